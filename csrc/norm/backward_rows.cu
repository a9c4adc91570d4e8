// The table of the kernels of the norm's gradient: element type, and warps that share a row.
#include "norm/backward_rows.cuh"

#include <algorithm>

#include "norm/launch.h"

namespace bigmodel::cuda {
namespace {

// use(a kernel, of bfloat16) with the narrowest that holds a row.
template <typename Use>
auto with_kernel(int columns, Use use) {
  if (columns <= 256) return use(NormRowsBackward<bfloat16, 1>{});
  if (columns <= 512) return use(NormRowsBackward<bfloat16, 2>{});
  if (columns <= 768) return use(NormRowsBackward<bfloat16, 3>{});
  if (columns <= 1024) return use(NormRowsBackward<bfloat16, 4>{});
  if (columns <= 2048) return use(NormRowsBackward<bfloat16, 8>{});
  return use(NormRowsBackward<bfloat16, 16>{});
}
static_assert(NormRowsBackward<bfloat16, 16>::threads * 8 == max_norm_backward_columns);

template <int warps>
void start(NormRowsBackward<bfloat16, warps>, const NormBackwardParams& p, bool is_bfloat16, int blocks, const Stream& stream) {
  is_bfloat16 ? launch<NormRowsBackward<bfloat16, warps>>({blocks}, p, stream) : launch<NormRowsBackward<float16, warps>>({blocks}, p, stream);
}

}  // namespace

// As many blocks as a multiprocessor has registers for, which is nine warps of them or one block, and no more than four: others would come
// when these have gone, and lengthen the sums of the parts.
int norm_backward_blocks(int rows, int columns, int multiprocessors) {
  return with_kernel(columns, [&](auto kernel) {
    using Kernel = decltype(kernel);
    return std::min((rows - 1) / Kernel::at_once + 1, std::clamp(9 / Kernel::warps, 1, 4) * multiprocessors);
  });
}

void norm_backward_rows(const NormBackwardParams& p, bool is_bfloat16, int blocks, const Stream& stream) {
  with_kernel(p.columns, [&](auto kernel) { start(kernel, p, is_bfloat16, blocks, stream); });
}

}  // namespace bigmodel::cuda
