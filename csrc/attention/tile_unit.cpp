// The attention forward by the tile unit (AMX), in bf16, and in float32 as sums of three bf16 (gemm/split.h). Between the products all is
// float32, but P is rounded to bf16 for P V where inputs are bf16, as in eager.
//
//                 K: pairs along depth             V: pairs along keys
//                +----+----+----+----+            +----+----+
//   Q: rows      |    |    |    |    |            |    |    |     bf16: [panel of 32 columns][16 pairs][half of the panel][16 x 16 pairs]:
//   of bf16      +----+----+----+----+            |    |    |     a register of pairs is 1 KB in one piece
//     +----+                                      |    |    |
//     |    |  ->   S -> P, rows of bf16      ->   +----+----+     a product is made of 2 x 2 registers of 16 x 16 floats,
//     +----+                                         O += P V     which end in memory as they are
//
// A block of rows and keys goes through three steps one after the other: S = Q K^T, P in the place of its S, O += P V. (Measured slower:
// the products dealt out between the rows of the softmax of another block, and shorter blocks of keys, whose scores fit L1.)
//
// Float32 goes the same way: Q, K and V are split once for a chunk, and P as it is made, beside its S; each product is six. P V is then
// as exact as with float32 instructions.
//
// What a block lacks in rows, depth, keys or columns is there as zeros, so that only whole registers are loaded and stored. Chunks that are
// too small to gain by this are left to the vectors (cpu.cpp).
#include "forward.h"
#include "parts.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

constexpr int64_t block_rows = 2 * unit_rows;
constexpr int64_t unit_pairs = unit_steps * 16;     // in a register

// ---- packing ----

// K's rows as panels of pairs along depth; keys and depth are rounded up to 32.
static void pack_key_pairs(const bf16* keys, int64_t stride, int64_t n, int64_t depth, uint32_t* packed) {
  alignas(64) bf16 buffer[16][32];
  const int64_t steps = round_up(depth, 32) / 2;
  for (int64_t first = 0; first < round_up(n, panel); first += 16) {
    const bf16* source = keys + first * stride;
    const int64_t here = smaller(16, n - first);
    uint32_t* out = packed + first / panel * (steps * panel) + first % panel / 16 * unit_pairs;
    // Rows lie a whole (batch, heads) stride apart, which no hardware prefetcher follows.
    for (int64_t i = 16; i < smaller(32, n - first); i++)
      for (int64_t d = 0; d < depth; d += 32) __builtin_prefetch(source + i * stride + d);
    for (int64_t d = 0; d < depth; d += 32) {
      const bf16* rows[16];
      const bool whole = here == 16 && d + 32 <= depth;
      if (!whole) memset(buffer, 0, sizeof(buffer));
      for (int i = 0; i < 16; i++) {
        rows[i] = whole ? source + i * stride + d : buffer[i];
        if (!whole && i < here) memcpy(buffer[i], source + i * stride + d, size_t(smaller(32, depth - d)) * sizeof(bf16));
      }
      transpose_pairs(rows, out + d / 2 * panel, 16);
    }
  }
}

// V's rows as panels of pairs along keys; keys and columns are rounded up to 32.
static void pack_value_pairs(const bf16* values, int64_t stride, int64_t n, int64_t depth, uint32_t* packed) {
  const int64_t pairs = round_up(n, 32) / 2;
  auto pack = [&](const bf16* even, const bf16* odd, uint32_t* out) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int half = 0; half < 32; half += 16) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + half)));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + half)));
      _mm512_storeu_si512(out + half / 16 * unit_pairs, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  };
  for (int64_t pair = 0; pair < pairs; pair++) {
    const bf16* source = values + 2 * pair * stride;
    const int64_t here = smaller(2, n - 2 * pair);
    uint32_t* out = packed + pair / unit_steps * (2 * unit_pairs) + pair % unit_steps * 16;
    for (int64_t ahead = 16; ahead < smaller(18, n - 2 * pair); ahead++)
      for (int64_t d = 0; d < depth; d += 32) __builtin_prefetch(source + ahead * stride + d);
    int64_t d = 0;
    if (here == 2)
      for (; d + 32 <= depth; d += 32, out += pairs * panel) pack(source + d, source + stride + d, out);
    for (; d < depth; d += 32, out += pairs * panel) {
      alignas(64) bf16 rows[2][32] = {};
      for (int64_t i = 0; i < here; i++) memcpy(rows[i], source + i * stride + d, size_t(smaller(32, depth - d)) * sizeof(bf16));
      pack(rows[0], rows[1], out);
    }
  }
}

