// Matrix product of a block of activation rows with a packed weight, the heart of linear, feed_forward and attention.
//
// The picture (Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008; BLIS names):
//
//        packed weight, panels of `panel` columns             A: tiles of `tile_rows` rows, packed [k][tile_rows]
//        +------+------+------+                               C: a tile of tile_rows x panel floats stays in registers
//      k |      |      |      |                                  while k runs through one block of depth_block
//        +------+------+------+
//   A ->   C      C      C        one panel's depth block (panel * depth_block floats) stays in L1 while all tiles of the
//                                 row block go over it; the row block's A stays in L2
//
// Half weights are widened to float32 as they are loaded; where the CPU has a bf16 dot product (AVX-512-BF16) both sides are
// kept as pairs along k and multiplied by it, accumulating in float32; where it has a tile unit (AMX), that multiplies them.
#pragma once
#include "../arch/simd.h"
#if BIGMODEL_AMX
#include "../arch/amx.h"
#endif
#include "../parallel.h"

namespace bigmodel::BIGMODEL_ISA {

// 16 or 32 registers (half as long as F32 where that is twice four lanes) hold the tile, the panel's row and one broadcast.
#if BIGMODEL_SIMD == 512
inline constexpr int tile_rows = 12, panel_vectors = 2;
#elif BIGMODEL_SIMD == 256
inline constexpr int tile_rows = 6, panel_vectors = 2;
#elif BIGMODEL_SIMD == 128
inline constexpr int tile_rows = 8, panel_vectors = 1;
#else
inline constexpr int tile_rows = 4, panel_vectors = 1;
#endif
inline constexpr int panel = panel_vectors * F32::width;
// In k steps. A panel's block (12 KB at 16 columns) stays in L1 with room to spare; the length is set by accuracy: each block's
// sum starts from zero, so no chain of additions is longer, and the error is that of a blocked sum instead of growing with k.
inline constexpr int64_t depth_block = 192;
// Panels are taken in groups whose columns of C (row_block rows) stay in L2 beside A while k runs.
inline constexpr int64_t panel_group = 384 / panel;
inline constexpr int64_t row_block = 16 * tile_rows;

// Rows of a packed tile, by its elements: the tile unit takes two of its registers' rows of pairs at a time.
#if BIGMODEL_AMX
inline constexpr int64_t unit_steps = 16, unit_rows = 16;
template <int count> struct Parts;  // of float32, see split.h
template <class A> inline constexpr int rows_of = __is_same(A, uint32_t) ? 2 * unit_rows : tile_rows;
template <int count> inline constexpr int rows_of<Parts<count>> = 2 * unit_rows;
#else
template <class A> inline constexpr int rows_of = tile_rows;
#endif
template <class A> inline constexpr bool by_unit = rows_of<A> != tile_rows;
// Emptying the unit's registers takes time, so that blocks are as deep as lets a panel's stay in L1 beside what comes of A, for the unit takes 64
// bytes a cycle, twice what comes from L2: of pairs (steps of them) 16 KB, of numbers in three parts 24.
inline constexpr int64_t pairs_block = 128, parts_block = 128, deepest_block = BIGMODEL_AMX ? 2 * depth_block : depth_block;
template <class A>
inline constexpr int64_t depth_block_of = !by_unit<A> ? depth_block : __is_same(A, uint32_t) ? pairs_block : parts_block;

// ---- how one k step multiplies: the element types of A and of the panel, and the step itself ----

template <class Weight>
struct Widen {               // A float32; panel float32, bf16 or fp16, widened at load
  using A = float;
  using B = Weight;
  struct Unit { Unit() {} };
  static constexpr int k_per_step = 1;
  static BIGMODEL_INLINE F32 panel_row(const B* b) { return F32::load(b); }
  static BIGMODEL_INLINE F32 broadcast(const A* a) { return F32::set(*a); }
  static BIGMODEL_INLINE F32 step(F32 a, F32 b, F32 acc) { return fma(a, b, acc); }
};

#if BIGMODEL_BF16_DOT
struct Pairs {               // both sides bf16 pairs along k
  using A = uint32_t;
  using B = uint32_t;
#if BIGMODEL_AMX
  using Unit = TileUnit;
#endif
  static constexpr int k_per_step = 2;
  static BIGMODEL_INLINE F32 panel_row(const B* b) { return {_mm512_castsi512_ps(_mm512_loadu_si512(b))}; }
  static BIGMODEL_INLINE F32 broadcast(const A* a) { return {_mm512_castsi512_ps(_mm512_set1_epi32(int(*a)))}; }
  static BIGMODEL_INLINE F32 step(F32 a, F32 b, F32 acc) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
  }
};
#endif

