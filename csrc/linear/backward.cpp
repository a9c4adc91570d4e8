// linear_backward: the gradients of y = norm(dropout(act(x W + b)) + residual).
//
//   1. row by row: dy -> norm' -> residual's gradient -> dropout -> act'(preactivation) -> dz, with the sums over rows that
//      are the gradients of the norm's parameters and of b;   left out where there is nothing to do: dz is then dy itself
//   2. dx = dz W^T       3. dW = x^T dz
#include "backward.h"

namespace bigmodel::BIGMODEL_ISA {

void linear_backward(const Runtime& runtime, const LinearBackwardArgs& args) {
  const int64_t rows = args.rows, k = args.k, n = args.n;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    bool wants_bias = false, wants_weight = false;
    for (int64_t i = 0; i < args.weights; i++) {
      wants_bias |= args.bias_grad[i] != nullptr;
      wants_weight |= args.weight_grad[i] != nullptr;
    }
    const T* grad = static_cast<const T*>(args.grad);
    const bool changes = args.has_norm || args.dropout.enabled || args.activation != Activation::none;
    float* dz = nullptr;
    if (changes && (wants_weight || args.x_grad)) dz = static_cast<float*>(runtime.scratch(scratch_grad, size_t(rows * n) * sizeof(float)));
    if (changes || wants_bias || args.residual_grad) {
      rest::tail_backward(runtime, {.dtype = args.dtype, .rows = rows, .n = n, .grad = grad, .norm_input = args.prenorm,
                                    .norm_input_addend = nullptr, .norm_input_drops = false, .has_norm = args.has_norm, .norm = args.norm,
                                    .dropout = args.dropout, .activation = args.activation,
                                    .preactivation = args.activation == Activation::none ? nullptr : args.preactivation,
                                    .sum_grad = args.residual_grad, .z_grad = dz, .z_grad_rounded = nullptr,
                                    .norm_weight_grad = args.norm_weight_grad, .norm_bias_grad = args.norm_bias_grad,
                                    .biases = args.weights, .bias_n = args.weight_n, .bias_grad = args.bias_grad});
    }
    const Stored<float> made = {dz, n};
    const Stored<T> given = {grad, n};

    if (args.x_grad) {
      const Weights<T> weight = {args.weight, args.weight_n, args.weights, k, args.layout};
      product_into(runtime, {dz ? as_rows(made, parts_enough_for<T>) : as_rows(given), false}, rows, weight.transpose(), k, n, static_cast<T*>(args.x_grad));
    }
    const Stored<T> x = {static_cast<const T*>(args.x), k};
    for (int64_t i = 0, column = 0; i < args.weights; column += args.weight_n[i++]) {
      if (!args.weight_grad[i]) continue;
      const Stored<float> made_part = {offset<float>(dz, column), n};
      const Stored<T> given_part = {grad + column, n};
      weight_gradient(runtime, args.layout, as_rows(x), k, dz ? as_rows(made_part, parts_enough_for<T>) : as_rows(given_part), args.weight_n[i], rows,
                      static_cast<T*>(args.weight_grad[i]));
    }
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
