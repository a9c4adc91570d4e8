// LayerNorm or RMSNorm of the rows that the linear layer writes, in the same launch. A tile has only a part of a row's columns; each
// counts one when it is written, and whoever counts last finds the rows whole, and still in L2.
//
//                tile_n
//              +--------+--------+--------+
//   panel rows | 1st    | 3rd    | 2nd    |   whose threads count 3rd normalise the panel
//              +--------+--------+--------+
#pragma once
#include "arch/number.cuh"
#include "arch/warp.cuh"
#include "linear/cuda.h"
#include "linear/epilogue.cuh"

namespace bigmodel::cuda {

template <int count>
BM_DEVICE void add_lanes(float (&x)[count]) {
  BM_UNROLL
  for (int mask = 1; mask < warp_size; mask *= 2)
    BM_UNROLL
    for (int i = 0; i < count; i++) x[i] += shuffle_xor(x[i], mask);
}

// By one warp: `rows_at_once` rows from `row`, of those before `end`, so that the loads of one hide those of the others. The mean, then
// the variance around it (so that a large mean costs no digits), then the result. Rows of up to 256 * `held` columns are read once and stay
// in registers; the columns of longer ones past that are read again each time.
template <typename Element, int rows_at_once, int held>
BM_DEVICE void normalise_rows(const LinearParams& p, int row, int end) {
  const int columns = int(p.out_stride), chunks = columns / 8;
  const float over = 1 / float(columns);
  float mean[rows_at_once] = {}, scale[rows_at_once] = {};
  Word<16> word[rows_at_once][held];
  const auto load = [&](int r, int chunk) {
    if (row + r >= end || chunk >= chunks) return Word<16>{};
    return load_global(reinterpret_cast<const Word<16>*>(static_cast<const Element*>(p.out) + (row + r) * p.out_stride + chunk * 8));
  };
  BM_UNROLL
  for (int h = 0; h < held; h++)
    BM_UNROLL
    for (int r = 0; r < rows_at_once; r++) word[r][h] = load(r, lane_index() + warp_size * h);
  // each(row of the few, chunk, its eight elements)
  const auto for_each = [&](auto each) {
    const auto unpacked = [&](int r, int chunk, const Word<16>& from) {
      float x[8];
      unpack<Element>(x, from);
      each(r, chunk, x);
    };
    BM_UNROLL
    for (int h = 0; h < held; h++)
      if (lane_index() + warp_size * h < chunks) {
        BM_UNROLL
        for (int r = 0; r < rows_at_once; r++) unpacked(r, lane_index() + warp_size * h, word[r][h]);
      }
    for (int chunk = lane_index() + warp_size * held; chunk < chunks; chunk += warp_size)
      for (int r = 0; r < rows_at_once; r++) unpacked(r, chunk, load(r, chunk));
  };
  if (!p.norm_is_rms) {
    for_each([&](int r, int, const float (&x)[8]) {
      BM_UNROLL
      for (int i = 0; i < 8; i++) mean[r] += x[i];
    });
    add_lanes(mean);
    for (float& m : mean) m *= over;
  }
  for_each([&](int r, int, const float (&x)[8]) {
    BM_UNROLL
    for (int i = 0; i < 8; i++) scale[r] += (x[i] - mean[r]) * (x[i] - mean[r]);
  });
  add_lanes(scale);
  for (float& s : scale) s = reciprocal_root(s * over + p.norm_eps);
  for_each([&](int r, int chunk, const float (&x)[8]) {
    if (row + r >= end) return;
    float weight[8], bias[8] = {}, y[8];
    unpack<Element>(weight, load_global(static_cast<const Word<16>*>(p.norm_weight) + chunk));
    if (p.norm_bias != nullptr) unpack<Element>(bias, load_global(static_cast<const Word<16>*>(p.norm_bias) + chunk));
    BM_UNROLL
    for (int i = 0; i < 8; i++) y[i] = (x[i] - mean[r]) * scale[r] * weight[i] + bias[i];
    store_global(reinterpret_cast<Word<16>*>(static_cast<Element*>(p.normalised) + (row + r) * p.out_stride + chunk * 8), pack<Element>(y));
  });
}

// By `warps` warps that have written a tile together; `wait` is their barrier, `arrival` four bytes of shared memory of theirs, and
// `warp` this one among them. The panel has rows from `row` to `end`, and `tiles` tiles.
template <typename Element, int warps, int rows_at_once, typename Wait>
BM_DEVICE void normalise_if_last(const LinearParams& p, int panel, int row, int end, int tiles, int warp, SharedAddress arrival, Wait wait) {
  if (p.norm_weight == nullptr) return;
  wait();  // so that the count below speaks for all of them
  if (warp == 0 && lane_index() == 0) store_shared(arrival, count_global(p.counters + panel, uint32_t(tiles - 1)));
  wait();
  if (load_shared<uint32_t>(arrival) != uint32_t(tiles - 1)) return;
  constexpr int held = 4;
  BM_UNROLL_BY(1)
  for (int r = row + rows_at_once * warp; r < end; r += rows_at_once * warps) normalise_rows<Element, rows_at_once, held>(p, r, end);
}

}  // namespace bigmodel::cuda
