"""A decoder layer whose attention is a linear map, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import nbl_kernels as nk
from nbl_kernels.filters import remember

from ..upstream import Cache, GradientCheckpointingLayer, take_cache, take_over
from .plain import all_are_observed, is_plain_linear, is_plain_norm
from .quantized import scale_of
from .spec import LayerSpec
from .tokens import TokenSpan

__all__ = [
    "LinearizedDecoderLayer",
    "linear_layer",
    "map_spec",
    "replaced",
]


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
    (:class:`nbl.layers.cache.MemoryCacheLayer`).
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
        take_over(layer, self)

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
        token_span: TokenSpan | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (B, T, d) -> (B, T, d); of the other arguments, which concern attention,
        the cache matters to a memory."""
        hidden_states = self._attention(hidden_states, take_cache(kwargs), token_span)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def _attention(
        self, x: Tensor, cache: Cache | None = None, span: TokenSpan | None = None
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
        if not self._map_is_plain():
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
        span: TokenSpan | None = None,
        history: Tensor | None = None,
    ) -> Tensor:
        """x + W φ(x) + b, which takes the state (and its history) on."""
        span = span or TokenSpan()
        if not self._map_is_plain():
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
        self, x: Tensor, state: Tensor, span: TokenSpan, history: Tensor | None
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

    def _map_is_plain(self) -> bool:
        """Whether kernels may read the map's weights and its norm's (:mod:`nbl.layers.plain`)."""
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


# --- maps ----------------------------------------------------------------------------------------


def map_spec(solved: nk.Lmmse, *, features: str, bias: bool, rank: int | None) -> LayerSpec:
    """Of a layer with this map."""
    filters = {name: getattr(solved, name, ()) for name in ("lags", "decays")}
    return LayerSpec("linear", features, bias, rank, **filters)


def linear_layer(
    layer: nn.Module, spec: LayerSpec, solved: nk.Lmmse, layer_id: int
) -> LinearizedDecoderLayer:
    """The replacement of one decoder layer, its map checked and set."""
    linear = LinearizedDecoderLayer(layer, spec)
    if spec.bias != (solved.bias is not None):
        raise ValueError(f"maps[{layer_id}]: bias={spec.bias} was asked for, the map differs")
    if spec.rank is not None and solved.factors is None:
        raise ValueError(
            f"maps[{layer_id}]: rank={spec.rank} was asked for, the map has no factors"
        )
    tensors = (solved.weight,) if spec.rank is None else tuple(solved.factors)
    tensors += (solved.bias,) if spec.bias else ()
    shapes = [tuple(t.shape) for t in tensors]
    if shapes != linear.map_shapes:
        raise ValueError(f"maps[{layer_id}]: expected shapes {linear.map_shapes}, got {shapes}")
    linear.set_map(solved.weight, solved.bias, solved.factors)
    own = [p for name, p in linear.named_parameters() if name.startswith("linear")]
    if not all(torch.isfinite(p).all() for p in own):
        raise ValueError(f"layer {layer_id}: the map is not finite in {own[0].dtype}")
    return linear


@contextmanager
def replaced(model: PreTrainedModel, layer_id: int, layer: nn.Module) -> Iterator[None]:
    """One decoder layer exchanged for the length of the block, nothing else changed: for measuring
    without a cache."""
    layers = model.model.layers
    original = layers[layer_id]
    layers[layer_id] = layer
    try:
        yield
    finally:
        layers[layer_id] = original
