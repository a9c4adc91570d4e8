// What the host gives the CUDA attention kernels: plain data, one struct for every architecture.
#pragma once
#include <cstdint>

namespace bigmodel::cuda {

struct AttentionParams {
  const void *query, *key, *value;
  int64_t query_stride[3], key_stride[3], value_stride[3];  // batch, head, row, in elements; packed sequences: batch 0
  const int32_t *cu_seqlens_q, *cu_seqlens_k;               // or null: dense
  int32_t batch, heads, kv_heads, head_dim;                 // head_dim a multiple of 8
  int32_t query_length, key_length;                         // packed: of the longest
  int64_t total_queries, total_keys;                        // packed: of all sequences
  float softmax_scale, softcap;                             // softcap 0: none
  int32_t window_left, window_right;                        // -1: no limit; causal is window_right 0
  const uint8_t* key_padding_mask;                          // (batch, key_length), 1 = visible, or null
  int64_t mask_stride;
  const void* bias;                                         // or null
  int32_t bias_is_float;                                    // otherwise in the type of query
  int64_t bias_stride[4];                                   // batch, head, query, key; 0 where broadcast
  const float* alibi_slopes;                                // or null
  int64_t alibi_stride;                                     // of a batch; 0 where all share the slopes
  const float* sinks;                                       // (heads,) or null
  const int64_t* dropout_seed;                              // or null
  uint32_t dropout_threshold;                               // a probability is kept when its random word is at least this
  float dropout_scale;                                      // of the kept
  void* out;
  int64_t out_stride[3];
  float* logsumexp;                                         // or null
  int64_t logsumexp_stride[2];                              // batch, head
};

struct AttentionBackwardParams {
  AttentionParams p;                                        // out and logsumexp are the forward's results
  const void* grad_out;
  int64_t grad_out_stride[3];
  const float* grad_logsumexp;                              // or null; strides of logsumexp, like delta
  float* delta;                                             // rowsum(grad_out * out) - grad_logsumexp
  void *dq, *dk, *dv;
  int64_t dq_stride[3], dk_stride[3], dv_stride[3];
  float* dq_sum;                                            // zeros to add dQ up in, or null where no other block adds to it: see OnePass
  float* dbias;                                             // zeros to add to, or null
  int64_t dbias_stride[4];
};

// A few new queries against a cache. Of the caches the strides are those of a page, a head and a row.
struct DecodeParams {
  const void *query, *key, *value;
  int64_t query_stride[3], key_stride[3], value_stride[3];
  const int32_t* cache_seqlens;                             // keys of each sequence; its last query stands at the last of them
  int64_t seqlens_stride;
  const int32_t* block_table;                               // or null: page b is the whole cache of sequence b
  int64_t table_stride[2];
  int32_t batch, heads, kv_heads, head_dim;                 // head_dim a multiple of 8
  int32_t query_length, pages, page_size, capacity;         // capacity: keys that a sequence has room for
  float softmax_scale, softcap;
  int32_t window_left, window_right;
  const float* alibi_slopes;
  int64_t alibi_stride;
  const float* sinks;
  void* out;
  int64_t out_stride[3];
  float* logsumexp;
  int64_t logsumexp_stride[2];
  int32_t splits;                                           // parts that the keys of a tile of rows are cut into
  float *partial, *partial_logsumexp;                       // what each leaves: (tiles, splits, rows of a tile, head_dim), and without head_dim
  uint32_t* counters;                                       // of splits that have come, for each tile: 0 before and after
};

// Rows that a block works on: new queries times the query heads of one kv head, token by token.
inline constexpr int decode_rows = 16;
inline int64_t decode_tiles(int64_t batch, int64_t kv_heads, int64_t group, int64_t query_length) {
  return batch * kv_heads * ((group * query_length + decode_rows - 1) / decode_rows);
}
// Blocks run at once, of which a multiprocessor holds `resident`: the last ones should leave few of these places empty, and a part of a full
// cache should not be shorter than 256 keys. So, of the numbers of splits, the least that fills the places nearly as well as any
// (flash-attention's num_splits_heuristic has the same rule). Shapes alone decide, so that nothing is read from the device and a captured
// graph stays right while the sequences grow.
inline constexpr int64_t most_splits = 128;
inline constexpr int decode_resident(int architecture) { return architecture == 90 ? 3 : 2; }  // by the shared memory that decode.cuh takes
inline int32_t decode_splits(int64_t tiles, int64_t capacity, int64_t places) {
  const int64_t longest = (capacity + 255) / 256, most = longest < 1 ? 1 : longest > most_splits ? most_splits : longest;
  const auto filled = [&](int64_t splits) {
    const int64_t blocks = tiles * splits;
    return double(blocks) / double((blocks + places - 1) / places * places);
  };
  double best = 0;
  for (int64_t splits = 1; splits <= most; splits++) best = filled(splits) > best ? filled(splits) : best;
  int64_t splits = 1;
  while (splits < most && filled(splits) < 0.9 * best) splits++;
  return int32_t(splits);
}

// Whether anything is there that the short inner loop has no code for. It looks for a row's maximum before it scales.
inline bool needs_general(const AttentionParams& p) {
  return !(p.softmax_scale > 0) || p.softcap != 0 || p.key_padding_mask || p.bias || p.alibi_slopes || p.dropout_seed;
}

// Hopper's backward in one pass over the tiles (sm90_one_pass.cuh): blocks of keys add their parts of dQ up in float32, tile by tile of
// queries, in any order.
namespace one_pass {

inline constexpr int tile_n = 128;                                                     // keys
inline constexpr int tile_m(int64_t head_dim) { return head_dim <= 64 ? 128 : 64; }    // queries: registers decide
inline constexpr int columns(int64_t head_dim) { return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : 128; }

inline bool supports(const AttentionParams& p) { return p.head_dim <= 128 && !needs_general(p); }
// A sequence's keys may need several blocks.
inline bool adds_up(const AttentionParams& p) { return p.key_length > tile_n; }

// Tiles of queries that a head has in dq_sum, in a batch or in all packed sequences together. Of these, one that starts at query `first` is
// at tile first / tile_m + its number: no sequence before it can have filled more.
inline constexpr int64_t tiles(const AttentionParams& p) {
  const int m = tile_m(p.head_dim);
  return p.cu_seqlens_q != nullptr ? p.total_queries / m + p.batch : (int64_t(p.query_length) + m - 1) / m;
}
inline int64_t sum_size(const AttentionParams& p) {
  return (p.cu_seqlens_q != nullptr ? 1 : p.batch) * p.heads * tiles(p) * tile_m(p.head_dim) * columns(p.head_dim);
}

}  // namespace one_pass

}  // namespace bigmodel::cuda
