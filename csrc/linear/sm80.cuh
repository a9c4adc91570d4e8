// The linear layer for tensor cores of sm_80 and later: tiles of x and W by cp.async in four stages, products by mma.sync. W lies
// (out, in), or (in, out) as GPT-2's Conv1D has it, and is then turned by ldmatrix.
//
//             out features (tile_n)
//            +---------+---------+     Eight warps: 4 rows of 32 and 2 columns of 64. For 32 features at a time a stage of
//   32 rows  | warp 0  | warp 1  |     x (tile_m x 32) and W (tile_n x 32) is multiplied while three others are on their way.
//   32 rows  |   ...   |   ...   |
//            +---------+---------+
#pragma once
#include "arch/cp_async.cuh"
#include "arch/ldmatrix.cuh"
#include "arch/mma_sync.cuh"
#include "arch/swizzle.cuh"
#include "linear/epilogue.cuh"

namespace bigmodel::cuda {

template <typename Element, bool conv1d>
struct LinearSm80 {
  using Params = LinearParams;
  static constexpr int warps = 8, threads = warps * warp_size, blocks_per_multiprocessor = 1;
  static constexpr int tile_m = 128, tile_n = 128, tile_k = 32, stages = 4;
  static constexpr int warp_n = 64, blocks = warp_n / 8;
  using InputTile = SwizzledTile<tile_m, tile_k>;
  using WeightTile = SwizzledTile<conv1d ? tile_k : tile_n, conv1d ? tile_n : tile_k>;
  static constexpr int stage_bytes = InputTile::bytes + WeightTile::bytes, shared_bytes = stages * stage_bytes;
  static_assert(warps * StagingTile::bytes <= stages * stage_bytes, "the results on their way out fit where the stages were");

  // Zeros past the matrix's end.
  template <typename Tile>
  static BM_DEVICE void load(SharedAddress tile, const Element* matrix, int64_t stride, int row, int rows, int column, int columns) {
    BM_UNROLL
    for (int i = thread_index(); i < Tile::rows * Tile::row_chunks; i += threads) {
      const int r = i / Tile::row_chunks, c = i % Tile::row_chunks;
      const bool valid = row + r < rows && column + 8 * c < columns;
      copy_async_16(tile + Tile::offset(r, c), valid ? matrix + (row + r) * stride + column + 8 * c : matrix, valid);
    }
  }

  static BM_DEVICE void run(const Params& p) {
    const TilePlace at = place_of<tile_m, tile_n>(p, block_x());
    const Element* weight = static_cast<const Element*>(p.weight[at.weight]);
    const int out = p.out_features[at.weight], steps = (p.features + tile_k - 1) / tile_k;
    const SharedAddress shared = shared_start();
    const int warp = warp_index(), lane = lane_index(), warp_row = warp / 2 * 32, warp_column = warp % 2 * warp_n;
    const auto load_step = [&](int step) {
      const SharedAddress stage = shared + step % stages * stage_bytes;
      const int k = step * tile_k;
      load<InputTile>(stage, static_cast<const Element*>(p.x), p.x_stride, at.row, p.rows, k, p.features);
      if constexpr (conv1d)
        load<WeightTile>(stage + InputTile::bytes, weight, out, k, p.features, at.column, out);
      else
        load<WeightTile>(stage + InputTile::bytes, weight, p.features, at.column, out, k, p.features);
    };
    for (int step = 0; step < stages - 1; step++) {
      if (step < steps) load_step(step);
      copy_async_commit();
    }
    float c[2][blocks][4];
    BM_UNROLL
    for (int i = 0; i < 2; i++)
      BM_UNROLL
      for (int j = 0; j < blocks; j++)
        BM_UNROLL
        for (int e = 0; e < 4; e++) c[i][j][e] = 0;
    for (int step = 0; step < steps; step++) {
      copy_async_wait<stages - 2>();
      sync_block();  // this stage has arrived, and nobody reads the one before any more
      if (step + stages - 1 < steps) load_step(step + stages - 1);
      copy_async_commit();
      const SharedAddress x = shared + step % stages * stage_bytes, w = x + InputTile::bytes;
      BM_UNROLL
      for (int k = 0; k < tile_k / 16; k++) {
        uint32_t a[2][4];
        BM_UNROLL
        for (int i = 0; i < 2; i++) ldmatrix(a[i], x + InputTile::offset(warp_row + 16 * i + lane % 16, 2 * k + lane / 16));
        BM_UNROLL
        for (int j = 0; j < blocks; j += 2) {
          uint32_t b[4];
          if constexpr (conv1d)
            ldmatrix_transposed(b, w + WeightTile::offset(16 * k + lane % 16, warp_column / 8 + j + lane / 16));
          else
            ldmatrix(b, w + WeightTile::offset(warp_column + 8 * j + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
          const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
          BM_UNROLL
          for (int i = 0; i < 2; i++) {
            mma_m16n8k16<Element>(c[i][j], a[i], low);
            mma_m16n8k16<Element>(c[i][j + 1], a[i], high);
          }
        }
      }
    }
    const Element* bias = static_cast<const Element*>(p.bias[at.weight]);
    copy_async_wait<0>();
    sync_block();  // nobody reads a stage any more: there the results are put in order
    finish_tile<Element, 4, 16>(c, p, at.row + warp_row, at.out_column + at.column + warp_column, at.out_column + out,
                                bias != nullptr ? bias + at.column + warp_column : nullptr, shared + warp * StagingTile::bytes);
  }
};

}  // namespace bigmodel::cuda
