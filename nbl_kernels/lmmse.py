"""Linear minimum mean square error maps and canonical correlations, by Cholesky factors alone.

With ``C_ff + λI = L Lᵀ`` and ``G = C_tf L⁻ᵀ``::

    W = G L⁻¹                        b = E[t] - W E[f]
    E‖t - W f - b‖² = tr C_tt - ‖G‖² - λ ‖W‖²
    rank r:  W_r = U_r U_rᵀ W, U_r the leading left singular vectors of G

and with ``C_bb = K Kᵀ`` the canonical correlations ρ of block and features are the singular
values of ``K⁻¹ C_bf L⁻ᵀ``, so ``Σ ρ²`` is its squared Frobenius norm: no eigenvalues, no SVD.

Everything is float64. Matrices are scaled to unit diagonal before they are factored. The steps, by
``torch.linalg`` on every device, are in ``solves.py``.
Source: NBL (arXiv 2505.21077), Proposition 3.1 and Theorem 3.2.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nbl_kernels.arrays import Function, borrowed
from nbl_kernels.covariance import Moments

# What one call may take on the CPU (on CUDA: half of what is free): more layers than fit are solved
# group by group.
_GROUP_BYTES = 1 << 30


@dataclass(frozen=True)
class Lmmse:
    """What :func:`lmmse_solve` returns, float64; (…) is () or (L,), as the moments were given."""

    weight: Tensor  # (…, d_t, d_f)
    bias: Tensor | None  # (…, d_t), None for bias=False
    nmse: Tensor  # (…): E‖t - W f - b‖² / E‖t - E[t]‖² on the moments
    ridge: Tensor  # (…): what was used, relative to mean(diag cov_ff)
    factors: tuple[Tensor, Tensor] | None = None  # (U (…, d_t, r), V (…, r, d_f)), weight = U V


def _takes_arrays(solve: Function) -> Function:
    """Lets moments hold NumPy or CuPy arrays, all of one kind; then the result does, too."""

    @functools.wraps(solve)
    def wrapper(moments: Moments | Sequence[Moments], **options: Any) -> Any:
        single = isinstance(moments, Moments)
        batch = [moments] if single else list(moments)
        if all(isinstance(m.cov_ff, Tensor) for m in batch if isinstance(m, Moments)):
            return solve(moments if single else batch, **options)
        places = {
            f"moments[{i}].{field.name}": (i, field.name)
            for i, m in enumerate(batch)
            if isinstance(m, Moments)
            for field in fields(m)
            if hasattr(getattr(m, field.name), "__dlpack__")
        }
        arrays = {name: getattr(batch[i], field) for name, (i, field) in places.items()}
        with borrowed("", arrays) as (tensors, give_back):
            for name, (i, field) in places.items():
                batch[i] = replace(batch[i], **{field: tensors[name]})
            result = solve(batch[0] if single else batch, **options)
            return _mapped(give_back, result)

    return wrapper  # type: ignore[return-value]


def _mapped(function: Callable[[Tensor], Any], result: Any) -> Any:
    if isinstance(result, Tensor):
        return function(result)
    if isinstance(result, tuple):
        return tuple(function(t) for t in result)
    if isinstance(result, Lmmse):
        return Lmmse(*(_mapped(function, getattr(result, f.name)) for f in fields(result)))
    return result


@_takes_arrays
def lmmse_solve(
    moments: Moments | Sequence[Moments],
    *,
    ridge: float = 1e-4,
    bias: bool = True,
    rank: int | None = None,
) -> Lmmse:
    """``W = C_tf (C_ff + λI)⁻¹``, ``b = E[t] - W E[f]``, λ = ridge · mean(diag C_ff).

    Args:
        moments: of one layer, or a sequence of the same dimensions (batched over layers). Of
            tensors, or of arrays (``nbl_kernels/arrays.py``): then the result is of arrays, too.
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
        ff, tf, energy = (_stack(matrices) for matrices in zip(*second))
        return torch.ops.nbl.lmmse_solve(ff, tf, energy, float(ridge), rank or 0)

    numbers = 2 * d_f * d_f + 4 * d_t * d_f + (3 * d_t * d_t if rank else 0)
    weight, u, v, error, used = _in_groups(batch, numbers, solve)
    _check_ridge(used, float(ridge), "cov_ff")
    # Uncentered moments are divided by count, not count - ddof: so must the variance be.
    scale = [1.0 if bias else (m.count - m.ddof) / m.count for m in batch]
    variance = _stack([m.cov_tt.diagonal().sum() * s for m, s in zip(batch, scale)])
    # Constant targets: 0 when predicted exactly, infinity when (without a bias) they are not.
    nmse = torch.where(error > 0, error / variance, 0.0)
    b = None
    if bias:
        means_f = _stack([m.mean_features for m in batch])
        means_t = _stack([m.mean_targets for m in batch])
        b = means_t - (weight @ means_f[..., None])[..., 0]

    def result(t: Tensor) -> Tensor:
        return t if batched else t[0]

    return Lmmse(
        weight=result(weight),
        bias=None if b is None else result(b),
        nmse=result(nmse),
        ridge=result(used),
        factors=None if rank is None else (result(u), result(v)),
    )


