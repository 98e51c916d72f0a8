"""The NBL counterparts of the supported transformers models.

A linearized model is the stock model with some decoder layers replaced by
:class:`LinearizedDecoderLayer`; everything else, from the embedding to ``generate``, is
transformers' own code. What a stock model cannot do is taken care of here, once:

* ``config.nbl`` says which layers were replaced, so that a checkpoint can be rebuilt;
* a cache keeps nothing for them but, where there is one, the state of a memory or the keys of a
  window (:mod:`nbl.layers.cache`), and still answers what transformers asks its first layer;
* a checkpoint that lacks a map is refused (transformers would fill in random numbers and warn).

``config.layer_types`` is left alone: Qwen looks its masks up by it, and ``generate`` prepares no
masks for a compiled static cache once it contains a type without attention.

The classes (``NblLlamaConfig``, ``NblLlamaModel``, ``NblLlamaForCausalLM``, and so for every family
of ``upstream.FAMILY_NAMES``) are derived from the stock ones by their names.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from .layers.cache import EmptyCacheLayer, prepare_entries
from .layers.linearized import LinearizedDecoderLayer
from .layers.quantized import quantized_linears
from .layers.spec import (
    FORMAT_VERSION,
    LayerSpec,
    config_entry,
    layer_specs,
    linearized_layers,
    windowed_layers,
)
from .layers.tokens import TokenSpan, has_memory, reads_spans, replaced_specs
from .layers.windowed import windowed_layer
from .saving import as_published
from .upstream import (
    CACHE,
    FAMILY_NAMES,
    Cache,
    forget_gguf,
    forward_arguments,
    give_no_pages,
    new_cache,
    record_hidden_states,
)

__all__ = [
    "FAMILIES",
    "EmptyCacheLayer",
    "Family",
    "LayerSpec",
    "LinearizedDecoderLayer",
    "TokenSpan",
    "become_nbl",
    "family_of",
    "linearized_layers",
    "model_type_of",
]

# --- what config.nbl says ------------------------------------------------------------------------


class NblConfigMixin:
    """A stock configuration with ``nbl``, checked when a checkpoint is read."""

    def __post_init__(self, nbl: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.nbl = config_entry({}) if nbl is None else nbl
        if not isinstance(self.nbl, dict) or self.nbl.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"config.nbl: expected a dict with format_version {FORMAT_VERSION}, "
                f"got {self.nbl!r}; written by another version of nbl?"
            )
        try:
            specs = layer_specs(self)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"config.nbl['layers']: {error}") from error
        beyond = [i for i in specs if not 0 <= i < self.num_hidden_layers]
        if beyond:
            raise ValueError(
                f"config.nbl names layers {beyond}, the model has {self.num_hidden_layers} layers"
            )


# --- the models ----------------------------------------------------------------------------------


class NblPreTrainedMixin:
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', but ValueError for a quantized model, before anything is written: no
        checkpoint format of transformers would say what the numbers mean. The generation config is
        saved as it is, also where transformers would rather have it changed."""
        quantized = next(quantized_linears(self), None)
        if quantized is not None:
            raise ValueError(
                f"the model's weights are quantized to {quantized.format}, which a checkpoint "
                "cannot hold: save it before nbl.optimize(…, weights=…), or after nbl.restore, and "
                "optimize what is loaded"
            )
        actual, named = replaced_specs(self.base_model), layer_specs(self.config)
        if actual != named:
            raise ValueError(
                f"config.nbl names the layers {list(named)} as replaced, the model has such layers "
                f"at {list(actual)}: its layers were changed after linearizing. Cut the original "
                "first (nbl.restore gives it back), then linearize"
            )
        with as_published(self):
            super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', but ValueError when a map is missing from the checkpoint or has another
        shape than the configuration says."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        maps = {
            f"{prefix}layers.{i}.{name}"
            for i in layer_specs(model.config)
            for name, _ in model.base_model.layers[i].named_parameters()
        }
        lost = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
        lost = sorted(maps & (lost | set(info["missing_keys"])))
        if lost:
            raise ValueError(
                "the checkpoint lacks weights of replaced layers, or has them in another shape: "
                f"{lost}; it is incomplete or was changed after nbl saved it"
            )
        return (model, info) if output_loading_info else model


