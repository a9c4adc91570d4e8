// cross_entropy: the loss of a linear layer's logits and its gradients, with the logits of some rows in memory at a time.
//
//   a chunk of rows, weight block by weight block (class_block classes, packed when its turn comes):
//     1. logits = x W^T + b                                  the chunk's logits stay in one buffer: (chunk, classes) float32
//     2. row by row: logsumexp, loss, and in place  d = scale (softmax - (1 - s) onehot - s / classes),   s: smoothing
//     3. db += sum of d,  dx += d W,  dW += d^T x            three products in all, as with all logits in memory
//
// For the loss alone a block's logits are used up at once, and the buffer is one block wide. The gradient of single losses, each with a
// scale of its own, goes the same way as that of their sum: from the logsumexp of the forward pass it would save a pass over the logits,
// but the rounding of a large one would be in every probability. Rows that do not count are left out before the first product.
#include "../arch/rows.h"
#include "../linear/backward.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

constexpr int64_t class_block = 2048;                     // a multiple of every panel
constexpr int64_t logits_bytes = int64_t(96) << 20, most_rows = 1024;

// The chunk's rows of x, which need not lie side by side.
template <class T>
struct Gathered {
  static constexpr int parts = parts_of_stored<T>;
  const T* x;
  int64_t stride;
  const int64_t* row;
  const float* get(int64_t r, int64_t column, int64_t n, float* buffer) const { return Stored<T>{x + row[r] * stride, 0}.get(0, column, n, buffer); }
};

struct Running {             // of a row while its blocks go by
  float maximum, exponentials, logits, target;
};

template <class T>
struct CrossEntropy {
  const Runtime& runtime;
  const CrossEntropyArgs& args;
  const int64_t k = args.k, classes = args.classes, blocks = ceil_div(classes, class_block);
  const bool wants_grad = args.x_grad || args.weight_grad || args.bias_grad;
  const int64_t stride = wants_grad ? round_up(classes, class_block) : class_block;
  const int64_t longest = larger(tile_rows, smaller(most_rows, logits_bytes / (stride * int64_t(sizeof(float)))));
  const int64_t chunk = smaller(args.rows, longest), chunks = ceil_div(args.rows, chunk);
  const T* weight = static_cast<const T*>(args.weight);
  const T* bias = static_cast<const T*>(args.bias);

  int64_t block_size(int64_t block) const { return smaller(class_block, classes - block * class_block); }

