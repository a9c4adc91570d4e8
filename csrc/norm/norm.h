// Layer norm and RMS norm of one row held in float32, forward (cpu.cpp) and backward (backward.cpp): functions that are compiled there
// once, for all operators that normalise.
#pragma once
#include "../arch/simd.h"
#include "../kernels.h"

namespace bigmodel::BIGMODEL_REST {

struct RowStatistics { float mean, drift, scale; };  // normalised x = (x - mean - drift) * scale

RowStatistics row_statistics(const float* x, int64_t n, const NormArgs& norm);

// out, of T or float, may be x itself. T is the type of weight and bias.
template <class T, class Out>
void norm_row(const float* x, int64_t n, const NormArgs& norm, Out* out);

// The gradient of the norm's input from that of its output; dx may be `grad` or x. With h = normalised x, g = grad * factor:
//   dx = scale (g - E[g] - h E[g h])  (without E[g] for RMS norm),  dweight += grad h,  dbias += grad   (sums may be null)
template <class T>
void norm_backward_row(const float* x, const float* grad, int64_t n, const NormArgs& norm, float* dx, float* weight_sum, float* bias_sum);

}  // namespace bigmodel::BIGMODEL_REST

namespace bigmodel::BIGMODEL_ISA {

BIGMODEL_INLINE F32 normalised(const rest::RowStatistics& s, F32 x) { return (x - F32::set(s.mean) - F32::set(s.drift)) * F32::set(s.scale); }

// The factor of normalised x: weight + weight_offset.
template <class T>
BIGMODEL_INLINE F32 norm_factor(const NormArgs& norm, int64_t i, int here) {
  return load(static_cast<const T*>(norm.weight) + i, here) + F32::set(norm.weight_offset);
}

}  // namespace bigmodel::BIGMODEL_ISA
