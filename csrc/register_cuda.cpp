// The CUDA ops as torch sees them: schemas, checks and parameters; no arithmetic. LibTorch's stable ABI only. Here attention and the
// linear layer; norms and whole layers in register_cuda_norm.cpp and register_cuda_layer.cpp.
#include "register_cuda.h"

#include "linear/launch.h"

namespace bigmodel::cuda {

// What a copy of 16 bytes at a time needs of query, key and value.
void check_rows(const Tensor& tensor, const char* name) {
  const int64_t rank = tensor.dim();
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.stride(rank - 1) == 1, name, ": the last dimension must be contiguous");
  STD_TORCH_CHECK(tensor.size(rank - 1) % 8 == 0, name, ": head_dim ", tensor.size(rank - 1), " must be a multiple of 8");
  STD_TORCH_CHECK(aligned(tensor), name, ": must start at a multiple of 16 bytes");
  for (int64_t i = 0; i + 1 < rank; i++)
    STD_TORCH_CHECK(tensor.size(i) <= 1 || tensor.stride(i) % 8 == 0, name, ": stride ", tensor.stride(i), " of dimension ", i, " must be a multiple of 8");
}

// What attention and its decoding have in common beside the tensors. float_sinks keeps the converted sinks alive; a window of
// `unlimited` or more is wider than any sequence.
template <typename Params>
void logit_params(Params& p, Call& call, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, Tensor& float_sinks, double softmax_scale,
                  double softcap, bool is_causal, int64_t window_left, int64_t window_right, int64_t unlimited) {
  if (alibi_slopes) {
    const int64_t dims = alibi_slopes->dim();
    require(*alibi_slopes, "alibi_slopes", ScalarType::Float, dims == 2 ? 2 : 1);
    STD_TORCH_CHECK(alibi_slopes->size(dims - 1) == p.heads && (dims == 1 || alibi_slopes->size(0) == p.batch) && alibi_slopes->stride(dims - 1) == 1,
                    "alibi_slopes: shape ", shape_of(*alibi_slopes), " must be (", p.heads, ",) or (", p.batch, ", ", p.heads, "), contiguous");
    p.alibi_slopes = static_cast<const float*>(call.use(*alibi_slopes, "alibi_slopes", false));
    p.alibi_stride = dims == 2 ? alibi_slopes->stride(0) : 0;
  }
  if (sinks) {
    STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == p.heads, "sinks: shape ", shape_of(*sinks), " must be (", p.heads, ",)");
    float_sinks = torch::stable::contiguous(torch::stable::to(*sinks, ScalarType::Float));
    p.sinks = static_cast<const float*>(call.use(float_sinks, "sinks", false));
  }
  STD_TORCH_CHECK(std::isfinite(softmax_scale), "softmax_scale: must be finite");
  STD_TORCH_CHECK(softcap >= 0 && std::isfinite(softcap), "softcap: ", softcap, " must be 0 (none) or positive");
  p.softmax_scale = float(softmax_scale);
  p.softcap = float(softcap);
  p.window_left = window_left < 0 || window_left >= unlimited ? -1 : int32_t(window_left);
  p.window_right = is_causal ? 0 : window_right < 0 || window_right >= unlimited ? -1 : int32_t(window_right);
}

