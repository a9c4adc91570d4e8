// A token's row: the sum of its word, position and token-type rows.
#pragma once
#include "../arch/rows.h"
#include "../kernels.h"

namespace bigmodel::BIGMODEL_ISA {

template <class T>
static void embedding_row(const int64_t* const ids[3], const void* const tables[3], int64_t token, int64_t hidden, float* row) {
  bool first = true;
  for (int t = 0; t < 3; t++) {
    if (!ids[t]) continue;
    const T* source = static_cast<const T*>(tables[t]) + ids[t][token] * hidden;
    first ? add_row<T>(source, nullptr, hidden, row) : add_to_row(source, hidden, row);
    first = false;
  }
}

}  // namespace bigmodel::BIGMODEL_ISA
