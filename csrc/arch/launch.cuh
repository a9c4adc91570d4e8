// Starts a kernel: on a CUDA stream, or in the emulator.
//
// A kernel is a struct with `Params`, `threads`, `blocks_per_multiprocessor`, `shared_bytes` and `static void run(const Params&)`.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "arch/cuda.cuh"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif
#include <stdexcept>

namespace bigmodel::cuda {

struct Grid { int x = 1, y = 1, z = 1; };

#if defined(__CUDACC__)

struct Stream { cudaStream_t stream; };

// shared_bytes is there to be seen in the kernel's name, by profilers and by csrc/cycles.py.
template <typename Kernel, int shared_bytes = Kernel::shared_bytes>
__global__ void __launch_bounds__(Kernel::threads, Kernel::blocks_per_multiprocessor) enter(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

template <typename Kernel>
void launch(Grid grid, const typename Kernel::Params& params, const Stream& stream) {
  const auto check = [](cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  };
  if constexpr (Kernel::shared_bytes > (48 << 10)) {  // once for each device: a launch is short beside it
    static std::atomic<uint64_t> allowed{0};
    int device = 0;
    check(cudaGetDevice(&device), "the current device");
    const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;  // none: every time
    if (!(allowed.load() & bit)) {
      check(cudaFuncSetAttribute(enter<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::shared_bytes), "shared memory of a kernel");
      allowed |= bit;
    }
  }
  enter<Kernel><<<dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)), Kernel::threads, Kernel::shared_bytes, stream.stream>>>(params);
  check(cudaGetLastError(), "launch of a kernel");
}

#else

struct Stream {
  std::vector<emulator::GlobalMemory> memory;  // all that the kernels may touch
  uint64_t seed = 0;                           // of the order in which threads run
};

template <typename Kernel>
void launch(Grid grid, const typename Kernel::Params& params, const Stream& stream) {
  emulator::Launch where;
  where.grid[0] = grid.x;
  where.grid[1] = grid.y;
  where.grid[2] = grid.z;
  where.threads = Kernel::threads;
  where.shared_bytes = Kernel::shared_bytes;
  where.memory = stream.memory;
  const emulator::Report report = emulator::launch(
      where, [](const void* p) { Kernel::run(*static_cast<const typename Kernel::Params*>(p)); }, &params, {stream.seed});
  if (!report.ok()) throw std::runtime_error(report.kind + ": " + report.message);
}

#endif

}  // namespace bigmodel::cuda
