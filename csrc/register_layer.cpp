// A transformer layer as torch sees it on the CPU, in two calls: to query, key and value, and from them to the layer's result.
// Between the two the caller turns heads, and keeps keys and values in its cache. Tokens of a generation, whose keys and values go behind
// those of a cache with room for them, need one call for all layers, those of a decoder that attends to an encoder too, and so do few rows
// in an encoder.
//
// They are the ops of register_cpu.cpp and the kernel of attention one after the other, to the same bits. What they save is the
// Python and the dispatching between these, which for a single token costs more than the arithmetic.
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "registration.h"

namespace bigmodel {
namespace {

// norm(x) W + b, without the norm where it has no weight.
Tensor cpu_layer_begin(Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, double norm_eps, Text norm_kind, Tensor packed,
                       OptionalTensor bias) {
  Tensor states = has_norm(norm_weight, norm_bias) ? norm_op(norm_kind_of(norm_kind), x, norm_weight, norm_bias, norm_eps, {}, {}, 0.0, 0.0, "norm_") : x;
  return cpu_linear(states, packed, bias, "none", {}, {}, {}, 1e-5, {}, "layer_norm", 0.0);
}

// `memory`, rows * heads floats, for a logsumexp that nobody asks for.
void set_logsumexp(AttentionArgs& args, int64_t rows, float* memory) {
  args.logsumexp_stride[0] = args.cu_seqlens_q ? 0 : args.heads * args.query_length;
  args.logsumexp_stride[1] = args.cu_seqlens_q ? rows : args.query_length;
  args.logsumexp = memory;
}
std::unique_ptr<float[]> logsumexp_memory(AttentionArgs& args, int64_t rows) {
  std::unique_ptr<float[]> memory(new float[size_t(rows * args.heads)]);
  set_logsumexp(args, rows, memory.get());
  return memory;
}

// The heads' results side by side, (..., heads * head_dim) with the leading dimensions of x.
Tensor context_of(const Tensor& x, const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options) {
  AttentionArgs args = attention_args(query, key, value, options);
  const int64_t rows = args.cu_seqlens_q ? query.size(0) : args.batch * args.query_length;
  STD_TORCH_CHECK(scalar_type_of(x, "x") == scalar_type_of(query, "query"), "query: dtype differs from x's");
  STD_TORCH_CHECK(x.size(x.dim() - 1) > 0, "x: shape ", shape_of(x), " has no features");  // or its elements could not tell its rows
  STD_TORCH_CHECK(x.numel() == rows * x.size(x.dim() - 1), "query: shape ", shape_of(query), " does not have the rows of x, ", shape_of(x));
  Tensor context = empty_rows_like(x, args.heads * args.head_dim);
  args.out = context.mutable_data_ptr();
  result_strides(args, args.out_stride);
  const auto logsumexp = logsumexp_memory(args, rows);
  if (context.numel() > 0) kernels().attention(runtime(), args);
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
  std::optional<Tensor> out;
  together([&] {
    Tensor context = context_of(x, query, key, value, {key_padding_mask, attention_bias, lengths, lengths, {}, {}, sinks, longest, longest,
                                                       softmax_scale, is_causal, window_left, window_right, softcap, 0.0});
    Tensor y = cpu_linear(context, packed_context, b_context, "none", x, attention_norm_weight, attention_norm_bias, attention_norm_eps, {},
                          norm_kind, 0.0);
    out = cpu_feed_forward(y, packed_in, b_in, packed_out, b_out, activation, y, norm_position, norm_weight, norm_bias, norm_eps, packed_gate,
                           b_gate, {}, norm_kind, 0.0);
  });
  return *out;
}

// What is one layer's, packed where it is a weight.
struct LayerParts {
  const OptionalTensor &attention_norm_weight, &attention_norm_bias;
  const Tensor& qkv;
  const OptionalTensor* b_qkv;                // of query, key and value, or one of all
  const Tensor& context;
  const OptionalTensor &b_context, &norm_weight, &norm_bias;
  const Tensor& in;
  const OptionalTensor& b_in;
  const Tensor& out;
  const OptionalTensor& b_out;
  const OptionalTensor &gate, &b_gate;        // of a gated feed-forward
  const OptionalTensor &query_norm, &key_norm;  // RMSNorms of heads
  static constexpr size_t count = 18;
  double attention_norm_eps, norm_eps, head_norm_eps;
  static constexpr size_t epsilons = 3;
};

// A weight whose rows are as long as what it is multiplied with.
WeightArgs weight_args(const Tensor& packed, const char* what, Dtype dtype, int64_t k) {
  const PackedHeader& header = check_packed(packed, "parts");
  STD_TORCH_CHECK(header.dtype == dtype, "parts: ", what, "'s dtype differs from x's");
  STD_TORCH_CHECK(header.k == k, "parts: ", what, "'s in_features ", header.k, " must be ", k);
  return packed_weight(header);
}

// What the kernels are told of a layer. All layers of a call are checked and written down before the first of them runs: of code and data that
// come between two layers' weights nothing is left in the caches.
struct LayerArgs {
  std::unique_ptr<char[]> b_qkv;  // where there is one of each
  NormArgs norm, ffn_norm;        // before the first projection, and one of its own before the feed-forward, where they have a weight
  LinearArgs qkv, context;
  NormArgs outer[2];              // of what attention and feed-forward add, where they have a weight
  WeightArgs gate;
  FeedForwardArgs ffn;
};

// The n elements of the first projection's bias, in `memory` if they are those of several. The key may have none.
const void* bias_of(const OptionalTensor* parts, ScalarType scalar_type, int64_t n, std::unique_ptr<char[]>& memory) {
  if (!parts[1] && !parts[2]) return data_of(parts[0], "bias", scalar_type, n);
  STD_TORCH_CHECK(parts[0] && parts[2], "parts: query and value must both have a bias, or one with the key");
  const int64_t others = parts[0]->numel() + parts[2]->numel(), key = parts[1] ? parts[1]->numel() : n - others;
  STD_TORCH_CHECK(key >= 0 && others + key == n, "parts: the ", others + (parts[1] ? key : 0),
                  " elements of query's, key's and value's bias must be the ", n, " out_features of the first projection");
  const int64_t element = dtype_size(dtype_of(*parts[0], "bias"));
  memory = std::make_unique<char[]>(size_t(n * element));
  char* next = memory.get();
  for (int i = 0; i < 3; i++) {
    const int64_t elements = parts[i] ? parts[i]->numel() : key;
    char* const here = std::exchange(next, next + elements * element);
    if (elements == 0) continue;
    if (parts[i]) memcpy(here, data_of(parts[i], "bias", scalar_type, elements), size_t(elements * element));
    else memset(here, 0, size_t(elements * element));
  }
  return memory.get();
}

// Norms are before ("pre") or behind ("post") the halves of a layer, or the halves stand side by side, with one norm before both or two.
enum class Order { pre, post, parallel };
Order order_of(const Text& name) {
  if (name == "pre") return Order::pre;
  if (name == "parallel") return Order::parallel;
  STD_TORCH_CHECK(name == "post", "order: '", name, "' is not one of pre, post, parallel");
  return Order::post;
}

// What is the same for all layers of a call.
struct Kind {
  Order order;
  NormKind norm;
  double norm_offset;           // added to the norms' weights
  Activation activation;
  double factor = 1.0;          // of what is added to the stream
};

// The products on `rows` rows of x, after qkv.weight is known; `queries` are the features of all heads.
void set_products(LayerArgs& layer, const LayerParts& w, const Tensor& x, int64_t rows, int64_t queries, const Kind& kind) {
  const Dtype dtype = dtype_of(x, "x");
  const ScalarType scalar_type = x.scalar_type();
  const int64_t hidden = x.size(x.dim() - 1);
  layer.qkv = {.dtype = dtype, .rows = rows, .weight = layer.qkv.weight, .bias = bias_of(w.b_qkv, scalar_type, layer.qkv.weight.n, layer.b_qkv),
               .activation = Activation::none};
  layer.context = {.dtype = dtype, .rows = rows, .weight = weight_args(w.context, "the attention's output", dtype, queries),
                   .bias = data_of(w.b_context, "bias", scalar_type, hidden), .activation = Activation::none};
  const bool normed = has_norm(w.attention_norm_weight, w.attention_norm_bias);
  const NormArgs norm = norm_args(w.attention_norm_weight, w.attention_norm_bias, w.attention_norm_eps, scalar_type, hidden, kind.norm,
                                  kind.norm_offset, "norm_");
  if (kind.order == Order::post) {
    layer.context.has_norm = normed;
    layer.context.norm = norm;
  } else {
    layer.norm = norm;
  }
  const WeightArgs in = weight_args(w.in, "the feed-forward's first weight", dtype, hidden);
  const WeightArgs out = weight_args(w.out, "the feed-forward's last weight", dtype, in.n);
  STD_TORCH_CHECK(layer.context.weight.n == hidden && out.n == hidden, "parts: out_features ", layer.context.weight.n, " and ", out.n, " must be x's ", hidden);
  const bool own = has_norm(w.norm_weight, w.norm_bias);
  const NormPosition position = kind.order == Order::post ? NormPosition::post : own ? NormPosition::pre : NormPosition::none;
  layer.ffn = {.dtype = dtype, .rows = rows, .w_in = in, .bias_in = data_of(w.b_in, "b_in", scalar_type, in.n), .w_out = out,
               .bias_out = data_of(w.b_out, "b_out", scalar_type, hidden), .activation = kind.activation, .norm_position = position,
               .norm = norm_args(w.norm_weight, w.norm_bias, w.norm_eps, scalar_type, hidden, kind.norm, kind.norm_offset, "norm_"),
               .bias_gate = data_of(w.b_gate, "b_gate", scalar_type, in.n)};
  if (kind.norm_offset != 0.0 && position == NormPosition::pre) {  // the feed-forward knows of none
    layer.ffn_norm = layer.ffn.norm;
    layer.ffn.norm_position = NormPosition::none;
  }
  if (w.gate) {
    layer.gate = weight_args(*w.gate, "the feed-forward's gate", dtype, hidden);
    STD_TORCH_CHECK(layer.gate.n == in.n, "parts: the gate's out_features ", layer.gate.n, " must be ", in.n);
  }
}

// y = x + context W + b
void run_context(LinearArgs& product, const void* x, const void* context, void* y) {
  product.x = context;
  product.residual = x;
  product.out = y;
  kernels().linear(runtime(), product);
}

// x + factor * norm(y), of rows.
void run_sum(const Kind& kind, Dtype dtype, int64_t rows, int64_t hidden, const NormArgs& norm, const void* x, const void* y, void* normed,
             void* out) {
  if (norm.weight) kernels().layer_norm(runtime(), {dtype, rows, hidden, y, nullptr, norm, normed, {}});
  kernels().add(runtime(), {dtype, rows * hidden, x, norm.weight ? normed : y, float(kind.factor), out});
}

// From x, or of halves side by side, to the sum with y.
void run_feed_forward(LayerArgs& layer, const void* x, const void* y, void* out) {
  layer.ffn.x = x;
  layer.ffn.residual = y;
  layer.ffn.w_gate = layer.gate.packed ? &layer.gate : nullptr;
  layer.ffn.out = out;
  kernels().feed_forward(runtime(), layer.ffn);
}

// The attention of a decoder's layer on what the encoder has made, whose keys and values are there: y = x + attention(x Wq + b) W + b, norm
// before or behind it. Its parts are in this order.
struct CrossedParts {
  const OptionalTensor &norm_weight, &norm_bias;
  const Tensor& query;
  const OptionalTensor& b_query;
  const Tensor& context;
  const OptionalTensor& b_context;
  static constexpr size_t count = 6;
  double norm_eps, softmax_scale;
  const Tensor &keys, &values;  // (batch, kv_heads, keys, head_dim)
  const OptionalTensor& key_padding_mask;
};
struct Crossed {
  NormArgs norm;                // where it has a weight, and is before it
  LinearArgs query, context;
  AttentionArgs attention;
};

// A layer of tokens: their keys and values become the ones behind the first `length` of the buffers (batch, kv_heads, room, head_dim), and
// what each attends to are all up to its own, or of these the last ones in a window, and then what an encoder has made if it is `crossed`.
struct TokenLayer : LayerArgs {
  AttentionArgs attention;
  NormArgs head_norms[2];        // where they have a weight, of so many features: a head's, or all of them
  int64_t normed[2];
  int64_t heads[3];              // of query, key and value
  int64_t at[3], step[3];        // the first head's elements in the projection, and how far the next ones are
  RotaryArgs rotary;             // where it has cosines
  char* buffers[2];
  std::optional<Crossed> crossed;
};

// Memory of the tokens' results, of every layer the same.
struct TokenMemory {
  char *normed, *qkv, *head_normed[2], *rotated[2], *context, *y, *half, *crossed_query, *crossed_y, *out[2];
  float* logsumexp;
};

// What is the same for all layers of tokens.
struct TokenCall {
  bool interleaved;             // of a rotary embedding: pairs side by side
  bool head_by_head;            // in the projection: of each key the queries that share it, the key and the value
  double softcap;
  Kind kind;
};

// Keys and values (batch, kv_heads, room, head_dim) of so many sequences, all but how many of them are read.
void set_keys(AttentionArgs& attention, const Tensor& keys, const Tensor& values, const char* const names[2], int64_t batch, ScalarType scalar_type) {
  const Tensor* both[2] = {&keys, &values};
  int64_t* strides[2] = {attention.key_stride, attention.value_stride};
  for (int i = 0; i < 2; i++) {
    const Tensor& t = *both[i];
    check_cpu(t, names[i]);
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == batch, names[i], ": shape ", shape_of(t), " must be (", batch, ", kv_heads, room, head_dim)");
    STD_TORCH_CHECK(shape_of(t) == shape_of(keys), names[i], ": shape ", shape_of(t), " must be that of ", names[0], ", ", shape_of(keys));
    STD_TORCH_CHECK(scalar_type_of(t, names[i]) == scalar_type, names[i], ": dtype differs from x's");
    STD_TORCH_CHECK(t.size(3) == 1 || t.stride(3) == 1, names[i], ": last dimension must be contiguous");
    check_aligned(t, names[i]);
    for (int d = 0; d < 3; d++) strides[i][d] = t.stride(d);
  }
  attention.key = keys.const_data_ptr();
  attention.value = values.const_data_ptr();
  attention.batch = batch;
  attention.kv_heads = keys.size(1);
  attention.head_dim = keys.size(3);
  STD_TORCH_CHECK(attention.head_dim >= 1 && attention.head_dim <= 256, names[0], ": head_dim ", attention.head_dim, " must be 1 to 256");
}

// The mask (batch, tokens) of keys that are those of the last tokens.
void set_last_keys(AttentionArgs& attention, const Tensor& mask) {
  STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == attention.batch && mask.size(1) >= attention.key_length, "key_padding_mask: shape ", shape_of(mask),
                  " must be (", attention.batch, ", ", attention.key_length, " or more)");
  const auto* const tokens = static_cast<const uint8_t*>(data_of(mask, "key_padding_mask", ScalarType::Bool, mask.numel()));
  attention.key_padding_mask = tokens + mask.size(1) - attention.key_length;
  attention.mask_stride = mask.size(1);
}

