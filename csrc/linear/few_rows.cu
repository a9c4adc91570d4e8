// The table of the linear kernels for few rows: element type, layout of the weight.
#include "linear/few_rows.cuh"

#include "arch/launch.cuh"
#include "linear/launch.h"

namespace bigmodel::cuda {
namespace {

template <typename Kernel>
void start(const LinearParams& p, const Stream& stream) {
  launch<Kernel>({tile_count<Kernel::tile_m, Kernel::tile_n>(p)}, p, stream);
}

constexpr void (*table[2][2])(const LinearParams&, const Stream&) = {  // [float16, bfloat16][linear, conv1d]
    {start<LinearFewRows<float16, false>>, start<LinearFewRows<float16, true>>},
    {start<LinearFewRows<bfloat16, false>>, start<LinearFewRows<bfloat16, true>>}};

}  // namespace

void linear_few_rows(const LinearParams& p, bool is_bfloat16, const Stream& stream) { table[is_bfloat16][p.conv1d](p, stream); }

}  // namespace bigmodel::cuda