// What is asked of memory meanwhile, a little at every k step: asked for at once, it would wait for the few lines that can be under way.
struct Nothing {
  BIGMODEL_INLINE void operator()(int64_t) const {}
};
template <bool two_lines>
struct Ahead {
  const void* from;
  int64_t bytes;             // per k step
  BIGMODEL_INLINE void operator()(int64_t k) const {
    const char* line = static_cast<const char*>(from) + k * bytes;
    __builtin_prefetch(line, 0, 2);
    if (two_lines && bytes > 64) __builtin_prefetch(line + bytes / 2, 0, 2);
  }
};
template <class B> inline constexpr int64_t row_bytes = panel * int64_t(sizeof(B));
template <class B> using AheadOf = Ahead<(row_bytes<B> > 64)>;

// Cache lines that are asked for while something else is computed.
struct LinesAhead {
  const char* from = nullptr;
  int64_t lines = 0;
  LinesAhead share(int64_t index, int64_t count) const {
    const int64_t each = ceil_div(lines, count);
    return {from + index * each * 64, larger(0, smaller(each, lines - index * each))};
  }
};

#if BIGMODEL_AMX
// The unit's sums, in registers 0 and 1 and, if there are two rows of tiles, 2 and 3: nothing, to memory, from memory, and added to C.
template <bool both>
BIGMODEL_INLINE void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (both) {
    _tile_zero(2);
    _tile_zero(3);
  }
}
template <bool both>
BIGMODEL_INLINE void store_tiles(float* c, int64_t c_stride) {
  const int64_t bytes = c_stride * int64_t(sizeof(float));
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + F32::width, bytes);
  if constexpr (both) {
    _tile_stored(2, c + unit_rows * c_stride, bytes);
    _tile_stored(3, c + unit_rows * c_stride + F32::width, bytes);
  }
}
template <bool both>
BIGMODEL_INLINE void load_tiles(const float* c, int64_t c_stride) {
  const int64_t bytes = c_stride * int64_t(sizeof(float));
  _tile_loadd(0, c, bytes);
  _tile_loadd(1, c + F32::width, bytes);
  if constexpr (both) {
    _tile_loadd(2, c + unit_rows * c_stride, bytes);
    _tile_loadd(3, c + unit_rows * c_stride + F32::width, bytes);
  }
}
// `rows` rows of sums (x panel), into C or added to it.
static inline void add_rows(int64_t rows, const float* sums, float* c, int64_t c_stride, bool accumulate) {
  for (int64_t r = 0; r < rows; r++)
    for (int v = 0; v < panel_vectors; v++) {
      const F32 total = F32::load(sums + r * panel + v * F32::width);
      float* target = c + r * c_stride + v * F32::width;
      (accumulate ? F32::load(target) + total : total).store(target);
    }
}
template <bool both>
static void add_tiles(int64_t rows, float* c, int64_t c_stride, bool accumulate) {
  constexpr int64_t whole = both ? 2 * unit_rows : unit_rows;
  if (!accumulate && rows == whole) return store_tiles<both>(c, c_stride);
  alignas(64) float sums[whole][panel];
  store_tiles<both>(sums[0], panel);
  add_rows(rows, sums[0], c, c_stride, accumulate);
}
#endif

// ---- the micro kernel ----
//
// C (rows x panel) = A B, or += A B if `accumulate`: at least one row and at most a tile's, `steps` deep. B is a panel, [k][panel].
// Compiled once, in tiles.cpp: with a body for each number of rows it takes longer to compile than what calls it.

}  // namespace bigmodel::BIGMODEL_ISA

