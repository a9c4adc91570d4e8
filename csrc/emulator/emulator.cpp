#include "emulator/emulator.h"

#include <algorithm>
#include <array>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>

#include "emulator/fiber.h"

namespace bigmodel::emulator {
namespace {

constexpr int warp_size = 32;
constexpr uint32_t granule = 2;          // the shadow's unit: the smallest thing that two threads write side by side
constexpr int max_mbarriers = 64;
constexpr int max_named_barriers = 16;

using Clock = uint32_t;

struct Read {
  uint16_t thread;
  Clock clock;
};

struct Granule {                         // what is known of two bytes of shared memory
  Clock clock = 0;                       // of the writer when it wrote
  uint16_t writer = 0;                   // a thread, or an mbarrier on which a copy arrived (see agents)
  bool written = false;
  bool arriving = false;                 // an asynchronous copy is under way
  bool generic = false;                  // written by ordinary stores
  bool by_copy = false;                  // writer is an mbarrier
  uint32_t fences = 0;                   // how many proxy fences its writer had made
  uint32_t reading = 0;                  // asynchronous reads under way
  std::vector<Read> readers;             // since the last write, one entry for each thread
};

struct Waiting {
  const char* word = nullptr;
  std::string where;
};

struct CopyAsync {
  uint32_t shared, bytes;
  std::array<char, 16> data;
};

struct BulkRead {                        // of shared memory by the copy engine or a tensor core, still under way
  uint32_t address, bytes;
};

struct Product {                         // of wgmma, for one thread
  float* c;
  std::vector<float> values;
  int group;                             // the last that adds to it
};

struct Thread {
  Fiber fiber;
  int index = 0;
  bool done = false, runnable = false;
  Waiting waiting;
  uint32_t fences = 0;
  std::vector<CopyAsync> open_copies;
  std::deque<std::vector<CopyAsync>> copy_groups;
  std::vector<BulkRead> open_reads;
  std::deque<std::vector<BulkRead>> read_groups;
  bool wgmma_fenced = false;
  int wgmma_groups = 0, wgmma_done = 0;  // committed, and waited for
  std::vector<Product> products;
  std::vector<BulkRead> open_operands;
  std::deque<std::vector<BulkRead>> operand_groups;
};

struct Collective {                      // what a warp is assembling for
  const char* word = nullptr;
  uint32_t mask = 0, arrived = 0;
  void* arguments[warp_size] = {};
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  std::vector<Clock> clocks;
  std::vector<int> waiting;
};

struct Mbarrier {
  bool ready = false;
  uint32_t address = 0;
  int count = 0, pending = 0;
  int64_t bytes = 0;                     // expected and not yet arrived
  Clock phase = 0;                       // completed so far
  std::vector<Clock> clocks, completed;  // of the arrivals; the same when the last phase completed
  std::vector<std::pair<int, int>> waiting;  // thread, parity
};

struct Arrival {                         // a copy by the copy engine that is under way
  uint32_t shared;
  int mbarrier;
  std::vector<char> data;
};

std::string hex(uint32_t address) {
  std::ostringstream text;
  text << "0x" << std::hex << address;
  return text.str();
}

class Block {
 public:
  Block(const Launch& launch, void (*kernel)(const void*), const void* params, const Options& options)
      : launch(launch), kernel(kernel), params(params), random(options.seed), adversarial(options.seed != 0),
        agents(launch.threads + max_mbarriers), threads(launch.threads), memory(launch.shared_bytes + 1024),
        granules(launch.shared_bytes / granule + 1), clocks(size_t(launch.threads) * agents),
        collectives((launch.threads + warp_size - 1) / warp_size) {
    shared = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024) % 1024;
  }

  Report run(const int (&index)[3]);

