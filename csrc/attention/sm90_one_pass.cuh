// Attention backward for Hopper (sm_90a) in one pass over the tiles: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), appendix B.1.
//
// A block owns 128 keys, as the first pass of sm90_backward.cuh does, and has dK and dV in registers. What it adds is dQ: dS goes to shared
// memory, turned, so that the product with K is one over all the block's keys. Five products where two passes take seven.
//
//                          queries (tile_m)                 head_dim
//   keys      consumer 0 +-----------------+              +----------+
//  (tile_n)              |  S^T, then P^T  |  x dO, x Q   |  dV, dK  |       A fragments from accumulators
//             consumer 1 +-----------------+              +----------+
//
//                           keys                        head_dim
//   queries              +-----------------+   x K      +----------+         dS from shared memory; consumers share dQ by rows where there
//   (tile_m)             |  dS             |            |    dQ    |         are 128 of them, by columns where there are 64
//                        +-----------------+            +----------+
//
// dQ of a tile of queries is a sum over blocks. It leaves in float32, as the registers have it, by way of shared memory: the copy engine adds
// it to a tile in memory (`dq_sum`), in the L2 cache and in whatever order blocks come, so that the last bits vary between runs.
// AttentionQueryGradRound makes dQ of it. Where a sequence's keys have one block, nobody adds, and dQ is written here.
//
//   products   | dV(i) ............ | dQ(i) | dK(i) | S(i+1) .. | dP(i+1) ......... | dV(i+1) ...
//   others           dS(i), turned  |       | dQ(i) leaves      |       P(i+1)      | dS(i+1), turned
//
// So there is a product under way while a consumer computes. Blocks start at different tiles of queries, so that they do not add to the
// same one at a time.
//
// What it costs: at head_dim 128 a step has 5 * 2 * 64 * 128 * 128 = 10.5 MFLOP and adds 32 KB of dQ, and as much of Q and dO comes in. At
// 600 TFLOP/s that is 1.9 TB/s each way between the L2 cache and all multiprocessors, where about 9 TB/s go through. Shared memory is the
// nearest limit: wgmma reads K, V and dS for S, dP and dQ at the rate of the products, and with dS and dQ through it a step keeps it busy
// for 2900 cycles beside 2560 of products.
#pragma once
#include "attention/sm90_backward.cuh"

namespace bigmodel::cuda {

// dQ of a tile of queries between two consumers: 64 rows each, or half of the columns.
template <int HeadDim>
struct QueryGradShare {
  static constexpr int tile_m = one_pass::tile_m(HeadDim);
  static constexpr bool by_rows = tile_m == 128;
  static constexpr int blocks = HeadDim / 8 / (by_rows ? 1 : 2), floats = tile_m * HeadDim / 2;
  using Tile = SwizzledTile<tile_m, HeadDim>;  // on its way out
  static_assert(by_rows || HeadDim / 2 % Tile::panel_columns == 0, "half of the columns are whole panels");

  static BM_DEVICE int row(int consumer) { return by_rows ? 64 * consumer : 0; }
  static BM_DEVICE int chunk(int consumer) { return by_rows ? 0 : blocks * consumer; }

  // Where the share of the tile of queries from m on is added up: block by block of columns, four floats for each of the consumer's threads.
  static BM_DEVICE float* sum(const AttentionBackwardParams& b, const Sequence& sequence, int batch, int head, int m, int consumer) {
    const AttentionParams& p = b.p;
    const bool packed = p.cu_seqlens_q != nullptr;
    const int64_t slice = packed ? head : int64_t(batch) * p.heads + head, tile = (packed ? sequence.first_query / tile_m + batch : 0) + m / tile_m;
    return b.dq_sum + ((slice * one_pass::tiles(p) + tile) * 2 + consumer) * floats;
  }
  // From there, in bytes: of the consumer's thread, four floats of block j.
  static BM_DEVICE int piece(int thread, int j) { return (j * 4 * warp_size + thread) * 16; }

