// residual_linear, norm_linear, norm_swiglu on the CPU: checks, then the fused kernels for few rows
// (decode) or ATen's matrix product between our normalization and epilogue for many (prefill).
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <limits>
#include <memory>

#include "dispatch.h"
#include "linear_args.h"

namespace nbl {
namespace {

// Below this much weight a second thread costs more than it brings.
constexpr int64_t kBytesPerThread = 1 << 15;
constexpr int64_t kElementsPerThread = 1 << 15;  // the same for a pass over activations
constexpr int64_t kSlabBytes = 4 << 20;          // of a weight that is dequantized for many rows

// Rows of x up to which passes over the weight, kSkinnyRows at a time, beat ATen's matrix product,
// as measured by benchmarks/test_linear.py: ATen has no fast float16 product at all, and its
// float32 product needs many rows. Narrower registers were not measured.
int64_t most_skinny_rows(const CpuKernels& isa, DType dtype) {
  const bool avx512 = std::string(isa.name).rfind("avx512", 0) == 0;
  if (avx512 && dtype == DType::kFloat16) return std::numeric_limits<int64_t>::max();
  if (avx512 && dtype == DType::kFloat32) return 4 * kSkinnyRows;
  return kSkinnyRows;
}

// One pass over the weight for rows [first, first + m), m <= kSkinnyRows.
void run_skinny(const LinearArgs& a, const Tensor& out, int64_t first, int64_t m) {
  const CpuKernels& isa = cpu_kernels();
  const LinearKernels& kernels = isa[kernel_dtype(a.op, "x", a.x)][weight_format(a)];
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

  // Features in cache-line aligned memory of this thread, kept between calls.
  thread_local std::vector<char> scratch;
  const int64_t bytes = m * ((p.k + 127) / 128 * 128 + 32) * int64_t{sizeof(float)};
  if (static_cast<int64_t>(scratch.size()) < bytes + 64) scratch.resize(bytes + 64);
  void* features = scratch.data();
  size_t space = scratch.size();
  std::align(64, bytes, features, space);
  kernels.prepare_features(p, features);

  const auto run = a.swiglu ? kernels.swiglu_columns : kernels.linear_columns;
  const int64_t weight_bytes = a.weight.size(1) * static_cast<int64_t>(a.weight.element_size());
  const int64_t row_bytes = std::max<int64_t>(1, weight_bytes * (a.swiglu ? 2 : 1));
  const int64_t grain = std::max<int64_t>(4, kBytesPerThread / row_bytes);
  torch::stable::parallel_for(0, p.n, grain,
                              [&](int64_t begin, int64_t end) { run(p, features, begin, end); });
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

// sums (m, n) = features · weightᵀ + start, where start is sums itself or is broadcast to it.
void add_product(const Tensor& sums, const Tensor& start, const Tensor& features,
                 const Tensor& weight, double beta) {
  const Tensor columns = torch::stable::transpose(weight, 0, 1);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(sums.get(), start.get(), features.get(), columns.get(), beta, 1.0));
}

// The same for a quantized weight, which is never there as a whole in the type of x: slabs of its
// rows are, one after the other, in the last-level cache.
void add_quantized_product(const LinearArgs& a, const Tensor& sums,
                           const std::optional<Tensor>& start, const Tensor& features) {
  const int64_t n = a.weight.size(0), k = a.x.size(-1);
  const int64_t row_bytes = std::max<int64_t>(1, k * static_cast<int64_t>(a.x.element_size()));
  const int64_t most = std::max<int64_t>(64, kSlabBytes / row_bytes / 64 * 64);
  const int64_t slabs = (n + most - 1) / most;
  Tensor memory = torch::stable::new_empty(a.x, {std::min(n, most), k});
  Dequantize p{};
  p.weight_stride = a.weight.stride(0);
  p.out = memory.mutable_data_ptr();
  p.k = k;
  const LinearKernels& kernels = cpu_kernels()[kernel_dtype(a.op, "x", a.x)][weight_format(a)];
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, k));
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const int64_t first = slab * most, rows = std::min(most, n - first);
    const auto from = [&](Tensor t, int64_t dim) {
      return torch::stable::narrow(t, dim, first, rows);
    };
    p.weight = from(a.weight, 0).const_data_ptr();
    const Tensor scale = from(*a.weight_scale, 0);
    p.weight_scale = scale.const_data_ptr();
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      kernels.dequantize_rows(p, begin, end);
    });
    const Tensor out = from(sums, 1);
    add_product(out, start ? from(*start, start->dim() - 1) : out, features,
                torch::stable::narrow(memory, 0, 0, rows), start ? 1.0 : 0.0);
  }
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
  if (weight_format(a) == WeightFormat::kPlain)
    add_product(sums, sums, rows, a.weight, 1.0);
  else
    add_quantized_product(a, sums, sums, rows);
  return out;
}