// Of what there is none, one for all layers, or one for each: how many there are, and that of a layer.
template <class T>
void check_each(const std::vector<T>& all, const char* name, size_t layers) {
  STD_TORCH_CHECK(all.size() <= 1 || all.size() == layers, name, ": ", all.size(), " must be none, one, or one for each of ", layers, " layers");
}
template <class T>
OptionalTensor of_layer(const std::vector<T>& all, size_t layer) {
  return all.empty() ? OptionalTensor() : OptionalTensor(all[all.size() == 1 ? 0 : layer]);
}

void check_angles(const std::vector<OptionalTensor>& cos, const std::vector<OptionalTensor>& sin, size_t layers) {
  check_each(cos, "cos", layers);
  STD_TORCH_CHECK(sin.size() == cos.size(), "sin: ", sin.size(), " must be as many as cos, ", cos.size());
  for (size_t i = 0; i < cos.size(); i++) STD_TORCH_CHECK(cos[i].has_value() == sin[i].has_value(), "sin: must be given with cos");
}

// Of each layer so many keys to a side, with its own, or 0 for all.
void check_windows(const std::vector<int64_t>& windows, size_t layers) {
  STD_TORCH_CHECK(windows.empty() || windows.size() == layers, "windows: ", windows.size(), " must be none, or one for each of ", layers, " layers");
  for (int64_t window : windows) STD_TORCH_CHECK(window >= 0, "windows: ", window, " must be 0 (all keys) or more");
}