  // -- scheduling --
  Thread& self() { return threads[running]; }
  void wait(const char* word, std::string where) {
    self().waiting = {word, std::move(where)};
    self().runnable = false;
    next();
  }
  void yield() {  // lets others run; whoever asks again and again must not keep the copy engine from moving
    if (queue.empty() && !arrivals.empty()) deliver(adversarial ? random() % arrivals.size() : 0);
    queue.push_back(running);
    next();
  }
  void wake(int thread) {
    threads[thread].runnable = true;
    queue.push_back(thread);
  }
  void next();
  [[noreturn]] void stop(const char* kind, const std::string& message) {
    if (report.ok()) report = {kind, message};
    leave();
  }
  [[noreturn]] void leave() {
    Fiber::switch_to(self().fiber, main);
    std::abort();
  }

  // -- clocks --
  Clock* clock_of(int thread) { return clocks.data() + size_t(thread) * agents; }
  void release(std::vector<Clock>& into) {
    Clock* mine = clock_of(running);
    into.resize(agents);
    for (int i = 0; i < agents; i++) into[i] = std::max(into[i], mine[i]);
    mine[running]++;
  }
  void acquire(int thread, const std::vector<Clock>& from) {
    Clock* mine = clock_of(thread);
    for (size_t i = 0; i < from.size(); i++) mine[i] = std::max(mine[i], from[i]);
  }

  // -- shared memory --
  void check_range(uint32_t address, uint32_t bytes, const char* word) {
    if (address > launch.shared_bytes || bytes > launch.shared_bytes - address)
      stop("out of bounds", who(running) + ": " + word + " of " + std::to_string(bytes) + " bytes at shared memory " + hex(address) +
                                "; the block has " + std::to_string(launch.shared_bytes) + " bytes");
    const uint32_t align = bytes >= 16 ? 16 : bytes;
    if ((bytes & (bytes - 1)) == 0 && bytes <= 16 && address % align != 0)
      stop("misaligned", who(running) + ": " + word + " at shared memory " + hex(address) + " must be aligned to " +
                             std::to_string(align) + " bytes");
  }
  void read(uint32_t address, uint32_t bytes, const char* word, bool by_unit);
  void check_write(uint32_t address, uint32_t bytes, const char* word);
  void set_written(uint32_t address, uint32_t bytes, bool generic);
  void order_after_write(const Granule& g, uint32_t address, const char* word, const char* what);

  std::string who(int thread) const {
    return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / warp_size) + ", lane " +
           std::to_string(thread % warp_size) + ") of block (" + std::to_string(index[0]) + ", " + std::to_string(index[1]) + ", " +
           std::to_string(index[2]) + ")";
  }
  std::string who(const Granule& g) const {
    return g.by_copy ? "a copy that arrives at the mbarrier at " + hex(mbarriers[g.writer].address) : "thread " + std::to_string(g.writer);
  }

  Mbarrier& mbarrier_at(uint32_t address, const char* word);
  void complete_if_due(Mbarrier& barrier);
  void deliver(size_t which);

  const Launch& launch;
  void (*kernel)(const void*);
  const void* params;
  std::mt19937_64 random;
  const bool adversarial;
  const int agents;
  int index[3] = {};
  int running = 0, left = 0;
  Fiber main;
  std::vector<Thread> threads;
  std::deque<int> queue;
  std::vector<char> memory;
  char* shared = nullptr;
  std::vector<Granule> granules;
  std::vector<Clock> clocks;
  std::vector<Collective> collectives;
  std::array<NamedBarrier, max_named_barriers> named;
  std::array<Mbarrier, max_mbarriers> mbarriers;
  std::deque<Arrival> arrivals;
  Report report;
};

thread_local Block* block = nullptr;

void fiber_main(void* argument) {
  Thread& thread = *static_cast<Thread*>(argument);
  block->kernel(block->params);
  thread.done = true;
  thread.runnable = false;
  block->left--;
  block->next();
  std::abort();
}

