// What the attention forward and backward share: where sequences and their visible keys are, what lies between Q K^T and the softmax
// (softcap, bias, ALiBi, masks), dropout's verdicts, and K and V packed for the micro kernel.
#pragma once
#include "../arch/philox.h"
#include "../dispatch.h"
#include "../gemm/gemm.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

constexpr int64_t key_block = 256;
constexpr int64_t score_rows = 4 * tile_rows;
constexpr int64_t score_stride = key_block + 16;    // not a power of two, or the rows of a tile would share their cache sets
constexpr int64_t direct_rows = 3;                  // up to here K and V are read in place
constexpr int64_t direct_scores = 32;               // so few fill too little of the tile unit's registers
constexpr int64_t keep_stride = key_block / 8;
constexpr int64_t weight_block = 128;               // keys whose P and dS the backward makes together
constexpr int64_t weight_line = weight_block + 16;  // as score_stride
static_assert(weight_block % 16 == 0 && weight_block <= key_block, "a block's dropout bits start at a call of the generator, in a row of keep_stride bytes");
// Longest chain of additions in a logit, as depth_block is for a product. Plain PyTorch takes the products of few rows as dot products of
// vectors, whose chains are short.
constexpr int64_t few_queries = 16;
constexpr int64_t logit_depth(int64_t queries) { return queries <= few_queries ? 16 : 128; }
constexpr float log2e = 1.44269504f, infinity = __builtin_inff();

template <class P>
static P* scratch_of(const Runtime& runtime, ScratchSlot slot, int64_t n) { return static_cast<P*>(runtime.scratch(slot, size_t(n) * sizeof(P))); }

// A row of Q or dO as floats, completed with zeros.
template <class T>
static void widen_row(const T* x, int64_t depth, int64_t padded, float* out) {
  for (int64_t d = 0; d < padded; d++) out[d] = d < depth ? to_float(x[d]) : 0.0f;
}

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
#if BIGMODEL_SIMD >= 128
    for (; d + 8 <= depth; d += 8)
      for (int64_t group = 0; group < panel; group += 8) {
        Eight r[8];
        for (int i = 0; i < 8; i++) r[i] = group + i < here ? load8(source + (group + i) * stride + d) : zero8();
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

}  // namespace

// Scores are raw products Q K^T as long as nothing has to be added to logits; else they are made logits first.
static bool scores_are_raw(const AttentionArgs& args) {
  return args.softcap == 0 && !args.bias && !args.alibi_slopes && args.softmax_scale > 0;
}

}  // namespace bigmodel::BIGMODEL_ISA

// What forward, backward and maps call is compiled once, in cpu.cpp, and for sets that extend another once with it.
namespace bigmodel::BIGMODEL_REST {

// Scores of `rows` rows, in tiles, against `width` keys, in panels: whole ones. `chain`: see logit_depth.
void multiply_keys(int64_t rows, int64_t depth, int64_t chain, const float* tiles, const float* keys, int64_t width, float* scores, int64_t stride);
// out += weights times a panel of `keys` values: `rows` rows of each.
void multiply_values(int64_t rows, int64_t keys, const float* weights, int64_t stride, const float* values, float* out, int64_t out_stride);
// Softcap, bias, ALiBi, padding and the row's own limits on scores [0, n) of keys [key, key + n); beyond n up to n_padded: -inf.
struct ScoreRow { int64_t batch, head, query, diagonal, low, high; };   // diagonal: of its sequence; it may see keys [low, high)
void modify_scores(const AttentionArgs& args, const ScoreRow& row, int64_t key, int64_t n, int64_t n_padded, const float* mask,
                   float* scores);
// The forward and the backward by vectors; of the forward a chunk of queries alone (`direct`: with K and V read in place), of the backward
// a sequence's kv head.
void attention(const Runtime& runtime, const AttentionArgs& args);
void attention_chunk(const Runtime& runtime, const AttentionArgs& args, int64_t batch, int64_t kv_head, int64_t first, int64_t count,
                     bool direct);
void attention_backward(const Runtime& runtime, const AttentionBackwardArgs& args);
void attention_backward_task(const Runtime& runtime, const AttentionBackwardArgs& args, int64_t batch, int64_t kv_head);

}  // namespace bigmodel::BIGMODEL_REST

