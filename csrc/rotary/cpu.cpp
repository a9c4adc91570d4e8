// rotary: queries and keys with pairs of their elements turned by the angles of their positions. RoFormer (Su et al.), arXiv 2104.09864.
//
// A task is some positions: their cosines and sines are widened once for all heads of both.
#include "../dispatch.h"
#include "../parallel.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

// (a, b) becomes (a cos - b sin, b cos + a sin), for pairs i and i + angles, or 2 i and 2 i + 1; the rest is copied.
template <class T>
void turn_head(const T* x, const float* cosine, const float* sine, int64_t angles, int64_t head_dim, bool interleaved, T* out) {
  if (interleaved) {
    for (int64_t i = 0; i < angles; i++) {
      const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
      from_float(a * cosine[i] - b * sine[i], out + 2 * i);
      from_float(b * cosine[i] + a * sine[i], out + 2 * i + 1);
    }
  } else {
    each_vector(angles, [&](int64_t i, int here) __attribute__((always_inline)) {
      const F32 a = load(x + i, here), b = load(x + angles + i, here), c = load(cosine + i, here), s = load(sine + i, here);
      store(a * c - b * s, out + i, here);
      store(fma(b, c, a * s), out + angles + i, here);
    });
  }
  for (int64_t i = 2 * angles; i < head_dim; i++) out[i] = x[i];
}

}  // namespace

void rotary(const Runtime& runtime, const RotaryArgs& args) {
  const int64_t angles = args.angles, padded = round_up(angles, 16), dim = args.head_dim;
  const int64_t block = larger(1, 16384 / larger(1, (args.heads[0] + args.heads[1]) * dim));  // positions per task: some 64 KB of them
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_near(runtime, ceil_div(args.batch * args.rows, block), [&](int64_t task) {
      float* cosine = static_cast<float*>(runtime.scratch(scratch_c, size_t(2 * padded) * sizeof(float)));
      float* sine = cosine + padded;
      for (int64_t position = task * block; position < smaller(args.batch * args.rows, (task + 1) * block); position++) {
        const int64_t b = position / args.rows, row = position % args.rows, at = (args.shared_angles ? row : position) * angles;
        with_dtype(args.angles_dtype, [&](auto table) {
          using Table = decltype(table);
          const Table *c = static_cast<const Table*>(args.cosine) + at, *s = static_cast<const Table*>(args.sine) + at;
          each_vector(angles, [&](int64_t i, int here) __attribute__((always_inline)) {
            store(load(c + i, here), cosine + i, here);
            store(load(s + i, here), sine + i, here);
          });
        });
        for (int which = 0; which < 2; which++) {
          const int64_t* stride = args.stride[which];
          const T* x = static_cast<const T*>(args.x[which]) + b * stride[0] + row * stride[2];
          T* out = static_cast<T*>(args.out[which]) + position * args.heads[which] * dim;
          for (int64_t head = 0; head < args.heads[which]; head++)
            turn_head(x + head * stride[1], cosine, sine, angles, dim, args.interleaved, out + head * dim);
        }
      }
    });
  });
}

}  // namespace bigmodel::BIGMODEL_ISA
