// Gradients of attention: FlashAttention-2 (Dao, arXiv 2307.08691, algorithm 2) for caches instead of shared memory. Probabilities are
// computed again from logsumexp, so that memory is linear in the sequence length.
//
//   P = exp(logits - logsumexp),  dP = dO V^T,  dS = P * (dP - delta),  delta = rowsum(P * dP) - dlogsumexp
//   dV = P^T dO,  dK = scale * dS^T Q,  dQ = scale * dS K          (dropout: P and dP are multiplied by 0 or 1 / (1 - p))
//
//   one task: one sequence and kv head, with the query heads that share it
//
//                       all keys that the chunk sees, in blocks (K^T, K and V^T in panels, packed once)
//                      +------------------------+
//      chunk of rows   |  P and dP, in L2       |  -> dQ of the chunk;  dK and dV in float buffers of all keys
//                      +------------------------+
//
// A chunk's rows are complete before any dS is made. So P is divided by its own sum, which takes out the rounding of logsumexp that
// every probability of a row shares, and delta is the sum that makes a row of dS vanish; rowsum(dO * O) would bring in the rounding of O.
//
// A task owns all that it writes, so no sum depends on which thread came first: results are the same in every run, whatever the
// number of threads. Only with the gradient of a bias that is shared by a batch are the batch's sequences one task.
#pragma once
#include "attention.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

struct Weights { F32 p, ds; };               // what multiplies dO, and what multiplies K and Q

// The gradients of a chunk, in float32 whatever is stored.
struct ChunkBackward : Attention {
  const AttentionBackwardArgs& gradients;

  // What a chunk works with. P, dP and their like are blocks [from `begin` on][chunk_rows][weight_line]: a block is in one piece, or each
  // of its rows would be on a page of its own.
  struct Chunk {
    int64_t first, count, begin, end, block_size;
    float *probability, *gradient, *slope;   // slope: of the softcap, or null
    float *logsumexp, *total, *inverse, *delta, *logsumexp_grad;   // of each row; total: of P as it is, and 1 over that
    uint8_t* bits;                           // dropout's, or null
  };

  // Calls each(key, from, width, column, mask) for the blocks of keys of which the chunk sees some: whole panels from key + from on, where
  // they are in a row of P, and the key padding mask of the block or null.
  template <class Each>
  void visible_blocks(const Sequence& s, const Chunk& c, const Each& each) const {
    alignas(64) float buffer[weight_block];
    for (int64_t key = c.begin; key < c.end; key += weight_block) {
      const int64_t n = smaller(weight_block, s.keys - key);
      const int64_t low_key = larger(0, low(s, query_of(0, c.first)) - key), high_key = smaller(n, c.end - key);
      bool visible;
      const float* mask = padding(s, key, n, round_up(n, panel), buffer, visible);
      if (!visible || low_key >= high_key) continue;
      const int64_t from = low_key / panel * panel;
      each(key, from, round_up(high_key, panel) - from, (key - c.begin) / weight_block * c.block_size + from, mask);
    }
  }