namespace bigmodel::BIGMODEL_ISA {

struct Statistics {  // of one query row: running maximum of the scores and sum of what the softmax made of them
  float maximum, sum;
};

struct Attention {
  const Runtime& runtime;
  const AttentionArgs& args;
  const int64_t group = args.heads / args.kv_heads, depth = args.head_dim, depth_padded = round_up(args.head_dim, panel);
  const bool raw = scores_are_raw(args);
  const float unit = raw ? args.softmax_scale : 1.0f;   // logit = unit * score

  // One sequence and kv head: where its rows are and how keys are limited.
  struct Sequence {
    int64_t batch, kv_head, queries, keys, first_query;  // first_query: offset of the sequence's rows in a packed output
    int64_t query, key, value;                           // where its rows begin in args' arrays, in elements

    int64_t diagonal() const { return keys - queries; }  // bottom-right alignment
  };

  Sequence sequence(int64_t batch, int64_t kv_head) const {
    Sequence s = {batch, kv_head, args.query_length, args.key_length, 0, batch * args.query_stride[0],
                  batch * args.key_stride[0] + kv_head * args.key_stride[1], batch * args.value_stride[0] + kv_head * args.value_stride[1]};
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

  void modify(const Sequence& s, int64_t query, int64_t head, int64_t key, int64_t n, int64_t n_padded, const float* mask,
              float* scores) const {
    rest::modify_scores(args, {s.batch, head, query, s.diagonal(), low(s, query), high(s, query)}, key, n, n_padded, mask, scores);
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

  // Dropout's bits of all rows of a chunk for keys [key, key + n), `stride` bytes a row. Queries q and q + 8 share a call of the
  // generator, which takes 16 keys; `key` is a multiple of 16.
  void draw(const Sequence& s, int64_t first, int64_t count, int64_t key, int64_t n, uint8_t* keep, int64_t stride = keep_stride) const {
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
            if (present[half]) memcpy(keep + ((queries[half] - first) * group + g) * stride + 2 * block, &own, 2);
          }
        }
    }
  }

  float sink(int64_t head) const {
    float value = 0;
    with_dtype(args.sinks_dtype, [&](auto type) { value = to_float(static_cast<const decltype(type)*>(args.sinks)[head]); });
    return value;
  }

  // The running maximum, in units of scores, and sum of a row before any key.
  Statistics start(const Sequence& s, int64_t head) const {
    if (!args.sinks) return {-infinity, 0.0f};
    const float first = sink(head);
    return {first / unit, first == -infinity ? 0.0f : 1.0f};
  }

  // e^(x + low). The product with log2(e) is rounded by more, for large x, than 2^y is: what it lost is made good.
  static BIGMODEL_INLINE F32 exponential(F32 x, F32 low) {
    const F32 base2 = F32::set(log2e), y = x * base2, lost = fma(low, base2, fma(x, F32::set(1.92596299e-8f), fma(x, base2, -y)));
    // Of -inf nothing is known to be lost, a NaN; of a product that is beyond float (a mask of float's lowest) all is, and p is 0.
    const F32 p = exp2(y), made_good = min(max(lost, F32::set(-1.0f)), F32::set(1.0f));
    return fma(p, made_good * F32::set(0.693147181f), p);
  }

  // Divides by the sum of a row, exactly 1 where the two are the same: a product with the inverse, and what that is wrong by made good.
  struct Divisor {
    F32 minus, inverse;
    BIGMODEL_INLINE Divisor(float divisor, float inverse) : minus(F32::set(-divisor)), inverse(F32::set(inverse)) {}
    BIGMODEL_INLINE F32 of(F32 p) const {
      const F32 quotient = p * inverse;
      return fma(fma(quotient, minus, p), inverse, quotient);
    }
  };

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
};

}  // namespace bigmodel::BIGMODEL_ISA
