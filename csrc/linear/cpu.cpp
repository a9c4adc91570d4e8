// pack: a weight into panels, once. linear: out = LN(act(x W^T + b) + residual), everything after the product in its epilogue.
#include "../gemm/product.h"
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
        const int64_t in_panel = column % panel, width = smaller(stop - column, 8 - in_panel % 8), n = column - args.first_column;
        const int64_t count = larger(0, smaller(width, args.n - n));
        T* target = panels + column / panel * (rows * panel) + in_panel * k_per_step;
        column += width;
        if constexpr (sizeof(T) == sizeof(float)) {
          if (stride_k == 1) {
            const float* sources[8] = {};
            for (int64_t i = 0; i < count; i++) sources[i] = weight + (n + i) * stride_n;
            if (width == 8) transpose_rows(sources, int(count), args.k, 8, target, panel);
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
  const Packed weight(args.packed);
  const int64_t k = weight.k(), n = weight.n(), n_padded = weight.panel_count() * panel;
  const Grid grid(args.rows, weight.panel_count(), runtime.threads);
  const bool norm_apart = args.has_norm && grid.column_blocks > 1;
  float* shared = norm_apart ? static_cast<float*>(runtime.scratch(scratch_shared, size_t(args.rows * n_padded) * sizeof(float))) : nullptr;

  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(args.out);
    using Step = typename StepOf<T>::Type;
    parallel(runtime, grid.tasks(), [&](int64_t task) {
      const int64_t block = task / grid.column_blocks, column_block = task % grid.column_blocks;
      const int64_t row = grid.first_row(block), rows = grid.first_row(block + 1) - row;
      const int64_t first = grid.first_panel(column_block), last = grid.first_panel(column_block + 1);
      if (rows == 0 || first == last) return;
      const auto* a = pack_a<Step>(runtime, static_cast<const T*>(args.x) + row * k, k, rows, k);

      const int64_t c_stride = norm_apart ? n_padded : (last - first) * panel;
      float* c = norm_apart ? shared + row * n_padded + first * panel
                            : static_cast<float*>(runtime.scratch(scratch_c, size_t(rows * c_stride) * sizeof(float)));
      const Epilogue<T> epilogue = {.bias = static_cast<const T*>(args.bias), .activation = args.activation,
                                    .preactivation = offset<T>(args.preactivation, row * n),
                                    .dropout = args.dropout.enabled ? &args.dropout : nullptr, .first_row = row,
                                    .residual = offset<T>(args.residual, row * n), .prenorm = offset<T>(args.prenorm, row * n),
                                    .out = args.has_norm ? nullptr : out + row * n, .columns = n};
      multiply_block<Step>(a, rows, weight.steps(), static_cast<const typename Step::B*>(weight.panels), first, last, c, c_stride,
                           [&](int64_t column, int64_t count, float* c_group) { finish_columns(epilogue, rows, column, count, c_group, c_stride); });
      if (args.has_norm && !norm_apart)
        for (int64_t r = 0; r < rows; r++) norm_row<T>(c + r * c_stride, n, args.norm, out + (row + r) * n);
    });
    if (norm_apart) norm_rows(runtime, shared, n_padded, args.rows, n, args.norm, out);
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
