// Attention of a few new queries to a cache, for tensor cores of sm_80 and later: Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023);
// pages as in Kwon et al., 2023, arXiv:2309.06180.
//
//   a block, for a tile of rows and a split of the keys that they see:
//     each warp, for its tiles of those keys:  S = Q K^T,  P = exp(S - m),  O = O exp(m - m') + P V    (attention/sm80.cuh)
//     O of the split = sum of the warps' parts, weighed by exp(logsumexp - top)
//   the last block of the tile to finish:
//     O = sum of the splits' parts, weighed the same way, in the order of the splits
//
//   rows (16):  (token 0, head 0) (token 0, head 1) ... (token 1, head 0) ...     all heads that read this kv head
//
//   keys:       |<------ split 0 ------>|<------ split 1 ------>|<------ split 2 ------>|
//               | w0 | w1 | w2 | w3 | w0 ...
//
// One query has a row for each head of the group: the tile is mostly empty, and the time is that of reading K and V. So a warp owns its
// keys, and not rows: it waits for nobody else, and copies to a ring of its own, where the slot that S or P V has done with is filled
// again at once. Keys past the split's end are zeros in shared memory, and so is what the block table gives no page for.
#pragma once
#include "attention/sm80.cuh"

namespace bigmodel::cuda {

template <int n>
struct alignas(4 * n) Floats { float x[n]; };

// Eight columns of a row whose keys were shared out: the parts' results, each divided by its own sum, with weights 2^(logsumexp - top).
// A sink is a part without a value. Returns the logsumexp of all, -inf where no part saw a key.
template <typename Logsumexp, typename Piece>
BM_DEVICE float add_parts(float (&sum)[8], int parts, float sink, Logsumexp logsumexp, Piece piece) {
  float top = sink;
  for (int part = 0; part < parts; part++) top = maximum(top, logsumexp(part));
  const float safe = top == -infinity ? 0 : top;
  float total = exp2_approx(sink - safe);
  BM_UNROLL
  for (int i = 0; i < 8; i++) sum[i] = 0;
  BM_UNROLL_BY(4)
  for (int part = 0; part < parts; part++) {
    const float weight = exp2_approx(logsumexp(part) - safe);
    const Floats<8> values = piece(part);
    total += weight;
    BM_UNROLL
    for (int i = 0; i < 8; i++) sum[i] += weight * values.x[i];
  }
  const float factor = total == 0 ? 0 : 1 / total;
  BM_UNROLL
  for (int i = 0; i < 8; i++) sum[i] *= factor;
  return total == 0 ? -infinity : top + log2_approx(total);
}

// Element: bfloat16 or float16. HeadDim: head_dim rounded up to 32, 64, 96, 128, 192 or 256.
template <typename Element, int HeadDim>
struct AttentionDecode {
  using Params = DecodeParams;
  static constexpr int warps = HeadDim <= 128 ? 4 : 2;
  static constexpr int threads = warps * warp_size, blocks_per_multiprocessor = 1;
  static constexpr int tile_n = HeadDim <= 64 ? 32 : 16, n_blocks = tile_n / 8, d_blocks = HeadDim / 8;
  using QueryTile = SwizzledTile<decode_rows, HeadDim>;
  using KeyTile = SwizzledTile<tile_n, HeadDim>;
  static constexpr int stages = HeadDim == 32 ? 4 : 2;  // of a warp's ring, each a tile of K and one of V

  static constexpr int ring_bytes = stages * 2 * KeyTile::bytes;
  static constexpr int part_row_bytes = (HeadDim + 8) * 4;  // of O in float32, where the ring was; 8 more spread rows over the banks
  static constexpr int shared_query = 0;
  static constexpr int shared_rings = shared_query + QueryTile::bytes;
  static constexpr int shared_logsumexp = shared_rings + warps * ring_bytes;  // of the warps' rows
  static constexpr int shared_arrival = shared_logsumexp + warps * decode_rows * 4;
  static constexpr int shared_bytes = shared_arrival + 16;
  static_assert(most_splits * decode_rows * 4 <= warps * ring_bytes, "and so do all splits' logsumexps");
  static_assert(decode_rows * part_row_bytes <= ring_bytes, "a warp's part fits where its ring was");
  static_assert(shared_bytes <= 99 << 10, "what a block may have on every GPU since sm_80");

