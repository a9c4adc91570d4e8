// What linear and feed_forward share: the product with a weight, packed or as it lies, and its epilogue.
#pragma once
#include "../activations/activations.h"
#include "../arch/philox.h"
#include "../dispatch.h"
#include "../norm/norm.h"
#include "weights.h"

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
        rest::activate_row(e.activation, e.gate + r * e.gate_stride + column, count, opened);
        for (int64_t i = 0; i < count; i += F32::width) (F32::load(row + i) * F32::load(opened + i)).store(row + i);
      } else if (e.activation != Activation::none) {
        rest::activate_row(e.activation, row, count, row);
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

// ---- the product with a weight ----

// body(Step{}) with the step for m rows of type T, and results of it.
template <class T, class Body>
static void with_step(int64_t m, const Body& body) {
  using Packed = typename StepOf<T>::Type;
#if BIGMODEL_AMX
  constexpr int parts = parts_enough_for<T>;
  if constexpr (Packed::k_per_step == 1)
    if (m >= fewest_split_rows) return body(Split<parts, parts>{});
#endif
  body(Packed{});
}

// left.m rows of x, k columns of type T or float32.
template <class Step, class X>
static void pack_rows_left(const Runtime& runtime, const X* x, int64_t k, const Left<typename Step::A>& left) {
  if constexpr (Step::k_per_step == 1) {
    const Stored<X> rows = {x, k};
    pack_left(runtime, {as_rows(rows), false}, 0, k, left);
  } else {
    pack_blocks(runtime, left, false, [&](int64_t row, int64_t rows, int64_t begin, int64_t depth, uint32_t*) {
      pack_pairs_left(left, row, x + row * k + 2 * begin, k, rows, begin, 0, smaller(2 * depth, k - 2 * begin));
    });
  }
}

// left times the weight, see multiply_packed.
template <class T, class Step>
static void multiply_weight(const Runtime& runtime, const Left<typename Step::A>& left, const WeightArgs& weight, float* direct, int64_t direct_stride,
                            Finish finish) {
  using Packed = typename StepOf<T>::Type;
  if (weight.packed) {
    const auto* panels = reinterpret_cast<const typename Packed::B*>(static_cast<const PackedHeader*>(weight.packed) + 1);
    multiply_packed<Step, Packed>(runtime, left, panels, weight.n, weight.k, direct, direct_stride, finish);
  } else {
    const Weights<T> rows = {weight.parts, weight.part_n, weight.count, weight.k, weight.layout};
    const Operand right = rows.operand();
    if constexpr (splits<Step> || Step::k_per_step > 1) multiply_operand<Step>(runtime, left, right, weight.n, weight.k, direct, direct_stride, finish);
    else multiply_operand<Widen<float>>(runtime, left, right, weight.n, weight.k, direct, direct_stride, finish);
  }
}

// The norm of float32 rows into out, as a pass of its own (the products were cut by columns).
template <class T>
static void norm_rows(const Runtime& runtime, const float* x, int64_t x_stride, int64_t rows, int64_t n, const NormArgs& norm, T* out) {
  const int64_t block = larger(1, 16384 / larger(1, n));
  parallel_near(runtime, ceil_div(rows, block), [&](int64_t task) {
    for (int64_t r = task * block; r < smaller(rows, (task + 1) * block); r++) rest::norm_row<T>(x + r * x_stride, n, norm, out + r * n);
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
