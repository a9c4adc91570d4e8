// ldmatrix and stmatrix: a warp moves 8 x 8 matrices of 16-bit elements between shared memory and fragments.
//
// Matrix i's row r is the 16 bytes at the address that lane 8 i + r gives. Lane l gets, of row l / 4, the elements 2 (l % 4) and
// 2 (l % 4) + 1 in one register (PTX ISA, "ldmatrix", figure of the fragment layout); transposed, it gets column l / 4.
#pragma once
#include "arch/cuda.cuh"

namespace bigmodel::cuda {

#if !defined(__CUDACC__)
namespace host {

struct MatrixMove { uint32_t* registers; SharedAddress row; };

template <int count, bool transposed>
inline void load_matrices(void* const* lanes) {
  const char* memory = emulator::shared_memory();
  for (int i = 0; i < count; i++)
    for (int lane = 0; lane < warp_size; lane++) {
      uint16_t pair[2];
      for (int e = 0; e < 2; e++) {
        const int row = transposed ? 2 * (lane % 4) + e : lane / 4, column = transposed ? lane / 4 : 2 * (lane % 4) + e;
        std::memcpy(&pair[e], memory + static_cast<MatrixMove*>(lanes[8 * i + row])->row + 2 * column, 2);
      }
      std::memcpy(&static_cast<MatrixMove*>(lanes[lane])->registers[i], pair, 4);
    }
}
template <int count, bool transposed>
inline void store_matrices(void* const* lanes) {
  char* memory = emulator::shared_memory();
  for (int i = 0; i < count; i++)
    for (int lane = 0; lane < warp_size; lane++) {
      uint16_t pair[2];
      std::memcpy(pair, &static_cast<MatrixMove*>(lanes[lane])->registers[i], 4);
      for (int e = 0; e < 2; e++) {
        const int row = transposed ? 2 * (lane % 4) + e : lane / 4, column = transposed ? lane / 4 : 2 * (lane % 4) + e;
        std::memcpy(memory + static_cast<MatrixMove*>(lanes[8 * i + row])->row + 2 * column, &pair[e], 2);
      }
    }
}

}  // namespace host
#endif

// Four matrices (x4) or two (x2); every lane gives a row's address (of x2, lanes 16 to 31 are not looked at).
BM_DEVICE void ldmatrix(uint32_t (&d)[4], SharedAddress row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(row) : "memory");
#else
  emulator::shared_read(row, 16, "ldmatrix");
  host::MatrixMove mine{d, row};
  emulator::collective("ldmatrix.x4", full_warp, &mine, host::load_matrices<4, false>);
#endif
}
BM_DEVICE void ldmatrix_transposed(uint32_t (&d)[4], SharedAddress row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(row) : "memory");
#else
  emulator::shared_read(row, 16, "ldmatrix.trans");
  host::MatrixMove mine{d, row};
  emulator::collective("ldmatrix.x4.trans", full_warp, &mine, host::load_matrices<4, true>);
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
BM_DEVICE void stmatrix(SharedAddress row, uint32_t (&s)[4]) {  // sm_90
#if defined(__CUDACC__)
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(row), "r"(s[0]), "r"(s[1]), "r"(s[2]), "r"(s[3]) : "memory");
#else
  emulator::shared_write(row, 16, "stmatrix");
  host::MatrixMove mine{s, row};
  emulator::collective("stmatrix.x4", full_warp, &mine, host::store_matrices<4, false>);
#endif
}
BM_DEVICE void stmatrix_transposed(SharedAddress row, uint32_t (&s)[4]) {
#if defined(__CUDACC__)
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(row), "r"(s[0]), "r"(s[1]), "r"(s[2]), "r"(s[3]) : "memory");
#else
  emulator::shared_write(row, 16, "stmatrix.trans");
  host::MatrixMove mine{s, row};
  emulator::collective("stmatrix.x4.trans", full_warp, &mine, host::store_matrices<4, true>);
#endif
}
#endif

}  // namespace bigmodel::cuda
