// The CPU kernels on threads of this program's own, for ThreadSanitizer: torch's OpenMP pool synchronises in ways that it does not
// see, so that under torch it would report every call.
//
// Each kernel runs on four threads, alone and from two callers at once, on threads that are started for each deal of tasks and on a team's. Every result must have the same bits (on another number of
// threads a sum over rows may be split in other places, and round otherwise). A race is reported by the sanitizer that this is built with (BIGMODEL_SANITIZE=thread, see csrc/sanitize.py).
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <list>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../kernels.h"
#include "../tasks.h"

namespace bigmodel {

namespace BIGMODEL_DRIVEN { extern const KernelTable table; }  // the instruction set that is linked

namespace {

const KernelTable& kernels = BIGMODEL_DRIVEN::table;

constexpr auto on_own_threads = [](int64_t threads, const auto& work) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; i++) others.emplace_back([&work, i] { work(i); });
  work(0);
  for (std::thread& other : others) other.join();
};

using OwnThreads = Threads<on_own_threads>;

void* thread_scratch(int slot, size_t bytes) {
  struct Block {
    void* memory = nullptr;
    size_t size = 0;
    ~Block() { std::free(memory); }
  };
  thread_local Block blocks[scratch_slots];
  Block& block = blocks[slot];
  if (bytes > block.size) {
    std::free(block.memory);
    block.size = (bytes + 63) / 64 * 64;
    block.memory = std::aligned_alloc(64, block.size);
    if (!block.memory) std::abort();
  }
  return block.memory;
}

struct alignas(64) Line {  // of the cache: what memory is given out in
  uint8_t bytes[64];
  bool operator==(const Line&) const = default;
};

// Arrays of one dtype, which live as long as this: inputs of random numbers, results of zeros.
class Arrays {
 public:
  Arrays(Dtype dtype, uint32_t seed) : dtype(dtype), random_(seed) {}

  const void* input(int64_t count, float scale = 1.0f) {
    auto* memory = static_cast<uint8_t*>(result(count));
    std::normal_distribution<float> normal(0.0f, scale);
    for (int64_t i = 0; i < count; i++) {
      const float value = normal(random_);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const auto half = uint16_t(bits >> 16);  // bfloat16, rounded down
      if (dtype == Dtype::float32) std::memcpy(&memory[size_t(4 * i)], &bits, 4);
      else std::memcpy(&memory[size_t(2 * i)], &half, 2);
    }
    return memory;
  }
  const int64_t* ids(int64_t count, int64_t below) {
    auto* id = static_cast<int64_t*>(result(count, 8));
    for (int64_t i = 0; i < count; i++) id[i] = int64_t(random_() % uint64_t(below));
    return id;
  }
  void* result(int64_t count, int64_t size = 0) { return all_.emplace_back(size_t(count * (size ? size : dtype_size(dtype)) + 63) / 64).data(); }

  // The bytes of everything, inputs too: a call that wrote into one of them is seen as well.
  bool same_as(const Arrays& other) const { return all_ == other.all_; }

  const Dtype dtype;

 private:
  std::mt19937 random_;
  std::list<std::vector<Line>> all_;
};

using Kernel = std::function<void(const Runtime&, Arrays&)>;

constexpr int64_t rows = 150, k = 130, n = 260, inner = 290;
constexpr Dropout dropout = {true, {1234, 5678}, 0x20000000u, 1 / 0.875f};

const void* packed(const Runtime& runtime, Arrays& a, const void* weight, int64_t from, int64_t to) {
  const int64_t padded = (from + 1) / 2 * 2 * ((to + kernels.panel - 1) / kernels.panel * kernels.panel);
  auto* header = static_cast<PackedHeader*>(a.result(int64_t(sizeof(PackedHeader)) + padded * dtype_size(a.dtype), 1));
  *header = {packed_magic, from, to, a.dtype, kernels.panel, a.dtype == Dtype::bfloat16 && kernels.bf16_pairs, {}};
  kernels.pack(runtime, {weight, WeightLayout::linear, a.dtype, from, to, 0, header});
  return header;
}

NormArgs norm(Arrays& a, int64_t columns, NormKind kind = NormKind::layer_norm) {
  return {a.input(columns), kind == NormKind::layer_norm ? a.input(columns) : nullptr, 1e-5f, kind, 0.0f};
}

