"""Streaming moments of features stacked with their past, without multiplying the stack by itself.

``φ_t = [f_t | f_{t-l} for every lag l | e_t^a for every decay a]`` has P = 1 + lags + decays blocks
of d numbers. Of the P² blocks of ``Σ φ φᵀ`` only those with f itself are multiplied: ``S = Σ f fᵀ``
(half of it), ``A_l = Σ f_{t-l} f_tᵀ`` and ``X_a = Σ e_t^a f_tᵀ``. The others follow from what the
blocks of φ have to do with each other. Over one sequence, with nothing before its first token, and
x' its value at the last token of the sequence::

    Σ x_{t-1} y_{t-1}ᵀ = Σ x_t y_tᵀ - x' y'ᵀ                                            (shift)

With ``f_{t-k}`` and ``f_{t-l}`` for x and y, k ≤ l, the shift k times over::

    Σ f_{t-k} f_{t-l}ᵀ = A_{l-k}ᵀ - Σ_{i<k} f'_{-i} f'_{-(i+l-k)}ᵀ

(f'_{-i} stands i tokens before the last). With ``e_t = a e_{t-1} + (1 - a) f_t`` put in for e_t::

    Σ e_t f_{t-l}ᵀ = a (Σ e_t f_{t-l+1}ᵀ - e' f'_{-(l-1)}ᵀ) + (1 - a) A_lᵀ
    (1 - ab) Σ e^a_t e^b_tᵀ = (1-b) X_a + (1-a) X_bᵀ - (1-a)(1-b) S - ab e'^a e'^bᵀ
    (1 - a) Σ e_t = (1 - a) Σ f_t - a e'

So besides the products only the last states of the sequences are kept, [f'_0 … f'_{-(L-1)} | e'],
L the longest lag: as rows, until there are more of them than their Gram matrix has.

The averages are rounded to the dtype of the features to be multiplied; around a mean far from zero
a slow one would then be a constant. So what is filtered, rounded and multiplied is f less its mean
c: ``e_t = ẽ_t + (1 - a^{i+1}) c``, i the place of the token in its sequence. The rest of
``Σ e xᵀ``, of rank two, is added in float64, and such that Σ e is what the last identity says: then
covariances derived from these identities lose nothing to the means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nbl_kernels.arrays import takes_arrays
from nbl_kernels.covariance import Moments, check_dims, check_mask, check_tokens, symmetric
from nbl_kernels.filters import Filters, filter_features

_CHUNK_BYTES = 256 << 20  # float32 features of the sequences that are stacked at a time
_END_ROWS = 64  # last states that there is room for from the beginning


def memory_features(
    features: Tensor,
    lags: Sequence[int] = (1,),
    decays: Sequence[float] = (0.6, 0.95),
    *,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """``φ_t = [f_t | f_{t-l} for every lag l | e_t^a for every decay a]``, what a linear map with a
    memory sees; ``e_t = a e_{t-1} + (1 - a) f_t``, zeros before the first token of a sequence.

    Args:
        features: (B, T, d), floating point.
        lags: positive and distinct. decays: between 0 and 1, distinct. Σ lags + len(decays) ≤ 8.
        mask: (B, T) bool, False: the token is not there (padding): its sequence goes on after it,
            its values are not looked at, its φ is zero. None: all are.
        starts: (B, T) bool, True: a sequence begins with this token. Every row begins one.

    Returns:
        (B, T, P·d), P = 1 + len(lags) + len(decays): float64 for float64, else float32. Plain
        PyTorch, differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit; names it.
    """
    filters = Filters(lags, decays)
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a tensor, got {type(features).__name__}")
    if features.dim() != 3 or not features.is_floating_point():
        raise ValueError(
            f"features must be floating point of shape (B, T, d), got {features.dtype} of shape "
            f"{tuple(features.shape)}"
        )
    for name, value in (("mask", mask), ("starts", starts)):
        check_mask(name, value, features.shape[:-1])
    with torch.autocast(features.device.type, enabled=False):  # float32, as promised
        stacked, _ = filter_features(features, filters, own=False, mask=mask, starts=starts)
    return stacked.flatten(2)


class MemoryAccumulator:
    """Streams sequences into the moments of :func:`memory_features`, targets and a block.

    What :class:`CovarianceAccumulator` would give for φ (..., P·d_f), P = 1 + len(lags) +
    len(decays), for far fewer products: of the (d_f, d_f) blocks of ``Σ φ φᵀ`` those with f are
    multiplied and the others derived (the module's comment has the formulas), 3.5 instead of 8 (or
    16 without symmetry) for one lag and two decays. Longer lags cost the products with all lags up
    to the longest (without decays: with all differences of two lags).

    Sums are float64, products as in :class:`CovarianceAccumulator`; the averages are computed in
    float32 and, less the mean of f, rounded to the dtype of the features before they are
    multiplied. Relative to float64 on the same inputs the Gram matrix of φ is right to 1e-6
    (Frobenius) for float32; of 16-bit inputs the blocks with averages have the errors of their
    rounding, which average out: after 4096 tokens 5e-4 for bfloat16, 5e-5 for float16, the others
    are exact to 1e-6.

    For every sequence its last state is kept, (max(lags) + len(decays)) · d_f float32, until those
    outnumber the rows of their Gram matrix, which then takes their place.

    Args:
        feature_dim, target_dim, block_dim: d_f, d_t, d_b; block_dim 0: no block.
        lags: positive and distinct. decays: between 0 and 1, distinct. Σ lags + len(decays) ≤ 8.
        device: where the sums live; the inputs must be there too. Default: CPU.
    """

    def __init__(
        self,
        feature_dim: int,
        target_dim: int,
        *,
        lags: Sequence[int] = (1,),
        decays: Sequence[float] = (0.6, 0.95),
        block_dim: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        check_dims(feature_dim=feature_dim, target_dim=target_dim, block_dim=block_dim)
        self.feature_dim, self.target_dim, self.block_dim = feature_dim, target_dim, block_dim
        self._filters = Filters(lags, decays)
        self.device = torch.device(device if device is not None else "cpu")
        lags, decays = self.lags, self.decays
        self._reach = max(lags, default=0)
        if decays:
            needed = set(range(1, self._reach + 1))
        else:
            needed = set(lags) | {m - k for m in lags for k in lags if k < m}
        # φ, and after it the shifts of f that are needed only to derive blocks
        self._extra = tuple(sorted(needed - set(lags)))

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)

        stacked = self._filters.branches * feature_dim
        past = stacked - feature_dim + len(self._extra) * feature_dim
        self._count = torch.zeros((), dtype=torch.int64, device=self.device)
        self._sums = zeros(feature_dim + target_dim + block_dim)
        self._gram_ff = zeros(feature_dim, feature_dim)
        self._gram_pf = zeros(past, feature_dim)  # lags, decays, extra shifts
        self._gram_ts = zeros(target_dim, stacked)
        self._gram_tt = zeros(target_dim, target_dim)
        self._gram_bs = zeros(block_dim, stacked)
        self._gram_bb = zeros(block_dim, block_dim)
        self._end_sums = zeros(self._reach + len(decays), feature_dim)
        self._gram_ends = zeros(0, 0)
        self._drop_end_rows()

    @property
    def lags(self) -> tuple[int, ...]:
        return self._filters.lags

    @property
    def decays(self) -> tuple[float, ...]:
        return self._filters.decays

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
        starts: Tensor | None = None,
    ) -> None:
        """Adds sequences: tensors, or arrays (``nbl_kernels/arrays.py``). Every row begins anew. On
        an error that names an argument nothing has been added.

        Args:
            features: (B, T, d_f), float32, bfloat16 or float16.
            targets: (B, T, d_t), the same dtype.
            block: (B, T, d_b), given exactly when block_dim > 0.
            mask: (B, T) bool, False: the token is not there; its sequence goes on after it. Its
                values are not looked at.
            starts: (B, T) bool, True: a sequence begins with this token (packed ones).

        Raises:
            ValueError, TypeError: a shape or type does not fit; names the argument.
            RuntimeError: a dtype does not fit, or a token that is there is not finite; names
                input, token (of B·T) and channel.
        """
        inputs = {"features": (features, self.feature_dim), "targets": (targets, self.target_dim)}
        if features.dim() != 3:
            raise ValueError(
                f"features must have shape (B, T, {self.feature_dim}), got {tuple(features.shape)}"
            )
        check_tokens(inputs, block, self.block_dim, self.device)
        check_mask("mask", mask, features.shape[:-1])
        check_mask("starts", starts, features.shape[:-1])
        if features.shape[:-1].numel() == 0:
            return
        # The sums alone: this refuses what may not be added before anything is.
        none = self._gram_ff.new_empty(0, 0)
        count, sums = torch.zeros_like(self._count), torch.zeros_like(self._sums)
        torch.ops.nbl.covariance_update(
            features.reshape(-1, self.feature_dim),
            targets.reshape(-1, self.target_dim),
            None if block is None else block.reshape(-1, self.block_dim),
            None if mask is None else mask.reshape(-1),
            count,
            sums,
            *[none] * 5,
        )
        pilots = (sums / count.clamp_min(1)).float()
        stacked = self._filters.branches + len(self._extra)
        row_bytes = 4 * features.shape[1] * stacked * self.feature_dim
        rows = max(1, _CHUNK_BYTES // row_bytes)
        inputs = [features, targets] + ([] if block is None else [block])
        for start in range(0, features.shape[0], rows):
            part = slice(start, start + rows)
            with torch.autocast(self.device.type, enabled=False):  # the identities need float32
                self._add_sequences(
                    [value[part] for value in inputs],
                    None if mask is None else mask[part],
                    None if starts is None else starts[part],
                    pilots.split([value.shape[-1] for value in inputs]),
                )
        self._count += count
        self._sums += sums

    def _add_sequences(
        self,
        inputs: list[Tensor],
        mask: Tensor | None,
        starts: Tensor | None,
        pilots: Sequence[Tensor],
    ) -> None:
        """Everything but count and sums, for some rows; pilots: means of the inputs, about."""
        d, lags, decays = self.feature_dim, self.lags, self.decays
        averages, _ = filter_features(
            inputs[0] - pilots[0], Filters((), decays), own=False, mask=mask, starts=starts
        )
        averages = averages[:, :, 1:].flatten(0, 1)  # ẽ, (tokens, decays, d)
        begins = torch.zeros(inputs[0].shape[:2], dtype=torch.bool, device=self.device)
        begins[:, 0] = True
        if mask is not None:
            begins = mask & (mask.cumsum(1) == 1)
        if starts is not None:
            begins |= starts
        begins = begins.flatten()
        inputs = [value.flatten(0, 1) for value in inputs]
        if mask is not None:  # from here on what is not there is gone
            there = mask.flatten()
            inputs = [value[there] for value in inputs]
            averages, begins = averages[there], begins[there]
        f, n = inputs[0], len(begins)
        if n == 0:
            return
        token = torch.arange(n, device=self.device)
        position = token - torch.where(begins, token, 0).cummax(0).values  # in its sequence

        stacked = f.new_empty(n, self._filters.branches + len(self._extra), d)
        stacked[:, 0] = f
        shifts = [*enumerate(lags, start=1), *enumerate(self._extra, self._filters.branches)]
        for branch, lag in shifts:
            stacked[:lag, branch] = 0
            stacked[lag:, branch] = torch.where((position >= lag)[lag:, None], f[:-lag], 0)
        if f.dtype == torch.float16:  # f less its mean may lie beyond what float16 can hold
            averages = averages.clamp(-65504, 65504)
        stacked[:, 1 + len(lags) : self._filters.branches] = averages

        faded = torch.tensor(decays, dtype=torch.float64, device=self.device)
        faded = faded ** (position[:, None] + 1)  # (tokens, decays)
        last = torch.cat([begins[1:], begins.new_ones(1)]).nonzero().flatten()
        ends = f.new_empty(len(last), self._reach + len(decays), d, dtype=torch.float32)
        for back in range(self._reach):
            same = (position[last] >= back)[:, None]
            ends[:, back] = torch.where(same, f[(last - back).clamp_min(0)], 0)
        ends[:, self._reach :] = averages[last] + (1 - faded[last, :, None]) * pilots[0]

        none, count = self._gram_ff.new_empty(0, 0), torch.zeros_like(self._count)
        past_sums = self._gram_ff.new_zeros(stacked.shape[1] * d)
        stacked = stacked.flatten(1)
        past = (stacked[:, :d], stacked[:, d:], None, None)
        past_grams = (self._gram_ff, self._gram_pf, none, none, none)
        torch.ops.nbl.covariance_update(*past, count, past_sums, *past_grams)
        wide = self._gram_ts.shape[1]  # without the extra shifts
        sums = self._gram_ff.new_zeros(wide + self.target_dim + self.block_dim)
        rest = (stacked[:, :wide], inputs[1], inputs[2] if inputs[2:] else None, None)
        rest_grams = (none, self._gram_ts, self._gram_tt, self._gram_bs, self._gram_bb)
        torch.ops.nbl.covariance_update(*rest, count, sums, *rest_grams)
        self._end_sums += ends.sum(0, dtype=torch.float64)
        self._add_ends(ends.flatten(1))

        if not decays:
            return
        # Σ ẽ xᵀ were added for Σ e xᵀ, e = ẽ + (1 - faded) pilot + their mean difference.
        first, pilot = (1 + len(lags)) * d, pilots[0].double()
        missing = sums[:d] - self._fading() * ends[:, self._reach :].sum(0, dtype=torch.float64)
        missing -= sums[first:wide].reshape(-1, d)
        missing -= (n - faded.sum(0))[:, None] * pilot
        totals = (sums[:d], *sums[wide:].split([self.target_dim, self.block_dim]))
        grams = (
            self._gram_pf[first - d : wide - d],
            self._gram_ts[:, first:wide].T,
            self._gram_bs[:, first:wide].T,
        )
        for x, center, total, gram in zip(inputs, pilots, totals, grams):
            faded_x = (faded.float().T @ (x - center)).double()
            faded_x += faded.sum(0)[:, None] * center
            for i in range(len(decays)):
                left = torch.stack([pilot + missing[i] / n, -pilot], dim=1)
                gram[i * d : (i + 1) * d].addmm_(left, torch.stack([total, faded_x[i]]))

    def _fading(self) -> Tensor:
        """(decays, 1): a / (1 - a), what a last average lacks in the sum of all."""
        fading = [[a / (1 - a)] for a in self.decays]
        return torch.tensor(fading, dtype=torch.float64, device=self.device).reshape(-1, 1)

    def _add_ends(self, rows: Tensor) -> None:
        """Keeps them: as rows, or in the Gram matrix once that is not larger."""
        width, total = self._end_sums.numel(), self._num_ends + len(rows)
        if self._gram_ends.numel() == 0 and total <= width:
            if total > len(self._end_buffer):
                # In few large pieces: each that stays among the freed temporaries of updates splits
                # the heap, which then grows with every update.
                larger = rows.new_empty(min(width, 2 * total), width)
                larger[: self._num_ends] = self._end_rows()
                self._end_buffer = larger
            self._end_buffer[self._num_ends : total] = rows
            self._num_ends = total
            return
        if self._gram_ends.numel() == 0:
            self._gram_ends = self._gram_ends.new_zeros(width, width)
        for part in (self._end_rows().double(), rows.double()):
            self._gram_ends.addmm_(part.T, part)
        self._drop_end_rows()

    def _drop_end_rows(self) -> None:
        width = self._end_sums.numel()
        size = 0 if self._gram_ends.numel() else min(width, _END_ROWS)
        self._end_buffer = self._end_sums.new_empty(size, width, dtype=torch.float32)
        self._num_ends = 0

    def _end_rows(self) -> Tensor:
        """(sequences, (reach + decays) · d_f) float32, unless in the Gram matrix."""
        return self._end_buffer[: self._num_ends]

    def merge(self, other: MemoryAccumulator) -> None:
        """Adds the sequences of another accumulator of the same dimensions, lags and decays."""
        if not isinstance(other, MemoryAccumulator):
            raise TypeError(f"other must be a MemoryAccumulator, got {type(other).__name__}")
        if other._settings != self._settings:
            raise ValueError(f"other must have {self._settings}, got {other._settings}")
        for mine, its in zip(self._added().values(), other._added().values()):
            mine += its.to(mine.device)
        if other._gram_ends.numel() > 0:
            gram = other._gram_ends.to(self.device)
            self._gram_ends = gram + self._gram_ends if self._gram_ends.numel() else gram.clone()
        self._add_ends(other._end_rows().to(self.device))

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Adds up the accumulators of all processes of a torch.distributed group."""
        distributed = torch.distributed
        for tensor in self._added().values():
            distributed.all_reduce(tensor, group=group)
        rows = self._end_rows()
        sizes = torch.zeros(
            distributed.get_world_size(group), 2, dtype=torch.int64, device=self.device
        )
        mine = torch.tensor([len(rows), self._gram_ends.numel()], device=self.device)
        sizes[distributed.get_rank(group)] = mine
        distributed.all_reduce(sizes, group=group)
        if int(sizes[:, 1].max()) > 0:
            if self._gram_ends.numel() == 0:
                self._gram_ends = self._gram_ends.new_zeros(rows.shape[1], rows.shape[1])
            distributed.all_reduce(self._gram_ends, group=group)
        # Every process has its own number of rows: padded to the most, and cut again.
        counts = sizes[:, 0].tolist()
        if max(counts) == 0:
            return
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(gathered, padded, group=group)
        self._drop_end_rows()
        for part, count in zip(gathered, counts):
            self._add_ends(part[:count])

    def to(self, device: torch.device | str) -> MemoryAccumulator:
        """A copy on another device."""
        other = MemoryAccumulator(**self._settings, device=device)
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, Tensor]:
        """Everything accumulated, as copies, and lags and decays, to be compared when loaded."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replaces everything accumulated by that of :meth:`state_dict`, of an accumulator of the
        same dimensions, lags and decays; on an error nothing changes."""
        mine = self._tensors()
        if set(state) != set(mine):
            raise ValueError(f"state must have the keys {sorted(mine)}, got {sorted(state)}")
        width = self._end_sums.numel()
        for name, tensor in mine.items():
            new = state[name]
            shapes = [tensor.shape]
            if name == "ends":
                shapes = [(len(new) if new.dim() else 0, width)]
            elif name == "gram_ends":
                shapes = [(width, width), (0, 0)]
            if tuple(new.shape) not in map(tuple, shapes) or new.dtype != tensor.dtype:
                raise ValueError(
                    f"state[{name!r}] must be {tensor.dtype} of shape {tuple(shapes[0])}, got "
                    f"{new.dtype} of shape {tuple(new.shape)}"
                )
        for name in ("lags", "decays"):
            if state[name].tolist() != mine[name].tolist():
                raise ValueError(
                    f"state[{name!r}] must be {mine[name].tolist()}, got {state[name].tolist()}"
                )
        for name, tensor in self._added().items():
            tensor.copy_(state[name])
        self._gram_ends = state["gram_ends"].to(self.device, copy=True)
        self._end_buffer = state["ends"].to(self.device, copy=True)
        self._num_ends = len(self._end_buffer)

    def moments(
        self,
        ddof: int = 1,
        decays: Sequence[float] | None = None,
        *,
        residual_block: bool = False,
    ) -> Moments:
        """Means and covariances of φ and targets, ``C_xy = (Σ x yᵀ - Σx Σyᵀ / n) / (n - ddof)``,
        float64: the argument of :func:`lmmse_solve`.

        Args:
            ddof: the covariances are sums divided by count - ddof.
            decays: the averages that φ shall have, of those accumulated and in this order; None:
                all. The lags all stay.
            residual_block: derive the block f + t, what :func:`cca_bound` needs of a residual
                block whose features are stacked. Needs block_dim 0 and d_t == d_f.

        Raises ValueError with fewer than ddof + 1 tokens, or where an argument does not fit.
        """
        n, d = self.count, self.feature_dim
        if ddof < 0 or n <= ddof:
            raise ValueError(f"moments(ddof={ddof}) needs more than {max(ddof, 0)} tokens, got {n}")
        decays = self.decays if decays is None else tuple(decays)
        if len(set(decays)) < len(decays) or not set(decays) <= set(self.decays):
            raise ValueError(f"decays must be distinct ones of {self.decays}, got {decays}")
        if residual_block and (self.block_dim or self.target_dim != d):
            raise ValueError(
                "residual_block needs block_dim 0 and targets of the features' dimension, got "
                f"block_dim {self.block_dim}, dimensions {self.target_dim} and {d}"
            )
        chosen = [self.decays.index(a) for a in decays]
        sum_f, sum_t, sum_b = self._sums.split([d, self.target_dim, self.block_dim])
        fading = self._fading() * self._end_sums[self._reach :]
        sums = [sum_f] + [sum_f - self._end_sums[:lag].sum(0) for lag in self.lags]
        mean_s = torch.cat(sums + [sum_f - fading[i] for i in chosen]) / n
        mean_t, mean_b = sum_t / n, sum_b / n

        size = len(mean_s)
        cov_ff = torch.outer(mean_s, mean_s).mul_(-n)
        for (i, j), gram in self._stacked_blocks(chosen):
            cov_ff[i * d : (i + 1) * d, j * d : (j + 1) * d] += gram
            if i != j:
                cov_ff[j * d : (j + 1) * d, i * d : (i + 1) * d] += gram.T
        cov_ff /= n - ddof
        first = 1 + len(self.lags)
        kept = [*range(first), *(first + i for i in chosen)]

        def columns(gram: Tensor) -> Tensor:
            return gram.unflatten(1, (self._filters.branches, d))[:, kept].reshape(-1, size)

        def covariance(gram: Tensor, mean_x: Tensor, mean_y: Tensor) -> Tensor:
            return (gram - torch.outer(n * mean_x, mean_y)).div_(n - ddof)

        cov_tf = covariance(columns(self._gram_ts), mean_t, mean_s)
        cov_tt = covariance(symmetric(self._gram_tt), mean_t, mean_t)
        block = {}
        if self.block_dim:
            block = {
                "mean_block": mean_b.clone(),
                "cov_bf": covariance(columns(self._gram_bs), mean_b, mean_s),
                "cov_bb": covariance(symmetric(self._gram_bb), mean_b, mean_b),
            }
        elif residual_block:
            block = {
                "mean_block": mean_s[:d] + mean_t,
                "cov_bf": cov_ff[:d] + cov_tf,
                "cov_bb": cov_ff[:d, :d] + cov_tf[:, :d] + cov_tf[:, :d].T + cov_tt,
            }
        return Moments(
            count=n,
            mean_features=mean_s,
            mean_targets=mean_t.clone(),
            cov_ff=cov_ff,
            cov_tf=cov_tf,
            cov_tt=cov_tt,
            ddof=ddof,
            **block,
        )

    def _stacked_blocks(self, chosen: Sequence[int]) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """((i, j), block (i, j) of Σ φ φᵀ) for all i ≤ j; φ with the chosen decays."""
        d, lags = self.feature_dim, (0, *self.lags)
        past = self._gram_pf.unflatten(0, (-1, d))
        order = (*self.lags, *(None for _ in self.decays), *self._extra)
        shifted = {0: symmetric(self._gram_ff)}  # A_l
        shifted |= {lag: past[i] for i, lag in enumerate(order) if lag is not None}
        averages = past[len(self.lags) :][: len(self.decays)]  # X_a
        rows = self._end_rows().double().unflatten(1, (-1, d)) if self._end_sums.numel() else None

        def ends(x: int, y: int) -> Tensor:
            gram = rows[:, x].T @ rows[:, y]
            if self._gram_ends.numel() > 0:
                gram += self._gram_ends[x * d : (x + 1) * d, y * d : (y + 1) * d]
            return gram

        for i, k in enumerate(lags):
            for j, m in enumerate(lags[i:], start=i):
                nearer, apart = min(k, m), abs(m - k)
                gram = shifted[apart].T.clone()
                for back in range(nearer):
                    gram -= ends(back, back + apart)
                yield (i, j), gram if k <= m else gram.T
        for j, x in enumerate(chosen, start=len(lags)):
            a, end = self.decays[x], self._reach + x
            gram = averages[x].clone()  # Σ e_t f_{t-l}ᵀ, l from 0 on
            for lag in range(self._reach + 1):
                if lag > 0:
                    gram -= ends(end, lag - 1)
                    gram.mul_(a).add_(shifted[lag].T, alpha=1 - a)
                if lag in lags:
                    yield (lags.index(lag), j), gram.T
            for i, y in enumerate(chosen[: j - len(lags) + 1], start=len(lags)):
                b = self.decays[y]
                gram = ends(self._reach + y, end).mul_(-a * b)
                gram.add_(averages[y], alpha=1 - a).add_(averages[x].T, alpha=1 - b)
                gram.add_(shifted[0], alpha=-(1 - a) * (1 - b)).div_(1 - a * b)
                yield (i, j), gram

    @property
    def _settings(self) -> dict[str, object]:
        return {
            "feature_dim": self.feature_dim,
            "target_dim": self.target_dim,
            "block_dim": self.block_dim,
            "lags": self.lags,
            "decays": self.decays,
        }

    def _added(self) -> dict[str, Tensor]:
        """What adds up element by element."""
        return {
            "count": self._count,
            "sums": self._sums,
            "gram_ff": self._gram_ff,
            "gram_pf": self._gram_pf,
            "gram_ts": self._gram_ts,
            "gram_tt": self._gram_tt,
            "gram_bs": self._gram_bs,
            "gram_bb": self._gram_bb,
            "end_sums": self._end_sums,
        }

    def _tensors(self) -> dict[str, Tensor]:
        return self._added() | {
            "ends": self._end_rows(),
            "gram_ends": self._gram_ends,
            "lags": torch.tensor(self.lags, dtype=torch.int64),
            "decays": torch.tensor(self.decays, dtype=torch.float64),
        }

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self._settings.items())
        return f"MemoryAccumulator({settings}, count={self.count}, device={self.device})"
