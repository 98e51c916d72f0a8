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

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import nbl_kernels as nk
from nbl_kernels import machine

from .calibration import Calibration
from .layers.spec import linearized_layers
from .models import model_type_of
from .optimize import optimize, weight_bytes
from .runner import Runner, draft_model
from .upstream import CACHE, sliding_window

__all__ = [
    "Engine",
    "Ours",
    "Transformers",
    "decode_bytes",
    "measure_decode",
    "measure_prefill",
    "model_engines",
    "our_engines",
    "prefill_flops",
    "sweep",
    "twin",
]

EAGER = "transformers eager"
COMPILED = "transformers static + compile"
RANDOM_MAPS = (
    "The linear maps are random: speed does not depend on their values, nor do these tokens/s say "
    "anything about quality."
)
_TOKENS_PER_PASS = 65_536  # of a prompt in one of transformers' forward passes
_PAUSE = 0.02  # before a turn: the threads of the engine before have stopped spinning by then
_WARM_UP = 2  # decode steps


# --- the engines ----------------------------------------------------------------------------------


class Engine(Protocol):
    """Something that generates greedily, for a batch at a time, and keeps its place."""

    name: str
    model: PreTrainedModel  # whose bytes and FLOPs its ceiling counts
    optional: bool  # may fail: it is then absent from the table, with its error

    def prefill(self, prompts: Tensor, room: int) -> tuple[float, list[int]]:
        """Runs prompts (B, T) into a cache with room for that many new tokens; the seconds until
        the first of them, and that token of each row."""

    def decode(self, steps: int) -> float:
        """Seconds for that many more tokens of every row."""

    def close(self) -> None:
        """Gives the cache back."""


