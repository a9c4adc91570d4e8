// A layer in two calls, as torch sees it: to query, key and value, and from them to the layer's result; and the gradients of both. They
// are the launches of the operators (register_cuda.h) one after the other, without the Python between them, for which a GPU would wait.
// Rows are (tokens, features).
#include "register_cuda.h"

#include <array>

namespace bigmodel::cuda {
namespace {

// An operator of torch with one result.
template <typename... Arguments>
Tensor call_torch(const char* name, const Arguments&... arguments) {
  using torch::stable::detail::from;
  std::array<StableIValue, sizeof...(Arguments)> stack{from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// torch's product with the bias, where that has been measured to be faster and the residual can go with the norm.
Tensor torch_product(const Tensor& rows, const Tensor& weight, const OptionalTensor& bias, const std::string& weight_layout) {
  return call_torch("aten::linear", rows, is_conv1d(weight_layout) ? transposed(weight) : weight, bias);
}

// The other products of the backward have nothing to fuse, and are torch's. dz: the gradient of what the weight gave; name: of the other.
Tensor product(const Tensor& a, const Tensor& b, const Tensor& named, const char* name) {
  require(named, name, a.scalar_type(), 2);
  STD_TORCH_CHECK(b.scalar_type() == a.scalar_type() && a.size(1) == b.size(0), name, ": shape ", shape_of(named), " does not fit: ", shape_of(a), " times ",
                  shape_of(b));
  return call_torch("aten::mm", a, b);
}
Tensor input_gradient(const Tensor& dz, const Tensor& weight, const std::string& weight_layout, const char* name) {
  STD_TORCH_CHECK(weight.dim() == 2, name, ": shape ", shape_of(weight), " must have 2 dimensions");
  return product(dz, is_conv1d(weight_layout) ? transposed(weight) : weight, weight, name);
}
Tensor weight_gradient(const Tensor& rows, const Tensor& dz, const std::string& weight_layout, const char* name) {
  STD_TORCH_CHECK(rows.dim() == 2, name, ": shape ", shape_of(rows), " must have 2 dimensions");
  return is_conv1d(weight_layout) ? product(transposed(rows), dz, rows, name) : product(transposed(dz), rows, rows, name);
}

std::vector<Tensor> vector_of(const OptionalTensor& tensor) { return tensor ? std::vector<Tensor>{*tensor} : std::vector<Tensor>{}; }

bool is_pre(const std::string& norm_position, const OptionalTensor& attention_norm_weight) {
  STD_TORCH_CHECK(norm_position == "pre" || norm_position == "post", "norm_position: '", norm_position, "' must be 'pre' or 'post'");
  const bool pre = norm_position == "pre";
  STD_TORCH_CHECK(pre != attention_norm_weight.has_value(), "attention_norm_weight: must be given with norm_position 'post', and only with it");
  return pre;
}

// ---- to query, key and value ----

Tensor layer_begin(Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, double norm_eps, std::vector<Tensor> weights,
                   std::vector<Tensor> biases, Text weight_layout) {
  Tensor states = norm_weight ? std::get<0>(norm(x, {}, *norm_weight, norm_bias, norm_eps, "layer_norm", false)) : x;
  return std::get<0>(linear(states, weights, biases, {}, {}, weight_layout, "none", 0, false, -1));
}

// From the gradient of the result those of x, norm_weight and norm_bias, each weight and each bias, where `needs` asks for them: otherwise
// empty. states: what the weights were multiplied by, which their gradients read; x: what the norm was of, where there was one.
std::vector<Tensor> layer_begin_backward(Tensor grad, OptionalTensor x, OptionalTensor states, OptionalTensor norm_weight, double norm_eps,
                                         std::vector<Tensor> weights, Text weight_layout, std::vector<bool> needs) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0, "weights: 0 tensors; 1 or more are allowed");
  STD_TORCH_CHECK(needs.size() == 3 + 2 * count, "needs: must hold ", 3 + 2 * count, " values, not ", needs.size());
  STD_TORCH_CHECK(x.has_value() == norm_weight.has_value(), "x: must be given with norm_weight, and only with it");
  STD_TORCH_CHECK(norm_weight || !(needs[1] || needs[2]), "norm_weight: must be given where its gradient or its bias's is needed");
  STD_TORCH_CHECK(grad.dim() == 2, "grad: shape ", shape_of(grad), " must have 2 dimensions");
  const bool conv1d = is_conv1d(weight_layout);
  std::vector<int64_t> first{0};  // column of each weight
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.dim() == 2, "weights: shape ", shape_of(weight), " must have 2 dimensions");
    first.push_back(first.back() + weight.size(conv1d ? 1 : 0));
  }
  STD_TORCH_CHECK(grad.size(1) == first.back(), "grad: shape ", shape_of(grad), " must have ", first.back(), " columns, as many as weights give");
  const auto asks = [&](size_t from) {
    for (size_t i = from; i < from + count; i++)
      if (needs[i]) return true;
    return false;
  };
  STD_TORCH_CHECK(states || !asks(3), "states: must be given where the gradient of a weight is needed");
  const Call call(grad);  // torch's products run on its device too
  std::vector<OptionalTensor> results(needs.size());
  Sums sums(grad);

