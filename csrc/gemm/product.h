// A matrix product cut by columns, by all threads.
//
//              b: read from memory once; packed beforehand, or by each task for the columns it owns, a depth block at a time
//             +-----+-----+---+--+
//   depth  -> |  .  |     |   |  |     chunks of columns get shorter towards the end (cut.h)
//             +-----+-----+---+--+
//   a: packed |  C  |     |   |  |     a is packed once, by all threads, and read by all of them, row block by row block, with
//   once      |     |     |   |  |     one depth block of the chunk in L2 and one of its panels in L1
//             +-----+-----+---+--+
//
// What training multiplies changes with every step, so neither side is packed beforehand:
//
//   y  = x W             a: rows of x              b: W as it lies
//   dx = dy W^T          a: rows of dy             b: W as it lies
//   dW = dy^T x          a: columns of dy          b: rows of x              contraction over the tokens
//
// Both sides are asked for as float32 rows, as they lie or made on the fly: a hidden layer is recomputed from its preactivation, a
// normalised row from its input, while they are packed, and neither is ever stored.
#pragma once
#include "cut.h"
#if BIGMODEL_AMX
#include "split.h"
#endif

namespace bigmodel::BIGMODEL_ISA {

// A matrix known by its rows: get returns n floats, columns [column, column + n) of a row, in `buffer` where they had to be made. `parts`
// says how many bits of them count, 8 for each (see split.h).
struct Rows {
  const void* of;
  const float* (*get)(const void* of, int64_t row, int64_t column, int64_t n, float* buffer);
  int parts;
};
// Those of stored numbers, and those that are enough for results of type T.
template <class T> inline constexpr int parts_of_stored = sizeof(T) == sizeof(float) ? 3 : __is_same(T, bf16) ? 1 : 2;
template <class T> inline constexpr int parts_enough_for = sizeof(T) == sizeof(float) ? 3 : 2;

template <class Source>
static Rows as_rows(const Source& source, int parts = Source::parts) {
  return {&source, [](const void* of, int64_t row, int64_t column, int64_t n, float* buffer) {
            return static_cast<const Source*>(of)->get(row, column, n, buffer);
          }, parts};
}

// A matrix in memory.
template <class T>
struct Stored {
  static constexpr int parts = parts_of_stored<T>;
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
  static constexpr int parts = parts_of_stored<float>;
  const float* data;
  int64_t stride;
  const float* get(int64_t row, int64_t column, int64_t, float*) const { return data + row * stride + column; }
};

struct Operand {
  Rows rows;
  bool transposed;         // the operand is rows' transpose
};

// Eight rows' n floats each, transposed: out[k * out_stride + r]. For k + 1 == n exactly `count_out` values are written; before that eight,
// of which what is too much is overwritten by the next k.
BIGMODEL_INLINE void transpose_rows(const float* const rows[8], int64_t n, int count_out, float* out, int64_t out_stride) {
  int64_t k = 0;
#if BIGMODEL_SIMD >= 256
  auto block = [&](float* to, int64_t stride) __attribute__((always_inline)) {
    __m256 r[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(rows[i] + k);
    transpose8x8(r, to, stride);
  };
  for (; k + 8 < n; k += 8) block(out + k * out_stride, out_stride);
  if (k + 8 == n) {
    alignas(32) float last[64];
    block(last, 8);
    for (int i = 0; i < 7; i++) _mm256_storeu_ps(out + (k + i) * out_stride, _mm256_load_ps(last + 8 * i));
    for (int i = 0; i < count_out; i++) out[(k + 7) * out_stride + i] = last[56 + i];
    return;
  }
#endif
  for (; k < n; k++)
    for (int i = 0; i < count_out; i++) out[k * out_stride + i] = rows[i][k];
}

// ---- how a product multiplies ----

template <class Step> inline constexpr bool splits = false;
template <class A> inline constexpr bool is_parts = false;
#if BIGMODEL_AMX
template <int of_a, int of_b> inline constexpr bool splits<Split<of_a, of_b>> = true;
template <int count> inline constexpr bool is_parts<Parts<count>> = true;
inline constexpr int64_t fewest_split_rows = 64;   // with fewer, splitting the right side takes longer than is won
#endif

// body(Step{}) with the step for m rows, and numbers of so many parts.
template <class Body>
static void with_float_step([[maybe_unused]] int64_t m, [[maybe_unused]] int of_a, [[maybe_unused]] int of_b, const Body& body) {
#if BIGMODEL_AMX
  if (m >= fewest_split_rows) {
    if (of_a == 3 || of_b == 3) return body(Split<3, 3>{});
    if (of_a == 2) return of_b == 2 ? body(Split<2, 2>{}) : body(Split<2, 1>{});
    return of_b == 2 ? body(Split<1, 2>{}) : body(Split<1, 1>{});
  }
#endif
  body(Widen<float>{});
}

// What k columns are in steps.
template <class Step>
static int64_t steps_of(int64_t k) {
#if BIGMODEL_AMX
  if constexpr (splits<Step>) return round_up(k, split_depth);
#endif
  return ceil_div(k, Step::k_per_step);
}

// ---- the left side ----

// a (m x steps) packed for all tasks: [depth block][tile][step][rows_of].
template <class A>
struct Left {
  A* packed;
  int64_t m, steps;
  uint8_t* marks = nullptr;  // of split tiles [depth block][tile]: 1 where not all numbers have parts
  static constexpr int64_t tile_rows = rows_of<A>, depth_block = depth_block_of<A>;
  Left(A* packed, int64_t m, int64_t steps) : packed(packed), m(m), steps(steps) {}
  // In the calling thread's scratch.
  Left(const Runtime& runtime, int slot, int64_t m, int64_t steps) : m(m), steps(steps) {
    const size_t bytes = size_t(round_up(m, tile_rows) * steps + F32::width) * sizeof(A);
    const size_t marked = is_parts<A> ? size_t(ceil_div(steps, depth_block) * ceil_div(m, tile_rows)) : 0;
    packed = static_cast<A*>(runtime.scratch(slot, bytes + marked));
    if (is_parts<A>) marks = static_cast<uint8_t*>(memset(reinterpret_cast<char*>(packed) + bytes, 0, marked));
  }
  int64_t depth(int64_t begin) const { return smaller(depth_block, steps - begin); }
  A* at(int64_t begin, int64_t tile) const { return packed + (begin * ceil_div(m, tile_rows) + tile * depth(begin)) * tile_rows; }
  uint8_t& mark(int64_t begin, int64_t tile) const { return marks[begin / depth_block * ceil_div(m, tile_rows) + tile]; }
};

// A tile of `rows` rows, which source(row) points at, `depth` steps of each.
template <class Source>
static void pack_tile(const Source& source, int64_t rows, int64_t depth, float* out) {
  // Groups of eight rows from last to first: an eight-wide store of a group may run into the next step, never into another group.
  for (int64_t group = (rows - 1) / 8 * 8; group >= 0; group -= 8) {
    const int count = int(smaller(8, rows - group));
    const float* sources[8];
    for (int i = 0; i < 8; i++) sources[i] = i < count ? source(group + i) : sources[0];
    transpose_rows(sources, depth, count, out + group, tile_rows);
  }
}

// Rows [row, row + rows), up to a row block, of an operand that is its rows' transpose: tiles lie depth * tile_rows apart.
static inline void pack_tiles_transposed(const Rows& source, int64_t row, int64_t rows, int64_t begin, int64_t depth, float* out) {
  // Eight steps at a time: a tile's lines are then written whole, and no more rows are open than a cache set has ways.
  constexpr int64_t together = 8;
  alignas(64) float buffer[together][row_block];
  for (int64_t step = 0; step < depth; step += together) {
    const int count = int(smaller(together, depth - step));
    const float* sources[together];
    for (int i = 0; i < count; i++) sources[i] = source.get(source.of, begin + step + i, row, rows, buffer[i]);
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

// pack(row, rows, begin, depth, target) for every row block and depth block; neighbouring tasks follow each other along the rows, or down
// them. What is too little to share stays with the calling thread.
template <class A, class Pack>
static void pack_blocks(const Runtime& runtime, const Left<A>& left, bool down, const Pack& pack) {
  constexpr int64_t depth_block = depth_block_of<A>;
  const int64_t blocks = ceil_div(left.m, row_block), depths = ceil_div(left.steps, depth_block);
  auto one = [&](int64_t task) {
    const int64_t block = down ? task % blocks : task / depths, begin = (down ? task / blocks : task % depths) * depth_block;
    const int64_t row = block * row_block;
    pack(row, smaller(row_block, left.m - row), begin, left.depth(begin), left.at(begin, row / Left<A>::tile_rows));
  };
  if (left.m * left.steps > 16384) return parallel(runtime, blocks * depths, one);
  for (int64_t task = 0; task < blocks * depths; task++) one(task);
}

// Rows [first, first + left.m) of a, of k columns.
static inline void pack_left(const Runtime& runtime, const Operand& a, int64_t first, int64_t, const Left<float>& left) {
  pack_blocks(runtime, left, a.transposed, [&](int64_t row, int64_t rows, int64_t begin, int64_t depth, float* target) {
    if (a.transposed) return pack_tiles_transposed(a.rows, first + row, rows, begin, depth, target);
    alignas(64) float buffer[8 * depth_block];
    for (int64_t r = 0; r < rows; r += tile_rows)
      pack_tile([&](int64_t i) { return a.rows.get(a.rows.of, first + row + r + i, begin, depth, buffer + i % 8 * depth_block); },
                smaller(tile_rows, rows - r), depth, target + r * depth);
  });
}

#if BIGMODEL_AMX
// A row's columns from `begin` into its tile, and its mark if need be: several tasks may have parts of one depth block.
template <int count>
static void split_row_left(const Left<Parts<count>>& left, int64_t row, int64_t begin, int64_t from, int64_t n, const float* x) {
  const int64_t tile = row / left.tile_rows;
  if (!split_row(x, n, left.at(begin, tile) + from * left.tile_rows, row % left.tile_rows)) __atomic_store_n(&left.mark(begin, tile), 1, __ATOMIC_RELAXED);
}

template <int count>
static void pack_left(const Runtime& runtime, const Operand& a, int64_t first, int64_t k, const Left<Parts<count>>& left) {
  pack_blocks(runtime, left, a.transposed, [&](int64_t row, int64_t rows, int64_t begin, int64_t, Parts<count>*) {
    const int64_t depth = smaller(left.depth_block, k - begin);
    if (!a.transposed) {
      alignas(64) float buffer[deepest_block];
      for (int64_t r = row; r < row + rows; r++) split_row_left(left, r, begin, 0, depth, a.rows.get(a.rows.of, first + r, begin, depth, buffer));
      return;
    }
    alignas(64) static constexpr float zeros[row_block] = {};
    alignas(64) float buffer[8][row_block], columns[row_block][split_depth];
    for (int64_t step = 0; step < depth; step += split_depth) {
      for (int64_t at = 0; at < split_depth; at += 8) {
        const float* sources[8];
        for (int64_t i = 0; i < 8; i++)
          sources[i] = step + at + i < depth ? a.rows.get(a.rows.of, begin + step + at + i, first + row, rows, buffer[i]) : zeros;
        transpose_rows(sources, rows, 8, columns[0] + at, split_depth);
      }
      for (int64_t r = 0; r < rows; r++) split_row_left(left, row + r, begin, step, split_depth, columns[r]);
    }
  });
}
#endif

// Columns [column, column + columns) of `rows` rows of float32, as they come out of a product, for the next one's left side; `row` is a
// multiple of a tile's rows, `column` of a step's elements.
template <class Step>
static void pack_columns_left(const Left<typename Step::A>& left, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* x, int64_t x_stride) {
  constexpr int64_t tile_rows = rows_of<typename Step::A>, depth_block = depth_block_of<typename Step::A>;
  for (int64_t done = 0; done < columns;) {
    const int64_t step = (column + done) / Step::k_per_step, begin = step / depth_block * depth_block, depth = left.depth(begin);
    const int64_t here = smaller(columns - done, (begin + depth - step) * Step::k_per_step);
    for (int64_t r = 0; r < rows; r += tile_rows) {
      const float* source = x + r * x_stride + done;
      if constexpr (splits<Step>) {
        for (int64_t i = 0; i < smaller(tile_rows, rows - r); i++) split_row_left(left, row + r + i, begin, step - begin, here, source + i * x_stride);
      } else {
        auto* target = left.at(begin, (row + r) / tile_rows) + (step - begin) * tile_rows;
        if constexpr (Step::k_per_step == 1) pack_tile([&](int64_t i) { return source + i * x_stride; }, smaller(tile_rows, rows - r), here, target);
        else pack_rows_pairs(source, x_stride, smaller(tile_rows, rows - r), here, target);
      }
    }
    done += here;
  }
}

// ---- the right side: what a task takes of it ----

template <class B>
struct Panels {
  const B* first;
  int64_t stride;        // from panel to panel
  bool marked = false;   // split ones: not all numbers have parts
};

// A packed weight: panels `steps` deep.
template <class Step>
struct PackedRight {
  static constexpr bool packed = true;
  static constexpr int64_t most_units = 4;   // row blocks of a part, see Cut
  const typename Step::B* panels;
  int64_t steps;
  Panels<typename Step::B> chunk(const Runtime&, int64_t panel_index, int64_t, int64_t begin, int64_t) const {
    return {panels + (panel_index * steps + begin) * panel, steps * panel};
  }
};

// Rows, packed by each task for its own chunk of the n columns; those that a last panel lacks are zero.
struct RowsRight {
  static constexpr bool packed = false;
  static constexpr int64_t most_units = 8;
  const Operand& b;
  int64_t n;
  Panels<float> chunk(const Runtime& runtime, int64_t panel_index, int64_t count, int64_t begin, int64_t depth) const {
    float* panels = static_cast<float*>(runtime.scratch(scratch_right, size_t(count * panel * deepest_block) * sizeof(float)));
    const int64_t column = panel_index * panel, columns = smaller(n - column, count * panel);
    b.transposed ? columns_as_rows(column, columns, begin, depth, panels) : rows_as_rows(column, columns, begin, depth, panels);
    return {panels, depth * panel};
  }

 private:
  void columns_as_rows(int64_t column, int64_t columns, int64_t begin, int64_t depth, float* panels) const {
    alignas(64) static constexpr float zeros[deepest_block] = {};
    alignas(64) float buffer[8 * deepest_block];
    for (int64_t at = 0; at < round_up(columns, panel); at += 8) {
      const float* rows[8];
      for (int i = 0; i < 8; i++) rows[i] = at + i < columns ? b.rows.get(b.rows.of, column + at + i, begin, depth, buffer + i * deepest_block) : zeros;
      transpose_rows(rows, depth, 8, panels + at / panel * (depth * panel) + at % panel, panel);
    }
  }
  void rows_as_rows(int64_t column, int64_t columns, int64_t begin, int64_t depth, float* panels) const {
    alignas(64) float buffer[widest_chunk * panel];
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
};

// How far ahead of a weight that is read once it is asked for, in bytes: beyond the hardware's own prefetch, which stops at each page and, on
// one core, leaves a third to two thirds of the memory's speed unused.
inline constexpr int64_t stream_ahead = 8192;
template <class B>
BIGMODEL_INLINE auto stream(const B* from) {
  constexpr int64_t bytes = panel * int64_t(sizeof(B));
  return Ahead<(bytes > 64)>{reinterpret_cast<const char*>(from) + stream_ahead, bytes};
}

#if BIGMODEL_AMX
// Either of them, k deep, split by each task for its own chunk.
template <int of_b, class Right>
struct SplitRight {
  static constexpr bool packed = false;
  static constexpr int64_t most_units = 4;
  const Right& right;
  int64_t k;
  Panels<Parts<of_b>> chunk(const Runtime& runtime, int64_t panel_index, int64_t count, int64_t begin, int64_t depth) const {
    const int64_t there = smaller(depth, k - begin), stride = depth * panel;
    const auto whole = right.chunk(runtime, panel_index, count, begin, there);
    auto* parts = static_cast<Parts<of_b>*>(runtime.scratch(scratch_parts, size_t(count * panel * deepest_block) * sizeof(Parts<of_b>)));
    bool marked = false;
    for (int64_t p = 0; p < count; p++) {
      const auto* from = whole.first + p * whole.stride;
      if constexpr (Right::packed) marked |= !split_panel(from, there, parts + p * stride, panel, stream(from));
      else marked |= !split_panel(from, there, parts + p * stride);
    }
    return {parts, stride, marked};
  }
};
#endif

// ---- the product ----

// C (m x n) = left right. `direct`: where C is to lie as it is, rows `direct_stride` apart, with room for all of the last panel; or null: C is
// the task's own. finish(row, rows, column, columns, c, c_stride) follows when these elements are complete: `row` is a multiple of row_block,
// `rows` at most that, `columns` at most widest_chunk * panel.
template <class Step, class Right, class Finish>
static void multiply_columns(const Runtime& runtime, const Left<typename Step::A>& left, const Right& right, int64_t n, float* direct,
                             int64_t direct_stride, const Finish& finish) {
  using B = typename Step::B;
  constexpr int64_t tile_rows = rows_of<typename Step::A>, depth_block = depth_block_of<typename Step::A>;
  using Cut = CutBy<tile_rows>;
  const int64_t m = left.m, steps = left.steps;
  const Cut cut(m, ceil_div(n, panel), runtime.threads, Right::most_units);
  // Libraries multiply few rows by kernels of their own, whose sums are short; so are these, and reading the weight hides the additions.
  const int64_t chain = m > 1 && m <= 2 * tile_rows && Step::k_per_step == 1 && !splits<Step> ? depth_block / 4 : depth_block;
  // Depth block `begin` of a panel against tiles [tile, last); meanwhile each tile asks for its share of what comes from L3 or memory next.
  auto one = [&](int64_t begin, const B* b, [[maybe_unused]] bool marked, int64_t tile, int64_t last, float* c, int64_t c_stride, const B* next) {
    const int64_t depth = left.depth(begin), count = last - tile, row_bytes = panel * int64_t(sizeof(B)), bytes = next ? ceil_div(row_bytes, count) : 0;
    for (int64_t i = 0; i < count; i++) {
      if constexpr (splits<Step>) {
        multiply_split(!marked && !left.mark(begin, tile + i), smaller(tile_rows, m - (tile + i) * tile_rows), depth, left.at(begin, tile + i), b,
                       c + i * tile_rows * c_stride, c_stride, begin > 0);
      } else {
        const char* from = next ? reinterpret_cast<const char*>(next) + depth * row_bytes * i / count : reinterpret_cast<const char*>(b);
        for (int64_t d = 0; d < depth; d += chain)
          multiply_rows<Step>(smaller(tile_rows, m - (tile + i) * tile_rows), smaller(chain, depth - d), PackedTile<Step>{left.at(begin, tile + i) + d * tile_rows},
                              b + d * panel, c + i * tile_rows * c_stride, c_stride, begin + d > 0, Ahead<(panel * sizeof(B) > 64)>{from + d * bytes, bytes});
      }
    }
  };
  auto chunk_of = [&](const auto& piece, int64_t first_panel, int64_t panels) {
    const int64_t column = first_panel * panel, columns = smaller(n - column, panels * panel);
    const int64_t rows = smaller(m, piece.last_tile * tile_rows) - piece.first_tile * tile_rows;
    const int64_t c_stride = direct ? direct_stride : panels * panel;
    float* c = direct ? direct + piece.first_tile * tile_rows * direct_stride + column
                      : static_cast<float*>(runtime.scratch(scratch_c, size_t(rows * c_stride) * sizeof(float)));
    if (Right::packed && piece.last_tile - piece.first_tile == 1) {  // a single tile reuses no panel: the weight is read once, straight through
      for (int64_t p = 0; p < panels; p++)
        for (int64_t begin = 0; begin < larger(1, steps); begin += depth_block) {
          const B* b = right.chunk(runtime, first_panel + p, 1, begin, left.depth(begin)).first;
          // A step of a single row of float32 takes so little time that with short vectors asking only delays it.
          const bool ask = rows > 1 || sizeof(B) < sizeof(float) || BIGMODEL_SIMD == 512;
          one(begin, b, false, piece.first_tile, piece.last_tile, c + p * panel, c_stride, ask ? b + stream_ahead / sizeof(B) : nullptr);
        }
      return finish(piece.first_tile * tile_rows, rows, column, columns, c, c_stride);
    }
    int64_t begin = 0;
    do {  // once at least: a product of no depth is zero
      const auto chunk = right.chunk(runtime, first_panel, panels, begin, left.depth(begin));
      // What the task reads after this: the next depth block, or the chunk beside this one.
      const B* after = chunk.first + (begin + depth_block < steps ? depth_block * panel : panels * chunk.stride - begin * panel);
      for (int64_t tile = piece.first_tile; tile < piece.last_tile; tile += Cut::part_unit) {
        const int64_t last = smaller(piece.last_tile, tile + Cut::part_unit);
        float* c_block = c + (tile - piece.first_tile) * tile_rows * c_stride;
        for (int64_t p = 0; p < panels; p++) {
          const B* b = chunk.first + p * chunk.stride;
          const bool ask = Right::packed && tile == piece.first_tile;
          one(begin, b, chunk.marked, tile, last, c_block + p * panel, c_stride, ask ? p + 1 < panels ? b + chunk.stride : after : nullptr);
        }
        if (begin + depth_block < steps) continue;
        const int64_t row = tile * tile_rows;
        finish(row, smaller(m, last * tile_rows) - row, column, columns, c_block, c_stride);
      }
      begin += depth_block;
    } while (begin < steps);
  };
  parallel(runtime, cut.tasks(), [&](int64_t task) {
#if BIGMODEL_AMX
    [[maybe_unused]] const typename Step::Unit unit;
#endif
    const auto piece = cut.piece(task);
    for (int64_t first = piece.first_panel; first < piece.last_panel; first += Cut::widest)
      chunk_of(piece, first, smaller(Cut::widest, piece.last_panel - first));
  });
}

// Rows that a long product takes at a time, so that the packed ones take 16 MB or little more.
static inline int64_t rows_together(int64_t steps) { return larger(2, (4 << 20) / larger(1, steps) / row_block) * row_block; }

#if BIGMODEL_AMX
template <int of_a, int of_b, class Right, class Finish>
static void multiply_split_columns(Split<of_a, of_b>, const Runtime& runtime, const Left<Parts<of_a>>& left, const Right& right, int64_t n, int64_t k, float* direct,
                                   int64_t direct_stride, const Finish& finish) {
  multiply_columns<Split<of_a, of_b>>(runtime, left, SplitRight<of_b, Right>{right, k}, n, direct, direct_stride, finish);
}
#endif

// The same with a right side k deep that has to be split if the left one is.
template <class Step, class Right, class Finish>
static void multiply_unsplit(const Runtime& runtime, const Left<typename Step::A>& left, const Right& right, int64_t n, [[maybe_unused]] int64_t k, float* direct,
                             int64_t direct_stride, const Finish& finish) {
  if constexpr (splits<Step>) multiply_split_columns(Step{}, runtime, left, right, n, k, direct, direct_stride, finish);
  else multiply_columns<Step>(runtime, left, right, n, direct, direct_stride, finish);
}

// C (m x n) = a b, k deep, neither of them packed; `row` of `finish` counts from a's first.
template <class Finish>
static void product(const Runtime& runtime, const Operand& a, int64_t m, const Operand& b, int64_t n, int64_t k, float* direct, int64_t direct_stride,
                    const Finish& finish) {
  const int64_t together = rows_together(k);
  with_float_step(m, a.rows.parts, b.rows.parts, [&](auto step) {
    using Step = decltype(step);
    for (int64_t first = 0; first < m; first += together) {
      const Left<typename Step::A> left(runtime, scratch_a, smaller(together, m - first), steps_of<Step>(k));
      pack_left(runtime, a, first, k, left);
      multiply_unsplit<Step>(runtime, left, RowsRight{b, n}, n, k, direct ? direct + first * direct_stride : nullptr, direct_stride,
                             [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* c, int64_t c_stride) {
                               finish(first + row, rows, column, columns, c, c_stride);
                            });
    }
  });
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
