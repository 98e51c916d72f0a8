// Fills a CpuKernels table with the kernels of one instruction set; see simd.h.
#pragma once

#include "gram.h"
#include "memory.h"
#include "rope.h"
#include "skinny_linear.h"
#include "wide_linear.h"

namespace nbl {
namespace NBL_ISA {

template <class T, class W>
constexpr LinearKernels linear_kernels() {
  return {prepare_features<T, W>,    linear_columns<T, W>,      swiglu_columns<T, W>,
          wide_linear_columns<T, W>, wide_swiglu_columns<T, W>, wide_scratch_bytes<T, W>};
}

template <class T>
constexpr TypedKernels typed_kernels() {
  return {{linear_kernels<T, T>(), linear_kernels<T, int8_t>(), linear_kernels<T, float8_e4m3>(),
           linear_kernels<T, int4_group>()},
          rms_norm_rows<T>,
          silu_mul_rows<T>,
          residual_rows<T>,
          rope_append<T>,
          memory_filter<T>,
          column_stats<T>,
          pack<T>};
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