AttentionParams attention_params(Call& call, const AttentionInputs& inputs, Tensor& float_sinks) {
  const auto& [query, key, value, key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, dropout_seed, alibi_slopes, sinks, max_seqlen_q,
               max_seqlen_k, softmax_scale, is_causal, window_left, window_right, softcap, dropout_p] = inputs;
  AttentionParams p = {};
  // ---- shapes ----
  const bool packed = cu_seqlens_q.has_value();
  STD_TORCH_CHECK(packed == cu_seqlens_k.has_value(), "cu_seqlens_k: must be given with cu_seqlens_q");
  const int64_t rank = packed ? 3 : 4;
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "query: dtype must be float16 or bfloat16");
  const Tensor* tensors[3] = {&query, &key, &value};
  const char* names[3] = {"query", "key", "value"};
  int64_t* strides[3] = {p.query_stride, p.key_stride, p.value_stride};
  for (int i = 0; i < 3; i++) {
    const Tensor& t = require(*tensors[i], names[i], dtype, rank);
    STD_TORCH_CHECK(t.size(rank - 1) == query.size(rank - 1), names[i], ": head_dim ", t.size(rank - 1), " differs from query's ", query.size(rank - 1));
    check_rows(t, names[i]);
    strides[i][0] = packed ? 0 : t.stride(0);
    strides[i][1] = t.stride(1);
    strides[i][2] = packed ? t.stride(0) : t.stride(2);
  }
  STD_TORCH_CHECK(shape_of(key) == shape_of(value), "value: shape ", shape_of(value), " must be key's ", shape_of(key));
  p.head_dim = narrow(query.size(rank - 1), "query");
  p.heads = narrow(query.size(1), "query");
  p.kv_heads = narrow(key.size(1), "key");
  STD_TORCH_CHECK(p.head_dim >= 8 && p.head_dim <= 256, "query: head_dim ", p.head_dim, " must be 8 to 256");
  STD_TORCH_CHECK(p.kv_heads >= 1 && p.heads % p.kv_heads == 0, "key: ", p.kv_heads, " kv heads do not divide ", p.heads, " query heads");

  if (packed) {
    STD_TORCH_CHECK(!key_padding_mask && !bias, "key_padding_mask, bias: must be None with cu_seqlens");
    STD_TORCH_CHECK(cu_seqlens_q->numel() == cu_seqlens_k->numel() && cu_seqlens_q->numel() >= 1, "cu_seqlens_k: shape ", shape_of(*cu_seqlens_k), " must be cu_seqlens_q's");
    // Their values lie on the device; ops/attention/checks.py looks at them.
    const std::pair<const Tensor*, const char*> both[] = {{&*cu_seqlens_q, "cu_seqlens_q"}, {&*cu_seqlens_k, "cu_seqlens_k"}};
    for (const auto& [cu, name] : both)
      STD_TORCH_CHECK(require(*cu, name, ScalarType::Int, 1).stride(0) == 1 || cu->numel() <= 1, name, ": must be contiguous");
    p.cu_seqlens_q = static_cast<const int32_t*>(call.use(*cu_seqlens_q, "cu_seqlens_q", false));
    p.cu_seqlens_k = static_cast<const int32_t*>(call.use(*cu_seqlens_k, "cu_seqlens_k", false));
    p.batch = narrow(cu_seqlens_q->numel() - 1, "cu_seqlens_q");
    p.query_length = narrow(max_seqlen_q, "max_seqlen_q");
    p.key_length = narrow(max_seqlen_k, "max_seqlen_k");
    p.total_queries = query.size(0);
    p.total_keys = key.size(0);
    p.logsumexp_stride[1] = query.size(0);
  } else {
    STD_TORCH_CHECK(key.size(0) == query.size(0), "key: batch ", key.size(0), " must be query's ", query.size(0));
    p.batch = narrow(query.size(0), "query");
    p.query_length = narrow(query.size(2), "query");
    p.key_length = narrow(key.size(2), "key");
    p.logsumexp_stride[0] = int64_t(p.heads) * query.size(2);
    p.logsumexp_stride[1] = query.size(2);
  }
  STD_TORCH_CHECK(p.batch <= 65535 && p.heads <= 65535, "query: at most 65535 sequences and heads, not ", p.batch, " and ", p.heads);

  // ---- what else the logits go through ----
  if (key_padding_mask) {
    require(*key_padding_mask, "key_padding_mask", ScalarType::Bool, 2);
    STD_TORCH_CHECK(key_padding_mask->size(0) == p.batch && key_padding_mask->size(1) == p.key_length, "key_padding_mask: shape ",
                    shape_of(*key_padding_mask), " must be (", p.batch, ", ", p.key_length, ")");
    STD_TORCH_CHECK(key_padding_mask->stride(1) == 1 || p.key_length <= 1, "key_padding_mask: the last dimension must be contiguous");
    p.key_padding_mask = static_cast<const uint8_t*>(call.use(*key_padding_mask, "key_padding_mask", false));
    p.mask_stride = key_padding_mask->stride(0);
  }
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == dtype || bias->scalar_type() == ScalarType::Float, "bias: dtype must be query's or float32");
    STD_TORCH_CHECK(bias->dim() <= 4, "bias: shape ", shape_of(*bias), " must have at most 4 dimensions");
    const int64_t full[4] = {p.batch, p.heads, p.query_length, p.key_length};
    for (int64_t i = 0; i < bias->dim(); i++) {
      const int64_t at = 4 - bias->dim() + i;
      STD_TORCH_CHECK(bias->size(i) == 1 || bias->size(i) == full[at], "bias: shape ", shape_of(*bias), " does not broadcast to (", full[0], ", ", full[1], ", ", full[2], ", ", full[3], ")");
      p.bias_stride[at] = bias->size(i) == 1 ? 0 : bias->stride(i);
    }
    p.bias = call.use(*bias, "bias", false);
    p.bias_is_float = bias->scalar_type() == ScalarType::Float;
  }
  const ElementDropout dropout = element_dropout(call, dropout_seed, dropout_p);
  p.dropout_seed = dropout.seed;
  p.dropout_threshold = dropout.threshold;
  p.dropout_scale = dropout.scale;
  logit_params(p, call, inputs.alibi_slopes, inputs.sinks, float_sinks, softmax_scale, softcap, is_causal, window_left, window_right,
               int64_t(p.query_length) + p.key_length);

  p.query = call.use(query, "query", false);
  p.key = call.use(key, "key", false);
  p.value = call.use(value, "value", false);
  return p;
}

