// What the host gives the CUDA kernels of LayerNorm and RMSNorm: norm(x + residual), row by row, and the gradient of
// norm(dropout(x) + residual).
#pragma once
#include <cstdint>

#include "philox/cuda.h"

namespace bigmodel::cuda {

struct NormParams {
  int32_t rows, columns;      // columns a multiple of 8; all rows are contiguous and start at multiples of 16 bytes
  const void *x, *residual;   // residual: or null
  void* sum;                  // x + residual, rounded, or null
  const void *weight, *bias;  // (columns,); bias: or null
  int32_t is_rms;
  float eps;
  void* out;
};

// The backward holds rows of up to so many columns.
inline constexpr int max_norm_backward_columns = 4096;

struct NormBackwardParams {
  int32_t rows, columns;        // as above
  const void *grad, *more_grad; // of the norm's result: the sum of both; more_grad: or null
  const void *x, *residual;     // what the norm was of: dropout(x) + residual, or x itself where it is `summed`; residual: or null
  int32_t summed;
  const void* beside;           // what came to what the norm was of by another way, and joins its gradient; or null
  const void* weight;           // (columns,), or null
  float weight_offset, eps;
  int32_t is_rms;
  ElementDropout dropout;
  void* dtotal;                 // the gradient of what the norm was of, or null
  void* dx;                     // the same after dropout's own, or null
  // Sums over the rows of a block: of the gradients of weight and bias, and of dx. Of the first block; or null.
  float *weight_parts, *bias_parts, *dx_parts;
  int64_t parts_stride;         // from one block to the next
};

}  // namespace bigmodel::cuda
