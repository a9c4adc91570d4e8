// What the attention kernels of every architecture do with a tile of S and of O in registers.
//
// mma.sync and wgmma leave a warp's 16 rows the same way: lane 4 g + t holds, of each block j of eight columns, x[j][0, 1] = row g,
// columns 8 j + 2 t and + 1, and x[j][2, 3] = row g + 8. So a row lies in four lanes, and a thread has two rows.
#pragma once
#include "arch/number.cuh"
#include "arch/philox.cuh"
#include "arch/swizzle.cuh"
#include "arch/warp.cuh"
#include "attention/cuda.h"

namespace bigmodel::cuda {

template <int blocks>
BM_DEVICE void clear(float (&x)[blocks][4]) {
  BM_UNROLL
  for (int j = 0; j < blocks; j++)
    BM_UNROLL
    for (int e = 0; e < 4; e++) x[j][e] = 0;
}

// Two blocks of P as the A fragment of the next product.
template <typename Element>
BM_DEVICE void to_fragment(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<Element>(left[0], left[1]);
  a[1] = pack<Element>(left[2], left[3]);
  a[2] = pack<Element>(right[0], right[1]);
  a[3] = pack<Element>(right[2], right[3]);
}

// Where a sequence lies: the whole of a dense batch's row, or a part of packed tensors.
struct Sequence {
  int first_query = 0, first_key = 0, queries, keys;

  static BM_DEVICE Sequence of(const AttentionParams& p, int batch) {
    if (p.cu_seqlens_q == nullptr) return {0, 0, p.query_length, p.key_length};
    const int q = load_global(p.cu_seqlens_q + batch), k = load_global(p.cu_seqlens_k + batch);
    return {q, k, load_global(p.cu_seqlens_q + batch + 1) - q, load_global(p.cu_seqlens_k + batch + 1) - k};
  }
  // Query i stands at key i + offset: causal is aligned to the last of both.
  BM_DEVICE int offset() const { return keys - queries; }
};

// The tiles of keys that a tile of queries sees (or of queries that see a tile of keys), and of those the ones without a hidden pair.
struct TileRange {
  int begin, end;            // keys (or queries); begin is a multiple of the tile
  int whole_begin, whole_end;
  int tile;
  BM_DEVICE int tiles() const { return end > begin ? (end - begin + tile - 1) / tile : 0; }
  BM_DEVICE bool all_visible(int start) const { return start >= whole_begin && start + tile <= whole_end; }
};
template <int tile_n>
BM_DEVICE TileRange visible_keys(const AttentionParams& p, const Sequence& s, int m_start, int tile_m) {
  const int last_row = (m_start + tile_m < s.queries ? m_start + tile_m : s.queries) - 1, offset = s.offset();
  TileRange r{0, s.keys, 0, s.keys, tile_n};
  if (p.window_right >= 0) {
    if (last_row + offset + p.window_right + 1 < r.end) r.end = last_row + offset + p.window_right + 1;
    if (m_start + offset + p.window_right + 1 < r.whole_end) r.whole_end = m_start + offset + p.window_right + 1;
  }
  if (p.window_left >= 0) {
    if (m_start + offset - p.window_left > 0) r.begin = (m_start + offset - p.window_left) / tile_n * tile_n;
    r.whole_begin = m_start + tile_m - 1 + offset - p.window_left;
  }
  return r;
}

// The backward's rows of S^T are keys.
template <int tile_m>
BM_DEVICE TileRange visible_queries(const AttentionParams& p, const Sequence& s, int n_start, int tile_n) {
  const int last_key = (n_start + tile_n < s.keys ? n_start + tile_n : s.keys) - 1, offset = s.offset();
  TileRange r{0, s.queries, 0, n_start + tile_n <= s.keys ? s.queries : 0, tile_m};
  if (p.window_right >= 0) {
    if (n_start - offset - p.window_right > 0) r.begin = (n_start - offset - p.window_right) / tile_m * tile_m;
    r.whole_begin = n_start + tile_n - 1 - offset - p.window_right;
  }
  if (p.window_left >= 0) {
    if (last_key - offset + p.window_left + 1 < r.end) r.end = last_key - offset + p.window_left + 1;
    if (n_start - offset + p.window_left + 1 < r.whole_end) r.whole_end = n_start - offset + p.window_left + 1;
  }
  return r;
}

// What the backward knows of a query: logsumexp in units of log 2, and delta = rowsum(dO * O) - the gradient of logsumexp.
struct RowStatistics { float logsumexp, delta; };
// Of the two queries that a thread has in each block of S: its rows, the same in all blocks, or its columns of S^T.
struct alignas(16) RowPair { RowStatistics row[2]; };

// What lies between Q K^T and P, for this thread's elements of a tile. In the backward's tiles of S^T (`transposed`) keys are rows.
template <typename Element, bool General, bool transposed = false>
class Scores {
 public:
  BM_DEVICE Scores(const AttentionParams& p, const Sequence& s, int batch, int head) : p_(p), s_(s), batch_(batch), head_(head) {
    if constexpr (General) {
      if (p.alibi_slopes != nullptr) slope_ = load_global(p.alibi_slopes + batch * p.alibi_stride + head);
      if (p.dropout_seed != nullptr) seed_ = uint64_t(load_global(p.dropout_seed));
    }
  }

