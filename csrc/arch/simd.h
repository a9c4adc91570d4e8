// The CPU vocabulary: one vector of floats, F32, and the few words kernels are written with.
//
// A kernel is written once against F32 and compiled once per instruction set into its own namespace (BIGMODEL_ISA), so
// objects for different instruction sets can live in one library and be chosen at load time (register_cpu.cpp). The bodies below are
// AVX-512 (16 lanes), AVX2+FMA+F16C (8 lanes) and the vectors of GCC and Clang (8 lanes), to which NEON adds words of its own. Compiled
// with BIGMODEL_SIMDE the AVX-512 bodies run on AVX2 CPUs (avx512_emulated.h): that is how they are tested where no AVX-512 CPU is at hand.
//
// No standard-library templates here: an inline function that the linker merges across objects could carry AVX-512
// instructions into code that runs on a CPU without them. Everything is in the instruction set's own namespace.
#pragma once
#include <cstdint>
#include <cstring>

#ifndef BIGMODEL_ISA
#error "compile with -DBIGMODEL_ISA=<namespace> and -DBIGMODEL_SIMD=<0 portable, 128 NEON, 256, 512>"
#endif

#if BIGMODEL_SIMD == 512 && defined(BIGMODEL_SIMDE)
#include "avx512_emulated.h"
#elif BIGMODEL_SIMD >= 256
#include <immintrin.h>
#elif BIGMODEL_SIMD == 128
#include <arm_neon.h>
#endif

#define BIGMODEL_INLINE inline __attribute__((always_inline))

// Where the kernels are that multiply neither by bf16's dot product nor by the tile unit: the sets that have one of these have kernels of
// their own where they use it (setup.py), and the rest from the set that they extend.
#if BIGMODEL_BF16_DOT
#define BIGMODEL_REST avx512
#else
#define BIGMODEL_REST BIGMODEL_ISA
#endif
namespace bigmodel::BIGMODEL_REST {}

namespace bigmodel {

// Storage types of the half formats, the same for all sets. They are only ever converted: arithmetic is in float32.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

}  // namespace bigmodel

namespace bigmodel::BIGMODEL_ISA {

namespace rest = bigmodel::BIGMODEL_REST;

BIGMODEL_INLINE float bits_to_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
BIGMODEL_INLINE uint32_t float_to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

BIGMODEL_INLINE float to_float(float x) { return x; }
BIGMODEL_INLINE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
BIGMODEL_INLINE float to_float(fp16 x) {
  // Shift the 5-bit exponent into float's place and rebias by a multiplication, which also normalises subnormals.
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return bits_to_float(sign | (magnitude + 0x70000000u));  // inf, NaN
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));
}

BIGMODEL_INLINE void from_float(float x, float* out) { *out = x; }
BIGMODEL_INLINE void from_float(float x, bf16* out) {
  const uint32_t u = float_to_bits(x);
  out->bits = x != x ? uint16_t((u >> 16) | 0x40u) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);  // nearest, ties to even
}
BIGMODEL_INLINE void from_float(float x, fp16* out) {
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) { out->bits = uint16_t(sign | 0x7e00u); return; }
  if (magnitude >= 0x477ff000u) { out->bits = uint16_t(sign | 0x7c00u); return; }  // 65520 and up round to infinity
  if (magnitude < 0x38800000u) {  // subnormal half: let a float addition do the rounding at bit 2^-24
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f);
    out->bits = uint16_t(sign | (rounded - 0x3f000000u));
    return;
  }
  const uint32_t rebiased = magnitude - 0x38000000u;
  out->bits = uint16_t(sign | ((rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13));
}

#if BIGMODEL_SIMD == 512

