"""The tables of arXiv 2505.21077, on a model and a machine of one's own: calibration time,
accuracy of NBL by the paper's recipe beside dropped attention, prefill against context, decode, and
the same on quantized weights.

    python -m benchmarks.studies.paper --model meta-llama/Llama-3.1-8B --text dataset:allenai/c4:en
    python -m benchmarks.studies.paper --model smollm2 --text c4.jsonl --tasks arc_easy.jsonl \\
        --limit 20 --counts 4 --contexts 128 --calibration-tokens 8192 --json none   # a dry run

Layers are chosen and solved as in the paper (pre-norm features, CCA bound, 256 sequences of 2048
tokens); --criterion and --features take others. Tasks are those of the paper by their names in
lm-eval (the extra `eval`), or files of questions. Quantized weights are 4-bit ones that a model
comes with (--quantized MODEL: AWQ and whatever else transformers loads; calibrated as it is), or
our own (int4, of the linearized model).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import nbl
import torch
import transformers
from nbl import benchmark, pipeline
from nbl.tasks import compare
from nbl_cli import models
from nbl_cli.cases import table
from nbl_cli.tasks import Task, read_tasks
from rich.console import Console

from benchmarks import results

RESULT = results.FOLDER / "paper.json"
NORMALIZED = ("arc_challenge", "hellaswag", "openbookqa")
TASKS = ",".join(["arc_easy,boolq,piqa,winogrande,mmlu", *(f"{t}:acc_norm" for t in NORMALIZED)])


class Study:
    """One model of the tables: its weights as they are, or quantized."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.model, self.tokenizer = models.load(name, options.dtype, options.device)
        documents, _ = models.read_texts(name, [options.text], options.calibration_tokens)
        sizes = {"length": min(2048, pipeline.length_limit(self.model))}
        batches = pipeline.make_batches(
            self.model, self.tokenizer, documents, **sizes, max_tokens=options.calibration_tokens
        )
        start = time.perf_counter()
        self.cal = nbl.calibrate(self.model, batches, features=options.features, progress=False)
        seen = time.perf_counter()
        self.orders = {
            "NBL": [score.layer for score in self.cal.rank(options.criterion)],
            "dropped": [score.layer for score in self.cal.rank("cosine")],
        }
        ranked = time.perf_counter()
        self.cal.solve(layers=self.orders["NBL"][: max(options.counts)])
        self.calibration = {
            "tokens": self.cal.tokens,
            "seconds": {
                "forward pass and moments": seen - start,
                "ranking": ranked - seen,
                "maps": time.perf_counter() - ranked,
            },
        }

    def change(self, method: str, count: int) -> list[int]:
        layers = self.orders[method][:count]
        if method == "NBL":
            nbl.linearize(self.model, self.cal, layers)
        else:
            nbl.drop(self.model, layers)
        return layers

    def accuracies(
        self, asked: list[Task], counts: list[int], weights: str | None = None
    ) -> list[dict[str, Any]]:
        """Rows for the model itself and for every method and count; weights: quantized to these."""
        answered, rows = {}, []
        for method, count in [("the model itself", 0)] + [
            (method, count) for count in counts for method in self.orders
        ]:
            layers: list[int] = []
            try:
                if count:
                    layers = self.change(method, count)
                if weights is not None:
                    nbl.optimize(self.model, weights=weights, keep_original=True)
                found = {}
                for task in asked:
                    accuracy, _ = task.answer(self.model, self.tokenizer, lambda _: False)
                    found[Path(task.name).name] = accuracy
            finally:
                nbl.restore(self.model)
            answered = answered or found
            row: dict[str, Any] = {"method": method, "layers": layers, "weights": weights}
            row["tasks"] = {
                name: {
                    "accuracy": accuracy.value,
                    "stderr": accuracy.stderr,
                    "difference": compare(accuracy, answered[name]).value,
                }
                for name, accuracy in found.items()
            }
            row["average"] = sum(a.value for a in found.values()) / max(1, len(found))
            rows.append(row)
            shown = "  ".join(f"{a.value:6.1%}" for a in found.values())
            print(f"  {method:<16} {count:>2} {weights or '':<6} {shown}", flush=True)
        return rows

    def speeds(self, options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
        """Cases of nbl.benchmark: transformers, ours, and ours with so many layers linear."""
        try:
            return benchmark.sweep(
                self.model,
                kinds=[kind],
                batches=[1],
                contexts=options.contexts,
                layers=[0, *options.counts],
                calibration=None,
                say=print,
                show=lambda case: Console().print(table(case)),
            )
        finally:
            nbl.restore(self.model)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"type": lambda text: [int(n) for n in text.split(",") if n]}
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B")
    parser.add_argument("--quantized", metavar="MODEL", help="its weights in 4 bits, as published")
    parser.add_argument("--text", required=True, help="of the calibration")
    parser.add_argument("--tasks", default=TASKS, help="as nbl eval takes them; '': none")
    parser.add_argument("--limit", type=int, help="only the first so many questions of each task")
    parser.add_argument("--counts", default=[4, 8, 12, 16], **numbers)
    parser.add_argument("--contexts", default=[512, 2048, 8192, 32_768], **numbers)
    parser.add_argument("--features", default=pipeline.PAPER["features"])
    parser.add_argument("--criterion", default=pipeline.PAPER["criterion"])
    parser.add_argument("--calibration-tokens", type=int, default=pipeline.PAPER["max_tokens"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", default=str(RESULT), metavar="FILE", help="none: nowhere")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results.environment()  # that of the start
    asked = read_tasks(options.tasks, options.limit) if options.tasks else []
    record: dict[str, Any] = {
        **results.stamp(),
        "model": options.model,
        "quantized": options.quantized,
        "text": Path(options.text).name,
        "features": options.features,
        "criterion": options.criterion,
        "limit": options.limit,
    }

    def save(**part: Any) -> None:
        record.update(part)
        results.save(options.json, record)

    study = Study(options.model, options)
    save(calibration=study.calibration, orders=study.orders)
    print(f"  calibration: {study.calibration}", flush=True)
    save(accuracy=study.accuracies(asked, options.counts))
    for kind in ("prefill", "decode"):
        save(**{kind: study.speeds(options, kind)})
    if options.quantized:
        del study
        study = Study(options.quantized, options)
        save(quantized_calibration=study.calibration)
        save(accuracy_quantized=study.accuracies(asked, options.counts))
    else:
        save(accuracy_quantized=study.accuracies(asked, options.counts, weights="int4"))


if __name__ == "__main__":
    main()
