// What every source of a rule of setup.py begins with, compiled once for the rule: intrinsics and torch's headers take longer to
// read than most kernels take to compile. It changes no meaning: sources include what they need all the same.
#ifdef BIGMODEL_ISA
#include "arch/simd.h"
#else
#include "registration.h"
#endif