// A result like `tensor` of h heads, with rows of all of them side by side: (B, H, S, D) laid out as (B, S, H, D), or (total, H, D).
Tensor result_like(const Tensor& tensor, int64_t h, int64_t (&stride)[3]) {
  const int64_t d = tensor.size(tensor.dim() - 1);
  stride[1] = d;
  stride[2] = h * d;
  if (tensor.dim() == 3) return torch::stable::new_empty(tensor, {tensor.size(0), h, d});
  stride[0] = tensor.size(2) * h * d;
  return torch::stable::transpose(torch::stable::new_empty(tensor, {tensor.size(0), tensor.size(2), h, d}), 1, 2);
}
Tensor rows_like(const Tensor& query) {
  if (query.dim() == 3) return torch::stable::new_empty(query, {query.size(1), query.size(0)}, ScalarType::Float);
  return torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
}

void launch_attention(const AttentionParams& p, Call& call, const Tensor& query, const Tensor& key) {
  if (query.numel() == 0) return;
  const bool is_bfloat16 = query.scalar_type() == ScalarType::BFloat16;
  if (architecture(call.device()) == 90 && key.numel() > 0)
    attention_sm90(p, is_bfloat16, multiprocessors(call.device()), call.stream());
  else
    attention_sm80(p, is_bfloat16, call.stream());
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, OptionalTensor key_padding_mask, OptionalTensor bias,
                                     OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor dropout_seed,
                                     OptionalTensor alibi_slopes, OptionalTensor sinks, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                     double softmax_scale, bool is_causal, int64_t window_left, int64_t window_right, double softcap,
                                     double dropout_p) {
  Call call(query);
  Tensor float_sinks;
  AttentionParams p = attention_params(
      call, {query, key, value, key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, dropout_seed, alibi_slopes, sinks, max_seqlen_q, max_seqlen_k,
             softmax_scale, is_causal, window_left, window_right, softcap, dropout_p}, float_sinks);
  Tensor out = result_like(query, query.size(1), p.out_stride), logsumexp = rows_like(query);
  p.out = call.use(out, "out", true);
  p.logsumexp = static_cast<float*>(call.use(logsumexp, "logsumexp", true));
  launch_attention(p, call, query, key);
  return {out, logsumexp};
}

