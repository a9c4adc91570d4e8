// Philox-4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and the two
// rules by which dropout asks it for the fate of an element. An element's word depends on its place alone: forward and backward,
// every backend and any division of the work agree on it. An element is kept when its word is at least `threshold`.
//
// One call of the generator takes a counter of four numbers and gives four words. The unit here is eight calls side by side whose
// first counters are c, c + 1, ... c + 7, which makes a mask of 32 bits, one per word, in the order in which the elements lie:
//
//   elements of a row    counter = (column without its bits 3 and 4, row, row >> 32, 0), word = those two bits of the column
//                        bits    = columns 32 b ... 32 b + 31
//   probabilities        counter = (key without its bit 3, query without its bit 3, head, sequence), word = bit 3 of key + 2 * bit 3 of query
//                        bits    = keys 16 b ... 16 b + 15 of the query whose bit 3 is 0, then of the query eight further on
//
// The generator multiplies 32 by 32 bits to 64, and so the numbers live in 64-bit lanes. Their upper halves are never looked at: what
// an addition of rubbish there would cost to clear is saved.
#pragma once
#include "simd.h"
#include "../kernels.h"

namespace bigmodel::BIGMODEL_ISA {

struct Philox4 { uint32_t word[4]; };

// One call.
BIGMODEL_INLINE Philox4 philox(const uint32_t key[2], Philox4 counter) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3], k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
  }
  return {{c0, c1, c2, c3}};
}

// ---- eight calls side by side ----

#if BIGMODEL_SIMD == 512
struct Lanes8 { __m512i v; };
BIGMODEL_INLINE Lanes8 lanes8(uint32_t x) { return {_mm512_set1_epi64(int64_t(x))}; }
BIGMODEL_INLINE Lanes8 lanes8_from(uint32_t x) { return {_mm512_add_epi64(_mm512_set1_epi64(int64_t(x)), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0))}; }
BIGMODEL_INLINE Lanes8 operator^(Lanes8 a, Lanes8 b) { return {_mm512_xor_si512(a.v, b.v)}; }
BIGMODEL_INLINE Lanes8 product(Lanes8 a, uint32_t b) { return {_mm512_mul_epu32(a.v, _mm512_set1_epi64(int64_t(b)))}; }
BIGMODEL_INLINE Lanes8 high_half(Lanes8 a) { return {_mm512_srli_epi64(a.v, 32)}; }
BIGMODEL_INLINE __m256i words8(Lanes8 a) { return _mm512_cvtepi64_epi32(a.v); }
#elif BIGMODEL_SIMD == 256
struct Lanes8 { __m256i even, odd; };
BIGMODEL_INLINE Lanes8 lanes8(uint32_t x) { return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}; }
BIGMODEL_INLINE Lanes8 lanes8_from(uint32_t x) {
  const __m256i first = _mm256_set1_epi32(int(x));
  return {_mm256_add_epi32(first, _mm256_setr_epi32(0, 0, 2, 0, 4, 0, 6, 0)), _mm256_add_epi32(first, _mm256_setr_epi32(1, 0, 3, 0, 5, 0, 7, 0))};
}
BIGMODEL_INLINE Lanes8 operator^(Lanes8 a, Lanes8 b) { return {_mm256_xor_si256(a.even, b.even), _mm256_xor_si256(a.odd, b.odd)}; }
BIGMODEL_INLINE Lanes8 product(Lanes8 a, uint32_t b) {
  const __m256i factor = _mm256_set1_epi32(int(b));
  return {_mm256_mul_epu32(a.even, factor), _mm256_mul_epu32(a.odd, factor)};
}
BIGMODEL_INLINE Lanes8 high_half(Lanes8 a) { return {_mm256_srli_epi64(a.even, 32), _mm256_srli_epi64(a.odd, 32)}; }
BIGMODEL_INLINE __m256i words8(Lanes8 a) { return _mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xaa); }
#else
typedef uint64_t Words2 __attribute__((vector_size(16)));
struct Lanes8 { Words2 v[4]; };
BIGMODEL_INLINE Lanes8 lanes8(uint32_t x) { const Words2 two = {x, x}; return {{two, two, two, two}}; }
BIGMODEL_INLINE Lanes8 lanes8_from(uint32_t x) { const Words2 two = {x, x}; return {{two + Words2{0, 1}, two + Words2{2, 3}, two + Words2{4, 5}, two + Words2{6, 7}}}; }
BIGMODEL_INLINE Lanes8 operator^(Lanes8 a, Lanes8 b) { return {{a.v[0] ^ b.v[0], a.v[1] ^ b.v[1], a.v[2] ^ b.v[2], a.v[3] ^ b.v[3]}}; }
#if BIGMODEL_SIMD == 128  // which multiplies no lanes of 64 bits
BIGMODEL_INLINE Lanes8 product(Lanes8 a, uint32_t b) { for (Words2& e : a.v) e = Words2(vmull_u32(vmovn_u64(uint64x2_t(e)), vdup_n_u32(b))); return a; }
#else
BIGMODEL_INLINE Lanes8 product(Lanes8 a, uint32_t b) { for (Words2& e : a.v) e = (e & 0xffffffffu) * b; return a; }
#endif
BIGMODEL_INLINE Lanes8 high_half(Lanes8 a) { for (Words2& e : a.v) e >>= 32; return a; }
#endif

