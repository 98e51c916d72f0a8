"""The NBL counterparts of the supported transformers models.

A linearized model is the stock model with some decoder layers replaced by
:class:`LinearizedDecoderLayer`; everything else, from the embedding to ``generate``, is
transformers' own code. What a stock model cannot do is taken care of here, once:

* ``config.nbl`` says which layers are linear maps, so that a checkpoint can be rebuilt;
* a cache keeps nothing for them but, where there is one, the state of a memory (:mod:`nbl.cache`),
  and still answers the questions that transformers asks its first layer;
* a checkpoint that lacks a map is refused (transformers would fill in random numbers and warn).

``config.layer_types`` is left alone: Qwen looks its masks up by it, and ``generate`` prepares no
masks for a compiled static cache once it contains a type without attention.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import nbl_kernels as nk
from nbl_kernels.memory import Filters, remember

from .batches import Batch
from .cache import EmptyCacheLayer, prepare_entries
from .plain import all_are_observed, is_plain_linear, is_plain_norm
from .quantized import quantized_linears, scale_of
from .saving import as_published
from .upstream import (
    CACHE,
    Cache,
    forward_arguments,
    give_no_pages,
    new_cache,
    record_hidden_states,
    take_cache,
)

__all__ = [
    "FAMILIES",
    "EmptyCacheLayer",
    "Family",
    "LayerSpec",
    "LinearizedDecoderLayer",
    "MemorySpan",
    "NblLlamaConfig",
    "NblLlamaForCausalLM",
    "NblLlamaModel",
    "NblMistralConfig",
    "NblMistralForCausalLM",
    "NblMistralModel",
    "NblQwen2Config",
    "NblQwen2ForCausalLM",
    "NblQwen2Model",
    "NblQwen3Config",
    "NblQwen3ForCausalLM",
    "NblQwen3Model",
    "family_of",
    "linearized_layers",
]

_FORMAT_VERSION = 1


# --- what config.nbl says ------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSpec:
    """What stands in the place of one attention.

    kind: ``"linear"``, the map ``y = W f + b``, or ``"drop"``, nothing (``y = 0``); with ``"drop"``
    the other fields are at their defaults.
    features: ``"post-norm"``, f = RMSNorm(x) with the layer's own weight, or ``"pre-norm"``, f = x.
    rank: None for a full ``W`` (d, d), else W = U V is stored as U (d, rank) and V (rank, d).
    lags, decays: of a map with a memory (:class:`nbl.Memory`); both empty: there is none.
    """

    kind: Literal["linear", "drop"]
    features: Literal["pre-norm", "post-norm"] = "post-norm"
    bias: bool = False
    rank: int | None = None
    lags: tuple[int, ...] = ()
    decays: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "drop"):
            raise ValueError(f"kind must be 'linear' or 'drop', got {self.kind!r}")
        if self.features not in ("pre-norm", "post-norm"):
            raise ValueError(f"features must be 'pre-norm' or 'post-norm', got {self.features!r}")
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias must be a bool, got {self.bias!r}")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(f"rank must be None or a positive int, got {self.rank!r}")
        filters = Filters(self.lags, self.decays)
        object.__setattr__(self, "lags", filters.lags)
        object.__setattr__(self, "decays", filters.decays)
        object.__setattr__(self, "filters", filters)  # no field: it follows from two of them

    @property
    def has_memory(self) -> bool:
        return bool(self.lags or self.decays)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a map without a memory says nothing of one."""
        entry = asdict(self)
        for name in ("lags", "decays"):
            values = entry.pop(name)
            if self.has_memory:
                entry[name] = list(values)
        return entry


def layer_specs(config: PreTrainedConfig) -> dict[int, LayerSpec]:
    """{layer: LayerSpec} of the linearized layers, in order; {} for a stock config."""
    layers = (getattr(config, "nbl", None) or {}).get("layers", {})
    return {i: LayerSpec(**layers[str(i)]) for i in sorted(map(int, layers))}


def config_entry(specs: Mapping[int, LayerSpec]) -> dict[str, Any]:
    """``config.nbl`` for these layers (JSON: the keys are strings)."""
    layers = {str(i): specs[i].as_dict() for i in sorted(specs)}
    return {"format_version": _FORMAT_VERSION, "layers": layers}


