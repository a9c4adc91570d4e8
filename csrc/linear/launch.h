// Entry points of the CUDA kernels of the linear layer, for register_cuda.cpp.
#pragma once
#include "linear/cuda.h"

namespace bigmodel::cuda {

struct Stream;
void linear_sm80(const LinearParams& params, bool is_bfloat16, const Stream& stream);

// Hopper's kernel has several forms, by number: 128 x 256, 192 and 128 of a tile and 64 x 64, then 128 x 192 and 128 in ping-pong.
inline constexpr int linear_sm90_forms = 6;
// The one that takes the least time, by sizes alone (no pointer is read).
int linear_sm90_form(const LinearParams& params, int multiprocessors);
void linear_sm90(const LinearParams& params, bool is_bfloat16, int form, int multiprocessors, const Stream& stream);

}  // namespace bigmodel::cuda
