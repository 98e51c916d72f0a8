"""What a model still knows with so many attention layers replaced: multiple-choice questions, and a
number in a long text; differences to the model itself are paired, over the same questions.

Orders of layers are arguments, the first to be replaced first (nbl rank says them); by cosine it is
found here. Files are arguments; nothing of them is written down but the figures, and of every
question whether it was answered right: any two rows can be compared.

    python -m benchmarks.studies.tasks --text c4.jsonl --tasks arc_easy.jsonl,piqa.jsonl
    python -m benchmarks.studies.tasks … --order greedy=26,9,28,7,25,6,29,5 --counts 8 --limit 100
    python -m benchmarks.studies.tasks … --only one-token --passkey 256,512 --json none
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import nbl
import torch
import transformers
from nbl.tasks import Accuracy, compare, passkey
from nbl.text import load_texts
from nbl_cli import models
from nbl_cli.tasks import read_tasks

from benchmarks import results
from benchmarks.studies.real import CONTEXT, ROWS, kinds, rows

RESULT = results.FOLDER / "tasks.json"


class Study:
    """The model, its questions, and what it answers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.asked = read_tasks(options.tasks, options.limit) if options.tasks else []
        self.lengths, self.samples = options.passkey, options.passkey_samples
        self.model, self.tokenizer = models.load(options.model, options.dtype, "cpu")
        sequences = rows(self.tokenizer, load_texts([options.text]))
        self.calibration = sequences[: options.calibration_tokens // CONTEXT].split(ROWS)
        self.base = self.answers()

    def answers(self) -> dict[str, Accuracy]:
        found = {}
        for task in self.asked:
            about = (self.model, self.tokenizer, lambda _: False)
            found[Path(task.name).name], _ = task.answer(*about)
        if self.lengths:
            options = {"lengths": self.lengths, "samples": self.samples}
            for length, accuracy in passkey(self.model, self.tokenizer, **options).items():
                found[f"passkey, {length} tokens"] = accuracy
        return found

    def row(self, kind: str, order: str, layers: list[int]) -> dict[str, Any]:
        """With the layers as they are now."""
        start = time.perf_counter()
        found = self.answers() if layers else self.base
        row = {"kind": kind, "order": order, "layers": layers}
        row["seconds"] = time.perf_counter() - start
        row["commit"] = results.environment()["commit"]
        row["tasks"] = {name: self.facts(name, accuracy) for name, accuracy in found.items()}
        shown = "  ".join(
            f"{facts['accuracy']:6.1%} ({100 * facts['difference']:+5.1f} ± "
            f"{100 * facts['difference_stderr']:.1f})"
            for facts in row["tasks"].values()
        )
        print(f"  {kind:<12} {order:<9} {len(layers):>2}   {shown}", flush=True)
        return row

    def facts(self, name: str, found: Accuracy) -> dict[str, Any]:
        difference = compare(found, self.base[name])
        return {
            "questions": found.questions,
            "accuracy": found.value,
            "stderr": found.stderr,
            "difference": difference.value,
            "difference_stderr": difference.stderr,
            "gained": difference.gained,
            "lost": difference.lost,
            "right": "".join(map(str, found.right.int().tolist())),
        }


def measure(options: argparse.Namespace) -> None:
    study = Study(options)
    model = study.model
    print(f"  {'':<26} {'  '.join(study.base)}", flush=True)
    found = [study.row("attention", "", [])]
    options.save(found, study)
    cals: dict[tuple[Any, ...], nbl.Calibration] = {}

    def calibrated(about: dict[str, Any]) -> nbl.Calibration:
        seen = {"features": about.get("features", "post-norm"), "memory": about.get("memory")}
        key = tuple(seen.values())
        if key not in cals:
            cals[key] = nbl.calibrate(model, study.calibration, progress=False, **seen)
        return cals[key]

    by_cosine = [score.layer for score in calibrated({}).rank("cosine")]
    orders = {"cosine": by_cosine} | options.order
    for kind, about in {"dropped": {}, **kinds(model.config.hidden_size)}.items():
        if kind not in options.only:
            continue
        for order in ["cosine"] if kind == "dropped" else orders:
            for count in (c for c in options.counts if c <= len(orders[order])):
                layers = orders[order][:count]
                try:
                    if kind == "dropped":
                        nbl.drop(model, layers)
                    else:
                        own = {name: about.get(name) for name in ("rank", "window")}
                        nbl.linearize(model, calibrated(about), layers, **own)
                    found.append(study.row(kind, order, layers))
                finally:
                    nbl.restore(model)
                options.save(found, study)
    if options.plan is not None:
        record = results.read(RESULT.with_name("real.json"))
        points = next(row for row in record["rows"] if row["kind"] == "plan")["points"]
        chosen = {int(i): kind for i, kind in points[options.plan]["layers"].items()}
        try:
            become(model, calibrated({}), chosen)
            found.append(study.row("plan", f"point {options.plan}", sorted(chosen)))
        finally:
            nbl.restore(model)
        options.save(found, study)


def become(model: Any, cal: nbl.Calibration, chosen: dict[int, str]) -> None:
    """Makes layers of these kinds, as a plan names them: windows, maps, dropped ones."""
    for layer, kind in chosen.items():
        name, _, size = kind.partition(" ")
        if name == "window":
            window = nbl.Window(*map(int, size.split("+")))
            nbl.linearize(model, None, [layer], window=window)
        elif kind == "map":
            nbl.linearize(model, cal, [layer])
        elif kind == "drop":
            nbl.drop(model, [layer])
        else:
            raise SystemExit(f"--plan: no {kind!r} is known here")


def parse_order(given: str) -> tuple[str, list[int]]:
    """ "greedy=26,9": its name, and the layers."""
    name, _, ids = given.partition("=")
    try:
        layers = [int(part) for part in ids.split(",")]
    except ValueError:
        layers = []
    if not name or not layers or len(set(layers)) < len(layers):
        raise argparse.ArgumentTypeError(f"expected NAME=LAYER,LAYER,…, got {given!r}")
    return name, layers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = ("dropped", *kinds(8))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True, help="of the calibration")
    parser.add_argument("--tasks", default="", help="as nbl eval takes them")
    parser.add_argument("--limit", type=int, help="only the first so many questions of each")
    parser.add_argument("--passkey", default="", metavar="LENGTH,…", help="tokens of its contexts")
    parser.add_argument("--passkey-samples", type=int, default=20, help="of each length and depth")
    parser.add_argument("--order", type=parse_order, action="append", default=[])
    parser.add_argument("--counts", default="8,12", help="layers that are replaced")
    parser.add_argument("--only", default="dropped,one-token", help=f"of {', '.join(everything)}")
    parser.add_argument(
        "--plan", type=int, metavar="N", help="also the N-th point of the plan in real.json"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--calibration-tokens", type=int, default=98_304)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default=str(RESULT), metavar="FILE", help="none: nowhere")
    options = parser.parse_args()
    options.counts = sorted(int(count) for count in options.counts.split(","))
    options.passkey = [int(length) for length in options.passkey.split(",") if length]
    options.only, options.order = options.only.split(","), dict(options.order)
    if unknown := set(options.only) - set(everything):
        parser.error(f"--only: expected some of {', '.join(everything)}, got {sorted(unknown)}")
    if not options.tasks and not options.passkey:
        parser.error("expected --tasks, --passkey or both")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results.environment()  # that of the start

    def save(found: list[dict[str, Any]], study: Study) -> None:
        record = {
            **results.stamp(),
            "model": options.model,
            "num_hidden_layers": study.model.config.num_hidden_layers,
            "dtype": str(study.model.dtype).removeprefix("torch."),
            "text": Path(options.text).name,
            "calibration_tokens": sum(batch.numel() for batch in study.calibration),
            "tasks": [Path(task.name).name for task in study.asked],
            "limit": options.limit,
            "passkey": {"lengths": study.lengths, "samples": study.samples},
        }
        results.save(options.json, record | {"rows": found})

    options.save = save
    measure(options)


if __name__ == "__main__":
    main()
