// feed_forward: x -> (norm) -> W_in, activation -> W_out -> dropout -> + residual -> (norm), the block of Vaswani et al.,
// arXiv 1706.03762, 3.3; gated, the hidden layer is act(x W_gate) * (x W_in) (Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202).
//
//        x --pack--> left side --W_in--> a chunk of hidden --activation--> packed as the left side of --W_out--> sums (--norm--> out)
//
// The (rows, inner) hidden layer is never stored as rows: a chunk of it is activated and packed while it is in its task's cache.
#include "../linear/linear.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

template <class T, class Step>
struct FeedForward {
  using Side = Left<typename Step::A>;
  const Runtime& runtime;
  const FeedForwardArgs& args;
  const int64_t hidden = args.w_in.k, inner = args.w_in.n, inner_padded = round_up(inner, panel), columns = args.w_out.n,
                columns_padded = round_up(columns, panel);

  void run() const {
    const int64_t together = rows_together(larger(steps_of<Step>(hidden), steps_of<Step>(inner)));
    for (int64_t first = 0; first < args.rows; first += together) {
      const int64_t rows = smaller(together, args.rows - first);
      const Side x(runtime, scratch_a, rows, steps_of<Step>(hidden)), h(runtime, scratch_hidden, rows, steps_of<Step>(inner));
      pack_x(first, x);
      first_product(first, x, h);
      second_product(first, h);
    }
  }

  void pack_x(int64_t first, const Side& left) const {
    const T* x = static_cast<const T*>(args.x) + first * hidden;
    if (args.norm_position != NormPosition::pre) return pack_rows_left<Step>(runtime, x, hidden, left);
    float* normed = static_cast<float*>(runtime.scratch(scratch_output, size_t(left.m * hidden) * sizeof(float)));
    parallel(runtime, ceil_div(left.m, tile_rows), [&](int64_t task) {
      for (int64_t r = task * tile_rows; r < smaller(left.m, (task + 1) * tile_rows); r++) {
        float* target = normed + r * hidden;
        add_row<T>(x + r * hidden, nullptr, hidden, target);
        rest::norm_row<T>(target, hidden, args.norm, target);
      }
    });
    pack_rows_left<Step>(runtime, static_cast<const float*>(normed), hidden, left);
  }

  // W_in, activated (or times the activated gate), as the left side of the second product.
  void first_product(int64_t first, const Side& x, const Side& h) const {
    float* gate = nullptr;
    if (args.w_gate) {
      gate = static_cast<float*>(runtime.scratch(scratch_gate, size_t(x.m * inner_padded) * sizeof(float)));
      multiply_weight<T, Step>(runtime, x, *args.w_gate, gate, inner_padded, [&](int64_t row, int64_t rows, int64_t column, int64_t count, float* c, int64_t c_stride) {
        const Epilogue<T> epilogue = {.bias = static_cast<const T*>(args.bias_gate), .activation = Activation::none,
                                      .preactivation = offset<T>(args.gate_preactivation, (first + row) * inner), .residual = nullptr,
                                      .out = nullptr, .columns = inner};
        finish_columns(epilogue, rows, column, count, c, c_stride);
      });
    }
    multiply_weight<T, Step>(runtime, x, args.w_in, nullptr, 0, [&](int64_t row, int64_t rows, int64_t column, int64_t count, float* c, int64_t c_stride) {
      const Epilogue<T> epilogue = {.bias = static_cast<const T*>(args.bias_in), .activation = args.activation,
                                    .gate = gate ? gate + row * inner_padded : nullptr, .gate_stride = inner_padded,
                                    .preactivation = offset<T>(args.preactivation, (first + row) * inner), .residual = nullptr, .out = nullptr,
                                    .columns = inner};
      finish_columns(epilogue, rows, column, count, c, c_stride);
      pack_columns_left<Step>(h, row, rows, column, count, c, c_stride);
    });
  }

  // W_out, plus residual, into args.out or through the norm.
  void second_product(int64_t first, const Side& h) const {
    const bool post = args.norm_position == NormPosition::post;
    T* out = static_cast<T*>(args.out);
    float* sums = post ? static_cast<float*>(runtime.scratch(scratch_shared, size_t(h.m * columns_padded) * sizeof(float))) : nullptr;
    multiply_weight<T, Step>(runtime, h, args.w_out, sums, columns_padded, [&](int64_t row, int64_t rows, int64_t column, int64_t count, float* c, int64_t c_stride) {
      const int64_t at = first + row;
      const Epilogue<T> epilogue = {.bias = static_cast<const T*>(args.bias_out), .activation = Activation::none,
                                    .dropout = args.dropout.enabled ? &args.dropout : nullptr, .first_row = at,
                                    .residual = offset<T>(args.residual, at * columns), .prenorm = offset<T>(args.prenorm, at * columns),
                                    .out = post ? nullptr : out + at * columns, .columns = columns};
      finish_columns(epilogue, rows, column, count, c, c_stride);
    });
    if (post) norm_rows(runtime, sums, columns_padded, h.m, columns, args.norm, out + first * columns);
  }
};

}  // namespace

void feed_forward(const Runtime& runtime, const FeedForwardArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_step<T>(args.rows, [&](auto step) { FeedForward<T, decltype(step)>{runtime, args}.run(); });
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
