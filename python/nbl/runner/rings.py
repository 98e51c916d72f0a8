"""The caches of a Runner's layers with a window: rings of slots, of one size however long the text.

A few new tokens are written to the ring and attended to it as it lies; a prompt is attended block
by block beside what the ring held before, and leaves there what later tokens will see
(:mod:`nbl.layers.ring`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import nbl_kernels as nk

from ..layers.ring import append, attend_prompt, earlier, ring_slots, visible_slots
from ..window import Window
from .attention import SdpaAttention
from .step import MOST_ROWS, Kept, RingView

__all__ = ["Rings"]


class Rings:
    """Keys and values (layers, max_batch_size, kv_heads, slots, head_dim) for each window."""

    def __init__(
        self,
        kept: Iterable[Kept],
        max_batch_size: int,
        max_length: int,
        heads: tuple[int, int, int],
        *,
        drafts: bool,
        **where: Any,
    ) -> None:
        """heads: how many of the queries, of the keys, and how long. drafts: up to MOST_ROWS tokens
        are written at a time, and some of them rejected: room for them beside the window."""
        bounded = [k.bounded for k in kept if k.bounded is not None]
        self._sdpa = SdpaAttention((), heads[0], heads[1])
        self._rings: dict[Window, tuple[Tensor, Tensor]] = {}
        for window in dict.fromkeys(bounded):
            length = min(window.size + (MOST_ROWS - 1 if drafts else 0), max_length)
            layers, slots = bounded.count(window), window.sinks + length + 1
            shape = (layers, max_batch_size, heads[1], slots, heads[2])
            self._rings[window] = torch.zeros(shape, **where), torch.zeros(shape, **where)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for ring in self._rings.values() for t in ring)

    def begin(self, rows: int) -> None:
        """What is masked is multiplied by zero: nothing of an earlier call, infinite perhaps, may
        be left."""
        for ring in self._rings.values():
            for tensor in ring:
                tensor[:, :rows] = 0

    def views(self, batch: Any, start: int, end: int) -> dict[Window, RingView]:
        """For the tokens in slots start to end of the cache."""
        if not self._rings:
            return {}
        index = torch.arange(start, end, device=batch.ids.device)[None]
        first = start
        if batch.padding is not None:
            index = index - batch.padding[:, None]
            first = start - (batch.length - min(batch.lengths))  # of the shortest prompt
        return {
            window: self._view(window, index, first, start, end, padded=batch.padding is not None)
            for window in self._rings
        }

    def _view(
        self, window: Window, index: Tensor, first: int, start: int, end: int, *, padded: bool
    ) -> RingView:
        """For tokens `index` (R, T), the shortest prompt's from `first` on."""
        new, length = end - start, self._length(window)
        slots = ring_slots(index, window, length)
        fits = new - 1 <= length - window.size or end <= window.sinks + length
        if new > MOST_ROWS or not fits:
            return RingView(index, slots, None, min(window.size - 1, start))
        all_seen = length <= window.size or end <= window.sinks + window.size
        if new == 1 and all_seen and (not padded or first >= window.slots - 1):
            view = self._sdpa.whole(slice(0, min(end, window.sinks + length)))
        else:
            view = self._masked(window, index)
        return RingView(index, slots, view)

    def step_views(self, own: Tensor, padding: Tensor) -> dict[Window, RingView]:
        """For the tokens in slots `own` (T,), padding (rows, 1): all that varies is in tensors."""
        index = own - padding
        return {
            window: RingView(
                index,
                ring_slots(index, window, self._length(window)),
                self._masked(window, index),
            )
            for window in self._rings
        }

    def attend(
        self, qkv: Tensor, kept: Kept, span: Any, tables: tuple[Tensor, Tensor], norms: Any
    ) -> Tensor:
        """(B, T, heads, head_dim): q and k are rotated, k and v written to the ring, which q sees.

        tables, norms: as nk.rope_append takes them.
        """
        rows, new = qkv.shape[:2]
        window, seen = kept.bounded, span.rings[kept.bounded]
        keys, values = (t[kept.index] for t in self._rings[window])
        if seen.view is not None:
            q = nk.rope_append(qkv, *tables, span.positions, seen.slots, keys, values, **norms)
            return self._sdpa(q, keys, values, seen.view, kept.scaling)
        k, v = (t.new_empty((rows, t.shape[1], new, t.shape[3])) for t in (keys, values))
        places = torch.arange(new, device=qkv.device)
        q = nk.rope_append(qkv, *tables, span.positions, places, k, v, **norms)
        ring = (keys[:rows], values[:rows])
        if seen.before == 0 and len(seen.index) == 1:
            append(ring, k, v, seen.index, window)
            return attend_prompt(q, k, v, window, kept.scaling)
        first = seen.index[:, 0]
        before = earlier(ring, first, window, seen.before)
        append(ring, k, v, seen.index, window)
        sinks = tuple(t[:, :, : window.sinks] for t in ring)
        return attend_prompt(q, k, v, window, kept.scaling, first=first, before=before, sinks=sinks)

    def _length(self, window: Window) -> int:
        return self._rings[window][0].shape[3] - 1 - window.sinks

    def _masked(self, window: Window, index: Tensor) -> Any:
        length = self._length(window)
        mask = visible_slots(index, window, length)[:, None]
        return self._sdpa.masked(slice(0, window.sinks + length), mask)
