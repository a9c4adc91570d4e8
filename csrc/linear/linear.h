// What linear and feed_forward share: choosing the step for a packed weight, packing A for it, and the epilogue of a panel.
#pragma once
#include "../activations/activations.h"
#include "../arch/philox.h"
#include "../dispatch.h"
#include "../gemm/grid.h"
#include "../norm/norm.h"

namespace bigmodel::BIGMODEL_ISA {

// ---- the epilogue of a group of columns: out = dropout(act(c + bias)) + residual, or act(gate) (c + bias) for a gated one ----

template <class T>
struct Epilogue {
  const T* bias;               // of the whole row, or null
  Activation activation;       // of the gate if there is one
  const float* gate = nullptr; // c's columns again: the gate's preactivation, rows gate_stride apart
  int64_t gate_stride = 0;
  T* preactivation = nullptr;  // c + bias goes here too; first row of the row block
  const Dropout* dropout = nullptr;
  int64_t first_row = 0;       // of the row block, which dropout asks for
  const T* residual;           // first row of the row block, or null
  T* prenorm = nullptr;        // the result goes here too
  T* out;                      // null: the result stays in c, as float32
  int64_t columns;             // n, the stride of all T rows; a last panel is wider than what is left
};

// In place, row by row in cache: the product plus bias, the activation, dropout, and what comes after.
template <class T>
static void finish_columns(const Epilogue<T>& e, int64_t rows, int64_t column, int64_t columns, float* c, int64_t c_stride) {
  const int64_t count = smaller(columns, e.columns - column);
  alignas(64) float opened[panel_group * panel];
  for (int64_t r = 0; r < rows; r++) {
    const int64_t at = r * e.columns + column;
    float* row = c + r * c_stride;
    const T* residual = e.residual ? e.residual + at : nullptr;
    const bool plain = e.activation == Activation::none && !e.gate && !e.dropout;
    if (!plain) {
      if (e.bias || e.preactivation)
        each_vector(count, [&](int64_t i, int here) __attribute__((always_inline)) {
          F32 y = F32::load(row + i);
          if (e.bias) y = y + load(e.bias + column + i, here);
          if (e.preactivation) store(y, e.preactivation + at + i, here);
          y.store(row + i);
        });
      if (e.gate) {
        activate_row(e.activation, e.gate + r * e.gate_stride + column, count, opened);
        for (int64_t i = 0; i < count; i += F32::width) (F32::load(row + i) * F32::load(opened + i)).store(row + i);
      } else if (e.activation != Activation::none) {
        activate_row(e.activation, row, count, row);
      }
      if (e.dropout) drop_elements(*e.dropout, e.first_row + r, column, count, row);
      if (!residual && !e.prenorm && !e.out) continue;
    }
    each_vector(count, [&](int64_t i, int here) __attribute__((always_inline)) {
      F32 y = F32::load(row + i);
      if (plain && e.bias) y = y + load(e.bias + column + i, here);
      if (plain && e.preactivation) store(y, e.preactivation + at + i, here);
      if (residual) y = y + load(residual + i, here);
      if (e.prenorm) store(y, e.prenorm + at + i, here);
      e.out ? store(y, e.out + at + i, here) : y.store(row + i);
    });
  }
}

// ---- a packed weight ----

struct Packed {
  const PackedHeader& header;
  const void* panels;
  explicit Packed(const void* packed) : header(*static_cast<const PackedHeader*>(packed)), panels(static_cast<const PackedHeader*>(packed) + 1) {}
  int64_t k() const { return header.k; }
  int64_t n() const { return header.n; }
  int64_t steps() const { return header.pairs ? ceil_div(header.k, 2) : header.k; }
  int64_t panel_count() const { return ceil_div(header.n, panel); }
};

// How weights of storage type T multiply: the packing (cpu.cpp's `pack`) and the product agree on this.
template <class T>
struct StepOf { using Type = Widen<T>; };
#if BIGMODEL_BF16_DOT
template <>
struct StepOf<bf16> { using Type = Pairs; };
#endif

// A's rows packed for `Step` into the calling thread's scratch.
template <class Step, class T>
static const typename Step::A* pack_a(const Runtime& runtime, const T* x, int64_t x_stride, int64_t rows, int64_t k) {
  const int64_t steps = ceil_div(k, Step::k_per_step), tiles = ceil_div(rows, tile_rows);
  void* memory = runtime.scratch(scratch_a, size_t(tiles * tile_rows * steps + 8) * sizeof(typename Step::A));
#if BIGMODEL_BF16_DOT
  if constexpr (Step::k_per_step == 2) {
    pack_rows_pairs(x, x_stride, rows, k, static_cast<uint32_t*>(memory));
    return static_cast<const typename Step::A*>(memory);
  }
#endif
  pack_rows(x, x_stride, rows, k, static_cast<float*>(memory));
  return static_cast<const typename Step::A*>(memory);
}

// The norm of float32 rows into out, as a pass of its own (the products were cut by columns).
template <class T>
static void norm_rows(const Runtime& runtime, const float* x, int64_t x_stride, int64_t rows, int64_t n, const NormArgs& norm, T* out) {
  const int64_t block = larger(1, 16384 / larger(1, n));
  parallel(runtime, ceil_div(rows, block), [&](int64_t task) {
    for (int64_t r = task * block; r < smaller(rows, (task + 1) * block); r++) norm_row<T>(x + r * x_stride, n, norm, out + r * n);
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
