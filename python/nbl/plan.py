"""plan: which kind for which layer, so that a model costs no more than it may and loses little."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

import nbl_kernels as nk

from .batches import read_batches
from .calibration import Calibration, added_losses
from .checks import check_model, check_no_draft
from .costs import Cost, attention_cost, other_cost
from .layers.linearized import LinearizedDecoderLayer, linear_layer, map_spec, replaced
from .layers.spec import LayerSpec, layer_specs
from .layers.windowed import windowed_layer
from .linearize import drop as drop_attention
from .linearize import linearize
from .perplexity import eval_mode
from .window import Window

__all__ = ["Plan", "PlanPoint", "kind_name", "plan"]

KEEP = "keep"


@dataclass(frozen=True)
class PlanPoint:
    """One step on the way from the model as it is to the plan.

    layer, kind, instead_of: what was changed; None in the first point, the model as it is.
    loss: what all changes so far add to the mean negative log-likelihood, measured together.
    cost: of a decode step then. saved: bytes of it that this change saves.
    """

    layer: int | None
    kind: str | None
    instead_of: str | None
    loss: float
    cost: Cost
    saved: int = 0


@dataclass(frozen=True)
class _Choice:
    """One kind for one layer."""

    layer: int
    kind: str
    spec: LayerSpec
    module: nn.Module
    cost: Cost
    solved: nk.Lmmse | None = None
    source: tuple[Calibration, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` chose.

    layers: {layer: kind} of the layers that change; kinds are named as "window 128+1", "map",
        "map rank 72", "memory", "memory rank 72", "drop".
    loss: what they add to the mean negative log-likelihood together, measured.
    front: the points on the way, the model as it is first: every one of them is a plan.
    alone: {(layer, kind): what this change alone adds}, measured on the first quarter of the text.
    context, batch: what it was made for.
    """

    layers: dict[int, str]
    loss: float
    front: list[PlanPoint]
    alone: dict[tuple[int, str], float]
    context: int
    batch: int
    _made: dict[tuple[int, str], _Choice] = field(repr=False)

    @property
    def specs(self) -> dict[int, LayerSpec]:
        """{layer: what is put in its place}."""
        return {i: self._made[i, kind].spec for i, kind in self.layers.items()}

    @property
    def maps(self) -> dict[int, nk.Lmmse]:
        """{layer: its map}, of those that become maps."""
        solved = {i: self._made[i, kind].solved for i, kind in self.layers.items()}
        return {i: one for i, one in solved.items() if one is not None}

    def at(self, point: int) -> Plan:
        """The plan that the front's point of this index is."""
        if type(point) is not int or not 0 <= point < len(self.front):
            raise ValueError(
                f"point: expected an index of the front, 0 to {len(self.front) - 1}, got {point!r}"
            )
        front = self.front[: point + 1]
        layers = {p.layer: p.kind for p in front if p.layer is not None and p.kind is not None}
        return replace(self, layers=dict(sorted(layers.items())), loss=front[-1].loss, front=front)

    @property
    def cost(self) -> Cost:
        return self.front[-1].cost

    @property
    def speedup(self) -> float:
        """Bytes of a decode step of the model as it is, over those of the plan."""
        return self.front[0].cost.bytes / self.cost.bytes

    @property
    def kv_share(self) -> float:
        """What the layers keep of the text, over what those of the model as it is keep."""
        return self.cost.cache / max(1, self.front[0].cost.cache)

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """Makes the model, which must be the one that was planned for, what the plan says, in
        place; undone by :func:`nbl.restore`."""
        dropped = []
        for i, kind in self.layers.items():
            made = self._made[i, kind]
            if made.source is not None:
                cal, options = made.source
                linearize(model, cal, [i], **options, maps={i: made.solved})
            elif made.spec.window is not None:
                linearize(model, None, [i], window=made.spec.window)
            else:
                dropped.append(i)
        return drop_attention(model, dropped) if dropped else model


