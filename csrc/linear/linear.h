// What linear and feed_forward share: choosing the step for a packed weight, packing A for it, the epilogue of a panel, and
// how a product is cut into tasks.
#pragma once
#include "../dispatch.h"
#include "../gemm/gemm.h"
#include "../norm/norm.h"

namespace bigmodel::BIGMODEL_ISA {

// ---- activations; the definitions are those of torch.nn.functional and transformers ----

template <Activation A>
BIGMODEL_INLINE F32 activate(F32 x) {
  if constexpr (A == Activation::gelu) {  // x Phi(x) = max(x, 0) - |x| tail(|x|), which cancels nowhere; beyond 7 the tail is nothing
    const F32 t = min(F32::set(7.0f), abs(x));
    return max(F32::zero(), x) - t * normal_tail(t);
  }
  // 0.5 x (1 + tanh u) = x sigmoid(2u), which does not cancel; u = sqrt(2/pi) (x + 0.044715 x^3). Hendrycks & Gimpel, arXiv 1606.08415.
  if constexpr (A == Activation::gelu_tanh) return x * sigmoid(x * fma(x * x, F32::set(0.0713548163f), F32::set(1.59576912f)));
  if constexpr (A == Activation::quick_gelu) return x * sigmoid(F32::set(1.702f) * x);
  if constexpr (A == Activation::relu) return max(F32::zero(), x);
  if constexpr (A == Activation::silu) return x * sigmoid(x);
  return x;
}

// ---- the epilogue of a group of columns: out = act(c + bias) + residual ----

template <class T>
struct Epilogue {
  const T* bias;        // of the whole row, or null
  Activation activation;
  const T* residual;    // first row of the row block, or null
  int64_t residual_stride;
  T* out;               // null: the result stays in c, as float32
  int64_t out_stride;
  int64_t columns;      // n: a last panel is wider than what is left
};

template <Activation A, class T>
static void finish_rows(const Epilogue<T>& e, int64_t rows, int64_t column, int64_t columns, float* c, int64_t c_stride) {
  constexpr int w = F32::width;
  const int64_t end = smaller(e.columns, column + columns);
  for (int64_t r = 0; r < rows; r++) {
    float* c_row = c + r * c_stride - column;
    const T* residual = e.residual ? e.residual + r * e.residual_stride : nullptr;
    T* out = e.out ? e.out + r * e.out_stride : nullptr;
    int64_t at = column;
    for (; at + w <= end; at += w) {
      F32 y = F32::load(c_row + at);
      if (e.bias) y = y + F32::load(e.bias + at);
      y = activate<A>(y);
      if (residual) y = y + F32::load(residual + at);
      out ? y.store(out + at) : y.store(c_row + at);
    }
    if (at < end) {
      const int here = int(end - at);
      F32 y = F32::load(c_row + at);
      if (e.bias) y = y + load_partial(e.bias + at, here);
      y = activate<A>(y);
      if (residual) y = y + load_partial(residual + at, here);
      out ? store_partial(y, out + at, here) : y.store(c_row + at);
    }
  }
}

template <class T>
static void finish_columns(const Epilogue<T>& e, int64_t rows, int64_t column, int64_t columns, float* c, int64_t c_stride) {
  switch (e.activation) {
    case Activation::none: return finish_rows<Activation::none>(e, rows, column, columns, c, c_stride);
    case Activation::gelu: return finish_rows<Activation::gelu>(e, rows, column, columns, c, c_stride);
    case Activation::gelu_tanh: return finish_rows<Activation::gelu_tanh>(e, rows, column, columns, c, c_stride);
    case Activation::quick_gelu: return finish_rows<Activation::quick_gelu>(e, rows, column, columns, c, c_stride);
    case Activation::relu: return finish_rows<Activation::relu>(e, rows, column, columns, c, c_stride);
    case Activation::silu: return finish_rows<Activation::silu>(e, rows, column, columns, c, c_stride);
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

// ---- tasks ----

// Long products are cut by rows alone: every task owns whole rows, so a norm can follow in the same task while they are in
// cache. Blocks are row_block rows long, and towards the end ever shorter, so that threads finish together even when one of
// them is held up (guided self-scheduling, Polychronopoulos & Kuck, 1987). Short products are cut by columns too, so that each
// thread reads its own part of the weight and none reads it all.
struct Grid {
  static constexpr int64_t long_block = row_block / tile_rows, short_block = 2;  // in tiles
  int64_t rows, tiles, panels, threads, long_blocks, row_blocks, column_blocks;
  Grid(int64_t rows, int64_t panels, int64_t threads) : rows(rows), tiles(ceil_div(rows, tile_rows)), panels(panels), threads(threads) {
    const bool by_rows = threads > 1 && tiles >= threads * long_block / 2;
    long_blocks = by_rows ? larger(0, tiles / long_block - 2 * threads) : ceil_div(tiles, long_block);
    row_blocks = long_blocks;
    for (int64_t tile = long_blocks * long_block; tile < tiles; tile = after(tile)) row_blocks++;
    column_blocks = row_blocks >= threads ? 1 : smaller(panels, ceil_div(threads, larger(1, row_blocks)));
  }
  int64_t tasks() const { return row_blocks * column_blocks; }
  int64_t first_row(int64_t block) const {
    int64_t tile = smaller(block, long_blocks) * long_block;
    for (; block > long_blocks; block--) tile = after(tile);
    return smaller(rows, tile * tile_rows);
  }
  int64_t first_panel(int64_t block) const { return panels * block / column_blocks; }

 private:
  int64_t after(int64_t tile) const { return tile + larger(short_block, smaller(long_block, (tiles - tile) / (2 * threads))); }
};

// Layer norm of float32 rows into out, as a pass of its own (the products were cut by columns).
template <class T>
static void norm_rows(const Runtime& runtime, const float* x, int64_t x_stride, int64_t rows, int64_t n, const NormArgs& norm, T* out) {
  const int64_t block = larger(1, 16384 / larger(1, n));
  parallel(runtime, ceil_div(rows, block), [&](int64_t task) {
    for (int64_t r = task * block; r < smaller(rows, (task + 1) * block); r++) layer_norm_row(x + r * x_stride, n, norm, out + r * n);
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