@_takes_arrays
def cca_bound(moments: Moments | Sequence[Moments]) -> Tensor:
    """``Σᵢ (1 - ρᵢ²)``, ρ the canonical correlations of the features and the block output.

    The bound of NBL's Theorem 3.2, over the d_b dimensions of the block output (ρ = 0 beyond the
    rank). The block is ``block`` where it was accumulated, else features + targets, a residual
    block on pre-norm features. Float64, shape () or (L,). Singular matrices get a small ridge
    (relative 1e-12 upwards, with a warning). Errors as :func:`lmmse_solve`.
    """

    def bounds(matrices: Tensor) -> Tensor:
        squares = torch.stack([torch.linalg.vector_norm(m).square() for m in matrices])
        return (matrices.shape[1] - squares).clamp_min(0)

    return _of_cca_matrices(moments, bounds)


@_takes_arrays
def canonical_correlations(moments: Moments | Sequence[Moments]) -> Tensor:
    """The canonical correlations of :func:`cca_bound`, descending, (…, min(d_b, d_f)), float64.

    A diagnostic: needs the singular values that the bound does not.
    """
    return _of_cca_matrices(moments, lambda matrices: torch.linalg.svdvals(matrices).clamp(0, 1))


def _of_cca_matrices(
    moments: Moments | Sequence[Moments], function: Callable[[Tensor], Tensor]
) -> Tensor:
    """``function`` of the matrices K⁻¹ C_bf L⁻ᵀ, stacked, of which only its result is kept."""
    batch, batched = _as_batch(moments)
    _warn_few_tokens(batch)
    for m in batch:
        if m.cov_bf is None and m.cov_ff.shape != m.cov_tt.shape:
            raise ValueError(
                "moments without a block need features and targets of equal dimension (the block "
                f"output is their sum), got {m.cov_ff.shape[0]} and {m.cov_tt.shape[0]}"
            )
    has_block = batch[0].cov_bf is not None
    for i, m in enumerate(batch):
        if (m.cov_bf is not None) != has_block:
            raise ValueError(f"moments[{i}] must have a block if and only if the first has")
        if has_block and m.cov_bf.shape != batch[0].cov_bf.shape:
            raise ValueError(
                f"moments[{i}] must have the dimensions of the first, "
                f"{tuple(batch[0].cov_bf.shape)}, got {tuple(m.cov_bf.shape)}"
            )
    op = torch.ops.nbl.cca_matrix if has_block else torch.ops.nbl.residual_cca_matrix
    names = ("cov_ff", "cov_bf", "cov_bb") if has_block else ("cov_ff", "cov_tf", "cov_tt")

    def solve(group: list[Moments]) -> tuple[Tensor, ...]:
        matrices, ridge = op(*(_stack([getattr(m, name) for m in group]) for name in names))
        return function(matrices), ridge

    numbers = 2 * sum(getattr(batch[0], name).numel() for name in names)
    result, ridge = _in_groups(batch, numbers, solve)
    _check_ridge(ridge, 0.0, "cov_ff or cov_bb", stacklevel=5)
    return result if batched else result[0]


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


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """On the device of the first; a single one is not copied."""
    if len(tensors) == 1:
        return tensors[0][None]
    return torch.stack([t.to(tensors[0].device) for t in tensors])


def _in_groups(
    batch: list[Moments], numbers: int, solve: Callable[[list[Moments]], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """The results of ``solve``, which takes ``numbers`` float64 per layer, for the whole batch."""
    step = max(1, _group_bytes(batch[0].cov_ff.device) // (8 * max(1, numbers)))
    groups = [solve(batch[i : i + step]) for i in range(0, len(batch), step)]
    return groups[0] if len(groups) == 1 else tuple(torch.cat(parts) for parts in zip(*groups))


def _group_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _GROUP_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + cached) // 2


def _check_ridge(used: Tensor, asked: float, matrix: str, stacklevel: int = 4) -> None:
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
                stacklevel=stacklevel,
            )


def _warn_few_tokens(batch: list[Moments]) -> None:
    d_f = batch[0].cov_ff.shape[0]
    fewest = min(m.count for m in batch)
    if fewest <= d_f:
        warnings.warn(
            f"canonical correlations of {d_f} features need many more than {d_f} tokens, got "
            f"{fewest}: they are 1 by construction",
            stacklevel=5,
        )