  // Products become logits; `unit()` times that is in units of log 2. row0: this thread's upper row; column0: the tile's first column.
  template <int blocks>
  BM_DEVICE void logits(float (&x)[blocks][4], int row0, int column0, bool all_visible) const {
    if constexpr (General) {
      NoSlope none;
      general_logits(x, none, row0, column0);
    } else if (all_visible) {
      return;  // most tiles: the unit is left to the exponential, which multiplies and subtracts at once
    }
    hide(x, row0, column0);
  }
  BM_DEVICE float unit() const { return General ? 1 : p_.softmax_scale * log2_e; }

  // Dropout of probabilities, after they were summed.
  template <int blocks>
  BM_DEVICE void drop(float (&x)[blocks][4], int row0, int column0) const {
    for_each_kept<blocks>(row0, column0, [&](int j, int e, float keep) { x[j][e] *= keep; });
  }

  // The backward, in two steps, since products x = Q K^T are there before g = dO V^T. statistics(j) is the RowPair of block j.
  //   probabilities:  x becomes P before dropout. The general one has to keep x, for the slope of the softcap, and does nothing yet.
  //   gradients:      x becomes P after dropout, and g becomes dS = P (g - delta) before the scale. add_to_bias(query, key, value)
  //                   gets the gradient of the logits where it is not 0, if it is wanted().
  template <int blocks, typename Statistics>
  BM_DEVICE void probabilities(float (&x)[blocks][4], int row0, int column0, bool all_visible, Statistics statistics) const {
    if constexpr (General) return;
    const auto each = [&](auto masked) {
      Spans spans;
      if (masked.value) spans = spans_of(row0, column0);
      BM_UNROLL
      for (int j = 0; j < blocks; j++) {
        const RowPair pair = statistics(j);
        BM_UNROLL
        for (int e = 0; e < 4; e++) {
          const float probability = exp2_approx(x[j][e] * (p_.softmax_scale * log2_e) - of_pair(pair, e).logsumexp);
          x[j][e] = !masked.value || spans.has(j, e) ? probability : 0;
        }
      }
    };
    if (all_visible) each(Constant<false>{}); else each(Constant<true>{});
  }

  template <int blocks, typename Statistics, typename AddToBias>
  BM_DEVICE void gradients(float (&x)[blocks][4], float (&g)[blocks][4], int row0, int column0, bool all_visible,
                           Statistics statistics, AddToBias add_to_bias) const {
    for_each_kept<blocks>(row0, column0, [&](int j, int e, float keep) { g[j][e] *= keep; });
    if constexpr (General) {
      if (p_.softcap != 0) {
        CapSlope<blocks> slope;
        general_gradients(x, g, slope, row0, column0, statistics, add_to_bias);
      } else {
        NoSlope none;
        general_gradients(x, g, none, row0, column0, statistics, add_to_bias);
      }
    } else {
      BM_UNROLL
      for (int j = 0; j < blocks; j++) {
        const RowPair pair = statistics(j);
        BM_UNROLL
        for (int e = 0; e < 4; e++) {
          // Of a hidden pair g may be anything, and not 0 times anything.
          const float ds = x[j][e] * (g[j][e] - of_pair(pair, e).delta);
          g[j][e] = all_visible | (x[j][e] != 0) ? ds : 0;
        }
      }
    }
    drop(x, row0, column0);
  }

