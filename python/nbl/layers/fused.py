"""Decoder layers that run on the fused kernels, in place of a stock or a linearized layer.

A fused layer *is* the layer it was: :func:`fuse` exchanges the class of the object and keeps its
modules, parameters and hooks. What it adds is one tensor for the weights that are read together, q
with k with v and gate with up; the modules' own parameters become views of it, so that no weight is
in memory twice and ``state_dict``, ``save_pretrained``, ``load_state_dict`` and in-place updates
mean what they always meant. Its linears are plain ones, or quantized (:mod:`nbl.layers.quantized`).

The kernels run where that means the same as transformers' code, and that code runs (on the same
weights) everywhere else: in training mode, where autograd records, under autocast, where a module
inside the layer is no longer a plain one (:mod:`nbl.layers.plain`: hooks, as of calibration, a LoRA
layer, weights of torchao or offloaded ones), and where attention weights are asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nbl_kernels as nk

from ..upstream import MODELING, NORMS, Cache, attend, take_cache
from .linearized import LinearizedDecoderLayer
from .plain import LINEARS, all_are_observed, has_plain_weights, is_observed, is_plain
from .quantized import QuantizedLinear, quantize_linears, quantized_linears, scale_of
from .tokens import TokenSpan
from .windowed import WindowedAttention

__all__ = [
    "FusedHead",
    "FusedLayer",
    "add_linear",
    "check_fusible",
    "fuse",
    "meant_to_record",
    "unfuse",
]


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
    # What a fused forward reads instead of calling: modules by the dict that holds them and their
    # name. Those with weights may be exchanged for others of their kinds; the blocks may not, as
    # the packs are theirs.
    _read: tuple[tuple[dict[str, nn.Module], str, tuple[type, ...]], ...]
    _blocks: tuple[tuple[str, nn.Module], ...]

    def _setup(self) -> None:
        self._blocks = tuple(
            (name, self._modules[name]) for name in ("self_attn", "mlp") if name in self._modules
        )
        packs = (Packed(self.mlp, ("gate_proj", "up_proj")),)
        if "self_attn" in self._modules:
            packs = (Packed(self.self_attn, ("q_proj", "k_proj", "v_proj")), *packs)
        self._packs = packs
        holders = (self, *(block for _, block in self._blocks))
        self._read = tuple(
            (holder._modules, name, _kinds_like(module))
            for holder in holders
            for name, module in holder._modules.items()
            if (name, module) not in self._blocks
        )

    def _teardown(self) -> None:
        for pack in self._packs:
            pack.unpack()
        del self._packs, self._read, self._blocks

    def _runs_fused(self, x: Tensor) -> bool:
        if self.training or not _takes_kernels(x):
            return False
        if _records_gradients(x, self):
            _say_that_gradients_are_recorded()
            return False
        return self._is_intact()

    def _is_intact(self) -> bool:
        """False where the kernels would leave something out: a hook, an adapter, weights that are
        elsewhere. Weights that were given other memory are packed again."""
        if not self._is_plain():
            return False
        if not torch.compiler.is_compiling():  # addresses mean nothing while tracing
            self.pack()
        return True

    def _is_plain(self) -> bool:
        """Whether all that is read is plain (:mod:`nbl.layers.plain`)."""
        if all_are_observed():
            return False
        for name, block in self._blocks:
            if self._modules.get(name) is not block or is_observed(block):
                return False
        return all(is_plain(modules.get(name), kinds) for modules, name, kinds in self._read)

    def pack(self) -> None:
        """Packs what was given other memory since."""
        for pack in self._packs:
            if not pack.is_current():
                pack.pack()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.to()`` and its like move one parameter at a time, out of the packed tensor."""
        super()._apply(fn, recurse)
        if self._is_plain():
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
        token_span: TokenSpan | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not self._runs_fused(hidden_states):
            return super().forward(hidden_states, *args, token_span=token_span, **kwargs)
        return self._mlp(self._attention(hidden_states, take_cache(kwargs), token_span))


