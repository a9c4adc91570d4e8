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

// Element `at` of an untyped array; null stays null.
template <class T> BIGMODEL_INLINE T* offset(void* data, int64_t at) { return data ? static_cast<T*>(data) + at : nullptr; }
template <class T> BIGMODEL_INLINE const T* offset(const void* data, int64_t at) { return data ? static_cast<const T*>(data) + at : nullptr; }

}  // namespace bigmodel::BIGMODEL_ISA
