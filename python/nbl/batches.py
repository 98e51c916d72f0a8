"""Token batches, checked: what calibrate and perplexity read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .upstream import execution_device

__all__ = ["Batch", "count_tokens", "read_batches"]


@dataclass(frozen=True)
class Batch:
    """input_ids (B, T) int64; attention_mask (B, T) bool, or None without padding; position_ids
    (B, T) int64 of packed texts, or None.

    All on the model's device.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of a model's forward."""
        inputs = {name: getattr(self, name) for name in ("attention_mask", "position_ids")}
        present = {name: t for name, t in inputs.items() if t is not None}
        return {"input_ids": self.input_ids, **present}

    @property
    def starts(self) -> Tensor | None:
        """(B, T) bool: the first token of every packed text but the row's first."""
        if self.position_ids is None:
            return None
        return torch.diff(self.position_ids, dim=-1, prepend=self.position_ids[:, :1] - 1) != 1

    @property
    def tokens(self) -> int:
        mask = self.attention_mask
        return self.input_ids.numel() if mask is None else int(mask.sum())


def read_batches(batches: Iterable[Any], model: PreTrainedModel) -> Iterator[Batch]:
    """Checks each batch as it comes. TypeError, ValueError: naming the batch by its index."""
    if isinstance(batches, Mapping | str | bytes) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches: expected an iterable of token batches, got {type(batches).__name__}"
        )
    vocab_size = model.config.vocab_size
    device = execution_device(model.get_input_embeddings())
    number = -1
    for number, item in enumerate(batches):
        yield _checked(item, f"batch {number}", vocab_size, device)
    if number < 0:
        raise ValueError(
            "batches: empty, no token to read (or an iterator that was used up before)"
        )


def count_tokens(batches: Any) -> int | None:
    """How many tokens a list of batches holds; None where that is not known beforehand."""
    if not isinstance(batches, list | tuple):
        return None
    total = 0
    for batch in batches:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if not isinstance(ids, Tensor):
            return None  # a bad batch: it is reported by its number when it is read
        total += int(mask.sum()) if isinstance(mask, Tensor) else ids.numel()
    return total


def _checked(item: Any, name: str, vocab_size: int, device: torch.device) -> Batch:
    mask = positions = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise ValueError(f"{name}: expected the key 'input_ids', got {sorted(item)}")
        mask, positions = item.get("attention_mask"), item.get("position_ids")
        item = item["input_ids"]
    if not isinstance(item, Tensor):
        raise TypeError(
            f"{name}: expected a LongTensor (B, T) or a dict, got {type(item).__name__}"
        )
    if item.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected token ids of dtype int64, got {item.dtype}")
    if item.ndim != 2 or item.numel() == 0:
        raise ValueError(
            f"{name}: expected a non-empty (B, T) tensor, got shape {tuple(item.shape)}"
        )
    low, high = map(int, item.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name}: token ids {low} to {high}; the vocabulary is 0 to {vocab_size - 1}"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != item.shape:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"{name}: attention_mask: expected shape {tuple(item.shape)}, got {got}"
            )
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"{name}: attention_mask: expected only 0 and 1")
        mask = mask.bool()
        mask = None if bool(mask.all()) else mask.to(device)
    if positions is not None:
        if not isinstance(positions, Tensor) or positions.shape != item.shape:
            got = tuple(positions.shape) if isinstance(positions, Tensor) else positions
            raise ValueError(f"{name}: position_ids: expected shape {tuple(item.shape)}, got {got}")
        if mask is not None:
            raise ValueError(
                f"{name}: position_ids: expected no padding beside them (transformers tells packed "
                "texts by their positions only without an attention_mask)"
            )
        positions = positions.to(device, torch.int64)
    return Batch(item.to(device, torch.int64), mask, positions)
