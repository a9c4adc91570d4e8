// What the host gives the CUDA kernel of LayerNorm and RMSNorm: norm(x + residual), row by row.
#pragma once
#include <cstdint>

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

}  // namespace bigmodel::cuda
