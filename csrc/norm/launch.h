// The norm of rows on a GPU of sm_80 or later.
#pragma once
#include "arch/launch.cuh"
#include "norm/cuda.h"

namespace bigmodel::cuda {

void norm_rows(const NormParams& p, bool is_bfloat16, const Stream& stream);

}  // namespace bigmodel::cuda