 private:
  template <bool value_> struct Constant { static constexpr bool value = value_; };
  struct Place { int query, key; };
  static BM_DEVICE RowStatistics of_pair(const RowPair& pair, int e) { return pair.row[transposed ? e % 2 : e / 2]; }
  static BM_DEVICE Place place(int row0, int column0, int j, int e) {
    const int row = row0 + e / 2 * 8, column = column0 + 8 * j + 2 * (lane_index() % 4) + e % 2;
    return transposed ? Place{column, row} : Place{row, column};
  }
  // The columns that each of this thread's two rows sees, counted from the thread's own first: a comparison with two numbers for each
  // element, and no branch, of which a tile on the diagonal would have thousands.
  struct Spans {
    int begin[2], end[2];
    BM_DEVICE bool has(int j, int e) const {
      const int column = 8 * j + e % 2;
      return (column >= begin[e / 2]) & (column < end[e / 2]);
    }
  };
  BM_DEVICE Spans spans_of(int row0, int column0) const {
    const int columns = transposed ? s_.queries : s_.keys, rows = transposed ? s_.keys : s_.queries;
    const int before = transposed ? p_.window_right : p_.window_left, after = transposed ? p_.window_left : p_.window_right;
    const int own = column0 + 2 * (lane_index() % 4);
    Spans spans;
    BM_UNROLL
    for (int r = 0; r < 2; r++) {
      const int row = row0 + 8 * r, place = row + (transposed ? -s_.offset() : s_.offset());
      int begin = 0, end = columns;
      if (before >= 0 && place - before > begin) begin = place - before;
      if (after >= 0 && place + after + 1 < end) end = place + after + 1;
      if ((General || transposed) && row >= rows) end = 0;
      spans.begin[r] = begin - own;
      spans.end[r] = end - own;
    }
    return spans;
  }
  // What is hidden becomes -infinity.
  template <int blocks>
  BM_DEVICE void hide(float (&x)[blocks][4], int row0, int column0) const {
    const Spans spans = spans_of(row0, column0);
    BM_UNROLL
    for (int j = 0; j < blocks; j++)
      BM_UNROLL
      for (int e = 0; e < 4; e++) x[j][e] = spans.has(j, e) ? x[j][e] : -infinity;
    if constexpr (General) {
      if (p_.key_padding_mask != nullptr) {
        // A key is a column of two rows, or (transposed) a row of many columns: it is looked up once.
        const auto seen = [&](int key) { return load_global(p_.key_padding_mask + batch_ * p_.mask_stride + (key < s_.keys ? key : 0)) != 0; };
        if constexpr (transposed) {
          const bool is[2] = {seen(row0), seen(row0 + 8)};
          BM_UNROLL
          for (int j = 0; j < blocks; j++)
            BM_UNROLL
            for (int e = 0; e < 4; e++) x[j][e] = is[e / 2] ? x[j][e] : -infinity;
        } else {
          BM_UNROLL
          for (int j = 0; j < blocks; j++)
            BM_UNROLL
            for (int e = 0; e < 2; e++) {
              const bool is = seen(place(row0, column0, j, e).key);
              x[j][e] = is ? x[j][e] : -infinity;
              x[j][e + 2] = is ? x[j][e + 2] : -infinity;
            }
        }
      }
    }
  }

  // The slope of the softcap at each element, for the backward; a forward or a call without one has none.
  template <int blocks> struct CapSlope {
    float x[blocks][4];
    BM_DEVICE void set(int j, int e, float value) { x[j][e] = value; }
    BM_DEVICE float of(int j, int e) const { return x[j][e]; }
  };
  struct NoSlope {
    BM_DEVICE void set(int, int, float) {}
    BM_DEVICE float of(int, int) const { return 1; }
  };

