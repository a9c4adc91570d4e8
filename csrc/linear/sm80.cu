// The table of the sm_80 linear kernels: element type, layout of the weight.
#include "linear/sm80.cuh"

#include "arch/launch.cuh"
#include "linear/launch.h"

namespace bigmodel::cuda {
namespace {

template <typename Kernel>
void start(const LinearParams& p, const Stream& stream) {
  launch<Kernel>({tile_count<Kernel::tile_m, Kernel::tile_n>(p)}, p, stream);
}

constexpr void (*table[2][2])(const LinearParams&, const Stream&) = {  // [float16, bfloat16][linear, conv1d]
    {start<LinearSm80<float16, false>>, start<LinearSm80<float16, true>>},
    {start<LinearSm80<bfloat16, false>>, start<LinearSm80<bfloat16, true>>}};

}  // namespace

void linear_sm80(const LinearParams& p, bool is_bfloat16, const Stream& stream) { table[is_bfloat16][p.conv1d](p, stream); }

}  // namespace bigmodel::cuda
