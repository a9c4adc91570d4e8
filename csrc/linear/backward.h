// What the backward passes of linear and feed_forward share: the two products of a linear layer's gradient.
#pragma once
#include "../gemm/product.h"
#include "../norm/backward.h"

namespace bigmodel::BIGMODEL_ISA {

// A weight W (k x n) as it lies, as the right side of dY W^T: panels of W^T (n x k), n being the depth.
template <class T>
static void pack_transposed_weight(const Runtime& runtime, const void* weight, WeightLayout layout, int64_t k, int64_t n, float* panels,
                                   int64_t steps, int64_t first_step) {
  const bool linear = layout == WeightLayout::linear;   // (n, k) in memory; conv1d: (k, n)
  const Stored<T> stored = {static_cast<const T*>(weight), linear ? k : n};
  pack_panels(runtime, {as_rows(stored), !linear}, n, k, panels, steps, first_step);
}

// dW of y = x W: in the "linear" layout dY^T x, in "conv1d" x^T dY. Both are given as (rows x columns) matrices.
template <class T>
static void weight_gradient(const Runtime& runtime, WeightLayout layout, const Rows& x, int64_t k, const Rows& y_grad, int64_t n, int64_t rows, T* out) {
  const bool linear = layout == WeightLayout::linear;
  const int64_t columns = linear ? k : n;
  float* panels = panel_memory(runtime, rows, columns);
  pack_panels(runtime, {linear ? x : y_grad, false}, rows, columns, panels, rows);
  product_into(runtime, {linear ? y_grad : x, true}, linear ? n : k, columns, rows, panels, out);
}

}  // namespace bigmodel::BIGMODEL_ISA
