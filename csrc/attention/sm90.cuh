// Attention forward for Hopper (sm_90a): FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), algorithm 2.
//
// A block is one producer warpgroup, which has the copy engine bring tiles, and two or three consumer warpgroups, which multiply.
//
//   producer   Q | K0 | V0 | K1 | V1 | ...    into two stages of K and two of V, as they become empty
//   consumer   S0 = Q K0^T, softmax -> P0
//              S1 = Q K1^T  and  O += P0 V0   run at once on the tensor cores; softmax of S1 as soon as it is there
//              S2 = Q K2^T  and  O += P1 V1   ...
//
// In the short loop consumers take turns at the tensor cores (ping-pong): one starts its products when the one before has started its own,
// and so comes to its softmax while the other's products run.
//
//   consumer 0   | S, O |  softmax    | S, O |  softmax    |
//   consumer 1          | S, O |  softmax    | S, O |  softmax ...
//
//            head_dim                      keys (tile_n)
//          +----------+     consumer 0    +-----------------+     64 rows of S and O for each consumer. P goes from S's
//   tile_m | Q        |     consumer 1    |        S        |     accumulators to A fragments in registers.
//          +----------+    (consumer 2)   +-----------------+
//
// Rows past the end of a dense tensor arrive as zeros. In packed tensors the next sequence lies there: its keys are masked, and its
// values, which 0 * V would make NaN where they are not finite, the producer overwrites with zeros.
#pragma once
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "attention/rows.cuh"

namespace bigmodel::cuda {

// By one thread: rows from `row` of one head, panel by panel. `full` expects the bytes and gets them.
template <typename Tile>
BM_DEVICE void load_tile(SharedAddress tile, const TensorMap& map, SharedAddress full, int row, int head, int batch) {
  BM_UNROLL
  for (int panel = 0; panel < Tile::columns / Tile::panel_columns; panel++)
    tma_load(tile + panel * Tile::panel_bytes, map, full, panel * Tile::panel_columns, row, head, batch);
}

// By one warp: zeros in the rows from `first` of a tile that has arrived, for wgmma to read.
template <typename Tile>
BM_DEVICE void clear_rows(SharedAddress tile, int first) {
  for (int c = first * Tile::row_chunks + lane_index(); c < Tile::rows * Tile::row_chunks; c += warp_size)
    store_shared(tile + Tile::offset(c / Tile::row_chunks, c % Tile::row_chunks), Word<16>{});
  fence_proxy_async();
  sync_warp();
}

// C = X Y^T over head_dim: 64 rows of X from `x_row`, and as many rows of Y from `y_row` as C has columns. A group of its own.
template <typename Element, typename TileX, typename TileY, int blocks>
BM_DEVICE void start_multiply_transposed(float (&c)[blocks][4], SharedAddress x, int x_row, SharedAddress y, int y_row) {
  wgmma_fence();
  BM_UNROLL
  for (int k = 0; k < TileX::columns / 16; k++) wgmma<Element, false>(c, k_major<TileX>(x, x_row, k), k_major<TileY>(y, y_row, k), k > 0);
  wgmma_commit();
}
// C += A Y, A from registers, of which Y has a row for each column. A group of its own.
template <typename Element, typename TileY, int steps, int blocks>
BM_DEVICE void start_multiply(float (&c)[blocks][4], const uint32_t (&a)[steps][4], SharedAddress y) {
  wgmma_fence();
  BM_UNROLL
  for (int k = 0; k < steps; k++) wgmma<Element, true>(c, a[k], mn_major<TileY>(y, k), true);
  wgmma_commit();
}

template <typename Element, int steps>
BM_DEVICE void to_fragments(uint32_t (&a)[steps][4], const float (&x)[2 * steps][4]) {
  BM_UNROLL
  for (int k = 0; k < steps; k++) to_fragment<Element>(a[k], x[2 * k], x[2 * k + 1]);
}

// On the host: the map of query, key, value or dO, of which one copy brings `box_rows` rows of one panel.
inline TensorMap map_of(const void* base, int64_t head_dim, int64_t rows, int64_t heads, int64_t batch, const int64_t (&stride)[3], int panel_columns, int box_rows) {
  TensorMapArgs a{base, {head_dim, rows, heads, batch}, {1, stride[2], stride[1], stride[0]}, {panel_columns, box_rows, 1, 1}};
  for (int i = 1; i < 4; i++)
    if (a.size[i] == 1) a.stride[i] = 8;  // never used, and perhaps not one that a map may have
  return tensor_map(a);
}

inline TensorMap query_map(const AttentionParams& p, const void* query, const int64_t (&stride)[3], int panel_columns, int box_rows) {
  const bool packed = p.cu_seqlens_q != nullptr;
  return map_of(query, p.head_dim, packed ? p.total_queries : p.query_length, p.heads, packed ? 1 : p.batch, stride, panel_columns, box_rows);
}
inline TensorMap key_map(const AttentionParams& p, const void* key, const int64_t (&stride)[3], int panel_columns, int box_rows) {
  const bool packed = p.cu_seqlens_q != nullptr;
  return map_of(key, p.head_dim, packed ? p.total_keys : p.key_length, p.kv_heads, packed ? 1 : p.batch, stride, panel_columns, box_rows);
}

struct AttentionSm90Params {
  AttentionParams p;
  TensorMap query, key, value;  // dimensions: head_dim, row, head, batch
};

template <typename Element, int HeadDim, bool General>
struct AttentionSm90 {
  using Params = AttentionSm90Params;
  // Registers decide: a thread holds tile_n / 2 of S, tile_n / 4 of P and HeadDim / 2 of O beside what the loop needs, which in
  // the general one is much (addresses, random words). Compiled so, none spills.
  static constexpr int consumers = HeadDim <= 64 && !General ? 3 : 2;
  static constexpr int tile_n = General ? (HeadDim == 64 ? 96 : HeadDim <= 96 ? 128 : HeadDim == 128 ? 64 : 32)
                                        : (HeadDim <= 64 ? 96 : HeadDim <= 128 ? 128 : HeadDim == 192 ? 96 : 64);
  static constexpr int group = 4 * warp_size, threads = (1 + consumers) * group, blocks_per_multiprocessor = 1;
  static constexpr int tile_m = 64 * consumers;
  static constexpr int stages = 2;
  static constexpr bool ping_pong = HeadDim <= 128 && !General;  // with longer products, or a longer softmax, turns have less to give
  static constexpr int n_blocks = tile_n / 8, d_blocks = HeadDim / 8, d_steps = HeadDim / 16, n_steps = tile_n / 16;
  static constexpr int producer_registers = consumers == 3 ? 32 : 24, consumer_registers = consumers == 3 ? 160 : 240;
  using QueryTile = SwizzledTile<tile_m, HeadDim>;
  using KeyTile = SwizzledTile<tile_n, HeadDim>;

