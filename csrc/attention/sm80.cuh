// Attention forward for tensor cores of sm_80 and later: FlashAttention-2 (Dao, 2023, arXiv:2307.08691, algorithm 1).
//
//   for a tile of queries:  m = -inf, l = 0, O = 0
//     for each tile of keys that it sees:
//       S = Q K^T;  m' = max(m, rowmax S);  P = exp(S - m');  l = l exp(m - m') + rowsum P;  O = O exp(m - m') + P V
//     O = O / l,  logsumexp = m + log l
//
//            head_dim                       keys (tile_n)
//          +----------+            warp 0  +-----------------+        A warp owns 16 rows of S and of O, so that the softmax
//   tile_m | Q        |  K^T ->    warp 1  |        S        |        needs only the four lanes that share a row.
//          +----------+            ...     +-----------------+        P goes from S's accumulators to A fragments in registers.
//
// K and V come by cp.async: V of this tile and K of the next are under way while S is computed. Rows past the end are zeros in
// shared memory, so that nothing outside is ever read and 0 * V is 0.
#pragma once
#include "arch/cp_async.cuh"
#include "arch/ldmatrix.cuh"
#include "arch/mma_sync.cuh"
#include "arch/philox.cuh"
#include "arch/swizzle.cuh"
#include "arch/warp.cuh"
#include "attention/cuda.h"

namespace bigmodel::cuda {

// Element: bfloat16 or float16. HeadDim: head_dim rounded up to 32, 64, 96, 128, 192 or 256. General: with softcap, key padding,
// bias, ALiBi and dropout; without, the inner loop is the short one.
template <typename Element, int HeadDim, bool General>
struct AttentionSm80 {
  using Params = AttentionParams;
  static constexpr int warps = HeadDim <= 128 ? 8 : 4;
  static constexpr int threads = warps * warp_size, blocks_per_multiprocessor = 1;
  static constexpr int tile_m = 16 * warps;
  static constexpr int tile_n = HeadDim <= 64 ? 128 : HeadDim <= 128 ? 64 : 32;
  static constexpr int n_blocks = tile_n / 8, d_blocks = HeadDim / 8, d_steps = HeadDim / 16;
  using QueryTile = SwizzledTile<tile_m, HeadDim>;
  using KeyTile = SwizzledTile<tile_n, HeadDim>;

  static constexpr int shared_query = 0;  // Q, and O on its way out
  static constexpr int shared_key = shared_query + QueryTile::bytes;
  static constexpr int shared_value = shared_key + KeyTile::bytes;
  static constexpr int shared_bytes = shared_value + KeyTile::bytes;

  // Rows [first, first + Tile::rows) of a matrix of `length` rows into shared memory; zeros past its end and past head_dim.
  template <typename Tile>
  static BM_DEVICE void load_tile(SharedAddress tile, const void* matrix, int64_t row_stride, int first, int length, int head_dim) {
    const Element* source = static_cast<const Element*>(matrix);
    BM_UNROLL
    for (int i = thread_index(); i < Tile::rows * Tile::row_chunks; i += threads) {
      const int row = i / Tile::row_chunks, chunk = i % Tile::row_chunks;
      const bool valid = first + row < length && chunk * 8 < head_dim;
      copy_async_16(tile + Tile::offset(row, chunk), valid ? source + (first + row) * row_stride + chunk * 8 : source, valid);
    }
  }

  static BM_DEVICE float logit(float product, const AttentionParams& p, int batch, int head, int query, int key, int offset, float slope) {
    float x = product * p.softmax_scale;
    if (p.softcap != 0) x = p.softcap * tanh_exact(x / p.softcap);
    if (p.bias != nullptr) {
      const int64_t at = batch * p.bias_stride[0] + head * p.bias_stride[1] + query * p.bias_stride[2] + key * p.bias_stride[3];
      x += p.bias_is_float ? load_global(static_cast<const float*>(p.bias) + at)
                           : to_float(load_global(static_cast<const Element*>(p.bias) + at));
    }
    const int distance = query + offset - key;
    if (p.alibi_slopes != nullptr) x -= slope * float(distance < 0 ? -distance : distance);
    return x * log2_e;
  }