  // To dQ itself, by way of the thread's warp's rows of `tile`.
  template <typename Element>
  static BM_DEVICE void store(float (&x)[blocks][4], SharedAddress tile, int consumer, const AttentionBackwardParams& b, const Sequence& sequence,
                              int batch, int head, int m) {
    multiply_by(x, b.p.softmax_scale);
    store_rows<Element, Tile>(x, tile, row(consumer) + 16 * (warp_index() % 4), chunk(consumer), rows_of<Element>(b.dq, b.dq_stride, batch, head, sequence.first_query),
                              b.dq_stride[2], m, sequence.queries, b.p.head_dim);
  }
};

// What a consumer has to know of a step: told by the producer, for a consumer's registers are full.
struct alignas(16) OnePassStep { int m, all_visible, queries, keys; };

template <int HeadDim>
struct OnePassTiles {
  static constexpr int tile_m = one_pass::tile_m(HeadDim), tile_n = one_pass::tile_n;
  using GradTile = SwizzledTile<tile_m, tile_n>;  // dS, its rows are queries: two, so that one is written while the other is read
  using Type = KeyValueGradTiles<HeadDim, tile_m, tile_n, 2 * GradTile::bytes + 2 * QueryGradShare<HeadDim>::floats * int(sizeof(float)), int(sizeof(OnePassStep))>;
};

template <typename Element, int HeadDim>
struct AttentionOnePassSm90 : OnePassTiles<HeadDim>::Type {
  using Base = typename OnePassTiles<HeadDim>::Type;
  using Params = AttentionBackwardSm90Params;
  using KeyTile = typename Base::KeyTile;
  using QueryTile = typename Base::QueryTile;
  using GradTile = typename OnePassTiles<HeadDim>::GradTile;
  using Share = QueryGradShare<HeadDim>;
  static constexpr int tile_m = Base::tile_m, tile_n = Base::tile_n, stages = Base::stages;
  static constexpr int m_blocks = tile_m / 8, m_steps = tile_m / 16, d_blocks = HeadDim / 8, q_blocks = Share::blocks;
  static constexpr int share_bytes = Share::floats * int(sizeof(float));
  enum NamedBarrier { gradients_there = 1, sum_full, sum_empty = sum_full + Base::consumers };
  static constexpr int both = 2 * Base::group, with_sender = Base::group + warp_size;

  static BM_DEVICE SharedAddress gradient_tile(int which) { return shared_start() + Base::shared_own + which * GradTile::bytes; }
  static BM_DEVICE SharedAddress share(int consumer) { return gradient_tile(2) + consumer * share_bytes; }

  struct Work : Base::Work {
    static constexpr bool multiplies_by_keys = true;
    const bool alone;  // nobody else adds to these dQ: all of them are to be written, also where there is nothing to see
    const int first;   // the tile of queries to start with
    BM_DEVICE Work(const Params& all) : Base::Work(all, all.b.dq_sum == nullptr), alone(all.b.dq_sum == nullptr), first(first_tile()) {}
    BM_DEVICE bool nothing() const { return Base::Work::nothing() && !(alone && this->n_start == 0); }
    BM_DEVICE int query(int step) const {
      const int tile = step % this->tiles + first;
      return this->range.begin + (tile < this->tiles ? tile : tile - this->tiles) * tile_m;
    }
    BM_DEVICE void tell(SharedAddress at, int m) const {
      store_shared(at, OnePassStep{m, this->range.all_visible(m), this->sequence.queries, this->sequence.keys});
    }
    // Under a causal mask or a window each block has another range already.
    BM_DEVICE int first_tile() const { return this->params.b.p.window_right >= 0 || this->tiles == 0 ? 0 : block_x() % this->tiles; }
  };

  static BM_DEVICE void run(const Params& params) { Base::template run_as<AttentionOnePassSm90, Work>(params); }

  // A warp for each consumer; its first lane speaks to the copy engine.
  static BM_DEVICE void help(const Work& work, int consumer) {
    if (work.alone || consumer >= Base::consumers) return;
    for (int step = 0; step < work.steps; step++) {
      sync_named(sum_full + consumer, with_sender);
      if (lane_index() == 0) {
        bulk_add(Share::sum(work.params.b, work.sequence, work.batch, work.head(step), work.query(step), consumer), share(consumer), share_bytes);
        bulk_commit();
        bulk_wait_read();
      }
      sync_warp();
      if (step + 1 < work.steps) arrive_named(sum_empty + consumer, with_sender);
    }
  }

