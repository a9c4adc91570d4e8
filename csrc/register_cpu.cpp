// The CPU ops as torch sees them: schemas, checks, choice of instruction set, threads and scratch memory; no arithmetic.
// LibTorch's stable ABI only, so that one binary serves every torch from 2.10 on.
//
// These ops are called by bigmodel_kernels/ops/*/native.py after friendlier checks in Python. They check again what memory
// safety needs, because anything can call torch.ops.bigmodel.cpu_*.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(BIGMODEL_X86)
#include <cpuid.h>
#endif

#include "registration.h"
#include "tasks.h"

namespace bigmodel {

#ifndef BIGMODEL_EVERY_CPU
#error "compile with -DBIGMODEL_EVERY_CPU=<the instruction set that every CPU of the machine has>"
#endif
#define BIGMODEL_DECLARE_TABLE(isa) namespace isa { extern const KernelTable table; }
#if defined(BIGMODEL_X86)
BIGMODEL_DECLARE_TABLE(amx)
BIGMODEL_DECLARE_TABLE(avx512_bf16)
BIGMODEL_DECLARE_TABLE(avx512)
BIGMODEL_DECLARE_TABLE(avx2)
#endif
BIGMODEL_DECLARE_TABLE(BIGMODEL_EVERY_CPU)

// ---- instruction sets ----

struct Isa {
  const KernelTable* table;
  bool supported;
};

#if defined(BIGMODEL_X86)
// Clang 14 has no name for it.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#if defined(BIGMODEL_X86) && !defined(BIGMODEL_EMULATE_AVX512)
// Whether the CPU has the tile unit with bf16, and the system lets this process use its registers, for which it has to be asked.
bool tile_unit() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

const std::vector<Isa>& instruction_sets() {  // best first
  static const std::vector<Isa> sets = [] {
    std::vector<Isa> all;
#if defined(BIGMODEL_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(BIGMODEL_EMULATE_AVX512)  // a test build: the AVX-512 and AMX objects run on any AVX2 CPU, and never by default
    all.push_back({&amx::table, avx2});
    all.push_back({&avx512_bf16::table, avx2});
    all.push_back({&avx512::table, avx2});
#else
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    all.push_back({&amx::table, bf16 && tile_unit()});
    all.push_back({&avx512_bf16::table, bf16});
    all.push_back({&avx512::table, avx512});
#endif
    all.push_back({&avx2::table, avx2});
#endif
    all.push_back({&BIGMODEL_EVERY_CPU::table, true});
    return all;
  }();
  return sets;
}

const KernelTable* find_isa(const std::string& name, std::string* known) {
  for (const Isa& isa : instruction_sets()) {
    if (!isa.supported) continue;
    if (name == isa.table->isa) return isa.table;
    *known += std::string(known->empty() ? "" : ", ") + isa.table->isa;
  }
  return nullptr;
}

const KernelTable* default_isa() {
  if (const char* wanted = std::getenv("BIGMODEL_CPU_ISA"); wanted && *wanted) {
    std::string known;
    const KernelTable* table = find_isa(wanted, &known);
    STD_TORCH_CHECK(table, "BIGMODEL_CPU_ISA=", wanted, " is not supported by this CPU and build; supported: ", known);
    return table;
  }
  for (const Isa& isa : instruction_sets()) {
#if defined(BIGMODEL_EMULATE_AVX512)
    if (isa.table->panel > avx2::table.panel) continue;
#endif
    if (isa.supported) return isa.table;
  }
  return &BIGMODEL_EVERY_CPU::table;
}

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> table{default_isa()};
  return table;
}
const KernelTable& kernels() { return *chosen().load(std::memory_order_relaxed); }

std::string cpu_isa() { return kernels().isa; }

std::string cpu_isas() {
  std::string known;
  find_isa("", &known);
  return known;
}

void cpu_set_isa(Text name) {
  std::string known;
  const KernelTable* table = find_isa(name, &known);
  STD_TORCH_CHECK(table, "name: '", name, "' is not supported by this CPU and build; supported: ", known);
  chosen().store(table);
}

// ---- runtime ----

constexpr auto on_torch_threads = [](int64_t threads, const auto& work) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin++) work(begin);
  });
};

using TorchThreads = Threads<on_torch_threads>;