void linear(const Runtime& runtime, Arrays& a) {
  const void* weight = a.input(k * n, 0.1f);
  LinearArgs args = {};
  args.dtype = a.dtype;
  args.rows = rows;
  args.x = a.input(rows * k);
  args.weight = {.k = k, .n = n, .packed = packed(runtime, a, weight, k, n)};
  args.bias = a.input(n);
  args.activation = Activation::gelu;
  args.residual = a.input(rows * n);
  args.has_norm = true;
  args.norm = norm(a, n);
  args.dropout = dropout;
  args.out = a.result(rows * n);
  args.preactivation = a.result(rows * n);
  args.prenorm = a.result(rows * n);
  kernels.linear(runtime, args);
}

void linear_backward(const Runtime& runtime, Arrays& a) {
  const void* weight[2] = {a.input(k * 100, 0.1f), a.input(k * 160, 0.1f)};
  const int64_t weight_n[2] = {100, 160};
  void* weight_grad[2] = {a.result(k * 100), a.result(k * 160)};
  void* bias_grad[2] = {a.result(100), a.result(160)};
  LinearBackwardArgs args = {};
  args.dtype = a.dtype;
  args.activation = Activation::gelu_tanh;
  args.rows = rows, args.k = k, args.n = n;
  args.grad = a.input(rows * n);
  args.x = a.input(rows * k);
  args.preactivation = a.input(rows * n);
  args.prenorm = a.input(rows * n);
  args.has_norm = true;
  args.norm = norm(a, n);
  args.dropout = dropout;
  args.weights = 2;
  args.weight = weight, args.weight_n = weight_n, args.weight_grad = weight_grad, args.bias_grad = bias_grad;
  args.x_grad = a.result(rows * k);
  args.residual_grad = a.result(rows * n);
  args.norm_weight_grad = a.result(n), args.norm_bias_grad = a.result(n);
  kernels.linear_backward(runtime, args);
}

void feed_forward(const Runtime& runtime, Arrays& a) {
  const void *w_in = a.input(k * inner, 0.1f), *w_gate = a.input(k * inner, 0.1f), *w_out = a.input(inner * k, 0.1f);
  const WeightArgs gate = {.k = k, .n = inner, .packed = packed(runtime, a, w_gate, k, inner)};
  FeedForwardArgs args = {};
  args.dtype = a.dtype;
  args.rows = rows;
  args.x = a.input(rows * k);
  args.w_in = {.k = k, .n = inner, .packed = packed(runtime, a, w_in, k, inner)};
  args.bias_in = a.input(inner);
  args.w_out = {.k = inner, .n = k, .packed = packed(runtime, a, w_out, inner, k)};
  args.bias_out = a.input(k);
  args.activation = Activation::silu;
  args.residual = a.input(rows * k);
  args.norm_position = NormPosition::pre;
  args.norm = norm(a, k, NormKind::rms_norm);
  args.w_gate = &gate;
  args.out = a.result(rows * k);
  args.preactivation = a.result(rows * inner);
  args.gate_preactivation = a.result(rows * inner);
  kernels.feed_forward(runtime, args);
}

void feed_forward_backward(const Runtime& runtime, Arrays& a) {
  FeedForwardBackwardArgs args = {};
  args.dtype = a.dtype;
  args.activation = Activation::silu;
  args.rows = rows, args.hidden = k, args.inner = inner, args.columns = k;
  args.grad = a.input(rows * k);
  args.x = a.input(rows * k);
  args.w_in = a.input(k * inner, 0.1f), args.w_gate = a.input(k * inner, 0.1f), args.w_out = a.input(inner * k, 0.1f);
  args.preactivation = a.input(rows * inner), args.gate_preactivation = a.input(rows * inner);
  args.prenorm = a.input(rows * k);
  args.norm_position = NormPosition::post;
  args.norm = norm(a, k);
  args.dropout = dropout;
  args.x_grad = a.result(rows * k), args.residual_grad = a.result(rows * k);
  args.w_in_grad = a.result(k * inner), args.w_gate_grad = a.result(k * inner), args.w_out_grad = a.result(inner * k);
  args.b_in_grad = a.result(inner), args.b_gate_grad = a.result(inner), args.b_out_grad = a.result(k);
  args.norm_weight_grad = a.result(k), args.norm_bias_grad = a.result(k);
  kernels.feed_forward_backward(runtime, args);
}

