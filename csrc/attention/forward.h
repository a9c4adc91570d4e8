// What the attention forward by vectors and that by the tile unit share: how queries are cut into tasks, and how a row ends.
#pragma once
#include "attention.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

// By all threads, chunk(sequence, first, count) for all queries of all sequences and kv heads, `longest` rows at most each: a query's heads
// of the group. Chunks are so long that packing K and V for each stays cheap, but there are enough of them for every thread. Last queries
// first: under causality they see the most keys, and long tasks are best started early.
template <class Chunk>
void each_chunk(const Attention& of, int64_t longest, const Chunk& chunk) {
  const AttentionArgs& args = of.args;
  const int64_t sequences = args.batch * args.kv_heads;
  int64_t queries = larger(1, longest / of.group);
  while (sequences * ceil_div(args.query_length, queries) < 4 * of.runtime.threads && queries * of.group > 16 * tile_rows) queries /= 2;
  int64_t chunks = ceil_div(args.query_length, queries);
  queries = ceil_div(args.query_length, chunks);
  if (args.dropout.enabled) {  // whole pairs of queries that share a call of the generator
    queries = round_up(queries, 16);
    chunks = ceil_div(args.query_length, queries);
  }
  const auto one = [&](int64_t task) {
    const int64_t pair = task % sequences, first = (chunks - 1 - task / sequences) * queries;
    const Attention::Sequence s = of.sequence(pair / args.kv_heads, pair % args.kv_heads);
    if (first < s.queries) chunk(s, first, smaller(queries, s.queries - first));
  };
  chunks == 1 ? parallel_near(of.runtime, sequences, one) : parallel(of.runtime, sequences * chunks, one);
}

template <class T>
BIGMODEL_INLINE void store_output(F32 x, T* out, int64_t left) {
#if BIGMODEL_AMX  // has the conversion, which takes subnormal numbers for zero
  if constexpr (__is_same(T, bf16)) {
    const auto lanes = __mmask16(left >= F32::width ? 0xffff : (1 << left) - 1);
    return _mm256_mask_storeu_epi16(out, lanes, __m256i(_mm512_cvtneps_pbh(x.v)));
  }
#endif
  if (left >= F32::width) x.store(out);
  else store_partial(x, out, int(left));
}

// The result of query i: what was summed, divided by the sum of its probabilities, which are relative to e^reference.
template <class T>
void finish_row(const Attention& of, const Attention::Sequence& s, int64_t i, int64_t head, const float* output, float total,
                float reference) {
  const AttentionArgs& args = of.args;
  const float kept = args.dropout.enabled ? args.dropout.scale : 1.0f;
  const F32 inverse = F32::set(total == 0.0f ? 0.0f : kept / total);  // no visible key: a row of zeros
  T* out = static_cast<T*>(args.out) + s.batch * args.out_stride[0] + head * args.out_stride[1] + (s.first_query + i) * args.out_stride[2];
  for (int64_t d = 0; d < of.depth; d += F32::width) store_output(F32::load(output + d) * inverse, out + d, of.depth - d);
  args.logsumexp[s.batch * args.logsumexp_stride[0] + head * args.logsumexp_stride[1] + s.first_query + i] =
      total == 0.0f ? -infinity : reference + __builtin_logf(total);
}

}  // namespace

}  // namespace bigmodel::BIGMODEL_ISA
