"""What stands in the place of an attention, and how ``config.nbl`` says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from nbl_kernels.filters import Filters

from ..window import Window

__all__ = [
    "FORMAT_VERSION",
    "LayerSpec",
    "config_entry",
    "layer_specs",
    "linearized_layers",
    "windowed_layers",
]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerSpec:
    """What stands in the place of one attention.

    kind: ``"linear"``, the map ``y = W f + b``; ``"drop"``, nothing (``y = 0``); or ``"window"``,
    the attention itself, which sees a bounded part of the text. Fields of other kinds are at their
    defaults.
    features: ``"post-norm"``, f = RMSNorm(x) with the layer's own weight, or ``"pre-norm"``, f = x.
    rank: None for a full ``W`` (d, d), else W = U V is stored as U (d, rank) and V (rank, d).
    lags, decays: of a map with a memory (:class:`nbl.Memory`); both empty: there is none.
    size, sinks: of a window (:class:`nbl.Window`).
    """

    kind: Literal["linear", "drop", "window"]
    features: Literal["pre-norm", "post-norm"] = "post-norm"
    bias: bool = False
    rank: int | None = None
    lags: tuple[int, ...] = ()
    decays: tuple[float, ...] = ()
    size: int | None = None
    sinks: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "drop", "window"):
            raise ValueError(f"kind must be 'linear', 'drop' or 'window', got {self.kind!r}")
        window = None
        if self.kind == "window":
            window = Window(self.size, self.sinks)
        elif (self.size, self.sinks) != (None, None):
            raise ValueError(f"size and sinks are those of a window, got kind {self.kind!r}")
        if self.features not in ("pre-norm", "post-norm"):
            raise ValueError(f"features must be 'pre-norm' or 'post-norm', got {self.features!r}")
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias must be a bool, got {self.bias!r}")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(f"rank must be None or a positive int, got {self.rank!r}")
        filters = Filters(self.lags, self.decays)
        object.__setattr__(self, "lags", filters.lags)
        object.__setattr__(self, "decays", filters.decays)
        # No fields: they follow from others, and are asked for at every step.
        object.__setattr__(self, "filters", filters)
        object.__setattr__(self, "window", window)

    @property
    def has_memory(self) -> bool:
        return bool(self.lags or self.decays)

    @classmethod
    def of_window(cls, window: Window) -> LayerSpec:
        return cls("window", size=window.size, sinks=window.sinks)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a map without a memory says nothing of one, a window nothing of a map."""
        if self.kind == "window":
            return {"kind": self.kind, "size": self.size, "sinks": self.sinks}
        entry = asdict(self)
        del entry["size"], entry["sinks"]
        for name in ("lags", "decays"):
            values = entry.pop(name)
            if self.has_memory:
                entry[name] = list(values)
        return entry


def layer_specs(config: PreTrainedConfig) -> dict[int, LayerSpec]:
    """{layer: LayerSpec} of the layers that were replaced, in order; {} for a stock config."""
    layers = (getattr(config, "nbl", None) or {}).get("layers", {})
    return {i: LayerSpec(**layers[str(i)]) for i in sorted(map(int, layers))}


def config_entry(specs: Mapping[int, LayerSpec]) -> dict[str, Any]:
    """``config.nbl`` for these layers (JSON: the keys are strings)."""
    layers = {str(i): specs[i].as_dict() for i in sorted(specs)}
    return {"format_version": FORMAT_VERSION, "layers": layers}


def linearized_layers(model: PreTrainedModel | PreTrainedConfig) -> list[int]:
    """Ids of the layers of a model (or of a config) that have no attention any more, ascending."""
    return [i for i, spec in _specs(model).items() if spec.kind != "window"]


def windowed_layers(model: PreTrainedModel | PreTrainedConfig) -> list[int]:
    """Ids of the layers of a model (or of a config) whose attention sees a window, ascending."""
    return [i for i, spec in _specs(model).items() if spec.kind == "window"]


def _specs(model: PreTrainedModel | PreTrainedConfig) -> dict[int, LayerSpec]:
    return layer_specs(model if isinstance(model, PreTrainedConfig) else model.config)
