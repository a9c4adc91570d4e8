// How a product is cut into tasks.
#pragma once
#include "gemm.h"

namespace bigmodel::BIGMODEL_ISA {

// A task owns a chunk of columns of all rows of a part, so that a weight is read once a part however many threads there are. A part has at
// most `most_units` row blocks, whose chunk of C stays in the caches; more parts are made where columns alone would not go round among the
// threads. Chunks get ever shorter towards the end, so that threads finish together even when one of them is held up (guided
// self-scheduling, Polychronopoulos & Kuck, 1987). With one or two tiles of rows the time is that of reading the weight, which goes fastest
// in one run: three quarters of it are dealt out so, and what is left is shared.
//
// The tile unit is so fast that it waits for what comes from another core's cache. With many rows a thread therefore has parts of its own, of
// two row blocks at most; their tasks follow each other (parallel_near), each a chunk of columns. The narrow ones leave L2 (2 MB) to the
// left side, from which they all read; if that is too deep to stay, wide ones ask L3 for it less often.
inline constexpr int64_t widest_chunk = panel_group / 2, stays_in_l2 = 1 << 20;
template <int64_t tile_rows>
struct CutBy {
  static constexpr int64_t narrowest = 2;   // chunks, in panels
  static constexpr int64_t part_unit = row_block / tile_rows;
  struct Piece { int64_t first_tile, last_tile, first_panel, last_panel; };
  int64_t tiles, panels, threads, parts, widest = widest_chunk;
  bool by_rows = false;      // tasks of the same rows are neighbours
  CutBy(int64_t rows, int64_t panels, int64_t threads, int64_t most_units) : tiles(ceil_div(rows, tile_rows)), panels(panels), threads(threads) {
    const int64_t units = ceil_div(tiles, part_unit), turns = 4;       // chunks per thread that even out what each was given
    parts = larger(ceil_div(units, most_units), threads > 1 ? ceil_div(turns * threads * narrowest, larger(1, panels)) : 1);
    parts = larger(1, smaller(parts, units));
  }
  // Parts for each thread, if there are rows enough; `row_bytes` of the left side. Split numbers gain from three tiles a thread on, if the left side
  // does not stay in one core's L2.
  void cut_by_rows(int64_t row_bytes, bool split) {
    if (tiles < threads * (split && tiles * tile_rows * row_bytes > stays_in_l2 ? 3 : part_unit)) return;
    by_rows = true;
    parts = round_up(ceil_div(tiles, 2 * part_unit), threads);
    const bool part_stays = ceil_div(tiles, parts) * tile_rows * row_bytes <= stays_in_l2;
    widest = part_stays ? widest_chunk * 2 / 3 : widest_chunk * 2;
  }
  int64_t tasks() const {
    if (by_rows) return parts * ceil_div(panels, widest);
    int64_t count = 0;
    if (tiles > 0)
      for (int64_t at = 0; at < parts * panels; at += length(at)) count++;
    return count;
  }
  Piece piece(int64_t task) const {
    if (by_rows) {
      const int64_t chunks = ceil_div(panels, widest), part = task / chunks, first = task % chunks * widest;
      return {tiles * part / parts, tiles * (part + 1) / parts, first, smaller(panels, first + widest)};
    }
    int64_t at = 0;
    for (; task > 0; task--) at += length(at);
    const int64_t part = at / panels, first = at % panels, units = ceil_div(tiles, part_unit);
    return {units * part / parts * part_unit, smaller(tiles, units * (part + 1) / parts * part_unit), first, first + length(at)};
  }

 private:
  int64_t length(int64_t at) const {
    const int64_t left = parts * panels - at, here = panels - at % panels;
    if (tiles <= 2) return smaller(here, at < panels * 3 / 4 ? ceil_div(panels * 3, 4 * threads) : larger(1, left / (2 * threads)));
    return smaller(here, threads == 1 ? widest : larger(narrowest, smaller(widest, left / (2 * threads))));
  }
};

}  // namespace bigmodel::BIGMODEL_ISA
