// What attention looks at: its probabilities, and their entropy, their sum over queries and the largest of each query.
//
//   P = softmax(logits)     entropy = -sum(P log P) = log(total) - sum(P t)     t = logit - maximum <= 0; both terms are positive
//
//   one task: one sequence and kv head, with the query heads that share it
//
//                       all keys that the chunk sees, in blocks (K^T in panels, packed once)
//                      +------------------------+
//      chunk of rows   |  scores, then e^t      |  -> rows of P, or their entropy and largest; sums of columns for the mass
//                      +------------------------+
//
// Rows are any queries in any order: those whose probabilities are asked for. A task owns all that it writes, as in the backward.
#include "../attention/attention.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

constexpr int64_t chunk_rows = (48 + tile_rows - 1) / tile_rows * tile_rows;

template <class T>
struct Maps : Attention {
  const AttentionMapsArgs& maps;

  struct Row {
    int64_t place, query, head;         // place: among the rows of a head in the results
    bool counts;                        // by the mask of queries
    float maximum, total, surprise;     // of scores; of e^t and -t e^t over the keys and the sink
  };
  struct Chunk {
    int64_t count, begin, end;          // rows; keys of which one of them sees some
    Row* rows;
    float *tiles, *scores;              // scores: [block of keys][row][weight_line]
    float *mass, *lost;                 // of the task: a row of keys for each head of the group, and what adding up has rounded off
  };

  // Calls each(key, n, row of scores) for the blocks of keys of row r.
  template <class Each>
  static void each_block(const Chunk& c, int64_t r, const Each& each) {
    for (int64_t key = c.begin; key < c.end; key += weight_block)
      each(key, smaller(weight_block, c.end - key), c.scores + ((key - c.begin) / weight_block * chunk_rows + r) * weight_line);
  }

  // Scores of all rows, and the maximum of each.
  void multiply(const Sequence& s, const Chunk& c, const float* keys) const {
    alignas(64) float buffer[weight_block];
    for (int64_t key = c.begin; key < c.end; key += weight_block) {
      const int64_t n = smaller(weight_block, c.end - key), width = round_up(n, panel);
      float* scores = c.scores + (key - c.begin) / weight_block * chunk_rows * weight_line;
      bool visible;
      const float* mask = padding(s, key, n, width, buffer, visible);
      if (visible) multiply_keys(c.count, depth, logit_depth(s.queries), c.tiles, keys + key * depth, width, scores, weight_line);
      for (int64_t r = 0; r < c.count; r++) {
        Row& row = c.rows[r];
        float* line = scores + r * weight_line;
        F32 top = F32::set(-infinity);
        if (visible) modify(s, row.query, row.head, key, n, width, mask, line);
        for (int64_t j = 0; j < width; j += F32::width) {
          if (!visible) F32::set(-infinity).store(line + j);
          top = max(top, F32::load(line + j));
        }
        row.maximum = __builtin_fmaxf(row.maximum, maximum(top));
      }
    }
  }

  // A row's scores become e^t.
  void exponentials(const Chunk& c, int64_t r) const {
    Row& row = c.rows[r];
    if (row.maximum == -infinity) row.maximum = 0.0f;  // no visible key: e^-inf is 0, not NaN
    constexpr float lowest = -1e4f;                    // of t, which e^t takes to 0: what is masked adds 0 to the entropy
    const F32 scale = F32::set(unit), shift = F32::set(row.maximum);
    if (args.sinks) {
      const float t = __builtin_fmaxf((sink(row.head) / unit - row.maximum) * unit, lowest);
      row.total = __builtin_expf(t);
      row.surprise = -t * row.total;
    }
    each_block(c, r, [&](int64_t, int64_t n, float* scores) {
      F32 sum = F32::zero(), products = F32::zero();
      for (int64_t j = 0; j < n; j += F32::width) {
        const F32 t = max(F32::set(lowest), (F32::load(scores + j) - shift) * scale), weight = exponential(t, F32::zero());
        weight.store(scores + j);
        sum = sum + weight;
        products = fma(t, weight, products);
      }
      row.total += bigmodel::BIGMODEL_ISA::sum(sum);
      row.surprise -= bigmodel::BIGMODEL_ISA::sum(products);
    });
  }

  void store_probabilities(const Sequence& s, const Chunk& c, int64_t r) const {
    const Row& row = c.rows[r];
    T* out = static_cast<T*>(maps.probabilities) + s.batch * maps.out_stride[0] + row.head * maps.out_stride[1] + row.place * maps.out_stride[2];
    auto zeros = [&](int64_t from, int64_t to) { memset(static_cast<void*>(out + from), 0, size_t(larger(0, to - from)) * sizeof(T)); };
    if (!row.counts || row.total == 0.0f) return zeros(0, maps.width);
    const Divisor divisor(row.total, 1.0f / row.total);
    zeros(0, c.begin);
    each_block(c, r, [&](int64_t key, int64_t n, const float* weights) {
      each_vector(n, [&](int64_t j, int here) __attribute__((always_inline)) { store(divisor.of(F32::load(weights + j)), out + key + j, here); });
    });
    zeros(larger(c.begin, c.end), maps.width);
  }

  // The largest probabilities so far, in order.
  struct Largest {
    float* probabilities;
    int64_t *keys, count;
    void start() const {
      for (int64_t i = 0; i < count; i++) {
        probabilities[i] = 0.0f;
        keys[i] = -1;
      }
    }
    void put(float p, int64_t key) const {
      if (!(p > probabilities[count - 1])) return;
      int64_t i = count - 1;
      for (; i > 0 && p > probabilities[i - 1]; i--) {
        probabilities[i] = probabilities[i - 1];
        keys[i] = keys[i - 1];
      }
      probabilities[i] = p;
      keys[i] = key;
    }
  };