  static constexpr int shared_query = 0;  // Q, and O on its way out
  static constexpr int shared_key = shared_query + QueryTile::bytes;
  static constexpr int shared_value = shared_key + stages * KeyTile::bytes;
  static constexpr int shared_barriers = shared_value + stages * KeyTile::bytes;
  enum Barrier { query_full, key_full, key_empty = key_full + stages, value_full = key_empty + stages, value_empty = value_full + stages,
                 value_arrived = value_empty + stages, barriers };
  static constexpr int shared_bytes = shared_barriers + barriers * mbarrier_bytes;
  static_assert(shared_bytes <= 227 << 10, "the most that a block gets");

  static BM_DEVICE SharedAddress barrier(int which) { return shared_start() + shared_barriers + which * mbarrier_bytes; }
  static BM_DEVICE SharedAddress key_tile(int stage) { return shared_start() + shared_key + stage * KeyTile::bytes; }
  static BM_DEVICE SharedAddress value_tile(int stage) { return shared_start() + shared_value + stage * KeyTile::bytes; }

  template <typename Tile>
  static BM_DEVICE void load(SharedAddress tile, const TensorMap& map, SharedAddress full, int row, int head, int batch) {
    mbarrier_arrive_expect(full, Tile::bytes);
    load_tile<Tile>(tile, map, full, row, head, batch);
  }

  static BM_DEVICE void run(const Params& params) {
    const AttentionParams& p = params.p;
    // ---- which tile ----
    const int batch = block_z(), head = block_y();
    const Sequence sequence = Sequence::of(p, batch);
    const int m_start = (grid_x() - 1 - block_x()) * tile_m;  // causal: the longest rows first
    if (m_start >= sequence.queries) return;
    const TileRange range = visible_keys<tile_n>(p, sequence, m_start, tile_m);
    const int tiles = range.tiles();

    // ---- barriers ----
    if (thread_index() == 0) {
      mbarrier_init(barrier(query_full), 1);
      mbarrier_init(barrier(value_arrived), 1);
      for (int stage = 0; stage < stages; stage++) {
        mbarrier_init(barrier(key_full + stage), 1);
        mbarrier_init(barrier(value_full + stage), 1);
        mbarrier_init(barrier(key_empty + stage), consumers * 4);
        mbarrier_init(barrier(value_empty + stage), consumers * 4);
      }
      fence_mbarrier_init();
    }
    sync_block();

    const int warp = warp_index();
    if (warp < 4) {
      lower_registers<producer_registers>();
      if (warp == 0) produce(params, sequence, batch, head, m_start, range, tiles);
    } else {
      raise_registers<consumer_registers>();
      consume(params, sequence, batch, head, m_start, range, tiles, warp / 4 - 1);
    }
  }

