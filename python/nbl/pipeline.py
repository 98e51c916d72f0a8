"""compress: from a model and a text to a compressed model, and what that costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

import nbl_kernels as nk

from . import measure
from .calibration import CRITERIA, MEASURED, Calibration, calibrate
from .checks import check_layers, check_model, check_no_draft
from .layers.spec import layer_specs
from .linearize import drop as drop_attention
from .linearize import linearize, windowed_layers_of
from .memory import Memory
from .plan import Plan, plan
from .selfcheck import check_installed
from .text import Document, count_tokens, split_documents, token_batches
from .window import Window

__all__ = [
    "CALIBRATION_TOKENS",
    "LOSS_TOKENS",
    "PAPER",
    "Compressed",
    "check_choices",
    "compress",
    "disagreements",
    "length_limit",
    "make_batches",
]

LOSS_TOKENS = 8192  # of the calibration text, on which greedy and loss measure layers
CALIBRATION_TOKENS = 262_144  # 64 per feature dimension at width 4096
EVALUATION_TOKENS = 65_536
_PARTED = 1.5  # times the rise on text of the calibration's kind: the other text is worth a note
# The recipe of arXiv 2505.21077: 256 sequences of 2048 tokens.
PAPER = {"features": "pre-norm", "criterion": "cca", "length": 2048, "max_tokens": 256 * 2048}

# (batches, what is done, passes over them): the batches, read any number of times.
Watch = Callable[[list[Tensor], str, int], Iterable[Tensor]]


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress` did and measured.

    model: the model that was given, compressed in place; :func:`nbl.restore` undoes it.
    layers: the ids of the replaced layers, the first to be replaced first.
    scores: {criterion: the score of layer 0, 1, …}, None for a layer that was not calibrated.
    choice: how they were chosen and fitted (method, criterion, features, bias, rank, ridge, …).
    points: one dict for the dense model and one for each choice of layers (just `layers`, or with
        `sweep` its first ones): layers, kv_bytes_per_token, with a memory state_bytes;
        where it was evaluated perplexity, drop and drop_same, prefill and decode (tokens/s); other:
        {perplexity, drop} on the other text.
    notes: sentences for the user: criteria that disagree, a text that is short for the preset.
    calibration, maps: what was measured, and the maps of these layers, {layer: nk.Lmmse}.
    text, evaluation, other: {"tokens", "length"} of the batches that were read; None: none were.
    speed: how prefill and decode were measured, or None.
    plan: which kind for which layer, where that was asked for.
    """

    model: PreTrainedModel
    layers: list[int]
    scores: dict[str, list[float | None]]
    choice: dict[str, Any]
    points: list[dict[str, Any]]
    notes: list[str]
    calibration: Calibration
    maps: dict[int, nk.Lmmse]
    text: dict[str, int] | None = None
    evaluation: dict[str, int] | None = None
    other: dict[str, int] | None = None
    speed: dict[str, int] | None = None
    plan: Plan | None = None


