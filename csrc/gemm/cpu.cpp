// The products that product.h declares, compiled once for each instruction set.
#include "product.h"

namespace bigmodel::BIGMODEL_ISA {

// ---- packing the left side ----

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

void pack_left(const Runtime& runtime, const Operand& a, int64_t first, int64_t, const Left<float>& left) {
  pack_blocks(runtime, left, a.transposed, [&](int64_t row, int64_t rows, int64_t begin, int64_t depth, float* target) {
    alignas(64) float buffer[8 * depth_block];
    if (left.single_row()) {
      if (a.transposed)
        for (int64_t i = 0; i < depth; i++) target[i] = *a.rows.get(a.rows.of, begin + i, first, 1, buffer);
      else
        memcpy(target, a.rows.get(a.rows.of, first, begin, depth, buffer), size_t(depth) * sizeof(float));
      return;
    }
    if (a.transposed) return pack_tiles_transposed(a.rows, first + row, rows, begin, depth, target);
    for (int64_t r = 0; r < rows; r += tile_rows)
      pack_tile([&](int64_t i) { return a.rows.get(a.rows.of, first + row + r + i, begin, depth, buffer + i % 8 * depth_block); },
                smaller(tile_rows, rows - r), depth, target + r * depth);
  });
}

#if BIGMODEL_AMX
template <int count>
void pack_left(const Runtime& runtime, const Operand& a, int64_t first, int64_t k, const Left<Parts<count>>& left) {
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
  static constexpr bool packed = true, cut_by_rows = true;
  static constexpr int64_t most_units = 4;   // row blocks of a part, see Cut
  const typename Step::B* panels;
  int64_t steps;
  const typename Step::B* at(int64_t panel_index, int64_t begin) const { return panels + (panel_index * steps + begin) * panel; }
  Panels<typename Step::B> chunk(const Runtime&, int64_t panel_index, int64_t, int64_t begin, int64_t) const { return {at(panel_index, begin), steps * panel}; }
};

// Rows, packed by each task for its own chunk of the n columns; those that a last panel lacks are zero.
struct RowsRight {
  static constexpr bool packed = false, cut_by_rows = false;
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

#if BIGMODEL_BF16_DOT
inline constexpr int64_t rows_asked = 16;   // so many rows before they are read: from one to the next it is too far for the hardware's own prefetch

// put(row, at, pairs) for every second row and every 16 columns: their numbers and those of the next row, `columns` of each, and what `width` has
// more than these is zero. row(i, which) points at one, ahead(i) at one that is asked for meanwhile, or is null.
template <class Row, class Ahead, class Put>
static void each_pair_of_rows(const Row& row, const Ahead& ahead, int64_t rows, int64_t columns, int64_t width, const Put& put) {
  constexpr int64_t together = 16;
  for (int64_t i = 0; i < rows; i += 2) {
    const bf16* const both[2] = {row(i, 0), row(i + 1, 1)};
    for (int64_t next = i + rows_asked; next < i + rows_asked + 2; next++)
      if (const bf16* const asked = ahead(next))
        for (int64_t at = 0; at < columns; at += 32) __builtin_prefetch(asked + at, 0, 2);
    for (int64_t at = 0; at < width; at += together) {
      alignas(32) bf16 ends[2][together] = {};
      auto numbers = [&](int which) __attribute__((always_inline)) {
        const bf16* from = both[which] + at;
        if (const int64_t here = columns - at; here < together) from = here > 0 ? static_cast<const bf16*>(memcpy(ends[which], from, size_t(here) * sizeof(bf16))) : ends[which];
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      };
      put(i, at, pairs_of_rows(numbers(0), numbers(1)));
    }
  }
}

// Rows of bf16, packed likewise, as pairs.
struct PairsRight {
  static constexpr bool packed = false, cut_by_rows = false;
  static constexpr int64_t most_units = 8;
  const Operand& b;
  int64_t n, k;
  Panels<uint32_t> chunk(const Runtime& runtime, int64_t panel_index, int64_t count, int64_t begin, int64_t depth) const {
    uint32_t* const panels = static_cast<uint32_t*>(runtime.scratch(scratch_right, size_t(count * panel * depth) * sizeof(uint32_t)));
    const int64_t first = 2 * begin, there = smaller(2 * depth, k - first), column = panel_index * panel, columns = smaller(n - column, count * panel);
    b.transposed ? columns_as_rows(column, columns, first, there, panels) : rows_as_rows(column, columns, first, there, panels);
    return {panels, depth * panel};
  }

