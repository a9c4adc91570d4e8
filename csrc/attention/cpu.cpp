// attention: softmax(scale * Q K^T + bias, masked) V, tiled over keys with an online softmax, so that memory is linear in the
// sequence length. Milakov & Gimelshein, arXiv 1805.02867; Dao, FlashAttention-2, arXiv 2307.08691, algorithm 1.
//
//   one task: one sequence, one kv head, a chunk of its queries (with GQA, of all query heads that share the kv head)
//
//                      key block (key_block keys, packed once per chunk: K transposed into panels, V into panels)
//                     +--------------------------+
//     score_rows rows |  S = Q K^T, in L1        |   row max, P = 2^(S - max), row sum, O = O * 2^(old max - max) + P V
//                     +--------------------------+
//
// Dropout makes some of the P that go into P V zero, not those in the row sum. Its verdicts, a bit for a probability, are made for a chunk
// and key block at a time. A sink is a key without value: the running maximum and sum begin with it.
//
// The softmax needs 2^x alone: P = 2^((S - max) * scale * log2(e)). S stays unscaled, because scaling before the difference is
// taken would leave the rounding error of a large product in it. Everything between loading Q, K, V and storing O is float32. A chunk of very few rows (decoding) skips the packing, which would cost more
// than it saves, and takes K and V as they lie in memory.
#include "../arch/philox.h"
#include "../dispatch.h"
#include "../gemm/gemm.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

constexpr int64_t key_block = 256;
constexpr int64_t score_rows = 4 * tile_rows;
constexpr int64_t score_stride = key_block + 16;    // not a power of two, or the rows of a tile would share their cache sets
constexpr int64_t logit_depth = 128;                // longest chain of additions in a logit, as depth_block is for a product
constexpr int64_t direct_rows = 3;                  // up to here K and V are read in place
constexpr int64_t keep_stride = key_block / 8;
constexpr float log2e = 1.44269504f, infinity = __builtin_inff();