struct F32 {
  static constexpr int width = 16;
  __m512 v;
  static BIGMODEL_INLINE F32 zero() { return {_mm512_setzero_ps()}; }
  static BIGMODEL_INLINE F32 set(float x) { return {_mm512_set1_ps(x)}; }
  static BIGMODEL_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static BIGMODEL_INLINE F32 load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static BIGMODEL_INLINE F32 load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  BIGMODEL_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  BIGMODEL_INLINE void store(bf16* p) const {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i r = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
  }
  BIGMODEL_INLINE void store(fp16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};
BIGMODEL_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
BIGMODEL_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
BIGMODEL_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
BIGMODEL_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
BIGMODEL_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// max(a, b) and min(a, b) return b where either is NaN, as the x86 instructions do.
BIGMODEL_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
BIGMODEL_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
BIGMODEL_INLINE F32 abs(F32 a) { return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)))}; }
BIGMODEL_INLINE F32 copy_sign(F32 magnitude, F32 sign) {
  const __m512i bit = _mm512_set1_epi32(int(0x80000000u));
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_and_si512(_mm512_castps_si512(sign.v), bit), _mm512_castps_si512(magnitude.v)))};
}
// a < b ? yes : no, lane by lane.
BIGMODEL_INLINE F32 select_less(F32 a, F32 b, F32 yes, F32 no) { return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)}; }
BIGMODEL_INLINE F32 round_nearest(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integral n in float's normal range.
BIGMODEL_INLINE F32 scale_exponent(F32 a, F32 n) {
  const __m512i shift = _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), shift))};
}
BIGMODEL_INLINE float sum(F32 a) { return _mm512_reduce_add_ps(a.v); }
BIGMODEL_INLINE float maximum(F32 a) { return _mm512_reduce_max_ps(a.v); }

#elif BIGMODEL_SIMD == 256

struct F32 {
  static constexpr int width = 8;
  __m256 v;
  static BIGMODEL_INLINE F32 zero() { return {_mm256_setzero_ps()}; }
  static BIGMODEL_INLINE F32 set(float x) { return {_mm256_set1_ps(x)}; }
  static BIGMODEL_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static BIGMODEL_INLINE F32 load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static BIGMODEL_INLINE F32 load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  BIGMODEL_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  BIGMODEL_INLINE void store(bf16* p) const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  BIGMODEL_INLINE void store(fp16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};
BIGMODEL_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
BIGMODEL_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
BIGMODEL_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
BIGMODEL_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
BIGMODEL_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
BIGMODEL_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
BIGMODEL_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
BIGMODEL_INLINE F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
BIGMODEL_INLINE F32 copy_sign(F32 magnitude, F32 sign) { return {_mm256_or_ps(_mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)), magnitude.v)}; }
BIGMODEL_INLINE F32 select_less(F32 a, F32 b, F32 yes, F32 no) { return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))}; }
BIGMODEL_INLINE F32 round_nearest(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
BIGMODEL_INLINE F32 scale_exponent(F32 a, F32 n) {
  const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), shift))};
}
BIGMODEL_INLINE float sum(F32 a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
BIGMODEL_INLINE float maximum(F32 a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

#else  // portable and NEON: twice four lanes as GCC and Clang have them, which are SSE2's and NEON's registers

typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t Bits4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));  // and what comparisons give: -1 or 0
typedef uint16_t Half4 __attribute__((vector_size(8)));

BIGMODEL_INLINE Bits4 select(Int4 which, Bits4 yes, Bits4 no) { return (Bits4(which) & yes) | (~Bits4(which) & no); }
BIGMODEL_INLINE Float4 select(Int4 which, Float4 yes, Float4 no) { return Float4(select(which, Bits4(yes), Bits4(no))); }

