"""Which attention layer to replace first: scores, and the order that follows from them."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batches import read_batches
from ..layers.linearized import replaced
from ..layers.tokens import span_arguments
from ..perplexity import eval_mode, perplexity, sum_nll
from .partial import run_layers

__all__ = [
    "CRITERIA",
    "MEASURED",
    "Greedy",
    "LayerScore",
    "added_losses",
    "greedy",
    "loss_scores",
    "ordered",
]

CRITERIA = ("greedy", "loss", "residual", "cca", "nmse", "cosine")
MEASURED = CRITERIA[:2]  # on the model, on text
_CANDIDATES = 8  # that greedy measures in each step after the first
_FINALISTS = 3  # of them, that it measures on the second half of the text too


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


class Greedy(NamedTuple):
    """What :func:`greedy` found.

    together: {layer: what the layers up to this one add to the mean NLL, together}, in the order in
        which they were taken (scores that rise, so that sorting keeps the order).
    alone: {layer: what it adds alone}, of the layers that the first step measured.
    """

    together: dict[int, float]
    alone: dict[int, float]


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    replacements: Mapping[int, nn.Module],
    batches: Iterable[Any],
    count: int,
    likely: Sequence[int],
) -> Greedy:
    """Takes `count` layers one after another, each time the one that adds the least to the loss of
    the model with those before it replaced: what layers add alone does not add up.

    The first step measures the first 2 `count` layers of `likely` (a cheap order), and at least 8;
    each later one the 8 that added least when they were last measured: all of them on the first
    half of the text, the best 3 on the rest, too. Every candidate is run from its own layer on. In
    forward passes over the text: about 1 + 0.3 a candidate for each step, 50 for 12 of 30 layers.
    """
    if not hasattr(batches, "__len__"):  # a generator, say: the text is read once per step
        batches = list(batches)
    candidates = list(likely)[: max(2 * count, _CANDIDATES)]
    together: dict[int, float] = {}
    base, alone = 0.0, {}
    last: dict[int, float] = {}
    with ExitStack() as chosen, eval_mode(model):
        for replacement in replacements.values():
            replacement.eval()
        for step in range(count):
            now, added, finalists = added_losses(
                model, {i: (i, replacements[i]) for i in candidates}, batches, _FINALISTS
            )
            last |= added
            if step == 0:
                base, alone = now, dict(added)
            best = min(finalists, key=lambda i: (last[i], i))
            floor = max(together.values(), default=-math.inf)
            together[best] = max(now + last.pop(best) - base, math.nextafter(floor, math.inf))
            chosen.enter_context(replaced(model, best, replacements[best]))
            candidates = sorted(last, key=lambda i: (last[i], i))[:_CANDIDATES]
    return Greedy(together, alone)


_Key = TypeVar("_Key", bound=Hashable)


@torch.no_grad()
def added_losses(
    model: PreTrainedModel,
    candidates: Mapping[_Key, tuple[int, nn.Module]],
    batches: Collection[Any],
    finalists: int | None = None,
) -> tuple[float, dict[_Key, float], list[_Key]]:
    """(mean NLL of the model as it is, {candidate: what it adds}, those measured on all of the
    text).

    A candidate is (layer, what is put in its place), and is run from its own layer on. finalists:
    only the best so many of them after half of the text are measured on the rest, too.
    """
    layers = model.model.layers
    before: dict[int, Tensor] = {}
    total, tokens = 0.0, 0
    totals = dict.fromkeys(candidates, 0.0)
    place = {key: n for n, key in enumerate(candidates)}  # ties: the first
    added: dict[_Key, float] = {}
    running = list(candidates)

    def keep(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before[i] = args[0] if args else kwargs["hidden_states"]

    for number, batch in enumerate(read_batches(batches, model)):
        if finalists and number and tokens and number == len(batches) // 2:
            added = {key: (totals[key] - total) / tokens for key in running}
            running = sorted(running, key=lambda key: (totals[key], place[key]))[:finalists]
        with ExitStack() as hooks:
            for i in {candidates[key][0] for key in running}:
                handle = layers[i].register_forward_pre_hook(
                    lambda module, args, kwargs, i=i: keep(i, args, kwargs), with_kwargs=True
                )
                hooks.callback(handle.remove)
            inputs = batch.inputs | span_arguments(model.base_model, batch)
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        nll, predicted = sum_nll(model, hidden, batch)
        total, tokens = total + nll, tokens + predicted
        for key in running:
            i, replacement = candidates[key]
            above = {i: replacement} | dict(enumerate(layers[i + 1 :], i + 1))
            hidden = run_layers(model, above, batch, before[i], norm=True)
            totals[key] += sum_nll(model, hidden, batch)[0]
        before.clear()
    if tokens == 0:
        raise ValueError("batches: no token to predict; a sequence needs two tokens")
    return total / tokens, added | {key: (totals[key] - total) / tokens for key in running}, running
