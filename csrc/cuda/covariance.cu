// covariance_update on CUDA: checks, then the launches of nbl/cuda/covariance_update.h with
// PyTorch's memory and stream; the products by cuBLAS on panels, by the portable kernel or by that
// of Hopper (paths.h). The host reads the flags of the statistics once per update, before anything
// is accumulated, so an update waits for the stream and cannot be captured in a CUDA graph.
#include <cublas_v2.h>
#include <cuda.h>
#include <cudaTypedefs.h>

#include "cuda/cuda_common.h"
#include "cuda/paths.h"
#include "nbl/cuda/covariance_update.h"
#include "nbl/cuda/gram_sm90.cuh"

namespace nbl {
namespace {

constexpr const char* kOp = "covariance_update";
constexpr const char* kInputNames[kMaxInputs] = {"features", "targets", "block"};
constexpr const char* kGramNames[kMaxProducts] = {"gram_ff", "gram_tf", "gram_tt", "gram_bf",
                                                  "gram_bb"};

void check_blas(cublasStatus_t status, const char* what) {
  check(status == CUBLAS_STATUS_SUCCESS, what, ": ", cublasGetStatusString(status));
}

// PyTorch's handle with the settings that exact sums need, and as it was afterwards.
class ExactBlas {
 public:
  ExactBlas() : handle_(blas_handle()) {
    check_blas(cublasGetMathMode(handle_, &math_), "cublasGetMathMode");
    check_blas(cublasGetPointerMode(handle_, &pointers_), "cublasGetPointerMode");
    check_blas(cublasSetMathMode(handle_, CUBLAS_DEFAULT_MATH), "cublasSetMathMode");
    check_blas(cublasSetPointerMode(handle_, CUBLAS_POINTER_MODE_HOST), "cublasSetPointerMode");
  }
  ~ExactBlas() {
    cublasSetMathMode(handle_, math_);
    cublasSetPointerMode(handle_, pointers_);
  }
  ExactBlas(const ExactBlas&) = delete;
  ExactBlas& operator=(const ExactBlas&) = delete;

  // out (rows, cols) row-major (+)= Σ_tokens x_r y_c: cuBLAS, which is column-major, sees
  // outᵀ = Y Xᵀ with Y (cols, tokens) and X (rows, tokens).
  void gemm(bool as_half, int cols, int rows, int64_t tokens, const uint16_t* y, int64_t y_stride,
            const uint16_t* x, int64_t x_stride, bool add, float* out) const {
    const float one = 1.0f, beta = add ? 1.0f : 0.0f;
    const cudaDataType type = as_half ? CUDA_R_16F : CUDA_R_16BF;
    check_blas(cublasGemmEx_64(handle_, CUBLAS_OP_N, CUBLAS_OP_T, cols, rows, tokens, &one, y, type,
                               y_stride, x, type, x_stride, &beta, out, CUDA_R_32F, cols,
                               CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
               "cublasGemmEx");
  }

 private:
  cublasHandle_t handle_;
  cublasMath_t math_;
  cublasPointerMode_t pointers_;
};

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion");
    check(found == cudaDriverEntryPointSuccess && function,
          "cuTensorMapEncodeTiled: not in this driver");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

TensorMap tensor_map(const GramOperand& operand, int64_t tokens, bool as_half) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(operand.dim),
                               static_cast<cuuint64_t>(tokens),
                               static_cast<cuuint64_t>(operand.parts)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(operand.stride) * 2,
                                 static_cast<cuuint64_t>(operand.part_stride) * 2};
  const cuuint32_t box[3] = {kBoxColumns, kHopperSlab, 1}, steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, as_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      const_cast<void*>(operand.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", static_cast<int>(result));
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "the same 128 bytes");
  TensorMap copy;
  std::memcpy(&copy, &map, sizeof copy);
  return copy;
}

class CudaDevice {
 public:
  CudaDevice(const Tensor& like, Path path)
      : like_(like), stream_(current_stream(like)), path_(path) {}

  void* allocate(size_t bytes) {
    memory_.push_back(new_memory(bytes));
    return memory_.back().mutable_data_ptr();
  }