// ---- the product ----

// C (32 x 32, or 16 x 32) = A B, or += A B, over 32 * blocks of depth. A: rows of bf16; B: a panel of pairs. The registers are those of
// gemm.h: C 0 to 3, A 4 and 5, B 6 and 7.
template <bool both>
static void multiply_unit(int64_t blocks, const bf16* a, int64_t a_stride, const uint32_t* b, float* c, int64_t c_stride, bool accumulate) {
  static_assert(panel == 32, "two registers of 16 columns");
  const int64_t a_bytes = a_stride * int64_t(sizeof(bf16)), c_bytes = c_stride * int64_t(sizeof(float));
  const bf16* a_lower = a + unit_rows * a_stride;
  float* c_lower = c + unit_rows * c_stride;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    if constexpr (both) {
      _tile_loadd(2, c_lower, c_bytes);
      _tile_loadd(3, c_lower + 16, c_bytes);
    }
  } else {
    zero_tiles<both>();
  }
  for (int64_t block = 0; block < blocks; block++, b += 2 * unit_pairs) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a + block * 32, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + unit_pairs, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (both) {
      _tile_loadd(5, a_lower + block * 32, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_tiles<both>(c, c_stride);
}

// ---- the softmax ----

// Lane r of the result is rows[r] reduced over its lanes: a quarter of the instructions of 16 reductions, and no chain of them.
template <class Op>
BIGMODEL_INLINE F32 reduce_rows(const F32 rows[16], const Op& op) {
  __m512 quads[4];  // of four rows, which alternate; a 128-bit lane has what its own four lanes came to
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const F32* x = rows + 4 * i;
    const F32 p = op(F32{_mm512_unpacklo_ps(x[0].v, x[1].v)}, F32{_mm512_unpackhi_ps(x[0].v, x[1].v)});
    const F32 q = op(F32{_mm512_unpacklo_ps(x[2].v, x[3].v)}, F32{_mm512_unpackhi_ps(x[2].v, x[3].v)});
    const __m512d pd = _mm512_castps_pd(p.v), qd = _mm512_castps_pd(q.v);
    quads[i] = op(F32{_mm512_castpd_ps(_mm512_unpacklo_pd(pd, qd))}, F32{_mm512_castpd_ps(_mm512_unpackhi_pd(pd, qd))}).v;
  }
  const F32 low = op(F32{_mm512_shuffle_f32x4(quads[0], quads[1], 0x44)}, F32{_mm512_shuffle_f32x4(quads[0], quads[1], 0xee)});
  const F32 high = op(F32{_mm512_shuffle_f32x4(quads[2], quads[3], 0x44)}, F32{_mm512_shuffle_f32x4(quads[2], quads[3], 0xee)});
  return op(F32{_mm512_shuffle_f32x4(low.v, high.v, 0x88)}, F32{_mm512_shuffle_f32x4(low.v, high.v, 0xdd)});
}

// 2^x for x below 127, as exp2 of simd.h, from a table: x = k / 32 + r, 2^x = 2^(k / 32) * (1 + r * (a + b * r)). Relative error below
// 1.5 float32 ulp; exactly 0 from -127 down and exactly 1 at 0. An entry is 2^(i / 32) less what the low bits of k, which are i, add
// to its mantissa when k is shifted to the exponent's place.
struct TableOfPowers {
  __m512i low, high;
  TableOfPowers() {
    alignas(64) static constexpr uint32_t entries[32] = {
        0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532,
        0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be,
        0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
    low = _mm512_load_si512(entries);
    high = _mm512_load_si512(entries + 16);
  }
  BIGMODEL_INLINE F32 operator()(F32 x) const {
    const F32 clamped = max(F32::set(-127.0f), x);  // x second: a NaN stays one
    const F32 shifted = clamped + F32::set(0x1.8p18f);  // its last mantissa bit is worth 1 / 32
    const F32 r = {_mm512_reduce_ps(clamped.v, 5 << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};  // by 5 binary places
    const __m512i k = _mm512_castps_si512(shifted.v);
    const F32 power = {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_permutex2var_epi32(low, k, high), _mm512_slli_epi32(k, 18)))};
    return fma(power, fma(F32::set(0.24022707f), r, F32::set(0.6931573f)) * r, power);
  }
};

