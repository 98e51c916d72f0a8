// lmmse_solve, cca_matrix and residual_cca_matrix on any device, in float64: the checks, the ridge
// and the order of the steps. Formulas: nbl_kernels/lmmse.py. Cholesky factors, triangular solves,
// products and eigenvectors are ATen's (LAPACK and BLAS; cuSOLVER and cuBLAS), in place; the steps
// between them are a device's SolveSteps.
//
// Layers are worked on in groups of neighbours (`Layers`): small matrices together, as one call of
// the batched routines; large ones singly, side by side where the device has streams.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include "common.h"
#include "nbl/lmmse.h"

namespace nbl {

struct Layers {
  int64_t first, count;
};

// What a device brings. All pointers are its own; `layers` of them start where the arguments say.
class SolveSteps {
 public:
  virtual ~SolveSteps() = default;
  virtual void equilibrate(const EquilibrateParams& p, int64_t layers) = 0;
  virtual void assemble(const AssembleParams& p, int64_t layers) = 0;
  virtual void check_pivots(const CheckPivotsParams& p, int64_t layers) = 0;
  virtual void scale(const ScaleParams& p, int64_t layers) = 0;
  virtual void subtract_squares(const SubtractSquaresParams& p, int64_t layers) = 0;
  // Doubles of scratch that subtract_squares wants for a layer of n elements.
  virtual int64_t squares_scratch(int64_t n) const = 0;
  // Matrices up to this dimension are factored and solved with by batched calls.
  virtual int64_t batched_dim() const = 0;
  // task(0) … task(count - 1), in any order or side by side; done when it returns (on a GPU: for
  // what is enqueued next).
  virtual void for_each(int64_t count, const std::function<void(int64_t)>& task) = 0;
  virtual std::vector<double> to_host(const Tensor& t) = 0;
  virtual void from_host(const std::vector<double>& values, const Tensor& t) = 0;
};

namespace solve {

constexpr double kFirstGrownRidge = 1e-12;
constexpr double kLargestRidge = 1.0;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }
inline const double* const_doubles(const Tensor& t) {
  return static_cast<const double*>(t.const_data_ptr());
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                    ScalarType type = ScalarType::Double) {
  return torch::stable::new_empty(like, sizes, type);
}

inline Tensor part(const Tensor& t, Layers layers) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, layers.first, layers.count);
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 1, 2); }

// Factors the upper triangles of `matrix` (row-major) in place: transposed, they are the lower
// ones that LAPACK reads and writes.
inline void cholesky_(const Tensor& matrix, const Tensor& info) {
  const Tensor lower = transposed(matrix);
  std::array<StableIValue, 5> stack{to_ivalue(lower), to_ivalue(false), to_ivalue(false),
                                    to_ivalue(lower), to_ivalue(info)};
  call_aten("aten::linalg_cholesky_ex", "L", stack.data());
  tensor_from(stack[0]);
  tensor_from(stack[1]);
}

// b = a⁻¹ b (left) or b a⁻¹.
inline void solve_triangular_(const Tensor& a, const Tensor& b, bool upper, bool left) {
  std::array<StableIValue, 6> stack{to_ivalue(a),    to_ivalue(b),     to_ivalue(upper),
                                    to_ivalue(left), to_ivalue(false), to_ivalue(b)};
  call_aten("aten::linalg_solve_triangular", "out", stack.data());
  tensor_from(stack[0]);
}

// Eigenvectors of symmetric matrices by ascending eigenvalue.
inline Tensor eigenvectors(const Tensor& matrix) {
  std::array<StableIValue, 2> stack{to_ivalue(matrix), to_ivalue(std::string("L"))};
  call_aten("aten::linalg_eigh", "", stack.data());
  tensor_from(stack[0]);
  return tensor_from(stack[1]);
}

