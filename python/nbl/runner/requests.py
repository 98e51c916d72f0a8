"""Prompts, and what is asked of them: checked, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PromptBatch", "Sampler", "token_rows"]


@dataclass(frozen=True)
class PromptBatch:
    ids: Tensor  # (B, length), prompts aligned on their right
    lengths: list[int]
    length: int  # of the longest
    padding: Tensor | None  # (B,), slots before each prompt; None where there are none
    visible: Tensor | None  # (B, max_length), False for those slots


def token_rows(
    prompts: Sequence[Any] | Tensor, attention_mask: Tensor | None, vocab_size: int
) -> list[Tensor]:
    """Prompts as LongTensors (length,) on the CPU; ValueError or TypeError for anything else."""
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2:
            raise ValueError(f"prompts: expected (B, T), got shape {tuple(prompts.shape)}")
        rows = list(prompts.cpu())
    else:
        if isinstance(prompts, str | bytes) or any(isinstance(p, int | str) for p in prompts):
            raise TypeError("prompts: expected a sequence of sequences of token ids")
        rows = [torch.as_tensor(p).cpu() for p in prompts]
    if attention_mask is not None:
        if not isinstance(prompts, Tensor) or attention_mask.shape != prompts.shape:
            raise ValueError(
                "attention_mask: expected the shape of prompts, a tensor (B, T), got "
                f"{tuple(attention_mask.shape)}"
            )
        rows = [row[keep] for row, keep in zip(rows, attention_mask.cpu().bool())]
    if not rows:
        raise ValueError("prompts: expected at least one")
    for i, row in enumerate(rows):
        if row.dim() != 1 or len(row) == 0:
            raise ValueError(f"prompts[{i}]: expected at least one token id")
        if row.is_floating_point() or row.dtype == torch.bool:
            raise TypeError(f"prompts[{i}]: expected integers, got {row.dtype}")
        if not 0 <= int(row.min()) <= int(row.max()) < vocab_size:
            raise ValueError(f"prompts[{i}]: expected token ids from 0 to {vocab_size - 1}")
    return rows


class Sampler:
    """Logits (B, vocab) to tokens (B,), on their device, without waiting for it."""

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int | None,
        device: torch.device,
    ) -> None:
        if not temperature >= 0 or temperature == float("inf"):
            raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature!r}")
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"top_k: expected a positive int, got {top_k!r}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
        if temperature == 0 and (top_k, top_p, seed) != (None, None, None):
            raise ValueError("top_k, top_p and seed need a temperature above 0, which is greedy")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        scores, ids = logits.float() / self.temperature, None
        if self.top_k is not None:
            scores, ids = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1)
        elif self.top_p is not None:
            scores, ids = scores.sort(dim=-1, descending=True)
        p = scores.softmax(dim=-1)
        if self.top_p is not None:
            p = p.masked_fill(p.cumsum(dim=-1) - p >= self.top_p, 0)
        # Of independent exponential clocks with rates p, the i-th rings first with probability p_i.
        clocks = torch.empty_like(p).exponential_(generator=self.generator)
        choice = (p / clocks).argmax(dim=-1, keepdim=True)
        return (choice if ids is None else ids.gather(-1, choice))[:, 0]
