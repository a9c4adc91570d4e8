// Fibers: every thread of an emulated block has a stack of its own, and runs until it waits for another.
//
// A switch saves the registers that a called function must keep, and takes a few nanoseconds; ucontext, which stands in on
// processors without a switch of their own below, makes a system call each time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace bigmodel::emulator {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber();

  // Runs body(argument) when first entered; body must not return: it ends by switching away for ever.
  void prepare(void (*body)(void*), void* argument);

  // Saves the running fiber in `from` and goes on with `to`.
  static void switch_to(Fiber& from, Fiber& to);

  static constexpr size_t stack_bytes = size_t(256) << 10;  // pages that are never touched cost nothing

 private:
  void allocate();
  void start(void (*body)(void*), void* argument);  // what prepare and switch_to do on this processor
  static void change(Fiber& from, Fiber& to);
  char* stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)  // which has to be told where the stack is
  const void* stack_begin_ = nullptr;
  size_t stack_size_ = 0;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  static void enter(void* fiber);
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_{};
#endif
};

}  // namespace bigmodel::emulator
