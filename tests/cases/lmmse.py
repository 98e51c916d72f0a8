"""Badly scaled tokens and their exact moments."""

from __future__ import annotations

import torch
from torch import Tensor

import nbl_kernels as nk


def tokens(n: int, d_f: int, d_t: int, seed: int = 0, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Badly scaled, correlated features with means; targets that are partly linear in them."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_f, d_f, generator=g) * d_f**-0.5
    f = torch.randn(n, d_f, generator=g) @ mix * torch.logspace(-2, 1, d_f) + 0.3
    t = (
        f @ torch.randn(d_f, d_t, generator=g)
        + noise * torch.randn(n, d_t, generator=g).sin()
        + 1.0
    )
    return f.float(), t.float()


def exact_moments(f: Tensor, t: Tensor, b: Tensor | None = None) -> nk.Moments:
    """float64 moments, so that only the solver is compared."""
    f, t = f.double(), t.double()

    def cov(x, y):
        return (x - x.mean(0)).T @ (y - y.mean(0)) / (len(x) - 1)

    block = {}
    if b is not None:
        b = b.double()
        block = {"mean_block": b.mean(0), "cov_bf": cov(b, f), "cov_bb": cov(b, b)}
    return nk.Moments(len(f), f.mean(0), t.mean(0), cov(f, f), cov(t, f), cov(t, t), **block)
