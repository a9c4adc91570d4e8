// mma.sync.m16n8k16 (sm_80): one warp multiplies A (16 x 16) by B (16 x 8) and adds to C (16 x 8), 16-bit in and float32 out.
//
// Where lane l = 4 g + t holds what (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type"):
//   A register 0: row g,     columns 2t, 2t + 1        B register 0: rows 2t, 2t + 1,         column g
//              1: row g + 8, the same                             1: rows 2t + 8, 2t + 9,     column g
//              2: row g,     columns 2t + 8, 2t + 9    C 0, 1: row g, columns 2t, 2t + 1;  C 2, 3: row g + 8, the same
//              3: row g + 8, the same
#pragma once
#include "arch/number.cuh"

namespace bigmodel::cuda {

#if !defined(__CUDACC__)
namespace host {

struct MmaArguments { float* c; const uint32_t* a; const uint32_t* b; };

template <typename T>
inline void mma_m16n8k16(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < warp_size; lane++) {
    const MmaArguments& m = *static_cast<MmaArguments*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; r++)
      for (int e = 0; e < 2; e++) a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + e] = to_float(T{uint16_t(m.a[r] >> (16 * e))});
    for (int r = 0; r < 2; r++)
      for (int e = 0; e < 2; e++) b[2 * t + 8 * r + e][g] = to_float(T{uint16_t(m.b[r] >> (16 * e))});
  }
  for (int lane = 0; lane < warp_size; lane++) {
    const MmaArguments& m = *static_cast<MmaArguments*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 4; e++) {
      // Products of 16-bit numbers are exact in float; the hardware's order of summation is not documented.
      double sum = m.c[e];
      for (int k = 0; k < 16; k++) sum += double(a[g + 8 * (e / 2)][k]) * double(b[k][2 * t + e % 2]);
      m.c[e] = float(sum);
    }
  }
}

}  // namespace host
#endif

template <typename T>
BM_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (__is_same(T, bfloat16))
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  host::MmaArguments mine{c, a, b};
  emulator::collective("mma.m16n8k16", full_warp, &mine, host::mma_m16n8k16<T>);
#endif
}

}  // namespace bigmodel::cuda
