// residual_linear, norm_linear, norm_swiglu on the CPU: checks, then the fused kernels for few rows
// (decode: skinny_linear.h) or many (prefill: wide_linear.h), or for many ATen's matrix product
// between our normalization and epilogue.
#include "args/linear.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <memory>

#include "dispatch.h"

namespace nbl {
namespace {

// Below this much weight a second thread costs more than it brings.
constexpr int64_t kBytesPerThread = 1 << 15;
constexpr int64_t kElementsPerThread = 1 << 15;  // the same for a pass over activations

// Rows of x up to which passes over the weight, kSkinnyRows at a time, beat a wide product, as
// measured by benchmarks/micro/test_linear.py: ATen's in float32 needs many rows. Narrower
// registers were not measured.
int64_t most_skinny_rows(const CpuKernels& isa, DType dtype) {
  const bool avx512 = std::string(isa.name).rfind("avx512", 0) == 0;
  return avx512 && dtype == DType::kFloat32 ? 4 * kSkinnyRows : kSkinnyRows;
}

// Whether the wide product is ours, not ATen's: that is fast in float32, and in bf16 where there is
// AMX (and, for all we know, where our registers are unknown); it knows no quantized weights.
bool wide_is_ours(const CpuKernels& isa, DType dtype, WeightFormat format) {
  if (format != WeightFormat::kPlain) return true;
  if (dtype == DType::kFloat32 || std::string(isa.name) == "portable") return false;
  return dtype == DType::kFloat16 || !has_amx_bf16();
}

// The problem for rows [first, first + m) of x.
SkinnyLinear rows_of(const LinearArgs& a, const Tensor& out, int64_t first, int64_t m) {
  const int64_t element = static_cast<int64_t>(a.x.element_size());
  const auto row = [&](const void* p, int64_t stride) {
    return static_cast<const char*>(p) + first * stride * element;
  };
  SkinnyLinear p{};
  p.m = m;
  p.n = out.size(-1);
  p.k = a.x.size(-1);
  p.x_stride = row_stride(a.x);
  p.x = row(a.x.const_data_ptr(), p.x_stride);
  p.norm_weight = data(a.norm_weight);
  p.norm_eps = static_cast<float>(a.norm_eps);
  p.weight = a.weight.const_data_ptr();
  p.weight_stride = a.weight.stride(0);
  p.weight_scale = data(a.weight_scale);
  p.bias = data(a.bias);
  if (a.residual) {
    p.residual_stride = row_stride(*a.residual);
    p.residual = row(a.residual->const_data_ptr(), p.residual_stride);
  }
  p.out_stride = p.n;
  p.out = const_cast<char*>(row(out.mutable_data_ptr(), p.out_stride));
  return p;
}

// At least `bytes` of cache-line aligned memory, kept between calls.
void* aligned(std::vector<char>& memory, int64_t bytes) {
  if (static_cast<int64_t>(memory.size()) < bytes + 64) memory.resize(bytes + 64);
  void* start = memory.data();
  size_t space = memory.size();
  return std::align(64, bytes, start, space);
}

// Memory for the features of m rows, of the calling thread.
void* feature_memory(int64_t m, int64_t k) {
  thread_local std::vector<char> memory;
  return aligned(memory, m * ((k + 127) / 128 * 128 + 32) * int64_t{sizeof(float)});
}

// One pass over the weight for rows [first, first + m), m <= kSkinnyRows.
void run_skinny(const LinearArgs& a, const Tensor& out, int64_t first, int64_t m) {
  const CpuKernels& isa = cpu_kernels();
  const LinearKernels& kernels = isa[kernel_dtype(a.op, "x", a.x)][weight_format(a)];
  const SkinnyLinear p = rows_of(a, out, first, m);
  void* features = feature_memory(m, p.k);
  kernels.prepare_features(p, features, 0, m);

  const auto run = a.swiglu ? kernels.swiglu_columns : kernels.linear_columns;
  const int64_t weight_bytes = a.weight.size(1) * static_cast<int64_t>(a.weight.element_size());
  const int64_t row_bytes = std::max<int64_t>(1, weight_bytes * (a.swiglu ? 2 : 1));
  const int64_t grain = std::max<int64_t>(4, kBytesPerThread / row_bytes);
  torch::stable::parallel_for(0, p.n, grain,
                              [&](int64_t begin, int64_t end) { run(p, features, begin, end); });
}

// The same for m <= kWideRows, as kernels of the wide product.
void run_wide(const LinearArgs& a, const Tensor& out, int64_t first, int64_t m) {
  const CpuKernels& isa = cpu_kernels();
  const TypedKernels& typed = isa[kernel_dtype(a.op, "x", a.x)];
  const LinearKernels& kernels = typed[weight_format(a)];
  const SkinnyLinear p = rows_of(a, out, first, m);
  void* features = feature_memory(m + kSkinnyRows, p.k);  // up to a whole tile of rows
  torch::stable::parallel_for(0, m, 4, [&](int64_t begin, int64_t end) {
    typed[WeightFormat::kPlain].prepare_features(p, features, begin, end);
  });
  const auto run = a.swiglu ? kernels.wide_swiglu_columns : kernels.wide_linear_columns;
  torch::stable::parallel_for(
      0, (p.n + isa.panel - 1) / isa.panel, 1, [&](int64_t begin, int64_t end) {
        thread_local std::vector<char> memory;
        void* scratch = aligned(memory, kernels.wide_scratch_bytes(m, p.k));
        run(p, features, scratch, begin * isa.panel, std::min(end * isa.panel, p.n));
      });
}

Tensor normalized(const LinearArgs& a, int64_t m) {
  Tensor out = torch::stable::new_empty(a.x, a.x.sizes());
  RowNorm p{};
  p.x = a.x.const_data_ptr();
  p.x_stride = row_stride(a.x);
  p.norm_weight = data(a.norm_weight);
  p.norm_eps = static_cast<float>(a.norm_eps);
  p.out = out.mutable_data_ptr();
  p.k = a.x.size(-1);
  const TypedKernels& kernels = cpu_kernels()[kernel_dtype(a.op, "x", a.x)];
  torch::stable::parallel_for(
      0, m, 4, [&](int64_t begin, int64_t end) { kernels.rms_norm_rows(p, begin, end); });
  return out;
}

Tensor aten_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{to_ivalue(x), to_ivalue(weight), to_ivalue(bias)};
  call_aten("aten::linear", "", stack.data());
  return tensor_from(stack[0]);
}

// out = residual + bias first; then ATen adds the product to it: no pass over the product.
Tensor add_linear(const LinearArgs& a, const Tensor& features, int64_t m) {
  const int64_t n = a.weight.size(0);
  const Tensor out = empty_like_rows(a.x, n);
  const ResidualRows p{a.residual->const_data_ptr(), row_stride(*a.residual), data(a.bias),
                       out.mutable_data_ptr(), n};
  const TypedKernels& kernels = cpu_kernels()[kernel_dtype(a.op, "x", a.x)];
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, n));
  torch::stable::parallel_for(
      0, m, grain, [&](int64_t begin, int64_t end) { kernels.residual_rows(p, begin, end); });
  if (m == 0 || n == 0) return out;
  const Tensor sums = torch::stable::view(out, {m, n});
  const Tensor rows = torch::stable::reshape(features, {m, features.size(-1)});
  const Tensor columns = torch::stable::transpose(a.weight, 0, 1);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(sums.get(), sums.get(), rows.get(), columns.get(), 1.0, 1.0));
  return out;
}