Report Block::run(const int (&where)[3]) {
  std::copy(where, where + 3, index);
  std::memset(shared, 0xff, launch.shared_bytes);
  std::fill(granules.begin(), granules.end(), Granule{});
  std::fill(clocks.begin(), clocks.end(), 0);
  std::fill(collectives.begin(), collectives.end(), Collective{});
  named.fill({});
  mbarriers.fill({});
  arrivals.clear();
  queue.clear();
  left = launch.threads;
  for (int i = 0; i < launch.threads; i++) {
    Thread& thread = threads[i];
    thread.fiber.prepare(fiber_main, &thread);
    thread.index = i;
    thread.done = false;
    thread.fences = 0;
    thread.open_copies.clear();
    thread.copy_groups.clear();
    thread.open_reads.clear();
    thread.read_groups.clear();
    thread.wgmma_fenced = false;
    thread.wgmma_groups = thread.wgmma_done = 0;
    thread.products.clear();
    thread.open_operands.clear();
    thread.operand_groups.clear();
    clock_of(i)[i] = 1;
    wake(i);
  }
  block = this;
  if (left > 0) {
    running = queue.front();
    queue.pop_front();
    Fiber::switch_to(main, self().fiber);
  }
  block = nullptr;
  return report;
}

// Goes on with another thread, or with the same; when none can, the copy engine moves; when it has nothing, that is a deadlock.
void Block::next() {
  const int from = running;
  while (queue.empty()) {
    if (left == 0) leave();
    if (!arrivals.empty()) {
      deliver(adversarial ? random() % arrivals.size() : 0);
      continue;
    }
    std::map<std::string, std::vector<int>> waiting;
    for (const Thread& t : threads)
      if (!t.done) waiting[std::string(t.waiting.word) + " " + t.waiting.where].push_back(t.index);
    std::string text = "block (" + std::to_string(index[0]) + ", " + std::to_string(index[1]) + ", " + std::to_string(index[2]) + "):";
    for (const auto& [where, who] : waiting) {
      text += "\n  " + std::to_string(who.size()) + " threads (" + std::to_string(who.front()) +
              (who.size() > 1 ? " to " + std::to_string(who.back()) : "") + ") wait at " + where;
    }
    const int done = int(std::count_if(threads.begin(), threads.end(), [](const Thread& t) { return t.done; }));
    if (done) text += "\n  " + std::to_string(done) + " threads have ended";
    stop("deadlock", text);
  }
  if (adversarial) {
    std::swap(queue.front(), queue[random() % queue.size()]);
    if (!arrivals.empty() && random() % 4 == 0) deliver(random() % arrivals.size());
  }
  running = queue.front();
  queue.pop_front();
  if (running != from) Fiber::switch_to(threads[from].fiber, self().fiber);
}

void Block::order_after_write(const Granule& g, uint32_t address, const char* word, const char* what) {
  if (g.arriving)
    stop("race", who(running) + ": " + word + " " + what + " shared memory " + hex(address) + " while an asynchronous copy to it is under way");
  if (!g.written) return;
  const int agent = g.by_copy ? launch.threads + g.writer : g.writer;
  if (agent != running && clock_of(running)[agent] < g.clock)
    stop("race", who(running) + ": " + word + " " + what + " shared memory " + hex(address) + ", which " + who(g) +
                     " wrote, with no barrier in between");
}

void Block::read(uint32_t address, uint32_t bytes, const char* word, bool by_unit) {
  check_range(address, bytes, word);
  for (uint32_t at = address / granule; at < (address + bytes + granule - 1) / granule; at++) {
    Granule& g = granules[at];
    order_after_write(g, at * granule, word, "reads");
    if (!g.written) stop("uninitialised", who(running) + ": " + word + " reads shared memory " + hex(at * granule) + ", which nobody wrote");
    if (by_unit && g.generic && threads[g.writer].fences <= g.fences)
      stop("proxy fence", who(running) + ": " + word + " reads shared memory " + hex(at * granule) + ", which ordinary stores of " + who(g) +
                              " wrote with no fence.proxy.async after them");
    const Clock now = clock_of(running)[running];
    bool known = false;
    for (Read& r : g.readers)
      if (r.thread == running) {
        r.clock = now;
        known = true;
        break;
      }
    if (!known) g.readers.push_back({uint16_t(running), now});
  }
}

