"""linearize, drop and restore: attention layers of a model exchanged for linear maps, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

import nbl_kernels as nk

from .calibration import Calibration, fit_sequentially
from .checks import (
    check_attention,
    check_layers,
    check_model,
    check_no_draft,
    check_one_device,
    check_sequential,
    has_lost_weights,
)
from .layers.fused import FusedLayer, check_plain, fuse, unfuse
from .layers.linearized import LinearizedDecoderLayer, linear_layer, map_spec
from .layers.quantized import restore_linears
from .layers.spec import (
    LayerSpec,
    config_entry,
    layer_specs,
    linearized_layers,
    windowed_layers,
)
from .layers.tokens import replaced_specs
from .layers.windowed import whole_layer, windowed_layer
from .models import become_nbl, family_of
from .upstream import share_checkpointing
from .window import Window

__all__ = [
    "chosen_layers",
    "drop",
    "forget_originals",
    "linear_layers",
    "linearize",
    "original_layers",
    "restore",
]

# Where a model keeps the layers that were replaced: a plain dict, so that they are in no state_dict
# and follow no .to().
_ORIGINALS = "_nbl_original_layers"
# And, likewise, the weights of refitted down projections.
_ORIGINAL_DOWN = "_nbl_original_down_proj"


def linearize(
    model: PreTrainedModel,
    cal: Calibration | None,
    layers: int | Iterable[int],
    *,
    criterion: str = "residual",
    ridge: float = 1e-4,
    bias: bool = True,
    rank: int | None = None,
    batches: Iterable[Any] | None = None,
    maps: Mapping[int, nk.Lmmse] | None = None,
    sequential: bool = False,
    refit_mlp: bool = False,
    window: Window | None = None,
) -> PreTrainedModel:
    """Replaces attention layers by their best linear maps, in place: h = x + W f(x) + b.

    Or, with a `window`, by themselves, seeing the last tokens and the first ones only.

    W = C_yf C_ff⁻¹ and b = E[y] - W E[f] (Prop. 3.1 of arXiv 2505.21077) come from `cal`, solved in
    float64 and rounded once to the model's dtype. The replaced layers lose their KV cache. The
    model takes its NBL class, so ``model.save_pretrained(folder)`` writes a checkpoint that
    ``AutoModelForCausalLM.from_pretrained(folder)`` reads once nbl is imported.

    Args:
        model: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM, or one
            that is linearized in part already. Mutated; the replaced layers are kept aside for
            :func:`restore`.
        cal: what :func:`nbl.calibrate` measured on this model.
        layers: how many of the attention layers left, taken in the order of
            ``cal.rank(criterion)``; or their ids. An id that is linearized already gets a new map.
        criterion: see :meth:`nbl.Calibration.rank`; used when `layers` is a number.
        ridge, bias, rank: see :meth:`nbl.Calibration.solve`.
        batches: token batches, for criteria "greedy" and "loss", and for `sequential`.
        maps: {layer: nk.Lmmse} that ``cal.solve`` gave with the same bias and rank, to solve
            nothing.
        sequential, refit_mlp: fit the maps of these layers anew, on `batches`, bottom-up, each on
            what those below it leave; and the down projections: see :func:`nbl.calibrate`. `cal`
            then only says which layers (and with which features and memory). A calibration that is
            sequential itself is used as it is, for all of its layers.
        window: :class:`nbl.Window`: no map is solved or set; the layers keep their attention, which
            sees so many tokens, and a cache of so many. Ids need no calibration (None); a number
            needs one, whose criteria but the measured ones ("greedy", "loss") know maps only.

    Returns:
        model.

    Raises:
        ValueError: an unsupported model, a calibration of another model, layers out of range, twice
            or not calibrated, a layer whose moments have no finite solution. The model is
            untouched.
    """
    check_model(model)
    check_no_draft(model)
    if refit_mlp and not sequential:
        raise ValueError("refit_mlp: expected sequential=True beside it")
    options = {"ridge": ridge, "bias": bias, "rank": rank}
    if window is not None:
        if maps is not None or sequential:
            raise ValueError("window: expected no maps and no sequential beside it: no map is set")
        layers = chosen_layers(model, cal, layers, criterion, batches, window=window, **options)
        _replace(model, windowed_layers_of(model, layers, window))
        return model
    if cal is None:
        raise ValueError("cal: expected a calibration; only a window needs none")
    cal.check_model(model)
    if sequential:
        if maps is not None:
            raise ValueError("maps: expected None with sequential=True, which solves for its own")
        if batches is None:
            raise ValueError("sequential: expected batches to fit the maps on")
        check_sequential(model, refit_mlp=refit_mlp)
        if iter(batches) is batches:  # a generator, which the criterion may read as well
            batches = list(batches)
    layers = chosen_layers(model, cal, layers, criterion, batches, **options)
    if sequential and layers:
        check_attention(model, layers)
        seen = {"features": cal.features, "memory": cal.memory}
        cal = fit_sequentially(model, batches, layers, **seen, refit_mlp=refit_mlp, **options)
    replacements = linear_layers(model, cal, layers, **options, maps=maps)
    for i in cal.down_proj:
        check_plain(model.model.layers[i], f"refit_mlp: model.layers.{i}")
    _replace(model, replacements, cal.down_proj)
    return model


def linear_layers(
    model: PreTrainedModel,
    cal: Calibration,
    layers: list[int],
    *,
    ridge: float,
    bias: bool,
    rank: int | None,
    maps: Mapping[int, nk.Lmmse] | None,
) -> dict[int, LinearizedDecoderLayer]:
    """What :func:`linearize` puts into the model in the place of `layers`, as chosen_layers gave
    them. The model is not changed; ValueError for maps that do not fit."""
    if layers and cal.sequential is not None and sorted(layers) != cal.layers:
        raise ValueError(
            f"layers: expected {cal.layers}, whose maps were fitted together by a sequential "
            f"calibration, got {layers}"
        )
    if maps is None:
        maps = cal.solve(ridge=ridge, bias=bias, rank=rank, layers=layers)
    replacements = {}
    for i in layers:
        if i not in maps:
            raise ValueError(f"maps has no map for layer {i}")
        spec = map_spec(maps[i], features=cal.features, bias=bias, rank=rank)
        replacements[i] = linear_layer(_template(model, i, spec), spec, maps[i], i)
    return replacements


def windowed_layers_of(
    model: PreTrainedModel, layers: list[int], window: Window
) -> dict[int, torch.nn.Module]:
    """What :func:`linearize` puts into the model in the place of `layers`, with a window."""
    spec = LayerSpec.of_window(window)
    return {i: windowed_layer(_template(model, i, spec), spec, i) for i in layers}


def chosen_layers(
    model: PreTrainedModel,
    cal: Calibration | None,
    layers: int | Iterable[int],
    criterion: str,
    batches: Iterable[Any] | None,
    *,
    window: Window | None = None,
    **options: Any,
) -> list[int]:
    """The ids that linearize's `layers` means, checked, the first to be replaced in front."""
    if isinstance(layers, int) and not isinstance(layers, bool):
        if cal is None:
            raise ValueError(f"cal: expected a calibration to choose {layers} layers by, got None")
        cal.check_model(model)
        gone = linearized_layers(model) if window is None else layer_specs(model.config)
        eligible = (set(range(model.config.num_hidden_layers)) - set(gone)) & set(cal.layers)
        if not 0 <= layers <= len(eligible):
            raise ValueError(
                f"layers: expected a number from 0 to {len(eligible)} (calibrated layers that "
                f"still have {'attention' if window is None else 'all of their attention'}), got "
                f"{layers}"
            )
        more: dict[str, Any] = {"count": layers} if criterion == "greedy" else {}
        measured = {"model": model, "batches": batches, "window": window}
        order = cal.rank(criterion, **measured, **options, **more) if layers else []
        layers = [score.layer for score in order if score.layer in eligible][:layers]
    layers = check_layers(model, layers)
    if window is not None:
        return layers
    missing = [i for i in layers if i not in cal.layers]
    if missing:
        raise ValueError(f"layers {missing} are not in the calibration, which has {cal.layers}")
    return layers


