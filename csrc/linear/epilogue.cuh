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

// 1 / (1 + 2^x): the sigmoid of -x ln 2.
BM_DEVICE float logistic(float x) { return reciprocal(1 + exp2_approx(x)); }
// x Phi(x) = max(x, 0) - s Phi(-s) for s = |x|, with log2 Phi(-s) as a polynomial: minimax in the error of s Phi(-s), of up to 2e-8 or
// 1.6e-6 of it, for s up to 5.6, and below -50 from 7 to 13. Rounding to 16 bits leaves nothing of the difference.
// The derivative is Phi(x) + x phi(x).
BM_DEVICE Curve gelu(float x) {
  const float size = minimum_or_nan(absolute(x), 13);
  float tail = 3.545928535e-05f;
  constexpr float coefficients[] = {-7.851795387e-04f, 8.110228013e-03f, -5.340647640e-02f, -4.588285424e-01f, -1.151160666f, -9.999995563e-01f};
  BM_UNROLL
  for (float coefficient : coefficients) tail = tail * size + coefficient;
  const float below = exp2_approx(tail), rise = 0.3989422804014327f * size * exp2_approx(-0.5f * log2_e * size * size);  // Phi(-s), s phi(s)
  return {maximum_or_nan(x, 0) - size * below, x < 0 ? below - rise : 1 - below + rise};
}
BM_DEVICE Curve gelu_tanh(float x) {  // (1 + tanh(u)) / 2 = sigmoid(2u), u = 0.79788456 (x + 0.044715 x^3)
  constexpr float scale = 1.5957691216057308f;
  const float s = logistic(x * (-log2_e * scale * 0.044715f * (x * x) - log2_e * scale));
  const float near = minimum(maximum(x, -16), 16);  // beyond, s or 1 - s is 0, and x^2 may be infinite
  return {x * s, s + near * s * (1 - s) * (scale * 3 * 0.044715f * (near * near) + scale)};
}
BM_DEVICE Curve swish(float x, float rate) {
  const float s = logistic(-log2_e * rate * x);
  return {x * s, s + rate * x * s * (1 - s)};
}

// use(curve) with the activation's curve: one choice for all that `use` computes.
template <typename Use>
BM_DEVICE void with_activation(Activation activation, Use use) {
  switch (activation) {
    case Activation::none: return use([](float x) { return Curve{x, 1}; });
    case Activation::gelu: return use([](float x) { return gelu(x); });
    case Activation::gelu_tanh: return use([](float x) { return gelu_tanh(x); });
    case Activation::quick_gelu: return use([](float x) { return swish(x, 1.702f); });
    case Activation::relu: return use([](float x) { return Curve{maximum_or_nan(x, 0), x > 0 ? 1.0f : 0.0f}; });
    case Activation::silu: return use([](float x) { return swish(x, 1); });
  }
}

// One switch for all rows, which is one long stretch of independent instructions.
template <int rows>
BM_DEVICE void activate(float (&x)[rows][8], Activation activation) {
  with_activation(activation, [&](auto curve) {
    BM_UNROLL
    for (auto& row : x)
      BM_UNROLL
      for (float& value : row) value = curve(value).value;
  });
}
// x times the derivative at z, and z through the activation. Of one row: of several, both would not fit the registers.
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

// 16 rows of 64 float32 columns, in chunks of four; of a row the even chunks come before the odd ones. What is written together (four
// rows of two neighbouring chunks), or read together (eight even or odd ones of a row), lies in different banks. It starts at a multiple
// of 128 bytes.
struct StagingTile {
  static constexpr int rows = 16, columns = 64, row_bytes = columns * 4, bytes = rows * row_bytes;
  static BM_DEVICE SharedAddress offset(int row, int chunk) {
    const int odd = chunk & 1;
    return SharedAddress(row * row_bytes + 128 * odd + (chunk >> 1 ^ 2 * (row % 4) ^ odd) * 16);
  }
  // From chunk 0 or 1 of a row the one that is `chunks` later, an even number.
  static BM_DEVICE SharedAddress later(SharedAddress address, int chunks) { return address ^ SharedAddress(chunks / 2 * 16); }
  // From an even chunk the one after it.
  static BM_DEVICE SharedAddress neighbour(SharedAddress address) { return (address ^ 16) + 128; }
};