void Block::check_write(uint32_t address, uint32_t bytes, const char* word) {
  check_range(address, bytes, word);
  for (uint32_t at = address / granule; at < (address + bytes + granule - 1) / granule; at++) {
    const Granule& g = granules[at];
    order_after_write(g, at * granule, word, "writes");
    if (g.reading)
      stop("race", who(running) + ": " + word + " writes shared memory " + hex(at * granule) + " while the copy engine or a tensor core reads it");
    for (const Read& r : g.readers)
      if (r.thread != running && clock_of(running)[r.thread] < r.clock)
        stop("race", who(running) + ": " + word + " writes shared memory " + hex(at * granule) + ", which thread " +
                         std::to_string(r.thread) + " may still be reading");
  }
}

void Block::set_written(uint32_t address, uint32_t bytes, bool generic) {
  for (uint32_t at = address / granule; at < (address + bytes + granule - 1) / granule; at++) {
    Granule& g = granules[at];
    g.clock = clock_of(running)[running];
    g.writer = uint16_t(running);
    g.written = true;
    g.arriving = g.by_copy = false;
    g.generic = generic;
    g.fences = self().fences;
    g.readers.clear();
  }
}

Mbarrier& Block::mbarrier_at(uint32_t address, const char* word) {
  check_range(address, 8, word);
  for (Mbarrier& b : mbarriers)
    if (b.ready && b.address == address) {
      order_after_write(granules[address / granule], address, word, "uses the mbarrier at");
      return b;
    }
  stop("uninitialised", who(running) + ": " + word + " at shared memory " + hex(address) + ", where no mbarrier was initialised");
}

void Block::complete_if_due(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase++;
  barrier.pending = barrier.count;
  barrier.completed = barrier.clocks;
  const int agent = launch.threads + int(&barrier - mbarriers.data());
  barrier.completed.resize(agents);
  barrier.completed[agent] = barrier.phase;
  std::vector<std::pair<int, int>> still;
  for (auto [thread, parity] : barrier.waiting)
    if (int(barrier.phase & 1) != parity) {
      acquire(thread, barrier.completed);
      wake(thread);
    } else {
      still.emplace_back(thread, parity);
    }
  barrier.waiting = std::move(still);
}

void Block::deliver(size_t which) {
  Arrival arrival = std::move(arrivals[which]);
  arrivals.erase(arrivals.begin() + long(which));
  Mbarrier& barrier = mbarriers[arrival.mbarrier];
  std::memcpy(shared + arrival.shared, arrival.data.data(), arrival.data.size());
  for (uint32_t at = arrival.shared / granule; at < (arrival.shared + arrival.data.size() + granule - 1) / granule; at++) {
    Granule& g = granules[at];
    g.clock = barrier.phase + 1;         // visible to whoever saw this phase complete
    g.writer = uint16_t(arrival.mbarrier);
    g.written = g.by_copy = true;
    g.arriving = g.generic = false;
    g.readers.clear();
  }
  barrier.bytes -= int64_t(arrival.data.size());
  complete_if_due(barrier);
}

uint32_t swizzled(uint32_t address, int swizzle_bytes) {  // PTX ISA, tensor swizzle modes: 16-byte chunks within 128-byte rows
  const uint32_t mask = swizzle_bytes == 128 ? 7 : swizzle_bytes == 64 ? 3 : swizzle_bytes == 32 ? 1 : 0;
  return address ^ (((address >> 7) & mask) << 4);
}

// Calls each(offset in the box, address in global memory or null) for all elements of a box, the innermost dimension first.
template <typename Each>
void for_box(const TensorMap& map, const int* coordinates, Each each) {
  int at[5] = {};
  uint32_t offset = 0;
  for (;;) {
    char* address = map.base;
    for (int d = 0; d < map.rank; d++) {
      const int64_t c = int64_t(coordinates[d]) + at[d];
      if (c < 0 || c >= map.size[d]) address = nullptr;
      if (address != nullptr) address += c * map.stride_bytes[d];
    }
    each(offset, address);
    offset += uint32_t(map.element_bytes);
    int d = 0;
    while (d < map.rank && ++at[d] == map.box[d]) at[d++] = 0;
    if (d == map.rank) return;
  }
}

}  // namespace

