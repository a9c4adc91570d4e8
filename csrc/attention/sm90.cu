// The table of the sm_90a attention kernels: element type, head_dim rounded up, short or general inner loop.
#include "attention/sm90.cuh"

#include "arch/launch.cuh"
#include "attention/launch.h"

namespace bigmodel::cuda {
namespace {

template <typename Kernel>
void start(const AttentionParams& p, const Stream& stream) {
  constexpr int panel = Kernel::QueryTile::panel_columns;
  const AttentionSm90Params params{p, query_map(p, p.query, p.query_stride, panel, Kernel::tile_m), key_map(p, p.key, p.key_stride, panel, Kernel::tile_n),
                                   key_map(p, p.value, p.value_stride, panel, Kernel::tile_n)};
  launch<Kernel>({(p.query_length + Kernel::tile_m - 1) / Kernel::tile_m, p.heads, p.batch}, params, stream);
}

using Start = void (*)(const AttentionParams&, const Stream&);
struct Row {
  int head_dim;
  Start start[2][2];  // [float16, bfloat16][short, general]
};
template <int D>
constexpr Row row{D,
                  {{start<AttentionSm90<float16, D, false>>, start<AttentionSm90<float16, D, true>>},
                   {start<AttentionSm90<bfloat16, D, false>>, start<AttentionSm90<bfloat16, D, true>>}}};
constexpr Row table[] = {row<32>, row<64>, row<96>, row<128>, row<192>, row<256>};

}  // namespace

void attention_sm90(const AttentionParams& p, bool is_bfloat16, const Stream& stream) {
  for (const Row& r : table)
    if (p.head_dim <= r.head_dim) return r.start[is_bfloat16][needs_general(p)](p, stream);
  throw std::runtime_error("head_dim: " + std::to_string(p.head_dim) + " must be at most 256");
}

}  // namespace bigmodel::cuda