// By one warp. row: its first of 16, of each group of rows, which are group_rows apart; column: of the first block, in the whole output;
// end: past the last column of this weight. staging: a StagingTile that no other warp uses. A lane takes its columns of every fourth row,
// `at_once` of them beside each other, as registers allow.
template <typename Element, int at_once, int group_rows, int groups, int blocks>
BM_DEVICE void finish_tile(const float (&c)[groups][blocks][4], const LinearParams& p, int row, int column, int end, const Element* bias,
                           SharedAddress staging) {
  constexpr int piece = StagingTile::columns / 8, pieces = blocks / piece, rows_at_once = warp_size / piece, turns = StagingTile::rows / rows_at_once;
  static_assert(StagingTile::rows == column_part_rows, "a warp's rows are a part of the sums");
  static_assert(groups <= 2 && blocks % piece == 0 && turns % at_once == 0, "whole pieces, whole turns");
  const void* beside = p.activated != nullptr ? p.activated : p.residual;
  const uint64_t seed = p.dropout.seed != nullptr ? uint64_t(load_global(p.dropout.seed)) : 0;
  // All addresses go on from the one before: 64-bit products for each row would be as many instructions as an activation.
  const int64_t step = int64_t(rows_at_once * sizeof(Element)) * p.out_stride;
  const auto at = [](auto* matrix, int64_t bytes) { return reinterpret_cast<Word<16>*>(static_cast<char*>(const_cast<void*>(matrix)) + bytes); };
  BM_UNROLL_BY(1)
  for (int n = 0; n < groups * pieces; n++) {
    const bool later_group = groups == 2 && n >= pieces;
    const int lane = anew(lane_index()) & (warp_size - 1), own_chunk = lane % piece;
    const int first = column + StagingTile::columns * (later_group ? n - pieces : n) + 8 * own_chunk;  // of this lane's eight columns
    if (first - 8 * own_chunk >= end) continue;
    int own_row = row + (later_group ? group_rows : 0) + lane / piece;
    int rows = first < end ? p.rows - own_row : 0;  // from this lane's first on
    int64_t offset = int64_t(sizeof(Element)) * (own_row * p.out_stride + first);
    const auto writes = [&](int i) { return i * rows_at_once < rows; };
    // ---- residual, or what the activation was given, on its way while the accumulators move ----
    struct Beside { Word<16> row[at_once]; };
    const auto read_beside = [&](int after) {
      Beside found = {};
      if (beside != nullptr) {
        BM_UNROLL
        for (int i = 0; i < at_once; i++)
          if (writes(after + i)) found.row[i] = load_global(at(beside, offset + (after + i) * step));
      }
      return found;
    };
    Beside next = read_beside(0);
    Word<16> bias_word = {};
    if (bias != nullptr && first < end) bias_word = load_global(reinterpret_cast<const Word<16>*>(bias + (first - column)));
    // ---- accumulators to shared memory ----
    sync_warp();  // nobody reads the piece before any more
    const SharedAddress write = staging + StagingTile::offset(lane / 4, lane % 4 / 2) + 8 * (lane % 2);
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
          store_shared(StagingTile::later(write, 2 * j) + 8 * r * StagingTile::row_bytes, word);
        }
    }
    sync_warp();
    // ---- and on ----
    SharedAddress read = staging + StagingTile::offset(lane / piece, 2 * own_chunk);
    BM_UNROLL_BY(1)
    for (int turn = 0; turn < turns; turn += at_once) {
      const Beside now = next;
      if (turn + at_once < turns) next = read_beside(at_once);
      float x[at_once][8], other[8];
      const auto place = [&](int i, int half) { return (half ? StagingTile::neighbour(read) : read) + i * rows_at_once * StagingTile::row_bytes; };
      BM_UNROLL
      for (int i = 0; i < at_once; i++) {
        BM_UNROLL
        for (int half = 0; half < 2; half++) {
          const Word<16> word = load_shared<Word<16>>(place(i, half));
          memcpy(x[i] + 4 * half, &word, 16);
        }
      }
      if (p.activated != nullptr) {
        BM_UNROLL
        for (int i = 0; i < at_once; i++) {
          unpack<Element>(other, now.row[i]);
          activate_backward(x[i], other, p.activation);
          if (p.hidden != nullptr && writes(i)) store_global(at(p.hidden, offset + i * step), pack<Element>(other));
          if (p.column_parts == nullptr) continue;
          BM_UNROLL
          for (int half = 0; half < 2; half++) {  // back to where they were
            Word<16> word;
            memcpy(&word, x[i] + 4 * half, 16);
            store_shared(place(i, half), word);
          }
        }
      } else {
        BM_UNROLL
        for (uint32_t& pair : bias_word.value) pair = anew(pair);  // unpacked here, for want of registers
        unpack<Element>(other, bias_word);
        BM_UNROLL
        for (int i = 0; i < at_once; i++)
          BM_UNROLL
          for (int k = 0; k < 8; k++) x[i][k] += other[k];
        if (p.preactivation != nullptr) {
          BM_UNROLL
          for (int i = 0; i < at_once; i++)
            if (writes(i)) store_global(at(p.preactivation, offset + i * step), pack<Element>(x[i]));
        }
        activate(x, p.activation);
        if (p.dropout.seed != nullptr) {
          BM_UNROLL
          for (int i = 0; i < at_once; i++) drop_eight(x[i], kept_elements(own_row + i * rows_at_once, first, p.dropout.threshold, seed), first, p.dropout.scale);
        }
        if (p.residual != nullptr) {
          BM_UNROLL
          for (int i = 0; i < at_once; i++) {
            unpack<Element>(other, now.row[i]);
            BM_UNROLL
            for (int k = 0; k < 8; k++) x[i][k] += other[k];
          }
        }
      }
      BM_UNROLL
      for (int i = 0; i < at_once; i++)
        if (writes(i)) store_global(at(p.out, offset + i * step), pack<Element>(x[i]));
      read += at_once * rows_at_once * StagingTile::row_bytes;
      offset += at_once * step;
      own_row += at_once * rows_at_once;
      rows -= at_once * rows_at_once;
    }
    // ---- sums of columns, two of each lane, over the rows of the piece, which are 0 past the last ----
    if (p.column_parts != nullptr) {
      sync_warp();
      const int part = own_row / StagingTile::rows - 1, own_column = first + 2 * lane - 8 * own_chunk;
      float sum[2] = {};
      BM_UNROLL_BY(4)
      for (int r = 0; r < StagingTile::rows; r++) {
        const Word<8> word = load_shared<Word<8>>(staging + StagingTile::offset(r, lane / 2) + 8 * (lane % 2));
        float pair[2];
        memcpy(pair, &word, 8);
        sum[0] += pair[0];
        sum[1] += pair[1];
      }
      Word<8> word;
      memcpy(&word, sum, 8);
      if (own_column < end && part * StagingTile::rows < p.rows)
        store_global(reinterpret_cast<Word<8>*>(p.column_parts + part * p.out_stride + own_column), word);
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
