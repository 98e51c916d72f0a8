"""Linear minimum mean square error maps and canonical correlations, by Cholesky factors alone.

With ``C_ff + λI = L Lᵀ`` and ``G = C_tf L⁻ᵀ``::

    W = G L⁻¹                        b = E[t] - W E[f]
    E‖t - W f - b‖² = tr C_tt - ‖G‖² - λ ‖W‖²
    rank r:  W_r = U_r U_rᵀ W, U_r the leading left singular vectors of G

and with ``C_bb = K Kᵀ`` the canonical correlations ρ of block and features are the singular
values of ``K⁻¹ C_bf L⁻ᵀ``, so ``Σ ρ²`` is its squared Frobenius norm: no eigenvalues, no SVD.

Kernels: ``csrc/cpu/lmmse.cpp``. Everything is float64. Matrices are scaled to unit diagonal before
they are factored. The solves run on the CPU; moments of another device are copied there and back.
Source: NBL (arXiv 2505.21077), Proposition 3.1 and Theorem 3.2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nbl_kernels.covariance import Moments

# Stacked covariance matrices handed to one call: more layers than fit are solved group by group.
_GROUP_BYTES = 1 << 30


@dataclass(frozen=True)
class Lmmse:
    """What :func:`lmmse_solve` returns, float64; (…) is () or (L,), as the moments were given."""

    weight: Tensor  # (…, d_t, d_f)
    bias: Tensor | None  # (…, d_t), None for bias=False
    nmse: Tensor  # (…): E‖t - W f - b‖² / E‖t - E[t]‖² on the moments
    ridge: Tensor  # (…): what was used, relative to mean(diag cov_ff)
    factors: tuple[Tensor, Tensor] | None = None  # (U (…, d_t, r), V (…, r, d_f)), weight = U V


def lmmse_solve(
    moments: Moments | Sequence[Moments],
    *,
    ridge: float = 1e-4,
    bias: bool = True,
    rank: int | None = None,
) -> Lmmse:
    """``W = C_tf (C_ff + λI)⁻¹``, ``b = E[t] - W E[f]``, λ = ridge · mean(diag C_ff).

    Args:
        moments: of one layer, or a sequence of the same dimensions (batched over layers).
        ridge: >= 0. Grown tenfold (from 1e-12) while ``C_ff + λI`` cannot be factored or has a
            pivot of no more than rounding error; a warning and ``ridge`` of the result say so.
        bias: False uses the uncentered second moments in place of covariances, and b = 0.
        rank: the best map of this rank in the metric of the features; None: full.

    Returns:
        :class:`Lmmse`, float64 on the device of the moments. ``nmse`` is the error this very W
        (ridge and rank included) makes on the moments, relative to the variance of the targets.

    Raises:
        TypeError, ValueError: an argument does not fit; a moment is not finite, or no ridge up to 1
            makes its matrix definite: names ``moments[i]``.
    """
    batch, batched = _as_batch(moments)
    if not isinstance(ridge, int | float) or isinstance(ridge, bool):
        raise TypeError(f"ridge must be a number, got {type(ridge).__name__}")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be finite and >= 0, got {ridge}")
    d_t, d_f = batch[0].cov_tf.shape
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(f"rank must be an integer or None, got {type(rank).__name__}")
    if rank is not None and not 1 <= rank <= min(d_t, d_f):
        raise ValueError(f"rank must be between 1 and {min(d_t, d_f)}, got {rank}")

    def solve(group: list[Moments]) -> tuple[Tensor, ...]:
        second = [_second_moments(m, centered=bias) for m in group]
        ff, tf = _stack([s[0] for s in second]), _stack([s[1] for s in second])
        energy = torch.stack([s[2] for s in second])
        return torch.ops.nbl.lmmse_solve(ff, tf, energy, float(ridge), rank or 0)

    weight, u, v, error, used = _in_groups(batch, solve)
    _check_ridge(used, float(ridge), "cov_ff")
    # Uncentered moments are divided by count, not count - ddof: so must the variance be.
    scale = [1.0 if bias else (m.count - m.ddof) / m.count for m in batch]
    variance = torch.stack([m.cov_tt.diagonal().sum().cpu() * s for m, s in zip(batch, scale)])
    # Constant targets: 0 when predicted exactly, infinity when (without a bias) they are not.
    nmse = torch.where(error > 0, error / variance, 0.0)
    b = None
    if bias:
        means_f = torch.stack([m.mean_features.cpu() for m in batch])
        means_t = torch.stack([m.mean_targets.cpu() for m in batch])
        b = means_t - (weight @ means_f[..., None])[..., 0]

    device = batch[0].cov_ff.device

    def result(t: Tensor) -> Tensor:
        return (t if batched else t[0]).to(device)

    return Lmmse(
        weight=result(weight),
        bias=None if b is None else result(b),
        nmse=result(nmse),
        ridge=result(used),
        factors=None if rank is None else (result(u), result(v)),
    )


def cca_bound(moments: Moments | Sequence[Moments]) -> Tensor:
    """``Σᵢ (1 - ρᵢ²)``, ρ the canonical correlations of the features and the block output.

    The bound of NBL's Theorem 3.2, over the d_b dimensions of the block output (ρ = 0 beyond the
    rank). The block is ``block`` where it was accumulated, else features + targets, a residual
    block on pre-norm features. Float64, shape () or (L,). Singular matrices get a small ridge
    (relative 1e-12 upwards, with a warning). Errors as :func:`lmmse_solve`.
    """
    batch, batched = _as_batch(moments)
    _warn_few_tokens(batch)
    matrices = (_cca_matrices([m]) for m in batch)  # one at a time: only a number is kept of each
    bounds = torch.stack([t.shape[1] - t.square().sum() for t in matrices]).clamp_min(0)
    return (bounds if batched else bounds[0]).to(batch[0].cov_ff.device)


def canonical_correlations(moments: Moments | Sequence[Moments]) -> Tensor:
    """The canonical correlations of :func:`cca_bound`, descending, (…, min(d_b, d_f)), float64.

    A diagnostic: needs the singular values that the bound does not.
    """
    batch, batched = _as_batch(moments)
    _warn_few_tokens(batch)
    rho = torch.cat([torch.linalg.svdvals(_cca_matrices([m])) for m in batch]).clamp(0, 1)
    return (rho if batched else rho[0]).to(batch[0].cov_ff.device)


def _cca_matrices(batch: list[Moments]) -> Tensor:
    blocks = [_block_moments(m) for m in batch]
    matrix, ridge = torch.ops.nbl.cca_matrix(
        _stack([m.cov_ff for m in batch]),
        _stack([b[0] for b in blocks]),
        _stack([b[1] for b in blocks]),
    )
    _check_ridge(ridge, 0.0, "cov_ff or cov_bb")
    return matrix


def _block_moments(m: Moments) -> tuple[Tensor, Tensor]:
    """(cov_bf, cov_bb), of features + targets where no block was accumulated."""
    if m.cov_bf is not None:
        return m.cov_bf, m.cov_bb
    if m.cov_ff.shape != m.cov_tt.shape:
        raise ValueError(
            "moments without a block need features and targets of equal dimension (the block "
            f"output is their sum), got {m.cov_ff.shape[0]} and {m.cov_tt.shape[0]}"
        )
    return m.cov_tf + m.cov_ff, m.cov_tt + m.cov_tf + m.cov_tf.T + m.cov_ff


def _second_moments(m: Moments, centered: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(ff, tf, trace of tt): covariances, or E[x yᵀ] when not centered."""
    trace = m.cov_tt.diagonal().sum()
    if centered:
        return m.cov_ff, m.cov_tf, trace
    scale = (m.count - m.ddof) / m.count
    ff = m.cov_ff * scale + torch.outer(m.mean_features, m.mean_features)
    tf = m.cov_tf * scale + torch.outer(m.mean_targets, m.mean_features)
    return ff, tf, trace * scale + m.mean_targets.square().sum()


