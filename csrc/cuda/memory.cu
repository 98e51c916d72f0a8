// memory_scan on CUDA: checks, then a linear, the filter, and a linear.
#include "args/memory.h"
#include "cuda/cuda_common.h"
#include "cuda/paths.h"
#include "nbl/cuda/launch.h"
#include "nbl/cuda/memory.cuh"

namespace nbl {
namespace {

// nbl::memory_scan_plain: PyTorch operations (nbl_kernels/_ops.py).
Tensor run_plain(const MemoryArgs& a) {
  std::array<StableIValue, 15> stack{
      to_ivalue(a.x),        to_ivalue(a.weight_v),       to_ivalue(a.weight_u),
      to_ivalue(a.bias),     to_ivalue(a.residual),       to_ivalue(a.norm_weight),
      to_ivalue(a.norm_eps), to_ivalue(a.state),          to_ivalue(a.history),
      to_ivalue(a.lags),     to_ivalue(a.decays),         to_ivalue(a.mask),
      to_ivalue(a.starts),   to_ivalue(a.weight_v_scale), to_ivalue(a.weight_u_scale)};
  call_aten("nbl::memory_scan_plain", "", stack.data());
  return tensor_from(stack[0]);
}

template <class T>
void run_filter(const MemoryArgs& a, const MemoryParams& p) {
  MemoryLaunch launch = memory_launch(p);
  const auto kernel = memory_filter<T>;
  const bool dependent = dependent_launch(device_of(a.x), reinterpret_cast<const void*>(kernel));
  const auto start = [&](void (*which)(MemoryLaunch)) {
    check_cuda(launch_kernel(which, dim3(memory_blocks(launch)), kMemoryThreads,
                             memory_shared_bytes(launch), current_stream(a.x), dependent, launch),
               a.op);
  };
  std::optional<Tensor> entries, counts;
  if (const int64_t floats = memory_entries(p); floats > 0) {
    entries = torch::stable::new_empty(a.state, {floats});
    counts = torch::stable::new_empty(a.state, {p.batch * launch.chunks}, ScalarType::Int);
    launch.entries = static_cast<float*>(entries->mutable_data_ptr());
    launch.counts = static_cast<int32_t*>(counts->mutable_data_ptr());
    start(memory_ends<T>);
  }
  start(kernel);
}

Tensor run(const Tensor& x, const Tensor& weight_v, const std::optional<Tensor>& weight_u,
           const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
           const std::optional<Tensor>& norm_weight, double norm_eps, const Tensor& state,
           const std::optional<Tensor>& history, std::vector<int64_t> lags,
           std::vector<double> decays, const std::optional<Tensor>& mask,
           const std::optional<Tensor>& starts, const std::optional<Tensor>& weight_v_scale,
           const std::optional<Tensor>& weight_u_scale) {
  MemoryArgs a{x,       weight_v, weight_u, bias, residual, norm_weight,    norm_eps,      state,
               history, lags,     decays,   mask, starts,   weight_v_scale, weight_u_scale};
  validate(a);
  const int device = device_of(a.x);
  constexpr int kOldest = 80;  // what the kernels are compiled for
  if (compute_capability(device) < kOldest ||
      memory_path(compute_capability(device)) == Path::kPlain)
    return run_plain(a);
  const DeviceGuard guard(device);
  make_rows_contiguous(a);
  const Tensor c = empty_like_rows(a.x, a.channels());
  if (c.numel() > 0) {
    const Tensor g = run_linear(first_linear(a));
    const MemoryParams p = memory_params(a, g, c);
    if (!memory_fits(p)) return run_plain(a);
    switch (kernel_dtype(a.op, "x", a.x)) {
      case DType::kFloat32:
        run_filter<float>(a, p);
        break;
      case DType::kBFloat16:
        run_filter<bfloat16>(a, p);
        break;
      case DType::kFloat16:
        run_filter<float16>(a, p);
        break;
    }
  }
  return a.weight_u ? run_linear(second_linear(a, c)) : c;
}

}  // namespace
}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CUDA, m) { m.impl("memory_scan", TORCH_BOX(&nbl::run)); }
