"""What generates, to be measured: transformers' own code, and ours with so many linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import nbl_kernels as nk
from nbl_kernels import machine

from .calibration import Calibration
from .layers.spec import linearized_layers
from .models import model_type_of
from .optimize import optimize
from .runner import Runner, draft_model
from .upstream import CACHE

__all__ = [
    "EAGER",
    "Engine",
    "Ours",
    "Transformers",
    "attentions",
    "model_engines",
    "our_engines",
    "twin",
]

EAGER = "transformers eager"
COMPILED = "transformers static + compile"
_TOKENS_PER_PASS = 65_536  # of a prompt in one of transformers' forward passes


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
            heads, size = config.num_key_value_heads, next(attentions(self.model)).head_dim
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


def attentions(model: PreTrainedModel) -> Iterator[Any]:
    """Those that are left."""
    for layer in model.model.layers:
        if hasattr(layer, "self_attn"):
            yield layer.self_attn