def _as_batch(moments: Moments | Sequence[Moments]) -> tuple[list[Moments], bool]:
    batched = not isinstance(moments, Moments)
    batch = list(moments) if batched else [moments]
    if not batch:
        raise ValueError("moments must hold at least one layer, got an empty sequence")
    for i, m in enumerate(batch):
        name = f"moments[{i}]" if batched else "moments"
        if not isinstance(m, Moments):
            raise TypeError(f"{name} must be Moments, got {type(m).__name__}")
        if m.cov_tf.shape != batch[0].cov_tf.shape:
            raise ValueError(
                f"{name} must have the dimensions of the first, {tuple(batch[0].cov_tf.shape)}, "
                f"got {tuple(m.cov_tf.shape)}"
            )
        for field in ("mean_features", "mean_targets", "cov_ff", "cov_tf", "cov_tt"):
            if not bool(torch.isfinite(getattr(m, field)).all()):
                raise ValueError(f"{name}.{field} must be finite, got NaN or infinity")
    return batch, batched


def _stack(matrices: list[Tensor]) -> Tensor:
    """(L, d, d) on the CPU; a single matrix is not copied."""
    return (matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)).cpu()


def _in_groups(
    batch: list[Moments], solve: Callable[[list[Moments]], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    size = 8 * (batch[0].cov_ff.numel() + 3 * batch[0].cov_tf.numel())
    step = max(1, _GROUP_BYTES // max(1, size))
    groups = [solve(batch[i : i + step]) for i in range(0, len(batch), step)]
    return groups[0] if len(groups) == 1 else tuple(torch.cat(parts) for parts in zip(*groups))


def _check_ridge(used: Tensor, asked: float, matrix: str) -> None:
    for i, ridge in enumerate(used.tolist()):
        if math.isnan(ridge):
            raise ValueError(
                f"moments[{i}].{matrix} must be positive semidefinite: no ridge up to 1 (relative "
                "to the mean of the diagonal) makes it definite"
            )
        if ridge > asked:
            warnings.warn(
                f"moments[{i}].{matrix} is singular to working precision (constant or dependent "
                f"channels, or fewer tokens than channels): ridge {ridge:.0e} was used, "
                f"not {asked:g}",
                stacklevel=3,
            )


def _warn_few_tokens(batch: list[Moments]) -> None:
    d_f = batch[0].cov_ff.shape[0]
    fewest = min(m.count for m in batch)
    if fewest <= d_f:
        warnings.warn(
            f"canonical correlations of {d_f} features need many more than {d_f} tokens, got "
            f"{fewest}: they are 1 by construction",
            stacklevel=3,
        )