  // Feature after feature, each over the whole tile: whether it is there is asked once, and elements that lie outside, which are hidden
  // later, take what lies at the edge instead of a branch.
  template <int blocks, typename Slope>
  BM_DEVICE void general_logits(float (&x)[blocks][4], Slope& slope, int row0, int column0) const {
    const auto for_each = [&](auto change) {
      BM_UNROLL
      for (int j = 0; j < blocks; j++)
        BM_UNROLL
        for (int e = 0; e < 4; e++) change(x[j][e], j, e);
    };
    if (p_.softcap != 0) {
      const float inner = 2 * log2_e * p_.softmax_scale / p_.softcap;
      for_each([&](float& v, int j, int e) {
        const float t = tanh_of(inner * v);
        slope.set(j, e, 1 - t * t);
        v = p_.softcap * log2_e * t;
      });
    } else {
      const float scale = p_.softmax_scale * log2_e;
      for_each([&](float& v, int, int) { v *= scale; });
    }
    if (p_.bias != nullptr) {
      if (p_.bias_is_float) add_bias<float>(x, row0, column0); else add_bias<Element>(x, row0, column0);
    }
    if (p_.alibi_slopes != nullptr) {
      const float slope_2 = slope_ * log2_e;
      for_each([&](float& v, int j, int e) {
        const Place at = place(row0, column0, j, e);
        const int distance = at.query + s_.offset() - at.key;
        v -= slope_2 * float(distance < 0 ? -distance : distance);
      });
    }
  }
  template <typename Bias, int blocks>
  BM_DEVICE void add_bias(float (&x)[blocks][4], int row0, int column0) const {
    const Bias* bias = static_cast<const Bias*>(p_.bias) + batch_ * p_.bias_stride[0] + head_ * p_.bias_stride[1];
    BM_UNROLL
    for (int j = 0; j < blocks; j++)
      BM_UNROLL
      for (int e = 0; e < 4; e++) {
        const Place at = place(row0, column0, j, e);
        const int query = at.query < s_.queries ? at.query : s_.queries - 1, key = at.key < s_.keys ? at.key : s_.keys - 1;
        x[j][e] += log2_e * to_float(load_global(bias + query * p_.bias_stride[2] + key * p_.bias_stride[3]));
      }
  }
  template <int blocks, typename Slope, typename Statistics, typename AddToBias>
  BM_DEVICE void general_gradients(float (&x)[blocks][4], float (&g)[blocks][4], Slope& slope, int row0, int column0, Statistics statistics,
                                   AddToBias add_to_bias) const {
    general_logits(x, slope, row0, column0);
    hide(x, row0, column0);
    BM_UNROLL
    for (int j = 0; j < blocks; j++) {
      const RowPair pair = statistics(j);
      BM_UNROLL
      for (int e = 0; e < 4; e++) {
        const RowStatistics row = of_pair(pair, e);
        const bool seen = x[j][e] != -infinity;
        const float probability = exp2_approx(x[j][e] - row.logsumexp), ds = probability * (g[j][e] - row.delta);
        x[j][e] = seen ? probability : 0;
        g[j][e] = seen ? ds : 0;
      }
    }
    if (add_to_bias.wanted()) {
      BM_UNROLL
      for (int j = 0; j < blocks; j++)
        BM_UNROLL
        for (int e = 0; e < 4; e++) {
          const Place at = place(row0, column0, j, e);
          if (g[j][e] != 0) add_to_bias(at.query, at.key, g[j][e]);  // so that nothing is added outside
        }
    }
    BM_UNROLL
    for (int j = 0; j < blocks; j++)
      BM_UNROLL
      for (int e = 0; e < 4; e++) g[j][e] *= slope.of(j, e);
  }
  // each(j, e, 0 or 1 / (1 - p)): one call of the generator serves four elements of this thread.
  template <int blocks, typename Each>
  BM_DEVICE void for_each_kept(int row0, int column0, Each each) const {
    if constexpr (General) {
      if (p_.dropout_seed == nullptr) return;
      BM_UNROLL
      for (int j = 0; j < blocks; j += 2)
        BM_UNROLL
        for (int e = 0; e < 2; e++) {
          const Place at = place(row0, column0, j, e);
          const PhiloxWords random = attention_words(at.query, at.key, head_, batch_, seed_);
          BM_UNROLL
          for (int lower = 0; lower < 2; lower++)
            BM_UNROLL
            for (int right = 0; right < 2; right++) {
              const uint32_t word = random.word[transposed ? 2 * right + lower : 2 * lower + right];
              each(j + right, 2 * lower + e, word >= p_.dropout_threshold ? p_.dropout_scale : 0.0f);
            }
        }
    }
  }

  const AttentionParams& p_;
  const Sequence& s_;
  const int batch_, head_;
  float slope_ = 0;
  uint64_t seed_ = 0;
};

// The running maximum and sum of this thread's two rows (Milakov and Gimelshein, 2018, arXiv:1805.02867). S times `unit`, which is
// positive, is in units of log 2.
template <int d_blocks>
class OnlineSoftmax {
 public:
  explicit BM_DEVICE OnlineSoftmax(float unit = 1) : unit_(unit) {}