// to_float and from_float, four at a time.
BIGMODEL_INLINE Float4 load4(const float* p) { Float4 x; memcpy(&x, p, 16); return x; }
BIGMODEL_INLINE Float4 load4(const bf16* p) { Half4 x; memcpy(&x, p, 8); return Float4(__builtin_convertvector(x, Bits4) << 16); }
BIGMODEL_INLINE Float4 load4(const fp16* p) {
  Half4 x;
  memcpy(&x, p, 8);
#if BIGMODEL_SIMD == 128
  return Float4(vcvt_f32_f16(vreinterpret_f16_u16(uint16x4_t(x))));
#else
  const Bits4 bits = __builtin_convertvector(x, Bits4), magnitude = (bits & 0x7fffu) << 13;
  const Bits4 finite = Bits4(Float4(magnitude) * 0x1p112f);
  return Float4((bits & 0x8000u) << 16 | select(magnitude >= 0x0f800000u, magnitude + 0x70000000u, finite));
#endif
}
BIGMODEL_INLINE void store4(Float4 x, float* p) { memcpy(p, &x, 16); }
BIGMODEL_INLINE void store4(Bits4 x, void* p) { const Half4 low = __builtin_convertvector(x, Half4); memcpy(p, &low, 8); }
BIGMODEL_INLINE void store4(Float4 x, bf16* p) {
  const Bits4 u = Bits4(x);
  store4(select(x != x, (u >> 16) | 0x40u, (u + 0x7fffu + ((u >> 16) & 1u)) >> 16), static_cast<void*>(p));
}
BIGMODEL_INLINE void store4(Float4 x, fp16* p) {
#if BIGMODEL_SIMD == 128
  const Half4 half = Half4(vreinterpret_u16_f16(vcvt_f16_f32(float32x4_t(x))));
  memcpy(p, &half, 8);
#else
  const Bits4 u = Bits4(x), magnitude = u & 0x7fffffffu, rebiased = magnitude - 0x38000000u;
  const Bits4 normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13, subnormal = Bits4(Float4(magnitude) + 0.5f) - 0x3f000000u;
  const Bits4 infinity = Bits4{} + 0x7c00u, nan = Bits4{} + 0x7e00u;
  const Bits4 finite = select(magnitude < 0x38800000u, subnormal, normal);
  const Bits4 large = select(magnitude > 0x7f800000u, nan, infinity);
  store4((u >> 16 & 0x8000u) | select(magnitude >= 0x477ff000u, large, finite), static_cast<void*>(p));
#endif
}
#if BIGMODEL_SIMD == 128  // one rounding, and one instruction, whatever -ffp-contract says
BIGMODEL_INLINE Float4 fma(Float4 a, Float4 b, Float4 c) { return Float4(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b))); }
BIGMODEL_INLINE Float4 round_nearest(Float4 a) { return Float4(vrndnq_f32(float32x4_t(a))); }
#else
BIGMODEL_INLINE Float4 fma(Float4 a, Float4 b, Float4 c) { return c + a * b; }
// Adding 1.5 * 2^23 leaves no fraction bits, so the addition itself rounds to nearest even; |a| < 2^22 is all callers need.
BIGMODEL_INLINE Float4 round_nearest(Float4 a) { return a + 12582912.0f - 12582912.0f; }
#endif

struct F32 {
  static constexpr int width = 8;
  Float4 low, high;
  static BIGMODEL_INLINE F32 zero() { return {Float4{}, Float4{}}; }
  static BIGMODEL_INLINE F32 set(float x) { return {Float4{x, x, x, x}, Float4{x, x, x, x}}; }
  template <class T> static BIGMODEL_INLINE F32 load(const T* p) { return {load4(p), load4(p + 4)}; }
  template <class T> BIGMODEL_INLINE void store(T* p) const { store4(low, p); store4(high, p + 4); }
};
BIGMODEL_INLINE F32 operator+(F32 a, F32 b) { return {a.low + b.low, a.high + b.high}; }
BIGMODEL_INLINE F32 operator-(F32 a, F32 b) { return {a.low - b.low, a.high - b.high}; }
BIGMODEL_INLINE F32 operator*(F32 a, F32 b) { return {a.low * b.low, a.high * b.high}; }
BIGMODEL_INLINE F32 operator/(F32 a, F32 b) { return {a.low / b.low, a.high / b.high}; }
BIGMODEL_INLINE F32 fma(F32 a, F32 b, F32 c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }
// a < b ? yes : no, lane by lane.
BIGMODEL_INLINE F32 select_less(F32 a, F32 b, F32 yes, F32 no) { return {select(a.low < b.low, yes.low, no.low), select(a.high < b.high, yes.high, no.high)}; }
BIGMODEL_INLINE F32 max(F32 a, F32 b) { return select_less(b, a, a, b); }
BIGMODEL_INLINE F32 min(F32 a, F32 b) { return select_less(a, b, a, b); }
BIGMODEL_INLINE F32 abs(F32 a) { return {Float4(Bits4(a.low) & 0x7fffffffu), Float4(Bits4(a.high) & 0x7fffffffu)}; }
BIGMODEL_INLINE F32 copy_sign(F32 magnitude, F32 sign) {
  const Int4 bit = Int4(Bits4{} + 0x80000000u);
  return {select(bit, sign.low, magnitude.low), select(bit, sign.high, magnitude.high)};
}
BIGMODEL_INLINE F32 round_nearest(F32 a) { return {round_nearest(a.low), round_nearest(a.high)}; }
BIGMODEL_INLINE F32 scale_exponent(F32 a, F32 n) {
  const Bits4 low = Bits4(__builtin_convertvector(n.low, Int4)) << 23, high = Bits4(__builtin_convertvector(n.high, Int4)) << 23;
  return {Float4(Bits4(a.low) + low), Float4(Bits4(a.high) + high)};
}
BIGMODEL_INLINE float sum(F32 a) { const Float4 s = a.low + a.high; return (s[0] + s[2]) + (s[1] + s[3]); }
BIGMODEL_INLINE float maximum(F32 a) {
  const Float4 m = select(a.low < a.high, a.high, a.low);
  const float even = m[0] < m[2] ? m[2] : m[0], odd = m[1] < m[3] ? m[3] : m[1];
  return even < odd ? odd : even;
}

