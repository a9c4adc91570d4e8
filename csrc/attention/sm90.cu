// The table of the sm_90a attention kernels: element type, head_dim rounded up, short or general inner loop.
#include "attention/sm90.cuh"

#include <algorithm>

#include "arch/launch.cuh"
#include "attention/launch.h"

namespace bigmodel::cuda {
namespace {

template <typename Kernel>
void start_with(const AttentionParams& p, int multiprocessors, const Stream& stream) {
  constexpr int panel = Kernel::QueryTile::panel_columns;
  const int64_t tiles = tile_bound(p, Kernel::tile_m);
  if (tiles == 0) return;
  if (tiles >= int64_t(1) << 30) throw std::runtime_error("query: " + std::to_string(tiles) + " tiles are more than the kernel counts");
  const AttentionSm90Params params{p, query_map(p, p.query, p.query_stride, panel, Kernel::tile_m), key_map(p, p.key, p.key_stride, panel, Kernel::tile_n),
                                   key_map(p, p.value, p.value_stride, panel, Kernel::tile_n)};
  launch<Kernel>({int(std::min<int64_t>(tiles, multiprocessors))}, params, stream);
}

// Up to head_dim 64 three consumers fit, of 192 rows together; short sequences leave fewer rows empty with two.
template <typename Element, int D, bool General>
void start(const AttentionParams& p, int multiprocessors, const Stream& stream) {
  using Two = AttentionSm90<Element, D, General>;
  if constexpr (D <= 64 && !General) {
    using Three = AttentionSm90<Element, D, General, 3>;
    const auto rows = [&p](int tile_m) { return (p.query_length + tile_m - 1) / tile_m * tile_m; };
    if (rows(Three::tile_m) * 9 < rows(Two::tile_m) * 10) return start_with<Three>(p, multiprocessors, stream);
  }
  start_with<Two>(p, multiprocessors, stream);
}

using Start = void (*)(const AttentionParams&, int, const Stream&);
struct Row {
  int head_dim;
  Start start[2][2];  // [float16, bfloat16][short, general]
};
template <int D>
constexpr Row row{D,
                  {{start<float16, D, false>, start<float16, D, true>}, {start<bfloat16, D, false>, start<bfloat16, D, true>}}};
constexpr Row table[] = {row<32>, row<64>, row<96>, row<128>, row<192>, row<256>};

}  // namespace

void attention_sm90(const AttentionParams& p, bool is_bfloat16, int multiprocessors, const Stream& stream) {
  for (const Row& r : table)
    if (p.head_dim <= r.head_dim) return r.start[is_bfloat16][needs_general(p)](p, multiprocessors, stream);
  throw std::runtime_error("head_dim: " + std::to_string(p.head_dim) + " must be at most 256");
}

}  // namespace bigmodel::cuda
