"""Decoder layers that run on the fused kernels, in place of a stock or a linearized layer.

A fused layer *is* the layer it was: :func:`fuse` exchanges the class of the object and keeps its
modules, parameters and hooks. What it adds is one tensor for the weights that are read together, q
with k with v and gate with up; the modules' own parameters become views of it, so that no weight is
in memory twice and ``state_dict``, ``save_pretrained``, ``load_state_dict`` and in-place updates
mean what they always meant. Its linears are plain ones, or quantized (:mod:`nbl.quantized`).

The kernels run where that means the same as transformers' code, and that code runs (on the same
weights) everywhere else: in training mode, where autograd records, under autocast, where a module
inside the layer carries hooks (calibration does) or was replaced (by a LoRA layer, say), and where
attention weights are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

import nbl_kernels as nk

from .models import LinearizedDecoderLayer, MemorySpan
from .quantized import (
    QuantizedLinear,
    is_plain_or_quantized,
    quantize_linears,
    quantized_linears,
    scale_of,
)

__all__ = ["FusedHead", "FusedLayer", "add_linear", "check_fusible", "fuse", "unfuse"]


class Packed:
    """Linears that read the same input: their weights (and scales and biases) stacked in one tensor
    each, of which the linears' own are views."""

    def __init__(self, parent: nn.Module, names: tuple[str, ...]) -> None:
        self.parent = parent
        self.names = names
        self.pack()

    def pack(self) -> None:
        self._views: list[Tensor] = []
        self.weight = self._stacked("weight")
        self.weight_scale = self._stacked("weight_scale")
        self.bias = self._stacked("bias")

    @torch.no_grad()
    def _stacked(self, kind: str) -> Tensor | None:
        tensors = self._tensors(kind)
        if any(t is None for t in tensors):
            return None
        stacked, views = _stack(tensors)
        self._views += views
        return stacked

    def _tensors(self, kind: str) -> list[Tensor | None]:
        modules = self.parent._modules
        return [getattr(modules[name], kind, None) for name in self.names]

    def is_current(self) -> bool:
        """False once a parameter was given other memory: by ``.to()``, by assignment."""
        tensors = self._tensors("weight")
        if self.weight_scale is not None:
            tensors += self._tensors("weight_scale")
        if self.bias is not None:
            tensors += self._tensors("bias")
        return all(t.data_ptr() == v.data_ptr() for t, v in zip(tensors, self._views))

    @torch.no_grad()
    def unpack(self) -> None:
        """Every parameter in memory of its own again."""
        for kind in ("weight", "weight_scale", "bias"):
            for tensor in self._tensors(kind):
                if tensor is not None:
                    tensor.data = tensor.data.clone()

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles pack what they got
        return Packed, (self.parent, self.names)