// The softmax of `rows` (up to 16) rows of `width` scores, Operands::score_line apart, each of which becomes a row of P, which `put` takes
// by 32. As Attention::softmax, for the rows together; `base` is what a score is multiplied by to be an exponent of 2. The factors by
// which what was summed before shrinks go to `factors`. Returns whether all P are numbers; then they are at most 1.
template <class Operands, bool DROP, class Put>
static bool softmax_rows(int64_t rows, int64_t width, const float* scores, float base, Statistics* statistics, const uint8_t* keep, float* factors, const Put& put) {
  constexpr int64_t score_line = Operands::score_line, keep_line = Operands::keep_line;
  alignas(64) float maximum[16], sums[16], references[16];
  F32 partial[16];
  for (int64_t r = 0; r < 16; r++) {
    F32 m0 = F32::set(-infinity), m1 = m0;
    const float* line = scores + r * score_line;
    if (r < rows)
      for (int64_t j = 0; j < width; j += 2 * F32::width) {
        m0 = max(m0, F32::load(line + j));
        m1 = max(m1, F32::load(line + j + F32::width));
      }
    partial[r] = max(m0, m1);
    maximum[r] = r < rows ? statistics[r].maximum : -infinity;
    sums[r] = r < rows ? statistics[r].sum : 0.0f;
  }
  const F32 none = F32::set(-infinity), factor_of_score = F32::set(base), before = F32::load(maximum);
  const F32 top = max(reduce_rows(partial, [](F32 a, F32 b) { return max(a, b); }), before);
  const F32 reference = select_less(none, top, top, F32::zero());  // no key seen yet: -inf - 0 stays -inf and 2^-inf is 0
  const F32 factor = exp2((before - reference) * factor_of_score);
  reference.store(references);
  factor.store(factors);
  top.store(maximum);

  const TableOfPowers power;
  for (int64_t r = 0; r < rows; r++) {
    const F32 from = F32::set(references[r]);
    const float* line = scores + r * score_line;
    F32 t0 = F32::zero(), t1 = t0;
    for (int64_t j = 0; j < width; j += 2 * F32::width) {
      F32 p0 = power((F32::load(line + j) - from) * factor_of_score), p1 = power((F32::load(line + j + F32::width) - from) * factor_of_score);
      t0 = t0 + p0;
      t1 = t1 + p1;
      if constexpr (DROP) {
        uint32_t bits;
        memcpy(&bits, keep + r * keep_line + j / 8, 4);
        p0 = keep_lanes(p0, bits & 0xffff);
        p1 = keep_lanes(p1, bits >> 16);
      }
      put(r, j, p0, p1);
    }
    partial[r] = t0 + t1;
  }
  for (int64_t r = rows; r < 16; r++) partial[r] = F32::zero();
  const F32 added = reduce_rows(partial, [](F32 a, F32 b) { return a + b; });
  fma(F32::load(sums), factor, added).store(sums);
  for (int64_t r = 0; r < rows; r++) statistics[r] = {maximum[r], sums[r]};
  return _mm512_cmp_ps_mask(added.v, added.v, _CMP_UNORD_Q) == 0;
}

// ---- what is multiplied ----

// Queries of a chunk, a block of keys and values, and the probabilities of a block of rows, for one type of element. A line of scores is
// an odd number of cache lines, or the rows of a tile would share their cache sets.
template <class T>
struct Operands;

template <>
struct Operands<bf16> {
  static constexpr int64_t block_keys = 512, score_line = block_keys + 16, keep_line = block_keys / 8;
  static bool worthwhile(int64_t rows, int64_t keys) { return rows * keys > direct_scores; }  // so few fill too little of the registers

