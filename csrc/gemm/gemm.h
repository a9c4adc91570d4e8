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
// Emptying the unit's registers takes so long that it works through two blocks at a time, whose panel then comes from L2.
inline constexpr int64_t deepest_block = BIGMODEL_AMX ? 2 * depth_block : depth_block;
template <class A> inline constexpr int64_t depth_block_of = rows_of<A> == tile_rows ? depth_block : deepest_block;

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

// ---- the micro kernel: ROWS x panel accumulators over `steps` k steps ----

template <class Step>
struct PackedTile {          // a tile packed [k][rows_of]
  const typename Step::A* a;
  BIGMODEL_INLINE const typename Step::A* at(int64_t k, int row) const { return a + k * rows_of<typename Step::A> + row; }
};
struct SingleRow {           // a row as it is: in a tile, each of its numbers would be on a line of its own
  const float* a;
  BIGMODEL_INLINE const float* at(int64_t k, int) const { return a + k; }
};
struct RowMajorTile {        // rows as they lie in memory: attention's probabilities
  const float* a;
  int64_t stride;
  BIGMODEL_INLINE const float* at(int64_t k, int row) const { return a + row * stride + k; }
};

// What is asked of memory meanwhile, a little at every k step: asked for at once, it would wait for the few lines that can be under way.
struct Nothing {
  BIGMODEL_INLINE bool asks() const { return false; }
  BIGMODEL_INLINE void operator()(int64_t) const {}
};
struct Rest : Nothing {};    // of a depth that the tile unit has not taken
template <bool two_lines>
struct Ahead {
  const void* from;
  int64_t bytes;             // per k step
  BIGMODEL_INLINE bool asks() const { return bytes != 0; }
  BIGMODEL_INLINE void operator()(int64_t k) const {
    const char* line = static_cast<const char*>(from) + k * bytes;
    __builtin_prefetch(line, 0, 2);
    if constexpr (two_lines) __builtin_prefetch(line + bytes / 2, 0, 2);
  }
};

template <int ROWS, class Step, class Tile, class Next>
BIGMODEL_INLINE void multiply(int64_t steps, const Tile tile, const typename Step::B* b, float* c, int64_t c_stride, bool accumulate, const Next next) {
  // Few rows leave registers free: k is then dealt to several chains, which hides the latency of each and shortens its sum.
  constexpr int chains = ROWS == 1 ? 4 : ROWS <= tile_rows / 2 ? 2 : 1;
  F32 acc[chains][ROWS][panel_vectors];
#pragma GCC unroll 4
  for (int i = 0; i < chains; i++)
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int v = 0; v < panel_vectors; v++) acc[i][r][v] = F32::zero();
  auto step = [&](int64_t k, int i) __attribute__((always_inline)) {
    next(k);
    F32 row[panel_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < panel_vectors; v++) row[v] = Step::panel_row(b + k * panel + v * F32::width);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      const F32 a = Step::broadcast(tile.at(k, r));
#pragma GCC unroll 4
      for (int v = 0; v < panel_vectors; v++) acc[i][r][v] = Step::step(a, row[v], acc[i][r][v]);
    }
  };
  if (accumulate)
    for (int r = 0; r < ROWS; r++) __builtin_prefetch(c + r * c_stride, 1);
  int64_t k = 0;
  for (; k + chains <= steps; k += chains)
#pragma GCC unroll 4
    for (int i = 0; i < chains; i++) step(k + i, i);
  for (; k < steps; k++) step(k, 0);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < panel_vectors; v++) {
      F32 total = acc[0][r][v];
      if constexpr (chains == 2) total = total + acc[1][r][v];
      if constexpr (chains == 4) total = (total + acc[1][r][v]) + (acc[2][r][v] + acc[3][r][v]);
      float* target = c + r * c_stride + v * F32::width;
      (accumulate ? F32::load(target) + total : total).store(target);
    }
}

#if BIGMODEL_AMX
// The unit's sums, in registers 0 and 1 and, if there are two rows of tiles, 2 and 3: nothing, to memory, and to C.
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
static void add_tiles(int64_t rows, float* c, int64_t c_stride, bool accumulate) {
  constexpr int64_t whole = both ? 2 * unit_rows : unit_rows;
  if (!accumulate && rows == whole) return store_tiles<both>(c, c_stride);
  alignas(64) float sums[whole][panel];
  store_tiles<both>(sums[0], panel);
  for (int64_t r = 0; r < rows; r++)
    for (int v = 0; v < panel_vectors; v++) {
      const F32 total = F32::load(sums[r] + v * F32::width);
      float* target = c + r * c_stride + v * F32::width;
      (accumulate ? F32::load(target) + total : total).store(target);
    }
}

