// For the test build only: the tile unit on any CPU, after the operation sections of Intel's instruction set reference. Stricter than the
// unit where that is kinder: whole registers only, and none before the unit is set up.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace bigmodel::BIGMODEL_ISA::emulated {

struct Tile { uint32_t word[16][16]; };
struct Tiles {
  bool ready = false;
  Tile tile[8];
};
inline Tiles& tiles() {
  static thread_local Tiles all;
  return all;
}
inline Tile& tile(int number) {
  if (tiles().ready) return tiles().tile[number];
  fprintf(stderr, "tile register %d before _tile_loadconfig\n", number);
  abort();
}

inline void tile_loadconfig(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  for (int i = 0; i < 8; i++) {
    uint16_t row_bytes;
    memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    if (bytes[0] != 1 || row_bytes != 64 || bytes[48 + i] != 16) {
      fprintf(stderr, "tile register %d is set up as %d rows of %d bytes\n", i, bytes[48 + i], row_bytes);
      abort();
    }
  }
  tiles() = {};
  tiles().ready = true;
}
inline void tile_release() { tiles().ready = false; }
inline void tile_zero(int number) { tile(number) = {}; }
inline void tile_loadd(int number, const void* from, int64_t stride) {
  for (int row = 0; row < 16; row++) memcpy(tile(number).word[row], static_cast<const char*>(from) + row * stride, 64);
}
inline void tile_stored(int number, void* to, int64_t stride) {
  for (int row = 0; row < 16; row++) memcpy(static_cast<char*>(to) + row * stride, tile(number).word[row], 64);
}

// Subnormal numbers are zero, going in and coming out.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x; }
inline float element(uint32_t word, int which) {
  const uint32_t bits = which ? word & 0xffff0000u : word << 16;
  float x;
  memcpy(&x, &bits, 4);
  return flushed(x);
}
// The even and the odd elements of k are summed apart, and together added to C.
inline void tile_dpbf16ps(int c, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      float sum[2] = {};
      for (int k = 0; k < 16; k++)
        for (int i = 0; i < 2; i++) sum[i] = flushed(std::fma(element(tile(a).word[m][k], i), element(tile(b).word[k][n], i), sum[i]));
      float total;
      memcpy(&total, &tile(c).word[m][n], 4);
      total = flushed(flushed(total) + flushed(sum[0] + sum[1]));
      memcpy(&tile(c).word[m][n], &total, 4);
    }
}

}  // namespace bigmodel::BIGMODEL_ISA::emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_zero
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_dpbf16ps emulated::tile_dpbf16ps
