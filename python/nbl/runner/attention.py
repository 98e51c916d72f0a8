"""The attention of a Runner's layers to its cache: PyTorch's, or FlashInfer's where it is there.

Both are asked for the same three things: what the tokens of a step see (`views`, one per sliding
window), the same for the step that a CUDA graph captures (`step_views`), and the attention itself,
with one of these views. A layer's cache is (max_batch_size, kv_heads, max_length, head_dim), and
prompts are aligned on their right: shorter ones have padding in their first slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FlashInferAttention", "SdpaAttention", "allocate_cache", "load_flashinfer"]

_FEW_TOKENS = 16  # so many, and no key is repeated for the query heads that share it
_PAGE = 16  # slots: FlashInfer divides the work by pages
_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends


def allocate_cache(shape: Sequence[int], **where: Any) -> Tensor:
    """Zeros of this shape (…, max_length, head_dim). Behind the last there is room for what the
    last page of a row may reach over."""
    size = torch.Size(shape).numel()
    return torch.zeros(size + (_PAGE - 1) * shape[-1], **where)[:size].view(shape)


# --- PyTorch's -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """The cache as the tokens of a step see it."""

    slots: slice
    mask: Tensor | None = None  # True: seen; broadcasts to (B, heads, tokens, slots)
    causal: bool = False
    # The query heads that share a key head are to it as so many tokens: no key is repeated. That
    # pays for few tokens; the mask then has a row for each head of each token.
    grouped: bool = False


class SdpaAttention:
    """``scaled_dot_product_attention``. `windows`: the layers' sliding windows, None: none."""

    reads_free_slots = True  # masked, in the step of a CUDA graph

    def __init__(self, windows: Iterable[int | None], heads: int, kv_heads: int) -> None:
        self._windows = set(windows)
        self._groups = heads // kv_heads

    def views(self, batch: Any, start: int, end: int) -> dict[int | None, _View]:
        """For the tokens in slots start to end."""
        views = {}
        for window in self._windows:
            first = 0 if window is None else max(0, start - window + 1)
            views[window] = self._view(batch, start, end, first, window)
        return views

    def step_views(
        self, rows: int, length: int, bucket: int, padding: Tensor, own: Tensor
    ) -> dict[int | None, _View]:
        """For the tokens in slots `own` (length,), of `bucket` slots; padding (rows, 1)."""
        slots = torch.arange(bucket, device=own.device)
        seen = (slots <= own[:, None]) & (slots >= padding[..., None])
        views = {}
        for window in self._windows:
            mask = seen if window is None else seen & (slots > own[:, None] - window)
            views[window] = self.masked(slice(0, bucket), mask[:, None])
        return views

    def prepare_step(self, batch: Any, slot: int, length: int) -> None:
        """Before the step is replayed: nothing, all of it is in tensors."""

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, view: _View, scaling: float
    ) -> Tensor:
        """(B, T, heads, head_dim) of q (B, heads, T, head_dim) and a layer's cache."""
        rows, length = q.shape[0], q.shape[2]
        keys, values = keys[:rows, :, view.slots], values[:rows, :, view.slots]
        options = {"attn_mask": view.mask, "scale": scaling}
        if view.grouped:
            q = q.unflatten(1, (keys.shape[1], -1)).transpose(2, 3).flatten(2, 3)
            y = F.scaled_dot_product_attention(q, keys, values, **options)
            y = y.unflatten(2, (length, -1)).transpose(1, 2)
            return y.flatten(2, 3)
        y = F.scaled_dot_product_attention(
            q, keys, values, is_causal=view.causal, enable_gqa=True, **options
        )
        return y.transpose(1, 2)

    def _view(self, batch: Any, start: int, end: int, first: int, window: int | None) -> _View:
        """What the tokens in slots start to end see: slots first to end, masked."""
        slots = slice(first, end)
        padded = batch.visible is not None
        if end - start == 1:
            mask = batch.visible[:, None, None, slots] if padded else None
            return _View(slots, mask, grouped=True)
        if start == 0 and not padded and (window is None or window >= end):
            return _View(slots, causal=True)
        device = batch.ids.device
        queries = torch.arange(start, end, device=device)[:, None]
        keys = torch.arange(first, end, device=device)
        mask = keys <= queries
        if window is not None:
            mask = mask & (keys > queries - window)
        if padded:  # padding sees itself: some kernels make NaN of a row of nothing, and it spreads
            mask = (mask & batch.visible[:, None, None, slots]) | (keys == queries)
        return self.masked(slots, mask) if end - start <= _FEW_TOKENS else _View(slots, mask)

    def whole(self, slots: slice) -> _View:
        """For one token of each row, which sees all of these slots."""
        return _View(slots, grouped=True)

    def masked(self, slots: slice, mask: Tensor) -> _View:
        """For a few tokens, mask (…, T, slots)."""
        if mask.shape[-2] > 1:
            mask = mask.repeat_interleave(self._groups, dim=-2)
        return _View(slots, mask, grouped=True)


# --- FlashInfer's --------------------------------------------------------------------------------