  const Runtime& runtime;
  const int64_t depth, padded, padded_rows;
  bf16* const query = static_cast<bf16*>(runtime.scratch(scratch_query, size_t(padded_rows * padded) * sizeof(bf16)));
  uint32_t* const key = static_cast<uint32_t*>(runtime.scratch(scratch_key, size_t(block_keys * padded / 2) * sizeof(uint32_t)));
  uint32_t* const value = static_cast<uint32_t*>(runtime.scratch(scratch_value, size_t(block_keys * padded / 2) * sizeof(uint32_t)));
  int64_t keys = 0;                    // that are packed, rounded up to whole blocks

  void put_query(int64_t row, const bf16* source) {  // null: a row of zeros
    bf16* line = query + row * padded;
    if (source) memcpy(line, source, size_t(depth) * sizeof(bf16));
    memset(line + (source ? depth : 0), 0, size_t(padded - (source ? depth : 0)) * sizeof(bf16));
  }
  void pack(const bf16* k, int64_t k_stride, const bf16* v, int64_t v_stride, int64_t n) {
    keys = round_up(n, 32);
    pack_key_pairs(k, k_stride, n, depth, key);
    pack_value_pairs(v, v_stride, n, depth, value);
  }
  // 32 x 32 scores of `here` rows and the panel of keys that begins at `from`.
  void multiply_scores(int64_t row, int64_t here, int64_t from, float* scores) const {
    (here > unit_rows ? multiply_unit<true> : multiply_unit<false>)(padded / 32, query + row * padded, padded, key + from * (padded / 2), scores, score_line, false);
  }
  // P in the place of the scores: 16 lines from `row` on.
  template <class Softmax>
  void make_probabilities(int64_t row, float* scores, const Softmax& softmax) {
    softmax([&](int64_t r, int64_t j, F32 p0, F32 p1) __attribute__((always_inline)) {
      _mm512_storeu_si512(reinterpret_cast<bf16*>(scores + (row + r) * score_line) + j, __m512i(_mm512_cvtne2ps_pbh(p1.v, p0.v)));
    });
  }
  // Output columns from d on += P of `width` keys from `from` on times V.
  void multiply_values(int64_t here, const float* scores, int64_t from, int64_t width, int64_t d, float* output) const {
    (here > unit_rows ? multiply_unit<true> : multiply_unit<false>)(width / 32, reinterpret_cast<const bf16*>(scores), 2 * score_line,
                                                                    value + d / 2 * keys + from / 2 * panel, output, padded, true);
  }
};

template <>
struct Operands<float> {
  static constexpr int64_t block_keys = 256, score_line = block_keys + 16, keep_line = block_keys / 8;
  static_assert(block_keys <= deepest_block, "multiply_joined");
  // Below, splitting costs more than the unit saves.
  static bool worthwhile(int64_t rows, int64_t keys) { return rows >= 64 && keys >= 64; }

  const Runtime& runtime;
  const int64_t depth, padded, padded_rows;
  template <class P> P* scratch(ScratchSlot slot, int64_t bytes) const { return static_cast<P*>(runtime.scratch(slot, size_t(bytes))); }
  Parts<3>* const query = scratch<Parts<3>>(scratch_query, padded_rows * padded * int64_t(sizeof(Parts<3>)) + padded_rows);
  Parts<3>* const key = scratch<Parts<3>>(scratch_key, block_keys * padded * int64_t(sizeof(Parts<3>)));
  Parts<3>* const value = scratch<Parts<3>>(scratch_value, block_keys * padded * int64_t(sizeof(Parts<3>)));
  Parts<3>* const probabilities = scratch<Parts<3>>(scratch_a, block_rows * block_keys * int64_t(sizeof(Parts<3>)));
  // Whether a tile holds numbers without parts: of rows of queries, panels of keys, panels of V's columns, and P.
  uint8_t* const query_marks = reinterpret_cast<uint8_t*>(query + padded_rows * padded);
  bool key_marks[block_keys / panel], value_marks[256 / panel], probabilities_mark = false;
  int64_t keys = 0;

