// Small kernels of the tests: every word of csrc/arch by itself, and kernels that are wrong on purpose.
//
// A word's kernel is one warp (or one warpgroup): each thread loads its registers from the input, says the word and stores its
// registers to the output, so that where each element went can be read off, on a GPU as in the emulator.
#pragma once
#include "arch/cp_async.cuh"
#include "arch/ldmatrix.cuh"
#include "arch/mma_sync.cuh"
#include "arch/philox.cuh"
#include "arch/swizzle.cuh"
#include "arch/warp.cuh"

namespace bigmodel::cuda::testing {

struct WordParams {
  const uint32_t* input;
  uint32_t* output;
};

template <int threads_, int shared_bytes_>
struct Shape {
  using Params = WordParams;
  static constexpr int threads = threads_, blocks_per_multiprocessor = 1, shared_bytes = shared_bytes_;
};

// ---- words ----

template <bool transposed>
struct LdmatrixWord : Shape<32, 512> {  // input: 4 matrices of 8 x 8 halves, row by row; output: 4 registers of each lane
  static BM_DEVICE void run(const WordParams& p) {
    const int lane = lane_index();
    const SharedAddress row = shared_start() + lane * 16;
    store_shared(row, load_global(reinterpret_cast<const Word<16>*>(p.input) + lane));
    sync_warp();
    uint32_t d[4];
    if constexpr (transposed)
      ldmatrix_transposed(d, row);
    else
      ldmatrix(d, row);
    for (int i = 0; i < 4; i++) store_global(p.output + lane * 4 + i, d[i]);
  }
};

struct StmatrixWord : Shape<32, 512> {  // input: 4 registers of each lane; output: 4 matrices of 8 x 8 halves
  static BM_DEVICE void run(const WordParams& p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const int lane = lane_index();
    uint32_t s[4];
    for (int i = 0; i < 4; i++) s[i] = load_global(p.input + lane * 4 + i);
    stmatrix(shared_start() + lane * 16, s);
    sync_warp();
    store_global(reinterpret_cast<Word<16>*>(p.output) + lane, load_shared<Word<16>>(shared_start() + lane * 16));
#endif
  }
};

template <typename Element>
struct MmaWord : Shape<32, 0> {  // input: 4 registers of A, 2 of B, 4 of C (float32) of each lane; output: 4 of C
  static BM_DEVICE void run(const WordParams& p) {
    const uint32_t* mine = p.input + lane_index() * 10;
    uint32_t a[4], b[2];
    float c[4];
    for (int i = 0; i < 4; i++) a[i] = load_global(mine + i);
    for (int i = 0; i < 2; i++) b[i] = load_global(mine + 4 + i);
    for (int i = 0; i < 4; i++) c[i] = load_global(reinterpret_cast<const float*>(mine) + 6 + i);
    mma_m16n8k16<Element>(c, a, b);
    for (int i = 0; i < 4; i++) store_global(reinterpret_cast<float*>(p.output) + lane_index() * 4 + i, c[i]);
  }
};

struct ShuffleWord : Shape<32, 0> {  // input: one register of each lane; output: xor 5, and that of lane 31 - l
  static BM_DEVICE void run(const WordParams& p) {
    const int lane = lane_index();
    const uint32_t value = load_global(p.input + lane);
    store_global(p.output + lane, shuffle_xor(value, 5));
    store_global(p.output + 32 + lane, shuffle(value, 31 - lane));
  }
};

struct CopyAsyncWord : Shape<32, 512> {  // input: 512 bytes; output: the same with the odd 16-byte pieces zero
  static BM_DEVICE void run(const WordParams& p) {
    const int lane = lane_index();
    copy_async_16(shared_start() + lane * 16, p.input + lane * 4, lane % 2 == 0);
    copy_async_commit();
    copy_async_wait<0>();
    sync_warp();
    store_global(reinterpret_cast<Word<16>*>(p.output) + (31 - lane), load_shared<Word<16>>(shared_start() + (31 - lane) * 16));
  }
};

struct PhiloxWord : Shape<32, 0> {  // input: counter and key (6 registers) of each lane; output: 4 words
  static BM_DEVICE void run(const WordParams& p) {
    const uint32_t* mine = p.input + lane_index() * 6;
    const PhiloxWords r = philox(load_global(mine), load_global(mine + 1), load_global(mine + 2), load_global(mine + 3),
                                 load_global(mine + 4) | uint64_t(load_global(mine + 5)) << 32);
    for (int i = 0; i < 4; i++) store_global(p.output + lane_index() * 4 + i, r.word[i]);
  }
};

template <typename Element>
struct PackWord : Shape<32, 0> {  // input: two floats of each lane; output: the packed pair
  static BM_DEVICE void run(const WordParams& p) {
    const float* mine = reinterpret_cast<const float*>(p.input) + lane_index() * 2;
    store_global(p.output + lane_index(), pack<Element>(load_global(mine), load_global(mine + 1)));
  }
};

template <int columns>
struct SwizzleWord : Shape<32, 0> {  // output: for 64 rows, the offset of each 16-byte chunk
  static BM_DEVICE void run(const WordParams& p) {
    using Tile = SwizzledTile<64, columns>;
    for (int i = lane_index(); i < Tile::rows * Tile::row_chunks; i += 32)
      store_global(p.output + i, Tile::offset(i / Tile::row_chunks, i % Tile::row_chunks));
  }
};

// ---- kernels that are wrong, and what the emulator has to say of them ----

struct MissingArrival : Shape<64, 256> {  // deadlock: one warp does not come to the barrier
  static BM_DEVICE void run(const WordParams&) {
    if (thread_index() < 32) sync_named(1, 64);
  }
};

struct MissingBarrier : Shape<64, 256> {  // race: the second warp reads what the first wrote
  static BM_DEVICE void run(const WordParams& p) {
    const int thread = thread_index();
    if (thread < 32) store_shared(shared_start() + thread * 4, uint32_t(thread));
    if (thread >= 32) store_global(p.output + thread - 32, load_shared<uint32_t>(shared_start() + (thread - 32) * 4));
  }
};

struct MissingSyncWarp : Shape<32, 128> {  // race: lanes of one warp
  static BM_DEVICE void run(const WordParams& p) {
    const int lane = lane_index();
    store_shared(shared_start() + lane * 4, uint32_t(lane));
    store_global(p.output + lane, load_shared<uint32_t>(shared_start() + (31 - lane) * 4));
  }
};

struct OverwrittenWhileRead : Shape<64, 256> {  // race: the next write does not wait for the readers of the last
  static BM_DEVICE void run(const WordParams& p) {
    const int thread = thread_index();
    if (thread < 32) store_shared(shared_start() + thread * 4, uint32_t(thread));
    sync_block();
    if (thread >= 32) store_global(p.output + thread - 32, load_shared<uint32_t>(shared_start() + (thread - 32) * 4));
    if (thread < 32) store_shared(shared_start() + thread * 4, uint32_t(thread + 1));
  }
};

struct CopyNotWaitedFor : Shape<32, 512> {  // race: the copy is under way
  static BM_DEVICE void run(const WordParams& p) {
    const int lane = lane_index();
    copy_async_16(shared_start() + lane * 16, p.input + lane * 4);
    copy_async_commit();
    sync_block();
    store_global(p.output + lane, load_shared<uint32_t>(shared_start() + lane * 16));
  }
};

struct NeverWritten : Shape<32, 256> {  // uninitialised
  static BM_DEVICE void run(const WordParams& p) {
    const int lane = lane_index();
    if (lane != 7) store_shared(shared_start() + lane * 4, uint32_t(lane));
    sync_warp();
    store_global(p.output + lane, load_shared<uint32_t>(shared_start() + lane * 4));
  }
};

struct PastSharedMemory : Shape<32, 124> {  // out of bounds
  static BM_DEVICE void run(const WordParams&) { store_shared(shared_start() + lane_index() * 4, uint32_t(0)); }
};

struct PastGlobalMemory : Shape<32, 0> {  // out of bounds: one element past the output
  static BM_DEVICE void run(const WordParams& p) { store_global(p.output + lane_index() + 1, uint32_t(0)); }
};

struct WriteToInput : Shape<32, 0> {  // out of bounds: the input is not the kernel's to write
  static BM_DEVICE void run(const WordParams& p) { store_global(const_cast<uint32_t*>(p.input) + lane_index(), uint32_t(0)); }
};

struct DivergentWarp : Shape<32, 0> {  // divergence: half a warp at a shuffle of all
  static BM_DEVICE void run(const WordParams& p) {
    uint32_t value = uint32_t(lane_index());
    if (lane_index() < 16)
      value = shuffle_xor(value, 1);
    else
      sync_warp();
    store_global(p.output + lane_index(), value);
  }
};

}  // namespace bigmodel::cuda::testing
