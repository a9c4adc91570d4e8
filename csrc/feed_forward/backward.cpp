// feed_forward_backward: the gradients of y = norm(dropout(h W_out + b_out) + residual), h = act(z) or act(g) z (gated),
// z = norm(x) W_in + b_in, g = norm(x) W_gate + b_gate; at most one of the norms is there.
//
//   1. row by row: dy -> norm' -> residual's gradient -> dropout -> da, and the sums over rows for the norm and b_out
//   2. dh = da W_out^T, and in its epilogue  dz = dh act'(z)  (gated: dz = dh act(g), dg = dh z act'(g)), with the sums for b_in
//   3. dW_out = h^T da; h is recomputed from z while it is packed
//   4. dx = dz W_in^T (+ dg W_gate^T: one product twice as deep), then through the norm before
//   5. dW_in = x^T dz, dW_gate = x^T dg; a normalised x is recomputed while it is packed
#include "../activations/activations.h"
#include "../linear/backward.h"
#include "../norm/norm.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

// The hidden layer, from its preactivations.
template <class T>
struct Hidden {
  const T *z, *gate;
  int64_t stride;
  Activation activation;
  const float* get(int64_t row, int64_t column, int64_t n, float* buffer) const {
    const int64_t at = row * stride + column;
    add_row<T>((gate ? gate : z) + at, nullptr, n, buffer);
    rest::activate_row(activation, buffer, n, buffer);
    if (gate)
      each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(buffer + i, here) * load(z + at + i, here), buffer + i, here); });
    return buffer;
  }
};

// Normalised rows, from their input and statistics.
template <class T>
struct Normalised {
  const T* x;
  int64_t stride;
  const NormArgs& norm;
  const rest::RowStatistics* statistics;
  const float* get(int64_t row, int64_t column, int64_t n, float* buffer) const {
    const T *source = x + row * stride + column, *bias = static_cast<const T*>(norm.bias);
    const rest::RowStatistics s = statistics[row];
    each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) {
      F32 y = normalised(s, load(source + i, here));
      if (norm.weight) y = y * norm_factor<T>(norm, column + i, here);
      if (bias) y = y + load(bias + column + i, here);
      store(y, buffer + i, here);
    });
    return buffer;
  }
};

template <class T>
struct FeedForwardBackward {
  const Runtime& runtime;
  const FeedForwardBackwardArgs& args;
  const int64_t rows = args.rows, hidden = args.hidden, inner = args.inner, columns = args.columns;
  const bool gated = args.w_gate != nullptr, pre = args.norm_position == NormPosition::pre, post = args.norm_position == NormPosition::post;
  const T* z = static_cast<const T*>(args.preactivation);
  const T* g = static_cast<const T*>(args.gate_preactivation);
  // dz, and beside it dg: one matrix, so that they are one operand.
  const int64_t inner_stride = gated ? 2 * inner : inner;

  static constexpr int enough = parts_enough_for<T>;   // of what is computed, not stored

  static T* out(void* p) { return static_cast<T*>(p); }

  // A group of columns of dh = da W_out^T to dz and dg, and into the row block's sums.
  void hidden_gradient(int64_t first_row, int64_t count_rows, int64_t column, int64_t count, const float* c, int64_t c_stride, float* dz, float* sums) const {
    constexpr int64_t widest = panel_group * panel;
    alignas(64) float slope[widest], opened[widest], chain[2][2 * widest];
    ChainedSums z_sums(sums + column, chain[0], count), gate_sums(sums + inner + column, chain[1], gated ? count : 0);
    for (int64_t r = 0; r < count_rows; r++) {
      const int64_t at = (first_row + r) * inner + column;
      const float* dh = c + r * c_stride;
      float* target = dz + (first_row + r) * inner_stride + column;
      add_row<T>((gated ? g : z) + at, nullptr, count, slope);
      if (gated) rest::activate_row(args.activation, slope, count, opened);
      rest::derivative_row(args.activation, slope, count, slope);
      each_vector(count, [&](int64_t i, int here) __attribute__((always_inline)) {
        const F32 gradient = F32::load(dh + i), d = gradient * F32::load((gated ? opened : slope) + i);
        store(d, target + i, here);
        store(load(chain[0] + i, here) + d, chain[0] + i, here);
        if (!gated) return;
        const F32 d_gate = gradient * load(z + at + i, here) * F32::load(slope + i);
        store(d_gate, target + inner + i, here);
        store(load(chain[1] + i, here) + d_gate, chain[1] + i, here);
      });
      z_sums.row_done();
      gate_sums.row_done();
    }
    z_sums.finish();
    gate_sums.finish();
  }