  void put_query(int64_t row, const float* source) {
    constexpr float zeros[256] = {};
    if (row % block_rows == 0) query_marks[row / block_rows] = 0;
    query_marks[row / block_rows] |= !split_row(source ? source : zeros, depth, query + row / block_rows * block_rows * padded, row % block_rows);
  }
  void pack(const float* k, int64_t k_stride, const float* v, int64_t v_stride, int64_t n) {
    keys = round_up(n, panel);
    for (int64_t first = 0; first < n; first += panel) {
      const int64_t here = smaller(panel, n - first), next = first + here, ahead = smaller(panel, n - next);
      ask_for_rows(k + next * k_stride, k_stride, ahead, depth);
      ask_for_rows(v + next * v_stride, v_stride, ahead, depth);
      key_marks[first / panel] = !split_keys(k + first * k_stride, k_stride, here, depth, key + first * padded);
      split_values(v + first * v_stride, v_stride, here, depth, value + first * panel, keys * panel,
                   [&](int64_t p, bool parts) { value_marks[p] = !parts || (first > 0 && value_marks[p]); });
    }
  }
  void multiply_scores(int64_t row, int64_t here, int64_t from, float* scores) const {
    multiply_split(!query_marks[row / block_rows] && !key_marks[from / panel], here > unit_rows ? block_rows : unit_rows, padded, query + row * padded,
                   key + from * padded, scores, score_line, false);
  }
  template <class Softmax>
  void make_probabilities(int64_t row, float*, const Softmax& softmax) {
    const bool marked = !softmax([&](int64_t r, int64_t j, F32 p0, F32 p1) __attribute__((always_inline)) {
      put_row(probabilities + j * block_rows, row + r, split<3>(p0.v), split<3>(p1.v));
    });
    probabilities_mark = marked || (row > 0 && probabilities_mark);
    if (marked)
      softmax([&](int64_t r, int64_t j, F32 p0, F32 p1) { put_row(probabilities + j * block_rows, row + r, split_any<3>(p0.v), split_any<3>(p1.v)); });
  }
  void multiply_values(int64_t here, const float*, int64_t from, int64_t width, int64_t d, float* output) const {
    multiply_split(!probabilities_mark && !value_marks[d / panel], here, width, probabilities, value + d * keys + from * panel, output, padded, true);
  }
};

// ---- the chunk ----

template <class T>
struct UnitChunk {
  static constexpr int64_t block_keys = Operands<T>::block_keys, score_line = Operands<T>::score_line, keep_line = Operands<T>::keep_line;
  const Attention& of;
  const Attention::Sequence& s;
  const int64_t first, count;          // queries
  const int64_t rows = count * of.group, padded_rows = round_up(rows, block_rows), padded = round_up(of.depth, 32);
  const float base = of.unit * log2e;
  Operands<T> operands = {of.runtime, of.depth, padded, padded_rows};
  float* const output = scratch_of<float>(of.runtime, scratch_output, padded_rows * padded);
  float* const scores = scratch_of<float>(of.runtime, scratch_scores, (block_rows + 1) * score_line);  // the last line holds the padding mask
  Statistics* const statistics = scratch_of<Statistics>(of.runtime, scratch_statistics, rows);
  uint8_t* const bits = of.args.dropout.enabled ? scratch_of<uint8_t>(of.runtime, scratch_keep, rows * keep_line) : nullptr;

  struct Keys {                        // what is packed: [first, first + n)
    int64_t first, n;
    const float* mask;
  };

  const T* source(int64_t row) const {
    return static_cast<const T*>(of.args.query) + s.query + of.query_of(first, row) * of.args.query_stride[2] + of.head_of(s, row) * of.args.query_stride[1];
  }