def load_flashinfer(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module, where it can run a model of this device and dtype; or says why it cannot."""
    if device.type != "cuda":
        raise ValueError(f'attention: "flashinfer" needs a GPU, the model is on {device}')
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f'attention: "flashinfer" needs bfloat16 or float16, the model is {dtype}')
    try:
        import flashinfer
    except ImportError as error:
        raise ImportError(
            'attention: "flashinfer" is not installed: pip install "nbl_kernels[flashinfer]" '
            f"({error})"
        ) from error
    return flashinfer


@dataclass(frozen=True)
class _Planned:
    """A wrapper whose plan holds the tokens of a step, and which tokens of (B, T) these are."""

    wrapper: Any
    tokens: Tensor | None = None  # None: all


class FlashInferAttention:
    """FlashInfer's ``BatchPrefillWithPagedKVCacheWrapper``, for prompts, drafts and single tokens.

    Its pages are slots of the cache as they lie: a page may begin at any slot, pages overlap, and a
    row's first begins where its padding ends. So no mask is needed and nothing of the padding is
    read. Page i of a layer is the _PAGE slots from the i-th on, for other heads those max_length
    slots further; the slots of the next row begin kv_heads · max_length further.

    A plan is made on the CPU for each forward pass and sliding window, and used by all layers. That
    of the step of a CUDA graph is made before each replay and left in buffers that the graph reads.
    """

    reads_free_slots = False

    def __init__(
        self,
        flashinfer: ModuleType,
        windows: dict[int | None, float],
        heads: int,
        cache_shape: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """windows: scaling of q kᵀ per sliding window; cache_shape: of a layer."""
        self._new_wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper
        self._windows = windows
        self._max_batch_size, self._kv_heads, self._max_length, self._head_dim = cache_shape
        self._heads, self._device, self._dtype = heads, device, dtype
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[tuple[Any, ...], Any] = {}

    def views(self, batch: Any, start: int, end: int) -> dict[int | None, _Planned]:
        """For the tokens in slots start to end."""
        # What is best for long prompts is not for few tokens, which FlashInfer cannot know.
        backend = "fa2" if end - start <= _FEW_TOKENS else "auto"
        return self._plan(batch, start, end, (backend,), lambda: {"backend": backend})

    def step_views(
        self, rows: int, length: int, bucket: int, padding: Tensor, own: Tensor
    ) -> dict[int | None, _Planned]:
        """What prepare_step has planned."""
        return {w: _Planned(self._wrappers["step", rows, length, w]) for w in self._windows}

    def prepare_step(self, batch: Any, slot: int, length: int) -> None:
        """Plans the step before it is replayed, for the tokens from `slot` on."""
        rows = len(batch.lengths)

        def options() -> dict[str, Any]:
            sizes = {
                "qo_indptr_buf": rows + 1,
                "paged_kv_indptr_buf": rows + 1,
                "paged_kv_indices_buf": rows * -(-self._max_length // _PAGE),
                "paged_kv_last_page_len_buf": rows,
            }
            where = {"dtype": torch.int32, "device": self._device}
            buffers = {name: torch.zeros(size, **where) for name, size in sizes.items()}
            return {"backend": "fa2", "use_cuda_graph": True, **buffers}

        self._plan(batch, slot, slot + length, ("step", rows, length), options)

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, view: _Planned, scaling: float
    ) -> Tensor:
        """(B, T, heads, head_dim) of q (B, heads, T, head_dim) and a layer's cache; zeros for the
        tokens of the padding."""
        q = q.transpose(1, 2)
        tokens = q.flatten(0, 1)
        pages = self._pages(keys), self._pages(values)
        if view.tokens is None:
            return view.wrapper.run(tokens, pages).view(q.shape)
        y = torch.zeros_like(tokens)
        y[view.tokens] = view.wrapper.run(tokens[view.tokens], pages)
        return y.view(q.shape)

    def _pages(self, cache: Tensor) -> Tensor:
        """(pages, kv_heads, _PAGE, head_dim): FlashInfer's layout HND."""
        dim, length = self._head_dim, self._max_length
        pages = ((self._max_batch_size - 1) * self._kv_heads + 1) * length
        return cache.as_strided((pages, self._kv_heads, _PAGE, dim), (dim, length * dim, dim, 1))

    def _plan(
        self, batch: Any, start: int, end: int, kind: tuple[Any, ...], options: Any
    ) -> dict[int | None, _Planned]:
        # A row that is padding up to `end` sees itself, so that every row has something to do.
        padding = [batch.length - n for n in batch.lengths]
        begins = [p if p < end else start for p in padding]
        new = [end - max(start, begin) for begin in begins]
        tokens = None
        if any(n < end - start for n in new):
            ends = range(end - start, (end - start) * len(new) + 1, end - start)
            tokens = torch.cat([torch.arange(e - n, e) for e, n in zip(ends, new)]).to(self._device)
        seen = [end - begin for begin in begins]
        row_slots = self._kv_heads * self._max_length
        pages = [
            torch.arange(row * row_slots + begin, row * row_slots + end, _PAGE, dtype=torch.int32)
            for row, begin in enumerate(begins)
        ]
        planned = {}
        for window, scaling in self._windows.items():
            wrapper = self._wrappers.get((*kind, window))
            if wrapper is None:
                wrapper = self._new_wrapper(self._workspace, "HND", **options())
                self._wrappers[(*kind, window)] = wrapper
            wrapper.plan(
                _offsets(new),
                _offsets([len(p) for p in pages]),
                torch.cat(pages),
                torch.tensor([(n - 1) % _PAGE + 1 for n in seen], dtype=torch.int32),
                self._heads,
                self._kv_heads,
                self._head_dim,
                _PAGE,
                causal=True,
                sm_scale=scaling,
                window_left=-1 if window is None else window - 1,
                q_data_type=self._dtype,
            )
            planned[window] = _Planned(wrapper, tokens)
        return planned


def _offsets(counts: Sequence[int]) -> Tensor:
    """0, then the sums up to each."""
    return torch.tensor([0, *counts]).cumsum(0).int()
