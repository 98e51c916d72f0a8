// lmmse_solve and cca_matrix on the CPU, in float64: Cholesky factors and triangular solves by ATen
// (LAPACK, BLAS); equilibration, ridge and reductions here. Formulas: nbl_kernels/lmmse.py.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common.h"

namespace nbl {
namespace {

constexpr double kFirstGrownRidge = 1e-12;
constexpr double kLargestRidge = 1.0;

Tensor cholesky(const Tensor& a, bool& ok) {
  std::array<StableIValue, 3> stack{to_ivalue(a), to_ivalue(false), to_ivalue(false)};
  call_aten("aten::linalg_cholesky_ex", "", stack.data());
  const Tensor factor = tensor_from(stack[0]), info = tensor_from(stack[1]);
  ok = *static_cast<const int32_t*>(info.const_data_ptr()) == 0;
  return factor;
}

Tensor solve_triangular(const Tensor& a, const Tensor& b, bool upper, bool left) {
  std::array<StableIValue, 5> stack{to_ivalue(a), to_ivalue(b), to_ivalue(upper), to_ivalue(left),
                                    to_ivalue(false)};
  call_aten("aten::linalg_solve_triangular", "", stack.data());
  return tensor_from(stack[0]);
}

Tensor transposed(const Tensor& a) { return torch::stable::transpose(a, 0, 1); }

double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }
const double* const_doubles(const Tensor& t) {
  return static_cast<const double*>(t.const_data_ptr());
}

double sum_of_squares(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);  // ATen's solvers return column-major
  const double* p = const_doubles(dense);
  double sum = 0;
  for (int64_t i = 0; i < dense.size(0); ++i) {  // row by row: short sums of similar size
    double row = 0;
    for (int64_t j = 0; j < dense.size(1); ++j)
      row += p[i * dense.size(1) + j] * p[i * dense.size(1) + j];
    sum += row;
  }
  return sum;
}

// t[i][j] *= scale[j], as a contiguous copy
Tensor scaled_columns(const Tensor& t, const std::vector<double>& scale) {
  const Tensor out = torch::stable::new_empty(t, t.sizes());
  const Tensor dense = torch::stable::contiguous(t);
  const double* p = const_doubles(dense);
  double* q = doubles(out);
  const int64_t cols = t.size(1);
  torch::stable::parallel_for(0, t.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < cols; ++j) q[i * cols + j] = p[i * cols + j] * scale[j];
  });
  return out;
}

// C + λI = D⁻¹ L Lᵀ D⁻¹ with D = diag(C + λI)^(-1/2): unit diagonal before factoring.
struct Factor {
  Tensor lower;               // L
  std::vector<double> scale;  // D
  double lambda = 0, ridge = 0;
  bool ok = false;
};

// λ = ridge · mean(diag C). Grows the ridge tenfold while the factorization fails or a pivot is
// no more than rounding error: then a direction has no variance that could be told from noise.
Factor factorize(const Tensor& matrix, double ridge) {
  const Tensor dense = torch::stable::contiguous(matrix);
  const double* c = const_doubles(dense);
  const int64_t d = dense.size(0);
  Factor f;
  f.scale.assign(d, 1.0);
  double mean = 0;
  for (int64_t i = 0; i < d; ++i) mean += c[i * d + i] / static_cast<double>(d);
  if (!std::isfinite(mean) || mean < 0) return f;
  if (mean == 0) mean = 1;  // no variance at all: any λ > 0 gives W = 0
  const double smallest_pivot = 8 * static_cast<double>(d) * std::numeric_limits<double>::epsilon();
  const Tensor scaled = torch::stable::new_empty(dense, dense.sizes());
  for (f.ridge = ridge; f.ridge <= std::max(ridge, kLargestRidge);
       f.ridge = std::max(10 * f.ridge, kFirstGrownRidge)) {
    f.lambda = f.ridge * mean;
    bool positive = true;
    for (int64_t i = 0; i < d; ++i) {
      const double diagonal = c[i * d + i] + f.lambda;
      positive = positive && diagonal > 0;
      f.scale[i] = 1 / std::sqrt(diagonal);
    }
    if (!positive) continue;
    double* s = doubles(scaled);
    torch::stable::parallel_for(0, d, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < d; ++j) s[i * d + j] = c[i * d + j] * f.scale[i] * f.scale[j];
        s[i * d + i] = 1;
      }
    });
    bool ok = true;
    f.lower = cholesky(scaled, ok);
    if (ok) {
      const Tensor factor = torch::stable::contiguous(f.lower);
      const double* l = const_doubles(factor);
      for (int64_t i = 0; i < d; ++i) {
        const double pivot = l[i * d + i] * l[i * d + i];
        ok = ok && pivot > smallest_pivot;  // also false for NaN
      }
    }
    if (ok) {
      f.ok = true;
      return f;
    }
  }
  return f;
}

