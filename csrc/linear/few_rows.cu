// The linear kernels for few rows: element type, layout of the weight.
#include "linear/few_rows.cuh"

#include "linear/every_type.cuh"

namespace bigmodel::cuda {

void linear_few_rows(const LinearParams& p, bool is_bfloat16, const Stream& stream) { start_for_type<LinearFewRows>(p, is_bfloat16, stream); }

}  // namespace bigmodel::cuda
