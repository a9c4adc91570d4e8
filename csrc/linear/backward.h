// What the backward passes of linear and feed_forward share: the two products of a linear layer's gradient.
#pragma once
#include "../gemm/product.h"
#include "../norm/backward.h"

namespace bigmodel::BIGMODEL_ISA {

// W^T (n x k) as the right side of dY W^T, W being some weights (k x n_i) beside each other as they lie in memory.
template <class T>
struct TransposedWeights {
  const void* const* weights;
  const int64_t* n;
  int64_t count, k;
  WeightLayout layout;

  const T* weight(int64_t i) const { return static_cast<const T*>(weights[i]); }
  // "linear": a row of W^T lies as such. "conv1d": rows are those of W, each a piece of every weight.
  const float* get(int64_t row, int64_t column, int64_t length, float* buffer) const {
    if (layout == WeightLayout::linear) {
      int64_t i = 0;
      while (row >= n[i]) row -= n[i++];
      return Stored<T>{weight(i), k}.get(row, column, length, buffer);
    }
    int64_t i = 0;
    while (column >= n[i] && i + 1 < count) column -= n[i++];
    if (column + length <= n[i]) return Stored<T>{weight(i), n[i]}.get(row, column, length, buffer);
    for (int64_t done = 0; done < length; i++, column = 0) {
      const int64_t here = smaller(length - done, n[i] - column);
      add_row<T>(weight(i) + row * n[i] + column, nullptr, here, buffer + done);
      done += here;
    }
    return buffer;
  }
  Operand operand() const { return {as_rows(*this), layout != WeightLayout::linear}; }
};

// dW of y = x W: in the "linear" layout dY^T x, in "conv1d" x^T dY. Both are given as (rows x columns) matrices.
template <class T>
static void weight_gradient(const Runtime& runtime, WeightLayout layout, const Rows& x, int64_t k, const Rows& y_grad, int64_t n, int64_t rows, T* out) {
  const bool linear = layout == WeightLayout::linear;
  product_into(runtime, {linear ? y_grad : x, true}, linear ? n : k, {linear ? x : y_grad, false}, linear ? k : n, rows, out);
}

}  // namespace bigmodel::BIGMODEL_ISA
