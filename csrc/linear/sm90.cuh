// The linear layer for Hopper (sm_90a): tiles of x and W by the copy engine, products by wgmma, one producer warp and one or two
// consumers, persistent blocks. W lies (out, in), and is then K-major, or (in, out) as GPT-2's Conv1D has it, and is MN-major; wgmma
// reads both.
//
//                 out features (tile_n)
//                +--------------------+       for 64 features at a time: x (tile_m x 64) and W (tile_n x 64) arrive in a stage,
//   consumer 0   |  64 rows           |       each consumer adds their product to its 64 x tile_n in registers
//   consumer 1   |  64 rows           |
//                +--------------------+       While a tile leaves, the producer fills the stages for the next.
//
// The tensor cores stand still meanwhile. With ping-pong they do not: each consumer has a tile of its own, all of its rows, and the two
// take turns, so that one multiplies while the other's tile leaves.
//
//   producer     tile 0 | tile 1 | tile 2 | tile 3 ...           in the order of the turns, as stages become empty
//   consumer 0   multiplies | tile 0 leaves | multiplies ...
//   consumer 1              | multiplies    | tile 1 leaves ...
#pragma once
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "linear/epilogue.cuh"

namespace bigmodel::cuda {

struct LinearSm90Params {
  LinearParams p;
  TensorMap x;                    // dimensions: feature, row
  TensorMap weight[max_weights];  // dimensions as the weight lies
};

template <typename Element, int tile_n_, bool conv1d, bool ping_pong>
struct LinearSm90 {
  using Params = LinearSm90Params;
  // A small tile, of one consumer, is for few rows: there are more of them then, on more multiprocessors. Two blocks of them share one,
  // with a single warp to produce; of the others the consumers take registers from a producer of a whole warpgroup.
  static constexpr int consumers = tile_n_ == 64 ? 1 : 2;
  static constexpr bool small = tile_n_ == 64;
  static constexpr int blocks_per_multiprocessor = small ? 2 : 1, producer_warps = small ? 1 : 4;
  static constexpr int group = 4 * warp_size, threads = consumers * group + producer_warps * warp_size;
  static constexpr int tile_m = 64 * consumers, tile_n = tile_n_, tile_k = 64, stages = tile_n >= 192 ? 4 : 6;
  static constexpr int blocks = tile_n / 8, row_groups = ping_pong ? 2 : 1;  // of 64 rows, that a consumer has of a tile
  static constexpr int rows_at_once = blocks * row_groups > 32 ? 1 : 4;  // of a lane, in the epilogue, as registers allow
  using InputTile = SwizzledTile<tile_m, tile_k>;
  using WeightTile = SwizzledTile<conv1d ? tile_k : tile_n, conv1d ? tile_n : tile_k>;
  static constexpr int stage_bytes = InputTile::bytes + WeightTile::bytes;
  static constexpr int shared_staging = stages * stage_bytes, shared_barriers = shared_staging + 4 * consumers * StagingTile::bytes;
  static constexpr int shared_bytes = shared_barriers + 2 * stages * mbarrier_bytes;
  static_assert(!ping_pong || consumers == 2, "turns are taken by two");
  static_assert(shared_bytes <= 227 << 10, "the most that a block gets");

  static BM_DEVICE SharedAddress full(int stage) { return shared_start() + shared_barriers + stage * mbarrier_bytes; }
  static BM_DEVICE SharedAddress empty(int stage) { return full(stages + stage); }
  static BM_DEVICE SharedAddress input_tile(int stage) { return shared_start() + stage * stage_bytes; }
  static BM_DEVICE SharedAddress weight_tile(int stage) { return input_tile(stage) + InputTile::bytes; }

  static BM_DEVICE void run(const Params& params) {
    const LinearParams& p = params.p;
    if (thread_index() == 0) {
      for (int stage = 0; stage < stages; stage++) {
        mbarrier_init(full(stage), 1);
        mbarrier_init(empty(stage), ping_pong ? 4 : 4 * consumers);
      }
      fence_mbarrier_init();
    }
    sync_block();
    const int tiles = tile_count<tile_m, tile_n>(p);
    const int steps = (p.features + tile_k - 1) / tile_k, warp = warp_index();
    if (warp < 4 * consumers) {
      if constexpr (!small) raise_registers<240>();
      consume(params, tiles, steps, warp / 4);
    } else {
      if constexpr (!small) lower_registers<24>();
      if (warp == 4 * consumers && lane_index() == 0) produce(params, tiles, steps);
    }
  }

