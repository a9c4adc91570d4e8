// Norms, their gradient and sums over rows as torch sees them (register_cuda.h).
#include "register_cuda.h"

#include "norm/launch.h"
#include "reduce/launch.h"

namespace bigmodel::cuda {
namespace {

bool is_rms(const std::string& kind) {
  STD_TORCH_CHECK(kind == "layer_norm" || kind == "rms_norm", "kind: '", kind, "' is unknown");
  return kind == "rms_norm";
}

// Matrices like x and vectors as long as its rows, checked.
class Operands {
 public:
  Operands(Call& call, const Tensor& x) : call_(call), x_(x) {
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "x: dtype must be float16 or bfloat16");
    STD_TORCH_CHECK(require(x, "x", dtype, 2).size(1) % 8 == 0, "x: shape ", shape_of(x), " has ", x.size(1), " columns, which must be a multiple of 8");
  }

  void* matrix(const Tensor& t, const char* name, bool writable = false) const {
    STD_TORCH_CHECK(require(t, name, x_.scalar_type(), 2).is_contiguous() && aligned(t) && t.size(0) == x_.size(0) && t.size(1) == x_.size(1), name,
                    ": shape ", shape_of(t), " must be ", shape_of(x_), ", contiguous, from a multiple of 16 bytes");
    return call_.use(t, name, writable);
  }
  void* matrix(const OptionalTensor& t, const char* name) const { return t ? matrix(*t, name) : nullptr; }

  void* vector(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(require(t, name, x_.scalar_type(), 1).size(0) == x_.size(1) && t.is_contiguous() && aligned(t), name, ": shape ", shape_of(t),
                    " must be (", x_.size(1), ",), contiguous, from a multiple of 16 bytes");
    return call_.use(t, name, false);
  }

 private:
  Call& call_;
  const Tensor& x_;
};

}  // namespace

// norm(x + residual) of rows, and x + residual where it is wanted: otherwise empty.
std::tuple<Tensor, Tensor> norm(Tensor x, OptionalTensor residual, Tensor weight, OptionalTensor bias, double eps, Text kind, bool keep_sum) {
  Call call(x);
  NormParams p = {};
  const Operands operands(call, x);
  p.x = operands.matrix(x, "x");
  p.rows = narrow(x.size(0), "x");
  p.columns = narrow(x.size(1), "x");
  p.residual = operands.matrix(residual, "residual");
  p.weight = operands.vector(weight, "weight");
  if (bias) p.bias = operands.vector(*bias, "bias");
  p.is_rms = is_rms(kind);
  p.eps = float(eps);
  Tensor out = torch::stable::new_empty(x, {p.rows, p.columns}), sum = torch::stable::new_empty(x, {keep_sum ? p.rows : 0, p.columns});
  p.out = call.use(out, "out", true);
  if (keep_sum) p.sum = call.use(sum, "sum", true);
  norm_rows(p, x.scalar_type() == ScalarType::BFloat16, call.stream());
  return {out, sum};
}

Tensor Sums::add(const Parts& parts) {
  Tensor out = torch::stable::new_empty(like_, {parts.columns});
  all_.emplace_back(parts, out);
  return out;
}

void Sums::run() {
  Call call(like_);
  for (size_t done = 0; done < all_.size(); done += max_sums) {
    SumPartsParams p = {};
    for (size_t i = done; i < all_.size() && p.sums < max_sums; i++) {
      const auto& [parts, out] = all_[i];
      const float* first = static_cast<const float*>(call.use(parts.memory, "parts", false)) + parts.first;
      p.sum[p.sums++] = {first, parts.stride, narrow(parts.count, "parts"), narrow(parts.columns, "parts"), call.use(out, "out", true)};
    }
    sum_parts(p, like_.scalar_type() == ScalarType::BFloat16, call.stream());
  }
  all_.clear();
}

std::tuple<Parts, Tensor> column_parts_of(const Tensor& x, const OptionalTensor& dropout_seed, double dropout_p) {
  Call call(x);
  ColumnPartsParams p = {};
  p.x = Operands(call, x).matrix(x, "x");
  p.rows = narrow(x.size(0), "x");
  p.columns = narrow(x.size(1), "x");
  p.x_stride = x.size(1);
  p.dropout = element_dropout(call, dropout_seed, dropout_p);
  p.rows_of_part = column_part_size(p.rows, p.columns, multiprocessors(call.device()));
  const int64_t count = (int64_t(p.rows) + p.rows_of_part - 1) / p.rows_of_part;
  Tensor parts = torch::stable::new_empty(x, {count, p.columns}, ScalarType::Float);
  p.parts = static_cast<float*>(call.use(parts, "parts", true));
  Tensor out = x;
  if (dropout_seed) {
    out = torch::stable::new_empty(x, {p.rows, p.columns});
    p.out = call.use(out, "out", true);
  }
  column_parts(p, x.scalar_type() == ScalarType::BFloat16, call.stream());
  return {Parts{parts, 0, p.columns, count, p.columns}, out};
}

// Sums of x's columns after dropout, and x after it: empty without dropout.
std::tuple<Tensor, Tensor> column_sums(Tensor x, OptionalTensor dropout_seed, double dropout_p) {
  const auto [parts, dropped] = column_parts_of(x, dropout_seed, dropout_p);
  Sums sums(x);
  Tensor out = sums.add(parts);
  sums.run();
  return {out, dropout_seed ? dropped : torch::stable::new_empty(x, {0, x.size(1)})};
}

