// The arguments of memory_scan, checked and made ready: what the CPU and the CUDA launcher have in
// common. It is two linears (linear_args.h) with a filter (nbl/memory.h) in between.
#pragma once

#include "args/linear.h"
#include "nbl/memory.h"

namespace nbl {

struct MemoryArgs {
  static constexpr const char* op = "memory_scan";
  Tensor x, weight_v;
  std::optional<Tensor> weight_u, bias, residual, norm_weight;
  double norm_eps;
  Tensor state;
  std::optional<Tensor> history;
  std::vector<int64_t> lags;
  std::vector<double> decays;
  std::optional<Tensor> mask, starts, weight_v_scale, weight_u_scale;

  int64_t batch() const { return x.size(0); }
  int64_t tokens() const { return x.size(1); }
  int64_t branches() const { return static_cast<int64_t>(1 + lags.size() + decays.size()); }
  int64_t channels() const { return weight_v.size(0) / branches(); }
  int64_t slots() const {
    int64_t slots = static_cast<int64_t>(decays.size());
    for (int64_t lag : lags) slots += lag;
    return slots;
  }
};

inline void check_filters(const MemoryArgs& a) {
  for (int64_t lag : a.lags)
    check(lag >= 1 && lag <= kMostSlots, a.op, ": lags must be from 1 to ", kMostSlots, ", got ",
          lag);
  for (double decay : a.decays)
    check(decay > 0 && decay < 1, a.op, ": decays must be between 0 and 1, got ", decay);
  check(a.slots() <= kMostSlots, a.op, ": lags and decays must be at most ", kMostSlots,
        " vectors of state (the sum of the lags, and one per decay), got ", a.slots());
}

inline void check_states(const MemoryArgs& a, const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float, a.op, ": ", name, " must be float32, got ",
        dtype_name(t.scalar_type()));
  check(t.device() == a.x.device(), a.op, ": ", name, " must be on the device of x");
  check(t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1, a.op, ": ", name,
        " must be contiguous in its last dimension: it is written in place");
}

inline void check_flags(const MemoryArgs& a, const char* name, const std::optional<Tensor>& t) {
  if (!t) return;
  check_shape(a.op, name, *t, {a.batch(), a.tokens()});
  check(t->scalar_type() == ScalarType::Bool, a.op, ": ", name, " must be bool, got ",
        dtype_name(t->scalar_type()));
  check(t->device() == a.x.device(), a.op, ": ", name, " must be on the device of x");
}

inline void validate(const MemoryArgs& a) {
  kernel_dtype(a.op, "x", a.x);
  check(a.x.dim() == 3, a.op, ": x must have shape (batch, tokens, K), got ", shape(a.x));
  check_filters(a);
  const int64_t k = a.x.size(2);
  check(a.weight_v.dim() == 2 && a.weight_v.size(0) % a.branches() == 0, a.op,
        ": weight_v must have shape (", a.branches(), " · r, K), as many rows for each of f, ",
        a.lags.size(), " lags and ", a.decays.size(), " decays, got ", shape(a.weight_v));
  check_weight(a.op, {"weight_v", a.weight_v, "weight_v_scale", a.weight_v_scale}, k, "x", a.x);
  const int64_t r = a.channels();
  if (a.weight_u) {
    check(a.weight_u->dim() == 2, a.op, ": weight_u must have 2 dimensions, got shape ",
          shape(*a.weight_u));
    check_weight(a.op, {"weight_u", *a.weight_u, "weight_u_scale", a.weight_u_scale}, r, "weight_v",
                 a.weight_v, a.x);
  } else {
    check(!a.weight_u_scale, a.op, ": weight_u_scale must be None without a weight_u");
  }
  const int64_t n = a.weight_u ? a.weight_u->size(0) : r;
  if (a.bias) {
    check_shape(a.op, "bias", *a.bias, {n});
    check_like(a.op, "bias", *a.bias, "x", a.x);
  }
  if (a.residual) {
    check_shape(a.op, "residual", *a.residual, {a.batch(), a.tokens(), n});
    check_like(a.op, "residual", *a.residual, "x", a.x);
  }
  check(a.residual || n == k, a.op, ": residual must be given (it defaults to x) when N != K, got ",
        "N = ", n, " and x of shape ", shape(a.x));
  if (a.norm_weight) {
    check_shape(a.op, "norm_weight", *a.norm_weight, {k});
    check_like(a.op, "norm_weight", *a.norm_weight, "x", a.x);
  }
  check_shape(a.op, "state", a.state, {a.batch(), a.slots(), r});
  check_states(a, "state", a.state);
  if (a.history) {
    const Tensor& h = *a.history;
    check(h.dim() == 4 && h.size(0) == a.batch() && h.size(1) <= a.tokens() &&
              h.size(2) == a.slots() && h.size(3) == r,
          a.op, ": history must have shape (", a.batch(), ", at most ", a.tokens(), ", ", a.slots(),
          ", ", r, "), got ", shape(h));
    check_states(a, "history", h);
  }
  check_flags(a, "mask", a.mask);
  check_flags(a, "starts", a.starts);
}

// g = V f(x), (batch, tokens, branches · channels).
inline LinearArgs first_linear(const MemoryArgs& a) {
  return {a.op,          a.x,        a.weight_v, std::nullopt,    std::nullopt,
          a.norm_weight, a.norm_eps, false,      a.weight_v_scale};
}

// residual + U c + b.
inline LinearArgs second_linear(const MemoryArgs& a, const Tensor& c) {
  return {a.op,         c,  *a.weight_u, a.bias,          a.residual ? *a.residual : a.x,
          std::nullopt, 0., false,       a.weight_u_scale};
}

// Without U the filter's result is the operator's: what it adds must have contiguous rows. `a` must
// outlive the parameters.
inline void make_rows_contiguous(MemoryArgs& a) {
  if (a.weight_u) return;
  a.residual = with_contiguous_rows(a.residual ? *a.residual : a.x);
  a.bias = contiguous(a.bias);
}

inline MemoryParams memory_params(const MemoryArgs& a, const Tensor& g, const Tensor& out) {
  const auto flags = [](const uint8_t*& p, int64_t (&strides)[2], const std::optional<Tensor>& t) {
    if (!t) return;
    p = static_cast<const uint8_t*>(t->const_data_ptr());
    for (int i = 0; i < 2; ++i) strides[i] = t->stride(i);
  };
  MemoryParams p{};
  p.g = g.const_data_ptr();
  for (int64_t lag : a.lags) p.lags[p.num_lags++] = static_cast<int>(lag);
  for (double decay : a.decays) {
    p.decays[p.num_decays] = static_cast<float>(decay);
    p.news[p.num_decays++] = static_cast<float>(1 - decay);
  }
  p.num_slots = static_cast<int>(a.slots());
  p.state = static_cast<float*>(a.state.mutable_data_ptr());
  for (int i = 0; i < 2; ++i) p.state_strides[i] = a.state.stride(i);
  if (a.history) {
    p.history = static_cast<float*>(a.history->mutable_data_ptr());
    for (int i = 0; i < 3; ++i) p.history_strides[i] = a.history->stride(i);
    p.history_tokens = a.history->size(1);
  }
  flags(p.mask, p.mask_strides, a.mask);
  flags(p.starts, p.start_strides, a.starts);
  if (!a.weight_u) {
    p.residual = data(a.residual);
    p.residual_stride = row_stride(*a.residual);
    p.bias = data(a.bias);
  }
  p.out = out.mutable_data_ptr();
  p.batch = a.batch();
  p.tokens = a.tokens();
  p.channels = a.channels();
  return p;
}

}  // namespace nbl
