// mbarrier (sm_90): a barrier in shared memory that counts arrivals of threads and bytes of the copy engine.
//
// A phase completes when all arrivals have come and all expected bytes with them. Phases alternate in parity, 0 first: whoever
// keeps count waits for parity (phase & 1). A thread that waits for parity 1 of a fresh barrier does not wait: the phase "before
// the first" counts as complete, which is how a producer finds its buffers empty at the start.
#pragma once
#include "arch/cuda.cuh"

namespace bigmodel::cuda {

inline constexpr int mbarrier_bytes = 8;

// By one thread; the others may use it after fence_mbarrier_init and a barrier.
BM_DEVICE void mbarrier_init(SharedAddress barrier, int arrivals) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#else
  emulator::mbarrier_init(barrier, arrivals);
#endif
}

// Makes initialised barriers known to the copy engine.
BM_DEVICE void fence_mbarrier_init() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

BM_DEVICE void mbarrier_arrive(SharedAddress barrier) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
  emulator::mbarrier_arrive(barrier, 0);
#endif
}

// Arrives, and adds bytes that the phase has to wait for.
BM_DEVICE void mbarrier_arrive_expect(SharedAddress barrier, int bytes) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
  emulator::mbarrier_arrive(barrier, bytes);
#endif
}

BM_DEVICE void mbarrier_wait(SharedAddress barrier, int parity) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(barrier), "r"(parity) : "memory");
#else
  emulator::mbarrier_wait(barrier, parity);
#endif
}

// Which of a ring of `stages` is next, and the parity in which its barrier completes; kept by addition, as a division for each step of a
// loop would keep the instruction unit from the products.
template <int stages>
struct Ring {
  int stage = 0, parity = 0;
  BM_DEVICE void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  BM_DEVICE void advance(int steps) {
    stage += steps;
    parity ^= stage / stages & 1;
    stage %= stages;
  }
};

}  // namespace bigmodel::cuda