class FusedAttentionLayer(FusedLayer):
    """q, k and v in one launch, then transformers' own rotation, cache and attention function, then
    ``o_proj`` with the residual."""

    modeling: Any  # the transformers module of the family

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        asked = dict(kwargs)
        if position_embeddings is not None:
            asked["position_embeddings"] = position_embeddings
        attention = self.self_attn
        attentions = kwargs.get(
            "output_attentions", getattr(attention.config, "output_attentions", False)
        )
        cache = take_cache(kwargs)
        # A paged cache is handed over with more than its name.
        known = position_embeddings is not None and (cache is None or isinstance(cache, Cache))
        if args or attentions or not known or not self._runs_fused(hidden_states):
            return super().forward(hidden_states, attention_mask, position_ids, *args, **asked)
        q, k, v = self._qkv(hidden_states).split(self._heads, dim=-2)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if isinstance(attention, WindowedAttention):
            span = kwargs.get("token_span")
            y = attention.attend(q, k, v, position_embeddings, cache, span)
        else:
            y = attend(
                attention,
                self.modeling,
                q,
                k,
                v,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past=cache,
                position_ids=position_ids,  # as stock layers pass on: flash attention wants them
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


class FusedHead(nn.Linear):
    """A language-model head that reads its weight once for the few rows of a decode step."""

    _MOST_ROWS = 16

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // max(x.shape[-1], 1)
        few = rows <= self._MOST_ROWS and not self.training
        inference = _takes_kernels(x) and not _records_gradients(x, self)
        if few and inference and has_plain_weights(self):
            nothing = x.new_zeros(()).expand(*x.shape[:-1], self.out_features)
            return nk.residual_linear(x, self.weight, self.bias, residual=nothing)
        return super().forward(x)


def _fused_attention(name: str, modeling: ModuleType) -> tuple[type, type]:
    """(stock class, fused class) of a family's decoder layer; the second a name of this module."""
    stock = getattr(modeling, f"{name}DecoderLayer")
    attributes = {"__module__": __name__, "modeling": modeling}
    fused = type(f"Fused{stock.__name__}", (FusedAttentionLayer, stock), attributes)
    globals()[fused.__name__] = fused
    return stock, fused


_FUSED: dict[type, type] = {
    nn.Linear: FusedHead,
    LinearizedDecoderLayer: FusedLinearizedDecoderLayer,
    **dict(_fused_attention(name, modeling) for name, modeling in MODELING.items()),
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
            if type(linear) is not nn.Linear or not has_plain_weights(linear):
                weight = getattr(linear, "weight", None)
                where = "" if weight is None else f" on {weight.device}"
                raise ValueError(
                    f"{name}.{parent}.{child}: expected a plain nn.Linear, got "
                    f"{_class_name(linear)} with a weight of {_class_name(weight)}{where}"
                )


def _kinds_like(module: nn.Module) -> tuple[type, ...]:
    """What may stand in the place of a module that is read: linears and norms have kernels."""
    kinds = (kinds for kinds in (LINEARS, NORMS) if isinstance(module, kinds))
    return next(kinds, (type(module),))


def _takes_kernels(x: Tensor) -> bool:
    """No autocast, and a dtype of the kernels."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type)


def _records_gradients(x: Tensor, module: nn.Module) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in module.parameters())
    )


_said: set[str] = set()


def _say_that_gradients_are_recorded() -> None:
    """Once per process: who wants speed most likely forgot to say that no gradient is needed."""
    if not _said and not torch.compiler.is_compiling():
        _said.add("gradients")
        warnings.warn(
            "an optimized model was called while gradients are recorded, which its fused kernels "
            "do not: its layers run unfused. Call it under torch.inference_mode() or "
            "torch.no_grad(), or train it after nbl.restore",
            stacklevel=2,
        )


@contextmanager
def meant_to_record() -> Iterator[None]:
    """Without that warning, for the length of the block: gradients are recorded on purpose."""
    before = set(_said)
    _said.add("gradients")
    try:
        yield
    finally:
        _said.clear()
        _said.update(before)


def _class_name(value: object) -> str:
    return type(value).__name__
