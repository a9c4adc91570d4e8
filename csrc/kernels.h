// What the instruction-set objects and the registration share: plain argument structs, one table of functions per
// instruction set, and the little runtime (threads, scratch memory) that kernels are lent. No torch header comes in here,
// so nothing of torch is compiled with AVX-512 flags.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bigmodel {

enum class Dtype : int32_t { float32, bfloat16, float16 };
enum class Activation : int32_t { none, gelu, gelu_tanh, quick_gelu, relu, silu };
enum class WeightLayout : int32_t { linear, conv1d };     // (out, in) as nn.Linear, (in, out) as GPT-2's Conv1D
enum class NormPosition : int32_t { none, pre, post };

inline constexpr int64_t dtype_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Lent to a kernel for the time of one call.
struct Runtime {
  int64_t threads;
  // Runs body(context, task) for every task in [0, tasks), tasks handed out in order to whichever thread is free.
  void (*run)(const Runtime& runtime, int64_t tasks, void (*body)(void* context, int64_t task), void* context);
  // The same where neighbouring tasks work on neighbouring rows: each thread begins with a run of its own, the same one in every call, so that
  // what it wrote is still in its cache; done with that, it takes what others have left.
  decltype(run) run_near;
  // Memory of the calling thread, 64-byte aligned, kept between calls; a slot's earlier pointer dies when it grows.
  void* (*scratch)(int slot, size_t bytes);
};
// One slot per use that may be alive at the same time on one thread.
enum ScratchSlot : int { scratch_a, scratch_c, scratch_hidden, scratch_shared, scratch_key, scratch_value, scratch_query,
                         scratch_scores, scratch_output, scratch_statistics, scratch_keep,
                         scratch_gate, scratch_right, scratch_parts, scratch_packed, scratch_packed_out, scratch_packed_gate, scratch_grad, scratch_grad_hidden, scratch_sums, scratch_bias, scratch_logits,
                         scratch_slots };

// A packed weight: this header, then panels of `panel` columns, each [k][panel] (see gemm/gemm.h).
struct PackedHeader {
  uint64_t magic;          // packed_magic; anything else is not a packed weight
  int64_t k, n;            // in_features, out_features
  Dtype dtype;             // of the weights
  int32_t panel;           // columns per panel
  int32_t pairs;           // 1: bf16 pairs along k for the dot-product instruction
  int32_t reserved[23];
};
static_assert(sizeof(PackedHeader) == 128, "panels start where a pair of cache lines does, which come from memory together");
inline constexpr uint64_t packed_magic = 0x31304b434150'4d42ull;  // "BMPACK01"

struct PackArgs {
  const void* weight;      // one weight; several are packed one after the other into neighbouring columns
  WeightLayout layout;
  Dtype dtype;
  int64_t k, n;            // of this weight
  int64_t first_column;    // where its columns start in the packed weight
  void* packed;            // with its header filled in
};

// Dropout by csrc/arch/philox.h. An element is kept when its word is at least `threshold`, and multiplied by `scale`.
struct Dropout {
  bool enabled;
  uint32_t key[2];         // the seed's low and high half
  uint32_t threshold;      // round(p * 2^32)
  float scale;             // 1 / (1 - p)
};

struct PhiloxArgs {        // one block of a rule's words, see philox/cpu.cpp
  Dropout dropout;
  bool elements;           // of rows x columns; else of attention's probabilities
  int64_t rows, columns, first_row, head, sequence;
  uint32_t* words;         // (rows, columns)
  uint8_t* kept;           // (rows, columns)
  float* values;           // (rows, columns), dropped in place; elements only
};

enum class NormKind : int32_t { layer_norm, rms_norm };
struct NormArgs {          // over the last dimension; weight and bias may be null; rms_norm has no bias
  const void* weight;
  const void* bias;
  float eps;
  NormKind kind;
  float weight_offset;     // added to the weight (Gemma: 1)
};

// A weight (k, n) that is packed, or, with packed == null, lies as it is in some parts beside each other.
struct WeightArgs {
  int64_t k, n;              // n over all parts
  const void* packed;
  WeightLayout layout;       // the rest is read without packed only
  int64_t count;
  const void* const* parts;
  const int64_t* part_n;     // out_features of each
};

struct LinearArgs {
  Dtype dtype;             // of x, bias, residual, norm and out
  int64_t rows;
  const void* x;           // (rows, k), contiguous
  WeightArgs weight;
  const void* bias;        // (n,) or null
  Activation activation;
  const void* residual;    // (rows, n) or null
  bool has_norm;
  NormArgs norm;
  void* out;               // (rows, n)
  Dropout dropout;
  void* preactivation;     // (rows, n): x W + b, kept for the backward pass, or null
  void* prenorm;           // (rows, n): what the norm is given, likewise
};

