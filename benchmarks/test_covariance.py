"""CovarianceAccumulator.update beside torch's full Gram matrices and the float64 route."""

from __future__ import annotations

import math

import machine
import pytest
import torch
from torch import Tensor

import nbl_kernels as nk

TOKENS = 4096


def full_grams(f: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return f.T @ f, y.T @ f, y.T @ y


def relative_error(grams: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest relative Frobenius error; of symmetric matrices the upper triangle counts."""
    (ff, tf, tt), (ff64, tf64, tt64) = grams, exact
    pairs = (ff.triu(), ff64.triu()), (tf, tf64), (tt.triu(), tt64.triu())
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("d", [1024, 2048], ids="d{}".format)
def test_update(compare, d: int, dtype: str) -> None:
    f, y = torch.randn(2, TOKENS, d).add(0.5).to(getattr(torch, dtype))
    copies = math.ceil(machine.BLOCK_BYTES / (f.nbytes + y.nbytes))
    features, targets = f.expand(copies, *f.shape).clone(), y.expand(copies, *y.shape).clone()
    accumulator = nk.CovarianceAccumulator(d, d)

    accumulator.update(f, y)
    state = accumulator.state_dict()
    exact = full_grams(f.double(), y.double())
    ours_error = relative_error(tuple(state[f"gram_{s}"] for s in ("ff", "tf", "tt")), exact)
    error = f"{ours_error:.1e} (PyTorch {relative_error(full_grams(f, y), exact):.1e})"
    compare(
        "covariance",
        f"{TOKENS}x{d}",
        f.dtype,
        ours=lambda i: accumulator.update(features[i], targets[i]),
        pytorch={"full Gram matrices": lambda i: full_grams(features[i], targets[i])},
        # in float64, as the paper's authors do
        ref=lambda i: nk.covariance_update_ref(features[i], targets[i]),
        copies=copies,
        flops=2 * TOKENS * d * (2 * d + 1),  # symmetric matrices once
        error=error,
    )
