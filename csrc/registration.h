// What the registration files share: torch's types, the chosen instruction set's kernels, the runtime lent to them, the checks
// that memory safety needs, and results on large pages. Defined in register_cpu.cpp.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "text.h"

namespace bigmodel {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline constexpr size_t huge_page = size_t(2) << 20;

const KernelTable& kernels();
Runtime runtime();
// body(), whose kernels have their threads from its begin to its end: for several kernels, and those that deal tasks several times.
void together(void (*body)(const void* of), const void* of);
template <class Body>
void together(const Body& body) {
  together([](const void* of) { (*static_cast<const Body*>(of))(); }, &body);
}
void prefer_huge_pages(void* memory, size_t bytes);

Dtype dtype_of(const Tensor& tensor, const char* name);
std::string shape_of(const Tensor& tensor);
void check_defined(const Tensor& tensor, const char* name);
inline ScalarType scalar_type_of(const Tensor& tensor, const char* name) {
  check_defined(tensor, name);
  try {
    return tensor.scalar_type();
  } catch (const std::exception&) {  // torch's interface for libraries does not know all of its dtypes
    STD_TORCH_CHECK(false, name, ": dtype is not supported");
    throw;
  }
}
void check_cpu(const Tensor& tensor, const char* name);
void check_aligned(const Tensor& tensor, const char* name);
// Where a tensor's elements begin. Without elements that may be null, to which nothing may be added; what these give instead may not be
// read either. For kernels that go to a head's rows before they see that it has none.
const void* const_elements(const Tensor& tensor);
void* mutable_elements(const Tensor& tensor);
// A dense array of exactly this dtype and this many elements; null where there is no tensor.
const void* data_of(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel);
const void* data_of(const OptionalTensor& tensor, const char* name, ScalarType dtype, int64_t numel);

Activation activation_of(const std::string& name);
WeightLayout layout_of(const std::string& name);
NormPosition position_of(const std::string& name);
const PackedHeader& check_packed(const Tensor& packed, const char* name);
inline WeightArgs packed_weight(const PackedHeader& header) { return {.k = header.k, .n = header.n, .packed = &header}; }
int64_t rows_of(const Tensor& x, int64_t columns);
NormKind norm_kind_of(const std::string& name, const char* argument = "norm_kind");
// Where a norm is there if it has a weight.
bool has_norm(const OptionalTensor& weight, const OptionalTensor& bias);
// `prefix` is of the names of weight and bias in an error.
NormArgs norm_args(const OptionalTensor& weight, const OptionalTensor& bias, double eps, ScalarType dtype, int64_t n,
                   NormKind kind = NormKind::layer_norm, double weight_offset = 0.0, const char* prefix = "norm_");
size_t packed_size(int64_t k, int64_t n, Dtype dtype, const KernelTable& table);
// Ids and tables of an embedding: word, position, token type; the last two may be missing. Ids are checked to be in range.
void embedding_tables(const OptionalTensor (&ids)[3], const OptionalTensor (&tables)[3], const int64_t* (&id_data)[3], const void* (&table_data)[3]);
const int64_t* ids_of(const OptionalTensor& ids, const char* name, const OptionalTensor& table, int64_t tokens);

// Dropout with this seed (one int64) and chance; neither means none.
Dropout dropout_of(const OptionalTensor& seed, double p, const char* name = "dropout_seed");

// Uninitialised results; large ones are of memory that is kept for the next ones, in large pages (memory.cpp).
Tensor empty_result(const std::vector<int64_t>& shape, ScalarType dtype);
Tensor empty_rows_like(const Tensor& x, int64_t columns);
// For a packed weight, of bytes; in large pages too.
Tensor empty_weight(size_t bytes);

// Cosines and sines (1 or batch, rows, angles) of args, which has the rest.
void set_angles(RotaryArgs& args, const Tensor& cos, const Tensor& sin);

// The options of attention, by the names and in the order of the operator.
struct AttentionOptions {
  OptionalTensor key_padding_mask, bias, cu_seqlens_q, cu_seqlens_k, dropout_seed, alibi_slopes, sinks;
  int64_t max_seqlen_q, max_seqlen_k;
  double softmax_scale;
  bool is_causal;
  int64_t window_left, window_right;
  double softcap, dropout_p;
};
// Everything but the results, checked.
AttentionArgs attention_args(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options);
// What is not in the tensors' shapes, for an args that has those.
void set_options(AttentionArgs& args, const AttentionOptions& options);
// Strides of batch, head and row of a result, whose rows have the heads side by side.
void result_strides(const AttentionArgs& args, int64_t strides[3]);
// Shape and strides of logsumexp and its like: (B, H, Sq), or (H, total) packed.
std::vector<int64_t> logsumexp_shape(const Tensor& query, const AttentionArgs& args, int64_t strides[2]);

// Ops that others are made of.
Tensor norm_op(NormKind kind, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps, const OptionalTensor& residual,
               const OptionalTensor& dropout_seed, double dropout_p, double weight_offset, const char* prefix = "");
Tensor cpu_linear(Tensor x, Tensor packed, OptionalTensor bias, Text activation, OptionalTensor residual, OptionalTensor norm_weight,
                  OptionalTensor norm_bias, double norm_eps, OptionalTensor dropout_seed, Text norm_kind, double dropout_p);
Tensor cpu_feed_forward(Tensor x, Tensor packed_in, OptionalTensor b_in, Tensor packed_out, OptionalTensor b_out, Text activation,
                        OptionalTensor residual, Text norm_position, OptionalTensor norm_weight, OptionalTensor norm_bias,
                        double norm_eps, OptionalTensor packed_gate, OptionalTensor b_gate, OptionalTensor dropout_seed, Text norm_kind,
                        double dropout_p);

}  // namespace bigmodel
