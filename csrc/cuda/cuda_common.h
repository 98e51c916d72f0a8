// What the CUDA launchers share, on top of csrc/args/common.h: streams, devices, errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <string>

#include "args/common.h"

struct cublasContext;  // cublas_v2.h: its handle is a cublasContext*

namespace nbl {

using torch::stable::accelerator::DeviceGuard;

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // so that the next call does not report it again
  fail(what, ": ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
}

inline int device_of(const Tensor& t) { return static_cast<int>(t.get_device_index()); }

// PyTorch's current stream on the tensor's device.
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_of(t), &stream));
  return static_cast<cudaStream_t>(stream);
}

// PyTorch's cuBLAS handle, set to its current stream, on the current device.
inline cublasContext* blas_handle() {
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  return static_cast<cublasContext*>(handle);
}

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

struct Device {
  int compute_capability;  // major * 10 + minor
  int sm_count;
  int l2_bytes;
  int most_shared_bytes;  // a block may ask for
};

inline constexpr int kMostDevices = 64;

// Asked for once; of a device that exists.
inline const Device& device_properties(int index) {
  static const std::array<Device, kMostDevices> devices = [] {
    std::array<Device, kMostDevices> all{};
    int count = 0;
    check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    for (int i = 0; i < std::min(count, kMostDevices); ++i) {
      const auto attribute = [i](cudaDeviceAttr which) {
        int value = 0;
        check_cuda(cudaDeviceGetAttribute(&value, which, i), "cudaDeviceGetAttribute");
        return value;
      };
      all[i] = {10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                    attribute(cudaDevAttrComputeCapabilityMinor),
                attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrL2CacheSize),
                attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
    }
    return all;
  }();
  check(index >= 0 && index < kMostDevices && devices[index].sm_count > 0,
        "no CUDA device of index ", index);
  return devices[index];
}

inline int compute_capability(int device) { return device_properties(device).compute_capability; }
inline int sm_count(int device) { return device_properties(device).sm_count; }

// Programmatic dependent launch, where the kernels that this device runs wait for their
// predecessors: code compiled for less than sm_90 (or brought there as PTX) does not.
// NBL_DEPENDENT_LAUNCH=0 turns it off. `device` is the current one, `kernel` any of ours: all are
// compiled for the same list.
inline bool dependent_launch(int device, const void* kernel) {
  static const bool allowed = [] {
    const char* text = std::getenv("NBL_DEPENDENT_LAUNCH");
    return text == nullptr || std::string(text) != "0";
  }();
  static std::array<std::atomic<int>, kMostDevices> known{};  // 0: not yet, 1: no, 2: yes
  std::atomic<int>& waits = known[device];
  if (waits.load(std::memory_order_relaxed) == 0) {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    waits.store(attributes.ptxVersion >= 90 ? 2 : 1, std::memory_order_relaxed);
  }
  return allowed && waits.load(std::memory_order_relaxed) == 2;
}

}  // namespace nbl
