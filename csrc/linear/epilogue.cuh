// What happens to a tile of x W^T on its way out of the accumulators: + bias, (kept for the backward), activation, dropout, + residual.
// Or, where x is the gradient of what W was multiplied by: times the derivative of the activation at what that was given, with the
// activation itself and the sums of columns beside.
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

// An activation and its derivative at one place. What is not used of the two is not computed.
struct Curve { float value, slope; };

BM_DEVICE float sigmoid(float x) { return reciprocal(1 + exp2_approx(-log2_e * x)); }
// x Phi(x), with erfc(z) = (a1 t + ... + a5 t^5) exp(-z^2), t = 1 / (1 + 0.3275911 z), for z >= 0, which is within 1.5e-7 (Abramowitz and
// Stegun, 7.1.26): a third of erff's instructions, and rounding to 16 bits leaves nothing of the difference. The same exponential is in
// the density, by which the derivative Phi(x) + x phi(x) has it.
BM_DEVICE Curve gelu(float x) {
  const float size = x < 0 ? -x : x, z = size * 0.7071067811865476f, t = reciprocal(1 + 0.3275911f * z);
  const float sum = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float e = exp2_approx(-log2_e * z * z), tail = 0.5f * sum * e;  // Phi(-size)
  const float finite = minimum(size, 1e30f);                           // for infinity times 0 is no number
  const float near = 0.3989422804014327f * finite * e;
  return {maximum(x, 0) - finite * tail, x < 0 ? tail - near : 1 - tail + near};
}
BM_DEVICE Curve gelu_tanh(float x) {
  const float s = sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));  // (1 + tanh(u)) / 2 = sigmoid(2u)
  const float near = minimum(maximum(x, -16), 16);                             // beyond, 1 - s or s is 0, and x^2 may be infinite
  return {x * s, s + near * s * (1 - s) * 1.5957691216057308f * (1 + 0.134145f * near * near)};
}
BM_DEVICE Curve swish(float x, float rate) {
  const float s = sigmoid(rate * x);
  return {x * s, s + rate * x * s * (1 - s)};
}

// use(curve) with the activation's curve: the choice is outside of what loops over elements.
template <typename Use>
BM_DEVICE void with_activation(Activation activation, Use use) {
  switch (activation) {
    case Activation::none: return use([](float x) { return Curve{x, 1}; });
    case Activation::gelu: return use([](float x) { return gelu(x); });
    case Activation::gelu_tanh: return use([](float x) { return gelu_tanh(x); });
    case Activation::quick_gelu: return use([](float x) { return swish(x, 1.702f); });
    case Activation::relu: return use([](float x) { return Curve{maximum(x, 0), x > 0 ? 1.0f : 0.0f}; });
    case Activation::silu: return use([](float x) { return swish(x, 1); });
  }
}

BM_DEVICE void activate(float (&x)[8], Activation activation) {
  with_activation(activation, [&](auto curve) {
    BM_UNROLL
    for (float& value : x) value = curve(value).value;
  });
}
// x times the derivative at z, and z through the activation.
BM_DEVICE void activate_backward(float (&x)[8], float (&z)[8], Activation activation) {
  with_activation(activation, [&](auto curve) {
    BM_UNROLL
    for (int i = 0; i < 8; i++) {
      const Curve at = curve(z[i]);
      x[i] *= at.slope;
      z[i] = at.value;
    }
  });
}

