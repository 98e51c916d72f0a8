// The arguments of rope_append, checked and made ready: what the CPU and the CUDA launcher have in
// common. Only the values of positions and slots are not looked at here.
#pragma once

#include "args/common.h"
#include "nbl/rope.h"

namespace nbl {

struct RopeArgs {
  static constexpr const char* op = "rope_append";
  Tensor qkv, cos, sin, positions, slots, key_cache, value_cache;
  std::optional<Tensor> q_norm_weight, k_norm_weight;
  double norm_eps;

  int64_t batch() const { return qkv.size(0); }
  int64_t tokens() const { return qkv.size(1); }
  int64_t kv_heads() const { return key_cache.size(1); }
  int64_t heads() const { return qkv.size(2) - 2 * kv_heads(); }
  int64_t head_dim() const { return qkv.size(3); }
};

inline void check_table(const RopeArgs& a, const char* name, const Tensor& t) {
  check(t.dim() == 2 && 2 * t.size(1) <= a.head_dim(), a.op, ": ", name,
        " must have shape (positions, at most head_dim / 2 = ", a.head_dim() / 2, "), got ",
        shape(t));
  check(t.scalar_type() == ScalarType::Float, a.op, ": ", name, " must be float32, got ",
        dtype_name(t.scalar_type()));
  check(t.device() == a.qkv.device(), a.op, ": ", name, " must be on the device of qkv");
}

inline void check_indices(const RopeArgs& a, const char* name, const Tensor& t) {
  const auto fits = [&](int64_t dim, int64_t size) {
    return t.size(dim) == size || t.size(dim) == 1;
  };
  check((t.dim() == 1 && fits(0, a.tokens())) ||
            (t.dim() == 2 && fits(0, a.batch()) && fits(1, a.tokens())),
        a.op, ": ", name, " must broadcast to (", a.batch(), ", ", a.tokens(), "), got shape ",
        shape(t));
  check(t.scalar_type() == ScalarType::Long, a.op, ": ", name, " must be int64, got ",
        dtype_name(t.scalar_type()));
  check(t.device() == a.qkv.device(), a.op, ": ", name, " must be on the device of qkv");
}

inline void check_cache(const RopeArgs& a, const char* name, const Tensor& t) {
  check_like(a.op, name, t, "qkv", a.qkv);
  check(t.stride(3) == 1 || t.size(3) <= 1, a.op, ": ", name,
        " must be contiguous in its last dimension: it is written in place");
}

inline void validate(const RopeArgs& a) {
  kernel_dtype(a.op, "qkv", a.qkv);
  check(a.qkv.dim() == 4, a.op,
        ": qkv must have shape (batch, tokens, heads + 2 kv_heads, head_dim), got ", shape(a.qkv));
  const int64_t d = a.head_dim();
  check(a.key_cache.dim() == 4 && a.key_cache.size(0) >= a.batch() && a.key_cache.size(3) == d,
        a.op, ": key_cache must have shape (at least ", a.batch(), ", kv_heads, slots, ", d,
        "), got ", shape(a.key_cache));
  check(a.heads() > 0, a.op, ": qkv must have more than 2 · ", a.kv_heads(),
        " heads (q, then k and v of key_cache's number), got shape ", shape(a.qkv));
  check_shape(a.op, "value_cache", a.value_cache,
              {a.key_cache.size(0), a.kv_heads(), a.key_cache.size(2), d});
  check_cache(a, "key_cache", a.key_cache);
  check_cache(a, "value_cache", a.value_cache);
  check_table(a, "cos", a.cos);
  check_table(a, "sin", a.sin);
  check_shape(a.op, "sin", a.sin, {a.cos.size(0), a.cos.size(1)});
  check_indices(a, "positions", a.positions);
  check_indices(a, "slots", a.slots);
  if (a.q_norm_weight) {
    check_shape(a.op, "q_norm_weight", *a.q_norm_weight, {d});
    check_like(a.op, "q_norm_weight", *a.q_norm_weight, "qkv", a.qkv);
  }
  if (a.k_norm_weight) {
    check_shape(a.op, "k_norm_weight", *a.k_norm_weight, {d});
    check_like(a.op, "k_norm_weight", *a.k_norm_weight, "qkv", a.qkv);
  }
}

// What is read becomes contiguous in its last dimension; `a` must outlive the parameters.
inline void make_last_contiguous(RopeArgs& a) {
  for (Tensor* t : {&a.qkv, &a.cos, &a.sin})
    if (t->stride(t->dim() - 1) != 1) *t = torch::stable::contiguous(*t);
  for (std::optional<Tensor>* t : {&a.q_norm_weight, &a.k_norm_weight})
    if (*t && !(*t)->is_contiguous()) *t = torch::stable::contiguous(**t);
}

// q (batch, heads, tokens, head_dim), in memory (batch, tokens, heads, head_dim): attention answers
// in the layout of q, and what follows it wants the heads of a token side by side.
inline Tensor empty_q(const RopeArgs& a) {
  const Tensor q =
      torch::stable::new_empty(a.qkv, {a.batch(), a.tokens(), a.heads(), a.head_dim()});
  return torch::stable::transpose(q, 1, 2);
}

inline RopeParams rope_params(const RopeArgs& a, const Tensor& q) {
  const auto three_strides = [](int64_t (&strides)[3], const Tensor& t) {
    for (int i = 0; i < 3; ++i) strides[i] = t.stride(i);
  };
  const auto broadcast_strides = [](int64_t (&strides)[2], const Tensor& t) {
    const int64_t last = t.dim() - 1;
    strides[0] = t.dim() == 2 && t.size(0) > 1 ? t.stride(0) : 0;
    strides[1] = t.size(last) > 1 ? t.stride(last) : 0;
  };
  const auto data = [](const std::optional<Tensor>& t) {
    return t ? t->const_data_ptr() : nullptr;
  };
  RopeParams p{};
  p.qkv = a.qkv.const_data_ptr();
  three_strides(p.qkv_strides, a.qkv);
  p.cos = static_cast<const float*>(a.cos.const_data_ptr());
  p.sin = static_cast<const float*>(a.sin.const_data_ptr());
  p.cos_stride = a.cos.stride(0);
  p.sin_stride = a.sin.stride(0);
  p.positions = static_cast<const int64_t*>(a.positions.const_data_ptr());
  p.slots = static_cast<const int64_t*>(a.slots.const_data_ptr());
  broadcast_strides(p.position_strides, a.positions);
  broadcast_strides(p.slot_strides, a.slots);
  p.q_norm_weight = data(a.q_norm_weight);
  p.k_norm_weight = data(a.k_norm_weight);
  p.norm_eps = static_cast<float>(a.norm_eps);
  p.q = q.mutable_data_ptr();
  three_strides(p.q_strides, q);
  p.keys = a.key_cache.mutable_data_ptr();
  p.values = a.value_cache.mutable_data_ptr();
  three_strides(p.key_strides, a.key_cache);
  three_strides(p.value_strides, a.value_cache);
  p.batch = a.batch();
  p.tokens = a.tokens();
  p.heads = a.heads();
  p.kv_heads = a.kv_heads();
  p.head_dim = a.head_dim();
  p.half = a.cos.size(1);
  p.num_positions = a.cos.size(0);
  p.num_slots = a.key_cache.size(2);
  return p;
}

}  // namespace nbl
