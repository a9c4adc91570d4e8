// Entry points of the CUDA kernels of sums over rows, for register_cuda*.cpp.
#pragma once
#include "arch/launch.cuh"
#include "reduce/cuda.h"

namespace bigmodel::cuda {

// How many rows a part is of.
int column_part_size(int rows, int columns, int multiprocessors);
void column_parts(const ColumnPartsParams& params, bool is_bfloat16, const Stream& stream);
void sum_parts(const SumPartsParams& params, bool is_bfloat16, const Stream& stream);

}  // namespace bigmodel::cuda
