// Attention backward for tensor cores of sm_80 and later: FlashAttention-2 (Dao, 2023, arXiv:2307.08691, algorithm 2), in two passes
// over the tiles, so that every sum belongs to one thread: no atomic addition, and the same bits in every run.
//
//   delta = rowsum(dO * O)                                    S = Q K^T,  P = exp(S - logsumexp),  dP = dO V^T,  dS = P (dP - delta)
//   for a tile of keys:     dV = sum P^T dO,  dK = sum dS^T Q    over the queries that see it, and the heads that share it
//   for a tile of queries:  dQ = sum dS K                        over the keys that it sees
//
//                    queries (tile_m)                       The first pass works on S^T: a warp owns 16 keys, and P^T and dS^T go
//            warp 0 +-----------------+                     from accumulators to A fragments, as P does in the forward. Heads of
//   keys     warp 1 |  S^T, then P^T  |   x dO -> dV        more than 128 are shared by two warps, each with half of the columns
//  (tile_n)  ...    |  and dS^T       |   x Q  -> dK        of dV and dK.
//                   +-----------------+
//
// Q and dO (or K and V) of the next tile come by cp.async while this one is worked on.
#pragma once
#include "attention/backward.cuh"
#include "attention/sm80.cuh"

namespace bigmodel::cuda {

// ---- dK and dV ----

template <typename Element, int HeadDim, bool General>
struct AttentionKeyValueGradSm80 {
  using Params = AttentionBackwardParams;
  static constexpr int warps = 8, threads = warps * warp_size, blocks_per_multiprocessor = 1;
  static constexpr int parts = HeadDim > 128 ? 2 : 1;  // warps that share a key's head_dim
  static constexpr int tile_n = 16 * warps / parts, tile_m = (HeadDim <= 64 ? 64 : 32) / (General ? 2 : 1);  // registers decide
  static constexpr int m_blocks = tile_m / 8, d_blocks = HeadDim / 8 / parts;
  using QueryTile = SwizzledTile<tile_m, HeadDim>;
  using KeyTile = SwizzledTile<tile_n, HeadDim>;

  static constexpr int shared_key = 0;  // K, and dK on its way out
  static constexpr int shared_value = shared_key + KeyTile::bytes;  // V, and dV
  static constexpr int shared_query = shared_value + KeyTile::bytes;  // two stages of Q and dO
  static constexpr int stage_bytes = 2 * QueryTile::bytes;
  static constexpr int shared_bytes = shared_query + 2 * stage_bytes;

  static BM_DEVICE void run(const Params& params) {
    const AttentionParams& p = params.p;
    // ---- which tile ----
    const int batch = block_z(), kv_head = block_y(), n_start = block_x() * tile_n, group = p.heads / p.kv_heads;
    const Sequence sequence = Sequence::of(p, batch);
    if (n_start >= sequence.keys) return;
    const TileRange range = visible_queries<tile_m>(p, sequence, n_start, tile_n);
    const int tiles = range.tiles(), steps = tiles * group;

    const SharedAddress shared = shared_start();
    const int warp = warp_index(), row = 16 * (warp / parts), chunk = warp % parts * d_blocks;
    const int key0 = n_start + row + lane_index() / 4;
    const auto load_step = [&](int step) {
      const int head = kv_head * group + step / tiles, m = range.begin + step % tiles * tile_m;
      const SharedAddress stage = shared + shared_query + step % 2 * stage_bytes;
      load_tile<QueryTile, Element, threads>(stage, rows_of<Element>(p.query, p.query_stride, batch, head, sequence.first_query), p.query_stride[2], m, sequence.queries, p.head_dim);
      load_tile<QueryTile, Element, threads>(stage + QueryTile::bytes, rows_of<Element>(params.grad_out, params.grad_out_stride, batch, head, sequence.first_query), params.grad_out_stride[2], m, sequence.queries, p.head_dim);
    };
    load_tile<KeyTile, Element, threads>(shared + shared_key, rows_of<Element>(p.key, p.key_stride, batch, kv_head, sequence.first_key), p.key_stride[2], n_start, sequence.keys, p.head_dim);
    load_tile<KeyTile, Element, threads>(shared + shared_value, rows_of<Element>(p.value, p.value_stride, batch, kv_head, sequence.first_key), p.value_stride[2], n_start, sequence.keys, p.head_dim);
    if (steps > 0) load_step(0);
    copy_async_commit();

    float dk[d_blocks][4], dv[d_blocks][4];
    clear(dk);
    clear(dv);
    for (int step = 0; step < steps; step++) {
      const int head = kv_head * group + step / tiles, m = range.begin + step % tiles * tile_m;
      const SharedAddress query = shared + shared_query + step % 2 * stage_bytes, grad = query + QueryTile::bytes;
      copy_async_wait<0>();
      sync_block();  // this step's tiles have arrived, and nobody reads those of the last any more
      if (step + 1 < steps) load_step(step + 1);
      copy_async_commit();

      // ---- S^T = K Q^T, dP^T = V dO^T ----
      float s[m_blocks][4], g[m_blocks][4];
      clear(s);
      clear(g);
      multiply_transposed<Element, KeyTile, QueryTile>(s, shared + shared_key, row, query);
      multiply_transposed<Element, KeyTile, QueryTile>(g, shared + shared_value, row, grad);

      // ---- P^T and dS^T ----
      RowPair pairs[m_blocks];
      BM_UNROLL
      for (int j = 0; j < m_blocks; j++)
        BM_UNROLL
        for (int e = 0; e < 2; e++) pairs[j].row[e] = row_statistics(params, sequence, batch, head, m + 8 * j + 2 * (lane_index() % 4) + e);
      const auto statistics = [&](int j) { return pairs[j]; };
      const Scores<Element, General, true> scores(p, sequence, batch, head);
      scores.probabilities(s, key0, m, range.all_visible(m), statistics);
      scores.gradients(s, g, key0, m, range.all_visible(m), statistics, NoBias{});

      // ---- dV += P^T dO, dK += dS^T Q ----
      multiply<Element, QueryTile>(dv, s, grad, chunk);
      multiply<Element, QueryTile>(dk, g, query, chunk);
    }

    multiply_by(dk, p.softmax_scale);
    copy_async_wait<0>();
    sync_block();  // every warp has done with K and V
    store_rows<Element, KeyTile>(dk, shared + shared_key, row, chunk, rows_of<Element>(params.dk, params.dk_stride, batch, kv_head, sequence.first_key),
                                 params.dk_stride[2], n_start, sequence.keys, p.head_dim);
    store_rows<Element, KeyTile>(dv, shared + shared_value, row, chunk, rows_of<Element>(params.dv, params.dv_stride, batch, kv_head, sequence.first_key),
                                 params.dv_stride[2], n_start, sequence.keys, p.head_dim);
  }
};

// ---- dQ, and the gradient of the bias ----

template <typename Element, int HeadDim, bool General>
struct AttentionQueryGradSm80 {
  using Params = AttentionBackwardParams;
  static constexpr int warps = HeadDim <= 128 ? 8 : 4, threads = warps * warp_size, blocks_per_multiprocessor = 1;
  static constexpr int tile_m = 16 * warps, tile_n = (HeadDim <= 64 ? 64 : 32) / (General ? 2 : 1);
  static constexpr int n_blocks = tile_n / 8, d_blocks = HeadDim / 8;
  using QueryTile = SwizzledTile<tile_m, HeadDim>;
  using KeyTile = SwizzledTile<tile_n, HeadDim>;

