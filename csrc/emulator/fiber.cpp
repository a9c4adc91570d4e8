#include "emulator/fiber.h"

#include <new>

#if defined(__linux__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace bigmodel::emulator {

void Fiber::allocate() {
  if (stack_ != nullptr) return;
  void* memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory);
  mprotect(stack_, 4096, PROT_NONE);  // an overflow stops here and not in a neighbour's stack
}

Fiber::~Fiber() {
  if (stack_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
  // Its last functions never returned: what they poisoned would be reported to whoever is given these addresses next.
  __asan_unpoison_memory_region(stack_, stack_bytes);
#endif
  munmap(stack_, stack_bytes);
}

#if defined(__x86_64__)

// System V: rbx, rbp, r12-r15 and the stack pointer are the callee's to keep.
extern "C" void bigmodel_fiber_switch(void** save, void* load);
extern "C" void bigmodel_fiber_start();
asm(R"(
.text
.p2align 4
.type bigmodel_fiber_switch, @function
bigmodel_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size bigmodel_fiber_switch, .-bigmodel_fiber_switch
.p2align 4
.type bigmodel_fiber_start, @function
bigmodel_fiber_start:
  movq %r12, %rdi
  callq *%r13
  ud2
.size bigmodel_fiber_start, .-bigmodel_fiber_start
)");

void Fiber::start(void (*body)(void*), void* argument) {
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes) - 2;
  *--top = reinterpret_cast<void*>(&bigmodel_fiber_start);  // where the first switch returns to; the stack is 16-byte aligned there
  *--top = nullptr;                                         // rbp
  *--top = nullptr;                                         // rbx
  *--top = argument;                                        // r12
  *--top = reinterpret_cast<void*>(body);                   // r13
  *--top = nullptr;                                         // r14
  *--top = nullptr;                                         // r15
  stack_pointer_ = top;
}

#elif defined(__aarch64__)

// AAPCS64: x19-x30, d8-d15 and the stack pointer are the callee's to keep.
extern "C" void bigmodel_fiber_switch(void** save, void* load);
extern "C" void bigmodel_fiber_start();
asm(R"(
.text
.p2align 4
bigmodel_fiber_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.p2align 4
bigmodel_fiber_start:
  mov x0, x19
  blr x20
  brk #1
)");

void Fiber::start(void (*body)(void*), void* argument) {
  void** frame = reinterpret_cast<void**>(stack_ + stack_bytes - 160);
  for (int i = 0; i < 20; i++) frame[i] = nullptr;
  frame[0] = argument;                                          // x19
  frame[1] = reinterpret_cast<void*>(body);                     // x20
  frame[11] = reinterpret_cast<void*>(&bigmodel_fiber_start);   // x30
  stack_pointer_ = frame;
}

#else

void Fiber::start(void (*body)(void*), void* argument) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_ + 4096;
  context_.uc_stack.ss_size = stack_bytes - 4096;
  context_.uc_link = nullptr;
  const uint64_t b = reinterpret_cast<uintptr_t>(body), a = reinterpret_cast<uintptr_t>(argument);
  using Entry = void (*)();
  auto start = +[](unsigned b0, unsigned b1, unsigned a0, unsigned a1) {  // makecontext passes ints only
    reinterpret_cast<void (*)(void*)>(uintptr_t(uint64_t(b1) << 32 | b0))(reinterpret_cast<void*>(uintptr_t(uint64_t(a1) << 32 | a0)));
  };
  makecontext(&context_, reinterpret_cast<Entry>(start), 4, unsigned(b), unsigned(b >> 32), unsigned(a), unsigned(a >> 32));
}

#endif

#if defined(__x86_64__) || defined(__aarch64__)
void Fiber::change(Fiber& from, Fiber& to) { bigmodel_fiber_switch(&from.stack_pointer_, to.stack_pointer_); }
#else
void Fiber::change(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }
#endif

#if defined(__SANITIZE_ADDRESS__)

namespace {
thread_local Fiber* left = nullptr;  // the fiber that ran before the switch under way
}

void Fiber::prepare(void (*body)(void*), void* argument) {
  allocate();
  body_ = body;
  argument_ = argument;
  stack_begin_ = stack_ + 4096;
  stack_size_ = stack_bytes - 4096;
  __asan_unpoison_memory_region(stack_begin_, stack_size_);  // what ran here before never returned from its functions
  start(enter, this);
}

void Fiber::enter(void* fiber) {
  __sanitizer_finish_switch_fiber(nullptr, &left->stack_begin_, &left->stack_size_);
  const Fiber& self = *static_cast<Fiber*>(fiber);
  self.body_(self.argument_);
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  void* fake_stack = nullptr;
  left = &from;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack_begin_, to.stack_size_);
  change(from, to);
  __sanitizer_finish_switch_fiber(fake_stack, &left->stack_begin_, &left->stack_size_);
}

#else

void Fiber::prepare(void (*body)(void*), void* argument) {
  allocate();
  start(body, argument);
}
void Fiber::switch_to(Fiber& from, Fiber& to) { change(from, to); }

#endif

}  // namespace bigmodel::emulator
