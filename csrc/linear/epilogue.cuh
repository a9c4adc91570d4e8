// What happens to a tile of x W^T on its way out of the accumulators: + bias, (kept for the backward), activation, dropout, + residual.
//
// A thread has two rows and, of each block of eight columns, two neighbours. Before they leave, the four lanes of a row exchange
// blocks, so that each writes the 16 bytes of a whole block and the four of them 64 in a row:
//
//   lane 0..3 hold columns 2t, 2t+1 of blocks j .. j+3   ->   lane t holds all eight columns of block j + t
#pragma once
#include "arch/number.cuh"
#include "arch/philox.cuh"
#include "arch/warp.cuh"
#include "linear/cuda.h"

namespace bigmodel::cuda {

BM_DEVICE float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::gelu: return 0.5f * x * (1 + erf_exact(x * 0.7071067811865476f));
    case Activation::gelu_tanh: return 0.5f * x * (1 + tanh_exact(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case Activation::quick_gelu: return x / (1 + exp2_approx(-1.702f * log2_e * x));
    case Activation::relu: return maximum(x, 0);
    case Activation::silu: return x / (1 + exp2_approx(-log2_e * x));
  }
  return x;
}

// Of 4 words of each of 4 neighbouring lanes, lane t gets word t of all: a transposition.
BM_DEVICE void transpose_quad(uint32_t (&x)[4]) {
  const int t = lane_index() % 4;
  BM_UNROLL
  for (int mask = 1; mask <= 2; mask *= 2)  // exchange word i of the lower lane with word i ^ mask of the upper
    BM_UNROLL
    for (int i = 0; i < 4; i++) {
      if (i & mask) continue;
      const uint32_t send = t & mask ? x[i] : x[i | mask], got = shuffle_xor(send, mask);
      if (t & mask)
        x[i] = got;
      else
        x[i | mask] = got;
    }
}

// row: the warp's first of 16; column: of the first block, in the whole output; end: past the last column of this weight.
template <typename Element, int blocks>
BM_DEVICE void finish_tile(float (&c)[blocks][4], const LinearParams& p, int row, int column, int end, const Element* bias) {
  static_assert(blocks % 4 == 0, "four lanes exchange four blocks");
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const uint64_t seed = p.dropout_seed != nullptr ? uint64_t(load_global(p.dropout_seed)) : 0;
  BM_UNROLL
  for (int j = 0; j < blocks; j += 4)
    BM_UNROLL
    for (int r = 0; r < 2; r++) {
      const int at_row = row + g + 8 * r;
      float x[4][2];
      BM_UNROLL
      for (int b = 0; b < 4; b++)
        BM_UNROLL
        for (int e = 0; e < 2; e++) {
          const int at = column + 8 * (j + b) + 2 * t + e;
          x[b][e] = c[j + b][2 * r + e] + (bias != nullptr && at < end ? to_float(load_global(bias + (at - column))) : 0);
        }
      const int first = column + 8 * (j + t);  // of the block that this lane writes
      const bool mine = at_row < p.rows && first < end;
      uint32_t words[4];
      if (p.preactivation != nullptr) {
        BM_UNROLL
        for (int b = 0; b < 4; b++) words[b] = pack<Element>(x[b][0], x[b][1]);
        transpose_quad(words);
        if (mine) store_global(reinterpret_cast<Word<16>*>(static_cast<Element*>(p.preactivation) + at_row * p.out_stride + first), Word<16>{{words[0], words[1], words[2], words[3]}});
      }
      BM_UNROLL
      for (int b = 0; b < 4; b++)
        BM_UNROLL
        for (int e = 0; e < 2; e++) x[b][e] = activate(x[b][e], p.activation);
      if (p.dropout_seed != nullptr) {
        // One call of the generator serves the columns that differ in bits 3 and 4 (ops/philox.py), which are the four blocks: with
        // dropout there is one weight, and its tiles start at multiples of 32.
        BM_UNROLL
        for (int e = 0; e < 2; e++) {
          const int at = column + 8 * j + 2 * t + e;
          const PhiloxWords random = philox(uint32_t(at >> 5 << 3 | (at & 7)), uint32_t(at_row), 0, 0, seed);
          BM_UNROLL
          for (int b = 0; b < 4; b++) x[b][e] = random.word[b] >= p.dropout_threshold ? x[b][e] * p.dropout_scale : 0;
        }
      }
      if (p.residual != nullptr) {
        BM_UNROLL
        for (int b = 0; b < 4; b++) {
          const int at = column + 8 * (j + b) + 2 * t;
          if (at_row < p.rows && at < end) {
            const uint32_t pair = load_global(reinterpret_cast<const uint32_t*>(static_cast<const Element*>(p.residual) + at_row * p.out_stride + at));
            x[b][0] += to_float(Element{uint16_t(pair)});
            x[b][1] += to_float(Element{uint16_t(pair >> 16)});
          }
        }
      }
      BM_UNROLL
      for (int b = 0; b < 4; b++) words[b] = pack<Element>(x[b][0], x[b][1]);
      transpose_quad(words);
      if (mine) store_global(reinterpret_cast<Word<16>*>(static_cast<Element*>(p.out) + at_row * p.out_stride + first), Word<16>{{words[0], words[1], words[2], words[3]}});
    }
}

// Which tile of the output, of all weights: tiles of one weight after the other, and within a weight eight rows of tiles before the
// next column, so that blocks that run together share what they read from L2.
struct TilePlace {
  int weight, row, column, out_column;  // row and column within the weight's output; out_column in the whole
};
template <int tile_m, int tile_n>
BM_DEVICE TilePlace place_of(const LinearParams& p, int tile) {
  constexpr int band = 8;
  const int tiles_m = (p.rows + tile_m - 1) / tile_m;
  int weight = 0, out_column = 0, tiles_n = (p.out_features[0] + tile_n - 1) / tile_n;
  while (tile >= tiles_m * tiles_n && weight + 1 < p.weights) {
    tile -= tiles_m * tiles_n;
    out_column += p.out_features[weight++];
    tiles_n = (p.out_features[weight] + tile_n - 1) / tile_n;
  }
  const int first = tile / (band * tiles_n) * band, height = tiles_m - first < band ? tiles_m - first : band, rest = tile % (band * tiles_n);
  return {weight, (first + rest % height) * tile_m, rest / height * tile_n, out_column};
}
template <int tile_n>
constexpr int tiles_across(const LinearParams& p) {
  int count = 0;
  for (int i = 0; i < p.weights; i++) count += (p.out_features[i] + tile_n - 1) / tile_n;
  return count;
}
template <int tile_m, int tile_n>
constexpr int tile_count(const LinearParams& p) {
  return tiles_across<tile_n>(p) * ((p.rows + tile_m - 1) / tile_m);
}

}  // namespace bigmodel::cuda