  static BM_DEVICE void run(const AttentionParams& p) {
    // ---- which tile ----
    const int batch = block_z(), head = block_y(), kv_head = head / (p.heads / p.kv_heads);
    const bool packed = p.cu_seqlens_q != nullptr;
    const int first_query = packed ? load_global(p.cu_seqlens_q + batch) : 0;
    const int first_key = packed ? load_global(p.cu_seqlens_k + batch) : 0;
    const int queries = packed ? load_global(p.cu_seqlens_q + batch + 1) - first_query : p.query_length;
    const int keys = packed ? load_global(p.cu_seqlens_k + batch + 1) - first_key : p.key_length;
    const int m_start = (grid_x() - 1 - block_x()) * tile_m;  // causal: the longest rows first
    if (m_start >= queries) return;
    const int offset = keys - queries;
    const int last_row = (m_start + tile_m < queries ? m_start + tile_m : queries) - 1;
    int n_begin = 0, n_end = keys;
    if (p.window_right >= 0 && last_row + offset + p.window_right + 1 < n_end) n_end = last_row + offset + p.window_right + 1;
    if (p.window_left >= 0 && m_start + offset - p.window_left > 0) n_begin = (m_start + offset - p.window_left) / tile_n * tile_n;

    const int64_t query_base = batch * p.query_stride[0] + head * p.query_stride[1] + first_query * p.query_stride[2];
    const int64_t key_base = batch * p.key_stride[0] + kv_head * p.key_stride[1] + first_key * p.key_stride[2];
    const int64_t value_base = batch * p.value_stride[0] + kv_head * p.value_stride[1] + first_key * p.value_stride[2];
    const Element* query = static_cast<const Element*>(p.query) + query_base;
    const Element* key = static_cast<const Element*>(p.key) + key_base;
    const Element* value = static_cast<const Element*>(p.value) + value_base;

    const SharedAddress shared = shared_start();
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const int row0 = m_start + 16 * warp + g;  // this thread's rows: row0 and row0 + 8
    const float slope = p.alibi_slopes != nullptr ? load_global(p.alibi_slopes + batch * p.alibi_stride + head) : 0;
    const uint64_t seed = p.dropout_seed != nullptr ? uint64_t(load_global(p.dropout_seed)) : 0;

    float o[d_blocks][4], m[2] = {-infinity, -infinity}, l[2] = {0, 0};
    BM_UNROLL
    for (int j = 0; j < d_blocks; j++)
      BM_UNROLL
      for (int e = 0; e < 4; e++) o[j][e] = 0;

    load_tile<QueryTile>(shared + shared_query, query, p.query_stride[2], m_start, queries, p.head_dim);
    if (n_begin < n_end) load_tile<KeyTile>(shared + shared_key, key, p.key_stride[2], n_begin, keys, p.head_dim);
    copy_async_commit();

    for (int n = n_begin; n < n_end; n += tile_n) {
      // ---- S = Q K^T ----
      copy_async_wait<0>();
      sync_block();  // Q and this K have arrived, and nobody reads the last V any more
      load_tile<KeyTile>(shared + shared_value, value, p.value_stride[2], n, keys, p.head_dim);
      copy_async_commit();
      float s[n_blocks][4];
      BM_UNROLL
      for (int j = 0; j < n_blocks; j++)
        BM_UNROLL
        for (int e = 0; e < 4; e++) s[j][e] = 0;
      BM_UNROLL
      for (int k = 0; k < d_steps; k++) {
        uint32_t a[4];
        ldmatrix(a, shared + shared_query + QueryTile::offset(16 * warp + lane % 16, 2 * k + lane / 16));
        BM_UNROLL
        for (int j = 0; j < n_blocks; j += 2) {
          uint32_t b[4];
          ldmatrix(b, shared + shared_key + KeyTile::offset(8 * j + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
          const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
          mma_m16n8k16<Element>(s[j], a, low);
          mma_m16n8k16<Element>(s[j + 1], a, high);
        }
      }

      // ---- logits in units of log 2, and masks ----
      const bool all_visible = n + tile_n <= keys && (p.window_right < 0 || n + tile_n - 1 <= m_start + offset + p.window_right) &&
                               (p.window_left < 0 || n >= m_start + tile_m - 1 + offset - p.window_left);
      BM_UNROLL
      for (int j = 0; j < n_blocks; j++)
        BM_UNROLL
        for (int e = 0; e < 4; e++) {
          const int row = row0 + e / 2 * 8, column = n + 8 * j + 2 * t + e % 2;
          bool visible = true;
          if (!all_visible)
            visible = column < keys && (p.window_right < 0 || column <= row + offset + p.window_right) &&
                      (p.window_left < 0 || column >= row + offset - p.window_left);
          if constexpr (General) {
            visible = visible && column < keys && row < queries;
            if (visible && p.key_padding_mask != nullptr) visible = load_global(p.key_padding_mask + batch * p.mask_stride + column) != 0;
            if (visible) s[j][e] = logit(s[j][e], p, batch, head, row, column, offset, slope);
          } else {
            s[j][e] *= p.softmax_scale * log2_e;
          }
          if (!visible) s[j][e] = -infinity;
        }

      // ---- online softmax ----
      BM_UNROLL
      for (int r = 0; r < 2; r++) {
        float top = m[r];
        BM_UNROLL
        for (int j = 0; j < n_blocks; j++) top = maximum(top, maximum(s[j][2 * r], s[j][2 * r + 1]));
        top = maximum(top, shuffle_xor(top, 1));
        top = maximum(top, shuffle_xor(top, 2));
        const float safe = top == -infinity ? 0 : top;  // a row that has seen no key yet: exp2(-inf - 0) = 0, not NaN
        const float rescale = exp2_approx(m[r] - safe);
        m[r] = top;
        float sum = 0;
        BM_UNROLL
        for (int j = 0; j < n_blocks; j++)
          BM_UNROLL
          for (int e = 0; e < 2; e++) {
            s[j][2 * r + e] = exp2_approx(s[j][2 * r + e] - safe);
            sum += s[j][2 * r + e];
          }
        l[r] = l[r] * rescale + sum;  // of this thread's columns; the four lanes of a row are added at the end
        BM_UNROLL
        for (int j = 0; j < d_blocks; j++) {
          o[j][2 * r] *= rescale;
          o[j][2 * r + 1] *= rescale;
        }
      }

      if constexpr (General) {
        if (p.dropout_seed != nullptr) {
          BM_UNROLL
          for (int j = 0; j < n_blocks; j += 2)
            BM_UNROLL
            for (int e = 0; e < 2; e++) {
              const PhiloxWords random = attention_words(row0, n + 8 * j + 2 * t + e, head, batch, seed);
              BM_UNROLL
              for (int w = 0; w < 4; w++) {
                float& probability = s[j + w % 2][w / 2 * 2 + e];
                probability = random.word[w] >= p.dropout_threshold ? probability * p.dropout_scale : 0;
              }
            }
        }
      }

      // ---- O += P V ----
      copy_async_wait<0>();
      sync_block();  // this V has arrived, and nobody reads this K any more
      if (n + tile_n < n_end) load_tile<KeyTile>(shared + shared_key, key, p.key_stride[2], n + tile_n, keys, p.head_dim);
      copy_async_commit();
      BM_UNROLL
      for (int k = 0; k < tile_n / 16; k++) {
        const float(&left)[4] = s[2 * k], (&right)[4] = s[2 * k + 1];
        const uint32_t a[4] = {pack<Element>(left[0], left[1]), pack<Element>(left[2], left[3]), pack<Element>(right[0], right[1]),
                               pack<Element>(right[2], right[3])};
        BM_UNROLL
        for (int j = 0; j < d_blocks; j += 2) {
          uint32_t b[4];
          ldmatrix_transposed(b, shared + shared_value + KeyTile::offset(16 * k + lane % 16, j + lane / 16));
          const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
          mma_m16n8k16<Element>(o[j], a, low);
          mma_m16n8k16<Element>(o[j + 1], a, high);
        }
      }
    }

    // ---- O / l, and logsumexp ----
    BM_UNROLL
    for (int r = 0; r < 2; r++) {
      float sum = l[r];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      float scale = 1;
      if (p.sinks != nullptr) {  // one more logit in the sum, without a value
        const float sink = load_global(p.sinks + head) * log2_e, top = maximum(m[r], sink);
        scale = exp2_approx(m[r] - top);
        sum = sum * scale + exp2_approx(sink - top);
        m[r] = top;
      }
      scale = sum == 0 ? 0 : scale / sum;
      BM_UNROLL
      for (int j = 0; j < d_blocks; j++) {
        o[j][2 * r] *= scale;
        o[j][2 * r + 1] *= scale;
      }
      const int row = row0 + 8 * r;
      if (p.logsumexp != nullptr && t == 0 && row < queries) {
        const int64_t at = batch * p.logsumexp_stride[0] + head * p.logsumexp_stride[1] + first_query + row;
        store_global(p.logsumexp + at, sum == 0 ? -infinity : (m[r] + log2_approx(sum)) * ln_2);
      }
    }

    // ---- O through shared memory, so that a row leaves in 16-byte pieces ----
    copy_async_wait<0>();
    sync_block();  // every warp has done with Q, and with a Q that no tile of keys was computed for
    BM_UNROLL
    for (int r = 0; r < 2; r++)
      BM_UNROLL
      for (int j = 0; j < d_blocks; j++)
        store_shared(shared + shared_query + QueryTile::offset(16 * warp + g + 8 * r, j) + 4 * t,
                     Word<4>{pack<Element>(o[j][2 * r], o[j][2 * r + 1])});
    sync_warp();
    Element* out = static_cast<Element*>(p.out) + batch * p.out_stride[0] + head * p.out_stride[1] + first_query * p.out_stride[2];
    BM_UNROLL
    for (int i = lane; i < 16 * QueryTile::row_chunks; i += warp_size) {
      const int row = 16 * warp + i / QueryTile::row_chunks, chunk = i % QueryTile::row_chunks;
      if (m_start + row < queries && chunk * 8 < p.head_dim)
        store_global(reinterpret_cast<Word<16>*>(out + (m_start + row) * p.out_stride[2] + chunk * 8),
                     load_shared<Word<16>>(shared + shared_query + QueryTile::offset(row, chunk)));
    }
  }
};

}  // namespace bigmodel::cuda
