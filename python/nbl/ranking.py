"""Which attention layer to replace first: the criteria behind ``Calibration.rank``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from .evaluation import perplexity
from .linearization import check_calibration, check_one_device, linear_layer, map_spec, replaced
from .models import family_of, linearized_layers

if TYPE_CHECKING:
    from .calibration import Calibration

__all__ = ["CRITERIA", "LayerScore", "rank_layers"]

CRITERIA = ("loss", "residual", "cca", "nmse", "cosine")


@dataclass(frozen=True)
class LayerScore:
    """layer: its id; score: how bad it is to replace it, in the units of the criterion."""

    layer: int
    score: float


def rank_layers(
    cal: Calibration,
    criterion: str,
    *,
    model: PreTrainedModel | None = None,
    batches: Iterable[Any] | None = None,
    ridge: float = 1e-4,
    bias: bool = True,
    rank: int | None = None,
) -> list[LayerScore]:
    """See :meth:`nbl.Calibration.rank`."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
    options = {"ridge": ridge, "bias": bias, "rank": rank}
    if criterion == "loss":
        scores = _loss(cal, model, batches, options)
    elif criterion == "cca":
        scores = cal.cca_bounds()
    elif criterion == "cosine":
        scores = {i: 1.0 - cal.mean_cosine(i) for i in cal.layers}
    else:
        scores = {i: float(solved.nmse) for i, solved in cal.solve(**options).items()}
        if criterion == "residual":
            scores = {i: nmse * _relative_power(cal, i) for i, nmse in scores.items()}
    for i, score in scores.items():
        if not score == score:
            raise ValueError(f"layer {i}: its {criterion} score is not a number")
    return [
        LayerScore(i, s) for i, s in sorted(scores.items(), key=lambda item: (item[1], item[0]))
    ]


def _relative_power(cal: Calibration, layer: int) -> float:
    """tr(C_yy) / E||x||²."""
    moments = cal.moments(layer, decays=())  # of a memory's features as few as there can be
    return float(moments.cov_tt.diagonal().sum()) / cal.mean_square(layer)


def _loss(
    cal: Calibration,
    model: PreTrainedModel | None,
    batches: Iterable[Any] | None,
    options: dict[str, Any],
) -> dict[int, float]:
    """{layer: mean NLL with only this layer replaced, minus the NLL of the model}."""
    if model is None or batches is None:
        raise ValueError('criterion "loss" measures the model: it needs model= and batches=')
    family_of(model)
    check_one_device(model)
    check_calibration(model, cal)
    if iter(batches) is batches:  # a generator: the text is read once per layer
        batches = list(batches)
    layers = [i for i in cal.layers if i not in linearized_layers(model)]
    maps = cal.solve(**options, layers=layers)
    kind = {"features": cal.features, "bias": options["bias"], "rank": options["rank"]}
    base = perplexity(model, batches).nll
    scores = {}
    for i in layers:
        spec = map_spec(maps[i], **kind)
        with torch.no_grad():
            layer = linear_layer(model.model.layers[i], spec, maps[i], i)
        with replaced(model, i, layer):
            scores[i] = perplexity(model, batches).nll - base
    return scores