Crossed crossed_layer(const Tensor& x, const CrossedParts& w, const TokenCall& call) {
  Crossed crossed = {};
  AttentionArgs& attention = crossed.attention;
  const Dtype dtype = attention.dtype = dtype_of(x, "x");
  const ScalarType scalar_type = x.scalar_type();
  const int64_t batch = x.size(0), rows = x.size(1), hidden = x.size(2);
  const char* const names[2] = {"crossed_keys", "crossed_values"};
  set_keys(attention, w.keys, w.values, names, batch, scalar_type);
  attention.query_length = rows;
  attention.key_length = w.keys.size(2);
  crossed.query = {.dtype = dtype, .rows = batch * rows, .weight = weight_args(w.query, "the query's weight", dtype, hidden),
                   .activation = Activation::none};
  const int64_t queries = crossed.query.weight.n, kv = attention.kv_heads * attention.head_dim;
  STD_TORCH_CHECK(attention.kv_heads >= 1 && queries > 0 && queries % kv == 0, "crossed: the ", queries,
                  " out_features of the query's weight must be heads for ", attention.kv_heads, " kv heads of ", attention.head_dim, " in crossed_keys");
  attention.heads = queries / attention.head_dim;
  crossed.query.bias = data_of(w.b_query, "bias", scalar_type, queries);
  set_options(attention, {w.key_padding_mask, {}, {}, {}, {}, {}, {}, rows, attention.key_length, w.softmax_scale, false, -1, -1, 0.0, 0.0});
  attention.query_stride[0] = rows * queries;
  attention.query_stride[1] = attention.head_dim;
  attention.query_stride[2] = queries;
  result_strides(attention, attention.out_stride);
  crossed.context = {.dtype = dtype, .rows = batch * rows, .weight = weight_args(w.context, "the attention's output", dtype, queries),
                     .bias = data_of(w.b_context, "bias", scalar_type, hidden), .activation = Activation::none};
  STD_TORCH_CHECK(crossed.context.weight.n == hidden, "crossed: out_features ", crossed.context.weight.n, " must be x's ", hidden);
  const bool has = has_norm(w.norm_weight, w.norm_bias);
  const NormArgs norm = norm_args(w.norm_weight, w.norm_bias, w.norm_eps, scalar_type, hidden, call.kind.norm, call.kind.norm_offset, "norm_");
  if (call.kind.order == Order::post) {
    crossed.context.has_norm = has;
    crossed.context.norm = norm;
  } else {
    crossed.norm = norm;
  }
  return crossed;
}

