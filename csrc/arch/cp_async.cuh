// cp.async (sm_80): a thread copies 16 bytes from global to shared memory without a register; copies are waited for in groups.
#pragma once
#include "arch/cuda.cuh"

namespace bigmodel::cuda {

// Zeros arrive when not `valid`, and global memory is not read.
BM_DEVICE void copy_async_16(SharedAddress shared, const void* global, bool valid = true) {
#if defined(__CUDACC__)
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(global)), "r"(bytes) : "memory");
#else
  emulator::copy_async(shared, global, 16, valid ? 16 : 0);
#endif
}

BM_DEVICE void copy_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::copy_async_commit();
#endif
}

// Waits until at most `groups` of this thread's latest groups are under way. A barrier makes the data visible to others.
template <int groups>
BM_DEVICE void copy_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#else
  emulator::copy_async_wait(groups);
#endif
}

}  // namespace bigmodel::cuda
