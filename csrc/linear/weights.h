// Weights that are not packed: as they lie, the right side of a product.
#pragma once
#include "../arch/rows.h"
#include "../gemm/product.h"

namespace bigmodel::BIGMODEL_ISA {

// W (k x n), some weights (k x n_i) beside each other as they lie in memory, as the right side of x W or of dy W^T.
template <class T>
struct Weights {
  static constexpr int parts = parts_of_stored<T>;
  const void* const* weights;
  const int64_t* n;
  int64_t count, k;
  WeightLayout layout;

  const T* weight(int64_t i) const { return static_cast<const T*>(weights[i]); }
  // "linear": rows are those of W^T. "conv1d": those of W, each a piece of every weight.
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
  // Those of a row that lie side by side.
  const T* stored(int64_t row, int64_t column, int64_t length) const requires __is_same(T, bf16) {
    const bool linear = layout == WeightLayout::linear;
    int64_t& place = linear ? row : column;
    int64_t i = 0;
    while (place >= n[i] && i + 1 < count) place -= n[i++];
    if (linear) return weight(i) + row * k + column;
    return column + length <= n[i] ? weight(i) + row * n[i] + column : nullptr;
  }
  Operand operand() const { return {as_rows(*this), layout == WeightLayout::linear}; }
  Operand transpose() const { return {as_rows(*this), layout != WeightLayout::linear}; }
};

}  // namespace bigmodel::BIGMODEL_ISA