#endif

BIGMODEL_INLINE F32 operator-(F32 a) { return F32::zero() - a; }

// The first n lanes (1 <= n <= width); the rest are `fill`. Through a buffer: tails are rare and a masked load saves little. Never
// inlined: a branch for each lane at the end of every loop would be half of what there is to compile.
template <class T>
__attribute__((noinline)) static F32 load_partial(const T* p, int n, float fill = 0.0f) {
  alignas(64) float lanes[F32::width];
  for (int i = 0; i < F32::width; i++) lanes[i] = i < n ? to_float(p[i]) : fill;
  return F32::load(lanes);
}
template <class T>
__attribute__((noinline)) static void store_partial(F32 x, T* p, int n) {
  alignas(64) T lanes[F32::width];
  x.store(lanes);
  memcpy(p, lanes, size_t(n) * sizeof(T));
}

// body(i, n) for vectors of n lanes at i that make up [0, total): all full but the last.
template <class Body>
BIGMODEL_INLINE void each_vector(int64_t total, const Body& body) {
  int64_t i = 0;
  for (; i + F32::width <= total; i += F32::width) body(i, F32::width);
  if (i < total) body(i, int(total - i));
}
template <class T> BIGMODEL_INLINE F32 load(const T* p, int n) { return n == F32::width ? F32::load(p) : load_partial(p, n); }
template <class T> BIGMODEL_INLINE void store(F32 x, T* p, int n) { n == F32::width ? x.store(p) : store_partial(x, p, n); }

// ---- functions ----
// Coefficients are minimax fits made for this file (weighted least squares on Chebyshev nodes, reweighted until the error is level).

// 2^x for x below 127, relative error below 1.5 float32 ulp; exactly 0 from -127 down (and at -inf), so a masked logit weighs nothing.
// x = n + r with n integral and |r| <= 1/2, so 2^x = 2^n * (1 + r * p(r)) and p has degree 5. At the clamp r = 0 and the exponent
// field is 0: no comparison is needed. Between -127 and -126 results are subnormal with few bits, which no sum notices.
BIGMODEL_INLINE F32 exp2(F32 x) {
  const F32 clamped = max(F32::set(-127.0f), x);  // x second: a NaN stays one
  const F32 n = round_nearest(clamped), r = clamped - n;
  F32 p = F32::set(1.53533605e-4f);
  p = fma(p, r, F32::set(1.33988750e-3f));
  p = fma(p, r, F32::set(9.61843692e-3f));
  p = fma(p, r, F32::set(5.55033237e-2f));
  p = fma(p, r, F32::set(2.40226477e-1f));
  p = fma(p, r, F32::set(6.93147182e-1f));
  return scale_exponent(fma(p, r, F32::set(1.0f)), n);
}

