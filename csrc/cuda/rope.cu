// rope_append on CUDA: checks, then the kernel. Positions and slots stay on the device.
#include "args/rope.h"
#include "cuda/cuda_common.h"
#include "cuda/paths.h"
#include "nbl/cuda/launch.h"
#include "nbl/cuda/rope.cuh"

namespace nbl {
namespace {

// nbl::rope_append_plain: PyTorch operations (nbl_kernels/_ops.py).
Tensor run_plain(const RopeArgs& a) {
  std::array<StableIValue, 10> stack{to_ivalue(a.qkv),           to_ivalue(a.cos),
                                     to_ivalue(a.sin),           to_ivalue(a.positions),
                                     to_ivalue(a.slots),         to_ivalue(a.key_cache),
                                     to_ivalue(a.value_cache),   to_ivalue(a.q_norm_weight),
                                     to_ivalue(a.k_norm_weight), to_ivalue(a.norm_eps)};
  call_aten("nbl::rope_append_plain", "", stack.data());
  return tensor_from(stack[0]);
}

template <class T>
void run_kernel(const RopeArgs& a, const RopeParams& p) {
  const RopeLaunch launch = rope_launch(p, sizeof(T));
  const auto kernel = rope_vectors(p, sizeof(T)) ? rope_append<T, true> : rope_append<T, false>;
  const bool dependent = dependent_launch(device_of(a.qkv), reinterpret_cast<const void*>(kernel));
  check_cuda(launch_kernel(kernel, dim3(rope_blocks(launch)), kRopeThreads, 0,
                           current_stream(a.qkv), dependent, launch),
             a.op);
}

Tensor run(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions,
           const Tensor& slots, const Tensor& key_cache, const Tensor& value_cache,
           const std::optional<Tensor>& q_norm_weight, const std::optional<Tensor>& k_norm_weight,
           double norm_eps) {
  RopeArgs a{qkv,       cos,         sin,           positions,     slots,
             key_cache, value_cache, q_norm_weight, k_norm_weight, norm_eps};
  validate(a);
  const int device = device_of(a.qkv);
  constexpr int kOldest = 80;  // what the kernels are compiled for
  if (compute_capability(device) < kOldest || rope_path(compute_capability(device)) == Path::kPlain)
    return run_plain(a);
  const DeviceGuard guard(device);
  make_last_contiguous(a);
  const Tensor q = empty_q(a);
  if (q.numel() == 0) return q;
  const RopeParams p = rope_params(a, q);
  if (!rope_fits(p)) return run_plain(a);
  switch (kernel_dtype(a.op, "qkv", a.qkv)) {
    case DType::kFloat32:
      run_kernel<float>(a, p);
      break;
    case DType::kBFloat16:
      run_kernel<bfloat16>(a, p);
      break;
    case DType::kFloat16:
      run_kernel<float16>(a, p);
      break;
  }
  return q;
}

}  // namespace
}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CUDA, m) { m.impl("rope_append", TORCH_BOX(&nbl::run)); }