  if (asks(3)) {
    bool all = count > 1 && !conv1d;
    for (size_t i = 0; i < count; i++) all = all && needs[3 + i];
    if (all) {  // rows of one matrix, which they stay
      Tensor whole = weight_gradient(*states, grad, weight_layout, "states");
      for (size_t i = 0; i < count; i++) results[3 + i] = torch::stable::narrow(whole, 0, first[i], first[i + 1] - first[i]);
    } else {
      for (size_t i = 0; i < count; i++)
        if (needs[3 + i]) results[3 + i] = weight_gradient(*states, torch::stable::narrow(grad, 1, first[i], first[i + 1] - first[i]), weight_layout, "states");
    }
  }
  if (asks(3 + count)) {
    const auto [parts, same] = column_parts_of(grad, {}, 0);
    for (size_t i = 0; i < count; i++)
      if (needs[3 + count + i]) results[3 + count + i] = sums.add(parts.part(first[i], first[i + 1] - first[i]));
  }
  if (needs[0] || needs[1] || needs[2]) {
    Tensor weight = count == 1 ? weights[0] : call_torch("aten::cat", weights, int64_t(conv1d ? 1 : 0));
    results[0] = input_gradient(grad, weight, weight_layout, "weights");
    if (norm_weight) {
      const NormGradient found = norm_gradient({*results[0], {}, {}, {}, *x, norm_weight, {}, 0, true, "layer_norm", norm_eps, 0},
                                               {needs[0], false, needs[1], needs[2], false});
      results[0] = found.total;
      if (found.weight) results[1] = sums.add(*found.weight);
      if (found.bias) results[2] = sums.add(*found.bias);
    }
  }
  sums.run();
  return filled(results, grad);
}

// ---- from them to the result ----

struct Dropout {
  OptionalTensor seed;
  double p = 0;
};

struct EndInputs {
  const Tensor &x, &query, &key, &value;
  const OptionalTensor& lengths;
  int64_t longest;
  const OptionalTensor& sinks;
  double softmax_scale;
  bool is_causal;
  int64_t window_left, window_right;
  const Tensor& w_context;
  const OptionalTensor &b_context, &attention_norm_weight, &attention_norm_bias;
  double attention_norm_eps;
  const Tensor& w_in;
  const OptionalTensor& b_in;
  const Tensor& w_out;
  const OptionalTensor& b_out;
  const Text &weight_layout, &activation, &norm_position;
  const Tensor& norm_weight;
  const OptionalTensor& norm_bias;
  double norm_eps;
  const std::vector<bool>& by_torch;
  Dropout attention, context, ffn;
};

// What the backward reads. `normalised` is the feed-forward block's input; preactivation is left out if it is made again; ffn_sum is there
// where a norm is behind the block.
struct Kept {
  bool recompute;
  OptionalTensor context, logsumexp, sum, normalised, preactivation, ffn_sum;
};

AttentionInputs attention_of(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& lengths, int64_t longest,
                             const OptionalTensor& sinks, double softmax_scale, bool is_causal, int64_t window_left, int64_t window_right,
                             const Dropout& dropout) {
  static const OptionalTensor none{};
  return {query, key, value, none, none, lengths, lengths, dropout.seed, none, sinks, longest, longest, softmax_scale, is_causal, window_left, window_right,
          0, dropout.p};
}