  template <class Products>
  void chunk(const Sequence& s, const Chunk& c, const Products& products) const {
    for (int64_t r = 0; r < c.count; r++) {
      const float logsumexp = args.logsumexp[statistics_at(s, c.first + r)];
      c.logsumexp[r] = logsumexp == -infinity ? 0.0f : logsumexp;  // a row with no visible key: exp(-inf - 0) = 0, not NaN
      c.total[r] = args.sinks && logsumexp != -infinity ? __builtin_expf(sink(head_of(s, c.first + r)) - logsumexp) : 0.0f;
      c.delta[r] = 0.0f;
    }

    // ---- S = Q K^T -> P,  dP = dO V^T, and the sum of each row of P ----
    visible_blocks(s, c, [&](int64_t key, int64_t from, int64_t width, int64_t column, const float* mask) {
      const int64_t n = smaller(weight_block, s.keys - key);
      products.multiply_scores(c.count, key + from, width, c.probability + column, c.gradient + column);
      // draw counts in queries; a chunk of a group that does not divide it begins within one.
      const int64_t first_query = query_of(0, c.first), last_query = query_of(0, c.first + c.count - 1);
      if (c.bits) draw(s, first_query, last_query - first_query + 1, key, n, c.bits);
      for (int64_t r = 0; r < c.count; r++) {
        const int64_t row = c.first + r, at = r * weight_line + column;
        float* line = c.probability + at;
        if (c.slope) cap_slope(line, width, c.slope + at);
        modify(s, query_of(0, row), head_of(s, row), key + from, smaller(width, n - from), width, mask ? mask + from : nullptr, line);
        probabilities(line, c.gradient + at, width, c.logsumexp[r], c.bits ? c.bits + (row - first_query * group) * keep_stride + from / 8 : nullptr,
                      c.total[r]);
      }
    });

    // ---- P divided by its sum, and the sum of each row of P dP ----
    for (int64_t r = 0; r < c.count; r++) {
      if (c.total[r] == 0.0f) c.total[r] = 1.0f;
      c.inverse[r] = 1.0f / c.total[r];
    }
    visible_blocks(s, c, [&](int64_t, int64_t, int64_t width, int64_t column, const float*) {
      for (int64_t r = 0; r < c.count; r++) {
        const int64_t at = column + r * weight_line;
        c.delta[r] += weighted_sum({c.total[r], c.inverse[r]}, c.probability + at, c.gradient + at, width);
      }
    });
    for (int64_t r = 0; r < c.count; r++) {
      const int64_t at = statistics_at(s, c.first + r);
      c.logsumexp_grad[r] = gradients.grad_logsumexp ? gradients.grad_logsumexp[at] : 0.0f;
      if (gradients.dsinks && args.logsumexp[at] != -infinity) {  // a key without value: dP = 0, so dS = -P delta
        const int64_t head = head_of(s, c.first + r);
        gradients.dsinks[s.batch * args.heads + head] -= __builtin_expf(sink(head) - c.logsumexp[r]) / c.total[r] * (c.delta[r] - c.logsumexp_grad[r]);
      }
    }

    // ---- P as it multiplies dO, dS, the gradient of the products;  dQ += dS K,  dV += P^T dO,  dK += dS^T Q ----
    const F32 kept = F32::set(args.dropout.enabled ? args.dropout.scale : 1.0f);
    visible_blocks(s, c, [&](int64_t key, int64_t from, int64_t width, int64_t column, const float*) {
      auto logits_gradient = [&](int64_t r, F32 p, F32 dp) __attribute__((always_inline)) {  // the difference first: of a lone key it is 0
        return abs(p) * (dp - F32::set(c.delta[r]) + F32::set(c.logsumexp_grad[r]));
      };
      if (gradients.dbias)
        for (int64_t r = 0; r < c.count; r++)
          for (int64_t j = 0, at = r * weight_line + column; j < width; j += F32::width)
            add_bias_gradient(s, c.first + r, key + from + j,
                              logits_gradient(r, Divisor(c.total[r], c.inverse[r]).of(F32::load(c.probability + at + j)), F32::load(c.gradient + at + j)));
      auto make = [&](int64_t r, int64_t j, F32 p, F32 dp) __attribute__((always_inline)) {
        const F32 whole = Divisor(c.total[r], c.inverse[r]).of(p), ds = logits_gradient(r, whole, dp);
        return Weights{max(whole, F32::zero()) * kept, c.slope ? ds * F32::load(c.slope + r * weight_line + column + j) : ds};
      };
      products.multiply_gradients(c.count, key + from, width, c.probability + column, c.gradient + column, make);
    });
  }

  int64_t statistics_at(const Sequence& s, int64_t row) const {
    return s.batch * args.logsumexp_stride[0] + head_of(s, row) * args.logsumexp_stride[1] + s.first_query + query_of(0, row);
  }