  // One thread. The ring goes on over all tiles.
  static BM_DEVICE void produce(const Params& params, int tiles, int steps) {
    Ring<stages> ring;
    for (int tile = block_x(); tile < tiles; tile += grid_x()) {
      const TilePlace at = place_of<tile_m, tile_n>(params.p, tile);
      for (int step = 0; step < steps; step++, ring.advance()) {
        const int stage = ring.stage;
        mbarrier_wait(empty(stage), ring.parity ^ 1);
        mbarrier_arrive_expect(full(stage), stage_bytes);
        tma_load(input_tile(stage), params.x, full(stage), step * tile_k, at.row, 0, 0);
        BM_UNROLL
        for (int panel = 0; panel < WeightTile::columns / 64; panel++)
          tma_load(weight_tile(stage) + panel * WeightTile::panel_bytes, params.weight[at.weight], full(stage),
                   conv1d ? at.column + 64 * panel : step * tile_k, conv1d ? step * tile_k : at.column, 0, 0);
      }
    }
  }

  // Barrier of a consumer's turn: its own threads wait for it, the other's say that it is there.
  static BM_DEVICE void wait_for_turn(int consumer) { sync_named(1 + consumer, 2 * group); }
  static BM_DEVICE void pass_turn(int consumer) { arrive_named(1 + (consumer ^ 1), 2 * group); }

  static BM_DEVICE void consume(const Params& params, int tiles, int steps, int consumer) {
    const LinearParams& p = params.p;
    Ring<stages> ring;
    int before = 0;  // the stage of the step before
    const int warp = warp_index() % 4, first_tile = block_x() + (ping_pong ? consumer * grid_x() : 0);
    const SharedAddress staging = shared_start() + shared_staging + (4 * consumer + warp) * StagingTile::bytes;
    if (ping_pong && consumer == 1) ring.advance(steps);
    for (int tile = first_tile; tile < tiles; tile += grid_x() * row_groups) {
      const TilePlace at = place_of<tile_m, tile_n>(p, tile);
      const int first_row = ping_pong ? 0 : 64 * consumer;  // of this consumer's, in the tile
      float c[row_groups][blocks][4];
      // A turn is also what keeps a consumer from waiting for a stage of the ring's round after next, whose parity is that of this round.
      if (ping_pong && tile >= grid_x()) wait_for_turn(consumer);
      for (int step = 0; step < steps; step++, ring.advance()) {
        const int stage = ring.stage;
        mbarrier_wait(full(stage), ring.parity);
        wgmma_fence();
        BM_UNROLL
        for (int k = 0; k < tile_k / 16; k++) {
          uint64_t weight;
          if constexpr (conv1d)
            weight = mn_major<WeightTile>(weight_tile(stage), k);
          else
            weight = k_major<WeightTile>(weight_tile(stage), 0, k);
          BM_UNROLL
          for (int i = 0; i < row_groups; i++)
            wgmma<Element, conv1d>(c[i], k_major<InputTile>(input_tile(stage), first_row + 64 * i, k), weight, step > 0 || k > 0);
        }
        wgmma_commit();
        // The tensor cores go on with this stage while the one before is given back.
        wgmma_wait<1>();
        if (step > 0 && lane_index() == 0) mbarrier_arrive(empty(before));
        before = stage;
      }
      if (ping_pong && tile + grid_x() < tiles) pass_turn(consumer);  // the other's products queue up behind these
      wgmma_wait<0>();
      if (steps > 0 && lane_index() == 0) mbarrier_arrive(empty(before));
      if (ping_pong) ring.advance(steps);  // over the other's tile
      const Element* bias = static_cast<const Element*>(p.bias[at.weight]);
      finish_tile<Element, rows_at_once, 64>(c, p, at.row + first_row + 16 * warp, at.out_column + at.column, at.out_column + p.out_features[at.weight],
                                             bias != nullptr ? bias + at.column : nullptr, staging);
    }
  }
};

}  // namespace bigmodel::cuda