def plan(
    model: PreTrainedModel,
    cal: Calibration | Sequence[Calibration] | None,
    batches: Iterable[Any],
    *,
    context: int,
    batch: int = 1,
    speedup: float | None = None,
    bytes: float | None = None,
    windows: Iterable[Window] | None = None,
    ranks: Iterable[int | None] = (None,),
    drop: bool = True,
    ridge: float = 1e-4,
    bias: bool = True,
    remeasured: int = 4,
    say: Callable[[str], None] | None = None,
) -> Plan:
    """Chooses for every layer to keep its attention, bound it by a window, replace it by a map, or
    drop it, so that a decode step costs no more than asked for and the loss rises least.

    The cost is counted: bytes of weights, keys, values and states that a decode step of `batch`
    sequences of `context` tokens reads, which is what it takes its time for. The loss is measured:
    first of every change alone, on the first quarter of `batches`; then step by step the change
    that adds least for what it saves is made, the most promising ones being measured anew, on all
    of `batches`, with the changes before them in place. Nothing is changed in the model.

    Args:
        model: a supported causal LM with all its attention.
        cal: what maps are solved from; two of them, one with a memory; None: no maps.
        batches: token batches to measure on. A window costs nothing on texts shorter than it: they
            should be as long as what the model will read, as far as they can be.
        context, batch: how many tokens of how many sequences there are in a decode step.
        speedup: at least so many times fewer bytes of a decode step in all; from 1 on.
        bytes: at most this share of the bytes of keys, values and states, between 0 and 1. At least
            one of the two.
        windows: to choose from, shorter than the longest sequence; None: 128 and 512 tokens and a
            sink, as far as they are at most a quarter of it. ranks: of maps and memories
            (None: full). drop: whether attention may also just go.
        ridge, bias: of the maps.
        remeasured: how many changes are measured in each step.
        say: called with a sentence for each step.

    Returns:
        Plan. ``plan.apply(model)`` makes the model what it says.

    Raises:
        ValueError: naming the argument; where no choice of kinds is cheap enough, how far it goes.
    """
    check_model(model)
    check_no_draft(model)
    if layer_specs(model.config):
        raise ValueError("model: expected one with all its attention: start from the original")
    for name, number in (("context", context), ("batch", batch), ("remeasured", remeasured)):
        if type(number) is not int or number < 1:
            raise ValueError(f"{name}: expected a positive int, got {number!r}")
    if speedup is None and bytes is None:
        raise ValueError("speedup, bytes: expected one of them, got neither")
    if speedup is not None and not (isinstance(speedup, int | float) and speedup >= 1):
        raise ValueError(f"speedup: expected a number from 1 on, got {speedup!r}")
    if bytes is not None and not (isinstance(bytes, int | float) and 0 <= bytes <= 1):
        raise ValueError(f"bytes: expected a share between 0 and 1, got {bytes!r}")
    cals = [] if cal is None else [cal] if isinstance(cal, Calibration) else list(cal)
    for one in cals:
        one.check_model(model)
    if len({one.memory is None for one in cals}) < len(cals):
        raise ValueError(
            "cal: expected one calibration without and one with a memory at most, got "
            f"{[one.memory for one in cals]}"
        )
    say = say or (lambda sentence: None)
    batches = batches if isinstance(batches, list | tuple) else list(batches)
    if not batches:
        raise ValueError("batches: expected token batches to measure on, got none")
    longest = max(batch.input_ids.shape[1] for batch in read_batches(batches, model))
    sizes = {"context": context, "batch": batch}
    windows = _windows(windows, longest)
    layers = range(model.config.num_hidden_layers)
    stock = {i: attention_cost(model.model.layers[i], None, **sizes) for i in layers}
    options = {"ridge": ridge, "bias": bias}
    choices = _choices(model, cals, stock, list(windows), list(ranks), drop, options, sizes)
    if not choices:
        raise ValueError("windows, ranks, drop, cal: no kind is cheaper than the attention itself")
    needs = _Needs(other_cost(model, batch=batch), stock, speedup, bytes)
    needs.check(choices)

    with ExitStack() as changed, eval_mode(model):
        for choice in choices.values():
            choice.module.eval()
        sample = batches[: max(1, len(batches) // 4)]
        say(f"measuring {len(choices)} changes alone")
        candidates = {key: (c.layer, c.module) for key, c in choices.items()}
        _, alone, _ = added_losses(model, candidates, sample)
        search = _Search(choices, dict(alone), stock)
        first = needs.cost({})
        front = [PlanPoint(None, None, None, 0.0, first)]
        base = None
        while not needs.met(front[-1].cost):
            likely = search.moves(needs, front[-1].cost)[:remeasured]
            if not likely:
                total, cache = needs.left(front[-1].cost)
                raise ValueError(
                    f"speedup, bytes: expected less of both together: {total:,.0f} bytes of a step "
                    f"and {cache:,.0f} of the cache are left that no change saves without costing "
                    "the other"
                )
            found = {key: (c.layer, c.module) for key, c in ((k, choices[k]) for k in likely)}
            now, added, _ = added_losses(model, found, batches)
            base = now if base is None else base
            search.note(added)
            key = search.moves(needs, front[-1].cost, only=added)[0]
            choice, before = choices[key], search.now.get(key[0])
            changed.enter_context(replaced(model, choice.layer, choice.module))
            search.make(key)
            cost = needs.cost(search.chosen())
            point = PlanPoint(
                *key,
                KEEP if before is None else before,
                now + added[key] - base,
                cost,
                front[-1].cost.bytes - cost.bytes,
            )
            front.append(point)
            say(
                f"layer {point.layer}: {point.kind} instead of {point.instead_of}, "
                f"{point.saved:,} bytes less, loss {point.loss:+.4f} in all"
            )
    return Plan(
        layers=dict(sorted(search.now.items())),
        loss=front[-1].loss,
        front=front,
        alone=dict(alone),
        context=context,
        batch=batch,
        _made={key: choices[key] for key in search.path},
    )


def kind_name(spec: LayerSpec) -> str:
    """As a plan names it."""
    if spec.kind == "window":
        return f"window {spec.size}+{spec.sinks}"
    if spec.kind == "drop":
        return "drop"
    name = "memory" if spec.has_memory else "map"
    return name if spec.rank is None else f"{name} rank {spec.rank}"


def _windows(given: Iterable[Window] | None, longest: int) -> list[Window]:
    """Those that texts of this length can say something about."""
    if given is None:
        sizes = [size for size in (128, 512) if 4 * size <= longest]
        return [Window(size) for size in sizes or [max(1, longest // 4)]]
    windows = list(given)
    blind = [window for window in windows if window.size >= longest]
    if blind:
        raise ValueError(
            f"windows: expected fewer tokens than the longest sequence of batches has, {longest}, "
            f"got {blind[0].size}: what it costs would not be seen"
        )
    return windows


def _choices(
    model: PreTrainedModel,
    cals: Sequence[Calibration],
    stock: Mapping[int, Cost],
    windows: Sequence[Window],
    ranks: Sequence[int | None],
    drop: bool,
    options: dict[str, Any],
    sizes: dict[str, int],
) -> dict[tuple[int, str], _Choice]:
    """Every kind of every layer that reads fewer bytes than its attention."""
    decoder = model.model.layers
    found: dict[tuple[int, str], _Choice] = {}

    def add(layer: int, spec: LayerSpec, make: Callable[[], nn.Module], **more: Any) -> None:
        cost, key = attention_cost(decoder[layer], spec, **sizes), (layer, kind_name(spec))
        cheaper = cost.bytes < stock[layer].bytes or cost.cache < stock[layer].cache
        if cheaper and key not in found:
            found[key] = _Choice(*key, spec, make(), cost, **more)

    for i in stock:
        for window in windows:
            spec = LayerSpec.of_window(window)
            add(i, spec, lambda i=i, spec=spec: windowed_layer(decoder[i], spec, i))
        if drop:
            spec = LayerSpec("drop")
            add(i, spec, lambda i=i, spec=spec: LinearizedDecoderLayer(decoder[i], spec))
    for cal in cals:
        for rank in ranks:
            own = {**options, "rank": rank}
            for i, solved in cal.solve(**own).items():
                spec = map_spec(solved, features=cal.features, bias=own["bias"], rank=rank)
                add(
                    i,
                    spec,
                    lambda i=i, spec=spec, solved=solved: linear_layer(decoder[i], spec, solved, i),
                    solved=solved,
                    source=(cal, own),
                )
    return found


class _Needs:
    """What a plan may cost."""

    def __init__(
        self,
        other: Cost,
        stock: Mapping[int, Cost],
        speedup: float | None,
        share: float | None,
    ) -> None:
        self.other, self.stock = other, stock
        dense = self.cost({})
        self.bytes = None if speedup is None else dense.bytes / speedup
        self.cache = None if share is None else share * dense.cache
        self.dense = dense

    def cost(self, chosen: Mapping[int, Cost]) -> Cost:
        return sum((chosen.get(i, own) for i, own in self.stock.items()), self.other)

    def left(self, cost: Cost) -> tuple[float, float]:
        """Bytes that are still too many, in all and of the cache."""
        total = 0.0 if self.bytes is None else max(0.0, cost.bytes - self.bytes)
        return total, 0.0 if self.cache is None else max(0.0, cost.cache - self.cache)

    def met(self, cost: Cost) -> bool:
        return self.left(cost) == (0.0, 0.0)

    def progress(self, left: tuple[float, float], before: Cost, after: Cost) -> float:
        """Which part of what is still too much a change saves: no more than all of it counts."""
        saved = (before.bytes - after.bytes, before.cache - after.cache)
        parts = [min(s, most) / most for s, most in zip(saved, left, strict=True) if most > 0]
        return sum(parts) if min(parts, default=0.0) >= 0 else 0.0

    def check(self, choices: Mapping[tuple[int, str], _Choice]) -> None:
        """ValueError where the cheapest choice of all costs too much."""
        dense = self.dense
        if self.cache is not None:
            least = self._least(choices, "cache")
            if least > self.cache:
                raise ValueError(
                    f"bytes: expected a share from {least / max(1, dense.cache):.3f} on, the least "
                    f"that these kinds keep, got {self.cache / dense.cache:.3f}"
                )
        if self.bytes is not None:
            least = self._least(choices, "bytes")
            if least > self.bytes:
                raise ValueError(
                    f"speedup: expected at most {dense.bytes / least:.3f}, which is the most that "
                    f"these kinds give, got {dense.bytes / self.bytes:.3f}"
                )

    def _least(self, choices: Mapping[tuple[int, str], _Choice], what: str) -> int:
        """Of "bytes" or "cache", with the kind of every layer that has the fewest."""
        least = {i: getattr(cost, what) for i, cost in self.stock.items()}
        for (i, _), choice in choices.items():
            least[i] = min(least[i], getattr(choice.cost, what))
        return sum(least.values()) + getattr(self.other, what)


class _Search:
    """What is known of the changes, and which ones were made."""

    def __init__(
        self,
        choices: Mapping[tuple[int, str], _Choice],
        alone: dict[tuple[int, str], float],
        stock: Mapping[int, Cost],
    ) -> None:
        self.choices, self.alone, self.stock = choices, alone, stock
        self.now: dict[int, str] = {}
        self.path: list[tuple[int, str]] = []
        self.last: dict[tuple[int, str], float] = {}  # as measured, from the layer's kind of now

    def chosen(self) -> dict[int, Cost]:
        return {i: self.choices[i, kind].cost for i, kind in self.now.items()}

    def note(self, added: Mapping[tuple[int, str], float]) -> None:
        self.last |= added

    def make(self, key: tuple[int, str]) -> None:
        self.now[key[0]] = key[1]
        self.path.append(key)
        for other in [k for k in self.last if k[0] == key[0]]:
            del self.last[other]

    def added(self, key: tuple[int, str]) -> float:
        if key in self.last:
            return self.last[key]
        kind = self.now.get(key[0])
        return self.alone[key] - (0.0 if kind is None else self.alone[key[0], kind])

    def moves(
        self, needs: _Needs, cost: Cost, only: Iterable[tuple[int, str]] | None = None
    ) -> list[tuple[int, str]]:
        """The changes that save what is needed, the one that adds least for it first."""
        left = needs.left(cost)
        rated = []
        for key, choice in self.choices.items():
            kind = self.now.get(key[0])
            before = self.stock[key[0]] if kind is None else self.choices[key[0], kind].cost
            if kind == key[1] or (only is not None and key not in only):
                continue
            progress = needs.progress(left, before, choice.cost)
            if progress > 0:
                # Less than nothing is chance: of two such changes the one that saves more.
                rated.append((max(self.added(key), 1e-5) / progress, key))
        return [key for _, key in sorted(rated)]
