// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the rules by which it drops attention
// probabilities and the elements of a matrix; the same as in bigmodel_kernels/ops/philox.py.
#pragma once
#include "arch/cuda.cuh"
#include "arch/warp.cuh"

namespace bigmodel::cuda {

struct PhiloxWords { uint32_t word[4]; };

BM_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  return __umulhi(a, b);
#else
  return uint32_t(uint64_t(a) * b >> 32);
#endif
}

BM_DEVICE PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  BM_UNROLL
  for (int round = 0; round < 10; round++) {
    const uint32_t high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// One call serves the queries q and q + 8 and the keys k and k + 8 (bit 3 of q and k is 0): word 2 * (query's bit 3) + (key's bit 3).
// In an accumulator of mma.sync or wgmma these four belong to one thread, for S = Q K^T and for its transpose alike.
BM_DEVICE PhiloxWords attention_words(int query, int key, int head, int sequence, uint64_t seed) {
  const auto without_bit_3 = [](uint32_t i) { return i >> 4 << 3 | (i & 7); };
  return philox(without_bit_3(uint32_t(key)), without_bit_3(uint32_t(query)), uint32_t(head), uint32_t(sequence), seed);
}

// Which elements of a row are kept, of the 32 columns that four neighbouring lanes have between them, each eight from `column`: bit i is
// column i of the 32. A call of the generator serves the columns that differ in bits 3 and 4: the four lanes make two calls each and
// exchange the answers. All lanes of a warp together.
BM_DEVICE uint32_t kept_elements(int row, int column, uint32_t threshold, uint64_t seed) {
  const int own = column >> 3 & 3;
  uint32_t kept = 0;
  BM_UNROLL
  for (int e = 0; e < 2; e++) {
    const int i = 2 * own + e;
    const PhiloxWords random = philox(uint32_t(column >> 5 << 3 | i), uint32_t(row), 0, 0, seed);
    BM_UNROLL
    for (int b = 0; b < 4; b++) kept |= uint32_t(random.word[b] >= threshold) << (8 * b + i);
  }
  kept |= shuffle_xor(kept, 1);
  kept |= shuffle_xor(kept, 2);
  return kept;
}
// The eight of this lane, by that answer.
BM_DEVICE void drop_eight(float (&x)[8], uint32_t kept, int column, float scale) {
  const int own = column >> 3 & 3;
  BM_UNROLL
  for (int i = 0; i < 8; i++) x[i] = kept >> (8 * own + i) & 1 ? x[i] * scale : 0;
}

}  // namespace bigmodel::cuda
