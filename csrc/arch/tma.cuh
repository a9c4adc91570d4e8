// The copy engine (TMA, sm_90): one thread copies a box of up to five dimensions between global and shared memory by a tensor map;
// elements outside the tensor are read as zeros and not written. Loads complete on an mbarrier. Without a map it adds contiguous floats
// of shared memory to global memory, where the L2 cache does the arithmetic; these complete in groups.
#pragma once
#include <stdexcept>
#include <string>

#include "arch/mbarrier.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace bigmodel::cuda {

#if defined(__CUDACC__)
using TensorMap = CUtensorMap;
#else
using TensorMap = emulator::TensorMap;
#endif

// On the host: the map of a 16-bit tensor of four dimensions, innermost first; strides in elements (stride[0] is 1). box is what one
// copy moves, its first dimension as wide as the swizzle, 64 or 128 bytes.
struct TensorMapArgs {
  const void* base;
  int64_t size[4], stride[4];
  int box[4];
};
#if defined(__CUDACC__)
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
// From the driver, through the runtime, so that the library does not link against libcuda.
inline EncodeTiled encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (status != cudaSuccess || function == nullptr)
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; a driver for CUDA 12 or newer is needed");
  return reinterpret_cast<EncodeTiled>(function);
}
inline TensorMap tensor_map(const TensorMapArgs& a) {
  static const EncodeTiled encode = encode_tiled();
  TensorMap map;
  cuuint64_t size[4], stride[3];
  cuuint32_t box[4], step[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; i++) {
    size[i] = cuuint64_t(a.size[i]);
    box[i] = cuuint32_t(a.box[i]);
    if (i) stride[i - 1] = cuuint64_t(a.stride[i]) * 2;
  }
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(a.base), size, stride, box, step,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, a.box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled refuses the tensor, error " + std::to_string(int(result)));
  return map;
}
#else
inline TensorMap tensor_map(const TensorMapArgs& a) {
  TensorMap map;
  map.base = static_cast<char*>(const_cast<void*>(a.base));
  map.rank = 4;
  map.element_bytes = 2;
  map.swizzle_bytes = a.box[0] * 2;
  if (reinterpret_cast<uintptr_t>(a.base) % 16 != 0) throw std::runtime_error("cuTensorMapEncodeTiled refuses a base that is no multiple of 16 bytes");
  for (int i = 0; i < 4; i++) {
    if (a.box[i] < 1 || a.box[i] > 256 || a.size[i] < 1 || (i && (a.stride[i] * 2 % 16 != 0 || a.stride[i] <= 0)))
      throw std::runtime_error("cuTensorMapEncodeTiled refuses dimension " + std::to_string(i));
    map.size[i] = a.size[i];
    map.stride_bytes[i] = a.stride[i] * 2;
    map.box[i] = a.box[i];
  }
  return map;
}
#endif

// By one thread. The coordinates are the box's first element, innermost dimension first.
BM_DEVICE void tma_load(SharedAddress shared, const TensorMap& map, SharedAddress barrier, int c0, int c1, int c2, int c3) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(shared), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
#else
  const int at[4] = {c0, c1, c2, c3};
  emulator::tma_load(shared, map, at, barrier);
#endif
}

BM_DEVICE void tma_prefetch(const TensorMap& map) {
#if defined(__CUDACC__)
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#else
  (void)map;
#endif
}

// By one thread: adds `bytes` of float32 in shared memory to those in global memory, in any order among all who add there; both start at
// multiples of 16 bytes, as many as whole 16 bytes.
BM_DEVICE void bulk_add(float* global, SharedAddress shared, int bytes) {
#if defined(__CUDACC__)
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               ::"l"(__cvta_generic_to_global(global)), "r"(shared), "r"(bytes) : "memory");
#else
  emulator::bulk_add(global, shared, uint32_t(bytes));
#endif
}
// By the thread that added, after the last of a group.
BM_DEVICE void bulk_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  emulator::tma_commit();
#endif
}
// Until all groups of this thread have read their shared memory (which may then be written again), or also been added.
BM_DEVICE void bulk_wait_read() {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#else
  emulator::tma_wait(0, true);
#endif
}
BM_DEVICE void bulk_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#else
  emulator::tma_wait(0, false);
#endif
}

// Before the copy engine or wgmma reads what this thread's ordinary stores wrote; a barrier has to follow.
BM_DEVICE void fence_proxy_async() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emulator::proxy_fence();
#endif
}

}  // namespace bigmodel::cuda
