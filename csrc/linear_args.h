// The arguments of the three linear operators, checked and made ready: what the CPU and the CUDA
// launcher have in common.
#pragma once

#include <vector>

#include "common.h"

namespace nbl {

struct LinearArgs {
  const char* op;
  Tensor x, weight;
  std::optional<Tensor> bias, residual, norm_weight;
  double norm_eps;
  bool swiglu;
  std::optional<Tensor> weight_scale;  // of a quantized weight
};

inline LinearArgs residual_linear_args(const Tensor& x, const Tensor& weight,
                                       const std::optional<Tensor>& bias,
                                       const std::optional<Tensor>& residual,
                                       const std::optional<Tensor>& norm_weight, double norm_eps,
                                       const std::optional<Tensor>& weight_scale) {
  return {"residual_linear", x,        weight, bias,        residual ? *residual : x,
          norm_weight,       norm_eps, false,  weight_scale};
}

inline LinearArgs norm_linear_args(const Tensor& x, const Tensor& norm_weight, const Tensor& weight,
                                   const std::optional<Tensor>& bias, double norm_eps,
                                   const std::optional<Tensor>& weight_scale) {
  return {"norm_linear", x, weight, bias, std::nullopt, norm_weight, norm_eps, false, weight_scale};
}

inline LinearArgs norm_swiglu_args(const Tensor& x, const Tensor& norm_weight,
                                   const Tensor& gate_up_weight, double norm_eps,
                                   const std::optional<Tensor>& weight_scale) {
  return {"norm_swiglu", x,        gate_up_weight, std::nullopt, std::nullopt,
          norm_weight,   norm_eps, true,           weight_scale};
}

inline WeightFormat weight_format(const LinearArgs& a) {
  switch (a.weight.scalar_type()) {
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

// The weight of `rows` rows for k features, and its scale, in one of the formats.
inline void validate_weight(const LinearArgs& a, const char* name, int64_t rows, int64_t k) {
  const WeightFormat format = weight_format(a);
  const bool int4 = format == WeightFormat::kInt4;
  const int64_t groups = (k + kInt4Group - 1) / kInt4Group;
  const int64_t columns = int4 ? groups * static_cast<int64_t>(sizeof(int4_group)) : k;
  check(a.weight.size(1) == columns, a.op, ": ", name, " must have shape (N, ", columns,
        int4 ? "), 64 bytes for every 128 features," : ")", " for x of shape ", shape(a.x),
        ", got ", shape(a.weight));
  if (format == WeightFormat::kPlain) {
    check_like(a.op, name, a.weight, "x", a.x);
    check(!a.weight_scale, a.op, ": weight_scale must be None for a ", name, " in the dtype of x");
    return;
  }
  check(a.weight.device() == a.x.device(), a.op, ": ", name, " must be on the device of x");
  check(a.weight_scale.has_value(), a.op, ": weight_scale must be given for a ", name, " of dtype ",
        dtype_name(a.weight.scalar_type()));
  const Tensor& scale = *a.weight_scale;
  if (int4)
    check_shape(a.op, "weight_scale", scale, {rows, groups});
  else
    check_shape(a.op, "weight_scale", scale, {rows});
  const ScalarType expected = int4 ? ScalarType::BFloat16 : ScalarType::Float;
  check(scale.scalar_type() == expected, a.op, ": weight_scale must be ", dtype_name(expected),
        " for a ", name, " of dtype ", dtype_name(a.weight.scalar_type()), ", got ",
        dtype_name(scale.scalar_type()));
  check(scale.device() == a.x.device(), a.op, ": weight_scale must be on the device of x");
}

inline void validate(const LinearArgs& a) {
  kernel_dtype(a.op, "x", a.x);
  const char* weight_name = a.swiglu ? "gate_up_weight" : "weight";
  check(a.x.dim() >= 1, a.op, ": x must have at least one dimension, got a scalar");
  check(a.weight.dim() == 2, a.op, ": ", weight_name, " must have 2 dimensions, got shape ",
        shape(a.weight));
  const int64_t k = a.x.size(-1), rows = a.weight.size(0);
  validate_weight(a, weight_name, rows, k);
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

}  // namespace nbl
