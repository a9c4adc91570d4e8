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
#include "arch/tma.cuh"
#include "arch/warp.cuh"
#include "arch/wgmma.cuh"
#include "attention/schedule.cuh"

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

// Not a word: the order in which a grid's blocks take attention's tiles of queries. Input: batch, heads, query_length, key_length,
// window_left, window_right, whether packed, tiles that a block has room for, then cu_seqlens_q and _k; output: for each block its tiles
// as (batch, head, m_start).
struct ScheduleOrder : Shape<32, 0> {
  static constexpr int tile_m = 128, tile_n = 64;
  static BM_DEVICE void run(const WordParams& word) {
    const int32_t* input = reinterpret_cast<const int32_t*>(word.input);
    AttentionParams p = {};
    p.batch = load_global(input);
    p.heads = load_global(input + 1);
    p.query_length = load_global(input + 2);
    p.key_length = load_global(input + 3);
    p.window_left = load_global(input + 4);
    p.window_right = load_global(input + 5);
    if (load_global(input + 6)) {
      p.cu_seqlens_q = input + 8;
      p.cu_seqlens_k = input + 8 + p.batch + 1;
    }
    const int room = load_global(input + 7);
    LongestFirst<tile_m, tile_n> order(p);
    WorkTile tile;
    for (int round = 0; round < room && order.next(round, tile); round++) {
      if (lane_index() > 0) continue;
      uint32_t* at = word.output + (block_x() * room + round) * 3;
      store_global(at, uint32_t(tile.batch));
      store_global(at + 1, uint32_t(tile.head));
      store_global(at + 2, uint32_t(tile.m_start));
    }
  }
};

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