TokenLayer token_layer(const Tensor& x, const LayerParts& w, Tensor& keys, Tensor& values, int64_t length, int64_t window, double softmax_scale,
                       const OptionalTensor& mask, const OptionalTensor& attention_bias, const OptionalTensor& cos, const OptionalTensor& sin, const TokenCall& call) {
  TokenLayer layer = {};
  AttentionArgs& attention = layer.attention;
  const Dtype dtype = attention.dtype = dtype_of(x, "x");
  const ScalarType scalar_type = x.scalar_type();
  const int64_t batch = x.size(0), rows = x.size(1), hidden = x.size(2);
  const char* const names[2] = {"keys", "values"};
  set_keys(attention, keys, values, names, batch, scalar_type);
  layer.buffers[0] = static_cast<char*>(keys.mutable_data_ptr());
  layer.buffers[1] = static_cast<char*>(values.mutable_data_ptr());
  STD_TORCH_CHECK(length >= 0 && length <= keys.size(2) - rows, "lengths: ", length, " must be 0 to ", keys.size(2) - rows,
                  ", for there is room for ", keys.size(2));
  attention.query_length = rows;
  attention.key_length = length + rows;
  const WeightArgs qkv = layer.qkv.weight = weight_args(w.qkv, "the first projection", dtype, hidden);
  const int64_t kv = attention.kv_heads * attention.head_dim, queries = qkv.n - 2 * kv;
  attention.heads = queries / attention.head_dim;
  STD_TORCH_CHECK(attention.kv_heads >= 1 && queries > 0 && queries % kv == 0, "parts: the ", qkv.n,
                  " out_features of the first projection must be queries, keys and values of ", attention.kv_heads, " kv heads of ", attention.head_dim, " in keys");
  set_options(attention, {{}, attention_bias, {}, {}, {}, {}, {}, rows, attention.key_length, softmax_scale, rows > 1,
                          window && window < attention.key_length ? window - 1 : -1, -1, call.softcap, 0.0});
  if (mask) set_last_keys(attention, *mask);
  result_strides(attention, attention.out_stride);

  const OptionalTensor* head_norms[2] = {&w.query_norm, &w.key_norm};
  const char* head_names[2] = {"q_norm_", "k_norm_"};
  layer.heads[0] = attention.heads;
  layer.heads[1] = layer.heads[2] = attention.kv_heads;
  for (int i = 0; i < 2; i++) {
    const OptionalTensor& weight = *head_norms[i];
    const int64_t all = layer.heads[i] * attention.head_dim;
    layer.normed[i] = weight && weight->numel() == all ? all : attention.head_dim;
    layer.head_norms[i] = norm_args(weight, {}, w.head_norm_eps, scalar_type, layer.normed[i], NormKind::rms_norm, call.kind.norm_offset,
                                    head_names[i]);
  }
  const int64_t shared = attention.heads / attention.kv_heads, head_dim = attention.head_dim;
  if (call.head_by_head) {
    STD_TORCH_CHECK(shared == 1 || attention.kv_heads == 1, "head_by_head: ", attention.heads, " heads that share ", attention.kv_heads,
                    " keys have no even distance");
    STD_TORCH_CHECK(!w.query_norm && !w.key_norm, "head_by_head: such heads have no norms");
  }
  for (int i = 0; i < 3; i++) {
    layer.at[i] = i == 0 ? 0 : call.head_by_head ? (shared + i - 1) * head_dim : queries + (i - 1) * kv;
    layer.step[i] = call.head_by_head && shared == 1 ? 3 * head_dim : head_dim;
  }
  if (cos) {
    layer.rotary = {.dtype = dtype, .batch = batch, .rows = rows, .head_dim = head_dim, .heads = {attention.heads, attention.kv_heads},
                    .interleaved = call.interleaved};
    set_angles(layer.rotary, *cos, *sin);
  }
  set_products(layer, w, x, batch * rows, queries, call.kind);
  return layer;
}

