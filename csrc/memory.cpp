// Memory of large results, kept for the next ones.
//
// A training step makes some hundred tensors of megabytes and frees them all. The C library gives such memory back to the system as soon
// as the end of its heap is free, and the next step takes it again page by page: up to a quarter of a step was spent in page faults. Here a
// freed block waits for the next result of its size.
//
//   slab (64 MB, of 2 MB pages)   | block | block |    block    | ...  not yet used |
//   size of a block               2^k, 9/8 2^k, 10/8 2^k, ... 15/8 2^k: whatever the lengths of sequences, blocks are of few sizes
//   free                          never more than twice what was in use at once (and `least`), for what is freed together need not have been
//                                 in use together; what waited longest goes back to the system
//
// Packed weights stay until their model goes, and a layer's are read one behind the other: so they lie, without gaps, in slabs of their own,
// and memory is asked for across their ends as within them. A freed one's pages go back to the system at once, a slab's address with the last.
//
// Both need torch_from_blob, of torch 2.11; with an older torch, and under AddressSanitizer, which could not see the end of a block, the
// tensors are torch's own.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <vector>

#include "registration.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define BIGMODEL_KEEPS_MEMORY 0
#elif defined(__linux__)
#define BIGMODEL_KEEPS_MEMORY 1
#else
#define BIGMODEL_KEEPS_MEMORY 0
#endif

#if BIGMODEL_KEEPS_MEMORY
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset,
                                                                int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
                                                                int32_t layout, const uint8_t* metadata, int64_t metadata_size,
                                                                void (*deleter)(void* data, void* context), void* context);
#endif

namespace bigmodel {
namespace {

class Blocks;  // of results
class PackedWeights;

constexpr size_t smallest = size_t(256) << 10;  // what is smaller does not make the heap's end move

#if BIGMODEL_KEEPS_MEMORY
struct Slab { char *begin, *end; };

Slab new_slab(size_t least) {
  constexpr size_t slab_bytes = size_t(64) << 20;
  const size_t bytes = (std::max(least, slab_bytes) + huge_page - 1) / huge_page * huge_page;
  char* slab = static_cast<char*>(std::aligned_alloc(huge_page, bytes));
  if (slab == nullptr) return {};
  prefer_huge_pages(slab, bytes);
  return {slab, slab + bytes};
}

// Those that lie in the block with nothing else.
void give_pages_back(void* block, size_t size) {
  const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(block) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(block) + size) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

class Blocks {
 public:
  static size_t rounded(size_t bytes) {
    const size_t step = size_t(1) << (60 - __builtin_clzll(bytes));  // an eighth of the power of two below
    return (bytes + step - 1) / step * step;
  }

  void* take(size_t size) {
    std::lock_guard<std::mutex> guard(lock_);
    in_use_ += size;
    if (in_use_ > most_) most_ = in_use_;
    std::deque<Free>& waiting = free_[size];
    if (!waiting.empty()) {
      void* block = waiting.back().memory;
      if (!waiting.back().empty) held_ -= size;
      waiting.pop_back();
      return block;
    }
    return carve(size);
  }

  void give(void* block, size_t size) {
    std::lock_guard<std::mutex> guard(lock_);
    in_use_ -= size;
    held_ += size;
    free_[size].push_back({block, ++clock_, false});
    while (held_ > std::max(2 * most_, least)) drop_oldest();
    // What is needed at once may become less: halfway to it whenever all is free.
    if (in_use_ == 0) most_ -= (most_ - std::min(most_, recent_)) / 2, recent_ = 0;
    if (in_use_ > recent_) recent_ = in_use_;
  }

  // All that waits, in bytes.
  size_t release() {
    std::lock_guard<std::mutex> guard(lock_);
    const size_t bytes = held_;
    while (held_ > 0) drop_oldest();
    most_ = recent_ = in_use_;
    return bytes;
  }

  std::mutex& lock() { return lock_; }

 private:
  static constexpr size_t least = size_t(64) << 20;
  struct Free {
    void* memory;
    uint64_t since;
    bool empty;  // its pages have gone back to the system
  };

  void* carve(size_t size) {
    if (size > size_t(end_ - begin_)) {
      const Slab slab = new_slab(size);
      if (slab.begin == nullptr) return nullptr;
      begin_ = slab.begin;
      end_ = slab.end;
    }
    char* block = begin_;
    begin_ += size;
    return block;
  }

  void drop_oldest() {
    std::deque<Free>* oldest = nullptr;
    size_t size = 0, place = 0;
    for (auto& [bytes, waiting] : free_)
      for (size_t i = 0; i < waiting.size(); i++)  // the first with pages is the oldest of its size
        if (!waiting[i].empty) {
          if (oldest == nullptr || waiting[i].since < (*oldest)[place].since) oldest = &waiting, size = bytes, place = i;
          break;
        }
    Free& block = (*oldest)[place];
    give_pages_back(block.memory, size);
    block.empty = true;
    held_ -= size;
  }

