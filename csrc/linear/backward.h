// What the backward passes of linear and feed_forward share: the two products of a linear layer's gradient.
#pragma once
#include "../norm/backward.h"
#include "weights.h"

namespace bigmodel::BIGMODEL_ISA {

// dW of y = x W: in the "linear" layout dY^T x, in "conv1d" x^T dY. Both are given as (rows x columns) matrices.
template <class T>
static void weight_gradient(const Runtime& runtime, WeightLayout layout, const Rows& x, int64_t k, const Rows& y_grad, int64_t n, int64_t rows, T* out) {
  const bool linear = layout == WeightLayout::linear;
  product_into(runtime, {linear ? y_grad : x, true}, linear ? n : k, {linear ? x : y_grad, false}, linear ? k : n, rows, out);
}

}  // namespace bigmodel::BIGMODEL_ISA
