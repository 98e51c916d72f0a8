// Every operator of the namespace `nbl`, on one page. The kernels are registered beside their
// launchers in cpu/ and cuda/; what each computes is written in nbl_kernels/reference.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(nbl, m) {
  // A quantized weight (WeightFormat in include/nbl/dtypes.h) comes with its weight_scale.
  // out = residual + W f(x) + b, f the identity or RMSNorm · norm_weight; residual defaults to x
  m.def(
      "residual_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
      "Tensor? norm_weight, float norm_eps, Tensor? weight_scale=None) -> Tensor");
  // out = W RMSNorm(x) + b
  m.def(
      "norm_linear(Tensor x, Tensor norm_weight, Tensor weight, Tensor? bias, float norm_eps, "
      "Tensor? weight_scale=None) -> Tensor");
  // out = silu(G f) · (U f), f = RMSNorm(x), gate_up_weight = [G; U]
  m.def(
      "norm_swiglu(Tensor x, Tensor norm_weight, Tensor gate_up_weight, float norm_eps, "
      "Tensor? weight_scale=None) -> Tensor");

  // The same three without a gradient: what the Python functions call when none is asked for.
  // (A gradient registered from Python costs every call a detour through the interpreter, tens of
  // microseconds once the weights have swept it out of the caches.)
  m.def(
      "residual_linear_inference(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
      "Tensor? norm_weight, float norm_eps, Tensor? weight_scale=None) -> Tensor");
  m.def(
      "norm_linear_inference(Tensor x, Tensor norm_weight, Tensor weight, Tensor? bias, "
      "float norm_eps, Tensor? weight_scale=None) -> Tensor");
  m.def(
      "norm_swiglu_inference(Tensor x, Tensor norm_weight, Tensor gate_up_weight, float norm_eps, "
      "Tensor? weight_scale=None) -> Tensor");

  // Rotates the heads of q and k (normalized first where a weight is given) by the rows of cos and
  // sin that positions name; returns q (B, H, T, D) and writes k and v to their slots of the caches
  m.def(
      "rope_append(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor slots, "
      "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor? q_norm_weight, "
      "Tensor? k_norm_weight, float norm_eps) -> Tensor");

  // out = residual + U c + b, c of the filters lags and decays over g = V f(x), f as above; state
  // and history (the states after the last tokens) are those of the filters
  m.def(
      "memory_scan(Tensor x, Tensor weight_v, Tensor? weight_u, Tensor? bias, "
      "Tensor? residual, Tensor? norm_weight, float norm_eps, Tensor(a!) state, "
      "Tensor(b!)? history, int[] lags, float[] decays, Tensor? mask, Tensor? starts, "
      "Tensor? weight_v_scale=None, Tensor? weight_u_scale=None) -> Tensor");

  // count += tokens; sums += Σ [f | t | b]; gram_xy += Σ x yᵀ (upper triangle where x is y); a gram
  // without elements, such as (0, 0), is left out: not computed
  m.def(
      "covariance_update(Tensor features, Tensor targets, Tensor? block, Tensor? mask, "
      "Tensor(a!) count, Tensor(b!) sums, Tensor(c!) gram_ff, Tensor(d!) gram_tf, "
      "Tensor(e!) gram_tt, Tensor(f!) gram_bf, Tensor(g!) gram_bb) -> ()");

  // By torch.linalg on every device (nbl_kernels/solves.py), batched over the first dimension;
  // ridge is NaN where no ridge made the matrix definite. (weight, u, v, error, ridge): W = C_tf
  // (C_ff + λI)⁻¹, λ = ridge · mean(diag C_ff), of rank `rank` as u v (0: full, u and v empty);
  // error = energy - tr(2 W C_ft - W C_ff Wᵀ)
  m.def(
      "lmmse_solve(Tensor cov_ff, Tensor cov_tf, Tensor energy, float ridge, int rank) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // (K⁻¹ C_bf L⁻ᵀ, ridge), C_bb = K Kᵀ, C_ff = L Lᵀ: its singular values are the canonical
  // correlations
  m.def("cca_matrix(Tensor cov_ff, Tensor cov_bf, Tensor cov_bb) -> (Tensor, Tensor)");
  // cca_matrix of block = features + targets, which is not stored: C_bf = C_tf + C_ff and
  // C_bb = C_tt + C_tf + C_tfᵀ + C_ff
  m.def("residual_cca_matrix(Tensor cov_ff, Tensor cov_tf, Tensor cov_tt) -> (Tensor, Tensor)");

  // The same as PyTorch operations (nbl_kernels/_ops.py): what runs on tensors that no kernel of
  // ours takes. Operators of their own, because a launcher knows only after its checks that it has
  // no kernel for these sizes, and LibTorch's stable ABI calls operators by name: it cannot hand
  // the same one on to its next dispatch key.
  m.def(
      "residual_linear_plain(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
      "Tensor? norm_weight, float norm_eps, Tensor? weight_scale=None) -> Tensor");
  m.def(
      "norm_linear_plain(Tensor x, Tensor? norm_weight, Tensor weight, Tensor? bias, "
      "float norm_eps, Tensor? weight_scale=None) -> Tensor");
  m.def(
      "norm_swiglu_plain(Tensor x, Tensor norm_weight, Tensor gate_up_weight, float norm_eps, "
      "Tensor? weight_scale=None) -> Tensor");
  m.def(
      "rope_append_plain(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor slots, "
      "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor? q_norm_weight, "
      "Tensor? k_norm_weight, float norm_eps) -> Tensor");
  m.def(
      "memory_scan_plain(Tensor x, Tensor weight_v, Tensor? weight_u, Tensor? bias, "
      "Tensor? residual, Tensor? norm_weight, float norm_eps, Tensor(a!) state, "
      "Tensor(b!)? history, int[] lags, float[] decays, Tensor? mask, Tensor? starts, "
      "Tensor? weight_v_scale=None, Tensor? weight_u_scale=None) -> Tensor");
  m.def(
      "covariance_update_plain(Tensor features, Tensor targets, Tensor? block, Tensor? mask, "
      "Tensor(a!) count, Tensor(b!) sums, Tensor(c!) gram_ff, Tensor(d!) gram_tf, "
      "Tensor(e!) gram_tt, Tensor(f!) gram_bf, Tensor(g!) gram_bb) -> bool");
}
