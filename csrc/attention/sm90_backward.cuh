// Attention backward for Hopper (sm_90a): FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), appendix B.1, but in two passes over the
// tiles, as in sm80_backward.cuh, so that every sum belongs to one thread: no atomic addition, and the same bits in every run. The form in
// one pass, for calls that need not have that, is in sm90_one_pass.cuh.
//
//   S = Q K^T,  P = exp(S - logsumexp),  dP = dO V^T,  dS = P (dP - delta)                delta comes from a kernel of its own, before
//   for a tile of keys:     dV = sum P^T dO,  dK = sum dS^T Q    over the queries that see it, and the heads that share it
//   for a tile of queries:  dQ = sum dS K                        over the keys that it sees
//
// A block is one producer warpgroup, which has the copy engine bring tiles, and two consumer warpgroups, which multiply. Two tiles stay
// for the whole block (K and V, or Q and dO), and stages of two others pass by (Q and dO, or K and V).
//
//                          queries (tile_m)                 head_dim         The first pass works on S^T: a consumer owns 64 keys, and
//   keys      consumer 0 +-----------------+              +----------+       P^T and dS^T go from accumulators to A fragments in
//  (tile_n)              |  S^T, then P^T  |  x dO, x Q   |  dV, dK  |       registers.
//             consumer 1 +-----------------+              +----------+
//
//            consumer 0     1                       consumer 0    1          Rows of more than 128: dV and dK of 64 keys are all that two
//          +--------+--------+                      +------+ +------+        consumers can hold, one each. They share the work on S^T by
//  64 keys |  S^T   | S^T    |   P^T, dS^T in       |  dV  | |  dK  |        columns, and meet over P^T and dS^T in shared memory.
//          +--------+--------+   shared memory      +------+ +------+
//
// Rows past the end of a dense tensor arrive as zeros. In packed tensors the next sequence lies there; P and dS of its rows are 0, and
// that 0 times its rows is 0 too the producer sees to by overwriting them.
#pragma once
#include "arch/launch.cuh"
#include "arch/ldmatrix.cuh"
#include "attention/backward.cuh"
#include "attention/sm90.cuh"

namespace bigmodel::cuda {

struct AttentionBackwardSm90Params {
  AttentionBackwardParams b;
  TensorMap query, grad_out, key, value;  // dimensions: head_dim, row, head, batch
};

// The block's shared memory and its barriers: two tiles that stay, stages of two tiles that pass and of `beside` bytes, and `own` bytes
// for the kernel, at a multiple of 1024.
template <int HeadDim, int staying_rows, int passing_rows, int own, int beside>
struct BackwardTiles {
  static constexpr int consumers = 2, group = 4 * warp_size;
  static constexpr int threads = (1 + consumers) * group, blocks_per_multiprocessor = 1;
  static constexpr int producer_registers = 24, consumer_registers = 240;
  using Staying = SwizzledTile<staying_rows, HeadDim>;
  using Passing = SwizzledTile<passing_rows, HeadDim>;

  static constexpr int most = 227 << 10, barrier_room = 128;
  static constexpr int stages_that_fit = (most - barrier_room - 2 * Staying::bytes - own) / (2 * Passing::bytes + beside);
  static constexpr int stages = stages_that_fit < 3 ? stages_that_fit : 3;
  static_assert(stages >= 2, "a tile has to come while another is worked on");

  static constexpr int shared_passing = 2 * Staying::bytes;
  static constexpr int shared_own = shared_passing + 2 * stages * Passing::bytes;
  static constexpr int shared_beside = shared_own + own;
  static constexpr int shared_barriers = shared_beside + stages * beside;
  enum Barrier { staying_full, arrived, full, empty = full + stages, barriers = empty + stages };
  static constexpr int shared_bytes = shared_barriers + barriers * mbarrier_bytes;
  static_assert(barriers * mbarrier_bytes <= barrier_room && shared_bytes <= most, "the most that a block gets");

