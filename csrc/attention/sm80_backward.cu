// The table of the sm_80 attention backward: element type, head_dim rounded up, short or general inner loop.
#include "attention/sm80_backward.cuh"

#include "arch/launch.cuh"
#include "attention/launch.h"

namespace bigmodel::cuda {
namespace {

int tiles(int length, int tile) { return (length + tile - 1) / tile; }

template <typename Element, int D, bool General>
void start(const AttentionBackwardParams& params, const Stream& stream) {
  using KeyValueGrad = AttentionKeyValueGradSm80<Element, D, General>;
  using QueryGrad = AttentionQueryGradSm80<Element, D, General>;
  const AttentionParams& p = params.p;
  if (p.key_length > 0) launch<KeyValueGrad>({tiles(p.key_length, KeyValueGrad::tile_n), p.kv_heads, p.batch}, params, stream);
  if (p.query_length > 0) launch<QueryGrad>({tiles(p.query_length, QueryGrad::tile_m), p.heads, p.batch}, params, stream);
}

using Start = void (*)(const AttentionBackwardParams&, const Stream&);
struct Row {
  int head_dim;
  Start start[2][2];  // [float16, bfloat16][short, general]
};
template <int D>
constexpr Row row{D, {{start<float16, D, false>, start<float16, D, true>}, {start<bfloat16, D, false>, start<bfloat16, D, true>}}};
constexpr Row table[] = {row<32>, row<64>, row<96>, row<128>, row<192>, row<256>};

template <typename Element, int lanes>
void start_delta(const AttentionBackwardParams& params, const Stream& stream) {
  using Delta = AttentionDelta<Element, lanes>;
  launch<Delta>({tiles(params.p.query_length, Delta::rows), params.p.heads, params.p.batch}, params, stream);
}
template <typename Element>
void start_delta(const AttentionBackwardParams& params, const Stream& stream) {
  const int head_dim = params.p.head_dim;
  (head_dim <= 64 ? start_delta<Element, 8> : head_dim <= 128 ? start_delta<Element, 16> : start_delta<Element, 32>)(params, stream);
}

}  // namespace

void attention_delta(const AttentionBackwardParams& params, bool is_bfloat16, const Stream& stream) {
  if (params.p.query_length > 0) is_bfloat16 ? start_delta<bfloat16>(params, stream) : start_delta<float16>(params, stream);
}

void attention_backward_sm80(const AttentionBackwardParams& params, bool is_bfloat16, const Stream& stream) {
  attention_delta(params, is_bfloat16, stream);
  for (const Row& r : table)
    if (params.p.head_dim <= r.head_dim) return r.start[is_bfloat16][needs_general(params.p)](params, stream);
  throw std::runtime_error("head_dim: " + std::to_string(params.p.head_dim) + " must be at most 256");
}

}  // namespace bigmodel::cuda
