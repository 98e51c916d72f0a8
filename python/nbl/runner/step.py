"""What one forward pass of a Runner knows: its layers, where its tokens are, what memories keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..layers.linearized import LinearizedDecoderLayer
from ..layers.tokens import TokenSpan
from ..layers.windowed import WindowedAttention
from ..upstream import sliding_window
from ..window import Window

__all__ = ["MOST_ROWS", "Kept", "RingView", "Span", "Stack", "States", "kept_layers"]

# Rows of one forward pass up to which the linears read their weights once, and a row's result does
# not depend on the others: drafted tokens are verified in no more.
MOST_ROWS = 16


@dataclass(frozen=True)
class Span:
    """Where the tokens of one step are, in the cache and in the text."""

    positions: Tensor  # (T,) or (B, T), in the text
    slots: Tensor  # (T,), that their keys and values are written to
    views: dict[int | None, Any]  # of the cache, per sliding window
    memory: TokenSpan | None = None  # which of the tokens are there
    rings: dict[Window, RingView] = field(default_factory=dict)  # the caches of windows


@dataclass(frozen=True)
class RingView:
    """Where the tokens of one step are in the ring of a window, and what they see of it."""

    index: Tensor  # (T,) or (B, T), in their sequences; negative: padding
    slots: Tensor  # the same, in the ring
    view: Any  # of the ring; None: a prompt, which is attended block by block
    before: int = 0  # how many tokens before the first one there may be


@dataclass
class Kept:
    """A layer that kept its attention."""

    index: int  # in the cache, or in that of its window
    kv_heads: int
    scaling: float
    window: int | None  # a sliding window of the model's own, whose tokens stay in the cache
    normalizes: bool  # q and k, head by head, before they are rotated
    bounded: Window | None = None  # with a cache of its own

    def head_norms(self, attention: Any) -> dict[str, Any]:
        """Arguments of rope_append."""
        if not self.normalizes:
            return {}
        return {
            "q_norm_weight": attention.q_norm.weight,
            "k_norm_weight": attention.k_norm.weight,
            "norm_eps": attention.q_norm.variance_epsilon,
        }


@dataclass(frozen=True, eq=False)
class Stack:
    """The decoder layers of a forward pass: the model's own, or a draft's."""

    layers: list[Any]
    kept: list[Kept | None]  # None for the layers without attention


class States:
    """What the layers with a memory keep: of the model's stack, and of the draft's own layers.

    As with the cache, what counts is the model's own pass: a memory of the draft is not fed by the
    draft's stream but observes the model's, in front of the layer in whose place it stands. Only
    between two passes of the model it goes on with the draft's.
    """

    def __init__(self, stack: Stack, drafts: list[Stack], max_batch_size: int) -> None:
        layers = [*stack.layers, *(drafts[-1].layers if drafts else [])]
        remembering = [
            layer
            for layer in dict.fromkeys(layers)
            if isinstance(layer, LinearizedDecoderLayer) and layer.spec.has_memory
        ]
        self._states = {layer: layer.new_state(max_batch_size) for layer in remembering}
        # The states after every token of a pass, where some of these may be rejected.
        self._history = {}
        if drafts:
            for layer, state in self._states.items():
                shape = (max_batch_size, MOST_ROWS, *state.shape[1:])
                self._history[layer] = state.new_zeros(shape)
        self._own = set(stack.layers)
        self.observing: Stack | None = None  # the draft's layers in use

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._states

    def __len__(self) -> int:
        return len(self._states)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._states.values(), *self._history.values()))

    def observer(self, i: int) -> nn.Module | None:
        """The draft's own layer i, where it has a memory."""
        layer = None if self.observing is None else self.observing.layers[i]
        return layer if layer in self._states and layer not in self._own else None

    def recall(self, layer: Any, x: Tensor, span: TokenSpan | None, *, record: bool) -> Tensor:
        """x + W φ(x) + b, which takes the layer's state on; record: and notes it token by token."""
        rows, length = x.shape[:2]
        history = None
        if record and self.observing is not None and length <= MOST_ROWS:
            history = self._history[layer][:rows, :length]
        return layer._recall(x, self._states[layer][:rows], span, history)

    def begin(self, rows: int) -> None:
        """Nothing is remembered."""
        self.observing = None
        for state in self._states.values():
            state[:rows] = 0

    def save(self, rows: int) -> list[Tensor]:
        return [state[:rows].clone() for state in self._states.values()]

    def restore(self, saved: list[Tensor]) -> None:
        for state, before in zip(self._states.values(), saved, strict=True):
            state[: len(before)] = before

    def go_back(self, rows: int, token: int) -> None:
        """To what the states were after this token of the model's last pass."""
        for layer, state in self._states.items():
            if layer in self._own or layer in self.observing.layers:
                state[:rows] = self._history[layer][:rows, token]


def kept_layers(layers: list[Any]) -> list[Kept | None]:
    """None for the layers without attention."""
    kept: list[Kept | None] = []
    counts: dict[Window | None, int] = {}
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        if attention is None:
            kept.append(None)
            continue
        _, kv_heads, _ = layer._heads
        bounded = attention.spec.window if isinstance(attention, WindowedAttention) else None
        window = None if bounded else sliding_window(attention)
        index = counts.setdefault(bounded, 0)
        counts[bounded] += 1
        normalizes = hasattr(attention, "q_norm")
        kept.append(Kept(index, kv_heads, attention.scaling, window, normalizes, bounded))
    return kept
