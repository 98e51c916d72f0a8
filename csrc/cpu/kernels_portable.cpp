// The CPU kernels for: portable. See include/nbl/cpu/simd.h for how one source serves all.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "nbl/cpu/kernels.h"
#include "nbl/dtypes.h"

#define NBL_ISA portable

#include "nbl/cpu/table.h"

namespace nbl {

const CpuKernels& kernels_portable() {
  static const CpuKernels table = NBL_ISA::make_table("portable");
  return table;
}

}  // namespace nbl