  // 1 - tanh^2: what the softcap's gradient is multiplied with.
  void cap_slope(const float* products, int64_t width, float* slope) const {
    const F32 inner = F32::set(args.softmax_scale / args.softcap), one = F32::set(1.0f);
    for (int64_t j = 0; j < width; j += F32::width) {
      const F32 t = tanh(F32::load(products + j) * inner);
      (one - t * t).store(slope + j);
    }
  }

  // Scores become P, with the sign turned where dropout takes it, and dP is dropped too; the sum of P is added to `total`.
  void probabilities(float* scores, float* gradient, int64_t width, float logsumexp, const uint8_t* keep, float& total) const {
    const F32 scale = F32::set(unit), shift = F32::set(logsumexp), kept = F32::set(args.dropout.scale);
    F32 sum_p = F32::zero();
    for (int64_t j = 0; j < width; j += F32::width) {
      // Logits are near 0, and logsumexp grows with the keys: without `low` their difference would be rounded more than they are.
      const F32 score = F32::load(scores + j), t = fma(score, scale, -shift), low = fma(score, scale, -(t + shift));
      const F32 p = exponential(t, low);
      sum_p = sum_p + p;
      if (keep) {
        const uint32_t lanes = lane_bits(keep + j / 8);
        (keep_lanes(F32::load(gradient + j), lanes) * kept).store(gradient + j);
        const F32 chosen = keep_lanes(p, lanes);
        (chosen + chosen - p).store(scores + j);
      } else {
        p.store(scores + j);
      }
    }
    total += bigmodel::BIGMODEL_ISA::sum(sum_p);
  }

  // The sum of P dP.
  static float weighted_sum(const Divisor& divisor, const float* probability, const float* gradient, int64_t width) {
    F32 products = F32::zero();
    for (int64_t j = 0; j < width; j += F32::width) products = fma(abs(divisor.of(F32::load(probability + j))), F32::load(gradient + j), products);
    return bigmodel::BIGMODEL_ISA::sum(products);
  }

  void add_bias_gradient(const Sequence& s, int64_t row, int64_t key, F32 ds) const {
    const int64_t head = head_of(s, row), left = s.keys - key;
    float* to = gradients.dbias + s.batch * gradients.dbias_stride[0] + head * gradients.dbias_stride[1] + query_of(0, row) * gradients.dbias_stride[2] + key;
    if (left >= F32::width) (F32::load(to) + ds).store(to);
    else if (left > 0) store_partial(load_partial(to, int(left)) + ds, to, int(left));
  }
};

// What reads and writes arrays of T: a task, one kv head of a sequence.
template <class T>
struct Backward : ChunkBackward {
  // The chunk's rows of Q or dO as floats, depth_padded apart.
  void widen(const T* source, const int64_t (&stride)[3], const Sequence& s, int64_t first, int64_t count, float* line) const {
    for (int64_t row = 0; row < count; row++)
      widen_row(source + query_of(0, first + row) * stride[2] + head_of(s, first + row) * stride[1], depth, depth_padded, line + row * depth_padded);
  }

  static void store_rows(const float* from, int64_t from_stride, float scale, T* to, int64_t to_stride, int64_t rows, int64_t n) {
    const F32 factor = F32::set(scale);
    for (int64_t r = 0; r < rows; r++)
      each_vector(n, [&](int64_t d, int here) __attribute__((always_inline)) {
        store(F32::load(from + r * from_stride + d) * factor, to + r * to_stride + d, here);
      });
  }

