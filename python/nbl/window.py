"""How far back an attention sees: the user's side of nbl.layers.windowed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Window"]


@dataclass(frozen=True)
class Window:
    """An attention that keeps its weights and sees a bounded part of the text.

    A token sees itself and those before it, `size` tokens in all, and the first `sinks` tokens of
    its sequence. Positions are those of the text, so up to `size` tokens the layer is what it was;
    behind that its keys and values take no more memory: size + sinks tokens of a sequence, however
    long. Nothing is trained and nothing measured. Models put much of an attention on the first
    token; without a sink they lose their way (docs/window.md).

    Args:
        size: how many tokens a token sees, itself included; positive.
        sinks: how many first tokens stay visible, 0 or more.
    """

    size: int = 128
    sinks: int = 1

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"size: expected a positive int, got {self.size!r}")
        if type(self.sinks) is not int or self.sinks < 0:
            raise ValueError(f"sinks: expected an int from 0 on, got {self.sinks!r}")

    @property
    def slots(self) -> int:
        """Tokens of a sequence whose keys and values are needed."""
        return self.size + self.sinks
