// Gradients of attention: FlashAttention-2 (Dao, arXiv 2307.08691, algorithm 2) for caches instead of shared memory. Probabilities are
// computed again from logsumexp, so that memory is linear in the sequence length.
//
//   P = exp(logits - logsumexp),  dP = dO V^T,  dS = P * (dP - delta),  delta = rowsum(dO * O) - dlogsumexp
//   dV = P^T dO,  dK = scale * dS^T Q,  dQ = scale * dS K          (dropout: P and dP are multiplied by 0 or 1 / (1 - p))
//
//   one task: one sequence and kv head, with the query heads that share it
//
//                       key block (block keys: K^T, K and V^T in panels)
//                      +------------------------+
//      chunk of rows   |  P and dS, in L2       |  -> dQ of the chunk, in a float buffer of all rows
//                      +------------------------+
//                         dK and dV of the block
//
// A task owns all that it writes, so no sum depends on which thread came first: results are the same in every run, whatever the
// number of threads. Only with the gradient of a bias that is shared by a batch are the batch's sequences one task.
#include "attention.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

constexpr int64_t block = 128;               // keys
constexpr int64_t block_stride = block + 16;  // not a power of two
constexpr int64_t chunk_rows = (96 + tile_rows - 1) / tile_rows * tile_rows;
static_assert(block % 16 == 0 && block <= key_block, "a block's dropout bits start at a call of the generator, in a row of keep_stride bytes");

struct ColumnTile {                          // the transpose of rows as they lie in memory
  const float* a;
  int64_t stride;
  BIGMODEL_INLINE const float* at(int64_t k, int row) const { return a + k * stride + row; }
};

template <class T>
struct Backward : Attention<T> {
  using Base = Attention<T>;
  using typename Base::Sequence;
  using Base::args, Base::depth, Base::depth_padded, Base::draw, Base::group, Base::head_of, Base::high, Base::lane_bits, Base::low, Base::modify,
      Base::padding, Base::query_of, Base::runtime, Base::sequence, Base::unit;
  const AttentionBackwardArgs& gradients;

  struct Row { float logsumexp, delta; };

  float* floats(ScratchSlot slot, int64_t n) const { return static_cast<float*>(runtime.scratch(slot, size_t(n) * sizeof(float))); }

  // Rows of Q or dO as floats: tiles for the products over head_dim, panels of columns, chunk by chunk, for those over rows.
  void pack(const T* source, const int64_t (&stride)[3], const Sequence& s, int64_t rows, float* line, float* tiles, float* columns) const {
    for (int64_t first = 0; first < rows; first += chunk_rows) {
      const int64_t count = smaller(chunk_rows, rows - first);
      for (int64_t row = 0; row < count; row++) {
        const T* x = source + query_of(0, first + row) * stride[2] + head_of(s, first + row) * stride[1];
        for (int64_t d = 0; d < depth_padded; d++) line[row * depth_padded + d] = d < depth ? to_float(x[d]) : 0.0f;
      }
      pack_rows(line, depth_padded, count, depth, tiles + first * depth);
      pack_columns(line, depth_padded, count, depth, columns + first * depth_padded);
    }
  }

