// The arguments of covariance_update, checked and made ready: what the CPU and the CUDA launcher
// have in common.
#pragma once

#include <vector>

#include "args/common.h"

namespace nbl {

// The inputs are features, targets and, where there is one, block; gram_xy is Σ x yᵀ of two of
// them.
struct CovarianceArgs {
  static constexpr const char* kOp = "covariance_update";
  static constexpr const char* kInputNames[] = {"features", "targets", "block"};
  static constexpr const char* kGramNames[] = {"gram_ff", "gram_tf", "gram_tt", "gram_bf",
                                               "gram_bb"};
  static constexpr int kGramInputs[][2] = {{0, 0}, {1, 0}, {1, 1}, {2, 0}, {2, 2}};

  std::vector<Tensor> inputs;  // (tokens, dims[i]), rows contiguous
  std::array<int64_t, 3> dims{};
  int64_t tokens = 0;
  std::optional<Tensor> mask;  // (tokens,), contiguous; false: not looked at
  Tensor count, sums;
  std::vector<Tensor> grams;  // without elements: left out, not computed

  int64_t* count_data() const { return static_cast<int64_t*>(count.mutable_data_ptr()); }
  double* sums_data() const { return static_cast<double*>(sums.mutable_data_ptr()); }
  // Null where it is left out.
  double* gram_data(size_t gram) const {
    const Tensor& t = grams[gram];
    return t.numel() > 0 ? static_cast<double*>(t.mutable_data_ptr()) : nullptr;
  }
};

inline CovarianceArgs covariance_args(const Tensor& features, const Tensor& targets,
                                      const std::optional<Tensor>& block,
                                      const std::optional<Tensor>& mask, const Tensor& count,
                                      const Tensor& sums, std::vector<Tensor> grams) {
  using A = CovarianceArgs;
  A a{{features, targets}, {}, 0, mask, count, sums, std::move(grams)};
  if (block) a.inputs.push_back(*block);
  a.tokens = features.dim() > 0 ? features.size(0) : 0;
  for (size_t i = 0; i < a.inputs.size(); ++i) {
    Tensor& input = a.inputs[i];
    const char* name = A::kInputNames[i];
    kernel_dtype(A::kOp, name, input);
    check_like(A::kOp, name, input, "features", features);
    check(input.dim() == 2, A::kOp, ": ", name, " must have 2 dimensions (tokens, dim), got ",
          shape(input));
    check(input.size(0) == a.tokens, A::kOp, ": ", name, " must have the ", a.tokens,
          " tokens of features, got ", input.size(0));
    check(input.size(1) <= int64_t{1} << 20, A::kOp, ": ", name,
          " must have at most 2^20 channels, got ", input.size(1));
    input = with_contiguous_rows(input);
    a.dims[i] = input.size(1);
  }
  const auto check_device = [&](const char* name, const Tensor& t) {
    check(t.device() == features.device(), A::kOp, ": ", name,
          " must be on the device of features");
  };
  if (mask) {
    check_shape(A::kOp, "mask", *mask, {a.tokens});
    check(mask->scalar_type() == ScalarType::Bool, A::kOp, ": mask must be bool, got ",
          dtype_name(mask->scalar_type()));
    check_device("mask", *mask);
    a.mask = torch::stable::contiguous(*mask);
  }
  const auto check_sum = [&](const char* name, const Tensor& t) {
    check(t.scalar_type() == ScalarType::Double && t.is_contiguous(), A::kOp, ": ", name,
          " must be a contiguous float64 tensor");
    check_device(name, t);
  };
  check_shape(A::kOp, "sums", sums, {a.dims[0] + a.dims[1] + a.dims[2]});
  check_sum("sums", sums);
  for (size_t gram = 0; gram < a.grams.size(); ++gram) {
    const auto [row, col] = A::kGramInputs[gram];
    if (a.grams[gram].numel() > 0)
      check_shape(A::kOp, A::kGramNames[gram], a.grams[gram], {a.dims[row], a.dims[col]},
                  " or no elements (left out)");
    check_sum(A::kGramNames[gram], a.grams[gram]);
  }
  check(count.scalar_type() == ScalarType::Long && count.numel() == 1, A::kOp,
        ": count must be one int64");
  check_device("count", count);
  return a;
}

}  // namespace nbl