// The heads' results side by side, (tokens, heads * head_dim), and the logsumexp if it is to be kept.
Tensor context_of(const AttentionInputs& inputs, OptionalTensor* logsumexp) {
  const Tensor& query = inputs.query;
  Call call(query);
  Tensor float_sinks;
  AttentionParams p = attention_params(call, inputs, float_sinks);
  const bool packed = query.dim() == 3;
  const int64_t heads = query.size(1), d = query.size(query.dim() - 1), rows = packed ? query.size(0) : query.size(0) * query.size(2);
  Tensor context = torch::stable::new_empty(query, {rows, heads * d});
  p.out_stride[0] = packed ? 0 : query.size(2) * heads * d;
  p.out_stride[1] = d;
  p.out_stride[2] = heads * d;
  p.out = call.use(context, "context", true);
  if (logsumexp != nullptr) {
    *logsumexp = rows_like(query);
    p.logsumexp = static_cast<float*>(call.use(**logsumexp, "logsumexp", true));
  }
  launch_attention(p, call, query, inputs.key);
  return context;
}

// (tokens, heads * head_dim) as query is.
Tensor heads_of(const Tensor& rows, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(query.dim() == 3 || query.dim() == 4, "query: shape ", shape_of(query), " must have 3 or 4 dimensions");
  STD_TORCH_CHECK(rows.numel() == query.numel() && rows.is_contiguous(), name, ": shape ", shape_of(rows), " does not fit query's, ", shape_of(query));
  if (query.dim() == 3) return torch::stable::view(rows, {query.size(0), query.size(1), query.size(2)});
  return torch::stable::transpose(torch::stable::view(rows, {query.size(0), query.size(2), query.size(1), query.size(3)}), 1, 2);
}

Tensor run_end(const EndInputs& in, Kept* kept) {
  const bool pre = is_pre(in.norm_position, in.attention_norm_weight);
  STD_TORCH_CHECK(in.by_torch.size() == 2, "by_torch: must hold 2 values, not ", in.by_torch.size());
  STD_TORCH_CHECK(!(in.by_torch[0] && in.context.seed) && !(in.by_torch[1] && in.ffn.seed), "by_torch: must be false with dropout, which goes with our product");
  const Call call(in.x);  // torch's products run on its device too
  const auto multiply = [&](const Tensor& rows, const Tensor& weight, const OptionalTensor& bias, const Text& then, const OptionalTensor& residual,
                            const Dropout& dropout, bool keep) {
    return linear(rows, {weight}, vector_of(bias), residual, dropout.seed, in.weight_layout, then, dropout.p, keep, -1);
  };
  // (the norm of dropout(rows W + b) + residual, and that sum)
  const auto close = [&](const Tensor& rows, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual, const Dropout& dropout,
                         const Tensor& gamma, const OptionalTensor& beta, double eps, bool torchs) {
    if (torchs) return norm(torch_product(rows, weight, bias, in.weight_layout), residual, gamma, beta, eps, "layer_norm", pre || kept != nullptr);
    Tensor sum = std::get<0>(multiply(rows, weight, bias, "none", residual, dropout, false));
    return std::tuple<Tensor, Tensor>{std::get<0>(norm(sum, {}, gamma, beta, eps, "layer_norm", false)), sum};
  };
  Tensor context = context_of(attention_of(in.query, in.key, in.value, in.lengths, in.longest, in.sinks, in.softmax_scale, in.is_causal, in.window_left,
                                           in.window_right, in.attention), kept != nullptr ? &kept->logsumexp : nullptr);
  const auto [normalised, sum] =
      pre ? close(context, in.w_context, in.b_context, in.x, in.context, in.norm_weight, in.norm_bias, in.norm_eps, in.by_torch[0])
          : close(context, in.w_context, in.b_context, in.x, in.context, *in.attention_norm_weight, in.attention_norm_bias, in.attention_norm_eps, in.by_torch[0]);
  const bool keep = kept != nullptr && !kept->recompute, activates = in.activation != "none";
  const auto [hidden, preactivation] = multiply(normalised, in.w_in, in.b_in, in.activation, {}, {}, keep && activates);
  if (kept != nullptr) {
    kept->context = context;
    kept->sum = sum;
    kept->normalised = normalised;
    if (keep) kept->preactivation = activates ? preactivation : hidden;
  }
  if (pre) return std::get<0>(multiply(hidden, in.w_out, in.b_out, "none", sum, in.ffn, false));
  const auto [out, ffn_sum] = close(hidden, in.w_out, in.b_out, normalised, in.ffn, in.norm_weight, in.norm_bias, in.norm_eps, in.by_torch[1]);
  if (kept != nullptr) kept->ffn_sum = ffn_sum;
  return out;
}

