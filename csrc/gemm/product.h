// Products of which neither side is packed beforehand: what training needs, where weights change with every step.
//
//   dX = dY W^T          a: rows of dY             b: rows (or columns) of W
//   dW = dY^T X          a: columns of dY          b: rows of X              contraction over the tokens
//
// The right side is packed into panels once, by all threads, in memory they share; the left side by each task for its own row
// block, just before use (gemm.h has the picture). Both are asked for as float32 rows, as they lie or made on the fly: a hidden layer
// is recomputed from its preactivation, a normalised row from its input, while they are packed, and neither is ever stored.
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

inline constexpr int64_t pack_columns = 128, pack_depth = 128;   // of one call of Rows::get

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

// b (k x n) into panels for Widen<float> whose depth is `steps`, from step `first_step` on; columns that a last panel lacks are zero.
static inline void pack_panels(const Runtime& runtime, const Operand& b, int64_t k, int64_t n, float* panels, int64_t steps, int64_t first_step = 0) {
  const int64_t n_padded = round_up(n, panel);
  const int64_t blocks = ceil_div(n_padded, pack_columns), depths = ceil_div(k, pack_depth);
  parallel(runtime, blocks * depths, [&](int64_t task) {
    // Not transposed: k outermost, so that neighbouring tasks read on along the rows. Transposed: the other way round.
    const int64_t block = b.transposed ? task / depths : task % blocks, depth = b.transposed ? task % depths : task / blocks;
    const int64_t column = block * pack_columns, columns = smaller(pack_columns, n - column), padded = smaller(pack_columns, n_padded - column);
    const int64_t begin = depth * pack_depth, end = smaller(k, begin + pack_depth);
    alignas(64) float buffer[8 * pack_depth];
    if (!b.transposed) {
      for (int64_t row = begin; row < end; row++) {
        const float* source = b.rows.get(b.rows.of, row, column, columns, buffer);
        float* target = panels + (column / panel * steps + first_step + row) * panel;
        int64_t at = 0;
        for (; at + panel <= columns; at += panel, target += steps * panel)
#pragma GCC unroll 4
          for (int v = 0; v < panel_vectors; v++) F32::load(source + at + v * F32::width).store(target + v * F32::width);
        if (at < padded)
          for (int64_t i = 0; i < panel; i++) target[i] = at + i < columns ? source[at + i] : 0.0f;
      }
      return;
    }
    for (int64_t at = 0; at < padded; at += 8) {
      const int count = int(larger(0, smaller(8, columns - at)));
      const float* rows[8] = {};
      for (int i = 0; i < count; i++) rows[i] = b.rows.get(b.rows.of, column + at + i, begin, end - begin, buffer + i * pack_depth);
      const int64_t place = column + at;
      transpose_rows(rows, count, end - begin, 8, panels + (place / panel * steps + first_step + begin) * panel + place % panel, panel);
    }
  });
}