// Packed weights and large scratch blocks are read from end to end again and again, and a large result is memory that the system
// has just given: with 2 MB pages there are 512 times fewer walks and faults. Advice only, before the first touch.
void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / huge_page * huge_page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A thread's scratch grows to what its largest call needed; nothing of it is memory too, which may be cleared. Beyond `keep` bytes a block is given back by the next smaller request.
void* thread_scratch(int slot, size_t bytes) {
  struct Block {
    void* memory = nullptr;
    size_t size = 0;
    ~Block() { std::free(memory); }
  };
  constexpr size_t keep = size_t(64) << 20;
  thread_local Block blocks[scratch_slots];
  Block& block = blocks[slot];
  if (!block.memory || bytes > block.size || (block.size > keep && bytes <= keep)) {
    std::free(block.memory);
    bytes = std::max<size_t>(bytes, 1);
    const size_t page = bytes < huge_page / 8 ? 4096 : huge_page;
    block.size = (bytes + page - 1) / page * page;
    block.memory = std::aligned_alloc(page, block.size);
    if (!block.memory) block.size = 0;
    STD_TORCH_CHECK(block.memory, "out of memory: ", bytes, " bytes of scratch");
    prefer_huge_pages(block.memory, block.size);
  }
  return block.memory;
}

Runtime runtime() {
  return {TorchThreads::team ? TorchThreads::size : int64_t(torch::stable::get_num_threads()), TorchThreads::run, TorchThreads::run_near, thread_scratch};
}

void together(void (*body)(const void* of), const void* of) {
  TorchThreads::together(runtime().threads, [&] { body(of); });
}

// ---- checks ----

// torch takes None where a schema says Tensor.
void check_defined(const Tensor& tensor, const char* name) { STD_TORCH_CHECK(tensor.defined(), name, ": must be a tensor, not None"); }

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (scalar_type_of(tensor, name)) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, name, ": dtype must be float32, bfloat16 or float16 on the CPU backend");
  }
  return Dtype::float32;
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); i++) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

void check_cpu(const Tensor& tensor, const char* name) {
  check_defined(tensor, name);
  STD_TORCH_CHECK(tensor.device().type() == torch::headeronly::DeviceType::CPU, name, ": must be on the CPU");
}

// Compilers may use loads that need it; torch makes such tensors of a caller's buffer.
void check_aligned(const Tensor& tensor, const char* name) {
  const size_t size = tensor.element_size();
  STD_TORCH_CHECK(tensor.numel() == 0 || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % size == 0, name,
                  ": its address must be a multiple of its element size, ", size, " bytes");
}

alignas(64) static char no_element[64];
const void* const_elements(const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  return data ? data : no_element;
}
void* mutable_elements(const Tensor& tensor) {
  void* data = tensor.mutable_data_ptr();
  return data ? data : no_element;
}

// A dense array of exactly this dtype and this many elements.
const void* data_of(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(scalar_type_of(tensor, name) == dtype, name, ": dtype differs from the input's");
  STD_TORCH_CHECK(tensor.numel() == numel, name, ": shape ", shape_of(tensor), " does not have ", numel, " elements");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": must be contiguous");
  check_aligned(tensor, name);
  return tensor.const_data_ptr();
}
const void* data_of(const OptionalTensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
  return tensor ? data_of(*tensor, name, dtype, numel) : nullptr;
}

Activation activation_of(const std::string& name) {
  static const std::pair<const char*, Activation> known[] = {
      {"none", Activation::none}, {"gelu", Activation::gelu}, {"gelu_tanh", Activation::gelu_tanh},
      {"quick_gelu", Activation::quick_gelu}, {"relu", Activation::relu}, {"silu", Activation::silu}};
  for (const auto& [text, value] : known)
    if (name == text) return value;
  STD_TORCH_CHECK(false, "activation: '", name, "' is not one of none, gelu, gelu_tanh, quick_gelu, relu, silu");
  return Activation::none;
}

WeightLayout layout_of(const std::string& name) {
  STD_TORCH_CHECK(name == "linear" || name == "conv1d", "weight_layout: '", name, "' is not one of linear, conv1d");
  return name == "linear" ? WeightLayout::linear : WeightLayout::conv1d;
}