// y = x + attention(query, key, value) W + b, normalised where the norms are behind ("post") the halves of the layer; then the feed-forward
// block on y with its residual and its norm. `lengths` are the cu_seqlens of packed rows, as many keys as queries. by_torch: which of
// the products before a norm that can add the residual, W and the block's second ("post" alone), are torch's.
Tensor layer_end(Tensor x, Tensor query, Tensor key, Tensor value, OptionalTensor lengths, int64_t longest, OptionalTensor sinks, double softmax_scale,
                 bool is_causal, int64_t window_left, int64_t window_right, Tensor w_context, OptionalTensor b_context,
                 OptionalTensor attention_norm_weight, OptionalTensor attention_norm_bias, double attention_norm_eps, Tensor w_in, OptionalTensor b_in,
                 Tensor w_out, OptionalTensor b_out, Text weight_layout, Text activation, Text norm_position, Tensor norm_weight,
                 OptionalTensor norm_bias, double norm_eps, std::vector<bool> by_torch) {
  return run_end({x, query, key, value, lengths, longest, sinks, softmax_scale, is_causal, window_left, window_right, w_context, b_context,
                  attention_norm_weight, attention_norm_bias, attention_norm_eps, w_in, b_in, w_out, b_out, weight_layout, activation, norm_position,
                  norm_weight, norm_bias, norm_eps, by_torch, {}, {}, {}}, nullptr);
}

// The same with dropout of the probabilities, of attention's output and of the block's; then all that `Kept` is, empty where it is not.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_end_training(
    Tensor x, Tensor query, Tensor key, Tensor value, OptionalTensor lengths, int64_t longest, double softmax_scale, bool is_causal, int64_t window_left,
    int64_t window_right, OptionalTensor attention_seed, double attention_p, OptionalTensor context_seed, double context_p, OptionalTensor ffn_seed,
    double ffn_p, Tensor w_context, OptionalTensor b_context, OptionalTensor attention_norm_weight, OptionalTensor attention_norm_bias,
    double attention_norm_eps, Tensor w_in, OptionalTensor b_in, Tensor w_out, OptionalTensor b_out, Text weight_layout, Text activation,
    Text norm_position, Tensor norm_weight, OptionalTensor norm_bias, double norm_eps, std::vector<bool> by_torch, bool recompute) {
  Kept kept{recompute, {}, {}, {}, {}, {}, {}};
  Tensor out = run_end({x, query, key, value, lengths, longest, {}, softmax_scale, is_causal, window_left, window_right, w_context, b_context,
                        attention_norm_weight, attention_norm_bias, attention_norm_eps, w_in, b_in, w_out, b_out, weight_layout, activation, norm_position,
                        norm_weight, norm_bias, norm_eps, by_torch, {attention_seed, attention_p}, {context_seed, context_p}, {ffn_seed, ffn_p}}, &kept);
  const std::vector<Tensor> all = filled({kept.context, kept.logsumexp, kept.sum, kept.normalised, kept.preactivation, kept.ffn_sum}, x);
  return {out, all[0], all[1], all[2], all[3], all[4], all[5]};
}

// The places of the gradients of layer_end_training.
enum Gradient : size_t {
  of_x, of_query, of_key, of_value, of_w_context, of_b_context, of_attention_norm_weight, of_attention_norm_bias, of_w_in, of_b_in, of_w_out, of_b_out,
  of_norm_weight, of_norm_bias, gradient_count
};

}  // namespace

