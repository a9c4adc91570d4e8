// wgmma (sm_90a): a warpgroup multiplies A (64 x 16) by B (16 x N) and adds to C (64 x N), 16-bit in and float32 out.
//
// B is read from shared memory through a descriptor, A from shared memory or from registers. Warp w of the group holds rows 16 w to
// 16 w + 15 of C and of A, as mma.m16n8k16 has them (PTX ISA, "Register fragments and shared memory matrix layouts" of wgmma): lane
// 4 g + t has C[j][0, 1] = row g, columns 8 j + 2 t and + 1; C[j][2, 3] = row g + 8.
//
// The instruction runs by itself: wgmma_fence before the first, wgmma_commit after the last of a group, wgmma_wait before C, or
// the registers of A, are touched or the tiles in shared memory overwritten.
#pragma once
#include "arch/number.cuh"
#include "arch/swizzle.cuh"

namespace bigmodel::cuda {

// A tile in shared memory as wgmma takes it (PTX ISA, "Matrix descriptor"): start, leading and stride byte offsets in units of 16, and
// the swizzle, 1 for 128 and 2 for 64 bytes.
//   K-major  (rows of the tile are M or N, its columns K): stride = bytes between groups of eight rows; leading is not used.
//   MN-major (rows of the tile are K, its columns M or N): stride = bytes between groups of eight rows, leading = between panels.
template <typename Tile>
BM_DEVICE uint64_t wgmma_descriptor(SharedAddress address) {
  constexpr uint64_t swizzle = Tile::panel_columns == 64 ? 1 : 2, stride = 8 * Tile::panel_columns * 2, leading = Tile::panel_bytes;
  return uint64_t(address >> 4 & 0x3fff) | leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62;
}

// The same `bytes` further on. A block's addresses have 18 bits, so that nothing is carried out of the start's field.
BM_DEVICE uint64_t further(uint64_t descriptor, int bytes) { return (descriptor >> 32 << 32) | (uint32_t(descriptor) + uint32_t(bytes >> 4)); }

// From the first step's descriptor on, steps take half the instructions; but ptxas then keeps some, and kernels without a register to
// spare spill.
// Of step `step` (16 columns) of the K-major tile's rows from `row`, a multiple of 8.
template <typename Tile, bool from_first = false>
BM_DEVICE uint64_t k_major(SharedAddress tile, int row, int step) {
  constexpr int steps = Tile::panel_columns / 16;
  if constexpr (from_first) return further(wgmma_descriptor<Tile>(tile + row * Tile::panel_columns * 2), step / steps * Tile::panel_bytes + step % steps * 32);
  return wgmma_descriptor<Tile>(tile + step / steps * Tile::panel_bytes + row * Tile::panel_columns * 2 + step % steps * 32);
}
// Of step `step` (16 rows) of the MN-major tile.
template <typename Tile, bool from_first = false>
BM_DEVICE uint64_t mn_major(SharedAddress tile, int step) {
  if constexpr (from_first) return further(wgmma_descriptor<Tile>(tile), step * 16 * Tile::panel_columns * 2);
  return wgmma_descriptor<Tile>(tile + step * 16 * Tile::panel_columns * 2);
}

#if !defined(__CUDACC__)
namespace host {

// Address of element (mn, k) of the 64- or N-by-16 matrix that a descriptor describes.
inline SharedAddress descriptor_address(uint64_t descriptor, bool mn_major, int mn, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, leading = uint32_t(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) << 4, mode = uint32_t(descriptor >> 62);
  const uint32_t row_bytes = mode == 1 ? 128 : mode == 2 ? 64 : 32, columns = row_bytes / 2;
  const uint32_t row = uint32_t(mn_major ? k : mn), column = uint32_t(mn_major ? mn : k);
  const uint32_t address = start + row / 8 * stride + row % 8 * row_bytes + column / columns * leading + column % columns * 2;
  return address ^ ((address >> 7 & (mode == 1 ? 7 : mode == 2 ? 3 : 1)) << 4);
}

struct WgmmaArguments {
  float* c;
  const uint32_t* a;   // registers, or null: a_descriptor
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};

// One warp's 16 rows. The products of a warpgroup's warps do not depend on each other.
template <typename T, int n, bool b_mn_major>
inline void wgmma(void* const* lanes) {
  static thread_local float a[16][16], b[16][n];
  const WgmmaArguments& first = *static_cast<WgmmaArguments*>(lanes[0]);
  const int warp_row = emulator::thread_index() / warp_size % 4 * 16;
  const char* memory = emulator::shared_memory();
  const auto element = [memory](SharedAddress address) {
    T value;
    std::memcpy(&value, memory + address, 2);
    return to_float(value);
  };
  if (first.a == nullptr) {
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < 16; k++) {
        const SharedAddress address = descriptor_address(first.a_descriptor, false, warp_row + row, k);
        if (k % 8 == 0) emulator::wgmma_read(address, 16, "wgmma (A)");
        a[row][k] = element(address);
      }
  } else {
    for (int lane = 0; lane < warp_size; lane++)
      for (int r = 0; r < 4; r++)
        for (int e = 0; e < 2; e++)
          a[lane / 4 + 8 * (r % 2)][2 * (lane % 4) + 8 * (r / 2) + e] =
              to_float(T{uint16_t(static_cast<WgmmaArguments*>(lanes[lane])->a[r] >> (16 * e))});
  }
  for (int k = 0; k < 16; k++)
    for (int column = 0; column < n; column++) {
      const SharedAddress address = descriptor_address(first.b_descriptor, b_mn_major, column, k);
      if ((b_mn_major ? column : k) % 8 == 0) emulator::wgmma_read(address, 16, "wgmma (B)");
      b[k][column] = element(address);
    }
  for (int lane = 0; lane < warp_size; lane++) {
    const WgmmaArguments& m = *static_cast<WgmmaArguments*>(lanes[lane]);
    float* c = emulator::wgmma_result(lane, m.c, n / 2);
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < n / 8; j++)
      for (int e = 0; e < 4; e++) {
        double sum = m.accumulate ? c[4 * j + e] : 0;  // products are exact in float; the order of summation is not documented
        for (int k = 0; k < 16; k++) sum += double(a[g + e / 2 * 8][k]) * double(b[k][8 * j + 2 * t + e % 2]);
        c[4 * j + e] = float(sum);
      }
  }
}

}  // namespace host
#endif

