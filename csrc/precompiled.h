// What every source of a rule of setup.py begins with, compiled once for the rule: intrinsics and torch's headers take longer to
// read than most kernels take to compile. It changes no meaning: sources include what they need all the same.
#ifdef BIGMODEL_ISA
#include "arch/simd.h"
#elif !defined(BIGMODEL_DRIVEN)  // the driver of threads does without torch
#include "registration.h"
#endif
