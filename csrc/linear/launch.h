// Entry points of the CUDA kernels of the linear layer, for register_cuda.cpp.
#pragma once
#include "linear/cuda.h"

namespace bigmodel::cuda {

struct Stream;
void linear_sm80(const LinearParams& params, bool is_bfloat16, const Stream& stream);
void linear_sm90(const LinearParams& params, bool is_bfloat16, int multiprocessors, const Stream& stream);

}  // namespace bigmodel::cuda