// e^x with log2(e) in two parts, so that the product's rounding does not grow with |x|.
BIGMODEL_INLINE F32 exp(F32 x) {
  const F32 clamped = min(F32::set(88.0f), max(F32::set(-87.3f), x));
  const F32 n = round_nearest(clamped * F32::set(1.44269504f));
  F32 r = fma(n, F32::set(-0.693359375f), clamped);  // ln 2 = 0.693359375 - 2.12194440e-4, the first part exact in 9 bits
  r = fma(n, F32::set(2.12194440e-4f), r);
  const F32 t = r * F32::set(1.44269504f);
  F32 p = F32::set(1.53533605e-4f);
  p = fma(p, t, F32::set(1.33988750e-3f));
  p = fma(p, t, F32::set(9.61843692e-3f));
  p = fma(p, t, F32::set(5.55033237e-2f));
  p = fma(p, t, F32::set(2.40226477e-1f));
  p = fma(p, t, F32::set(6.93147182e-1f));
  return scale_exponent(fma(p, t, F32::set(1.0f)), n);
}

BIGMODEL_INLINE F32 sigmoid(F32 x) { return F32::set(1.0f) / (F32::set(1.0f) + exp(-x)); }

// tanh: odd polynomial below 0.625, 1 - 2 / (e^2x + 1) above.
BIGMODEL_INLINE F32 tanh(F32 x) {
  const F32 t = abs(x), s = x * x;
  F32 p = F32::set(-5.67242177e-3f);
  p = fma(p, s, F32::set(2.06031464e-2f));
  p = fma(p, s, F32::set(-5.37252314e-2f));
  p = fma(p, s, F32::set(1.33311853e-1f));
  p = fma(p, s, F32::set(-3.33332628e-1f));
  const F32 small = fma(p * s, x, x);
  const F32 e = exp(min(F32::set(10.0f), t) * F32::set(2.0f));
  const F32 large = copy_sign(F32::set(1.0f) - F32::set(2.0f) / (e + F32::set(1.0f)), x);
  return select_less(t, F32::set(0.625f), small, large);
}

// The upper tail of the normal distribution, erfc(t / sqrt 2) / 2, as 2^-q(t) for 0 <= t <= 7; times t it is right to 1e-8.
BIGMODEL_INLINE F32 normal_tail(F32 t) {
  F32 q = F32::set(1.99190458e-6f);
  q = fma(q, t, F32::set(-2.92720579e-5f));
  q = fma(q, t, F32::set(1.38088435e-4f));
  q = fma(q, t, F32::set(2.53436272e-4f));
  q = fma(q, t, F32::set(-7.21638976e-3f));
  q = fma(q, t, F32::set(5.26030511e-2f));
  q = fma(q, t, F32::set(4.59172219e-1f));
  q = fma(q, t, F32::set(1.15110970f));
  q = fma(q, t, F32::set(9.99999881e-1f));
  return exp2(-q);
}

// ---- packing ----

