#include "cuda/matmul.h"

#include <cublasLt.h>

#include <map>
#include <memory>

#include "cuda/cuda_common.h"

namespace nbl {
namespace {

void check_blas(cublasStatus_t status, const char* what) {
  check(status == CUBLAS_STATUS_SUCCESS, what, ": ", cublasLtGetStatusName(status));
}

template <class Opaque, cublasStatus_t (*destroy)(Opaque*)>
struct Destroy {
  void operator()(Opaque* object) const { (void)destroy(object); }
};
template <class Opaque, cublasStatus_t (*destroy)(Opaque*)>
using Owned = std::unique_ptr<Opaque, Destroy<Opaque, destroy>>;
using Description = Owned<cublasLtMatmulDescOpaque_t, cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayoutOpaque_t, cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreferenceOpaque_t, cublasLtMatmulPreferenceDestroy>;

// What cuBLASLt wants to know of a problem, and what it answered.
struct Plan {
  Description description;
  Layout weight, x, residual, out;
  cublasLtMatmulAlgo_t algorithm;
  size_t workspace_bytes = 0;
  bool found = false;
};

template <class T>
void set(const Description& description, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check_blas(cublasLtMatmulDescSetAttribute(description.get(), attribute, &value, sizeof value),
             "cublasLtMatmulDescSetAttribute");
}

template <class T>
void set(const Preference& preference, cublasLtMatmulPreferenceAttributes_t attribute,
         const T& value) {
  check_blas(
      cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value),
      "cublasLtMatmulPreferenceSetAttribute");
}

cudaDataType data_type(DType dtype) { return dtype == DType::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F; }

// Row-major (rows, columns) is column-major (columns, rows): the only order there is here.
Layout layout(DType dtype, int64_t rows, int64_t columns, int64_t stride) {
  cublasLtMatrixLayout_t made = nullptr;
  check_blas(cublasLtMatrixLayoutCreate(&made, data_type(dtype), columns, rows, stride),
             "cublasLtMatrixLayoutCreate");
  return Layout(made);
}

uint32_t alignment(const void* pointer) {
  uint32_t bytes = 256;
  while (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) bytes /= 2;
  return bytes;
}

Plan make_plan(const Matmul& p, int compute_capability) {
  Plan plan;
  cublasLtMatmulDesc_t description = nullptr;
  check_blas(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F),
             "cublasLtMatmulDescCreate");
  plan.description.reset(description);
  // Column-major, out (n, m) = weight (k, n)ᵀ · x (k, m).
  set(plan.description, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  set(plan.description, CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  if (p.bias) {
    set(plan.description, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(plan.description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
  }
  plan.weight = layout(p.dtype, p.n, p.k, p.weight_stride);
  plan.x = layout(p.dtype, p.m, p.k, p.x_stride);
  plan.residual = layout(p.dtype, p.m, p.n, p.residual ? p.residual_stride : p.out_stride);
  plan.out = layout(p.dtype, p.m, p.n, p.out_stride);

  cublasLtMatmulPreference_t made = nullptr;
  check_blas(cublasLtMatmulPreferenceCreate(&made), "cublasLtMatmulPreferenceCreate");
  const Preference preference(made);
  // Hopper's kernels ask for more; what is allocated is what the algorithm wants, at most this.
  const size_t most_workspace = size_t{compute_capability >= 90 ? 32u : 8u} << 20;
  set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, most_workspace);
  // Where k is split, partial sums meet as float32, in a fixed order.
  set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(p.weight));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(p.x));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
      alignment(p.residual ? p.residual : p.out));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(p.out));

  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const auto handle = reinterpret_cast<cublasLtHandle_t>(blas_handle());
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle, plan.description.get(), plan.weight.get(), plan.x.get(), plan.residual.get(),
      plan.out.get(), preference.get(), 1, &result, &found);
  plan.found =
      status == CUBLAS_STATUS_SUCCESS && found > 0 && result.state == CUBLAS_STATUS_SUCCESS;
  if (plan.found) {
    plan.algorithm = result.algo;
    plan.workspace_bytes = result.workspaceSize;
  }
  return plan;
}

// Asking for an algorithm costs far more than a launch, so the answers are kept: per thread, since
// a plan also carries the bias of the call.
Plan& find_plan(const Matmul& p, int device) {
  constexpr size_t kMostPlans = 1024;  // prompts of all lengths come by
  using Key = std::array<int64_t, 14>;
  thread_local std::map<Key, Plan> plans;
  const Key key{device,
                static_cast<int64_t>(p.dtype),
                p.m,
                p.n,
                p.k,
                p.x_stride,
                p.weight_stride,
                p.residual ? p.residual_stride : -1,
                p.out_stride,
                p.bias ? alignment(p.bias) : 0,
                alignment(p.weight),
                alignment(p.x),
                p.residual ? alignment(p.residual) : 0,
                alignment(p.out)};
  auto found = plans.find(key);
  if (found == plans.end()) {
    if (plans.size() >= kMostPlans) plans.clear();
    found = plans.emplace(key, make_plan(p, compute_capability(device))).first;
  }
  return found->second;
}

}  // namespace

bool matmul(const Matmul& p, const Tensor& like) {
  Plan& plan = find_plan(p, device_of(like));
  if (!plan.found) return false;
  if (p.bias) set(plan.description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) {
    workspace = torch::stable::new_empty(like, {static_cast<int64_t>(plan.workspace_bytes)},
                                         ScalarType::Byte);
  }
  const float alpha = 1.0f, beta = p.residual ? 1.0f : 0.0f;
  check_blas(
      cublasLtMatmul(reinterpret_cast<cublasLtHandle_t>(blas_handle()), plan.description.get(),
                     &alpha, p.weight, plan.weight.get(), p.x, plan.x.get(), &beta,
                     p.residual ? p.residual : p.out, plan.residual.get(), p.out, plan.out.get(),
                     &plan.algorithm, workspace ? workspace->mutable_data_ptr() : nullptr,
                     plan.workspace_bytes, current_stream(like)),
      "cublasLtMatmul");
  return true;
}

}  // namespace nbl
