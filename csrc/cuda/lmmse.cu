// lmmse_solve and the CCA matrices on CUDA: the steps of csrc/lmmse_solve.h by the kernels of
// nbl/cuda/lmmse.cuh. Factors and triangular solves are ATen's: potrfBatched, trsm or trsmBatched
// for small matrices, potrf and trsm for large ones, the triangular solves of several layers side
// by side on a few streams. In place, on PyTorch's handles and allocator; the host waits once per
// ridge that is tried.
#include <map>
#include <mutex>
#include <utility>

#include "cuda/cuda_common.h"
#include "cuda/paths.h"
#include "lmmse_solve.h"
#include "nbl/cuda/lmmse.cuh"

namespace nbl {
namespace {

// By calculation, on an H100: a batched factorization keeps about one SM busy per layer, n³/3 at
// some 0.25 TFLOP/s; factored singly, one after another, a layer is n/64 dependent steps of some
// 40 µs. For 32 layers the former is far ahead at 512 and level near 4096; but trsm, which is most
// of the work, is faster singly from a few hundred on.
constexpr int64_t kBatchedDim = 512;
constexpr int kLanes = 4;
constexpr int64_t kMostLayers = 65535;  // blockIdx.y and .z

using Lanes = std::array<cudaStream_t, kLanes>;

// Of PyTorch's pool, always the same: what its allocator keeps for them is used again.
const Lanes& lanes_of(int device) {
  static std::mutex mutex;
  static std::map<int, Lanes> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  Lanes lanes;
  for (cudaStream_t& lane : lanes) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_cuda_stream_from_pool(false, device, &stream));
    lane = static_cast<cudaStream_t>(stream);
  }
  return known.emplace(device, lanes).first->second;
}

// `stream` waits for what has been enqueued on `other`.
void wait_for(cudaStream_t stream, cudaStream_t other) {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  cudaError_t error = cudaEventRecord(event, other);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(stream, event, 0);
  cudaEventDestroy(event);
  check_cuda(error, "cudaStreamWaitEvent");
}

// While it lives, lane(i) makes a lane the current stream; the lanes start after what was enqueued
// before and the current stream goes on after them. So memory that belongs to the current stream
// may be used on the lanes, and released as soon as this is gone.
class Fork {
 public:
  Fork(int device, int count)
      : device_(device), count_(count), lanes_(lanes_of(device)), main_(current()) {
    for (int i = 0; i < count_; ++i) wait_for(lanes_[i], main_);
  }

  void lane(int64_t i) {
    leave();
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_create_cuda_stream_guard(lanes_[i % count_], device_, &guard_));
  }

  void join() {
    joined_ = true;
    leave();
    for (int i = 0; i < count_; ++i) wait_for(main_, lanes_[i]);
  }

  ~Fork() {
    if (joined_) return;
    try {  // leaving by an exception: the first one is the one to report
      join();
    } catch (...) {
    }
  }

  Fork(const Fork&) = delete;
  Fork& operator=(const Fork&) = delete;

 private:
  cudaStream_t current() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  // Back to the stream that was current before, as the very object it was.
  void leave() {
    if (guard_ == nullptr) return;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_delete_cuda_stream_guard(std::exchange(guard_, CUDAStreamGuardHandle{})));
  }

  int device_, count_;
  const Lanes& lanes_;
  cudaStream_t main_;
  CUDAStreamGuardHandle guard_ = nullptr;
  bool joined_ = false;
};

class CudaSteps final : public SolveSteps {
 public:
  explicit CudaSteps(const Tensor& like) : like_(like) {
    check(like.dim() == 0 || like.size(0) <= kMostLayers, "at most ", kMostLayers,
          " layers at once, got ", like.dim() ? like.size(0) : 0);
  }

  void equilibrate(const EquilibrateParams& p, int64_t layers) override {
    launch(equilibrate_kernel, lmmse_layer_grid(layers), p, "equilibrate");
  }

  void assemble(const AssembleParams& p, int64_t layers) override {
    launch(assemble_kernel, assemble_grid(p.c, layers), p, "assemble");
  }

  void check_pivots(const CheckPivotsParams& p, int64_t layers) override {
    launch(check_pivots_kernel, lmmse_layer_grid(layers), p, "check_pivots");
  }

  void scale(const ScaleParams& p, int64_t layers) override {
    launch(scale_kernel, scale_grid(p.rows, p.cols, layers), p, "scale");
  }

  void subtract_squares(const SubtractSquaresParams& p, int64_t layers) override {
    launch(squares_kernel, squares_grid(p.n, layers), p, "squares");
    launch(subtract_squares_kernel, lmmse_layer_grid(layers), p, "subtract_squares");
  }

