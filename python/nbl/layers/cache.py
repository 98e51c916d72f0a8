"""What a transformers cache holds for the layers that were replaced: nothing, or a small state.

A linear map of one token needs nothing (:class:`EmptyCacheLayer`). A map with a memory keeps a few
vectors of each sequence (:class:`MemoryCacheLayer`), a window the keys and values of the tokens
that it sees (:class:`WindowCacheLayer`), of one size however long the text. They live in the cache
beside the keys and values of the other layers, and whatever ``generate`` does to a cache (reorder,
repeat, select, crop, reset) is done to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..upstream import (
    Cache,
    CacheLayerMixin,
    append_entries,
    check_croppable,
    length_after_crop,
)
from ..window import Window
from .ring import FEW, append, attend_prompt, attend_ring, earlier, in_order, token_order
from .spec import LayerSpec

__all__ = [
    "CacheBytes",
    "EmptyCacheLayer",
    "MemoryCacheLayer",
    "WindowCacheLayer",
    "cache_bytes",
    "prepare_entries",
]

# How many tokens a memory or a window can be rolled back, exactly: what assisted generation may
# reject. transformers drafts up to 20 at a time, unless told otherwise.
MOST_ROLLED_BACK = 31


class EmptyCacheLayer(CacheLayerMixin):
    """The cache entry of a layer without attention: no keys, no values.

    transformers asks entry 0 how many tokens are cached and how large the masks are; an empty entry
    answers for the first entry that does hold keys. Where every layer is linearized there is none,
    and it counts the tokens itself.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self, entries: list[Any], index: int, count: int = 0) -> None:
        super().__init__()
        self.is_initialized = True
        self.entries = entries
        self.index = index
        self.count = count

    @property
    def source(self) -> CacheLayerMixin | None:
        """The first entry with keys."""
        return next((e for e in self.entries if not isinstance(e, EmptyCacheLayer)), None)

    @property
    def is_sliding(self) -> bool:
        return getattr(self.source, "is_sliding", False)

    @property
    def is_compileable(self) -> bool:
        return getattr(self.source, "is_compileable", False)

    def advance(self, tokens: int) -> None:
        """`tokens` more went by."""
        self.count += tokens

    def get_seq_length(self) -> int:
        source = self.source
        return self.count if source is None else source.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        source = self.source
        return (
            (self.count + query_length, 0)
            if source is None
            else source.get_mask_sizes(query_length)
        )

    def get_max_length(self) -> int:
        source = self.source
        return -1 if source is None else source.get_max_length()

    def prefetch(self) -> None:
        """An offloading cache fetches the entry after the one in use: the next with keys."""
        order = self.entries[self.index :] + self.entries[: self.index]
        following = next((e for e in order if not isinstance(e, EmptyCacheLayer)), None)
        if following is not None:
            following.prefetch()

    def crop(self, tokens_to_remove: int) -> None:
        """As the entries with keys understand it; where one of them cannot, it is said here, before
        anything is removed."""
        self.count = self._length_after(tokens_to_remove)

    def _length_after(self, tokens_to_remove: int) -> int:
        for entry in self.entries:
            if not isinstance(entry, EmptyCacheLayer):
                check_croppable(entry)
        return length_after_crop(self.count, tokens_to_remove)

    def reset(self) -> None:
        self.count = 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError(
            f"this cache was used by a model in which layer {self.index} is linearized; it holds "
            "no keys for a model in which that layer has attention"
        )

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None: ...
    def offload(self) -> None: ...

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda t: t[indices.to(t.device)])

    def _select(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Does this to whatever is kept for each row of the batch: nothing is."""


class MemoryCacheLayer(EmptyCacheLayer):
    """The cache entry of a layer with a memory: its state, and the last states before it.

    state: (B, S, r) float32, as :func:`nbl_kernels.memory_scan` keeps it, zeros before the first
    token; None before the first forward pass. Without limit to the text its size is constant. The
    states after the last tokens are kept as well, so that :meth:`crop` gives back the very one that
    was there: up to MOST_ROLLED_BACK tokens can be taken back at a time.
    """

    def __init__(self, entries: list[Any], index: int, count: int = 0) -> None:
        super().__init__(entries, index, count)
        self.state: Tensor | None = None
        self.past: Tensor | None = None  # (B, MOST_ROLLED_BACK + 1, S, r), the last one the state
        self.depth = 0  # how many tokens can be taken back

    @property
    def nbytes(self) -> int:
        """Memory of the state and of those before it."""
        return 0 if self.state is None else self.state.nbytes + self.past.nbytes

    def prepare(self, batch: int, slots: int, rank: int, device: torch.device) -> Tensor:
        """The state, of this shape; ValueError where it has another."""
        shape = (batch, slots, rank)
        if self.state is None:
            kept = (batch, MOST_ROLLED_BACK + 1, slots, rank)
            self.state = torch.zeros(shape, dtype=torch.float32, device=device)
            self.past = torch.zeros(kept, dtype=torch.float32, device=device)
            # Where transformers compiles its steps, a graph may read and write it in place.
            if self.is_compileable and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.state)
                torch._dynamo.mark_static_address(self.past)
        elif self.state.shape != shape:
            raise ValueError(
                f"layer {self.index}: expected a state of shape {shape}, the cache has "
                f"{tuple(self.state.shape)}; it was filled by another model, or another batch size"
            )
        return self.state

    def history_of(self, tokens: int) -> Tensor:
        """Where memory_scan puts the states after the last of so many tokens."""
        kept = min(tokens, self.past.shape[1])
        return self.past.new_empty(self.past.shape[0], kept, *self.past.shape[2:])

    def remember(self, history: Tensor) -> None:
        """The states after the last tokens join those before."""
        past = torch.cat([self.past[:, history.shape[1] :], history], dim=1)
        if self.is_compileable:  # graphs know its address
            self.past.copy_(past)
        else:
            self.past = past

    def advance(self, tokens: int) -> None:
        super().advance(tokens)
        self.depth = min(self.depth + tokens, MOST_ROLLED_BACK)

    def crop(self, tokens_to_remove: int) -> None:
        length = self._length_after(tokens_to_remove)
        removed, self.count = self.count - length, length
        if removed == 0 or self.state is None:
            return
        if length == 0:
            self._forget()
            return
        if removed > self.depth:
            self.count += removed
            raise ValueError(
                f"layer {self.index} has a memory, of which {self.depth} tokens can be taken back "
                f"(at most {MOST_ROLLED_BACK}), got {removed} to remove: run the text anew, or "
                "draft fewer tokens at a time (num_assistant_tokens)"
            )
        kept = self.past.shape[1]
        self.past.copy_(torch.cat([self.past[:, :removed], self.past[:, : kept - removed]], dim=1))
        self.state.copy_(self.past[:, -1])
        self.depth -= removed

    def reset(self) -> None:
        super().reset()
        self._forget()

    def _select(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state, self.past = rows(self.state), rows(self.past)

    def _forget(self) -> None:
        self.depth = 0
        if self.state is not None:
            self.state.zero_()
            self.past.zero_()


class WindowCacheLayer(EmptyCacheLayer):
    """The cache entry of a layer with a window: the keys and values of the tokens that it sees.

    keys, values: (B, H_kv, sinks + length + 1, D), rings (:mod:`nbl.layers.ring`) that grow with
    the text up to a length of size + MOST_ROLLED_BACK, so that :meth:`crop` can take back as many;
    None before the first forward pass.
    past: (B, MOST_ROLLED_BACK + 1) int64, how many tokens of each sequence there were after each of
    the last ones of the cache; one row, where they are the same in all.
    """

    def __init__(self, entries: list[Any], index: int, window: Window, count: int = 0) -> None:
        super().__init__(entries, index, count)
        self.window = window
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.past: Tensor | None = None
        self.longest = 0  # the most tokens there were at a time
        self.depth = 0  # how many tokens `past` can go back, where there is padding
        self.padded = False

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float,
        mask: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """(B, T, H, D) of new tokens q (B, H, T, D), k, v (B, H_kv, T, D), which are appended.
        mask (B, T): False where padding."""
        length, window = q.shape[2], self.window
        self.padded = self.padded or mask is not None
        self._prepare(k)
        before = self.past[:, -1:].clone()  # _note may write in place
        if mask is None:
            index = before + torch.arange(length, device=q.device)
            self._note(index + 1)
        else:
            counts = before + mask.cumsum(dim=1)
            index = torch.where(mask, counts - 1, -1)
            self._note(counts)
        ring = (self.keys, self.values)
        records = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        if length <= FEW and not records and dropout == 0.0:
            append(ring, k, v, index, window)
            return attend_ring(q, *ring, index, window, scaling)
        if mask is None and self.count == 0 and not torch.compiler.is_compiling():
            append(ring, k, v, index, window)
            return attend_prompt(q, k, v, window, scaling, dropout=dropout)
        first = before[:, 0]
        back = None
        if mask is not None:
            order, back = token_order(mask)
            q, k, v = (in_order(t, order) for t in (q, k, v))
            index = index.gather(1, order)
        kept = window.size - 1
        if not torch.compiler.is_compiling():
            kept = min(kept, self.count)
        seen = earlier(ring, first, window, kept)
        append(ring, k, v, index, window)
        sinks = tuple(t[:, :, : window.sinks] for t in ring)
        if records:  # what is in the ring knows of no gradient
            ahead = torch.arange(window.sinks, device=q.device) - first[:, None]
            new = (ahead >= 0) & (ahead < length)
            where = ahead.clamp(0, length - 1)[:, None, :, None]
            sinks = tuple(
                torch.where(new[:, None, :, None], t.gather(2, where.expand(old.shape)), old)
                for t, old in zip((k, v), sinks, strict=True)
            )
        y = attend_prompt(
            q, k, v, window, scaling, first=first, before=seen, sinks=sinks, dropout=dropout
        )
        return y if back is None else in_order(y.transpose(1, 2), back).transpose(1, 2)

    def _prepare(self, k: Tensor) -> None:
        """Room for the new tokens; ValueError where the entry was filled by something else."""
        rows, heads, new, dim = k.shape
        fixed = self.is_compileable  # graphs know its address
        most = self.window.size + MOST_ROLLED_BACK
        length = most
        if not fixed and not torch.compiler.is_compiling():
            length = min(most, max(self.count + new, FEW) - self.window.sinks)
            length = max(length, 1)
        if self.keys is None:
            shape = (rows, heads, self.window.sinks + length + 1, dim)
            self.keys, self.values = k.new_zeros(shape), k.new_zeros(shape)
            history = (rows if fixed else 1, MOST_ROLLED_BACK + 1)
            self.past = torch.zeros(history, dtype=torch.long, device=k.device)
            if fixed and not torch.compiler.is_compiling():
                for tensor in (self.keys, self.values, self.past):
                    torch._dynamo.mark_static_address(tensor)
        if (rows, heads, dim) != (*self.keys.shape[:2], self.keys.shape[3]):
            raise ValueError(
                f"layer {self.index}: expected keys of shape {(rows, heads, '…', dim)}, the cache "
                f"has {tuple(self.keys.shape)}; it was filled by another model, or another batch "
                "size"
            )
        own = self.keys.shape[2] - 1 - self.window.sinks
        if own < length:  # nothing was overwritten yet: slots keep their tokens
            grown = min(most, max(length, 2 * own))
            pad = (0, 0, 0, grown - own)
            self.keys, self.values = (nn.functional.pad(t, pad) for t in (self.keys, self.values))
        if self.padded and len(self.past) < rows:
            self.past = self.past.repeat(rows, 1)

    def _note(self, counts: Tensor) -> None:
        """counts (B or 1, T): how many tokens there are after each new slot."""
        past = torch.cat([self.past, counts.expand(len(self.past), -1)], dim=1)
        past = past[:, -self.past.shape[1] :]
        if self.is_compileable:
            self.past.copy_(past)
        else:
            self.past = past

    def advance(self, tokens: int) -> None:
        super().advance(tokens)
        self.longest = max(self.longest, self.count)
        self.depth = min(max(self.depth, 0) + tokens, MOST_ROLLED_BACK)

    def crop(self, tokens_to_remove: int) -> None:
        length = self._length_after(tokens_to_remove)
        removed = self.count - length
        if removed == 0 or self.keys is None:
            self.count = length
            return
        if length == 0:
            self.reset()
            return
        slots = self.keys.shape[2] - 1
        oldest = self.longest - (
            slots - self.window.sinks
        )  # in the ring: the newest there ever were
        whole = self.longest <= slots
        known = whole or length - self.window.size + 1 >= oldest
        if not known or (self.padded and removed > self.depth):
            raise ValueError(
                f"layer {self.index} sees a window, of which at most {MOST_ROLLED_BACK} tokens can "
                f"be taken back, got {removed} to remove: run the text anew, or draft fewer tokens "
                "at a time (num_assistant_tokens)"
            )
        self.count = length
        self.depth -= removed
        size = self.past.shape[1]
        if self.padded:
            first = self.past[:, :1].expand(-1, removed)  # for what is beyond the depth: anything
            self.past.copy_(torch.cat([first, self.past[:, : size - removed]], dim=1))
        else:
            steps = torch.arange(1 - size, 1, device=self.past.device)
            self.past.copy_((length + steps).clamp_min(0).expand_as(self.past))

    def reset(self) -> None:
        super().reset()
        self.longest, self.depth, self.padded = 0, 0, False
        if self.keys is not None:
            for tensor in (self.keys, self.values, self.past):
                tensor.zero_()

    def _select(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.keys is None:
            return
        if len(self.past) == len(self.keys) > 1:
            self.past = rows(self.past)
        self.keys, self.values = rows(self.keys), rows(self.values)


def prepare_entries(cache: Cache, num_layers: int, specs: Mapping[int, LayerSpec]) -> None:
    """Puts the right entry at every layer of a cache that was replaced, in place.

    A cache that attention layers filled before their replacement loses those keys, and a memory or
    a window knows nothing of them; the number of tokens stays what it was.

    ValueError where the entries have seen different numbers of tokens: a crop that one of them
    refused has left the others shorter.
    """
    append_entries(cache, num_layers)
    entries = cache.layers
    for i, spec in specs.items():
        entry, kind = entries[i], MemoryCacheLayer if spec.has_memory else EmptyCacheLayer
        own: tuple[Window, ...] = ()
        if spec.window is not None:
            kind, own = WindowCacheLayer, (spec.window,)
        if type(entry) is not kind or (own and entry.window != own[0]):
            count = entry.get_seq_length() if isinstance(entry, CacheLayerMixin) else 0
            entries[i] = kind(entries, i, *own, int(count))
    if torch.compiler.is_compiling():
        return
    lengths = {entry.count for entry in entries if isinstance(entry, EmptyCacheLayer)}
    lengths |= {n for n in (cache.get_seq_length(),) if isinstance(n, int)}  # a static one's is not
    if specs and len(lengths) > 1:
        raise ValueError(
            f"cache: its entries have seen {sorted(lengths)} tokens, as after a crop that failed; "
            "run the text anew on another one"
        )


@dataclass(frozen=True)
class CacheBytes:
    """keys_values: of the attention layers, windows among them; state: of those with a memory."""

    keys_values: int
    state: int

    @property
    def total(self) -> int:
        return self.keys_values + self.state


def cache_bytes(cache: Cache) -> CacheBytes:
    """The memory that a transformers cache holds, after a forward pass or ``generate``."""
    keys_values = state = 0
    for entry in cache.layers:
        if isinstance(entry, MemoryCacheLayer):
            state += entry.nbytes
        else:
            tensors = (getattr(entry, name, None) for name in ("keys", "values"))
            keys_values += sum(t.nbytes for t in tensors if isinstance(t, Tensor))
    return CacheBytes(keys_values, state)
