// For the test build only: AVX-512 on an AVX2 CPU. SIMD Everywhere gives most of it; the words it lacks (in its 0.7.4) are here, from
// their AVX2 halves or lane by lane, after Intel's intrinsics guide.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/x86/avx512.h>

namespace bigmodel::BIGMODEL_ISA::emulated {

struct Halves { __m256i low, high; };
template <class V> inline Halves split(V v) { Halves h; static_assert(sizeof(V) == 64); memcpy(&h, &v, 64); return h; }
template <class V> inline V join(__m256i low, __m256i high) { Halves h = {low, high}; V v; memcpy(&v, &h, 64); return v; }

inline simde__m512i cvtepu16_epi32(__m256i x) {
  return join<simde__m512i>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
}
inline __m256i cvtepi32_epi16(simde__m512i x) {  // truncates
  uint32_t wide[16];
  uint16_t narrow[16];
  memcpy(wide, &x, 64);
  for (int i = 0; i < 16; i++) narrow[i] = uint16_t(wide[i]);
  __m256i r;
  memcpy(&r, narrow, 32);
  return r;
}
inline simde__m512i cvtps_epi32(simde__m512 x) {
  const Halves h = split(x);
  return join<simde__m512i>(_mm256_cvtps_epi32(_mm256_castsi256_ps(h.low)), _mm256_cvtps_epi32(_mm256_castsi256_ps(h.high)));
}
inline simde__m512 cvtph_ps(__m256i x) {
  return join<simde__m512>(_mm256_castps_si256(_mm256_cvtph_ps(_mm256_castsi256_si128(x))), _mm256_castps_si256(_mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))));
}
inline __m256i cvtps_ph(simde__m512 x) {  // to nearest even
  const Halves h = split(x);
  return _mm256_set_m128i(_mm256_cvtps_ph(_mm256_castsi256_ps(h.high), _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(_mm256_castsi256_ps(h.low), _MM_FROUND_TO_NEAREST_INT));
}
inline float reduce_add_ps(simde__m512 x) {
  float lanes[16];
  memcpy(lanes, &x, 64);
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
  return lanes[0];
}
inline float reduce_max_ps(simde__m512 x) {
  float lanes[16];
  memcpy(lanes, &x, 64);
  for (int i = 1; i < 16; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}
// Lanes of 128 bits, two of a and two of b, by two bits each of `lanes`.
template <class V> inline V shuffle_128(V a, V b, int lanes) {
  struct { __m128i lane[4]; } from[2], to;
  memcpy(&from[0], &a, 64);
  memcpy(&from[1], &b, 64);
  for (int i = 0; i < 4; i++) to.lane[i] = from[i / 2].lane[lanes >> (2 * i) & 3];
  V r;
  memcpy(&r, &to, 64);
  return r;
}
inline void mask_storeu_epi16(void* to, uint16_t mask, __m256i x) {
  uint16_t words[16];
  memcpy(words, &x, 32);
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) memcpy(static_cast<char*>(to) + 2 * i, words + i, 2);
}
// To bf16, to nearest even; subnormal numbers become zero.
inline __m256i cvtneps_pbh(simde__m512 x) {
  uint32_t from[16];
  uint16_t to[16];
  memcpy(from, &x, 64);
  for (int i = 0; i < 16; i++) {
    const uint32_t bits = from[i], magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) to[i] = uint16_t(bits >> 16 | 0x40);
    else if (magnitude < 0x00800000u) to[i] = uint16_t(bits >> 16 & 0x8000);
    else to[i] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  __m256i r;
  memcpy(&r, to, 32);
  return r;
}
inline simde__m512i cvtne2ps_pbh(simde__m512 high, simde__m512 low) { return join<simde__m512i>(cvtneps_pbh(low), cvtneps_pbh(high)); }
// What is left of x, to nearest even, below so many binary places as the upper half of `places` says.
inline simde__m512 reduce_ps(simde__m512 x, int places) {
  float lanes[16];
  memcpy(lanes, &x, 64);
  const float scale = float(1 << (places >> 4));
  for (float& lane : lanes) lane -= __builtin_nearbyintf(lane * scale) / scale;
  simde__m512 r;
  memcpy(&r, lanes, 64);
  return r;
}

}  // namespace bigmodel::BIGMODEL_ISA::emulated

#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) emulated::cvtps_ph(x)
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulated::shuffle_128
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulated::shuffle_128
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_reduce_ps emulated::reduce_ps