// Where `deterministic` forbids to add to one place from several blocks, Hopper's backward takes two passes over the tiles, and dbias, which is
// float32, has the shape of all logits; otherwise that of bias. side_by_side: dq, dk and dv are parts of one tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, OptionalTensor grad_logsumexp, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp,
    OptionalTensor key_padding_mask, OptionalTensor bias, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor dropout_seed,
    OptionalTensor alibi_slopes, OptionalTensor sinks, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool is_causal,
    int64_t window_left, int64_t window_right, double softcap, double dropout_p, bool bias_requires_grad, bool deterministic, bool side_by_side) {
  Call call(query);
  Tensor float_sinks;
  AttentionBackwardParams params = {};
  AttentionParams& p = params.p;
  p = attention_params(
      call, {query, key, value, key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, dropout_seed, alibi_slopes, sinks, max_seqlen_q, max_seqlen_k,
             softmax_scale, is_causal, window_left, window_right, softcap, dropout_p}, float_sinks);

  // ---- the forward's results, and their gradients ----
  const int64_t rank = query.dim();
  int64_t* strides[2] = {p.out_stride, params.grad_out_stride};
  const Tensor* tensors[2] = {&out, &grad_out};
  const char* names[2] = {"out", "grad_out"};
  for (int i = 0; i < 2; i++) {
    const Tensor& t = require(*tensors[i], names[i], query.scalar_type(), rank);
    STD_TORCH_CHECK(shape_of(t) == shape_of(query), names[i], ": shape ", shape_of(t), " must be query's ", shape_of(query));
    check_rows(t, names[i]);
    strides[i][0] = rank == 3 ? 0 : t.stride(0);
    strides[i][1] = t.stride(1);
    strides[i][2] = rank == 3 ? t.stride(0) : t.stride(2);
  }
  Tensor delta = rows_like(query);
  const auto rows = [&](const Tensor& t, const char* name) {
    require(t, name, ScalarType::Float, rank - 1);
    STD_TORCH_CHECK(shape_of(t) == shape_of(delta) && t.is_contiguous(), name, ": shape ", shape_of(t), " must be ", shape_of(delta), ", contiguous");
    return static_cast<float*>(call.use(t, name, false));
  };
  p.logsumexp = rows(logsumexp, "logsumexp");
  if (grad_logsumexp) params.grad_logsumexp = rows(*grad_logsumexp, "grad_logsumexp");
  p.out = call.use(out, "out", false);
  params.grad_out = call.use(grad_out, "grad_out", false);

  // ---- the results ----
  Tensor dq, dk, dv;
  const bool packed = rank == 3;
  if (side_by_side) {
    STD_TORCH_CHECK(query.size(0) == key.size(0) && (packed || query.size(2) == key.size(2)), "side_by_side: needs a key for each query");
    Tensor whole = result_like(query, p.heads + 2 * p.kv_heads, params.dq_stride);
    dq = torch::stable::narrow(whole, 1, 0, p.heads);
    dk = torch::stable::narrow(whole, 1, p.heads, p.kv_heads);
    dv = torch::stable::narrow(whole, 1, p.heads + p.kv_heads, p.kv_heads);
    for (int i = 0; i < 3; i++) params.dk_stride[i] = params.dv_stride[i] = params.dq_stride[i];
  } else {
    dq = result_like(query, p.heads, params.dq_stride);
    dk = result_like(key, p.kv_heads, params.dk_stride);
    dv = result_like(value, p.kv_heads, params.dv_stride);
  }
  params.delta = static_cast<float*>(call.use(delta, "delta", true));
  params.dq = call.use(dq, "dq", true);
  params.dk = call.use(dk, "dk", true);
  params.dv = call.use(dv, "dv", true);
  Tensor dbias = torch::stable::new_empty(query, {0}, ScalarType::Float);
  if (bias && bias_requires_grad) {
    const int64_t full[4] = {p.batch, p.heads, p.query_length, p.key_length};
    std::vector<int64_t> size(full, full + 4);
    if (!deterministic)
      for (int64_t i = 0; i < 4; i++) {
        const int64_t at = bias->dim() - 4 + i;
        size[i] = at < 0 ? 1 : bias->size(at);
      }
    dbias = torch::stable::new_zeros(query, size, ScalarType::Float);
    for (int i = 0; i < 4; i++) params.dbias_stride[i] = size[i] == 1 ? 0 : dbias.stride(i);
    params.dbias = static_cast<float*>(call.use(dbias, "dbias", true));
  }
  const bool is_bfloat16 = query.scalar_type() == ScalarType::BFloat16;
  const bool hopper = query.numel() > 0 && key.numel() > 0 && architecture(call.device()) == 90;
  Tensor dq_sum;
  if (hopper && !deterministic && one_pass::supports(p)) {
    if (one_pass::adds_up(p)) {
      dq_sum = torch::stable::new_zeros(query, {one_pass::sum_size(p)}, ScalarType::Float);
      params.dq_sum = static_cast<float*>(call.use(dq_sum, "dq_sum", true));
    }
    attention_backward_one_pass_sm90(params, is_bfloat16, call.stream());
  } else if (hopper)
    attention_backward_sm90(params, is_bfloat16, call.stream());
  else if (query.numel() > 0 || key.numel() > 0)
    attention_backward_sm80(params, is_bfloat16, call.stream());
  return {dq, dk, dv, dbias, delta};
}

