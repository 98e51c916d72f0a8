"""Sequential calibration: every map fitted on what the layers below it have become.

Bottom-up, one layer at a time, two streams run through the model side by side: that of the original
and that of the compressed model, whose replaced layers below are linear already. The map of the
next one is fitted on the features of the compressed stream x' to what brings it back to the
original,

    y' = x + y - x',   so that   x' + W f(x') + b  ≈  x + y,

and, where it is asked for, every down projection D above the first replaced layer is refitted to
the original stream behind its layer, z: with a the input of D,

    D' = D + C_ea (C_aa + λI)⁻¹,   e = z - (h' + D a),

uncentered, as there is no bias; the ridge pulls to D itself. Both streams are kept for all tokens,
one layer at a time: two hidden states per token in the model's dtype, and two forward passes of
work (three with refitted down projections) whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

import nbl_kernels as nk

from ..batches import Batch
from ..layers.linearized import linear_layer, map_spec
from .calibration import Calibration
from .partial import run_layers

__all__ = ["calibrate_sequentially"]


def calibrate_sequentially(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    cal: Calibration,
    *,
    ridge: float,
    bias: bool,
    rank: int | None,
    refit_mlp: bool,
    report: Callable[[int], None],
) -> dict[int, Tensor]:
    """Fills the sums of `cal`, whose layers are taken to be replaced all together.

    report: called with the tokens so far, as if each had been read once.

    Returns:
        {layer: D'}, the refitted down projections in the model's dtype.
    """
    embed = model.get_input_embeddings()
    original = [embed(batch.input_ids) for batch in batches]
    compressed = original
    options = {"ridge": ridge, "bias": bias, "rank": rank}
    last = model.config.num_hidden_layers - 1 if refit_mlp else max(cal.layers)
    tokens = sum(batch.tokens for batch in batches)
    down: dict[int, Tensor] = {}
    for i in range(last + 1):
        layer = model.model.layers[i]
        attended, above = _run_original(model, i, batches, original)
        replacement = layer
        if i in cal.layers:
            for batch, z, x in zip(batches, attended, compressed):
                y = (z.float() - x.float()).to(x.dtype)
                cal.update(i, x, layer.input_layernorm(x), y, batch.attention_mask, batch.starts)
            solved = cal.solve(**options, layers=[i])[i]
            spec = map_spec(solved, features=cal.features, bias=bias, rank=rank)
            replacement = linear_layer(layer, spec, solved, i)
        if replacement is layer and compressed is original:
            compressed = above
        else:
            with ExitStack() as stack:
                if refit_mlp:
                    down[i] = _refit(model, i, replacement, batches, compressed, above, ridge)
                    stack.enter_context(_weight(replacement.mlp.down_proj, down[i]))
                compressed = [
                    run_layers(model, {i: replacement}, batch, x)
                    for batch, x in zip(batches, compressed)
                ]
        original = above
        report(tokens * (i + 1) // (last + 1))
    return down


def _run_original(
    model: PreTrainedModel, i: int, batches: Sequence[Batch], stream: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The stream x + y behind the attention of layer i, and that behind the layer."""
    layer = model.model.layers[i]
    attended: list[Tensor] = []

    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        attended.append(args[0])

    handle = layer.post_attention_layernorm.register_forward_pre_hook(hook)
    try:
        above = [run_layers(model, {i: layer}, batch, x) for batch, x in zip(batches, stream)]
    finally:
        handle.remove()
    return attended, above


def _refit(
    model: PreTrainedModel,
    i: int,
    layer: nn.Module,
    batches: Sequence[Batch],
    stream: Sequence[Tensor],
    wanted: Sequence[Tensor],
    ridge: float,
) -> Tensor:
    """The down projection of a layer that brings the stream before it nearest to the wanted one."""
    projection = layer.mlp.down_proj
    weight = projection.weight
    acc = nk.CovarianceAccumulator(weight.shape[1], weight.shape[0], device=weight.device)
    inputs: list[Tensor] = []

    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        inputs[:] = [args[0]]

    handle = projection.register_forward_pre_hook(hook)
    try:
        for batch, x, z in zip(batches, stream, wanted):
            error = z.float() - run_layers(model, {i: layer}, batch, x).float()
            acc.update(inputs[0], error.to(inputs[0].dtype), mask=batch.attention_mask)
    finally:
        handle.remove()
    change = nk.lmmse_solve(acc.moments(), ridge=ridge, bias=False).weight
    return (weight.double() + change).to(weight.dtype)


@contextmanager
def _weight(linear: nn.Linear, weight: Tensor) -> Iterator[None]:
    before = linear.weight
    try:
        linear.weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        linear.weight = before