NormPosition position_of(const std::string& name) {
  if (name == "none") return NormPosition::none;
  if (name == "pre") return NormPosition::pre;
  STD_TORCH_CHECK(name == "post", "norm_position: '", name, "' is not one of none, pre, post");
  return NormPosition::post;
}

size_t packed_size(int64_t k, int64_t n, Dtype dtype, const KernelTable& table) {
  const int64_t rows = dtype == Dtype::bfloat16 && table.bf16_pairs ? (k + 1) / 2 * 2 : k;
  return sizeof(PackedHeader) + size_t(rows) * size_t((n + table.panel - 1) / table.panel * table.panel) * size_t(dtype_size(dtype));
}

// A packed weight made by this build for the instruction set now in use, as large as its header says. A header is bytes of a tensor:
// whatever stands there, it must not send a kernel out of the tensor.
const PackedHeader& check_packed(const Tensor& packed, const char* name) {
  check_cpu(packed, name);
  STD_TORCH_CHECK(scalar_type_of(packed, name) == ScalarType::Byte && packed.is_contiguous() && packed.dim() == 1 &&
                      packed.numel() >= int64_t(sizeof(PackedHeader)),
                  name, ": is not a weight packed by cpu_pack_weight");
  const auto& header = *static_cast<const PackedHeader*>(packed.const_data_ptr());
  STD_TORCH_CHECK(header.magic == packed_magic, name, ": is not a weight packed by cpu_pack_weight");
  const KernelTable& table = kernels();
  STD_TORCH_CHECK(header.panel == table.panel && header.pairs == (header.dtype == Dtype::bfloat16 && table.bf16_pairs),
                  name, ": was packed for another instruction set than ", table.isa);
  const int64_t most = packed.numel();  // of either: each feature has an element at least, so that packed_size cannot overflow
  STD_TORCH_CHECK(header.k >= 1 && header.n >= 1 && header.k <= most / header.n &&
                      size_t(packed.numel()) == packed_size(header.k, header.n, header.dtype, table),
                  name, ": is damaged, its size does not fit its header");
  check_aligned(packed, name);
  return header;
}

// ---- ops ----

Tensor cpu_pack_weight(std::vector<Tensor> weights, Text weight_layout) {
  STD_TORCH_CHECK(!weights.empty(), "weights: is empty");
  const WeightLayout layout = layout_of(weight_layout);
  const int out = layout == WeightLayout::linear ? 0 : 1;
  const Dtype dtype = dtype_of(weights[0], "weights");
  int64_t k = 0, n = 0;
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.dim() == 2, "weights: shape ", shape_of(weight), " must have two dimensions");
    STD_TORCH_CHECK(weight.numel() > 0, "weights: shape ", shape_of(weight), " has no elements");
    STD_TORCH_CHECK(n == 0 || weight.size(1 - out) == k, "weights: shape ", shape_of(weight), " must have in_features ", k);
    k = weight.size(1 - out);
    n += weight.size(out);
  }
  const KernelTable& table = kernels();
  Tensor packed = empty_weight(packed_size(k, n, dtype, table));
  auto& header = *static_cast<PackedHeader*>(packed.mutable_data_ptr());
  header = {packed_magic, k, n, dtype, table.panel, dtype == Dtype::bfloat16 && table.bf16_pairs, {}};
  int64_t column = 0;
  for (const Tensor& weight : weights) {
    const void* data = data_of(weight, "weights", scalar_type_of(weights[0], "weights"), weight.numel());
    table.pack(runtime(), {data, layout, dtype, k, weight.size(out), column, &header});
    column += weight.size(out);
  }
  return packed;
}