// `counters` are zeros, and zeros again when the kernel has run: one for each tile of rows (decode_tiles), for the splits that have come.
// splits 0: as many as the shapes ask for.
std::tuple<Tensor, Tensor> decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, Tensor counters, OptionalTensor block_table,
                                  OptionalTensor alibi_slopes, OptionalTensor sinks, double softmax_scale, bool is_causal, int64_t window_left,
                                  int64_t window_right, double softcap, int64_t splits) {
  Call call(query);
  DecodeParams p = {};
  // ---- shapes ----
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "query: dtype must be float16 or bfloat16");
  const Tensor* tensors[3] = {&query, &key_cache, &value_cache};
  const char* names[3] = {"query", "key_cache", "value_cache"};
  int64_t* strides[3] = {p.query_stride, p.key_stride, p.value_stride};
  for (int i = 0; i < 3; i++) {
    const Tensor& t = require(*tensors[i], names[i], dtype, 4);
    STD_TORCH_CHECK(t.size(3) == query.size(3), names[i], ": head_dim ", t.size(3), " differs from query's ", query.size(3));
    check_rows(t, names[i]);
    for (int64_t d = 0; d < 3; d++) strides[i][d] = t.stride(d);
  }
  STD_TORCH_CHECK(shape_of(key_cache) == shape_of(value_cache), "value_cache: shape ", shape_of(value_cache), " must be key_cache's ", shape_of(key_cache));
  p.batch = narrow(query.size(0), "query");
  p.heads = narrow(query.size(1), "query");
  p.query_length = narrow(query.size(2), "query");
  p.head_dim = narrow(query.size(3), "query");
  p.pages = narrow(key_cache.size(0), "key_cache");
  p.kv_heads = narrow(key_cache.size(1), "key_cache");
  p.page_size = narrow(key_cache.size(2), "key_cache");
  STD_TORCH_CHECK(p.head_dim >= 8 && p.head_dim <= 256, "query: head_dim ", p.head_dim, " must be 8 to 256");
  STD_TORCH_CHECK(p.kv_heads >= 1 && p.heads % p.kv_heads == 0, "key_cache: ", p.kv_heads, " kv heads do not divide ", p.heads, " query heads");
  STD_TORCH_CHECK(p.batch <= 65535 && p.kv_heads <= 65535, "query: at most 65535 sequences and kv heads, not ", p.batch, " and ", p.kv_heads);

  // ---- lengths and pages: their values lie on the device, where the kernel reads none that would lead outside ----
  STD_TORCH_CHECK(require(cache_seqlens, "cache_seqlens", ScalarType::Int, 1).size(0) == p.batch, "cache_seqlens: shape ", shape_of(cache_seqlens), " must be (", p.batch, ",)");
  p.cache_seqlens = static_cast<const int32_t*>(call.use(cache_seqlens, "cache_seqlens", false));
  p.seqlens_stride = cache_seqlens.stride(0);
  int64_t capacity = p.page_size;
  if (block_table) {
    STD_TORCH_CHECK(require(*block_table, "block_table", ScalarType::Int, 2).size(0) == p.batch, "block_table: shape ", shape_of(*block_table), " must be (", p.batch, ", blocks)");
    p.block_table = static_cast<const int32_t*>(call.use(*block_table, "block_table", false));
    for (int64_t d = 0; d < 2; d++) p.table_stride[d] = block_table->stride(d);
    capacity *= block_table->size(1);
  } else {
    STD_TORCH_CHECK(p.pages == p.batch, "key_cache: batch ", p.pages, " must be query's ", p.batch);
  }
  // The sum of any two of capacity, queries and window fits 32 bits.
  const int64_t group = p.heads / p.kv_heads, unlimited = capacity + p.query_length;
  STD_TORCH_CHECK(unlimited < int64_t(1) << 30 && group * p.query_length < int64_t(1) << 30, "key_cache, query: ", capacity, " keys and ", group * p.query_length,
                  " rows are more than the kernel counts");
  p.capacity = int32_t(capacity);
  Tensor float_sinks;
  logit_params(p, call, alibi_slopes, sinks, float_sinks, softmax_scale, softcap, is_causal, window_left, window_right, unlimited);
  p.query = call.use(query, "query", false);
  p.key = call.use(key_cache, "key_cache", false);
  p.value = call.use(value_cache, "value_cache", false);

  // ---- the results, and what the splits leave ----
  Tensor out = result_like(query, query.size(1), p.out_stride), logsumexp = rows_like(query);
  p.out = call.use(out, "out", true);
  p.logsumexp = static_cast<float*>(call.use(logsumexp, "logsumexp", true));
  p.logsumexp_stride[0] = int64_t(p.heads) * p.query_length;
  p.logsumexp_stride[1] = p.query_length;
  if (query.numel() == 0) return {out, logsumexp};
  const int64_t tiles = decode_tiles(p.batch, p.kv_heads, group, p.query_length);
  STD_TORCH_CHECK(splits >= 0 && splits <= most_splits, "splits: ", splits, " must be 0 (from the shapes) to ", most_splits);
  p.splits = splits ? int32_t(splits) : decode_splits(tiles, capacity, int64_t(decode_resident(architecture(call.device()))) * multiprocessors(call.device()));
  narrow(tiles / p.batch / p.kv_heads * p.splits, "splits");
  STD_TORCH_CHECK(require(counters, "counters", ScalarType::Int, 1).is_contiguous() && counters.numel() >= tiles, "counters: shape ", shape_of(counters),
                  " must be (", tiles, ",) or more, contiguous");
  p.counters = static_cast<uint32_t*>(call.use(counters, "counters", true));
  Tensor partial, partial_logsumexp;
  if (p.splits > 1) {
    const int64_t rows = tiles * p.splits * (group * p.query_length < decode_rows ? group * p.query_length : decode_rows);
    partial = torch::stable::new_empty(query, {rows, p.head_dim}, ScalarType::Float);
    partial_logsumexp = torch::stable::new_empty(query, {rows}, ScalarType::Float);
    p.partial = static_cast<float*>(call.use(partial, "partial", true));
    p.partial_logsumexp = static_cast<float*>(call.use(partial_logsumexp, "partial_logsumexp", true));
  }
  attention_decode(p, dtype == ScalarType::BFloat16, call.stream());
  return {out, logsumexp};
}