NormGradient norm_gradient(const NormBackwardInputs& inputs, NormBackwardNeeds needs) {
  const Tensor& x = inputs.x;
  Call call(x);
  const Operands operands(call, x);
  NormBackwardParams p = {};
  p.x = operands.matrix(x, "x");
  STD_TORCH_CHECK(x.size(1) <= max_norm_backward_columns, "x: shape ", shape_of(x), " has ", x.size(1), " columns; up to ", max_norm_backward_columns,
                  " are allowed");
  p.rows = narrow(x.size(0), "x");
  p.columns = narrow(x.size(1), "x");
  p.grad = operands.matrix(inputs.grad, "grad");
  p.more_grad = operands.matrix(inputs.more_grad, "more_grad");
  p.residual = operands.matrix(inputs.residual, "residual");
  p.beside = operands.matrix(inputs.beside, "beside");
  if (inputs.weight) p.weight = operands.vector(*inputs.weight, "weight");
  p.weight_offset = float(inputs.weight_offset);
  p.eps = float(inputs.eps);
  p.is_rms = is_rms(inputs.kind);
  p.summed = inputs.summed;
  p.dropout = element_dropout(call, inputs.dropout_seed, inputs.dropout_p);

  NormGradient found;
  const auto matrix = [&](const char* name, void*& place) {
    Tensor t = torch::stable::new_empty(x, {p.rows, p.columns});
    place = operands.matrix(t, name, true);
    return t;
  };
  if (inputs.dropout_seed) {
    if (needs.total) found.total = matrix("total", p.dtotal);
    if (needs.x) found.x = matrix("dx", p.dx);
  } else if (needs.total || needs.x) {
    found.total = found.x = matrix("dx", p.dx);
  }
  const bool empty = p.rows == 0 || p.columns == 0;
  const int64_t blocks = empty ? 0 : norm_backward_blocks(p.rows, p.columns, multiprocessors(call.device()));
  const int64_t wanted = needs.weight + needs.bias + needs.sums;
  Tensor parts = torch::stable::new_empty(x, {blocks, wanted * p.columns}, ScalarType::Float);
  float* memory = static_cast<float*>(call.use(parts, "parts", true));
  p.parts_stride = wanted * p.columns;
  int64_t first = 0;
  const auto part = [&](bool need, float*& place) -> std::optional<Parts> {
    if (!need) return {};
    place = memory + first;
    const Parts mine{parts, first, p.parts_stride, blocks, p.columns};
    first += p.columns;
    return mine;
  };
  found.weight = part(needs.weight, p.weight_parts);
  found.bias = part(needs.bias, p.bias_parts);
  found.sums = part(needs.sums, p.dx_parts);
  if (!empty) norm_backward_rows(p, x.scalar_type() == ScalarType::BFloat16, int(blocks), call.stream());
  return found;
}

// Gradients of x, residual, weight and bias, and the sums of the columns of that of x, each where `needs` asks for it: otherwise empty.
std::vector<Tensor> norm_backward(Tensor grad, Tensor x, OptionalTensor weight, OptionalTensor residual, OptionalTensor dropout_seed,
                                  OptionalTensor more_grad, OptionalTensor beside, Text kind, double eps, double dropout_p, double weight_offset,
                                  bool summed, std::vector<bool> needs) {
  STD_TORCH_CHECK(needs.size() == 5, "needs: must hold 5 values, not ", needs.size());
  STD_TORCH_CHECK(!summed || !residual, "residual: must be None where x is summed");
  const NormGradient found = norm_gradient(
      {grad, more_grad, residual, beside, x, weight, dropout_seed, dropout_p, summed, kind, eps, weight_offset}, {needs[1], needs[0], needs[2], needs[3], needs[4]});
  Sums sums(x);
  std::vector<OptionalTensor> results(5);
  if (needs[0]) results[0] = found.x;
  if (needs[1]) results[1] = needs[0] && !dropout_seed ? torch::stable::clone(*found.total) : *found.total;  // results share no memory
  const std::optional<Parts>* parts[] = {&found.weight, &found.bias, &found.sums};
  for (int i = 0; i < 3; i++)
    if (*parts[i]) results[2 + i] = sums.add(**parts[i]);
  sums.run();
  return filled(results, x);
}

}  // namespace bigmodel::cuda

BM_CUDA_OPS(m) {
  m.def("cuda_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias=None, *, float eps=1e-5, str kind=\"layer_norm\", "
        "bool keep_sum=False) -> (Tensor, Tensor)");
  m.def("cuda_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? residual=None, Tensor? dropout_seed=None, Tensor? more_grad=None, "
        "Tensor? beside=None, *, str kind, float eps, float dropout_p=0.0, float weight_offset=0.0, bool summed=False, bool[] needs) -> Tensor[]");
  m.def("cuda_column_sums(Tensor x, Tensor? dropout_seed=None, *, float dropout_p=0.0) -> (Tensor, Tensor)");
}

BM_CUDA_OPS_IMPL(m) {
  m.impl("cuda_norm", TORCH_BOX(&bigmodel::cuda::norm));
  m.impl("cuda_norm_backward", TORCH_BOX(&bigmodel::cuda::norm_backward));
  m.impl("cuda_column_sums", TORCH_BOX(&bigmodel::cuda::column_sums));
}
