// lmmse_solve and the CCA matrices on the CPU: the steps of csrc/lmmse_solve.h (nbl/lmmse.h says
// what each computes).
#include "lmmse_solve.h"

namespace nbl {
namespace {

constexpr int64_t kGrainRows = 16;

class CpuSteps final : public SolveSteps {
 public:
  void equilibrate(const EquilibrateParams& p, int64_t layers) override {
    const int64_t n = p.c.n;
    for (int64_t l = 0; l < layers; ++l) {
      double mean = 0;
      for (int64_t i = 0; i < n; ++i) mean += diagonal(p.c, l, i) / static_cast<double>(n);
      p.lambda[l] = p.ridge * (mean == 0 ? 1.0 : mean);
      for (int64_t i = 0; i < n; ++i)
        p.scale[l * n + i] = 1 / std::sqrt(diagonal(p.c, l, i) + p.lambda[l]);
    }
  }

  void assemble(const AssembleParams& p, int64_t layers) override {
    const int64_t n = p.c.n;
    torch::stable::parallel_for(0, layers * n, kGrainRows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t l = row / n, i = row % n, first = l * n * n;
        const double* base = p.c.base + first + i * n;
        const double* scale = p.scale + l * n;
        double* out = p.out + first + i * n;
        out[i] = 1;
        if (!p.c.cross) {
          for (int64_t j = i + 1; j < n; ++j) out[j] = base[j] * scale[i] * scale[j];
          continue;
        }
        const double* cross = p.c.cross + first;
        const double* other = p.c.other + first + i * n;
        for (int64_t j = i + 1; j < n; ++j) {
          const double value = base[j] + (other[j] + cross[i * n + j] + cross[j * n + i]);
          out[j] = value * scale[i] * scale[j];
        }
      }
    });
  }

  void check_pivots(const CheckPivotsParams& p, int64_t layers) override {
    for (int64_t l = 0; l < layers; ++l) {
      bool ok = p.info[l] == 0;
      for (int64_t i = 0; i < p.n; ++i) {
        const double scale = p.scale[l * p.n + i];
        const double root = p.factor[l * p.n * p.n + i * (p.n + 1)];
        ok = ok && scale > 0 && std::isfinite(scale) && root * root > p.smallest_pivot;
      }
      p.used[l] = ok ? p.ridge : p.failed;
    }
  }

  void scale(const ScaleParams& p, int64_t layers) override {
    torch::stable::parallel_for(0, layers * p.rows, kGrainRows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const double* a = p.a + row * p.cols;
        const double* b = p.b ? p.b + row * p.cols : nullptr;
        const double* col_scale = p.col_scale + row / p.rows * p.cols;
        const double row_scale = p.row_scale ? p.row_scale[row] : 1;
        double* out = p.out + row * p.cols;
        for (int64_t j = 0; j < p.cols; ++j)
          out[j] = (b ? a[j] + b[j] : a[j]) * col_scale[j] * row_scale;
      }
    });
  }

  void subtract_squares(const SubtractSquaresParams& p, int64_t layers) override {
    constexpr int64_t kPiece = 4096;  // short sums of similar size
    for (int64_t l = 0; l < layers; ++l) {
      double sum = 0;
      for (int64_t begin = 0; begin < p.n; begin += kPiece) {
        double piece = 0;
        for (int64_t i = begin; i < std::min(p.n, begin + kPiece); ++i)
          piece += p.a[l * p.n + i] * p.a[l * p.n + i];
        sum += piece;
      }
      p.out[l] -= p.factor ? p.factor[l] * sum : sum;
    }
  }

  int64_t squares_scratch(int64_t) const override { return 0; }
  int64_t batched_dim() const override { return 8; }  // there a call costs more than its arithmetic

  void for_each(int64_t count, const std::function<void(int64_t)>& task) override {
    for (int64_t i = 0; i < count; ++i) task(i);  // each uses all threads
  }

  std::vector<double> to_host(const Tensor& t) override {
    const double* values = solve::const_doubles(t);
    return {values, values + t.numel()};
  }

  void from_host(const std::vector<double>& values, const Tensor& t) override {
    std::copy(values.begin(), values.end(), solve::doubles(t));
  }

 private:
  static double diagonal(const SymmetricSum& c, int64_t layer, int64_t i) {
    const int64_t at = layer * c.n * c.n + i * (c.n + 1);
    return c.cross ? c.base[at] + (c.other[at] + 2 * c.cross[at]) : c.base[at];
  }
};

solve::FiveTensors lmmse_solve(const Tensor& cov_ff, const Tensor& cov_tf, const Tensor& energy,
                               double ridge, int64_t rank) {
  CpuSteps steps;
  return solve::lmmse_solve(steps, cov_ff, cov_tf, energy, ridge, rank);
}

std::tuple<Tensor, Tensor> cca_matrix(const Tensor& cov_ff, const Tensor& cov_bf,
                                      const Tensor& cov_bb) {
  CpuSteps steps;
  return solve::cca_matrix(steps, "cca_matrix", /*residual=*/false, cov_ff, cov_bf, cov_bb);
}

std::tuple<Tensor, Tensor> residual_cca_matrix(const Tensor& cov_ff, const Tensor& cov_tf,
                                               const Tensor& cov_tt) {
  CpuSteps steps;
  return solve::cca_matrix(steps, "residual_cca_matrix", /*residual=*/true, cov_ff, cov_tf, cov_tt);
}

}  // namespace
}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CPU, m) {
  m.impl("lmmse_solve", TORCH_BOX(&nbl::lmmse_solve));
  m.impl("cca_matrix", TORCH_BOX(&nbl::cca_matrix));
  m.impl("residual_cca_matrix", TORCH_BOX(&nbl::residual_cca_matrix));
}
