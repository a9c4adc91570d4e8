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
// taken would leave the rounding error of a large product in it. Everything between loading Q, K, V and storing O is float32. A chunk of
// very few rows (decoding) skips the packing, which would cost more than it saves, and takes K and V as they lie in memory. By the tile
// unit: tile_unit.cpp.
#include "forward.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

// scores = scores * scale + bias
template <class B>
void add_bias(const B* bias, int64_t stride, float scale, float* scores, int64_t n) {
  const F32 factor = F32::set(scale);
  int64_t j = 0;
  if (stride == 1)
    for (; j + F32::width <= n; j += F32::width) fma(F32::load(scores + j), factor, F32::load(bias + j)).store(scores + j);
  for (; j < n; j++) scores[j] = scores[j] * scale + to_float(bias[j * stride]);
}

// scores -= slope * |position - j|, both counted from this block's first key
void add_alibi(float slope, float position, float* scores, int64_t n_padded) {
  alignas(64) float lanes[F32::width];
  for (int i = 0; i < F32::width; i++) lanes[i] = float(i);
  const F32 negative = F32::set(-slope), from = F32::load(lanes) - F32::set(position);
  for (int64_t j = 0; j < n_padded; j += F32::width) fma(abs(from + F32::set(float(j))), negative, F32::load(scores + j)).store(scores + j);
}

}  // namespace

void modify_scores(const AttentionArgs& args, const ScoreRow& row, int64_t key, int64_t n, int64_t n_padded, const float* mask,
                   float* scores) {
  float scale = args.softmax_scale;  // what is still to be multiplied in
  if (args.softcap > 0) {
    const F32 cap = F32::set(args.softcap), inner = F32::set(scale / args.softcap);
    for (int64_t j = 0; j < n_padded; j += F32::width) (tanh(F32::load(scores + j) * inner) * cap).store(scores + j);
    scale = 1.0f;
  }
  if (args.bias) {
    const int64_t* stride = args.bias_stride;
    const int64_t at = row.batch * stride[0] + row.head * stride[1] + row.query * stride[2] + key * stride[3];
    with_dtype(args.bias_dtype, [&](auto type) {
      add_bias(static_cast<const decltype(type)*>(args.bias) + at, stride[3], scale, scores, n);
    });
  } else if (!scores_are_raw(args) && args.softcap == 0) {
    for (int64_t j = 0; j < n_padded; j += F32::width) (F32::load(scores + j) * F32::set(scale)).store(scores + j);
  }
  if (args.alibi_slopes)
    add_alibi(args.alibi_slopes[row.batch * args.alibi_batch_stride + row.head], float(row.query + row.diagonal - key), scores, n_padded);
  if (mask)
    for (int64_t j = 0; j < n_padded; j += F32::width) (F32::load(scores + j) + F32::load(mask + j)).store(scores + j);
  const int64_t first = smaller(n_padded, larger(0, row.low - key)), end = larger(first, smaller(n, row.high - key));
  for (int64_t j = 0; j < first; j++) scores[j] = -infinity;
  for (int64_t j = end; j < n_padded; j++) scores[j] = -infinity;
}

void multiply_keys(int64_t rows, int64_t depth, int64_t chain, const float* tiles, const float* keys, int64_t width, float* scores, int64_t stride) {
  for (int64_t p = 0; p < width; p += panel)
    for (int64_t r = 0; r < rows; r += tile_rows)
      for (int64_t d = 0; d < depth; d += chain)
        multiply_tile(smaller(tile_rows, rows - r), smaller(chain, depth - d), tiles + r * depth + d * tile_rows, keys + p * depth + d * panel,
                      scores + r * stride + p, stride, d > 0);
}

void multiply_values(int64_t rows, int64_t keys, const float* weights, int64_t stride, const float* values, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += tile_rows)
    multiply_tile_of_rows(smaller(tile_rows, rows - r), keys, weights + r * stride, stride, values, out + r * out_stride, out_stride, true);
}

namespace {

// What works on packed keys and values, in float32 whatever is stored.
struct PackedForward : Attention {
  // score_rows rows against one packed key block.
  void tile(const Sequence& s, int64_t first, int64_t row, int64_t rows, int64_t key, int64_t n, const float* mask, const uint8_t* keep,
            const float* tiles, const float* packed_key, const float* packed_value, float* scores, Statistics* statistics, float* output) const {
    const int64_t low_key = larger(0, low(s, query_of(first, row)) - key);
    const int64_t high_key = smaller(n, high(s, query_of(first, row + rows - 1)) - key);
    if (low_key >= high_key) return;
    const int64_t first_panel = low_key / panel, last_panel = ceil_div(high_key, panel);
    const int64_t from = first_panel * panel, width = last_panel * panel - from;
    multiply_keys(rows, depth, logit_depth(s.queries), tiles + row * depth, packed_key + from * depth, width, scores + from, score_stride);
    for (int64_t r = 0; r < rows; r++) {
      float* line = scores + r * score_stride + from;
      modify(s, query_of(first, row + r), head_of(s, row + r), key + from, smaller(width, n - from), width, mask ? mask + from : nullptr, line);
      rescale(output + (row + r) * depth_padded, depth_padded, softmax(line, width, statistics[row + r], keep ? keep + (row + r) * keep_stride + from / 8 : nullptr));
    }
    for (int64_t p = 0; p * panel < depth; p++)
      multiply_values(rows, high_key - from, scores + from, score_stride, packed_value + (p * n + from) * panel,
                      output + row * depth_padded + p * panel, depth_padded);
  }
};

template <class T>
struct Forward : PackedForward {
  // ---- a chunk: queries [first, first + count) of one sequence and kv head ----

