// The micro kernel of a product for every number of rows that a tile may have: what gemm.h declares.
#include "gemm.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

// ---- where a row of A is at a step ----

template <class Step>
struct PackedTile {          // a tile packed [k][rows_of]
  const typename Step::A* a;
  BIGMODEL_INLINE const typename Step::A* at(int64_t k, int row) const { return a + k * rows_of<typename Step::A> + row; }
};
struct SingleRow {           // a row as it is: in a tile, each of its numbers would be on a line of its own
  const float* a;
  BIGMODEL_INLINE const float* at(int64_t k, int) const { return a + k; }
};
template <class A>
struct RowMajorTile {        // rows as they lie in memory
  const A* a;
  int64_t stride;
  BIGMODEL_INLINE const A* at(int64_t k, int row) const { return a + row * stride + k; }
};
struct ColumnTile {          // the transpose of rows as they lie in memory
  const float* a;
  int64_t stride;
  BIGMODEL_INLINE const float* at(int64_t k, int row) const { return a + k * stride + row; }
};

// ---- ROWS x panel accumulators over `steps` k steps ----

template <int ROWS, class Step, class Tile, class Next>
BIGMODEL_INLINE void multiply(int64_t steps, const Tile tile, const typename Step::B* b, float* c, int64_t c_stride, bool accumulate,
                              const Next next) {
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

// `rows` known only at run time: full tiles take the first branch, a block's last tile one of the others. The lower half, whose chains are
// several, is a function of its own: in one with the rest, addresses of rows were kept on the stack.
template <class Step, class Tile, class Next>
__attribute__((noinline)) void multiply_few_rows(int64_t rows, int64_t steps, const Tile tile, const typename Step::B* b, float* c,
                                                 int64_t c_stride, bool accumulate, const Next next);
template <class Step, class Tile, class Next = Nothing, int ROWS = tile_rows>
BIGMODEL_INLINE void multiply_rows(int64_t rows, int64_t steps, const Tile tile, const typename Step::B* b, float* c, int64_t c_stride,
                                   bool accumulate, const Next next = {}) {
  if (rows == ROWS) return multiply<ROWS, Step>(steps, tile, b, c, c_stride, accumulate, next);
  if constexpr (ROWS == tile_rows / 2 + 1) multiply_few_rows<Step>(rows, steps, tile, b, c, c_stride, accumulate, next);
  else if constexpr (ROWS > 1) multiply_rows<Step, Tile, Next, ROWS - 1>(rows, steps, tile, b, c, c_stride, accumulate, next);
}
template <class Step, class Tile, class Next>
void multiply_few_rows(int64_t rows, int64_t steps, const Tile tile, const typename Step::B* b, float* c, int64_t c_stride,
                       bool accumulate, const Next next) {
  multiply_rows<Step, Tile, Next, tile_rows / 2>(rows, steps, tile, b, c, c_stride, accumulate, next);
}

#if BIGMODEL_AMX
// By the tile unit, 16 steps (32 of k) at a time.
//
//              B6   B7                   registers by their numbers, of which the compiler wants to know nothing but literals; the second
//        A4    C0   C1                   row of tiles is left out where there are no rows for it
//        A5    C2   C3
//
// A register is loaded for the next block as soon as no product of this one needs it, so that those that follow hide the load.
template <bool both>
void multiply_by_unit(int64_t rows, int64_t blocks, const uint32_t* a, const uint32_t* b, float* c, int64_t c_stride, bool accumulate,
                      const AheadOf<uint32_t>& ahead) {
  static_assert(panel == 32, "two tiles of 16 columns");
  constexpr int64_t a_half = unit_steps * unit_rows, b_block = unit_steps * panel, b_stride = panel * sizeof(uint32_t);
  auto step = [&]<bool last>() __attribute__((always_inline)) {
    const uint32_t *a_next = a + 2 * a_half, *b_next = b + b_block;
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (!last) _tile_loadd(4, a_next, 64);
    if constexpr (both) _tile_dpbf16ps(2, 5, 6);
    if constexpr (!last) _tile_loadd(6, b_next, b_stride);
    if constexpr (both) _tile_dpbf16ps(3, 5, 7);
    if constexpr (!last) _tile_loadd(7, b_next + panel / 2, b_stride);
    if constexpr (!last && both) _tile_loadd(5, a_next + a_half, 64);
    a = a_next;
    b = b_next;
  };
  // The sums go on from where C is; of tiles that C has not all rows of, the others are whatever they were.
  constexpr int64_t whole = both ? 2 * unit_rows : unit_rows;
  alignas(64) float few[whole][panel];
  const bool all = rows == whole;
  float* sums = all ? c : few[0];
  const int64_t sums_stride = all ? c_stride : panel;
  if (!all && accumulate)
    for (int64_t r = 0; r < rows; r++) memcpy(few[r], c + r * c_stride, sizeof few[r]);
  if (accumulate) load_tiles<both>(sums, sums_stride);
  else zero_tiles<both>();
  _tile_loadd(4, a, 64);
  _tile_loadd(6, b, b_stride);
  _tile_loadd(7, b + panel / 2, b_stride);
  if constexpr (both) _tile_loadd(5, a + a_half, 64);
  for (int64_t block = 0; block < blocks; block++) {
    const char* lines = static_cast<const char*>(ahead.from) + block * unit_steps * ahead.bytes;
    for (int64_t at = 0; at < unit_steps * ahead.bytes; at += 64) __builtin_prefetch(lines + at, 0, 2);
    if (block + 1 < blocks) step.template operator()<false>();
    else step.template operator()<true>();
  }
  store_tiles<both>(sums, sums_stride);
  if (!all)
    for (int64_t r = 0; r < rows; r++) memcpy(c + r * c_stride, few[r], sizeof few[r]);
}
#endif

}  // namespace