// A hash of where each weight lies and how, and of 16 elements spread over it: how the cache of packed weights notices other memory, and an
// edit that left the tensor's version as it was. Any strides. All are asked for before the first is read: each is a miss of every cache.
int64_t cpu_fingerprint(std::vector<Tensor> weights) {
  // 16 elements of each, in four places: where much has been read since, each page costs microseconds to come back to.
  constexpr int64_t windows = 4, each = 4;
  const auto part_of = [](int64_t n, int64_t i, int64_t of) { return n / of * i + n % of * i / of; };  // n * i / of, without overflow
  struct Sample { const char* at; size_t size; };
  std::vector<Sample> places;
  places.reserve(weights.size() * windows * each);
  uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a, 64 bit, over words
  const auto add = [&](uint64_t word) { hash = (hash ^ word) * 0x100000001b3ull; };
  for (const Tensor& weight : weights) {
    check_cpu(weight, "weights");
    STD_TORCH_CHECK(weight.dim() == 2, "weights: shape ", shape_of(weight), " must have two dimensions");
    const int64_t size = dtype_size(dtype_of(weight, "weights")), columns = weight.size(1), numel = weight.numel();
    const int64_t stride_row = weight.stride(0), stride_column = weight.stride(1);
    const char* data = static_cast<const char*>(weight.const_data_ptr());
    for (int64_t word : {int64_t(reinterpret_cast<uintptr_t>(data)), weight.size(0), columns, stride_row, stride_column, int64_t(weight.scalar_type())})
      add(uint64_t(word));
    if (numel == 0) continue;
    // Along the dimension whose elements lie side by side, windows of less than a page, from the first element to the last.
    const bool along_rows = stride_column <= stride_row;
    const int64_t fast = along_rows ? columns : weight.size(0), slow = along_rows ? weight.size(0) : columns;
    const int64_t fast_stride = along_rows ? stride_column : stride_row, slow_stride = along_rows ? stride_row : stride_column;
    const int64_t window = std::min<int64_t>(fast, 256);
    for (int64_t i = 0; i < windows; i++)
      for (int64_t j = 0; j < each; j++) {
        const int64_t at_slow = part_of(slow - 1, i, windows - 1), at_fast = part_of(fast - window, i, windows - 1) + part_of(window - 1, j, each - 1);
        places.push_back({data + (at_slow * slow_stride + at_fast * fast_stride) * size, size_t(size)});
        __builtin_prefetch(places.back().at);
      }
  }
  for (const Sample& place : places) {
    uint32_t bits = 0;
    std::memcpy(&bits, place.at, place.size);
    add(bits);
  }
  return int64_t(hash);
}

int64_t rows_of(const Tensor& x, int64_t columns) {
  check_cpu(x, "x");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == columns, "x: shape ", shape_of(x), " must end in ", columns);
  STD_TORCH_CHECK(x.is_contiguous(), "x: must be contiguous");
  check_aligned(x, "x");
  return columns == 0 ? 0 : x.numel() / columns;
}

Tensor empty_rows_like(const Tensor& x, int64_t columns) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = columns;
  return empty_result(shape, x.scalar_type());
}

NormKind norm_kind_of(const std::string& name, const char* argument) {
  STD_TORCH_CHECK(name == "layer_norm" || name == "rms_norm", argument, ": '", name, "' is not one of layer_norm, rms_norm");
  return name == "layer_norm" ? NormKind::layer_norm : NormKind::rms_norm;
}

bool has_norm(const OptionalTensor& weight, const OptionalTensor& bias) {
  STD_TORCH_CHECK(weight || !bias, "norm_bias: must be None without norm_weight");
  return weight.has_value();
}

NormArgs norm_args(const OptionalTensor& weight, const OptionalTensor& bias, double eps, ScalarType dtype, int64_t n, NormKind kind, double weight_offset,
                   const char* prefix) {
  const std::string names[2] = {std::string(prefix) + "weight", std::string(prefix) + "bias"};
  STD_TORCH_CHECK(kind == NormKind::layer_norm || !bias, names[1], ": must be None with rms_norm");
  return {data_of(weight, names[0].c_str(), dtype, n), data_of(bias, names[1].c_str(), dtype, n), float(eps), kind, float(weight_offset)};
}

Tensor cpu_linear(Tensor x, Tensor packed, OptionalTensor bias, Text activation, OptionalTensor residual,
                  OptionalTensor norm_weight, OptionalTensor norm_bias, double norm_eps, OptionalTensor dropout_seed, Text norm_kind,
                  double dropout_p) {
  const PackedHeader& header = check_packed(packed, "packed");
  const ScalarType dtype = scalar_type_of(x, "x");
  STD_TORCH_CHECK(dtype_of(x, "x") == header.dtype, "packed: dtype differs from the input's");
  const int64_t rows = rows_of(x, header.k), n = header.n;
  Tensor out = empty_rows_like(x, n);
  if (rows == 0 || n == 0) return out;
  const LinearArgs args = {header.dtype, rows, x.const_data_ptr(), packed_weight(header), data_of(bias, "bias", dtype, n), activation_of(activation),
                           data_of(residual, "residual", dtype, rows * n), has_norm(norm_weight, norm_bias),
                           norm_args(norm_weight, norm_bias, norm_eps, dtype, n, norm_kind_of(norm_kind)), out.mutable_data_ptr(),
                           dropout_of(dropout_seed, dropout_p), nullptr, nullptr};
  kernels().linear(runtime(), args);
  return out;
}