  void chunk(const Sequence& s, int64_t first, int64_t count, bool direct) const {
    const int64_t rows = count * group, padded_rows = round_up(rows, tile_rows);
    float* query = scratch_of<float>(runtime, scratch_query, rows * depth_padded);
    float* output = scratch_of<float>(runtime, scratch_output, rows * depth_padded);
    float* scores = scratch_of<float>(runtime, scratch_scores, (score_rows + 1) * score_stride);     // the last row holds the padding mask
    auto* statistics = scratch_of<Statistics>(runtime, scratch_statistics, rows);
    float *tiles = nullptr, *packed_key = nullptr, *packed_value = nullptr;
    if (!direct) {
      tiles = scratch_of<float>(runtime, scratch_a, padded_rows * depth + 8);
      packed_key = scratch_of<float>(runtime, scratch_key, key_block * depth);
      packed_value = scratch_of<float>(runtime, scratch_value, key_block * depth_padded);
    }

    for (int64_t row = 0; row < rows; row++) {
      const T* source = static_cast<const T*>(args.query) + s.query + query_of(first, row) * args.query_stride[2] + head_of(s, row) * args.query_stride[1];
      widen_row(source, depth, depth_padded, query + row * depth_padded);
      statistics[row] = start(s, head_of(s, row));
    }
    if (!direct) pack_rows(query, depth_padded, rows, depth, tiles);
    memset(output, 0, size_t(rows * depth_padded) * sizeof(float));

    const bool dropping = args.dropout.enabled;
    auto* bits = dropping ? scratch_of<uint8_t>(runtime, scratch_keep, rows * keep_stride) : nullptr;

    const int64_t begin = dropping ? low(s, first) / 16 * 16 : low(s, first), end = high(s, first + count - 1);
    for (int64_t key = begin; key < end; key += key_block) {
      const int64_t n = smaller(key_block, end - key), n_padded = round_up(n, panel);
      bool visible;
      const float* mask = padding(s, key, n, n_padded, scores + score_rows * score_stride, visible);
      if (!visible) continue;
      const T* keys = static_cast<const T*>(args.key) + s.key + key * args.key_stride[2];
      const T* values = static_cast<const T*>(args.value) + s.value + key * args.value_stride[2];
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

    for (int64_t row = 0; row < rows; row++)
      finish_row<T>(*this, s, query_of(first, row), head_of(s, row), output + row * depth_padded, statistics[row].sum,
                    statistics[row].maximum * unit);
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
      constexpr int64_t stripe = 4 * F32::width, chain = 32;  // of keys whose sum is made before it is added, as in products of few rows
      for (int64_t from = 0; from < n; from += chain) {
        float* out = output + r * depth_padded;
        const int64_t last = smaller(n, from + chain);
        int64_t d = 0;
        for (; d + stripe <= whole; d += stripe) {
          F32 acc[4] = {F32::zero(), F32::zero(), F32::zero(), F32::zero()};
          const T* v = values + from * args.value_stride[2] + d;
          for (int64_t j = from; j < last; j++, v += args.value_stride[2]) {
            const F32 p = F32::set(line[j]);
            for (int i = 0; i < 4; i++) acc[i] = fma(p, F32::load(v + i * F32::width), acc[i]);
          }
          for (int i = 0; i < 4; i++) (F32::load(out + d + i * F32::width) + acc[i]).store(out + d + i * F32::width);
        }
        for (; d < depth; d += F32::width) {
          const int here = int(smaller(F32::width, depth - d));
          F32 acc = F32::zero();
          for (int64_t j = from; j < last; j++) {
            const T* v = values + j * args.value_stride[2] + d;
            acc = fma(F32::set(line[j]), here == F32::width ? F32::load(v) : load_partial(v, here), acc);
          }
          (F32::load(out + d) + acc).store(out + d);
        }
      }
    }
  }
};

}  // namespace

void attention(const Runtime& runtime, const AttentionArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    const Forward<decltype(type)> forward = {{{runtime, args}}};
    each_chunk(forward, larger(96, 16384 / args.head_dim), [&](const Attention::Sequence& s, int64_t first, int64_t count) {
      forward.chunk(s, first, count, count * forward.group <= direct_rows);
    });
  });
}

void attention_chunk(const Runtime& runtime, const AttentionArgs& args, int64_t batch, int64_t kv_head, int64_t first, int64_t count,
                     bool direct) {
  with_dtype(args.dtype, [&](auto type) {
    const Forward<decltype(type)> forward = {{{runtime, args}}};
    forward.chunk(forward.sequence(batch, kv_head), first, count, direct);
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
