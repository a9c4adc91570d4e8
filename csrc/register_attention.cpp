// Attention as torch sees it on the CPU: schemas, checks, results; no arithmetic (see register_cpu.cpp).
#include <algorithm>
#include <cmath>
#include <limits>

#include "registration.h"

namespace bigmodel {

// The seed is read here, once: it decides the whole call.
Dropout dropout_of(const OptionalTensor& seed, double p, const char* name) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "dropout_p: ", p, " must be 0 to 1");
  STD_TORCH_CHECK(seed.has_value() == (p > 0), name, ": must be given when dropout_p is not 0, and None when it is");
  if (!seed) return {};
  const auto value = *static_cast<const uint64_t*>(data_of(*seed, name, ScalarType::Long, 1));
  const auto threshold = uint32_t(std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1));
  return {true, {uint32_t(value), uint32_t(value >> 32)}, threshold, p < 1 ? float(1 / (1 - p)) : 0.0f};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> cpu_philox(Tensor seed, int64_t rows, int64_t columns, Text rule, int64_t first_row, int64_t head,
                                              int64_t sequence, double dropout_p) {
  STD_TORCH_CHECK(rule == "attention" || rule == "elements", "rule: '", rule, "' is not one of attention, elements");
  STD_TORCH_CHECK(rows >= 0 && columns >= 0 && first_row >= 0, "rows, columns, first_row: must not be negative");
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  STD_TORCH_CHECK(columns == 0 || rows <= (most >> 3) / columns, "rows, columns: ", rows, " x ", columns, " elements are too many");
  STD_TORCH_CHECK(first_row <= most - rows, "first_row: ", first_row, " and ", rows, " rows behind it overflow");
  Tensor words = torch::stable::empty({rows, columns}, ScalarType::Int), kept = torch::stable::empty({rows, columns}, ScalarType::Bool);
  Tensor values = torch::stable::empty({rows, columns}, ScalarType::Float);
  auto* value = static_cast<float*>(values.mutable_data_ptr());
  for (int64_t i = 0; i < rows * columns; i++) value[i] = 1.0f;
  const PhiloxArgs args = {dropout_of(seed, dropout_p, "seed"), rule == "elements", rows, columns, first_row, head, sequence,
                           static_cast<uint32_t*>(words.mutable_data_ptr()), static_cast<uint8_t*>(kept.mutable_data_ptr()), value};
  kernels().philox_block(args);
  return {words, kept, values};
}

// cu_seqlens: 0 = c[0] <= c[1] <= ... = total, no sequence longer than `longest`.
const int32_t* cumulative_lengths(const Tensor& lengths, const char* name, int64_t total, int64_t longest) {
  const auto* c = static_cast<const int32_t*>(data_of(lengths, name, ScalarType::Int, lengths.numel()));
  const int64_t batch = lengths.numel() - 1;
  STD_TORCH_CHECK(lengths.dim() == 1 && batch >= 0, name, ": shape ", shape_of(lengths), " must be (batch + 1,)");
  STD_TORCH_CHECK(c[0] == 0 && c[batch] == total, name, ": must run from 0 to ", total, ", but runs from ", c[0], " to ", c[batch]);
  for (int64_t b = 0; b < batch; b++)
    STD_TORCH_CHECK(c[b + 1] >= c[b] && c[b + 1] - c[b] <= longest, name, ": sequence ", b, " runs from ", c[b], " to ", c[b + 1],
                    ", but lengths must be 0 to ", longest);
  return c;
}

// Where the rows of a tensor in the inputs' form (dense (B, H, S, D) or packed (S, H, D)) are: strides of batch, head and row; zeros
// where there are none, since nothing may be added to the address of nothing.
void row_strides(const Tensor& t, const char* name, bool varlen, int64_t strides[3]) {
  const int rank = varlen ? 3 : 4;
  STD_TORCH_CHECK(t.numel() == 0 || t.size(rank - 1) == 1 || t.stride(rank - 1) == 1, name, ": last dimension must be contiguous");
  const bool rows = t.numel() > 0;
  strides[0] = rows && !varlen ? t.stride(0) : 0;
  strides[1] = rows ? t.stride(1) : 0;
  strides[2] = !rows ? 0 : varlen ? t.stride(0) : t.stride(2);
}

}  // namespace

