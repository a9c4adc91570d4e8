// The training ops and gradients of all operators but attention, and linear_cross_entropy, as torch sees them. Their arguments are those of the public operators' schemas
// (bigmodel::linear_training and so on), with these differences:
//
//   weights      in a *_training op each may be the layer's own weight or, where it does not change between calls, what cpu_pack_weight
//                made of it (for linear: of all of them, as the only element). A weight as it lies is packed anew for each
//                call: one that an optimizer changes with every step gains nothing from a kept copy. Backward ops take weights as they lie.
//   results      a result that is not there or not wanted is an empty tensor
//   saved        preactivation, gate_preactivation and prenorm may be None or empty: the forward pass is then run again for them.
//                feed_forward_training with recompute keeps prenorm alone
//   residual     in a backward op needed only where prenorm is to be computed again; its gradient is made whenever it is asked for
//
// Shapes are checked against each other before any pointer is followed.
#include <algorithm>
#include <cstring>

#include "registration.h"

namespace bigmodel {

namespace {

struct LayerShape { int64_t k, n; };

LayerShape weight_shape(const Tensor& weight, WeightLayout layout, ScalarType dtype, const char* name) {
  check_cpu(weight, name);
  STD_TORCH_CHECK(weight.dim() == 2, name, ": shape ", shape_of(weight), " must have two dimensions");
  STD_TORCH_CHECK(scalar_type_of(weight, name) == dtype, name, ": dtype differs from the input's");
  STD_TORCH_CHECK(weight.is_contiguous(), name, ": must be contiguous");
  STD_TORCH_CHECK(weight.numel() > 0, name, ": shape ", shape_of(weight), " has no elements");
  check_aligned(weight, name);
  const int out = layout == WeightLayout::linear ? 0 : 1;
  return {weight.size(1 - out), weight.size(out)};
}

// How many rows of features x has.
int64_t rows_along(const Tensor& x) {
  const int64_t features = x.dim() > 0 ? x.size(x.dim() - 1) : 0;
  return features > 0 ? x.numel() / features : 0;
}

// A weight as the products take it: packed as it came, or in parts as they lie. Parts that the CPU multiplies as pairs are packed into this
// thread's scratch memory for so many rows that each thread can have its own (see csrc/gemm/cut.h): with fewer, each packs the columns that it
// multiplies, which stay in its cache. Holds what `args` points at.
struct GivenWeight {
  static constexpr int64_t rows_packed_first = 768, rows_of_a_thread = 192;
  std::vector<const void*> parts;
  std::vector<int64_t> part_n;
  WeightArgs args = {};
  GivenWeight(const std::vector<Tensor>& weights, int64_t rows, WeightLayout layout, Dtype dtype, ScalarType scalar, int slot, const char* name) {
    STD_TORCH_CHECK(!weights.empty(), name, ": is empty");
    if (weights.size() == 1 && scalar_type_of(weights[0], name) == ScalarType::Byte) {
      const PackedHeader& header = check_packed(weights[0], name);
      STD_TORCH_CHECK(header.dtype == dtype, name, ": dtype differs from the input's");
      args = packed_weight(header);
      return;
    }
    int64_t k = 0, n = 0;
    for (const Tensor& weight : weights) {
      const LayerShape shape = weight_shape(weight, layout, scalar, name);
      STD_TORCH_CHECK(n == 0 || shape.k == k, name, ": shape ", shape_of(weight), " must have in_features ", k);
      k = shape.k;
      n += shape.n;
      parts.push_back(weight.const_data_ptr());
      part_n.push_back(shape.n);
    }
    args = {k, n, nullptr, layout, int64_t(parts.size()), parts.data(), part_n.data()};
    const KernelTable& table = kernels();
    const Runtime lent = runtime();
    if (dtype != Dtype::bfloat16 || !table.bf16_pairs || rows < std::max<int64_t>(rows_packed_first, rows_of_a_thread * lent.threads)) return;
    auto& header = *static_cast<PackedHeader*>(lent.scratch(slot, packed_size(k, n, dtype, table)));
    header = {packed_magic, k, n, dtype, table.panel, true, {}};
    int64_t column = 0;
    for (size_t i = 0; i < parts.size(); column += part_n[i++]) table.pack(lent, {parts[i], layout, dtype, k, part_n[i], column, &header});
    args.packed = &header;
  }
  GivenWeight(const GivenWeight&) = delete;
};

// Several biases as one row; null when there are none.
const void* joined(const std::vector<Tensor>& biases, ScalarType dtype, int64_t n, const char* name) {
  if (biases.empty()) return nullptr;
  if (biases.size() == 1) return data_of(biases[0], name, dtype, n);
  int64_t total = 0;
  for (const Tensor& bias : biases) total += bias.numel();
  STD_TORCH_CHECK(total == n, name, ": ", total, " elements in all, must be ", n);
  const size_t size = dtype == ScalarType::Float ? 4 : 2;
  char* memory = static_cast<char*>(runtime().scratch(scratch_bias, size_t(n) * size));
  size_t at = 0;
  for (const Tensor& bias : biases) {
    if (bias.numel() == 0) continue;  // has no address that memcpy may be given
    std::memcpy(memory + at, data_of(bias, name, dtype, bias.numel()), size_t(bias.numel()) * size);
    at += size_t(bias.numel()) * size;
  }
  return memory;
}

Tensor nothing(ScalarType dtype) { return torch::stable::empty({0}, dtype); }

// A saved tensor, or null where it was not kept.
const void* saved(const OptionalTensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
  if (!tensor || tensor->numel() == 0) return nullptr;
  return data_of(*tensor, name, dtype, numel);
}

// Gradients in the order of `needs`: made where wanted, empty elsewhere.
struct Gradients {
  const std::vector<bool>& needs;
  ScalarType dtype;
  std::vector<Tensor> tensors;
  Gradients(const std::vector<bool>& needs, size_t count, ScalarType dtype) : needs(needs), dtype(dtype) {
    STD_TORCH_CHECK(needs.size() == count, "needs: has ", needs.size(), " elements, must have ", count);
  }
  // The next one; `exists`: the tensor that it belongs to was given.
  void* next(const std::vector<int64_t>& shape, bool exists = true) {
    const bool wanted = needs[tensors.size()] && exists;
    tensors.push_back(wanted ? empty_result(shape, dtype) : nothing(dtype));
    return wanted ? tensors.back().mutable_data_ptr() : nullptr;
  }
  std::vector<Tensor> zeros() {
    for (Tensor& tensor : tensors)
      if (tensor.numel() > 0) std::memset(tensor.mutable_data_ptr(), 0, size_t(tensor.numel()) * (dtype == ScalarType::Float ? 4 : 2));
    return tensors;
  }
};

std::vector<int64_t> shape_vector(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

}  // namespace

// ---- linear ----

std::tuple<Tensor, Tensor, Tensor> cpu_linear_training(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, OptionalTensor residual,
                                                       OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor dropout_seed,
                                                       Text weight_layout, Text activation, double norm_eps, Text norm_kind,
                                                       double dropout_p) {
  const ScalarType dtype = scalar_type_of(x, "x");
  const Dtype type = dtype_of(x, "x");
  const Activation act = activation_of(activation);
  const GivenWeight weight(weights, rows_along(x), layout_of(weight_layout), type, dtype, scratch_packed, "weights");
  const int64_t rows = rows_of(x, weight.args.k), n = weight.args.n;
  const bool normed = has_norm(norm_weight, norm_bias);
  Tensor out = empty_rows_like(x, n);
  Tensor preactivation = act == Activation::none ? nothing(dtype) : empty_rows_like(x, n);
  Tensor prenorm = normed ? empty_rows_like(x, n) : nothing(dtype);
  const LinearArgs args = {type, rows, x.const_data_ptr(), weight.args, joined(biases, dtype, n, "biases"), act,
                           data_of(residual, "residual", dtype, rows * n), normed,
                           norm_args(norm_weight, norm_bias, norm_eps, dtype, n, norm_kind_of(norm_kind)), out.mutable_data_ptr(),
                           dropout_of(dropout_seed, dropout_p), act == Activation::none ? nullptr : preactivation.mutable_data_ptr(),
                           normed ? prenorm.mutable_data_ptr() : nullptr};
  if (rows > 0 && n > 0) kernels().linear(runtime(), args);
  return {out, preactivation, prenorm};
}

std::vector<Tensor> cpu_linear_backward(Tensor grad, Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, OptionalTensor residual,
                                        OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor dropout_seed,
                                        OptionalTensor preactivation, OptionalTensor prenorm, Text weight_layout, Text activation,
                                        double norm_eps, Text norm_kind, double dropout_p, std::vector<bool> needs) {
  const ScalarType dtype = scalar_type_of(x, "x");
  LinearBackwardArgs args = {};
  args.dtype = dtype_of(x, "x");
  args.layout = layout_of(weight_layout);
  args.activation = activation_of(activation);
  STD_TORCH_CHECK(!weights.empty(), "weights: is empty");
  STD_TORCH_CHECK(biases.empty() || biases.size() == weights.size(), "biases: ", biases.size(), " of them, must be none or one for each weight");
  std::vector<int64_t> weight_n;
  std::vector<const void*> weight;
  for (const Tensor& w : weights) {
    const LayerShape shape = weight_shape(w, args.layout, dtype, "weights");
    STD_TORCH_CHECK(args.k == 0 || shape.k == args.k, "weights: shape ", shape_of(w), " must have in_features ", args.k);
    args.k = shape.k;
    args.n += shape.n;
    weight_n.push_back(shape.n);
    weight.push_back(w.const_data_ptr());
  }
  for (size_t i = 0; i < biases.size(); i++) data_of(biases[i], "biases", dtype, weight_n[i]);
  const int64_t rows = args.rows = rows_of(x, args.k), n = args.n;
  args.x = x.const_data_ptr();
  args.grad = data_of(grad, "grad", dtype, rows * n);
  args.has_norm = has_norm(norm_weight, norm_bias);
  args.norm = norm_args(norm_weight, norm_bias, norm_eps, dtype, n, norm_kind_of(norm_kind));
  args.dropout = dropout_of(dropout_seed, dropout_p);
  const void* addend = data_of(residual, "residual", dtype, rows * n);

  Gradients result(needs, 4 + weights.size() + biases.size(), dtype);
  std::vector<void*> weight_grad, bias_grad;
  args.x_grad = result.next(shape_vector(x));
  args.residual_grad = result.next(shape_vector(grad));  // residual itself may be left out: what it would be read for was saved
  args.norm_weight_grad = result.next({n}, norm_weight.has_value());
  args.norm_bias_grad = result.next({n}, norm_bias.has_value());
  for (const Tensor& w : weights) weight_grad.push_back(result.next(shape_vector(w)));
  for (size_t i = 0; i < weights.size(); i++) bias_grad.push_back(biases.empty() ? nullptr : result.next({weight_n[i]}));
  if (rows == 0) return result.zeros();

  args.preactivation = saved(preactivation, "preactivation", dtype, rows * n);
  args.prenorm = saved(prenorm, "prenorm", dtype, rows * n);
  const bool wants_preactivation = args.activation != Activation::none && !args.preactivation, wants_prenorm = args.has_norm && !args.prenorm;
  Tensor made[2] = {nothing(dtype), nothing(dtype)};
  if (wants_preactivation || wants_prenorm) {
    for (Tensor& t : made) t = empty_result({rows, n}, dtype);
    const GivenWeight given(weights, rows, args.layout, args.dtype, dtype, scratch_packed, "weights");
    const LinearArgs again = {args.dtype, rows, args.x, given.args, joined(biases, dtype, n, "biases"), args.activation, addend, false, {},
                              made[1].mutable_data_ptr(), args.dropout, args.activation == Activation::none ? nullptr : made[0].mutable_data_ptr(), nullptr};
    kernels().linear(runtime(), again);
    if (wants_preactivation) args.preactivation = made[0].const_data_ptr();
    if (wants_prenorm) args.prenorm = made[1].const_data_ptr();
  }
  args.weights = int64_t(weights.size());
  args.weight = weight.data();
  args.weight_n = weight_n.data();
  args.weight_grad = weight_grad.data();
  args.bias_grad = bias_grad.data();
  together([&] { kernels().linear_backward(runtime(), args); });
  return result.tensors;
}

// ---- feed_forward ----

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_feed_forward_training(
    Tensor x, Tensor w_in, OptionalTensor b_in, Tensor w_out, OptionalTensor b_out, OptionalTensor residual, OptionalTensor norm_weight,
    OptionalTensor norm_bias, OptionalTensor w_gate, OptionalTensor b_gate, OptionalTensor dropout_seed, Text activation,
    Text weight_layout, Text norm_position, double norm_eps, Text norm_kind, double dropout_p, bool recompute) {
  const ScalarType dtype = scalar_type_of(x, "x");
  const Dtype type = dtype_of(x, "x");
  const WeightLayout layout = layout_of(weight_layout);
  const NormPosition position = position_of(norm_position);
  const int64_t along = rows_along(x);
  const GivenWeight given_in({w_in}, along, layout, type, dtype, scratch_packed, "w_in");
  const GivenWeight given_out({w_out}, along, layout, type, dtype, scratch_packed_out, "w_out");
  std::optional<GivenWeight> given_gate;
  if (w_gate) given_gate.emplace(std::vector<Tensor>{*w_gate}, along, layout, type, dtype, scratch_packed_gate, "w_gate");
  const WeightArgs &in = given_in.args, &second = given_out.args, *gate = given_gate ? &given_gate->args : nullptr;
  STD_TORCH_CHECK(in.n == second.k, "w_out: in_features ", second.k, " must be w_in's out_features ", in.n);
  STD_TORCH_CHECK(!gate || (gate->k == in.k && gate->n == in.n), "w_gate: shape must be w_in's");
  const int64_t rows = rows_of(x, in.k), n = second.n, inner = in.n;
  Tensor out = empty_rows_like(x, n);
  Tensor preactivation = recompute ? nothing(dtype) : empty_rows_like(x, inner);
  Tensor gate_preactivation = recompute || !gate ? nothing(dtype) : empty_rows_like(x, inner);
  Tensor prenorm = position == NormPosition::post ? empty_rows_like(x, n) : nothing(dtype);  // costs no more than residual, which it stands for
  auto data = [](Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; };
  const FeedForwardArgs args = {type, rows, x.const_data_ptr(), in, data_of(b_in, "b_in", dtype, inner), second,
                                data_of(b_out, "b_out", dtype, n), activation_of(activation), data_of(residual, "residual", dtype, rows * n),
                                position, norm_args(norm_weight, norm_bias, norm_eps, dtype, position == NormPosition::pre ? in.k : n, norm_kind_of(norm_kind)),
                                out.mutable_data_ptr(), gate, data_of(b_gate, "b_gate", dtype, inner), dropout_of(dropout_seed, dropout_p),
                                data(preactivation), data(gate_preactivation), data(prenorm)};
  if (rows > 0 && n > 0) together([&] { kernels().feed_forward(runtime(), args); });
  return {out, preactivation, gate_preactivation, prenorm};
}

std::vector<Tensor> cpu_feed_forward_backward(
    Tensor grad, Tensor x, Tensor w_in, OptionalTensor b_in, Tensor w_out, OptionalTensor b_out, OptionalTensor residual, OptionalTensor norm_weight,
    OptionalTensor norm_bias, OptionalTensor w_gate, OptionalTensor b_gate, OptionalTensor dropout_seed, OptionalTensor preactivation,
    OptionalTensor gate_preactivation, OptionalTensor prenorm, Text activation, Text weight_layout, Text norm_position,
    double norm_eps, Text norm_kind, double dropout_p, std::vector<bool> needs) {
  const ScalarType dtype = scalar_type_of(x, "x");
  FeedForwardBackwardArgs args = {};
  args.dtype = dtype_of(x, "x");
  args.layout = layout_of(weight_layout);
  args.activation = activation_of(activation);
  args.norm_position = position_of(norm_position);
  const LayerShape in = weight_shape(w_in, args.layout, dtype, "w_in"), second = weight_shape(w_out, args.layout, dtype, "w_out");
  STD_TORCH_CHECK(in.n == second.k, "w_out: in_features ", second.k, " must be w_in's out_features ", in.n);
  if (w_gate) {
    const LayerShape gate = weight_shape(*w_gate, args.layout, dtype, "w_gate");
    STD_TORCH_CHECK(gate.k == in.k && gate.n == in.n, "w_gate: shape ", shape_of(*w_gate), " must be w_in's ", shape_of(w_in));
  }
  const int64_t rows = args.rows = rows_of(x, in.k), inner = args.inner = in.n, n = args.columns = second.n;
  args.hidden = in.k;
  const bool pre = args.norm_position == NormPosition::pre;
  args.grad = data_of(grad, "grad", dtype, rows * n);
  args.x = x.const_data_ptr();
  args.w_in = w_in.const_data_ptr();
  args.w_out = w_out.const_data_ptr();
  args.w_gate = w_gate ? w_gate->const_data_ptr() : nullptr;
  args.norm = norm_args(norm_weight, norm_bias, norm_eps, dtype, pre ? in.k : n, norm_kind_of(norm_kind));
  args.dropout = dropout_of(dropout_seed, dropout_p);
  const void* addend = data_of(residual, "residual", dtype, rows * n);
  const void *bias_in = data_of(b_in, "b_in", dtype, inner), *bias_out = data_of(b_out, "b_out", dtype, n), *bias_gate = data_of(b_gate, "b_gate", dtype, inner);
  STD_TORCH_CHECK(w_gate.has_value() || !b_gate.has_value(), "b_gate: must be None without w_gate");
  const bool normed = args.norm_position != NormPosition::none;

  Gradients result(needs, 10, dtype);
  args.x_grad = result.next(shape_vector(x));
  args.w_in_grad = result.next(shape_vector(w_in));
  args.b_in_grad = result.next({inner}, b_in.has_value());
  args.w_out_grad = result.next(shape_vector(w_out));
  args.b_out_grad = result.next({n}, b_out.has_value());
  args.residual_grad = result.next(shape_vector(grad));  // residual itself may be left out: what it would be read for was saved
  args.norm_weight_grad = result.next({pre ? in.k : n}, normed && norm_weight.has_value());
  args.norm_bias_grad = result.next({pre ? in.k : n}, normed && norm_bias.has_value());
  args.w_gate_grad = result.next(w_gate ? shape_vector(*w_gate) : std::vector<int64_t>{0}, w_gate.has_value());
  args.b_gate_grad = result.next({inner}, b_gate.has_value());
  if (rows == 0) return result.zeros();

  const bool post = args.norm_position == NormPosition::post;
  args.preactivation = saved(preactivation, "preactivation", dtype, rows * inner);
  args.gate_preactivation = saved(gate_preactivation, "gate_preactivation", dtype, rows * inner);
  args.prenorm = saved(prenorm, "prenorm", dtype, rows * n);
  Tensor made[3] = {nothing(dtype), nothing(dtype), nothing(dtype)};
  if (!args.preactivation || (w_gate && !args.gate_preactivation) || (post && !args.prenorm)) {
    made[0] = empty_result({rows, inner}, dtype);
    if (w_gate) made[1] = empty_result({rows, inner}, dtype);
    made[2] = empty_result({rows, n}, dtype);
    const GivenWeight in({w_in}, rows, args.layout, args.dtype, dtype, scratch_packed, "w_in"), out({w_out}, rows, args.layout, args.dtype, dtype, scratch_packed_out, "w_out");
    std::optional<GivenWeight> gate;
    if (w_gate) gate.emplace(std::vector<Tensor>{*w_gate}, rows, args.layout, args.dtype, dtype, scratch_packed_gate, "w_gate");
    // Without the norm after: what is asked for is its input.
    const FeedForwardArgs again = {args.dtype, rows, args.x, in.args, bias_in, out.args, bias_out, args.activation, addend,
                                   pre ? NormPosition::pre : NormPosition::none, pre ? args.norm : NormArgs{}, made[2].mutable_data_ptr(),
                                   gate ? &gate->args : nullptr, bias_gate, args.dropout, made[0].mutable_data_ptr(),
                                   w_gate ? made[1].mutable_data_ptr() : nullptr, nullptr};
    together([&] { kernels().feed_forward(runtime(), again); });
    if (!args.preactivation) args.preactivation = made[0].const_data_ptr();
    if (w_gate && !args.gate_preactivation) args.gate_preactivation = made[1].const_data_ptr();
    if (!args.prenorm) args.prenorm = made[2].const_data_ptr();
  }
  together([&] { kernels().feed_forward_backward(runtime(), args); });
  return result.tensors;
}

// ---- norms ----

std::vector<Tensor> cpu_norm_backward(Tensor grad, Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                                      OptionalTensor dropout_seed, Text kind, double eps, double dropout_p, double weight_offset,
                                      std::vector<bool> needs) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: must have at least one dimension");
  const int64_t n = x.size(x.dim() - 1), rows = rows_of(x, n);
  const ScalarType dtype = scalar_type_of(x, "x");
  NormBackwardArgs args = {dtype_of(x, "x"), rows, n, data_of(grad, "grad", dtype, rows * n), x.const_data_ptr(),
                           data_of(residual, "residual", dtype, rows * n), norm_args(weight, bias, eps, dtype, n, norm_kind_of(kind, "kind"), weight_offset, ""),
                           dropout_of(dropout_seed, dropout_p), nullptr, nullptr, nullptr, nullptr};
  Gradients result(needs, 4, dtype);
  args.x_grad = result.next(shape_vector(x));
  args.residual_grad = result.next(shape_vector(x), residual.has_value());
  args.weight_grad = result.next({n}, weight.has_value());
  args.bias_grad = result.next({n}, bias.has_value());
  if (rows == 0) return result.zeros();
  kernels().norm_backward(runtime(), args);
  return result.tensors;
}

// ---- embedding ----

namespace {

void fill_zero(Tensor& tensor) {
  const int64_t bytes = tensor.numel() * (tensor.scalar_type() == ScalarType::Float ? 4 : 2), part = int64_t(1) << 20;
  struct Memory { char* data; int64_t bytes, part; } memory = {static_cast<char*>(tensor.mutable_data_ptr()), bytes, part};
  const Runtime lent = runtime();
  lent.run(lent, (bytes + part - 1) / part, [](void* context, int64_t task) {
    const auto& m = *static_cast<Memory*>(context);
    std::memset(m.data + task * m.part, 0, size_t(std::min(m.part, m.bytes - task * m.part)));
  }, &memory);
}

// The tokens by their id: a counting sort, stable, without the id `skip`.
struct Groups {
  std::vector<int64_t> id, start, order;
  Groups(const int64_t* ids, int64_t tokens, int64_t table_rows, int64_t skip) {
    std::vector<int64_t> next(size_t(table_rows) + 1, 0);
    for (int64_t t = 0; t < tokens; t++)
      if (ids[t] != skip) next[size_t(ids[t]) + 1]++;
    for (int64_t row = 0; row < table_rows; row++) {
      if (next[size_t(row) + 1] > 0) {
        id.push_back(row);
        start.push_back(next[size_t(row)]);
      }
      next[size_t(row) + 1] += next[size_t(row)];
    }
    start.push_back(next.back());
    order.resize(size_t(next.back()));
    for (int64_t t = 0; t < tokens; t++)
      if (ids[t] != skip) order[size_t(next[size_t(ids[t])]++)] = t;
  }
  EmbeddingGroups view() const { return {int64_t(id.size()), id.data(), start.data(), order.data()}; }
};

}  // namespace

std::vector<Tensor> cpu_embedding_backward(Tensor grad, Tensor input_ids, Tensor word_weight, OptionalTensor position_ids,
                                           OptionalTensor position_weight, OptionalTensor token_type_ids, OptionalTensor token_type_weight,
                                           OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor dropout_seed, double norm_eps,
                                           double dropout_p, int64_t padding_idx, std::vector<bool> needs) {
  EmbeddingBackwardArgs args = {};
  const OptionalTensor tables[3] = {word_weight, position_weight, token_type_weight};
  embedding_tables({input_ids, position_ids, token_type_ids}, tables, args.ids, args.tables);
  const ScalarType dtype = scalar_type_of(word_weight, "word_weight");
  args.dtype = dtype_of(word_weight, "word_weight");
  args.tokens = input_ids.numel();
  args.hidden = word_weight.size(1);
  args.grad = data_of(grad, "grad", dtype, args.tokens * args.hidden);
  args.has_norm = has_norm(norm_weight, norm_bias);
  args.norm = norm_args(norm_weight, norm_bias, norm_eps, dtype, args.hidden);
  args.dropout = dropout_of(dropout_seed, dropout_p);
  Gradients result(needs, 5, dtype);
  std::optional<Groups> groups[3];
  for (int t = 0; t < 3; t++) {
    args.table_grad[t] = result.next(tables[t] ? shape_vector(*tables[t]) : std::vector<int64_t>{0}, tables[t].has_value());
    if (!args.table_grad[t]) continue;
    fill_zero(result.tensors.back());
    groups[t].emplace(args.ids[t], args.tokens, tables[t]->size(0), t == 0 ? padding_idx : -1);
    args.groups[t] = groups[t]->view();
  }
  args.norm_weight_grad = result.next({args.hidden}, norm_weight.has_value());
  args.norm_bias_grad = result.next({args.hidden}, norm_bias.has_value());
  if (args.tokens == 0 || args.hidden == 0) return result.zeros();
  kernels().embedding_backward(runtime(), args);
  return result.tensors;
}

// ---- cross-entropy ----

namespace {

// What the three forms share; keeps what args points to.
struct CrossEntropyCall {
  CrossEntropyArgs args = {};
  std::vector<int64_t> rows;
  int64_t all = 0;
  ScalarType dtype;