 private:
  static constexpr int64_t together = 16, deepest = 2 * depth_block_of<uint32_t>;
  // Of a row, those that lie side by side as they are, or else in `buffer`.
  const bf16* row(int64_t at, int64_t column, int64_t length, bf16* buffer) const {
    if (const bf16* there = b.rows.stored(b.rows.of, at, column, length)) return there;
    alignas(64) float made[larger(deepest, widest_chunk * panel)];
    const float* numbers = b.rows.get(b.rows.of, at, column, length, made);
    each_vector(length, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(numbers + i, here), buffer + i, here); });
    return buffer;
  }
  void columns_as_rows(int64_t column, int64_t columns, int64_t first, int64_t depth, uint32_t* panels) const {
    alignas(64) static constexpr bf16 zeros[deepest] = {};
    alignas(64) bf16 buffer[together][deepest];
    for (int64_t at = 0; at < round_up(columns, panel); at += together)
      columns_as_pairs([&](int64_t i) { return at + i < columns ? row(column + at + i, first, depth, buffer[i]) : zeros; }, depth,
                       panels + at / panel * (ceil_div(depth, 2) * panel) + at % panel);
  }
  void rows_as_rows(int64_t column, int64_t columns, int64_t first, int64_t depth, uint32_t* panels) const {
    alignas(64) static constexpr bf16 zeros[widest_chunk * panel] = {};
    alignas(64) bf16 buffer[2][widest_chunk * panel];
    const int64_t stride = ceil_div(depth, 2) * panel;
    each_pair_of_rows([&](int64_t i, int which) { return i < depth ? row(first + i, column, columns, buffer[which]) : zeros; },
                      [&](int64_t i) { return i < depth ? b.rows.stored(b.rows.of, first + i, column, columns) : nullptr; }, depth, columns, round_up(columns, panel),
                      [&](int64_t i, int64_t at, __m512i pairs) __attribute__((always_inline)) {
                        _mm512_store_si512(panels + at / panel * stride + i / 2 * panel + at % panel, pairs);
                      });
  }
};
#endif

// How far ahead of a weight that is read once it is asked for, in bytes. The hardware's own prefetch stops at each page of 4 KB, and so finds
// the next one begun; asked for from a page ahead on, there are two streams to follow, and a tenth to a fifth of the speed is lost.
inline constexpr int64_t stream_ahead = 2560;

// A depth block of a panel.
template <class B>
BIGMODEL_INLINE LinesAhead lines_of(const B* b, int64_t depth) { return {reinterpret_cast<const char*>(b), ceil_div(depth * row_bytes<B>, 64)}; }

#if BIGMODEL_AMX
// Either of them, k deep, split by each task for its own chunk: a packed panel alone, rows into all panels of the chunk.
template <int of_b, class Right>
struct SplitRight {
  static constexpr bool cut_by_rows = Right::cut_by_rows;
  static constexpr int64_t most_units = 4;
  const Right& right;
  int64_t k;
  // `ahead`: what is asked of memory meanwhile, a line for each row of a packed panel.
  Panels<Parts<of_b>> chunk(const Runtime& runtime, int64_t panel_index, int64_t count, int64_t begin, int64_t depth, const LinesAhead& ahead = {}) const {
    const int64_t there = smaller(depth, k - begin), stride = depth * panel;
    auto* parts = static_cast<Parts<of_b>*>(runtime.scratch(scratch_parts, size_t(count * panel * parts_block) * sizeof(Parts<of_b>)));
    bool marked = false;
    if constexpr (Right::packed) {
      const auto* from = right.at(panel_index, begin);
      auto ask = [&](int64_t i) __attribute__((always_inline)) { __builtin_prefetch(ahead.from + i * 64, 0, 2); };
      marked = !(ahead.lines ? split_panel(from, there, parts, panel, ask) : split_panel(from, there, parts));
    } else if (!right.b.transposed) {
      if constexpr (of_b == 1)
        if (right.b.rows.stored(right.b.rows.of, begin, panel_index * panel, columns_of(panel_index, count)) && copy_rows(panel_index, count, begin, there, parts, stride))
          return {parts, stride, false};
      marked = !split_rows<false>(panel_index, count, begin, there, parts, stride);
      if (marked) split_rows<true>(panel_index, count, begin, there, parts, stride);
    } else {
      const auto whole = right.chunk(runtime, panel_index, count, begin, there);
      for (int64_t p = 0; p < count; p++) marked |= !split_panel(whole.first + p * whole.stride, there, parts + p * stride);
    }
    return {parts, stride, marked};
  }