  // Where this lane puts dS^T of its warp's 16 keys from `key` and of the first 16 queries; 16 queries later the swizzle is the same.
  static BM_DEVICE SharedAddress turned(SharedAddress tile, int key) {
    const int lane = anew(lane_index());
    return tile + GradTile::offset(lane / 16 * 8 + lane % 8, key / 8 + lane / 8 % 2);
  }
  static constexpr int turned_step = 16 * GradTile::panel_columns * 2;

  // This consumer's share of dQ = dS K. A group of its own.
  static BM_DEVICE void start_query_product(float (&dq)[q_blocks][4], SharedAddress gradients, SharedAddress key, int consumer) {
    const SharedAddress columns = key + Share::chunk(consumer) / KeyTile::panel_chunks * KeyTile::panel_bytes;
    wgmma_fence();
    BM_UNROLL
    for (int k = 0; k < tile_n / 16; k++)
      wgmma<Element, true>(dq, k_major<GradTile>(gradients, Share::row(consumer), k), mn_major<KeyTile>(columns, k), k > 0);
    wgmma_commit();
  }

  static BM_DEVICE void consume(const Work& work, int consumer) {
    const AttentionBackwardParams& b = work.params.b;
    const AttentionParams& p = b.p;
    const SharedAddress key = Base::staying(0), value = Base::staying(1);
    const int row = 64 * consumer + 16 * (warp_index() % 4);
    float dk[d_blocks][4], dv[d_blocks][4], s[m_blocks][4], g[m_blocks][4];
    clear(dk);
    clear(dv);
    mbarrier_wait(Base::barrier(Base::staying_full), 0);

    Ring<stages> ring;
    uint32_t gradients[m_steps][4];
    const auto start_scores = [&] {
      mbarrier_wait(Base::barrier(Base::full + ring.stage), ring.parity);
      start_multiply_transposed<Element, KeyTile, QueryTile>(s, key, 64 * consumer, Base::passing(ring.stage, 0), 0);
    };
    const auto start_gradients = [&] {
      start_multiply_transposed<Element, KeyTile, QueryTile>(g, value, 64 * consumer, Base::passing(ring.stage, 1), 0);
    };
    // From S and dP, which are under way, to dS.
    const auto find_gradients = [&](int step) {
      const auto statistics = Base::statistics_of(ring.stage, 0);
      const SharedAddress grad = Base::passing(ring.stage, 1), mine = turned(gradient_tile(step % 2), row);
      const int key0 = anew(block_x()) * tile_n + row + anew(lane_index()) / 4;
      const OnePassStep told = load_shared<OnePassStep>(Base::told(ring.stage));
      const bool all_visible = told.all_visible;
      const Sequence sequence{0, 0, told.queries, told.keys};
      const Scores<Element, false, true> scores(p, sequence, 0, 0);
      uint32_t probabilities[m_steps][4];
      // ---- P^T ----
      wgmma_wait<1>();
      scores.probabilities(s, key0, told.m, all_visible, statistics);

      // ---- dV += P^T dO; dS^T, and dS in shared memory ----
      // 16 queries at a time, so that S and dP make room for P and dS: a thread has about 30 registers for all that is no tile.
      BM_UNROLL
      for (int k = 0; k < m_steps; k++) {
        float(&x)[2][4] = reinterpret_cast<float(&)[2][4]>(s[2 * k]);
        float(&y)[2][4] = reinterpret_cast<float(&)[2][4]>(g[2 * k]);
        to_fragment<Element>(probabilities[k], x[0], x[1]);
        wgmma_fence();
        wgmma<Element, true>(dv, probabilities[k], mn_major<QueryTile>(grad, k), true);
        wgmma_commit();
        if (k == 0) wgmma_wait<1>();  // dP
        scores.gradients(x, y, key0, told.m + 16 * k, all_visible, [&](int j) { return statistics(2 * k + j); }, NoBias{});
        to_fragment<Element>(gradients[k], y[0], y[1]);
        stmatrix_transposed(mine + k * turned_step, gradients[k]);
      }
      fence_proxy_async();
      sync_named(gradients_there, both);  // and both have done with the other dS
      wgmma_wait<0>();  // nothing is under way where the loop goes round: ptxas would put a wait after each product
    };
    // The rest of a step, and if there are `more` the next one's S and dP.
    const auto multiply_gradients = [&](int step, auto more) {
      constexpr int next = more.value ? 1 : 0;  // groups under way after this step's
      const int stage = ring.stage;
      float dq[q_blocks][4];
      // ---- dQ = dS K, dK += dS^T Q, the next S ----
      start_query_product(dq, gradient_tile(step % 2), key, consumer);
      start_multiply<Element, QueryTile>(dk, gradients, Base::passing(stage, 0));
      ring.advance();
      if constexpr (more.value) start_scores();

      // ---- dQ leaves ----
      wgmma_wait<1 + next>();
      if (work.alone) {
        const Work again(work.params);  // rather than in registers all the time
        Share::template store<Element>(dq, share(0), consumer, b, again.sequence, again.batch, again.head(step), again.query(step));
      } else {
        if (step > 0) sync_named(sum_empty + consumer, with_sender);
        BM_UNROLL
        for (int j = 0; j < q_blocks; j++) {
          Word<16> piece;
          memcpy(&piece, dq[j], sizeof(piece));
          store_shared(share(consumer) + Share::piece(thread_index() % Base::group, j), piece);
        }
        fence_proxy_async();
        arrive_named(sum_full + consumer, with_sender);
      }

      // ---- the next dP ----
      wgmma_wait<next>();
      Base::release(stage);
      if constexpr (more.value) start_gradients();
    };
    if (work.steps > 0) {
      start_scores();
      start_gradients();
      find_gradients(0);
      for (int step = 1; step < work.steps; step++) {
        multiply_gradients(step - 1, More<true>{});
        find_gradients(step);
      }
      multiply_gradients(work.steps - 1, More<false>{});
    }

    const Work done(work.params);
    multiply_by(dk, p.softmax_scale);
    sync_named(gradients_there, both);  // both have done with K
    store_rows<Element, KeyTile>(dk, key, row, 0, rows_of<Element>(b.dk, b.dk_stride, done.batch, done.kv_head, done.sequence.first_key), b.dk_stride[2],
                                 done.n_start, done.sequence.keys, p.head_dim);
    store_rows<Element, KeyTile>(dv, value, row, 0, rows_of<Element>(b.dv, b.dv_stride, done.batch, done.kv_head, done.sequence.first_key), b.dv_stride[2],
                                 done.n_start, done.sequence.keys, p.head_dim);
  }