// By float32 instructions, which the sets that extend another share with it: in types that they share.
namespace bigmodel::BIGMODEL_REST {

// A: a packed tile, [k][tile_rows].
void multiply_tile(int64_t rows, int64_t steps, const float* a, const float* b, float* c, int64_t c_stride, bool accumulate);
// A: rows, or columns, as they lie in memory, `a_stride` apart.
void multiply_tile_of_rows(int64_t rows, int64_t steps, const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride,
                           bool accumulate);
void multiply_tile_of_columns(int64_t rows, int64_t steps, const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride,
                              bool accumulate);
// A: a packed tile. B: of a weight; halves are widened as they are loaded. At each step `bytes` more of what lies at `ahead` are asked for.
template <class Weight>
void multiply_tile_ahead(int64_t rows, int64_t steps, const float* a, const Weight* b, float* c, int64_t c_stride, bool accumulate,
                         const void* ahead, int64_t bytes);
// The same for a single row, as it lies, in sums of `chain` steps that follow each other.
template <class Weight>
void multiply_row_ahead(int64_t steps, int64_t chain, const float* a, const Weight* b, float* c, bool accumulate, const void* ahead,
                        int64_t bytes);

}  // namespace bigmodel::BIGMODEL_REST

namespace bigmodel::BIGMODEL_ISA {

// multiply_tile_ahead for pairs, by the dot product or the tile unit: with that a packed tile is [block of 16 steps][32 rows][16], and what
// is left of its depth [step][32 rows].
void multiply_pairs(int64_t rows, int64_t steps, const uint32_t* a, const uint32_t* b, float* c, int64_t c_stride, bool accumulate,
                    const void* ahead, int64_t bytes);
// The same for few rows as they lie, `a_stride` apart: by the dot product, which takes less time for them than the tile unit.
inline constexpr int64_t most_rows_of_pairs = 4;
void multiply_rows_of_pairs(int64_t rows, int64_t steps, const uint32_t* a, int64_t a_stride, const uint32_t* b, float* c, int64_t c_stride,
                            bool accumulate, const void* ahead, int64_t bytes);

// ---- packing A ----

// Packs `rows` rows of x (row stride x_stride, k columns) into tiles [k][tile_rows]; rows that a last tile lacks are not read
// by the micro kernel, so they are left as they are. `packed` needs tile_rows * k * tiles floats and 8 more.
template <class T>
static void pack_rows(const T* x, int64_t x_stride, int64_t rows, int64_t k, float* packed, float scale = 1.0f) {
  for (int64_t first = 0; first < rows; first += tile_rows, packed += tile_rows * k) {
    const int64_t here = smaller(tile_rows, rows - first);
    const T* source = x + first * x_stride;
    int64_t column = 0;
#if BIGMODEL_SIMD >= 128
    // A group's eight-wide store may run past its own rows into the next k: groups go from last to first and k upwards, so
    // whatever was spilled into is written later.
    for (; column + 8 <= k; column += 8) {
      for (int64_t group = (here - 1) / 8 * 8; group >= 0; group -= 8) {
        Eight r[8];
        for (int i = 0; i < 8; i++) r[i] = group + i < here ? times8(load8(source + (group + i) * x_stride + column), scale) : zero8();
        transpose8x8(r, packed + column * tile_rows + group, tile_rows);
      }
    }
#endif
    for (; column < k; column++)
      for (int64_t i = 0; i < here; i++) packed[column * tile_rows + i] = to_float(source[i * x_stride + column]) * scale;
  }
}

#if BIGMODEL_BF16_DOT
// out[i * out_stride + r] = rows[r][i] for 16 rows of 16 pairs.
BIGMODEL_INLINE void transpose_pairs(const bf16* const rows[16], uint32_t* out, int64_t out_stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)  // a[i + c]: columns c, c + 4, c + 8, c + 12 of rows i to i + 3
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      a[i + 2 * half] = _mm512_unpacklo_epi64(b[i + half], b[i + 2 + half]);
      a[i + 2 * half + 1] = _mm512_unpackhi_epi64(b[i + half], b[i + 2 + half]);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44), high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    _mm512_storeu_si512(out + c * out_stride, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(out + (4 + c) * out_stride, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(out + (8 + c) * out_stride, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(out + (12 + c) * out_stride, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

// 16 columns of k numbers, which column(i) points at, as pairs: a line of them for each two k, `panel` apart; an odd k is completed with zero.
// The hardware's own prefetch does not follow so many columns.
template <class Column>
static void columns_as_pairs(const Column& column, int64_t k, uint32_t* out) {
  constexpr int64_t count = 16, block = 2 * count, ahead = 4 * block;
  const bf16* columns[count];
  for (int64_t i = 0; i < count; i++) columns[i] = column(i);
  int64_t at = 0;
  for (; at + block <= k; at += block) {
    transpose_pairs(columns, out + at / 2 * panel, panel);
    for (int64_t i = 0; i < count; i++) {
      if (at + ahead < k) __builtin_prefetch(columns[i] + ahead);
      columns[i] += block;
    }
  }
  if (at == k) return;
  alignas(64) bf16 ends[count][block] = {};
  alignas(64) uint32_t last[count][count];
  for (int64_t i = 0; i < count; i++) columns[i] = static_cast<const bf16*>(memcpy(ends[i], columns[i], size_t(k - at) * sizeof(bf16)));
  transpose_pairs(columns, last[0], count);
  for (int64_t pair = 0; pair < ceil_div(k - at, 2); pair++) memcpy(out + (at / 2 + pair) * panel, last[pair], sizeof last[pair]);
}

// Two rows' 16 numbers as pairs, and those of k rows, which row(i) points at, likewise.
BIGMODEL_INLINE __m512i pairs_of_rows(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}
template <class Row>
static void rows_as_pairs(const Row& row, int64_t k, uint32_t* out) {
  auto numbers = [&](int64_t i) __attribute__((always_inline)) {
    return i < k ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row(i))) : _mm256_setzero_si256();
  };
  for (int64_t i = 0; i < k; i += 2, out += panel) _mm512_storeu_si512(out, pairs_of_rows(numbers(i), numbers(i + 1)));
}

// k numbers as pairs of bf16; an odd k is completed with zero.
template <class T>
BIGMODEL_INLINE void copy_pairs(const T* x, int64_t k, uint32_t* pairs) {
  bf16* out = reinterpret_cast<bf16*>(pairs);
  if constexpr (__is_same(T, bf16)) memcpy(out, x, size_t(k) * sizeof(bf16));
  else each_vector(k, [&](int64_t at, int lanes) __attribute__((always_inline)) { store(load(x + at, lanes), out + at, lanes); });
  if (k % 2) out[k] = bf16{0};
}

// Pieces of rows lie too far apart for the hardware's own prefetch: they are asked for so many rows before.
inline constexpr int64_t rows_ahead = 4;

// Rows as pack_rows has them, in pairs of bf16 along k; an odd k is completed with zero. With a tile unit every 16 steps of a row lie together, see
// multiply_pairs.
template <class T>
static void pack_rows_pairs(const T* x, int64_t x_stride, int64_t rows, int64_t k, uint32_t* packed) {
  constexpr int64_t tile = rows_of<uint32_t>;
  const int64_t steps = ceil_div(k, 2);
  for (int64_t first = 0; first < rows; first += tile, packed += tile * steps) {
    const int64_t here = smaller(tile, rows - first);
    for (int64_t i = 0; i < here; i++) {
      const T* source = x + (first + i) * x_stride;
      if (first + i + rows_ahead < rows)
        for (int64_t at = 0; at < k; at += 64 / int64_t(sizeof(T))) __builtin_prefetch(source + rows_ahead * x_stride + at);
      int64_t step = 0;
#if BIGMODEL_AMX
      for (; step + unit_steps <= steps; step += unit_steps)
        copy_pairs(source + 2 * step, smaller(2 * unit_steps, k - 2 * step), packed + step * tile + i * unit_steps);
#endif
      for (; step * 2 + F32::width <= k; step += F32::width / 2) {
        alignas(64) uint32_t pairs[F32::width / 2];
        F32::load(source + step * 2).store(reinterpret_cast<bf16*>(pairs));
        for (int j = 0; j < F32::width / 2; j++) packed[(step + j) * tile + i] = pairs[j];
      }
      for (; step < steps; step++) {
        bf16 pair[2] = {{0}, {0}};
        from_float(to_float(source[step * 2]), &pair[0]);
        if (step * 2 + 1 < k) from_float(to_float(source[step * 2 + 1]), &pair[1]);
        packed[step * tile + i] = uint32_t(pair[0].bits) | uint32_t(pair[1].bits) << 16;
      }
    }
  }
}
#endif

}  // namespace bigmodel::BIGMODEL_ISA
