// What the host gives the CUDA kernels of the linear layer: y = dropout(activation(x W^T + b)) + residual. Or, in the backward of a
// feed-forward block, y = x W^T activation'(Z), where x is the gradient of its output and Z what its activation was given.
#pragma once
#include <cstdint>

#include "philox/cuda.h"

namespace bigmodel::cuda {

enum class Activation : int32_t { none, gelu, gelu_tanh, quick_gelu, relu, silu };

inline constexpr int column_part_rows = 16;  // that a partial sum of a column is over
inline constexpr int max_weights = 4;  // side by side in one product, as for Q, K and V

struct LinearParams {
  int32_t rows, features;                 // x is (rows, features), contiguous rows, features a multiple of 8
  const void* x;
  int64_t x_stride;                       // of a row, in elements, a multiple of 8
  int32_t weights;                        // how many
  int32_t out_features[max_weights];      // of each, a multiple of 8
  const void* weight[max_weights];        // (out, in), or (in, out) where `conv1d`
  const void* bias[max_weights];          // (out,), or all null
  int32_t conv1d;
  Activation activation;
  ElementDropout dropout;                 // only with one weight, whose tiles start at multiples of 32
  const void* residual;                   // (rows, sum of out), or null
  void* preactivation;                    // the same, to be written, or null
  const void* activated;                  // Z, the same, or null: then there is no bias, dropout, residual or preactivation
  void* hidden;                           // activation(Z), the same, to be written, or null
  float* column_parts;                    // (ceil(rows / column_part_rows), sum of out), sums of so many rows of y, or null
  void* out;                              // (rows, sum of out)
  int64_t out_stride;                     // of a row of all these
};

}  // namespace bigmodel::cuda
