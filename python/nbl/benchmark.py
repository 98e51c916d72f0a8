"""How fast a model decodes and reads prompts: beside transformers, and beside what the machine can.

`nbl bench` and the repository's benchmarks/ share this. Engines take turns, repetition by
repetition, so that a machine that slows down slows all of them; what the machine can do (reading
memory for decode, multiplying matrices for prefill) is measured in the same turns. A result is a
plain dictionary, a *case*:

    kind       "decode" | "prefill";  batch, context;  repetitions
    limit      {name, rate}: the best of what was measured, in bytes/s or FLOP/s; rates {name: rate}
    in_turns   whether engines took turns; False where their caches do not fit in memory together
    rows       [{engine, layers, tokens_per_second (the median), quartiles, samples, work,
               ceiling, percent_of_ceiling, times_eager, first_token_agrees}, ...]
    absent     {engine: why it is not among the rows}

`layers` counts linearized layers, `work` is bytes per step or FLOPs per prompt, `ceiling` the
tokens per second if nothing but that work took time.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import nbl_kernels as nk
from nbl_kernels import machine

from .calibration import Calibration
from .engines import EAGER, Engine, attentions, model_engines
from .layers.spec import linearized_layers
from .layers.windowed import WindowedAttention
from .optimize import weight_bytes
from .upstream import sliding_window

__all__ = [
    "RANDOM_MAPS",
    "Bandwidth",
    "MatmulRate",
    "decode_bytes",
    "measure_decode",
    "measure_prefill",
    "prefill_flops",
    "sweep",
]

RANDOM_MAPS = (
    "The linear maps are random: speed does not depend on their values, nor do these tokens/s say "
    "anything about quality."
)
_PAUSE = 0.02  # before a turn: the threads of the engine before have stopped spinning by then
_WARM_UP = 2  # decode steps


# --- what must be read or computed ----------------------------------------------------------------


def decode_bytes(model: PreTrainedModel, batch: int, context: int) -> float:
    """Bytes that one decode step of `batch` rows must read: the weights of layers, last norm and
    head once, as they are stored, and the keys and values of `context` tokens per row, within
    each layer's window. (Of the embedding it reads some rows: nothing.)"""
    read = weight_bytes(model)
    for attention in attentions(model):
        tokens = min(context, _seen(attention) or context)
        kv_size = attention.k_proj.out_features + attention.v_proj.out_features
        read += batch * tokens * kv_size * model.model.norm.weight.itemsize
    return read


def _seen(attention: Any) -> int | None:
    """How many tokens a token sees at most; None: all."""
    if isinstance(attention, WindowedAttention):
        return attention.spec.window.slots
    return sliding_window(attention)


def prefill_flops(model: PreTrainedModel, batch: int, length: int) -> float:
    """FLOPs of a prompt (batch, length): two per weight and token, the causal half of the
    attention, and the head for the last token only."""
    tokens = batch * length
    linears = [
        m
        for layer in model.model.layers
        for m in layer.modules()
        if hasattr(m, "in_features") and hasattr(m, "out_features")
    ]
    flops = 2.0 * tokens * sum(m.in_features * m.out_features for m in linears)
    for attention in attentions(model):
        window = min(length, _seen(attention) or length)
        pairs = length * window - window * (window - 1) / 2
        flops += 4.0 * batch * pairs * attention.q_proj.out_features
    return flops + 2.0 * batch * model.lm_head.in_features * model.lm_head.out_features


class Bandwidth:
    """What reading memory can do, measured at every call: bytes/s of each loop."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._block = torch.zeros(1 << 27, device=device)
            self._target = torch.empty_like(self._block)
            return
        self._block = torch.ones(machine.BLOCK_BYTES // 4)
        nk.use_huge_pages(self._block)
        self._loops = {name: machine.READ_LOOPS[name] for name in machine.best_read_loops()}

    def __call__(self) -> dict[str, float]:
        block = self._block
        if self._device.type == "cuda":
            times = 10  # so that launching does not count
            taken = machine.seconds(
                lambda: [self._target.copy_(block) for _ in range(times)], self._device
            )
            return {"copy, read and written bytes": times * 2 * block.nbytes / taken}
        return {
            f"read, {name}": block.nbytes / machine.seconds(lambda read=read: read(block))
            for name, read in self._loops.items()
        }


class MatmulRate:
    """What multiplying matrices can do, measured at every call: FLOP/s of torch.matmul in the
    model's dtype and, as some processors multiply nothing else fast, in float32."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtypes = [dtype] if device.type == "cuda" else [*{dtype, torch.float32}]

    def __call__(self) -> dict[str, float]:
        return {
            f"matmul, {str(dtype).removeprefix('torch.')}": machine.measure_gemm_rate(
                dtype, self._device
            )
            for dtype in self._dtypes
        }