 private:
  int64_t columns_of(int64_t panel_index, int64_t count) const { return smaller(right.n - panel_index * panel, count * panel); }

  // Rows of bf16, of which each number is its only part, into the panels of the chunk, two at a time. Returns whether all have parts.
  bool copy_rows(int64_t panel_index, int64_t count, int64_t begin, int64_t depth, Parts<1>* parts, int64_t stride) const {
    alignas(64) static constexpr bf16 zeros[widest_chunk * panel] = {};
    const Rows& rows = right.b.rows;
    const int64_t column = panel_index * panel, columns = columns_of(panel_index, count);
    auto stored = [&](int64_t i) { return i < depth ? rows.stored(rows.of, begin + i, column, columns) : nullptr; };
    __m512i largest = _mm512_setzero_si512();
    each_pair_of_rows([&](int64_t i, int) { return i < depth ? stored(i) : zeros; }, stored, round_up(depth, split_depth), columns, count * panel,
                      [&](int64_t i, int64_t at, __m512i pairs) __attribute__((always_inline)) {
                        largest = _mm512_max_epu16(largest, _mm512_and_si512(pairs, _mm512_set1_epi16(0x7fff)));
                        Parts<1>* const block = parts + at / panel * stride + i / split_depth * (split_depth * panel);
                        _mm512_store_si512(part_of(block, 0, at % panel / F32::width) + i % split_depth / 2 * 32, pairs);
                      });
    return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;
  }

  // Rows straight into all panels of the chunk, two at a time: split_panel's work. Rows that lie in memory are asked for before, since from
  // one to the next it is too far for the hardware's own prefetch. Returns whether all have parts; `any` splits any number.
  template <bool any>
  bool split_rows(int64_t panel_index, int64_t count, int64_t begin, int64_t depth, Parts<of_b>* parts, int64_t stride) const {
    alignas(64) static constexpr float zeros[widest_chunk * panel] = {};
    alignas(64) float buffer[2][widest_chunk * panel];
    const Rows& rows = right.b.rows;
    const int64_t column = panel_index * panel, columns = columns_of(panel_index, count);
    auto row = [&](int64_t i, float* made) { return i < depth ? rows.get(rows.of, begin + i, column, columns, made) : zeros; };
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < round_up(depth, split_depth); i += 2) {
      const float *even = row(i, buffer[0]), *odd = row(i + 1, buffer[1]);
      if (even != buffer[0])
        for (int64_t ahead = i + rows_asked; ahead < smaller(depth, i + rows_asked + 2); ahead++) {
          const float* next = row(ahead, nullptr);
          for (int64_t at = 0; at < columns; at += 16) __builtin_prefetch(next + at, 0, 2);
        }
      Parts<of_b>* block = parts + i / split_depth * (split_depth * panel);
      auto put = [&](int64_t at, F32 x, F32 y) __attribute__((always_inline)) {
        Parts<of_b>* to = block + at / panel * stride;
        const int64_t pair = i % split_depth / 2, half = at % panel / F32::width;
        if constexpr (any) put_pair(to, pair, half, split_any<of_b>(x.v), split_any<of_b>(y.v));
        else put_pair(to, pair, half, split<of_b>(x.v, largest), split<of_b>(y.v, largest));
      };
      int64_t at = 0;
      for (; at + F32::width <= columns; at += F32::width) put(at, F32::load(even + at), F32::load(odd + at));
      if (at < columns) put(at, load_partial(even + at, int(columns - at)), load_partial(odd + at, int(columns - at)));
      for (at = round_up(columns, F32::width); at < count * panel; at += F32::width) put(at, F32::zero(), F32::zero());
    }
    return any || !without_parts(largest);
  }
};
#endif

// ---- the product ----

// So few tiles of A take less time than reading the weight: each block of it is then read in its turn, and multiplied with all of them.
inline constexpr int64_t few_tiles = 2;