Activation activation_of(const std::string& name) {
  const char* names[] = {"none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu"};
  for (int i = 0; i < 6; i++)
    if (name == names[i]) return Activation(i);
  STD_TORCH_CHECK(false, "activation: '", name, "' is unknown");
}

// The kernels of the linear layer by number: Hopper's forms, or instead of them sm_80's only one; then the one for few rows.
constexpr int few_rows_form = linear_sm90_forms;
int form_of(const LinearParams& p, bool hopper, int multiprocessors) {
  return p.rows <= most_few_rows ? few_rows_form : hopper ? linear_sm90_form(p, multiprocessors) : 0;
}

// Which of them a call with these sizes runs on Hopper with so many multiprocessors.
int64_t linear_form(int64_t rows, int64_t features, std::vector<int64_t> out_features, int64_t multiprocessors) {
  LinearParams p = {};
  p.rows = narrow(rows, "rows");
  p.features = narrow(features, "features");
  STD_TORCH_CHECK(!out_features.empty() && out_features.size() <= max_weights, "out_features: ", out_features.size(), " numbers; 1 to ", max_weights,
                  " are allowed");
  for (const int64_t out : out_features) p.out_features[p.weights++] = narrow(out, "out_features");
  STD_TORCH_CHECK(multiprocessors > 0, "multiprocessors: ", multiprocessors, " must be 1 or more");
  return form_of(p, true, narrow(multiprocessors, "multiprocessors"));
}

// What products of rows with weights side by side have in common, beside what is done to the result: operands checked, and the launch.
class Linear {
 public:
  LinearParams p = {};

  Linear(Call& call, const Tensor& x, const char* name, bool conv1d, const std::string& activation) : call_(call), name_(name), dtype_(x.scalar_type()) {
    STD_TORCH_CHECK(dtype_ == ScalarType::Half || dtype_ == ScalarType::BFloat16, name, ": dtype must be float16 or bfloat16");
    p.conv1d = conv1d;
    p.activation = activation_of(activation);
    p.x = matrix(x, name);
    p.rows = narrow(x.size(0), name);
    p.features = narrow(x.size(1), name);
    p.x_stride = x.size(0) > 1 ? x.stride(0) : x.size(1);
  }

  void* matrix(const Tensor& t, const char* name, bool writable = false) {
    STD_TORCH_CHECK(require(t, name, dtype_, 2).size(1) % 8 == 0 && (t.size(1) <= 1 || t.stride(1) == 1) && (t.size(0) <= 1 || t.stride(0) % 8 == 0) && aligned(t),
                    name, ": shape ", shape_of(t), ": rows must be multiples of 8 elements that start at multiples of 16 bytes");
    return call_.use(t, name, writable);
  }

  // The next weight to the right, and its number of features out.
  int64_t add(const Tensor& w, const char* name) {
    p.weight[p.weights] = matrix(w, name);
    STD_TORCH_CHECK(w.is_contiguous(), name, ": must be contiguous");
    const int64_t in = w.size(p.conv1d ? 0 : 1), out = w.size(p.conv1d ? 1 : 0);
    STD_TORCH_CHECK(in == p.features, name, ": shape ", shape_of(w), " takes ", in, " features; ", name_, " has ", p.features);
    STD_TORCH_CHECK(out % 8 == 0, name, ": shape ", shape_of(w), " gives ", out, " features, which must be a multiple of 8");
    p.out_features[p.weights++] = narrow(out, name);
    p.out_stride += out;
    return out;
  }

