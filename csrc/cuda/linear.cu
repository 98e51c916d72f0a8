// residual_linear, norm_linear, norm_swiglu on CUDA: checks, then the fused kernels for few rows
// (decode) or cuBLASLt between our normalization and silu·up for many (prefill), of a quantized
// weight slab by slab.
#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "args/linear.h"
#include "cuda/cuda_common.h"
#include "cuda/matmul.h"
#include "cuda/paths.h"
#include "nbl/cuda/launch.h"
#include "nbl/cuda/skinny_linear.cuh"

namespace nbl {
namespace {

// ---- Plain PyTorch -----------------------------------------------------------------------------

// The composites of PyTorch operations (nbl_kernels/_ops.py), by what is to be computed.
Tensor run_plain(const LinearArgs& a) {
  if (a.swiglu) {
    std::array<StableIValue, 5> stack{to_ivalue(a.x), to_ivalue(*a.norm_weight),
                                      to_ivalue(a.weight), to_ivalue(a.norm_eps),
                                      to_ivalue(a.weight_scale)};
    call_aten("nbl::norm_swiglu_plain", "", stack.data());
    return tensor_from(stack[0]);
  }
  if (a.residual) {
    std::array<StableIValue, 7> stack{to_ivalue(a.x),           to_ivalue(a.weight),
                                      to_ivalue(a.bias),        to_ivalue(a.residual),
                                      to_ivalue(a.norm_weight), to_ivalue(a.norm_eps),
                                      to_ivalue(a.weight_scale)};
    call_aten("nbl::residual_linear_plain", "", stack.data());
    return tensor_from(stack[0]);
  }
  std::array<StableIValue, 6> stack{to_ivalue(a.x),        to_ivalue(a.norm_weight),
                                    to_ivalue(a.weight),   to_ivalue(a.bias),
                                    to_ivalue(a.norm_eps), to_ivalue(a.weight_scale)};
  call_aten("nbl::norm_linear_plain", "", stack.data());
  return tensor_from(stack[0]);
}

// ---- Few rows ----------------------------------------------------------------------------------

// The counters of the tiles whose k is split, zero between launches. Launches of one stream follow
// each other and share them. A graph may be replayed beside whatever its stream does then, so what
// is captured gets its own, set to zero by a node of the graph: at the first split of a capture,
// once per stream, 4 KiB that are never given back, because the graph may outlive everything else.
// Not from PyTorch's allocator: in the private pool of a graph it would count them as a leak. (The
// partial sums need no care: like `out`, they come from there, call by call.)
constexpr int64_t kMostCounters = 1024;  // splits are only made where tiles are fewer than SMs

uint32_t* new_counters(cudaStream_t stream) {
  void* memory = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // allows cudaMalloc during a capture
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  const cudaError_t error = cudaMalloc(&memory, kMostCounters * sizeof(uint32_t));
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  check_cuda(error, "cudaMalloc");
  check_cuda(cudaMemsetAsync(memory, 0, kMostCounters * sizeof(uint32_t), stream),
             "cudaMemsetAsync");
  return static_cast<uint32_t*>(memory);
}

uint32_t* tile_counters(int device, cudaStream_t stream, int64_t count) {
  check(count <= kMostCounters, "at most ", kMostCounters, " tiles can be split, got ", count);
  struct Counters {
    unsigned long long capture = 0;  // none
    uint32_t *eager = nullptr, *captured = nullptr;
  };
  static std::mutex mutex;
  static std::map<std::pair<int, cudaStream_t>, Counters> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  Counters& mine = streams[{device, stream}];

  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  check_cuda(cudaStreamGetCaptureInfo(stream, &status, &capture), "cudaStreamGetCaptureInfo");
  const bool capturing = status == cudaStreamCaptureStatusActive;
  if (capturing && capture != mine.capture) {
    mine.captured = nullptr;
    mine.capture = capture;
  }
  uint32_t*& counters = capturing ? mine.captured : mine.eager;
  if (counters == nullptr) counters = new_counters(stream);
  return counters;
}

bool dependent_launch(int device) {
  return nbl::dependent_launch(device,
                               reinterpret_cast<const void*>(rms_norm_rows<bfloat16, true>));
}

// Whether every row can be read by 16 bytes at a time.
bool whole_granules(const void* rows, int64_t count, int64_t columns, int64_t stride,
                    int64_t element) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && columns * element % 16 == 0 &&
         (count <= 1 || stride * element % 16 == 0);
}

void run_skinny(const LinearArgs& a, const Tensor& out, int64_t m, int64_t n) {
  const int64_t k = a.x.size(-1), element = static_cast<int64_t>(a.x.element_size());
  const int device = device_of(a.x);
  const cudaStream_t stream = current_stream(a.x);
  LinearParams p{};
  p.x = a.x.const_data_ptr();
  p.x_stride = row_stride(a.x);
  p.norm_weight = data(a.norm_weight);
  p.norm_eps = static_cast<float>(a.norm_eps);
  p.weight = a.weight.const_data_ptr();
  p.weight_stride = a.weight.stride(0);
  p.weight_scale = data(a.weight_scale);
  p.bias = data(a.bias);
  p.residual = data(a.residual);
  p.residual_stride = a.residual ? row_stride(*a.residual) : 0;
  p.out = out.mutable_data_ptr();
  p.out_stride = n;
  p.m = static_cast<int>(m);
  p.n = static_cast<int>(n);
  p.k = static_cast<int>(k);
  p.swiglu = a.swiglu;
  p.dependent = dependent_launch(device);

  LinearProblem problem{};
  problem.dtype = kernel_dtype(a.op, "x", a.x);
  problem.format = weight_format(a);
  problem.swiglu = a.swiglu;
  problem.norm = a.norm_weight.has_value();
  problem.vector = whole_granules(p.x, m, k, p.x_stride, element) &&
                   whole_granules(p.norm_weight, 1, k, k, element) &&
                   whole_granules(p.weight, a.weight.size(0), a.weight.size(1), p.weight_stride,
                                  static_cast<int64_t>(a.weight.element_size()));
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.sm_count = sm_count(device);
  // One handle, but another stream in every thread: no counters could be shared.
  if (stream == cudaStreamPerThread) problem.splits = 1;
  with_linear_tile(problem, [&](auto tile) {
    using Tile = decltype(tile);
    const LinearGeometry geometry = linear_geometry<Tile>(problem);
    std::optional<Tensor> partials;
    p.split_k = geometry.split_k;
    if (geometry.grid_y > 1) {
      partials = torch::stable::new_empty(a.x, {geometry.partials}, ScalarType::Float);
      p.partials = static_cast<float*>(partials->mutable_data_ptr());
      p.counters = tile_counters(device, stream, geometry.counters);
    }
    check_cuda(launch_kernel(skinny_linear<Tile>, dim3(geometry.grid_x, geometry.grid_y),
                             kLinearThreads, geometry.shared_bytes, stream, p.dependent, p),
               a.op);
  });
}

// ---- Many rows: bfloat16 and float16 -----------------------------------------------------------

// Calls visitor(element of the type of t).
template <class Visitor>
void with_16_bit_type(const Tensor& t, const Visitor& visitor) {
  t.scalar_type() == ScalarType::BFloat16 ? visitor(bfloat16{}) : visitor(float16{});
}

Tensor normalized(const LinearArgs& a, int64_t m) {
  const Tensor out = torch::stable::new_empty(a.x, a.x.sizes());
  const int64_t k = a.x.size(-1), element = static_cast<int64_t>(a.x.element_size());
  NormRowsParams p{};
  p.x = a.x.const_data_ptr();
  p.x_stride = row_stride(a.x);
  p.norm_weight = data(a.norm_weight);
  p.norm_eps = static_cast<float>(a.norm_eps);
  p.out = out.mutable_data_ptr();
  p.out_stride = k;
  p.k = static_cast<int>(k);
  const bool vector = whole_granules(p.x, m, k, p.x_stride, element) &&
                      whole_granules(p.norm_weight, 1, k, k, element) &&
                      whole_granules(p.out, m, k, k, element);
  with_16_bit_type(a.x, [&](auto type) {
    using T = decltype(type);
    check_cuda(launch_kernel(vector ? rms_norm_rows<T, true> : rms_norm_rows<T, false>,
                             dim3(static_cast<unsigned>(m)), kRowThreads, kNormRowsSharedBytes,
                             current_stream(a.x), dependent_launch(device_of(a.x)), p),
               a.op);
  });
  return out;
}

void silu_mul(const LinearArgs& a, const Tensor& gate_up, const Tensor& out, int64_t m, int64_t n) {
  const int64_t element = static_cast<int64_t>(out.element_size());
  const SiluMulParams p{gate_up.const_data_ptr(), 2 * n, out.mutable_data_ptr(), n,
                        static_cast<int>(n)};
  const bool vector =
      whole_granules(p.gate_up, m, n, n, element) && whole_granules(p.out, m, n, n, element);
  with_16_bit_type(out, [&](auto type) {
    using T = decltype(type);
    check_cuda(launch_kernel(vector ? silu_mul_rows<T, true> : silu_mul_rows<T, false>,
                             dim3(static_cast<unsigned>(m)), kRowThreads, 0, current_stream(out),
                             dependent_launch(device_of(out)), p),
               a.op);
  });
}

// Calls visitor(element of the type that a quantized weight is stored as).
template <class Visitor>
void with_quantized_type(WeightFormat format, const Visitor& visitor) {
  if (format == WeightFormat::kInt8) return visitor(int8_t{});
  if (format == WeightFormat::kFp8) return visitor(float8_e4m3{});
  visitor(int4_group{});
}

// Rows [first, first + rows) of a quantized weight in the dtype of x.
void dequantize(const LinearArgs& a, int64_t first, int64_t rows, const Tensor& out,
                int64_t out_stride) {
  DequantizeParams p{};
  p.weight_stride = a.weight.stride(0);
  p.weight = static_cast<const char*>(a.weight.const_data_ptr()) + first * p.weight_stride;
  p.weight_scale =
      static_cast<const char*>(a.weight_scale->const_data_ptr()) +
      first * a.weight_scale->stride(0) * static_cast<int64_t>(a.weight_scale->element_size());
  p.vector = whole_granules(p.weight, rows, a.weight.size(1), p.weight_stride, 1);
  p.out = out.mutable_data_ptr();
  p.out_stride = out_stride;
  p.k = static_cast<int>(a.x.size(-1));
  with_16_bit_type(a.x, [&](auto type) {
    with_quantized_type(weight_format(a), [&](auto stored) {
      check_cuda(launch_kernel(dequantize_rows<decltype(type), decltype(stored)>,
                               dim3(static_cast<unsigned>(rows)), kRowThreads, 0,
                               current_stream(a.x), dependent_launch(device_of(a.x)), p),
                 a.op);
    });
  });
}

// Of a quantized weight that much at a time is there in the dtype of x: it may still be in L2 when
// the product reads it, and is enough to keep all SMs busy.
constexpr int64_t kSlabBytes = int64_t{32} << 20;

// False, and nothing done that counts, where cuBLASLt cannot.
bool run_wide(const LinearArgs& a, const Tensor& out, int64_t m, int64_t n) {
  const Tensor features = a.norm_weight ? normalized(a, m) : a.x;
  const int64_t rows = a.weight.size(0), k = features.size(-1);
  const int64_t element = static_cast<int64_t>(a.x.element_size());
  const bool quantized = weight_format(a) != WeightFormat::kPlain;
  const int64_t padded = (k + 7) / 8 * 8;  // rows of a slab begin at multiples of 16 bytes
  int64_t slab = rows;
  std::optional<Tensor> memory;
  if (quantized) {
    slab = std::min(rows, std::max<int64_t>(128, kSlabBytes / (padded * element) / 128 * 128));
    memory = torch::stable::new_empty(a.x, {slab, padded});
  }
  const Tensor product = a.swiglu ? torch::stable::new_empty(out, {m, rows}) : out;
  // cuBLASLt reads a bias by 16 bytes, whatever its address: one in between is copied.
  std::optional<Tensor> bias = a.bias;
  if (bias && reinterpret_cast<uintptr_t>(bias->const_data_ptr()) % 16 != 0)
    bias = torch::stable::clone(*bias);
  for (int64_t first = 0; first < rows; first += slab) {
    const auto from = [&](const std::optional<Tensor>& t) -> const void* {
      return t ? static_cast<const char*>(t->const_data_ptr()) + first * element : nullptr;
    };
    Matmul p{};
    p.dtype = kernel_dtype(a.op, "x", a.x);
    p.m = m;
    p.n = std::min(slab, rows - first);
    p.k = k;
    p.x = features.const_data_ptr();
    p.x_stride = row_stride(features);
    if (quantized) {
      dequantize(a, first, p.n, *memory, padded);
      p.weight = memory->const_data_ptr();
      p.weight_stride = padded;
    } else {
      p.weight = a.weight.const_data_ptr();
      p.weight_stride = rows == 1 ? k : a.weight.stride(0);  // of one row, whatever it was
    }
    p.bias = from(bias);
    p.residual = from(a.residual);
    p.residual_stride = a.residual ? row_stride(*a.residual) : 0;
    p.out = static_cast<char*>(product.mutable_data_ptr()) + first * element;
    p.out_stride = rows;
    const bool strides =
        p.x_stride >= k && p.weight_stride >= k && (!p.residual || p.residual_stride >= rows);
    if (!strides || !matmul(p, a.x)) return false;
  }
  if (a.swiglu) silu_mul(a, product, out, m, n);
  return true;
}

// ---- Which of them -----------------------------------------------------------------------------

}  // namespace