// From the gradient of the result those that `needs` asks for: otherwise empty. Those of query, key and value are side by side in one tensor
// where there is a key for each query. Biases are not read but for b_in, where preactivation is not there and is made again.
std::vector<Tensor> layer_end_backward(
    Tensor grad, Tensor query, Tensor key, Tensor value, OptionalTensor lengths, int64_t longest, double softmax_scale, bool is_causal, int64_t window_left,
    int64_t window_right, OptionalTensor attention_seed, double attention_p, OptionalTensor context_seed, double context_p, OptionalTensor ffn_seed,
    double ffn_p, Tensor context, Tensor logsumexp, Tensor sum, Tensor normalised, OptionalTensor preactivation, OptionalTensor ffn_sum, Tensor w_context,
    OptionalTensor attention_norm_weight, double attention_norm_eps, Tensor w_in, OptionalTensor b_in, Tensor w_out, Text weight_layout, Text activation,
    Text norm_position, Tensor norm_weight, double norm_eps, std::vector<bool> needs) {
  const bool pre = is_pre(norm_position, attention_norm_weight);
  STD_TORCH_CHECK(pre != ffn_sum.has_value(), "ffn_sum: must be given with norm_position 'post', and only with it");
  STD_TORCH_CHECK(needs.size() == gradient_count, "needs: must hold ", size_t(gradient_count), " values, not ", needs.size());
  STD_TORCH_CHECK(!pre || !(needs[of_attention_norm_weight] || needs[of_attention_norm_bias]), "needs: there is no norm behind attention with norm_position 'pre'");
  const Call call(grad);  // torch's products run on its device too
  std::vector<OptionalTensor> results(gradient_count);
  Sums sums(grad);
  const auto add = [&](Gradient which, const std::optional<Parts>& parts) {
    if (needs[which]) results[which] = sums.add(*parts);
  };
  const bool attends = needs[of_query] || needs[of_key] || needs[of_value];
  // What lies before the feed-forward block, and its norm where that is before it, needs the gradient of the block's input.
  bool before = attends || needs[of_x];
  for (size_t i = of_w_context; i <= of_attention_norm_bias; i++) before = before || needs[i];
  const bool need_input = before || (pre && (needs[of_norm_weight] || needs[of_norm_bias]));
  const bool need_hidden = need_input || needs[of_w_in] || needs[of_b_in], need_output = need_hidden || needs[of_w_out];

  // ---- the feed-forward block; dy is the gradient of its second product ----
  Tensor dy = grad;
  OptionalTensor by_residual = grad;
  if (!pre) {
    const NormGradient found = norm_gradient({grad, {}, {}, {}, *ffn_sum, norm_weight, ffn_seed, ffn_p, true, "layer_norm", norm_eps, 0},
                                             {before, need_output, needs[of_norm_weight], needs[of_norm_bias], needs[of_b_out]});
    if (need_output) dy = *found.x;
    by_residual = found.total;
    add(of_norm_weight, found.weight);
    add(of_norm_bias, found.bias);
    add(of_b_out, found.sums);
  } else if (needs[of_b_out] || (ffn_seed && need_output)) {
    std::optional<Parts> parts;
    std::tie(parts, dy) = column_parts_of(grad, ffn_seed, ffn_p);
    add(of_b_out, parts);
  }
  OptionalTensor dnormalised;
  if (need_output) {
    if (!preactivation) preactivation = std::get<0>(linear(normalised, {w_in}, vector_of(b_in), {}, {}, weight_layout, "none", 0, false, -1));
    const auto [dz, hidden, parts] = hidden_backward(dy, w_out, *preactivation, weight_layout, activation, needs[of_w_out], needs[of_b_in], -1);
    if (needs[of_w_out]) results[of_w_out] = weight_gradient(hidden, dy, weight_layout, "w_out");
    if (needs[of_w_in]) results[of_w_in] = weight_gradient(normalised, dz, weight_layout, "normalised");
    add(of_b_in, Parts{parts, 0, dz.size(1), parts.size(0), dz.size(1)});
    if (need_input) dnormalised = input_gradient(dz, w_in, weight_layout, "w_in");
    preactivation.reset();  // it may have been made here, and attention needs memory
  }
  // ---- the norm before it, the sum with the residual, and attention's projection, of whose result d is the gradient ----
  const bool need_projected = attends || needs[of_w_context];
  OptionalTensor d;
  if (need_input) {
    const NormBackwardNeeds asked{needs[of_x], need_projected, needs[pre ? of_norm_weight : of_attention_norm_weight],
                                  needs[pre ? of_norm_bias : of_attention_norm_bias], needs[of_b_context]};
    const NormGradient found =
        pre ? norm_gradient({*dnormalised, {}, {}, by_residual, sum, norm_weight, context_seed, context_p, true, "layer_norm", norm_eps, 0}, asked)
            : norm_gradient({*by_residual, dnormalised, {}, {}, sum, attention_norm_weight, context_seed, context_p, true, "layer_norm", attention_norm_eps, 0}, asked);
    if (needs[of_x]) results[of_x] = found.total;
    d = found.x;
    add(pre ? of_norm_weight : of_attention_norm_weight, found.weight);
    add(pre ? of_norm_bias : of_attention_norm_bias, found.bias);
    add(of_b_context, found.sums);
  }
  if (needs[of_w_context]) results[of_w_context] = weight_gradient(context, *d, weight_layout, "context");
  // ---- attention ----
  if (attends) {
    const bool side_by_side = query.size(0) == key.size(0) && (query.dim() == 3 || query.size(2) == key.size(2));
    auto [dq, dk, dv, dbias, delta] = attention_backward(
        heads_of(input_gradient(*d, w_context, weight_layout, "w_context"), query, "w_context"), {}, query, key, value, heads_of(context, query, "context"), logsumexp, {}, {}, lengths, lengths,
        attention_seed, {}, {}, longest, longest, softmax_scale, is_causal, window_left, window_right, 0, attention_p, false, false, side_by_side);
    if (needs[of_query]) results[of_query] = dq;
    if (needs[of_key]) results[of_key] = dk;
    if (needs[of_value]) results[of_value] = dv;
  }
  sums.run();
  return filled(results, grad);
}

}  // namespace bigmodel::cuda

