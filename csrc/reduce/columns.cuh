// Sums over rows in two stages (reduce/cuda.h), the same bits in every run: no addition in memory, whose order changes.
#pragma once
#include "arch/number.cuh"
#include "arch/philox.cuh"
#include "reduce/cuda.h"

namespace bigmodel::cuda {

// A block has 256 columns, eight neighbours to a lane, of the rows of one part; its warps take these in turns and meet in shared memory.
template <typename Element>
struct ColumnParts {
  using Params = ColumnPartsParams;
  static constexpr int warps = 8, threads = warps * warp_size, blocks_per_multiprocessor = 1;
  static constexpr int columns = 8 * warp_size, at_once = 4;  // at_once: rows of a warp that are on their way together
  static constexpr int sum_bytes = columns * 4, shared_bytes = warps * sum_bytes;

  static BM_DEVICE void run(const Params& p) {
    const int lane = lane_index(), warp = warp_index(), column = block_x() * columns + 8 * lane;
    const int64_t start = int64_t(block_y()) * p.rows_of_part, end = start + p.rows_of_part < p.rows ? start + p.rows_of_part : p.rows;
    const bool inside = column < p.columns;
    const uint64_t seed = p.dropout.seed != nullptr ? uint64_t(load_global(p.dropout.seed)) : 0;
    const Element* x = static_cast<const Element*>(p.x) + column;
    float sum[8] = {};
    for (int64_t first = start + warp; first < end; first += at_once * warps) {
      Word<16> words[at_once];
      BM_UNROLL
      for (int i = 0; i < at_once; i++) {
        const int64_t row = first + i * warps;
        words[i] = inside && row < end ? load_global(reinterpret_cast<const Word<16>*>(x + row * p.x_stride)) : Word<16>{};
      }
      BM_UNROLL
      for (int i = 0; i < at_once; i++) {
        const int64_t row = first + i * warps;
        float values[8];
        unpack<Element>(values, words[i]);
        if (p.dropout.seed != nullptr) drop_eight(values, kept_elements(int(row), column, p.dropout.threshold, seed), column, p.dropout.scale);
        if (p.out != nullptr && inside && row < end)
          store_global(reinterpret_cast<Word<16>*>(static_cast<Element*>(p.out) + row * p.columns + column), pack<Element>(values));
        BM_UNROLL
        for (int k = 0; k < 8; k++) sum[k] += values[k];
      }
    }
    const SharedAddress own = shared_start() + warp * sum_bytes + lane * 32;
    BM_UNROLL
    for (int half = 0; half < 2; half++) {
      Word<16> word;
      memcpy(&word, sum + 4 * half, 16);
      store_shared(own + 16 * half, word);
    }
    sync_block();
    const int mine = block_x() * columns + thread_index();
    if (mine >= p.columns) return;
    float total = 0;
    BM_UNROLL
    for (int w = 0; w < warps; w++) total += load_shared<float>(shared_start() + w * sum_bytes + thread_index() * 4);
    store_global(p.parts + int64_t(block_y()) * p.columns + mine, total);
  }
};

// A block has 32 columns of one sum, one to a lane; its warps take the parts in turns and meet in shared memory.
template <typename Element>
struct SumParts {
  using Params = SumPartsParams;
  static constexpr int warps = 16, threads = warps * warp_size, blocks_per_multiprocessor = 1, columns = warp_size;
  static constexpr int shared_bytes = warps * columns * 4;

  static constexpr int blocks_of(int count) { return (count + columns - 1) / columns; }

  static BM_DEVICE void run(const Params& p) {
    const int lane = lane_index(), warp = warp_index();
    int block = block_x(), which = 0;
    while (which + 1 < p.sums && block >= blocks_of(p.sum[which].columns)) block -= blocks_of(p.sum[which++].columns);
    const SumPartsParams::Sum& sum = p.sum[which];
    const int column = block * columns + lane;
    const bool inside = column < sum.columns;
    float total = 0;
    BM_UNROLL_BY(8)
    for (int part = warp; part < sum.count; part += warps)
      if (inside) total += load_global(sum.parts + part * sum.stride + column);
    store_shared(shared_start() + (warp * columns + lane) * 4, total);
    sync_block();
    if (warp > 0 || !inside) return;
    total = 0;
    BM_UNROLL
    for (int w = 0; w < warps; w++) total += load_shared<float>(shared_start() + (w * columns + lane) * 4);
    const Element rounded = from_float<Element>(total);
    store_global(static_cast<Element*>(sum.out) + column, rounded);
  }
};

}  // namespace bigmodel::cuda
