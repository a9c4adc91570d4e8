// The way back through a norm and what lies before it, row by row: norm_backward, and the ends of linear_backward and feed_forward_backward.
#include "backward.h"

#include "../activations/activations.h"
#include "../arch/philox.h"
#include "../arch/rows.h"
#include "norm.h"

namespace bigmodel::BIGMODEL_ISA {

template <class T>
void norm_backward_row(const float* x, const float* grad, int64_t n, const NormArgs& norm, float* dx, float* weight_sum, float* bias_sum) {
  const RowStatistics s = row_statistics(x, n, norm);
  float total[2];
  row_sums(n, total, [&](int64_t i, int here, F32* sums) __attribute__((always_inline)) {
    const F32 g = load(grad + i, here), h = normalised(s, load(x + i, here));
    if (weight_sum) store(fma(g, h, load(weight_sum + i, here)), weight_sum + i, here);
    if (bias_sum) store(g + load(bias_sum + i, here), bias_sum + i, here);
    const F32 scaled = norm.weight ? g * norm_factor<T>(norm, i, here) : g;
    sums[0] = sums[0] + scaled;
    sums[1] = fma(scaled, h, sums[1]);
  });
  const F32 mean = F32::set(norm.kind == NormKind::layer_norm ? total[0] / float(n) : 0.0f), slope = F32::set(total[1] / float(n));
  each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) {
    const F32 g = load(grad + i, here), h = normalised(s, load(x + i, here));
    const F32 scaled = norm.weight ? g * norm_factor<T>(norm, i, here) : g;
    store((scaled - mean - h * slope) * F32::set(s.scale), dx + i, here);
  });
}

template void norm_backward_row<float>(const float*, const float*, int64_t, const NormArgs&, float*, float*, float*);
template void norm_backward_row<bf16>(const float*, const float*, int64_t, const NormArgs&, float*, float*, float*);
template void norm_backward_row<fp16>(const float*, const float*, int64_t, const NormArgs&, float*, float*, float*);

namespace {

template <class T>
void tail(const Runtime& runtime, const TailBackwardArgs& args) {
  const T *grad = static_cast<const T*>(args.grad), *preactivation = static_cast<const T*>(args.preactivation);
  const T *norm_input = static_cast<const T*>(args.norm_input), *norm_input_addend = static_cast<const T*>(args.norm_input_addend);
  T *sum_grad = static_cast<T*>(args.sum_grad), *z_grad_rounded = static_cast<T*>(args.z_grad_rounded);
  float* z_grad = args.z_grad;
  const Dropout& dropout = args.dropout;
  bool wants_biases = false;
  for (int64_t b = 0; b < args.biases; b++) wants_biases |= args.bias_grad[b] != nullptr;

  const int64_t rows = args.rows, n = args.n, block = larger(4, ceil_div(rows, 8 * runtime.threads)), tasks = ceil_div(rows, block);
  const int64_t second = round_up(n, 16), third = 2 * second, stride = 3 * second;  // a task's sums: the norm's weight, its bias, the biases
  const bool sums_wanted = args.norm_weight_grad || args.norm_bias_grad || wants_biases;
  float* sums = sums_wanted ? static_cast<float*>(runtime.scratch(scratch_sums, size_t(tasks * stride) * sizeof(float))) : nullptr;
  parallel(runtime, tasks, [&](int64_t task) {
    float* g = static_cast<float*>(runtime.scratch(scratch_c, size_t(2 * second + 2 * stride) * sizeof(float)));
    float *x = g + second, *part = x + second;
    ChainedSums chained(sums ? sums + task * stride : part, part, sums ? stride : 0);
    for (int64_t row = task * block; row < smaller(rows, (task + 1) * block); row++) {
      const int64_t at = row * n;
      add_row<T>(grad + at, nullptr, n, g);
      if (args.has_norm) {
        add_row<T>(norm_input + at, nullptr, n, x);
        if (args.norm_input_drops && dropout.enabled) drop_elements(dropout, row, 0, n, x);
        if (norm_input_addend) add_to_row(norm_input_addend + at, n, x);
        norm_backward_row<T>(x, g, n, args.norm, g, args.norm_weight_grad ? part : nullptr, args.norm_bias_grad ? part + second : nullptr);
      }
      if (sum_grad) each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(g + i, here), sum_grad + at + i, here); });
      if (dropout.enabled) drop_elements(dropout, row, 0, n, g);
      if (preactivation) {
        add_row<T>(preactivation + at, nullptr, n, x);
        derivative_row(args.activation, x, n, x);
        each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(g + i, here) * load(x + i, here), g + i, here); });
      }
      if (wants_biases || z_grad || z_grad_rounded)
        each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) {
          const F32 z = load(g + i, here);
          if (z_grad) store(z, z_grad + at + i, here);
          if (z_grad_rounded) store(z, z_grad_rounded + at + i, here);
          if (wants_biases) store(load(part + third + i, here) + z, part + third + i, here);
        });
      chained.row_done();
    }
    chained.finish();
  });
  if (args.norm_weight_grad) add_parts(sums, tasks, stride, n, static_cast<T*>(args.norm_weight_grad));
  if (args.norm_bias_grad) add_parts(sums + second, tasks, stride, n, static_cast<T*>(args.norm_bias_grad));
  for (int64_t b = 0, column = third; b < args.biases; column += args.bias_n[b++])
    if (args.bias_grad[b]) add_parts(sums + column, tasks, stride, args.bias_n[b], static_cast<T*>(args.bias_grad[b]));
}

}  // namespace

void tail_backward(const Runtime& runtime, const TailBackwardArgs& args) {
  with_dtype(args.dtype, [&](auto type) { tail<decltype(type)>(runtime, args); });
}

// y = norm(dropout(x) + residual)
void norm_backward(const Runtime& runtime, const NormBackwardArgs& args) {
  tail_backward(runtime, {.dtype = args.dtype, .rows = args.rows, .n = args.columns, .grad = args.grad, .norm_input = args.x,
                          .norm_input_addend = args.residual, .norm_input_drops = true, .has_norm = true, .norm = args.norm,
                          .dropout = args.dropout, .activation = Activation::none, .preactivation = nullptr, .sum_grad = args.residual_grad,
                          .z_grad = nullptr, .z_grad_rounded = args.x_grad, .norm_weight_grad = args.weight_grad,
                          .norm_bias_grad = args.bias_grad, .biases = 0, .bias_n = nullptr, .bias_grad = nullptr});
}

}  // namespace bigmodel::BIGMODEL_ISA
