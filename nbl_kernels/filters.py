"""The branches of φ, the features that a linear map with a memory stacks: lags and exponential
averages, filtered in plain PyTorch (``memory.py`` has the formulas, and the kernels)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 64  # tokens that are averaged by one matrix product


@dataclass(frozen=True)
class Filters:
    """Lags and decays, checked: the branches of φ after f itself."""

    lags: tuple[int, ...]
    decays: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lags", tuple(self.lags))
        object.__setattr__(self, "decays", tuple(self.decays))
        for lag in self.lags:
            if type(lag) is not int or lag < 1:
                raise ValueError(f"lags: expected positive ints, got {self.lags!r}")
        for decay in self.decays:
            if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay < 1:
                raise ValueError(f"decays: expected numbers between 0 and 1, got {self.decays!r}")
        for name, values in (("lags", self.lags), ("decays", self.decays)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected distinct ones, got {values!r}")
        if self.slots > 8:
            raise ValueError(
                f"lags, decays: expected at most 8 vectors of state (Σ lags + decays), got "
                f"{self.slots}"
            )

    @property
    def branches(self) -> int:
        """How many there are in φ, f among them."""
        return 1 + len(self.lags) + len(self.decays)

    @property
    def slots(self) -> int:
        """S: vectors of state."""
        return sum(self.lags) + len(self.decays)


def filter_features(
    g: Tensor,
    filters: Filters,
    *,
    own: bool,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every branch of φ, and the state after every token; plain PyTorch, differentiable.

    Args:
        g: (B, T, P, r) with `own`: every branch filters numbers of its own; else (B, T, r), which
            all branches filter.
        state: (B, S, r) before the first token; None: nothing remembered.
        mask, starts: (B, T) bool or None, as in :func:`memory_scan`.

    Returns:
        (B, T, P, r) and (B, T, S, r); zeros for the branches of tokens that are not there. In
        float32, or float64 for float64.
    """
    acc = torch.promote_types(g.dtype, torch.float32)
    g = g.to(acc)
    batch, length = g.shape[:2]
    if not own:
        g = g[:, :, None].expand(-1, -1, filters.branches, -1)
    if state is None:
        state = g.new_zeros(batch, filters.slots, g.shape[-1])
    state = state.to(acc)
    if mask is not None:
        # The tokens that are there move together to the front, and their results back.
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        rows = torch.arange(batch, device=g.device)[:, None]
        there = mask.sum(dim=1, keepdim=True) > torch.arange(length, device=g.device)
        # where, not a product: what is not there may be NaN
        packed = torch.where(there[..., None, None], g[rows, order], 0)
        starts = None if starts is None else starts[rows, order]
        branches, states = filter_features(packed, filters, own=True, state=state, starts=starts)
        last = mask.cumsum(dim=1) - 1  # of the tokens there, up to each
        at = last.clamp_min(0)
        branches = torch.where(mask[..., None, None], branches[rows, at], 0)
        states = torch.where((last >= 0)[..., None, None], states[rows, at], state[:, None])
        return branches, states

    part = None if starts is None else starts.cumsum(dim=1)  # which sequence; 0: the state's own
    branches, states = [g[:, :, 0]], []
    slot = 0
    for branch, lag in enumerate(filters.lags, start=1):
        before = torch.cat([state[:, slot : slot + lag].flip(1), g[:, :, branch]], dim=1)
        for back in range(lag + 1):
            shifted = before[:, lag - back : lag - back + length]
            if part is not None and back > 0:
                zero = part.new_zeros(batch, back)
                same = part == torch.cat([zero, part], dim=1)[:, :length]
                shifted = torch.where(same[..., None], shifted, 0)
            (states if back < lag else branches).append(shifted)
        slot += lag
    for branch, decay in enumerate(filters.decays, start=1 + len(filters.lags)):
        average = _averages(g[:, :, branch], decay, state[:, slot], part)
        branches.append(average)
        states.append(average)
        slot += 1
    stacked = torch.stack(states, dim=2) if states else g.new_zeros(*g.shape[:2], 0, g.shape[-1])
    return torch.stack(branches, dim=2), stacked


def _averages(g: Tensor, decay: float, carry: Tensor, part: Tensor | None) -> Tensor:
    """e_t = a e_{t-1} + (1 - a) g_t over (B, T, r), from e = carry (B, r): a chunk of tokens at a
    time, as a product with the lower triangle of (1 - a) a^(t - s)."""
    if g.shape[1] == 0:
        return g
    done, previous = [], None
    for start in range(0, g.shape[1], _CHUNK):
        chunk = g[:, start : start + _CHUNK]
        steps = torch.arange(chunk.shape[1], device=g.device)
        kernel = (1 - decay) * decay ** (steps[:, None] - steps).clamp_min(0).to(g.dtype)
        kernel = kernel.tril()
        fading = (decay ** (steps + 1).to(g.dtype))[None, :, None]
        if part is not None:
            own = part[:, start : start + _CHUNK]
            kernel = torch.where(own[:, :, None] == own[:, None, :], kernel, 0)
            previous = own.new_zeros(len(own)) if previous is None else previous
            fading = torch.where((own == previous[:, None])[..., None], fading, 0)
            previous = own[:, -1]
        done.append(kernel @ chunk + fading * carry[:, None])
        carry = done[-1][:, -1]
    return torch.cat(done, dim=1)


def remember(
    g: Tensor,
    filters: Filters,
    state: Tensor,
    history: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """c (B, T, r) of g (B, T, P·r), the sum of the branches, in float32 or float64; state and
    history are taken on, without a gradient."""
    g = g.unflatten(-1, (filters.branches, -1))
    tokens = {"mask": mask, "starts": starts}
    branches, states = filter_features(g, filters, own=True, state=state.clone(), **tokens)
    with torch.no_grad():
        if states.shape[1] > 0:
            state.copy_(states[:, -1])
        if history is not None:
            history.copy_(states[:, states.shape[1] - history.shape[1] :])
    return branches.sum(dim=2)
