// Attention forward for Hopper (sm_90a): FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), algorithm 2.
//
// A block is one producer warpgroup, of which a warp has the copy engine bring tiles and another says which, and two or three consumer
// warpgroups, which multiply. It stays for many tiles of queries, the longest first (schedule.cuh): while one leaves, the next one's
// Q, K and V arrive.
//
//   producer   Q | K0 | V0 | K1 | V1 | ... | the next Q | K0 | ...    into stages of each, two or more, as they become empty
//   consumer   S0 = Q K0^T, softmax -> P0
//              S1 = Q K1^T  and  O += P0 V0   run at once on the tensor cores; softmax of S1 as soon as it is there
//              S2 = Q K2^T  and  O += P1 V1   ...
//              S0 = Q K0^T of the next tile of queries  and  the last O += P V of this one, which then leaves
//
// That is the short loop, without softcap, key padding, bias, ALiBi and dropout. In it consumers take turns at the tensor cores
// (ping-pong): one starts its products when the one before has started its own, and so comes to its softmax while the other's run.
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
#include "attention/schedule.cuh"

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
template <typename Element, typename TileX, typename TileY, bool from_first = false, int blocks>
BM_DEVICE void start_multiply_transposed(float (&c)[blocks][4], SharedAddress x, int x_row, SharedAddress y, int y_row) {
  wgmma_fence();
  BM_UNROLL
  for (int k = 0; k < TileX::columns / 16; k++)
    wgmma<Element, false>(c, k_major<TileX, from_first>(x, x_row, k), k_major<TileY, from_first>(y, y_row, k), k > 0);
  wgmma_commit();
}
// C += A Y, A from registers, of which Y has a row for each column. A group of its own.
template <typename Element, typename TileY, bool from_first = false, int steps, int blocks>
BM_DEVICE void start_multiply(float (&c)[blocks][4], const uint32_t (&a)[steps][4], SharedAddress y) {
  wgmma_fence();
  BM_UNROLL
  for (int k = 0; k < steps; k++) wgmma<Element, true>(c, a[k], mn_major<TileY, from_first>(y, k), true);
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

template <typename Element, int HeadDim, bool General, int consumers_ = 2>
struct AttentionSm90 {
  using Params = AttentionSm90Params;
  // Registers decide: a thread holds tile_n / 2 of S, tile_n / 4 of P and HeadDim / 2 of O beside what the loop needs. In the general
  // loop the instruction cache does: with 64 keys a kernel's code takes about 100 KB. Compiled so, none spills.
  static constexpr int consumers = consumers_;
  static constexpr int tile_n = General ? 64 : HeadDim <= 128 ? 128 : HeadDim == 192 ? 96 : 64;
  static constexpr int group = 4 * warp_size, threads = (1 + consumers) * group, blocks_per_multiprocessor = 1;
  static constexpr int tile_m = 64 * consumers;
  // As many as fit: short sequences have one or two tiles of keys, and the next ones' arrive meanwhile. A tile's Q is in its place until
  // its O has left, when the next one's is multiplied already: it takes a third place for the one after that to be on its way.
  static constexpr int stages = HeadDim <= 64 ? 4 : 2, query_stages = HeadDim > 128 ? 1 : General ? 2 : 3;
  static constexpr bool ping_pong = HeadDim <= 128 && !General;  // with longer products, or a longer softmax, turns have less to give
  static constexpr int n_blocks = tile_n / 8, d_blocks = HeadDim / 8, d_steps = HeadDim / 16, n_steps = tile_n / 16;
  static constexpr int producer_registers = consumers == 3 ? 32 : 40, consumer_registers = consumers == 3 ? 160 : 232;
  using QueryTile = SwizzledTile<tile_m, HeadDim>;
  using KeyTile = SwizzledTile<tile_n, HeadDim>;

  static constexpr int shared_query = 0;  // Q, and O on its way out
  static constexpr int shared_key = shared_query + query_stages * QueryTile::bytes;
  static constexpr int shared_value = shared_key + stages * KeyTile::bytes;
  static constexpr int shared_work = shared_value + stages * KeyTile::bytes;  // what each Q is: a WorkTile
  static constexpr int shared_barriers = shared_work + query_stages * int(sizeof(WorkTile));
  enum Barrier { work_full, query_full = work_full + query_stages, query_empty = query_full + query_stages, key_full = query_empty + query_stages,
                 key_empty = key_full + stages, value_full = key_empty + stages, value_empty = value_full + stages, value_arrived = value_empty + stages, barriers };
  static constexpr int shared_bytes = shared_barriers + barriers * mbarrier_bytes;
  static_assert(shared_bytes <= 227 << 10, "the most that a block gets");

  static BM_DEVICE SharedAddress barrier(int which) { return shared_start() + shared_barriers + which * mbarrier_bytes; }
  static BM_DEVICE SharedAddress query_tile(int stage) { return shared_start() + shared_query + stage * QueryTile::bytes; }
  static BM_DEVICE SharedAddress work_tile(int stage) { return shared_start() + shared_work + stage * int(sizeof(WorkTile)); }
  static BM_DEVICE SharedAddress key_tile(int stage) { return shared_start() + shared_key + stage * KeyTile::bytes; }
  static BM_DEVICE SharedAddress value_tile(int stage) { return shared_start() + shared_value + stage * KeyTile::bytes; }

  template <typename Tile>
  static BM_DEVICE void load(SharedAddress tile, const TensorMap& map, SharedAddress full, int row, int head, int batch) {
    mbarrier_arrive_expect(full, Tile::bytes);
    load_tile<Tile>(tile, map, full, row, head, batch);
  }

  static BM_DEVICE void run(const Params& params) {
    // ---- barriers ----
    if (thread_index() == 0) {
      mbarrier_init(barrier(value_arrived), 1);
      for (int stage = 0; stage < query_stages; stage++) {
        mbarrier_init(barrier(work_full + stage), 1);
        mbarrier_init(barrier(query_full + stage), 1);
        mbarrier_init(barrier(query_empty + stage), consumers * 4);
      }
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
      if (warp == 0) produce(params);
      if (warp == 1) schedule(params.p);
    } else {
      raise_registers<consumer_registers>();
      consume(params, warp / 4 - 1);
    }
  }

  // One warp: says what comes next, in time for the producer to bring it. Consumers give back a WorkTile with its Q.
  static BM_DEVICE void schedule(const AttentionParams& p) {
    LongestFirst<tile_m, tile_n> order(p);
    WorkTile work;
    Ring<query_stages> ring;
    for (int turn = 0; work.batch >= 0; turn++, ring.advance()) {
      const int stage = ring.stage;
      if (!order.next(turn, work)) work.batch = -1;  // the end
      mbarrier_wait(barrier(query_empty + stage), ring.parity ^ 1);
      if (lane_index() == 0) work.store(work_tile(stage));
      if (lane_index() == 0) mbarrier_arrive(barrier(work_full + stage));
    }
  }

  // One warp; its first lane speaks to the copy engine. `count` numbers the tiles of keys since the start, over all tiles of queries.
  static BM_DEVICE void produce(const Params& params) {
    const AttentionParams& p = params.p;
    const bool packed = p.cu_seqlens_q != nullptr, leader = lane_index() == 0;
    int count = 0, cleared = 0;
    for (Ring<query_stages> ring;; ring.advance()) {
      // ---- Q ----
      const int query_stage = ring.stage;
      mbarrier_wait(barrier(work_full + query_stage), ring.parity);
      const WorkTile work = WorkTile::load(work_tile(query_stage));
      sync_warp();  // all lanes have it before the first speaks for them
      const int slice = packed ? 0 : work.batch;
      if (work.batch < 0) {
        if (leader) mbarrier_arrive(barrier(query_full + query_stage));
        return;
      }
      if (leader) load<QueryTile>(query_tile(query_stage), params.query, barrier(query_full + query_stage), work.sequence.first_query + work.m_start, work.head, slice);

      // ---- K and V ----
      const TileRange range = visible_keys<tile_n>(p, work.sequence, work.m_start, tile_m);
      const int kv_head = work.head / (p.heads / p.kv_heads);
      for (int n = range.begin; n < range.end; n += tile_n, count++) {
        const int stage = count % stages, parity = count / stages & 1, row = work.sequence.first_key + n;
        mbarrier_wait(barrier(key_empty + stage), parity ^ 1);
        if (leader) load<KeyTile>(key_tile(stage), params.key, barrier(key_full + stage), row, kv_head, slice);
        mbarrier_wait(barrier(value_empty + stage), parity ^ 1);
        if (!packed || n + tile_n <= work.sequence.keys) {
          if (leader) load<KeyTile>(value_tile(stage), params.value, barrier(value_full + stage), row, kv_head, slice);
        } else {  // the last tile of a packed sequence, and its only one that is not whole
          if (leader) load<KeyTile>(value_tile(stage), params.value, barrier(value_arrived), row, kv_head, slice);
          mbarrier_wait(barrier(value_arrived), cleared++ & 1);
          clear_rows<KeyTile>(value_tile(stage), work.sequence.keys - n);
          if (leader) mbarrier_arrive(barrier(value_full + stage));
        }
      }
    }
  }

  static BM_DEVICE void release(int which) {
    if (lane_index() == 0) mbarrier_arrive(barrier(which));
  }

  // Barrier of a consumer's turn: its own threads wait for it, those of the consumer before say that it is there.
  static BM_DEVICE int turn_of(int consumer) { return 1 + consumers + consumer; }
  static BM_DEVICE void wait_for_turn(int consumer) {
    if constexpr (ping_pong) sync_named(turn_of(consumer), 2 * group);
  }
  static BM_DEVICE void pass_turn(int consumer) {
    if constexpr (ping_pong) arrive_named(turn_of((consumer + 1) % consumers), 2 * group);
  }

  // A tile of queries at its consumers.
  struct Tile {
    int query_stage, row0;  // row0: this thread's upper row
    Sequence sequence;
    TileRange range;
    BM_DEVICE bool empty() const { return range.begin >= range.end; }
    BM_DEVICE SharedAddress query() const { return query_tile(query_stage); }
  };
  // The next tile, once its Q is there; false when there is none.
  static BM_DEVICE bool arrived(const AttentionParams& p, Ring<query_stages>& ring, int consumer, Tile& tile) {
    const int stage = shuffle(ring.stage, 0);  // for the compiler the same in all lanes: addresses of Q stay in uniform registers
    mbarrier_wait(barrier(query_full + stage), ring.parity);
    ring.advance();
    const WorkTile work = WorkTile::load(work_tile(stage));
    if (work.batch < 0) return false;
    tile = {stage, work.m_start + 64 * consumer + 16 * (warp_index() % 4) + lane_index() / 4, work.sequence,
            visible_keys<tile_n>(p, work.sequence, work.m_start, tile_m)};
    return true;
  }

  using Output = float[d_blocks][4];
  using Softmax = OnlineSoftmax<d_blocks>;

  // O to global memory, by way of Q's place, and the place to the producer.
  static BM_DEVICE void leave(const AttentionParams& p, int query_stage, int consumer, Output& o, Softmax& softmax) {
    const WorkTile done = WorkTile::load(work_tile(query_stage));  // read again: the loops need the registers
    const int tile_row = 64 * consumer + 16 * (warp_index() % 4);
    const SharedAddress query = query_tile(query_stage);
    softmax.finish(o, p, done.sequence, done.batch, done.head, done.m_start + tile_row + lane_index() / 4);
    sync_named(1 + consumer, group);  // the warps of this consumer have done with its rows of Q
    store_rows<Element, QueryTile>(o, query, tile_row, 0, rows_of<Element>(p.out, p.out_stride, done.batch, done.head, done.sequence.first_query),
                                   p.out_stride[2], done.m_start, done.sequence.queries, p.head_dim);
    fence_proxy_async();  // the copy engine writes the next Q over these rows
    sync_warp();
    release(query_empty + query_stage);
  }

  static BM_DEVICE void consume(const Params& params, int consumer) {
    if constexpr (General) consume_general(params.p, consumer); else consume_short(params.p, consumer);
  }

  // S, softmax and O one after the other: next to such a softmax the products are short, other consumers' run beside it, and once in the
  // code it stays in the instruction cache.
  static BM_DEVICE void consume_general(const AttentionParams& p, int consumer) {
    Tile tile;
    Ring<query_stages> ring;
    int count = 0;  // as the producer has it
    while (arrived(p, ring, consumer, tile)) {
      const WorkTile work = WorkTile::load(work_tile(tile.query_stage));
      const Scores<Element, General> scores(p, tile.sequence, work.batch, work.head);
      Softmax softmax(scores.unit());
      float o[d_blocks][4], s[n_blocks][4], rescale[2];
      uint32_t probabilities[n_steps][4];
      clear(o);
      for (int n = tile.range.begin; n < tile.range.end; n += tile_n, count++) {
        const int stage = count % stages, parity = count / stages & 1;
        mbarrier_wait(barrier(key_full + stage), parity);
        start_multiply_transposed<Element, QueryTile, KeyTile>(s, tile.query(), 64 * consumer, key_tile(stage), 0);
        wgmma_wait<0>();
        release(key_empty + stage);
        scores.logits(s, tile.row0, n, tile.range.all_visible(n));
        softmax.probabilities(s, rescale);
        softmax.scale(o, rescale);
        scores.drop(s, tile.row0, n);
        to_fragments<Element>(probabilities, s);
        mbarrier_wait(barrier(value_full + stage), parity);
        start_multiply<Element, KeyTile>(o, probabilities, value_tile(stage));
        wgmma_wait<0>();
        release(value_empty + stage);
      }
      leave(p, tile.query_stage, consumer, o, softmax);
    }
  }

  // The first S of a tile runs beside the last P V of the one before, so that in short sequences, which have few tiles of keys, the tensor
  // cores need not wait for a softmax at every tile's beginning and for a way out at its end. With a single place for Q, where O leaves
  // from, the next one cannot be there yet.
  static constexpr bool overlaps_tiles = query_stages > 1;

  static BM_DEVICE void consume_short(const AttentionParams& p, int consumer) {
    Ring<query_stages> ring;
    int count = 0;  // as the producer has it
    float o[d_blocks][4], s[n_blocks][4], rescale[2];
    uint32_t probabilities[n_steps][4];
    Softmax softmax(p.softmax_scale * log2_e);
    Tile tile;
    // In steps of one tile of keys. S of this one, and, where there is one before, O += P V of that.
    const auto start_scores = [&](const Tile& of) {
      mbarrier_wait(barrier(key_full + count % stages), count / stages & 1);
      wait_for_turn(consumer);
      start_multiply_transposed<Element, QueryTile, KeyTile>(s, of.query(), 64 * consumer, key_tile(count % stages), 0);
    };
    const auto start_output = [&](int step) {
      mbarrier_wait(barrier(value_full + step % stages), step / stages & 1);
      start_multiply<Element, KeyTile>(o, probabilities, value_tile(step % stages));
    };
    const auto to_probabilities = [&](const Tile& of, int n) {
      release(key_empty + count % stages);
      const Scores<Element, General> scores(p, of.sequence, 0, 0);
      scores.logits(s, of.row0, n, of.range.all_visible(n));
      softmax.probabilities(s, rescale);
    };

    if (consumer + 1 == consumers) pass_turn(consumer);  // the first turn is consumer 0's
    bool more = arrived(p, ring, consumer, tile);
    while (more) {
      clear(o);
      softmax = Softmax(p.softmax_scale * log2_e);
      if (tile.empty()) {
        leave(p, tile.query_stage, consumer, o, softmax);
        more = arrived(p, ring, consumer, tile);
        continue;
      }
      // ---- the first S of all, or after a tile without keys ----
      start_scores(tile);
      pass_turn(consumer);
      wgmma_wait<0>();
      to_probabilities(tile, tile.range.begin);
      to_fragments<Element>(probabilities, s);

      for (;;) {
        count = shuffle(count, 0);  // likewise of K and V
        // ---- S of this step, and O += P V of the last ----
        for (int n = tile.range.begin + tile_n; n < tile.range.end; n += tile_n) {
          const int before = count++;
          start_scores(tile);
          start_output(before);
          pass_turn(consumer);
          wgmma_wait<1>();
          to_probabilities(tile, n);
          wgmma_wait<0>();
          release(value_empty + before % stages);
          softmax.scale(o, rescale);
          to_fragments<Element>(probabilities, s);
        }
        if constexpr (!overlaps_tiles) break;

        // ---- the first S of the next tile, and the last O += P V of this one ----
        const int query_stage = tile.query_stage;
        more = arrived(p, ring, consumer, tile);
        if (!more || tile.empty()) {
          finish_last(p, query_stage, consumer, count++, o, probabilities, softmax);
          break;
        }
        const int before = count++;
        start_scores(tile);
        start_output(before);
        pass_turn(consumer);
        wgmma_wait<1>();
        Softmax ended = softmax;
        softmax = Softmax(p.softmax_scale * log2_e);
        to_probabilities(tile, tile.range.begin);
        wgmma_wait<0>();
        release(value_empty + before % stages);
        leave(p, query_stage, consumer, o, ended);
        clear(o);
        to_fragments<Element>(probabilities, s);
      }
      if constexpr (!overlaps_tiles) {
        finish_last(p, tile.query_stage, consumer, count++, o, probabilities, softmax);
        more = arrived(p, ring, consumer, tile);
      }
    }
    if (consumer == 0) wait_for_turn(consumer);  // which nobody else takes
  }

  // The last O += P V where no S runs beside it, and the way out.
  static BM_DEVICE void finish_last(const AttentionParams& p, int query_stage, int consumer, int step, Output& o, const uint32_t (&probabilities)[n_steps][4],
                                    Softmax& softmax) {
    mbarrier_wait(barrier(value_full + step % stages), step / stages & 1);
    start_multiply<Element, KeyTile>(o, probabilities, value_tile(step % stages));
    wgmma_wait<0>();
    release(value_empty + step % stages);
    leave(p, query_stage, consumer, o, softmax);
  }
};

}  // namespace bigmodel::cuda
