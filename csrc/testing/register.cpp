// The kernels of testing/words.cuh as an op of the tests: bigmodel_testing::run(name, input, output, seed) -> what went wrong.
// For CUDA tensors where nvcc compiles it, for CPU tensors in the emulator.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "arch/launch.cuh"
#include "testing/words.cuh"

namespace bigmodel::cuda::testing {
namespace {

using torch::stable::Tensor;

struct Row {
  const char* name;
  void (*start)(const WordParams&, const Stream&);
};
template <typename Kernel>
void start(const WordParams& p, const Stream& stream) { launch<Kernel>({}, p, stream); }

const Row table[] = {
    {"ldmatrix", start<LdmatrixWord<false>>},
    {"ldmatrix_transposed", start<LdmatrixWord<true>>},
    {"stmatrix", start<StmatrixWord>},
    {"mma_bfloat16", start<MmaWord<bfloat16>>},
    {"mma_float16", start<MmaWord<float16>>},
    {"shuffle", start<ShuffleWord>},
    {"copy_async", start<CopyAsyncWord>},
    {"philox", start<PhiloxWord>},
    {"pack_bfloat16", start<PackWord<bfloat16>>},
    {"pack_float16", start<PackWord<float16>>},
    {"swizzle_64", start<SwizzleWord<64>>},
    {"swizzle_32", start<SwizzleWord<32>>},
    {"swizzle_96", start<SwizzleWord<96>>},
#if !defined(__CUDACC__)  // a GPU would hang, or go on as if nothing were wrong
    {"missing_arrival", start<MissingArrival>},
    {"missing_barrier", start<MissingBarrier>},
    {"missing_sync_warp", start<MissingSyncWarp>},
    {"overwritten_while_read", start<OverwrittenWhileRead>},
    {"copy_not_waited_for", start<CopyNotWaitedFor>},
    {"never_written", start<NeverWritten>},
    {"past_shared_memory", start<PastSharedMemory>},
    {"past_global_memory", start<PastGlobalMemory>},
    {"write_to_input", start<WriteToInput>},
    {"divergent_warp", start<DivergentWarp>},
#endif
};

void run(std::string name, Tensor input, Tensor output, [[maybe_unused]] int64_t seed) {
  const WordParams p{static_cast<const uint32_t*>(input.mutable_data_ptr()), static_cast<uint32_t*>(output.mutable_data_ptr())};
  Stream stream = {};
#if defined(__CUDACC__)
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(input.get_device_index(), &current));
  stream.stream = static_cast<cudaStream_t>(current);
#else
  stream.memory = {{p.input, size_t(input.numel()) * input.element_size(), false}, {p.output, size_t(output.numel()) * output.element_size(), true}};
  stream.seed = uint64_t(seed);
#endif
  for (const Row& row : table)
    if (name == row.name) return row.start(p, stream);
  STD_TORCH_CHECK(false, "name: '", name, "' is unknown");
}

}  // namespace
}  // namespace bigmodel::cuda::testing

STABLE_TORCH_LIBRARY(bigmodel_testing, m) { m.def("run(str name, Tensor input, Tensor(a!) output, int seed=0) -> ()"); }
#if defined(__CUDACC__)
STABLE_TORCH_LIBRARY_IMPL(bigmodel_testing, CUDA, m) { m.impl("run", TORCH_BOX(&bigmodel::cuda::testing::run)); }
#else
STABLE_TORCH_LIBRARY_IMPL(bigmodel_testing, CPU, m) { m.impl("run", TORCH_BOX(&bigmodel::cuda::testing::run)); }
#endif
