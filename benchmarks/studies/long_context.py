"""A real model on long texts: perplexity, a number to be found again, bytes of the cache and decode
speed, with attention replaced by maps or bounded by windows. What a layer does not see any more it
cannot find: the passkey shows it, perplexity hardly.

    python -m benchmarks.studies.long_context --text wikitext.txt --calibration c4.jsonl
    python -m benchmarks.studies.long_context … --contexts 512,2048 --passkey 512 --json none
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import nbl
import torch
import transformers
from nbl.costs import attention_cost
from nbl.layers.spec import layer_specs
from nbl.tasks import passkey
from nbl.text import load_texts
from nbl_cli import models
from torch import Tensor

from benchmarks import results
from benchmarks.studies.real import ROWS, rows
from nbl_kernels.machine import in_turns

RESULT = results.FOLDER / "long_context.json"
# name: (how many layers, by cosine; what is put in their place)
VARIANTS: dict[str, tuple[int, nbl.Window | str | None]] = {
    "the model itself": (0, None),
    "12 maps": (12, "map"),
    "12 windows, 128 + 1": (12, nbl.Window(128, 1)),
    "12 windows, 512 + 1": (12, nbl.Window(512, 1)),
    "30 windows, 512 + 1": (30, nbl.Window(512, 1)),
}
STEPS = 24  # of decoding, in each turn


class Study:
    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self.tokenizer = models.load(options.model, options.dtype, "cpu")
        first = rows(self.tokenizer, load_texts([options.calibration]))
        sequences = first[: options.calibration_tokens // first.shape[1]].split(ROWS)
        self.cal = nbl.calibrate(self.model, sequences, progress=False)
        self.order = [score.layer for score in self.cal.rank("cosine")]
        self.tokens = rows(self.tokenizer, load_texts([options.text])).flatten()
        self.options = options

    def change(self, model: Any, count: int, what: nbl.Window | str | None) -> list[int]:
        layers = self.order[:count]
        if isinstance(what, nbl.Window):
            nbl.linearize(model, None, layers, window=what)
        elif what == "map":
            nbl.linearize(model, self.cal, layers)
        elif what == "drop":
            nbl.drop(model, layers)
        return layers

    def texts(self, context: int) -> list[Tensor]:
        """The same tokens, cut into sequences of this length."""
        size = self.options.test_tokens // context * context
        return list(self.tokens[:size].view(-1, context).split(max(1, 4096 // context)))

    def quality(self, name: str) -> dict[str, Any]:
        count, what = VARIANTS[name]
        stock = list(self.model.model.layers)
        try:
            layers = self.change(self.model, count, what)
            specs = layer_specs(self.model.config)
            row: dict[str, Any] = {"layers": sorted(layers)}
            row["perplexity"] = {
                str(context): nbl.perplexity(self.model, self.texts(context)).value
                for context in self.options.contexts
            }
            row["kv_bytes"] = {
                str(context): sum(
                    attention_cost(s, specs.get(i), context=context, batch=1).cache
                    for i, s in enumerate(stock)
                )
                for context in self.options.decode
            }
            if self.options.passkey:
                found = passkey(
                    self.model,
                    self.tokenizer,
                    lengths=self.options.passkey,
                    samples=self.options.passkey_samples,
                )
                row["passkey"] = {
                    str(length): {"accuracy": a.value, "stderr": a.stderr}
                    for length, a in found.items()
                }
            return row
        finally:
            nbl.restore(self.model)

    def speeds(self, names: list[str], context: int) -> dict[str, dict[str, float]]:
        """{variant: tokens/s of decode behind so many tokens, of prefill}, in turns, medians."""
        prompt = self.tokens[:context][None]

        def turn(name: str) -> tuple[float, float]:
            self.change(self.model, *VARIANTS[name])
            try:
                runner = nbl.Runner(self.model, 1, context + STEPS + 2)
                begin = time.perf_counter()
                stream = runner.stream(prompt, STEPS + 2, stop=[])
                next(stream)
                first = time.perf_counter()
                next(stream)  # warm
                start = time.perf_counter()
                for _ in range(STEPS):
                    next(stream)
                return context / (first - begin), STEPS / (time.perf_counter() - start)
            finally:
                nbl.restore(self.model)

        calls = {name: (lambda name=name: turn(name)) for name in names}
        seen = in_turns(calls, self.options.repetitions + 1)
        return {
            name: {
                "prefill": statistics.median(t[0] for t in turns[1:]),
                "decode": statistics.median(t[1] for t in turns[1:]),
            }
            for name, turns in seen.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"type": lambda text: [int(n) for n in text.split(",") if n]}
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True, help="long text to measure on")
    parser.add_argument("--calibration", required=True, help="text of the maps")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--contexts", default=[512, 2048, 8192], **numbers)
    parser.add_argument("--decode", default=[512, 4096, 8064], **numbers)
    parser.add_argument("--passkey", default=[256, 512, 1024], **numbers)
    parser.add_argument("--passkey-samples", type=int, default=4, help="of each depth and length")
    parser.add_argument("--test-tokens", type=int, default=16_384)
    parser.add_argument("--calibration-tokens", type=int, default=98_304)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", default="; ".join(VARIANTS), help="variants, between ;")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default=str(RESULT), metavar="FILE", help="none: nowhere")
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(";")]
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"--only: expected some of {'; '.join(VARIANTS)}, got {sorted(unknown)}")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results.environment()  # that of the start
    study = Study(options)
    record: dict[str, Any] = {
        **results.stamp(),
        "model": options.model,
        "dtype": str(study.model.dtype).removeprefix("torch."),
        "text": Path(options.text).name,
        "calibration": Path(options.calibration).name,
        "test_tokens": options.test_tokens,
        "speed": {"batch": 1, "steps": STEPS, "repetitions": options.repetitions},
        "variants": {},
    }
    speeds = {context: study.speeds(names, context) for context in options.decode}
    for name in names:
        row = study.quality(name)
        for kind in ("decode", "prefill"):
            row[kind] = {str(context): found[name][kind] for context, found in speeds.items()}
        record["variants"][name] = row
        shown = {k: v for k, v in row.items() if k != "layers"}
        print(f"  {name:<22} {shown}", flush=True)
        results.save(options.json, record)


if __name__ == "__main__":
    main()
