// Layer norm of one row held in float32: the mean, then the variance as E[d^2] with d = x - mean, which does not cancel. Where the
// mean is far from 0 its own rounding matters: the second pass also takes the mean of d, and the result is of d - E[d] (the corrected
// two-pass algorithm, Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983).
#pragma once
#include "../arch/simd.h"
#include "../kernels.h"

namespace bigmodel::BIGMODEL_ISA {

template <class T>
static void layer_norm_row(const float* x, int64_t n, const NormArgs& norm, T* out) {
  constexpr int w = F32::width;
  const T* weight = static_cast<const T*>(norm.weight);
  const T* bias = static_cast<const T*>(norm.bias);
  constexpr int lanes = 4;  // vectors summed side by side: shorter chains, less latency
  F32 total[lanes] = {F32::zero(), F32::zero(), F32::zero(), F32::zero()};
  int64_t i = 0;
  for (; i + lanes * w <= n; i += lanes * w)
    for (int v = 0; v < lanes; v++) total[v] = total[v] + F32::load(x + i + v * w);
  float rest = 0.0f;
  for (; i < n; i++) rest += x[i];
  const float mean = (sum((total[0] + total[1]) + (total[2] + total[3])) + rest) / float(n);

  const F32 center = F32::set(mean);
  F32 square[lanes] = {F32::zero(), F32::zero(), F32::zero(), F32::zero()}, away[lanes] = {F32::zero(), F32::zero(), F32::zero(), F32::zero()};
  rest = 0.0f;
  float drift = 0.0f;
  for (i = 0; i + lanes * w <= n; i += lanes * w)
    for (int v = 0; v < lanes; v++) {
      const F32 d = F32::load(x + i + v * w) - center;
      square[v] = fma(d, d, square[v]);
      away[v] = away[v] + d;
    }
  for (; i < n; i++) {
    const float d = x[i] - mean;
    rest += d * d;
    drift += d;
  }
  drift = (sum((away[0] + away[1]) + (away[2] + away[3])) + drift) / float(n);
  const float raw = (sum((square[0] + square[1]) + (square[2] + square[3])) + rest) / float(n) - drift * drift;
  const float variance = raw < 0.0f ? 0.0f : raw;
  const F32 scale = F32::set(1.0f / __builtin_sqrtf(variance + norm.eps)), offset = F32::set(drift);

  for (i = 0; i + w <= n; i += w) {
    F32 y = (F32::load(x + i) - center - offset) * scale;
    if (weight) y = y * F32::load(weight + i);
    if (bias) y = y + F32::load(bias + i);
    y.store(out + i);
  }
  if (i < n) {
    const int tail = int(n - i);
    F32 y = (load_partial(x + i, tail) - center - offset) * scale;
    if (weight) y = y * load_partial(weight + i, tail);
    if (bias) y = y + load_partial(bias + i, tail);
    store_partial(y, out + i, tail);
  }
}

// out = a + b in float32 (b may be null); the sum a norm is taken of.
template <class T>
static void add_row(const T* a, const T* b, int64_t n, float* out) {
  constexpr int w = F32::width;
  int64_t i = 0;
  for (; i + w <= n; i += w) (b ? F32::load(a + i) + F32::load(b + i) : F32::load(a + i)).store(out + i);
  for (; i < n; i++) out[i] = to_float(a[i]) + (b ? to_float(b[i]) : 0.0f);
}

}  // namespace bigmodel::BIGMODEL_ISA