class NblModelMixin(NblPreTrainedMixin):
    """A stock base model; the layers that ``config.nbl`` names are replaced."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        record_hidden_states(cls, LinearizedDecoderLayer)
        cls._no_split_modules = [*cls._no_split_modules, "LinearizedDecoderLayer"]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.replace_layers()

    def replace_layers(self) -> None:
        """Replaces the stock layers that ``config.nbl`` names; maps are not yet set."""
        for i, spec in layer_specs(self.config).items():
            if spec.kind == "window":
                self.layers[i] = windowed_layer(self.layers[i], spec, i)
            else:
                self.layers[i] = LinearizedDecoderLayer(self.layers[i], spec)

    def forward(self, *args: Any, token_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The stock forward, with a cache that has no keys for the linearized layers and few for
        those with a window.

        token_mask: (B, T) of the new tokens, 0 where padding: what a memory or a window needs to
        know where the attention_mask is not 2-dimensional. ``generate`` passes it on.
        """
        kwargs = forward_arguments(args, kwargs)
        use_cache, cache = kwargs.get("use_cache"), kwargs[CACHE]
        if use_cache is None:
            use_cache = self.config.use_cache and not (
                self.gradient_checkpointing and self.training
            )
        if use_cache and cache is None:
            cache = new_cache(self.config)
        kwargs |= {"use_cache": use_cache, CACHE: cache}
        ids = kwargs.get("input_ids")
        rows, length = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        cached = isinstance(cache, Cache)
        if cached:
            prepare_entries(cache, self.config.num_hidden_layers, replaced_specs(self))
        if reads_spans(self):
            positions = None if cached else kwargs.get("position_ids")  # packed texts: for training
            mask = kwargs.get("attention_mask")
            span = _token_span((rows, length), mask, positions, token_mask)
            if span is not None:
                kwargs["token_span"] = span
        outputs = super().forward(**kwargs)
        if cached:
            for entry in cache.layers:
                if isinstance(entry, EmptyCacheLayer):
                    entry.advance(length)
        return outputs


def _token_span(
    shape: tuple[int, int],
    attention_mask: Any,
    position_ids: Tensor | None,
    token_mask: Tensor | None,
) -> TokenSpan | None:
    """What a memory or a window is to know of the new tokens (B, T); None: nothing."""
    rows, length = shape
    if token_mask is None:
        token_mask = attention_mask
    if token_mask is not None:
        if not isinstance(token_mask, Tensor) or token_mask.ndim != 2:
            what = getattr(token_mask, "shape", type(token_mask).__name__)
            raise ValueError(
                "attention_mask: a model with a memory or a window needs one of shape (batch, "
                f"tokens), or token_mask of that shape beside it, got {what}"
            )
        mask = token_mask[:, -length:].bool()
        # Nobody waits for a GPU, or compiles a branch, to learn that there is no padding.
        if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
            return None
        return TokenSpan(mask=mask)
    if position_ids is None:
        return None
    # As transformers tells packed sequences: the positions do not go on by one.
    new = torch.diff(position_ids, dim=-1) != 1
    if not torch.compiler.is_compiling() and not bool(new.any()):
        return None
    first = new.new_zeros(len(new), 1)
    return TokenSpan(starts=torch.cat([first, new], dim=1).expand(rows, length))


