// What happens to a tile of x W^T on its way out of the accumulators: + bias, (kept for the backward), activation, dropout, + residual.
//
// A warp has 16 rows of it, and takes them 64 columns at a time through shared memory of its own:
//
//   accumulators, two columns of a row to a lane   ->   float32 in shared memory   ->   eight neighbours of a row to a lane
//
// so that all that is read and written beside lies in pieces of 16 bytes, 128 in a row, and the code is there once and not once for every
// column: a tile's own would not stay in the instruction cache.
#pragma once
#include "arch/number.cuh"
#include "arch/philox.cuh"
#include "arch/warp.cuh"
#include "linear/cuda.h"

namespace bigmodel::cuda {

// 1 / (1 + 2^x): the sigmoid of -x ln 2.
BM_DEVICE float logistic(float x) { return reciprocal(1 + exp2_approx(x)); }
// x Phi(x) = max(x, 0) - s Phi(-s) for s = |x|, with log2 Phi(-s) as a polynomial: minimax in the error of s Phi(-s), of up to 2e-8 or
// 1.6e-6 of it, for s up to 5.6, and below -50 from 7 to 13. Rounding to 16 bits leaves nothing of the difference.
BM_DEVICE float gelu(float x) {
  const float size = minimum(x < 0 ? -x : x, 13);
  float tail = 3.545928535e-05f;
  constexpr float coefficients[] = {-7.851795387e-04f, 8.110228013e-03f, -5.340647640e-02f, -4.588285424e-01f, -1.151160666f, -9.999995563e-01f};
  BM_UNROLL
  for (float coefficient : coefficients) tail = tail * size + coefficient;
  return maximum_or_nan(x, 0) - size * exp2_approx(tail);
}
BM_DEVICE float gelu_tanh(float x) {  // (1 + tanh(u)) / 2 = sigmoid(2u), u = 0.79788456 (x + 0.044715 x^3)
  constexpr float scale = -log2_e * 1.5957691216057308f;
  return x * logistic(x * (scale * 0.044715f * (x * x) + scale));
}
BM_DEVICE float quick_gelu(float x) { return x * logistic(-log2_e * 1.702f * x); }
BM_DEVICE float silu(float x) { return x * logistic(-log2_e * x); }

// One switch for all rows, which is one long stretch of independent instructions.
template <int rows>
BM_DEVICE void activate(float (&x)[rows][8], Activation activation) {
  const auto all = [&](auto function) {
    BM_UNROLL
    for (auto& row : x)
      BM_UNROLL
      for (float& value : row) value = function(value);
  };
  switch (activation) {
    case Activation::none: return;
    case Activation::gelu: return all([](float v) { return gelu(v); });
    case Activation::gelu_tanh: return all([](float v) { return gelu_tanh(v); });
    case Activation::quick_gelu: return all([](float v) { return quick_gelu(v); });
    case Activation::relu: return all([](float v) { return maximum_or_nan(v, 0); });
    case Activation::silu: return all([](float v) { return silu(v); });
  }
}

// 16 rows of 64 float32 columns, in chunks of four; of a row the even chunks come before the odd ones. What is written together (four
// rows of two neighbouring chunks), or read together (eight even or odd ones of a row), lies in different banks.
struct StagingTile {
  static constexpr int rows = 16, columns = 64, bytes = rows * columns * 4;
  static BM_DEVICE uint32_t offset(int row, int chunk) {
    const int odd = chunk & 1;
    return uint32_t(row * columns * 4 + 128 * odd + (chunk >> 1 ^ 2 * (row % 4) ^ odd) * 16);
  }
};

// Dropout of eight columns from `column`, a multiple of 8. A call of the generator serves the columns that differ in bits 3 and 4
// (ops/philox.py): four lanes, which have 32 columns of a row between them, make two calls each and exchange the answers. With dropout
// there is one weight, and its tiles start at multiples of 32. All lanes together.
BM_DEVICE void drop(float (&x)[8], const LinearParams& p, int row, int column, uint64_t seed) {
  const int own = column / 8 % 4;
  uint32_t kept = 0;  // bit 8 b + i: column i of block b
  BM_UNROLL
  for (int e = 0; e < 2; e++) {
    const int i = 2 * own + e;
    const PhiloxWords random = philox(uint32_t(column >> 5 << 3 | i), uint32_t(row), 0, 0, seed);
    BM_UNROLL
    for (int b = 0; b < 4; b++) kept |= uint32_t(random.word[b] >= p.dropout_threshold) << (8 * b + i);
  }
  kept |= shuffle_xor(kept, 1);
  kept |= shuffle_xor(kept, 2);
  BM_UNROLL
  for (int i = 0; i < 8; i++) x[i] = kept >> (8 * own + i) & 1 ? x[i] * p.dropout_scale : 0;
}

// By one warp. row: its first of 16, of each group of rows, which are group_rows apart; column: of the first block, in the whole output;
// end: past the last column of this weight. staging: a StagingTile that no other warp uses. A lane takes its columns of every fourth row,
// `at_once` of them beside each other, as registers allow.
template <typename Element, int at_once, int group_rows, int groups, int blocks>
BM_DEVICE void finish_tile(const float (&c)[groups][blocks][4], const LinearParams& p, int row, int column, int end, const Element* bias,
                           SharedAddress staging) {
  constexpr int piece = StagingTile::columns / 8, pieces = blocks / piece, rows_at_once = warp_size / piece, turns = StagingTile::rows / rows_at_once;
  static_assert(blocks % piece == 0 && turns % at_once == 0, "whole pieces, whole groups");
  const uint64_t seed = p.dropout_seed != nullptr ? uint64_t(load_global(p.dropout_seed)) : 0;
  const auto at = [](auto* matrix, int64_t offset) { return reinterpret_cast<Word<16>*>(static_cast<Element*>(const_cast<void*>(matrix)) + offset); };
  BM_UNROLL_BY(1)
  for (int n = 0; n < groups * pieces; n++) {
    const int lane = anew(lane_index()), own_chunk = lane % piece;
    const int own_row = row + n / pieces * group_rows + lane / piece;
    const int first = column + StagingTile::columns * (n % pieces) + 8 * own_chunk;  // of this lane's eight columns
    if (first - 8 * own_chunk >= end) continue;
    const int rows = first < end ? p.rows - own_row : 0;  // from this lane's first on
    const int64_t start = own_row * p.out_stride + first, step = rows_at_once * p.out_stride;
    const auto writes = [&](int turn) { return turn * rows_at_once < rows; };
    const auto offset = [&](int turn) { return start + turn * step; };
    // ---- what is added, on its way while the accumulators move ----
    struct Added { Word<16> row[at_once]; };
    const auto residual_of = [&](int turn) {
      Added added = {};
      if (p.residual != nullptr) {
        BM_UNROLL
        for (int i = 0; i < at_once; i++)
          if (writes(turn + i)) added.row[i] = load_global(at(p.residual, offset(turn + i)));
      }
      return added;
    };
    Added residual = residual_of(0);
    Word<16> bias_word = {};
    if (bias != nullptr && first < end) bias_word = load_global(reinterpret_cast<const Word<16>*>(bias + (first - column)));
    // ---- accumulators to shared memory ----
    sync_warp();  // nobody reads the piece before any more
    BM_UNROLL
    for (int m = 0; m < groups * pieces; m++) {
      if (m != n) continue;  // registers have no index that changes
      BM_UNROLL
      for (int j = 0; j < piece; j++)
        BM_UNROLL
        for (int r = 0; r < 2; r++) {
          const float(&block)[4] = c[m / pieces][m % pieces * piece + j];
          const float pair[2] = {block[2 * r], block[2 * r + 1]};
          Word<8> word;
          memcpy(&word, pair, 8);
          store_shared(staging + StagingTile::offset(lane / 4 + 8 * r, 2 * j + lane % 4 / 2) + 8 * (lane % 2), word);
        }
    }
    sync_warp();
    // ---- and on ----
    BM_UNROLL_BY(1)
    for (int turn = 0; turn < turns; turn += at_once) {
      const Added now = residual;
      if (turn + at_once < turns) residual = residual_of(turn + at_once);
      float x[at_once][8];
      BM_UNROLL
      for (int i = 0; i < at_once; i++) {
        BM_UNROLL
        for (int half = 0; half < 2; half++) {
          const Word<16> word = load_shared<Word<16>>(staging + StagingTile::offset((turn + i) * rows_at_once + lane / piece, 2 * own_chunk + half));
          memcpy(x[i] + 4 * half, &word, 16);
        }
      }
      float added[8];
      BM_UNROLL
      for (uint32_t& pair : bias_word.value) pair = anew(pair);  // unpacked here, for want of registers
      unpack<Element>(added, bias_word);
      BM_UNROLL
      for (int i = 0; i < at_once; i++)
        BM_UNROLL
        for (int k = 0; k < 8; k++) x[i][k] += added[k];
      if (p.preactivation != nullptr) {
        BM_UNROLL
        for (int i = 0; i < at_once; i++)
          if (writes(turn + i)) store_global(at(p.preactivation, offset(turn + i)), pack<Element>(x[i]));
      }
      activate(x, p.activation);
      if (p.dropout_seed != nullptr) {
        BM_UNROLL
        for (int i = 0; i < at_once; i++) drop(x[i], p, own_row + (turn + i) * rows_at_once, first, seed);
      }
      if (p.residual != nullptr) {
        BM_UNROLL
        for (int i = 0; i < at_once; i++) {
          unpack<Element>(added, now.row[i]);
          BM_UNROLL
          for (int k = 0; k < 8; k++) x[i][k] += added[k];
        }
      }
      BM_UNROLL
      for (int i = 0; i < at_once; i++)
        if (writes(turn + i)) store_global(at(p.out, offset(turn + i)), pack<Element>(x[i]));
    }
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