# --- measuring ------------------------------------------------------------------------------------


def sweep(
    model: PreTrainedModel,
    *,
    kinds: Iterable[str],
    batches: Iterable[int],
    contexts: Iterable[int],
    layers: Iterable[int],
    compiled: bool = False,
    weights: str | None = None,
    calibration: Calibration | None = None,
    steps: int = 8,
    repetitions: int = 5,
    say: Callable[[str], None] = lambda text: None,
    show: Callable[[dict[str, Any]], None] = lambda case: None,
) -> list[dict[str, Any]]:
    """A case for each kind, batch and context; `show` gets each when it is measured. `model` is
    optimized in place. Other arguments as of measure_decode and model_engines."""
    kinds = list(kinds)
    if "decode" in kinds:
        for context in contexts:
            _prompt_length(context, steps, repetitions)  # refused now rather than in an hour
    engines = model_engines(
        model, layers, compiled=compiled, calibration=calibration, weights=weights
    )
    options: dict[str, Any] = {"repetitions": repetitions, "say": say}
    cases = []
    for kind in kinds:
        if kind == "decode":
            limit = Bandwidth(model.device)
            measure = functools.partial(measure_decode, bandwidth=limit, steps=steps)
        else:
            limit = MatmulRate(model.device, model.dtype)
            measure = functools.partial(measure_prefill, matmul=limit)
        for batch in batches:
            for context in contexts:
                cases.append(measure(engines, batch=batch, context=context, **options))
                show(cases[-1])
    return cases


