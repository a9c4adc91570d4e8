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
// says how many bits of them count, 8 for each (see split.h). `stored` returns them as the bf16 that they are in memory, or null.
struct Rows {
  const void* of;
  const float* (*get)(const void* of, int64_t row, int64_t column, int64_t n, float* buffer);
  int parts;
  const bf16* (*stored)(const void* of, int64_t row, int64_t column, int64_t n);
};
// Those of stored numbers, and those that are enough for results of type T.
template <class T> inline constexpr int parts_of_stored = sizeof(T) == sizeof(float) ? 3 : __is_same(T, bf16) ? 1 : 2;
template <class T> inline constexpr int parts_enough_for = parts_of_stored<T>;

template <class Source>
static Rows as_rows(const Source& source, int parts = Source::parts) {
  const auto get = [](const void* of, int64_t row, int64_t column, int64_t n, float* buffer) {
    return static_cast<const Source*>(of)->get(row, column, n, buffer);
  };
  const auto stored = [](const void* of, int64_t row, int64_t column, int64_t n) -> const bf16* {
    if constexpr (requires(const Source& s) { s.stored(row, column, n); }) return static_cast<const Source*>(of)->stored(row, column, n);
    return nullptr;
  };
  return {&source, get, parts, stored};
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
  const bf16* stored(int64_t row, int64_t column, int64_t) const requires __is_same(T, bf16) { return data + row * stride + column; }
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
#if BIGMODEL_SIMD >= 128
  auto block = [&](float* to, int64_t stride) __attribute__((always_inline)) {
    Eight r[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = load8(rows[i] + k);
    transpose8x8(r, to, stride);
  };
  for (; k + 8 < n; k += 8) block(out + k * out_stride, out_stride);
  if (k + 8 == n) {
    alignas(32) float last[64];
    block(last, 8);
    for (int i = 0; i < 7; i++) store8(load8(last + 8 * i), out + (k + i) * out_stride);
    for (int i = 0; i < count_out; i++) out[(k + 7) * out_stride + i] = last[56 + i];
    return;
  }
#endif
  for (; k < n; k++)
    for (int i = 0; i < count_out; i++) out[k * out_stride + i] = rows[i][k];
}

// ---- how a product multiplies ----

// How packed weights of storage type T lie: linear's `pack` and the product agree on this.
template <class T>
struct StepOf { using Type = Widen<T>; };
#if BIGMODEL_BF16_DOT
template <>
struct StepOf<bf16> { using Type = Pairs; };
#endif

template <class Step> inline constexpr bool splits = false;
template <class A> inline constexpr bool is_parts = false;
#if BIGMODEL_AMX
template <int of_a, int of_b> inline constexpr bool splits<Split<of_a, of_b>> = true;
template <int count> inline constexpr bool is_parts<Parts<count>> = true;
inline constexpr int64_t fewest_split_rows = 2 * tile_rows + 1;   // with fewer, splitting the right side takes longer than is won
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

// a (m x steps) packed for all tasks: [depth block][tile][step][rows_of]; a single row of float32, and few rows of pairs, lie as they are:
// [depth block][row][step].
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
  bool single_row() const { return __is_same(A, float) && m == 1; }
  bool rows_of_pairs() const { return __is_same(A, uint32_t) && m <= most_rows_of_pairs; }
  int64_t step_rows() const { return single_row() ? 1 : rows_of_pairs() ? m : tile_rows; }  // elements for each step
  A* at(int64_t begin, int64_t tile) const { return packed + (begin * ceil_div(m, tile_rows) + tile * depth(begin)) * step_rows(); }
  LinesAhead lines(int64_t begin, int64_t tile, int64_t last) const {
    return {reinterpret_cast<const char*>(at(begin, tile)), (last - tile) * depth(begin) * step_rows() * int64_t(sizeof(A)) / 64};
  }
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
  if (left.m * left.steps > 16384) return down ? parallel(runtime, blocks * depths, one) : parallel_near(runtime, blocks * depths, one);
  for (int64_t task = 0; task < blocks * depths; task++) one(task);
}

