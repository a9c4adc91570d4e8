// The kernels of a linear layer that have one form: by element type and layout of the weight.
#pragma once
#include "arch/launch.cuh"
#include "linear/epilogue.cuh"
#include "linear/launch.h"

namespace bigmodel::cuda {

template <template <typename, bool> typename Kernel>
void start_for_type(const LinearParams& p, bool is_bfloat16, const Stream& stream) {
  const auto start = [&](auto kernel) {
    using Chosen = decltype(kernel);
    launch<Chosen>({tile_count<Chosen::tile_m, Chosen::tile_n>(p)}, p, stream);
  };
  if (is_bfloat16)
    p.conv1d ? start(Kernel<bfloat16, true>{}) : start(Kernel<bfloat16, false>{});
  else
    p.conv1d ? start(Kernel<float16, true>{}) : start(Kernel<float16, false>{});
}

}  // namespace bigmodel::cuda