class Transformers:
    """transformers' own code in a plain greedy loop (what `generate` adds to it is left out).

    compiled: a static cache, and the forward pass through torch.compile, on a GPU with its CUDA
    graphs. A prompt's pass is compiled only where nothing else is asked for: each shape costs a
    compilation.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False) -> None:
        self.name = COMPILED if compiled else EAGER
        self.model = model
        self.optional = compiled
        self._compiled = compiled
        self._static: tuple[tuple[int, int], StaticCache] | None = None

    def prefill(self, prompts: Tensor, room: int) -> tuple[float, list[int]]:
        prompts = prompts.to(self.model.device)
        rows, length = prompts.shape
        cache = self._cache(rows, length + room)
        forward = self._forward if room == 1 else self.model

        def run() -> None:
            for part in prompts.split(max(1, _TOKENS_PER_PASS // rows), dim=1):
                self._tokens = self._step(forward, part, cache)

        taken = machine.seconds(run, prompts.device)
        self._cache_in_use = cache
        return taken, self._tokens[:, 0].tolist()

    def decode(self, steps: int) -> float:
        def run() -> None:
            for _ in range(steps):
                self._tokens = self._step(self._forward, self._tokens, self._cache_in_use)

        return machine.seconds(run, self.model.device)

    def close(self) -> None:
        self._static = self._cache_in_use = None
        if self._compiled:
            torch.compiler.reset()
            vars(self).pop("_forward_compiled", None)

    @property
    def _forward(self) -> Callable[..., Any]:
        if not self._compiled:
            return self.model
        if "_forward_compiled" not in vars(self):
            mode = "reduce-overhead" if self.model.device.type == "cuda" else None
            self._forward_compiled = torch.compile(self.model.forward, dynamic=False, mode=mode)
        return self._forward_compiled

    @torch.no_grad()  # inference mode would make caches that nothing else may reset
    def _step(self, forward: Callable[..., Any], tokens: Tensor, cache: Any) -> Tensor:
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        out = forward(tokens, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(dim=-1)

    def _cache(self, rows: int, length: int) -> Any:
        config = self.model.config
        if not self._compiled:
            return DynamicCache(config=config)
        if self._static is None or self._static[0] != (rows, length):
            cache = StaticCache(config=config, max_cache_len=length)
            heads, size = config.num_key_value_heads, next(_attentions(self.model)).head_dim
            where = {"dtype": self.model.dtype, "device": self.model.device}
            cache.early_initialization(rows, heads, size, **where)
            self._static = ((rows, length), cache)
        else:
            self._static[1].reset()
        return self._static[1]


class Ours:
    """Runner; on a GPU with CUDA graphs."""

    optional = False

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.name = name
        self.model = model
        self.runner: Runner | None = None

    def prefill(self, prompts: Tensor, room: int) -> tuple[float, list[int]]:
        sizes = (prompts.shape[0], prompts.shape[1] + room)
        runner = self.runner
        if runner is None or (runner.max_batch_size, runner.max_length) != sizes:
            self.close()
            on_gpu = self.model.device.type == "cuda"
            self.runner = runner = Runner(self.model, *sizes, cuda_graphs=on_gpu)
        first: list[int] = []

        def run() -> None:
            self._stream = runner.stream(prompts, room, stop=[])
            first.extend(next(self._stream).tolist())

        return machine.seconds(run, self.model.device), first

    def decode(self, steps: int) -> float:
        def run() -> None:
            for _ in range(steps):
                next(self._stream)

        return machine.seconds(run, self.model.device)

    def close(self) -> None:
        self.runner = self._stream = None


def our_engines(
    model: PreTrainedModel,
    counts: Iterable[int],
    *,
    calibration: Calibration | None = None,
    weights: str | None = None,
) -> list[Ours]:
    """An engine for each number of linearized layers, all of them on the weights of `model`, which
    is optimized in place.

    calibration: where the maps come from. None: random ones, in the last layers.
    weights: of nbl.optimize.

    Raises:
        ValueError: more layers than the model has, or fewer than it has linearized already.
    """
    own, total = len(linearized_layers(model)), model.config.num_hidden_layers
    for count in counts:
        if not own <= count <= total:
            raise ValueError(
                f"layers: expected numbers from {own} (linearized already) to {total}, got {count}"
            )
    options = {} if weights is None else {"weights": weights}
    optimize(model, **options)
    engines = []
    for count in counts:
        linearized = model
        if count > own:
            cal, layers, maps = calibration, count - own, None
            if cal is None:
                cal, maps = _random_maps(model, count - own)
                layers = list(maps)
            linearized = draft_model(model, cal, layers, maps=maps)
        name = f"ours NBL-{count}" if count else "ours dense"
        engines.append(Ours(linearized, f"{name}, {weights}" if weights else name))
    return engines


def model_engines(
    model: PreTrainedModel,
    counts: Iterable[int],
    *,
    eager: bool = True,
    compiled: bool = False,
    calibration: Calibration | None = None,
    weights: str | None = None,
) -> list[Transformers | Ours]:
    """transformers' engines, and ours for each of `counts`; arguments as of our_engines.

    On a GPU, and where `weights` is None, they share the weights. Not on a CPU: nbl.optimize moves
    weights into huge pages, which transformers would profit from.
    """
    share = model.device.type == "cuda" and weights is None
    stock = twin(model, share=False) if (eager or compiled) and not share else None
    ours = our_engines(model, counts, calibration=calibration, weights=weights)
    if stock is None and (eager or compiled):
        stock = twin(model, share=True)
    wanted = [kind for kind, is_wanted in ((False, eager), (True, compiled)) if is_wanted]
    return [*(Transformers(stock, compiled=kind) for kind in wanted), *ours]


def _random_maps(model: PreTrainedModel, count: int) -> tuple[Calibration, dict[int, nk.Lmmse]]:
    """Maps for the last `count` layers with attention, and a calibration that knows no more than
    which layers these are."""
    own, size = linearized_layers(model), model.config.hidden_size
    layers = [i for i in range(model.config.num_hidden_layers) if i not in own][-count:]
    like = model.model.norm.weight
    where = {"dtype": like.dtype, "device": like.device}
    weight = torch.randn(size, size, **where) * (0.1 / size**0.5)
    nothing = torch.zeros(())
    solved = nk.Lmmse(weight, torch.zeros(size, **where), nmse=nothing, ridge=nothing)
    cal = Calibration(
        model_type=model_type_of(model),
        num_hidden_layers=model.config.num_hidden_layers,
        hidden_size=size,
        features="post-norm",
        layers=[],
        fingerprint="",
    )
    cal.layers = layers
    return cal, dict.fromkeys(layers, solved)


def twin(model: PreTrainedModel, *, share: bool) -> PreTrainedModel:
    """A model that transformers' own code runs, with the weights of `model`: in the same memory
    (`model` may be optimized), or a copy of it in plain pages, as transformers loads a model."""
    if not share:
        return copy.deepcopy(model)
    with torch.device("meta"):
        other = type(model)(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.model.rotary_emb = model.model.rotary_emb
    return other.eval()


# --- what must be read or computed ----------------------------------------------------------------


def _attentions(model: PreTrainedModel) -> Iterator[Any]:
    for layer in model.model.layers:
        if hasattr(layer, "self_attn"):
            yield layer.self_attn


def decode_bytes(model: PreTrainedModel, batch: int, context: int) -> float:
    """Bytes that one decode step of `batch` rows must read: the weights of layers, last norm and
    head once, as they are stored, and the keys and values of `context` tokens per row, within
    each layer's window. (Of the embedding it reads some rows: nothing.)"""
    read = weight_bytes(model)
    for attention in _attentions(model):
        tokens = min(context, sliding_window(attention) or context)
        kv_size = attention.k_proj.out_features + attention.v_proj.out_features
        read += batch * tokens * kv_size * model.model.norm.weight.itemsize
    return read


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
    for attention in _attentions(model):
        window = min(length, sliding_window(attention) or length)
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
