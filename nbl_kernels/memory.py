"""Linear maps with a memory: a causal filter over time between two skinny linears.

``φ_t = [f_t | f_{t-l} for every lag l | e_t^a for every decay a]``, with the exponential averages
``e_t = a e_{t-1} + (1 - a) f_t`` and nothing before the first token of a sequence (``f_{-1} = 0``,
``e_{-1} = 0``), is what a token's features are stacked with; ``W φ + b`` of rank r is
``U [V₀ | V₁ | …] φ + b``. Filters commute with maps, so V comes first: ``g_t = V f_t``, r numbers
for every branch of φ, and what is remembered of a sequence are vectors of r numbers.

The state of a sequence, (S, r) float32, S = Σ lags + the number of decays: for every lag l the last
l of its g, the newest first, then for every decay its average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 64  # tokens that plain PyTorch averages by one matrix product


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


def memory_scan(
    x: Tensor,
    weight_v: Tensor,
    weight_u: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    state: Tensor,
    lags: Sequence[int] = (1,),
    decays: Sequence[float] = (0.6, 0.95),
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    history: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    weight_v_scale: Tensor | None = None,
    weight_u_scale: Tensor | None = None,
) -> Tensor:
    """``residual + U c_t + b``, ``c = V₀ f + Σ_l V_l f_{t-l} + Σ_a ema_a(V_a f)``: a linear map with
    a memory, over T tokens of B sequences.

    f is the identity or, when ``norm_weight`` is given, RMSNorm as in :func:`residual_linear`.
    ``e_t = a e_{t-1} + (1 - a) V_a f_t``; before the first token of a sequence f and e are zero.

    Args:
        x: (B, T, K), float32, bfloat16 or float16; any strides.
        weight_v: (P·r, K), x's dtype, P = 1 + len(lags) + len(decays): V₀, then the lags' in order,
            then the decays'. Or quantized, with weight_v_scale: see :func:`quantize`.
        weight_u: (N, r), or None: U is the identity, N = r.
        bias: (N,) or None.
        residual: (B, T, N) or None: then x itself, which needs N == K.
        state: (B, S, r) float32, S = Σ lags + len(decays): what is remembered of each sequence;
            zeros where nothing is. For every lag l the last l of its V_l f, the newest first, then
            the averages. The last dimension contiguous. MUTATED: what it is after the last token.
        lags: positive and distinct.
        decays: between 0 and 1, distinct. S is at most 8.
        mask: (B, T) bool, False: the token is not there (padding): it changes no state, its values
            are not looked at, and its c is zero. None: all are.
        starts: (B, T) bool, True: a sequence begins with this token (packed ones, or a reset): what
            was remembered is forgotten before it. None: none does.
        history: (B, H, S, r) float32, H ≤ T, or None. MUTATED: the states after each of the last H
            tokens, to go back to one of them.

    Returns:
        (B, T, N) in x's dtype. V f and c are each rounded once to x's dtype, between them the
        filter is float32. So the result does not depend, but for the order of the linears' sums, on
        how the tokens are split over calls. Differentiable in everything but the state and its
        history (by plain PyTorch).

    Raises:
        TypeError: an argument is no tensor or array, or the arrays are not of one kind.
        ValueError: lags or decays.
        RuntimeError: a shape, dtype or device does not fit; names the argument; nothing is mutated.

    Source: the causal Wiener filter of reduced rank; derived in docs/memory.md.
    """
    raise NotImplementedError


def memory_linear(
    x: Tensor,
    weight_v: Tensor,
    weight_u: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    state: Tensor,
    lags: Sequence[int] = (1,),
    decays: Sequence[float] = (0.6, 0.95),
    reset: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    weight_v_scale: Tensor | None = None,
    weight_u_scale: Tensor | None = None,
) -> Tensor:
    """The decode step of :func:`memory_scan`: one token of each of B sequences.

    x (B, K), residual (B, N), reset (B,) bool, True: the sequence begins with this token; the other
    arguments are those of :func:`memory_scan`. Returns (B, N); ``state`` (B, S, r) is mutated.
    """
    raise NotImplementedError
