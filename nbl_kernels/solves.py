"""The operators behind ``lmmse.py``, by ``torch.linalg``: on the CPU LAPACK and BLAS, on CUDA
cuSOLVER and cuBLAS. Formulas: ``lmmse.py``.

Everything is float64, batched over layers and in place: beside the arguments and the results there
is one matrix of Cholesky factors (and, of a reduced rank, what one ``eigh`` takes). C++ around the
same routines took as long (0.94 to 1.05 of it from 576 dimensions on) and no less memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_FIRST_GROWN_RIDGE = 1e-12
_LARGEST_RIDGE = 1.0
# Up to here a GPU takes the matrices of all layers in one call. (By calculation, on an H100:
# triangular solves, most of the work, are faster singly from a few hundred dimensions on.)
_LARGEST_BATCHED = 512


class _Factors(NamedTuple):
    """Of every layer C + λI = D⁻¹ L Lᵀ D⁻¹, D = diag(C + λI)^(-1/2): unit diagonal in between.

    Where no ridge makes C + λI definite, L is the identity and D is 0: so are all solutions.
    """

    upper: Tensor  # (layers, n, n): Lᵀ
    scale: Tensor  # (layers, n): D
    ridge_added: Tensor  # (layers,): λ
    ridge: Tensor  # (layers,): λ / mean(diag C); NaN where there is none

    def layers(self, part: slice) -> _Factors:
        return _Factors(*(t[part] for t in self))


def lmmse_solve(
    cov_ff: Tensor, cov_tf: Tensor, energy: Tensor, ridge: float, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(weight, u, v, error, ridge) of ``torch.ops.nbl.lmmse_solve``; see ``csrc/ops.cpp``."""
    op = "lmmse_solve"
    _check(cov_ff.dim() == 3, op, "cov_ff must have shape (L, d_f, d_f)", cov_ff)
    _check(cov_tf.dim() == 3, op, "cov_tf must have shape (L, d_t, d_f)", cov_tf)
    layers, d_t, d_f = cov_tf.shape
    _check_matrix(op, "cov_ff", cov_ff, (layers, d_f, d_f), cov_tf)
    _check_matrix(op, "cov_tf", cov_tf, (layers, d_t, d_f), cov_tf)
    _check_matrix(op, "energy", energy, (layers,), cov_tf)
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise RuntimeError(f"{op}: ridge must be a finite number >= 0, got {ridge}")
    if not 0 <= rank <= min(d_t, d_f):
        raise RuntimeError(f"{op}: rank must be between 0 and {min(d_t, d_f)}, got {rank}")
    u, v = cov_tf.new_zeros(layers, d_t, rank), cov_tf.new_zeros(layers, rank, d_f)
    error = energy.clone()
    if cov_tf.numel() == 0:
        return torch.zeros_like(cov_tf), u, v, error, torch.zeros_like(error)

    factors = _factorize(_copies_of(cov_ff), _diagonal(cov_ff), ridge)
    cov_tf = cov_tf.contiguous()
    # One buffer: C_tf D, then G = C_tf D L⁻ᵀ, then W = G L⁻¹ D.
    weight = cov_tf * factors.scale[:, None]
    for part in _groups(weight, max(d_t, d_f)):
        f, w = factors.layers(part), weight[part]
        torch.linalg.solve_triangular(f.upper, w, upper=True, left=False, out=w)
        if rank > 0:
            # The leading eigenvectors of G Gᵀ are the leading left singular vectors of G.
            vectors = u[part].copy_(torch.linalg.eigh(w @ w.mT).eigenvectors[..., -rank:])
            error[part] -= _squares(vectors.mT @ w)
        else:
            error[part] -= _squares(w)
        torch.linalg.solve_triangular(f.upper.mT, w, upper=False, left=False, out=w)
        w *= f.scale[:, None]
        if rank > 0:
            torch.matmul(vectors.mT, w, out=v[part])
            torch.matmul(vectors, v[part], out=w)
            error[part] -= f.ridge_added * _squares(v[part])  # ‖U V‖ = ‖V‖: UᵀU = I
        else:
            error[part] -= f.ridge_added * _squares(w)
    return weight, u, v, error, factors.ridge


def cca_matrix(cov_ff: Tensor, cov_bf: Tensor, cov_bb: Tensor) -> tuple[Tensor, Tensor]:
    """(K⁻¹ C_bf L⁻ᵀ, ridge) of ``torch.ops.nbl.cca_matrix``; see ``csrc/ops.cpp``."""
    op = "cca_matrix"
    _check(cov_bf.dim() == 3, op, "cov_bf must have shape (L, d_b, d_f)", cov_bf)
    layers, d_b, d_f = cov_bf.shape
    _check_matrix(op, "cov_ff", cov_ff, (layers, d_f, d_f), cov_bf)
    _check_matrix(op, "cov_bf", cov_bf, (layers, d_b, d_f), cov_bf)
    _check_matrix(op, "cov_bb", cov_bb, (layers, d_b, d_b), cov_bf)
    return _cca_matrix(cov_ff, _copies_of(cov_bf)(), _copies_of(cov_bb), _diagonal(cov_bb))


