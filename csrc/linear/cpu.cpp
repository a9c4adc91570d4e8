// pack: a weight into panels, once. linear: out = LN(act(x W^T + b) + residual), everything after the product in its epilogue.
#include "linear.h"

namespace bigmodel::BIGMODEL_ISA {

// Weight element (k, n) goes to panel n / panel, row k, column n % panel; with pairs two neighbouring k share a 32-bit word.
// Columns past n and the last odd k are zero, so no kernel ever asks where a weight ends.
void pack(const Runtime& runtime, const PackArgs& args) {
  PackedHeader& header = *static_cast<PackedHeader*>(args.packed);
  const int64_t k_per_step = header.pairs ? 2 : 1, rows = round_up(args.k, k_per_step);
  const int64_t stride_k = args.layout == WeightLayout::linear ? 1 : args.n;
  const int64_t stride_n = args.layout == WeightLayout::linear ? args.k : 1;
  const bool last = args.first_column + args.n == header.n;
  const int64_t end = last ? round_up(header.n, panel) : args.first_column + args.n;
  const int64_t first_panel = args.first_column / panel;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    T* panels = static_cast<T*>(static_cast<void*>(&header + 1));
    const T* weight = static_cast<const T*>(args.weight);
    // Eight columns at a time: each reads a contiguous run of a (out, in) weight while the panel's lines are written whole.
    parallel(runtime, ceil_div(end, panel) - first_panel, [&](int64_t task) {
      int64_t column = larger(args.first_column, (first_panel + task) * panel);
      const int64_t stop = smaller(end, (first_panel + task + 1) * panel);
      while (column < stop) {
        const int64_t in_panel = column % panel, n = column - args.first_column;
#if BIGMODEL_BF16_DOT
        if constexpr (__is_same(T, bf16))
          if (in_panel % 16 == 0 && smaller(stop - column, args.n - n) >= 16) {
            const bf16* const first = weight + n * stride_n;
            uint32_t* const pairs = reinterpret_cast<uint32_t*>(panels + column / panel * (rows * panel)) + in_panel;
            if (args.layout == WeightLayout::linear) columns_as_pairs([&](int64_t i) { return first + i * stride_n; }, args.k, pairs);
            else rows_as_pairs([&](int64_t i) { return first + i * stride_k; }, args.k, pairs);
            column += 16;
            continue;
          }
#endif
        const int64_t width = smaller(stop - column, 8 - in_panel % 8), count = larger(0, smaller(width, args.n - n));
        T* target = panels + column / panel * (rows * panel) + in_panel * k_per_step;
        column += width;
        if constexpr (sizeof(T) == sizeof(float)) {
          if (stride_k == 1) {
            const float* sources[8] = {};
            for (int64_t i = 0; i < count; i++) sources[i] = weight + (n + i) * stride_n;
            if (count == 8) transpose_rows(sources, args.k, 8, target, panel);
            else
              for (int64_t k = 0; k < rows; k++)
                for (int64_t i = 0; i < width; i++) target[k * panel + i] = i < count ? sources[i][k] : 0.0f;
            continue;
          }
        }
        for (int64_t k = 0; k < rows; k++) {
          T* row = target + k / k_per_step * (panel * k_per_step) + k % k_per_step;
          for (int64_t i = 0; i < width; i++) row[i * k_per_step] = k < args.k && i < count ? weight[k * stride_k + (n + i) * stride_n] : T{};
        }
      }
    });
  });
}

void linear(const Runtime& runtime, const LinearArgs& args) {
  const int64_t k = args.weight.k, n = args.weight.n, n_padded = round_up(n, panel);
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(args.out);
    with_step<T>(args.rows, [&](auto step) {
      using Step = decltype(step);
      const int64_t steps = steps_of<Step>(k), together = rows_together(steps);
      for (int64_t first = 0; first < args.rows; first += together) {
        const Left<typename Step::A> left(runtime, scratch_a, smaller(together, args.rows - first), steps);
        pack_rows_left<Step>(runtime, static_cast<const T*>(args.x) + first * k, k, left);
        // The norm needs whole rows, which no task has: it follows as a pass of its own.
        float* sums = args.has_norm ? static_cast<float*>(runtime.scratch(scratch_shared, size_t(left.m * n_padded) * sizeof(float))) : nullptr;
        multiply_weight<T, Step>(runtime, left, args.weight, sums, n_padded, [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* c, int64_t c_stride) {
          const int64_t at = first + row;
          const Epilogue<T> epilogue = {.bias = static_cast<const T*>(args.bias), .activation = args.activation,
                                        .preactivation = offset<T>(args.preactivation, at * n),
                                        .dropout = args.dropout.enabled ? &args.dropout : nullptr, .first_row = at,
                                        .residual = offset<T>(args.residual, at * n), .prenorm = offset<T>(args.prenorm, at * n),
                                        .out = args.has_norm ? nullptr : out + at * n, .columns = n};
          finish_columns(epilogue, rows, column, columns, c, c_stride);
        });
        if (args.has_norm) norm_rows(runtime, sums, n_padded, left.m, n, args.norm, out + first * n);
      }
    });
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
