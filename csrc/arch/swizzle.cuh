// How a tile of 16-bit elements lies in shared memory so that eight rows of one column block fall into eight different groups of
// banks. Rows are cut into panels of 128 bytes (64 where the row's length asks for it), and within a panel the 16-byte chunk c of
// row r lies at chunk c xor r mod 8: PTX's 128-byte swizzle (64-byte: c xor r / 2 mod 4), which TMA writes and wgmma reads, so
// the tile must start at a multiple of 1024 bytes.
//
//        row 0   | 0 1 2 3 4 5 6 7 |      one panel, chunk numbers as stored
//        row 1   | 1 0 3 2 5 4 7 6 |
//        row 2   | 2 3 0 1 6 7 4 5 |  ...
#pragma once
#include "arch/cuda.cuh"

namespace bigmodel::cuda {

template <int rows_, int columns_>
struct SwizzledTile {
  static constexpr int rows = rows_, columns = columns_;
  static constexpr int panel_columns = columns % 64 == 0 ? 64 : 32;
  static constexpr int panel_bytes = rows * panel_columns * 2;
  static constexpr int row_chunks = columns / 8, panel_chunks = panel_columns / 8;
  static constexpr int bytes = rows * columns * 2;
  static_assert(columns % 32 == 0, "a tile's rows are whole panels");
  static_assert(panel_bytes % 1024 == 0, "panels start on a repetition of the swizzle");

  // Of the 16 bytes (8 elements) `chunk` of `row`, from the start of the tile.
  static BM_DEVICE SharedAddress offset(int row, int chunk) {
    const int panel = chunk / panel_chunks, c = chunk % panel_chunks;
    const int swizzled = panel_columns == 64 ? c ^ (row & 7) : c ^ (row >> 1 & 3);
    return SharedAddress(panel * panel_bytes + row * panel_columns * 2 + swizzled * 16);
  }
};

}  // namespace bigmodel::cuda
