"""Streaming first and second moments of features and targets.

CPU kernels: ``csrc/include/nbl/cpu/gram.h``, launched by ``csrc/cpu/covariance.cpp``. CUDA kernels:
``csrc/include/nbl/cuda/gram.cuh`` (any GPU from sm_80 on), ``gram_sm90.cuh`` (Hopper) and
``column_stats.cuh``, launched by ``csrc/cuda/covariance.cu`` where ``cuda_paths()`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from nbl_kernels.arrays import takes_arrays


@dataclass(frozen=True)
class Moments:
    """Means and covariances, float64: what :func:`lmmse_solve` and :func:`cca_bound` work on.

    Shapes for d_f features, d_t targets and, where a block was accumulated, d_b block outputs.
    """

    count: int
    mean_features: Tensor  # (d_f,)
    mean_targets: Tensor  # (d_t,)
    cov_ff: Tensor  # (d_f, d_f)
    cov_tf: Tensor  # (d_t, d_f)
    cov_tt: Tensor  # (d_t, d_t)
    mean_block: Tensor | None = None  # (d_b,)
    cov_bf: Tensor | None = None  # (d_b, d_f)
    cov_bb: Tensor | None = None  # (d_b, d_b)
    ddof: int = 1  # the covariances are sums divided by count - ddof

    def to(self, device: torch.device | str) -> Moments:
        """The same on another device."""
        tensors = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)


class CovarianceAccumulator:
    """Streams tokens into count, sums and Gram matrices of features, targets and a block.

    Holds ``Σ f``, ``Σ t``, ``Σ f fᵀ``, ``Σ t fᵀ``, ``Σ t tᵀ`` (and with a block ``Σ b``,
    ``Σ b fᵀ``, ``Σ b bᵀ``) in float64, uncentered, so that accumulators of different tokens
    simply add up.
    Products are float32 (bf16 multiplied exactly) over blocks of at most 192 tokens, added up in
    float64; channels with |mean| > 8 standard deviations are shifted before multiplying and the
    shift is undone in float64. Relative to float64 on the same inputs the Gram matrices are right
    to 1e-6 (Frobenius), the correlations to 1e-5, however the tokens are split over updates.
    Symmetric matrices are computed once (upper triangle; the rest of those sums stays as it was).

    The CUDA kernels hold to the same errors otherwise: tensor cores add up at most 128 tokens,
    because they cut off instead of rounding, and shift from 3 standard deviations on. An update
    waits once for the stream, to learn whether its input may be accumulated, so it cannot be
    captured in a CUDA graph (RuntimeError).

    Args:
        feature_dim, target_dim, block_dim: d_f, d_t, d_b; block_dim 0: no block.
        device: where the sums live; the inputs must be there too. Default: CPU.
    """

    def __init__(
        self,
        feature_dim: int,
        target_dim: int,
        *,
        block_dim: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        check_dims(feature_dim=feature_dim, target_dim=target_dim, block_dim=block_dim)
        self.feature_dim, self.target_dim, self.block_dim = feature_dim, target_dim, block_dim
        self.device = torch.device(device if device is not None else "cpu")

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)

        self._count = torch.zeros((), dtype=torch.int64, device=self.device)
        self._sums = zeros(feature_dim + target_dim + block_dim)
        self._gram_ff = zeros(feature_dim, feature_dim)
        self._gram_tf = zeros(target_dim, feature_dim)
        self._gram_tt = zeros(target_dim, target_dim)
        self._gram_bf = zeros(block_dim, feature_dim)
        self._gram_bb = zeros(block_dim, block_dim)

    @property
    def count(self) -> int:
        """Tokens counted so far."""
        return int(self._count)

    @torch.no_grad()
    @takes_arrays()
    def update(
        self,
        features: Tensor,
        targets: Tensor,
        block: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        """Adds tokens: tensors, or arrays (``nbl_kernels/arrays.py``). On an error nothing has been
        added.

        Args:
            features: (…, d_f), float32, bfloat16 or float16.
            targets: (…, d_t), the same leading shape and dtype.
            block: (…, d_b), given exactly when block_dim > 0.
            mask: (…) bool, True = count the token. Values of other tokens are not looked at.

        Raises:
            ValueError, TypeError: a shape or type does not fit; names the argument.
            RuntimeError: a counted token is not finite; names input, token and channel.
        """
        inputs = {"features": (features, self.feature_dim), "targets": (targets, self.target_dim)}
        rows = check_tokens(inputs, block, self.block_dim, self.device)
        check_mask("mask", mask, features.shape[:-1])
        torch.ops.nbl.covariance_update(
            rows[0],
            rows[1],
            rows[2] if block is not None else None,
            None if mask is None else mask.reshape(-1),
            self._count,
            self._sums,
            self._gram_ff,
            self._gram_tf,
            self._gram_tt,
            self._gram_bf,
            self._gram_bb,
        )

    def merge(self, other: CovarianceAccumulator) -> None:
        """Adds the tokens of another accumulator of the same dimensions."""
        if not isinstance(other, CovarianceAccumulator):
            raise TypeError(f"other must be a CovarianceAccumulator, got {type(other).__name__}")
        if other._dims != self._dims:
            raise ValueError(f"other must have dimensions {self._dims}, got {other._dims}")
        for mine, its in zip(self._tensors().values(), other._tensors().values()):
            mine += its.to(mine.device)

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Adds up the accumulators of all processes of a torch.distributed group."""
        for tensor in self._tensors().values():
            torch.distributed.all_reduce(tensor, group=group)

    def to(self, device: torch.device | str) -> CovarianceAccumulator:
        """A copy on another device."""
        other = CovarianceAccumulator(**self._dims, device=device)
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, as copies: count, sums, gram_ff, gram_tf, gram_tt, gram_bf, gram_bb."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replaces the sums by those of :meth:`state_dict`; on an error nothing changes."""
        mine = self._tensors()
        if set(state) != set(mine):
            raise ValueError(f"state must have the keys {sorted(mine)}, got {sorted(state)}")
        for name, tensor in mine.items():
            new = state[name]
            if new.shape != tensor.shape or new.dtype != tensor.dtype:
                raise ValueError(
                    f"state[{name!r}] must be {tensor.dtype} of shape {tuple(tensor.shape)}, "
                    f"got {_describe(new)}"
                )
        for name, tensor in mine.items():
            tensor.copy_(state[name])

    def moments(self, ddof: int = 1) -> Moments:
        """Means and covariances: ``C_xy = (Σ x yᵀ - Σx Σyᵀ / n) / (n - ddof)``, float64.

        Raises ValueError with fewer than ddof + 1 tokens.
        """
        n = self.count
        if ddof < 0 or n <= ddof:
            raise ValueError(f"moments(ddof={ddof}) needs more than {max(ddof, 0)} tokens, got {n}")
        means = (self._sums / n).split([self.feature_dim, self.target_dim, self.block_dim])
        mean_f, mean_t, mean_b = (m.clone() for m in means)

        def covariance(gram: Tensor, mean_x: Tensor, mean_y: Tensor) -> Tensor:
            if mean_x is mean_y:  # only the upper triangle is accumulated
                gram = symmetric(gram)
            return (gram - torch.outer(n * mean_x, mean_y)).div_(n - ddof)

        has_block = self.block_dim > 0
        return Moments(
            count=n,
            mean_features=mean_f,
            mean_targets=mean_t,
            cov_ff=covariance(self._gram_ff, mean_f, mean_f),
            cov_tf=covariance(self._gram_tf, mean_t, mean_f),
            cov_tt=covariance(self._gram_tt, mean_t, mean_t),
            mean_block=mean_b if has_block else None,
            cov_bf=covariance(self._gram_bf, mean_b, mean_f) if has_block else None,
            cov_bb=covariance(self._gram_bb, mean_b, mean_b) if has_block else None,
            ddof=ddof,
        )

    @property
    def _dims(self) -> dict[str, int]:
        return {
            "feature_dim": self.feature_dim,
            "target_dim": self.target_dim,
            "block_dim": self.block_dim,
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "count": self._count,
            "sums": self._sums,
            "gram_ff": self._gram_ff,
            "gram_tf": self._gram_tf,
            "gram_tt": self._gram_tt,
            "gram_bf": self._gram_bf,
            "gram_bb": self._gram_bb,
        }

    def __repr__(self) -> str:
        dims = ", ".join(f"{name}={dim}" for name, dim in self._dims.items())
        return f"CovarianceAccumulator({dims}, count={self.count}, device={self.device})"