  std::mutex lock_;
  std::map<size_t, std::deque<Free>> free_;
  char *begin_ = nullptr, *end_ = nullptr;  // of the slab, what is not yet used
  size_t in_use_ = 0, most_ = 0, recent_ = 0, held_ = 0;
  uint64_t clock_ = 0;
};

class PackedWeights {
 public:
  // To pairs of cache lines, as the header is.
  static size_t rounded(size_t bytes) { return (bytes + sizeof(PackedHeader) - 1) / sizeof(PackedHeader) * sizeof(PackedHeader); }

  void* take(size_t size) {
    std::lock_guard<std::mutex> guard(lock_);
    if (size > size_t(end_ - next_)) {
      const Slab slab = new_slab(size);
      if (slab.begin == nullptr) return nullptr;
      last_ = next_ = slab.begin;
      end_ = slab.end;
    }
    slabs_[last_]++;
    char* block = next_;
    next_ += size;
    return block;
  }

  void give(void* block, size_t size) {
    std::lock_guard<std::mutex> guard(lock_);
    give_pages_back(block, size);
    const auto slab = std::prev(slabs_.upper_bound(static_cast<char*>(block)));
    if (--slab->second > 0) return;
    if (slab->first == last_) last_ = next_ = end_ = nullptr;
    std::free(slab->first);
    slabs_.erase(slab);
  }

  std::mutex& lock() { return lock_; }

 private:
  std::mutex lock_;
  std::map<char*, int64_t> slabs_;                           // by their beginnings, with the weights that each has
  char *last_ = nullptr, *next_ = nullptr, *end_ = nullptr;  // the last slab, and what of it is not yet used
};

// Never destroyed: tensors may outlive everything. A child of fork() finds it unlocked.
template <class Kept>
Kept& instance() {
  static Kept* const made = [] {
    static Kept* kept = new Kept;
    pthread_atfork([] { kept->lock().lock(); }, [] { kept->lock().unlock(); }, [] { kept->lock().unlock(); });
    return kept;
  }();
  return *made;
}

// In a block of Kept.
template <class Kept>
Tensor tensor_in(const std::vector<int64_t>& shape, ScalarType dtype, size_t bytes, const char* what) {
  const size_t size = Kept::rounded(bytes);
  void* block = instance<Kept>().take(size);
  STD_TORCH_CHECK(block != nullptr, "out of memory: ", bytes, " bytes for ", what);
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  AtenTensorHandle handle;
  const auto give_back = [](void* memory, void* context) { instance<Kept>().give(memory, reinterpret_cast<size_t>(context)); };
  const AOTITorchError status = torch_from_blob(block, int64_t(shape.size()), shape.data(), strides.data(), 0, int32_t(dtype), aoti_torch_device_type_cpu(), -1,
                                                &handle, aoti_torch_layout_strided(), nullptr, 0, give_back, reinterpret_cast<void*>(size));
  if (status != 0) {
    instance<Kept>().give(block, size);
    STD_TORCH_CHECK(false, "a tensor of ", bytes, " bytes cannot be made");
  }
  return Tensor(handle);
}
#endif

// In memory of Kept if it can be, or else torch's own.
template <class Kept>
Tensor empty_in(const std::vector<int64_t>& shape, ScalarType dtype, size_t bytes, [[maybe_unused]] const char* what) {
#if BIGMODEL_KEEPS_MEMORY
  if (bytes >= smallest && torch_from_blob != nullptr) return tensor_in<Kept>(shape, dtype, bytes, what);
#endif
  Tensor out = torch::stable::empty(shape, dtype);
  if (bytes >= 2 * huge_page) prefer_huge_pages(out.mutable_data_ptr(), bytes);
  return out;
}

int64_t cpu_release_memory() {
#if BIGMODEL_KEEPS_MEMORY
  return int64_t(instance<Blocks>().release());
#else
  return 0;
#endif
}

}  // namespace

Tensor empty_result(const std::vector<int64_t>& shape, ScalarType dtype) {
  size_t bytes = dtype == ScalarType::Float ? 4 : 2;
  for (int64_t size : shape) bytes *= size_t(size);
  return empty_in<Blocks>(shape, dtype, bytes, "a result");
}

Tensor empty_weight(size_t bytes) { return empty_in<PackedWeights>({int64_t(bytes)}, ScalarType::Byte, bytes, "a packed weight"); }

}  // namespace bigmodel

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel, m) { m.def("cpu_release_memory() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(bigmodel, CompositeExplicitAutograd, m) { m.impl("cpu_release_memory", TORCH_BOX(&bigmodel::cpu_release_memory)); }
