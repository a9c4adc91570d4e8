// The gradient of LayerNorm or RMSNorm of t = dropout(x) + residual. It is bound by memory: a block has a few rows at a time, all of them
// in registers, eight neighbouring columns to a thread, and normalises them again. With n = (t - mean) r the normalised row, w the weight
// and g = grad w (RMSNorm: without the means of t and of g)
//
//   dt = r (g - mean(g) - n mean(g n))       dx = dt where x was kept, scaled
//   dweight = sum over rows of grad n        dbias = sum over rows of grad        and the sum over rows of dx, for a bias before x
//
//            thread 0   thread 1  ...          rows b, b + blocks, ... (`at_once` at a time) of block b
//   row     | 8 cols | 8 cols | ...            each thread keeps the three sums of its columns; reduce/columns.cuh adds up those of blocks
#pragma once
#include "arch/number.cuh"
#include "arch/philox.cuh"
#include "arch/warp.cuh"
#include "norm/cuda.h"
#include "norm/rows.cuh"

namespace bigmodel::cuda {

// Rows of up to 256 * warps columns.
template <typename Element, int warps_>
struct NormRowsBackward {
  using Params = NormBackwardParams;
  static constexpr int warps = warps_, threads = warps * warp_size, blocks_per_multiprocessor = 1;
  static constexpr int at_once = warps <= 8 ? 4 : 2;
  // What the warps tell each other: the sums of a row, of its squares, and two of its gradient.
  static constexpr int sum_bytes = warps * at_once * 4, shared_bytes = 4 * sum_bytes;

  // The sums over a row of what each thread has. A place is free again when the block has met twice since.
  template <int count>
  static BM_DEVICE void add_block(float (&x)[count], SharedAddress place) {
    BM_UNROLL
    for (float& value : x) value = add_lanes(value);
    if constexpr (warps > 1) {
      if (lane_index() == 0)
        BM_UNROLL
        for (int i = 0; i < count; i++) store_shared(place + (warp_index() * count + i) * 4, x[i]);
      sync_block();
      BM_UNROLL
      for (int i = 0; i < count; i++) {
        x[i] = 0;
        BM_UNROLL
        for (int w = 0; w < warps; w++) x[i] += load_shared<float>(place + (w * count + i) * 4);
      }
    }
  }

  static BM_DEVICE void run(const Params& p) {
    const int column = 8 * thread_index();
    const bool inside = column < p.columns;
    const float over = 1 / float(p.columns);
    const uint64_t seed = p.dropout.seed != nullptr ? uint64_t(load_global(p.dropout.seed)) : 0;
    const auto at = [&](const void* matrix, int64_t row) {
      return reinterpret_cast<Word<16>*>(static_cast<Element*>(const_cast<void*>(matrix)) + row * p.columns + column);
    };
    float weight[8], weight_sum[8] = {}, bias_sum[8] = {}, dx_sum[8] = {};
    BM_UNROLL
    for (float& factor : weight) factor = 1;
    if (p.weight != nullptr && inside) {
      unpack<Element>(weight, load_global(at(p.weight, 0)));
      BM_UNROLL
      for (float& factor : weight) factor += p.weight_offset;
    }
    for (int64_t first = int64_t(block_x()) * at_once; first < p.rows; first += int64_t(grid_x()) * at_once) {
      // ---- all that is read, on its way together; 0 outside ----
      const auto valid = [&](int r) { return inside && first + r < p.rows; };
      const auto read = [&](const void* matrix, int r) { return matrix != nullptr && valid(r) ? load_global(at(matrix, first + r)) : Word<16>{}; };
      Word<16> words[at_once], residual[at_once], grads[at_once], more[at_once], beside[at_once];
      BM_UNROLL
      for (int r = 0; r < at_once; r++) {
        words[r] = read(p.x, r);
        residual[r] = read(p.residual, r);
        grads[r] = read(p.grad, r);
        more[r] = read(p.more_grad, r);
        beside[r] = read(p.beside, r);
      }
      // ---- the rows, normalised ----
      float x[at_once][8], sums[at_once], factor[at_once];
      uint32_t kept[at_once] = {};
      BM_UNROLL
      for (int r = 0; r < at_once; r++) {
        unpack<Element>(x[r], words[r]);
        if (p.dropout.seed != nullptr) {
          kept[r] = kept_elements(int(first + r), column, p.dropout.threshold, seed);
          if (!p.summed) drop_eight(x[r], kept[r], column, p.dropout.scale);
        }
        float other[8];
        unpack<Element>(other, residual[r]);
        sums[r] = 0;
        BM_UNROLL
        for (int i = 0; i < 8; i++) sums[r] += x[r][i] += other[i];
      }
      if (!p.is_rms) {
        add_block(sums, shared_start());
        BM_UNROLL
        for (int r = 0; r < at_once; r++)
          BM_UNROLL
          for (int i = 0; i < 8; i++) x[r][i] = inside ? x[r][i] - sums[r] * over : 0;
      }
      BM_UNROLL
      for (int r = 0; r < at_once; r++) {
        sums[r] = 0;
        BM_UNROLL
        for (int i = 0; i < 8; i++) sums[r] += x[r][i] * x[r][i];
      }
      add_block(sums, shared_start() + sum_bytes);
      // ---- its gradient ----
      float g[at_once][8], along[2 * at_once];
      BM_UNROLL
      for (int r = 0; r < at_once; r++) {
        factor[r] = valid(r) ? reciprocal_root(sums[r] * over + p.eps) : 0;
        float other[8];
        unpack<Element>(g[r], grads[r]);
        unpack<Element>(other, more[r]);
        along[2 * r] = along[2 * r + 1] = 0;
        BM_UNROLL
        for (int i = 0; i < 8; i++) {
          x[r][i] *= factor[r];
          g[r][i] += other[i];
          weight_sum[i] += g[r][i] * x[r][i];
          bias_sum[i] += g[r][i];
          g[r][i] *= weight[i];
          along[2 * r] += g[r][i] * x[r][i];
          along[2 * r + 1] += g[r][i];
        }
      }
      add_block(along, shared_start() + 2 * sum_bytes);
      BM_UNROLL
      for (int r = 0; r < at_once; r++) {
        const float slope = along[2 * r] * over, mean = p.is_rms ? 0 : along[2 * r + 1] * over;
        float other[8];
        unpack<Element>(other, beside[r]);
        BM_UNROLL
        for (int i = 0; i < 8; i++) g[r][i] = (g[r][i] - mean - x[r][i] * slope) * factor[r] + other[i];
        if (p.dtotal != nullptr && valid(r)) store_global(at(p.dtotal, first + r), pack<Element>(g[r]));
        if (p.dropout.seed != nullptr) drop_eight(g[r], kept[r], column, p.dropout.scale);
        if (p.dx != nullptr && valid(r)) store_global(at(p.dx, first + r), pack<Element>(g[r]));
        BM_UNROLL
        for (int i = 0; i < 8; i++) dx_sum[i] += g[r][i];
      }
    }
    if (!inside) return;
    const auto keep = [&](float* parts, const float (&sum)[8]) {
      if (parts == nullptr) return;
      BM_UNROLL
      for (int half = 0; half < 2; half++) {
        Word<16> word;
        memcpy(&word, sum + 4 * half, 16);
        store_global(reinterpret_cast<Word<16>*>(parts + block_x() * p.parts_stride + column) + half, word);
      }
    };
    keep(p.weight_parts, weight_sum);
    keep(p.bias_parts, bias_sum);
    keep(p.dx_parts, dx_sum);
  }
};

}  // namespace bigmodel::cuda