def compress(
    model: PreTrainedModel,
    tokenizer: Any,
    text: Iterable[Document] | None,
    *,
    layers: int | Iterable[int] | None = None,
    speedup: float | None = None,
    kv_bytes: float | None = None,
    context: int | None = None,
    batch: int | None = None,
    window: Window | None = None,
    preset: Literal["paper"] | None = None,
    criterion: str | None = None,
    features: str | None = None,
    memory: Memory | None = None,
    ridge: float = 1e-4,
    bias: bool = True,
    rank: int | None = None,
    sequential: bool = False,
    refit_mlp: bool = False,
    drop: bool = False,
    calibration: Calibration | None = None,
    evaluate: bool = False,
    eval_text: Iterable[Document] | None = None,
    other_text: Iterable[Document] | None = None,
    eval_tokens: int = EVALUATION_TOKENS,
    sweep: bool | Iterable[int] = False,
    max_tokens: int | None = None,
    loss_tokens: int = LOSS_TOKENS,
    length: int | None = None,
    batch_size: int | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] | None = None,
) -> Compressed:
    """Calibrates, ranks, replaces attention layers, in place, and measures.

    What ``nbl compress`` does::

        done = nbl.compress(model, tokenizer, nbl.text.load_texts(["book.txt"]), layers=12)
        done.model.save_pretrained(OUT), tokenizer.save_pretrained(OUT)

    With `layers`, so many of them become linear maps, or with a `window` see one. With `speedup` or
    `kv_bytes` every layer may be kept, bounded, mapped or dropped, whichever loses least for what
    it saves (:func:`nbl.plan`).

    Args:
        model: a supported causal LM with all its attention layers, in memory, on one device.
        tokenizer: of the model.
        text: documents, strings or chats (:func:`nbl.text.load_texts`), to calibrate on. None or
            empty: with a `calibration` and a criterion that reads none.
        layers: how many, or which; None with `speedup` or `kv_bytes`.
        speedup, kv_bytes: see :func:`nbl.plan`, whose `bytes` the second one is; measured on the
            first `loss_tokens` of the text.
        context, batch: of the decode step that a plan is for: tokens of each sequence (default: the
            model's limit), sequences (1).
        window: :class:`nbl.Window`: the chosen layers keep their attention, which sees this; no map
            is set. Of a plan: the window to choose, in place of 128 and 512 tokens.
        preset: "paper": pre-norm features, criterion "cca", 256 sequences of 2048 tokens, where
            nothing else is given.
        criterion: see :meth:`nbl.Calibration.rank`. Default: "greedy" (on the first `loss_tokens`
            of the text); without text "residual"; with `drop` "cosine".
        features, memory: see :func:`nbl.calibrate`; of a `calibration` that is given, its own.
        ridge, bias, rank: of the maps, see :meth:`nbl.Calibration.solve`.
        sequential, refit_mlp: see :func:`nbl.linearize`.
        drop: only remove the attention: the baseline.
        calibration: use this instead of calibrating.
        evaluate: measure perplexity and speed, beside the dense model and beside dropping: on
            `eval_text`, or on a tenth of the documents, which the calibration then does not see.
        other_text: documents of another kind, to measure perplexity on as well: maps fit the kind
            of text that they are calibrated on, and a note says where the two part.
        eval_tokens: at most so many of them, of either.
        sweep: True: measure every number of layers up to `layers`; or only these numbers.
        max_tokens: read at most so many tokens. Default 262,144.
        loss_tokens: greedy and loss measure on so many of them.
        length, batch_size: tokens per sequence (default 2048, or the model's limit), sequences per
            batch (default about 2048 tokens).
        watch: called with (batches, what is done, passes) before batches are read so many times,
            returns what is read: for progress bars.
        say: called with a sentence where something without batches takes its time.

    Raises:
        ValueError, TypeError: naming the argument; the model is then what it was.
        RuntimeError: under a version of transformers that goes wrong (:mod:`nbl.selfcheck`).
    """
    check_installed()
    check_model(model)
    check_no_draft(model)
    if layer_specs(model.config):
        raise ValueError(
            "model: expected one with all its attention layers, but it is compressed already: "
            "start from the original"
        )
    planned = speedup is not None or kv_bytes is not None
    if planned == (layers is not None):
        raise ValueError(
            "layers, speedup, kv_bytes: expected a number of layers (or ids), or what a plan is to "
            f"reach, got {'both' if planned else 'neither'}"
        )
    own = {"drop": drop, "sequential": sequential, "criterion": criterion, "preset": preset}
    asked = [name for name, value in own.items() if value]
    if planned and (asked or sweep):
        raise ValueError(f"{(asked or ['sweep'])[0]}: expected none with a plan")
    if not planned and (context, batch) != (None, None):
        raise ValueError("context, batch: expected speedup or kv_bytes beside them")
    asked = [name for name in ("drop", "sequential") if own[name]]
    if window is not None and not planned and (asked or memory is not None or rank is not None):
        raise ValueError(
            f"window: expected no {(*asked, 'memory or rank')[0]} beside it: no map is set"
        )
    sizes = None if isinstance(sweep, bool) else sorted(set(sweep))
    sweep = bool(sweep)
    check_choices(drop=drop, memory=memory, sequential=sequential, refit_mlp=refit_mlp, sweep=sweep)
    if rank is not None and rank > model.config.hidden_size:
        raise ValueError(
            f"rank: expected at most {model.config.hidden_size}, the model's width, got {rank}"
        )
    by_number = isinstance(layers, int) and not isinstance(layers, bool)
    if planned:
        layers = []
    if by_number and not 1 <= layers <= model.config.num_hidden_layers:
        raise ValueError(
            f"layers: expected a number from 1 to {model.config.num_hidden_layers}, got {layers}"
        )
    if not by_number:
        layers = check_layers(model, layers)
        if window is not None:
            windowed_layers_of(model, layers, window)  # it can be done
    most = layers if by_number else len(layers)
    if sizes is not None and not all(type(m) is int and 1 <= m <= most for m in sizes):
        raise ValueError(f"sweep: expected True, False or numbers from 1 to {most}, got {sizes}")
    if type(loss_tokens) is not int or loss_tokens < 2:
        raise ValueError(f"loss_tokens: expected an int from 2 on, got {loss_tokens!r}")
    if preset not in (None, "paper"):
        raise ValueError(f"preset: expected None or 'paper', got {preset!r}")
    recipe = PAPER if preset else {}
    features = features or recipe.get("features")
    if calibration is not None:
        calibration.check_model(model)
        for name, asked in (("features", features), ("memory", memory)):
            own = getattr(calibration, name)
            if asked is not None and asked != own:
                raise ValueError(f"{name}: expected {own}, as the calibration has, got {asked}")
        features, memory = calibration.features, calibration.memory
    documents = list(text or ())
    fallback = "cosine" if drop else "greedy" if documents else "residual"
    criterion = criterion or recipe.get("criterion") or fallback
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
    held_out = list(eval_text or ())
    others = list(other_text or ())
    if others and not (evaluate or sweep or held_out):
        raise ValueError("other_text: expected evaluate beside it")
    if (evaluate or sweep) and not held_out:
        if calibration is not None:
            raise ValueError(
                "eval_text: expected with a calibration, as nbl cannot know which part of the text "
                "that one has not seen"
            )
        documents, held_out = split_documents(documents)
    measures = planned or (by_number and criterion in MEASURED)
    needs_text = calibration is None or sequential or measures
    if needs_text and not documents:
        raise ValueError("text: expected documents to read, got none")
    watch = watch or (lambda batches, what, passes: batches)
    say = say or (lambda sentence: None)
    of_model = functools.partial(make_batches, model, tokenizer, batch_size=batch_size)
    limit = max_tokens or recipe.get("max_tokens") or CALIBRATION_TOKENS
    batches = of_model(documents, length=length, max_tokens=limit) if needs_text else []
    eval_batches = of_model(held_out, length=length, max_tokens=eval_tokens) if held_out else []
    other_batches = of_model(others, length=length, max_tokens=eval_tokens) if others else []
    notes = []
    if preset and calibration is None and count_tokens(batches) < PAPER["max_tokens"]:
        notes = [
            f"preset paper: expected {PAPER['max_tokens']:,} tokens (256 x 2048), "
            f"calibrating on {count_tokens(batches):,}"
        ]

    read_length = max((b.shape[1] for b in batches + eval_batches), default=None)
    if window is not None and read_length is not None and window.size >= read_length:
        notes.append(
            f"window: {window.size} tokens are no fewer than the text's sequences have "
            f"({read_length}): nothing that is measured here says what it costs"
        )
    mapless = None
    if calibration is None:
        read = watch(batches, "calibrating", 2 if planned and memory else 1)
        options = {"features": features or "post-norm", "progress": False}
        calibration = calibrate(model, read, memory=memory, **options)
        if planned and memory is not None:  # a plan may take maps without a memory, too
            mapless = calibrate(model, read, **options)
    fitted = {"ridge": ridge, "bias": bias, "rank": rank}
    measured: dict[str, Any] = {}
    if by_number and criterion in MEASURED:
        passes = layers if criterion == "greedy" else len(calibration.layers) + 1
        sample = watch(_first(batches, loss_tokens), "ranking layers", passes)
        count = layers if criterion == "greedy" else None
        measured = {"model": model, "batches": sample, "count": count, "window": window}
    scores = measure.score_layers(calibration, **measured, **fitted)
    made = None
    if planned:
        say("planning ...")
        made = plan(
            model,
            [calibration] if mapless is None else [mapless, calibration],
            _first(batches, loss_tokens),
            context=context or length_limit(model),
            batch=batch or 1,
            speedup=speedup,
            bytes=kv_bytes,
            windows=None if window is None else (window,),
            ranks=(rank,) if rank is not None or memory is None else _ranks(model),
            ridge=ridge,
            bias=bias,
            say=say,
        )
        chosen = list(dict.fromkeys(p.layer for p in made.front if p.layer is not None))
        criterion = "plan"
    else:
        chosen = _order(scores[criterion])[:layers] if by_number else layers
    if sequential:
        read = watch(batches, "fitting layer by layer", 1)
        own = {"features": calibration.features, "memory": calibration.memory, "layers": chosen}
        rules = {"sequential": True, "refit_mlp": refit_mlp, "progress": False}
        calibration = calibrate(model, read, **own, **rules, **fitted)
    fits = not (drop or planned or window is not None)
    maps = calibration.solve(**fitted, layers=chosen) if fits or drop else {}
    fit = {"bias": bias, "rank": rank, "maps": maps}
    nbl_change: measure.Change = functools.partial(linearize, model, calibration, **fit)
    if made is not None:
        maps = made.maps
        nbl_change = functools.partial(_apply, made, model)
    elif window is not None:
        nbl_change = functools.partial(linearize, model, None, window=window)
    drop_change: measure.Change = functools.partial(drop_attention, model)
    change = drop_change if drop else nbl_change
    choice: dict[str, Any] = {
        "method": "drop" if drop else "nbl",
        "layers": chosen,
        "criterion": criterion if by_number or planned else "the user",
    }
    if made is not None:
        choice |= _planned(made)
    elif window is not None:
        choice["window"] = {"size": window.size, "sinks": window.sinks}
    if fits:
        choice |= _fit(calibration, maps, fitted, sequential=sequential, refit_mlp=refit_mlp)
    if by_number and window is None:
        notes = disagreements(scores, None if sweep else len(chosen)) + notes
    points, speed = _measure(
        model,
        change,
        [chosen[:m] for m in sizes or range(1, len(chosen) + 1)] if sweep else [chosen],
        _order(scores["cosine"]),
        eval_batches,
        other_batches,
        keeps_states=memory is not None or window is not None or planned,
        instead=nbl_change if drop else None,
        watch=watch,
        say=say,
    )
    if maps:
        notes += _domain(points)
    change(chosen)
    return Compressed(
        model=model,
        layers=chosen,
        scores=scores,
        choice=choice,
        points=points,
        notes=notes,
        calibration=calibration,
        maps=maps,
        text=_size(batches),
        evaluation=_size(eval_batches),
        other=_size(other_batches),
        speed=speed,
        plan=made,
    )


