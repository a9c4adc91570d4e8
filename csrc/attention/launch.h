// Entry points of the CUDA attention kernels, for register_cuda*.cpp.
#pragma once
#include "attention/cuda.h"

namespace bigmodel::cuda {

struct Stream;
void attention_sm80(const AttentionParams& params, bool is_bfloat16, const Stream& stream);
void attention_sm90(const AttentionParams& params, bool is_bfloat16, int multiprocessors, const Stream& stream);  // at least one key

void attention_decode(const DecodeParams& params, bool is_bfloat16, const Stream& stream);  // sm_80 and later

void attention_delta(const AttentionBackwardParams& params, bool is_bfloat16, const Stream& stream);  // sm_80 and later
void attention_backward_sm80(const AttentionBackwardParams& params, bool is_bfloat16, const Stream& stream);
void attention_backward_sm90(const AttentionBackwardParams& params, bool is_bfloat16, const Stream& stream);  // at least one query and one key
void attention_backward_one_pass_sm90(const AttentionBackwardParams& params, bool is_bfloat16, const Stream& stream);  // and what one_pass::supports

}  // namespace bigmodel::cuda