// Eight floats, whatever the width of F32; the portable set packs without them.
#if BIGMODEL_SIMD >= 256
typedef __m256 Eight;
BIGMODEL_INLINE Eight zero8() { return _mm256_setzero_ps(); }
BIGMODEL_INLINE Eight load8(const float* p) { return _mm256_loadu_ps(p); }
BIGMODEL_INLINE Eight load8(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
BIGMODEL_INLINE Eight load8(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
BIGMODEL_INLINE void store8(Eight x, float* p) { _mm256_storeu_ps(p, x); }
BIGMODEL_INLINE Eight times8(Eight x, float factor) { return _mm256_mul_ps(x, _mm256_set1_ps(factor)); }
#elif BIGMODEL_SIMD == 128
typedef F32 Eight;
BIGMODEL_INLINE Eight zero8() { return F32::zero(); }
template <class T> BIGMODEL_INLINE Eight load8(const T* p) { return F32::load(p); }
BIGMODEL_INLINE void store8(Eight x, float* p) { x.store(p); }
BIGMODEL_INLINE Eight times8(Eight x, float factor) { return x * F32::set(factor); }
#endif

// Transposes an 8x8 block: out[k][r] = in[r][k], rows of `in` are rows[0..7], out has a stride of `out_stride` floats and may
// overlap forward (each k writes 8 floats, the next k may start before they end): stores are made in the order of k.
#if BIGMODEL_SIMD >= 256
BIGMODEL_INLINE void transpose8x8(const Eight r[8], float* out, int64_t out_stride) {
  const __m256 a0 = _mm256_unpacklo_ps(r[0], r[1]), a1 = _mm256_unpackhi_ps(r[0], r[1]);
  const __m256 a2 = _mm256_unpacklo_ps(r[2], r[3]), a3 = _mm256_unpackhi_ps(r[2], r[3]);
  const __m256 a4 = _mm256_unpacklo_ps(r[4], r[5]), a5 = _mm256_unpackhi_ps(r[4], r[5]);
  const __m256 a6 = _mm256_unpacklo_ps(r[6], r[7]), a7 = _mm256_unpackhi_ps(r[6], r[7]);
  const __m256 b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xee);
  const __m256 b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xee);
  const __m256 b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xee);
  const __m256 b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xee);
  _mm256_storeu_ps(out + 0 * out_stride, _mm256_permute2f128_ps(b0, b4, 0x20));
  _mm256_storeu_ps(out + 1 * out_stride, _mm256_permute2f128_ps(b1, b5, 0x20));
  _mm256_storeu_ps(out + 2 * out_stride, _mm256_permute2f128_ps(b2, b6, 0x20));
  _mm256_storeu_ps(out + 3 * out_stride, _mm256_permute2f128_ps(b3, b7, 0x20));
  _mm256_storeu_ps(out + 4 * out_stride, _mm256_permute2f128_ps(b0, b4, 0x31));
  _mm256_storeu_ps(out + 5 * out_stride, _mm256_permute2f128_ps(b1, b5, 0x31));
  _mm256_storeu_ps(out + 6 * out_stride, _mm256_permute2f128_ps(b2, b6, 0x31));
  _mm256_storeu_ps(out + 7 * out_stride, _mm256_permute2f128_ps(b3, b7, 0x31));
}
#elif BIGMODEL_SIMD == 128
BIGMODEL_INLINE Float4 two_lanes(bool odd, Float4 a, Float4 b) {  // lanes 0 and 1, or 2 and 3, of both
  const float64x2_t x = vreinterpretq_f64_f32(float32x4_t(a)), y = vreinterpretq_f64_f32(float32x4_t(b));
  return Float4(vreinterpretq_f32_f64(odd ? vtrn2q_f64(x, y) : vtrn1q_f64(x, y)));
}
BIGMODEL_INLINE void transpose4x4(Float4 a, Float4 b, Float4 c, Float4 d, Float4 columns[4]) {
  const Float4 even_ab = Float4(vtrn1q_f32(float32x4_t(a), float32x4_t(b))), odd_ab = Float4(vtrn2q_f32(float32x4_t(a), float32x4_t(b)));
  const Float4 even_cd = Float4(vtrn1q_f32(float32x4_t(c), float32x4_t(d))), odd_cd = Float4(vtrn2q_f32(float32x4_t(c), float32x4_t(d)));
  columns[0] = two_lanes(false, even_ab, even_cd);
  columns[1] = two_lanes(false, odd_ab, odd_cd);
  columns[2] = two_lanes(true, even_ab, even_cd);
  columns[3] = two_lanes(true, odd_ab, odd_cd);
}
BIGMODEL_INLINE void transpose8x8(const Eight r[8], float* out, int64_t out_stride) {
  Float4 left[8], right[8];  // of each column: rows 0 to 3, and 4 to 7
  transpose4x4(r[0].low, r[1].low, r[2].low, r[3].low, left);
  transpose4x4(r[0].high, r[1].high, r[2].high, r[3].high, left + 4);
  transpose4x4(r[4].low, r[5].low, r[6].low, r[7].low, right);
  transpose4x4(r[4].high, r[5].high, r[6].high, r[7].high, right + 4);
#pragma GCC unroll 8
  for (int k = 0; k < 8; k++) F32{left[k], right[k]}.store(out + k * out_stride);
}
#endif

}  // namespace bigmodel::BIGMODEL_ISA