// Of additions that follow each other. Libraries multiply few rows by kernels of their own, with short sums; so are these, and reading the
// weight hides what they add. Of a deep product other roundings are the larger part.
BIGMODEL_INLINE int64_t longest_chain(int64_t rows, int64_t depth) {
  if (rows <= 16 && depth <= 512) return rows == 1 ? 64 : 16;  // a single row is dealt to four chains
  return rows > 1 && rows <= 2 * tile_rows ? depth_block / 4 : depth_block;
}

// A task's chunk of C: `tiles` tiles of rows from `first_tile` on, some panels of columns.
struct Chunk {
  int64_t first_tile, tiles, first_panel, panels;
  float* c;
  int64_t c_stride;
};

// C (m x n) = left right, see multiply_packed, chunk by chunk: multiply(chunk). `Right` says how it is cut.
template <class Step, class Right, class Multiply>
static void each_chunk(const Runtime& runtime, const Left<typename Step::A>& left, int64_t n, float* direct, int64_t direct_stride,
                       const Multiply& multiply) {
  constexpr int64_t tile_rows = rows_of<typename Step::A>;
  CutBy<tile_rows> cut(left.m, ceil_div(n, panel), runtime.threads, Right::most_units);
  if constexpr (by_unit<typename Step::A> && Right::cut_by_rows) cut.cut_by_rows(left.steps * int64_t(sizeof(typename Step::A)), splits<Step>);
  const auto task_of = [&](int64_t task) {
#if BIGMODEL_AMX
    [[maybe_unused]] const typename Step::Unit unit;
#endif
    const auto piece = cut.piece(task);
    const int64_t tiles = piece.last_tile - piece.first_tile;
    for (int64_t first = piece.first_panel; first < piece.last_panel; first += cut.widest) {
      const int64_t panels = smaller(cut.widest, piece.last_panel - first), c_stride = direct ? direct_stride : panels * panel;
      const int64_t row = piece.first_tile * tile_rows, rows = smaller(left.m, piece.last_tile * tile_rows) - row;
      float* c = direct ? direct + row * direct_stride + first * panel
                        : static_cast<float*>(runtime.scratch(scratch_c, size_t(rows * c_stride) * sizeof(float)));
      multiply(Chunk{piece.first_tile, tiles, first, panels, c, c_stride});
    }
  };
  cut.by_rows ? parallel_near(runtime, cut.tasks(), task_of) : parallel(runtime, cut.tasks(), task_of);
}

// What follows, for tiles [tile, last) of a chunk.
template <class A>
static void finish_tiles(const Left<A>& left, int64_t n, const Chunk& chunk, int64_t tile, int64_t last, Finish finish) {
  const int64_t row = (chunk.first_tile + tile) * rows_of<A>, column = chunk.first_panel * panel;
  finish(row, smaller(left.m, (chunk.first_tile + last) * rows_of<A>) - row, column, smaller(n - column, chunk.panels * panel),
         chunk.c + tile * rows_of<A> * chunk.c_stride, chunk.c_stride);
}