 private:
  template <bool value_> struct More { static constexpr bool value = value_; };
};

// dQ of what was added up.
template <typename Element, int HeadDim>
struct AttentionQueryGradRound {
  using Params = AttentionBackwardParams;
  using Share = QueryGradShare<HeadDim>;
  static constexpr int group = 4 * warp_size, threads = 2 * group, blocks_per_multiprocessor = 4, shared_bytes = Share::Tile::bytes;

  static BM_DEVICE void run(const Params& params) {
    const int batch = block_z(), head = block_y(), m = block_x() * Share::tile_m, consumer = warp_index() / 4;
    const Sequence sequence = Sequence::of(params.p, batch);
    if (m >= sequence.queries) return;
    const char* sum = reinterpret_cast<const char*>(Share::sum(params, sequence, batch, head, m, consumer));
    float dq[Share::blocks][4];
    BM_UNROLL
    for (int j = 0; j < Share::blocks; j++) {
      const Word<16> piece = load_global(reinterpret_cast<const Word<16>*>(sum + Share::piece(thread_index() % group, j)));
      memcpy(dq[j], &piece, sizeof(piece));
    }
    Share::template store<Element>(dq, shared_start(), consumer, params, sequence, batch, head, m);
  }
};

}  // namespace bigmodel::cuda
