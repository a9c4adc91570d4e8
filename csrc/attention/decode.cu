// The table of the decode kernels: element type and head_dim rounded up.
#include "attention/decode.cuh"

#include "arch/launch.cuh"
#include "attention/launch.h"

namespace bigmodel::cuda {
namespace {

template <typename Kernel>
void start(const DecodeParams& p, const Stream& stream) {
  const int64_t tiles = decode_tiles(1, 1, p.heads / p.kv_heads, p.query_length);
  launch<Kernel>({int(tiles * p.splits), p.kv_heads, p.batch}, p, stream);
}

using Start = void (*)(const DecodeParams&, const Stream&);
struct Row {
  int head_dim;
  Start start[2];  // [float16, bfloat16]
};
template <int D>
constexpr Row row{D, {start<AttentionDecode<float16, D>>, start<AttentionDecode<bfloat16, D>>}};
constexpr Row table[] = {row<32>, row<64>, row<96>, row<128>, row<192>, row<256>};

}  // namespace

void attention_decode(const DecodeParams& p, bool is_bfloat16, const Stream& stream) {
  for (const Row& r : table)
    if (p.head_dim <= r.head_dim) return r.start[is_bfloat16](p, stream);
  throw std::runtime_error("head_dim: " + std::to_string(p.head_dim) + " must be at most 256");
}

}  // namespace bigmodel::cuda