struct Philox8 { Lanes8 word[4]; };

// Counters (c0 + lane, c1, c2, c3).
BIGMODEL_INLINE Philox8 philox8(const uint32_t key[2], uint32_t first, uint32_t second, uint32_t third, uint32_t fourth) {
  Lanes8 c0 = lanes8_from(first), c1 = lanes8(second), c2 = lanes8(third), c3 = lanes8(fourth);
  uint32_t k0 = key[0], k1 = key[1];
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const Lanes8 p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u);
    c0 = high_half(p1) ^ c1 ^ lanes8(k0);
    c1 = p1;
    c2 = high_half(p0) ^ c3 ^ lanes8(k1);
    c3 = p0;
  }
  return {{c0, c1, c2, c3}};
}

// Words of a kind, lane by lane.
BIGMODEL_INLINE void store_words(Lanes8 a, uint32_t out[8]) {
#if BIGMODEL_SIMD >= 256
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words8(a));
#else
  for (int i = 0; i < 8; i++) out[i] = uint32_t(a.v[i / 2][i % 2]);
#endif
}

// Bit i: lane i's word is at least the threshold.
BIGMODEL_INLINE uint32_t at_least(Lanes8 a, uint32_t threshold) {
#if BIGMODEL_SIMD >= 256
  const __m256i words = words8(a), least = _mm256_set1_epi32(int(threshold));
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(words, least), words))));
#else
  uint32_t bits = 0;
  for (int i = 0; i < 8; i++) bits |= uint32_t(uint32_t(a.v[i / 2][i % 2]) >= threshold) << i;
  return bits;
#endif
}

// Not inlined: forty multiplications are worth a call.
__attribute__((noinline)) static uint32_t keep_bits(const Dropout& dropout, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  const Philox8 r = philox8(dropout.key, c0, c1, c2, c3);
  return at_least(r.word[0], dropout.threshold) | at_least(r.word[1], dropout.threshold) << 8 |
         at_least(r.word[2], dropout.threshold) << 16 | at_least(r.word[3], dropout.threshold) << 24;
}

// ---- the two rules ----

// Bit i: element (row, 32 * block + i) is kept.
BIGMODEL_INLINE uint32_t keep_elements(const Dropout& dropout, int64_t row, int64_t block) {
  return keep_bits(dropout, uint32_t(block) << 3, uint32_t(uint64_t(row)), uint32_t(uint64_t(row) >> 32), 0);
}

// Bit i: the probability of key 16 * block + i is kept for query q, where q is `query` with bit 3 cleared; bit 16 + i: for q + 8.
BIGMODEL_INLINE uint32_t keep_probabilities(const Dropout& dropout, int64_t block, int64_t query, int64_t head, int64_t sequence) {
  return keep_bits(dropout, uint32_t(block) << 3, uint32_t(query >> 4) << 3 | uint32_t(query & 7), uint32_t(head), uint32_t(sequence));
}

// Lanes whose bit is 0 become 0; lane i looks at bit i.
BIGMODEL_INLINE F32 keep_lanes(F32 x, uint32_t bits) {
#if BIGMODEL_SIMD == 512
  return {_mm512_maskz_mov_ps(__mmask16(bits), x.v)};
#elif BIGMODEL_SIMD == 256
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane), lane);
  return {_mm256_and_ps(x.v, _mm256_castsi256_ps(kept))};
#else
  const Bits4 all = Bits4{} + bits, low = {1, 2, 4, 8}, high = {16, 32, 64, 128};
  return {select((all & low) == low, x.low, Float4{}), select((all & high) == high, x.high, Float4{})};
#endif
}

// Dropout of x[0, n), columns [first, first + n) of a row: 0 or x / (1 - p). `first` is a multiple of F32::width.
static inline void drop_elements(const Dropout& dropout, int64_t row, int64_t first, int64_t n, float* x) {
  const F32 scale = F32::set(dropout.scale);
  for (int64_t i = 0; i < n;) {
    const int64_t column = first + i, end = (column / 32 + 1) * 32 - first;
    uint32_t bits = keep_elements(dropout, row, column / 32) >> (column % 32);
    for (; i < n && i < end; i += F32::width, bits = uint32_t(uint64_t(bits) >> F32::width)) {
      if (n - i >= F32::width) keep_lanes(F32::load(x + i) * scale, bits).store(x + i);
      else store_partial(keep_lanes(load_partial(x + i, int(n - i)) * scale, bits), x + i, int(n - i));
    }
  }
}

}  // namespace bigmodel::BIGMODEL_ISA