// From `x` to `out`, both (batch * rows, hidden).
void run_tokens(TokenLayer& layer, const TokenMemory& memory, const Kind& kind, const void* x, void* out) {
  const bool parallel = kind.order == Order::parallel;
  const int64_t batch = layer.attention.batch, rows = layer.attention.query_length, head_dim = layer.attention.head_dim, all = batch * rows;
  const Dtype dtype = layer.attention.dtype;
  const int64_t element = dtype_size(dtype);
  if (layer.norm.weight)
    kernels().layer_norm(runtime(), {dtype, all, layer.qkv.weight.k, x, nullptr, layer.norm, memory.normed, {}});
  const void* const normed = layer.qkv.x = layer.norm.weight ? memory.normed : x;
  layer.qkv.out = memory.qkv;
  kernels().linear(runtime(), layer.qkv);

  const char* heads[3];        // of query, key and value: (batch * rows, heads, head_dim), rows and heads so many elements apart
  int64_t row[3], step[3];
  for (int i = 0; i < 3; i++) {
    heads[i] = memory.qkv + layer.at[i] * element;
    row[i] = layer.qkv.weight.n;
    step[i] = layer.step[i];
  }
  for (int i = 0; i < 2; i++) {
    if (!layer.head_norms[i].weight) continue;
    const int64_t width = layer.heads[i] * head_dim;
    const char* together = heads[i];
    if (all > 1) {
      for (int64_t r = 0; r < all; r++) memcpy(memory.rotated[i] + r * width * element, heads[i] + r * row[i] * element, size_t(width * element));
      together = memory.rotated[i];
    }
    kernels().layer_norm(runtime(), {dtype, all * width / layer.normed[i], layer.normed[i], together, nullptr, layer.head_norms[i],
                                     memory.head_normed[i], {}});
    heads[i] = memory.head_normed[i];
    row[i] = width;
  }
  if (layer.rotary.cosine) {
    for (int i = 0; i < 2; i++) {
      layer.rotary.x[i] = heads[i];
      layer.rotary.stride[i][0] = rows * row[i];
      layer.rotary.stride[i][1] = step[i];
      layer.rotary.stride[i][2] = row[i];
      layer.rotary.out[i] = memory.rotated[i];
      heads[i] = memory.rotated[i];
      row[i] = layer.heads[i] * head_dim;
      step[i] = head_dim;
    }
    kernels().rotary(runtime(), layer.rotary);
  }
  AttentionArgs& attention = layer.attention;
  const int64_t* strides[2] = {attention.key_stride, attention.value_stride};
  const int64_t length = attention.key_length - rows;
  for (int i = 0; i < 2; i++)
    for (int64_t b = 0; b < batch; b++)
      for (int64_t h = 0; h < attention.kv_heads; h++) {
        char* const target = layer.buffers[i] + (b * strides[i][0] + h * strides[i][1] + length * strides[i][2]) * element;
        const char* const source = heads[i + 1] + (b * rows * row[i + 1] + h * step[i + 1]) * element;
        for (int64_t r = 0; r < rows; r++) memcpy(target + r * strides[i][2] * element, source + r * row[i + 1] * element, size_t(head_dim * element));
      }
  attention.query = heads[0];
  attention.query_stride[0] = rows * row[0];
  attention.query_stride[1] = step[0];
  attention.query_stride[2] = row[0];
  attention.out = memory.context;
  set_logsumexp(attention, all, memory.logsumexp);
  kernels().attention(runtime(), attention);

  // What the halves add may have a norm or a factor before it is added.
  const int64_t hidden = layer.qkv.weight.k;
  const bool summed = layer.outer[0].weight || layer.outer[1].weight || kind.factor != 1.0;
  run_context(layer.context, summed ? nullptr : x, memory.context, summed ? memory.half : memory.y);
  if (summed) run_sum(kind, dtype, all, hidden, layer.outer[0], x, memory.half, memory.normed, memory.y);
  const void* y = memory.y;
  if (layer.crossed) {
    Crossed& crossed = *layer.crossed;
    if (crossed.norm.weight)
      kernels().layer_norm(runtime(), {dtype, all, hidden, y, nullptr, crossed.norm, memory.normed, {}});
    crossed.query.x = crossed.norm.weight ? memory.normed : y;
    crossed.query.out = memory.crossed_query;
    kernels().linear(runtime(), crossed.query);
    crossed.attention.query = memory.crossed_query;
    crossed.attention.out = memory.context;
    set_logsumexp(crossed.attention, all, memory.logsumexp);
    kernels().attention(runtime(), crossed.attention);
    run_context(crossed.context, y, memory.context, memory.crossed_y);
    y = memory.crossed_y;
  }
  const void* states = parallel ? layer.ffn.norm_position == NormPosition::pre ? x : normed : y;
  if (layer.ffn_norm.weight) {
    kernels().layer_norm(runtime(), {dtype, all, hidden, states, nullptr, layer.ffn_norm, memory.normed, {}});
    states = memory.normed;
  }
  run_feed_forward(layer, states, summed ? nullptr : y, summed ? memory.half : out);
  if (summed) run_sum(kind, dtype, all, hidden, layer.outer[1], y, memory.half, memory.normed, out);
}

