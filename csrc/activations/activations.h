// An activation, or its derivative, of n floats that are in cache: one function for all, so that epilogues are compiled once and not
// once per activation. out may be x.
#pragma once
#include "../arch/simd.h"
#include "../kernels.h"

namespace bigmodel::BIGMODEL_REST {

void activate_row(Activation activation, const float* x, int64_t n, float* out);
void derivative_row(Activation activation, const float* x, int64_t n, float* out);

}  // namespace bigmodel::BIGMODEL_REST