void layer_norm(const Runtime& runtime, Arrays& a) {
  const void *x = a.input(rows * n), *residual = a.input(rows * n);
  const NormArgs given = norm(a, n);
  kernels.layer_norm(runtime, {a.dtype, rows, n, x, residual, given, a.result(rows * n), dropout});
}

void norm_backward(const Runtime& runtime, Arrays& a) {
  const void *grad = a.input(rows * n), *x = a.input(rows * n), *residual = a.input(rows * n);
  const NormArgs given = norm(a, n);
  kernels.norm_backward(runtime, {a.dtype, rows, n, grad, x, residual, given, dropout, a.result(rows * n), a.result(rows * n), a.result(n), a.result(n)});
}

void embedding(const Runtime& runtime, Arrays& a) {
  EmbeddingArgs args = {};
  args.dtype = a.dtype;
  args.tokens = rows, args.hidden = n;
  for (int t = 0; t < 3; t++) {
    args.ids[t] = a.ids(rows, 7);
    args.tables[t] = a.input(7 * n);
  }
  args.has_norm = true;
  args.norm = norm(a, n);
  args.dropout = dropout;
  args.out = a.result(rows * n);
  kernels.embedding(runtime, args);
}

void embedding_backward(const Runtime& runtime, Arrays& a) {
  EmbeddingBackwardArgs args = {};
  std::vector<int64_t> id[3], start[3], order[3];
  args.dtype = a.dtype;
  args.tokens = rows, args.hidden = n;
  args.grad = a.input(rows * n);
  for (int t = 0; t < 3; t++) {
    args.ids[t] = a.ids(rows, 7);
    args.tables[t] = a.input(7 * n);
    args.table_grad[t] = a.result(7 * n);
    for (int64_t value = 0; value < 7; value++) {
      start[t].push_back(int64_t(order[t].size()));
      for (int64_t token = 0; token < rows; token++)
        if (args.ids[t][token] == value) order[t].push_back(token);
      if (start[t].back() == int64_t(order[t].size())) start[t].pop_back();
      else id[t].push_back(value);
    }
    start[t].push_back(int64_t(order[t].size()));
    args.groups[t] = {int64_t(id[t].size()), id[t].data(), start[t].data(), order[t].data()};
  }
  args.has_norm = true;
  args.norm = norm(a, n);
  args.dropout = dropout;
  args.norm_weight_grad = a.result(n), args.norm_bias_grad = a.result(n);
  kernels.embedding_backward(runtime, args);
}

void rotary(const Runtime& runtime, Arrays& a) {
  constexpr int64_t batch = 2, length = 75, dim = 32;
  RotaryArgs args = {};
  args.dtype = args.angles_dtype = a.dtype;
  args.batch = batch, args.rows = length, args.head_dim = dim, args.angles = dim / 2;
  for (int i = 0; i < 2; i++) {
    args.heads[i] = i ? 2 : 4;
    args.x[i] = a.input(batch * length * args.heads[i] * dim);
    args.stride[i][0] = args.heads[i] * length * dim, args.stride[i][1] = length * dim, args.stride[i][2] = dim;
    args.out[i] = a.result(batch * length * args.heads[i] * dim);
  }
  args.cosine = a.input(batch * length * dim / 2), args.sine = a.input(batch * length * dim / 2);
  kernels.rotary(runtime, args);
}

void cross_entropy(const Runtime& runtime, Arrays& a) {
  CrossEntropyArgs args = {};
  std::vector<int64_t> counting;
  for (int64_t row = 0; row < rows; row++)
    if (row % 5) counting.push_back(row);
  args.dtype = a.dtype;
  args.rows = int64_t(counting.size()), args.k = k, args.classes = 1000;
  args.x = a.input(rows * k), args.weight = a.input(args.classes * k, 0.1f), args.bias = a.input(args.classes);
  args.target = a.ids(rows, args.classes);
  args.row = counting.data();
  args.smoothing = 0.1f;
  args.scale = 1.0f / float(args.rows);
  args.loss = static_cast<float*>(a.result(rows, 4)), args.logsumexp = static_cast<float*>(a.result(rows, 4));
  args.x_grad = a.result(rows * k), args.weight_grad = a.result(args.classes * k), args.bias_grad = a.result(args.classes);
  kernels.cross_entropy(runtime, args);
}

constexpr int64_t batch = 2, heads = 4, kv_heads = 2, queries = 150, keys = 170, dim = 32;