Report launch(const Launch& launch, void (*kernel)(const void*), const void* params, const Options& options) {
  Block instance(launch, kernel, params, options);
  std::vector<int64_t> order(size_t(launch.grid[0]) * launch.grid[1] * launch.grid[2]);
  std::iota(order.begin(), order.end(), 0);
  if (options.seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937_64(options.seed));
  for (const int64_t i : order) {
    const int64_t row = i / launch.grid[0];
    if (Report report = instance.run({int(i % launch.grid[0]), int(row % launch.grid[1]), int(row / launch.grid[1])}); !report.ok()) return report;
  }
  return {};
}

int thread_index() { return block->running; }
int block_index(int axis) { return block->index[axis]; }
int grid_size(int axis) { return block->launch.grid[axis]; }
int block_size() { return block->launch.threads; }

void fail(const char* kind, const std::string& message) { block->stop(kind, block->who(block->running) + ": " + message); }

void check_global(const void* address, size_t bytes, bool write, const char* word) {
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail("misaligned", std::string(word) + " of " + std::to_string(bytes) + " bytes at a global address that is not a multiple of it");
  if (block->launch.memory.empty()) return;
  const char* at = static_cast<const char*>(address);
  for (const GlobalMemory& m : block->launch.memory) {
    const char* begin = static_cast<const char*>(m.begin);
    if (at >= begin && at + bytes <= begin + m.bytes) {
      if (write && !m.writable) fail("out of bounds", std::string(word) + " writes global memory that is an input");
      return;
    }
  }
  std::string nearest;
  for (const GlobalMemory& m : block->launch.memory) {
    const long distance = at - static_cast<const char*>(m.begin);
    if (std::labs(distance) < (1L << 24)) nearest += " (byte " + std::to_string(distance) + " of an array of " + std::to_string(m.bytes) + ")";
  }
  fail("out of bounds", std::string(word) + (write ? " writes " : " reads ") + std::to_string(bytes) +
                            " bytes of global memory that is none of the launch's" + nearest);
}

char* shared_memory() { return block->shared; }
void shared_read(uint32_t address, uint32_t bytes, const char* word) { block->read(address, bytes, word, false); }
void shared_write(uint32_t address, uint32_t bytes, const char* word) {
  block->check_write(address, bytes, word);
  block->set_written(address, bytes, true);
}

void collective(const char* word, uint32_t mask, void* arguments, void (*execute)(void* const* lanes)) {
  Block& b = *block;
  const int me = b.running, warp = me / warp_size, lane = me % warp_size;
  Collective& c = b.collectives[warp];
  if (!(mask >> lane & 1)) fail("divergence", std::string(word) + " with a mask that leaves the calling lane out");
  if (c.arrived == 0) {
    c.word = word;
    c.mask = mask;
  } else if (c.word != word || c.mask != mask) {
    fail("divergence", std::string("is at ") + word + " while others of its warp are at " + c.word);
  }
  for (int i = 0; i < warp_size; i++)
    if (mask >> i & 1) {
      const int other = warp * warp_size + i;
      if (other >= int(b.threads.size()) || b.threads[other].done) fail("divergence", std::string(word) + " waits for lane " + std::to_string(i) + ", which has ended");
    }
  c.arrived |= 1u << lane;
  c.arguments[lane] = arguments;
  if (c.arrived != mask) {
    b.wait(word, "(warp " + std::to_string(warp) + ")");
    return;
  }
  void* lanes[warp_size];
  for (int i = 0; i < warp_size; i++) lanes[i] = mask >> i & 1 ? c.arguments[i] : nullptr;
  c.arrived = 0;
  if (execute != nullptr) execute(lanes);
  for (int i = 0; i < warp_size; i++)
    if ((mask >> i & 1) && i != lane) b.wake(warp * warp_size + i);
}