  int64_t squares_scratch(int64_t n) const override { return squares_blocks(n); }
  int64_t batched_dim() const override { return kBatchedDim; }

  void for_each(int64_t count, const std::function<void(int64_t)>& task) override {
    if (count == 1) return task(0);
    Fork fork(device_of(like_), static_cast<int>(std::min<int64_t>(count, kLanes)));
    for (int64_t i = 0; i < count; ++i) {
      fork.lane(i);
      task(i);
    }
    fork.join();
  }

  std::vector<double> to_host(const Tensor& t) override {
    std::vector<double> values(t.numel());
    const cudaStream_t stream = current_stream(like_);
    check_cuda(cudaMemcpyAsync(values.data(), t.const_data_ptr(), values.size() * sizeof(double),
                               cudaMemcpyDeviceToHost, stream),
               "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    return values;
  }

  // From pageable memory: it has been read when the call returns.
  void from_host(const std::vector<double>& values, const Tensor& t) override {
    check_cuda(cudaMemcpyAsync(t.mutable_data_ptr(), values.data(), values.size() * sizeof(double),
                               cudaMemcpyHostToDevice, current_stream(like_)),
               "cudaMemcpyAsync");
  }

 private:
  template <class Params>
  void launch(void (*kernel)(Params), const LmmseGrid& grid, const Params& params,
              const char* name) const {
    kernel<<<dim3(grid.x, grid.y, grid.z), kLmmseThreads, grid.shared_bytes,
             current_stream(like_)>>>(params);
    check_cuda(cudaGetLastError(), name);
  }

  Tensor like_;
};

bool use_kernels(const char* op, const Tensor& t) {
  check(!is_capturing(current_stream(t)), op,
        " reads flags back to the host and cannot be captured in a CUDA graph");
  return solve_path(compute_capability(device_of(t))) == Path::kKernel;
}

solve::FiveTensors lmmse_solve(const Tensor& cov_ff, const Tensor& cov_tf, const Tensor& energy,
                               double ridge, int64_t rank) {
  const DeviceGuard guard(device_of(cov_tf));
  if (use_kernels("lmmse_solve", cov_tf)) {
    CudaSteps steps(cov_tf);
    return solve::lmmse_solve(steps, cov_ff, cov_tf, energy, ridge, rank);
  }
  std::array<StableIValue, 5> stack{to_ivalue(cov_ff), to_ivalue(cov_tf), to_ivalue(energy),
                                    to_ivalue(ridge), to_ivalue(rank)};
  call_aten("nbl::lmmse_solve_plain", "", stack.data());
  const auto result = [&stack](int i) { return tensor_from(stack[i]); };
  return {result(0), result(1), result(2), result(3), result(4)};
}

std::tuple<Tensor, Tensor> cca(const char* op, bool residual, const Tensor& cov_ff,
                               const Tensor& cov_bf, const Tensor& cov_bb) {
  const DeviceGuard guard(device_of(cov_bf));
  if (use_kernels(op, cov_bf)) {
    CudaSteps steps(cov_bf);
    return solve::cca_matrix(steps, op, residual, cov_ff, cov_bf, cov_bb);
  }
  std::array<StableIValue, 3> stack{to_ivalue(cov_ff), to_ivalue(cov_bf), to_ivalue(cov_bb)};
  call_aten(residual ? "nbl::residual_cca_matrix_plain" : "nbl::cca_matrix_plain", "",
            stack.data());
  Tensor matrix = tensor_from(stack[0]), used = tensor_from(stack[1]);
  return {matrix, used};
}

std::tuple<Tensor, Tensor> cca_matrix(const Tensor& cov_ff, const Tensor& cov_bf,
                                      const Tensor& cov_bb) {
  return cca("cca_matrix", /*residual=*/false, cov_ff, cov_bf, cov_bb);
}

std::tuple<Tensor, Tensor> residual_cca_matrix(const Tensor& cov_ff, const Tensor& cov_tf,
                                               const Tensor& cov_tt) {
  return cca("residual_cca_matrix", /*residual=*/true, cov_ff, cov_tf, cov_tt);
}

}  // namespace
}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CUDA, m) {
  m.impl("lmmse_solve", TORCH_BOX(&nbl::lmmse_solve));
  m.impl("cca_matrix", TORCH_BOX(&nbl::cca_matrix));
  m.impl("residual_cca_matrix", TORCH_BOX(&nbl::residual_cca_matrix));
}
