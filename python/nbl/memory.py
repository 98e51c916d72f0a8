"""What a linear map remembers of the text before a token: the user's side of nbl_kernels.memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import nbl_kernels as nk
from nbl_kernels.filters import Filters

__all__ = ["Memory", "MemoryMap"]


@dataclass(frozen=True)
class Memory:
    """Features of the tokens before, stacked with f_t: the causal Wiener filter.

    ``φ_t = [f_t | f_{t-l}, l in lags | e_t^a, a in decays]`` with ``e_t = a e_{t-1} + (1 - a) f_t``
    and zeros before the first token of a sequence. The map is ``W = C_yφ C_φφ⁻¹``, of reduced rank
    by the SVD of ``C_yφ L⁻ᵀ``; it costs a state of (Σ lags + decays) · rank numbers for each
    sequence, however long. Derived in docs/memory.md.

    Args:
        lags: distinct positive ints.
        decays: distinct numbers between 0 and 1. An average with decay a reaches back over about
            1 / (1 - a) tokens.
        choose: None: every layer takes all decays. A number: every layer takes so many of them,
            those with the least NMSE, in closed form (every subset is solved for).
    """

    lags: tuple[int, ...] = (1,)
    decays: tuple[float, ...] = (0.6, 0.95)
    choose: int | None = None

    def __post_init__(self) -> None:
        filters = Filters(tuple(self.lags), tuple(self.decays))
        object.__setattr__(self, "lags", filters.lags)
        object.__setattr__(self, "decays", filters.decays)
        if not filters.slots:
            raise ValueError("memory: expected lags or decays, got neither; None is no memory")
        if self.choose is None:
            return
        if type(self.choose) is not int or not 1 <= self.choose <= len(self.decays):
            raise ValueError(
                f"choose: expected None or a number from 1 to {len(self.decays)}, the decays, "
                f"got {self.choose!r}"
            )

    @property
    def branches(self) -> int:
        """How many times the hidden size φ is, for a layer's map."""
        decays = len(self.decays) if self.choose is None else self.choose
        return 1 + len(self.lags) + decays

    def choices(self) -> Iterator[tuple[float, ...]]:
        """The decays that a layer may take."""
        count = len(self.decays) if self.choose is None else self.choose
        return combinations(self.decays, count)


@dataclass(frozen=True)
class MemoryMap(nk.Lmmse):
    """A solved map with a memory: weight (d, P d), factors (d, r) and (r, P d)."""

    lags: tuple[int, ...] = ()
    decays: tuple[float, ...] = ()