// How many layers `epsilons` are for, the three of each.
size_t layers_of(const std::vector<double>& epsilons) {
  STD_TORCH_CHECK(epsilons.size() % LayerParts::epsilons == 0, "epsilons: ", epsilons.size(), " must be ", LayerParts::epsilons, " for each layer");
  return epsilons.size() / LayerParts::epsilons;
}

// The layers of `parts`, LayerParts' tensors layer by layer: body(layer, i) for each.
template <class Body>
void each_layer(const std::vector<OptionalTensor>& parts, const std::vector<double>& epsilons, const Body& body) {
  const size_t layers = layers_of(epsilons);
  STD_TORCH_CHECK(parts.size() == layers * LayerParts::count, "parts: ", parts.size(), " tensors must be ", LayerParts::count, " for each of ", layers,
                  " layers that epsilons are for");
  for (size_t i = 0; i < layers; i++) {
    const OptionalTensor* p = &parts[i * LayerParts::count];
    const double* eps = &epsilons[i * LayerParts::epsilons];
    for (int weight : {2, 6, 10, 12}) STD_TORCH_CHECK(p[weight].has_value(), "parts: the packed weight ", weight, " of layer ", i, " is None");
    body(LayerParts{p[0], p[1], *p[2], p + 3, *p[6], p[7], p[8], p[9], *p[10], p[11], *p[12], p[13], p[14], p[15], p[16], p[17], eps[0], eps[1], eps[2]}, i);
  }
}

// All layers of such tokens, x (batch, rows, hidden); `buffers` are the keys and values of each. With `cos` and `sin` (1 or batch, rows,
// angles), one for all layers or one or none for each, queries and keys are turned (rotary embedding), after the norms of heads. A bias of the
// logits is one for all layers or one for each. Where layers are crossed, `crossed` are CrossedParts' tensors layer by layer, with the epsilons of
// their norms, `states` the keys and values that each attends to, and their scales are behind the others. `outer` are norms of what attention
// and feed-forward add, two for each layer.
Tensor cpu_layers(Tensor x, std::vector<OptionalTensor> parts, std::vector<double> epsilons, std::vector<Tensor> buffers,
                  std::vector<int64_t> lengths, std::vector<int64_t> windows, std::vector<OptionalTensor> key_padding_masks,
                  std::vector<Tensor> attention_biases, std::vector<OptionalTensor> cos, std::vector<OptionalTensor> sin, bool interleaved, bool head_by_head, std::vector<OptionalTensor> crossed,
                  std::vector<double> crossed_epsilons, std::vector<Tensor> states, OptionalTensor states_padding_mask, std::vector<double> softmax_scales,
                  double softcap, std::vector<OptionalTensor> outer, std::vector<double> outer_epsilons, double factor, Text norm_kind, double norm_offset,
                  Text order, Text activation) {
  const size_t count = layers_of(epsilons), crosses = crossed_epsilons.size();
  STD_TORCH_CHECK(crosses == 0 || crosses == count, "crossed_epsilons: ", crosses, " must be none, or one for each of ", count, " layers");
  STD_TORCH_CHECK(crossed.size() == crosses * CrossedParts::count, "crossed: ", crossed.size(), " tensors must be ", CrossedParts::count, " for each of ", crosses,
                  " layers that crossed_epsilons are for");
  STD_TORCH_CHECK(states.size() == 2 * crosses, "states: ", states.size(), " tensors must be two for each of ", crosses,
                  " layers that crossed_epsilons are for");
  STD_TORCH_CHECK(softmax_scales.size() == count + crosses, "softmax_scales: ", softmax_scales.size(), " must be one for each attention of ", count,
                  " layers, ", count + crosses);
  check_each(key_padding_masks, "key_padding_masks", count);
  check_each(attention_biases, "attention_biases", count);
  check_angles(cos, sin, count);
  STD_TORCH_CHECK(buffers.size() == 2 * count, "buffers: ", buffers.size(), " tensors must be two for each of ", count, " layers");
  STD_TORCH_CHECK(lengths.size() == count, "lengths: ", lengths.size(), " must be one for each of ", count, " layers");
  check_windows(windows, count);
  check_cpu(x, "x");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && x.size(2) > 0, "x: shape ", shape_of(x), " must be (batch, rows, hidden), the last two not empty");
  const int64_t rows = rows_of(x, x.size(2)), hidden = x.size(2);
  const Kind kind = {order_of(order), norm_kind_of(norm_kind), norm_offset, activation_of(activation), factor};
  const TokenCall call = {interleaved, head_by_head, softcap, kind};
  STD_TORCH_CHECK(!crosses || kind.order != Order::parallel, "order: crossed layers are not parallel");
  STD_TORCH_CHECK(outer.size() == outer_epsilons.size() && (outer.empty() || outer.size() == 2 * count), "outer: ", outer.size(),
                  " tensors and outer_epsilons, ", outer_epsilons.size(), ", must be none, or two for each of ", count, " layers");
  STD_TORCH_CHECK((outer.empty() && factor == 1.0) || (!crosses && kind.order == Order::pre),
                  "outer: norms of what is added, and a factor, are for order pre, uncrossed");
  std::vector<TokenLayer> layers;
  layers.reserve(count);
  each_layer(parts, epsilons, [&](const LayerParts& w, size_t i) {
    layers.push_back(token_layer(x, w, buffers[2 * i], buffers[2 * i + 1], lengths[i], windows.empty() ? 0 : windows[i], softmax_scales[i],
                                 of_layer(key_padding_masks, i), of_layer(attention_biases, i), of_layer(cos, i), of_layer(sin, i), call));
    for (size_t half = 0; half < 2 && !outer.empty(); half++)
      layers.back().outer[half] =
          norm_args(outer[2 * i + half], {}, outer_epsilons[2 * i + half], x.scalar_type(), hidden, kind.norm, norm_offset, "outer: norm_");
    if (!crosses) return;
    const OptionalTensor* p = &crossed[i * CrossedParts::count];
    for (int weight : {2, 4}) STD_TORCH_CHECK(p[weight].has_value(), "crossed: the packed weight ", weight, " of layer ", i, " is None");
    const CrossedParts attention = {p[0], p[1], *p[2], p[3], *p[4], p[5], crossed_epsilons[i], softmax_scales[count + i],
                                    states[2 * i], states[2 * i + 1], states_padding_mask};
    layers.back().crossed = crossed_layer(x, attention, call);
  });
  if (layers.empty()) return x;
  Tensor out = empty_rows_like(x, hidden);
  if (rows == 0) return out;

  // The most features that a layer has of each.
  int64_t projected = 0, heads[2] = {}, logsumexp = 0, queries = 0;
  for (const TokenLayer& layer : layers) {
    projected = std::max(projected, layer.qkv.weight.n);
    for (int i = 0; i < 2; i++) heads[i] = std::max(heads[i], layer.heads[i] * layer.attention.head_dim);
    logsumexp = std::max(logsumexp, layer.heads[0]);
    if (!layer.crossed) continue;
    queries = std::max(queries, layer.crossed->query.weight.n);
    logsumexp = std::max(logsumexp, layer.crossed->attention.heads);
  }
  const int64_t element = dtype_size(dtype_of(x, "x"));
  int64_t bytes = 0;
  const auto reserve = [&](int64_t features, int64_t size) { return std::exchange(bytes, bytes + (rows * features * size + 63) / 64 * 64); };
  const int64_t normed = reserve(hidden, element), qkv = reserve(projected, element);
  const int64_t context = reserve(std::max(heads[0], queries), element), y = reserve(hidden, element);
  const int64_t half = reserve(hidden, element), crossed_query = reserve(queries, element), crossed_y = reserve(crosses ? hidden : 0, element);
  const int64_t results[2] = {reserve(hidden, element), reserve(hidden, element)}, sums = reserve(logsumexp, sizeof(float));
  int64_t of_heads[2][2];
  for (int i = 0; i < 2; i++)
    for (int64_t& at : of_heads[i]) at = reserve(heads[i], element);
  const std::unique_ptr<char[]> block(new char[size_t(bytes + 64)]);
  char* const start = block.get() + (64 - reinterpret_cast<uintptr_t>(block.get()) % 64) % 64;
  const TokenMemory memory = {.normed = start + normed, .qkv = start + qkv, .head_normed = {start + of_heads[0][0], start + of_heads[1][0]},
                              .rotated = {start + of_heads[0][1], start + of_heads[1][1]}, .context = start + context, .y = start + y,
                              .half = start + half, .crossed_query = start + crossed_query, .crossed_y = start + crossed_y,
                              .out = {start + results[0], start + results[1]}, .logsumexp = reinterpret_cast<float*>(start + sums)};
  together([&] {
    const void* from = x.const_data_ptr();
    for (size_t i = 0; i < count; i++) {
      void* const to = i + 1 < count ? memory.out[i % 2] : out.mutable_data_ptr();
      run_tokens(layers[i], memory, call.kind, from, to);
      from = to;
    }
  });
  return out;
}

