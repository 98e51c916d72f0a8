"""Texts whose targets depend on their past, and the exact moments of features with a memory."""

from __future__ import annotations

import torch

import nbl_kernels as nk
from cases.covariance import relative_error

# Relative errors of each block of the covariances by itself: float32 products, or what rounding
# the averages to the inputs' dtype leaves (a single average is off by 2^-9, or 2^-12).
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}


# With means, float32: products of channels that are not shifted are right to 1e-7 of the mean
# square, up to 65 times the variance.
WITH_MEANS = TOLERANCE | {torch.float32: 3e-4}


def texts(
    batch: int, length: int, dim: int, dtype=torch.float32, *, mean=0.0, seed=0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that are correlated in channels and time, and targets that depend on their past."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=g) * dim**-0.5
    f = torch.randn(batch, length, dim, generator=g) @ mix
    f = f + 0.5 * f.roll(1, 1) + 0.3 * f.roll(7, 1)
    t = f @ mix + 0.5 * f.roll(1, 1) + 0.2 * torch.randn(f.shape, generator=g)
    # Means of many standard deviations, and a few times a channel's scale.
    scale = torch.logspace(-1, 1, dim)
    return ((f + mean) * scale).to(dtype), t.to(dtype)


def exact_moments(f, t, lags, decays, mask=None, starts=None, block=None) -> nk.Moments:
    there = torch.ones(f.shape[:2], dtype=torch.bool) if mask is None else mask
    phi = nk.memory_features(f.double(), lags, decays, mask=mask, starts=starts)[there]
    parts = {"f": phi, "t": t[there].double()}
    if block is not None:
        parts["b"] = block[there].double()
    n = len(phi)
    means = {name: value.mean(0) for name, value in parts.items()}
    centered = {name: value - means[name] for name, value in parts.items()}
    cov = {
        f"cov_{x}{y}": centered[x].T @ centered[y] / (n - 1)
        for x, y in ["ff", "tf", "tt", *(["bf", "bb"] if block is not None else [])]
    }
    return nk.Moments(n, means["f"], means["t"], mean_block=means.get("b"), **cov)


def block_errors(actual: nk.Moments, exact: nk.Moments, dim: int) -> dict[str, float]:
    """The largest relative Frobenius error of a (·, dim) block, of each matrix.

    Relative to a tenth of what the standard deviations allow where that is more: blocks of things
    that have next to nothing to do with each other are small by cancellation.
    """
    errors = {}
    for name in ("cov_ff", "cov_tf", "cov_tt", "cov_bf", "cov_bb"):
        a, e = getattr(actual, name), getattr(exact, name)
        if e is None:
            assert a is None
            continue
        own = {"f": exact.cov_ff, "t": exact.cov_tt, "b": exact.cov_bb}
        rows, cols = (own[x].diagonal().sqrt() for x in name[-2:])
        worst = 0.0
        for i in range(0, a.shape[0], dim):
            for j in range(0, a.shape[1], dim):
                at = slice(i, i + dim), slice(j, j + dim)
                size = max(e[at].norm(), 0.1 * rows[at[0]].norm() * cols[at[1]].norm() / dim**0.5)
                worst = max(worst, float((a[at] - e[at]).norm() / size))
        errors[name] = worst
    return errors


def assert_right(
    actual: nk.Moments, exact: nk.Moments, dim: int, dtype=torch.float32, means=False
) -> None:
    actual = actual.to("cpu")
    assert actual.count == exact.count
    errors = block_errors(actual, exact, dim)
    assert max(errors.values()) <= (WITH_MEANS if means else TOLERANCE)[dtype], errors
    assert max(errors.get(name, 0.0) for name in ("cov_tt", "cov_bb")) <= 2e-6, errors
    scale = exact.cov_ff.diagonal().sqrt() + exact.mean_features.abs()
    assert ((actual.mean_features - exact.mean_features).abs() / scale).max() <= 1e-6
    for name in ("mean_targets", "mean_block"):
        if getattr(exact, name) is not None:
            assert relative_error(getattr(actual, name), getattr(exact, name)) <= 1e-6
    n = exact.count

    def raw(m: nk.Moments) -> torch.Tensor:
        return m.cov_ff * (n - 1) + n * torch.outer(m.mean_features, m.mean_features)

    bound = 1e-6 if dtype == torch.float32 else TOLERANCE[dtype]
    assert relative_error(raw(actual), raw(exact)) <= bound
    assert relative_error(actual.cov_ff, actual.cov_ff.T) <= 1e-13
