"""Which attention layer to replace first: scores, and the order that follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..layers.linearized import replaced
from ..perplexity import perplexity

__all__ = ["CRITERIA", "LayerScore", "loss_scores", "ordered"]

CRITERIA = ("loss", "residual", "cca", "nmse", "cosine")


@dataclass(frozen=True)
class LayerScore:
    """layer: its id; score: how bad it is to replace it, in the units of the criterion."""

    layer: int
    score: float


def ordered(scores: Mapping[int, float], criterion: str) -> list[LayerScore]:
    """The lowest score first, ties by the layer's id. ValueError for a score that is no number."""
    for i, score in scores.items():
        if not score == score:
            raise ValueError(f"layer {i}: its {criterion} score is not a number")
    return [
        LayerScore(i, s) for i, s in sorted(scores.items(), key=lambda item: (item[1], item[0]))
    ]


def loss_scores(
    model: PreTrainedModel, replacements: Mapping[int, nn.Module], batches: Iterable[Any]
) -> dict[int, float]:
    """{layer: mean NLL with only this layer replaced, minus the NLL of the model}."""
    if iter(batches) is batches:  # a generator: the text is read once per layer
        batches = list(batches)
    base = perplexity(model, batches).nll
    scores = {}
    for i, replacement in replacements.items():
        with replaced(model, i, replacement):
            scores[i] = perplexity(model, batches).nll - base
    return scores