  void store_statistics(const Sequence& s, const Chunk& c, int64_t r) const {
    const Row& row = c.rows[r];
    const int64_t at = s.batch * maps.rows_stride[0] + row.head * maps.rows_stride[1] + row.place;
    const Largest largest = {maps.top_probabilities + at * maps.top_k, maps.top_keys + at * maps.top_k, maps.top_k};
    largest.start();
    maps.entropy[at] = 0.0f;
    if (!row.counts || row.total == 0.0f) return;
    maps.entropy[at] = __builtin_logf(row.total) + row.surprise / row.total;
    const Divisor divisor(row.total, 1.0f / row.total);
    each_block(c, r, [&](int64_t key, int64_t n, const float* weights) {
      const int64_t first = row.head % group * round_up(s.keys, weight_block) + key;
      float *mass = c.mass + first, *lost = c.lost + first;
      for (int64_t j = 0; j < n; j += F32::width) {
        const F32 p = divisor.of(F32::load(weights + j)), before = F32::load(mass + j), sum = before + p;
        sum.store(mass + j);
        (F32::load(lost + j) + (p - (sum - before))).store(lost + j);
        if (maps.top_k == 0 || maximum(p) <= largest.probabilities[maps.top_k - 1]) continue;
        alignas(64) float lanes[F32::width];
        p.store(lanes);
        for (int64_t i = 0; i < smaller(F32::width, n - j); i++) largest.put(lanes[i], key + j + i);
      }
    });
  }

  void task(const Sequence& s) const {
    const int64_t keys_padded = round_up(s.keys, weight_block);
    const T *q = static_cast<const T*>(args.query) + s.query, *k = static_cast<const T*>(args.key) + s.key;
    Chunk c = {};
    c.rows = scratch_of<Row>(runtime, scratch_statistics, chunk_rows);
    c.tiles = scratch_of<float>(runtime, scratch_a, chunk_rows * depth + 8);
    c.scores = scratch_of<float>(runtime, scratch_scores, ceil_div(s.keys, weight_block) * chunk_rows * weight_line);
    float* line = scratch_of<float>(runtime, scratch_c, chunk_rows * depth_padded);
    float* keys = scratch_of<float>(runtime, scratch_key, keys_padded * depth);
    for (int64_t key = 0; key < s.keys; key += weight_block)
      pack_transposed(k + key * args.key_stride[2], args.key_stride[2], smaller(weight_block, s.keys - key), depth, keys + key * depth);

    // The queries of this sequence: all, or those of the list that are its own.
    const int64_t listed = maps.queries ? maps.count : s.queries;
    int64_t* places = scratch_of<int64_t>(runtime, scratch_sums, listed + 1);
    int64_t count = 0;
    for (int64_t i = 0; i < listed; i++)
      if (!maps.queries || (maps.queries[i] >= s.first_query && maps.queries[i] < s.first_query + s.queries)) places[count++] = maps.queries ? i : s.first_query + i;

    if (maps.mass) {
      c.mass = scratch_of<float>(runtime, scratch_output, 2 * group * keys_padded);
      c.lost = c.mass + group * keys_padded;
      memset(c.mass, 0, size_t(2 * group * keys_padded) * sizeof(float));
    }
    for (int64_t first = 0; first < count * group; first += chunk_rows) {
      c.count = smaller(chunk_rows, count * group - first);
      c.begin = s.keys;
      c.end = 0;
      for (int64_t r = 0; r < c.count; r++) {
        const int64_t place = places[(first + r) / group], query = (maps.queries ? maps.queries[place] : place) - s.first_query, head = head_of(s, first + r);
        const bool counts = !maps.query_padding_mask || maps.query_padding_mask[s.batch * args.query_length + query];
        c.rows[r] = {place, query, head, counts, args.sinks ? sink(head) / unit : -infinity, 0.0f, 0.0f};
        c.begin = smaller(c.begin, low(s, query) / weight_block * weight_block);
        c.end = larger(c.end, high(s, query));
        const T* x = q + query * args.query_stride[2] + head * args.query_stride[1];
        widen_row(x, depth, depth_padded, line + r * depth_padded);
      }
      pack_rows(line, depth_padded, c.count, depth, c.tiles);
      multiply(s, c, keys);
      for (int64_t r = 0; r < c.count; r++) {
        exponentials(c, r);
        if (maps.probabilities) store_probabilities(s, c, r);
        else store_statistics(s, c, r);
      }
    }
    for (int64_t g = 0; g < group && maps.mass; g++) {
      const int64_t first_key = args.cu_seqlens_k ? args.cu_seqlens_k[s.batch] : 0;
      float* out = maps.mass + s.batch * maps.mass_stride[0] + (s.kv_head * group + g) * maps.mass_stride[1] + first_key;
      for (int64_t j = 0; j < s.keys; j++) out[j] = c.mass[g * keys_padded + j] + c.lost[g * keys_padded + j];
    }
  }

  void run() const {
    parallel(runtime, args.batch * args.kv_heads, [&](int64_t i) { task(sequence(i / args.kv_heads, i % args.kv_heads)); });
  }
};

}  // namespace

void attention_maps(const Runtime& runtime, const AttentionMapsArgs& args) {
  with_dtype(args.attention.dtype, [&](auto type) { Maps<decltype(type)>{{runtime, args.attention}, args}.run(); });
}

}  // namespace bigmodel::BIGMODEL_ISA