AttentionArgs attention_args(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options) {
  const auto& [key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k] = std::tie(
      options.key_padding_mask, options.bias, options.cu_seqlens_q, options.cu_seqlens_k, options.max_seqlen_q, options.max_seqlen_k);
  AttentionArgs args = {};
  const bool varlen = cu_seqlens_q.has_value();
  STD_TORCH_CHECK(varlen == cu_seqlens_k.has_value(), "cu_seqlens_k: must be given with cu_seqlens_q");
  const ScalarType dtype = scalar_type_of(query, "query");
  args.dtype = dtype_of(query, "query");
  const int rank = varlen ? 3 : 4;
  const Tensor* tensors[3] = {&query, &key, &value};
  const char* names[3] = {"query", "key", "value"};
  int64_t* strides[3] = {args.query_stride, args.key_stride, args.value_stride};
  for (int i = 0; i < 3; i++) {
    const Tensor& t = *tensors[i];
    check_cpu(t, names[i]);
    STD_TORCH_CHECK(t.dim() == rank, names[i], ": shape ", shape_of(t), " must have ", rank, " dimensions");
    STD_TORCH_CHECK(scalar_type_of(t, names[i]) == dtype, names[i], ": dtype differs from query's");
    STD_TORCH_CHECK(t.size(rank - 1) == query.size(rank - 1), names[i], ": head_dim ", t.size(rank - 1), " differs from query's ", query.size(rank - 1));
    check_aligned(t, names[i]);
    row_strides(t, names[i], varlen, strides[i]);
  }
  const int row_dim = varlen ? 0 : 2;
  STD_TORCH_CHECK(value.size(row_dim) == key.size(row_dim) && value.size(1) == key.size(1), "value: shape ", shape_of(value), " must be key's ", shape_of(key));
  args.head_dim = query.size(rank - 1);
  args.heads = query.size(1);
  args.kv_heads = key.size(1);
  STD_TORCH_CHECK(args.head_dim >= 1 && args.head_dim <= 256, "query: head_dim ", args.head_dim, " must be 1 to 256");
  STD_TORCH_CHECK(args.kv_heads >= 1 && args.heads % args.kv_heads == 0, "key: ", args.kv_heads, " kv heads do not divide ", args.heads, " query heads");
  if (varlen) {
    STD_TORCH_CHECK(!key_padding_mask, "key_padding_mask: must be None with cu_seqlens");
    STD_TORCH_CHECK(cu_seqlens_q->numel() == cu_seqlens_k->numel(), "cu_seqlens_k: shape ", shape_of(*cu_seqlens_k), " must be cu_seqlens_q's ", shape_of(*cu_seqlens_q));
    args.cu_seqlens_q = cumulative_lengths(*cu_seqlens_q, "cu_seqlens_q", query.size(0), max_seqlen_q);
    args.cu_seqlens_k = cumulative_lengths(*cu_seqlens_k, "cu_seqlens_k", key.size(0), max_seqlen_k);
    args.batch = cu_seqlens_q->numel() - 1;
    args.query_length = std::min(max_seqlen_q, query.size(0));  // what is not there needs no scratch memory
    args.key_length = std::min(max_seqlen_k, key.size(0));
  } else {
    args.batch = query.size(0);
    args.query_length = query.size(2);
    args.key_length = key.size(2);
    STD_TORCH_CHECK(key.size(0) == args.batch, "key: batch ", key.size(0), " must be query's ", args.batch);
  }
  set_options(args, options);
  args.query = const_elements(query);
  args.key = const_elements(key);
  args.value = const_elements(value);
  return args;
}