struct FeedForwardArgs {
  Dtype dtype;
  int64_t rows;
  const void* x;           // (rows, hidden)
  WeightArgs w_in;
  const void* bias_in;     // (inner,) or null
  WeightArgs w_out;
  const void* bias_out;    // (hidden,) or null
  Activation activation;
  const void* residual;    // (rows, hidden) or null
  NormPosition norm_position;
  NormArgs norm;
  void* out;
  const WeightArgs* w_gate; // or null: not gated
  const void* bias_gate;   // (inner,) or null
  Dropout dropout;
  void* preactivation;     // (rows, inner) or null, as in LinearArgs
  void* gate_preactivation;
  void* prenorm;           // (rows, hidden) or null
};

// Gradients that are not wanted are null, here and below. All tensors are of dtype and contiguous.
struct LinearBackwardArgs {
  Dtype dtype;
  WeightLayout layout;
  Activation activation;
  int64_t rows, k, n;      // n over all weights
  const void* grad;        // (rows, n)
  const void* x;           // (rows, k)
  const void* preactivation;           // (rows, n); needed with an activation
  const void* prenorm;     // (rows, n); needed with a norm
  bool has_norm;
  NormArgs norm;
  Dropout dropout;
  int64_t weights;
  const void* const* weight;           // as the layer stores them
  const int64_t* weight_n;             // out_features of each
  void* x_grad;
  void* residual_grad;
  void *norm_weight_grad, *norm_bias_grad;
  void* const* weight_grad;
  void* const* bias_grad;  // of weight_n elements each
};

struct FeedForwardBackwardArgs {
  Dtype dtype;
  WeightLayout layout;
  Activation activation;
  int64_t rows, hidden, inner, columns;
  const void* grad;        // (rows, columns)
  const void* x;           // (rows, hidden)
  const void *w_in, *w_out, *w_gate;   // w_gate null: not gated
  const void *preactivation, *gate_preactivation;   // (rows, inner)
  const void* prenorm;     // (rows, columns); needed with a norm after
  NormPosition norm_position;
  NormArgs norm;
  Dropout dropout;
  void *x_grad, *w_in_grad, *b_in_grad, *w_out_grad, *b_out_grad, *residual_grad, *norm_weight_grad, *norm_bias_grad, *w_gate_grad, *b_gate_grad;
};

struct LayerNormArgs {     // out = norm(dropout(x) + residual), layer norm or RMS norm
  Dtype dtype;
  int64_t rows, columns;
  const void* x;
  const void* residual;    // or null
  NormArgs norm;
  void* out;
  Dropout dropout;
};

struct NormBackwardArgs {
  Dtype dtype;
  int64_t rows, columns;
  const void* grad;
  const void* x;
  const void* residual;    // or null
  NormArgs norm;
  Dropout dropout;
  void *x_grad, *residual_grad, *weight_grad, *bias_grad;
};

struct EmbeddingArgs {
  Dtype dtype;
  int64_t tokens, hidden;
  const int64_t* ids[3];   // word, position, token type: null where there is no such table; checked to be in range
  const void* tables[3];
  bool has_norm;
  NormArgs norm;
  void* out;               // (tokens, hidden)
  Dropout dropout;         // after the norm
};

struct EmbeddingGroups {   // the tokens of a table by their id
  int64_t count;           // ids that occur and get a gradient
  const int64_t* id;       // (count,), ascending
  const int64_t* start;    // (count + 1,): where an id's tokens begin in `order`
  const int64_t* order;    // numbers of tokens; ascending within an id
};

struct EmbeddingBackwardArgs {
  Dtype dtype;
  int64_t tokens, hidden;
  const void* grad;        // (tokens, hidden)
  const int64_t* ids[3];   // as in EmbeddingArgs; looked at only with a norm
  const void* tables[3];
  bool has_norm;
  NormArgs norm;
  Dropout dropout;
  EmbeddingGroups groups[3];
  void* table_grad[3];     // zero when handed over
  void *norm_weight_grad, *norm_bias_grad;
};

struct RotaryArgs {        // of queries and of keys
  Dtype dtype;
  int64_t batch, rows, head_dim, heads[2];
  const void* x[2];        // (batch, heads, rows, head_dim)
  int64_t stride[2][3];    // batch, head, row, in elements
  Dtype angles_dtype;
  int64_t angles;          // at most head_dim / 2
  bool shared_angles;      // by the whole batch
  const void *cosine, *sine;  // (batch or 1, rows, angles), contiguous
  bool interleaved;
  void* out[2];            // (batch, rows, heads, head_dim)
};

struct AddArgs {           // out = x + factor * y
  Dtype dtype;
  int64_t n;
  const void *x, *y;
  float factor;
  void* out;
};

