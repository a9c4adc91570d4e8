// LayerNorm (Ba, Kiros and Hinton, 2016, arXiv:1607.06450) or RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467) of x + residual. It
// is bound by memory: a warp reads its row once, all of it at once, holds it in registers, and makes its passes there.
//
//           lane 0   lane 1  ...  lane 31   lane 0  ...
//   row   | 8 cols | 8 cols | ... | 8 cols | 8 cols | ...          `held` pieces to a lane
#pragma once
#include "arch/number.cuh"
#include "arch/warp.cuh"
#include "norm/cuda.h"

namespace bigmodel::cuda {

BM_DEVICE float add_lanes(float x) {
  BM_UNROLL
  for (int mask = 1; mask < warp_size; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}

// Rows of up to 256 * held columns; of longer ones the columns past that are read again in each pass.
template <typename Element, int held>
struct NormRows {
  using Params = NormParams;
  static constexpr int warps = 4, threads = warps * warp_size, blocks_per_multiprocessor = 1, shared_bytes = 0;

  static BM_DEVICE void run(const Params& p) {
    const int row = block_x() * warps + warp_index(), chunks = p.columns / 8;
    if (row >= p.rows) return;
    const int64_t start = int64_t(row) * p.columns;
    const auto piece_of = [&](const void* matrix, int chunk) { return reinterpret_cast<Word<16>*>(static_cast<Element*>(const_cast<void*>(matrix)) + start) + chunk; };
    const auto load = [&](float (&x)[8], int chunk) {
      unpack<Element>(x, load_global(piece_of(p.x, chunk)));
      if (p.residual == nullptr) return;
      float more[8];
      unpack<Element>(more, load_global(piece_of(p.residual, chunk)));
      BM_UNROLL
      for (int i = 0; i < 8; i++) x[i] += more[i];
    };
    float x[held][8];
    BM_UNROLL
    for (int h = 0; h < held; h++)
      if (lane_index() + warp_size * h < chunks) load(x[h], lane_index() + warp_size * h);
    // each(chunk, its eight elements)
    const auto for_each = [&](auto each) {
      BM_UNROLL
      for (int h = 0; h < held; h++)
        if (lane_index() + warp_size * h < chunks) each(lane_index() + warp_size * h, x[h]);
      for (int chunk = lane_index() + warp_size * held; chunk < chunks; chunk += warp_size) {
        float again[8];
        load(again, chunk);
        each(chunk, again);
      }
    };
    if (p.sum != nullptr) for_each([&](int chunk, const float (&v)[8]) { store_global(piece_of(p.sum, chunk), pack<Element>(v)); });

    // The mean, then the variance around it, so that a large mean costs no digits.
    const float over = 1 / float(p.columns);
    float mean = 0, squares = 0;
    if (!p.is_rms) {
      for_each([&](int, const float (&v)[8]) {
        BM_UNROLL
        for (int i = 0; i < 8; i++) mean += v[i];
      });
      mean = add_lanes(mean) * over;
    }
    for_each([&](int, const float (&v)[8]) {
      BM_UNROLL
      for (int i = 0; i < 8; i++) squares += (v[i] - mean) * (v[i] - mean);
    });
    const float scale = reciprocal_root(add_lanes(squares) * over + p.eps);
    for_each([&](int chunk, const float (&v)[8]) {
      float weight[8], bias[8] = {}, y[8];
      unpack<Element>(weight, load_global(static_cast<const Word<16>*>(p.weight) + chunk));
      if (p.bias != nullptr) unpack<Element>(bias, load_global(static_cast<const Word<16>*>(p.bias) + chunk));
      BM_UNROLL
      for (int i = 0; i < 8; i++) y[i] = (v[i] - mean) * scale * weight[i] + bias[i];
      store_global(piece_of(p.out, chunk), pack<Element>(y));
    });
  }
};

}  // namespace bigmodel::cuda