// Rows [first, first + rows) of a, k deep, into tiles [k][tile_rows] in the calling thread's scratch.
static inline const float* pack_tiles(const Runtime& runtime, const Operand& a, int64_t first, int64_t rows, int64_t k) {
  const int64_t tiles = ceil_div(rows, tile_rows);
  float* packed = static_cast<float*>(runtime.scratch(scratch_a, size_t(tiles * tile_rows * k + F32::width) * sizeof(float)));
  if (a.transposed) {
    // Eight steps at a time: a tile's lines are then written whole, and no more rows are open than a cache set has ways.
    constexpr int64_t widest = row_block, together = 8;
    alignas(64) float buffer[together][widest];
    for (int64_t begin = 0; begin < rows; begin += widest) {
      const int64_t here = smaller(widest, rows - begin);
      for (int64_t step = 0; step < k; step += together) {
        const int count = int(smaller(together, k - step));
        const float* sources[together];
        for (int i = 0; i < count; i++) sources[i] = a.rows.get(a.rows.of, step + i, first + begin, here, buffer[i]);
        for (int64_t row = 0; row < here; row += tile_rows) {
          float* target = packed + (begin + row) * k + step * tile_rows;
          // A whole vector is stored per step, and what it writes too far is overwritten by the next step; the last one is exact.
          const int whole = row + larger(tile_rows, F32::width) <= here ? (step + count < k ? count : count - 1) : 0;
          for (int i = 0; i < whole; i++)
#pragma GCC unroll 4
            for (int at = 0; at < tile_rows; at += F32::width) F32::load(sources[i] + row + at).store(target + i * tile_rows + at);
          for (int i = whole; i < count; i++)
            for (int64_t at = 0; at < smaller(tile_rows, here - row); at++) target[i * tile_rows + at] = sources[i][row + at];
        }
      }
    }
    return packed;
  }
  alignas(64) float buffer[8 * pack_depth];
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t row = tile * tile_rows, here = smaller(tile_rows, rows - row);
    for (int64_t step = 0; step < k; step += pack_depth) {
      const int64_t depth = smaller(pack_depth, k - step);
      // Groups of eight rows from last to first: an eight-wide store of a group may run into the next step, never into another group.
      for (int64_t group = (here - 1) / 8 * 8; group >= 0; group -= 8) {
        const int count = int(smaller(8, here - group));
        const float* sources[8] = {};
        for (int i = 0; i < count; i++) sources[i] = a.rows.get(a.rows.of, first + row + group + i, step, depth, buffer + i * pack_depth);
        transpose_rows(sources, count, depth, count, packed + row * k + step * tile_rows + group, tile_rows);
      }
    }
  }
  return packed;
}

// C (m x n) = a b, b packed k deep. `direct`: where C is to lie as it is, rows `direct_stride` apart, with room for all of the last panel;
// or null: C is the task's own. finish(block, row, rows, column, columns, c, c_stride) follows each group of columns while it is in cache:
// `block` numbers the row blocks (row_blocks(...) of them), and a row block's columns may be given to several tasks.
template <class Finish>
static void product(const Runtime& runtime, const Operand& a, int64_t m, int64_t n, int64_t k, const float* panels, float* direct,
                    int64_t direct_stride, const Finish& finish) {
  const Grid grid(m, ceil_div(n, panel), runtime.threads);
  parallel(runtime, grid.tasks(), [&](int64_t task) {
    const int64_t block = task / grid.column_blocks, column_block = task % grid.column_blocks;
    const int64_t row = grid.first_row(block), rows = grid.first_row(block + 1) - row;
    const int64_t first = grid.first_panel(column_block), last = grid.first_panel(column_block + 1);
    if (rows == 0 || first == last) return;
    const float* tiles = pack_tiles(runtime, a, row, rows, k);
    const int64_t c_stride = direct ? direct_stride : (last - first) * panel;
    float* c = direct ? direct + row * direct_stride + first * panel
                      : static_cast<float*>(runtime.scratch(scratch_c, size_t(rows * c_stride) * sizeof(float)));
    multiply_block<Widen<float>>(tiles, rows, k, panels, first, last, c, c_stride, [&](int64_t column, int64_t columns, float* c_group) {
      finish(block, row, rows, column, smaller(columns, n - column), c_group, c_stride);
    });
  });
}

// C to memory, rounded once: direct where it can lie as it is.
template <class T>
static void product_into(const Runtime& runtime, const Operand& a, int64_t m, int64_t n, int64_t k, const float* panels, T* out) {
  float* direct = nullptr;
  if constexpr (sizeof(T) == sizeof(float)) direct = n % panel == 0 ? out : nullptr;
  product(runtime, a, m, n, k, panels, direct, n, [&](int64_t, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* c, int64_t c_stride) {
    if (direct) return;
    for (int64_t r = 0; r < rows; r++) {
      T* target = out + (row + r) * n + column;
      each_vector(columns, [&](int64_t i, int here) __attribute__((always_inline)) { store(F32::load(c + r * c_stride + i), target + i, here); });
    }
  });
}

static inline float* panel_memory(const Runtime& runtime, int64_t steps, int64_t n) {
  return static_cast<float*>(runtime.scratch(scratch_packed, size_t(steps * round_up(n, panel)) * sizeof(float)));
}

}  // namespace bigmodel::BIGMODEL_ISA
