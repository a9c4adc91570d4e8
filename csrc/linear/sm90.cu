// The table of the sm_90a linear kernels: element type, width of a tile, layout of the weight.
#include "linear/sm90.cuh"

#include <algorithm>
#include <iterator>

#include "arch/launch.cuh"
#include "linear/launch.h"

namespace bigmodel::cuda {
namespace {

TensorMap matrix_map(const void* base, int64_t columns, int64_t rows, int64_t stride, int box_rows) {
  return tensor_map({base, {columns, rows, 1, 1}, {1, stride, 8, 8}, {64, box_rows, 1, 1}});
}

template <typename Kernel, bool conv1d>
void start(const LinearParams& p, int multiprocessors, const Stream& stream) {
  LinearSm90Params params{p, matrix_map(p.x, p.features, p.rows, p.x_stride, Kernel::tile_m), {}};
  for (int i = 0; i < p.weights; i++) {
    const int64_t out = p.out_features[i];
    params.weight[i] = conv1d ? matrix_map(p.weight[i], out, p.features, out, Kernel::tile_k)
                              : matrix_map(p.weight[i], p.features, out, p.features, Kernel::tile_n);
  }
  const int tiles = tile_count<Kernel::tile_m, Kernel::tile_n>(p);
  launch<Kernel>({std::min(tiles, multiprocessors * Kernel::blocks_per_multiprocessor)}, params, stream);
}

template <typename Element, int tile_n, bool ping_pong>
void start_layout(const LinearParams& p, int multiprocessors, const Stream& stream) {
  (p.conv1d ? start<LinearSm90<Element, tile_n, true, ping_pong>, true> : start<LinearSm90<Element, tile_n, false, ping_pong>, false>)(p, multiprocessors, stream);
}

using Start = void (*)(const LinearParams&, int, const Stream&);
struct Row {
  int (*tiles)(const LinearParams&);
  int blocks;       // that share a multiprocessor
  double time;      // of a tile of each, in units of one of 128 columns: a wide one reads x once for more columns
  Start start[2];   // [float16, bfloat16]
};
template <int tile_n, bool ping_pong = false>
constexpr Row row(double time) {
  using Kernel = LinearSm90<bfloat16, tile_n, false, ping_pong>;
  return {[](const LinearParams& p) { return tile_count<Kernel::tile_m, tile_n>(p); }, Kernel::blocks_per_multiprocessor, time,
          {start_layout<float16, tile_n, ping_pong>, start_layout<bfloat16, tile_n, ping_pong>}};
}
constexpr Row table[] = {row<256>(1.8), row<192>(1.4), row<128>(1), row<64>(0.7), row<128, true>(0.9), row<192, true>(1.3)};

}  // namespace

// The tile with which the multiprocessors are busy for the shortest time.
void linear_sm90(const LinearParams& p, bool is_bfloat16, int multiprocessors, const Stream& stream) {
  const auto waves = [&](const Row& r) { return double((r.tiles(p) + multiprocessors * r.blocks - 1) / (multiprocessors * r.blocks)) * r.time; };
  const Row& best = *std::min_element(std::begin(table), std::end(table), [&](const Row& a, const Row& b) { return waves(a) < waves(b); });
  best.start[is_bfloat16](p, multiprocessors, stream);
}

}  // namespace bigmodel::cuda
