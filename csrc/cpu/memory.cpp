// memory_scan on the CPU: checks, then a linear, the filter, and a linear.
#include "args/memory.h"

#include "dispatch.h"

namespace nbl {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;  // below, a second thread costs more than it brings

Tensor memory_scan(const Tensor& x, const Tensor& weight_v, const std::optional<Tensor>& weight_u,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                   const std::optional<Tensor>& norm_weight, double norm_eps, const Tensor& state,
                   const std::optional<Tensor>& history, std::vector<int64_t> lags,
                   std::vector<double> decays, const std::optional<Tensor>& mask,
                   const std::optional<Tensor>& starts, const std::optional<Tensor>& weight_v_scale,
                   const std::optional<Tensor>& weight_u_scale) {
  MemoryArgs a{x,       weight_v, weight_u, bias, residual, norm_weight,    norm_eps,      state,
               history, lags,     decays,   mask, starts,   weight_v_scale, weight_u_scale};
  validate(a);
  make_rows_contiguous(a);
  const Tensor g = run_linear(first_linear(a));
  const Tensor c = empty_like_rows(a.x, a.channels());
  const MemoryParams p = memory_params(a, g, c);
  const TypedKernels& kernels = cpu_kernels()[kernel_dtype(a.op, "x", a.x)];
  const int64_t elements = std::max<int64_t>(1, p.tokens * a.branches() * kMemoryGroup);
  torch::stable::parallel_for(
      0, p.batch * memory_groups(p.channels), std::max<int64_t>(1, kElementsPerThread / elements),
      [&](int64_t begin, int64_t end) { kernels.memory_filter(p, begin, end); });
  return a.weight_u ? run_linear(second_linear(a, c)) : c;
}

}  // namespace
}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CPU, m) { m.impl("memory_scan", TORCH_BOX(&nbl::memory_scan)); }
