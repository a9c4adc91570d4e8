// Products that are cut by columns: what training needs, where neither side is packed beforehand as weights change with every step.
//
//   dX = dY W^T          a: rows of dY             b: rows (or columns) of W
//   dW = dY^T X          a: columns of dY          b: rows of X              contraction over the tokens
//
//              b: each task packs its own columns, one depth block at a time, and goes over all of a with it in L2
//             +-----+-----+---+--+
//   depth  -> |  .  |     |   |  |     chunks of columns get shorter towards the end, so that threads finish together
//             +-----+-----+---+--+
//   a: packed |  C  |     |   |  |     a is packed once, by all threads, and read by all of them, row block by row block;
//   once      |     |     |   |  |     b is read from memory once
//             +-----+-----+---+--+
//
// Both are asked for as float32 rows, as they lie or made on the fly: a hidden layer is recomputed from its preactivation, a normalised
// row from its input, while they are packed, and neither is ever stored.
#pragma once
#include "grid.h"

namespace bigmodel::BIGMODEL_ISA {

// A matrix known by its rows: get returns n floats, columns [column, column + n) of a row, in `buffer` where they had to be made.
struct Rows {
  const void* of;
  const float* (*get)(const void* of, int64_t row, int64_t column, int64_t n, float* buffer);
};
template <class Source>
static Rows as_rows(const Source& source) {
  return {&source, [](const void* of, int64_t row, int64_t column, int64_t n, float* buffer) {
            return static_cast<const Source*>(of)->get(row, column, n, buffer);
          }};
}

// A matrix in memory.
template <class T>
struct Stored {
  const T* data;
  int64_t stride;
  const float* get(int64_t row, int64_t column, int64_t n, float* buffer) const {
    const T* source = data + row * stride + column;
    each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(source + i, here), buffer + i, here); });
    return buffer;
  }
};
template <>
struct Stored<float> {
  const float* data;
  int64_t stride;
  const float* get(int64_t row, int64_t column, int64_t, float*) const { return data + row * stride + column; }
};

struct Operand {
  Rows rows;
  bool transposed;         // the operand is rows' transpose
};

// Eight rows' n floats each, transposed: out[k * out_stride + r]. Rows past `count` give zeros. For k + 1 == n exactly `count_out`
// values are written; before that eight, of which what is too much is overwritten by the next k.
BIGMODEL_INLINE void transpose_rows(const float* const rows[8], int count, int64_t n, int count_out, float* out, int64_t out_stride) {
  int64_t k = 0;
#if BIGMODEL_SIMD >= 256
  for (; k + 8 < n; k += 8) {
    __m256 r[8];
    for (int i = 0; i < 8; i++) r[i] = i < count ? _mm256_loadu_ps(rows[i] + k) : _mm256_setzero_ps();
    transpose8x8(r, out + k * out_stride, out_stride);
  }
#endif
  for (; k < n; k++)
    for (int i = 0; i < count_out; i++) out[k * out_stride + i] = i < count ? rows[i][k] : 0.0f;
}

// ---- packing ----

// a (m x k) packed for all tasks: [depth block][tile][step][tile_rows].
struct Left {
  const float* packed;
  int64_t tiles;
  const float* at(int64_t begin, int64_t depth, int64_t tile) const { return packed + (begin * tiles + tile * depth) * tile_rows; }
};

inline constexpr int64_t tiles_together = row_block / tile_rows;   // of one task of packing, and of one row block

// Rows [row, row + rows) of a, as many as one tile has or fewer, steps [begin, begin + depth).
static inline void pack_tile(const Operand& a, int64_t row, int64_t rows, int64_t begin, int64_t depth, float* out) {
  alignas(64) float buffer[8 * depth_block];
  // Groups of eight rows from last to first: an eight-wide store of a group may run into the next step, never into another group.
  for (int64_t group = (rows - 1) / 8 * 8; group >= 0; group -= 8) {
    const int count = int(smaller(8, rows - group));
    const float* sources[8] = {};
    for (int i = 0; i < count; i++) sources[i] = a.rows.get(a.rows.of, row + group + i, begin, depth, buffer + i * depth_block);
    transpose_rows(sources, count, depth, count, out + group, tile_rows);
  }
}