  template <class Products>
  void task(const Sequence& s, Products products) const {
    constexpr int64_t chunk_rows = Products::chunk_rows;
    const int64_t rows = s.queries * group;
    const T *q = static_cast<const T*>(args.query) + s.query, *k = static_cast<const T*>(args.key) + s.key, *v = static_cast<const T*>(args.value) + s.value;
    T* dk = static_cast<T*>(gradients.dk) + s.batch * gradients.dk_stride[0] + s.kv_head * gradients.dk_stride[1];
    T* dv = static_cast<T*>(gradients.dv) + s.batch * gradients.dv_stride[0] + s.kv_head * gradients.dv_stride[1];
    T* dq = static_cast<T*>(gradients.dq) + s.batch * gradients.dq_stride[0];
    const T* grad = static_cast<const T*>(gradients.grad_out) + s.batch * gradients.grad_out_stride[0];
    if (args.cu_seqlens_k) {
      dk += int64_t(args.cu_seqlens_k[s.batch]) * gradients.dk_stride[2];
      dv += int64_t(args.cu_seqlens_k[s.batch]) * gradients.dv_stride[2];
      dq += s.first_query * gradients.dq_stride[2];
      grad += s.first_query * gradients.grad_out_stride[2];
    }
    products.put_keys(k, args.key_stride[2], v, args.value_stride[2]);
    if (gradients.dsinks)
      for (int64_t g = 0; g < group; g++) gradients.dsinks[s.batch * args.heads + s.kv_head * group + g] = 0.0f;

    const bool capped = args.softcap > 0;
    Chunk c = {};
    float* line = scratch_of<float>(runtime, scratch_c, chunk_rows * depth_padded);
    c.block_size = chunk_rows * weight_line;
    const int64_t all = ceil_div(s.keys, weight_block) * c.block_size;
    c.probability = scratch_of<float>(runtime, scratch_scores, (capped ? 3 : 2) * all);
    c.gradient = c.probability + all;
    c.slope = capped ? c.gradient + all : nullptr;
    c.logsumexp = scratch_of<float>(runtime, scratch_statistics, 5 * chunk_rows);
    c.total = c.logsumexp + chunk_rows;
    c.inverse = c.total + chunk_rows;
    c.delta = c.inverse + chunk_rows;
    c.logsumexp_grad = c.delta + chunk_rows;
    if (args.dropout.enabled) c.bits = scratch_of<uint8_t>(runtime, scratch_keep, (chunk_rows + 2 * group) * keep_stride);

    for (c.first = 0; c.first < rows; c.first += chunk_rows) {
      c.count = smaller(chunk_rows, rows - c.first);
      c.begin = low(s, query_of(0, c.first)) / weight_block * weight_block;
      c.end = high(s, query_of(0, c.first + c.count - 1));
      widen(q, args.query_stride, s, c.first, c.count, line);
      products.put_queries(line, c.count);
      widen(grad, gradients.grad_out_stride, s, c.first, c.count, line);
      products.put_grads(line, c.count);
      chunk(s, c, products);
      for (int64_t r = 0; r < c.count; r++)
        store_rows(products.query_grad + r * depth_padded, depth_padded, args.softmax_scale,
                   dq + query_of(0, c.first + r) * gradients.dq_stride[2] + head_of(s, c.first + r) * gradients.dq_stride[1], 0, 1, depth);
    }
    products.key_gradient([&](const float* from, int64_t from_stride, int64_t key, int64_t count, int64_t d, int64_t n) {
      store_rows(from, from_stride, args.softmax_scale, dk + key * gradients.dk_stride[2] + d, gradients.dk_stride[2], count, n);
    });
    products.value_gradient([&](const float* from, int64_t from_stride, int64_t key, int64_t count, int64_t d, int64_t n) {
      store_rows(from, from_stride, 1.0f, dv + key * gradients.dv_stride[2] + d, gradients.dv_stride[2], count, n);
    });
  }

  // By all threads, each(sequence) for every sequence and kv head.
  template <class Each>
  void each_task(const Each& each) const {
    const bool shared_bias = gradients.dbias && gradients.dbias_stride[0] == 0;
    const int64_t together = shared_bias ? args.batch : 1, tasks = args.batch / larger(1, together) * args.kv_heads;
    parallel(runtime, tasks, [&](int64_t i) {
      for (int64_t b = 0; b < together; b++) each(sequence(shared_bias ? b : i / args.kv_heads, i % args.kv_heads));
    });
  }
};

}  // namespace

}  // namespace bigmodel::BIGMODEL_ISA
