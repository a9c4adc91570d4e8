// The products of the attention backward by the tile unit (AMX): inputs as sums of `inputs` bf16 (all of a float32 are three, of a bf16
// one), P and dS as sums of `weights`.
//
//   S = Q K^T    dP = dO V^T             a row of 32 x 32 blocks for each 32 rows of the chunk
//   dV^T += dO^T P    dK^T += Q^T dS     P and dS as they lie are what the unit takes on the right, and only the chunk's rows, which all
//   dQ += dS K                           keys meet, are turned over; the sums of a task are turned back at its end
//
// Tasks that are too small to gain by this are left to the vectors (backward.cpp).
#include "backward.h"
#include "parts.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

template <int inputs, int weights>
struct UnitProducts {
  static constexpr int64_t chunk_rows = 96;    // whole tiles
  // Below, splitting costs more than the unit saves.
  static bool worthwhile(int64_t rows, int64_t keys) { return smaller(rows, keys) >= (inputs == 1 ? 32 : 128); }

  using Input = Parts<inputs>;
  using Weight = Parts<weights>;
  static constexpr int64_t tile = 2 * unit_rows;
  static_assert(tile == panel && chunk_rows % tile == 0 && chunk_rows <= deepest_block && weight_block <= deepest_block);

  const Runtime& runtime;
  const int64_t depth, keys, padded = round_up(depth, panel), keys_padded = round_up(keys, panel);
  const TileUnit registers = {};
  Input* const key_transposed = scratch_of<Input>(runtime, scratch_key, 3 * keys_padded * padded);
  Input* const value_transposed = key_transposed + keys_padded * padded;
  Input* const key_columns = value_transposed + keys_padded * padded;
  Input* const query = scratch_of<Input>(runtime, scratch_query, 4 * chunk_rows * padded);
  Input* const grad = query + chunk_rows * padded;
  Input* const query_columns = grad + chunk_rows * padded;
  Input* const grad_columns = query_columns + chunk_rows * padded;
  Weight* const gradient_rows = scratch_of<Weight>(runtime, scratch_parts, chunk_rows * (weight_block + 2 * panel));   // of dS, a row of tiles after the other
  Weight* const probability_panel = gradient_rows + chunk_rows * weight_block;
  Weight* const gradient_panel = probability_panel + chunk_rows * panel;
  float* const turned = scratch_of<float>(runtime, scratch_hidden, chunk_rows * padded);
  float* const query_grad = scratch_of<float>(runtime, scratch_output, chunk_rows * padded);
  float* const key_grad = scratch_of<float>(runtime, scratch_sums, 2 * keys_padded * padded);   // [panel of keys][column of dK][key]
  float* const value_grad = key_grad + keys_padded * padded;
  bool keys_in_parts = true, query_in_parts = true, grad_in_parts = true;    // or they hold numbers that have none

  template <class T>
  void put_keys(const T* k, int64_t k_stride, const T* v, int64_t v_stride) {
    memset(key_grad, 0, size_t(2 * keys_padded * padded) * sizeof(float));
    for (int64_t first = 0; first < keys; first += panel) {
      const int64_t here = smaller(panel, keys - first), next = first + here, ahead = smaller(panel, keys - next);
      ask_for_rows(k + next * k_stride, k_stride, ahead, depth);
      ask_for_rows(v + next * v_stride, v_stride, ahead, depth);
      keys_in_parts &= split_keys(k + first * k_stride, k_stride, here, depth, key_transposed + first * padded);
      keys_in_parts &= split_keys(v + first * v_stride, v_stride, here, depth, value_transposed + first * padded);
      split_values(k + first * k_stride, k_stride, here, depth, key_columns + first * panel, keys_padded * panel,
                   [&](int64_t, bool parts) { keys_in_parts &= parts; });
    }
  }

  // Rows of Q or dO, `padded` apart: as they are, and turned over.
  void put_rows(const float* rows, int64_t count, Input* as_rows, Input* as_columns, bool& in_parts) {
    in_parts = true;
    for (int64_t r = 0; r < count; r++) in_parts &= split_row(rows + r * padded, padded, as_rows + r / tile * tile * padded, r % tile);
    pack_transposed(rows, padded, count, padded, turned);
    const int64_t steps = round_up(count, panel);
    for (int64_t first = 0; first < count; first += panel)
      for (int64_t d = 0; d < padded; d++)
        split_row(turned + first * padded + d * panel, panel, as_columns + d / tile * tile * steps + first * tile, d % tile);
  }
  void put_queries(const float* rows, int64_t count) {
    put_rows(rows, count, query, query_columns, query_in_parts);
    memset(query_grad, 0, size_t(count * padded) * sizeof(float));
  }
  void put_grads(const float* rows, int64_t count) { put_rows(rows, count, grad, grad_columns, grad_in_parts); }

  // C (rows x panel) = or += A B, for any number of rows of A.
  template <int of_a, int of_b>
  static void multiply(bool by_unit, int64_t rows, int64_t steps, const Parts<of_a>* a, const Parts<of_b>* b, float* c, int64_t c_stride, bool accumulate) {
    for (int64_t r = 0; r < rows; r += tile)
      multiply_split(by_unit, smaller(tile, rows - r), steps, a + r * steps, b, c + r * c_stride, c_stride, accumulate);
  }

