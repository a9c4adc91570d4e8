// Runs CUDA thread blocks on the CPU, to test kernels where no GPU is at hand and to see what a GPU does not show.
//
// Each thread is a fiber. What one thread does alone (arithmetic, loads, stores) runs as plain C++; the words of csrc/arch that
// several threads do together, or that a hardware unit does by itself, come here. Beside the data, a shadow of shared memory
// remembers who wrote and who read each two bytes and when, in vector clocks (as in FastTrack, Flanagan and Freund, PLDI 2009),
// so that an access that no barrier orders is reported although it happened to go well. Reports:
//
//   deadlock         no thread can go on; says who waits where
//   race             a read or a write of shared memory that nothing orders after the other access
//   uninitialised    a read of shared memory that nobody wrote
//   proxy fence      a tensor core or the copy engine reads what ordinary stores wrote with no fence.proxy.async after them
//   out of bounds    of shared memory, or of global memory that the launch was told of
//   divergence       threads of a warp at different words that they have to do together
//   misaligned       an address that the word does not take
//
// Not modelled: time, bank conflicts, the number of registers, relaxed memory in global memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace bigmodel::emulator {

struct Options {
  // 0: blocks and threads take turns and copies arrive as late as they may. Other seeds: any order, any time.
  uint64_t seed = 0;
};

struct GlobalMemory {  // what a kernel may touch
  const void* begin;
  size_t bytes;
  bool writable;
};

struct Launch {
  int grid[3] = {1, 1, 1};
  int threads = 32;
  size_t shared_bytes = 0;
  std::vector<GlobalMemory> memory;  // empty: anything goes
};

struct Report {
  std::string kind;     // of the first thing that went wrong, or empty
  std::string message;
  bool ok() const { return kind.empty(); }
};

Report launch(const Launch& launch, void (*kernel)(const void* params), const void* params, const Options& options = {});

// ---- what the words of csrc/arch call, on the running thread ----

int thread_index();
int block_index(int axis);
int grid_size(int axis);
int block_size();

// Reports and ends the block; does not return.
[[noreturn]] void fail(const char* kind, const std::string& message);

void check_global(const void* address, size_t bytes, bool write, const char* word);

char* shared_memory();  // of the block; poisoned with 0xff
// A plain load or store of shared memory: checked, and remembered.
void shared_read(uint32_t address, uint32_t bytes, const char* word);
void shared_write(uint32_t address, uint32_t bytes, const char* word);

// All threads of `mask` in the warp come here, each with its arguments; the last one runs execute over all of them (by lane; null
// where the mask has none).
void collective(const char* word, uint32_t mask, void* arguments, void (*execute)(void* const* lanes));
void sync_warp(uint32_t mask);

void named_barrier(int id, int threads, bool wait, const char* word);  // bar.sync and bar.arrive

// cp.async: a copy of the running thread into shared memory that lands when its group is waited for.
void copy_async(uint32_t shared, const void* global, uint32_t bytes, uint32_t valid_bytes);
void copy_async_commit();
void copy_async_wait(int groups_left);

void proxy_fence();

void mbarrier_init(uint32_t barrier, int arrivals);
void mbarrier_arrive(uint32_t barrier, int64_t expected_bytes);  // 0: a plain arrival
void mbarrier_expect(uint32_t barrier, int64_t bytes);
void mbarrier_wait(uint32_t barrier, int parity);
bool mbarrier_test(uint32_t barrier, int parity);

struct TensorMap {          // the fields of cuTensorMapEncodeTiled, innermost dimension first
  char* base = nullptr;
  int rank = 0, element_bytes = 0;
  int64_t size[5] = {}, stride_bytes[5] = {};  // stride_bytes[0] is element_bytes
  int box[5] = {};
  int swizzle_bytes = 0;    // 0, 32, 64 or 128
  bool fill_nan = false;    // what is read outside: zero or NaN
};
void tma_load(uint32_t shared, const TensorMap& map, const int* coordinates, uint32_t barrier);
void tma_store(const TensorMap& map, const int* coordinates, uint32_t shared, bool add);
void bulk_add(float* global, uint32_t shared, uint32_t bytes);  // in the groups of the stores
void tma_commit();
void tma_wait(int groups_left, bool read_only);

// wgmma: what it reads stays in use, and where it writes holds NaN, until its group is waited for.
void wgmma_fence();
void wgmma_read(uint32_t address, uint32_t bytes, const char* word);
float* wgmma_result(int lane, float* c, int count);  // of that lane of the running thread's warp
void wgmma_commit();
void wgmma_wait(int groups_left);

}  // namespace bigmodel::emulator