  void run() {
    for (int64_t row = 0; row < padded_rows; row++) {
      if (row + 16 < rows)
        for (int64_t d = 0; d < of.depth; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(source(row + 16) + d);
      operands.put_query(row, row < rows ? source(row) : nullptr);
      if (row < rows) statistics[row] = of.start(s, of.head_of(s, row));
    }
    memset(output, 0, size_t(padded_rows * padded) * sizeof(float));
    const int64_t low = of.low(s, first), end = of.high(s, first + count - 1);
    for (int64_t key = bits ? low / 16 * 16 : low; key < end; key += block_keys) {
      const int64_t n = smaller(block_keys, end - key);
      bool visible;
      const float* mask = of.padding(s, key, n, round_up(n, panel), scores + block_rows * score_line, visible);
      if (!visible) continue;
      if (bits) of.draw(s, first, count, key, n, bits, keep_line);
      operands.pack(static_cast<const T*>(of.args.key) + s.key + key * of.args.key_stride[2], of.args.key_stride[2],
                    static_cast<const T*>(of.args.value) + s.value + key * of.args.value_stride[2], of.args.value_stride[2], n);
      for (int64_t row = 0; row < rows; row += block_rows) block(row, smaller(block_rows, rows - row), {key, n, mask});
    }
  }

  // Rows [row, row + here) against the packed keys, of which those that no row sees are left out by whole panels.
  void block(int64_t row, int64_t here, const Keys& k) {
    const int64_t first_query = of.query_of(first, row), last_query = of.query_of(first, row + here - 1);
    const int64_t from = larger(0, of.low(s, first_query) - k.first) / panel * panel;
    const int64_t width = round_up(smaller(k.n, of.high(s, last_query) - k.first) - from, panel);
    if (width <= 0) return;
    for (int64_t p = 0; p < width; p += panel) operands.multiply_scores(row, here, from + p, scores + p);

    // Nothing is to be done to scores of which every row sees all.
    const bool plain = of.raw && !k.mask && from + width <= smaller(k.n, of.high(s, first_query) - k.first) && from >= of.low(s, last_query) - k.first;
    for (int64_t r = 0; r < here && !plain; r++)
      of.modify(s, of.query_of(first, row + r), of.head_of(s, row + r), k.first + from, smaller(width, k.n - from), width,
                k.mask ? k.mask + from : nullptr, scores + r * score_line);
    alignas(64) float factors[block_rows];
    for (int64_t r = 0; r < here; r += unit_rows) {
      const int64_t count = smaller(unit_rows, here - r);
      const float* lines = scores + r * score_line;
      Statistics before[unit_rows];
      memcpy(before, statistics + row + r, size_t(count) * sizeof(Statistics));
      operands.make_probabilities(r, scores, [&](const auto& put) __attribute__((always_inline)) {
        memcpy(statistics + row + r, before, size_t(count) * sizeof(Statistics));
        if (!bits) return softmax_rows<Operands<T>, false>(count, width, lines, base, statistics + row + r, nullptr, factors + r, put);
        return softmax_rows<Operands<T>, true>(count, width, lines, base, statistics + row + r, bits + (row + r) * keep_line + from / 8, factors + r, put);
      });
    }
    for (int64_t r = 0; r < here; r++) of.rescale(output + (row + r) * padded, padded, factors[r]);
    for (int64_t d = 0; d < padded; d += panel) operands.multiply_values(here, scores, from, width, d, output + row * padded + d);
  }
};

template <class T>
void attention_of(const Runtime& runtime, const AttentionArgs& args) {
  const Attention of = {runtime, args};
  each_chunk(of, 1024, [&](const Attention::Sequence& s, int64_t first, int64_t count) {
    const int64_t rows = count * of.group;
    const bool few = rows <= direct_rows;
    if (few || !Operands<T>::worthwhile(rows, s.keys))
      return rest::attention_chunk(runtime, args, s.batch, s.kv_head, first, count, few || __is_same(T, bf16));
    const TileUnit registers;
    UnitChunk<T> c{of, s, first, count};
    c.run();
    for (int64_t row = 0; row < rows; row++)
      finish_row<T>(of, s, of.query_of(first, row), of.head_of(s, row), c.output + row * c.padded, c.statistics[row].sum,
                    c.statistics[row].maximum * of.unit);
  });
}

}  // namespace

void attention(const Runtime& runtime, const AttentionArgs& args) {
  // Few rows in every chunk: decoding.
  if (args.query_length * (args.heads / args.kv_heads) <= direct_rows) return rest::attention(runtime, args);
  switch (args.dtype) {
    case Dtype::float32: return attention_of<float>(runtime, args);
    case Dtype::bfloat16: return attention_of<bf16>(runtime, args);
    case Dtype::float16: return rest::attention(runtime, args);
  }
}

}  // namespace bigmodel::BIGMODEL_ISA
