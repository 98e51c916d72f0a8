"""All that nbl knows of transformers' names, signatures and internals.

What changes between its versions is found by looking at what is installed, once, here; the rest of
nbl asks this module. What cannot be found by looking is found by trying: :mod:`nbl.selfcheck`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.generation.continuous_batching import cache as paged
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

__all__ = [
    "CACHE",
    "FAMILY_NAMES",
    "MODELING",
    "NORMS",
    "TESTED",
    "Cache",
    "CacheLayerMixin",
    "GradientCheckpointingLayer",
    "append_entries",
    "attend",
    "capture_once",
    "check_croppable",
    "execution_device",
    "forget_gguf",
    "forward_arguments",
    "gguf_arguments",
    "give_no_pages",
    "is_capturing_hook",
    "is_tested",
    "length_after_crop",
    "new_cache",
    "output_cache",
    "record_hidden_states",
    "rotation_table",
    "share_checkpointing",
    "sliding_window",
    "take_cache",
    "take_over",
    "tested_range",
    "warn_untested",
]

# --- versions ------------------------------------------------------------------------------------

# The oldest and the newest minor version whose whole test suite passed; pyproject.toml has them
# too.
TESTED = ((5, 17), (5, 24))


def is_tested() -> bool:
    """Whether the transformers that is installed lies in the range that nbl was tested with."""
    oldest, newest = TESTED
    return oldest <= tuple(map(int, transformers.__version__.split(".")[:2])) <= newest


def tested_range() -> str:
    """As in "5.17 to 5.24"."""
    return " to ".join(".".join(map(str, version)) for version in TESTED)


def warn_untested() -> None:
    """One line, where another version is installed."""
    if not is_tested():
        warnings.warn(
            f"nbl was tested with transformers {tested_range()}, this is {transformers.__version__}"
            "; a small model is tried before one is optimized (nbl doctor tries it now)",
            stacklevel=2,
        )


# --- the families' modules -----------------------------------------------------------------------

# A model type of transformers, and what the names of its classes begin with: a family that is made
# of the same parts is added by its row.
FAMILY_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
MODELING = {
    name: importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    for model_type, name in FAMILY_NAMES.items()
}
# RMSNorm(x)·weight with an epsilon called variance_epsilon, as the kernels compute it.
NORMS = tuple(getattr(module, f"{name}RMSNorm") for name, module in MODELING.items())

# --- how a cache is handed over ------------------------------------------------------------------

_FORWARD = tuple(inspect.signature(MODELING["Llama"].LlamaModel.forward).parameters)[1:]
_LAYER = inspect.signature(MODELING["Llama"].LlamaDecoderLayer.forward).parameters
# The argument's name, then its older ones, which transformers goes on taking from its users.
_CACHE_NAMES = tuple(name for name in ("cache", "past_key_values") if name in _LAYER)
if _CACHE_NAMES == ("cache",):
    _CACHE_NAMES = ("cache", "past_key_values")
# Where neither is known, nothing is handed over: the self-check sees it.
CACHE = _CACHE_NAMES[0] if _CACHE_NAMES else "cache"


def take_cache(arguments: dict[str, Any]) -> Any:
    """The cache among the keyword arguments of a layer or a model, which lose it; None: there is
    none."""
    cache = None
    for name in _CACHE_NAMES:
        given = arguments.pop(name, None)
        cache = given if cache is None else cache
    return cache


def forward_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a base model's forward by their names, the cache under its present one."""
    arguments = dict(zip(_FORWARD, args)) | kwargs
    arguments[CACHE] = take_cache(arguments)
    return arguments


def output_cache(outputs: Any) -> Cache:
    """What a forward pass with use_cache returned."""
    return getattr(outputs, CACHE)


def new_cache(config: PreTrainedConfig) -> Cache:
    """As a model makes one where it is given none."""
    return DynamicCache(config=config)


# --- what a cache does ---------------------------------------------------------------------------