void sync_warp(uint32_t mask) {
  collective("syncwarp", mask, &mask, [](void* const* lanes) {
    Block& b = *block;
    const int first = b.running / warp_size * warp_size;
    std::vector<Clock> joint(b.agents);
    for (int i = 0; i < warp_size; i++)
      if (lanes[i] != nullptr)
        for (int a = 0; a < b.agents; a++) joint[a] = std::max(joint[a], b.clock_of(first + i)[a]);
    for (int i = 0; i < warp_size; i++)
      if (lanes[i] != nullptr) {
        std::copy(joint.begin(), joint.end(), b.clock_of(first + i));
        b.clock_of(first + i)[first + i]++;
      }
  });
}

void named_barrier(int id, int threads, bool wait, const char* word) {
  Block& b = *block;
  if (id < 0 || id >= max_named_barriers) fail("out of bounds", std::string(word) + " at barrier " + std::to_string(id) + "; a block has 16");
  if (threads % warp_size != 0 || threads <= 0)
    fail("divergence", std::string(word) + " for " + std::to_string(threads) + " threads; must be whole warps");
  NamedBarrier& barrier = b.named[id];
  if (barrier.arrived != 0 && barrier.expected != threads)
    fail("divergence", std::string(word) + " at barrier " + std::to_string(id) + " for " + std::to_string(threads) +
                           " threads, which others use for " + std::to_string(barrier.expected));
  barrier.expected = threads;
  b.release(barrier.clocks);
  if (++barrier.arrived < threads) {
    if (wait) {
      barrier.waiting.push_back(b.running);
      b.wait(word, std::to_string(id) + " (" + std::to_string(threads) + " threads)");
    }
    return;
  }
  for (int thread : barrier.waiting) {
    b.acquire(thread, barrier.clocks);
    b.wake(thread);
  }
  if (wait) b.acquire(b.running, barrier.clocks);
  barrier = {};
}

void copy_async(uint32_t shared, const void* global, uint32_t bytes, uint32_t valid_bytes) {
  Block& b = *block;
  b.check_write(shared, bytes, "cp.async");
  if (valid_bytes) check_global(global, bytes, false, "cp.async");
  CopyAsync copy{shared, bytes, {}};
  if (valid_bytes) std::memcpy(copy.data.data(), global, valid_bytes);
  for (uint32_t at = shared / granule; at < (shared + bytes) / granule; at++) b.granules[at].arriving = true;
  b.self().open_copies.push_back(copy);
}

void copy_async_commit() {
  Thread& t = block->self();
  t.copy_groups.push_back(std::move(t.open_copies));
  t.open_copies.clear();
}

void copy_async_wait(int groups_left) {
  Block& b = *block;
  Thread& t = b.self();
  while (int(t.copy_groups.size()) > groups_left) {
    for (const CopyAsync& copy : t.copy_groups.front()) {
      std::memcpy(b.shared + copy.shared, copy.data.data(), copy.bytes);
      b.set_written(copy.shared, copy.bytes, true);
    }
    t.copy_groups.pop_front();
  }
}

void proxy_fence() { block->self().fences++; }

void mbarrier_init(uint32_t address, int arrivals) {
  Block& b = *block;
  shared_write(address, 8, "mbarrier.init");
  for (Mbarrier& m : b.mbarriers)
    if (!m.ready || m.address == address) {
      m = {};
      m.ready = true;
      m.address = address;
      m.count = m.pending = arrivals;
      return;
    }
  fail("out of bounds", "mbarrier.init of more than " + std::to_string(max_mbarriers) + " mbarriers");
}

void mbarrier_arrive(uint32_t address, int64_t expected_bytes) {
  Block& b = *block;
  Mbarrier& m = b.mbarrier_at(address, "mbarrier.arrive");
  m.bytes += expected_bytes;
  b.release(m.clocks);
  if (m.pending == 0) fail("deadlock", "mbarrier.arrive at " + hex(address) + " more often than the " + std::to_string(m.count) + " that it was initialised for");
  m.pending--;
  b.complete_if_due(m);
}