#if BIGMODEL_AMX
void multiply_pairs(int64_t rows, int64_t steps, const uint32_t* a, const uint32_t* b, float* c, int64_t c_stride, bool accumulate,
                    const void* ahead, int64_t bytes) {
  const int64_t blocks = steps / unit_steps, done = blocks * unit_steps;
  if (blocks)
    (rows > unit_rows ? multiply_by_unit<true> : multiply_by_unit<false>)(rows, blocks, a, b, c, c_stride, accumulate, {ahead, bytes});
  if (done == steps && blocks) return;
  for (int64_t r = 0; r < rows; r += tile_rows)  // what is left of the depth, by vectors
    multiply_rows<Pairs>(smaller(tile_rows, rows - r), steps - done, PackedTile<Pairs>{a + done * rows_of<uint32_t> + r}, b + done * panel,
                         c + r * c_stride, c_stride, accumulate || blocks);
}
#elif BIGMODEL_BF16_DOT
void multiply_pairs(int64_t rows, int64_t steps, const uint32_t* a, const uint32_t* b, float* c, int64_t c_stride, bool accumulate,
                    const void* ahead, int64_t bytes) {
  multiply_rows<Pairs>(rows, steps, PackedTile<Pairs>{a}, b, c, c_stride, accumulate, AheadOf<uint32_t>{ahead, bytes});
}
#endif

#if BIGMODEL_BF16_DOT
void multiply_rows_of_pairs(int64_t rows, int64_t steps, const uint32_t* a, int64_t a_stride, const uint32_t* b, float* c, int64_t c_stride,
                            bool accumulate, const void* ahead, int64_t bytes) {
  multiply_rows<Pairs, RowMajorTile<uint32_t>, AheadOf<uint32_t>, most_rows_of_pairs>(rows, steps, {a, a_stride}, b, c, c_stride, accumulate, {ahead, bytes});
}
#else
void multiply_tile(int64_t rows, int64_t steps, const float* a, const float* b, float* c, int64_t c_stride, bool accumulate) {
  multiply_rows<Widen<float>>(rows, steps, PackedTile<Widen<float>>{a}, b, c, c_stride, accumulate);
}

void multiply_tile_of_rows(int64_t rows, int64_t steps, const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride,
                           bool accumulate) {
  multiply_rows<Widen<float>>(rows, steps, RowMajorTile<float>{a, a_stride}, b, c, c_stride, accumulate);
}

void multiply_tile_of_columns(int64_t rows, int64_t steps, const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride,
                              bool accumulate) {
  multiply_rows<Widen<float>>(rows, steps, ColumnTile{a, a_stride}, b, c, c_stride, accumulate);
}

template <class Weight>
void multiply_tile_ahead(int64_t rows, int64_t steps, const float* a, const Weight* b, float* c, int64_t c_stride, bool accumulate,
                         const void* ahead, int64_t bytes) {
  using Step = Widen<Weight>;
  multiply_rows<Step>(rows, steps, PackedTile<Step>{a}, b, c, c_stride, accumulate, AheadOf<Weight>{ahead, bytes});
}

template <class Weight>
void multiply_row_ahead(int64_t steps, int64_t chain, const float* a, const Weight* b, float* c, bool accumulate, const void* ahead,
                        int64_t bytes) {
  for (int64_t k = 0; k < steps; k += chain)
    multiply<1, Widen<Weight>>(smaller(chain, steps - k), SingleRow{a + k}, b + k * panel, c, panel, accumulate || k > 0,
                               AheadOf<Weight>{static_cast<const char*>(ahead) + k * bytes, bytes});
}

#define BIGMODEL_AHEAD(Weight) \
  template void multiply_tile_ahead(int64_t, int64_t, const float*, const Weight*, float*, int64_t, bool, const void*, int64_t); \
  template void multiply_row_ahead(int64_t, int64_t, const float*, const Weight*, float*, bool, const void*, int64_t);
BIGMODEL_AHEAD(float)
BIGMODEL_AHEAD(bf16)
BIGMODEL_AHEAD(fp16)
#endif

}  // namespace bigmodel::BIGMODEL_ISA
