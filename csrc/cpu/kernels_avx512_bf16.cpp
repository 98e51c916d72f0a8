// The CPU kernels for: avx512_bf16. See include/nbl/cpu/simd.h for how one source serves all.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "nbl/cpu/kernels.h"
#include "nbl/dtypes.h"

#define NBL_ISA avx512_bf16
#define NBL_AVX512
#define NBL_AVX512_BF16

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((                                                                         \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx2,fma,f16c")
#endif

#include "nbl/cpu/table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace nbl {

const CpuKernels& kernels_avx512_bf16() {
  static const CpuKernels table = NBL_ISA::make_table("avx512_bf16");
  return table;
}

}  // namespace nbl
#endif  // __x86_64__
