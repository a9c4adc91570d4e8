// norm_backward: the gradients of y = norm(dropout(x) + residual), row by row; see backward.h.
#include "backward.h"

namespace bigmodel::BIGMODEL_ISA {

void norm_backward(const Runtime& runtime, const NormBackwardArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    const TailBackward<T> tail = {.rows = args.rows, .n = args.columns, .grad = static_cast<const T*>(args.grad),
                                  .norm_input = static_cast<const T*>(args.x), .norm_input_addend = static_cast<const T*>(args.residual),
                                  .norm_input_drops = true, .has_norm = true, .norm = args.norm, .dropout = args.dropout,
                                  .activation = Activation::none, .preactivation = nullptr, .sum_grad = static_cast<T*>(args.residual_grad),
                                  .z_grad = nullptr, .z_grad_rounded = static_cast<T*>(args.x_grad),
                                  .norm_weight_grad = static_cast<T*>(args.weight_grad), .norm_bias_grad = static_cast<T*>(args.bias_grad),
                                  .wants_column_sums = false};
    tail.run(runtime, [](const float*, int64_t, int64_t) {});
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
