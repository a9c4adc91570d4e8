// The linear layer for few rows of x, on sm_80 and later: nearly all that is read is W, once, and what counts is that all of it is on its
// way at the same time. Tiles are of 16 rows and 32 columns, so that W is spread over many multiprocessors; the warps of a block share out
// the features, and their sums meet in shared memory.
//
// Fragments of mma.sync come from global memory straight to registers, 16 bytes of a row of x to a lane. The order of the features within
// a product is free, if it is the same for both sides, and so is that of the columns: lane 4 g + t takes features 8 t to 8 t + 7 of 32,
// the first four for one product and the rest for the next, and
//
//   W (out, in)    of columns g, g + 8, g + 16 and g + 24, where they are neighbours in memory
//   W (in, out)    of columns 4 g to 4 g + 3, four neighbours of each feature
#pragma once
#include "arch/mma_sync.cuh"
#include "linear/epilogue.cuh"

namespace bigmodel::cuda {

template <typename Element, bool conv1d>
struct LinearFewRows {
  using Params = LinearParams;
  static constexpr int warps = 8, threads = warps * warp_size, blocks_per_multiprocessor = 1;
  static constexpr int tile_m = 16, tile_n = 32, blocks = tile_n / 8, chunk = 32;  // chunk: features
  static constexpr int in_flight = 4;  // chunks, of a warp
  // A warp's sums, float32. Of rows that are so far apart, four that are written together lie in different banks.
  static constexpr int row_bytes = (tile_n + 8) * 4, sum_bytes = tile_m * row_bytes, shared_bytes = warps * sum_bytes;
  static_assert(StagingTile::bytes <= shared_bytes, "the results on their way out fit where the sums were");

  struct Chunk {
    Word<16> x[2];         // of rows g and g + 8
    uint32_t weight[16];   // (out, in): four of each column; (in, out): two, of four columns, of each feature

    BM_DEVICE void load(const Params& p, const Element* w, int out, int row, int column, int features) {
      const int g = lane_index() / 4, first = features + lane_index() % 4 * 8;
      const bool inside = first < p.features;  // all eight, or none
      BM_UNROLL
      for (int i = 0; i < 2; i++) {
        const bool valid = inside && row + g + 8 * i < p.rows;
        x[i] = valid ? load_global(reinterpret_cast<const Word<16>*>(static_cast<const Element*>(p.x) + (row + g + 8 * i) * p.x_stride + first)) : Word<16>{};
      }
      if constexpr (conv1d) {
        const bool valid = inside && column + 4 * g < out;
        BM_UNROLL
        for (int i = 0; i < 8; i++) {
          const Word<8> word = valid ? load_global(reinterpret_cast<const Word<8>*>(w + int64_t(first + i) * out + column + 4 * g)) : Word<8>{};
          memcpy(weight + 2 * i, &word, 8);
        }
      } else {
        BM_UNROLL
        for (int i = 0; i < 4; i++) {
          const bool valid = inside && column + 8 * i + g < out;
          const Word<16> word = valid ? load_global(reinterpret_cast<const Word<16>*>(w + int64_t(column + 8 * i + g) * p.features + first)) : Word<16>{};
          memcpy(weight + 4 * i, &word, 16);
        }
      }
    }

    // Two features, pair 0 or 1 of product `step`, of block j's column.
    BM_DEVICE uint32_t right(int step, int j, int pair) const {
      if constexpr (conv1d) {
        const int feature = 4 * step + 2 * pair;
        const uint32_t first = weight[2 * feature + j / 2], second = weight[2 * feature + 2 + j / 2];
        return j % 2 == 0 ? (first & 0xffff) | second << 16 : first >> 16 | (second & 0xffff0000);
      } else {
        return weight[4 * j + 2 * step + pair];
      }
    }

    BM_DEVICE void multiply(float (&c)[blocks][4]) const {
      BM_UNROLL
      for (int step = 0; step < 2; step++) {
        const uint32_t a[4] = {x[0].value[2 * step], x[1].value[2 * step], x[0].value[2 * step + 1], x[1].value[2 * step + 1]};
        BM_UNROLL
        for (int j = 0; j < blocks; j++) {
          const uint32_t b[2] = {right(step, j, 0), right(step, j, 1)};
          mma_m16n8k16<Element>(c[j], a, b);
        }
      }
    }
  };

  static BM_DEVICE void run(const Params& p) {
    const TilePlace at = place_of<tile_m, tile_n>(p, block_x());
    const Element* weight = static_cast<const Element*>(p.weight[at.weight]);
    const int out = p.out_features[at.weight], warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    constexpr int piece = StagingTile::columns / 8;  // of which this tile has the first half
    float c[1][piece][4] = {}, sums[blocks][4] = {};
    for (int k = warp * chunk; k < p.features; k += warps * in_flight * chunk) {
      Chunk chunks[in_flight];
      BM_UNROLL
      for (int i = 0; i < in_flight; i++) chunks[i].load(p, weight, out, at.row, at.column, k + i * warps * chunk);
      BM_UNROLL
      for (int i = 0; i < in_flight; i++) chunks[i].multiply(sums);
    }
    // ---- the warps' sums meet ----
    const SharedAddress shared = shared_start(), own = shared + warp * sum_bytes + g * row_bytes;
    BM_UNROLL
    for (int j = 0; j < blocks; j++)
      BM_UNROLL
      for (int e = 0; e < 4; e++) {
        const int n = 2 * t + e % 2, column = conv1d ? 4 * n + j : 8 * j + n;
        store_shared(own + e / 2 * 8 * row_bytes + column * 4, sums[j][e]);
      }
    sync_block();
    if (warp > 0) return;
    BM_UNROLL_BY(2)
    for (int w = 0; w < warps; w++)
      BM_UNROLL
      for (int j = 0; j < blocks; j++)
        BM_UNROLL
        for (int r = 0; r < 2; r++) {
          const Word<8> word = load_shared<Word<8>>(shared + w * sum_bytes + (g + 8 * r) * row_bytes + (8 * j + 2 * t) * 4);
          float pair[2];
          memcpy(pair, &word, 8);
          c[0][j][2 * r] += pair[0];
          c[0][j][2 * r + 1] += pair[1];
        }
    const Element* bias = static_cast<const Element*>(p.bias[at.weight]);
    const int end = at.column + tile_n < out ? at.column + tile_n : out;
    finish_tile<Element, 4, tile_m>(c, p, at.row, at.out_column + at.column, at.out_column + end, bias != nullptr ? bias + at.column : nullptr, shared);
  }
};

}  // namespace bigmodel::cuda
