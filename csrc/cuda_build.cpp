// What the CUDA library was built for, to be read from the file: a library that does not fit the torch at hand cannot be loaded to
// be asked. bigmodel_kernels/_native.py looks for this text.
#include <cuda_runtime_api.h>

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

extern "C" __attribute__((used, visibility("default"))) const char bigmodel_cuda_build[] =
    "bigmodel_kernels CUDA library: CUDART_VERSION " TEXT(CUDART_VERSION) ", architectures " BIGMODEL_CUDA_ARCHS ".";