  // Where a key lies. No page: past the end, or a number in the block table that is none.
  struct Place { int page, slot; };
  static BM_DEVICE Place place_of(const DecodeParams& p, int batch, int key, int end) {
    if (key >= end) return {-1, 0};
    if (p.block_table == nullptr) return {batch, key};
    const int page = load_global(p.block_table + batch * p.table_stride[0] + key / p.page_size * p.table_stride[1]);
    return {page < p.pages ? page : -1, key % p.page_size};
  }

  // The tile of keys from `first` by one warp, whose lane i knows where key i lies. Most tiles lie in one piece.
  static BM_DEVICE void load_keys(SharedAddress tile, const DecodeParams& p, const Element* cache, const int64_t (&stride)[3], Place mine, int first, int end) {
    const int first_page = shuffle(mine.page, 0), first_slot = shuffle(mine.slot, 0);
    if (p.block_table == nullptr || first_slot + tile_n <= p.page_size) {
      const int count = first_page >= 0 ? end - first : 0;
      const Element* piece = cache + (count > 0 ? first_page * stride[0] + first_slot * stride[2] : 0);
      for_each_piece<HeadDim <= 128 ? 8 : 4>([&](int row, int chunk, SharedAddress at) {
        const bool valid = row < count && chunk * 8 < p.head_dim;
        copy_async_16(tile + at, valid ? piece + row * stride[2] + chunk * 8 : piece, valid);
      });
    } else {
      for_each_piece<2>([&](int row, int chunk, SharedAddress at) {  // all at once, their addresses would leave too few registers
        const int page = shuffle(mine.page, row), slot = shuffle(mine.slot, row);
        const bool valid = page >= 0 && chunk * 8 < p.head_dim;
        copy_async_16(tile + at, valid ? cache + page * stride[0] + slot * stride[2] + chunk * 8 : cache, valid);
      });
    }
  }
  template <int at_once, typename Each>
  static BM_DEVICE void for_each_piece(Each each) {
    BM_UNROLL_BY(at_once)
    for (int i = lane_index(); i < KeyTile::rows * KeyTile::row_chunks; i += warp_size)
      each(i / KeyTile::row_chunks, i % KeyTile::row_chunks, KeyTile::offset(i / KeyTile::row_chunks, i % KeyTile::row_chunks));
  }

  // softcap * tanh(s / softcap).
  static BM_DEVICE void cap(float (&s)[n_blocks][4], float softcap) {
    float* element = &s[0][0];
    BM_UNROLL
    for (int i = 0; i < 4 * n_blocks; i++) element[i] = softcap * tanh_of(2 * log2_e * element[i] / softcap);
  }

