// Launching a kernel that takes one params struct: on the host, by nvcc-compiled code.
#pragma once

#include <cuda_runtime.h>

namespace nbl {

// `dependent`: the kernel may start while the one before it in the stream still runs (it calls
// grid_dependency_wait() before it touches anything of that one). From compute capability 9.0 on.
template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                          cudaStream_t stream, bool dependent, const Params& params) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace nbl