void mbarrier_expect(uint32_t address, int64_t bytes) { block->mbarrier_at(address, "mbarrier.expect_tx").bytes += bytes; }

bool mbarrier_test(uint32_t address, int parity) {
  Block& b = *block;
  Mbarrier& m = b.mbarrier_at(address, "mbarrier.test_wait");
  if (int(m.phase & 1) == parity) {
    b.yield();
    return false;
  }
  b.acquire(b.running, m.completed);
  return true;
}

void mbarrier_wait(uint32_t address, int parity) {
  Block& b = *block;
  Mbarrier& m = b.mbarrier_at(address, "mbarrier.wait");
  if (int(m.phase & 1) != parity) {
    b.acquire(b.running, m.completed);
    return;
  }
  m.waiting.emplace_back(b.running, parity);
  b.wait("mbarrier", "at shared memory " + hex(address) + ", parity " + std::to_string(parity) + " (phases completed " + std::to_string(m.phase) +
                         ", arrivals missing " + std::to_string(m.pending) + ", bytes missing " + std::to_string(m.bytes) + ")");
}

void tma_load(uint32_t shared, const TensorMap& map, const int* coordinates, uint32_t barrier) {
  Block& b = *block;
  const Mbarrier& m = b.mbarrier_at(barrier, "cp.async.bulk.tensor");
  int64_t bytes = map.element_bytes;
  for (int d = 0; d < map.rank; d++) bytes *= map.box[d];
  if (shared % (map.swizzle_bytes ? 128 : 16) != 0)
    fail("misaligned", "cp.async.bulk.tensor to shared memory " + hex(shared) + " must be aligned to 128 bytes");
  if (map.swizzle_bytes && map.box[0] * map.element_bytes > map.swizzle_bytes)
    fail("out of bounds", "cp.async.bulk.tensor: a box row of " + std::to_string(map.box[0] * map.element_bytes) + " bytes with a swizzle of " +
                              std::to_string(map.swizzle_bytes));
  b.check_range(shared, uint32_t(bytes), "cp.async.bulk.tensor");
  b.check_write(shared, uint32_t(bytes), "cp.async.bulk.tensor");
  Arrival arrival{shared, int(&m - b.mbarriers.data()), std::vector<char>(size_t(bytes))};
  const uint64_t all_ones = ~uint64_t(0);
  for_box(map, coordinates, [&](uint32_t offset, const char* address) {
    const uint32_t at = swizzled(shared + offset, map.swizzle_bytes) - shared;
    if (address != nullptr)
      std::memcpy(arrival.data.data() + at, address, size_t(map.element_bytes));
    else if (map.fill_nan)
      std::memcpy(arrival.data.data() + at, &all_ones, size_t(map.element_bytes));
  });
  for (uint32_t at = shared / granule; at < (shared + bytes) / granule; at++) b.granules[at].arriving = true;
  b.arrivals.push_back(std::move(arrival));
}

namespace {

// The copy engine reads shared memory for the running thread, until its group is waited for.
void start_bulk_read(uint32_t shared, uint32_t bytes, const char* word) {
  Block& b = *block;
  b.read(shared, bytes, word, true);
  for (uint32_t at = shared / granule; at < (shared + bytes) / granule; at++) b.granules[at].reading++;
  b.self().open_reads.push_back({shared, bytes});
}

}  // namespace

void tma_store(const TensorMap& map, const int* coordinates, uint32_t shared, bool add) {
  Block& b = *block;
  int64_t bytes = map.element_bytes;
  for (int d = 0; d < map.rank; d++) bytes *= map.box[d];
  if (shared % (map.swizzle_bytes ? 128 : 16) != 0)
    fail("misaligned", "cp.async.bulk.tensor from shared memory " + hex(shared) + " must be aligned to 128 bytes");
  start_bulk_read(shared, uint32_t(bytes), "cp.async.bulk.tensor store");
  for_box(map, coordinates, [&](uint32_t offset, char* address) {
    if (address == nullptr) return;
    const char* from = b.shared + swizzled(shared + offset, map.swizzle_bytes);
    check_global(address, size_t(map.element_bytes), true, "cp.async.bulk.tensor store");
    if (!add) {
      std::memcpy(address, from, size_t(map.element_bytes));
    } else {
      if (map.element_bytes != 4) fail("out of bounds", "cp.reduce.async.bulk.tensor of other than float32");
      float sum, addend;
      std::memcpy(&sum, address, 4);
      std::memcpy(&addend, from, 4);
      sum += addend;
      std::memcpy(address, &sum, 4);
    }
  });
}

