// The norm of rows, and its gradient, on a GPU of sm_80 or later.
#pragma once
#include "arch/launch.cuh"
#include "norm/cuda.h"

namespace bigmodel::cuda {

void norm_rows(const NormParams& p, bool is_bfloat16, const Stream& stream);

// How many blocks the backward has, and so many parts its sums. There is a row.
int norm_backward_blocks(int rows, int columns, int multiprocessors);
void norm_backward_rows(const NormBackwardParams& p, bool is_bfloat16, int blocks, const Stream& stream);

}  // namespace bigmodel::cuda
