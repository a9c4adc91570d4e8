// Which tiles of queries a persistent block works on: those that see the most keys first, so that what is left over at the end is short.
//
// Tiles are sorted into 32 or fewer classes by the keys that they see. Class by class, a warp looks at 32 sequences at a time (a lane
// counts the tiles of one in closed form), and so finds the tile of any number without a list in memory, without a kernel before this one
// to write it, and without reading a length on the host: a captured graph stays right when the lengths change.
//
//   number of the tile     0   1   2 |  5   4   3 |  6   7 ...      here by three blocks; neighbours in the order share a head's
//   block                  0   1   2 |  0   1   2 |  0   1 ...      keys and values in L2
//
// Every second round runs backwards: whoever got the longest of one gets the shortest of the next. Blocks need not ask who is next.
#pragma once
#include "attention/rows.cuh"

namespace bigmodel::cuda {

struct alignas(16) WorkTile {
  Sequence sequence;
  int batch = 0, head, m_start;
  int unused = 0;

  static constexpr int words = 2;  // of 16 bytes, through shared memory
  BM_DEVICE void store(SharedAddress at) const {
    Word<16> word[words];
    memcpy(word, this, sizeof(word));
    for (int i = 0; i < words; i++) store_shared(at + 16 * i, word[i]);
  }
  static BM_DEVICE WorkTile load(SharedAddress at) {
    Word<16> word[words];
    for (int i = 0; i < words; i++) word[i] = load_shared<Word<16>>(at + 16 * i);
    WorkTile tile;
    memcpy(&tile, word, sizeof(word));
    return tile;
  }
};
static_assert(sizeof(WorkTile) == 16 * WorkTile::words);

// By one warp, all lanes together. Few registers: a producer warpgroup has few to give.
template <int tile_m, int tile_n>
class LongestFirst {
 public:
  BM_DEVICE explicit LongestFirst(const AttentionParams& p)
      : p_(p), width_(((p.key_length - 1) / (classes * tile_n) + 1) * tile_n), from_((p.key_length - 1) / width_ * width_) {
    count();
  }

  // The block's next tile; false when there is none. `round`: how many it has had.
  BM_DEVICE bool next(int round, WorkTile& tile) {
    const int number = round * grid_x() + (round % 2 ? grid_x() - 1 - block_x() : block_x());
    while (number - before_ >= shuffle(up_to_, warp_size - 1)) {
      before_ += shuffle(up_to_, warp_size - 1);
      first_ += warp_size;
      if (first_ >= p_.batch) {
        if (from_ == 0) return false;
        from_ -= width_;
        first_ = 0;
      }
      count();
    }
    int lane = up_to_ <= number - before_;  // how many lanes come before the tile's
    for (int mask = 1; mask < warp_size; mask *= 2) lane += shuffle_xor(lane, mask);
    const int lower = shuffle(up_to_, lane - 1), within = number - before_ - (lane > 0 ? lower : 0);
    tile.batch = first_ + lane;
    tile.sequence = Sequence::of(p_, tile.batch);
    const Tiles here = tiles_of(tile.sequence);
    tile.head = within / here.count;
    tile.m_start = (here.first + here.count - 1 - within % here.count) * tile_m;
    return true;
  }

 private:
  static constexpr int classes = 32;
  struct Tiles { int first, count; };

  // up_to_: tiles of this class in the 32 sequences, up to this lane's, over all heads.
  BM_DEVICE void count() {
    const int batch = first_ + lane_index();
    up_to_ = batch < p_.batch ? tiles_of(Sequence::of(p_, batch)).count * p_.heads : 0;
    for (int distance = 1; distance < warp_size; distance *= 2) {
      const int lower = shuffle(up_to_, lane_index() - distance);
      if (lane_index() >= distance) up_to_ += lower;
    }
  }
  // The tiles of a sequence that see more than from_ keys and no more than a class's width above; the top class has no end.
  BM_DEVICE Tiles tiles_of(const Sequence& s) const {
    const int all = (s.queries + tile_m - 1) / tile_m, first = from_ == 0 ? 0 : see_at_most(s, all, from_);
    return {first, (from_ + width_ >= p_.key_length ? all : see_at_most(s, all, from_ + width_)) - first};
  }
  // How many of a sequence's tiles, from the first. Of a window that is limited to the left all tiles count alike.
  BM_DEVICE int see_at_most(const Sequence& s, int all, int keys) const {
    if (s.keys <= keys) return all;
    if (p_.window_right < 0 || p_.window_left >= 0) return 0;
    const int tiles = (keys - s.offset() - p_.window_right) / tile_m;  // tile m sees (m + 1) tile_m + offset + window_right keys
    return tiles < 0 ? 0 : tiles > all ? all : tiles;
  }

  const AttentionParams& p_;
  const int width_;            // of a class, in keys
  int from_, first_ = 0;       // the class, and the first of the 32 sequences
  int before_ = 0, up_to_;     // tiles before these sequences, and among them
};

// On the host: how many tiles there are, or may be in packed sequences, whose lengths lie on the device.
inline int64_t tile_bound(const AttentionParams& p, int tile_m) {
  int64_t tiles = int64_t(p.batch) * ((p.query_length + tile_m - 1) / tile_m);
  if (p.cu_seqlens_q != nullptr && p.total_queries / tile_m + p.batch < tiles) tiles = p.total_queries / tile_m + p.batch;
  return tiles * p.heads;
}

}  // namespace bigmodel::cuda