void set_options(AttentionArgs& args, const AttentionOptions& options) {
  const auto& [key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, dropout_seed, alibi_slopes, sinks, max_seqlen_q, max_seqlen_k, softmax_scale,
               is_causal, window_left, window_right, softcap, dropout_p] = options;
  if (key_padding_mask) {
    STD_TORCH_CHECK(key_padding_mask->dim() == 2 && key_padding_mask->size(0) == args.batch && key_padding_mask->size(1) == args.key_length,
                    "key_padding_mask: shape ", shape_of(*key_padding_mask), " must be (", args.batch, ", ", args.key_length, ")");
    args.key_padding_mask = static_cast<const uint8_t*>(data_of(*key_padding_mask, "key_padding_mask", ScalarType::Bool, args.batch * args.key_length));
    args.mask_stride = args.key_length;
  }
  if (bias) {
    check_cpu(*bias, "bias");
    args.bias_dtype = dtype_of(*bias, "bias");
    STD_TORCH_CHECK(args.bias_dtype == args.dtype || args.bias_dtype == Dtype::float32, "bias: dtype must be query's or float32");
    STD_TORCH_CHECK(bias->dim() <= 4, "bias: shape ", shape_of(*bias), " must have at most 4 dimensions");
    // Of packed rows it is counted from the first of each sequence.
    const int64_t full[4] = {args.batch, args.heads, cu_seqlens_q ? max_seqlen_q : args.query_length, cu_seqlens_q ? max_seqlen_k : args.key_length};
    for (int64_t i = 0; i < bias->dim(); i++) {
      const int64_t d = 4 - bias->dim() + i;
      STD_TORCH_CHECK(bias->size(i) == 1 || bias->size(i) == full[d], "bias: shape ", shape_of(*bias), " does not broadcast to (", full[0], ", ", full[1], ", ", full[2], ", ", full[3], ")");
      args.bias_stride[d] = bias->size(i) == 1 ? 0 : bias->stride(i);
    }
    check_aligned(*bias, "bias");
    args.bias = const_elements(*bias);
  }
  if (alibi_slopes) {
    const int64_t batches = alibi_slopes->dim() == 2 ? args.batch : 1;
    STD_TORCH_CHECK((alibi_slopes->dim() == 1 || alibi_slopes->dim() == 2) && alibi_slopes->size(alibi_slopes->dim() - 1) == args.heads &&
                        alibi_slopes->numel() == batches * args.heads,
                    "alibi_slopes: shape ", shape_of(*alibi_slopes), " must be (", args.heads, ",) or (", args.batch, ", ", args.heads, ")");
    args.alibi_slopes = static_cast<const float*>(data_of(*alibi_slopes, "alibi_slopes", ScalarType::Float, batches * args.heads));
    args.alibi_batch_stride = alibi_slopes->dim() == 2 ? args.heads : 0;
  }
  if (sinks) {
    args.sinks_dtype = dtype_of(*sinks, "sinks");
    STD_TORCH_CHECK(args.sinks_dtype == args.dtype || args.sinks_dtype == Dtype::float32, "sinks: dtype must be query's or float32");
    args.sinks = data_of(*sinks, "sinks", scalar_type_of(*sinks, "sinks"), args.heads);
  }
  STD_TORCH_CHECK(std::isfinite(softmax_scale), "softmax_scale: must be finite");
  STD_TORCH_CHECK(softcap >= 0 && std::isfinite(softcap), "softcap: must be 0 (none) or positive");
  args.dropout = dropout_of(dropout_seed, dropout_p);
  args.softmax_scale = float(softmax_scale);
  args.softcap = float(softcap);
  args.is_causal = is_causal;
  // A window beyond the longest sequences hides nothing more, and must not overflow the positions that it is added to.
  const int64_t all = args.query_length + args.key_length;
  STD_TORCH_CHECK(window_left >= -1 && window_right >= -1, "window_left, window_right: ", window_left, ", ", window_right, " must be -1 (no limit) or more");
  args.window_left = std::min(window_left, all);
  args.window_right = std::min(window_right, all);
}