// The same of an operand that is its rows' transpose, and of `rows` up to a row block: tiles lie depth * tile_rows apart.
static inline void pack_tiles_transposed(const Operand& a, int64_t row, int64_t rows, int64_t begin, int64_t depth, float* out) {
  // Eight steps at a time: a tile's lines are then written whole, and no more rows are open than a cache set has ways.
  constexpr int64_t together = 8;
  alignas(64) float buffer[together][row_block];
  for (int64_t step = 0; step < depth; step += together) {
    const int count = int(smaller(together, depth - step));
    const float* sources[together];
    for (int i = 0; i < count; i++) sources[i] = a.rows.get(a.rows.of, begin + step + i, row, rows, buffer[i]);
    for (int64_t r = 0; r < rows; r += tile_rows) {
      float* target = out + r * depth + step * tile_rows;
      // A whole vector is stored per step, and what it writes too far is overwritten by the next step; the last one is exact.
      const int whole = r + larger(tile_rows, F32::width) <= rows ? (step + count < depth ? count : count - 1) : 0;
      for (int i = 0; i < whole; i++)
#pragma GCC unroll 4
        for (int at = 0; at < tile_rows; at += F32::width) F32::load(sources[i] + r + at).store(target + i * tile_rows + at);
      for (int i = whole; i < count; i++)
        for (int64_t at = 0; at < smaller(tile_rows, rows - r); at++) target[i * tile_rows + at] = sources[i][r + at];
    }
  }
}

// Rows [first, first + m) of a, by all threads, in the calling thread's scratch.
static inline Left pack_left(const Runtime& runtime, const Operand& a, int64_t first, int64_t m, int64_t k) {
  const int64_t tiles = ceil_div(m, tile_rows), blocks = ceil_div(tiles, tiles_together), depths = ceil_div(k, depth_block);
  float* packed = static_cast<float*>(runtime.scratch(scratch_a, size_t(tiles * tile_rows * k + F32::width) * sizeof(float)));
  const Left left = {packed, tiles};
  parallel(runtime, blocks * depths, [&](int64_t task) {
    // Neighbouring tasks read on along the rows.
    const int64_t block = a.transposed ? task % blocks : task / depths, begin = (a.transposed ? task / blocks : task % depths) * depth_block;
    const int64_t depth = smaller(depth_block, k - begin), tile = block * tiles_together, row = tile * tile_rows, rows = smaller(row_block, m - row);
    float* target = packed + (begin * tiles + tile * depth) * tile_rows;
    if (a.transposed) return pack_tiles_transposed(a, first + row, rows, begin, depth, target);
    for (int64_t r = 0; r < rows; r += tile_rows) pack_tile(a, first + row + r, smaller(tile_rows, rows - r), begin, depth, target + r * depth);
  });
  return left;
}

// Steps [begin, begin + depth) of b's columns [column, column + columns) into panels; columns that a last panel lacks are zero.
static inline void pack_right(const Operand& b, int64_t column, int64_t columns, int64_t begin, int64_t depth, float* panels) {
  alignas(64) float buffer[8 * depth_block];
  static_assert(panel_group * panel <= 8 * depth_block, "a row of a chunk fits into the buffer");
  if (b.transposed) {
    for (int64_t at = 0; at < round_up(columns, panel); at += 8) {
      const int count = int(larger(0, smaller(8, columns - at)));
      const float* rows[8] = {};
      for (int i = 0; i < count; i++) rows[i] = b.rows.get(b.rows.of, column + at + i, begin, depth, buffer + i * depth_block);
      transpose_rows(rows, count, depth, 8, panels + at / panel * (depth * panel) + at % panel, panel);
    }
    return;
  }
  for (int64_t step = 0; step < depth; step++) {
    const float* source = b.rows.get(b.rows.of, begin + step, column, columns, buffer);
    float* target = panels + step * panel;
    int64_t at = 0;
    for (; at + panel <= columns; at += panel, target += depth * panel)
#pragma GCC unroll 4
      for (int v = 0; v < panel_vectors; v++) F32::load(source + at + v * F32::width).store(target + v * F32::width);
    if (at < columns)
      for (int64_t i = 0; i < panel; i++) target[i] = at + i < columns ? source[at + i] : 0.0f;
  }
}

