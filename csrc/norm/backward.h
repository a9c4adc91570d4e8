// Sums over rows for gradients of weights and biases, in two stages: each task sums its own rows in float32, then the tasks' sums are
// added in their order. With the same number of threads the result has the same bits in every run.
#pragma once
#include "../arch/simd.h"
#include "../dispatch.h"
#include "../kernels.h"
#include "../parallel.h"

namespace bigmodel {

// The way back through y = norm(dropout(act(z)) + residual), each part there or not, row by row. Arrays are of dtype, except z_grad.
struct TailBackwardArgs {
  Dtype dtype;
  int64_t rows, n;
  const void* grad;              // of y
  const void* norm_input;        // dropout(act(z)) + residual
  const void* norm_input_addend; // added to norm_input while it is read, or null
  bool norm_input_drops;         // norm_input is still to be dropped
  bool has_norm;
  NormArgs norm;
  Dropout dropout;
  Activation activation;
  const void* preactivation;     // z; null without activation
  void* sum_grad;                // of dropout(act(z)) + residual: the residual's; or null
  float* z_grad;                 // or null
  void* z_grad_rounded;          // the same rounded, or null
  void *norm_weight_grad, *norm_bias_grad;   // or null
  int64_t biases;                // that z's columns have had added, side by side: gradients of bias_n elements each, or null
  const int64_t* bias_n;
  void* const* bias_grad;
};

}  // namespace bigmodel

namespace bigmodel::BIGMODEL_REST {

void tail_backward(const Runtime&, const TailBackwardArgs&);

}  // namespace bigmodel::BIGMODEL_REST

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

}  // namespace bigmodel::BIGMODEL_ISA