template <bool transposed>
struct StmatrixWord : Shape<32, 512> {  // input: 4 registers of each lane; output: 4 matrices of 8 x 8 halves
  static BM_DEVICE void run(const WordParams& p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const int lane = lane_index();
    uint32_t s[4];
    for (int i = 0; i < 4; i++) s[i] = load_global(p.input + lane * 4 + i);
    if constexpr (transposed)
      stmatrix_transposed(shared_start() + lane * 16, s);
    else
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

struct CountWord : Shape<32, 0> {  // input: where to start; output: 32 numbers of one lane, then what a count of all lanes leaves and adds up to
  static BM_DEVICE void run(const WordParams& p) {
    uint32_t *alone = p.output + 32, *together = p.output + 33;
    if (lane_index() == 0) {
      store_global(alone, load_global(p.input) % 8);
      for (int i = 0; i < 32; i++) store_global(p.output + i, count_global(alone, 5));
      store_global(together, 0u);
    }
    sync_warp();
    uint32_t sum = count_global(together, 31);
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane_index() == 0) store_global(p.output + 34, sum);
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

#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL))
#define BM_HOPPER 1
#endif

// The first `rows` rows of a row-major matrix into a swizzled tile, by all threads of the block.
template <typename Tile>
BM_DEVICE void fill_tile(SharedAddress tile, const void* matrix, int threads) {
  for (int c = thread_index(); c < Tile::rows * Tile::row_chunks; c += threads)
    store_shared(tile + Tile::offset(c / Tile::row_chunks, c % Tile::row_chunks), load_global(static_cast<const Word<16>*>(matrix) + c));
}

// C (64 x n) = A (64 x 64) B^T, B (n x 64) row by row: both K-major. Or, transposed, C = A B with B (64 x n) row by row: MN-major.
// input: A, then B; output: C's registers of each thread.
template <typename Element, int n, bool transposed, bool from_registers>
struct WgmmaWord : Shape<128, 64 * 64 * 2 + 64 * n * 2> {
  using TileA = SwizzledTile<64, 64>;
  using TileB = SwizzledTile<transposed ? 64 : n, transposed ? n : 64>;
  static BM_DEVICE void run(const WordParams& p) {
#if defined(BM_HOPPER)
    const SharedAddress a = shared_start(), b = a + TileA::bytes;
    fill_tile<TileA>(a, p.input, 128);
    fill_tile<TileB>(b, p.input + 64 * 64 / 2, 128);
    fence_proxy_async();
    sync_block();
    float c[n / 8][4];
    uint32_t fragment[4][4];
    if constexpr (from_registers)
      for (int k = 0; k < 4; k++) ldmatrix(fragment[k], a + TileA::offset(16 * (thread_index() / 32) + lane_index() % 16, 2 * k + lane_index() / 16));
    wgmma_fence();
    BM_UNROLL
    for (int k = 0; k < 4; k++) {
      uint64_t descriptor;
      if constexpr (transposed)
        descriptor = mn_major<TileB>(b, k);
      else
        descriptor = k_major<TileB>(b, 0, k);
      if constexpr (from_registers)
        wgmma<Element, transposed>(c, fragment[k], descriptor, k > 0);
      else
        wgmma<Element, transposed>(c, k_major<TileA>(a, 0, k), descriptor, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    BM_UNROLL
    for (int j = 0; j < n / 8; j++)
      BM_UNROLL
      for (int e = 0; e < 4; e++) store_global(reinterpret_cast<float*>(p.output) + thread_index() * (n / 2) + 4 * j + e, c[j][e]);
#endif
  }
};

struct TmaParams {
  TensorMap map;
  uint32_t* output;
  int coordinate[4];
};

// A box of 64 rows and `columns` columns by the copy engine; output: the tile's bytes as they lie.
template <int columns>
struct TmaWord {
  using Params = TmaParams;
  using Tile = SwizzledTile<64, columns>;
  static constexpr int threads = 32, blocks_per_multiprocessor = 1, shared_bytes = Tile::bytes + 16;
  static BM_DEVICE void run(const TmaParams& p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const SharedAddress tile = shared_start(), barrier = tile + Tile::bytes;
    if (lane_index() == 0) {
      mbarrier_init(barrier, 1);
      fence_mbarrier_init();
      mbarrier_arrive_expect(barrier, Tile::bytes);
      tma_load(tile, p.map, barrier, p.coordinate[0], p.coordinate[1], p.coordinate[2], p.coordinate[3]);
    }
    sync_warp();
    mbarrier_wait(barrier, 0);
    for (int i = lane_index(); i < Tile::bytes / 4; i += 32) store_global(p.output + i, load_shared<uint32_t>(tile + 4 * i));
#endif
  }
};

struct BulkAddWord : Shape<32, 512> {  // input: two times 128 floats; output: 128, to which both are added
  static BM_DEVICE void run(const WordParams& p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    for (int turn = 0; turn < 2; turn++) {
      store_shared(shared_start() + lane_index() * 16, load_global(reinterpret_cast<const Word<16>*>(p.input) + 32 * turn + lane_index()));
      fence_proxy_async();
      sync_warp();
      if (lane_index() == 0) {
        bulk_add(reinterpret_cast<float*>(p.output), shared_start(), 512);
        bulk_commit();
        bulk_wait();  // one after the other, so that the sum has an order
      }
      sync_warp();
    }
#endif
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

struct MissingProxyFence : Shape<128, 2 * 64 * 64 * 2> {  // proxy fence: ordinary stores, then wgmma
  using Tile = SwizzledTile<64, 64>;
  static BM_DEVICE void run(const WordParams& p) {
    fill_tile<Tile>(shared_start(), p.input, 128);
    fill_tile<Tile>(shared_start() + Tile::bytes, p.input, 128);
    sync_block();
    float c[8][4];
    wgmma_fence();
    wgmma<bfloat16, false>(c, k_major<Tile>(shared_start(), 0, 0), k_major<Tile>(shared_start() + Tile::bytes, 0, 0), false);
    wgmma_commit();
    wgmma_wait<0>();
  }
};

struct OverwrittenUnderWgmma : Shape<128, 2 * 64 * 64 * 2> {  // race: the tile is filled again before the wait
  using Tile = SwizzledTile<64, 64>;
  static BM_DEVICE void run(const WordParams& p) {
    fill_tile<Tile>(shared_start(), p.input, 128);
    fill_tile<Tile>(shared_start() + Tile::bytes, p.input, 128);
    fence_proxy_async();
    sync_block();
    float c[8][4];
    wgmma_fence();
    wgmma<bfloat16, false>(c, k_major<Tile>(shared_start(), 0, 0), k_major<Tile>(shared_start() + Tile::bytes, 0, 0), false);
    wgmma_commit();
    sync_block();
    fill_tile<Tile>(shared_start() + Tile::bytes, p.input, 128);
    wgmma_wait<0>();
  }
};

struct OverwrittenUnderBulkAdd : Shape<32, 512> {  // race: the copy engine may not have read yet
  static BM_DEVICE void run(const WordParams& p) {
    const SharedAddress mine = shared_start() + lane_index() * 16;
    store_shared(mine, Word<16>{});
    fence_proxy_async();
    sync_warp();
    if (lane_index() == 0) {
      bulk_add(reinterpret_cast<float*>(p.output), shared_start(), 128);
      bulk_commit();
    }
    sync_warp();
    store_shared(mine, Word<16>{});
    bulk_wait_read();
  }
};

struct MbarrierNeverCompleted : Shape<32, 16> {  // deadlock: one arrival is missing
  static BM_DEVICE void run(const WordParams&) {
    if (lane_index() == 0) mbarrier_init(shared_start(), 2);
    sync_warp();
    if (lane_index() == 0) mbarrier_arrive(shared_start());
    mbarrier_wait(shared_start(), 0);
  }
};

struct TmaNotWaitedFor : TmaWord<64> {  // race: the copy engine is still writing
  static BM_DEVICE void run(const TmaParams& p) {
    const SharedAddress tile = shared_start(), barrier = tile + Tile::bytes;
    if (lane_index() == 0) {
      mbarrier_init(barrier, 1);
      mbarrier_arrive_expect(barrier, Tile::bytes);
      tma_load(tile, p.map, barrier, 0, 0, 0, 0);
    }
    sync_warp();
    store_global(p.output + lane_index(), load_shared<uint32_t>(tile + 4 * lane_index()));
  }
};

}  // namespace bigmodel::cuda::testing