// ---- the product ----

// Rows [first, first + m) of C, of which `direct` is the first.
template <class Finish>
static void product_rows(const Runtime& runtime, const Operand& a, int64_t first, int64_t m, const Operand& b, int64_t n, int64_t k, float* direct,
                         int64_t direct_stride, const Finish& finish) {
  const Left left = pack_left(runtime, a, first, m, k);
  const Cut cut(m, ceil_div(n, panel), runtime.threads);
  parallel(runtime, cut.tasks(), [&](int64_t task) {
    const Cut::Piece piece = cut.piece(task);
    const int64_t panels = piece.last_panel - piece.first_panel, column = piece.first_panel * panel, columns = smaller(n - column, panels * panel);
    const int64_t rows = smaller(m, piece.last_tile * tile_rows) - piece.first_tile * tile_rows;
    float* right = static_cast<float*>(runtime.scratch(scratch_packed, size_t(panels * panel * depth_block) * sizeof(float)));
    const int64_t c_stride = direct ? direct_stride : panels * panel;
    float* c = direct ? direct + piece.first_tile * tile_rows * direct_stride + column
                      : static_cast<float*>(runtime.scratch(scratch_c, size_t(rows * c_stride) * sizeof(float)));
    int64_t begin = 0;
    do {  // once at least: a product of no depth is zero
      const int64_t depth = smaller(depth_block, k - begin);
      pack_right(b, column, columns, begin, depth, right);
      for (int64_t block = piece.first_tile; block < piece.last_tile; block += tiles_together) {
        const int64_t end = smaller(piece.last_tile, block + tiles_together);
        float* c_block = c + (block - piece.first_tile) * tile_rows * c_stride;
        for (int64_t p = 0; p < panels; p++)
          for (int64_t tile = block; tile < end; tile++)
            multiply_rows<Widen<float>>(smaller(tile_rows, m - tile * tile_rows), depth, PackedTile<Widen<float>>{left.at(begin, depth, tile)},
                                        right + p * depth * panel, c_block + (tile - block) * tile_rows * c_stride + p * panel, c_stride, begin > 0);
        if (begin + depth < k) continue;
        const int64_t row = block * tile_rows;
        finish(first + row, smaller(m, end * tile_rows) - row, column, columns, c_block, c_stride);
      }
      begin += depth_block;
    } while (begin < k);
  });
}

// C (m x n) = a b, k deep. `direct`: where C is to lie as it is, rows `direct_stride` apart, with room for all of the last panel; or null: C is
// the task's own. finish(row, rows, column, columns, c, c_stride) follows when these elements are complete: `row` is a multiple of row_block
// and `rows` at most that, `columns` at most panel_group * panel.
template <class Finish>
static void product(const Runtime& runtime, const Operand& a, int64_t m, const Operand& b, int64_t n, int64_t k, float* direct, int64_t direct_stride,
                    const Finish& finish) {
  // A long product goes part by part, so that the packed rows take 16 MB or little more.
  constexpr int64_t most = 4 << 20;
  const int64_t together = larger(2, most / larger(1, k) / row_block) * row_block;
  for (int64_t first = 0; first < m; first += together)
    product_rows(runtime, a, first, smaller(together, m - first), b, n, k, direct ? direct + first * direct_stride : nullptr, direct_stride, finish);
}

// C to memory, rounded once: direct where it can lie as it is.
template <class T>
static void product_into(const Runtime& runtime, const Operand& a, int64_t m, const Operand& b, int64_t n, int64_t k, T* out) {
  float* direct = nullptr;
  if constexpr (sizeof(T) == sizeof(float)) direct = n % panel == 0 ? out : nullptr;
  product(runtime, a, m, b, n, k, direct, n, [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* c, int64_t c_stride) {
    if (direct) return;
    for (int64_t r = 0; r < rows; r++) {
      T* target = out + (row + r) * n + column;
      each_vector(columns, [&](int64_t i, int here) __attribute__((always_inline)) { store(F32::load(c + r * c_stride + i), target + i, here); });
    }
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