  // Work on memory that is given back here has been enqueued on the stream that PyTorch will
  // enqueue its next use on.
  void* scratch(size_t bytes) {
    if (bytes > scratch_bytes_) {
      scratch_ = new_memory(bytes);
      scratch_bytes_ = bytes;
    }
    return scratch_->mutable_data_ptr();
  }

  void clear(void* pointer, size_t bytes) {
    check_cuda(cudaMemsetAsync(pointer, 0, bytes, stream_), "cudaMemsetAsync");
  }

  template <class Params>
  void launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared, const Params& params) {
    if (shared > size_t{48} << 10)
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared)),
                 "cudaFuncSetAttribute");
    kernel<<<grid, threads, shared, stream_>>>(params);
    check_cuda(cudaGetLastError(), kOp);
  }

  void read_back(void* host, const void* device, size_t bytes) {
    check_cuda(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_),
               "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

  int multiprocessors() const { return sm_count(device_of(like_)); }

  void gram(const GramParams& params, bool as_half) {
    if (path_ == Path::kHopper)
      launch_hopper(params, as_half);
    else if (path_ == Path::kPortable)
      launch_gram_portable(*this, params, as_half);
    else
      multiply_panels(*this, params, as_half);
  }

  template <class... Args>
  void gemm(Args... args) {
    if (!blas_) blas_.emplace();
    blas_->gemm(args...);
  }

 private:
  Tensor new_memory(size_t bytes) const {
    return torch::stable::new_empty(like_, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  }

  void launch_hopper(const GramParams& params, bool as_half) {
    GramHopperParams p{};
    p.gram = params;
    plan_gram(p.gram, multiprocessors());
    if (p.gram.tiles == 0) return;
    if (p.gram.splits > 1)
      p.gram.partial = static_cast<float*>(scratch(gram_partial_bytes(p.gram, multiprocessors())));
    for (int i = 0; i < params.num_problems; ++i)
      for (int s = 0; s < params.problems[i].num_inputs; ++s)
        if (params.problems[i].inputs[s].dim > 0)
          p.maps[i][s] =
              tensor_map(params.problems[i].inputs[s], params.problems[i].tokens, as_half);
    launch(as_half ? gram_hopper<float16> : gram_hopper<bfloat16>,
           dim3{gram_hopper_blocks(p.gram, multiprocessors())}, kHopperThreads, kHopperShared, p);
    if (p.gram.splits > 1)
      launch(gram_combine, dim3{static_cast<unsigned>(p.gram.tiles)}, kGramThreads, 0, p.gram);
  }

  Tensor like_;
  cudaStream_t stream_;
  Path path_;
  std::vector<Tensor> memory_;
  std::optional<Tensor> scratch_;
  size_t scratch_bytes_ = 0;
  std::optional<ExactBlas> blas_;
};

template <class T>
void accumulate(const Tensor& features, Path path, const MomentsUpdate& update) {
  CudaDevice device(features, path);
  BadValue bad{};
  if (MomentsUpdater<T, CudaDevice>(device, {update}).run(bad)) return;
  const char* name = kInputNames[bad.input];
  if (bad.token < 0)
    fail(kOp, ": ", name, " has a sum of squares beyond float32 in channel ", bad.channel,
         "; nothing was accumulated");
  const MomentsInput& input = update.inputs[bad.input];
  T value;
  device.read_back(&value,
                   static_cast<const T*>(input.data) + bad.token * input.stride + bad.channel,
                   sizeof value);
  fail(kOp, ": ", name, " must be finite and below 1e18, got ", to_float(value), " at token ",
       bad.token, ", channel ", bad.channel, "; nothing was accumulated (mask such tokens out)");
}

void check_sums(const char* name, const Tensor& t, const Tensor& features) {
  check(t.scalar_type() == ScalarType::Double && t.is_contiguous(), kOp, ": ", name,
        " must be a contiguous float64 tensor");
  check(t.device() == features.device(), kOp, ": ", name, " must be on the device of features");
}

void covariance_update(const Tensor& features, const Tensor& targets,
                       const std::optional<Tensor>& block, const std::optional<Tensor>& mask,
                       Tensor count, Tensor sums, Tensor gram_ff, Tensor gram_tf, Tensor gram_tt,
                       Tensor gram_bf, Tensor gram_bb) {
  const int device = device_of(features);
  const DeviceGuard guard(device);
  const int capability = compute_capability(device);
  const Path path = gram_path(capability);
  if (path == Path::kPlain) {
    std::array<StableIValue, 11> stack{to_ivalue(features), to_ivalue(targets), to_ivalue(block),
                                       to_ivalue(mask),     to_ivalue(count),   to_ivalue(sums),
                                       to_ivalue(gram_ff),  to_ivalue(gram_tf), to_ivalue(gram_tt),
                                       to_ivalue(gram_bf),  to_ivalue(gram_bb)};
    return call_aten("nbl::covariance_update_plain", "", stack.data());
  }
  check(path != Path::kHopper || can_run_hopper(capability), kOp,
        ": the path hopper needs compute capability 9.0 (got ", capability / 10, ".",
        capability % 10, ") and a build for 9.0a");
  check(capability >= 80, kOp, ": CUDA kernels need compute capability 8.0, got ", capability / 10,
        ".", capability % 10);
  check(!is_capturing(current_stream(features)), kOp,
        " reads flags back to the host and cannot be captured in a CUDA graph");

  MomentsUpdate update{};
  std::array<Tensor, kMaxInputs> inputs{features, targets, block ? *block : features};
  update.num_inputs = block ? 3 : 2;
  update.tokens = features.dim() > 0 ? features.size(0) : 0;
  int64_t dims[kMaxInputs] = {};
  for (int s = 0; s < update.num_inputs; ++s) {
    Tensor& input = inputs[s];
    kernel_dtype(kOp, kInputNames[s], input);
    check_like(kOp, kInputNames[s], input, "features", features);
    check(input.dim() == 2, kOp, ": ", kInputNames[s],
          " must have 2 dimensions (tokens, dim), got ", shape(input));
    check(input.size(0) == update.tokens, kOp, ": ", kInputNames[s], " must have the ",
          update.tokens, " tokens of features, got ", input.size(0));
    check(input.size(1) <= int64_t{1} << 20, kOp, ": ", kInputNames[s],
          " must have at most 2^20 channels, got ", input.size(1));
    input = with_contiguous_rows(input);
    dims[s] = input.size(1);
    update.inputs[s] = {input.const_data_ptr(), row_stride(input), dims[s]};
  }
  Tensor counted = features;  // the mask, if there is one
  if (mask) {
    check_shape(kOp, "mask", *mask, {update.tokens});
    check(mask->scalar_type() == ScalarType::Bool, kOp, ": mask must be bool, got ",
          dtype_name(mask->scalar_type()));
    check(mask->device() == features.device(), kOp, ": mask must be on the device of features");
    counted = torch::stable::contiguous(*mask);
    update.mask = static_cast<const uint8_t*>(counted.const_data_ptr());
  }
  const auto [df, dt, db] = dims;
  check_shape(kOp, "sums", sums, {df + dt + db});
  check_sums("sums", sums, features);
  const Tensor* grams[kMaxProducts] = {&gram_ff, &gram_tf, &gram_tt, &gram_bf, &gram_bb};
  for (int product = 0; product < kMaxProducts; ++product) {
    const Tensor& gram = *grams[product];
    const char* name = kGramNames[product];
    if (gram.numel() > 0)
      check_shape(kOp, name, gram, {dims[gram_row_input(product)], dims[gram_col_input(product)]},
                  " or no elements (left out)");
    check_sums(name, gram, features);
  }
  check(count.scalar_type() == ScalarType::Long && count.numel() == 1 &&
            count.device() == features.device(),
        kOp, ": count must be one int64 on the device of features");
  if (update.tokens == 0) return;

  update.count = static_cast<int64_t*>(count.mutable_data_ptr());
  update.sums = static_cast<double*>(sums.mutable_data_ptr());
  for (int product = 0; product < kMaxProducts; ++product)
    if (grams[product]->numel() > 0)
      update.grams[product] = static_cast<double*>(grams[product]->mutable_data_ptr());
  switch (kernel_dtype(kOp, "features", features)) {
    case DType::kFloat32:
      return accumulate<float>(features, path, update);
    case DType::kBFloat16:
      return accumulate<bfloat16>(features, path, update);
    case DType::kFloat16:
      return accumulate<float16>(features, path, update);
  }
}

}  // namespace
}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CUDA, m) {
  m.impl("covariance_update", TORCH_BOX(&nbl::covariance_update));
}