  static void store_rows(const float* from, int64_t from_stride, float scale, T* to, int64_t to_stride, int64_t rows, int64_t n) {
    const F32 factor = F32::set(scale);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t d = 0; d < n; d += F32::width) {
        const F32 x = F32::load(from + r * from_stride + d) * factor;
        if (n - d >= F32::width) x.store(to + r * to_stride + d);
        else store_partial(x, to + r * to_stride + d, int(n - d));
      }
  }

  void task(const Sequence& s) const {
    const int64_t rows = s.queries * group, padded = round_up(rows, chunk_rows);
    T* dk = static_cast<T*>(gradients.dk) + s.batch * gradients.dk_stride[0] + s.kv_head * gradients.dk_stride[1];
    T* dv = static_cast<T*>(gradients.dv) + s.batch * gradients.dv_stride[0] + s.kv_head * gradients.dv_stride[1];
    T* dq = static_cast<T*>(gradients.dq) + s.batch * gradients.dq_stride[0];
    const T* grad = static_cast<const T*>(gradients.grad_out) + s.batch * gradients.grad_out_stride[0];
    const T* out = static_cast<const T*>(args.out) + s.batch * args.out_stride[0];
    if (args.cu_seqlens_k) {
      dk += int64_t(args.cu_seqlens_k[s.batch]) * gradients.dk_stride[2];
      dv += int64_t(args.cu_seqlens_k[s.batch]) * gradients.dv_stride[2];
      dq += s.first_query * gradients.dq_stride[2];
      grad += s.first_query * gradients.grad_out_stride[2];
      out += s.first_query * args.out_stride[2];
    }

    float* line = floats(scratch_hidden, chunk_rows * depth_padded);
    float* query_tiles = floats(scratch_a, padded * depth + 8);
    float* query_columns = floats(scratch_query, padded * depth_padded);
    float* grad_tiles = floats(scratch_grad, padded * depth + 8);
    float* grad_columns = floats(scratch_grad_hidden, padded * depth_padded);
    float* query_grad = floats(scratch_output, padded * depth_padded);
    auto* statistics = static_cast<Row*>(runtime.scratch(scratch_statistics, size_t(padded) * sizeof(Row)));
    pack(s.query, args.query_stride, s, rows, line, query_tiles, query_columns);
    pack(grad, gradients.grad_out_stride, s, rows, line, grad_tiles, grad_columns);
    memset(query_grad, 0, size_t(padded * depth_padded) * sizeof(float));
    for (int64_t row = 0; row < rows; row++) statistics[row] = statistics_of(s, row, grad, out);
    if (gradients.dsinks) sinks(s, rows, statistics);

    float* scores = floats(scratch_scores, (3 * chunk_rows + 1) * block_stride);  // P, dS and, for softcap, S; then the padding mask
    float* key_panels = floats(scratch_key, block * depth);
    float* value_panels = floats(scratch_value, block * depth);
    float* key_columns = floats(scratch_c, block * depth_padded);
    float* key_grad = floats(scratch_sums, 2 * block * depth_padded);
    auto* bits = args.dropout.enabled ? static_cast<uint8_t*>(runtime.scratch(scratch_keep, size_t(padded * keep_stride))) : nullptr;
    for (int64_t key = 0; key < s.keys; key += block) {
      const int64_t n = smaller(block, s.keys - key), n_padded = round_up(n, panel);
      float* value_grad = key_grad + block * depth_padded;
      memset(key_grad, 0, size_t(2 * block * depth_padded) * sizeof(float));
      bool visible;
      const float* mask = padding(s, key, n, n_padded, scores + 3 * chunk_rows * block_stride, visible);
      if (visible && rows > 0) {
        pack_transposed(s.key + key * args.key_stride[2], args.key_stride[2], n, depth, key_panels);
        pack_transposed(s.value + key * args.value_stride[2], args.value_stride[2], n, depth, value_panels);
        pack_columns(s.key + key * args.key_stride[2], args.key_stride[2], n, depth, key_columns);
        for (int64_t first = 0; first < rows; first += chunk_rows)
          chunk(s, first, smaller(chunk_rows, rows - first), key, n, mask, bits, query_tiles, query_columns, grad_tiles, grad_columns, statistics,
                key_panels, value_panels, key_columns, scores, key_grad, value_grad, query_grad);
      }
      store_rows(key_grad, depth_padded, args.softmax_scale, dk + key * gradients.dk_stride[2], gradients.dk_stride[2], n, depth);
      store_rows(value_grad, depth_padded, 1.0f, dv + key * gradients.dv_stride[2], gradients.dv_stride[2], n, depth);
    }
    for (int64_t row = 0; row < rows; row++)
      store_rows(query_grad + row * depth_padded, depth_padded, args.softmax_scale,
                 dq + query_of(0, row) * gradients.dq_stride[2] + head_of(s, row) * gradients.dq_stride[1], 0, 1, depth);
  }

  int64_t statistics_at(const Sequence& s, int64_t row) const {
    return s.batch * args.logsumexp_stride[0] + head_of(s, row) * args.logsumexp_stride[1] + s.first_query + query_of(0, row);
  }

  Row statistics_of(const Sequence& s, int64_t row, const T* grad, const T* out) const {
    const T* a = grad + query_of(0, row) * gradients.grad_out_stride[2] + head_of(s, row) * gradients.grad_out_stride[1];
    const T* b = out + query_of(0, row) * args.out_stride[2] + head_of(s, row) * args.out_stride[1];
    F32 sum = F32::zero();
    int64_t d = 0;
    for (; d + F32::width <= depth; d += F32::width) sum = fma(F32::load(a + d), F32::load(b + d), sum);
    float delta = bigmodel::BIGMODEL_ISA::sum(sum);
    for (; d < depth; d++) delta += to_float(a[d]) * to_float(b[d]);
    const int64_t at = statistics_at(s, row);
    if (gradients.grad_logsumexp) delta -= gradients.grad_logsumexp[at];
    const float logsumexp = args.logsumexp[at];
    return {logsumexp == -infinity ? 0.0f : logsumexp, delta};  // a row with no visible key: exp(-inf - 0) = 0, not NaN
  }

  // A sink is a key without value: dP = 0, so dS = -P delta.
  void sinks(const Sequence& s, int64_t rows, const Row* statistics) const {
    for (int64_t g = 0; g < group; g++) {
      float sink = 0, total = 0;
      const int64_t head = s.kv_head * group + g;
      with_dtype(args.sinks_dtype, [&](auto type) { sink = to_float(static_cast<const decltype(type)*>(args.sinks)[head]); });
      for (int64_t row = g; row < rows; row += group)
        if (args.logsumexp[statistics_at(s, row)] != -infinity) total -= __builtin_expf(sink - statistics[row].logsumexp) * statistics[row].delta;
      gradients.dsinks[s.batch * args.heads + head] = total;
    }
  }

  // Rows [first, first + count) against one block of keys.
  void chunk(const Sequence& s, int64_t first, int64_t count, int64_t key, int64_t n, const float* mask, uint8_t* bits, const float* query_tiles,
             const float* query_columns, const float* grad_tiles, const float* grad_columns, const Row* statistics, const float* key_panels,
             const float* value_panels, const float* key_columns, float* scores, float* key_grad, float* value_grad, float* query_grad) const {
    using Step = Widen<float>;
    const int64_t low_key = larger(0, low(s, query_of(0, first)) - key), high_key = smaller(n, high(s, query_of(0, first + count - 1)) - key);
    if (low_key >= high_key) return;
    const int64_t first_panel = low_key / panel, last_panel = ceil_div(high_key, panel), from = first_panel * panel, width = last_panel * panel - from;
    float *p = scores, *ds = scores + chunk_rows * block_stride, *products = ds + chunk_rows * block_stride;

    // ---- S = Q K^T, dP = dO V^T ----
    for (int64_t i = first_panel; i < last_panel; i++)
      for (int64_t r = 0; r < count; r += tile_rows)
        for (int64_t d = 0; d < depth; d += logit_depth) {
          const int64_t here = smaller(tile_rows, count - r), steps = smaller(logit_depth, depth - d), at = r * block_stride + i * panel;
          const int64_t tile = (first + r) * depth + d * tile_rows, panels = (i * depth + d) * panel;
          multiply_rows<Step>(here, steps, PackedTile<Step>{query_tiles + tile}, key_panels + panels, p + at, block_stride, d > 0);
          multiply_rows<Step>(here, steps, PackedTile<Step>{grad_tiles + tile}, value_panels + panels, ds + at, block_stride, d > 0);
        }

    // ---- P and dS ----
    // Rows begin at a whole query, because draw counts in queries; a chunk of a group that does not divide it begins within one.
    const int64_t first_query = query_of(0, first), last_query = query_of(0, first + count - 1);
    if (bits) draw(s, first_query, last_query - first_query + 1, key, n, bits);
    for (int64_t r = 0; r < count; r++) {
      float *line = p + r * block_stride + from, *gradient = ds + r * block_stride + from, *product = products + r * block_stride + from;
      const int64_t row = first + r, query = query_of(0, row), head = head_of(s, row);
      if (args.softcap > 0) memcpy(product, line, size_t(width) * sizeof(float));
      modify(s, query, head, key + from, smaller(width, n - from), width, mask ? mask + from : nullptr, line);
      probabilities(line, gradient, width, statistics[row], bits ? bits + (row - first_query * group) * keep_stride + from / 8 : nullptr);
      if (gradients.dbias) add_bias_gradient(s, query, head, key + from, smaller(width, n - from), gradient);
      if (args.softcap > 0) {
        const F32 inner = F32::set(args.softmax_scale / args.softcap);
        for (int64_t j = 0; j < width; j += F32::width) {
          const F32 t = tanh(F32::load(product + j) * inner), g = F32::load(gradient + j);
          (g - g * t * t).store(gradient + j);
        }
      }
    }

    // ---- dQ += dS K, dV += P^T dO, dK += dS^T Q ----
    const int64_t keys = smaller(n, from + width) - from;
    for (int64_t i = 0; i * panel < depth; i++) {
      for (int64_t r = 0; r < count; r += tile_rows)
        multiply_rows<Step>(smaller(tile_rows, count - r), keys, RowMajorTile{ds + r * block_stride + from, block_stride}, key_columns + (i * n + from) * panel,
                            query_grad + (first + r) * depth_padded + i * panel, depth_padded, true);
      const int64_t columns = first * depth_padded + i * count * panel;
      for (int64_t j = 0; j < keys; j += tile_rows) {
        const int64_t here = smaller(tile_rows, keys - j), at = (from + j) * depth_padded + i * panel;
        multiply_rows<Step>(here, count, ColumnTile{p + from + j, block_stride}, grad_columns + columns, value_grad + at, depth_padded, true);
        multiply_rows<Step>(here, count, ColumnTile{ds + from + j, block_stride}, query_columns + columns, key_grad + at, depth_padded, true);
      }
    }
  }

  // Scores become P (after dropout) and dP becomes dS, the gradient of the logits.
  void probabilities(float* scores, float* gradient, int64_t width, Row row, const uint8_t* keep) const {
    const F32 scale = F32::set(unit), logsumexp = F32::set(row.logsumexp), delta = F32::set(row.delta), base2 = F32::set(log2e);
    const F32 kept = F32::set(keep ? args.dropout.scale : 1.0f);
    for (int64_t j = 0; j < width; j += F32::width) {
      const F32 p = exp2((F32::load(scores + j) * scale - logsumexp) * base2);
      F32 dp = F32::load(gradient + j), dropped = p;
      if (keep) {
        const uint32_t lanes = lane_bits(keep + j / 8);
        dp = keep_lanes(dp, lanes) * kept;
        dropped = keep_lanes(p, lanes) * kept;
      }
      dropped.store(scores + j);
      (p * (dp - delta)).store(gradient + j);
    }
  }

  void add_bias_gradient(const Sequence& s, int64_t query, int64_t head, int64_t key, int64_t n, const float* gradient) const {
    float* to = gradients.dbias + s.batch * gradients.dbias_stride[0] + head * gradients.dbias_stride[1] + query * gradients.dbias_stride[2] + key;
    for (int64_t j = 0; j < n; j++) to[j] += gradient[j];
  }

  void run() const {
    const bool shared_bias = gradients.dbias && gradients.dbias_stride[0] == 0;
    const int64_t together = shared_bias ? args.batch : 1, tasks = args.batch / larger(1, together) * args.kv_heads;
    parallel(runtime, tasks, [&](int64_t i) {
      for (int64_t b = 0; b < together; b++) task(sequence(shared_bias ? b : i / args.kv_heads, i % args.kv_heads));
    });
  }
};

}  // namespace

void attention_backward(const Runtime& runtime, const AttentionBackwardArgs& args) {
  with_dtype(args.forward.dtype, [&](auto type) { Backward<decltype(type)>{{runtime, args.forward}, args}.run(); });
}

}  // namespace bigmodel::BIGMODEL_ISA
