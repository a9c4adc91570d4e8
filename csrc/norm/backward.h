// Sums over rows for gradients of weights and biases, in two stages: each task sums its own rows in float32, then the tasks' sums are
// added in their order. With the same number of threads the result has the same bits in every run.
#pragma once
#include "../activations/activations.h"
#include "../arch/philox.h"
#include "../dispatch.h"
#include "../parallel.h"
#include "norm.h"

namespace bigmodel::BIGMODEL_ISA {

// A task's sums of rows of n floats. Rows are added to `chain`; every 16 rows that joins `middle`, and every 16 times that joins
// `total`: sums of sums of sums are nearer to the truth than one long sum.
struct ChainedSums {
  static constexpr int length = 16;
  float *total, *chain, *middle;   // chain and middle are the caller's 2 n floats of working memory
  int64_t n;
  int rows = 0;
  ChainedSums(float* total, float* work, int64_t n) : total(total), chain(work), middle(work + n), n(n) {
    memset(total, 0, size_t(n) * sizeof(float));
    memset(work, 0, size_t(2 * n) * sizeof(float));
  }
  void row_done() {
    if (++rows % length == 0) join(chain, middle);
    if (rows % (length * length) == 0) join(middle, total);
  }
  void finish() {
    join(chain, middle);
    join(middle, total);
  }

 private:
  void join(float* from, float* to) {
    each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(to + i, here) + load(from + i, here), to + i, here); });
    memset(from, 0, size_t(n) * sizeof(float));
  }
};

// `parts` rows of n partial sums, to out.
template <class T>
static void add_parts(const float* sums, int64_t parts, int64_t stride, int64_t n, T* out) {
  each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) {
    F32 total = F32::zero();
    for (int64_t p = 0; p < parts; p++) total = total + load(sums + p * stride + i, here);
    store(total, out + i, here);
  });
}

// The way back through y = norm(dropout(act(z)) + residual), each part there or not, row by row.
template <class T>
struct TailBackward {
  int64_t rows, n;
  const T* grad;                 // of y
  const T* norm_input;           // dropout(act(z)) + residual
  const T* norm_input_addend;    // added to norm_input while it is read, or null
  bool norm_input_drops;         // norm_input is still to be dropped
  bool has_norm;
  NormArgs norm;
  Dropout dropout;
  Activation activation;
  const T* preactivation;        // z; null without activation
  T* sum_grad;                   // of dropout(act(z)) + residual: the residual's; or null
  float* z_grad;                 // or null
  T* z_grad_rounded;             // the same rounded, or null
  T *norm_weight_grad, *norm_bias_grad;   // or null
  bool wants_column_sums;        // of z_grad, to column_sums(part sums, parts, stride)

  template <class ColumnSums>
  void run(const Runtime& runtime, const ColumnSums& column_sums) const {
    const int64_t block = larger(4, ceil_div(rows, 8 * runtime.threads)), tasks = ceil_div(rows, block), stride = 3 * round_up(n, 16);
    const bool sums_wanted = norm_weight_grad || norm_bias_grad || wants_column_sums;
    float* sums = sums_wanted ? static_cast<float*>(runtime.scratch(scratch_sums, size_t(tasks * stride) * sizeof(float))) : nullptr;
    const int64_t second = stride / 3, third = 2 * second;
    parallel(runtime, tasks, [&](int64_t task) {
      float* g = static_cast<float*>(runtime.scratch(scratch_c, size_t(2 * second + 2 * stride) * sizeof(float)));
      float *x = g + second, *part = x + second;
      ChainedSums chained(sums ? sums + task * stride : part, part, sums ? stride : 0);
      for (int64_t row = task * block; row < smaller(rows, (task + 1) * block); row++) {
        const int64_t at = row * n;
        add_row<T>(grad + at, nullptr, n, g);
        if (has_norm) {
          add_row<T>(norm_input + at, nullptr, n, x);
          if (norm_input_drops && dropout.enabled) drop_elements(dropout, row, 0, n, x);
          if (norm_input_addend) add_to_row(norm_input_addend + at, n, x);
          norm_backward_row<T>(x, g, n, norm, g, norm_weight_grad ? part : nullptr, norm_bias_grad ? part + second : nullptr);
        }
        if (sum_grad) each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(g + i, here), sum_grad + at + i, here); });
        if (dropout.enabled) drop_elements(dropout, row, 0, n, g);
        if (preactivation) {
          add_row<T>(preactivation + at, nullptr, n, x);
          derivative_row(activation, x, n, x);
          each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(g + i, here) * load(x + i, here), g + i, here); });
        }
        if (wants_column_sums || z_grad || z_grad_rounded)
          each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) {
            const F32 z = load(g + i, here);
            if (z_grad) store(z, z_grad + at + i, here);
            if (z_grad_rounded) store(z, z_grad_rounded + at + i, here);
            if (wants_column_sums) store(load(part + third + i, here) + z, part + third + i, here);
          });
        chained.row_done();
      }
      chained.finish();
    });
    if (norm_weight_grad) add_parts(sums, tasks, stride, n, norm_weight_grad);
    if (norm_bias_grad) add_parts(sums + second, tasks, stride, n, norm_bias_grad);
    if (wants_column_sums) column_sums(sums + third, tasks, stride);
  }
};

}  // namespace bigmodel::BIGMODEL_ISA