template <class Step, class Right>
static void multiply_columns(const Runtime& runtime, const Left<typename Step::A>& left, const Right& right, int64_t n, float* direct,
                             int64_t direct_stride, Finish finish) {
  using B = typename Step::B;
  constexpr int64_t tile_rows = rows_of<typename Step::A>, depth_block = depth_block_of<typename Step::A>, part_unit = CutBy<tile_rows>::part_unit;
  const int64_t m = left.m, steps = left.steps, chain = Step::k_per_step == 1 ? longest_chain(m, steps) : steps;
  // Depth block `begin` of a panel against tiles [tile, last); meanwhile each tile asks for its share of what comes from L3 or memory next.
  auto one = [&](int64_t begin, int64_t depth, const B* b, int64_t tile, int64_t last, float* c, int64_t c_stride, const LinesAhead& next) {
    constexpr auto multiply_step = [] {
      if constexpr (Step::k_per_step == 1) return rest::multiply_tile_ahead<B>;
      else return multiply_pairs;
    }();
    for (int64_t i = tile; i < last; i++, c += tile_rows * c_stride) {
      const LinesAhead share = next.share(i - tile, last - tile);
      const char* from = share.lines ? share.from : reinterpret_cast<const char*>(b);
      const int64_t bytes = ceil_div(share.lines * 64, larger(1, depth));
      if constexpr (Step::k_per_step == 1) {
        if (left.single_row()) return rest::multiply_row_ahead(depth, chain, left.at(begin, 0), b, c, begin > 0, from, bytes);
      } else if (left.rows_of_pairs()) {
        return multiply_rows_of_pairs(m, depth, left.at(begin, 0), depth, b, c, c_stride, begin > 0, from, bytes);
      }
      for (int64_t d = 0; d < depth; d += chain)
        multiply_step(smaller(tile_rows, m - i * tile_rows), smaller(chain, depth - d), left.at(begin, i) + d * tile_rows, b + d * panel, c, c_stride, begin + d > 0,
                      from + d * bytes, bytes);
    }
  };
  each_chunk<Step, Right>(runtime, left, n, direct, direct_stride, [&](const Chunk& chunk) {
    const int64_t first_tile = chunk.first_tile, last_tile = first_tile + chunk.tiles, panels = chunk.panels, c_stride = chunk.c_stride;
    float* const c = chunk.c;
    if (Right::packed && chunk.tiles <= few_tiles) {
      // A single tile's blocks follow each other, so that the unit may go on: emptying its registers took a tenth of the time.
      const int64_t together = by_unit<typename Step::A> && m <= tile_rows && !left.rows_of_pairs() ? 4 * depth_block : depth_block;
      for (int64_t p = 0; p < panels; p++)
        for (int64_t begin = 0; begin < larger(1, steps); begin += together) {
          const int64_t depth = smaller(together, steps - begin);
          const B* b = right.chunk(runtime, chunk.first_panel + p, 1, begin, depth).first;
          // A step of a single row of float32 takes so little time that with short vectors asking only delays it.
          const bool ask = m > 1 || sizeof(B) < sizeof(float) || BIGMODEL_SIMD == 512;
          const int64_t ahead = chunk.tiles == 1 ? stream_ahead / int64_t(sizeof(B)) : depth * panel;
          one(begin, depth, b, first_tile, last_tile, c + p * panel, c_stride, ask ? lines_of(b + ahead, depth) : LinesAhead{});
        }
      return finish_tiles(left, n, chunk, 0, chunk.tiles, finish);
    }
    int64_t begin = 0;
    do {  // once at least: a product of no depth is zero
      const auto right_chunk = right.chunk(runtime, chunk.first_panel, panels, begin, left.depth(begin));
      // What the task reads after this: the next depth block, or the chunk beside this one.
      const B* after = right_chunk.first + (begin + depth_block < steps ? depth_block * panel : panels * right_chunk.stride - begin * panel);
      for (int64_t tile = first_tile; tile < last_tile; tile += part_unit) {
        const int64_t last = smaller(last_tile, tile + part_unit);
        // A's tiles after these, or those of the next depth block.
        auto after_tiles = [&] {
          const bool more = last < last_tile;
          const int64_t begin_next = more ? begin : begin + depth_block < steps ? begin + depth_block : 0, next = more ? last : first_tile;
          return left.lines(begin_next, next, smaller(last_tile, next + part_unit));
        };
        for (int64_t p = 0; p < panels; p++) {
          const B* b = right_chunk.first + p * right_chunk.stride;
          const bool ask = Right::packed && tile == first_tile;
          // Of A only the tile unit takes so much that the hardware's own prefetch is too slow.
          const LinesAhead next = ask ? lines_of(p + 1 < panels ? b + right_chunk.stride : after, left.depth(begin))
                                  : Step::k_per_step > 1 ? after_tiles().share(p, panels) : LinesAhead{};
          one(begin, left.depth(begin), b, tile, last, c + (tile - first_tile) * tile_rows * c_stride + p * panel, c_stride, next);
        }
        if (begin + depth_block >= steps) finish_tiles(left, n, chunk, tile - first_tile, last - first_tile, finish);
      }
      begin += depth_block;
    } while (begin < steps);
  });
}

#if BIGMODEL_AMX
// Of split numbers neither a tile nor a panel as deep as the product fits into L1. So a panel is split block by block, each into L1, and multiplied
// with all tiles of the chunk; and of those only a run, as deep as stays in L2, goes over all panels before the next.
//
//      run            panels ->                            split: a block of it, in L1
//     +----+      +-------+-------+
//     |    |      | split |       |                        products: of all tiles, while the next block of the weight is asked for,
//     | A  |      +-------+       |                        in L2 by then
//     |    |      |       |       |
//     +----+      +-------+-------+
inline constexpr int64_t run_bytes = 384 << 10;
// Of few rows, blocks are split in two halves, of which the second goes on with the sums of the first; and half of the next is asked for while one
// is split.
inline constexpr int64_t few_split_rows = 128;

