// What the host gives the CUDA kernels of the linear layer: y = dropout(activation(x W^T + b)) + residual.
#pragma once
#include <cstdint>

namespace bigmodel::cuda {

enum class Activation : int32_t { none, gelu, gelu_tanh, quick_gelu, relu, silu };

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
  const int64_t* dropout_seed;            // or null; only with one weight
  uint32_t dropout_threshold;
  float dropout_scale;
  const void* residual;                   // (rows, sum of out), or null
  void* preactivation;                    // the same, to be written, or null
  void* out;                              // the same
  int64_t out_stride;                     // of a row of the three
};

}  // namespace bigmodel::cuda
