// Dropout of the elements of a matrix, as a CUDA kernel is given it.
#pragma once
#include <cstdint>

namespace bigmodel::cuda {

struct ElementDropout {
  const int64_t* seed;        // or null: nothing is dropped
  uint32_t threshold;         // a word below it drops
  float scale;                // of what is kept
};

}  // namespace bigmodel::cuda