  static BM_DEVICE SharedAddress barrier(int which) { return shared_start() + shared_barriers + which * mbarrier_bytes; }
  static BM_DEVICE SharedAddress staying(int which) { return shared_start() + which * Staying::bytes; }
  static BM_DEVICE SharedAddress passing(int stage, int which) { return shared_start() + shared_passing + (2 * stage + which) * Passing::bytes; }

  static BM_DEVICE void init_barriers() {
    if (thread_index() == 0) {
      mbarrier_init(barrier(staying_full), 1);
      mbarrier_init(barrier(arrived), 1);
      for (int stage = 0; stage < stages; stage++) {
        mbarrier_init(barrier(full + stage), 1);
        mbarrier_init(barrier(empty + stage), consumers * 4);
      }
      fence_mbarrier_init();
    }
    sync_block();
  }

  // Where a tile's rows lie in a tensor.
  struct Place { int row, head, batch; };

  template <typename Tile>
  static BM_DEVICE void load_pair(SharedAddress first, SharedAddress second, const TensorMap& x, const TensorMap& y, int full_barrier, Place at) {
    mbarrier_arrive_expect(barrier(full_barrier), 2 * Tile::bytes);
    load_tile<Tile>(first, x, barrier(full_barrier), at.row, at.head, at.batch);
    load_tile<Tile>(second, y, barrier(full_barrier), at.row, at.head, at.batch);
  }

  // By one warp. rows: how many of the tile's are this sequence's; `cleared` counts the tiles that were cut short.
  static BM_DEVICE void produce_stage(int stage, const TensorMap& x, const TensorMap& y, Place at, int rows, int& cleared) {
    const bool leader = lane_index() == 0;
    if (rows >= Passing::rows) {
      if (leader) load_pair<Passing>(passing(stage, 0), passing(stage, 1), x, y, full + stage, at);
      return;
    }
    if (leader) load_pair<Passing>(passing(stage, 0), passing(stage, 1), x, y, arrived, at);
    mbarrier_wait(barrier(arrived), cleared++ & 1);
    clear_rows<Passing>(passing(stage, 0), rows);
    clear_rows<Passing>(passing(stage, 1), rows);
    if (leader) mbarrier_arrive(barrier(full + stage));
  }

  static BM_DEVICE void release(int stage) {
    sync_warp();  // every lane has read what it needs
    if (lane_index() == 0) mbarrier_arrive(barrier(empty + stage));
  }
};

// ---- dK and dV ----

// What the two forms of the first pass, and the one pass, have in common: which tiles, and the producer.
// told: bytes that the producer tells the consumers of each step.
template <int HeadDim, int tile_m_, int tile_n_, int own, int told_bytes = 0>
struct KeyValueGradTiles : BackwardTiles<HeadDim, tile_n_, tile_m_, own, tile_m_ * int(sizeof(RowStatistics)) + told_bytes> {
  using Tiles = BackwardTiles<HeadDim, tile_n_, tile_m_, own, tile_m_ * int(sizeof(RowStatistics)) + told_bytes>;
  using KeyTile = typename Tiles::Staying;    // 0: K, and dK on its way out; 1: V, and dV
  using QueryTile = typename Tiles::Passing;  // 0: Q; 1: dO
  static constexpr int tile_m = tile_m_, tile_n = tile_n_, stages = Tiles::stages;
  static_assert(tile_m % warp_size == 0, "the producer's lanes bring as many queries' statistics each");

  static BM_DEVICE SharedAddress statistics(int stage) {
    return shared_start() + Tiles::shared_beside + stage * (tile_m * int(sizeof(RowStatistics)) + told_bytes);
  }
  static BM_DEVICE SharedAddress told(int stage) { return statistics(stage) + tile_m * int(sizeof(RowStatistics)); }

  struct Work {
    const AttentionBackwardSm90Params& params;
    const Sequence sequence;
    const int batch, kv_head, n_start, group;
    const TileRange range;
    const int tiles, steps;

