// Rows of K and V as sums of bf16 (gemm/split.h), for the tile unit: what the attention forward and backward share.
#pragma once
#include "../gemm/split.h"
#include "attention.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

// Up to 32 rows as columns of B, for products over head_dim, which is rounded up to 32. Returns whether all numbers have parts.
template <class T, int count>
static bool split_keys(const T* x, int64_t stride, int64_t here, int64_t depth, Parts<count>* out) {
  alignas(64) float buffer[256 * panel];
  pack_transposed(x, stride, here, depth, buffer);
  return split_panel(buffer, depth, out);
}

// Up to 32 rows as rows of B, for products over keys: each panel of columns goes `panel_stride` after the one before. Calls
// mark(panel, whether all its numbers have parts).
template <class T, int count, class Mark>
static void split_values(const T* x, int64_t stride, int64_t here, int64_t depth, Parts<count>* out, int64_t panel_stride, const Mark& mark) {
  for (int64_t d = 0; d < depth; d += panel, out += panel_stride) {
    if (d + panel <= depth) {
      mark(d / panel, split_panel(x + d, here, out, stride));
    } else {
      alignas(64) float buffer[panel * panel];
      pack_columns(x + d, stride, here, depth - d, buffer);
      mark(d / panel, split_panel(buffer, here, out));
    }
  }
}

// Rows lie a whole (batch, heads) stride apart, which no hardware prefetcher follows.
template <class T>
BIGMODEL_INLINE void ask_for_rows(const T* x, int64_t stride, int64_t rows, int64_t depth) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t d = 0; d < depth; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + i * stride + d);
}

}  // namespace

}  // namespace bigmodel::BIGMODEL_ISA
