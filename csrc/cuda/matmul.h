// out = x · weightᵀ + bias + residual for many rows of x: cuBLASLt, with the sums in its epilogue.
#pragma once

#include "args/common.h"

namespace nbl {

struct Matmul {
  DType dtype;         // bfloat16 or float16; products and sums are float32
  int64_t m, n, k;     // positive
  const void* x;       // (m, k); strides are in elements, last dimensions contiguous
  int64_t x_stride;    // >= k
  const void* weight;  // (n, k)
  int64_t weight_stride;
  const void* bias;      // (n) or null
  const void* residual;  // (m, n) or null; may not overlap out
  int64_t residual_stride;
  void* out;  // (m, n)
  int64_t out_stride;
};

// On the current device and stream of `like`, whose allocator lends the workspace for the length of
// the call. False where cuBLASLt has no algorithm for such a problem.
bool matmul(const Matmul& problem, const Tensor& like);

}  // namespace nbl
