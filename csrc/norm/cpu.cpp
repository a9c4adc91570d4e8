// layer_norm: out = norm(dropout(x) + residual), one row at a time. Ba, Kiros, Hinton, "Layer Normalization", arXiv 1607.06450; RMS norm:
// Zhang & Sennrich, arXiv 1910.07467.
#include "../arch/philox.h"
#include "../dispatch.h"
#include "../parallel.h"
#include "norm.h"

namespace bigmodel::BIGMODEL_ISA {

void layer_norm(const Runtime& runtime, const LayerNormArgs& args) {
  const int64_t block = larger(1, 16384 / larger(1, args.columns));  // rows per task: some 64 KB of them
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_near(runtime, ceil_div(args.rows, block), [&](int64_t task) {
      float* row = static_cast<float*>(runtime.scratch(scratch_c, size_t(args.columns) * sizeof(float)));
      for (int64_t r = task * block; r < smaller(args.rows, (task + 1) * block); r++) {
        const int64_t at = r * args.columns;
        const T* residual = offset<T>(args.residual, at);
        add_row<T>(static_cast<const T*>(args.x) + at, args.dropout.enabled ? nullptr : residual, args.columns, row);
        if (args.dropout.enabled) {
          drop_elements(args.dropout, r, 0, args.columns, row);
          if (residual) add_to_row(residual, args.columns, row);
        }
        norm_row<T>(row, args.columns, args.norm, static_cast<T*>(args.out) + at);
      }
    });
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