def linearized_layers(model: PreTrainedModel | PreTrainedConfig) -> list[int]:
    """Ids of the layers of a model (or of a config) that have no attention any more, ascending."""
    return list(layer_specs(model if isinstance(model, PreTrainedConfig) else model.config))


class NblConfigMixin:
    """A stock configuration with ``nbl``, checked when a checkpoint is read."""

    def __post_init__(self, nbl: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.nbl = config_entry({}) if nbl is None else nbl
        if not isinstance(self.nbl, dict) or self.nbl.get("format_version") != _FORMAT_VERSION:
            raise ValueError(
                f"config.nbl: expected a dict with format_version {_FORMAT_VERSION}, "
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


# --- the layer -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemorySpan:
    """Which tokens (B, T) of a forward pass a memory sees: mask False, padding; starts True, the
    first of a packed sequence. None: all, none."""

    mask: Tensor | None = None
    starts: Tensor | None = None


class LinearizedDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer whose attention is linear: h = x + W f(x) + b, then h + MLP(RMSNorm(h)).

    Made from a stock decoder layer, with which it shares the modules that stay (``mlp``,
    ``post_attention_layernorm`` and, for post-norm features, ``input_layernorm``) and the hooks.
    The map is ``linear`` (d, d) or, of reduced rank, ``linear_v`` (rank, d) followed by
    ``linear_u`` (d, rank); a dropped attention has neither. In the weights' dtype, accumulated in
    float32.

    With a memory, h = x + W φ(x) + b, φ of P branches (:mod:`nbl_kernels.memory`). ``linear_v`` is
    then (P rank, d), the branches one after another; of full rank it is (P d, d) beside
    ``linear_bias``, and there is no ``linear_u``. The state is in the cache
    (:class:`nbl.cache.MemoryCacheLayer`).
    """

    def __init__(self, layer: nn.Module, spec: LayerSpec) -> None:
        super().__init__()
        norm = layer.post_attention_layernorm.weight
        size = norm.shape[0]
        self.spec = spec
        self.layer_idx = getattr(layer, "self_attn", layer).layer_idx
        if spec.kind == "linear":
            if spec.features == "post-norm":
                self.input_layernorm = layer.input_layernorm
            if spec.rank is not None:
                branches = spec.filters.branches
                self.linear_v = _zero_linear(size, branches * spec.rank, False, norm)
                self.linear_u = _zero_linear(spec.rank, size, spec.bias, norm)
            elif spec.has_memory:
                self.linear_v = _zero_linear(size, spec.filters.branches * size, False, norm)
                bias = nn.Parameter(torch.zeros_like(norm)) if spec.bias else None
                self.register_parameter("linear_bias", bias)
            else:
                self.linear = _zero_linear(size, size, spec.bias, norm)
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp
        self.training = layer.training
        if layer.gradient_checkpointing:
            self.gradient_checkpointing = True
            self._gradient_checkpointing_func = layer._gradient_checkpointing_func
        # A hook on a decoder layer, transformers' own for output_hidden_states among them, means
        # the layer at this depth, whatever computes it: one set of hooks for both.
        for name in vars(layer):
            if "hooks" in name:
                setattr(self, name, getattr(layer, name))

    @property
    def map_shapes(self) -> list[tuple[int, ...]]:
        """Of what :meth:`set_map` takes: the weight or the factors, then the bias."""
        size, rank = self.post_attention_layernorm.weight.shape[0], self.spec.rank
        features = self.spec.filters.branches * size
        shapes = [(size, features)] if rank is None else [(size, rank), (rank, features)]
        return shapes + [(size,)] * self.spec.bias

    @torch.no_grad()
    def set_map(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Copies the map in, rounded once to the layer's dtype.

        weight (d, P d), bias (d,); with a rank, factors U (d, rank), V (rank, P d) take the place
        of the weight. P = 1 without a memory.
        """
        if self.spec.rank is not None:
            u, v = factors
            self.linear_u.weight.copy_(u)
            self.linear_v.weight.copy_(self._branch_after_branch(v))
            own_bias = self.linear_u.bias
        elif self.spec.has_memory:
            self.linear_v.weight.copy_(self._branch_after_branch(weight))
            own_bias = self.linear_bias
        else:
            self.linear.weight.copy_(weight)
            own_bias = self.linear.bias
        if self.spec.bias:
            own_bias.copy_(bias)

    def _branch_after_branch(self, weight: Tensor) -> Tensor:
        """(n, P d), a row for each output, as (P n, d)."""
        return weight.unflatten(1, (self.spec.filters.branches, -1)).transpose(0, 1).flatten(0, 1)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        memory_span: MemorySpan | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (B, T, d) -> (B, T, d); of the other arguments, which concern attention,
        the cache matters to a memory."""
        hidden_states = self._attention(hidden_states, take_cache(kwargs), memory_span)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def _attention(
        self, x: Tensor, cache: Cache | None = None, span: MemorySpan | None = None
    ) -> Tensor:
        if self.spec.kind == "drop":
            return x
        if self.spec.has_memory:
            if cache is None:
                return self._recall(x, self.new_state(x.shape[0], x.device), span)
            if not isinstance(cache, Cache):
                raise ValueError(
                    f"layer {self.layer_idx} has a memory, whose state needs a transformers Cache, "
                    f"got {type(cache).__name__}"
                )
            entry = cache.layers[self.layer_idx]
            state = entry.prepare(x.shape[0], *self.state_shape, x.device)
            history = entry.history_of(x.shape[1])
            y = self._recall(x, state, span, history)
            entry.remember(history)
            return y
        if not self._is_plain():
            y = x if self.spec.features == "pre-norm" else self.input_layernorm(x)
            for linear in self._maps():
                y = linear(y)
            return x + y
        norm = self._norm()
        if self.spec.rank is None:
            linear, scale = self.linear, scale_of(self.linear)
            return nk.residual_linear(x, linear.weight, linear.bias, weight_scale=scale, **norm)
        u, v = self.linear_u, self.linear_v
        g = nk.norm_linear(x, weight=v.weight, weight_scale=scale_of(v), **norm) if norm else v(x)
        return nk.residual_linear(g, u.weight, u.bias, residual=x, weight_scale=scale_of(u))

    @property
    def state_shape(self) -> tuple[int, int]:
        """(S, r): what a memory keeps of a sequence, in float32."""
        branches = self.spec.filters.branches
        return self.spec.filters.slots, self.linear_v.out_features // branches

    def new_state(self, rows: int, device: torch.device | None = None) -> Tensor:
        """(rows, S, r): nothing remembered. device: that of the layer, unless it is offloaded."""
        if device is None:
            device = self.post_attention_layernorm.weight.device
        return torch.zeros((rows, *self.state_shape), dtype=torch.float32, device=device)

    def _recall(
        self,
        x: Tensor,
        state: Tensor,
        span: MemorySpan | None = None,
        history: Tensor | None = None,
    ) -> Tensor:
        """x + W φ(x) + b, which takes the state (and its history) on."""
        span = span or MemorySpan()
        if not self._is_plain():
            return self._recall_by_calls(x, state, span, history)
        v, u = self.linear_v, getattr(self, "linear_u", None)
        return nk.memory_scan(
            x,
            v.weight,
            None if u is None else u.weight,
            self.linear_bias if u is None else u.bias,
            state=state,
            lags=self.spec.lags,
            decays=self.spec.decays,
            mask=span.mask,
            starts=span.starts,
            history=history,
            weight_v_scale=scale_of(v),
            weight_u_scale=None if u is None else scale_of(u),
            **self._norm(),
        )

    def _recall_by_calls(
        self, x: Tensor, state: Tensor, span: MemorySpan, history: Tensor | None
    ) -> Tensor:
        """The same where the modules are called, not read."""
        f = x if self.spec.features == "pre-norm" else self.input_layernorm(x)
        tokens = {"mask": span.mask, "starts": span.starts}
        c = remember(self.linear_v(f), self.spec.filters, state, history, **tokens).to(x.dtype)
        if self.spec.rank is not None:
            return x + self.linear_u(c)
        return x + c if self.linear_bias is None else x + c + self.linear_bias

    def _maps(self) -> list[nn.Module]:
        """The linears of the map, in the order in which they are applied."""
        names = ("linear", "linear_v", "linear_u")
        return [self._modules[name] for name in names if name in self._modules]

    def _is_plain(self) -> bool:
        """Whether kernels may read the weights of the map and its norm (:mod:`nbl.plain`)."""
        norm = self._modules.get("input_layernorm")
        if all_are_observed() or not (norm is None or is_plain_norm(norm)):
            return False
        return all(map(is_plain_linear, self._maps()))

    def _norm(self) -> dict[str, Any]:
        """Arguments of the kernels: the features are normalized, or not."""
        if self.spec.features == "pre-norm":
            return {}
        norm = self.input_layernorm
        return {"norm_weight": norm.weight, "norm_eps": norm.variance_epsilon}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.spec.as_dict().items())


def _zero_linear(in_features: int, out_features: int, bias: bool, like: Tensor) -> nn.Linear:
    """All zeros until the map is set or loaded; no random numbers are drawn."""
    where = {"device": like.device, "dtype": like.dtype}
    linear = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, **where)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def memory_arguments(base: nn.Module, batch: Batch) -> dict[str, MemorySpan]:
    """What a stock base model, some layers of which were exchanged, must pass on to those with a
    memory; NBL models find it out themselves."""
    if not has_memory(base):
        return {}
    return {"memory_span": MemorySpan(batch.attention_mask, batch.starts)}


def has_memory(base: nn.Module) -> bool:
    """Whether a layer of a base model has a memory."""
    layers = getattr(base, "layers", ())
    return any(isinstance(m, LinearizedDecoderLayer) and m.spec.has_memory for m in layers)


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
        actual = {
            i: layer.spec
            for i, layer in enumerate(self.base_model.layers)
            if isinstance(layer, LinearizedDecoderLayer)
        }
        if actual != layer_specs(self.config):
            raise ValueError(
                f"config.nbl names the layers {linearized_layers(self)} as linear maps, the model "
                f"has them at {list(actual)}: its layers were changed after linearizing. Cut the "
                "original first (nbl.restore gives it back), then linearize"
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
            for i in linearized_layers(model)
            for name, _ in model.base_model.layers[i].named_parameters()
        }
        lost = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
        lost = sorted(maps & (lost | set(info["missing_keys"])))
        if lost:
            raise ValueError(
                f"the checkpoint lacks weights of linearized layers, or has them in another shape: "
                f"{lost}; it is incomplete or was changed after nbl saved it"
            )
        return (model, info) if output_loading_info else model


class NblModelMixin(NblPreTrainedMixin):
    """A stock base model; the layers that ``config.nbl`` names are linearized."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        record_hidden_states(cls, LinearizedDecoderLayer)
        cls._no_split_modules = [*cls._no_split_modules, "LinearizedDecoderLayer"]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.replace_layers()

    def replace_layers(self) -> None:
        """Makes the stock layers that ``config.nbl`` names linear ones, their maps not yet set."""
        for i, spec in layer_specs(self.config).items():
            self.layers[i] = LinearizedDecoderLayer(self.layers[i], spec)

    def forward(self, *args: Any, memory_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The stock forward, with a cache that has no keys for the linearized layers.

        memory_mask: (B, T) of the new tokens, 0 where padding: what a memory needs to know where
        the attention_mask is not 2-dimensional. ``generate`` passes it on.
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
        specs = {
            i: layer.spec
            for i, layer in enumerate(self.layers)
            if isinstance(layer, LinearizedDecoderLayer)
        }
        if cached:
            prepare_entries(cache, self.config.num_hidden_layers, specs)
        if has_memory(self):
            positions = None if cached else kwargs.get("position_ids")  # packed texts: for training
            mask = kwargs.get("attention_mask")
            span = _memory_span((rows, length), mask, positions, memory_mask)
            if span is not None:
                kwargs["memory_span"] = span
        outputs = super().forward(**kwargs)
        if cached:
            for entry in cache.layers:
                if isinstance(entry, EmptyCacheLayer):
                    entry.advance(length)
        return outputs


def _memory_span(
    shape: tuple[int, int],
    attention_mask: Any,
    position_ids: Tensor | None,
    memory_mask: Tensor | None,
) -> MemorySpan | None:
    """What a memory is to know of the new tokens (B, T); None: nothing."""
    rows, length = shape
    if memory_mask is None:
        memory_mask = attention_mask
    if memory_mask is not None:
        if not isinstance(memory_mask, Tensor) or memory_mask.ndim != 2:
            what = getattr(memory_mask, "shape", type(memory_mask).__name__)
            raise ValueError(
                "attention_mask: a model with a memory needs one of shape (batch, tokens), or "
                f"memory_mask of that shape beside it, got {what}"
            )
        return MemorySpan(mask=memory_mask[:, -length:].bool())
    if position_ids is None:
        return None
    # As transformers tells packed sequences: the positions do not go on by one.
    new = torch.diff(position_ids, dim=-1) != 1
    if not torch.compiler.is_compiling() and not bool(new.any()):
        return None
    first = new.new_zeros(len(new), 1)
    return MemorySpan(starts=torch.cat([first, new], dim=1).expand(rows, length))


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
        with a memory: a page holds keys of tokens, not the state of a sequence."""
        own = linearized_layers(self)
        if has_memory(self.model):
            raise ValueError(
                "continuous batching has no room for the states of layers with a memory: use "
                "generate or nbl.Runner"
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
        """As transformers', which makes the mask 4-dimensional for a static cache: a memory is told
        before which tokens are padding."""
        inputs = super().prepare_inputs_for_generation(
            *args, attention_mask=attention_mask, **kwargs
        )
        if not has_memory(self.model):
            return inputs
        ids = inputs.get("input_ids")
        new = inputs["inputs_embeds"] if ids is None else ids
        if attention_mask is None:
            inputs["memory_mask"] = new.new_ones(new.shape[:2], dtype=torch.bool)
        elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            inputs["memory_mask"] = attention_mask[:, -new.shape[1] :]
        return inputs


class NblLlamaConfig(NblConfigMixin, LlamaConfig):
    model_type = "nbl_llama"


class NblLlamaModel(NblModelMixin, LlamaModel):
    config_class = NblLlamaConfig


class NblLlamaForCausalLM(NblForCausalLMMixin, LlamaForCausalLM):
    config_class = NblLlamaConfig


class NblMistralConfig(NblConfigMixin, MistralConfig):
    model_type = "nbl_mistral"


class NblMistralModel(NblModelMixin, MistralModel):
    config_class = NblMistralConfig


class NblMistralForCausalLM(NblForCausalLMMixin, MistralForCausalLM):
    config_class = NblMistralConfig


class NblQwen2Config(NblConfigMixin, Qwen2Config):
    model_type = "nbl_qwen2"


class NblQwen2Model(NblModelMixin, Qwen2Model):
    config_class = NblQwen2Config


class NblQwen2ForCausalLM(NblForCausalLMMixin, Qwen2ForCausalLM):
    config_class = NblQwen2Config


class NblQwen3Config(NblConfigMixin, Qwen3Config):
    model_type = "nbl_qwen3"


class NblQwen3Model(NblModelMixin, Qwen3Model):
    config_class = NblQwen3Config


class NblQwen3ForCausalLM(NblForCausalLMMixin, Qwen3ForCausalLM):
    config_class = NblQwen3Config


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


FAMILIES: dict[str, Family] = {
    "llama": Family(
        LlamaConfig,
        LlamaModel,
        LlamaForCausalLM,
        NblLlamaConfig,
        NblLlamaModel,
        NblLlamaForCausalLM,
    ),
    "mistral": Family(
        MistralConfig,
        MistralModel,
        MistralForCausalLM,
        NblMistralConfig,
        NblMistralModel,
        NblMistralForCausalLM,
    ),
    "qwen2": Family(
        Qwen2Config,
        Qwen2Model,
        Qwen2ForCausalLM,
        NblQwen2Config,
        NblQwen2Model,
        NblQwen2ForCausalLM,
    ),
    "qwen3": Family(
        Qwen3Config,
        Qwen3Model,
        Qwen3ForCausalLM,
        NblQwen3Config,
        NblQwen3Model,
        NblQwen3ForCausalLM,
    ),
}

for _family in FAMILIES.values():
    AutoConfig.register(_family.nbl_config.model_type, _family.nbl_config)
    AutoModel.register(_family.nbl_config, _family.nbl_model)
    AutoModelForCausalLM.register(_family.nbl_config, _family.nbl_causal_lm)


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
    model.config.__class__ = family.nbl_config
    if getattr(model.config, "nbl", None) is None:
        model.config.nbl = config_entry({})
    model.__class__ = family.nbl_causal_lm
    model.model.__class__ = family.nbl_model
