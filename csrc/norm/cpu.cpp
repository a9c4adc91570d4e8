// layer_norm: out = norm(dropout(x) + residual), one row at a time. Ba, Kiros, Hinton, "Layer Normalization", arXiv 1607.06450; RMS norm:
// Zhang & Sennrich, arXiv 1910.07467.
#include "../arch/philox.h"
#include "../arch/rows.h"
#include "../dispatch.h"
#include "../parallel.h"
#include "norm.h"

namespace bigmodel::BIGMODEL_ISA {

// Layer norm: the mean, then the variance as E[d^2] with d = x - mean, which does not cancel. Where the mean is far from 0 its own
// rounding matters: the second pass also takes the mean of d, and the result is of d - E[d] (the corrected two-pass algorithm, Chan,
// Golub & LeVeque, "Algorithms for computing the sample variance", 1983). RMS norm (Zhang & Sennrich, arXiv 1910.07467) has no mean.
RowStatistics row_statistics(const float* x, int64_t n, const NormArgs& norm) {
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

template <class T, class Out>
static void apply_norm(const float* x, const RowStatistics& s, int64_t n, const NormArgs& norm, Out* out) {
  const T* bias = static_cast<const T*>(norm.bias);
  each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) {
    F32 y = normalised(s, load(x + i, here));
    if (norm.weight) y = y * norm_factor<T>(norm, i, here);
    if (bias) y = y + load(bias + i, here);
    store(y, out + i, here);
  });
}

template <class T, class Out>
void norm_row(const float* x, int64_t n, const NormArgs& norm, Out* out) {
  apply_norm<T>(x, row_statistics(x, n, norm), n, norm, out);
}

template void norm_row<float>(const float*, int64_t, const NormArgs&, float*);
template void norm_row<bf16>(const float*, int64_t, const NormArgs&, float*);
template void norm_row<bf16>(const float*, int64_t, const NormArgs&, bf16*);
template void norm_row<fp16>(const float*, int64_t, const NormArgs&, float*);
template void norm_row<fp16>(const float*, int64_t, const NormArgs&, fp16*);

void layer_norm(const Runtime& runtime, const LayerNormArgs& args) {
  const int64_t block = larger(1, 16384 / larger(1, args.columns));  // rows per task: some 64 KB of them
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_near(runtime, ceil_div(args.rows, block), [&](int64_t task) {
      float* row = static_cast<float*>(runtime.scratch(scratch_c, size_t(args.columns) * sizeof(float)));
      for (int64_t r = task * block; r < smaller(args.rows, (task + 1) * block); r++) {
        const int64_t at = r * args.columns;
        const T* residual = offset<T>(args.residual, at);
        add_row<T>(static_cast<const T*>(args.x) + at, args.dropout.enabled ? nullptr : residual, args.columns, row);
        if (args.dropout.enabled) {
          drop_elements(args.dropout, r, 0, args.columns, row);
          if (residual) add_to_row(residual, args.columns, row);
        }
        norm_row<T>(row, args.columns, args.norm, static_cast<T*>(args.out) + at);
      }
    });
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