#if BIGMODEL_AMX
// A row's columns from `begin` into its tile, and its mark if need be: several tasks may have parts of one depth block.
template <int count>
static void split_row_left(const Left<Parts<count>>& left, int64_t row, int64_t begin, int64_t from, int64_t n, const float* x) {
  const int64_t tile = row / left.tile_rows;
  if (!split_row(x, n, left.at(begin, tile) + from * left.tile_rows, row % left.tile_rows)) __atomic_store_n(&left.mark(begin, tile), 1, __ATOMIC_RELAXED);
}
#endif

// Rows [first, first + left.m) of a, of k columns; compiled once, in cpu.cpp.
void pack_left(const Runtime& runtime, const Operand& a, int64_t first, int64_t k, const Left<float>& left);
#if BIGMODEL_AMX
template <int count>
void pack_left(const Runtime& runtime, const Operand& a, int64_t first, int64_t k, const Left<Parts<count>>& left);
#endif

#if BIGMODEL_BF16_DOT
// Rows of a tile from `row` on, or of some tiles if they are whole: k columns, which go to step `from` of depth block `begin`.
template <class T>
static void pack_pairs_left(const Left<uint32_t>& left, int64_t row, const T* x, int64_t x_stride, int64_t rows, int64_t begin, int64_t from, int64_t k) {
  uint32_t* target = left.at(begin, row / left.tile_rows);
  if (!left.rows_of_pairs()) return pack_rows_pairs(x, x_stride, rows, k, target + from * left.tile_rows);
  for (int64_t r = 0; r < rows; r++) copy_pairs(x + r * x_stride, k, target + r * left.depth(begin) + from);
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
      } else if constexpr (Step::k_per_step > 1) {
        pack_pairs_left(left, row + r, source, x_stride, smaller(tile_rows, rows - r), begin, step - begin, here);
      } else {
        float* target = left.at(begin, (row + r) / tile_rows) + (step - begin) * left.step_rows();
        if (left.single_row()) memcpy(target, source, size_t(here) * sizeof(float));
        else pack_tile([&](int64_t i) { return source + i * x_stride; }, smaller(tile_rows, rows - r), here, target);
      }
    }
    done += here;
  }
}

// ---- the product ----

// What follows when elements of C are complete: a reference to a callable of (row, rows, column, columns, c, c_stride). `row` is a multiple of
// row_block, or with Pairs of a tile's rows; `rows` is at most row_block, `columns` at most 2 * widest_chunk * panel.
class Finish {
 public:
  template <class Callable>
  Finish(const Callable& callable)
      : of_(&callable), call_([](const void* of, int64_t row, int64_t rows, int64_t column, int64_t columns, float* c, int64_t c_stride) {
          (*static_cast<const Callable*>(of))(row, rows, column, columns, c, c_stride);
        }) {}
  void operator()(int64_t row, int64_t rows, int64_t column, int64_t columns, float* c, int64_t c_stride) const {
    call_(of_, row, rows, column, columns, c, c_stride);
  }

 private:
  const void* of_;
  void (*call_)(const void*, int64_t, int64_t, int64_t, int64_t, float*, int64_t);
};

// What is declared from here to product_into is compiled once, in cpu.cpp, for the steps that it names.

// C (m x n) = left times a right side k deep. `direct`: where C is to lie as it is, rows `direct_stride` apart, with room for all of the last
// panel; or null: C is the task's own. The right side is a packed weight, panels as Packed has them, or rows, packed by each task for the
// columns it owns.
template <class Step, class Packed>
void multiply_packed(const Runtime& runtime, const Left<typename Step::A>& left, const typename Packed::B* panels, int64_t n, int64_t k, float* direct,
                     int64_t direct_stride, Finish finish);
template <class Step>
void multiply_operand(const Runtime& runtime, const Left<typename Step::A>& left, const Operand& right, int64_t n, int64_t k, float* direct,
                      int64_t direct_stride, Finish finish);

// C (m x n) = a b, k deep, neither of them packed; `row` of `finish` counts from a's first.
void product(const Runtime& runtime, const Operand& a, int64_t m, const Operand& b, int64_t n, int64_t k, float* direct, int64_t direct_stride, Finish finish);

// Rows that a long product takes at a time, so that the packed ones take 16 MB or little more.
inline int64_t rows_together(int64_t steps) { return larger(2, (4 << 20) / larger(1, steps) / row_block) * row_block; }

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