def append_entries(cache: Cache, count: int) -> None:
    """DynamicCache() appends entries when they are first written to, which those of linearized
    layers never are: it gets all of them now."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < count:
            cache.layers.append(cache.layer_class_to_replicate())


def length_after_crop(length: int, argument: int) -> int:
    """How many of `length` tokens ``crop(argument)`` leaves; or its error. What the argument means
    has changed between versions: an entry with tiny keys is asked."""
    entry = DynamicLayer()
    keys = torch.empty(1, 1, length, 1, dtype=torch.bool)
    entry.update(keys, keys)
    entry.crop(argument)
    return entry.get_seq_length()


def check_croppable(entry: CacheLayerMixin) -> None:
    """NotImplementedError for an entry that transformers cannot shorten."""
    if not hasattr(entry, "crop"):
        raise NotImplementedError(
            f"crop: transformers {transformers.__version__} has none for a {type(entry).__name__}, "
            "which this cache holds"
        )


def give_no_pages(linearized: Callable[[PreTrainedConfig], Iterable[int]]) -> None:
    """The paged cache of continuous batching has pages for every layer of a config but those that
    `linearized` names; for a stock config it names none."""
    group = paged.group_layers_by_attn_type
    if hasattr(group, "__wrapped__"):
        return

    @functools.wraps(group)
    def group_kept_layers(config: PreTrainedConfig) -> Any:
        without = set(linearized(config))
        if not without:
            return group(config)
        kept = [i for i in range(config.num_hidden_layers) if i not in without]
        small = copy.copy(config)
        small.num_hidden_layers = len(kept)
        if getattr(config, "layer_types", None) is not None:
            small.layer_types = [config.layer_types[i] for i in kept]
        return _renumbered(group(small), kept)

    paged.group_layers_by_attn_type = group_kept_layers


def _renumbered(groups: Any, ids: list[int]) -> Any:
    """Groups of layers, however nested, with ids[i] for i."""
    if isinstance(groups, int):
        return ids[groups]
    if isinstance(groups, Mapping):
        return {key: _renumbered(value, ids) for key, value in groups.items()}
    if isinstance(groups, list | tuple):
        return type(groups)(_renumbered(value, ids) for value in groups)
    return groups


# --- attention -----------------------------------------------------------------------------------


def sliding_window(attention: nn.Module) -> int | None:
    """How many tokens this attention sees, itself included; None: all."""
    if isinstance(attention, MODELING["Mistral"].MistralAttention):
        return attention.config.sliding_window
    return getattr(attention, "sliding_window", None)


def attend(
    attention: nn.Module,
    modeling: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    past: Cache | None,
    **kwargs: Any,
) -> Tensor:
    """What a stock attention does between its projections: rotates q and k (B, heads, T, D), puts
    k and v into the cache, attends.

    modeling: the module of its family. Returns (B, T, heads, D).
    """
    q, k = modeling.apply_rotary_pos_emb(q, k, *position_embeddings)
    if past is not None:
        k, v = past.update(k, v, attention.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, modeling.eager_attention_forward
    )
    y, _ = function(
        attention,
        q,
        k,
        v,
        attention_mask,
        dropout=0.0,
        scaling=attention.scaling,
        sliding_window=sliding_window(attention),
        **kwargs,
    )
    return y


@torch.no_grad()
def rotation_table(model: PreTrainedModel, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, float32 (length, D / 2), as nk.rope_append takes them: by the
    model's own module, which knows every scaling, and says each angle twice.

    ValueError for a model whose angles depend on the length of the text.
    """
    rotary = model.model.rotary_emb
    if rotary.rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_type {rotary.rope_type!r}: positions would change with the length of the text; "
            "use model.generate"
        )
    device = model.model.norm.weight.device
    positions = torch.arange(length, device=device)[None]
    tables = rotary(torch.empty(0, device=device), positions)
    cos, sin = (t[0, :, : t.shape[-1] // 2].contiguous() for t in tables)
    return cos, sin


def execution_device(module: nn.Module) -> torch.device:
    """Where a module with a weight computes: accelerate may keep the weight elsewhere meanwhile."""
    device = module.weight.device
    if device.type == "meta" and hasattr(module, "_hf_hook"):
        return torch.device(module._hf_hook.execution_device)
    return device


# --- what a decoder layer carries with it -------------------------------------------------------


def take_over(layer: nn.Module, replacement: nn.Module) -> None:
    """The mode, the gradient checkpointing and the hooks of a decoder layer pass to another. Hooks
    (transformers' own for output_hidden_states among them) mean the layer at this depth, whatever
    computes it: one set of them for both."""
    replacement.training = layer.training
    share_checkpointing(layer, replacement)
    for name in vars(layer):
        if "hooks" in name:
            setattr(replacement, name, getattr(layer, name))


def share_checkpointing(layer: nn.Module, other: nn.Module) -> None:
    """The other layer recomputes its activations as this one does, or does not."""
    other.gradient_checkpointing = layer.gradient_checkpointing
    if layer.gradient_checkpointing:
        other._gradient_checkpointing_func = layer._gradient_checkpointing_func


# --- output_hidden_states ------------------------------------------------------------------------


def record_hidden_states(model: type[PreTrainedModel], layer: type[nn.Module]) -> None:
    """The class records what this kind of layer returns, too; and keeps it on one device."""
    recorded = dict(model._can_record_outputs)
    recorded["hidden_states"] = [recorded["hidden_states"], layer]
    model._can_record_outputs = recorded


def is_capturing_hook(hook: Callable[..., Any]) -> bool:
    """Whether a hook is transformers' own, which stays once output_hidden_states was asked for."""
    return hook.__module__ == output_capturing.__name__


def capture_once(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """transformers hooks the layers once per base model: these two share layers."""
    output_capturing.maybe_install_capturing_hooks(model)
    other._output_capturing_hooks_installed = True


# --- GGUF files ----------------------------------------------------------------------------------


def gguf_arguments(file: str) -> dict[str, Any]:
    """Of `from_pretrained`, for plain weights from a file: newer versions may leave quantized ones
    in their blocks."""
    config = getattr(transformers, "GgufConfig", None)
    plain = {} if config is None else {"quantization_config": config(dequantize=True)}
    return {"gguf_file": file, **plain}


def forget_gguf(model: PreTrainedModel) -> None:
    """A model from a GGUF file whose weights are plain is like any other, and can be saved: newer
    versions still call it quantized."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not getattr(getattr(quantizer, "quantization_config", None), "dequantize", False):
        return
    if type(quantizer).__name__ != "GgufHfQuantizer":
        return
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
