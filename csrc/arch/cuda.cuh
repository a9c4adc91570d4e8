// The vocabulary that CUDA kernels here are written in. Each word has two bodies: inline PTX or a builtin under nvcc, and plain
// C++ in which csrc/emulator moves the same fragments between the same threads, so that one kernel source runs on both.
//
// This file: threads and blocks, and loads and stores. Beside it, one file for each instruction family.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define BM_DEVICE __device__ __forceinline__
#define BM_UNROLL _Pragma("unroll")
#define BM_PRAGMA(text) _Pragma(#text)
#define BM_UNROLL_BY(count) BM_PRAGMA(unroll count)
#else
#include "emulator/emulator.h"
#define BM_DEVICE inline
#define BM_UNROLL
#define BM_UNROLL_BY(count)
#endif

namespace bigmodel::cuda {

inline constexpr int warp_size = 32;
inline constexpr uint32_t full_warp = 0xffffffffu;

// An address in the block's shared memory, in bytes from its start, as PTX's .shared instructions take it.
using SharedAddress = uint32_t;

#if defined(__CUDACC__)

BM_DEVICE int thread_index() { return int(threadIdx.x); }
BM_DEVICE int block_x() { return int(blockIdx.x); }
BM_DEVICE int block_y() { return int(blockIdx.y); }
BM_DEVICE int block_z() { return int(blockIdx.z); }
BM_DEVICE int grid_x() { return int(gridDim.x); }

// Where dynamic shared memory starts.
BM_DEVICE SharedAddress shared_start() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return SharedAddress(__cvta_generic_to_shared(memory));
}

#else

BM_DEVICE int thread_index() { return emulator::thread_index(); }
BM_DEVICE int block_x() { return emulator::block_index(0); }
BM_DEVICE int block_y() { return emulator::block_index(1); }
BM_DEVICE int block_z() { return emulator::block_index(2); }
BM_DEVICE int grid_x() { return emulator::grid_size(0); }
BM_DEVICE SharedAddress shared_start() { return 0; }

#endif

BM_DEVICE int lane_index() { return thread_index() % warp_size; }

// x, of which the compiler knows nothing. What depends on it is computed here, each time around a loop, and not before the loop, where
// it would take registers from all that comes between.
template <typename T>
BM_DEVICE T anew(T x) {
  static_assert(sizeof(T) == 4, "one register");
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// 2, 4, 8 and 16 bytes that one thread moves at once.
template <int bytes> struct Word;
template <> struct Word<2> { uint16_t value; };
template <> struct Word<4> { uint32_t value; };
template <> struct alignas(8) Word<8> { uint32_t value[2]; };
template <> struct alignas(16) Word<16> { uint32_t value[4]; };

template <typename T>
BM_DEVICE T load_global(const T* address) {
#if !defined(__CUDACC__)
  emulator::check_global(address, sizeof(T), false, "ld.global");
#endif
  return *address;
}

template <typename T>
BM_DEVICE void store_global(T* address, T value) {
#if !defined(__CUDACC__)
  emulator::check_global(address, sizeof(T), true, "st.global");
#else
  if constexpr (sizeof(T) == 16) {  // at once, which a struct of four words is not always
    uint4 word;
    memcpy(&word, &value, 16);
    *reinterpret_cast<uint4*>(address) = word;
    return;
  }
#endif
  *address = value;
}

// Nothing comes back: the memory's own arithmetic unit adds, in any order.
BM_DEVICE void add_global(float* address, float value) {
#if defined(__CUDACC__)
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "f"(value) : "memory");
#else
  emulator::check_global(address, sizeof(float), true, "red.global.add");
  *address += value;
#endif
}

// Counts up to `last`, then starts again at 0; returns the number before. Releases and acquires for the whole device: what this thread
// has written (and, by a barrier before, its block) is seen by whoever counts after it (and, by a barrier after, by that block).
BM_DEVICE uint32_t count_global(uint32_t* counter, uint32_t last) {
#if defined(__CUDACC__)
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(__cvta_generic_to_global(counter)), "r"(last) : "memory");
  return before;
#else
  emulator::check_global(counter, sizeof(uint32_t), true, "atom.global.inc");
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
#endif
}

template <typename T>
BM_DEVICE T load_shared(SharedAddress address) {
  T value;
#if defined(__CUDACC__)
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "PTX moves 2, 4, 8 or 16 bytes here");
  if constexpr (sizeof(T) == 2) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
    memcpy(&value, &v, 2);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    memcpy(&value, &v, 4);
  } else if constexpr (sizeof(T) == 8) {
    uint32_t v[2];
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
    memcpy(&value, v, 8);
  } else {
    uint32_t v[4];
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
    memcpy(&value, v, 16);
  }
#else
  emulator::shared_read(address, sizeof(T), "ld.shared");
  std::memcpy(&value, emulator::shared_memory() + address, sizeof(T));
#endif
  return value;
}

template <typename T>
BM_DEVICE void store_shared(SharedAddress address, T value) {
#if defined(__CUDACC__)
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "PTX moves 2, 4, 8 or 16 bytes here");
  if constexpr (sizeof(T) == 2) {
    uint16_t v;
    memcpy(&v, &value, 2);
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    memcpy(&v, &value, 4);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    uint32_t v[2];
    memcpy(v, &value, 8);
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v[0]), "r"(v[1]) : "memory");
  } else {
    uint32_t v[4];
    memcpy(v, &value, 16);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
  }
#else
  emulator::shared_write(address, sizeof(T), "st.shared");
  std::memcpy(emulator::shared_memory() + address, &value, sizeof(T));
#endif
}

}  // namespace bigmodel::cuda