  void run() const {
    float* logits = static_cast<float*>(runtime.scratch(scratch_logits, size_t(chunk * stride) * sizeof(float)));
    auto* running = static_cast<Running*>(runtime.scratch(scratch_statistics, size_t(chunk) * sizeof(Running)));
    // Gradients in float32 over all chunks: where they are float32 anyway, in their own place.
    float* x_sum = args.x_grad ? static_cast<float*>(runtime.scratch(scratch_grad, size_t(chunk * k) * sizeof(float))) : nullptr;
    float* weight_sum = over_chunks(args.weight_grad, classes * k, scratch_grad_hidden);
    float* bias_sum = args.bias_grad ? static_cast<float*>(runtime.scratch(scratch_bias, size_t(classes) * sizeof(float))) : nullptr;
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t first = c * chunk, rows = smaller(chunk, args.rows - first);
      const Gathered<T> gathered = {static_cast<const T*>(args.x), k, args.row + first};
      const Rows x = as_rows(gathered);
      for (int64_t r = 0; r < rows; r++) running[r] = {-__builtin_inff(), 0.0f, 0.0f, 0.0f};
      for (int64_t block = 0; block < blocks; block++) {
        float* part = logits + (wants_grad ? block * class_block : 0);
        block_logits(x, rows, block, part);
        take_in(first, rows, block, part, running);
      }
      if (args.loss) finish_loss(first, rows, running);
      if (wants_grad)
        for (int64_t block = 0; block < blocks; block++) {
          float* part = logits + block * class_block;
          to_gradient(first, rows, block, part, running);
          add_gradients(x, c, rows, block, part, x_sum, weight_sum, bias_sum);
        }
      if (args.x_grad)
        parallel_rows(rows, [&](int64_t r) { round_to(x_sum + r * k, k, static_cast<T*>(args.x_grad) + args.row[first + r] * k); });
    }
    if constexpr (sizeof(T) != sizeof(float))
      if (args.weight_grad)
        parallel(runtime, classes, [&](int64_t row) { round_to(weight_sum + row * k, k, static_cast<T*>(args.weight_grad) + row * k); });
    if (args.bias_grad) round_to(bias_sum, classes, static_cast<T*>(args.bias_grad));
  }

  float* over_chunks(void* grad, int64_t count, int slot) const {
    if (!grad) return nullptr;
    if constexpr (sizeof(T) == sizeof(float)) return static_cast<float*>(grad);
    return static_cast<float*>(runtime.scratch(slot, size_t(count) * sizeof(float)));
  }
  template <class Out>
  static void round_to(const float* x, int64_t n, Out* out) {
    each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) { store(load(x + i, here), out + i, here); });
  }
  template <class Body>
  void parallel_rows(int64_t rows, const Body& body) const {
    constexpr int64_t together = 8;
    parallel(runtime, ceil_div(rows, together), [&](int64_t task) {
      for (int64_t r = task * together; r < smaller(rows, (task + 1) * together); r++) body(r);
    });
  }

  void block_logits(const Rows& x, int64_t rows, int64_t block, float* part) const {
    const int64_t begin = block * class_block, size = block_size(block);
    const Stored<T> stored = {weight + begin * k, k};
    product(runtime, {x, false}, rows, {as_rows(stored), true}, size, k, part, stride,
            [&](int64_t, int64_t here, int64_t column, int64_t count, float* c, int64_t c_stride) {
              if (!bias) return;
              for (int64_t r = 0; r < here; r++) add_to_row(bias + begin + column, count, c + r * c_stride);
            });
  }

  // The block into the running sums of its rows: the exponentials are rescaled when the maximum grows.
  void take_in(int64_t first, int64_t rows, int64_t block, const float* part, Running* running) const {
    const int64_t begin = block * class_block, size = block_size(block);
    parallel_rows(rows, [&](int64_t r) {
      const float* row = part + r * stride;
      Running& s = running[r];
      F32 highest = F32::set(-__builtin_inff());
      each_vector(size, [&](int64_t i, int here) __attribute__((always_inline)) {
        highest = max(highest, here == F32::width ? F32::load(row + i) : load_partial(row + i, here, -__builtin_inff()));
      });
      const float top = maximum(highest), high = s.maximum > top ? s.maximum : top;
      const F32 offset = F32::set(high == -__builtin_inff() ? 0.0f : high);  // all masked so far: their exponentials are 0
      float total[2];
      row_sums(size, total, [&](int64_t i, int here, F32* sums) __attribute__((always_inline)) {
        const F32 x = load(row + i, here);
        const F32 away = here == F32::width ? x - offset : load_partial(row + i, here, -__builtin_inff()) - offset;
        sums[0] = sums[0] + exp2(away * F32::set(1.44269504f));
        sums[1] = sums[1] + x;
      });
      float rescale[F32::width];
      exp2(F32::set((s.maximum - high) * 1.44269504f)).store(rescale);
      s.exponentials = (s.exponentials == 0.0f ? 0.0f : s.exponentials * rescale[0]) + total[0];
      s.logits += total[1];
      s.maximum = high;
      const int64_t wanted = args.target[args.row[first + r]] - begin;
      if (wanted >= 0 && wanted < size) s.target = row[wanted];
    });
  }

  void finish_loss(int64_t first, int64_t rows, const Running* running) const {
    for (int64_t r = 0; r < rows; r++) {
      const Running& s = running[r];
      const int64_t at = args.row[first + r];
      args.logsumexp[at] = s.maximum + __builtin_logf(s.exponentials);
      const float nearest = args.logsumexp[at] - s.target, spread = args.logsumexp[at] - s.logits / float(classes);
      args.loss[at] = args.smoothing == 0.0f ? nearest : (1.0f - args.smoothing) * nearest + args.smoothing * spread;
    }
  }

  // The block's logits to their gradient, in place, from the running sums: maximum and sum apart are not rounded together, and what the
  // exponential function errs by in all its values cancels.
  void to_gradient(int64_t first, int64_t rows, int64_t block, float* part, const Running* running) const {
    const int64_t begin = block * class_block, size = block_size(block);
    parallel_rows(rows, [&](int64_t r) {
      float* row = part + r * stride;
      const int64_t at = args.row[first + r];
      const float scale = args.row_scale ? args.row_scale[at] : args.scale;
      const F32 offset = F32::set(running[r].maximum), factor = F32::set(scale / running[r].exponentials);
      const F32 everywhere = F32::set(args.smoothing / float(classes) * scale);
      each_vector(size, [&](int64_t i, int here) __attribute__((always_inline)) {
        store(exp(load(row + i, here) - offset) * factor - everywhere, row + i, here);
      });
      const int64_t wanted = args.target[at] - begin;
      if (wanted >= 0 && wanted < size) row[wanted] -= (1.0f - args.smoothing) * scale;
    });
  }

  void add_gradients(const Rows& x, int64_t c, int64_t rows, int64_t block, const float* part, float* x_sum,
                     float* weight_sum, float* bias_sum) const {
    const int64_t begin = block * class_block, size = block_size(block);
    const Stored<float> d = {part, stride};
    if (bias_sum) {
      constexpr int64_t columns = 256;
      parallel(runtime, ceil_div(size, columns), [&](int64_t task) {
        const int64_t column = task * columns, count = smaller(columns, size - column);
        float sums[columns], work[2 * columns];
        ChainedSums chained(sums, work, count);
        for (int64_t r = 0; r < rows; r++) {
          add_to_row(part + r * stride + column, count, work);
          chained.row_done();
        }
        chained.finish();
        float* target = bias_sum + begin + column;
        c == 0 ? round_to(sums, count, target) : add_to_row(sums, count, target);
      });
    }
    // c to `out`, or added to what is there.
    auto put = [](const float* c, int64_t c_stride, int64_t rows, int64_t count, float* out, int64_t out_stride, bool add) {
      for (int64_t r = 0; r < rows; r++) {
        if (add) add_to_row(c + r * c_stride, count, out + r * out_stride);
        else round_to(c + r * c_stride, count, out + r * out_stride);
      }
    };
    if (x_sum) {
      const Stored<T> stored = {weight + begin * k, k};
      product(runtime, {as_rows(d, parts_enough_for<T>), false}, rows, {as_rows(stored), false}, k, size, nullptr, 0,
              [&](int64_t row, int64_t here, int64_t column, int64_t count, const float* c_part, int64_t c_stride) {
                put(c_part, c_stride, here, count, x_sum + row * k + column, k, block > 0);
              });
    }
    if (weight_sum)
      product(runtime, {as_rows(d, parts_enough_for<T>), true}, size, {x, false}, k, rows, nullptr, 0,
              [&](int64_t row, int64_t here, int64_t column, int64_t count, const float* c_part, int64_t c_stride) {
                put(c_part, c_stride, here, count, weight_sum + (begin + row) * k + column, k, c > 0);
              });
  }
};

}  // namespace

void cross_entropy(const Runtime& runtime, const CrossEntropyArgs& args) {
  with_dtype(args.dtype, [&](auto type) { CrossEntropy<decltype(type)>{runtime, args}.run(); });
}

}  // namespace bigmodel::BIGMODEL_ISA
