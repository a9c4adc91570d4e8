// Layer norm and RMS norm of one row held in float32, forward and backward.
//
// Layer norm: the mean, then the variance as E[d^2] with d = x - mean, which does not cancel. Where the mean is far from 0 its own
// rounding matters: the second pass also takes the mean of d, and the result is of d - E[d] (the corrected two-pass algorithm, Chan,
// Golub & LeVeque, "Algorithms for computing the sample variance", 1983). RMS norm (Zhang & Sennrich, arXiv 1910.07467) has no mean.
#pragma once
#include "../arch/simd.h"
#include "../kernels.h"

namespace bigmodel::BIGMODEL_ISA {

struct RowStatistics {       // normalised x = (x - mean - drift) * scale
  float mean, drift, scale;
  BIGMODEL_INLINE F32 normalised(F32 x) const { return (x - F32::set(mean) - F32::set(drift)) * F32::set(scale); }
};

// Sums over a row in four chains, of `terms` vectors: shorter chains, less latency, smaller errors.
template <int TERMS, class Body>
BIGMODEL_INLINE void row_sums(int64_t n, float (&total)[TERMS], const Body& body) {
  constexpr int lanes = 4, w = F32::width;
  F32 sums[lanes][TERMS];
  for (auto& lane : sums)
    for (F32& s : lane) s = F32::zero();
  int64_t i = 0;
  for (; i + lanes * w <= n; i += lanes * w)
#pragma GCC unroll 4
    for (int v = 0; v < lanes; v++) body(i + v * w, w, sums[v]);
  for (; i + w <= n; i += w) body(i, w, sums[0]);
  if (i < n) body(i, int(n - i), sums[1]);
  for (int t = 0; t < TERMS; t++) total[t] = sum((sums[0][t] + sums[1][t]) + (sums[2][t] + sums[3][t]));
}

static inline RowStatistics row_statistics(const float* x, int64_t n, const NormArgs& norm) {
  RowStatistics s = {0.0f, 0.0f, 0.0f};
  if (norm.kind == NormKind::layer_norm) {
    float total[1];
    row_sums(n, total, [&](int64_t i, int here, F32* sums) __attribute__((always_inline)) { sums[0] = sums[0] + load(x + i, here); });
    s.mean = total[0] / float(n);
  }
  const F32 center = F32::set(s.mean);
  float moments[2];
  row_sums(n, moments, [&](int64_t i, int here, F32* sums) __attribute__((always_inline)) {
    const F32 d = (here == F32::width ? F32::load(x + i) : load_partial(x + i, here, s.mean)) - center;
    sums[0] = fma(d, d, sums[0]);
    sums[1] = sums[1] + d;
  });
  if (norm.kind == NormKind::layer_norm) s.drift = moments[1] / float(n);
  const float raw = moments[0] / float(n) - s.drift * s.drift;
  s.scale = 1.0f / __builtin_sqrtf((raw < 0.0f ? 0.0f : raw) + norm.eps);
  return s;
}

// The factor of normalised x: weight + weight_offset.
template <class T>
BIGMODEL_INLINE F32 norm_factor(const NormArgs& norm, int64_t i, int here) {
  return load(static_cast<const T*>(norm.weight) + i, here) + F32::set(norm.weight_offset);
}

// out may be x itself. T is the type of weight and bias.
template <class T, class Out>
static void apply_norm(const float* x, const RowStatistics& s, int64_t n, const NormArgs& norm, Out* out) {
  const T* bias = static_cast<const T*>(norm.bias);
  each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) {
    F32 y = s.normalised(load(x + i, here));
    if (norm.weight) y = y * norm_factor<T>(norm, i, here);
    if (bias) y = y + load(bias + i, here);
    store(y, out + i, here);
  });
}

template <class T, class Out>
static void norm_row(const float* x, int64_t n, const NormArgs& norm, Out* out) {
  apply_norm<T>(x, row_statistics(x, n, norm), n, norm, out);
}

// The gradient of the norm's input from that of its output; dx may be `grad` or x. With h = normalised x, g = grad * factor:
//   dx = scale (g - E[g] - h E[g h])  (without E[g] for RMS norm),  dweight += grad h,  dbias += grad   (sums may be null)
template <class T>
static void norm_backward_row(const float* x, const float* grad, int64_t n, const NormArgs& norm, float* dx, float* weight_sum, float* bias_sum) {
  const RowStatistics s = row_statistics(x, n, norm);
  float total[2];
  row_sums(n, total, [&](int64_t i, int here, F32* sums) __attribute__((always_inline)) {
    const F32 g = load(grad + i, here), h = s.normalised(load(x + i, here));
    if (weight_sum) store(fma(g, h, load(weight_sum + i, here)), weight_sum + i, here);
    if (bias_sum) store(g + load(bias_sum + i, here), bias_sum + i, here);
    const F32 scaled = norm.weight ? g * norm_factor<T>(norm, i, here) : g;
    sums[0] = sums[0] + scaled;
    sums[1] = fma(scaled, h, sums[1]);
  });
  const F32 mean = F32::set(norm.kind == NormKind::layer_norm ? total[0] / float(n) : 0.0f), slope = F32::set(total[1] / float(n));
  each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) {
    const F32 g = load(grad + i, here), h = s.normalised(load(x + i, here));
    const F32 scaled = norm.weight ? g * norm_factor<T>(norm, i, here) : g;
    store((scaled - mean - h * slope) * F32::set(s.scale), dx + i, here);
  });
}

// out = a + b in float32 (b may be null); the sum a norm is taken of.
template <class T>
static void add_row(const T* a, const T* b, int64_t n, float* out) {
  each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) {
    store(b ? load(a + i, here) + load(b + i, here) : load(a + i, here), out + i, here);
  });
}

// row += a.
template <class T>
static void add_to_row(const T* a, int64_t n, float* row) {
  each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(row + i, here) + load(a + i, here), row + i, here); });
}

}  // namespace bigmodel::BIGMODEL_ISA