  void run() const {
    const bool wants_inner = args.x_grad || args.w_in_grad || args.b_in_grad || args.w_gate_grad || args.b_gate_grad ||
                             (pre && (args.norm_weight_grad || args.norm_bias_grad));
    // 1
    const bool changes = post || args.dropout.enabled;
    float* da = nullptr;
    if (changes && (wants_inner || args.w_out_grad))
      da = static_cast<float*>(runtime.scratch(scratch_grad, size_t(rows * columns) * sizeof(float)));
    if (changes || args.b_out_grad || args.residual_grad) {
      rest::tail_backward(runtime, {.dtype = args.dtype, .rows = rows, .n = columns, .grad = args.grad, .norm_input = args.prenorm,
                                    .norm_input_addend = nullptr, .norm_input_drops = false, .has_norm = post, .norm = args.norm,
                                    .dropout = args.dropout, .activation = Activation::none, .preactivation = nullptr,
                                    .sum_grad = args.residual_grad, .z_grad = da, .z_grad_rounded = nullptr,
                                    .norm_weight_grad = post ? args.norm_weight_grad : nullptr,
                                    .norm_bias_grad = post ? args.norm_bias_grad : nullptr, .biases = 1, .bias_n = &columns,
                                    .bias_grad = &args.b_out_grad});
    }
    const Stored<float> made = {da, columns};
    const Stored<T> given = {static_cast<const T*>(args.grad), columns};
    const Rows tail_grad = da ? as_rows(made, enough) : as_rows(given);

    // 2
    float* dz = nullptr;
    if (wants_inner) {
      const Weights<T> w_out = {&args.w_out, &columns, 1, inner, args.layout};
      dz = static_cast<float*>(runtime.scratch(scratch_grad_hidden, size_t(rows * inner_stride) * sizeof(float)));
      const int64_t parts = ceil_div(rows, row_block);
      float* sums = static_cast<float*>(runtime.scratch(scratch_sums, size_t(parts * inner_stride) * sizeof(float)));
      product(runtime, {tail_grad, false}, rows, w_out.transpose(), inner, columns, nullptr, 0,
              [&](int64_t row, int64_t here, int64_t column, int64_t count, const float* c, int64_t c_stride) {
                hidden_gradient(row, here, column, count, c, c_stride, dz, sums + row / row_block * inner_stride);
              });
      if (args.b_in_grad) add_parts(sums, parts, inner_stride, inner, out(args.b_in_grad));
      if (args.b_gate_grad) add_parts(sums + inner, parts, inner_stride, inner, out(args.b_gate_grad));
    }
    // 3
    if (args.w_out_grad) {
      const Hidden<T> h = {z, g, inner, args.activation};
      weight_gradient(runtime, args.layout, as_rows(h, enough), inner, tail_grad, columns, rows, out(args.w_out_grad));
    }
    // 4
    if (args.x_grad || (pre && (args.norm_weight_grad || args.norm_bias_grad))) {
      const Stored<float> operand = {dz, inner_stride};
      const void* const both[] = {args.w_in, args.w_gate};
      const int64_t inner_of[] = {inner, inner};
      const Weights<T> weights = {both, inner_of, gated ? 2 : 1, hidden, args.layout};
      if (pre) {
        float* normed_grad = static_cast<float*>(runtime.scratch(scratch_grad, size_t(rows * hidden) * sizeof(float)));
        product_into(runtime, {as_rows(operand, enough), false}, rows, weights.transpose(), hidden, inner_stride, normed_grad);
        norm_before(normed_grad);
      } else {
        product_into(runtime, {as_rows(operand, enough), false}, rows, weights.transpose(), hidden, inner_stride, out(args.x_grad));
      }
    }
    // 5
    if (!args.w_in_grad && !args.w_gate_grad) return;
    const rest::RowStatistics* statistics = pre ? row_statistics_of_x() : nullptr;
    const Stored<T> plain = {static_cast<const T*>(args.x), hidden};
    const Normalised<T> normalised = {static_cast<const T*>(args.x), hidden, args.norm, statistics};
    const Rows x = pre ? as_rows(normalised, enough) : as_rows(plain);
    for (int part = 0; part < 2; part++) {
      T* target = out(part ? args.w_gate_grad : args.w_in_grad);
      const Stored<float> grad = {dz + part * inner, inner_stride};
      if (target) weight_gradient(runtime, args.layout, x, hidden, as_rows(grad, enough), inner, rows, target);
    }
  }