Tensor linear(const LinearArgs& a, const Tensor& features, int64_t m) {
  if (weight_format(a) == WeightFormat::kPlain) return aten_linear(features, a.weight, a.bias);
  const int64_t n = a.weight.size(0);
  const Tensor out = empty_like_rows(a.x, n);
  if (m == 0 || n == 0) return out;
  add_quantized_product(a, torch::stable::view(out, {m, n}), a.bias,
                        torch::stable::reshape(features, {m, features.size(-1)}));
  return out;
}

Tensor run_wide(const LinearArgs& a, int64_t m) {
  const Tensor features = a.norm_weight ? normalized(a, m) : a.x;
  if (a.residual) return add_linear(a, features, m);
  const Tensor product = linear(a, features, m);
  if (!a.swiglu) return product;
  const int64_t n = product.size(-1) / 2;
  const Tensor out = empty_like_rows(a.x, n);
  const SiluMul p{product.const_data_ptr(), out.mutable_data_ptr(), n};
  const TypedKernels& kernels = cpu_kernels()[kernel_dtype(a.op, "x", a.x)];
  torch::stable::parallel_for(
      0, m, 1, [&](int64_t begin, int64_t end) { kernels.silu_mul_rows(p, begin, end); });
  return out;
}

Tensor run(LinearArgs a) {
  validate(a);
  make_rows_contiguous(a);
  const int64_t m = product_of_leading(a.x);
  const int64_t n = a.weight.size(0) / (a.swiglu ? 2 : 1);
  if (m > most_skinny_rows(cpu_kernels(), kernel_dtype(a.op, "x", a.x))) return run_wide(a, m);
  Tensor out = empty_like_rows(a.x, n);
  if (n == 0) return out;
  const int64_t passes = (m + kSkinnyRows - 1) / kSkinnyRows;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = m * pass / passes;
    run_skinny(a, out, first, m * (pass + 1) / passes - first);
  }
  return out;
}

Tensor residual_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual,
                       const std::optional<Tensor>& norm_weight, double norm_eps,
                       const std::optional<Tensor>& weight_scale) {
  return run(residual_linear_args(x, weight, bias, residual, norm_weight, norm_eps, weight_scale));
}

Tensor norm_linear(const Tensor& x, const Tensor& norm_weight, const Tensor& weight,
                   const std::optional<Tensor>& bias, double norm_eps,
                   const std::optional<Tensor>& weight_scale) {
  return run(norm_linear_args(x, norm_weight, weight, bias, norm_eps, weight_scale));
}

Tensor norm_swiglu(const Tensor& x, const Tensor& norm_weight, const Tensor& gate_up_weight,
                   double norm_eps, const std::optional<Tensor>& weight_scale) {
  return run(norm_swiglu_args(x, norm_weight, gate_up_weight, norm_eps, weight_scale));
}

}  // namespace
}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CPU, m) {
  m.impl("residual_linear", TORCH_BOX(&nbl::residual_linear));
  m.impl("norm_linear", TORCH_BOX(&nbl::norm_linear));
  m.impl("norm_swiglu", TORCH_BOX(&nbl::norm_swiglu));
  m.impl("residual_linear_inference", TORCH_BOX(&nbl::residual_linear));
  m.impl("norm_linear_inference", TORCH_BOX(&nbl::norm_linear));
  m.impl("norm_swiglu_inference", TORCH_BOX(&nbl::norm_swiglu));
}