class NblForCausalLMMixin(NblPreTrainedMixin):
    """A stock causal LM around an NBL base model."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._no_split_modules = [*cls._no_split_modules, "LinearizedDecoderLayer"]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        become_nbl(self)
        self.model.replace_layers()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with pages for the layers with attention only. ValueError for a model
        with a memory or windows: a page holds keys of tokens, not the state of a sequence."""
        own = linearized_layers(self)
        if has_memory(self.model):
            raise ValueError(
                "continuous batching has no room for the states of layers with a memory: use "
                "generate or nbl.Runner"
            )
        if windowed_layers(self):
            raise ValueError(
                f"continuous batching has no pages for the windows of layers "
                f"{windowed_layers(self)}: use generate or nbl.Runner"
            )
        if len(own) == self.config.num_hidden_layers:
            raise ValueError(
                "continuous batching counts tokens by pages of keys, and every layer of this model "
                "is linear: use generate or nbl.Runner"
            )
        give_no_pages(linearized_layers)
        return super().init_continuous_batching(*args, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # its signature is looked at
    def prepare_inputs_for_generation(
        self, *args: Any, attention_mask: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers', which makes the mask 4-dimensional for a static cache: a memory or a
        window is told before which tokens are padding."""
        inputs = super().prepare_inputs_for_generation(
            *args, attention_mask=attention_mask, **kwargs
        )
        if not reads_spans(self.model):
            return inputs
        ids = inputs.get("input_ids")
        new = inputs["inputs_embeds"] if ids is None else ids
        if attention_mask is None:
            inputs["token_mask"] = new.new_ones(new.shape[:2], dtype=torch.bool)
        elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            inputs["token_mask"] = attention_mask[:, -new.shape[1] :]
        return inputs


# --- the registry --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One supported architecture: its stock classes and their NBL counterparts."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    nbl_config: type[PreTrainedConfig]
    nbl_model: type[PreTrainedModel]
    nbl_causal_lm: type[PreTrainedModel]


def _counterpart(mixin: type, stock: type, **attributes: Any) -> type:
    """The NBL class of a stock one: Nbl before its name, a name of this module."""
    name = f"Nbl{stock.__name__}"
    globals()[name] = type(name, (mixin, stock), {"__module__": __name__, **attributes})
    return globals()[name]


def _family(model_type: str, name: str) -> Family:
    """The NBL classes of a family, made and known to transformers' Auto classes."""
    config, model, causal_lm = (
        getattr(transformers, name + kind) for kind in ("Config", "Model", "ForCausalLM")
    )
    nbl_config = _counterpart(NblConfigMixin, config, model_type=f"nbl_{model_type}")
    nbl_model = _counterpart(NblModelMixin, model, config_class=nbl_config)
    nbl_causal_lm = _counterpart(NblForCausalLMMixin, causal_lm, config_class=nbl_config)
    AutoConfig.register(nbl_config.model_type, nbl_config)
    AutoModel.register(nbl_config, nbl_model)
    AutoModelForCausalLM.register(nbl_config, nbl_causal_lm)
    return Family(config, model, causal_lm, nbl_config, nbl_model, nbl_causal_lm)


FAMILIES = {model_type: _family(model_type, name) for model_type, name in FAMILY_NAMES.items()}


def model_type_of(model: PreTrainedModel) -> str:
    """The stock model type: "llama" for a LlamaForCausalLM and for an NblLlamaForCausalLM."""
    return model.config.model_type.removeprefix("nbl_")


def family_of(model: PreTrainedModel) -> Family:
    """The registry's entry for a causal LM, stock or linearized.

    ValueError, naming the type and the supported ones, for anything else: a subclass or a wrapper
    is not known to keep its meaning when layers are exchanged.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    family = FAMILIES.get(model_type.removeprefix("nbl_"))
    if family is None:
        raise ValueError(f"unsupported model type {model_type!r}; supported: {', '.join(FAMILIES)}")
    if type(model) not in (family.causal_lm, family.nbl_causal_lm):
        raise ValueError(
            f"unsupported model class {type(model).__name__}; "
            f"expected {family.causal_lm.__name__} or {family.nbl_causal_lm.__name__}"
        )
    return family


@functools.cache
def _announce_outputs(family: Family) -> None:
    """transformers learns what a class records (output_hidden_states) when one is constructed."""
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    with torch.device("meta"):
        family.nbl_model(family.nbl_config(num_hidden_layers=0, num_key_value_heads=1, **tiny))


def become_nbl(model: PreTrainedModel) -> None:
    """A stock causal LM, its base model and its config take their NBL classes, in place; no layer
    changes. The config object stays the same: the attention modules hold it too."""
    family = family_of(model)
    _announce_outputs(family)
    forget_gguf(model)
    model.config.__class__ = family.nbl_config
    if getattr(model.config, "nbl", None) is None:
        model.config.nbl = config_entry({})
    model.__class__ = family.nbl_causal_lm
    model.model.__class__ = family.nbl_model


__all__ += [name for name in globals() if name.startswith("Nbl")]