BM_DEVICE void wgmma_fence() {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_fence();
#endif
}
BM_DEVICE void wgmma_commit() {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_commit();
#endif
}
// Until at most `groups` of the latest groups are under way.
template <int groups>
BM_DEVICE void wgmma_wait() {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
#else
  emulator::wgmma_wait(groups);
#endif
}

// More registers for this warpgroup (consumers), or fewer (producer); all four warps say so.
template <int registers>
BM_DEVICE void raise_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}
template <int registers>
BM_DEVICE void lower_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

#if defined(__CUDACC__)

// PTX names every register of C, so each N has a spelling of its own, put together from pieces of 16 registers: BM_P0 are the
// placeholders of registers 0 to 15, BM_C(i) their constraints. The operands after C have the numbers given for each N below.
#define BM_P0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define BM_P1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BM_P2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define BM_P3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BM_P4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define BM_P5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define BM_P6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define BM_P7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define BM_C4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define BM_C(b) BM_C4(4 * b), BM_C4(4 * b + 1), BM_C4(4 * b + 2), BM_C4(4 * b + 3)
#define BM_REGISTERS_32 BM_P0
#define BM_REGISTERS_64 BM_P0 ", " BM_P1
#define BM_REGISTERS_96 BM_REGISTERS_64 ", " BM_P2
#define BM_REGISTERS_128 BM_REGISTERS_96 ", " BM_P3
#define BM_REGISTERS_192 BM_REGISTERS_128 ", " BM_P4 ", " BM_P5
#define BM_REGISTERS_256 BM_REGISTERS_192 ", " BM_P6 ", " BM_P7
#define BM_CONSTRAINTS_32 BM_C(0)
#define BM_CONSTRAINTS_64 BM_C(0), BM_C(1)
#define BM_CONSTRAINTS_96 BM_CONSTRAINTS_64, BM_C(2)
#define BM_CONSTRAINTS_128 BM_CONSTRAINTS_96, BM_C(3)
#define BM_CONSTRAINTS_192 BM_CONSTRAINTS_128, BM_C(4), BM_C(5)
#define BM_CONSTRAINTS_256 BM_CONSTRAINTS_192, BM_C(6), BM_C(7)
#define BM_WGMMA_SHARED(n, type, a_place, b_place, accumulates, transposed)                                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulates ", 0;\n"                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" BM_REGISTERS_##n "}, " a_place ", " b_place             \
               ", p, 1, 1, 0, " transposed ";\n}"                                                                              \
               : BM_CONSTRAINTS_##n : "l"(a_descriptor), "l"(b_descriptor), "r"(int(accumulate)), "n"(int(b_mn_major)))