template <int of_a, int of_b, class Right>
static void multiply_split_columns(Split<of_a, of_b>, const Runtime& runtime, const Left<Parts<of_a>>& left, const Right& rows_or_panels, int64_t n, int64_t k,
                                   float* direct, int64_t direct_stride, Finish finish) {
  constexpr int64_t tile_rows = rows_of<Parts<of_a>>, part_unit = CutBy<tile_rows>::part_unit;
  const int64_t m = left.m, steps = left.steps;
  const SplitRight<of_b, Right> right{rows_or_panels, k};
  const bool few = m <= few_split_rows;
  // Of a tile and a panel, `depth` from `at` on, in depth block `block`; see multiply_split.
  auto multiply = [&](int64_t block, int64_t at, int64_t depth, const Parts<of_b>* b, bool marked, int64_t tile, float* c, int64_t c_stride, bool accumulate,
                      const LinesAhead& next, float* begun) __attribute__((always_inline)) {
    constexpr Streams streams = Right::packed ? Streams::a : Streams::b;
    multiply_split<streams>(!marked && !left.mark(block, tile), smaller(tile_rows, m - tile * tile_rows), depth, left.at(block, tile) + (at - block) * tile_rows, b,
                            c, c_stride, accumulate, next, begun);
  };
  each_chunk<Split<of_a, of_b>, SplitRight<of_b, Right>>(runtime, left, n, direct, direct_stride, [&](const Chunk& chunk) {
    const int64_t run = larger(1, run_bytes / (chunk.tiles * tile_rows * int64_t(sizeof(Parts<of_a>))) / parts_block) * parts_block;
    int64_t begin = 0;
    do {  // once at least: a product of no depth is zero
      if constexpr (Right::packed) {
        alignas(64) float halves[few_split_rows / tile_rows][tile_rows * panel];
        const int64_t end = smaller(steps, begin + run), deepest = few ? parts_block / 2 : parts_block;
        for (int64_t p = 0; p < chunk.panels; p++) {
          int64_t at = begin;
          do {
            const int64_t depth = smaller(deepest, end - at), after = at + depth, block = at / parts_block * parts_block;
            auto lines = [&](int64_t panel_of_chunk, int64_t from) { return lines_of(rows_or_panels.at(chunk.first_panel + panel_of_chunk, from), depth); };
            const LinesAhead next = after < end ? lines(p, after) : p + 1 < chunk.panels ? lines(p + 1, begin) : end < steps ? lines(0, end) : lines(chunk.panels, 0);
            const int64_t meanwhile = few ? smaller(depth, next.lines) : 0;
            const auto split = right.chunk(runtime, chunk.first_panel + p, 1, at, depth, {next.from, meanwhile});
            const bool goes_on = after < smaller(block + parts_block, end);
            for (int64_t i = 0; i < chunk.tiles; i++) {
              float* const c = chunk.c + i * tile_rows * chunk.c_stride + p * panel;
              multiply(block, at, depth, split.first, split.marked, chunk.first_tile + i, goes_on ? halves[i] : c, goes_on ? panel : chunk.c_stride, block > 0 && !goes_on,
                       LinesAhead{next.from + meanwhile * 64, next.lines - meanwhile}.share(i, chunk.tiles), at > block ? halves[i] : nullptr);
            }
            at = after;
          } while (at < end);
        }
        begin = end;
      } else {
        const int64_t depth = left.depth(begin);
        const auto split = right.chunk(runtime, chunk.first_panel, chunk.panels, begin, depth);
        for (int64_t i = 0; i < chunk.tiles; i++) {
          const int64_t tile = chunk.first_tile + i;
          const LinesAhead next = i + 1 < chunk.tiles ? left.lines(begin, tile + 1, tile + 2) : LinesAhead{};
          for (int64_t p = 0; p < chunk.panels; p++)
            multiply(begin, begin, depth, split.first + p * split.stride, split.marked, tile, chunk.c + i * tile_rows * chunk.c_stride + p * panel, chunk.c_stride, begin > 0,
                     next.share(p, chunk.panels), nullptr);
        }
        begin += depth;
      }
    } while (begin < steps);
    for (int64_t tile = 0; tile < chunk.tiles; tile += part_unit) finish_tiles(left, n, chunk, tile, smaller(chunk.tiles, tile + part_unit), finish);
  });
}
#endif