Tensor cpu_feed_forward(Tensor x, Tensor packed_in, OptionalTensor b_in, Tensor packed_out, OptionalTensor b_out, Text activation,
                        OptionalTensor residual, Text norm_position, OptionalTensor norm_weight, OptionalTensor norm_bias,
                        double norm_eps, OptionalTensor packed_gate, OptionalTensor b_gate, OptionalTensor dropout_seed, Text norm_kind,
                        double dropout_p) {
  const PackedHeader& in = check_packed(packed_in, "packed_in");
  const PackedHeader& second = check_packed(packed_out, "packed_out");
  const ScalarType dtype = scalar_type_of(x, "x");
  STD_TORCH_CHECK(dtype_of(x, "x") == in.dtype && in.dtype == second.dtype, "packed_in, packed_out: dtype differs from the input's");
  STD_TORCH_CHECK(in.n == second.k, "packed_out: in_features ", second.k, " must be packed_in's out_features ", in.n);
  const PackedHeader* gate = packed_gate ? &check_packed(*packed_gate, "packed_gate") : nullptr;
  STD_TORCH_CHECK(!gate || (gate->dtype == in.dtype && gate->k == in.k && gate->n == in.n), "packed_gate: dtype and shape must be packed_in's");
  const NormPosition position = position_of(norm_position);
  const int64_t rows = rows_of(x, in.k), n = second.n;
  Tensor out = empty_rows_like(x, n);
  if (rows == 0 || n == 0) return out;
  const WeightArgs w_gate = gate ? packed_weight(*gate) : WeightArgs{};
  const FeedForwardArgs args = {in.dtype, rows, x.const_data_ptr(), packed_weight(in), data_of(b_in, "b_in", dtype, in.n), packed_weight(second),
                                data_of(b_out, "b_out", dtype, n), activation_of(activation), data_of(residual, "residual", dtype, rows * n),
                                position, norm_args(norm_weight, norm_bias, norm_eps, dtype, position == NormPosition::pre ? in.k : n, norm_kind_of(norm_kind)),
                                out.mutable_data_ptr(), gate ? &w_gate : nullptr, data_of(b_gate, "b_gate", dtype, in.n), dropout_of(dropout_seed, dropout_p),
                                nullptr, nullptr, nullptr};
  together([&] { kernels().feed_forward(runtime(), args); });
  return out;
}

Tensor norm_op(NormKind kind, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps, const OptionalTensor& residual,
               const OptionalTensor& dropout_seed, double dropout_p, double weight_offset, const char* prefix) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: must have at least one dimension");
  const int64_t n = x.size(x.dim() - 1), rows = rows_of(x, n);
  const ScalarType dtype = scalar_type_of(x, "x");
  Tensor out = empty_rows_like(x, n);
  const LayerNormArgs args = {dtype_of(x, "x"), rows, n, x.const_data_ptr(), data_of(residual, "residual", dtype, rows * n),
                              norm_args(weight, bias, eps, dtype, n, kind, weight_offset, prefix), out.mutable_data_ptr(),
                              dropout_of(dropout_seed, dropout_p)};
  if (rows > 0) kernels().layer_norm(runtime(), args);
  return out;
}

Tensor cpu_layer_norm(Tensor x, OptionalTensor weight, OptionalTensor bias, double eps, OptionalTensor residual, OptionalTensor dropout_seed,
                      double dropout_p) {
  return norm_op(NormKind::layer_norm, x, weight, bias, eps, residual, dropout_seed, dropout_p, 0.0);
}