    BM_DEVICE Work(const AttentionBackwardSm90Params& all, bool all_queries = false)
        : params(all), sequence(Sequence::of(all.b.p, block_z())), batch(block_z()), kv_head(block_y()), n_start(block_x() * tile_n),
          group(all.b.p.heads / all.b.p.kv_heads), range(range_of(all_queries)), tiles(range.tiles()), steps(tiles * group) {}
    // What a form may have otherwise.
    static constexpr bool multiplies_by_keys = false;  // sums over its keys, so that those past the sequence's end must be numbers
    BM_DEVICE bool nothing() const { return n_start >= sequence.keys; }
    BM_DEVICE int query(int step) const { return range.begin + step % tiles * tile_m; }
    BM_DEVICE void tell(SharedAddress, int) const {}

    BM_DEVICE int head(int step) const { return kv_head * group + step / tiles; }
    // Those that the keys see, or also those that see nothing.
    BM_DEVICE TileRange range_of(bool all_queries) const {
      TileRange r = visible_queries<tile_m>(params.b.p, sequence, n_start, tile_n);
      if (all_queries) r.begin = 0, r.end = sequence.queries;
      return r;
    }
  };

  // One warp; its first lane speaks to the copy engine.
  template <typename Work>
  static BM_DEVICE void produce(const Work& work) {
    const AttentionBackwardSm90Params& params = work.params;
    const bool packed = params.b.p.cu_seqlens_q != nullptr, clear_keys = Work::multiplies_by_keys && packed && work.n_start + tile_n > work.sequence.keys;
    const int slice = packed ? 0 : work.batch, lane = lane_index();
    int cleared = 0;
    if (lane == 0)
      Tiles::template load_pair<KeyTile>(Tiles::staying(0), Tiles::staying(1), params.key, params.value, clear_keys ? Tiles::arrived : Tiles::staying_full,
                                         {work.sequence.first_key + work.n_start, work.kv_head, slice});
    if (clear_keys) {
      mbarrier_wait(Tiles::barrier(Tiles::arrived), cleared++ & 1);
      clear_rows<KeyTile>(Tiles::staying(0), work.sequence.keys - work.n_start);
      if (lane == 0) mbarrier_arrive(Tiles::barrier(Tiles::staying_full));
    }
    for (int step = 0; step < work.steps; step++) {
      const int stage = step % stages, head = work.head(step), m = work.query(step);
      RowStatistics mine[tile_m / warp_size];  // on their way while the stage empties
      BM_UNROLL
      for (int i = 0; i < tile_m / warp_size; i++) mine[i] = row_statistics(params.b, work.sequence, work.batch, head, m + i * warp_size + lane);
      mbarrier_wait(Tiles::barrier(Tiles::empty + stage), (step / stages & 1) ^ 1);
      BM_UNROLL
      for (int i = 0; i < tile_m / warp_size; i++) store_shared(statistics(stage) + (i * warp_size + lane) * int(sizeof(RowStatistics)), mine[i]);
      if (lane == 0) work.tell(told(stage), m);
      sync_warp();  // before the first lane's arrival says that they are there
      Tiles::produce_stage(stage, params.query, params.grad_out, {work.sequence.first_query + m, head, slice},
                           packed ? work.sequence.queries - m : tile_m, cleared);
    }
  }

  // What the other warps of the producer's group do.
  static BM_DEVICE void help(const Work&, int) {}

  // Of the columns of S^T from `column` on.
  static BM_DEVICE auto statistics_of(int stage, int column) {
    const SharedAddress start = statistics(stage) + (column + 2 * (lane_index() % 4)) * int(sizeof(RowStatistics));
    return [start](int j) { return load_shared<RowPair>(start + 8 * j * int(sizeof(RowStatistics))); };
  }

