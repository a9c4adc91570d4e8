// feed_forward: x -> (norm) -> W_in, activation -> W_out -> dropout -> + residual -> (norm), the block of Vaswani et al.,
// arXiv 1706.03762, 3.3; gated, the hidden layer is act(x W_gate) * (x W_in) (Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202).
//
//   long input: a task owns a block of rows and takes it through both products; the (rows, inner) intermediate is that
//   block's alone and never reaches memory that another thread reads
//
//        x block --pack--> A --W_in panels--> hidden (float32, in cache) --pack--> A --W_out panels--> out block (--LN-->)
//
//   short input (fewer rows than keep all threads busy): two passes cut by columns, hidden shared between the threads
#include "../linear/linear.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

template <class T>
struct FeedForward {
  using Step = typename StepOf<T>::Type;
  const Runtime& runtime;
  const FeedForwardArgs& args;
  const Packed in, out;
  const int64_t hidden = in.k(), inner = in.n(), inner_padded = in.panel_count() * panel, columns = out.n(),
                columns_padded = out.panel_count() * panel;

  // rows [row, row + rows) times panels [first, last) of W_in, activated (or times the activated gate), into c.
  void first_product(int64_t row, int64_t rows, int64_t first, int64_t last, float* c, int64_t c_stride) const {
    const T* x = static_cast<const T*>(args.x) + row * hidden;
    const typename Step::A* a;
    if (args.norm_position == NormPosition::pre) {
      float* normed = static_cast<float*>(runtime.scratch(scratch_output, size_t(rows * hidden) * sizeof(float)));
      for (int64_t r = 0; r < rows; r++) {
        float* target = normed + r * hidden;
        add_row<T>(x + r * hidden, nullptr, hidden, target);
        norm_row<T>(target, hidden, args.norm, target);
      }
      a = pack_a<Step>(runtime, normed, hidden, rows, hidden);
    } else {
      a = pack_a<Step>(runtime, x, hidden, rows, hidden);
    }
    auto multiply = [&](const Packed& weight, const Epilogue<T>& epilogue, float* target, int64_t stride) {
      multiply_block<Step>(a, rows, in.steps(), static_cast<const typename Step::B*>(weight.panels), first, last, target, stride,
                           [&](int64_t column, int64_t count, float* group) { finish_columns(epilogue, rows, column, count, group, stride); });
    };
    float* gate = nullptr;
    const int64_t gate_stride = (last - first) * panel;
    if (args.packed_gate) {
      gate = static_cast<float*>(runtime.scratch(scratch_gate, size_t(rows * gate_stride) * sizeof(float)));
      multiply(Packed(args.packed_gate), {.bias = static_cast<const T*>(args.bias_gate), .activation = Activation::none,
                                          .preactivation = offset<T>(args.gate_preactivation, row * inner), .residual = nullptr, .out = nullptr,
                                          .columns = inner}, gate, gate_stride);
    }
    multiply(in, {.bias = static_cast<const T*>(args.bias_in), .activation = args.activation, .gate = gate ? gate - first * panel : nullptr,
                  .gate_stride = gate_stride, .preactivation = offset<T>(args.preactivation, row * inner), .residual = nullptr, .out = nullptr,
                  .columns = inner}, c, c_stride);
  }

  // The same rows of hidden times panels [first, last) of W_out, plus residual, into args.out or, before a norm, into c.
  void second_product(const float* h, int64_t row, int64_t rows, int64_t first, int64_t last, float* c, int64_t c_stride) const {
    const auto* a = pack_a<Step>(runtime, h, inner_padded, rows, inner);
    const bool post = args.norm_position == NormPosition::post;
    const Epilogue<T> epilogue = {.bias = static_cast<const T*>(args.bias_out), .activation = Activation::none,
                                  .dropout = args.dropout.enabled ? &args.dropout : nullptr, .first_row = row,
                                  .residual = offset<T>(args.residual, row * columns), .prenorm = offset<T>(args.prenorm, row * columns),
                                  .out = post ? nullptr : static_cast<T*>(args.out) + row * columns, .columns = columns};
    multiply_block<Step>(a, rows, out.steps(), static_cast<const typename Step::B*>(out.panels), first, last, c, c_stride,
                         [&](int64_t column, int64_t count, float* c_group) { finish_columns(epilogue, rows, column, count, c_group, c_stride); });
  }

  void run() const {
    const Grid grid(args.rows, in.panel_count(), runtime.threads);
    grid.column_blocks == 1 ? by_rows(grid) : by_columns(grid);
  }

  void by_rows(const Grid& grid) const {
    parallel(runtime, grid.row_blocks, [&](int64_t block) {
      const int64_t row = grid.first_row(block), rows = grid.first_row(block + 1) - row;
      if (rows == 0) return;
      float* h = static_cast<float*>(runtime.scratch(scratch_hidden, size_t(rows * inner_padded) * sizeof(float)));
      float* c = static_cast<float*>(runtime.scratch(scratch_c, size_t(rows * columns_padded) * sizeof(float)));
      first_product(row, rows, 0, in.panel_count(), h, inner_padded);
      second_product(h, row, rows, 0, out.panel_count(), c, columns_padded);
      if (args.norm_position == NormPosition::post)
        for (int64_t r = 0; r < rows; r++)
          norm_row<T>(c + r * columns_padded, columns, args.norm, static_cast<T*>(args.out) + (row + r) * columns);
    });
  }

  void by_columns(const Grid& grid) const {
    float* shared = static_cast<float*>(runtime.scratch(scratch_shared, size_t(args.rows * (inner_padded + columns_padded)) * sizeof(float)));
    float* sums = shared + args.rows * inner_padded;
    parallel(runtime, grid.tasks(), [&](int64_t task) {
      const int64_t block = task / grid.column_blocks, part = task % grid.column_blocks;
      const int64_t row = grid.first_row(block), rows = grid.first_row(block + 1) - row;
      const int64_t first = grid.first_panel(part), last = grid.first_panel(part + 1);
      if (rows > 0 && first < last) first_product(row, rows, first, last, shared + row * inner_padded + first * panel, inner_padded);
    });
    const Grid second(args.rows, out.panel_count(), runtime.threads);
    parallel(runtime, second.tasks(), [&](int64_t task) {
      const int64_t block = task / second.column_blocks, part = task % second.column_blocks;
      const int64_t row = second.first_row(block), rows = second.first_row(block + 1) - row;
      const int64_t first = second.first_panel(part), last = second.first_panel(part + 1);
      if (rows > 0 && first < last)
        second_product(shared + row * inner_padded, row, rows, first, last, sums + row * columns_padded + first * panel, columns_padded);
    });
    if (args.norm_position == NormPosition::post)
      norm_rows(runtime, sums, columns_padded, args.rows, columns, args.norm, static_cast<T*>(args.out));
  }
};

}  // namespace

void feed_forward(const Runtime& runtime, const FeedForwardArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    FeedForward<decltype(type)>{runtime, args, Packed(args.packed_in), Packed(args.packed_out)}.run();
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
