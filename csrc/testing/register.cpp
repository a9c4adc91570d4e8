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
template <typename Kernel, int blocks = 1>
void start(const WordParams& p, const Stream& stream) { launch<Kernel>({blocks}, p, stream); }

const Row table[] = {
    {"ldmatrix", start<LdmatrixWord<false>>},
    {"ldmatrix_transposed", start<LdmatrixWord<true>>},
    {"stmatrix", start<StmatrixWord<false>>},
    {"stmatrix_transposed", start<StmatrixWord<true>>},
    {"mma_bfloat16", start<MmaWord<bfloat16>>},
    {"mma_float16", start<MmaWord<float16>>},
    {"shuffle", start<ShuffleWord>},
    {"count", start<CountWord>},
    {"copy_async", start<CopyAsyncWord>},
    {"bulk_add", start<BulkAddWord>},
    {"wgmma_bfloat16_64", start<WgmmaWord<bfloat16, 64, false, false>>},
    {"wgmma_bfloat16_64_transposed", start<WgmmaWord<bfloat16, 64, true, false>>},
    {"wgmma_float16_128_transposed", start<WgmmaWord<float16, 128, true, false>>},
    {"wgmma_bfloat16_32", start<WgmmaWord<bfloat16, 32, false, false>>},
    {"wgmma_float16_192_transposed", start<WgmmaWord<float16, 192, true, false>>},
    {"wgmma_bfloat16_256_transposed", start<WgmmaWord<bfloat16, 256, true, false>>},
    {"wgmma_bfloat16_96_registers", start<WgmmaWord<bfloat16, 96, false, true>>},
    {"wgmma_bfloat16_32_transposed_registers", start<WgmmaWord<bfloat16, 32, true, true>>},
    {"wgmma_float16_192_transposed_registers", start<WgmmaWord<float16, 192, true, true>>},
    {"wgmma_bfloat16_256_transposed_registers", start<WgmmaWord<bfloat16, 256, true, true>>},
    {"philox", start<PhiloxWord>},
    {"pack_bfloat16", start<PackWord<bfloat16>>},
    {"pack_float16", start<PackWord<float16>>},
    {"swizzle_64", start<SwizzleWord<64>>},
    {"swizzle_32", start<SwizzleWord<32>>},
    {"swizzle_96", start<SwizzleWord<96>>},
    {"schedule_of_5", start<ScheduleOrder, 5>},
    {"schedule_of_132", start<ScheduleOrder, 132>},
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
    {"missing_proxy_fence", start<MissingProxyFence>},
    {"overwritten_under_wgmma", start<OverwrittenUnderWgmma>},
    {"overwritten_under_bulk_add", start<OverwrittenUnderBulkAdd>},
    {"mbarrier_never_completed", start<MbarrierNeverCompleted>},
#endif
};

struct TmaRow {
  const char* name;
  void (*start)(const TmaParams&, const Stream&);
  int columns;
};
template <typename Kernel>
void start_tma(const TmaParams& p, const Stream& stream) { launch<Kernel>({}, p, stream); }

const TmaRow tma_table[] = {
    {"tma_64", start_tma<TmaWord<64>>, 64},
    {"tma_32", start_tma<TmaWord<32>>, 32},
#if !defined(__CUDACC__)
    {"tma_not_waited_for", start_tma<TmaNotWaitedFor>, 64},
#endif
};

Stream stream_for(const Tensor& input, const Tensor& output, [[maybe_unused]] int64_t seed) {
  Stream stream = {};
#if defined(__CUDACC__)
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(input.get_device_index(), &current));
  (void)output;
  stream.stream = static_cast<cudaStream_t>(current);
#else
  stream.memory = {{input.mutable_data_ptr(), size_t(input.numel()) * input.element_size(), false},
                   {output.mutable_data_ptr(), size_t(output.numel()) * output.element_size(), true}};
  stream.seed = uint64_t(seed);
#endif
  return stream;
}

void run(std::string name, Tensor input, Tensor output, int64_t seed) {
  const WordParams p{static_cast<const uint32_t*>(input.mutable_data_ptr()), static_cast<uint32_t*>(output.mutable_data_ptr())};
  const Stream stream = stream_for(input, output, seed);
  for (const Row& row : table)
    if (name == row.name) return row.start(p, stream);
  STD_TORCH_CHECK(false, "name: '", name, "' is unknown");
}

// A box of a 16-bit tensor (batch, head, row, column), from the given coordinates, innermost first.
void run_tma(std::string name, Tensor input, Tensor output, std::vector<int64_t> coordinates, int64_t seed) {
  STD_TORCH_CHECK(input.dim() == 4 && coordinates.size() == 4, "input, coordinates: must have 4 dimensions");
  for (const TmaRow& row : tma_table) {
    if (name != row.name) continue;
    TmaParams p{};
    TensorMapArgs map{input.mutable_data_ptr(), {}, {}, {row.columns, 64, 1, 1}};
    for (int i = 0; i < 4; i++) {
      map.size[i] = input.size(3 - i);
      map.stride[i] = input.stride(3 - i);
      p.coordinate[i] = int(coordinates[i]);
    }
    p.map = tensor_map(map);
    p.output = static_cast<uint32_t*>(output.mutable_data_ptr());
    return row.start(p, stream_for(input, output, seed));
  }
  STD_TORCH_CHECK(false, "name: '", name, "' is unknown");
}

}  // namespace
}  // namespace bigmodel::cuda::testing

STABLE_TORCH_LIBRARY(bigmodel_testing, m) {
  m.def("run(str name, Tensor input, Tensor(a!) output, int seed=0) -> ()");
  m.def("run_tma(str name, Tensor input, Tensor(a!) output, int[] coordinates, int seed=0) -> ()");
}
#if defined(__CUDACC__)
STABLE_TORCH_LIBRARY_IMPL(bigmodel_testing, CUDA, m) {
  m.impl("run", TORCH_BOX(&bigmodel::cuda::testing::run));
  m.impl("run_tma", TORCH_BOX(&bigmodel::cuda::testing::run_tma));
}
#else
STABLE_TORCH_LIBRARY_IMPL(bigmodel_testing, CPU, m) {
  m.impl("run", TORCH_BOX(&bigmodel::cuda::testing::run));
  m.impl("run_tma", TORCH_BOX(&bigmodel::cuda::testing::run_tma));
}
#endif
