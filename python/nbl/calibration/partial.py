"""A part of a model run on a stream that was kept: some layers, the others skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batches import Batch
from ..layers.tokens import span_arguments

__all__ = ["run_layers"]


def run_layers(
    model: PreTrainedModel,
    layers: Mapping[int, nn.Module],
    batch: Batch,
    x: Tensor,
    *,
    norm: bool = False,
) -> Tensor:
    """The stream behind these layers, x before them, and with `norm` behind the last norm: the
    model's own forward makes their masks and rotations, the other layers are skipped."""
    inputs = {name: t for name, t in batch.inputs.items() if name != "input_ids"}
    with _only(model, layers, norm):
        inputs |= span_arguments(model.model, batch)
        return model.model(inputs_embeds=x, **inputs, use_cache=False).last_hidden_state


class _Skip(nn.Module):
    """In the place of a layer that is not run."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@contextmanager
def _only(model: PreTrainedModel, layers: Mapping[int, nn.Module], norm: bool) -> Iterator[None]:
    base = model.model
    own, own_norm = list(base.layers), base.norm
    try:
        for i in range(len(own)):
            base.layers[i] = layers.get(i) or _Skip()
        if not norm:
            base.norm = _Skip()
        yield
    finally:
        for i, layer in enumerate(own):
            base.layers[i] = layer
        base.norm = own_norm
