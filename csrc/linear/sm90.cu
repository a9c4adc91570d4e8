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
struct Form {
  int tile_m, tile_n, blocks;  // blocks that share a multiprocessor
  bool ping_pong;
  int (*tiles)(const LinearParams&);
  Start start[2];  // [float16, bfloat16]

  // Cycles from the first product to the last result, by what an H200 gives: products are as long as the tensor cores take for them
  // or L2 to bring the tiles, 45 bytes a cycle to each of 132 multiprocessors; the epilogue takes 24 for an element of each of 128
  // lanes, or 32 where one warp of each scheduler is alone with it. It comes on top of the products; with ping-pong only after the last
  // tile, unless it is the longer of the two: then a consumer's own tiles, one after the other, are all that there is.
  double cycles(const LinearParams& p, int multiprocessors) const {
    constexpr double multiplications = 2048, l2_bytes = 45;
    const double steps = (p.features + 63) / 64, elements = blocks * tile_m * tile_n;
    const double products = steps * std::max(elements * 64 / multiplications, blocks * (tile_m + tile_n) * 64 * 2 / l2_bytes);
    const double epilogue = elements / 128 * (ping_pong ? 32 : 24);
    const int at_once = multiprocessors * blocks, turns = (tiles(p) + at_once - 1) / at_once;
    if (!ping_pong || turns == 1) return turns * (products + epilogue);
    return turns * std::max(products, (products + epilogue) / 2) + epilogue;
  }
};
template <int tile_n, bool ping_pong = false>
constexpr Form form() {
  using Kernel = LinearSm90<bfloat16, tile_n, false, ping_pong>;
  return {Kernel::tile_m, tile_n, Kernel::blocks_per_multiprocessor, ping_pong, tile_count<Kernel::tile_m, tile_n>,
          {start_layout<float16, tile_n, ping_pong>, start_layout<bfloat16, tile_n, ping_pong>}};
}
constexpr Form table[] = {form<256>(), form<192>(), form<128>(), form<64>(), form<192, true>(), form<128, true>()};
static_assert(std::size(table) == linear_sm90_forms);

}  // namespace

int linear_sm90_form(const LinearParams& p, int multiprocessors) {
  const auto least = [&](const Form& a, const Form& b) { return a.cycles(p, multiprocessors) < b.cycles(p, multiprocessors); };
  return int(std::min_element(std::begin(table), std::end(table), least) - table);
}

void linear_sm90(const LinearParams& p, bool is_bfloat16, int form, int multiprocessors, const Stream& stream) {
  table[form].start[is_bfloat16](p, multiprocessors, stream);
}

}  // namespace bigmodel::cuda