  // S becomes P = exp2(unit (S - m)); returns what the old O has to be multiplied with.
  template <int blocks>
  BM_DEVICE void probabilities(float (&x)[blocks][4], float (&rescale)[2]) {
    BM_UNROLL
    for (int r = 0; r < 2; r++) {
      float top = m_[r];
      BM_UNROLL
      for (int j = 0; j < blocks; j++) top = maximum(top, maximum(x[j][2 * r], x[j][2 * r + 1]));
      top = maximum(top, shuffle_xor(top, 1));
      top = maximum(top, shuffle_xor(top, 2));
      const float safe = top == -infinity ? 0 : top;  // a row that has seen no key yet: exp2(-inf - 0) = 0, not NaN
      rescale[r] = exp2_approx((m_[r] - safe) * unit_);
      const float subtract = safe * unit_;
      m_[r] = top;
      float sum = 0;
      BM_UNROLL
      for (int j = 0; j < blocks; j++)
        BM_UNROLL
        for (int e = 0; e < 2; e++) {
          x[j][2 * r + e] = exp2_approx(x[j][2 * r + e] * unit_ - subtract);
          sum += x[j][2 * r + e];
        }
      l_[r] = l_[r] * rescale[r] + sum;  // of this thread's columns; the four lanes of a row are added at the end
    }
  }
  static BM_DEVICE void scale(float (&o)[d_blocks][4], const float (&factor)[2]) {
    BM_UNROLL
    for (int j = 0; j < d_blocks; j++)
      BM_UNROLL
      for (int e = 0; e < 4; e++) o[j][e] *= factor[e / 2];
  }

  // O / l, and the logsumexp of both rows in units of log 2.
  BM_DEVICE void finish(float (&o)[d_blocks][4], float (&logsumexp)[2]) const {
    float factor[2];
    BM_UNROLL
    for (int r = 0; r < 2; r++) {
      float sum = l_[r];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      factor[r] = sum == 0 ? 0 : 1 / sum;
      logsumexp[r] = sum == 0 ? -infinity : m_[r] * unit_ + log2_approx(sum);
    }
    scale(o, factor);
  }

  // O / l, with the sink in l, and logsumexp.
  BM_DEVICE void finish(float (&o)[d_blocks][4], const AttentionParams& p, const Sequence& s, int batch, int head, int row0) {
    float factor[2];
    BM_UNROLL
    for (int r = 0; r < 2; r++) {
      float sum = l_[r], top = m_[r] * unit_;
      const float before = top;
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      factor[r] = 1;
      if (p.sinks != nullptr) {  // one more logit in the sum, without a value
        const float sink = load_global(p.sinks + head) * log2_e;
        top = maximum(before, sink);
        factor[r] = exp2_approx(before - top);
        sum = sum * factor[r] + exp2_approx(sink - top);
      }
      factor[r] = sum == 0 ? 0 : factor[r] / sum;
      const int row = row0 + 8 * r;
      if (p.logsumexp != nullptr && lane_index() % 4 == 0 && row < s.queries) {
        const int64_t at = batch * p.logsumexp_stride[0] + head * p.logsumexp_stride[1] + s.first_query + row;
        store_global(p.logsumexp + at, sum == 0 ? -infinity : (top + log2_approx(sum)) * ln_2);
      }
    }
    scale(o, factor);
  }

 private:
  float unit_;
  float m_[2] = {-infinity, -infinity}, l_[2] = {0, 0};
};

// A warp's 16 rows (of O, dQ, dK or dV) to global memory, by way of its own rows of a tile in shared memory, so that they leave in
// 16-byte pieces. Nobody else may still use those rows. out: the sequence's first row; this tile's rows are from `row` to `end`, and
// the warp's columns from chunk `first_chunk`.
template <typename Element, typename Tile, int blocks>
BM_DEVICE void store_rows(const float (&x)[blocks][4], SharedAddress tile, int tile_row, int first_chunk, void* out, int64_t row_stride,
                          int row, int end, int head_dim) {
  const int lane = anew(lane_index()), g = lane / 4, t = lane % 4;
  BM_UNROLL
  for (int r = 0; r < 2; r++)
    BM_UNROLL
    for (int j = 0; j < blocks; j++)
      store_shared(tile + Tile::offset(tile_row + g + 8 * r, first_chunk + j) + 4 * t, Word<4>{pack<Element>(x[j][2 * r], x[j][2 * r + 1])});
  sync_warp();
  BM_UNROLL
  for (int i = lane; i < 16 * blocks; i += warp_size) {
    const int in_tile = tile_row + i / blocks, chunk = first_chunk + i % blocks;
    if (row + in_tile < end && chunk * 8 < head_dim)
      store_global(reinterpret_cast<Word<16>*>(static_cast<Element*>(out) + (row + in_tile) * row_stride + chunk * 8),
                   load_shared<Word<16>>(tile + Tile::offset(in_tile, chunk)));
  }
}

// A matrix of `heads` heads within a batch: its first row for this sequence and head.
template <typename Element>
BM_DEVICE Element* rows_of(const void* matrix, const int64_t (&stride)[3], int batch, int head, int first_row) {
  return static_cast<Element*>(const_cast<void*>(matrix)) + batch * stride[0] + head * stride[1] + first_row * stride[2];
}

}  // namespace bigmodel::cuda
