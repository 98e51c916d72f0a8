"""What a compressed model costs and how well it does, always beside the dense model and dropping.

`nbl compress --eval`, `--sweep` and `nbl demo` show these measurements.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from nbl_kernels.machine import in_turns

from .calibration import CRITERIA, MEASURED, Calibration
from .layers.spec import linearized_layers, windowed_layers
from .linearize import drop as drop_attention
from .linearize import restore
from .perplexity import perplexity
from .upstream import output_cache
from .window import Window

__all__ = [
    "Change",
    "Stopwatch",
    "compare_speed",
    "describe_model",
    "dropped",
    "kv_bytes_per_token",
    "measure_points",
    "score_layers",
    "state_bytes",
    "variant",
]


# Replaces these layers of a model.
Change = Callable[[Sequence[int]], Any]


def score_layers(
    calibration: Calibration,
    *,
    model: PreTrainedModel | None = None,
    batches: Iterable[Any] | None = None,
    ridge: float = 1e-4,
    bias: bool = True,
    rank: int | None = None,
    count: int | None = None,
    window: Window | None = None,
) -> dict[str, list[float | None]]:
    """{criterion: score of layer 0, 1, ...}; "loss" only where a model and batches are given, and
    with a `count` "greedy" for so many layers, and "loss" as the first step of that measured it.

    None stands for a layer that was not scored. `ridge`, `bias`, `rank`: of the maps; window:
    what greedy and loss measure in their place.
    """
    maps = {"ridge": ridge, "bias": bias, "rank": rank}
    found: dict[str, dict[int, float]] = {}
    if model is not None and batches is not None and count is not None:
        together, alone = calibration.greedy(model, batches, count, window=window, **maps)
        found = {"greedy": together, "loss": alone}
    elif model is not None and batches is not None:
        measured = {"model": model, "batches": batches, "window": window}
        ranked = calibration.rank("loss", **measured, **maps)
        found = {"loss": {s.layer: s.score for s in ranked}}
    for name in CRITERIA:
        if name not in MEASURED:
            found[name] = {s.layer: s.score for s in calibration.rank(name, **maps)}
    total = 1 + max(calibration.layers)
    return {
        name: [None if i not in scores else float(scores[i]) for i in range(total)]
        for name, scores in found.items()
    }


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values that the model's own cache holds for one token more of one sequence;
    those of windows do not grow."""
    return sum(held for i, held in _kv_bytes(model).items() if i not in windowed_layers(model))


def state_bytes(model: PreTrainedModel) -> int:
    """Bytes that are kept of one sequence, whatever its length: by the layers with a memory, and
    the keys and values that windows see."""
    layers, bounded = model.model.layers, windowed_layers(model)
    states = (layers[i] for i in linearized_layers(model))
    total = sum(layer.new_state(1).nbytes for layer in states if layer.spec.has_memory)
    if bounded:
        per_token = _kv_bytes(model)
        total += sum(layers[i].self_attn.spec.window.slots * per_token[i] for i in bounded)
    return total


def _kv_bytes(model: PreTrainedModel) -> dict[int, int]:
    """{layer: bytes of keys and values for one token of one sequence}, by the model's own cache."""
    tokens = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        cache = output_cache(model(tokens, use_cache=True))
    found = {}
    for i, entry in enumerate(cache.layers):
        held = (getattr(entry, name, None) for name in ("keys", "values"))
        found[i] = sum(t[:, :, :1].nbytes for t in held if t is not None)
    return found


class Stopwatch(BaseStreamer):
    """Notes when `generate` starts and when each new token is there; may pass tokens on."""

    def __init__(self, then: Callable[[torch.Tensor], None] | None = None) -> None:
        self.times = [time.perf_counter()]
        self._then = then
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # generate hands over the prompt first
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        if self._then is not None:
            self._then(value)

    def end(self) -> None:
        pass

    @property
    def prefill(self) -> float:
        """Seconds until the first new token."""
        return self.times[1] - self.times[0]

    @property
    def decode(self) -> float | None:
        """Seconds per token after the first one; None when there was only one."""
        steps = len(self.times) - 2
        return (self.times[-1] - self.times[1]) / steps if steps > 0 else None