// 16 rows of 64 float32 columns, in chunks of four. Rows that are written, or read, together lie in different banks.
struct StagingTile {
  static constexpr int rows = 16, columns = 64, bytes = rows * columns * 4;
  static BM_DEVICE uint32_t offset(int row, int chunk) { return uint32_t(row * columns * 4 + (chunk ^ 2 * (row % 4)) * 16); }
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

// By one warp. row: its first of 16; column: of the first block, in the whole output; end: past the last column of this weight.
// staging: a StagingTile that no other warp uses. A lane takes its columns of every fourth row, `at_once` of them written out beside each
// other, as registers allow.
template <typename Element, int at_once, int blocks>
BM_DEVICE void finish_tile(const float (&c)[blocks][4], const LinearParams& p, int row, int column, int end, const Element* bias, SharedAddress staging) {
  constexpr int piece = StagingTile::columns / 8, rows_at_once = warp_size / piece, turns = StagingTile::rows / rows_at_once;
  static_assert(StagingTile::rows == column_part_rows, "a warp's rows are a part of the sums");
  static_assert(blocks % piece == 0 && turns % at_once == 0, "whole pieces, whole groups");
  const int lane = lane_index(), own_row = lane / piece, own_chunk = lane % piece;
  const void* beside = p.activated != nullptr ? p.activated : p.residual;
  const uint64_t seed = p.dropout_seed != nullptr ? uint64_t(load_global(p.dropout_seed)) : 0;
  const auto at = [](auto* matrix, int64_t offset) { return reinterpret_cast<Word<16>*>(static_cast<Element*>(const_cast<void*>(matrix)) + offset); };
  BM_UNROLL_BY(1)
  for (int n = 0; n < blocks / piece; n++) {
    const int first = column + StagingTile::columns * n + 8 * own_chunk;  // of this lane's eight columns
    if (first - 8 * own_chunk >= end) break;
    const auto writes = [&](int turn) { return first < end && row + turn * rows_at_once + own_row < p.rows; };
    const auto offset = [&](int turn) { return int64_t(row + turn * rows_at_once + own_row) * p.out_stride + first; };
    // ---- residual, or what the activation was given, on its way while the accumulators move ----
    struct Beside { Word<16> row[at_once]; };
    const auto read_beside = [&](int turn) {
      Beside read = {};
      if (beside != nullptr) {
        BM_UNROLL
        for (int i = 0; i < at_once; i++)
          if (writes(turn + i)) read.row[i] = load_global(at(beside, offset(turn + i)));
      }
      return read;
    };
    Beside next = read_beside(0);
    Word<16> bias_word = {};
    if (bias != nullptr && first < end) bias_word = load_global(reinterpret_cast<const Word<16>*>(bias + (first - column)));
    // ---- accumulators to shared memory ----
    sync_warp();  // nobody reads the piece before any more
    BM_UNROLL
    for (int m = 0; m < blocks / piece; m++) {
      if (m != n) continue;  // registers have no index that changes
      BM_UNROLL
      for (int j = 0; j < piece; j++)
        BM_UNROLL
        for (int r = 0; r < 2; r++) {
          const float pair[2] = {c[piece * m + j][2 * r], c[piece * m + j][2 * r + 1]};
          Word<8> word;
          memcpy(&word, pair, 8);
          store_shared(staging + StagingTile::offset(lane / 4 + 8 * r, 2 * j + lane % 4 / 2) + 8 * (lane % 2), word);
        }
    }
    sync_warp();
    // ---- and on ----
    float sums[8] = {};
    BM_UNROLL_BY(1)
    for (int turn = 0; turn < turns; turn += at_once) {
      const Beside now = next;
      if (turn + at_once < turns) next = read_beside(turn + at_once);
      BM_UNROLL
      for (int i = 0; i < at_once; i++) {
        float x[8], other[8];
        BM_UNROLL
        for (int half = 0; half < 2; half++) {
          const Word<16> word = load_shared<Word<16>>(staging + StagingTile::offset((turn + i) * rows_at_once + own_row, 2 * own_chunk + half));
          memcpy(x + 4 * half, &word, 16);
        }
        if (p.activated != nullptr) {
          unpack<Element>(other, now.row[i]);
          activate_backward(x, other, p.activation);
          if (p.hidden != nullptr && writes(turn + i)) store_global(at(p.hidden, offset(turn + i)), pack<Element>(other));
          BM_UNROLL
          for (int k = 0; k < 8; k++) sums[k] += x[k];  // 0 in rows past the last
        } else {
          unpack<Element>(other, bias_word);
          BM_UNROLL
          for (int k = 0; k < 8; k++) x[k] += other[k];
          if (p.preactivation != nullptr && writes(turn + i)) store_global(at(p.preactivation, offset(turn + i)), pack<Element>(x));
          activate(x, p.activation);
          if (p.dropout_seed != nullptr) drop(x, p, row + (turn + i) * rows_at_once + own_row, first, seed);
          if (p.residual != nullptr) {
            unpack<Element>(other, now.row[i]);
            BM_UNROLL
            for (int k = 0; k < 8; k++) x[k] += other[k];
          }
        }
        if (writes(turn + i)) store_global(at(p.out, offset(turn + i)), pack<Element>(x));
      }
    }
    if (p.column_parts != nullptr) {
      BM_UNROLL
      for (int k = 0; k < 8; k++) {
        sums[k] += shuffle_xor(sums[k], piece);
        sums[k] += shuffle_xor(sums[k], 2 * piece);
      }
      if (own_row == 0 && writes(0)) {
        Word<16> words[2];
        memcpy(words, sums, 32);
        Word<16>* part = reinterpret_cast<Word<16>*>(p.column_parts + row / column_part_rows * p.out_stride + first);
        store_global(part, words[0]);
        store_global(part + 1, words[1]);
      }
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
