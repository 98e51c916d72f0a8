"""CovarianceAccumulator.update beside torch's full Gram matrices and the float64 route."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import nbl_kernels as nk


def full_grams(f: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On a GPU with float32 results, which cost no more there and lose nothing to bfloat16."""
    mm = functools.partial(torch.mm, out_dtype=torch.float32) if f.is_cuda else torch.mm
    return mm(f.T, f), mm(y.T, f), mm(y.T, y)


def cupy_grams(features: Tensor, targets: Tensor):
    """The same by CuPy, on CUDA tensors as float16 (CuPy before 14 has no bfloat16)."""
    import cupy

    f, y = (cupy.from_dlpack(t.half()) for t in (features, targets))
    return lambda i: (f[i].T @ f[i], y[i].T @ f[i], y[i].T @ y[i])


def relative_error(grams: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest relative Frobenius error; of symmetric matrices the upper triangle counts."""
    (ff, tf, tt), (ff64, tf64, tt64) = grams, exact
    pairs = (ff.triu(), ff64.triu()), (tf, tf64), (tt.triu(), tt64.triu())
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.sizes(
    cpu=[{"d": (1024, 2048), "dtype": ("bfloat16", "float32"), "tokens": (4096,)}],
    cuda=[
        {"d": (4096,), "dtype": ("bfloat16",), "tokens": (8192, 16384)},
        {"d": (2048,), "dtype": ("bfloat16",), "tokens": (8192,)},
    ],
    dry=[{"d": (48,), "dtype": ("bfloat16",), "tokens": (256,)}],
)
def test_update(compare, d: int, dtype: str, tokens: int) -> None:
    f, y = torch.randn(2, tokens, d, device=compare.device).add(0.5).to(getattr(torch, dtype))
    copies = math.ceil(compare.block_bytes / (f.nbytes + y.nbytes))
    features, targets = f.expand(copies, *f.shape).clone(), y.expand(copies, *y.shape).clone()
    accumulator = nk.CovarianceAccumulator(d, d, device=compare.device)
    exact = full_grams_float64(f, y)

    def error() -> float:
        fresh = nk.CovarianceAccumulator(d, d, device=compare.device)
        fresh.update(f, y)
        state = fresh.state_dict()
        return relative_error(tuple(state[f"gram_{s}"] for s in ("ff", "tf", "tt")), exact)

    compare(
        "covariance",
        f"{tokens}x{d}",
        f.dtype,
        switch="covariance",
        ours=lambda i: accumulator.update(features[i], targets[i]),
        pytorch={"full Gram matrices": lambda i: full_grams(features[i], targets[i])},
        # in float64, as the paper's authors do
        ref=lambda i: nk.covariance_update_ref(features[i], targets[i]),
        others={"cupy": lambda: cupy_grams(features, targets)} if f.is_cuda else {},
        copies=copies,
        flops=2 * tokens * d * (2 * d + 1),  # symmetric matrices once
        error=error,
        pytorch_error=relative_error(full_grams(f, y), exact),
    )


def full_grams_float64(f: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    f, y = f.double(), y.double()
    return f.T @ f, y.T @ f, y.T @ y


@pytest.mark.sizes(
    cpu=[{"d": (1024,), "dtype": ("bfloat16",), "tokens": (4096,)}],
    cuda=[{"d": (4096,), "dtype": ("bfloat16",), "tokens": (8192,)}],
    dry=[{"d": (48,), "dtype": ("bfloat16",), "tokens": (256,)}],
)
def test_memory_update(compare, d: int, dtype: str, tokens: int) -> None:
    """A lag and two averages: 8 products of (d, d) blocks, beside 12.5 of the stacked features."""
    shape, device = (4, tokens // 4, d), compare.device
    f, y = torch.randn(2, *shape, device=device).add(0.5).to(getattr(torch, dtype))
    copies = math.ceil(compare.block_bytes / (f.nbytes + y.nbytes))
    features, targets = f.expand(copies, *shape).clone(), y.expand(copies, *shape).clone()

    def stack(values: Tensor) -> Tensor:
        return nk.memory_features(values).to(values.dtype)

    accumulator = nk.MemoryAccumulator(d, d, device=device)
    stacked = nk.CovarianceAccumulator(4 * d, d, device=device)
    exact = torch.cov(nk.memory_features(f.double()).flatten(0, 1).T)

    def error(fresh: nk.MemoryAccumulator | nk.CovarianceAccumulator, values: Tensor) -> float:
        fresh.update(values, y)
        return float((fresh.moments().cov_ff - exact).norm() / exact.norm())

    compare(
        "memory moments",
        f"{tokens}x{d}",
        f.dtype,
        switch="covariance",
        ours=lambda i: accumulator.update(features[i], targets[i]),
        pytorch={"stacked": lambda i: stacked.update(stack(features[i]), targets[i])},
        ref=lambda i: nk.covariance_update_ref(nk.memory_features(features[i]), targets[i]),
        copies=copies,
        flops=2 * tokens * d * d * 8,
        error=lambda: error(nk.MemoryAccumulator(d, d, device=device), f),
        pytorch_error=error(nk.CovarianceAccumulator(4 * d, d, device=device), stack(f)),
    )
