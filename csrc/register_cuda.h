// What the files that register the CUDA ops have in common: checks, the memory of a call, and the ops that others are made of.
//
// Compiled by nvcc they register bigmodel::cuda_* for CUDA tensors. Compiled by a C++ compiler, for the tests, they register
// bigmodel_emulator::cuda_* for CPU tensors: the same checks, parameters, grids and kernels, in the emulator.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#if defined(__CUDACC__)
#include <torch/csrc/stable/accelerator.h>
#endif

#include <atomic>
#include <cmath>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arch/launch.cuh"
#include "attention/launch.h"
#include "philox/cuda.h"
#include "text.h"

#if defined(__CUDACC__)
#define BM_CUDA_OPS(m) STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel, m)
#define BM_CUDA_OPS_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(bigmodel, CUDA, m)
#else
#define BM_CUDA_OPS(m) STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_emulator, m)
#define BM_CUDA_OPS_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(bigmodel_emulator, CPU, m)
#endif

namespace bigmodel::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); i++) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

#if !defined(__CUDACC__)
inline std::atomic<uint64_t> seed{0};              // of the emulator's schedule
inline std::atomic<int64_t> emulated_architecture{80};
#endif

#if defined(__CUDACC__)
// Of a device, asked once.
inline int attribute(int32_t device, cudaDeviceAttr which, const char* name) {
  static std::map<std::pair<int32_t, int>, int> known;
  static std::mutex lock;
  std::lock_guard<std::mutex> guard(lock);
  const auto [at, is_new] = known.try_emplace({device, int(which)}, 0);
  if (is_new && cudaDeviceGetAttribute(&at->second, which, device) != cudaSuccess) {
    known.erase(at);
    throw std::runtime_error(std::string(name) + " of CUDA device " + std::to_string(device) + " cannot be read");
  }
  return at->second;
}
#endif

// Whose kernels run: 90 for Hopper, whose instructions no later GPU has, and 80 for all others.
inline int architecture([[maybe_unused]] int32_t device) {
#if defined(__CUDACC__)
  return attribute(device, cudaDevAttrComputeCapabilityMajor, "the compute capability") == 9 ? 90 : 80;
#else
  return int(emulated_architecture);
#endif
}

inline int multiprocessors([[maybe_unused]] int32_t device) {
#if defined(__CUDACC__)
  return attribute(device, cudaDevAttrMultiProcessorCount, "the number of multiprocessors");
#else
  return 3;  // few, so that blocks have more tiles than one
#endif
}

// The memory of a call's tensors, checked to be on one device, the current one meanwhile; the stream to launch on.
class Call {
 public:
  explicit Call(const Tensor& first)
      : device_(first.get_device_index())
#if defined(__CUDACC__)
        , guard_(device_)
#endif
  {}

  void check(const Tensor& tensor, const char* name) const {
#if defined(__CUDACC__)
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, name, ": must be on the CUDA device of query");
#else
    STD_TORCH_CHECK(tensor.is_cpu(), name, ": must be on the CPU, where the emulator runs");
#endif
  }

  // The tensor's memory for a kernel, with all that its strides reach.
  void* use(const Tensor& tensor, const char* name, bool writable) {
    check(tensor, name);
    void* data = tensor.mutable_data_ptr();
#if !defined(__CUDACC__)
    int64_t reach = tensor.numel() ? 1 : 0;
    for (int64_t i = 0; reach && i < tensor.dim(); i++) reach += (tensor.size(i) - 1) * tensor.stride(i);
    stream_.memory.push_back({data, size_t(reach) * tensor.element_size(), writable});
    stream_.seed = seed;
#else
    (void)writable;
#endif
    return data;
  }

  const Stream& stream() {
#if defined(__CUDACC__)
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_.stream = static_cast<cudaStream_t>(stream);
#endif
    return stream_;
  }

  int32_t device() const { return device_; }

 private:
  int32_t device_;
#if defined(__CUDACC__)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_;
};

inline const Tensor& require(const Tensor& tensor, const char* name, ScalarType dtype, int64_t dims) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == dims, name, ": shape ", shape_of(tensor), " must have ", dims, " dimensions");
  return tensor;
}

inline int32_t narrow(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= INT32_MIN && value <= INT32_MAX, name, ": ", value, " does not fit 32 bits");
  return int32_t(value);
}

// What a kernel reads 16 bytes at a time.
inline bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr()) % 16 == 0; }

inline uint32_t dropout_threshold(double p) {  // a word below it drops
  const double threshold = std::nearbyint(p * 4294967296.0);
  return threshold >= 4294967295.0 ? 4294967295u : uint32_t(threshold);
}

