// The arguments of the three linear operators, checked and made ready: what the CPU and the CUDA
// launcher have in common.
#pragma once

#include <vector>

#include "args/common.h"

namespace nbl {

struct LinearArgs {
  const char* op;
  Tensor x, weight;
  std::optional<Tensor> bias, residual, norm_weight;
  double norm_eps;
  bool swiglu;
  std::optional<Tensor> weight_scale;  // of a quantized weight
};

inline WeightFormat weight_format(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Char:
      return WeightFormat::kInt8;
    case ScalarType::Float8_e4m3fn:
      return WeightFormat::kFp8;
    case ScalarType::Byte:
      return WeightFormat::kInt4;
    default:
      return WeightFormat::kPlain;
  }
}

inline WeightFormat weight_format(const LinearArgs& a) { return weight_format(a.weight); }

// A weight (2 dimensions) and its scale by the names that messages give them.
struct NamedWeight {
  const char* name;
  const Tensor& weight;
  const char* scale_name;
  const std::optional<Tensor>& scale;
};

// In one of the formats, for k features, the shape of `source` says; activations are those of x.
inline void check_weight(const char* op, const NamedWeight& w, int64_t k, const char* source_name,
                         const Tensor& source, const Tensor& x) {
  const Tensor& weight = w.weight;
  const WeightFormat format = weight_format(weight);
  const bool int4 = format == WeightFormat::kInt4;
  const int64_t rows = weight.size(0), groups = (k + kInt4Group - 1) / kInt4Group;
  const int64_t columns = int4 ? groups * static_cast<int64_t>(sizeof(int4_group)) : k;
  check(weight.size(1) == columns, op, ": ", w.name, " must have shape (N, ", columns,
        int4 ? "), 64 bytes for every 128 features," : ")", " for ", source_name, " of shape ",
        shape(source), ", got ", shape(weight));
  if (format == WeightFormat::kPlain) {
    check_like(op, w.name, weight, "x", x);
    check(!w.scale, op, ": ", w.scale_name, " must be None for a ", w.name, " in the dtype of x");
    return;
  }
  check(weight.device() == x.device(), op, ": ", w.name, " must be on the device of x");
  check(w.scale.has_value(), op, ": ", w.scale_name, " must be given for a ", w.name, " of dtype ",
        dtype_name(weight.scalar_type()));
  const Tensor& scale = *w.scale;
  if (int4)
    check_shape(op, w.scale_name, scale, {rows, groups});
  else
    check_shape(op, w.scale_name, scale, {rows});
  const ScalarType expected = int4 ? ScalarType::BFloat16 : ScalarType::Float;
  check(scale.scalar_type() == expected, op, ": ", w.scale_name, " must be ", dtype_name(expected),
        " for a ", w.name, " of dtype ", dtype_name(weight.scalar_type()), ", got ",
        dtype_name(scale.scalar_type()));
  check(scale.device() == x.device(), op, ": ", w.scale_name, " must be on the device of x");
}

inline void check_weight(const char* op, const NamedWeight& w, int64_t k, const char* x_name,
                         const Tensor& x) {
  check_weight(op, w, k, x_name, x, x);
}

inline void validate(const LinearArgs& a) {
  kernel_dtype(a.op, "x", a.x);
  const char* weight_name = a.swiglu ? "gate_up_weight" : "weight";
  check(a.x.dim() >= 1, a.op, ": x must have at least one dimension, got a scalar");
  check(a.weight.dim() == 2, a.op, ": ", weight_name, " must have 2 dimensions, got shape ",
        shape(a.weight));
  const int64_t k = a.x.size(-1), rows = a.weight.size(0);
  check_weight(a.op, {weight_name, a.weight, "weight_scale", a.weight_scale}, k, "x", a.x);
  check(!a.swiglu || rows % 2 == 0, a.op,
        ": gate_up_weight must have an even number of rows (gate, then up), got ", rows);
  if (a.bias) {
    check_shape(a.op, "bias", *a.bias, {rows});
    check_like(a.op, "bias", *a.bias, "x", a.x);
  }
  if (a.norm_weight) {
    check_shape(a.op, "norm_weight", *a.norm_weight, {k});
    check_like(a.op, "norm_weight", *a.norm_weight, "x", a.x);
  }
  if (a.residual) {
    bool same = a.residual->dim() == a.x.dim() && a.residual->size(-1) == rows;
    for (int64_t i = 0; same && i + 1 < a.x.dim(); ++i) same = a.residual->size(i) == a.x.size(i);
    check(same, a.op, ": residual must have the shape of the output, x's ", shape(a.x),
          " with last dimension ", rows, ", got ", shape(*a.residual),
          a.residual->get() == a.x.get() ? " (residual defaults to x: give one when N != K)" : "");
    check_like(a.op, "residual", *a.residual, "x", a.x);
  }
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  if (!t || t->is_contiguous()) return t;
  return torch::stable::contiguous(*t);
}

// Every last dimension contiguous. Row strides are kept, but those of leading dimensions are not.
inline void make_rows_contiguous(LinearArgs& a) {
  a.x = with_contiguous_rows(a.x);
  if (a.weight.stride(1) != 1) a.weight = torch::stable::contiguous(a.weight);
  a.weight_scale = contiguous(a.weight_scale);
  a.bias = contiguous(a.bias);
  a.norm_weight = contiguous(a.norm_weight);
  if (a.residual) a.residual = with_contiguous_rows(*a.residual);
}

inline const void* data(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

inline int64_t product_of_leading(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// x's leading dimensions, and `last`.
inline Tensor empty_like_rows(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(last);
  return torch::stable::new_empty(x, sizes);
}

// Checks and runs: in cpu/linear.cpp and cuda/linear.cu, each module its own.
Tensor run_linear(LinearArgs a);

// The operators, for either device.
inline Tensor residual_linear(const Tensor& x, const Tensor& weight,
                              const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& residual,
                              const std::optional<Tensor>& norm_weight, double norm_eps,
                              const std::optional<Tensor>& weight_scale) {
  return run_linear({"residual_linear", x, weight, bias, residual ? *residual : x, norm_weight,
                     norm_eps, false, weight_scale});
}

inline Tensor norm_linear(const Tensor& x, const Tensor& norm_weight, const Tensor& weight,
                          const std::optional<Tensor>& bias, double norm_eps,
                          const std::optional<Tensor>& weight_scale) {
  return run_linear(
      {"norm_linear", x, weight, bias, std::nullopt, norm_weight, norm_eps, false, weight_scale});
}

inline Tensor norm_swiglu(const Tensor& x, const Tensor& norm_weight, const Tensor& gate_up_weight,
                          double norm_eps, const std::optional<Tensor>& weight_scale) {
  return run_linear({"norm_swiglu", x, gate_up_weight, std::nullopt, std::nullopt, norm_weight,
                     norm_eps, true, weight_scale});
}

template <class Library>
void register_linears(Library& m) {
  for (const char* name : {"residual_linear", "residual_linear_inference"})
    m.impl(name, TORCH_BOX(&residual_linear));
  for (const char* name : {"norm_linear", "norm_linear_inference"})
    m.impl(name, TORCH_BOX(&norm_linear));
  for (const char* name : {"norm_swiglu", "norm_swiglu_inference"})
    m.impl(name, TORCH_BOX(&norm_swiglu));
}

}  // namespace nbl
