"""The checks of the public door: what is checked here is trusted inside."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index

import torch
from transformers import PreTrainedModel

from .layers.fused import check_plain
from .layers.quantized import quantized_linears
from .layers.spec import linearized_layers
from .models import family_of

__all__ = [
    "DRAFT_ORDER",
    "check_attention",
    "check_dtype",
    "check_layers",
    "check_model",
    "check_no_draft",
    "check_one_device",
    "check_sequential",
    "has_lost_weights",
]

# Where a draft keeps the ids of its own layers, the first to be replaced first.
DRAFT_ORDER = "_nbl_draft_order"


def check_model(model: PreTrainedModel) -> None:
    """ValueError unless the layers of a model can be exchanged: a supported family and dtype, all
    weights in one place."""
    family_of(model)
    check_one_device(model)
    check_dtype(model)


def check_layers(model: PreTrainedModel, layers: Iterable[int]) -> list[int]:
    """Layer ids, in the order given; ValueError or TypeError for anything but distinct ids of this
    model."""
    total = model.config.num_hidden_layers
    if isinstance(layers, bool | str | bytes):
        raise TypeError(f"layers: expected layer ids, got {layers!r}")
    try:
        layers = list(layers)
        if any(isinstance(i, bool) for i in layers):
            raise TypeError
        ids = [index(i) for i in layers]
    except TypeError:
        raise TypeError(f"layers: expected layer ids, got {layers!r}") from None
    beyond = [i for i in ids if not 0 <= i < total]
    if beyond:
        raise ValueError(f"layers {beyond} are out of range: the model has layers 0 to {total - 1}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"layers: an id occurs twice in {ids}")
    return ids


def check_attention(model: PreTrainedModel, layers: Iterable[int]) -> None:
    """ValueError for layers that are linearized already."""
    gone = sorted(set(layers) & set(linearized_layers(model)))
    if gone:
        raise ValueError(f"layers {gone} have no attention: linearized")


def check_dtype(model: PreTrainedModel) -> None:
    """ValueError for a dtype that the kernels do not take."""
    dtype = model.model.norm.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"expected a model in float32, bfloat16 or float16, got {dtype}")


def has_lost_weights(model: PreTrainedModel) -> bool:
    """Whether weights are quantized and not all of the original ones were kept."""
    return any(linear.original is None for linear in quantized_linears(model))


def check_no_draft(model: PreTrainedModel) -> None:
    """ValueError for what :func:`nbl.draft_model` made: most of its layers are another model's."""
    if getattr(model, DRAFT_ORDER, None) is not None:
        raise ValueError(
            "the model is a draft, which shares its layers with the model it was made from: change "
            "that one, or make another draft"
        )


def check_one_device(model: PreTrainedModel) -> None:
    """ValueError for a model that accelerate spreads over devices, or offloads: its hooks sit on
    the layers."""
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if len(places) > 1:
        raise ValueError(
            f"the model is spread over {sorted(places)}: linearize it on one device, save it, "
            "and load the checkpoint with a device_map"
        )
    elsewhere = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if elsewhere is not None:
        raise ValueError(
            f"{elsewhere} is offloaded: linearize the model where its weights are in memory, save "
            "it, and offload what is loaded"
        )


def check_sequential(model: PreTrainedModel, *, refit_mlp: bool) -> None:
    """ValueError unless maps can be fitted one after another: on one device, and with `refit_mlp`
    with plain linears in all layers."""
    check_one_device(model)
    if refit_mlp:
        for i, layer in enumerate(model.model.layers):
            check_plain(layer, f"refit_mlp: model.layers.{i}")