// Dropout of a matrix's elements; none without a seed.
inline ElementDropout element_dropout(Call& call, const OptionalTensor& dropout_seed, double dropout_p) {
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p: ", dropout_p, " must be in [0, 1)");
  STD_TORCH_CHECK(dropout_seed.has_value() == (dropout_p > 0), "dropout_seed: must be given with dropout_p, and only with it");
  if (!dropout_seed) return {};
  require(*dropout_seed, "dropout_seed", ScalarType::Long, 0);
  return {static_cast<const int64_t*>(call.use(*dropout_seed, "dropout_seed", false)), dropout_threshold(dropout_p), float(1 / (1 - dropout_p))};
}

// Gradients as an operator returns them: empty where there is none.
inline std::vector<Tensor> filled(const std::vector<OptionalTensor>& gradients, const Tensor& like) {
  std::vector<Tensor> all;
  for (const OptionalTensor& gradient : gradients) all.push_back(gradient ? *gradient : torch::stable::new_empty(like, {0}));
  return all;
}

// The arguments of bigmodel::attention that the backward has too.
struct AttentionInputs {
  const Tensor &query, &key, &value;
  const OptionalTensor &key_padding_mask, &bias, &cu_seqlens_q, &cu_seqlens_k, &dropout_seed, &alibi_slopes, &sinks;
  int64_t max_seqlen_q, max_seqlen_k;
  double softmax_scale;
  bool is_causal;
  int64_t window_left, window_right;
  double softcap, dropout_p;
};

// ---- ops, and parts of them, that a layer is made of (register_cuda.cpp) ----

// Checks all of these and fills in all parameters but the results'. float_sinks keeps the converted sinks alive.
AttentionParams attention_params(Call& call, const AttentionInputs& inputs, Tensor& float_sinks);
void launch_attention(const AttentionParams& p, Call& call, const Tensor& query, const Tensor& key);
// float32, one for each query: (B, H, S), or (H, total).
Tensor rows_like(const Tensor& query);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, OptionalTensor grad_logsumexp, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp,
    OptionalTensor key_padding_mask, OptionalTensor bias, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor dropout_seed,
    OptionalTensor alibi_slopes, OptionalTensor sinks, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool is_causal,
    int64_t window_left, int64_t window_right, double softcap, double dropout_p, bool bias_requires_grad, bool deterministic, bool side_by_side);
bool is_conv1d(const std::string& layout);
std::tuple<Tensor, Tensor> linear(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, OptionalTensor residual,
                                  OptionalTensor dropout_seed, Text weight_layout, Text activation, double dropout_p,
                                  bool keep_preactivation, int64_t form);
std::tuple<Tensor, Tensor, Tensor> hidden_backward(Tensor grad, Tensor w_out, Tensor preactivation, Text weight_layout, Text activation,
                                                   bool need_hidden, bool need_sums, int64_t form);

// ---- norms and sums over rows (register_cuda_norm.cpp) ----

std::tuple<Tensor, Tensor> norm(Tensor x, OptionalTensor residual, Tensor weight, OptionalTensor bias, double eps, Text kind, bool keep_sum);

// Partial sums over rows, float32: `count` rows of `columns` numbers from `first` on, `stride` apart.
struct Parts {
  Tensor memory;
  int64_t first, stride, count, columns;
  Parts part(int64_t column, int64_t width) const { return {memory, first + column, stride, count, width}; }
};

// Sums of parts, all by one launch, in the dtype and on the device of `like`.
class Sums {
 public:
  explicit Sums(const Tensor& like) : like_(like) {}
  Tensor add(const Parts& parts);  // holds the sum after `run`
  void run();

 private:
  Tensor like_;
  std::vector<std::pair<Parts, Tensor>> all_;
};

// Parts of the sums of x's columns, after dropout, and where it drops x after it: otherwise x itself.
std::tuple<Parts, Tensor> column_parts_of(const Tensor& x, const OptionalTensor& dropout_seed, double dropout_p);

// The gradient of a norm of t = dropout(x) + residual, or of x itself where it is `summed`.
struct NormBackwardInputs {
  const Tensor& grad;             // (rows, columns) as all matrices here
  const OptionalTensor &more_grad, &residual, &beside;  // added to grad; t's; added to the gradient of t
  const Tensor& x;
  const OptionalTensor& weight;
  const OptionalTensor& dropout_seed;
  double dropout_p;
  bool summed;
  const std::string& kind;
  double eps, weight_offset;
};
struct NormBackwardNeeds { bool total, x, weight, bias, sums; };
// Without dropout the gradients of t and x are one tensor. Undefined where not needed.
struct NormGradient {
  OptionalTensor total, x;
  std::optional<Parts> weight, bias, sums;  // of the columns of x's
};
NormGradient norm_gradient(const NormBackwardInputs& inputs, NormBackwardNeeds needs);

}  // namespace bigmodel::cuda