  template <typename Kernel, typename Work = Work>
  static BM_DEVICE void run_as(const AttentionBackwardSm90Params& params) {
    const Work work(params);
    if (work.nothing()) return;
    Tiles::init_barriers();
    const int warp = warp_index();
    if (warp < 4) {
      lower_registers<Tiles::producer_registers>();
      if (warp == 0) produce(work); else Kernel::help(work, warp - 1);
    } else {
      raise_registers<Tiles::consumer_registers>();
      Kernel::consume(work, warp / 4 - 1);
    }
  }
};

// head_dim up to 128: each consumer has 64 keys.
// Registers decide: a thread holds tile_m / 2 of S and of dP each, then as much of P and dS together, and HeadDim / 2 of dK and of dV.
template <int HeadDim, bool General>
inline constexpr int key_grad_tile_m = General ? (HeadDim <= 64 ? 64 : 32) : HeadDim <= 64 ? 128 : 64;
template <int HeadDim, bool General>
using KeyGradTiles = KeyValueGradTiles<HeadDim, key_grad_tile_m<HeadDim, General>, 128, 0>;

template <typename Element, int HeadDim, bool General>
struct AttentionKeyValueGradSm90 : KeyGradTiles<HeadDim, General> {
  using Base = KeyGradTiles<HeadDim, General>;
  using Params = AttentionBackwardSm90Params;
  using KeyTile = typename Base::KeyTile;
  using QueryTile = typename Base::QueryTile;
  static constexpr int m_blocks = Base::tile_m / 8, m_steps = Base::tile_m / 16, d_blocks = HeadDim / 8;

  static BM_DEVICE void run(const Params& params) { Base::template run_as<AttentionKeyValueGradSm90>(params); }

  static BM_DEVICE void consume(const typename Base::Work& work, int consumer) {
    const AttentionBackwardParams& b = work.params.b;
    const AttentionParams& p = b.p;
    const SharedAddress key = Base::staying(0), value = Base::staying(1);
    const int row = 64 * consumer + 16 * (warp_index() % 4), key0 = work.n_start + row + lane_index() / 4;
    float dk[d_blocks][4], dv[d_blocks][4];
    clear(dk);
    clear(dv);
    mbarrier_wait(Base::barrier(Base::staying_full), 0);

    for (int step = 0; step < work.steps; step++) {
      const int stage = step % Base::stages, m = work.query(step);
      const SharedAddress query = Base::passing(stage, 0), grad = Base::passing(stage, 1);
      const bool all_visible = work.range.all_visible(m);
      const Scores<Element, General, true> scores(p, work.sequence, work.batch, work.head(step));
      float s[m_blocks][4], g[m_blocks][4];
      uint32_t probabilities[m_steps][4], gradients[m_steps][4];
      // ---- S^T = K Q^T, dP^T = V dO^T ----
      mbarrier_wait(Base::barrier(Base::full + stage), step / Base::stages & 1);
      start_multiply_transposed<Element, KeyTile, QueryTile>(s, key, 64 * consumer, query, 0);
      start_multiply_transposed<Element, KeyTile, QueryTile>(g, value, 64 * consumer, grad, 0);

      // ---- P^T and dS^T ----
      const auto statistics = Base::statistics_of(stage, 0);
      wgmma_wait<1>();
      scores.probabilities(s, key0, m, all_visible, statistics);
      wgmma_wait<0>();
      scores.gradients(s, g, key0, m, all_visible, statistics, NoBias{});
      to_fragments<Element>(probabilities, s);
      to_fragments<Element>(gradients, g);

      // ---- dV += P^T dO, dK += dS^T Q ----
      start_multiply<Element, QueryTile>(dv, probabilities, grad);
      start_multiply<Element, QueryTile>(dk, gradients, query);
      wgmma_wait<0>();
      Base::release(stage);
    }

    multiply_by(dk, p.softmax_scale);
    sync_named(1 + consumer, Base::group);  // the warps of this consumer have done with its rows of K and V
    store_rows<Element, KeyTile>(dk, key, row, 0, rows_of<Element>(b.dk, b.dk_stride, work.batch, work.kv_head, work.sequence.first_key), b.dk_stride[2],
                                 work.n_start, work.sequence.keys, p.head_dim);
    store_rows<Element, KeyTile>(dv, value, row, 0, rows_of<Element>(b.dv, b.dv_stride, work.batch, work.kv_head, work.sequence.first_key), b.dv_stride[2],
                                 work.n_start, work.sequence.keys, p.head_dim);
  }
};

// head_dim of more than 128: 64 keys, of which consumer 0 has dV and consumer 1 has dK.
using ScoreTile = SwizzledTile<64, 64>;  // P^T or dS^T: rows are keys
template <int HeadDim>
using WideKeyGradTiles = KeyValueGradTiles<HeadDim, 64, ScoreTile::rows, 2 * ScoreTile::bytes>;

template <typename Element, int HeadDim, bool General>
struct AttentionWideKeyValueGradSm90 : WideKeyGradTiles<HeadDim> {
  using Base = WideKeyGradTiles<HeadDim>;
  using Params = AttentionBackwardSm90Params;
  using KeyTile = typename Base::KeyTile;
  using QueryTile = typename Base::QueryTile;
  static constexpr int half = Base::tile_m / 2, half_blocks = half / 8, half_steps = half / 16, d_blocks = HeadDim / 8;
  static constexpr int both = 2 * Base::group;

