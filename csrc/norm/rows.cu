// The table of the norm's kernels: element type, and how much of a row a warp holds.
#include "norm/rows.cuh"

#include "norm/launch.h"

namespace bigmodel::cuda {
namespace {

template <typename Kernel>
void start(const NormParams& p, const Stream& stream) {
  launch<Kernel>({(p.rows + Kernel::warps - 1) / Kernel::warps}, p, stream);
}

template <int held>
void start_held(const NormParams& p, bool is_bfloat16, const Stream& stream) {
  (is_bfloat16 ? start<NormRows<bfloat16, held>> : start<NormRows<float16, held>>)(p, stream);
}

}  // namespace

void norm_rows(const NormParams& p, bool is_bfloat16, const Stream& stream) {
  if (p.rows > 0 && p.columns > 0) (p.columns <= 4 * 256 ? start_held<4> : start_held<8>)(p, is_bfloat16, stream);
}

}  // namespace bigmodel::cuda
