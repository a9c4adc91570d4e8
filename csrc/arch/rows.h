// Words for rows of a few thousand numbers, which are in cache: sums over one, and sums of two.
#pragma once
#include "simd.h"

namespace bigmodel::BIGMODEL_ISA {

// Sums over a row in four chains, of `terms` vectors: shorter chains, less latency, smaller errors.
template <int TERMS, class Body>
BIGMODEL_INLINE void row_sums(int64_t n, float (&total)[TERMS], const Body& body) {
  constexpr int lanes = 4, w = F32::width;
  F32 sums[lanes][TERMS];
  for (auto& lane : sums)
    for (F32& s : lane) s = F32::zero();
  int64_t i = 0;
  for (; i + lanes * w <= n; i += lanes * w)
#pragma GCC unroll 4
    for (int v = 0; v < lanes; v++) body(i + v * w, w, sums[v]);
  for (; i + w <= n; i += w) body(i, w, sums[0]);
  if (i < n) body(i, int(n - i), sums[1]);
  for (int t = 0; t < TERMS; t++) total[t] = sum((sums[0][t] + sums[1][t]) + (sums[2][t] + sums[3][t]));
}

// out = a + b in float32 (b may be null); the sum a norm is taken of.
template <class T>
static void add_row(const T* a, const T* b, int64_t n, float* out) {
  each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) {
    store(b ? load(a + i, here) + load(b + i, here) : load(a + i, here), out + i, here);
  });
}

// row += a.
template <class T>
static void add_to_row(const T* a, int64_t n, float* row) {
  each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(row + i, here) + load(a + i, here), row + i, here); });
}

}  // namespace bigmodel::BIGMODEL_ISA