#define BM_WGMMA_REGISTERS(n, type, a_place, b_place, accumulates, transposed)                                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulates ", 0;\n"                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" BM_REGISTERS_##n "}, {" a_place "}, " b_place           \
               ", p, 1, 1, " transposed ";\n}"                                                                                 \
               : BM_CONSTRAINTS_##n                                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(int(accumulate)), "n"(int(b_mn_major)))
#define BM_WGMMA_TYPES(form, n, ...)                                                                                           \
  if constexpr (blocks * 8 == n) {                                                                                             \
    if constexpr (__is_same(T, bfloat16)) form(n, "bf16", __VA_ARGS__); else form(n, "f16", __VA_ARGS__);                     \
  }

#endif

// C += A B (C = A B unless accumulate), A from shared memory, K-major.
template <typename T, bool b_mn_major, int blocks>
BM_DEVICE void wgmma(float (&c)[blocks][4], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  static_assert(blocks == 4 || blocks == 8 || blocks == 12 || blocks == 16 || blocks == 24 || blocks == 32, "N is 32, 64, 96, 128, 192 or 256");
#if defined(__CUDACC__)
  BM_WGMMA_TYPES(BM_WGMMA_SHARED, 32, "%16", "%17", "%18", "%19")
  BM_WGMMA_TYPES(BM_WGMMA_SHARED, 64, "%32", "%33", "%34", "%35")
  BM_WGMMA_TYPES(BM_WGMMA_SHARED, 96, "%48", "%49", "%50", "%51")
  BM_WGMMA_TYPES(BM_WGMMA_SHARED, 128, "%64", "%65", "%66", "%67")
  BM_WGMMA_TYPES(BM_WGMMA_SHARED, 192, "%96", "%97", "%98", "%99")
  BM_WGMMA_TYPES(BM_WGMMA_SHARED, 256, "%128", "%129", "%130", "%131")
#else
  host::WgmmaArguments mine{&c[0][0], nullptr, a_descriptor, b_descriptor, accumulate};
  emulator::collective("wgmma", full_warp, &mine, host::wgmma<T, blocks * 8, b_mn_major>);
#endif
}

// The same with A from registers.
template <typename T, bool b_mn_major, int blocks>
BM_DEVICE void wgmma(float (&c)[blocks][4], const uint32_t (&a)[4], uint64_t b_descriptor, bool accumulate) {
  static_assert(blocks == 4 || blocks == 8 || blocks == 12 || blocks == 16 || blocks == 24 || blocks == 32, "N is 32, 64, 96, 128, 192 or 256");
#if defined(__CUDACC__)
  BM_WGMMA_TYPES(BM_WGMMA_REGISTERS, 32, "%16, %17, %18, %19", "%20", "%21", "%22")
  BM_WGMMA_TYPES(BM_WGMMA_REGISTERS, 64, "%32, %33, %34, %35", "%36", "%37", "%38")
  BM_WGMMA_TYPES(BM_WGMMA_REGISTERS, 96, "%48, %49, %50, %51", "%52", "%53", "%54")
  BM_WGMMA_TYPES(BM_WGMMA_REGISTERS, 128, "%64, %65, %66, %67", "%68", "%69", "%70")
  BM_WGMMA_TYPES(BM_WGMMA_REGISTERS, 192, "%96, %97, %98, %99", "%100", "%101", "%102")
  BM_WGMMA_TYPES(BM_WGMMA_REGISTERS, 256, "%128, %129, %130, %131", "%132", "%133", "%134")
#else
  host::WgmmaArguments mine{&c[0][0], a, 0, b_descriptor, accumulate};
  emulator::collective("wgmma", full_warp, &mine, host::wgmma<T, blocks * 8, b_mn_major>);
#endif
}

}  // namespace bigmodel::cuda
