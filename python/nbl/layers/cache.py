"""What a transformers cache holds for the layers without attention: nothing, or a small state.

A linear map of one token needs nothing (:class:`EmptyCacheLayer`). A map with a memory keeps a few
vectors of each sequence (:class:`MemoryCacheLayer`), of one size however long the text. They live
in the cache beside the keys and values of the other layers, and whatever ``generate`` does to a
cache (reorder, repeat, select, crop, reset) is done to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..upstream import (
    Cache,
    CacheLayerMixin,
    append_entries,
    check_croppable,
    length_after_crop,
)
from .spec import LayerSpec

__all__ = ["CacheBytes", "EmptyCacheLayer", "MemoryCacheLayer", "cache_bytes", "prepare_entries"]

# How many tokens a memory can be rolled back, exactly: what assisted generation may reject.
# transformers drafts up to 20 at a time, unless told otherwise.
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
    def reorder_cache(self, beam_idx: Tensor) -> None: ...
    def batch_repeat_interleave(self, repeats: int) -> None: ...
    def batch_select_indices(self, indices: Tensor) -> None: ...


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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda t: t[indices.to(t.device)])

    def _select(self, rows: Any) -> None:
        if self.state is not None:
            self.state, self.past = rows(self.state), rows(self.past)

    def _forget(self) -> None:
        self.depth = 0
        if self.state is not None:
            self.state.zero_()
            self.past.zero_()


def prepare_entries(cache: Cache, num_layers: int, specs: Mapping[int, LayerSpec]) -> None:
    """Puts the right entry at every layer without attention of a cache, in place.

    A cache that attention layers filled before their linearization loses those keys, and a memory
    knows nothing of them; the number of tokens stays what it was.

    ValueError where the entries have seen different numbers of tokens: a crop that one of them
    refused has left the others shorter.
    """
    append_entries(cache, num_layers)
    entries = cache.layers
    for i, spec in specs.items():
        entry, kind = entries[i], MemoryCacheLayer if spec.has_memory else EmptyCacheLayer
        if type(entry) is not kind:
            count = entry.get_seq_length() if isinstance(entry, CacheLayerMixin) else 0
            entries[i] = kind(entries, i, int(count))
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
    """keys_values: of the attention layers; state: of the layers with a memory."""

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