// The same with a right side k deep that has to be split if the left one is.
template <class Step, class Right>
static void multiply_unsplit(const Runtime& runtime, const Left<typename Step::A>& left, const Right& right, int64_t n, [[maybe_unused]] int64_t k, float* direct,
                             int64_t direct_stride, Finish finish) {
  if constexpr (splits<Step>) multiply_split_columns(Step{}, runtime, left, right, n, k, direct, direct_stride, finish);
  else multiply_columns<Step>(runtime, left, right, n, direct, direct_stride, finish);
}

template <class Step, class Packed>
void multiply_packed(const Runtime& runtime, const Left<typename Step::A>& left, const typename Packed::B* panels, int64_t n, int64_t k, float* direct,
                     int64_t direct_stride, Finish finish) {
  multiply_unsplit<Step>(runtime, left, PackedRight<Packed>{panels, steps_of<Packed>(k)}, n, k, direct, direct_stride, finish);
}

template <class Step>
void multiply_operand(const Runtime& runtime, const Left<typename Step::A>& left, const Operand& right, int64_t n, int64_t k, float* direct,
                      int64_t direct_stride, Finish finish) {
#if BIGMODEL_BF16_DOT
  if constexpr (Step::k_per_step > 1) return multiply_columns<Step>(runtime, left, PairsRight{right, n, k}, n, direct, direct_stride, finish);
  else
#endif
    multiply_unsplit<Step>(runtime, left, RowsRight{right, n}, n, k, direct, direct_stride, finish);
}

void product(const Runtime& runtime, const Operand& a, int64_t m, const Operand& b, int64_t n, int64_t k, float* direct, int64_t direct_stride,
             Finish finish) {
  const int64_t together = rows_together(k);
  with_float_step(m, a.rows.parts, b.rows.parts, [&](auto step) {
    using Step = decltype(step);
    for (int64_t first = 0; first < m; first += together) {
      const Left<typename Step::A> left(runtime, scratch_a, smaller(together, m - first), steps_of<Step>(k));
      pack_left(runtime, a, first, k, left);
      multiply_operand<Step>(runtime, left, b, n, k, direct ? direct + first * direct_stride : nullptr, direct_stride,
                             [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* c, int64_t c_stride) {
                               finish(first + row, rows, column, columns, c, c_stride);
                             });
    }
  });
}

// ---- the steps that there are ----

#define BIGMODEL_PACKED(Packed, ...) \
  template void multiply_packed<__VA_ARGS__, Packed>(const Runtime&, const Left<__VA_ARGS__::A>&, const Packed::B*, int64_t, int64_t, float*, int64_t, Finish);
#define BIGMODEL_OPERAND(...) \
  template void multiply_operand<__VA_ARGS__>(const Runtime&, const Left<__VA_ARGS__::A>&, const Operand&, int64_t, int64_t, float*, int64_t, Finish);

BIGMODEL_PACKED(StepOf<float>::Type, StepOf<float>::Type)
BIGMODEL_PACKED(StepOf<bf16>::Type, StepOf<bf16>::Type)
BIGMODEL_PACKED(StepOf<fp16>::Type, StepOf<fp16>::Type)
BIGMODEL_OPERAND(Widen<float>)
#if BIGMODEL_BF16_DOT
BIGMODEL_OPERAND(Pairs)
#endif
#if BIGMODEL_AMX
BIGMODEL_PACKED(StepOf<float>::Type, Split<3, 3>)
BIGMODEL_PACKED(StepOf<fp16>::Type, Split<2, 2>)
BIGMODEL_OPERAND(Split<3, 3>)
BIGMODEL_OPERAND(Split<2, 2>)
template void pack_left(const Runtime&, const Operand&, int64_t, int64_t, const Left<Parts<3>>&);
template void pack_left(const Runtime&, const Operand&, int64_t, int64_t, const Left<Parts<2>>&);
#endif

}  // namespace bigmodel::BIGMODEL_ISA