  static BM_DEVICE SharedAddress score_tile(int which) { return shared_start() + Base::shared_own + which * ScoreTile::bytes; }

  static BM_DEVICE void run(const Params& params) { Base::template run_as<AttentionWideKeyValueGradSm90>(params); }

  // A warp's 16 rows of its consumer's half of the columns.
  static BM_DEVICE void store_scores(SharedAddress tile, int row, int consumer, const float (&x)[half_blocks][4]) {
    uint32_t fragments[half_steps][4];
    to_fragments<Element>(fragments, x);
    BM_UNROLL
    for (int k = 0; k < half_steps; k++) stmatrix(tile + ScoreTile::offset(row + lane_index() % 16, consumer * half_blocks + 2 * k + lane_index() / 16), fragments[k]);
  }

  static BM_DEVICE void consume(const typename Base::Work& work, int consumer) {
    const AttentionBackwardParams& b = work.params.b;
    const AttentionParams& p = b.p;
    const SharedAddress key = Base::staying(0), value = Base::staying(1);
    const int row = 16 * (warp_index() % 4), key0 = work.n_start + row + lane_index() / 4, column = half * consumer;
    float d[d_blocks][4];  // dV or dK
    clear(d);
    mbarrier_wait(Base::barrier(Base::staying_full), 0);

    for (int step = 0; step < work.steps; step++) {
      const int stage = step % Base::stages, m = work.query(step);
      const SharedAddress query = Base::passing(stage, 0), grad = Base::passing(stage, 1);
      const bool all_visible = work.range.all_visible(m);
      const Scores<Element, General, true> scores(p, work.sequence, work.batch, work.head(step));
      float s[half_blocks][4], g[half_blocks][4];
      // ---- this half of S^T = K Q^T and of dP^T = V dO^T ----
      mbarrier_wait(Base::barrier(Base::full + stage), step / Base::stages & 1);
      start_multiply_transposed<Element, KeyTile, QueryTile>(s, key, 0, query, column);
      start_multiply_transposed<Element, KeyTile, QueryTile>(g, value, 0, grad, column);

      // ---- P^T and dS^T, into shared memory ----
      const auto statistics = Base::statistics_of(stage, column);
      wgmma_wait<1>();
      scores.probabilities(s, key0, m + column, all_visible, statistics);
      wgmma_wait<0>();
      scores.gradients(s, g, key0, m + column, all_visible, statistics, NoBias{});
      sync_named(1, both);  // both have done with the last P^T and dS^T
      store_scores(score_tile(0), row, consumer, s);
      store_scores(score_tile(1), row, consumer, g);
      fence_proxy_async();
      sync_named(1, both);

      // ---- dV += P^T dO, or dK += dS^T Q ----
      const SharedAddress score = score_tile(consumer), other = consumer == 0 ? grad : query;
      wgmma_fence();
      BM_UNROLL
      for (int k = 0; k < Base::tile_m / 16; k++) wgmma<Element, true>(d, k_major<ScoreTile>(score, 0, k), mn_major<QueryTile>(other, k), true);
      wgmma_commit();
      wgmma_wait<0>();
      Base::release(stage);
    }

    sync_named(1, both);  // both have done with K and V
    if (consumer == 0) {
      store_rows<Element, KeyTile>(d, value, row, 0, rows_of<Element>(b.dv, b.dv_stride, work.batch, work.kv_head, work.sequence.first_key), b.dv_stride[2],
                                   work.n_start, work.sequence.keys, p.head_dim);
    } else {
      multiply_by(d, p.softmax_scale);
      store_rows<Element, KeyTile>(d, key, row, 0, rows_of<Element>(b.dk, b.dk_stride, work.batch, work.kv_head, work.sequence.first_key), b.dk_stride[2],
                                   work.n_start, work.sequence.keys, p.head_dim);
    }
  }
};

// ---- dQ, and the gradient of the bias ----

// Registers decide up to 128, where a thread holds tile_n / 2 of S and of dP each, then tile_n / 4 of dS, and HeadDim / 2 of dQ; above
// it is shared memory. The general loop is written out for each element, and has to stay small enough for the instruction cache.
template <int HeadDim, bool General>
inline constexpr int query_grad_tile_n = HeadDim > 192 || (General && HeadDim > 128) ? 32 : HeadDim > 128 || General ? 64 : 128;
template <int HeadDim, bool General>
using QueryGradTiles = BackwardTiles<HeadDim, 128, query_grad_tile_n<HeadDim, General>, 0, 0>;

template <typename Element, int HeadDim, bool General>
struct AttentionQueryGradSm90 : QueryGradTiles<HeadDim, General> {
  using Base = QueryGradTiles<HeadDim, General>;
  using Params = AttentionBackwardSm90Params;
  using QueryTile = typename Base::Staying;  // 0: Q, and dQ on its way out; 1: dO
  using KeyTile = typename Base::Passing;    // 0: K; 1: V
  static constexpr int tile_m = 128, tile_n = query_grad_tile_n<HeadDim, General>;
  static constexpr int n_blocks = tile_n / 8, n_steps = tile_n / 16, d_blocks = HeadDim / 8;