  // A matrix of the result's shape.
  void* beside(const Tensor& t, const char* name, bool writable = false) {
    STD_TORCH_CHECK(require(t, name, dtype_, 2).is_contiguous() && t.size(0) == p.rows && t.size(1) == p.out_stride, name, ": shape ", shape_of(t), " must be (",
                    p.rows, ", ", p.out_stride, "), contiguous");
    return matrix(t, name, writable);
  }

  // form: which kernel, or -1 for the fastest.
  void launch(int64_t form = -1) {
    if (p.rows == 0 || p.out_stride == 0) return;
    STD_TORCH_CHECK(p.features > 0, name_, ": shape (", p.rows, ", 0) has no features");
    const bool is_bfloat16 = dtype_ == ScalarType::BFloat16, hopper = architecture(call_.device()) == 90;
    STD_TORCH_CHECK(form == -1 || form == few_rows_form || (form >= 0 && form < (hopper ? linear_sm90_forms : 1)), "form: ", form, " must be -1, ",
                    few_rows_form, " or ", hopper ? "on Hopper 0 to " + std::to_string(linear_sm90_forms - 1) : "0");
    const int count = multiprocessors(call_.device()), chosen = form == -1 ? form_of(p, hopper, count) : int(form);
    if (chosen == few_rows_form)
      linear_few_rows(p, is_bfloat16, call_.stream());
    else if (hopper)
      linear_sm90(p, is_bfloat16, chosen, count, call_.stream());
    else
      linear_sm80(p, is_bfloat16, call_.stream());
  }

 private:
  Call& call_;
  const char* name_;  // of x
  ScalarType dtype_;
};

bool is_conv1d(const std::string& layout) {
  STD_TORCH_CHECK(layout == "linear" || layout == "conv1d", "weight_layout: '", layout, "' is unknown");
  return layout == "conv1d";
}

// (out, and the pre-activation where it is wanted: otherwise empty). form: which kernel, or -1 for the fastest.
std::tuple<Tensor, Tensor> linear(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, OptionalTensor residual,
                                  OptionalTensor dropout_seed, Text weight_layout, Text activation, double dropout_p,
                                  bool keep_preactivation, int64_t form) {
  Call call(x);
  const ScalarType dtype = x.scalar_type();
  Linear product(call, x, "x", is_conv1d(weight_layout), activation);
  LinearParams& p = product.p;
  STD_TORCH_CHECK(!weights.empty() && weights.size() <= max_weights, "weights: ", weights.size(), " tensors; 1 to ", max_weights, " are allowed");
  STD_TORCH_CHECK(biases.empty() || biases.size() == weights.size(), "biases: ", biases.size(), " tensors for ", weights.size(), " weights");
  for (size_t i = 0; i < weights.size(); i++) {
    const int64_t out = product.add(weights[i], "weights");
    if (biases.empty()) continue;
    STD_TORCH_CHECK(require(biases[i], "biases", dtype, 1).size(0) == out && biases[i].is_contiguous() && aligned(biases[i]), "biases: shape ",
                    shape_of(biases[i]), " must be (", out, ",), contiguous, from a multiple of 16 bytes");
    p.bias[i] = call.use(biases[i], "biases", false);
  }
  if (residual) p.residual = product.beside(*residual, "residual");
  p.dropout = element_dropout(call, dropout_seed, dropout_p);
  STD_TORCH_CHECK(!dropout_seed || p.weights == 1, "weights: dropout goes with one weight, not ", p.weights);
  Tensor out = torch::stable::new_empty(x, {p.rows, p.out_stride});
  Tensor preactivation = torch::stable::new_empty(x, {keep_preactivation ? p.rows : 0, p.out_stride});
  p.out = product.beside(out, "out", true);
  if (keep_preactivation) p.preactivation = product.beside(preactivation, "preactivation", true);
  product.launch(form);
  return {out, preactivation};
}

