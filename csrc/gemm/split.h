// Products of float32 by the tile unit, which multiplies bf16 alone: each number is the sum of three of them, 8 bits each,
//
//     x = high + middle + low          exactly: the 24 bits of a float32
//
// and of the nine products of two such sums the six that count are made (Henry, Tang & Heinecke, "Leveraging the bfloat16 Artificial
// Intelligence Datatype For Higher-Precision Computations", arXiv 1904.06376): what is left out is below 2^-25 of |a| |b|, less than the
// rounding of a float32 product. The unit adds up 32 products before it adds to the sum, so that a sum has fewer roundings than one of
// float32 instructions. Six products of the unit take less than half the time of one by vectors.
//
//     l.h  m.h  m.m  h.m  h.l  h.h     in this order: small ones first, and each step loads one side's tiles only
//
// Where results are fp16, two parts (16 bits) are enough: four products. Where they are bf16 it is one, all of a stored number and what is
// computed rounded to one, as it would be between two operators.
//
// The parts of numbers below 2^-110 are subnormal bf16, which the unit takes for zero. Infinities, NaN and the few numbers that bf16 would
// round to infinity have no such parts: a tile that holds one is marked, and multiplied by vectors from the parts' sum.
#pragma once
#include "gemm.h"

namespace bigmodel::BIGMODEL_ISA {

// One of the two operands' elements. They lie in blocks of 32 of k: [block][part][two tiles of 1 KB], a tile as the unit takes it: of A
// 16 rows of 32 k, of B 16 pairs of k of 16 columns.
template <int count>
struct Parts { uint16_t of[count]; };

template <int of_a, int of_b>
struct Split {
  using A = Parts<of_a>;
  using B = Parts<of_b>;
  using Unit = TileUnit;
  static constexpr int k_per_step = 1;
};

inline constexpr int64_t split_depth = 32, tile_words = 16 * 32;   // k of a block; elements of one of the unit's tiles
static_assert(depth_block % split_depth == 0 && panel == split_depth && sizeof(Parts<3>) == 6);

// A part's first or second tile in a block: rows 0 to 15 or 16 to 31 of A, columns of B.
template <int count>
BIGMODEL_INLINE uint16_t* part_of(Parts<count>* block, int part, int64_t half) { return reinterpret_cast<uint16_t*>(block) + (part * 2 + half) * tile_words; }
template <int count>
BIGMODEL_INLINE const uint16_t* part_of(const Parts<count>* block, int part, int64_t half) { return part_of(const_cast<Parts<count>*>(block), part, half); }

// Sixteen numbers, each part in the upper half of a word.
template <int count>
struct PartsOf16 { __m512i part[count]; };

BIGMODEL_INLINE __m512i magnitude(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }
template <int count>
BIGMODEL_INLINE PartsOf16<count> split(__m512 x) {
  const __m512i half = _mm512_set1_epi32(0x8000), top = _mm512_set1_epi32(int(0xffff0000u));
  PartsOf16<count> parts;
#pragma GCC unroll 3
  for (int part = 0; part < count; part++) {
    // The third part is what is left, and has no bits to round.
    const __m512i bits = _mm512_castps_si512(x);
    parts.part[part] = part == 2 ? bits : _mm512_and_si512(_mm512_add_epi32(bits, half), top);
    if (part + 1 < count) x = _mm512_sub_ps(x, _mm512_castsi512_ps(parts.part[part]));
  }
  return parts;
}
// `largest` gathers the largest magnitude, whose bits are in order.
template <int count>
BIGMODEL_INLINE PartsOf16<count> split(__m512 x, __m512i& largest) {
  largest = _mm512_max_epi32(largest, magnitude(x));
  return split<count>(x);
}
BIGMODEL_INLINE bool without_parts(__m512i largest) {  // from half a bf16 step below infinity
  return _mm512_cmpgt_epi32_mask(largest, _mm512_set1_epi32(0x7f7f7fff)) != 0;
}
// The same for any number: cut, not rounded, and what is not finite is its own highest part.
template <int count>
static PartsOf16<count> split_any(__m512 x) {
  const __m512i top = _mm512_set1_epi32(int(0xffff0000u));
  const __mmask16 finite = _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(0x7f800000), magnitude(x));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  PartsOf16<count> parts;
  for (int part = 0; part < count; part++) {
    const __m512i cut = _mm512_and_si512(_mm512_castps_si512(x), top);
    parts.part[part] = part == 0 ? _mm512_mask_or_epi32(cut, nan, cut, _mm512_set1_epi32(0x400000)) : cut;
    x = _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(parts.part[part]));
  }
  return parts;
}
// 32 numbers of a row of A, of which two vectors have the parts, into line `row` of a block.
template <int count>
BIGMODEL_INLINE void put_row(Parts<count>* block, int64_t row, const PartsOf16<count>& a, const PartsOf16<count>& b) {
  // The upper halves of two vectors' words, one after the other.
  alignas(64) static constexpr auto upper = [] { struct { uint16_t of[32]; } r; for (int i = 0; i < 32; i++) r.of[i] = uint16_t(2 * i + 1); return r; }();
  const __m512i order = _mm512_load_si512(upper.of);
#pragma GCC unroll 3
  for (int part = 0; part < count; part++)
    _mm512_store_si512(part_of(block, part, row / unit_rows) + row % unit_rows * split_depth, _mm512_permutex2var_epi16(a.part[part], order, b.part[part]));
}