  // S and dP of a chunk and `width` keys from `key` on, whole panels.
  void multiply_scores(int64_t count, int64_t key, int64_t width, float* scores, float* gradient) const {
    for (int64_t p = 0; p < width; p += panel)
      multiply(keys_in_parts && query_in_parts, count, padded, query, key_transposed + (key + p) * padded, scores + p, weight_line, false);
    for (int64_t p = 0; p < width; p += panel)
      multiply(keys_in_parts && grad_in_parts, count, padded, grad, value_transposed + (key + p) * padded, gradient + p, weight_line, false);
  }

  // What P and dS give to the three gradients. `make` makes them of what is stored, a vector at a time; they are split as they are made.
  template <class Make>
  void multiply_gradients(int64_t count, int64_t key, int64_t width, const float* probability, const float* gradient, const Make& make) const {
    const int64_t steps = round_up(count, panel);
    bool rows_in_parts = true;
    for (int64_t p = 0; p < width; p += panel) {
      PartsOf16<weights> probabilities[2][2], gradients[2][2];  // of a pair of rows
      __m512i largest_probability = _mm512_setzero_si512(), largest_gradient = largest_probability;
      auto each_pair = [&](const auto& split_one, const auto& split_two) __attribute__((always_inline)) {
        for (int64_t k = 0; k < steps; k += 2) {
#pragma GCC unroll 2
          for (int i = 0; i < 2; i++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
              const int64_t at = (k + i) * weight_line + p + half * F32::width;
              F32 one = F32::zero(), two = F32::zero();
              if (k + i < count) {
                const auto [pr, ds] = make(k + i, p + half * F32::width, F32::load(probability + at), F32::load(gradient + at));
                one = pr;
                two = ds;
              }
              probabilities[i][half] = split_one(one.v);
              gradients[i][half] = split_two(two.v);
            }
          const int64_t at = k / split_depth * (split_depth * panel), pair = k % split_depth / 2;
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) {
            put_pair(probability_panel + at, pair, half, probabilities[0][half], probabilities[1][half]);
            put_pair(gradient_panel + at, pair, half, gradients[0][half], gradients[1][half]);
          }
#pragma GCC unroll 2
          for (int i = 0; i < 2; i++) put_row(gradient_rows + k / tile * tile * weight_block + p * tile, (k + i) % tile, gradients[i][0], gradients[i][1]);
        }
      };
      each_pair([&](__m512 x) { return split<weights>(x, largest_probability); }, [&](__m512 x) { return split<weights>(x, largest_gradient); });
      const bool marked = without_parts(_mm512_max_epi32(largest_probability, largest_gradient));
      if (marked) each_pair([](__m512 x) { return split_any<weights>(x); }, [](__m512 x) { return split_any<weights>(x); });
      rows_in_parts &= !marked;
      multiply(!marked && grad_in_parts, depth, steps, grad_columns, probability_panel, value_grad + (key + p) * padded, panel, true);
      multiply(!marked && query_in_parts, depth, steps, query_columns, gradient_panel, key_grad + (key + p) * padded, panel, true);
    }
    for (int64_t r = 0; r < count; r += tile)
      for (int64_t d = 0; d < depth; d += panel)
        multiply(rows_in_parts && keys_in_parts, smaller(tile, count - r), width, gradient_rows + r * weight_block, key_columns + d * keys_padded + key * panel,
                 query_grad + r * padded + d, padded, true);
  }

  // Calls store(rows of keys, their stride, the first key, keys, the first column, columns) for all of `sums`, dK or dV.
  template <class Store>
  void turn_back(const float* sums, const Store& store) const {
    alignas(64) float rows[panel * panel];
    for (int64_t key = 0; key < keys; key += panel)
      for (int64_t d = 0; d < depth; d += panel) {
        const int64_t here = smaller(panel, keys - key);
        pack_transposed(sums + key * padded + d * panel, panel, panel, here, rows);
        store(rows, panel, key, here, d, smaller(panel, depth - d));
      }
  }
  template <class Store> void key_gradient(const Store& store) const { turn_back(key_grad, store); }
  template <class Store> void value_gradient(const Store& store) const { turn_back(value_grad, store); }
};

template <class T>
void backward_of(const Runtime& runtime, const AttentionBackwardArgs& args) {
  using Products = UnitProducts<__is_same(T, float) ? 3 : 1, __is_same(T, float) ? 3 : 2>;
  const Backward<T> of = {{{runtime, args.forward}, args}};
  of.each_task([&](const Attention::Sequence& s) {
    if (Products::worthwhile(s.queries * of.group, s.keys)) of.task(s, Products{runtime, of.depth, s.keys});
    else rest::attention_backward_task(runtime, args, s.batch, s.kv_head);
  });
}

}  // namespace

void attention_backward(const Runtime& runtime, const AttentionBackwardArgs& args) {
  switch (args.forward.dtype) {
    case Dtype::float32: return backward_of<float>(runtime, args);
    case Dtype::bfloat16: return backward_of<bf16>(runtime, args);
    case Dtype::float16: return rest::attention_backward(runtime, args);
  }
}

}  // namespace bigmodel::BIGMODEL_ISA
