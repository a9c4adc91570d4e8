// The table of the sm_90a attention backward in one pass: element type, head_dim rounded up.
#include "attention/sm90_one_pass.cuh"

#include "attention/launch.h"

namespace bigmodel::cuda {
namespace {

template <typename Element, int D>
void start(const AttentionBackwardParams& b, const Stream& stream) {
  using Pass = AttentionOnePassSm90<Element, D>;
  using Round = AttentionQueryGradRound<Element, D>;
  start_pass<Pass>(b, b.p.key_length, Pass::tile_n, b.p.kv_heads, stream);
  if (b.dq_sum != nullptr) launch<Round>({(b.p.query_length + Pass::tile_m - 1) / Pass::tile_m, b.p.heads, b.p.batch}, b, stream);
}

template <int D>
void start(const AttentionBackwardParams& b, bool is_bfloat16, const Stream& stream) {
  return is_bfloat16 ? start<bfloat16, D>(b, stream) : start<float16, D>(b, stream);
}

}  // namespace

void attention_backward_one_pass_sm90(const AttentionBackwardParams& b, bool is_bfloat16, const Stream& stream) {
  attention_delta(b, is_bfloat16, stream);
  switch (one_pass::columns(b.p.head_dim)) {
    case 32: return start<32>(b, is_bfloat16, stream);
    case 64: return start<64>(b, is_bfloat16, stream);
    default: return start<128>(b, is_bfloat16, stream);
  }
}

}  // namespace bigmodel::cuda
