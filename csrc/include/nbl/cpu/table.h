// Fills a CpuKernels table with the kernels of one instruction set; see simd.h.
#pragma once

#include "gram.h"
#include "rope.h"
#include "skinny_linear.h"

namespace nbl {
namespace NBL_ISA {

template <class T>
constexpr TypedKernels typed_kernels() {
  return {prepare_features<T>, linear_columns<T>, swiglu_columns<T>,
          rms_norm_rows<T>,    silu_mul_rows<T>,  residual_rows<T>,
          rope_append<T>,      column_stats<T>,   pack<T>};
}

inline CpuKernels make_table(const char* name) {
#if defined(NBL_AVX512_BF16)
  constexpr bool kPairs = true;
#else
  constexpr bool kPairs = false;
#endif
  return {name,
          typed_kernels<float>(),
          typed_kernels<bfloat16>(),
          typed_kernels<float16>(),
          gram_tile,
          kPanel,
          kTileRowPanels,
          kTileColPanels,
          kBlockTokens,
          kBlockTokensPairs,
          kPairs};
}

}  // namespace NBL_ISA
}  // namespace nbl
