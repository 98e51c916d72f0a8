// What the launchers share: checks whose messages name the argument, dtypes, ATen calls.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "nbl/dtypes.h"

namespace nbl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ')';
  return text.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

inline DType kernel_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(op, ": ", name, " must be float32, bfloat16 or float16, got ",
           dtype_name(t.scalar_type()));
  }
}

inline void check_like(const char* op, const char* name, const Tensor& t, const char* model_name,
                       const Tensor& model) {
  check(t.scalar_type() == model.scalar_type(), op, ": ", name, " must have the dtype of ",
        model_name, ", ", dtype_name(model.scalar_type()), ", got ", dtype_name(t.scalar_type()));
  check(t.device() == model.device(), op, ": ", name, " must be on the device of ", model_name);
}

inline void check_shape(const char* op, const char* name, const Tensor& t,
                        std::initializer_list<int64_t> expected, const char* or_else = "") {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (int64_t size : expected) same = same && t.size(i++) == size;
  if (same) return;
  std::ostringstream text;
  i = 0;
  for (int64_t size : expected) text << (i++ ? ", " : "(") << size;
  fail(op, ": ", name, " must have shape ", text.str(), expected.size() == 1 ? ",)" : ")", or_else,
       ", got ", shape(t));
}

// Rows with a contiguous last dimension: any 2-d row stride is kept, all else becomes contiguous.
inline Tensor with_contiguous_rows(const Tensor& t) {
  if (t.is_contiguous() || (t.dim() == 2 && t.stride(1) == 1)) return t;
  return torch::stable::contiguous(t);
}

inline int64_t row_stride(const Tensor& t) { return t.dim() == 2 ? t.stride(0) : t.size(-1); }

// Calls an ATen operator through the dispatcher; returns its first result.
inline void call_aten(const char* name, const char* overload, StableIValue* stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
}

template <class T>
StableIValue to_ivalue(const T& value) {
  return torch::stable::detail::from(value);
}

inline Tensor tensor_from(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

}  // namespace nbl