// n numbers of a row of A into row `row` of the blocks of its tile; the last block is completed with zeros. Returns whether all have parts.
template <int count>
static bool split_row(const float* x, int64_t n, Parts<count>* tile, int64_t row) {
  __m512i largest = _mm512_setzero_si512();
  auto load_two = [&](int64_t at, F32 two[2]) __attribute__((always_inline)) {
    for (int i = 0; i < 2; i++) {
      const int64_t left = n - at - i * F32::width;
      two[i] = left >= F32::width ? F32::load(x + at + i * F32::width) : left > 0 ? load_partial(x + at + i * F32::width, int(left)) : F32::zero();
    }
  };
  for (int64_t at = 0; at < n; at += split_depth) {
    F32 two[2];
    load_two(at, two);
    const auto a = split<count>(two[0].v, largest), b = split<count>(two[1].v, largest);
    put_row(tile + at * rows_of<Parts<count>>, row, a, b);
  }
  if (!without_parts(largest)) return true;
  for (int64_t at = 0; at < n; at += split_depth) {
    F32 two[2];
    load_two(at, two);
    put_row(tile + at * rows_of<Parts<count>>, row, split_any<count>(two[0].v), split_any<count>(two[1].v));
  }
  return false;
}

// 16 numbers of two rows of B, an even one and the next, into a block.
template <int count>
BIGMODEL_INLINE void put_pair(Parts<count>* block, int64_t pair, int64_t half, const PartsOf16<count>& even, const PartsOf16<count>& odd) {
#pragma GCC unroll 3
  for (int part = 0; part < count; part++)
    _mm512_store_si512(part_of(block, part, half) + pair * 32, _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even.part[part], 16), odd.part[part]));
}

// `depth` rows of a panel of B, `stride` apart, into blocks; the last block is completed with zeros. `next`: what is asked of memory at each
// row. Returns whether all have parts.
template <class T, int count, class Next = Nothing>
static bool split_panel(const T* x, int64_t depth, Parts<count>* blocks, int64_t stride = panel, const Next next = {}) {
  __m512i largest = _mm512_setzero_si512();
  auto row = [&](int64_t k, int64_t half) __attribute__((always_inline)) { return k < depth ? F32::load(x + k * stride + half * F32::width).v : _mm512_setzero_ps(); };
  for (int64_t k = 0; k < round_up(depth, split_depth); k += 2) {
    next(k);
    next(k + 1);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const auto even = split<count>(row(k, half), largest), odd = split<count>(row(k + 1, half), largest);
      put_pair(blocks + k / split_depth * (split_depth * panel), k % split_depth / 2, half, even, odd);
    }
  }
  if (!without_parts(largest)) return true;
  for (int64_t k = 0; k < round_up(depth, split_depth); k += 2)
    for (int half = 0; half < 2; half++)
      put_pair(blocks + k / split_depth * (split_depth * panel), k % split_depth / 2, half, split_any<count>(row(k, half)), split_any<count>(row(k + 1, half)));
  return false;
}

// The pairs of parts that are multiplied, small ones first; each differs from the one before on one side alone.
template <int of_a, int of_b>
struct PartPairs {
  int a[6] = {}, b[6] = {}, count = 0;
  constexpr PartPairs() {
    constexpr int high = 0, middle = 1, low = 2;
    constexpr int every[6][2] = {{low, high}, {middle, high}, {middle, middle}, {high, middle}, {high, low}, {high, high}};
    for (const auto& pair : every)
      if (pair[0] < of_a && pair[1] < of_b) {
        a[count] = pair[0];
        b[count++] = pair[1];
      }
  }
};

// The side that comes from L2: each block of it is asked into L1 while the one before is multiplied, for a register that is loaded from L2 keeps
// the unit waiting.
enum class Streams { neither, a, b };