  static BM_DEVICE void run(const DecodeParams& p) {
    // ---- which rows, and which part of the keys that they see ----
    const int batch = block_z(), kv_head = block_y(), split = block_x() % p.splits, tile = block_x() / p.splits;
    const int group = p.heads / p.kv_heads, first_row = tile * decode_rows, all_rows = group * p.query_length;
    const int rows = all_rows - first_row < decode_rows ? all_rows - first_row : decode_rows;
    const int length = load_global(p.cache_seqlens + batch * p.seqlens_stride);
    const int keys = length < 0 ? 0 : length < p.capacity ? length : p.capacity;
    const int offset = keys - p.query_length;  // token i stands at key i + offset
    int low = 0, high = keys;
    if (p.window_left >= 0) {
      const int first = first_row / group + offset - p.window_left;
      if (first > 0) low = first;
    }
    if (p.window_right >= 0) {
      const int last = (first_row + rows - 1) / group + offset + p.window_right;
      if (last < high) high = last + 1;
    }
    const int seen = high > low ? high - low : 0, share = ((seen + p.splits - 1) / p.splits + tile_n - 1) / tile_n * tile_n;
    const int begin = low + split * share, end = begin + share < high ? begin + share : high;

    const SharedAddress shared = shared_start();
    const int warp = warp_index(), lane = lane_index();
    const SharedAddress ring = shared + shared_rings + warp * ring_bytes;
    const Element* key = static_cast<const Element*>(p.key) + kv_head * p.key_stride[1];
    const Element* value = static_cast<const Element*>(p.value) + kv_head * p.value_stride[1];

    // This thread's two rows: where their tokens stand, and what they see of [begin, end).
    int standing[2], visible_begin[2], visible_end[2];
    float slope[2];
    BM_UNROLL
    for (int r = 0; r < 2; r++) {
      const int row = first_row + lane / 4 + 8 * r;
      standing[r] = row / group + offset;
      visible_begin[r] = p.window_left >= 0 ? standing[r] - p.window_left : 0;
      visible_end[r] = p.window_right >= 0 && standing[r] + p.window_right < end ? standing[r] + p.window_right + 1 : end;
      slope[r] = p.alibi_slopes != nullptr ? load_global(p.alibi_slopes + batch * p.alibi_stride + kv_head * group + row % group) : 0;
    }

    // ---- Q, and the first tiles ----
    for (int i = thread_index(); i < QueryTile::rows * QueryTile::row_chunks; i += threads) {
      const int row = i / QueryTile::row_chunks, chunk = i % QueryTile::row_chunks, token = (first_row + row) / group;
      const bool valid = row < rows && chunk * 8 < p.head_dim;
      const Element* query = static_cast<const Element*>(p.query);
      if (valid) query += batch * p.query_stride[0] + (kv_head * group + (first_row + row) % group) * p.query_stride[1] + token * p.query_stride[2] + chunk * 8;
      copy_async_16(shared + shared_query + QueryTile::offset(row, chunk), query, valid);
    }
    copy_async_commit();
    const auto first_key = [&](int step) { return begin + (step * warps + warp) * tile_n; };
    const auto place_at = [&](int step) { return place_of(p, batch, first_key(step) + lane % tile_n, end); };
    const auto slot_of = [&](int step) { return ring + step % stages * 2 * KeyTile::bytes; };
    for (int step = 0; step < stages; step++) {
      const Place place = place_at(step);
      const bool more = first_key(step) < end;
      if (more) load_keys(slot_of(step), p, key, p.key_stride, place, first_key(step), end);
      copy_async_commit();
      if (more) load_keys(slot_of(step) + KeyTile::bytes, p, value, p.value_stride, place, first_key(step), end);
      copy_async_commit();
    }
    Place next = place_at(stages);  // a step ahead, so that nothing waits for the block table
    copy_async_wait<2 * stages>();
    sync_block();  // Q has arrived

    OnlineSoftmax<d_blocks> softmax;
    float o[d_blocks][4];
    clear(o);
    for (int step = 0; first_key(step) < end; step++) {
      const SharedAddress key_tile = slot_of(step), value_tile = key_tile + KeyTile::bytes;
      const bool more = first_key(step + stages) < end;
      // ---- S = Q K^T ----
      copy_async_wait<2 * stages - 1>();
      sync_warp();  // this K has arrived
      float s[n_blocks][4];
      clear(s);
      multiply_transposed<Element, QueryTile, KeyTile>(s, shared + shared_query, 0, key_tile);
      sync_warp();  // and nobody reads it any more
      if (more) load_keys(key_tile, p, key, p.key_stride, next, first_key(step + stages), end);
      copy_async_commit();

      // ---- P = exp(S - m) ----
      BM_UNROLL
      for (int j = 0; j < n_blocks; j++)
        BM_UNROLL
        for (int e = 0; e < 4; e++) s[j][e] *= p.softmax_scale;
      if (p.softcap != 0) cap(s, p.softcap);
      BM_UNROLL
      for (int j = 0; j < n_blocks; j++)
        BM_UNROLL
        for (int e = 0; e < 4; e++) {
          const int at = first_key(step) + 8 * j + 2 * (lane % 4) + e % 2, r = e / 2;
          float x = s[j][e];
          const int distance = standing[r] - at;
          x -= slope[r] * float(distance < 0 ? -distance : distance);
          s[j][e] = at >= visible_begin[r] && at < visible_end[r] ? x * log2_e : -infinity;
        }
      float rescale[2];
      softmax.probabilities(s, rescale);
      softmax.scale(o, rescale);

      // ---- O += P V ----
      copy_async_wait<2 * stages - 1>();
      sync_warp();  // this V has arrived
      multiply<Element, KeyTile>(o, s, value_tile, 0);
      sync_warp();
      if (more) load_keys(value_tile, p, value, p.value_stride, next, first_key(step + stages), end);
      copy_async_commit();
      next = place_at(step + stages + 1);
    }

    // ---- the warps' parts, one beside the other ----
    float logsumexp[2];
    softmax.finish(o, logsumexp);
    BM_UNROLL
    for (int r = 0; r < 2; r++) {
      const int row = lane / 4 + 8 * r;
      BM_UNROLL
      for (int j = 0; j < d_blocks; j++)
        store_shared(ring + row * part_row_bytes + (8 * j + 2 * (lane % 4)) * 4, Floats<2>{{o[j][2 * r], o[j][2 * r + 1]}});
      if (lane % 4 == 0) store_shared(shared + shared_logsumexp + (warp * decode_rows + row) * 4, logsumexp[r]);
    }
    sync_block();

    const int chunks = p.head_dim / 8;
    const auto head_of = [&](int row) { return kv_head * group + (first_row + row) % group; };
    const auto sink_of = [&](int row) { return p.sinks != nullptr ? load_global(p.sinks + head_of(row)) * log2_e : -infinity; };
    const auto add_warps = [&](float (&sum)[8], int row, int chunk, float sink) {
      return add_parts(
          sum, warps, sink, [&](int w) { return load_shared<float>(shared + shared_logsumexp + (w * decode_rows + row) * 4); },
          [&](int w) {
            const SharedAddress at = shared + shared_rings + w * ring_bytes + row * part_row_bytes + chunk * 32;
            const auto a = load_shared<Floats<4>>(at), b = load_shared<Floats<4>>(at + 16);
            return Floats<8>{{a.x[0], a.x[1], a.x[2], a.x[3], b.x[0], b.x[1], b.x[2], b.x[3]}};
          });
    };
    const auto store_result = [&](const float (&sum)[8], int row, int chunk, float all) {
      const int head = head_of(row), token = (first_row + row) / group;
      Element* out = static_cast<Element*>(p.out) + batch * p.out_stride[0] + head * p.out_stride[1] + token * p.out_stride[2] + chunk * 8;
      store_global(reinterpret_cast<Word<16>*>(out), Word<16>{{pack<Element>(sum[0], sum[1]), pack<Element>(sum[2], sum[3]),
                                                               pack<Element>(sum[4], sum[5]), pack<Element>(sum[6], sum[7])}});
      if (chunk == 0) store_global(p.logsumexp + batch * p.logsumexp_stride[0] + head * p.logsumexp_stride[1] + token, all * ln_2);
    };
    if (p.splits == 1) {
      for (int i = thread_index(); i < rows * chunks; i += threads) {
        float sum[8];
        const float all = add_warps(sum, i / chunks, i % chunks, sink_of(i / chunks));
        store_result(sum, i / chunks, i % chunks, all);
      }
      return;
    }

    // ---- the splits' parts, by whoever comes last ----
    const int part_rows = all_rows < decode_rows ? all_rows : decode_rows;
    const int64_t unit = (int64_t(batch) * p.kv_heads + kv_head) * (grid_x() / p.splits) + tile;
    float* parts = p.partial + unit * p.splits * part_rows * p.head_dim;
    float* part_logsumexp = p.partial_logsumexp + unit * p.splits * part_rows;
    for (int i = thread_index(); i < rows * chunks; i += threads) {
      const int row = i / chunks, chunk = i % chunks, at = split * part_rows + row;
      float sum[8];
      const float all = add_warps(sum, row, chunk, -infinity);
      Floats<4>* part = reinterpret_cast<Floats<4>*>(parts + int64_t(at) * p.head_dim + chunk * 8);
      store_global(part, Floats<4>{{sum[0], sum[1], sum[2], sum[3]}});
      store_global(part + 1, Floats<4>{{sum[4], sum[5], sum[6], sum[7]}});
      if (chunk == 0) store_global(part_logsumexp + at, all);
    }
    sync_block();  // so that the count below speaks for the whole block
    if (thread_index() == 0) store_shared(shared + shared_arrival, count_global(p.counters + unit, uint32_t(p.splits - 1)));
    sync_block();
    if (load_shared<uint32_t>(shared + shared_arrival) != uint32_t(p.splits - 1)) return;
    // All logsumexps at once, where the rings were, and then from there: one after the other from L2 they would take longer than the rest.
    for (int i = thread_index(); i < p.splits * part_rows; i += threads) store_shared(shared + shared_rings + 4 * i, load_global(part_logsumexp + i));
    sync_block();
    for (int i = thread_index(); i < rows * chunks; i += threads) {
      const int row = i / chunks, chunk = i % chunks;
      float sum[8];
      const float all = add_parts(
          sum, p.splits, sink_of(row), [&](int s) { return load_shared<float>(shared + shared_rings + 4 * (s * part_rows + row)); },
          [&](int s) {
            const Floats<4>* part = reinterpret_cast<const Floats<4>*>(parts + (int64_t(s) * part_rows + row) * p.head_dim + chunk * 8);
            const auto a = load_global(part), b = load_global(part + 1);
            return Floats<8>{{a.x[0], a.x[1], a.x[2], a.x[3], b.x[0], b.x[1], b.x[2], b.x[3]}};
          });
      store_result(sum, row, chunk, all);
    }
  }
};

}  // namespace bigmodel::cuda