struct CrossEntropyArgs {
  Dtype dtype;
  int64_t rows, k, classes;
  const void* x;           // (all rows, k)
  const void* weight;      // (classes, k)
  const void* bias;        // (classes,) or null
  const int64_t* target;   // (all rows,)
  const int64_t* row;      // (rows,): the numbers of the rows that count
  float smoothing;
  // The forward pass: both (all rows,), or null for the gradients alone.
  float* loss;
  float* logsumexp;
  // The gradients of the sum over rows of row_scale (null: scale) * loss.
  const float* row_scale;   // (all rows,) or null
  float scale;
  void *x_grad, *weight_grad, *bias_grad;   // x_grad is zero when handed over: rows that do not count stay so
};

struct AttentionArgs {
  Dtype dtype;
  int64_t batch, heads, kv_heads, head_dim;
  int64_t query_length, key_length;    // dense; with cu_seqlens the longest
  const void *query, *key, *value;
  int64_t query_stride[3], key_stride[3], value_stride[3];  // batch, head, row, in elements; varlen: the batch stride is 0
  const int32_t *cu_seqlens_q, *cu_seqlens_k;               // or null: dense
  const uint8_t* key_padding_mask;     // (batch, key_length), 1 = visible, or null
  int64_t mask_stride;
  const void* bias;                    // or null
  Dtype bias_dtype;
  int64_t bias_stride[4];              // batch, head, query, key; 0 where broadcast
  const float* alibi_slopes;           // (heads,) or (batch, heads) contiguous, or null
  int64_t alibi_batch_stride;          // 0 or heads
  const void* sinks;                   // (heads,) or null
  Dtype sinks_dtype;
  Dropout dropout;
  float softmax_scale, softcap;        // softcap 0: none
  bool is_causal;
  int64_t window_left, window_right;   // -1: no limit
  void* out;
  int64_t out_stride[3];
  float* logsumexp;
  int64_t logsumexp_stride[2];         // batch, head; rows are contiguous
};

struct AttentionBackwardArgs {
  AttentionArgs forward;               // out and logsumexp are the forward's results
  const void* grad_out;
  int64_t grad_out_stride[3];
  const float* grad_logsumexp;         // where logsumexp is, or null
  void *dq, *dk, *dv;
  int64_t dq_stride[3], dk_stride[3], dv_stride[3];
  float* dbias;                        // zeros to add to, (batch or 1, heads, query, key), or null
  int64_t dbias_stride[3];             // batch (0: all batches add to one), head, query
  float* dsinks;                       // (batch, heads) to be written, or null
};

inline constexpr int64_t most_top_keys = 64;   // a row's are kept in order as they come

// Probabilities, or the rest, of attention without value and dropout.
struct AttentionMapsArgs {
  AttentionArgs attention;             // value, dropout, out and logsumexp are not read
  const uint8_t* query_padding_mask;   // (batch, query_length), 1 = counts, or null
  const int64_t* queries;              // of which probabilities are asked, counted from the first sequence on, or null: all
  int64_t count;                       // of these
  void* probabilities;                 // or null
  int64_t out_stride[3];               // batch, head, row
  int64_t width;                       // of a row, which is written whole
  float *entropy, *mass, *top_probabilities;
  int64_t* top_keys;
  int64_t top_k;
  int64_t rows_stride[2], mass_stride[2];  // batch, head; a row's top_k are contiguous
};

struct KernelTable {
  const char* isa;
  int32_t panel;                       // columns per packed panel, by dtype the same
  bool bf16_pairs;                     // packs bf16 weights as pairs
  void (*pack)(const Runtime&, const PackArgs&);
  void (*linear)(const Runtime&, const LinearArgs&);
  void (*feed_forward)(const Runtime&, const FeedForwardArgs&);
  void (*linear_backward)(const Runtime&, const LinearBackwardArgs&);
  void (*feed_forward_backward)(const Runtime&, const FeedForwardBackwardArgs&);
  void (*layer_norm)(const Runtime&, const LayerNormArgs&);
  void (*norm_backward)(const Runtime&, const NormBackwardArgs&);
  void (*embedding)(const Runtime&, const EmbeddingArgs&);
  void (*embedding_backward)(const Runtime&, const EmbeddingBackwardArgs&);
  void (*rotary)(const Runtime&, const RotaryArgs&);
  void (*add)(const Runtime&, const AddArgs&);
  void (*cross_entropy)(const Runtime&, const CrossEntropyArgs&);
  void (*attention)(const Runtime&, const AttentionArgs&);
  void (*attention_backward)(const Runtime&, const AttentionBackwardArgs&);
  void (*attention_maps)(const Runtime&, const AttentionMapsArgs&);
  void (*philox_block)(const PhiloxArgs&);
};

}  // namespace bigmodel