// The wide product by ATen, between our normalization and epilogue.
Tensor run_aten(const LinearArgs& a, int64_t m) {
  const Tensor features = a.norm_weight ? normalized(a, m) : a.x;
  if (a.residual) return add_linear(a, features, m);
  const Tensor product = aten_linear(features, a.weight, a.bias);
  if (!a.swiglu) return product;
  const int64_t n = product.size(-1) / 2;
  const Tensor out = empty_like_rows(a.x, n);
  const SiluMul p{product.const_data_ptr(), out.mutable_data_ptr(), n};
  const TypedKernels& kernels = cpu_kernels()[kernel_dtype(a.op, "x", a.x)];
  torch::stable::parallel_for(
      0, m, 1, [&](int64_t begin, int64_t end) { kernels.silu_mul_rows(p, begin, end); });
  return out;
}

}  // namespace

Tensor run_linear(LinearArgs a) {
  validate(a);
  make_rows_contiguous(a);
  const int64_t m = product_of_leading(a.x);
  const DType dtype = kernel_dtype(a.op, "x", a.x);
  const bool wide = m > most_skinny_rows(cpu_kernels(), dtype);
  if (wide && !wide_is_ours(cpu_kernels(), dtype, weight_format(a))) return run_aten(a, m);
  const Tensor out = empty_like_rows(a.x, a.weight.size(0) / (a.swiglu ? 2 : 1));
  if (out.size(-1) == 0) return out;
  const int64_t most = wide ? kWideRows : kSkinnyRows;
  const int64_t passes = (m + most - 1) / most;  // over the weight, in equal numbers of rows
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = m * pass / passes, rows = m * (pass + 1) / passes - first;
    wide ? run_wide(a, out, first, rows) : run_skinny(a, out, first, rows);
  }
  return out;
}

}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CPU, m) { nbl::register_linears(m); }