  // One warp; its first lane speaks to the copy engine.
  static BM_DEVICE void produce(const Params& params, const Sequence& sequence, int batch, int head, int m_start, const TileRange& range, int tiles) {
    const AttentionParams& p = params.p;
    const bool packed = p.cu_seqlens_q != nullptr, leader = lane_index() == 0;
    const int kv_head = head / (p.heads / p.kv_heads), slice = packed ? 0 : batch;
    if (leader) load<QueryTile>(shared_start() + shared_query, params.query, barrier(query_full), sequence.first_query + m_start, head, slice);
    for (int i = 0; i < tiles; i++) {
      const int stage = i % stages, parity = i / stages & 1, n = range.begin + i * tile_n, row = sequence.first_key + n;
      mbarrier_wait(barrier(key_empty + stage), parity ^ 1);
      if (leader) load<KeyTile>(key_tile(stage), params.key, barrier(key_full + stage), row, kv_head, slice);
      mbarrier_wait(barrier(value_empty + stage), parity ^ 1);
      if (!packed || n + tile_n <= sequence.keys) {
        if (leader) load<KeyTile>(value_tile(stage), params.value, barrier(value_full + stage), row, kv_head, slice);
      } else {  // the last tile of a packed sequence, and its only one that is not whole
        if (leader) load<KeyTile>(value_tile(stage), params.value, barrier(value_arrived), row, kv_head, slice);
        mbarrier_wait(barrier(value_arrived), 0);
        clear_rows<KeyTile>(value_tile(stage), sequence.keys - n);
        if (leader) mbarrier_arrive(barrier(value_full + stage));
      }
    }
  }

  static BM_DEVICE void release(int which) {
    if (lane_index() == 0) mbarrier_arrive(barrier(which));
  }

  // Barrier of a consumer's turn: its own threads wait for it, those of the consumer before say that it is there.
  static BM_DEVICE int turn_of(int consumer) { return 1 + consumers + consumer; }
  static BM_DEVICE void wait_for_turn(int consumer, bool first) {
    if constexpr (ping_pong)
      if (!first || consumer > 0) sync_named(turn_of(consumer), 2 * group);
  }
  static BM_DEVICE void pass_turn(int consumer, bool last) {
    if constexpr (ping_pong)
      if (!last || consumer + 1 < consumers) arrive_named(turn_of((consumer + 1) % consumers), 2 * group);
  }

  static BM_DEVICE void start_scores(float (&s)[n_blocks][4], int stage, int consumer) {
    start_multiply_transposed<Element, QueryTile, KeyTile>(s, shared_start() + shared_query, 64 * consumer, key_tile(stage), 0);
  }

  static BM_DEVICE void consume(const Params& params, const Sequence& sequence, int batch, int head, int m_start, const TileRange& range, int tiles, int consumer) {
    const AttentionParams& p = params.p;
    const int warp = warp_index() % 4, row0 = m_start + 64 * consumer + 16 * warp + lane_index() / 4;
    const Scores<Element, General> scores(p, sequence, batch, head);
    OnlineSoftmax<d_blocks> softmax;
    float o[d_blocks][4], s[n_blocks][4], rescale[2];
    uint32_t probabilities[n_steps][4];
    clear(o);
    mbarrier_wait(barrier(query_full), 0);

    if (tiles > 0) {
      // ---- the first S ----
      mbarrier_wait(barrier(key_full), 0);
      wait_for_turn(consumer, true);
      start_scores(s, 0, consumer);
      pass_turn(consumer, tiles == 1);
      wgmma_wait<0>();
      release(key_empty);
      scores.logits(s, row0, range.begin, range.all_visible(range.begin));
      softmax.probabilities(s, rescale);
      scores.drop(s, row0, range.begin);
      to_fragments<Element>(probabilities, s);

      // ---- S of this tile, and O += P V of the last ----
      for (int i = 1; i < tiles; i++) {
        const int stage = i % stages, before = (i - 1) % stages, n = range.begin + i * tile_n;
        mbarrier_wait(barrier(key_full + stage), i / stages & 1);
        wait_for_turn(consumer, false);
        start_scores(s, stage, consumer);
        mbarrier_wait(barrier(value_full + before), (i - 1) / stages & 1);
        start_multiply<Element, KeyTile>(o, probabilities, value_tile(before));
        pass_turn(consumer, i + 1 == tiles);
        wgmma_wait<1>();
        release(key_empty + stage);
        scores.logits(s, row0, n, range.all_visible(n));
        softmax.probabilities(s, rescale);
        wgmma_wait<0>();
        release(value_empty + before);
        softmax.scale(o, rescale);
        scores.drop(s, row0, n);
        to_fragments<Element>(probabilities, s);
      }

      // ---- the last O += P V ----
      const int last = (tiles - 1) % stages;
      mbarrier_wait(barrier(value_full + last), (tiles - 1) / stages & 1);
      start_multiply<Element, KeyTile>(o, probabilities, value_tile(last));
      wgmma_wait<0>();
      release(value_empty + last);
    }

    softmax.finish(o, p, sequence, batch, head, row0);
    sync_named(1 + consumer, group);  // the warps of this consumer have done with its rows of Q
    store_rows<Element, QueryTile>(o, shared_start() + shared_query, 64 * consumer + 16 * warp, 0,
                                   rows_of<Element>(p.out, p.out_stride, batch, head, sequence.first_query), p.out_stride[2], m_start,
                                   sequence.queries, p.head_dim);
  }
};

}  // namespace bigmodel::cuda