  static BM_DEVICE void run(const Params& params) {
    const AttentionParams& p = params.b.p;
    // ---- which tile ----
    const int batch = block_z(), head = block_y();
    const Sequence sequence = Sequence::of(p, batch);
    const int m_start = (grid_x() - 1 - block_x()) * tile_m;  // causal: the longest rows first
    if (m_start >= sequence.queries) return;
    const TileRange range = visible_keys<tile_n>(p, sequence, m_start, tile_m);

    Base::init_barriers();
    const int warp = warp_index();
    if (warp < 4) {
      lower_registers<Base::producer_registers>();
      if (warp == 0) produce(params, sequence, batch, head, m_start, range);
    } else {
      raise_registers<Base::consumer_registers>();
      consume(params.b, sequence, batch, head, m_start, range, warp / 4 - 1);
    }
  }

  // One warp; its first lane speaks to the copy engine.
  static BM_DEVICE void produce(const Params& params, const Sequence& sequence, int batch, int head, int m_start, const TileRange& range) {
    const AttentionParams& p = params.b.p;
    const bool packed = p.cu_seqlens_q != nullptr;
    const int kv_head = head / (p.heads / p.kv_heads), slice = packed ? 0 : batch, tiles = range.tiles();
    if (lane_index() == 0)
      Base::template load_pair<QueryTile>(Base::staying(0), Base::staying(1), params.query, params.grad_out, Base::staying_full,
                                          {sequence.first_query + m_start, head, slice});
    int cleared = 0;
    for (int i = 0; i < tiles; i++) {
      const int stage = i % Base::stages, n = range.begin + i * tile_n;
      mbarrier_wait(Base::barrier(Base::empty + stage), (i / Base::stages & 1) ^ 1);
      Base::produce_stage(stage, params.key, params.value, {sequence.first_key + n, kv_head, slice}, packed ? sequence.keys - n : tile_n, cleared);
    }
  }