def drop(model: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
    """Removes the attention of these layers, in place: h = x, with no map and no KV cache.

    The baseline that linear maps are compared with. `layers`: ids; a linearized layer loses its
    map.
    Undone by :func:`restore`. Returns model. ValueError as :func:`linearize`, the model untouched.
    """
    family_of(model)
    check_no_draft(model)
    check_one_device(model)
    spec = LayerSpec("drop")
    layers = check_layers(model, layers)
    _replace(model, {i: LinearizedDecoderLayer(_template(model, i, spec), spec) for i in layers})
    return model


def forget_originals(model: PreTrainedModel) -> None:
    """Frees the layers that were kept aside for :func:`restore`."""
    vars(model).pop(_ORIGINALS, None)
    vars(model).pop(_ORIGINAL_DOWN, None)


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes every :func:`linearize`, :func:`drop` and :func:`nbl.optimize`, in place.

    Windows that came with a checkpoint open, too: their attention is all there.

    The model gets its own decoder layers, class and configuration back: the same objects, so its
    logits are bit-identical to what they were. They follow the model to another device or dtype, if
    it was moved meanwhile. A model to which nothing was done is left as it is. Returns model.

    Linearized layers that came with a checkpoint have no original to return to. Such a model, where
    it was optimized, is only un-optimized. Quantized weights are exchanged for the original ones,
    bit for bit, where ``nbl.optimize(…, keep_original=True)`` kept them.

    Raises:
        ValueError: a quantized model whose original weights are gone, a model with maps of a
            checkpoint that is not optimized, a draft. It is untouched.
    """
    family = family_of(model)
    check_no_draft(model)
    if has_lost_weights(model):
        raise ValueError(
            "the model was quantized by nbl.optimize(…, weights=…) and its original weights are "
            "gone: load the model again, or optimize with keep_original=True what is to be restored"
        )
    optimized = any(isinstance(layer, FusedLayer) for layer in model.model.layers)
    originals = vars(model).get(_ORIGINALS, {})
    for module in (*model.model.layers, *originals.values(), model.lm_head):
        restore_linears(module, like=model.model.norm.weight)
        unfuse(module)
    if type(model) is family.causal_lm:
        return model
    lost = [i for i in linearized_layers(model) if i not in originals]
    if lost and optimized:
        return model
    if lost:
        raise ValueError(
            f"layers {lost} were loaded from a checkpoint as linear maps; their attention is "
            "not in it: load the original model instead"
        )
    for i in windowed_layers(model):  # from a checkpoint: all of the attention is there
        if i not in originals:
            originals[i] = whole_layer(model.model.layers[i])
    layers = model.model.layers
    for i, original in originals.items():
        current = layers[i]
        _follow(original, current)
        original.train(current.training)
        share_checkpointing(current, original)
        layers[i] = original
    for i, weight in vars(model).pop(_ORIGINAL_DOWN, {}).items():
        linear = layers[i].mlp.down_proj
        _move(weight, like=linear.weight)
        linear.weight = weight
    vars(model).pop(_ORIGINALS, None)
    model.__class__ = family.causal_lm
    model.model.__class__ = family.model
    del model.config.nbl
    vars(model.config).pop("model_type", None)  # a checkpoint's
    model.config.__class__ = family.config
    return model


@contextmanager
def original_layers(model: PreTrainedModel) -> Iterator[dict[int, torch.nn.Module]]:
    """{layer: the one that :func:`restore` would give back}, and refitted down projections as they
    were, for the length of the block. The linearized layers stay in the model.

    ValueError where an original is gone: the layer came with a checkpoint.
    """
    kept = dict(vars(model).get(_ORIGINALS, {}))
    lost = [i for i in linearized_layers(model) if i not in kept]
    if lost:
        raise ValueError(f"the attention of layers {lost} is not in memory")
    for i in windowed_layers(model):
        if i not in kept:
            kept[i] = whole_layer(model.model.layers[i])
    layers = dict(enumerate(model.model.layers)) | kept
    for i, layer in kept.items():
        _follow(layer, model.model.layers[i])
    fitted = {}
    try:
        for i, weight in vars(model).get(_ORIGINAL_DOWN, {}).items():
            linear = layers[i].mlp.down_proj
            fitted[i] = linear.weight
            _move(weight, like=linear.weight)
            linear.weight = weight
        yield layers
    finally:
        for i, weight in fitted.items():
            layers[i].mlp.down_proj.weight = weight


def _follow(original: torch.nn.Module, current: torch.nn.Module) -> None:
    """A layer that was kept aside goes where the model went meanwhile."""
    like = current.post_attention_layernorm.weight
    original.to(device=like.device, dtype=like.dtype)


def _move(weight: torch.nn.Parameter, like: torch.Tensor) -> None:
    weight.data = weight.data.to(device=like.device, dtype=like.dtype)


def _template(model: PreTrainedModel, layer_id: int, spec: LayerSpec) -> torch.nn.Module:
    """What to build a replacement from: the original (it has all norms), if there."""
    current = model.model.layers[layer_id]
    layer = vars(model).get(_ORIGINALS, {}).get(layer_id, current)
    if (
        spec.kind == "linear"
        and spec.features == "post-norm"
        and not hasattr(layer, "input_layernorm")
    ):
        raise ValueError(
            f"layer {layer_id} was loaded from a checkpoint without an input norm, or quantized "
            "without keep_original; it cannot get a map of post-norm features"
        )
    return layer


def _replace(
    model: PreTrainedModel,
    replacements: Mapping[int, torch.nn.Module],
    down_proj: Mapping[int, torch.Tensor] | None = None,
) -> None:
    """Cannot fail half way: everything was built and checked before."""
    if not replacements:
        return
    before = replaced_specs(model.model)
    become_nbl(model)
    originals = vars(model).setdefault(_ORIGINALS, {})
    restorable = not has_lost_weights(model)
    layers = model.model.layers
    for i, replacement in replacements.items():
        if restorable and i not in originals:
            if i not in before:
                originals[i] = layers[i]
            elif before[i].kind == "window":
                originals[i] = whole_layer(layers[i])
        replacement.train(layers[i].training)
        if isinstance(layers[i], FusedLayer):  # an optimized model stays one
            unfuse(layers[i])
            fuse(replacement)
        layers[i] = replacement
    model.config.nbl = config_entry(replaced_specs(model.model))
    for i, weight in (down_proj or {}).items():
        linear = layers[i].mlp.down_proj
        vars(model).setdefault(_ORIGINAL_DOWN, {}).setdefault(i, linear.weight)
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        needs_gradient = linear.weight.requires_grad
        linear.weight = torch.nn.Parameter(weight.to(**like, copy=True), needs_gradient)
