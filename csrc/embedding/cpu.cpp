// embedding: word + position + token-type rows summed and normalised while they are in cache (BERT's input, arXiv 1810.04805 fig. 2).
#include "../dispatch.h"
#include "../gemm/gemm.h"
#include "../norm/norm.h"

namespace bigmodel::BIGMODEL_ISA {

void embedding(const Runtime& runtime, const EmbeddingArgs& args) {
  const int64_t hidden = args.hidden, block = larger(1, 16384 / larger(1, hidden));
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    parallel(runtime, ceil_div(args.tokens, block), [&](int64_t task) {
      float* row = static_cast<float*>(runtime.scratch(scratch_c, size_t(hidden) * sizeof(float)));
      for (int64_t token = task * block; token < smaller(args.tokens, (task + 1) * block); token++) {
        const T* rows[3] = {};
        for (int t = 0; t < 3; t++)
          if (args.ids[t]) rows[t] = static_cast<const T*>(args.tables[t]) + args.ids[t][token] * hidden;
        for (int64_t i = 0; i < hidden; i += F32::width) {
          const int here = int(smaller(F32::width, hidden - i));
          F32 x = F32::zero();
          for (const T* r : rows)
            if (r) x = x + (here == F32::width ? F32::load(r + i) : load_partial(r + i, here));
          store_partial(x, row + i, here);
        }
        T* out = static_cast<T*>(args.out) + token * hidden;
        if (args.has_norm) {
          norm_row<T>(row, hidden, args.norm, out);
        } else {
          for (int64_t i = 0; i < hidden; i++) from_float(row[i], out + i);
        }
      }
    });
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
