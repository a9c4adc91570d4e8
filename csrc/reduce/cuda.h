// What the host gives the CUDA kernels of sums over rows, which the gradients of biases and of norms' weights end in.
//
//   rows    +---------+                     parts   +---------+
//   0..     | block 0 |  -->  part 0          0     |         |
//           +---------+                       1     |         |  -->  sum over the parts, in their order, rounded once
//   R..     | block 1 |  -->  part 1          2     |         |
//           +---------+                             +---------+
//              ...           float32
//
// Kernels that have rows in registers anyway make the parts themselves.
#pragma once
#include <cstdint>

#include "philox/cuda.h"

namespace bigmodel::cuda {

// The first stage of a matrix that no other kernel reads: sums of `rows_of_part` rows of dropout(x), and dropout(x) itself.
struct ColumnPartsParams {
  int32_t rows, columns;      // columns a multiple of 8; rows contiguous, from multiples of 16 bytes
  const void* x;
  int64_t x_stride;           // of a row, in elements, a multiple of 8
  ElementDropout dropout;
  void* out;                  // dropout(x), contiguous rows, or null
  int32_t rows_of_part;
  float* parts;               // (ceil(rows / rows_of_part), columns)
};

inline constexpr int max_sums = 8;  // in one launch

// The second stage, of several sums. The sum of no part is 0.
struct SumPartsParams {
  struct Sum {
    const float* parts;       // (count, columns)
    int64_t stride;           // from one part to the next
    int32_t count, columns;
    void* out;                // (columns,)
  };
  int32_t sums;
  Sum sum[max_sums];
};

}  // namespace bigmodel::cuda
