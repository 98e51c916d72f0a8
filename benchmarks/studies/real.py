"""A real model: perplexity on two kinds of text with so many attention layers replaced, by every
kind of map and every criterion, or bounded by windows, beside dropping and the paper's recipe; and
plans, beside every single kind at the bytes that it costs.

The text of the calibration is one kind, its rest is held out; another kind is given beside it: maps
fit the domain they are calibrated on. Files are arguments; nothing of them is written down but the
figures.

    python -m benchmarks.studies.real --text c4.jsonl --other wikitext.txt
    python -m benchmarks.studies.real --text c4.jsonl --other wikitext.txt --only one-token,dropped
    python -m benchmarks.studies.real … --counts 2,4 --calibration-tokens 8192 --json none
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbl
import torch
import transformers
from nbl.costs import attention_cost, other_cost
from nbl.layers.spec import layer_specs
from nbl.text import load_texts
from nbl_cli import models
from torch import Tensor

from benchmarks import results

RESULT = results.FOLDER / "real.json"
CONTEXT = 512
ROWS = 8  # sequences of a batch
CRITERIA = ("cosine", "nmse", "cca", "residual", "loss", "greedy")
# What costs are counted for: a decode step of so many sequences of so many tokens.
STEP = {"context": 4096, "batch": 8}
PLAN = 0.25  # the share of keys, values and states that the plan goes down to


def rows(tokenizer: Any, documents: list[Any]) -> Tensor:
    """Tokens (sequences, CONTEXT) of documents one after another, nothing added."""
    parts = [
        tokenizer(str(text) + "\n", add_special_tokens=False, verbose=False).input_ids
        for text in documents
    ]
    tokens = torch.tensor([token for part in parts for token in part])
    return tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)


class Study:
    """The model, its texts, and the perplexities with some layers replaced."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, tokenizer = models.load(options.model, options.dtype, "cpu")
        sequences = options.calibration_tokens // CONTEXT
        first = rows(tokenizer, load_texts([options.text]))
        other = rows(tokenizer, load_texts([options.other]))
        test = options.test_tokens // CONTEXT
        if len(first) <= sequences:
            raise SystemExit(f"--text: {len(first) * CONTEXT} tokens leave nothing held out")
        self.calibration = list(first[:sequences].split(ROWS))
        # As many tokens, half of them of the other kind; one batch of each in turns.
        half = first[: sequences // 2], other[test : test + sequences // 2]
        pairs = zip(*(part.split(ROWS) for part in half))
        self.mixed = [batch for pair in pairs for batch in pair]
        self.measured = self.calibration[: max(1, options.loss_tokens // (ROWS * CONTEXT))]
        self.tests = {
            "same kind": list(first[sequences : sequences + test].split(ROWS)),
            "other kind": list(other[:test].split(ROWS)),
        }
        self.base = self.perplexities()
        self.stock = list(self.model.model.layers)
        self.other = other_cost(self.model, batch=STEP["batch"])
        self.dense = sum((attention_cost(s, None, **STEP) for s in self.stock), self.other)
        self.counts: list[int] = options.counts

    def perplexities(self) -> dict[str, float]:
        return {name: nbl.perplexity(self.model, t).value for name, t in self.tests.items()}

    def curve(
        self, replace: Callable[[int], Any], counts: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """With each number of layers replaced: replace(count) says which layers they are, or of
        which kinds. bytes and kv_bytes are those of a decode step (STEP)."""
        points = []
        for count in self.counts if counts is None else counts:
            try:
                layers = replace(count)
                specs = layer_specs(self.model.config)
                costs = [attention_cost(s, specs.get(i), **STEP) for i, s in enumerate(self.stock)]
                cost = sum(costs, self.other)
                chosen = (
                    dict(sorted(layers.items())) if isinstance(layers, dict) else sorted(layers)
                )
                point = {"layers": chosen, **self.perplexities()}
                points.append(point | {"bytes": cost.bytes, "kv_bytes": cost.cache})
            finally:
                nbl.restore(self.model)
        return points

    def order(
        self, cal: nbl.Calibration, criterion: str, *, mixed: bool = False, **maps: Any
    ) -> list[int]:
        measured: dict[str, Any] = {}
        if criterion in ("loss", "greedy"):
            read = self.mixed[: len(self.measured)] if mixed else self.measured
            measured = {"model": self.model, "batches": read}
        if criterion == "greedy":
            measured["count"] = max(self.counts)
            measured["window"] = maps.pop("window", None)
        maps.pop("window", None)
        return [score.layer for score in cal.rank(criterion, **measured, **maps)]


def kinds(size: int) -> dict[str, dict[str, Any]]:
    """{name: what is calibrated and solved, and the criteria that choose its layers}."""
    memory = nbl.Memory()
    return {
        "paper": {"features": "pre-norm", "criteria": ("cca",)},
        "one-token": {"criteria": CRITERIA},
        "one-token-mix": {"mixed": True, "criteria": ("cosine", "residual", "greedy")},
        "memory-full": {"memory": memory, "criteria": ("residual", "greedy")},
        "memory-d4": {"memory": memory, "rank": size // 4, "criteria": ("greedy",)},
        "memory-d8": {"memory": memory, "rank": size // 8, "criteria": ("residual", "greedy")},
        "window-128": {"window": nbl.Window(128, 1), "criteria": ("cosine", "greedy")},
        "window-32": {"window": nbl.Window(32, 4), "criteria": ("cosine", "greedy")},
        "window-32-no-sink": {"window": nbl.Window(32, 0), "criteria": ("cosine",)},
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    study = Study(options)
    model = study.model
    found: list[dict[str, Any]] = []
    options.save(found, study)
    cals: dict[tuple[Any, ...], nbl.Calibration] = {}

    def add(
        kind: str,
        criterion: str,
        seconds: float,
        replace: Callable[[int], Any],
        counts: Sequence[int] | None = None,
    ) -> None:
        row = {"kind": kind, "criterion": criterion, "seconds_to_choose": seconds}
        row["commit"] = results.environment()["commit"]  # rows of several runs stand in one file
        found.append(row | {"points": study.curve(replace, counts)})
        shown = "  ".join(
            f"{'/'.join(f'{point[name]:.2f}' for name in study.tests)}"
            for point in found[-1]["points"]
        )
        print(f"  {kind:<12} {criterion:<9} {seconds:5.0f} s   {shown}", flush=True)
        options.save(found, study)

    for kind, about in kinds(model.config.hidden_size).items():
        if kind not in options.only and not (kind == "one-token" and "dropped" in options.only):
            continue
        seen = {"features": about.get("features", "post-norm"), "memory": about.get("memory")}
        mixed = about.get("mixed", False)
        key = (*seen.values(), mixed)
        if key not in cals:
            read = study.mixed if mixed else study.calibration
            cals[key] = nbl.calibrate(model, read, progress=False, **seen)
        cal, maps = cals[key], {"rank": about.get("rank"), "window": about.get("window")}
        if kind == "one-token" and "dropped" in options.only:
            order = study.order(cal, "cosine")

            def drop(count: int, order: list[int] = order) -> list[int]:
                nbl.drop(model, order[:count])
                return order[:count]

            add("dropped", "cosine", 0.0, drop)
        if kind not in options.only:
            continue
        for criterion in (c for c in about["criteria"] if c in options.criteria):
            start = time.perf_counter()
            order = study.order(cal, criterion, mixed=mixed, **maps)
            seconds = time.perf_counter() - start

            def linearize(
                count: int,
                order: list[int] = order,
                cal: nbl.Calibration = cal,
                maps: dict[str, Any] = maps,
            ) -> list[int]:
                nbl.linearize(model, cal, order[:count], **maps)
                return order[:count]

            add(kind, criterion, seconds, linearize)
    if "plan" in options.only:
        start = time.perf_counter()
        # A plan is for what the model will read: maps and losses of both kinds of text.
        cal = cals.get(("post-norm", None, True)) or nbl.calibrate(
            model, study.mixed, progress=False
        )
        said = functools.partial(print, "   ", flush=True)
        read = study.mixed[: len(study.measured)]
        windows = [nbl.Window(128, 1), nbl.Window(32, 4)]
        made = nbl.plan(model, cal, read, **STEP, bytes=PLAN, windows=windows, say=said)
        seconds = time.perf_counter() - start
        # As much of the cache as is left where so many layers have no keys at all, and the end.
        total = len(study.stock)
        shares = [1 - count / total for count in study.counts] + [PLAN]
        whole = made.front[0].cost.cache
        at = [
            next(n for n, point in enumerate(made.front) if point.cost.cache <= share * whole)
            for share in shares
        ]

        def planned(point: int) -> dict[int, str]:
            part = made.at(point)
            part.apply(model)
            return part.layers

        add("plan", "plan", seconds, planned, at)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = ("dropped", *kinds(8), "plan")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True, help="calibration, and held-out text of its kind")
    parser.add_argument("--other", required=True, help="held-out text of another kind")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--counts", default="4,8,12,16", help="layers that are replaced")
    parser.add_argument("--calibration-tokens", type=int, default=98_304)
    parser.add_argument("--loss-tokens", type=int, default=8192, help="of loss and greedy")
    parser.add_argument("--test-tokens", type=int, default=12_288, help="of each kind of text")
    parser.add_argument("--only", default=",".join(everything), help="default: %(default)s")
    parser.add_argument("--criteria", default=",".join(CRITERIA), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default=str(RESULT), metavar="FILE", help="none: nowhere")
    options = parser.parse_args()
    options.counts = sorted(int(count) for count in options.counts.split(","))
    options.only, options.criteria = options.only.split(","), options.criteria.split(",")
    if unknown := set(options.only) - set(everything):
        parser.error(f"--only: expected some of {', '.join(everything)}, got {sorted(unknown)}")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results.environment()  # that of the start
    old = results.read(options.json)

    def save(found: list[dict[str, Any]], study: Study) -> None:
        if not found:
            print(f"  the model itself: {study.base}", flush=True)
            return
        config = study.model.config
        record = {
            **results.stamp(),
            "model": options.model,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "dtype": str(study.model.dtype).removeprefix("torch."),
            "texts": {"same kind": Path(options.text).name, "other kind": Path(options.other).name},
            "calibration_tokens": sum(batch.numel() for batch in study.calibration),
            "loss_tokens": sum(batch.numel() for batch in study.measured),
            "test_tokens": options.test_tokens,
            "context": CONTEXT,
            "base": study.base,
            "step": {**STEP, "bytes": study.dense.bytes, "kv_bytes": study.dense.cache},
        }
        # What an earlier run measured of other kinds, on the same model and texts, stays.
        facts = [name for name in record if name not in ("date", "environment", "rows", "step")]
        if all(old.get(name) == record[name] for name in facts):
            measured = {(row["kind"], row["criterion"]) for row in found}
            kept = [r for r in old["rows"] if (r["kind"], r["criterion"]) not in measured]
            found = [*kept, *found]
        results.save(options.json, record | {"rows": found})

    options.save = save
    measure(options)


if __name__ == "__main__":
    main()