  CrossEntropyCall(const Tensor& x, const Tensor& weight, const Tensor& target, const OptionalTensor& bias, int64_t ignore_index, double label_smoothing)
      : dtype(scalar_type_of(x, "x")) {
    args.dtype = dtype_of(x, "x");
    const LayerShape shape = weight_shape(weight, WeightLayout::linear, dtype, "weight");
    STD_TORCH_CHECK(x.dim() == 2, "x: shape ", shape_of(x), " must have two dimensions");
    rows_of(x, shape.k);
    STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing: ", label_smoothing, " must be 0 to 1");
    all = x.size(0);
    args.k = shape.k;
    args.classes = shape.n;
    args.x = x.const_data_ptr();
    args.weight = weight.const_data_ptr();
    args.bias = data_of(bias, "bias", dtype, shape.n);
    args.target = static_cast<const int64_t*>(data_of(target, "target", ScalarType::Long, all));
    args.smoothing = float(label_smoothing);
    args.scale = 1.0f;
    for (int64_t i = 0; i < all; i++) {
      if (args.target[i] == ignore_index) continue;
      STD_TORCH_CHECK(args.target[i] >= 0 && args.target[i] < shape.n, "target: index out of range: value ", args.target[i], " at position ", i,
                      ", allowed is 0 to ", shape.n - 1);
      rows.push_back(i);
    }
    args.rows = int64_t(rows.size());
    args.row = rows.data();
  }

