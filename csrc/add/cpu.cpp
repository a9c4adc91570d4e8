// add: x + factor * y, of as many elements. Rounded once.
#include "../dispatch.h"
#include "../parallel.h"

namespace bigmodel::BIGMODEL_ISA {

void add(const Runtime& runtime, const AddArgs& args) {
  constexpr int64_t block = 16384;  // elements of a task
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    const T *x = static_cast<const T*>(args.x), *y = static_cast<const T*>(args.y);
    T* out = static_cast<T*>(args.out);
    const F32 factor = F32::set(args.factor);
    parallel_near(runtime, ceil_div(args.n, block), [&](int64_t task) {
      const int64_t first = task * block;
      each_vector(smaller(block, args.n - first), [&](int64_t i, int here) __attribute__((always_inline)) {
        store(fma(load(y + first + i, here), factor, load(x + first + i, here)), out + first + i, here);
      });
    });
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
