// covariance_update on CUDA: checks, then the launches of nbl/cuda/covariance_update.h with
// PyTorch's memory and stream; the products by the portable kernel or by that of Hopper (paths.h).
// The host reads the flags of the statistics once per update, before anything is accumulated, so an
// update waits for the stream and cannot be captured in a CUDA graph.
#include <cuda.h>
#include <cudaTypedefs.h>

#include <iterator>

#include "args/covariance.h"
#include "cuda/cuda_common.h"
#include "cuda/paths.h"
#include "nbl/cuda/covariance_update.h"
#include "nbl/cuda/gram_sm90.cuh"

namespace nbl {
namespace {

constexpr const char* kOp = CovarianceArgs::kOp;
static_assert(std::size(CovarianceArgs::kInputNames) == kMaxInputs &&
              std::size(CovarianceArgs::kGramNames) == kMaxProducts);

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
    else
      launch_gram_portable(*this, params, as_half);
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
};

template <class T>
void accumulate(const Tensor& features, Path path, const MomentsUpdate& update) {
  CudaDevice device(features, path);
  BadValue bad{};
  if (MomentsUpdater<T, CudaDevice>(device, {update}).run(bad)) return;
  const char* name = CovarianceArgs::kInputNames[bad.input];
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

void covariance_update(const Tensor& features, const Tensor& targets,
                       const std::optional<Tensor>& block, const std::optional<Tensor>& mask,
                       Tensor count, Tensor sums, Tensor gram_ff, Tensor gram_tf, Tensor gram_tt,
                       Tensor gram_bf, Tensor gram_bb) {
  const int device = device_of(features);
  const DeviceGuard guard(device);
  const int capability = compute_capability(device);
  const Path path = covariance_path(capability);
  if (path == Path::kPlain) {
    std::array<StableIValue, 11> stack{to_ivalue(features), to_ivalue(targets), to_ivalue(block),
                                       to_ivalue(mask),     to_ivalue(count),   to_ivalue(sums),
                                       to_ivalue(gram_ff),  to_ivalue(gram_tf), to_ivalue(gram_tt),
                                       to_ivalue(gram_bf),  to_ivalue(gram_bb)};
    call_aten("nbl::covariance_update_plain", "", stack.data());
    // An error of its own would come through the dispatcher without its message.
    return check(torch::stable::detail::to<bool>(stack[0]), kOp,
                 ": features, targets and block must be finite; nothing was accumulated");
  }
  check(path != Path::kHopper || can_run_hopper(capability), kOp,
        ": the path hopper needs compute capability 9.0 (got ", capability / 10, ".",
        capability % 10, ") and a build for 9.0a");
  check(capability >= 80, kOp, ": CUDA kernels need compute capability 8.0, got ", capability / 10,
        ".", capability % 10);
  check(!is_capturing(current_stream(features)), kOp,
        " reads flags back to the host and cannot be captured in a CUDA graph");

  const CovarianceArgs args = covariance_args(features, targets, block, mask, count, sums,
                                              {gram_ff, gram_tf, gram_tt, gram_bf, gram_bb});
  if (args.tokens == 0) return;
  MomentsUpdate update{};
  update.num_inputs = static_cast<int>(args.inputs.size());
  update.tokens = args.tokens;
  for (int s = 0; s < update.num_inputs; ++s) {
    const Tensor& input = args.inputs[s];
    update.inputs[s] = {input.const_data_ptr(), row_stride(input), args.dims[s]};
  }
  if (args.mask) update.mask = static_cast<const uint8_t*>(args.mask->const_data_ptr());
  update.count = args.count_data();
  update.sums = args.sums_data();
  for (int product = 0; product < kMaxProducts; ++product)
    update.grams[product] = args.gram_data(product);
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
