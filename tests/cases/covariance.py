"""Tokens that are hard to sum, and what their moments must be."""

from __future__ import annotations

import torch
from torch import Tensor

import nbl_kernels as nk


def hard_tokens(n: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Correlated channels; scales from 1e-2 to 1e3; a third of the means 100 std."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=g) @ torch.randn(dim, dim, generator=g) * dim**-0.5
    scale = torch.logspace(-2, 3 if dtype != torch.float16 else 2, dim)
    mean = torch.where(torch.arange(dim) % 3 == 0, 100.0, 0.5) * scale
    mean[1::2] *= -1
    return (x * scale + mean).to(dtype)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual - exact).norm() / exact.norm()).item()


def correlation(cov: Tensor, var_rows: Tensor, var_cols: Tensor) -> Tensor:
    return cov / torch.outer(var_rows.sqrt(), var_cols.sqrt())


def assert_moments_exact(m: nk.Moments, f: Tensor, t: Tensor, b: Tensor | None = None) -> None:
    """To 1e-6 (Frobenius) in the matrices, to 1e-5 in the correlations."""
    m = m.to("cpu")
    f, t = f.double(), t.double()
    parts = {"f": f, "t": t} | ({} if b is None else {"b": b.double()})
    n = f.shape[0]
    assert m.count == n
    means = {"f": m.mean_features, "t": m.mean_targets, "b": m.mean_block}
    for x, y in ["ff", "tf", "tt"] + ([] if b is None else ["bf", "bb"]):
        exact_x, exact_y = parts[x] - parts[x].mean(0), parts[y] - parts[y].mean(0)
        exact = exact_x.T @ exact_y / (n - 1)
        actual = getattr(m, f"cov_{x}{y}")
        error = relative_error(actual, exact)
        assert error <= 1e-6, f"cov_{x}{y}: {error:.2e}"
        raw = actual * (n - 1) + n * torch.outer(means[x], means[y])
        assert relative_error(raw, parts[x].T @ parts[y]) <= 1e-6
        var_x, var_y = exact_x.square().sum(0) / (n - 1), exact_y.square().sum(0) / (n - 1)
        error = correlation(actual, var_x, var_y) - correlation(exact, var_x, var_y)
        assert error.abs().max() <= 1e-5
        assert error.norm() / correlation(exact, var_x, var_y).norm() <= 1e-5
    for name, part in parts.items():
        assert relative_error(means[name], part.mean(0)) <= 1e-6


def accumulate(
    splits: int | list[int],
    f: Tensor,
    t: Tensor,
    b: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    device: str = "cpu",
) -> nk.CovarianceAccumulator:
    """What updates of ``splits`` tokens each leave."""
    dims = f.shape[1], t.shape[1]
    block_dim = 0 if b is None else b.shape[1]
    acc = nk.CovarianceAccumulator(*dims, block_dim=block_dim, device=device)
    sizes = splits if isinstance(splits, list) else [splits] * -(-len(f) // splits)
    start = 0
    for size in sizes:
        part = slice(start, start := start + size)
        f_t_b = (x if x is None else x[part].to(device) for x in (f, t, b))
        acc.update(*f_t_b, mask=None if mask is None else mask[part].to(device))
    return acc
