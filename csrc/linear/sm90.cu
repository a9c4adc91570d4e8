// The table of the sm_90a linear kernels: element type, width of a tile, layout of the weight.
#include "linear/sm90.cuh"

#include <algorithm>

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
  launch<Kernel>({std::min(tiles, multiprocessors)}, params, stream);
}

template <typename Element, int tile_n, bool conv1d>
constexpr auto entry = start<LinearSm90<Element, tile_n, conv1d>, conv1d>;
constexpr void (*table[2][2][2])(const LinearParams&, int, const Stream&) = {  // [float16, bfloat16][128, 256][linear, conv1d]
    {{entry<float16, 128, false>, entry<float16, 128, true>}, {entry<float16, 256, false>, entry<float16, 256, true>}},
    {{entry<bfloat16, 128, false>, entry<bfloat16, 128, true>}, {entry<bfloat16, 256, false>, entry<bfloat16, 256, true>}}};

// How long the multiprocessors are busy, in units of a tile of 128 columns: a wide tile takes 1.8 of it, because it reads x once.
double waves(const LinearParams& p, int multiprocessors, bool wide) {
  const int tiles = wide ? tile_count<128, 256>(p) : tile_count<128, 128>(p);
  return (tiles + multiprocessors - 1) / multiprocessors * (wide ? 1.8 : 1.0);
}

}  // namespace

void linear_sm90(const LinearParams& p, bool is_bfloat16, int multiprocessors, const Stream& stream) {
  const bool wide = waves(p, multiprocessors, true) <= waves(p, multiprocessors, false);
  table[is_bfloat16][wide][p.conv1d](p, multiprocessors, stream);
}

}  // namespace bigmodel::cuda