BM_CUDA_OPS(m) {
  m.def("cuda_layer_begin(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor[] weights, Tensor[] biases, str weight_layout) "
        "-> Tensor");
  m.def("cuda_layer_begin_backward(Tensor grad, Tensor? x, Tensor? states, Tensor? norm_weight, float norm_eps, Tensor[] weights, str weight_layout, "
        "bool[] needs) -> Tensor[]");
  m.def("cuda_layer_end(Tensor x, Tensor query, Tensor key, Tensor value, Tensor? lengths, int longest, Tensor? sinks, float softmax_scale, "
        "bool is_causal, int window_left, int window_right, Tensor w_context, Tensor? b_context, Tensor? attention_norm_weight, "
        "Tensor? attention_norm_bias, float attention_norm_eps, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, str weight_layout, "
        "str activation, str norm_position, Tensor norm_weight, Tensor? norm_bias, float norm_eps, bool[] by_torch) -> Tensor");
  m.def("cuda_layer_end_training(Tensor x, Tensor query, Tensor key, Tensor value, Tensor? lengths, int longest, float softmax_scale, "
        "bool is_causal, int window_left, int window_right, Tensor? attention_seed, float attention_p, Tensor? context_seed, float context_p, "
        "Tensor? ffn_seed, float ffn_p, Tensor w_context, Tensor? b_context, Tensor? attention_norm_weight, Tensor? attention_norm_bias, "
        "float attention_norm_eps, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, str weight_layout, str activation, str norm_position, "
        "Tensor norm_weight, Tensor? norm_bias, float norm_eps, bool[] by_torch, bool recompute) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cuda_layer_end_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? lengths, int longest, float softmax_scale, "
        "bool is_causal, int window_left, int window_right, Tensor? attention_seed, float attention_p, Tensor? context_seed, float context_p, "
        "Tensor? ffn_seed, float ffn_p, Tensor context, Tensor logsumexp, Tensor sum, Tensor normalised, Tensor? preactivation, Tensor? ffn_sum, "
        "Tensor w_context, Tensor? attention_norm_weight, float attention_norm_eps, Tensor w_in, Tensor? b_in, Tensor w_out, str weight_layout, "
        "str activation, str norm_position, Tensor norm_weight, float norm_eps, bool[] needs) -> Tensor[]");
}

BM_CUDA_OPS_IMPL(m) {
  m.impl("cuda_layer_begin", TORCH_BOX(&bigmodel::cuda::layer_begin));
  m.impl("cuda_layer_begin_backward", TORCH_BOX(&bigmodel::cuda::layer_begin_backward));
  m.impl("cuda_layer_end", TORCH_BOX(&bigmodel::cuda::layer_end));
  m.impl("cuda_layer_end_training", TORCH_BOX(&bigmodel::cuda::layer_end_training));
  m.impl("cuda_layer_end_backward", TORCH_BOX(&bigmodel::cuda::layer_end_backward));
}
