// How a kernel's tasks are dealt to threads. start(threads, work) is how these begin: it calls work(i) for every i < threads, on as many of
// them as it has, and returns when all are done.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

namespace bigmodel {

// Runtime::run: in order, to whichever thread is free.
template <class Start>
void deal_tasks(int64_t threads, int64_t tasks, void (*body)(void*, int64_t), void* context, const Start& start) {
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
void deal_near(int64_t threads, int64_t tasks, void (*body)(void*, int64_t), void* context, const Start& start) {
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

}  // namespace bigmodel
