// The tile unit (AMX, Sapphire Rapids and later): eight registers of 16 rows of 64 bytes, and a product of bf16 pairs that adds to a tile
// of float32, C (16 x 16) += A (16 x 32) B (32 x 16), with 16 times the arithmetic of an AVX-512 instruction.
//
// A is row by row, a row's 32 columns in 64 bytes; B is in pairs along k, as a packed weight has them (gemm/gemm.h).
#pragma once
#include <immintrin.h>

#include <cstdint>

#if defined(BIGMODEL_SIMDE)
#include "amx_emulated.h"
#endif

namespace bigmodel::BIGMODEL_ISA {

// The unit is set up while this lives, in this thread: whole registers.
struct TileUnit {
  TileUnit() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t row_count[16] = {};
    } config;
    for (int i = 0; i < 8; i++) {
      config.row_bytes[i] = 64;
      config.row_count[i] = 16;
    }
    asm volatile("" ::"r"(&config) : "memory");  // the intrinsic says that it reads the first eight bytes only
    _tile_loadconfig(&config);
  }
  ~TileUnit() { _tile_release(); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

}  // namespace bigmodel::BIGMODEL_ISA