Tensor cpu_rms_norm(Tensor x, OptionalTensor weight, double eps, OptionalTensor residual, OptionalTensor dropout_seed, double dropout_p,
                    double weight_offset) {
  return norm_op(NormKind::rms_norm, x, weight, {}, eps, residual, dropout_seed, dropout_p, weight_offset);
}

// Ids as int64 and in range; the index of the first that is not is named.
const int64_t* ids_of(const OptionalTensor& ids, const char* name, const OptionalTensor& table, int64_t tokens) {
  STD_TORCH_CHECK(ids.has_value() == table.has_value(), name, ": ids and table must both be given or both be None");
  if (!ids) return nullptr;
  const auto* data = static_cast<const int64_t*>(data_of(*ids, name, ScalarType::Long, tokens));
  const int64_t rows = table->size(0);
  for (int64_t i = 0; i < tokens; i++)
    if (data[i] < 0 || data[i] >= rows)
      STD_TORCH_CHECK(false, name, ": index out of range: value ", data[i], " at position ", i, ", allowed is 0 to ", rows - 1);
  return data;
}

void embedding_tables(const OptionalTensor (&ids)[3], const OptionalTensor (&tables)[3], const int64_t* (&id_data)[3], const void* (&table_data)[3]) {
  const Tensor& word = *tables[0];
  STD_TORCH_CHECK(word.dim() == 2, "word_weight: shape ", shape_of(word), " must have two dimensions");
  const int64_t tokens = ids[0]->numel(), hidden = word.size(1);
  const char* id_names[3] = {"input_ids", "position_ids", "token_type_ids"};
  const char* table_names[3] = {"word_weight", "position_weight", "token_type_weight"};
  for (int t = 0; t < 3; t++) {
    if (tables[t]) {
      STD_TORCH_CHECK(tables[t]->dim() == 2 && tables[t]->size(1) == hidden, table_names[t], ": shape ", shape_of(*tables[t]), " must be (rows, ", hidden, ")");
      table_data[t] = data_of(*tables[t], table_names[t], scalar_type_of(word, "word"), tables[t]->size(0) * hidden);
    }
    id_data[t] = ids_of(ids[t], id_names[t], tables[t], tokens);
  }
}

Tensor cpu_embedding(Tensor input_ids, Tensor word_weight, OptionalTensor position_ids, OptionalTensor position_weight,
                     OptionalTensor token_type_ids, OptionalTensor token_type_weight, OptionalTensor norm_weight, OptionalTensor norm_bias,
                     double norm_eps, OptionalTensor dropout_seed, double dropout_p) {
  EmbeddingArgs args = {};
  embedding_tables({input_ids, position_ids, token_type_ids}, {word_weight, position_weight, token_type_weight}, args.ids, args.tables);
  const int64_t hidden = word_weight.size(1);
  const ScalarType dtype = scalar_type_of(word_weight, "word_weight");
  args.dtype = dtype_of(word_weight, "word_weight");
  args.tokens = input_ids.numel();
  args.hidden = hidden;
  args.has_norm = has_norm(norm_weight, norm_bias);
  args.norm = norm_args(norm_weight, norm_bias, norm_eps, dtype, hidden);
  args.dropout = dropout_of(dropout_seed, dropout_p);
  std::vector<int64_t> shape(input_ids.sizes().begin(), input_ids.sizes().end());
  shape.push_back(hidden);
  Tensor out = empty_result(shape, dtype);
  args.out = out.mutable_data_ptr();
  if (args.tokens > 0 && hidden > 0) kernels().embedding(runtime(), args);
  return out;
}

void set_angles(RotaryArgs& args, const Tensor& cos, const Tensor& sin) {
  const bool fits = cos.dim() == 3 && (cos.size(0) == args.batch || cos.size(0) == 1) && cos.size(1) == args.rows && cos.size(2) <= args.head_dim / 2;
  STD_TORCH_CHECK(fits, "cos: shape ", shape_of(cos), " must be (1 or ", args.batch, ", ", args.rows, ", angles), with at most ", args.head_dim / 2, " angles");
  args.angles = cos.size(2);
  args.angles_dtype = dtype_of(cos, "cos");
  args.shared_angles = cos.size(0) == 1;
  args.cosine = data_of(cos, "cos", scalar_type_of(cos, "cos"), cos.numel());
  args.sine = data_of(sin, "sin", scalar_type_of(cos, "cos"), cos.numel());
}