// The layers for which `wanted` holds: runs of neighbours when they are `batched`, else singles.
template <class Wanted>
std::vector<Layers> layer_groups(int64_t layers, bool batched, const Wanted& wanted) {
  std::vector<Layers> groups;
  for (int64_t l = 0; l < layers; ++l) {
    if (!wanted(l)) continue;
    if (batched && !groups.empty() && groups.back().first + groups.back().count == l)
      ++groups.back().count;
    else
      groups.push_back({l, 1});
  }
  return groups;
}

inline SymmetricSum part(const SymmetricSum& c, int64_t first) {
  const int64_t offset = first * c.n * c.n;
  return {c.base + offset, c.cross ? c.cross + offset : nullptr,
          c.other ? c.other + offset : nullptr, c.n};
}

// Of every layer C + λI = D⁻¹ L Lᵀ D⁻¹ with D = diag(C + λI)^(-1/2): unit diagonal before
// factoring.
struct Factors {
  Tensor matrix;               // (layers, n, n): Lᵀ
  Tensor scale;                // (layers, n): D
  Tensor lambda;               // (layers,)
  Tensor used;                 // (layers,): the ridge, NaN where none made the matrix definite
  std::vector<double> ridges;  // the same on the host

  bool ok(int64_t layer) const { return !std::isnan(ridges[layer]); }
  Tensor lower(Layers layers) const { return transposed(part(matrix, layers)); }
  Tensor upper(Layers layers) const { return part(matrix, layers); }
  const double* scale_of(Layers layers) const {
    return const_doubles(scale) + layers.first * scale.size(1);
  }
};

// λ = ridge · mean(diag C). Grows the ridge tenfold while the factorization fails or a pivot is
// no more than rounding error: then a direction has no variance that could be told from noise.
inline Factors factorize(SolveSteps& steps, const SymmetricSum& c, const Tensor& like,
                         int64_t layers, double ridge) {
  const int64_t n = c.n;
  Factors f{empty(like, {layers, n, n}), empty(like, {layers, n}), empty(like, {layers}),
            empty(like, {layers}), std::vector<double>(layers, kNaN)};
  const Tensor info = empty(like, {layers}, ScalarType::Int);
  const double smallest_pivot = 8 * static_cast<double>(n) * std::numeric_limits<double>::epsilon();
  for (double r = ridge; r <= std::max(ridge, kLargestRidge);
       r = std::max(10 * r, kFirstGrownRidge)) {
    const std::vector<Layers> groups =
        layer_groups(layers, n <= steps.batched_dim(), [&](int64_t l) { return !f.ok(l); });
    if (groups.empty()) break;
    // Not for_each: PyTorch has one cuSOLVER handle per thread, and its work area would be shared
    // by factorizations that run side by side.
    for (const Layers group : groups) {
      const SymmetricSum sum = part(c, group.first);
      double* scale = doubles(f.scale) + group.first * n;
      double* matrix = doubles(f.matrix) + group.first * n * n;
      steps.equilibrate({sum, r, doubles(f.lambda) + group.first, scale}, group.count);
      steps.assemble({sum, scale, matrix}, group.count);
      cholesky_(part(f.matrix, group), part(info, group));
      const int32_t* infos = static_cast<const int32_t*>(info.const_data_ptr()) + group.first;
      steps.check_pivots(
          {scale, matrix, infos, doubles(f.used) + group.first, n, smallest_pivot, r, kNaN},
          group.count);
    }
    f.ridges = steps.to_host(f.used);
  }
  return f;
}

