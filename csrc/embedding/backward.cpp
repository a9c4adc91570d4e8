// embedding_backward: the gradients of y = dropout(norm(word[i] + position[j] + token_type[k])).
//
//   1. token by token: dy -> dropout -> norm' -> d, with the sums over tokens for the norm's parameters; left out where there is
//      neither dropout nor norm: d is then dy itself
//   2. table by table: the tokens are given in the order of their ids, and each table row is the sum of its tokens' d, in that order.
//      A task owns some columns of all rows: no two threads write to one place, and no result depends on how many there are.
#include "../arch/philox.h"
#include "../gemm/product.h"
#include "../norm/backward.h"
#include "../norm/norm.h"
#include "embedding.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

// rows of `out` = sums over the tokens of each group; the other rows are zero already.
template <class T>
void sum_groups(const Runtime& runtime, const EmbeddingGroups& groups, const Rows& d, int64_t hidden, T* out) {
  constexpr int64_t columns = 64, chain = 64;  // floats per task; tokens added one after the other before their sum joins the total
  parallel(runtime, ceil_div(hidden, columns), [&](int64_t task) {
    const int64_t column = task * columns, count = smaller(columns, hidden - column);
    alignas(64) float total[columns], part[columns], buffer[columns];
    for (int64_t g = 0; g < groups.count; g++) {
      memset(total, 0, sizeof total);
      for (int64_t begin = groups.start[g]; begin < groups.start[g + 1]; begin += chain) {
        memset(part, 0, sizeof part);
        for (int64_t t = begin; t < smaller(groups.start[g + 1], begin + chain); t++) {
          const float* row = d.get(d.of, groups.order[t], column, count, buffer);
          each_vector(count, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(part + i, here) + load(row + i, here), part + i, here); });
        }
        for (int64_t i = 0; i < columns; i += F32::width) (F32::load(total + i) + F32::load(part + i)).store(total + i);
      }
      T* target = out + groups.id[g] * hidden + column;
      each_vector(count, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(total + i, here), target + i, here); });
    }
  });
}

}  // namespace

void embedding_backward(const Runtime& runtime, const EmbeddingBackwardArgs& args) {
  const int64_t tokens = args.tokens, hidden = args.hidden;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    const T* grad = static_cast<const T*>(args.grad);
    const Stored<T> given = {grad, hidden};
    Stored<float> made = {nullptr, hidden};
    if (args.has_norm || args.dropout.enabled) {
      float* d = static_cast<float*>(runtime.scratch(scratch_grad, size_t(tokens * hidden) * sizeof(float)));
      made.data = d;
      const int64_t block = larger(4, ceil_div(tokens, 8 * runtime.threads)), tasks = ceil_div(tokens, block), padded = round_up(hidden, 16);
      float* sums = static_cast<float*>(runtime.scratch(scratch_sums, size_t(tasks * 2 * padded) * sizeof(float)));
      parallel(runtime, tasks, [&](int64_t task) {
        float* x = static_cast<float*>(runtime.scratch(scratch_c, size_t(5 * padded) * sizeof(float)));
        float* part = x + padded;
        ChainedSums chained(sums + task * 2 * padded, part, 2 * padded);
        for (int64_t token = task * block; token < smaller(tokens, (task + 1) * block); token++) {
          float* row = d + token * hidden;
          add_row<T>(grad + token * hidden, nullptr, hidden, row);
          if (args.dropout.enabled) drop_elements(args.dropout, token, 0, hidden, row);
          if (!args.has_norm) continue;
          embedding_row<T>(args.ids, args.tables, token, hidden, x);
          rest::norm_backward_row<T>(x, row, hidden, args.norm, row, part, part + padded);
          chained.row_done();
        }
        chained.finish();
      });
      if (args.norm_weight_grad) add_parts(sums, tasks, 2 * padded, hidden, static_cast<T*>(args.norm_weight_grad));
      if (args.norm_bias_grad) add_parts(sums + padded, tasks, 2 * padded, hidden, static_cast<T*>(args.norm_bias_grad));
    }
    for (int t = 0; t < 3; t++)
      if (args.table_grad[t]) sum_groups(runtime, args.groups[t], made.data ? as_rows(made) : as_rows(given), hidden, static_cast<T*>(args.table_grad[t]));
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