std::tuple<Tensor, Tensor> cpu_rotary(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "query, key: must have 4 dimensions");
  RotaryArgs args = {.dtype = dtype_of(query, "query"), .batch = query.size(0), .rows = query.size(2), .head_dim = query.size(3),
                     .interleaved = interleaved};
  const int64_t batch = args.batch, rows = args.rows, dim = args.head_dim;
  STD_TORCH_CHECK(key.size(0) == batch && key.size(2) == rows && key.size(3) == dim, "key: shape ", shape_of(key), " does not fit query's ",
                  shape_of(query));
  set_angles(args, cos, sin);
  Tensor results[2] = {query, key};
  for (int i = 0; i < 2; i++) {
    const Tensor& x = i ? key : query;
    const char* name = i ? "key" : "query";
    check_cpu(x, name);
    STD_TORCH_CHECK(scalar_type_of(x, name) == query.scalar_type(), name, ": dtype differs from the input's");
    STD_TORCH_CHECK(x.numel() == 0 || dim == 1 || x.stride(3) == 1, name, ": last dimension must be contiguous");
    check_aligned(x, name);
    args.heads[i] = x.size(1);
    args.x[i] = x.const_data_ptr();
    for (int d = 0; d < 3; d++) args.stride[i][d] = x.stride(d);
    Tensor out = empty_result({batch, rows, args.heads[i], dim}, x.scalar_type());
    args.out[i] = out.mutable_data_ptr();
    results[i] = torch::stable::transpose(out, 1, 2);
  }
  if (batch * rows > 0) kernels().rotary(runtime(), args);
  return {results[0], results[1]};
}

}  // namespace bigmodel

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel, m) {
  m.def("cpu_rotary(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)");
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
  m.def("cpu_set_isa(str name) -> ()");
  m.def("cpu_pack_weight(Tensor[] weights, str weight_layout) -> Tensor");
  m.def("cpu_fingerprint(Tensor[] weights) -> int");
  m.def("cpu_linear(Tensor x, Tensor packed, Tensor? bias, str activation, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, "
        "float norm_eps, Tensor? dropout_seed=None, *, str norm_kind='layer_norm', float dropout_p=0.0) -> Tensor");
  m.def("cpu_feed_forward(Tensor x, Tensor packed_in, Tensor? b_in, Tensor packed_out, Tensor? b_out, str activation, Tensor? residual, "
        "str norm_position, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor? packed_gate=None, Tensor? b_gate=None, "
        "Tensor? dropout_seed=None, *, str norm_kind='layer_norm', float dropout_p=0.0) -> Tensor");
  m.def("cpu_layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual, Tensor? dropout_seed=None, *, "
        "float dropout_p=0.0) -> Tensor");
  m.def("cpu_rms_norm(Tensor x, Tensor? weight, float eps, Tensor? residual=None, Tensor? dropout_seed=None, *, float dropout_p=0.0, "
        "float weight_offset=0.0) -> Tensor");
  m.def("cpu_embedding(Tensor input_ids, Tensor word_weight, Tensor? position_ids, Tensor? position_weight, Tensor? token_type_ids, "
        "Tensor? token_type_weight, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor? dropout_seed=None, *, "
        "float dropout_p=0.0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel, CPU, m) {
  m.impl("cpu_pack_weight", TORCH_BOX(&bigmodel::cpu_pack_weight));
  m.impl("cpu_fingerprint", TORCH_BOX(&bigmodel::cpu_fingerprint));
  m.impl("cpu_linear", TORCH_BOX(&bigmodel::cpu_linear));
  m.impl("cpu_feed_forward", TORCH_BOX(&bigmodel::cpu_feed_forward));
  m.impl("cpu_layer_norm", TORCH_BOX(&bigmodel::cpu_layer_norm));
  m.impl("cpu_rms_norm", TORCH_BOX(&bigmodel::cpu_rms_norm));
  m.impl("cpu_embedding", TORCH_BOX(&bigmodel::cpu_embedding));
  m.impl("cpu_rotary", TORCH_BOX(&bigmodel::cpu_rotary));
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&bigmodel::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&bigmodel::cpu_isas));
  m.impl("cpu_set_isa", TORCH_BOX(&bigmodel::cpu_set_isa));
}
