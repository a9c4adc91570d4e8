// Work cut into tasks for the threads that a kernel is lent, and the whole numbers that it is cut by.
#pragma once
#include "arch/simd.h"
#include "kernels.h"

namespace bigmodel::BIGMODEL_ISA {

BIGMODEL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
BIGMODEL_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
BIGMODEL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
BIGMODEL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class Body>
static void run_body(void* body, int64_t task) { (*static_cast<const Body*>(body))(task); }
template <class Body>
static void parallel(const Runtime& runtime, int64_t tasks, const Body& body) { runtime.run(runtime, tasks, run_body<Body>, const_cast<Body*>(&body)); }
template <class Body>
static void parallel_near(const Runtime& runtime, int64_t tasks, const Body& body) { runtime.run_near(runtime, tasks, run_body<Body>, const_cast<Body*>(&body)); }

}  // namespace bigmodel::BIGMODEL_ISA
