// Half types and the arithmetic that GPUs do in one instruction.
#pragma once
#include "arch/cuda.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <cmath>
#endif

namespace bigmodel::cuda {

struct bfloat16 { uint16_t bits; };  // storage; arithmetic is in float
struct float16 { uint16_t bits; };

template <typename T> inline constexpr bool is_half = sizeof(T) == 2;

#if !defined(__CUDACC__)
namespace host {

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // the NaN that cvt gives
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);          // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                                         // subnormal: the ulp is 2^-24
    float absolute;
    std::memcpy(&absolute, &magnitude, 4);
    return uint16_t(sign | uint16_t(std::nearbyint(absolute * 16777216.0f)));
  }
  return uint16_t(sign | uint16_t((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13));
}
inline float from_float16(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + float(fraction), exponent - 25) : std::ldexp(float(fraction), -24));
}

}  // namespace host
#endif

template <typename T> BM_DEVICE float to_float(T value);
template <typename T> BM_DEVICE T from_float(float value);
template <> BM_DEVICE float to_float(float value) { return value; }
template <> BM_DEVICE float from_float(float value) { return value; }

#if defined(__CUDACC__)
template <> BM_DEVICE float to_float(bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
template <> BM_DEVICE float to_float(float16 value) { return __half2float(__ushort_as_half(value.bits)); }
template <> BM_DEVICE bfloat16 from_float(float value) { return {__bfloat16_as_ushort(__float2bfloat16_rn(value))}; }
template <> BM_DEVICE float16 from_float(float value) { return {__half_as_ushort(__float2half_rn(value))}; }
#else
template <> BM_DEVICE float to_float(bfloat16 value) { return host::from_bfloat16(value.bits); }
template <> BM_DEVICE float to_float(float16 value) { return host::from_float16(value.bits); }
template <> BM_DEVICE bfloat16 from_float(float value) { return {host::to_bfloat16(value)}; }
template <> BM_DEVICE float16 from_float(float value) { return {host::to_float16(value)}; }
#endif

// Two values in one register, the first in the low half, as matrix fragments hold them (cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32).
template <typename T>
BM_DEVICE uint32_t pack(float low, float high) {
#if defined(__CUDACC__)
  uint32_t packed;
  if constexpr (sizeof(T) == 2 && __is_same(T, bfloat16))
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
#endif
}

// Eight values in 16 bytes.
template <typename Element>
BM_DEVICE void unpack(float (&x)[8], const Word<16>& word) {
  BM_UNROLL
  for (int i = 0; i < 8; i++) x[i] = to_float(Element{uint16_t(word.value[i / 2] >> (16 * (i % 2)))});
}
template <typename Element>
BM_DEVICE Word<16> pack(const float (&x)[8]) {
  return {{pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]), pack<Element>(x[4], x[5]), pack<Element>(x[6], x[7])}};
}

// 2^x by the special function unit: relative error 2^-22 (ex2.approx.ftz.f32), exp2(-inf) = 0.
BM_DEVICE float exp2_approx(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

BM_DEVICE float log2_approx(float x) {
#if defined(__CUDACC__)
  return __log2f(x);
#else
  return std::log2(x);
#endif
}

BM_DEVICE float reciprocal_root(float x) {
#if defined(__CUDACC__)
  return rsqrtf(x);
#else
  return 1 / std::sqrt(x);
#endif
}

// 1 / x by the special function unit: relative error 2^-23 (rcp.approx.ftz.f32).
BM_DEVICE float reciprocal(float x) {
#if defined(__CUDACC__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

// tanh(x) = 1 - 2 / (1 + exp(2x)), for x2 = 2 x log2(e).
BM_DEVICE float tanh_of(float x2) { return 1 - 2 * reciprocal(1 + exp2_approx(x2)); }

BM_DEVICE float absolute(float x) {
#if defined(__CUDACC__)
  return fabsf(x);
#else
  return std::fabs(x);
#endif
}

BM_DEVICE float maximum(float a, float b) {
#if defined(__CUDACC__)
  return fmaxf(a, b);
#else
  return std::fmax(a, b);
#endif
}

// The same, but a NaN stays one (max.NaN.f32).
BM_DEVICE float maximum_or_nan(float a, float b) {
#if defined(__CUDACC__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a != a || b != b ? a + b : std::fmax(a, b);
#endif
}

BM_DEVICE float minimum(float a, float b) {
#if defined(__CUDACC__)
  return fminf(a, b);
#else
  return std::fmin(a, b);
#endif
}

// The same, but a NaN stays one (min.NaN.f32).
BM_DEVICE float minimum_or_nan(float a, float b) {
#if defined(__CUDACC__)
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a != a || b != b ? a + b : std::fmin(a, b);
#endif
}

inline constexpr float infinity = __builtin_huge_valf();
inline constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

}  // namespace bigmodel::cuda
