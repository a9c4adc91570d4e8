// What the attention backward of every architecture does beside the products: delta, the statistics of a row, the bias's gradient.
#pragma once
#include "attention/rows.cuh"

namespace bigmodel::cuda {

// delta. `lanes` of a warp share a row, each with eight columns; a warp has the rows of several turns under way at once.
template <typename Element, int lanes>
struct AttentionDelta {
  using Params = AttentionBackwardParams;
  static constexpr int warps = 4, turns = 4, rows_at_once = warp_size / lanes, warp_rows = turns * rows_at_once, rows = warps * warp_rows;
  static constexpr int threads = warps * warp_size, blocks_per_multiprocessor = 8, shared_bytes = 0;

  static BM_DEVICE void run(const Params& params) {
    const AttentionParams& p = params.p;
    const int batch = block_z(), head = block_y(), chunk = lane_index() % lanes;
    const int first = block_x() * rows + warp_index() * warp_rows + lane_index() / lanes;  // of this lane's rows
    const Sequence sequence = Sequence::of(p, batch);
    const Element* out = rows_of<Element>(p.out, p.out_stride, batch, head, sequence.first_query);
    const Element* grad = rows_of<Element>(params.grad_out, params.grad_out_stride, batch, head, sequence.first_query);
    Word<16> o[turns] = {}, g[turns] = {};
    BM_UNROLL
    for (int turn = 0; turn < turns; turn++) {
      const int64_t row = first + turn * rows_at_once;
      if (row >= sequence.queries || chunk * 8 >= p.head_dim) continue;
      o[turn] = load_global(reinterpret_cast<const Word<16>*>(out + row * p.out_stride[2]) + chunk);
      g[turn] = load_global(reinterpret_cast<const Word<16>*>(grad + row * params.grad_out_stride[2]) + chunk);
    }
    BM_UNROLL
    for (int turn = 0; turn < turns; turn++) {
      float a[8], b[8], sum = 0;
      unpack<Element>(a, o[turn]);
      unpack<Element>(b, g[turn]);
      BM_UNROLL
      for (int i = 0; i < 8; i++) sum += a[i] * b[i];
      BM_UNROLL
      for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      const int row = first + turn * rows_at_once;
      if (chunk != 0 || row >= sequence.queries) continue;
      const int64_t at = batch * p.logsumexp_stride[0] + head * p.logsumexp_stride[1] + sequence.first_query + row;
      store_global(params.delta + at, params.grad_logsumexp != nullptr ? sum - load_global(params.grad_logsumexp + at) : sum);
    }
  }
};

BM_DEVICE RowStatistics row_statistics(const AttentionBackwardParams& params, const Sequence& s, int batch, int head, int query) {
  if (query >= s.queries) return {0, 0};
  const AttentionParams& p = params.p;
  const int64_t at = batch * p.logsumexp_stride[0] + head * p.logsumexp_stride[1] + s.first_query + query;
  return {load_global(static_cast<const float*>(p.logsumexp) + at) * log2_e, load_global(static_cast<const float*>(params.delta) + at)};
}

// Adds a logit's gradient to the bias's; of one (batch, head).
struct AddToBias {
  const AttentionBackwardParams& params;
  float* start;
  BM_DEVICE AddToBias(const AttentionBackwardParams& b, int batch, int head)
      : params(b), start(b.dbias == nullptr ? nullptr : b.dbias + batch * b.dbias_stride[0] + head * b.dbias_stride[1]) {}
  BM_DEVICE bool wanted() const { return start != nullptr; }
  BM_DEVICE void operator()(int query, int key, float ds) const {
    add_global(start + query * params.dbias_stride[2] + key * params.dbias_stride[3], ds);
  }
};
struct NoBias {
  BM_DEVICE bool wanted() const { return false; }
  BM_DEVICE void operator()(int, int, float) const {}
};

template <int blocks>
BM_DEVICE void multiply_by(float (&x)[blocks][4], float factor) {
  BM_UNROLL
  for (int j = 0; j < blocks; j++)
    BM_UNROLL
    for (int e = 0; e < 4; e++) x[j][e] *= factor;
}

}  // namespace bigmodel::cuda
