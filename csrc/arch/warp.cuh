// Threads of a warp, and of a block, together: shuffles and barriers.
#pragma once
#include "arch/cuda.cuh"

namespace bigmodel::cuda {

// The value of the lane whose number differs by `mask`.
template <typename T>
BM_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4, "a shuffle moves one register");
#if defined(__CUDACC__)
  return __shfl_xor_sync(full_warp, value, mask);
#else
  struct Arguments { T value, result; int mask; } mine{value, value, mask};
  emulator::collective("shfl.sync.bfly", full_warp, &mine, [](void* const* lanes) {
    for (int i = 0; i < warp_size; i++) {
      Arguments& a = *static_cast<Arguments*>(lanes[i]);
      a.result = static_cast<Arguments*>(lanes[(i ^ a.mask) & 31])->value;
    }
  });
  return mine.result;
#endif
}

// The value of the lane `source`.
template <typename T>
BM_DEVICE T shuffle(T value, int source) {
  static_assert(sizeof(T) == 4, "a shuffle moves one register");
#if defined(__CUDACC__)
  return __shfl_sync(full_warp, value, source);
#else
  struct Arguments { T value, result; int source; } mine{value, value, source};
  emulator::collective("shfl.sync.idx", full_warp, &mine, [](void* const* lanes) {
    for (int i = 0; i < warp_size; i++) {
      Arguments& a = *static_cast<Arguments*>(lanes[i]);
      a.result = static_cast<Arguments*>(lanes[a.source & 31])->value;
    }
  });
  return mine.result;
#endif
}

BM_DEVICE void sync_warp() {
#if defined(__CUDACC__)
  __syncwarp();
#else
  emulator::sync_warp(full_warp);
#endif
}

// The number of this thread's warp, the same register in all its lanes for the compiler.
BM_DEVICE int warp_index() {
#if defined(__CUDACC__)
  return __shfl_sync(full_warp, thread_index() / warp_size, 0);
#else
  return thread_index() / warp_size;
#endif
}

BM_DEVICE void sync_block() {
#if defined(__CUDACC__)
  __syncthreads();
#else
  emulator::named_barrier(0, emulator::block_size(), true, "bar.sync");
#endif
}

// Barrier `id` (1 to 15; 0 is sync_block's) for `threads` threads, whole warps: wait for all, or only say that one has come.
BM_DEVICE void sync_named(int id, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::named_barrier(id, threads, true, "bar.sync");
#endif
}
BM_DEVICE void arrive_named(int id, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::named_barrier(id, threads, false, "bar.arrive");
#endif
}

}  // namespace bigmodel::cuda
