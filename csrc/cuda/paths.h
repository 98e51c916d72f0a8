// Which implementation an operator runs on CUDA tensors. A path becomes the default of a GPU only
// by a line in the table of paths.cpp that names the result file which showed it right and faster.
#pragma once

#include <map>
#include <string>

namespace nbl {

enum class Path {
  kPlain,     // PyTorch operations (nbl_kernels/_ops.py)
  kKernel,    // our kernels, and cuBLASLt above their rows (linear)
  kPortable,  // covariance: nbl/cuda/gram.cuh
  kHopper,    // covariance: nbl/cuda/gram_sm90.cuh
};

// Hopper's instructions need code for sm_90a itself: neither sm_90 nor PTX has them.
inline bool can_run_hopper(int compute_capability) {
  return NBL_HAS_SM90A && compute_capability == 90;
}

// For the device of compute capability major * 10 + minor.
Path linear_path(int compute_capability);
Path covariance_path(int compute_capability);
Path rope_path(int compute_capability);
Path memory_path(int compute_capability);  // of the filter; its linears take linear_path

// For the Python module: op is "linear", "covariance", "rope" or "memory", path one of its names or
// "auto" (the table's choice). NBL_CUDA_PATHS="linear=kernel,covariance=hopper" or "all=kernel"
// sets them at start; for covariance, "kernel" is the fastest of ours that the device can run.
std::map<std::string, std::string> cuda_paths(int compute_capability);
void set_cuda_path(const std::string& op, const std::string& path);

}  // namespace nbl