  static BM_DEVICE void consume(const AttentionBackwardParams& b, const Sequence& sequence, int batch, int head, int m_start, const TileRange& range,
                                int consumer) {
    const AttentionParams& p = b.p;
    const SharedAddress query = Base::staying(0), grad = Base::staying(1);
    const int row = 64 * consumer + 16 * (warp_index() % 4), query0 = m_start + row + lane_index() / 4, tiles = range.tiles();
    const Scores<Element, General> scores(p, sequence, batch, head);
    const AddToBias add_to_bias(b, batch, head);
    RowPair pair;
    BM_UNROLL
    for (int r = 0; r < 2; r++) pair.row[r] = row_statistics(b, sequence, batch, head, query0 + 8 * r);
    const auto statistics = [&](int) { return pair; };
    float dq[d_blocks][4];
    clear(dq);
    mbarrier_wait(Base::barrier(Base::staying_full), 0);

    for (int i = 0; i < tiles; i++) {
      const int stage = i % Base::stages, n = range.begin + i * tile_n;
      const SharedAddress key = Base::passing(stage, 0), value = Base::passing(stage, 1);
      float s[n_blocks][4], g[n_blocks][4];
      uint32_t gradients[n_steps][4];
      // ---- S = Q K^T, dP = dO V^T ----
      mbarrier_wait(Base::barrier(Base::full + stage), i / Base::stages & 1);
      start_multiply_transposed<Element, QueryTile, KeyTile>(s, query, 64 * consumer, key, 0);
      start_multiply_transposed<Element, QueryTile, KeyTile>(g, grad, 64 * consumer, value, 0);

      // ---- dS ----
      wgmma_wait<1>();
      scores.probabilities(s, query0, n, range.all_visible(n), statistics);
      wgmma_wait<0>();
      scores.gradients(s, g, query0, n, range.all_visible(n), statistics, add_to_bias);
      to_fragments<Element>(gradients, g);

      // ---- dQ += dS K ----
      start_multiply<Element, KeyTile>(dq, gradients, key);
      wgmma_wait<0>();
      Base::release(stage);
    }

    multiply_by(dq, p.softmax_scale);
    sync_named(1 + consumer, Base::group);  // the warps of this consumer have done with its rows of Q
    store_rows<Element, QueryTile>(dq, query, row, 0, rows_of<Element>(b.dq, b.dq_stride, batch, head, sequence.first_query), b.dq_stride[2], m_start,
                                   sequence.queries, p.head_dim);
  }
};

// On the host: a block for each `tile` of `length` rows, and each head.
template <typename Kernel>
void start_pass(const AttentionBackwardParams& b, int length, int tile, int heads, const Stream& stream) {
  const AttentionParams& p = b.p;
  constexpr int panel = Kernel::QueryTile::panel_columns;
  const AttentionBackwardSm90Params params{
      b, query_map(p, p.query, p.query_stride, panel, Kernel::tile_m), query_map(p, b.grad_out, b.grad_out_stride, panel, Kernel::tile_m),
      key_map(p, p.key, p.key_stride, panel, Kernel::tile_n), key_map(p, p.value, p.value_stride, panel, Kernel::tile_n)};
  launch<Kernel>({(length + tile - 1) / tile, heads, p.batch}, params, stream);
}

}  // namespace bigmodel::cuda