// C (up to 32 rows x panel) = or += A B, `depth` deep, a multiple of a block's. `begun`: a sum (32 rows x panel) that goes on, or null.
template <bool both, Streams streams, int of_a, int of_b>
static void multiply_parts(int64_t rows, int64_t depth, const Parts<of_a>* a, const Parts<of_b>* b, float* c, int64_t c_stride, bool accumulate,
                           const LinesAhead ahead, const float* begun) {
  static constexpr PartPairs<of_a, of_b> pairs;
  static constexpr int64_t block_lines = (streams == Streams::a ? of_a : of_b) * 2 * unit_rows, pair_lines = (block_lines + pairs.count - 1) / pairs.count;
  const int64_t share = ceil_div(ahead.lines * split_depth, larger(1, depth) * pairs.count);
  const char* line = ahead.from;
  auto load_a0 = [&](int part) __attribute__((always_inline)) { _tile_loadd(4, part_of(a, part, 0), 64); };
  auto load_a1 = [&](int part) __attribute__((always_inline)) { if constexpr (both) _tile_loadd(5, part_of(a, part, 1), 64); };
  auto load_b0 = [&](int part) __attribute__((always_inline)) { _tile_loadd(6, part_of(b, part, 0), 64); };
  auto load_b1 = [&](int part) __attribute__((always_inline)) { _tile_loadd(7, part_of(b, part, 1), 64); };
  auto lower0 = []() __attribute__((always_inline)) { if constexpr (both) _tile_dpbf16ps(2, 5, 6); };
  auto lower1 = []() __attribute__((always_inline)) { if constexpr (both) _tile_dpbf16ps(3, 5, 7); };
  // One pair. A register is loaded for the next one as soon as no product needs it, so that those that follow hide the load.
  auto pair = [&]<int i, bool last>() __attribute__((always_inline)) {
    if constexpr (i < pairs.count) {
      constexpr bool end = i + 1 == pairs.count;
      constexpr int next = end ? 0 : i + 1;
      constexpr bool load = !(end && last), load_a = load && (end || pairs.a[next] != pairs.a[i]), load_b = load && (end || pairs.b[next] != pairs.b[i]);
      if constexpr (end) {
        a += split_depth * rows_of<Parts<of_a>>;
        b += split_depth * panel;
      }
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (load_b && !load_a) {
        lower0();
        load_b0(pairs.b[next]);
        _tile_dpbf16ps(1, 4, 7);
        lower1();
        load_b1(pairs.b[next]);
      } else {
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (load_a) load_a0(pairs.a[next]);
        lower0();
        if constexpr (load_b) load_b0(pairs.b[next]);
        lower1();
        if constexpr (load_b) load_b1(pairs.b[next]);
        if constexpr (load_a) load_a1(pairs.a[next]);
      }
      if constexpr (streams != Streams::neither) {
        const char* const here = streams == Streams::a ? reinterpret_cast<const char*>(a) : reinterpret_cast<const char*>(b);
        const char* const soon = here + (end ? 0 : block_lines * 64) + i * pair_lines * 64;
#pragma GCC unroll 32
        for (int64_t n = 0; n < pair_lines; n++) __builtin_prefetch(soon + n * 64);
      }
      for (int64_t n = 0; n < share; n++, line += 64) __builtin_prefetch(line, 0, 2);
    }
  };
  auto block = [&]<bool last>() __attribute__((always_inline)) {
    pair.template operator()<0, last>();
    pair.template operator()<1, last>();
    pair.template operator()<2, last>();
    pair.template operator()<3, last>();
    pair.template operator()<4, last>();
    pair.template operator()<5, last>();
  };
  if (begun) load_tiles<both>(begun, panel);
  else zero_tiles<both>();
  if (depth > 0) {
    load_a0(pairs.a[0]);
    load_b0(pairs.b[0]);
    load_b1(pairs.b[0]);
    load_a1(pairs.a[0]);
    for (int64_t k = split_depth; k < depth; k += split_depth) block.template operator()<false>();
    block.template operator()<true>();
  }
  add_tiles<both>(rows, c, c_stride, accumulate);
}

// The same by vectors, of any numbers; of_a and of_b are the parts of each. Seldom called, and compiled once, in split.cpp.
void multiply_joined(int64_t rows, int64_t depth, int of_a, const void* a, int of_b, const void* b, float* c, int64_t c_stride, bool accumulate);

template <Streams streams = Streams::neither, int of_a, int of_b>
BIGMODEL_INLINE void multiply_split(bool by_unit, int64_t rows, int64_t depth, const Parts<of_a>* a, const Parts<of_b>* b, float* c, int64_t c_stride,
                                    bool accumulate, const LinesAhead ahead = {}, float* begun = nullptr) {
  if (by_unit)
    return (rows > unit_rows ? multiply_parts<true, streams, of_a, of_b> : multiply_parts<false, streams, of_a, of_b>)(rows, depth, a, b, c, c_stride, accumulate,
                                                                                                                   ahead, begun);
  multiply_joined(rows, depth, of_a, a, of_b, b, begun ? begun : c, begun ? panel : c_stride, begun || accumulate);
  if (begun) add_rows(rows, begun, c, c_stride, accumulate);
}

}  // namespace bigmodel::BIGMODEL_ISA
