"""An attention that keeps its weights and sees a window: the last tokens, and the first ones."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..upstream import MODELING, Cache, sliding_window, take_cache
from .ring import attend_prompt, in_order, token_order
from .spec import LayerSpec
from .tokens import TokenSpan

__all__ = ["WindowedAttention", "whole_layer", "windowed_layer"]

_Module = TypeVar("_Module", bound=nn.Module)


class WindowedAttention:
    """What an attention with a window does otherwise than the stock one of its family, with which
    it shares its modules.

    By ``scaled_dot_product_attention``, whatever implementation the model is set to; attention
    weights are not returned. The mask of the model is not read: padding and packed texts are known
    from `token_span`. Keys and values are kept in a :class:`nbl.layers.cache.WindowCacheLayer`.
    """

    spec: LayerSpec
    modeling: Any  # the transformers module of the family

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *args: Any,
        token_span: TokenSpan | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache = take_cache(kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            projection(hidden_states).view(shape)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = self.attend(q, k, v, position_embeddings, cache, token_span)
        return self.o_proj(y.reshape(*hidden_states.shape[:-1], -1)), None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Cache | None,
        span: TokenSpan | None,
    ) -> Tensor:
        """(B, T, H, D) of q (B, H, T, D) and k, v (B, H_kv, T, D), not rotated yet, which go into
        the cache."""
        q, k = self.modeling.apply_rotary_pos_emb(q, k, *position_embeddings)
        span = span or TokenSpan()
        dropout = self.attention_dropout if self.training else 0.0
        window = self.spec.window
        if cache is not None:
            if not isinstance(cache, Cache):
                raise ValueError(
                    f"layer {self.layer_idx} sees a window, whose keys need a transformers Cache, "
                    f"got {type(cache).__name__}"
                )
            return cache.layers[self.layer_idx].attend(q, k, v, self.scaling, span.mask, dropout)
        if span.starts is not None:
            mask = _visible_in_packed(span.starts, window.size, window.sinks)[:, None]
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=self.scaling, enable_gqa=True, dropout_p=dropout
            )
            return y.transpose(1, 2)
        if span.mask is None:
            return attend_prompt(q, k, v, window, self.scaling, dropout=dropout)
        order, back = token_order(span.mask)
        q, k, v = (in_order(t, order) for t in (q, k, v))
        first = torch.zeros(1, dtype=torch.long, device=q.device)
        y = attend_prompt(q, k, v, window, self.scaling, first=first, dropout=dropout)
        return in_order(y.transpose(1, 2), back).transpose(1, 2)


def _visible_in_packed(starts: Tensor, size: int, sinks: int) -> Tensor:
    """(B, T, T) bool for rows of several texts: which tokens each one sees."""
    length = starts.shape[1]
    place = torch.arange(length, device=starts.device)
    begin = torch.where(starts, place, 0).cummax(dim=1).values  # where a token's text begins
    own, other = place[:, None], place
    near = (own - other < size) | (other - begin[..., None] < sinks)
    return (other <= own) & (other >= begin[..., None]) & near


def windowed_layer(layer: nn.Module, spec: LayerSpec, layer_id: int) -> nn.Module:
    """A second decoder layer on the modules of a stock one (fused or not), whose attention sees a
    window. Hooks belong to both. ValueError for one that has no attention, or sees less already."""
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        raise ValueError(
            f"layer {layer_id} has no attention that could see a window: start from the original"
        )
    own = sliding_window(attention)
    if own is not None and own < spec.size:
        raise ValueError(
            f"window: expected at most {own} tokens, which is what layer {layer_id} sees already, "
            f"got size {spec.size}"
        )
    twin, twin_attention = _twin(layer, _LAYERS), _twin(attention, _WINDOWED)
    twin_attention.__class__ = _WINDOWED[type(twin_attention)]
    twin_attention.spec = spec
    twin.self_attn = twin_attention
    return twin


def whole_layer(layer: nn.Module) -> nn.Module:
    """The stock layer that a windowed one was made from: another on the same modules."""
    twin = _twin(layer, _LAYERS)
    twin.self_attn = _twin(layer.self_attn, _WINDOWED)
    del twin.self_attn.spec
    return twin


def _twin(module: _Module, stock: Any) -> _Module:
    """Another module of the stock class that this one is, with the same parts."""
    kind = next(kind for kind in type(module).__mro__ if kind in stock)
    twin = kind.__new__(kind)
    fused = ("_packs", "_read", "_blocks")
    vars(twin).update({name: value for name, value in vars(module).items() if name not in fused})
    for name in ("_modules", "_parameters", "_buffers"):
        vars(twin)[name] = dict(vars(module)[name])
    return twin


def _windowed(name: str, modeling: Any) -> tuple[type, type]:
    """(stock class, class with a window) of a family's attention; the second a name of this
    module."""
    stock = getattr(modeling, f"{name}Attention")
    attributes = {"__module__": __name__, "modeling": modeling}
    windowed = type(f"Windowed{stock.__name__}", (WindowedAttention, stock), attributes)
    globals()[windowed.__name__] = windowed
    return stock, windowed


_LAYERS = {getattr(modeling, f"{name}DecoderLayer") for name, modeling in MODELING.items()}
_WINDOWED = dict(_windowed(name, modeling) for name, modeling in MODELING.items())