  Tensor per_row() const {
    Tensor made = torch::stable::empty({all}, ScalarType::Float);
    if (all > 0) std::memset(made.mutable_data_ptr(), 0, size_t(all) * sizeof(float));
    return made;
  }

  void gradients(Gradients& result, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    args.x_grad = result.next(shape_vector(x));
    if (args.x_grad) fill_zero(result.tensors.back());
    args.weight_grad = result.next(shape_vector(weight));
    args.bias_grad = result.next({args.classes}, bias.has_value());
    if (args.rows == 0) result.zeros();
  }

  void run() const {
    if (args.rows > 0) together([&] { kernels().cross_entropy(runtime(), args); });
  }

  Tensor reduced(const Tensor& losses, const std::string& reduction) const {
    if (reduction == "none") return losses;
    double total = 0;
    const auto* data = static_cast<const float*>(losses.const_data_ptr());
    for (const int64_t row : rows) total += data[row];
    Tensor loss = torch::stable::empty({}, ScalarType::Float);
    *static_cast<float*>(loss.mutable_data_ptr()) = float(reduction == "mean" ? total / double(args.rows) : total);
    return loss;
  }
};

void check_reduction(const std::string& reduction) {
  STD_TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none", "reduction: '", reduction, "' is not one of mean, sum, none");
}

}  // namespace

std::tuple<Tensor, Tensor> cpu_linear_cross_entropy(Tensor x, Tensor weight, Tensor target, OptionalTensor bias, int64_t ignore_index,
                                                    double label_smoothing, Text reduction) {
  check_reduction(reduction);
  CrossEntropyCall call(x, weight, target, bias, ignore_index, label_smoothing);
  Tensor losses = call.per_row(), logsumexp = call.per_row();
  call.args.loss = static_cast<float*>(losses.mutable_data_ptr());
  call.args.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
  call.run();
  return {call.reduced(losses, reduction), logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_linear_cross_entropy_training(Tensor x, Tensor weight, Tensor target, OptionalTensor bias,
                                                                                     int64_t ignore_index, double label_smoothing,
                                                                                     Text reduction, std::vector<bool> needs) {
  check_reduction(reduction);
  CrossEntropyCall call(x, weight, target, bias, ignore_index, label_smoothing);
  Tensor losses = call.per_row(), logsumexp = call.per_row();
  call.args.loss = static_cast<float*>(losses.mutable_data_ptr());
  call.args.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
  if (reduction == "mean") call.args.scale = float(1.0 / double(std::max<int64_t>(1, call.args.rows)));
  Gradients result(needs, 3, call.dtype);
  call.gradients(result, x, weight, bias);
  call.run();
  return {call.reduced(losses, reduction), logsumexp, result.tensors[0], result.tensors[1], result.tensors[2]};
}

std::vector<Tensor> cpu_linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor weight, Tensor target, OptionalTensor bias,
                                                      int64_t ignore_index, double label_smoothing, std::vector<bool> needs) {
  CrossEntropyCall call(x, weight, target, bias, ignore_index, label_smoothing);
  call.args.row_scale = static_cast<const float*>(data_of(grad, "grad", ScalarType::Float, call.all));
  Gradients result(needs, 3, call.dtype);
  call.gradients(result, x, weight, bias);
  call.run();
  return result.tensors;
}

}  // namespace bigmodel

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel, m) {
  m.def("cpu_linear_training(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, "
        "Tensor? dropout_seed, *, str weight_layout='linear', str activation='none', float norm_eps=1e-5, str norm_kind='layer_norm', "
        "float dropout_p=0.0) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_linear_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] biases, Tensor? residual, Tensor? norm_weight, "
        "Tensor? norm_bias, Tensor? dropout_seed, Tensor? preactivation, Tensor? prenorm, *, str weight_layout='linear', "
        "str activation='none', float norm_eps=1e-5, str norm_kind='layer_norm', float dropout_p=0.0, bool[] needs) -> Tensor[]");
  m.def("cpu_feed_forward_training(Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, Tensor? residual, Tensor? norm_weight, "
        "Tensor? norm_bias, Tensor? w_gate, Tensor? b_gate, Tensor? dropout_seed, *, str activation, str weight_layout='linear', "
        "str norm_position='none', float norm_eps=1e-5, str norm_kind='layer_norm', float dropout_p=0.0, bool recompute=False) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_feed_forward_backward(Tensor grad, Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, Tensor? residual, "
        "Tensor? norm_weight, Tensor? norm_bias, Tensor? w_gate, Tensor? b_gate, Tensor? dropout_seed, Tensor? preactivation, "
        "Tensor? gate_preactivation, Tensor? prenorm, *, str activation, str weight_layout='linear', str norm_position='none', "
        "float norm_eps=1e-5, str norm_kind='layer_norm', float dropout_p=0.0, bool[] needs) -> Tensor[]");
  m.def("cpu_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual=None, Tensor? dropout_seed=None, *, "
        "str kind, float eps, float dropout_p=0.0, float weight_offset=0.0, bool[] needs) -> Tensor[]");
  m.def("cpu_embedding_backward(Tensor grad, Tensor input_ids, Tensor word_weight, Tensor? position_ids, Tensor? position_weight, "
        "Tensor? token_type_ids, Tensor? token_type_weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? dropout_seed=None, *, "
        "float norm_eps, float dropout_p=0.0, int padding_idx=-1, bool[] needs) -> Tensor[]");
  m.def("cpu_linear_cross_entropy(Tensor x, Tensor weight, Tensor target, Tensor? bias=None, *, int ignore_index=-100, "
        "float label_smoothing=0.0, str reduction='mean') -> (Tensor, Tensor)");
  m.def("cpu_linear_cross_entropy_training(Tensor x, Tensor weight, Tensor target, Tensor? bias=None, *, int ignore_index=-100, "
        "float label_smoothing=0.0, str reduction='mean', bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor weight, Tensor target, Tensor? bias, *, "
        "int ignore_index=-100, float label_smoothing=0.0, bool[] needs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel, CPU, m) {
  m.impl("cpu_linear_training", TORCH_BOX(&bigmodel::cpu_linear_training));
  m.impl("cpu_linear_backward", TORCH_BOX(&bigmodel::cpu_linear_backward));
  m.impl("cpu_feed_forward_training", TORCH_BOX(&bigmodel::cpu_feed_forward_training));
  m.impl("cpu_feed_forward_backward", TORCH_BOX(&bigmodel::cpu_feed_forward_backward));
  m.impl("cpu_norm_backward", TORCH_BOX(&bigmodel::cpu_norm_backward));
  m.impl("cpu_embedding_backward", TORCH_BOX(&bigmodel::cpu_embedding_backward));
  m.impl("cpu_linear_cross_entropy", TORCH_BOX(&bigmodel::cpu_linear_cross_entropy));
  m.impl("cpu_linear_cross_entropy_training", TORCH_BOX(&bigmodel::cpu_linear_cross_entropy_training));
  m.impl("cpu_linear_cross_entropy_backward", TORCH_BOX(&bigmodel::cpu_linear_cross_entropy_backward));
}
