// rope_append on the CPU: checks, positions and slots among them, before anything is written.
#include "args/rope.h"

#include "dispatch.h"

namespace nbl {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;  // below, a second thread costs more than it brings

void check_values(const RopeParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t position = p.positions[b * p.position_strides[0] + t * p.position_strides[1]];
      const int64_t slot = p.slots[b * p.slot_strides[0] + t * p.slot_strides[1]];
      check(position >= 0 && position < p.num_positions, RopeArgs::op,
            ": positions must be from 0 to ", p.num_positions - 1, ", the last row of cos; got ",
            position, " at (", b, ", ", t, ")");
      check(slot < p.num_slots, RopeArgs::op, ": slots must be at most ", p.num_slots - 1,
            ", the last of key_cache (negative: not written); got ", slot, " at (", b, ", ", t,
            ")");
    }
  }
}

Tensor rope_append(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions,
                   const Tensor& slots, const Tensor& key_cache, const Tensor& value_cache,
                   const std::optional<Tensor>& q_norm_weight,
                   const std::optional<Tensor>& k_norm_weight, double norm_eps) {
  RopeArgs a{qkv,       cos,         sin,           positions,     slots,
             key_cache, value_cache, q_norm_weight, k_norm_weight, norm_eps};
  validate(a);
  make_last_contiguous(a);
  const Tensor q = empty_q(a);
  const RopeParams p = rope_params(a, q);
  check_values(p);
  const TypedKernels& kernels = cpu_kernels()[kernel_dtype(a.op, "qkv", a.qkv)];
  const int64_t row = std::max<int64_t>(1, a.qkv.size(2) * p.head_dim);
  torch::stable::parallel_for(
      0, p.batch * p.tokens, std::max<int64_t>(1, kElementsPerThread / row),
      [&](int64_t begin, int64_t end) { kernels.rope_append(p, begin, end); });
  return q;
}

}  // namespace
}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CPU, m) { m.impl("rope_append", TORCH_BOX(&nbl::rope_append)); }
