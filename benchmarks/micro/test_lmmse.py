"""lmmse_solve + cca_bound beside the eigendecompositions, SVD and inverse of the paper's code."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

import nbl_kernels as nk

RIDGE = 1e-4
_seconds_by_eigenvectors: dict[int, float] = {}


def moments(d: int, device: str) -> nk.Moments:
    """Of 8 d correlated tokens, y a noisy function of f."""
    like = {"dtype": torch.float64, "device": device}
    f = torch.randn(8 * d, d, **like) * torch.logspace(-1, 1, d, **like)
    f += torch.randn(8 * d, 1, **like)
    y = f @ torch.randn(d, d, **like) / d**0.5
    y += torch.randn_like(y)
    accumulator = nk.CovarianceAccumulator(d, d, device=device)
    accumulator.update(f.float(), y.float())
    return accumulator.moments()


def by_eigenvectors(cov_ff: Tensor, cov_tf: Tensor, cov_tt: Tensor) -> tuple[Tensor, float]:
    """W by an inverse, the bound by two eigendecompositions and an SVD, float64."""
    d = len(cov_ff)
    cov_bf = cov_tf + cov_ff  # the block output is features + targets
    cov_bb = cov_tt + cov_tf + cov_tf.T + cov_ff
    eye = torch.eye(d, dtype=cov_ff.dtype, device=cov_ff.device)
    ridged = cov_ff + RIDGE * cov_ff.diagonal().mean() * eye
    if cov_ff.is_cuda:  # singular values alone, which is in PyTorch's favour
        inverse, eigh, singular_values = torch.linalg.inv, torch.linalg.eigh, torch.linalg.svdvals
    else:  # as the authors' code
        ridged, cov_ff, cov_tf, cov_bf, cov_bb = (
            t.numpy() for t in (ridged, cov_ff, cov_tf, cov_bf, cov_bb)
        )
        inverse, eigh = np.linalg.inv, scipy.linalg.eigh

        def singular_values(matrix):
            return scipy.linalg.svd(matrix)[1]

    def inverse_root(c):
        values, vectors = eigh(c)
        return vectors / values**0.5 @ vectors.T

    weight = cov_tf @ inverse(ridged)
    rho = singular_values(inverse_root(cov_bb) @ cov_bf @ inverse_root(cov_ff))
    return torch.as_tensor(weight), float((1 - rho**2).sum())


@pytest.mark.sizes(
    cpu=[{"d": (512, 1024), "layers": (1,)}],
    cuda=[{"d": (1024, 2048), "layers": (1,)}, {"d": (4096,), "layers": (4,)}],
    dry=[{"d": (32,), "layers": (1, 2)}],
)
def test_solve_and_bound(compare, d: int, layers: int) -> None:
    # Eigenvectors take eight times as long for twice the dimension, and are computed twice.
    compare.skip_if_longer_than_left(2 * 8 * _seconds_by_eigenvectors.get(d // 2, 0.0))
    m = moments(d, compare.device)
    cov_bf = m.cov_tf + m.cov_ff
    cov_bb = m.cov_tt + m.cov_tf + m.cov_tf.T + m.cov_ff
    covs = m.cov_ff, m.cov_tf, m.cov_tt
    batch = m if layers == 1 else [m] * layers

    def ours(_: int) -> tuple[nk.Lmmse, Tensor]:
        return nk.lmmse_solve(batch, ridge=RIDGE), nk.cca_bound(batch)

    def ref(_: int) -> None:
        nk.lmmse_solve_ref(m.cov_ff, m.cov_tf, m.cov_tt, ridge=RIDGE)
        nk.cca_bound_ref(m.cov_ff, cov_bf, cov_bb)

    start = time.perf_counter()
    exact_weight, exact_bound = by_eigenvectors(*covs)
    _seconds_by_eigenvectors[d] = time.perf_counter() - start

    def error() -> float:
        solution, bound = ours(0)
        weight = solution.weight.reshape(-1, d, d)[-1]
        weight_error = (weight - exact_weight).norm() / exact_weight.norm()
        bound_error = abs(float(bound.reshape(-1)[-1]) - exact_bound) / exact_bound
        return max(float(weight_error), bound_error)

    compare(
        "solve + bound",
        f"{d}" if layers == 1 else f"{layers}x{d}",
        torch.float64,
        switch=None,
        ours=ours,
        pytorch={"eigh + SVD + inverse": lambda _: by_eigenvectors(*covs)},
        ref=ref,
        copies=1,
        flops=layers * (2 / 3 + 3) * d**3,  # 2 Cholesky factorizations, 3 triangular solves
        pytorch_share=1 / layers,
        error=error,
    )