AttentionArgs attention_args(Arrays& a) {
  AttentionArgs args = {};
  args.dtype = a.dtype, args.bias_dtype = a.dtype, args.sinks_dtype = a.dtype;
  args.batch = batch, args.heads = heads, args.kv_heads = kv_heads, args.head_dim = dim, args.query_length = queries, args.key_length = keys;
  args.query = a.input(batch * heads * queries * dim);
  args.key = a.input(batch * kv_heads * keys * dim), args.value = a.input(batch * kv_heads * keys * dim);
  const auto dense = [](int64_t (&stride)[3], int64_t count, int64_t length) { stride[0] = count * length * dim, stride[1] = length * dim, stride[2] = dim; };
  dense(args.query_stride, heads, queries), dense(args.out_stride, heads, queries);
  dense(args.key_stride, kv_heads, keys), dense(args.value_stride, kv_heads, keys);
  args.bias = a.input(heads * queries * keys);
  args.bias_stride[1] = queries * keys, args.bias_stride[2] = keys, args.bias_stride[3] = 1;
  args.sinks = a.input(heads);
  args.dropout = dropout;
  args.softmax_scale = 0.2f;
  args.is_causal = true;
  args.window_left = args.window_right = -1;
  args.out = a.result(batch * heads * queries * dim);
  args.logsumexp = static_cast<float*>(a.result(batch * heads * queries, 4));
  args.logsumexp_stride[0] = heads * queries, args.logsumexp_stride[1] = queries;
  return args;
}

void attention(const Runtime& runtime, Arrays& a) { kernels.attention(runtime, attention_args(a)); }

void decode(const Runtime& runtime, Arrays& a) {  // one query: threads share a sequence's keys
  AttentionArgs args = attention_args(a);
  args.batch = 1, args.query_length = 1;
  kernels.attention(runtime, args);
}

void attention_backward(const Runtime& runtime, Arrays& a) {
  AttentionBackwardArgs args = {};
  args.forward = attention_args(a);
  kernels.attention(runtime, args.forward);
  args.grad_out = a.input(batch * heads * queries * dim);
  args.dq = a.result(batch * heads * queries * dim);
  args.dk = a.result(batch * kv_heads * keys * dim), args.dv = a.result(batch * kv_heads * keys * dim);
  for (int i = 0; i < 3; i++) {
    args.grad_out_stride[i] = args.dq_stride[i] = args.forward.query_stride[i];
    args.dk_stride[i] = args.dv_stride[i] = args.forward.key_stride[i];
  }
  args.dbias = static_cast<float*>(a.result(heads * queries * keys, 4));  // both sequences add to it
  args.dbias_stride[1] = queries * keys, args.dbias_stride[2] = keys;
  args.dsinks = static_cast<float*>(a.result(batch * heads, 4));
  kernels.attention_backward(runtime, args);
}

const std::pair<const char*, Kernel> all[] = {
    {"linear", linear}, {"linear_backward", linear_backward}, {"feed_forward", feed_forward}, {"feed_forward_backward", feed_forward_backward},
    {"layer_norm", layer_norm}, {"norm_backward", norm_backward}, {"embedding", embedding}, {"embedding_backward", embedding_backward},
    {"rotary", rotary}, {"cross_entropy", cross_entropy}, {"attention", attention}, {"decode", decode},
    {"attention_backward", attention_backward}};

}  // namespace
}  // namespace bigmodel

int main() {
  using namespace bigmodel;
  const Runtime four = {4, OwnThreads::run, OwnThreads::run_near, thread_scratch};
  int failed = 0;
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16})
    for (const auto& [name, kernel] : all) {
      Arrays expected(dtype, 0), one(dtype, 0), other(dtype, 0), third(dtype, 0);
      kernel(four, expected);
      std::thread caller([&, &run = kernel] { OwnThreads::together(four.threads, [&] { run(four, one); }); });
      kernel(four, other);
      OwnThreads::together(four.threads, [&, &run = kernel] { run(four, third); });
      caller.join();
      const bool same = expected.same_as(one) && expected.same_as(other) && expected.same_as(third);
      std::printf("%s %s: %s\n", name, dtype == Dtype::float32 ? "float32" : "bfloat16", same ? "the same bits" : "OTHER BITS");
      failed += !same;
    }
  return failed != 0;
}