struct EncoderLayer : LayerArgs {
  RotaryArgs rotary;            // where it has cosines
  AttentionArgs attention;
};

// All layers of an encoder, on x (batch, rows, hidden) or, with `lengths`, on packed rows (tokens, hidden). A bias of the logits is one for all
// layers or one for each, and so are the cosines and sines (1 or batch, rows, angles) by which queries and keys are turned; of packed rows they
// are those of one sequence. Of windows there are none, or one for each layer: so many rows to each side, with its own, or 0 for all.
Tensor cpu_encoder(Tensor x, std::vector<OptionalTensor> parts, std::vector<double> epsilons, int64_t head_dim, OptionalTensor lengths, int64_t longest,
                   OptionalTensor key_padding_mask, bool is_causal, std::vector<int64_t> windows, std::vector<Tensor> attention_biases,
                   std::vector<OptionalTensor> cos, std::vector<OptionalTensor> sin, bool interleaved, double softmax_scale, Text norm_kind, Text order, Text activation) {
  check_cpu(x, "x");
  const int64_t rank = lengths ? 2 : 3;
  STD_TORCH_CHECK(x.dim() == rank && x.size(rank - 1) > 0, "x: shape ", shape_of(x), " must have ", rank, " dimensions, the last not empty");
  const int64_t hidden = x.size(rank - 1), rows = rows_of(x, hidden);
  const Dtype dtype = dtype_of(x, "x");
  const Kind kind = {order_of(order), norm_kind_of(norm_kind), 0.0, activation_of(activation)};
  STD_TORCH_CHECK(kind.order != Order::parallel, "order: an encoder's layers are not parallel");
  const size_t count = layers_of(epsilons);
  check_each(attention_biases, "attention_biases", count);
  check_angles(cos, sin, count);
  check_windows(windows, count);
  std::vector<EncoderLayer> layers;
  std::optional<Tensor> qkv;    // of every layer, as the heads are
  std::vector<Tensor> each;     // of them
  std::vector<Tensor> turned;   // queries and keys, where a layer turns them
  int64_t heads = 0;
  const auto as_heads = [&](const Tensor& features) {
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = heads;
    shape.push_back(head_dim);
    const Tensor t = torch::stable::view(features, shape);
    return lengths ? t : torch::stable::transpose(t, 1, 2);
  };
  each_layer(parts, epsilons, [&](const LayerParts& w, size_t i) {
    STD_TORCH_CHECK(!w.query_norm && !w.key_norm, "parts: an encoder's heads have no norms");
    EncoderLayer layer = {};
    layer.qkv.weight = weight_args(w.qkv, "the first projection", dtype, hidden);
    const int64_t features = layer.qkv.weight.n;
    if (!qkv) {
      heads = head_dim < 1 ? 0 : features / head_dim / 3;
      STD_TORCH_CHECK(heads > 0 && heads * head_dim * 3 == features, "head_dim: ", head_dim, " does not divide a third of the first projection's ", features, " out_features");
      qkv = empty_rows_like(x, features);
      for (int64_t i = 0; i < 3; i++) each.push_back(as_heads(torch::stable::narrow(*qkv, rank - 1, i * heads * head_dim, heads * head_dim)));
    }
    STD_TORCH_CHECK(features == 3 * heads * head_dim, "parts: all layers must have ", heads, " heads of ", head_dim, ", not ", features, " out_features");
    const OptionalTensor cosine = of_layer(cos, i), sine = of_layer(sin, i);
    if (cosine) {
      while (turned.size() < 2) turned.push_back(as_heads(empty_rows_like(x, heads * head_dim)));
      layer.rotary = {.dtype = dtype, .batch = lengths ? 1 : x.size(0), .rows = x.size(rank - 2), .head_dim = head_dim, .heads = {heads, heads},
                      .interleaved = interleaved};
      set_angles(layer.rotary, *cosine, *sine);
      for (int i = 0; i < 2; i++) {
        layer.rotary.x[i] = each[size_t(i)].const_data_ptr();
        layer.rotary.stride[i][0] = layer.rotary.rows * features;
        layer.rotary.stride[i][1] = head_dim;
        layer.rotary.stride[i][2] = features;
        layer.rotary.out[i] = turned[size_t(i)].mutable_data_ptr();
      }
    }
    const int64_t window = windows.empty() ? 0 : windows[i];
    const int64_t side = window && window < (lengths ? longest : x.size(1)) ? window - 1 : -1;
    const std::vector<Tensor>& seen = cosine ? turned : each;
    layer.attention = attention_args(seen[0], seen[1], each[2], {key_padding_mask, of_layer(attention_biases, i), lengths, lengths, {}, {}, {},
                                                                 longest, longest, softmax_scale, is_causal, side, side, 0.0, 0.0});
    set_products(layer, w, x, rows, heads * head_dim, kind);
    layers.push_back(std::move(layer));
  });
  if (layers.empty()) return x;
  Tensor out[2] = {empty_rows_like(x, hidden), empty_rows_like(x, hidden)};
  if (rows == 0) return out[0];
  Tensor context = empty_rows_like(x, heads * head_dim), y = empty_rows_like(x, hidden);
  const auto logsumexp = logsumexp_memory(layers[0].attention, rows);
  for (EncoderLayer& layer : layers) {
    set_logsumexp(layer.attention, rows, logsumexp.get());
    result_strides(layer.attention, layer.attention.out_stride);
    layer.attention.out = context.mutable_data_ptr();
  }
  void* const results[2] = {out[0].mutable_data_ptr(), out[1].mutable_data_ptr()};
  void* const second = y.mutable_data_ptr();
  void* const projected = qkv->mutable_data_ptr();
  void* const normed = second;  // before it holds anything else
  const void* from = x.const_data_ptr();
  together([&] {
    for (size_t i = 0; i < layers.size(); i++) {
      EncoderLayer& layer = layers[i];
      if (layer.norm.weight) kernels().layer_norm(runtime(), {dtype, rows, hidden, from, nullptr, layer.norm, normed, {}});
      layer.qkv.x = layer.norm.weight ? normed : from;
      layer.qkv.out = projected;
      kernels().linear(runtime(), layer.qkv);
      if (layer.rotary.cosine) kernels().rotary(runtime(), layer.rotary);
      kernels().attention(runtime(), layer.attention);
      run_context(layer.context, from, layer.attention.out, second);
      run_feed_forward(layer, second, second, results[i % 2]);
      from = results[i % 2];
    }
  });
  return out[(layers.size() - 1) % 2];
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
  m.def("cpu_layers(Tensor x, Tensor?[] parts, float[] epsilons, Tensor(a!)[] buffers, int[] lengths, int[] windows, Tensor?[] key_padding_masks, "
        "Tensor[] attention_biases, Tensor?[] cos, Tensor?[] sin, bool interleaved, bool head_by_head, Tensor?[] crossed, float[] crossed_epsilons, Tensor[] states, "
        "Tensor? states_padding_mask, float[] softmax_scales, float softcap, Tensor?[] outer, float[] outer_epsilons, float factor, "
        "str norm_kind, float norm_offset, str order, str activation) -> Tensor");
  m.def("cpu_encoder(Tensor x, Tensor?[] parts, float[] epsilons, int head_dim, Tensor? lengths, int longest, Tensor? key_padding_mask, "
        "bool is_causal, int[] windows, Tensor[] attention_biases, Tensor?[] cos, Tensor?[] sin, bool interleaved, float softmax_scale, str norm_kind, "
        "str order, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel, CPU, m) {
  m.impl("cpu_layer_begin", TORCH_BOX(&bigmodel::cpu_layer_begin));
  m.impl("cpu_layer_end", TORCH_BOX(&bigmodel::cpu_layer_end));
  m.impl("cpu_layers", TORCH_BOX(&bigmodel::cpu_layers));
  m.impl("cpu_encoder", TORCH_BOX(&bigmodel::cpu_encoder));
}