  static constexpr int shared_query = 0;  // Q, and dQ on its way out
  static constexpr int shared_grad = shared_query + QueryTile::bytes;
  static constexpr int shared_key = shared_grad + QueryTile::bytes;  // two stages of K and V
  static constexpr int stage_bytes = 2 * KeyTile::bytes;
  static constexpr int shared_bytes = shared_key + 2 * stage_bytes;

  static BM_DEVICE void run(const Params& params) {
    const AttentionParams& p = params.p;
    const int batch = block_z(), head = block_y(), kv_head = head / (p.heads / p.kv_heads);
    const Sequence sequence = Sequence::of(p, batch);
    const int m_start = (grid_x() - 1 - block_x()) * tile_m;  // causal: the longest rows first
    if (m_start >= sequence.queries) return;
    const TileRange range = visible_keys<tile_n>(p, sequence, m_start, tile_m);

    const SharedAddress shared = shared_start();
    const int warp = warp_index(), row = 16 * warp, query0 = m_start + row + lane_index() / 4;
    const auto load_keys = [&](int n) {
      const SharedAddress stage = shared + shared_key + (n - range.begin) / tile_n % 2 * stage_bytes;
      load_tile<KeyTile, Element, threads>(stage, rows_of<Element>(p.key, p.key_stride, batch, kv_head, sequence.first_key), p.key_stride[2], n, sequence.keys, p.head_dim);
      load_tile<KeyTile, Element, threads>(stage + KeyTile::bytes, rows_of<Element>(p.value, p.value_stride, batch, kv_head, sequence.first_key), p.value_stride[2], n, sequence.keys, p.head_dim);
    };
    load_tile<QueryTile, Element, threads>(shared + shared_query, rows_of<Element>(p.query, p.query_stride, batch, head, sequence.first_query), p.query_stride[2], m_start, sequence.queries, p.head_dim);
    load_tile<QueryTile, Element, threads>(shared + shared_grad, rows_of<Element>(params.grad_out, params.grad_out_stride, batch, head, sequence.first_query), params.grad_out_stride[2], m_start, sequence.queries, p.head_dim);
    if (range.begin < range.end) load_keys(range.begin);
    copy_async_commit();

    RowPair pair;
    BM_UNROLL
    for (int r = 0; r < 2; r++) pair.row[r] = row_statistics(params, sequence, batch, head, query0 + 8 * r);
    const auto statistics = [&](int) { return pair; };
    const Scores<Element, General> scores(p, sequence, batch, head);
    float dq[d_blocks][4];
    clear(dq);
    for (int n = range.begin; n < range.end; n += tile_n) {
      const SharedAddress key = shared + shared_key + (n - range.begin) / tile_n % 2 * stage_bytes, value = key + KeyTile::bytes;
      copy_async_wait<0>();
      sync_block();  // these tiles have arrived, and nobody reads those of the last step any more
      if (n + tile_n < range.end) load_keys(n + tile_n);
      copy_async_commit();
      float s[n_blocks][4], g[n_blocks][4];
      clear(s);
      clear(g);
      multiply_transposed<Element, QueryTile, KeyTile>(s, shared + shared_query, row, key);
      multiply_transposed<Element, QueryTile, KeyTile>(g, shared + shared_grad, row, value);
      scores.probabilities(s, query0, n, range.all_visible(n), statistics);
      scores.gradients(s, g, query0, n, range.all_visible(n), statistics, AddToBias(params, batch, head));
      multiply<Element, KeyTile>(dq, g, key, 0);
    }
    multiply_by(dq, p.softmax_scale);
    copy_async_wait<0>();
    sync_block();
    store_rows<Element, QueryTile>(dq, shared + shared_query, row, 0, rows_of<Element>(params.dq, params.dq_stride, batch, head, sequence.first_query),
                                   params.dq_stride[2], m_start, sequence.queries, p.head_dim);
  }
};

}  // namespace bigmodel::cuda