void result_strides(const AttentionArgs& args, int64_t strides[3]) {
  strides[1] = args.head_dim;
  strides[2] = args.heads * args.head_dim;
  strides[0] = args.cu_seqlens_q ? 0 : args.query_length * strides[2];
}

std::vector<int64_t> logsumexp_shape(const Tensor& query, const AttentionArgs& args, int64_t strides[2]) {
  if (args.cu_seqlens_q) {
    strides[0] = 0;
    strides[1] = query.size(0);
    return {args.heads, query.size(0)};
  }
  strides[0] = args.heads * args.query_length;
  strides[1] = args.query_length;
  return {args.batch, args.heads, args.query_length};
}

namespace {

// The operators take no bias of packed rows; whole layers do (register_layer.cpp).
AttentionArgs operator_args(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options) {
  STD_TORCH_CHECK(!options.cu_seqlens_q || !options.bias, "bias: must be None with cu_seqlens");
  return attention_args(query, key, value, options);
}

// A result in query's form: dense ones lie in memory as (B, S, H, D), in the order in which the next projection reads them.
Tensor empty_like_query(const Tensor& query, const AttentionArgs& args, int64_t strides[3]) {
  result_strides(args, strides);
  if (args.cu_seqlens_q) return empty_result({query.size(0), args.heads, args.head_dim}, query.scalar_type());
  Tensor rows = empty_result({args.batch, args.query_length, args.heads, args.head_dim}, query.scalar_type());
  return torch::stable::transpose(rows, 1, 2);
}

std::tuple<Tensor, Tensor> cpu_attention(Tensor query, Tensor key, Tensor value, OptionalTensor key_padding_mask, OptionalTensor bias,
                                         OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor dropout_seed,
                                         OptionalTensor alibi_slopes, OptionalTensor sinks, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                         double softmax_scale, bool is_causal, int64_t window_left, int64_t window_right, double softcap,
                                         double dropout_p) {
  AttentionArgs args = operator_args(query, key, value, {key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, dropout_seed, alibi_slopes, sinks,
                                                          max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, window_left, window_right, softcap,
                                                          dropout_p});
  Tensor out = empty_like_query(query, args, args.out_stride);
  Tensor logsumexp = torch::stable::empty(logsumexp_shape(query, args, args.logsumexp_stride), ScalarType::Float);
  args.out = mutable_elements(out);
  args.logsumexp = static_cast<float*>(mutable_elements(logsumexp));
  if (query.numel() > 0) kernels().attention(runtime(), args);
  return {out, logsumexp};
}

// dbias is float32 and has all of logits' dimensions but for a batch that shares it; dsinks is float32 (batch, heads): the caller adds
// up what was broadcast. Both are empty where they are not wanted. `side_by_side`: dq, dk and dv are the heads of one tensor, in
// query's form and as that would lie, which is then the first result; the next two are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_attention_backward(
    Tensor grad_out, OptionalTensor grad_logsumexp, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp,
    OptionalTensor key_padding_mask, OptionalTensor bias, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor dropout_seed,
    OptionalTensor alibi_slopes, OptionalTensor sinks, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool is_causal,
    int64_t window_left, int64_t window_right, double softcap, double dropout_p, bool bias_requires_grad, bool sinks_require_grad,
    bool side_by_side) {
  AttentionBackwardArgs args = {};
  AttentionArgs& forward = args.forward;
  forward = operator_args(query, key, value, {key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, dropout_seed, alibi_slopes, sinks, max_seqlen_q,
                                               max_seqlen_k, softmax_scale, is_causal, window_left, window_right, softcap, dropout_p});
  const bool varlen = cu_seqlens_q.has_value();
  const ScalarType dtype = scalar_type_of(query, "query");
  const Tensor* tensors[2] = {&grad_out, &out};
  const char* names[2] = {"grad_out", "out"};
  int64_t* strides[2] = {args.grad_out_stride, forward.out_stride};
  for (int i = 0; i < 2; i++) {
    check_cpu(*tensors[i], names[i]);
    STD_TORCH_CHECK(scalar_type_of(*tensors[i], names[i]) == dtype, names[i], ": dtype differs from query's");
    STD_TORCH_CHECK(shape_of(*tensors[i]) == shape_of(query), names[i], ": shape ", shape_of(*tensors[i]), " must be query's ", shape_of(query));
    check_aligned(*tensors[i], names[i]);
    row_strides(*tensors[i], names[i], varlen, strides[i]);
  }
  const std::vector<int64_t> rows = logsumexp_shape(query, forward, forward.logsumexp_stride);
  const int64_t count = varlen ? rows[0] * rows[1] : rows[0] * rows[1] * rows[2];
  const auto statistics = [&](const Tensor& t, const char* name) {
    bool same = t.dim() == int64_t(rows.size());
    for (size_t i = 0; same && i < rows.size(); i++) same = t.size(int64_t(i)) == rows[i];
    STD_TORCH_CHECK(same, name, ": shape ", shape_of(t), " must be that of the forward's logsumexp");
    return static_cast<const float*>(data_of(t, name, ScalarType::Float, count));
  };
  forward.logsumexp = const_cast<float*>(statistics(logsumexp, "logsumexp"));
  if (grad_logsumexp) args.grad_logsumexp = statistics(*grad_logsumexp, "grad_logsumexp");
  forward.out = const_cast<void*>(const_elements(out));
  args.grad_out = const_elements(grad_out);

  const auto like_key = [&](const Tensor& t, int64_t* stride) {
    stride[0] = varlen ? 0 : t.size(1) * t.size(2) * forward.head_dim;
    stride[1] = varlen ? forward.head_dim : t.size(2) * forward.head_dim;
    stride[2] = varlen ? t.size(1) * forward.head_dim : forward.head_dim;
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < t.dim(); i++) shape.push_back(t.size(i));
    return empty_result(shape, dtype);
  };
  Tensor dq = torch::stable::empty({0}, dtype), dk = dq, dv = dq;
  if (side_by_side) {
    const int64_t rows_dim = varlen ? 0 : 2, head_bytes = forward.head_dim * dtype_size(forward.dtype);
    STD_TORCH_CHECK(key.size(rows_dim) == query.size(rows_dim), "side_by_side: key's length ", key.size(rows_dim), " must be query's ", query.size(rows_dim));
    AttentionArgs all = forward;
    all.heads += 2 * forward.kv_heads;
    dq = empty_like_query(query, all, args.dq_stride);
    result_strides(all, args.dk_stride);
    result_strides(all, args.dv_stride);
    char* part = static_cast<char*>(mutable_elements(dq));
    args.dq = part;
    args.dk = part + forward.heads * head_bytes;
    args.dv = part + (forward.heads + forward.kv_heads) * head_bytes;
  } else {
    dq = empty_like_query(query, forward, args.dq_stride);
    dk = like_key(key, args.dk_stride);
    dv = like_key(value, args.dv_stride);
    args.dq = mutable_elements(dq);
    args.dk = mutable_elements(dk);
    args.dv = mutable_elements(dv);
  }
  Tensor dbias = torch::stable::empty({0}, ScalarType::Float), dsinks = torch::stable::empty({0}, ScalarType::Float);
  if (bias && bias_requires_grad) {
    const int64_t batches = bias->dim() == 4 && bias->size(0) != 1 ? forward.batch : 1;
    dbias = torch::stable::new_zeros(query, {batches, forward.heads, forward.query_length, forward.key_length}, ScalarType::Float);
    args.dbias = static_cast<float*>(mutable_elements(dbias));
    args.dbias_stride[2] = forward.key_length;
    args.dbias_stride[1] = forward.query_length * forward.key_length;
    args.dbias_stride[0] = batches == 1 ? 0 : forward.heads * args.dbias_stride[1];
  }
  if (sinks && sinks_require_grad) {
    dsinks = torch::stable::new_zeros(query, {forward.batch, forward.heads}, ScalarType::Float);
    args.dsinks = static_cast<float*>(mutable_elements(dsinks));
  }
  if (forward.batch > 0 && (query.numel() > 0 || key.numel() > 0)) together([&] { kernels().attention_backward(runtime(), args); });
  return {dq, dk, dv, dbias, dsinks};
}

