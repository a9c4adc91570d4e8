// The table of the sm_90a attention kernels: element type, head_dim rounded up, short or general inner loop.
#include "attention/sm90.cuh"

#include "arch/launch.cuh"
#include "attention/launch.h"

namespace bigmodel::cuda {
namespace {

// The map of query, key or value, of which one copy brings `rows` rows of one panel.
TensorMap map_of(const void* base, int64_t head_dim, int64_t rows, int64_t heads, int64_t batch, const int64_t (&stride)[3], int panel_columns, int box_rows) {
  TensorMapArgs a{base, {head_dim, rows, heads, batch}, {1, stride[2], stride[1], stride[0]}, {panel_columns, box_rows, 1, 1}};
  for (int i = 1; i < 4; i++)
    if (a.size[i] == 1) a.stride[i] = 8;  // never used, and perhaps not one that a map may have
  return tensor_map(a);
}

template <typename Kernel>
void start(const AttentionParams& p, const Stream& stream) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t batch = packed ? 1 : p.batch;
  constexpr int panel = Kernel::QueryTile::panel_columns;
  const AttentionSm90Params params{
      p, map_of(p.query, p.head_dim, packed ? p.total_queries : p.query_length, p.heads, batch, p.query_stride, panel, Kernel::tile_m),
      map_of(p.key, p.head_dim, packed ? p.total_keys : p.key_length, p.kv_heads, batch, p.key_stride, panel, Kernel::tile_n),
      map_of(p.value, p.head_dim, packed ? p.total_keys : p.key_length, p.kv_heads, batch, p.value_stride, panel, Kernel::tile_n)};
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
