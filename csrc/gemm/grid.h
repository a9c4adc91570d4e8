// How a product is cut into tasks.
#pragma once
#include "gemm.h"

namespace bigmodel::BIGMODEL_ISA {

// Long products are cut by rows alone: every task owns whole rows, so a norm can follow in the same task while they are in
// cache. Blocks are row_block rows long, and towards the end ever shorter, so that threads finish together even when one of
// them is held up (guided self-scheduling, Polychronopoulos & Kuck, 1987). Short products are cut by columns too, so that each
// thread reads its own part of the weight and none reads it all.
struct Grid {
  static constexpr int64_t long_block = row_block / tile_rows, short_block = 2;  // in tiles
  int64_t rows, tiles, panels, threads, long_blocks, row_blocks, column_blocks;
  Grid(int64_t rows, int64_t panels, int64_t threads) : rows(rows), tiles(ceil_div(rows, tile_rows)), panels(panels), threads(threads) {
    const bool by_rows = threads > 1 && tiles >= threads * long_block / 2;
    long_blocks = by_rows ? larger(0, tiles / long_block - 2 * threads) : ceil_div(tiles, long_block);
    row_blocks = long_blocks;
    for (int64_t tile = long_blocks * long_block; tile < tiles; tile = after(tile)) row_blocks++;
    column_blocks = row_blocks >= threads ? 1 : smaller(panels, ceil_div(threads, larger(1, row_blocks)));
  }
  int64_t tasks() const { return row_blocks * column_blocks; }
  int64_t first_row(int64_t block) const {
    int64_t tile = smaller(block, long_blocks) * long_block;
    for (; block > long_blocks; block--) tile = after(tile);
    return smaller(rows, tile * tile_rows);
  }
  int64_t first_panel(int64_t block) const { return panels * block / column_blocks; }

 private:
  int64_t after(int64_t tile) const { return tile + larger(short_block, smaller(long_block, (tiles - tile) / (2 * threads))); }
};

// Columns first: a task owns a chunk of columns of all rows of a part. A part has at most `most_tiles`, so that its chunk of C stays in the
// caches; more parts are made where columns alone would not go round among the threads.
struct Cut {
  static constexpr int64_t widest = panel_group / 2, narrowest = 2;   // chunks, in panels
  static constexpr int64_t part_unit = row_block / tile_rows, most_tiles = 8 * part_unit;
  struct Piece { int64_t first_tile, last_tile, first_panel, last_panel; };
  int64_t tiles, panels, threads, parts;
  Cut(int64_t rows, int64_t panels, int64_t threads) : tiles(ceil_div(rows, tile_rows)), panels(panels), threads(threads) {
    const int64_t units = ceil_div(tiles, part_unit), turns = 4;       // chunks per thread that even out what each was given
    parts = larger(ceil_div(tiles, most_tiles), threads > 1 ? ceil_div(turns * threads * narrowest, larger(1, panels)) : 1);
    parts = larger(1, smaller(parts, units));
  }
  int64_t tasks() const {
    int64_t count = 0;
    if (tiles > 0)
      for (int64_t at = 0; at < parts * panels; at += length(at)) count++;
    return count;
  }
  Piece piece(int64_t task) const {
    int64_t at = 0;
    for (; task > 0; task--) at += length(at);
    const int64_t part = at / panels, first = at % panels, units = ceil_div(tiles, part_unit);
    return {units * part / parts * part_unit, smaller(tiles, units * (part + 1) / parts * part_unit), first, first + length(at)};
  }

 private:
  int64_t length(int64_t at) const {
    const int64_t left = parts * panels - at, here = panels - at % panels;
    return smaller(here, threads == 1 ? widest : larger(narrowest, smaller(widest, left / (2 * threads))));
  }
};

}  // namespace bigmodel::BIGMODEL_ISA
