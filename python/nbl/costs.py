"""What a layer costs a decode step, by its kind: bytes that are read, and operations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .layers.spec import LayerSpec
from .optimize import weight_bytes
from .upstream import sliding_window

__all__ = ["Cost", "attention_cost", "other_cost"]


@dataclass(frozen=True)
class Cost:
    """Of one decode step of a batch. weights: bytes of them, read once; cache: bytes of keys,
    values and states, of all sequences; flops: of all sequences."""

    weights: int = 0
    cache: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.weights + self.cache

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weights + other.weights, self.cache + other.cache, self.flops + other.flops
        )


def attention_cost(layer: nn.Module, spec: LayerSpec | None, *, context: int, batch: int) -> Cost:
    """Of what `spec` puts in the place of the attention of a stock decoder layer; None: the
    attention itself. context: tokens of each of `batch` sequences."""
    attention = layer.self_attn
    dtype = layer.input_layernorm.weight.dtype
    if spec is not None and spec.kind == "drop":
        return Cost()
    if spec is not None and spec.kind == "linear":
        size, branches = layer.input_layernorm.weight.shape[0], spec.filters.branches
        numbers = branches * size * size
        if spec.rank is not None:
            numbers = spec.rank * (branches + 1) * size
        state = spec.filters.slots * (spec.rank or size) * 4 if spec.has_memory else 0
        weights = (numbers + size * spec.bias) * dtype.itemsize
        return Cost(weights, 2 * batch * state, 2 * batch * numbers)  # a state is written, too
    tensors = [*attention.parameters(), *attention.buffers()]
    numbers = sum(
        linear.in_features * linear.out_features
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    )
    kv_heads = attention.k_proj.out_features // attention.head_dim
    heads = attention.q_proj.out_features // attention.head_dim
    own = sliding_window(attention)
    seen = context if own is None else min(context, own)
    if spec is not None:
        seen = min(seen, spec.window.slots)
    cache = batch * seen * 2 * kv_heads * attention.head_dim * dtype.itemsize
    flops = batch * (2 * numbers + 4 * heads * attention.head_dim * seen)
    return Cost(sum(t.nbytes for t in tensors), cache, flops)


def other_cost(model: PreTrainedModel, *, batch: int) -> Cost:
    """Of all but the attentions of a model that has them all: MLPs, norms, the head."""
    attentions = [layer.self_attn for layer in model.model.layers]
    own = sum(t.nbytes for a in attentions for t in (*a.parameters(), *a.buffers()))
    linears = [m for m in model.modules() if hasattr(m, "in_features")]
    inside = {id(m) for a in attentions for m in a.modules()}
    flops = sum(2 * m.in_features * m.out_features for m in linears if id(m) not in inside)
    return Cost(weight_bytes(model) - own, 0, batch * flops)
