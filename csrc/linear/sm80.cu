// The linear kernels for sm_80: element type, layout of the weight.
#include "linear/sm80.cuh"

#include "linear/every_type.cuh"

namespace bigmodel::cuda {

void linear_sm80(const LinearParams& p, bool is_bfloat16, const Stream& stream) { start_for_type<LinearSm80>(p, is_bfloat16, stream); }

}  // namespace bigmodel::cuda
