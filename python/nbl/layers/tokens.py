"""Which tokens of a forward pass a layer sees: what an attention mask says, for layers whose state
does not fit into one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ..batches import Batch
from .spec import LayerSpec

__all__ = ["TokenSpan", "has_memory", "reads_spans", "replaced_specs", "span_arguments"]


@dataclass(frozen=True)
class TokenSpan:
    """Which tokens (B, T) of a forward pass there are: mask False, padding; starts True, the first
    of a packed sequence. None: all, none."""

    mask: Tensor | None = None
    starts: Tensor | None = None


def replaced_specs(base: nn.Module) -> dict[int, LayerSpec]:
    """{layer: its LayerSpec} of the layers of a base model that are not what they were."""
    return {i: spec for i, spec in enumerate(_specs(base)) if spec is not None}


def has_memory(base: nn.Module) -> bool:
    """Whether a layer of a base model has a memory."""
    return any(spec is not None and spec.has_memory for spec in _specs(base))


def reads_spans(base: nn.Module) -> bool:
    """Whether a layer of a base model must be told which tokens there are."""
    specs = (spec for spec in _specs(base) if spec is not None)
    return any(spec.has_memory or spec.kind == "window" for spec in specs)


def span_arguments(base: nn.Module, batch: Batch) -> dict[str, TokenSpan]:
    """What a stock base model, some layers of which were exchanged, must pass on to them; NBL
    models find it out themselves."""
    if not reads_spans(base):
        return {}
    return {"token_span": TokenSpan(batch.attention_mask, batch.starts)}


def _specs(base: nn.Module) -> Iterator[LayerSpec | None]:
    """A linearized layer has its spec, and so has the attention of a windowed one."""
    for layer in getattr(base, "layers", ()):
        yield getattr(layer, "spec", None) or getattr(
            getattr(layer, "self_attn", None), "spec", None
        )