void check_batch(const char* op, const char* name, const Tensor& t, int64_t batch, int64_t rows,
                 int64_t cols) {
  check_shape(op, name, t, {batch, rows, cols});
  check(t.scalar_type() == ScalarType::Double, op, ": ", name, " must be float64, got ",
        dtype_name(t.scalar_type()));
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors lmmse_solve(const Tensor& cov_ff, const Tensor& cov_tf, const Tensor& energy,
                        double ridge, int64_t rank) {
  const char* op = "lmmse_solve";
  check(cov_ff.dim() == 3, op, ": cov_ff must have shape (L, d_f, d_f), got ", shape(cov_ff));
  check(cov_tf.dim() == 3, op, ": cov_tf must have shape (L, d_t, d_f), got ", shape(cov_tf));
  const int64_t batch = cov_ff.size(0), df = cov_ff.size(1), dt = cov_tf.size(1);
  check_batch(op, "cov_ff", cov_ff, batch, df, df);
  check_batch(op, "cov_tf", cov_tf, batch, dt, df);
  check_shape(op, "energy", energy, {batch});
  check(energy.scalar_type() == ScalarType::Double, op, ": energy must be float64");
  check(ridge >= 0 && std::isfinite(ridge), op, ": ridge must be a finite number >= 0, got ",
        ridge);
  check(rank >= 0 && rank <= std::min(dt, df), op, ": rank must be between 0 and ",
        std::min(dt, df), ", got ", rank);

  const Tensor weight = torch::stable::new_zeros(cov_tf, {batch, dt, df});
  const Tensor u = torch::stable::new_zeros(cov_tf, {batch, dt, rank});
  const Tensor v = torch::stable::new_zeros(cov_tf, {batch, rank, df});
  const Tensor error = torch::stable::new_zeros(cov_tf, {batch});
  const Tensor used = torch::stable::new_zeros(cov_tf, {batch});
  const Tensor energies = torch::stable::contiguous(energy);
  for (int64_t layer = 0; layer < batch; ++layer) {
    const Factor f = factorize(torch::stable::select(cov_ff, 0, layer), ridge);
    doubles(used)[layer] = f.ok ? f.ridge : std::numeric_limits<double>::quiet_NaN();
    if (!f.ok) continue;
    const Tensor cross = scaled_columns(torch::stable::select(cov_tf, 0, layer), f.scale);
    Tensor g = solve_triangular(transposed(f.lower), cross, /*upper=*/true, /*left=*/false);
    Tensor w =
        scaled_columns(solve_triangular(f.lower, g, /*upper=*/false, /*left=*/false), f.scale);
    Tensor out = torch::stable::select(weight, 0, layer);
    if (rank > 0) {
      // The leading eigenvectors of G Gᵀ are the leading left singular vectors of G.
      const Tensor gram = torch::stable::matmul(g, transposed(g));
      std::array<StableIValue, 2> stack{to_ivalue(gram), to_ivalue(std::string("L"))};
      call_aten("aten::linalg_eigh", "", stack.data());
      tensor_from(stack[0]);  // eigenvalues, ascending
      Tensor vectors = tensor_from(stack[1]);
      vectors = torch::stable::narrow(vectors, 1, dt - rank, rank);
      const Tensor reduced =
          torch::stable::contiguous(torch::stable::matmul(transposed(vectors), w));
      Tensor u_out = torch::stable::select(u, 0, layer), v_out = torch::stable::select(v, 0, layer);
      torch::stable::copy_(u_out, vectors);
      torch::stable::copy_(v_out, reduced);
      g = torch::stable::matmul(transposed(vectors), g);
      torch::stable::copy_(out, torch::stable::matmul(vectors, reduced));
      w = reduced;  // ‖U V‖ = ‖V‖: U has orthonormal columns
    } else {
      torch::stable::copy_(out, w);
    }
    doubles(error)[layer] =
        const_doubles(energies)[layer] - sum_of_squares(g) - f.lambda * sum_of_squares(w);
  }
  return {weight, u, v, error, used};
}

std::tuple<Tensor, Tensor> cca_matrix(const Tensor& cov_ff, const Tensor& cov_bf,
                                      const Tensor& cov_bb) {
  const char* op = "cca_matrix";
  check(cov_bf.dim() == 3, op, ": cov_bf must have shape (L, d_b, d_f), got ", shape(cov_bf));
  const int64_t batch = cov_bf.size(0), db = cov_bf.size(1), df = cov_bf.size(2);
  check_batch(op, "cov_ff", cov_ff, batch, df, df);
  check_batch(op, "cov_bf", cov_bf, batch, db, df);
  check_batch(op, "cov_bb", cov_bb, batch, db, db);
  const Tensor out = torch::stable::new_zeros(cov_bf, {batch, db, df});
  const Tensor used = torch::stable::new_zeros(cov_bf, {batch});
  for (int64_t layer = 0; layer < batch; ++layer) {
    const Factor f = factorize(torch::stable::select(cov_ff, 0, layer), 0);
    const Factor b = factorize(torch::stable::select(cov_bb, 0, layer), 0);
    const bool ok = f.ok && b.ok;
    doubles(used)[layer] =
        ok ? std::max(f.ridge, b.ridge) : std::numeric_limits<double>::quiet_NaN();
    if (!ok) continue;
    const Tensor columns = scaled_columns(torch::stable::select(cov_bf, 0, layer), f.scale);
    const Tensor rows = scaled_columns(transposed(columns), b.scale);  // (d_f, d_b)
    const Tensor half = solve_triangular(b.lower, transposed(rows), /*upper=*/false, /*left=*/true);
    Tensor target = torch::stable::select(out, 0, layer);
    torch::stable::copy_(
        target, solve_triangular(transposed(f.lower), half, /*upper=*/true, /*left=*/false));
  }
  return {out, used};
}

}  // namespace
}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CPU, m) {
  m.impl("lmmse_solve", TORCH_BOX(&nbl::lmmse_solve));
  m.impl("cca_matrix", TORCH_BOX(&nbl::cca_matrix));
}
