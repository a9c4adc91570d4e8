// Entry points of the CUDA kernels of the linear layer, for register_cuda*.cpp.
#pragma once
#include "linear/cuda.h"

namespace bigmodel::cuda {

struct Stream;
// Up to so many rows: the kernel for few, on every GPU.
inline constexpr int most_few_rows = 32;
void linear_few_rows(const LinearParams& params, bool is_bfloat16, const Stream& stream);

void linear_sm80(const LinearParams& params, bool is_bfloat16, const Stream& stream);

// Hopper's kernel has several forms, by number: 128 x 128 of a tile, 64 x 64, and 128 x 128 in ping-pong.
inline constexpr int linear_sm90_forms = 3;
// The one that takes the least time, by sizes alone (no pointer is read).
int linear_sm90_form(const LinearParams& params, int multiprocessors);
void linear_sm90(const LinearParams& params, bool is_bfloat16, int form, int multiprocessors, const Stream& stream);

}  // namespace bigmodel::cuda