AttentionMapsArgs attention_maps_args(const Tensor& query, const Tensor& key, const OptionalTensor& query_padding_mask, const AttentionOptions& options) {
  AttentionMapsArgs args = {};
  args.attention = operator_args(query, key, key, options);
  if (query_padding_mask) {
    const int64_t batch = args.attention.batch, length = args.attention.query_length;
    STD_TORCH_CHECK(!args.attention.cu_seqlens_q, "query_padding_mask: must be None with cu_seqlens");
    STD_TORCH_CHECK(query_padding_mask->dim() == 2 && query_padding_mask->size(0) == batch && query_padding_mask->size(1) == length,
                    "query_padding_mask: shape ", shape_of(*query_padding_mask), " must be (", batch, ", ", length, ")");
    args.query_padding_mask = static_cast<const uint8_t*>(data_of(*query_padding_mask, "query_padding_mask", ScalarType::Bool, batch * length));
  }
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_attention_statistics(
    Tensor query, Tensor key, OptionalTensor key_padding_mask, OptionalTensor query_padding_mask, OptionalTensor bias, OptionalTensor cu_seqlens_q,
    OptionalTensor cu_seqlens_k, OptionalTensor alibi_slopes, OptionalTensor sinks, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
    bool is_causal, int64_t window_left, int64_t window_right, double softcap, int64_t top_k) {
  AttentionMapsArgs args = attention_maps_args(query, key, query_padding_mask,
                                               {key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, {}, alibi_slopes, sinks, max_seqlen_q, max_seqlen_k,
                                                softmax_scale, is_causal, window_left, window_right, softcap, 0.0});
  STD_TORCH_CHECK(top_k >= 0 && top_k <= most_top_keys, "top_k: ", top_k, " must be 0 to ", most_top_keys);
  const bool varlen = cu_seqlens_q.has_value();
  const std::vector<int64_t> rows = logsumexp_shape(query, args.attention, args.rows_stride);
  std::vector<int64_t> keys = rows, top = rows;
  keys.back() = key.size(varlen ? 0 : 2);
  top.push_back(top_k);
  args.mass_stride[1] = keys.back();
  args.mass_stride[0] = varlen ? 0 : args.attention.heads * keys.back();
  Tensor entropy = torch::stable::empty(rows, ScalarType::Float), mass = torch::stable::empty(keys, ScalarType::Float);
  Tensor top_keys = torch::stable::empty(top, ScalarType::Long), top_probabilities = torch::stable::empty(top, ScalarType::Float);
  args.entropy = static_cast<float*>(mutable_elements(entropy));
  args.mass = static_cast<float*>(mutable_elements(mass));
  args.top_keys = static_cast<int64_t*>(mutable_elements(top_keys));
  args.top_probabilities = static_cast<float*>(mutable_elements(top_probabilities));
  args.top_k = top_k;
  if (args.attention.batch > 0) kernels().attention_maps(runtime(), args);
  return {entropy, mass, top_keys, top_probabilities};
}

// `queries`: int64, counted from the first sequence on; None: all.
Tensor cpu_attention_probabilities(Tensor query, Tensor key, OptionalTensor key_padding_mask, OptionalTensor query_padding_mask, OptionalTensor bias,
                                   OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor alibi_slopes, OptionalTensor sinks,
                                   OptionalTensor queries, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool is_causal,
                                   int64_t window_left, int64_t window_right, double softcap) {
  AttentionMapsArgs args = attention_maps_args(query, key, query_padding_mask,
                                               {key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, {}, alibi_slopes, sinks, max_seqlen_q, max_seqlen_k,
                                                softmax_scale, is_causal, window_left, window_right, softcap, 0.0});
  const bool varlen = cu_seqlens_q.has_value();
  const int64_t total = query.size(varlen ? 0 : 2);
  int64_t rows = total;
  if (queries) {
    rows = args.count = queries->numel();
    args.queries = static_cast<const int64_t*>(data_of(*queries, "queries", ScalarType::Long, rows));
    for (int64_t i = 0; i < rows; i++)
      STD_TORCH_CHECK(args.queries[i] >= 0 && args.queries[i] < total, "queries: ", args.queries[i], " must be 0 to ", total - 1);
  }
  args.width = varlen ? max_seqlen_k : key.size(2);
  STD_TORCH_CHECK(args.width >= 0, "max_seqlen_k: ", args.width, " must not be negative");
  std::vector<int64_t> shape = {args.attention.heads, rows, args.width};
  if (!varlen) shape.insert(shape.begin(), args.attention.batch);
  Tensor out = empty_result(shape, query.scalar_type());
  args.out_stride[2] = args.width;
  args.out_stride[1] = rows * args.width;
  args.out_stride[0] = varlen ? 0 : args.attention.heads * args.out_stride[1];
  args.probabilities = mutable_elements(out);
  if (out.numel() > 0) kernels().attention_maps(runtime(), args);
  return out;
}

}  // namespace
}  // namespace bigmodel

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel, m) {
  m.def("cpu_philox(Tensor seed, int rows, int columns, str rule, int first_row, int head, int sequence, float dropout_p) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("cpu_attention(Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, Tensor? bias, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k, Tensor? dropout_seed, Tensor? alibi_slopes, Tensor? sinks, SymInt max_seqlen_q, SymInt max_seqlen_k, "
        "float softmax_scale, bool is_causal, SymInt window_left, SymInt window_right, float softcap, float dropout_p) -> (Tensor, Tensor)");
  m.def("cpu_attention_statistics(Tensor query, Tensor key, Tensor? key_padding_mask, Tensor? query_padding_mask, Tensor? bias, "
        "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? sinks, SymInt max_seqlen_q, SymInt max_seqlen_k, "
        "float softmax_scale, bool is_causal, SymInt window_left, SymInt window_right, float softcap, SymInt top_k) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_attention_probabilities(Tensor query, Tensor key, Tensor? key_padding_mask, Tensor? query_padding_mask, Tensor? bias, "
        "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? sinks, Tensor? queries, SymInt max_seqlen_q, "
        "SymInt max_seqlen_k, float softmax_scale, bool is_causal, SymInt window_left, SymInt window_right, float softcap) -> Tensor");
  m.def("cpu_attention_backward(Tensor grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
        "Tensor? key_padding_mask, Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? dropout_seed, Tensor? alibi_slopes, "
        "Tensor? sinks, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, bool is_causal, SymInt window_left, SymInt window_right, "
        "float softcap, float dropout_p, bool bias_requires_grad, bool sinks_require_grad, bool side_by_side) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel, CPU, m) {
  m.impl("cpu_philox", TORCH_BOX(&bigmodel::cpu_philox));
  m.impl("cpu_attention_statistics", TORCH_BOX(&bigmodel::cpu_attention_statistics));
  m.impl("cpu_attention_probabilities", TORCH_BOX(&bigmodel::cpu_attention_probabilities));
  m.impl("cpu_attention", TORCH_BOX(&bigmodel::cpu_attention));
  m.impl("cpu_attention_backward", TORCH_BOX(&bigmodel::cpu_attention_backward));
}
