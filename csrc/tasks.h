// How a kernel's tasks are dealt to threads. start(threads, work) is how these begin: it calls work(i) for every i < threads, on as many of
// them as it has, and returns when all are done.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "kernels.h"

namespace bigmodel {

// Runtime::run: in order, to whichever thread is free.
template <class Start>
void deal_tasks(int64_t threads, int64_t tasks, void (*body)(void*, int64_t), void* context, Start&& start) {
  if (threads == 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; task++) body(context, task);
    return;
  }
  std::atomic<int64_t> next{0};
  start(threads < tasks ? threads : tasks, [&](int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task);
  });
}

// Runtime::run_near: to each thread a run of neighbours, and then what others have left of theirs.
template <class Start>
void deal_near(int64_t threads, int64_t tasks, void (*body)(void*, int64_t), void* context, Start&& start) {
  threads = threads < tasks ? threads : tasks;
  if (threads <= 1) return deal_tasks(1, tasks, body, context, start);
  struct alignas(64) Run {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Run> runs(static_cast<size_t>(threads));
  for (int64_t t = 0; t < threads; t++) {
    runs[size_t(t)].next = tasks * t / threads;
    runs[size_t(t)].end = tasks * (t + 1) / threads;
  }
  start(threads, [&](int64_t first) {
    for (int64_t after = 0; after < threads; after++) {
      Run& run = runs[size_t((first + after) % threads)];
      for (int64_t task; (task = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end;) body(context, task);
    }
  });
}

// Threads that are started once for many deals, and wait for the next one awake. Starting them anew costs microseconds if they are; and the
// runtime of OpenMP lets its threads sleep between two starts as soon as there are more of them in the process, of other callers and of
// other libraries, than cores: each start then wakes them through the system.
//
//     start(n)   first thread:  body ----- deal ----- deal -- ... --- over
//                the others:     look ----- work ----- work -- ... --- leave
//
// Nothing waits for a thread that does not come (within somebody else's parallel region there is one alone): what it would have done is done
// by those that are there.
class Team {
 public:
  template <class Start, class Body>
  static void with(int64_t threads, const Start& start, const Body& body) {
    Team team;
    std::exception_ptr problem;  // what `start` goes through may not pass it on as it is
    start(threads, [&](int64_t thread) {
      if (thread > 0) return team.help(thread);
      try {
        body(team);
      } catch (...) {
        problem = std::current_exception();
      }
      team.over_.store(true, std::memory_order_release);
    });
    if (problem) std::rethrow_exception(problem);
  }
  // How a deal begins, see above.
  template <class Work>
  void operator()(int64_t threads, const Work& work) {
    call_ = [](const void* of, int64_t thread) { (*static_cast<const Work*>(of))(thread); };
    of_ = &work;
    threads_ = threads;
    round_.fetch_add(1);
    const AtEnd close([&] {  // after it nobody begins, and who has begun is waited for: `work` is gone then
      round_.fetch_add(1);
      for (Wait wait; at_work_.load();) wait();
    });
    work(0);
  }

 private:
  template <class Call>
  struct AtEnd {
    const Call call;
    explicit AtEnd(const Call& call) : call(call) {}
    ~AtEnd() { call(); }
  };
  // Awake for some tens of microseconds, as between two kernels; then others may have the core.
  struct Wait {
    int looked = 0;
    void operator()() {
      if (looked++ > 1000) return std::this_thread::yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  };
  void help(int64_t thread) {
    uint32_t seen = 0;
    for (Wait wait; !over_.load(std::memory_order_acquire);) {
      const uint32_t round = round_.load();
      if (round == seen || round % 2 == 0) {
        wait();
        continue;
      }
      seen = round;
      at_work_.fetch_add(1);
      const AtEnd leave([&] { at_work_.fetch_sub(1); });
      if (round_.load() == round && thread < threads_) call_(of_, thread);
      wait = {};
    }
  }
  void (*call_)(const void* of, int64_t thread) = nullptr;
  const void* of_ = nullptr;
  int64_t threads_ = 0;
  alignas(64) std::atomic<uint32_t> round_{0};  // odd while a deal is open
  alignas(64) std::atomic<int32_t> at_work_{0};
  alignas(64) std::atomic<bool> over_{false};
};

// The functions of a Runtime whose threads `start` starts, where the calling thread has no team.
template <const auto& start>
struct Threads {
  static void run(const Runtime& runtime, int64_t tasks, void (*body)(void*, int64_t), void* context) {
    if (team) return deal_tasks(runtime.threads, tasks, body, context, *team);
    deal_tasks(runtime.threads, tasks, body, context, start);
  }
  static void run_near(const Runtime& runtime, int64_t tasks, void (*body)(void*, int64_t), void* context) {
    if (team) return deal_near(runtime.threads, tasks, body, context, *team);
    deal_near(runtime.threads, tasks, body, context, start);
  }
  // body() with a team of so many; within another's it has that one.
  template <class Body>
  static void together(int64_t threads, const Body& body) {
    if (team || threads == 1) return body();
    Team::with(threads, start, [&](Team& own) {
      struct Leaves {
        ~Leaves() { team = nullptr; }
      } leaves;
      team = &own;
      size = threads;
      body();
    });
  }
  // Of the calling thread, if it has one, and how many they are.
  static inline thread_local Team* team = nullptr;
  static inline thread_local int64_t size = 0;
};

}  // namespace bigmodel