// The same by the tile unit, 16 steps (32 of k) at a time. A packed tile is then [block of 16 steps][32 rows][16], and only what is left of
// its depth is [step][32 rows].
//
//              B6   B7                   registers by their numbers, of which the compiler wants to know nothing but literals; the second
//        A4    C0   C1                   row of tiles is left out where there are no rows for it
//        A5    C2   C3
template <bool both, class Next>
static void multiply_by_unit(int64_t rows, int64_t blocks, const uint32_t* a, const uint32_t* b, float* c, int64_t c_stride, bool accumulate, const Next& next) {
  static_assert(panel == 32, "two tiles of 16 columns");
  zero_tiles<both>();
  constexpr int64_t a_half = unit_steps * unit_rows, b_block = unit_steps * panel, b_stride = panel * sizeof(uint32_t);
  for (int64_t block = 0; block < blocks; block++, a += 2 * a_half, b += b_block) {
    if (next.asks())
      for (int64_t i = 0; i < unit_steps; i++) next(block * unit_steps + i);
    _tile_loadd(6, b, b_stride);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + panel / 2, b_stride);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (both) {
      _tile_loadd(5, a + a_half, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  add_tiles<both>(rows, c, c_stride, accumulate);
}

// A packed tile of pairs, of any number of rows up to 32.
template <class Tile, class Next>
static void multiply_pairs(int64_t rows, int64_t steps, const Tile tile, const uint32_t* b, float* c, int64_t c_stride, bool accumulate, const Next& next);
#endif

// `rows` known only at run time: full tiles take the first branch, a block's last tile one of the others.
template <class Step, class Tile, class Next = Nothing, int ROWS = tile_rows>
static void multiply_rows(int64_t rows, int64_t steps, const Tile tile, const typename Step::B* b, float* c, int64_t c_stride, bool accumulate,
                          const Next next = {}) {
#if BIGMODEL_AMX
  if constexpr (ROWS == tile_rows && __is_same(Step, Pairs) && !__is_same(Next, Rest)) return multiply_pairs(rows, steps, tile, b, c, c_stride, accumulate, next);
#endif
  if (rows == ROWS) return multiply<ROWS, Step>(steps, tile, b, c, c_stride, accumulate, next);
  if constexpr (ROWS > 1) multiply_rows<Step, Tile, Next, ROWS - 1>(rows, steps, tile, b, c, c_stride, accumulate, next);
}

#if BIGMODEL_AMX
template <class Tile, class Next>
static void multiply_pairs(int64_t rows, int64_t steps, const Tile tile, const uint32_t* b, float* c, int64_t c_stride, bool accumulate, const Next& next) {
  const int64_t blocks = steps / unit_steps, done = blocks * unit_steps;
  if (blocks)
    (rows > unit_rows ? multiply_by_unit<true, Next> : multiply_by_unit<false, Next>)(rows, blocks, tile.a, b, c, c_stride, accumulate, next);
  if (done == steps && blocks) return;
  for (int64_t r = 0; r < rows; r += tile_rows)  // what is left of the depth, by vectors
    multiply_rows<Pairs, Tile, Rest>(smaller(tile_rows, rows - r), steps - done, Tile{tile.a + done * rows_of<uint32_t> + r}, b + done * panel,
                                     c + r * c_stride, c_stride, accumulate || blocks, Rest{});
}
#endif

// ---- packing A ----

// Packs `rows` rows of x (row stride x_stride, k columns) into tiles [k][tile_rows]; rows that a last tile lacks are not read
// by multiply_rows, so they are left as they are. `packed` needs tile_rows * k * tiles floats and 8 more.
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
// The same as pairs of bf16 along k; an odd k is completed with zero. With a tile unit every 16 steps of a row lie together, see
// multiply_by_unit.
template <class T>
static void pack_rows_pairs(const T* x, int64_t x_stride, int64_t rows, int64_t k, uint32_t* packed) {
  constexpr int64_t tile = rows_of<uint32_t>;
  const int64_t steps = ceil_div(k, 2);
  for (int64_t first = 0; first < rows; first += tile, packed += tile * steps) {
    const int64_t here = smaller(tile, rows - first);
    for (int64_t i = 0; i < here; i++) {
      const T* source = x + (first + i) * x_stride;
      int64_t step = 0;
#if BIGMODEL_AMX
      for (; step + unit_steps <= steps; step += unit_steps) {
        bf16* line = reinterpret_cast<bf16*>(packed + step * tile + i * unit_steps);
        const int64_t count = smaller(2 * unit_steps, k - 2 * step);
        if (count < 2 * unit_steps) line[count] = bf16{0};  // an odd k
        each_vector(count, [&](int64_t at, int lanes) __attribute__((always_inline)) { store(load(source + 2 * step + at, lanes), line + at, lanes); });
      }
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
