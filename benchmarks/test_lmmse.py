"""lmmse_solve + cca_bound beside the eigendecompositions, SVD and inverse of the paper's code."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

import nbl_kernels as nk

RIDGE = 1e-4


def moments(d: int) -> nk.Moments:
    """Of 8 d correlated tokens, y a noisy function of f."""
    f = torch.randn(8 * d, d, dtype=torch.float64) * torch.logspace(-1, 1, d, dtype=torch.float64)
    f += torch.randn(8 * d, 1, dtype=torch.float64)
    y = f @ torch.randn(d, d, dtype=torch.float64) / d**0.5
    y += torch.randn_like(y)
    accumulator = nk.CovarianceAccumulator(d, d)
    accumulator.update(f.float(), y.float())
    return accumulator.moments()


def by_eigenvectors(cov_ff: np.ndarray, cov_tf: np.ndarray, cov_tt: np.ndarray):
    """W by an inverse, the bound by two eigendecompositions and an SVD, float64."""
    d = len(cov_ff)
    weight = cov_tf @ np.linalg.inv(cov_ff + RIDGE * np.trace(cov_ff) / d * np.eye(d))
    cov_bf = cov_tf + cov_ff  # the block output is features + targets
    cov_bb = cov_tt + cov_tf + cov_tf.T + cov_ff

    def inverse_root(c: np.ndarray) -> np.ndarray:
        values, vectors = scipy.linalg.eigh(c)
        return vectors / np.sqrt(values) @ vectors.T

    root_bb, root_ff = inverse_root(cov_bb), inverse_root(cov_ff)
    rho = scipy.linalg.svd(root_bb @ cov_bf @ root_ff)[1]
    return weight, float(np.sum(1 - rho**2))


@pytest.mark.parametrize("d", [512, 1024], ids="d{}".format)
def test_solve_and_bound(compare, d: int) -> None:
    m = moments(d)
    cov_bf = m.cov_tf + m.cov_ff
    cov_bb = m.cov_tt + m.cov_tf + m.cov_tf.T + m.cov_ff
    covs = m.cov_ff.numpy(), m.cov_tf.numpy(), m.cov_tt.numpy()

    def ours(_: int) -> tuple[nk.Lmmse, torch.Tensor]:
        return nk.lmmse_solve(m, ridge=RIDGE), nk.cca_bound(m)

    def ref(_: int) -> None:
        nk.lmmse_solve_ref(m.cov_ff, m.cov_tf, m.cov_tt, ridge=RIDGE)
        nk.cca_bound_ref(m.cov_ff, cov_bf, cov_bb)

    solution, bound = ours(0)
    weight, bound_exact = by_eigenvectors(*covs)
    weight_error = np.linalg.norm(solution.weight.numpy() - weight) / np.linalg.norm(weight)
    bound_error = abs(float(bound) - bound_exact) / bound_exact
    compare(
        "solve + bound",
        f"{d}",
        torch.float64,
        ours=ours,
        pytorch={"eigh + SVD + inverse": lambda _: by_eigenvectors(*covs)},
        ref=ref,
        copies=1,
        flops=(2 / 3 + 3) * d**3,  # 2 Cholesky factorizations, 3 triangular solves
        error=f"W {weight_error:.0e}, bound {bound_error:.0e} (from eigh)",
    )