// Rows [0, keys) of K (or of any matrix, `depth` wide) as panels [keys / panel][depth][panel]: row r becomes column r.
template <class T>
static void pack_transposed(const T* x, int64_t stride, int64_t keys, int64_t depth, float* packed) {
  for (int64_t first = 0; first < keys; first += panel, packed += depth * panel) {
    const int64_t here = smaller(panel, keys - first);
    const T* source = x + first * stride;
    // Rows lie a whole (batch, heads) stride apart, which no hardware prefetcher follows.
    for (int64_t i = panel; i < smaller(2 * panel, keys - first); i++)
      for (int64_t d = 0; d < depth; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(source + i * stride + d);
    int64_t d = 0;
#if BIGMODEL_SIMD >= 256
    for (; d + 8 <= depth; d += 8)
      for (int64_t group = 0; group < panel; group += 8) {
        __m256 r[8];
        for (int i = 0; i < 8; i++) r[i] = group + i < here ? load8(source + (group + i) * stride + d) : _mm256_setzero_ps();
        transpose8x8(r, packed + d * panel + group, panel);
      }
#endif
    for (; d < depth; d++)
      for (int64_t i = 0; i < panel; i++) packed[d * panel + i] = i < here ? to_float(source[i * stride + d]) : 0.0f;
  }
}

// The same rows as panels [depth / panel][keys][panel]: V's columns, in its own order.
template <class T>
static void pack_columns(const T* x, int64_t stride, int64_t keys, int64_t depth, float* packed) {
  for (int64_t first = 0; first < depth; first += panel)
    for (int64_t j = 0; j < keys; j++, packed += panel) {
      const T* source = x + j * stride + first;
      __builtin_prefetch(source + 8 * stride);
      for (int64_t i = 0; i < panel; i += F32::width) {
        const int64_t here = depth - first - i;
        (here >= F32::width ? F32::load(source + i) : here > 0 ? load_partial(source + i, int(here)) : F32::zero()).store(packed + i);
      }
    }
}

struct Statistics {  // of one query row: running maximum of the scores and sum of what the softmax made of them
  float maximum, sum;
};

template <class T>
struct Attention {
  const Runtime& runtime;
  const AttentionArgs& args;
  const int64_t group = args.heads / args.kv_heads, depth = args.head_dim, depth_padded = round_up(args.head_dim, panel);
  // Scores are raw products Q K^T as long as nothing has to be added to logits; else they are made logits first.
  const bool raw = args.softcap == 0 && !args.bias && !args.alibi_slopes && args.softmax_scale > 0;
  const float unit = raw ? args.softmax_scale : 1.0f;   // logit = unit * score

  // One sequence and kv head: where its rows are and how keys are limited.
  struct Sequence {
    int64_t batch, kv_head, queries, keys, first_query;  // first_query: offset of the sequence's rows in a packed output
    const T *query, *key, *value;

    int64_t diagonal() const { return keys - queries; }  // bottom-right alignment
  };

  Sequence sequence(int64_t batch, int64_t kv_head) const {
    Sequence s = {batch, kv_head, args.query_length, args.key_length, 0, static_cast<const T*>(args.query) + batch * args.query_stride[0],
                  static_cast<const T*>(args.key) + batch * args.key_stride[0] + kv_head * args.key_stride[1],
                  static_cast<const T*>(args.value) + batch * args.value_stride[0] + kv_head * args.value_stride[1]};
    if (args.cu_seqlens_q) {
      s.first_query = args.cu_seqlens_q[batch];
      const int64_t first_key = args.cu_seqlens_k[batch];
      s.queries = args.cu_seqlens_q[batch + 1] - s.first_query;
      s.keys = args.cu_seqlens_k[batch + 1] - first_key;
      s.query += s.first_query * args.query_stride[2];
      s.key += first_key * args.key_stride[2];
      s.value += first_key * args.value_stride[2];
    }
    return s;
  }

  // Keys [low, high) that query i may see by causality and window.
  int64_t low(const Sequence& s, int64_t i) const {
    return args.window_left < 0 ? 0 : larger(0, i + s.diagonal() - args.window_left);
  }
  int64_t high(const Sequence& s, int64_t i) const {
    int64_t end = s.keys;
    if (args.is_causal) end = smaller(end, i + s.diagonal() + 1);
    if (args.window_right >= 0) end = smaller(end, i + s.diagonal() + args.window_right + 1);
    return larger(0, end);
  }

  // A row of a chunk is (query, head of the group), heads varying fastest, so limits grow with the row.
  int64_t query_of(int64_t first, int64_t row) const { return first + row / group; }
  int64_t head_of(const Sequence& s, int64_t row) const { return s.kv_head * group + row % group; }

  // ---- what is done to logits between S = QK^T and the softmax ----

  // scores = scores * scale + bias
  template <class B>
  static void add_bias(const B* bias, int64_t stride, float scale, float* scores, int64_t n) {
    const F32 factor = F32::set(scale);
    int64_t j = 0;
    if (stride == 1)
      for (; j + F32::width <= n; j += F32::width) fma(F32::load(scores + j), factor, F32::load(bias + j)).store(scores + j);
    for (; j < n; j++) scores[j] = scores[j] * scale + to_float(bias[j * stride]);
  }

  // scores -= slope * |position - j|, both counted from this block's first key
  static void add_alibi(float slope, float position, float* scores, int64_t n_padded) {
    alignas(64) float lanes[F32::width];
    for (int i = 0; i < F32::width; i++) lanes[i] = float(i);
    const F32 negative = F32::set(-slope), from = F32::load(lanes) - F32::set(position);
    for (int64_t j = 0; j < n_padded; j += F32::width) fma(abs(from + F32::set(float(j))), negative, F32::load(scores + j)).store(scores + j);
  }

  // Softcap, bias, ALiBi, padding and the row's own limits on scores [0, n) of keys [key, key + n); beyond n up to n_padded: -inf.
  void modify(const Sequence& s, int64_t query, int64_t head, int64_t key, int64_t n, int64_t n_padded, const float* mask, float* scores) const {
    float scale = args.softmax_scale;  // what is still to be multiplied in
    if (args.softcap > 0) {
      const F32 cap = F32::set(args.softcap), inner = F32::set(scale / args.softcap);
      for (int64_t j = 0; j < n_padded; j += F32::width) (tanh(F32::load(scores + j) * inner) * cap).store(scores + j);
      scale = 1.0f;
    }
    if (args.bias) {
      const int64_t at = s.batch * args.bias_stride[0] + head * args.bias_stride[1] + query * args.bias_stride[2] + key * args.bias_stride[3];
      with_dtype(args.bias_dtype, [&](auto type) {
        add_bias(static_cast<const decltype(type)*>(args.bias) + at, args.bias_stride[3], scale, scores, n);
      });
    } else if (!raw && args.softcap == 0) {
      for (int64_t j = 0; j < n_padded; j += F32::width) (F32::load(scores + j) * F32::set(scale)).store(scores + j);
    }
    if (args.alibi_slopes)
      add_alibi(args.alibi_slopes[s.batch * args.alibi_batch_stride + head], float(query + s.diagonal() - key), scores, n_padded);
    if (mask)
      for (int64_t j = 0; j < n_padded; j += F32::width) (F32::load(scores + j) + F32::load(mask + j)).store(scores + j);
    const int64_t first = smaller(n_padded, larger(0, low(s, query) - key)), end = larger(first, smaller(n, high(s, query) - key));
    for (int64_t j = 0; j < first; j++) scores[j] = -infinity;
    for (int64_t j = end; j < n_padded; j++) scores[j] = -infinity;
  }

  // Scores become probabilities relative to the new running maximum; returns the factor for what was summed before. With DROP those
  // whose bit in `keep` is 0 are zero for P V, though not for the sum.
  template <bool DROP>
  float softmax(float* scores, int64_t n_padded, Statistics& row, const uint8_t* keep) const {
    F32 m0 = F32::set(-infinity), m1 = m0;
    int64_t j = 0;
    for (; j + 2 * F32::width <= n_padded; j += 2 * F32::width) {
      m0 = max(m0, F32::load(scores + j));
      m1 = max(m1, F32::load(scores + j + F32::width));
    }
    for (; j < n_padded; j += F32::width) m0 = max(m0, F32::load(scores + j));
    const float block = maximum(max(m0, m1)), top = block > row.maximum ? block : row.maximum;
    const float reference = top == -infinity ? 0.0f : top;  // no key seen yet: -inf - 0 stays -inf and 2^-inf is 0
    const F32 shift = F32::set(reference), base2 = F32::set(unit * log2e);
    // One vector at a time: its constants fill the registers, and successive iterations overlap in the CPU anyway.
    F32 total = F32::zero();
    for (j = 0; j < n_padded; j += F32::width) {
      const F32 p = exp2((F32::load(scores + j) - shift) * base2);
      (DROP ? keep_lanes(p, lane_bits(keep + j / 8)) : p).store(scores + j);
      total = total + p;
    }
    const float factor = row.maximum == -infinity ? 0.0f : __builtin_exp2f((row.maximum - reference) * unit * log2e);
    row.sum = row.sum * factor + bigmodel::BIGMODEL_ISA::sum(total);
    row.maximum = top;
    return factor;
  }

  static BIGMODEL_INLINE uint32_t lane_bits(const uint8_t* keep) {
    if constexpr (F32::width == 8) return *keep;
    uint16_t bits;
    memcpy(&bits, keep, 2);
    return bits;
  }

  float softmax(float* scores, int64_t n_padded, Statistics& row, const uint8_t* keep) const {
    return keep ? softmax<true>(scores, n_padded, row, keep) : softmax<false>(scores, n_padded, row, keep);
  }

  // Dropout's bits of all rows of a chunk for keys [key, key + n), keep_stride bytes a row. Queries q and q + 8 share a call of the
  // generator, which takes 16 keys; `key` is a multiple of 16.
  void draw(const Sequence& s, int64_t first, int64_t count, int64_t key, int64_t n, uint8_t* keep) const {
    for (int64_t pair = first / 16 * 16; pair < first + count; pair += (pair & 7) == 7 ? 9 : 1) {
      const int64_t queries[2] = {pair, pair + 8};
      const bool present[2] = {pair >= first, pair + 8 >= first && pair + 8 < first + count};
      if (!present[0] && !present[1]) continue;
      const int64_t begin = larger(0, low(s, pair) - key) / 16, end = ceil_div(smaller(n, high(s, pair + 8) - key), 16);
      for (int64_t g = 0; g < group; g++)
        for (int64_t block = begin; block < end; block++) {
          const uint32_t bits = keep_probabilities(args.dropout, key / 16 + block, pair, s.kv_head * group + g, s.batch);
          for (int half = 0; half < 2; half++) {
            const uint16_t own = uint16_t(bits >> (16 * half));
            if (present[half]) memcpy(keep + ((queries[half] - first) * group + g) * keep_stride + 2 * block, &own, 2);
          }
        }
    }
  }

  // The running maximum, in units of scores, and sum of a row before any key.
  Statistics start(const Sequence& s, int64_t head) const {
    if (!args.sinks) return {-infinity, 0.0f};
    float sink = 0;
    with_dtype(args.sinks_dtype, [&](auto type) { sink = to_float(static_cast<const decltype(type)*>(args.sinks)[head]); });
    return {sink / unit, sink == -infinity ? 0.0f : 1.0f};
  }

  static void rescale(float* output, int64_t n, float factor) {
    if (factor == 1.0f) return;
    const F32 f = F32::set(factor);
    for (int64_t d = 0; d < n; d += F32::width) (F32::load(output + d) * f).store(output + d);
  }

  // The key padding mask of a block as 0 / -inf to add; nullptr where all its keys are visible, `visible` false where none is.
  const float* padding(const Sequence& s, int64_t key, int64_t n, int64_t n_padded, float* buffer, bool& visible) const {
    visible = true;
    if (!args.key_padding_mask) return nullptr;
    const uint8_t* mask = args.key_padding_mask + s.batch * args.mask_stride + key;
    int64_t count = 0;
    for (int64_t j = 0; j < n; j++) {
      buffer[j] = mask[j] ? 0.0f : -infinity;
      count += mask[j] != 0;
    }
    for (int64_t j = n; j < n_padded; j++) buffer[j] = -infinity;
    visible = count > 0;
    return count == n ? nullptr : buffer;
  }

  // ---- a chunk: queries [first, first + count) of one sequence and kv head ----

  void chunk(const Sequence& s, int64_t first, int64_t count) const {
    const int64_t rows = count * group, padded_rows = round_up(rows, tile_rows);
    const bool direct = rows <= direct_rows;
    auto floats = [&](ScratchSlot slot, int64_t n) { return static_cast<float*>(runtime.scratch(slot, size_t(n) * sizeof(float))); };
    float* query = floats(scratch_query, rows * depth_padded);
    float* output = floats(scratch_output, rows * depth_padded);
    float* scores = floats(scratch_scores, (score_rows + 1) * score_stride);     // the last row holds the padding mask
    auto* statistics = static_cast<Statistics*>(runtime.scratch(scratch_statistics, size_t(rows) * sizeof(Statistics)));
    float *tiles = nullptr, *packed_key = nullptr, *packed_value = nullptr;
    if (!direct) {
      tiles = floats(scratch_a, padded_rows * depth + 8);
      packed_key = floats(scratch_key, key_block * depth);
      packed_value = floats(scratch_value, key_block * depth_padded);
    }

    for (int64_t row = 0; row < rows; row++) {
      const T* source = s.query + query_of(first, row) * args.query_stride[2] + head_of(s, row) * args.query_stride[1];
      for (int64_t d = 0; d < depth_padded; d++) query[row * depth_padded + d] = d < depth ? to_float(source[d]) : 0.0f;
      statistics[row] = start(s, head_of(s, row));
    }
    if (!direct) pack_rows(query, depth_padded, rows, depth, tiles);
    memset(output, 0, size_t(rows * depth_padded) * sizeof(float));

    const bool dropping = args.dropout.enabled;
    auto* bits = dropping ? static_cast<uint8_t*>(runtime.scratch(scratch_keep, size_t(rows * keep_stride))) : nullptr;

    const int64_t begin = dropping ? low(s, first) / 16 * 16 : low(s, first), end = high(s, first + count - 1);
    for (int64_t key = begin; key < end; key += key_block) {
      const int64_t n = smaller(key_block, end - key), n_padded = round_up(n, panel);
      bool visible;
      const float* mask = padding(s, key, n, n_padded, scores + score_rows * score_stride, visible);
      if (!visible) continue;
      const T* keys = s.key + key * args.key_stride[2];
      const T* values = s.value + key * args.value_stride[2];
      if (dropping) draw(s, first, count, key, n, bits);
      if (direct) {
        direct_block(s, first, rows, key, n, mask, bits, keys, values, query, scores, statistics, output);
        continue;
      }
      pack_transposed(keys, args.key_stride[2], n, depth, packed_key);
      pack_columns(values, args.value_stride[2], n, depth, packed_value);
      for (int64_t row = 0; row < rows; row += score_rows)
        tile(s, first, row, smaller(score_rows, rows - row), key, n, mask, bits, tiles, packed_key,
             packed_value, scores, statistics, output);
    }

    for (int64_t row = 0; row < rows; row++) {
      const int64_t i = query_of(first, row), head = head_of(s, row);
      const float total = statistics[row].sum;
      const float kept = dropping ? args.dropout.scale : 1.0f;
      const F32 inverse = F32::set(total == 0.0f ? 0.0f : kept / total);  // no visible key: a row of zeros
      T* out = static_cast<T*>(args.out) + s.batch * args.out_stride[0] + head * args.out_stride[1] + (s.first_query + i) * args.out_stride[2];
      for (int64_t d = 0; d < depth; d += F32::width)
        store_row(F32::load(output + row * depth_padded + d) * inverse, out + d, depth - d);
      args.logsumexp[s.batch * args.logsumexp_stride[0] + head * args.logsumexp_stride[1] + s.first_query + i] =
          total == 0.0f ? -infinity : statistics[row].maximum * unit + __builtin_logf(total);
    }
  }

  static BIGMODEL_INLINE void store_row(F32 x, T* out, int64_t left) {
    if (left >= F32::width) x.store(out);
    else store_partial(x, out, int(left));
  }

  // score_rows rows against one packed key block.
  void tile(const Sequence& s, int64_t first, int64_t row, int64_t rows, int64_t key, int64_t n, const float* mask, const uint8_t* keep,
            const float* tiles, const float* packed_key, const float* packed_value, float* scores, Statistics* statistics, float* output) const {
    using Step = Widen<float>;
    const int64_t low_key = larger(0, low(s, query_of(first, row)) - key);
    const int64_t high_key = smaller(n, high(s, query_of(first, row + rows - 1)) - key);
    if (low_key >= high_key) return;
    const int64_t first_panel = low_key / panel, last_panel = ceil_div(high_key, panel);
    for (int64_t p = first_panel; p < last_panel; p++)
      for (int64_t r = 0; r < rows; r += tile_rows)
        for (int64_t d = 0; d < depth; d += logit_depth)
          multiply_rows<Step>(smaller(tile_rows, rows - r), smaller(logit_depth, depth - d), PackedTile<Step>{tiles + (row + r) * depth + d * tile_rows},
                              packed_key + (p * depth + d) * panel, scores + r * score_stride + p * panel, score_stride, d > 0);

    const int64_t from = first_panel * panel, width = last_panel * panel - from;
    for (int64_t r = 0; r < rows; r++) {
      float* line = scores + r * score_stride + from;
      modify(s, query_of(first, row + r), head_of(s, row + r), key + from, smaller(width, n - from), width, mask ? mask + from : nullptr, line);
      rescale(output + (row + r) * depth_padded, depth_padded, softmax(line, width, statistics[row + r], keep ? keep + (row + r) * keep_stride + from / 8 : nullptr));
    }
    for (int64_t p = 0; p * panel < depth; p++)
      for (int64_t r = 0; r < rows; r += tile_rows)
        multiply_rows<Step>(smaller(tile_rows, rows - r), high_key - from, RowMajorTile{scores + r * score_stride + from, score_stride},
                            packed_value + (p * n + from) * panel, output + (row + r) * depth_padded + p * panel, depth_padded, true);
  }

  // A few rows against a block of keys in place: dot products along head_dim, then a weighted sum of V's rows.
  void direct_block(const Sequence& s, int64_t first, int64_t rows, int64_t key, int64_t n, const float* mask, const uint8_t* keep,
                    const T* keys, const T* values, const float* query, float* scores, Statistics* statistics, float* output) const {
    const int64_t n_padded = round_up(n, panel), whole = depth / F32::width * F32::width;
    for (int64_t j = 0; j < n; j++) {
      const T* k = keys + j * args.key_stride[2];
      for (int64_t r = 0; r < rows; r++) {
        const float* q = query + r * depth_padded;
        F32 a0 = F32::zero(), a1 = F32::zero();
        int64_t d = 0;
        for (; d + 2 * F32::width <= whole; d += 2 * F32::width) {
          a0 = fma(F32::load(q + d), F32::load(k + d), a0);
          a1 = fma(F32::load(q + d + F32::width), F32::load(k + d + F32::width), a1);
        }
        for (; d < whole; d += F32::width) a0 = fma(F32::load(q + d), F32::load(k + d), a0);
        float dot = sum(a0 + a1);
        for (; d < depth; d++) dot += q[d] * to_float(k[d]);
        scores[r * score_stride + j] = dot;
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      float* line = scores + r * score_stride;
      for (int64_t j = n; j < n_padded; j++) line[j] = 0.0f;
      modify(s, query_of(first, r), head_of(s, r), key, n, n_padded, mask, line);
      rescale(output + r * depth_padded, depth_padded, softmax(line, n_padded, statistics[r], keep ? keep + r * keep_stride : nullptr));
      float* out = output + r * depth_padded;
      constexpr int64_t stripe = 4 * F32::width;
      int64_t d = 0;
      for (; d + stripe <= whole; d += stripe) {
        F32 acc[4];
        for (int i = 0; i < 4; i++) acc[i] = F32::load(out + d + i * F32::width);
        const T* v = values + d;
        for (int64_t j = 0; j < n; j++, v += args.value_stride[2]) {
          const F32 p = F32::set(line[j]);
          for (int i = 0; i < 4; i++) acc[i] = fma(p, F32::load(v + i * F32::width), acc[i]);
        }
        for (int i = 0; i < 4; i++) acc[i].store(out + d + i * F32::width);
      }
      for (; d < depth; d += F32::width) {
        const int here = int(smaller(F32::width, depth - d));
        F32 acc = F32::load(out + d);
        for (int64_t j = 0; j < n; j++) {
          const T* v = values + j * args.value_stride[2] + d;
          acc = fma(F32::set(line[j]), here == F32::width ? F32::load(v) : load_partial(v, here), acc);
        }
        acc.store(out + d);
      }
    }
  }

  void run() const {
    // Chunks as long as packing K and V per chunk stays cheap, but enough of them for every thread. Last queries first: under
    // causality they see the most keys, and long tasks are best started early.
    const int64_t sequences = args.batch * args.kv_heads;
    int64_t queries = larger(1, larger(96, 16384 / depth) / group);
    while (sequences * ceil_div(args.query_length, queries) < 4 * runtime.threads && queries * group > 16 * tile_rows) queries /= 2;
    int64_t chunks = ceil_div(args.query_length, queries);
    queries = ceil_div(args.query_length, chunks);
    if (args.dropout.enabled) {  // whole pairs of queries that share a call of the generator
      queries = round_up(queries, 16);
      chunks = ceil_div(args.query_length, queries);
    }
    parallel(runtime, sequences * chunks, [&](int64_t task) {
      const int64_t pair = task % sequences, first = (chunks - 1 - task / sequences) * queries;
      const Sequence s = sequence(pair / args.kv_heads, pair % args.kv_heads);
      if (first < s.queries) chunk(s, first, smaller(queries, s.queries - first));
    });
  }
};

}  // namespace

void attention(const Runtime& runtime, const AttentionArgs& args) {
  with_dtype(args.dtype, [&](auto type) { Attention<decltype(type)>{runtime, args}.run(); });
}

}  // namespace bigmodel::BIGMODEL_ISA