void bulk_add(float* global, uint32_t shared, uint32_t bytes) {
  const char* word = "cp.reduce.async.bulk";
  if (shared % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0)
    fail("misaligned", std::string(word) + " of " + std::to_string(bytes) + " bytes from shared memory " + hex(shared) +
                           ": addresses and size must be multiples of 16 bytes");
  check_global(global, bytes, true, word);
  start_bulk_read(shared, bytes, word);
  for (uint32_t i = 0; i < bytes / 4; i++) {
    float addend;
    std::memcpy(&addend, block->shared + shared + 4 * i, 4);
    global[i] += addend;
  }
}

void tma_commit() {
  Thread& t = block->self();
  t.read_groups.push_back(std::move(t.open_reads));
  t.open_reads.clear();
}

void tma_wait(int groups_left, bool) {
  Block& b = *block;
  Thread& t = b.self();
  while (int(t.read_groups.size()) > groups_left) {
    for (const BulkRead& r : t.read_groups.front())
      for (uint32_t at = r.address / granule; at < (r.address + r.bytes) / granule; at++) b.granules[at].reading--;
    t.read_groups.pop_front();
  }
}

void wgmma_fence() { block->self().wgmma_fenced = true; }

void wgmma_read(uint32_t address, uint32_t bytes, const char* word) {
  Block& b = *block;
  const int last = b.running;
  b.running = last / warp_size * warp_size;  // the warp reads as one; its first lane answers for it
  b.read(address, bytes, word, true);
  for (uint32_t at = address / granule; at < (address + bytes) / granule; at++) b.granules[at].reading++;
  b.self().open_operands.push_back({address, bytes});
  b.running = last;
}

float* wgmma_result(int lane, float* c, int count) {
  Thread& t = block->threads[block->running / warp_size * warp_size + lane];
  for (Product& p : t.products)
    if (p.c == c) {
      if (int(p.values.size()) != count) fail("divergence", "wgmma to registers of which another wgmma, still under way, has a different number");
      p.group = t.wgmma_groups;
      return p.values.data();
    }
  if (!t.wgmma_fenced) fail("race", "wgmma to registers that were touched since the last wgmma_fence");
  t.products.push_back({c, std::vector<float>(c, c + count), t.wgmma_groups});
  std::fill(c, c + count, std::numeric_limits<float>::quiet_NaN());  // whoever looks before the wait sees that
  return t.products.back().values.data();
}

void wgmma_commit() {
  Thread& t = block->self();
  t.wgmma_groups++;
  t.operand_groups.push_back(std::move(t.open_operands));
  t.open_operands.clear();
}

void wgmma_wait(int groups_left) {
  Block& b = *block;
  Thread& t = b.self();
  const int done = t.wgmma_groups - groups_left;
  while (t.wgmma_done < done) {
    for (const BulkRead& r : t.operand_groups.front()) {
      for (uint32_t at = r.address / granule; at < (r.address + r.bytes) / granule; at++) b.granules[at].reading--;
      b.read(r.address, r.bytes, "wgmma", true);  // it read until now
    }
    t.operand_groups.pop_front();
    t.wgmma_done++;
  }
  std::erase_if(t.products, [done](const Product& p) {
    if (p.group >= done) return false;
    std::copy(p.values.begin(), p.values.end(), p.c);
    return true;
  });
  t.wgmma_fenced = t.wgmma_fenced && !t.products.empty();
}

}  // namespace bigmodel::emulator
