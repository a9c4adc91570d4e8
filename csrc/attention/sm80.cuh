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
#include "arch/swizzle.cuh"
#include "arch/warp.cuh"
#include "attention/rows.cuh"

namespace bigmodel::cuda {

// Rows [first, first + Tile::rows) of a matrix of `length` rows into shared memory; zeros past its end and past head_dim.
template <typename Tile, typename Element, int threads>
BM_DEVICE void load_tile(SharedAddress tile, const Element* matrix, int64_t row_stride, int first, int length, int head_dim) {
  BM_UNROLL
  for (int i = thread_index(); i < Tile::rows * Tile::row_chunks; i += threads) {
    const int row = i / Tile::row_chunks, chunk = i % Tile::row_chunks;
    const bool valid = first + row < length && chunk * 8 < head_dim;
    copy_async_16(tile + Tile::offset(row, chunk), valid ? matrix + (first + row) * row_stride + chunk * 8 : matrix, valid);
  }
}

// X (16 rows from `row` of a tile) times the transpose of Y (all rows of a tile), over head_dim.
template <typename Element, typename TileX, typename TileY, int blocks>
BM_DEVICE void multiply_transposed(float (&c)[blocks][4], SharedAddress x, int row, SharedAddress y) {
  const int lane = lane_index();
  BM_UNROLL_BY((TileX::columns > 192 ? 1 : 2))  // all steps at once, their addresses would leave too few registers
  for (int k = 0; k < TileX::columns / 16; k++) {
    uint32_t a[4];
    ldmatrix(a, x + TileX::offset(row + lane % 16, 2 * k + lane / 16));
    BM_UNROLL
    for (int j = 0; j < blocks; j += 2) {
      uint32_t b[4];
      ldmatrix(b, y + TileY::offset(8 * j + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_m16n8k16<Element>(c[j], a, low);
      mma_m16n8k16<Element>(c[j + 1], a, high);
    }
  }
}

// P (in accumulators, rounded to Element) times Y's columns from `chunk` on; Y's rows are P's columns.
template <typename Element, typename TileY, int k_blocks, int blocks>
BM_DEVICE void multiply(float (&c)[blocks][4], const float (&p)[k_blocks][4], SharedAddress y, int chunk) {
  const int lane = lane_index();
  BM_UNROLL
  for (int k = 0; k < k_blocks / 2; k++) {
    uint32_t a[4];
    to_fragment<Element>(a, p[2 * k], p[2 * k + 1]);
    BM_UNROLL
    for (int j = 0; j < blocks; j += 2) {
      uint32_t b[4];
      ldmatrix_transposed(b, y + TileY::offset(16 * k + lane % 16, chunk + j + lane / 16));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_m16n8k16<Element>(c[j], a, low);
      mma_m16n8k16<Element>(c[j + 1], a, high);
    }
  }
}

// Element: bfloat16 or float16. HeadDim: head_dim rounded up to 32, 64, 96, 128, 192 or 256. General: with softcap, key padding,
// bias, ALiBi and dropout; without, the inner loop is the short one.
template <typename Element, int HeadDim, bool General>
struct AttentionSm80 {
  using Params = AttentionParams;
  static constexpr int warps = HeadDim <= 128 ? 8 : 4;
  static constexpr int threads = warps * warp_size, blocks_per_multiprocessor = 1;
  static constexpr int tile_m = 16 * warps;
  static constexpr int tile_n = HeadDim <= 64 ? (General ? 64 : 128) : HeadDim <= 128 ? 64 : 32;
  static constexpr int n_blocks = tile_n / 8, d_blocks = HeadDim / 8;
  using QueryTile = SwizzledTile<tile_m, HeadDim>;
  using KeyTile = SwizzledTile<tile_n, HeadDim>;

  static constexpr int shared_query = 0;  // Q, and O on its way out
  static constexpr int shared_key = shared_query + QueryTile::bytes;
  static constexpr int shared_value = shared_key + KeyTile::bytes;
  static constexpr int shared_bytes = shared_value + KeyTile::bytes;

  static BM_DEVICE void run(const AttentionParams& p) {
    // ---- which tile ----
    const Sequence sequence = Sequence::of(p, block_z());
    const int batch = block_z(), head = block_y(), kv_head = head / (p.heads / p.kv_heads);
    const int m_start = (grid_x() - 1 - block_x()) * tile_m;  // causal: the longest rows first
    if (m_start >= sequence.queries) return;
    const TileRange range = visible_keys<tile_n>(p, sequence, m_start, tile_m);
    const int n_begin = range.begin, n_end = range.end;
    const Element* query = rows_of<Element>(p.query, p.query_stride, batch, head, sequence.first_query);
    const Element* key = rows_of<Element>(p.key, p.key_stride, batch, kv_head, sequence.first_key);
    const Element* value = rows_of<Element>(p.value, p.value_stride, batch, kv_head, sequence.first_key);

    const SharedAddress shared = shared_start();
    const int warp = warp_index(), lane = lane_index();
    const int row0 = m_start + 16 * warp + lane / 4;  // this thread's rows: row0 and row0 + 8
    const Scores<Element, General> scores(p, sequence, batch, head);
    OnlineSoftmax<d_blocks> softmax(scores.unit());
    float o[d_blocks][4];
    clear(o);

    load_tile<QueryTile, Element, threads>(shared + shared_query, query, p.query_stride[2], m_start, sequence.queries, p.head_dim);
    if (n_begin < n_end) load_tile<KeyTile, Element, threads>(shared + shared_key, key, p.key_stride[2], n_begin, sequence.keys, p.head_dim);
    copy_async_commit();

    for (int n = n_begin; n < n_end; n += tile_n) {
      // ---- S = Q K^T ----
      copy_async_wait<0>();
      sync_block();  // Q and this K have arrived, and nobody reads the last V any more
      load_tile<KeyTile, Element, threads>(shared + shared_value, value, p.value_stride[2], n, sequence.keys, p.head_dim);
      copy_async_commit();
      float s[n_blocks][4];
      clear(s);
      multiply_transposed<Element, QueryTile, KeyTile>(s, shared + shared_query, 16 * warp, shared + shared_key);

      // ---- P = exp(S - m) ----
      scores.logits(s, row0, n, range.all_visible(n));
      float rescale[2];
      softmax.probabilities(s, rescale);
      softmax.scale(o, rescale);
      scores.drop(s, row0, n);

      // ---- O += P V ----
      copy_async_wait<0>();
      sync_block();  // this V has arrived, and nobody reads this K any more
      if (n + tile_n < n_end) load_tile<KeyTile, Element, threads>(shared + shared_key, key, p.key_stride[2], n + tile_n, sequence.keys, p.head_dim);
      copy_async_commit();
      multiply<Element, KeyTile>(o, s, shared + shared_value, 0);
    }

    // ---- O / l, and logsumexp ----
    softmax.finish(o, p, sequence, batch, head, row0);

    // ---- O through shared memory, so that a row leaves in 16-byte pieces ----
    copy_async_wait<0>();
    sync_block();  // every warp has done with Q, and with a Q that no tile of keys was computed for
    store_rows<Element, QueryTile>(o, shared + shared_query, 16 * warp, 0, rows_of<Element>(p.out, p.out_stride, batch, head, sequence.first_query),
                                   p.out_stride[2], m_start, sequence.queries, p.head_dim);
  }
};

}  // namespace bigmodel::cuda