// The gradient of what the activation of a feed-forward block was given, from that of the block's output: grad w_out^T times the
// activation's derivative. With it the hidden layer, and sums of the gradient's columns over each 16 rows, where they are wanted:
// otherwise empty. w_out lies as the block has it, where it is multiplied by from the other side.
std::tuple<Tensor, Tensor, Tensor> hidden_backward(Tensor grad, Tensor w_out, Tensor preactivation, Text weight_layout, Text activation,
                                                   bool need_hidden, bool need_sums, int64_t form) {
  Call call(grad);
  Linear product(call, grad, "grad", !is_conv1d(weight_layout), activation);
  LinearParams& p = product.p;
  product.add(w_out, "w_out");
  p.activated = product.beside(preactivation, "preactivation");
  const int64_t parts = need_sums ? (p.rows + column_part_rows - 1) / column_part_rows : 0;
  Tensor out = torch::stable::new_empty(grad, {p.rows, p.out_stride});
  Tensor hidden = torch::stable::new_empty(grad, {need_hidden ? p.rows : 0, p.out_stride});
  Tensor sums = torch::stable::new_empty(grad, {parts, p.out_stride}, ScalarType::Float);
  p.out = product.beside(out, "out", true);
  if (need_hidden) p.hidden = product.beside(hidden, "hidden", true);
  if (need_sums) p.column_parts = static_cast<float*>(call.use(sums, "sums", true));
  product.launch(form);
  return {out, hidden, sums};
}

const std::string optional_and_options =
    "Tensor? key_padding_mask=None, Tensor? bias=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? dropout_seed=None, "
    "Tensor? alibi_slopes=None, Tensor? sinks=None, *, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, float softmax_scale, "
    "bool is_causal=False, SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, float dropout_p=0.0";
const std::string attention_schema = "cuda_attention(Tensor query, Tensor key, Tensor value, " + optional_and_options + ") -> (Tensor, Tensor)";
const std::string attention_backward_schema =
    "cuda_attention_backward(Tensor grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, " +
    optional_and_options + ", bool bias_requires_grad=False, bool deterministic=False, bool side_by_side=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)";

#if !defined(__CUDACC__)
void set_seed(int64_t value) { seed = uint64_t(value); }
void set_architecture(int64_t value) {
  STD_TORCH_CHECK(value == 80 || value == 90, "value: ", value, " must be 80 or 90");
  emulated_architecture = value;
}
#endif

}  // namespace bigmodel::cuda

#if defined(__CUDACC__)
STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel, m) {
#else
STABLE_TORCH_LIBRARY(bigmodel_emulator, m) {
  m.def("set_seed(int value) -> ()");
  m.def("set_architecture(int value) -> ()");
#endif
  m.def(bigmodel::cuda::attention_schema.c_str());
  m.def(bigmodel::cuda::attention_backward_schema.c_str());
  m.def("cuda_attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, Tensor(a!) counters, "
        "Tensor? block_table=None, Tensor? alibi_slopes=None, Tensor? sinks=None, *, float softmax_scale, bool is_causal=True, "
        "SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, SymInt splits=0) -> (Tensor, Tensor)");
  m.def("cuda_linear(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? residual=None, Tensor? dropout_seed=None, *, "
        "str weight_layout=\"linear\", str activation=\"none\", float dropout_p=0.0, bool keep_preactivation=False, int form=-1) -> (Tensor, Tensor)");
  m.def("cuda_hidden_backward(Tensor grad, Tensor w_out, Tensor preactivation, *, str weight_layout=\"linear\", str activation, "
        "bool need_hidden=False, bool need_sums=False, int form=-1) -> (Tensor, Tensor, Tensor)");
  m.def("cuda_linear_form(int rows, int features, int[] out_features, int multiprocessors) -> int");
}

#if defined(__CUDACC__)
STABLE_TORCH_LIBRARY_IMPL(bigmodel, CompositeExplicitAutograd, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(bigmodel_emulator, CompositeExplicitAutograd, m) {
  m.impl("set_seed", TORCH_BOX(&bigmodel::cuda::set_seed));
  m.impl("set_architecture", TORCH_BOX(&bigmodel::cuda::set_architecture));
#endif
  m.impl("cuda_linear_form", TORCH_BOX(&bigmodel::cuda::linear_form));
}

BM_CUDA_OPS_IMPL(m) {
  m.impl("cuda_attention", TORCH_BOX(&bigmodel::cuda::attention));
  m.impl("cuda_attention_backward", TORCH_BOX(&bigmodel::cuda::attention_backward));
  m.impl("cuda_attention_decode", TORCH_BOX(&bigmodel::cuda::decode));
  m.impl("cuda_linear", TORCH_BOX(&bigmodel::cuda::linear));
  m.impl("cuda_hidden_backward", TORCH_BOX(&bigmodel::cuda::hidden_backward));
}