def residual_cca_matrix(cov_ff: Tensor, cov_tf: Tensor, cov_tt: Tensor) -> tuple[Tensor, Tensor]:
    """The same of block = features + targets, ``torch.ops.nbl.residual_cca_matrix``."""
    op = "residual_cca_matrix"
    _check(cov_tf.dim() == 3, op, "cov_tf must have shape (L, d_f, d_f)", cov_tf)
    layers, _, d_f = cov_tf.shape
    for name, t in (("cov_ff", cov_ff), ("cov_tf", cov_tf), ("cov_tt", cov_tt)):
        _check_matrix(op, name, t, (layers, d_f, d_f), cov_tf)

    def cov_bb(part: slice | Tensor) -> Tensor:
        return (cov_ff[part] + cov_tt[part]).add_(cov_tf[part]).add_(cov_tf[part].mT)

    ff, tf, tt = (_diagonal(t) for t in (cov_ff, cov_tf, cov_tt))
    return _cca_matrix(cov_ff, (cov_tf + cov_ff).contiguous(), cov_bb, ff + (tt + 2 * tf))


def _cca_matrix(
    cov_ff: Tensor,
    cov_bf: Tensor,
    cov_bb: Callable[..., Tensor],
    diagonal_bb: Tensor,
) -> tuple[Tensor, Tensor]:
    """``cov_bf`` is overwritten with the result."""
    if cov_bf.numel() == 0:
        return cov_bf, cov_bf.new_zeros(len(cov_bf))
    f = _factorize(_copies_of(cov_ff), _diagonal(cov_ff), 0.0)
    b = _factorize(cov_bb, diagonal_bb, 0.0)
    cov_bf.mul_(b.scale[:, :, None]).mul_(f.scale[:, None])
    for part in _groups(cov_bf, max(cov_bf.shape[1:])):
        w, lower_b, upper_f = cov_bf[part], b.upper[part].mT, f.upper[part]
        torch.linalg.solve_triangular(lower_b, w, upper=False, left=True, out=w)
        torch.linalg.solve_triangular(upper_f, w, upper=True, left=False, out=w)
    # The larger of both; NaN where either has none.
    return cov_bf, torch.maximum(f.ridge, b.ridge)


def _factorize(matrix: Callable[..., Tensor], diagonal: Tensor, ridge: float) -> _Factors:
    """Of C, whose layers ``matrix(part)`` copies (only the upper triangles count) and whose
    diagonal this is, (layers, n). λ = ridge · mean(diag C), with 1 for a mean of 0: no variance.

    Grows the ridge tenfold while the factorization fails or a pivot is no more than rounding error:
    then a direction has no variance that could be told from noise. The host waits once per ridge.
    """
    n = diagonal.shape[1]
    mean = diagonal.mean(dim=1)
    mean = torch.where(mean == 0, 1.0, mean)
    smallest_pivot = 8 * n * torch.finfo(torch.float64).eps

    def tried(part: slice | Tensor, ridge: float) -> tuple[_Factors, Tensor]:
        added = ridge * mean[part]
        scale = (diagonal[part] + added[:, None]).rsqrt()
        upper = matrix(part).mul_(scale[:, :, None]).mul_(scale[:, None])
        upper.diagonal(dim1=1, dim2=2).fill_(1.0)
        info = torch.zeros(len(added), dtype=torch.int32, device=added.device)
        for group in _groups(added, n):
            # Transposed: the lower triangle of what LAPACK takes for column-major.
            lower = upper[group].mT
            torch.linalg.cholesky_ex(lower, out=(lower, info[group]))
        pivots = upper.diagonal(dim1=1, dim2=2).square()
        definite = scale.isfinite() & (scale > 0) & (pivots > smallest_pivot)
        used = torch.full_like(added, ridge)
        return _Factors(upper, scale, added, used), (info != 0) | ~definite.all(dim=1)

    factors, failed = tried(slice(None), ridge)
    while failed.any() and ridge < _LARGEST_RIDGE:
        ridge = max(10 * ridge, _FIRST_GROWN_RIDGE)
        part = failed.nonzero()[:, 0]
        again, still = tried(part, ridge)
        for all_layers, some in zip(factors, again):
            all_layers[part] = some
        failed[part] = still
    if failed.any():
        factors.upper[failed] = torch.eye(n, dtype=mean.dtype, device=mean.device)
        factors.scale[failed] = factors.ridge_added[failed] = 0.0
        factors.ridge[failed] = math.nan
    return factors


def _groups(of: Tensor, n: int) -> Iterator[slice]:
    """Of the layers of ``of``: all together where their matrices, of dimension n, are small and
    their device takes them in one call, else one by one.

    On the CPU there is no such call, only sums in another order.
    """
    layers = len(of)
    step = max(1, layers) if of.is_cuda and n <= _LARGEST_BATCHED else 1
    return (slice(first, first + step) for first in range(0, layers, step))


def _copies_of(t: Tensor) -> Callable[..., Tensor]:
    return lambda part=slice(None): t[part].clone(memory_format=torch.contiguous_format)


def _diagonal(t: Tensor) -> Tensor:
    return t.diagonal(dim1=1, dim2=2)


def _squares(t: Tensor) -> Tensor:
    """Σ t² of every layer."""
    return torch.linalg.vector_norm(t, dim=(1, 2)).square()


def _check(holds: bool, op: str, expected: str, t: Tensor) -> None:
    if not holds:
        raise RuntimeError(f"{op}: {expected}, got {tuple(t.shape)}")


def _check_matrix(op: str, name: str, t: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    _check(t.shape == shape, op, f"{name} must have shape {shape}", t)
    if t.dtype != torch.float64:
        raise RuntimeError(f"{op}: {name} must be float64, got {t.dtype}")
    if t.device != like.device:
        raise RuntimeError(f"{op}: {name} must be on the device of the others")