def measure_decode(
    engines: Sequence[Engine],
    *,
    batch: int,
    context: int,
    steps: int = 16,
    repetitions: int = 7,
    bandwidth: Callable[[], dict[str, float]],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """A case of decode. Every repetition goes on where the one before ended, `steps` tokens more;
    the prompt is as long as makes `context` the mean number of tokens attended to.

    Args:
        bandwidth: rates of reading, measured at every call.
        say: is told what is being done.
    """
    room = _room(steps, repetitions)
    length = _prompt_length(context, steps, repetitions)
    prompts = _prompts(engines[0].model, batch, length)
    first = {}

    def begin(engine: Engine) -> None:
        say(f"{engine.name}: prompt of {batch} x {length}")
        _, first[engine.name] = engine.prefill(prompts, room)
        engine.decode(_WARM_UP)

    samples, rates, absent, in_turns = _take_turns(
        engines, begin, lambda engine: engine.decode(steps), repetitions, bandwidth, say
    )
    speeds = {name: [batch * steps / t for t in times] for name, times in samples.items()}
    work = {e.name: decode_bytes(e.model, batch, context) for e in engines}
    return {
        "kind": "decode",
        "batch": batch,
        "context": context,
        "prompt_tokens": length,
        "tokens_per_repetition": steps,
        "repetitions": repetitions,
        **_judge(engines, speeds, rates, work, batch, first),
        "in_turns": in_turns,
        "absent": absent,
    }


def measure_prefill(
    engines: Sequence[Engine],
    *,
    batch: int,
    context: int,
    repetitions: int = 5,
    matmul: Callable[[], dict[str, float]],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """A case of prefill: prompts of `context` tokens, until the first new token. Arguments as of
    measure_decode."""
    prompts = _prompts(engines[0].model, batch, context)
    first = {}

    def begin(engine: Engine) -> None:
        say(f"{engine.name}: first prompt of {batch} x {context}")
        _, first[engine.name] = engine.prefill(prompts, 1)

    samples, rates, absent, in_turns = _take_turns(
        engines, begin, lambda engine: engine.prefill(prompts, 1)[0], repetitions, matmul, say
    )
    speeds = {name: [prompts.numel() / t for t in times] for name, times in samples.items()}
    work = {e.name: prefill_flops(e.model, batch, context) for e in engines}
    return {
        "kind": "prefill",
        "batch": batch,
        "context": context,
        "repetitions": repetitions,
        **_judge(engines, speeds, rates, work, prompts.numel(), first),
        "in_turns": in_turns,
        "absent": absent,
    }


def _room(steps: int, repetitions: int) -> int:
    """New tokens of a case of decode, the one that the prompt gives among them."""
    return 1 + _WARM_UP + steps * repetitions


def _prompt_length(context: int, steps: int, repetitions: int) -> int:
    half = _room(steps, repetitions) // 2
    if context <= half:
        raise ValueError(
            f"context: expected at least {half + 1} for {repetitions} repetitions of {steps} "
            f"tokens, half of which it counts, got {context}"
        )
    return context - half


def _prompts(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)


def _take_turns(
    engines: Sequence[Engine],
    begin: Callable[[Engine], None],
    turn: Callable[[Engine], float],
    repetitions: int,
    limit: Callable[[], dict[str, float]],
    say: Callable[[str], None],
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, str], bool]:
    """Times of every engine and rates of the limit, repetition by repetition; who is absent, and
    why; whether they took turns. Engines whose caches do not fit in memory together go one after
    the other."""
    samples: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    absent: dict[str, str] = {}

    def attempt(engine: Engine, call: Callable[[Engine], Any]) -> Any:
        try:
            return call(engine)
        except Exception as error:
            if not engine.optional or isinstance(error, torch.OutOfMemoryError):
                raise
            absent[engine.name] = _reason(error)
            samples.pop(engine.name, None)
            return None

    try:
        for engine in engines:
            attempt(engine, begin)
        present = [engine for engine in engines if engine.name not in absent]
        for repetition in range(repetitions):
            say(f"repetition {repetition + 1} of {repetitions}")
            for engine in present:
                time.sleep(_PAUSE)
                taken = attempt(engine, turn)
                if taken is not None:
                    samples.setdefault(engine.name, []).append(taken)
            present = [engine for engine in present if engine.name not in absent]
            for name, rate in limit().items():
                rates.setdefault(name, []).append(rate)
        return samples, rates, absent, True
    except torch.OutOfMemoryError:
        samples, rates = {}, {}
        if len(engines) == 1:
            return samples, rates, absent | {engines[0].name: "out of memory"}, False
    finally:
        for engine in engines:
            engine.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for engine in engines:
        times, alone, why, _ = _take_turns([engine], begin, turn, repetitions, limit, say)
        samples |= times
        absent |= why
        for name, values in alone.items():
            rates.setdefault(name, []).extend(values)
    return samples, rates, absent, False


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _judge(
    engines: Sequence[Engine],
    speeds: dict[str, list[float]],
    rates: dict[str, list[float]],
    work: dict[str, float],
    tokens: int,
    first: dict[str, list[int]],
) -> dict[str, Any]:
    """The rows and the limit. `tokens`: what `work` yields."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max(medians, key=medians.get, default=None)
    baseline = next((e.name for e in engines if e.name == EAGER and e.name in speeds), None)
    rows = []
    for engine in engines:
        values = speeds.get(engine.name)
        if not values:
            continue
        speed = statistics.median(values)
        layers = len(linearized_layers(engine.model))
        ceiling = tokens * medians[best] / work[engine.name]
        same = baseline and layers == 0
        rows.append(
            {
                "engine": engine.name,
                "layers": layers,
                "tokens_per_second": speed,
                "quartiles": _quartiles(values),
                "samples": values,
                "work": work[engine.name],
                "ceiling": ceiling,
                "percent_of_ceiling": 100 * speed / ceiling,
                "times_eager": speed / statistics.median(speeds[baseline]) if baseline else None,
                "first_token_agrees": first[engine.name] == first[baseline] if same else None,
            }
        )
    limit = {"name": best, "rate": medians[best]} if best else None
    return {"limit": limit, "rates": medians, "rows": rows}


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
