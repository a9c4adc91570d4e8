// The table of the sm_90a attention backward: element type, head_dim rounded up, short or general inner loop.
#include "attention/sm90_backward.cuh"

#include "attention/launch.h"

namespace bigmodel::cuda {
namespace {

template <template <typename, int, bool> typename KeyValueGrad, typename Element, int D, bool General>
void start(const AttentionBackwardParams& b, const Stream& stream) {
  using First = KeyValueGrad<Element, D, General>;
  using Second = AttentionQueryGradSm90<Element, D, General>;
  start_pass<First>(b, b.p.key_length, First::tile_n, b.p.kv_heads, stream);
  start_pass<Second>(b, b.p.query_length, Second::tile_m, b.p.heads, stream);
}

using Start = void (*)(const AttentionBackwardParams&, const Stream&);
struct Row {
  int head_dim;
  Start start[2][2];  // [float16, bfloat16][short, general]
};
template <int D, template <typename, int, bool> typename KeyValueGrad>
constexpr Row row{D,
                  {{start<KeyValueGrad, float16, D, false>, start<KeyValueGrad, float16, D, true>},
                   {start<KeyValueGrad, bfloat16, D, false>, start<KeyValueGrad, bfloat16, D, true>}}};
constexpr Row table[] = {row<32, AttentionKeyValueGradSm90>,      row<64, AttentionKeyValueGradSm90>,
                         row<96, AttentionKeyValueGradSm90>,      row<128, AttentionKeyValueGradSm90>,
                         row<192, AttentionWideKeyValueGradSm90>, row<256, AttentionWideKeyValueGradSm90>};

}  // namespace

void attention_backward_sm90(const AttentionBackwardParams& b, bool is_bfloat16, const Stream& stream) {
  attention_delta(b, is_bfloat16, stream);
  for (const Row& r : table)
    if (b.p.head_dim <= r.head_dim) return r.start[is_bfloat16][needs_general(b.p)](b, stream);
  throw std::runtime_error("head_dim: " + std::to_string(b.p.head_dim) + " must be at most 256");
}

}  // namespace bigmodel::cuda
