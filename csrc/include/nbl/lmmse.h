// The steps of the LMMSE solves around their Cholesky factors and triangular solves, as arguments
// that the kernels of every device take (cuda/lmmse.cuh; csrc/cpu/lmmse.cpp). All float64, matrices
// row-major, batched over layers: layer l of an n × m matrix starts at l n m.
#pragma once

#include "nbl/dtypes.h"

namespace nbl {

// C = base + other + cross + crossᵀ, n × n, the last two both or neither. Only the upper triangles
// of base and other are read. With features f and targets t, (base, cross, other) =
// (C_ff, C_tf, C_tt) is the covariance of f + t, which is never stored.
struct SymmetricSum {
  const double* base;
  const double* cross;
  const double* other;
  int64_t n;
};

// Of each layer: lambda = ridge · mean(diag C), with 1 for a mean of 0 (no variance at all: any
// λ > 0 gives W = 0); scale = (diag C + λ)^(-1/2), not a positive finite number where C + λI is not
// definite.
struct EquilibrateParams {
  SymmetricSum c;
  double ridge;
  double* lambda;  // (layers,)
  double* scale;   // (layers, n)
};

// out = D (C + λI) D, D = diag(scale): the upper triangle, with a diagonal of 1.
struct AssembleParams {
  SymmetricSum c;
  const double* scale;
  double* out;
};

// used = ridge where every scale is positive and finite, info is 0 and every pivot (squared
// diagonal of the factor) is above smallest_pivot; else `failed`.
struct CheckPivotsParams {
  const double* scale;
  const double* factor;  // (layers, n, n), its diagonal is read
  const int32_t* info;   // (layers,)
  double* used;          // (layers,)
  int64_t n;
  double smallest_pivot, ridge, failed;
};

// out[i][j] = (a[i][j] + b[i][j]) · row_scale[i] · col_scale[j]; b and row_scale may be null; out
// may be a.
struct ScaleParams {
  const double* a;
  const double* b;
  const double* row_scale;  // (layers, rows)
  const double* col_scale;  // (layers, cols)
  double* out;
  int64_t rows, cols;
};

// out[layer] -= factor[layer] · Σ a², factor null: 1. `partial` is scratch.
struct SubtractSquaresParams {
  const double* a;       // (layers, n)
  const double* factor;  // (layers,)
  double* out;           // (layers,)
  double* partial;       // (layers, squares_blocks(n)); CUDA only
  int64_t n;
};

}  // namespace nbl