def symmetric(gram: Tensor) -> Tensor:
    """Of which only the upper triangle is accumulated."""
    return gram.triu() + gram.triu(1).T


def check_dims(**dims: int) -> None:
    for name, dim in dims.items():
        least = 0 if name == "block_dim" else 1
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {dim!r}")


def check_tokens(
    inputs: dict[str, tuple[Tensor, int]],
    block: Tensor | None,
    block_dim: int,
    device: torch.device,
) -> list[Tensor]:
    """The inputs, each with its last dimension, and the block, as (tokens, dim); the leading shape
    is that of the first."""
    if (block is None) != (block_dim == 0):
        expected = f"(…, {block_dim})" if block_dim else "absent (block_dim is 0)"
        raise ValueError(f"block must be {expected}, got {_describe(block)}")
    if block is not None:
        inputs = inputs | {"block": (block, block_dim)}
    first = next(iter(inputs.values()))[0]
    rows = []
    for name, (value, dim) in inputs.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dim() < 1 or value.shape != (*first.shape[:-1], dim):
            leading = ", ".join(map(str, first.shape[:-1])) or "…"
            raise ValueError(f"{name} must have shape ({leading}, {dim}), got {_describe(value)}")
        if value.device != device and value.device.type != device.type:
            raise ValueError(f"{name} must be on {device}, got {value.device}")
        rows.append(value.reshape(-1, dim))
    return rows


def check_mask(name: str, mask: Tensor | None, shape: torch.Size) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {_describe(mask)}")
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {_describe(mask)}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
