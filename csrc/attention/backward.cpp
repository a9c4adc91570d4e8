// The attention backward (backward.h) with products by vectors. By a tile unit: tile_unit_backward.cpp.
#include "backward.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

// The products of a task's chunks.
struct VectorProducts {
  static constexpr int64_t chunk_rows = (96 + tile_rows - 1) / tile_rows * tile_rows;

  const Runtime& runtime;
  const int64_t depth, keys, chain;          // chain: see logit_depth
  const int64_t padded = round_up(depth, panel), keys_padded = round_up(keys, weight_block);
  float* const key_transposed = scratch_of<float>(runtime, scratch_key, keys_padded * (2 * depth + padded));
  float* const value_transposed = key_transposed + keys_padded * depth;
  float* const key_columns = value_transposed + keys_padded * depth;
  float* const query_tiles = scratch_of<float>(runtime, scratch_a, chunk_rows * depth + 8);
  float* const query_columns = scratch_of<float>(runtime, scratch_query, chunk_rows * padded);
  float* const grad_tiles = scratch_of<float>(runtime, scratch_grad, chunk_rows * depth + 8);
  float* const grad_columns = scratch_of<float>(runtime, scratch_grad_hidden, chunk_rows * padded);
  float* const query_grad = scratch_of<float>(runtime, scratch_output, chunk_rows * padded);
  float* const key_grad = scratch_of<float>(runtime, scratch_sums, 2 * keys_padded * padded);
  float* const value_grad = key_grad + keys_padded * padded;

  template <class T>
  void put_keys(const T* k, int64_t k_stride, const T* v, int64_t v_stride) {
    memset(key_grad, 0, size_t(2 * keys_padded * padded) * sizeof(float));
    for (int64_t key = 0; key < keys; key += weight_block) {
      const int64_t n = smaller(weight_block, keys - key);
      pack_transposed(k + key * k_stride, k_stride, n, depth, key_transposed + key * depth);
      pack_transposed(v + key * v_stride, v_stride, n, depth, value_transposed + key * depth);
      pack_columns(k + key * k_stride, k_stride, n, depth, key_columns + key * padded);
    }
  }

  // Rows of Q or dO, `padded` apart: tiles for the products over head_dim, panels of columns for those over rows.
  void put_queries(const float* rows, int64_t count) {
    pack_rows(rows, padded, count, depth, query_tiles);
    pack_columns(rows, padded, count, depth, query_columns);
    memset(query_grad, 0, size_t(count * padded) * sizeof(float));
  }
  void put_grads(const float* rows, int64_t count) {
    pack_rows(rows, padded, count, depth, grad_tiles);
    pack_columns(rows, padded, count, depth, grad_columns);
  }

  // S and dP of a chunk and `width` keys from `key` on, whole panels.
  void multiply_scores(int64_t count, int64_t key, int64_t width, float* scores, float* gradient) const {
    multiply_keys(count, depth, chain, query_tiles, key_transposed + key * depth, width, scores, weight_line);
    multiply_keys(count, depth, chain, grad_tiles, value_transposed + key * depth, width, gradient, weight_line);
  }

  // What P and dS of keys of one block give to the three gradients. `make` makes them of what is stored, a vector at a time.
  template <class Make>
  void multiply_gradients(int64_t count, int64_t key, int64_t width, float* probability, float* gradient, const Make& make) const {
    for (int64_t r = 0; r < count; r++)
      for (int64_t j = 0; j < width; j += F32::width) {
        const auto [p, ds] = make(r, j, F32::load(probability + r * weight_line + j), F32::load(gradient + r * weight_line + j));
        p.store(probability + r * weight_line + j);
        ds.store(gradient + r * weight_line + j);
      }
    const int64_t first = key / weight_block * weight_block, n = smaller(weight_block, keys - first), steps = smaller(width, keys - key);
    for (int64_t i = 0; i * panel < depth; i++) {
      multiply_values(count, steps, gradient, weight_line, key_columns + first * padded + (i * n + key - first) * panel,
                      query_grad + i * panel, padded);
      for (int64_t j = 0; j < steps; j += tile_rows) {
        const int64_t here = smaller(tile_rows, steps - j), at = (key + j) * padded + i * panel, columns = i * count * panel;
        multiply_tile_of_columns(here, count, probability + j, weight_line, grad_columns + columns, value_grad + at, padded, true);
        multiply_tile_of_columns(here, count, gradient + j, weight_line, query_columns + columns, key_grad + at, padded, true);
      }
    }
  }

  // Calls store(rows of keys, their stride, the first key, keys, the first column, columns).
  template <class Store> void key_gradient(const Store& store) const { store(key_grad, padded, 0, keys, 0, depth); }
  template <class Store> void value_gradient(const Store& store) const { store(value_grad, padded, 0, keys, 0, depth); }
};

template <class T>
void task(const Backward<T>& of, const Attention::Sequence& s) {
  of.task(s, VectorProducts{of.runtime, of.depth, s.keys, logit_depth(s.queries)});
}

}  // namespace

void attention_backward(const Runtime& runtime, const AttentionBackwardArgs& args) {
  with_dtype(args.forward.dtype, [&](auto type) {
    const Backward<decltype(type)> of = {{{runtime, args.forward}, args}};
    of.each_task([&](const Attention::Sequence& s) { task(of, s); });
  });
}

void attention_backward_task(const Runtime& runtime, const AttentionBackwardArgs& args, int64_t batch, int64_t kv_head) {
  with_dtype(args.forward.dtype, [&](auto type) {
    const Backward<decltype(type)> of = {{{runtime, args.forward}, args}};
    task(of, of.sequence(batch, kv_head));
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