def _stack(parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """One tensor (ΣN, …) holding the parameters, which become views of it, and those views.

    Parameters that already lie one after another stay there: layers that share them (a draft's and
    its original's) agree on one tensor."""
    if _are_adjacent(parameters):
        shape = (sum(p.shape[0] for p in parameters), *parameters[0].shape[1:])
        stacked = parameters[0].detach().as_strided(shape, parameters[0].stride())
    else:
        stacked = torch.cat([p.detach() for p in parameters])
    views = list(stacked.split([p.shape[0] for p in parameters]))
    for parameter, view in zip(parameters, views):
        parameter.data = view
    return stacked, views


def _are_adjacent(parameters: list[nn.Parameter]) -> bool:
    """Whether the parameters lie one after another in one piece of memory."""
    first = parameters[0]
    address, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for p in parameters:
        if p.untyped_storage().data_ptr() != address or p.storage_offset() != offset:
            return False
        if p.dtype != first.dtype or p.device != first.device or not p.is_contiguous():
            return False
        offset += p.numel()
    return True


class FusedLayer:
    """What fused layers share: when to run fused, the MLP, and following the model around."""

    _packs: tuple[Packed, ...]  # gate with up; before it q with k with v, where there is attention
    _inside: tuple[nn.Module, ...]  # the modules that a fused forward does not call

    def _setup(self) -> None:
        mlp = self.mlp
        packs = (Packed(mlp, ("gate_proj", "up_proj")),)
        attention = getattr(self, "self_attn", None)
        if attention is not None:
            packs = (Packed(attention, ("q_proj", "k_proj", "v_proj")), *packs)
        self._packs = packs
        self._inside = tuple(m for m in self.modules() if m is not self)

    def _teardown(self) -> None:
        for pack in self._packs:
            pack.unpack()
        del self._packs, self._inside

    def _runs_fused(self, x: Tensor) -> bool:
        if self.training or not _is_inference(x, self):
            return False
        return self._is_intact()

    def _is_intact(self) -> bool:
        """False where the kernels would leave something out: a hook, an adapter. Weights that were
        given other memory are packed again."""
        if any(map(_is_observed, self._inside)):
            return False
        if not all(map(is_plain_or_quantized, self._linears())):
            return False
        if not torch.compiler.is_compiling():  # addresses mean nothing while tracing
            self.pack()
        return True

    def pack(self) -> None:
        """Packs what was given other memory since."""
        for pack in self._packs:
            if not pack.is_current():
                pack.pack()

    def _linears(self) -> list[nn.Module]:
        mlp = self.mlp._modules
        linears = [mlp["gate_proj"], mlp["up_proj"], mlp["down_proj"]]
        if "self_attn" in self._modules:
            attention = self._modules["self_attn"]._modules
            linears += [attention[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        return linears

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.to()`` and its like move one parameter at a time, out of the packed tensor."""
        super()._apply(fn, recurse)
        if all(map(is_plain_or_quantized, self._linears())):
            self.pack()
        return self

    def _mlp(self, x: Tensor) -> Tensor:
        norm, pack = self.post_attention_layernorm, self._packs[-1]
        options = {"norm_eps": norm.variance_epsilon, "weight_scale": pack.weight_scale}
        if pack.bias is None:
            y = nk.norm_swiglu(x, norm.weight, pack.weight, **options)
        else:
            gate, up = nk.norm_linear(x, norm.weight, pack.weight, pack.bias, **options).chunk(
                2, -1
            )
            y = F.silu(gate) * up
        return add_linear(x, self.mlp.down_proj, y)


class FusedLinearizedDecoderLayer(FusedLayer, LinearizedDecoderLayer):
    """The map, gate with up, down: three launches without a memory."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        past_key_values: Any = None,
        memory_span: MemorySpan | None = None,
        **kwargs: Any,
    ) -> Tensor:
        memory = {"past_key_values": past_key_values, "memory_span": memory_span}
        if not self._runs_fused(hidden_states):
            return super().forward(hidden_states, *args, **memory, **kwargs)
        return self._mlp(self._attention(hidden_states, past_key_values, memory_span))


class FusedAttentionLayer(FusedLayer):
    """q, k and v in one launch, then transformers' own rotation, cache and attention function, then
    ``o_proj`` with the residual."""

    modeling: Any  # the transformers module of the family

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        config = self.self_attn.config
        attentions = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
        if attentions or not self._runs_fused(hidden_states):
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        attention = self.self_attn
        q, k, v = self._qkv(hidden_states).split(self._heads, dim=-2)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = self.modeling.apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, attention.layer_idx)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            config._attn_implementation, self.modeling.eager_attention_forward
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
            # What stock layers pass on too: flash attention wants the positions.
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        y = y.reshape(*hidden_states.shape[:-1], -1)
        return self._mlp(add_linear(hidden_states, attention.o_proj, y))

    def _qkv(self, x: Tensor) -> Tensor:
        """(B, T, H + 2 H_kv, D): the heads of q, then of k, then of v, not rotated yet."""
        norm, pack = self.input_layernorm, self._packs[0]
        options = {"norm_eps": norm.variance_epsilon, "weight_scale": pack.weight_scale}
        qkv = nk.norm_linear(x, norm.weight, pack.weight, pack.bias, **options)
        return qkv.unflatten(-1, (-1, self.self_attn.head_dim))

    @property
    def _heads(self) -> list[int]:
        """How many heads q, k and v have."""
        attention = self.self_attn
        kv_heads = attention.k_proj.out_features // attention.head_dim
        return [kv_heads * attention.num_key_value_groups, kv_heads, kv_heads]


class FusedLlamaDecoderLayer(FusedAttentionLayer, modeling_llama.LlamaDecoderLayer):
    modeling = modeling_llama


class FusedMistralDecoderLayer(FusedAttentionLayer, modeling_mistral.MistralDecoderLayer):
    modeling = modeling_mistral


class FusedQwen2DecoderLayer(FusedAttentionLayer, modeling_qwen2.Qwen2DecoderLayer):
    modeling = modeling_qwen2


class FusedQwen3DecoderLayer(FusedAttentionLayer, modeling_qwen3.Qwen3DecoderLayer):
    modeling = modeling_qwen3


class FusedHead(nn.Linear):
    """A language-model head that reads its weight once for the few rows of a decode step."""

    _MOST_ROWS = 16

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // max(x.shape[-1], 1)
        if rows <= self._MOST_ROWS and not self.training and _is_inference(x, self):
            nothing = x.new_zeros(()).expand(*x.shape[:-1], self.out_features)
            return nk.residual_linear(x, self.weight, self.bias, residual=nothing)
        return super().forward(x)


_FUSED: dict[type, type] = {
    nn.Linear: FusedHead,
    LinearizedDecoderLayer: FusedLinearizedDecoderLayer,
    modeling_llama.LlamaDecoderLayer: FusedLlamaDecoderLayer,
    modeling_mistral.MistralDecoderLayer: FusedMistralDecoderLayer,
    modeling_qwen2.Qwen2DecoderLayer: FusedQwen2DecoderLayer,
    modeling_qwen3.Qwen3DecoderLayer: FusedQwen3DecoderLayer,
}
_STOCK = {fused: stock for stock, fused in _FUSED.items()}


def fuse(module: nn.Module) -> None:
    """Gives a decoder layer or a head its fused class, in place; one that has it stays, and so does
    a quantized head. Where some of its linears are quantized, the others (a new map) become so."""
    example = next(quantized_linears(module), None)
    if example is not None:
        kept = example.original is not None
        quantize_linears(module, example.format, keep_original=kept)
    if type(module) in _STOCK or type(module) is QuantizedLinear:
        return
    module.__class__ = _FUSED[type(module)]
    if isinstance(module, FusedLayer):
        module._setup()


def unfuse(module: nn.Module) -> None:
    """Undoes :func:`fuse`; anything else stays."""
    if type(module) not in _STOCK:
        return
    if isinstance(module, FusedLayer):
        module._teardown()
    module.__class__ = _STOCK[type(module)]


def add_linear(x: Tensor, linear: nn.Module, features: Tensor) -> Tensor:
    """x + W features + b."""
    return nk.residual_linear(
        features, linear.weight, linear.bias, residual=x, weight_scale=scale_of(linear)
    )


def check_fusible(layer: nn.Module, name: str) -> None:
    """ValueError, which begins with `name`, for a decoder layer that cannot be fused as it is."""
    if type(layer) not in _FUSED:
        raise ValueError(
            f"{name}: expected a stock or a linearized layer, got {_class_name(layer)}"
        )
    for where, module in layer.named_modules():
        if "forward" in vars(module):
            raise ValueError(f"{name}: the forward of {where or 'the layer'} was replaced")
    check_plain(layer, name)
    places = {(p.dtype, p.device) for p in layer.parameters()}
    if len(places) > 1:
        raise ValueError(f"{name}: expected weights of one dtype on one device, got {places}")


def check_plain(layer: nn.Module, name: str) -> None:
    """ValueError, which begins with `name`, unless the stock linears of a layer are plain ones."""
    parts = {"mlp": ("gate_proj", "up_proj", "down_proj")}
    if hasattr(layer, "self_attn"):
        parts["self_attn"] = ("q_proj", "k_proj", "v_proj", "o_proj")
    for parent, names in parts.items():
        for child in names:
            linear = getattr(getattr(layer, parent), child)
            if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
                raise ValueError(
                    f"{name}.{parent}.{child}: expected a plain nn.Linear, "
                    f"got {_class_name(linear)} with a weight of {_class_name(linear.weight)}"
                )


def sliding_window(attention: nn.Module) -> int | None:
    """How many tokens this attention sees, itself included; None: all."""
    if isinstance(attention, modeling_mistral.MistralAttention):
        return attention.config.sliding_window
    return getattr(attention, "sliding_window", None)


def _is_inference(x: Tensor, module: nn.Module) -> bool:
    """Plain inference: no gradient is recorded, no autocast, a dtype of the kernels."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return False
    return not torch.is_grad_enabled() or not (
        x.requires_grad or any(p.requires_grad for p in module.parameters())
    )


def _is_observed(module: nn.Module) -> bool:
    """Whether somebody relies on this module being called. transformers' own hooks, which stay
    once output_hidden_states was asked for, do not count: see output_attentions."""
    state = module.__dict__
    if "forward" in state or state["_forward_pre_hooks"]:
        return True
    hooks = state["_forward_hooks"]
    return bool(hooks) and any(
        hook.__module__ != "transformers.utils.output_capturing" for hook in hooks.values()
    )


def _class_name(value: object) -> str:
    return type(value).__name__
