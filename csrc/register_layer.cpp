// A transformer layer as torch sees it on the CPU, in two calls: to query, key and value, and from them to the layer's result.
// Between the two the caller turns heads, and keeps keys and values in its cache.
//
// They are the ops of register_cpu.cpp and the kernel of attention one after the other, to the same bits. What they save is the
// Python and the dispatching between these, which for a single token costs more than the arithmetic.
#include "registration.h"

namespace bigmodel {
namespace {

// norm(x) W + b, without the norm where it has no weight.
Tensor cpu_layer_begin(Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, double norm_eps, Text norm_kind, Tensor packed,
                       OptionalTensor bias) {
  Tensor states = has_norm(norm_weight, norm_bias) ? norm_op(norm_kind_of(norm_kind), x, norm_weight, norm_bias, norm_eps, {}, {}, 0.0, 0.0, "norm_") : x;
  return cpu_linear(states, packed, bias, "none", {}, {}, {}, 1e-5, {}, "layer_norm", 0.0);
}

// The heads' results side by side, (..., heads * head_dim) with the leading dimensions of x.
Tensor context_of(const Tensor& x, const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options) {
  AttentionArgs args = attention_args(query, key, value, options);
  const int64_t rows = args.cu_seqlens_q ? query.size(0) : args.batch * args.query_length;
  STD_TORCH_CHECK(x.scalar_type() == query.scalar_type(), "query: dtype differs from x's");
  STD_TORCH_CHECK(x.size(x.dim() - 1) > 0, "x: shape ", shape_of(x), " has no features");  // or its elements could not tell its rows
  STD_TORCH_CHECK(x.numel() == rows * x.size(x.dim() - 1), "query: shape ", shape_of(query), " does not have the rows of x, ", shape_of(x));
  Tensor context = empty_rows_like(x, args.heads * args.head_dim);
  args.out = context.mutable_data_ptr();
  result_strides(args, args.out_stride);
  Tensor logsumexp = torch::stable::empty(logsumexp_shape(query, args, args.logsumexp_stride), ScalarType::Float);
  args.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
  if (query.numel() > 0) kernels().attention(runtime(), args);
  return context;
}

// y = x + attention(query, key, value) W + b, normalised where attention_norm_weight is given; then the feed-forward block on y with
// its residual and its norm, before ("pre") or behind ("post") it. `lengths` are the cu_seqlens of packed rows, as many keys as queries.
Tensor cpu_layer_end(Tensor x, Tensor query, Tensor key, Tensor value, OptionalTensor key_padding_mask, OptionalTensor attention_bias,
                     OptionalTensor lengths, int64_t longest, OptionalTensor sinks, double softmax_scale, bool is_causal, int64_t window_left,
                     int64_t window_right, double softcap, Tensor packed_context, OptionalTensor b_context, OptionalTensor attention_norm_weight,
                     OptionalTensor attention_norm_bias, double attention_norm_eps, Tensor packed_in, OptionalTensor b_in, Tensor packed_out,
                     OptionalTensor b_out, OptionalTensor packed_gate, OptionalTensor b_gate, Text activation, Text norm_position,
                     OptionalTensor norm_weight, OptionalTensor norm_bias, double norm_eps, Text norm_kind) {
  check_cpu(x, "x");
  STD_TORCH_CHECK(x.dim() >= 1, "x: must have at least one dimension");
  Tensor context = context_of(x, query, key, value, {key_padding_mask, attention_bias, lengths, lengths, {}, {}, sinks, longest, longest,
                                                     softmax_scale, is_causal, window_left, window_right, softcap, 0.0});
  Tensor y = cpu_linear(context, packed_context, b_context, "none", x, attention_norm_weight, attention_norm_bias, attention_norm_eps, {},
                        norm_kind, 0.0);
  return cpu_feed_forward(y, packed_in, b_in, packed_out, b_out, activation, y, norm_position, norm_weight, norm_bias, norm_eps, packed_gate,
                          b_gate, {}, norm_kind, 0.0);
}

}  // namespace
}  // namespace bigmodel

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel, m) {
  m.def("cpu_layer_begin(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, str norm_kind, Tensor packed, Tensor? bias) -> Tensor");
  m.def("cpu_layer_end(Tensor x, Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, Tensor? attention_bias, Tensor? lengths, "
        "int longest, Tensor? sinks, float softmax_scale, bool is_causal, int window_left, int window_right, float softcap, Tensor packed_context, "
        "Tensor? b_context, Tensor? attention_norm_weight, Tensor? attention_norm_bias, float attention_norm_eps, Tensor packed_in, "
        "Tensor? b_in, Tensor packed_out, Tensor? b_out, Tensor? packed_gate, Tensor? b_gate, str activation, str norm_position, "
        "Tensor? norm_weight, Tensor? norm_bias, float norm_eps, str norm_kind) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel, CPU, m) {
  m.impl("cpu_layer_begin", TORCH_BOX(&bigmodel::cpu_layer_begin));
  m.impl("cpu_layer_end", TORCH_BOX(&bigmodel::cpu_layer_end));
}