def compare_speed(
    model: PreTrainedModel,
    variants: Sequence[Callable[[], AbstractContextManager[None]]],
    prompt: torch.Tensor,
    *,
    new_tokens: int = 32,
    repetitions: int = 5,
) -> list[dict[str, float]]:
    """Tokens per second of prefill and decode for each variant: {"prefill", "decode"}.

    `prompt` is (1, T). A variant is a function that returns a context in which the model is that
    variant. Variants take turns, so that a machine that slows down slows all of them; one round
    warms up, and the medians of `repetitions` more are returned.
    """
    prompt = prompt.to(model.device)

    def generate(as_variant: Callable[[], AbstractContextManager[None]]) -> Stopwatch:
        with as_variant(), torch.inference_mode():
            watch = Stopwatch()
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                streamer=watch,
                pad_token_id=0,
            )
        return watch

    calls = {i: functools.partial(generate, variant) for i, variant in enumerate(variants)}
    seen = in_turns(calls, 1 + repetitions)
    return [
        {
            "prefill": statistics.median(prompt.shape[1] / watch.prefill for watch in watches[1:]),
            "decode": statistics.median(1 / watch.decode for watch in watches[1:]),
        }
        for watches in seen.values()
    ]


def measure_points(
    model: PreTrainedModel,
    change: Change,
    choices: Sequence[Sequence[int]],
    cosine_order: Sequence[int],
    *,
    batches: Iterable[Any] | None = None,
    other: Iterable[Any] | None = None,
    keeps_states: bool = False,
    instead: Change | None = None,
    watch: Callable = lambda batches, what: batches,
) -> list[dict[str, Any]]:
    """One row for the dense model and one for each choice of layers: what a record calls points.

    change(layers) replaces these layers of the model. KV bytes per token are those of the changed
    model, and, where it keeps states (of a memory, of windows), the bytes of these per sequence.
    With `batches`, its perplexity, or that of `instead`, where the change is dropping itself, and
    the perplexity of dropping as many layers in `cosine_order`, and of dropping the same layers;
    with `other`, batches of another kind of text, on these too the first two of them. `watch` may
    wrap the batches of each pass, to show progress.
    """
    texts = {"perplexity": batches, "other": other}
    texts = {name: text for name, text in texts.items() if text is not None}
    after_drop: dict[frozenset, dict[str, float]] = {}

    def measured(name: str) -> dict[str, float]:
        found = {}
        for text, read in texts.items():
            what = f"perplexity, {name}" + (", other text" if text == "other" else "")
            found[text] = perplexity(model, watch(read, what)).value
        return found

    def measured_dropped(layers: Sequence[int], name: str) -> dict[str, float]:
        key = frozenset(layers)
        if key not in after_drop:
            with dropped(model, layers):
                after_drop[key] = measured(name)
        return after_drop[key]

    points = []
    for layers in [[], *map(list, choices)]:
        m = len(layers)
        point = {"layers": layers}
        with variant(model, change, layers):
            point["kv_bytes_per_token"] = kv_bytes_per_token(model)
            if keeps_states:
                point["state_bytes"] = state_bytes(model)
        if batches is not None:
            with variant(model, instead or change, layers):
                found = measured(f"NBL-{m}" if m else "dense")
            point["perplexity"] = found["perplexity"]
            if other is not None:
                point["other"] = {"perplexity": found["other"]}
            if m:
                by_cosine = measured_dropped(cosine_order[:m], f"drop-{m} by cosine")
                same = measured_dropped(layers, f"drop-{m}, same layers")
                point["drop"] = {
                    "layers": list(cosine_order[:m]),
                    "perplexity": by_cosine["perplexity"],
                }
                point["drop_same"] = {"layers": layers, "perplexity": same["perplexity"]}
                if other is not None:
                    point["other"]["drop"] = by_cosine["other"]
        points.append(point)
    return points


@contextmanager
def variant(model: PreTrainedModel, change: Change, layers: Sequence[int]) -> Iterator[None]:
    """A context in which the model is what change(layers) makes of it; without layers, itself."""
    if not layers:
        yield
        return
    change(layers)
    try:
        yield
    finally:
        restore(model)


@contextmanager
def dropped(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """A context in which these layers have no attention."""
    with variant(model, functools.partial(drop_attention, model), layers):
        yield


def describe_model(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """The record's "model"."""
    config = model.config.get_text_config()
    return {
        "name": name,
        "type": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