def check_choices(
    *, drop: bool, memory: Memory | None, sequential: bool, refit_mlp: bool, sweep: bool
) -> None:
    """ValueError for arguments of :func:`compress` that contradict each other."""
    if drop and (memory is not None or sequential):
        raise ValueError("drop: expected neither memory nor sequential beside it: no map is fitted")
    if refit_mlp and not sequential:
        raise ValueError("refit_mlp: expected sequential beside it")
    if sequential and sweep:
        raise ValueError("sequential: expected no sweep: its maps are for one number of layers")


def length_limit(model: PreTrainedModel) -> int:
    """The longest sequence the model was made for."""
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30


def make_batches(
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Iterable[Document],
    *,
    length: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
) -> list[Tensor]:
    """:func:`nbl.text.token_batches` of the length and size that suit the model: 2048 tokens, or
    its limit, and about 2048 tokens a batch."""
    limit = length_limit(model)
    length = length or min(PAPER["length"], limit)
    if length > limit:
        raise ValueError(f"length: expected at most {limit}, the model's limit, got {length}")
    sizes = {"length": length, "batch_size": batch_size or max(1, 2048 // length)}
    return token_batches(tokenizer, documents, **sizes, max_tokens=max_tokens)


def disagreements(scores: dict[str, list[float | None]], count: int | None = None) -> list[str]:
    """A sentence for each criterion whose first `count` layers (default: half) are mostly others.

    Compared is with "greedy" or "loss", which measure what the others estimate, or else with
    "residual".
    """
    reference = next(name for name in ("greedy", "loss", "residual") if name in scores)
    right = _order(scores[reference])
    count = count or max(1, len(right) // 2)
    notes = []
    for name in scores:
        first = _order(scores[name])[:count]
        differ = len(set(first) - set(right[:count]))
        if differ > count / 4:
            notes.append(
                f"{name} and {reference} disagree on {differ} of the first {count} layers: "
                f"{_ids(first)} by {name}, {_ids(right[:count])} by {reference}"
            )
    return notes


def _domain(points: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence where the last point costs much more on the other text than on the first."""
    if "other" not in points[0] or len(points) < 2:
        return []
    dense, last = points[0], points[-1]
    same = last["perplexity"] / dense["perplexity"]
    other = last["other"]["perplexity"] / dense["other"]["perplexity"]
    if other < 1.05 or other - 1 < _PARTED * (same - 1):
        return []
    dropped = last["other"]["drop"] / dense["other"]["perplexity"]
    return [
        f"maps fit their calibration's kind of text: with {len(last['layers'])} layers replaced "
        f"perplexity is {same:.2f} times the model's on held-out text of that kind, {other:.2f} "
        f"times on the other text (dropping as many by cosine: {dropped:.2f}); calibrate on a mix "
        "of what the model will read"
    ]


def _order(scores: Sequence[float | None]) -> list[int]:
    """The layers that have a score, the first to be replaced first."""
    known = [layer for layer, score in enumerate(scores) if score is not None]
    return sorted(known, key=lambda layer: scores[layer])


def _ids(layers: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(layers)))


def _fit(
    calibration: Calibration, maps: dict[int, nk.Lmmse], fitted: dict[str, Any], **rules: bool
) -> dict[str, Any]:
    """What a choice says of its maps."""
    found = {
        "features": calibration.features,
        **fitted,
        "ridge_used": {layer: float(solved.ridge) for layer, solved in maps.items()},
        "nmse": {layer: float(solved.nmse) for layer, solved in maps.items()},
        **rules,
    }
    if calibration.memory is not None:
        found["memory"] = {
            "lags": calibration.memory.lags,
            "decays": {layer: solved.decays for layer, solved in maps.items()},
        }
    return found


def _planned(made: Plan) -> dict[str, Any]:
    """What a choice says of a plan."""
    return {
        "kinds": made.layers,
        "context": made.context,
        "batch": made.batch,
        "loss": made.loss,
        "byte_ratio": made.speedup,
        "kv_share": made.kv_share,
        "front": [
            {
                "layer": point.layer,
                "kind": point.kind,
                "instead_of": point.instead_of,
                "loss": point.loss,
                "bytes": point.cost.bytes,
                "kv_bytes": point.cost.cache,
                "flops": point.cost.flops,
            }
            for point in made.front
        ],
    }


def _apply(made: Plan, model: PreTrainedModel, layers: Sequence[int]) -> None:
    made.apply(model)


def _ranks(model: PreTrainedModel) -> tuple[int | None, ...]:
    """To choose from, where maps may have a memory: a full one reads more than an attention."""
    return (None, model.config.hidden_size // 4, model.config.hidden_size // 8)


def _measure(
    model: PreTrainedModel,
    change: measure.Change,
    choices: list[list[int]],
    cosine_order: list[int],
    eval_batches: list[Tensor],
    other_batches: list[Tensor],
    *,
    keeps_states: bool,
    instead: measure.Change | None,
    watch: Watch,
    say: Callable[[str], None],
) -> tuple[list[dict[str, Any]], dict[str, int] | None]:
    """(points, how their speed was measured); the model is as it was afterwards."""
    read = other = None
    passes = 1 + 3 * len(choices)
    if eval_batches:
        read = watch(eval_batches, "measuring perplexity", passes)
    if other_batches:
        other = watch(other_batches, "perplexity, other text", passes)
    points = measure.measure_points(
        model,
        change,
        choices,
        cosine_order,
        batches=read,
        other=other,
        keeps_states=keeps_states,
        instead=instead,
    )
    if not eval_batches:
        return points, None
    say("measuring speed ...")
    new_tokens, repetitions = 32, 5
    prompt = eval_batches[0][:1, : max(1, min(256, length_limit(model) - new_tokens))]
    variants = [
        functools.partial(measure.variant, model, change, point["layers"]) for point in points
    ]
    sizes = {"new_tokens": new_tokens, "repetitions": repetitions}
    for point, speed in zip(
        points, measure.compare_speed(model, variants, prompt, **sizes), strict=True
    ):
        point.update(speed)
    return points, {"prompt_tokens": prompt.shape[1], "batch": 1, **sizes}


def _first(batches: list[Tensor], tokens: int) -> list[Tensor]:
    """Batches that hold about the first so many tokens: whole sequences, at least one."""
    kept: list[Tensor] = []
    for batch in batches:
        left = tokens - count_tokens(kept)
        if left <= 0:
            break
        kept.append(batch[: max(1, left // batch.shape[1])])
    return kept


def _size(batches: list[Tensor]) -> dict[str, int] | None:
    if not batches:
        return None
    return {"tokens": count_tokens(batches), "length": batches[0].shape[1]}