  // Through the norm before the products: its input is x, the gradient of its output is float32.
  void norm_before(const float* normed_grad) const {
    const int64_t block = larger(4, ceil_div(rows, 8 * runtime.threads)), tasks = ceil_div(rows, block), padded = round_up(hidden, 16);
    float* sums = static_cast<float*>(runtime.scratch(scratch_sums, size_t(tasks * 2 * padded) * sizeof(float)));
    parallel(runtime, tasks, [&](int64_t task) {
      float* x = static_cast<float*>(runtime.scratch(scratch_c, size_t(5 * padded) * sizeof(float)));
      float* part = x + padded;
      ChainedSums chained(sums + task * 2 * padded, part, 2 * padded);
      for (int64_t row = task * block; row < smaller(rows, (task + 1) * block); row++) {
        add_row<T>(static_cast<const T*>(args.x) + row * hidden, nullptr, hidden, x);
        rest::norm_backward_row<T>(x, normed_grad + row * hidden, hidden, args.norm, x, part, part + padded);
        if (args.x_grad)
          each_vector(hidden, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(x + i, here), out(args.x_grad) + row * hidden + i, here); });
        chained.row_done();
      }
      chained.finish();
    });
    if (args.norm_weight_grad) add_parts(sums, tasks, 2 * padded, hidden, out(args.norm_weight_grad));
    if (args.norm_bias_grad) add_parts(sums + padded, tasks, 2 * padded, hidden, out(args.norm_bias_grad));
  }

  const rest::RowStatistics* row_statistics_of_x() const {
    auto* statistics = static_cast<rest::RowStatistics*>(runtime.scratch(scratch_statistics, size_t(rows) * sizeof(rest::RowStatistics)));
    const int64_t block = 64;
    parallel(runtime, ceil_div(rows, block), [&](int64_t task) {
      float* x = static_cast<float*>(runtime.scratch(scratch_c, size_t(hidden) * sizeof(float)));
      for (int64_t row = task * block; row < smaller(rows, (task + 1) * block); row++) {
        add_row<T>(static_cast<const T*>(args.x) + row * hidden, nullptr, hidden, x);
        statistics[row] = rest::row_statistics(x, hidden, args.norm);
      }
    });
    return statistics;
  }
};

}  // namespace

void feed_forward_backward(const Runtime& runtime, const FeedForwardBackwardArgs& args) {
  with_dtype(args.dtype, [&](auto type) { FeedForwardBackward<decltype(type)>{runtime, args}.run(); });
}

}  // namespace bigmodel::BIGMODEL_ISA
