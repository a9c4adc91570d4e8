// embedding: dropout(norm(...)) of word + position + token-type rows summed and normalised while they are in cache (BERT's input, arXiv 1810.04805 fig. 2).
#include "../arch/philox.h"
#include "../dispatch.h"
#include "../parallel.h"
#include "../norm/norm.h"
#include "embedding.h"

namespace bigmodel::BIGMODEL_ISA {

void embedding(const Runtime& runtime, const EmbeddingArgs& args) {
  constexpr int64_t rows_ahead = 2;
  const int64_t hidden = args.hidden, block = larger(1, 16384 / larger(1, hidden));
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_near(runtime, ceil_div(args.tokens, block), [&](int64_t task) {
      float* row = static_cast<float*>(runtime.scratch(scratch_c, size_t(hidden) * sizeof(float)));
      for (int64_t token = task * block; token < smaller(args.tokens, (task + 1) * block); token++) {
        // The next word's row lies anywhere in the table: it is asked for while this one is normalised.
        if (args.ids[0] && token + rows_ahead < args.tokens) {
          const char* next = static_cast<const char*>(args.tables[0]) + args.ids[0][token + rows_ahead] * hidden * int64_t(sizeof(T));
          for (int64_t at = 0; at < hidden * int64_t(sizeof(T)); at += 64) __builtin_prefetch(next + at);
        }
        embedding_row<T>(args.ids, args.tables, token, hidden, row);
        T* out = static_cast<T*>(args.out) + token * hidden;
        if (args.dropout.enabled) {
          if (args.has_norm) rest::norm_row<T>(row, hidden, args.norm, row);
          drop_elements(args.dropout, token, 0, hidden, row);
        } else if (args.has_norm) {
          rest::norm_row<T>(row, hidden, args.norm, out);
          continue;
        }
        each_vector(hidden, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(row + i, here), out + i, here); });
      }
    });
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