inline void check_batch(const char* op, const char* name, const Tensor& t, const Tensor& like,
                        std::initializer_list<int64_t> sizes) {
  check_shape(op, name, t, sizes);
  check(t.scalar_type() == ScalarType::Double, op, ": ", name, " must be float64, got ",
        dtype_name(t.scalar_type()));
  check(t.device() == like.device(), op, ": ", name, " must be on the device of the others");
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline FiveTensors lmmse_solve(SolveSteps& steps, const Tensor& cov_ff_in, const Tensor& cov_tf_in,
                               const Tensor& energy, double ridge, int64_t rank) {
  const char* op = "lmmse_solve";
  check(cov_ff_in.dim() == 3, op, ": cov_ff must have shape (L, d_f, d_f), got ", shape(cov_ff_in));
  check(cov_tf_in.dim() == 3, op, ": cov_tf must have shape (L, d_t, d_f), got ", shape(cov_tf_in));
  const int64_t layers = cov_ff_in.size(0), df = cov_ff_in.size(1), dt = cov_tf_in.size(1);
  check_batch(op, "cov_ff", cov_ff_in, cov_tf_in, {layers, df, df});
  check_batch(op, "cov_tf", cov_tf_in, cov_tf_in, {layers, dt, df});
  check_batch(op, "energy", energy, cov_tf_in, {layers});
  check(ridge >= 0 && std::isfinite(ridge), op, ": ridge must be a finite number >= 0, got ",
        ridge);
  check(rank >= 0 && rank <= std::min(dt, df), op, ": rank must be between 0 and ",
        std::min(dt, df), ", got ", rank);

  const Tensor cov_ff = torch::stable::contiguous(cov_ff_in);
  const Tensor cov_tf = torch::stable::contiguous(cov_tf_in);
  const Tensor weight = torch::stable::new_zeros(cov_tf, {layers, dt, df});
  const Tensor u = torch::stable::new_zeros(cov_tf, {layers, dt, rank});
  const Tensor v = torch::stable::new_zeros(cov_tf, {layers, rank, df});
  Tensor error = empty(cov_tf, {layers});
  torch::stable::copy_(error, energy);
  if (layers == 0 || dt == 0 || df == 0)
    return {weight, u, v, error, torch::stable::new_zeros(cov_tf, {layers})};

  const Factors f =
      factorize(steps, {const_doubles(cov_ff), nullptr, nullptr, df}, cov_tf, layers, ridge);
  const Tensor scratch = empty(cov_tf, {layers, steps.squares_scratch(dt * df)});
  const auto subtract_squares = [&](const Tensor& t, Layers group, const double* factor) {
    steps.subtract_squares(
        {const_doubles(t), factor, doubles(error) + group.first,
         doubles(scratch) + group.first * scratch.size(1), t.size(1) * t.size(2)},
        group.count);
  };
  const std::vector<Layers> groups = layer_groups(layers, std::max(dt, df) <= steps.batched_dim(),
                                                  [&](int64_t l) { return f.ok(l); });
  steps.for_each(static_cast<int64_t>(groups.size()), [&](int64_t i) {
    const Layers group = groups[i];
    const double* scale = f.scale_of(group);
    const double* lambda = const_doubles(f.lambda) + group.first;
    // One buffer: C_tf D, then G = C_tf D L⁻ᵀ, then W = G L⁻¹ D.
    Tensor w = part(weight, group);
    const double* tf = const_doubles(cov_tf) + group.first * dt * df;
    steps.scale({tf, nullptr, nullptr, scale, doubles(w), dt, df}, group.count);
    solve_triangular_(f.upper(group), w, /*upper=*/true, /*left=*/false);
    Tensor vectors;
    if (rank > 0) {
      // The leading eigenvectors of G Gᵀ are the leading left singular vectors of G.
      vectors = eigenvectors(torch::stable::matmul(w, transposed(w)));
      vectors = torch::stable::contiguous(torch::stable::narrow(vectors, 2, dt - rank, rank));
      subtract_squares(torch::stable::contiguous(torch::stable::matmul(transposed(vectors), w)),
                       group, nullptr);
    } else {
      subtract_squares(w, group, nullptr);
    }
    solve_triangular_(f.lower(group), w, /*upper=*/false, /*left=*/false);
    steps.scale({doubles(w), nullptr, nullptr, scale, doubles(w), dt, df}, group.count);
    if (rank > 0) {
      const Tensor reduced =
          torch::stable::contiguous(torch::stable::matmul(transposed(vectors), w));
      Tensor u_out = part(u, group), v_out = part(v, group);
      torch::stable::copy_(u_out, vectors);
      torch::stable::copy_(v_out, reduced);
      torch::stable::copy_(w, torch::stable::matmul(vectors, reduced));
      subtract_squares(reduced, group, lambda);  // ‖U V‖ = ‖V‖: U has orthonormal columns
    } else {
      subtract_squares(w, group, lambda);
    }
  });
  return {weight, u, v, error, f.used};
}

// K⁻¹ C_bf L⁻ᵀ with C_bb = K Kᵀ, C_ff = L Lᵀ; where `residual` the block is features + targets and
// cov_bf, cov_bb are those of the targets alone.
inline std::tuple<Tensor, Tensor> cca_matrix(SolveSteps& steps, const char* op, bool residual,
                                             const Tensor& cov_ff_in, const Tensor& cov_bf_in,
                                             const Tensor& cov_bb_in) {
  const char* bf_name = residual ? "cov_tf" : "cov_bf";
  const char* bb_name = residual ? "cov_tt" : "cov_bb";
  check(cov_bf_in.dim() == 3, op, ": ", bf_name, " must have shape ",
        residual ? "(L, d_f, d_f)" : "(L, d_b, d_f)", ", got ", shape(cov_bf_in));
  const int64_t layers = cov_bf_in.size(0), df = cov_bf_in.size(2);
  const int64_t db = residual ? df : cov_bf_in.size(1);
  check_batch(op, "cov_ff", cov_ff_in, cov_bf_in, {layers, df, df});
  check_batch(op, bf_name, cov_bf_in, cov_bf_in, {layers, db, df});
  check_batch(op, bb_name, cov_bb_in, cov_bf_in, {layers, db, db});
  const Tensor cov_ff = torch::stable::contiguous(cov_ff_in);
  const Tensor cov_bf = torch::stable::contiguous(cov_bf_in);
  const Tensor cov_bb = torch::stable::contiguous(cov_bb_in);
  const Tensor out = torch::stable::new_zeros(cov_bf, {layers, db, df});
  const Tensor used = torch::stable::new_zeros(cov_bf, {layers});
  if (layers == 0 || db == 0 || df == 0) return {out, used};

  const double* ff = const_doubles(cov_ff);
  const double* bf = const_doubles(cov_bf);
  const double* bb = const_doubles(cov_bb);
  const SymmetricSum block =
      residual ? SymmetricSum{ff, bf, bb, db} : SymmetricSum{bb, nullptr, nullptr, db};
  const Factors f = factorize(steps, {ff, nullptr, nullptr, df}, cov_bf, layers, 0);
  const Factors b = factorize(steps, block, cov_bf, layers, 0);
  const std::vector<Layers> groups = layer_groups(layers, std::max(db, df) <= steps.batched_dim(),
                                                  [&](int64_t l) { return f.ok(l) && b.ok(l); });
  steps.for_each(static_cast<int64_t>(groups.size()), [&](int64_t i) {
    const Layers group = groups[i];
    const Tensor m = part(out, group);
    const int64_t offset = group.first * db * df;
    steps.scale({bf + offset, residual ? ff + offset : nullptr, b.scale_of(group),
                 f.scale_of(group), doubles(m), db, df},
                group.count);
    solve_triangular_(b.lower(group), m, /*upper=*/false, /*left=*/true);
    solve_triangular_(f.upper(group), m, /*upper=*/true, /*left=*/false);
  });
  std::vector<double> ridges(layers, kNaN);
  for (int64_t l = 0; l < layers; ++l)
    if (f.ok(l) && b.ok(l)) ridges[l] = std::max(f.ridges[l], b.ridges[l]);
  steps.from_host(ridges, used);
  return {out, used};
}

}  // namespace solve
}  // namespace nbl
