// From a Dtype known at run time to the storage type a kernel template takes.
#pragma once
#include "arch/simd.h"
#include "kernels.h"

namespace bigmodel::BIGMODEL_ISA {

template <class Body>
BIGMODEL_INLINE void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32: return body(float());
    case Dtype::bfloat16: return body(bf16());
    case Dtype::float16: return body(fp16());
  }
}

}  // namespace bigmodel::BIGMODEL_ISA