Tensor run_linear(LinearArgs a) {
  validate(a);
  const int device = device_of(a.x);
  constexpr int kOldest = 80;  // bfloat16 and its mma
  if (compute_capability(device) < kOldest ||
      linear_path(compute_capability(device)) == Path::kPlain)
    return run_plain(a);
  const DeviceGuard guard(device);
  make_rows_contiguous(a);

  const int64_t m = product_of_leading(a.x), k = a.x.size(-1);
  const int64_t n = a.weight.size(0) / (a.swiglu ? 2 : 1);
  constexpr int64_t kMost = std::numeric_limits<int>::max() - (1 << 20);
  if (m > kMost || a.weight.size(0) > kMost || k > kMost) return run_plain(a);
  if (m > 0 && n > 0 && m <= kMostSkinnyRows) {
    const Tensor out = empty_like_rows(a.x, n);
    run_skinny(a, out, m, n);
    return out;
  }
  // In float32 PyTorch alone knows whether TF32 is allowed.
  if (m > 0 && n > 0 && k > 0 && a.x.scalar_type() != ScalarType::Float) {
    const Tensor out = empty_like_rows(a.x, n);
    if (run_wide(a, out, m, n)) return out;
  }
  return run_plain(a);
}

}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CUDA, m) { nbl::register_linears(m); }
