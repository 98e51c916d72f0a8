"""What healing gains on a real model: maps trained against the original's logits.

Perplexity on held-out text of the calibration's kind and of another, and the KL divergence from
the original, with the closed-form maps, and after some ways to train them. The texts and their
parts are those of :mod:`benchmarks.studies.real`. One-token maps of one kind of text; or, with
--memory RANK, maps with a memory, of both kinds, which are trained on both.

    python -m benchmarks.studies.heal --text c4.jsonl --other wikitext.txt
    python -m benchmarks.studies.heal … --memory 288 --only "W, 3e-3" --steps 120
    python -m benchmarks.studies.heal … --only "W, 3e-4" --steps 25 --json none
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import nbl
import torch
import transformers
from nbl.text import load_texts
from nbl_cli import models
from torch import Tensor

from benchmarks import results
from benchmarks.studies.real import CONTEXT, rows

RESULT = results.FOLDER / "heal.json"
WITH_MEMORY = results.FOLDER / "heal_memory.json"
ROWS = 2  # sequences that run at once
HELD_OUT = 8  # sequences of the calibration text that healing measures on
# {name: how the maps are trained}; mixed: half of the rows are of the text --mix.
WAYS: dict[str, dict[str, Any]] = {
    "W, 3e-4": {"lr": 3e-4},
    "W, 1e-3": {"lr": 1e-3},
    "W, 3e-3": {"lr": 3e-3},
    "W, 1e-3, half of it other text": {"lr": 1e-3, "mixed": True},
    "W + A B of rank 32, 3e-3": {"lr": 3e-3, "rank": 32},
}


def measure(options: argparse.Namespace) -> None:
    model, tokenizer = models.load(options.model, options.dtype, "cpu")
    first = rows(tokenizer, load_texts([options.text]))
    other = rows(tokenizer, load_texts([options.other]))
    sequences, test = options.calibration_tokens // CONTEXT, options.test_tokens // CONTEXT
    if len(first) <= sequences:
        raise SystemExit(f"--text: {len(first) * CONTEXT} tokens leave nothing held out")
    texts = {"same kind": first[sequences : sequences + test], "other kind": other[:test]}
    train, validation = first[: sequences - HELD_OUT], first[sequences - HELD_OUT : sequences]

    def perplexities() -> dict[str, float]:
        return {name: nbl.perplexity(model, t.split(ROWS)).value for name, t in texts.items()}

    base = perplexities()
    calibration = list(first[:sequences].split(8))
    maps: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    if options.memory is not None:
        maps, seen = {"rank": options.memory}, {"memory": nbl.Memory()}
        half = first[: sequences // 2], other[test : test + sequences // 2]
        both = torch.stack(half, dim=1).flatten(0, 1)  # one of each in turns
        calibration = list(both.split(8))
        train, validation = both[:-HELD_OUT], both[-HELD_OUT:]
    cal = nbl.calibrate(model, calibration, layers=options.layers, progress=False, **seen)
    nbl.linearize(model, cal, options.layers, **maps)
    record = {
        "model": options.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "texts": {name: Path(getattr(options, o)).name for name, o in KINDS.items()},
        "mix": options.mix,
        **({} if options.memory is None else {"memory_rank": options.memory}),
        "layers": options.layers,
        "num_hidden_layers": model.config.num_hidden_layers,
        "calibration_tokens": sequences * CONTEXT,
        "validation_tokens": HELD_OUT * CONTEXT,
        "test_tokens": test * CONTEXT,
        "context": CONTEXT,
        "tokens_per_step": options.tokens_per_step,
        "base": base,
        "closed form": perplexities(),
    }
    print(f"  the model itself {_shown(base)}, closed form {_shown(record['closed form'])}")
    for name in options.only:
        nbl.linearize(model, cal, options.layers, **maps)  # maps anew
        how = dict(WAYS[name])
        read: Tensor = train
        if how.pop("mixed", False):
            more = rows(tokenizer, load_texts([options.mix]))
            chance = torch.Generator().manual_seed(0)
            half = len(train) // 2
            read = torch.cat([train[:half], more[torch.randperm(len(more), generator=chance)]])
            read = read[: 2 * half]
        start = time.perf_counter()
        healed = nbl.heal(
            model,
            None,
            read.split(ROWS),
            steps=options.steps,
            tokens_per_step=options.tokens_per_step,
            validation=validation.split(ROWS),
            progress=False,
            **how,
        )
        row = {
            "name": name,
            "steps": options.steps,
            "commit": results.environment()["commit"],
            "seconds": time.perf_counter() - start,
            "tokens": healed.tokens,
            "kl_before": healed.before,
            "kl_after": healed.after,
            **perplexities(),
        }
        print(
            f"  {name:<32} KL {row['kl_before']:.4f} -> {row['kl_after']:.4f}  {_shown(row)}  "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
        # What an earlier run measured in other ways, of the same maps and texts, stays.
        own = (name, options.steps)
        old = results.read(options.json)
        kept = []
        if all(old.get(key) == value for key, value in record.items()):
            kept = [r for r in old["rows"] if (r["name"], r["steps"]) != own]
        results.save(options.json, results.stamp() | record | {"rows": [*kept, row]})


KINDS = {"same kind": "text", "other kind": "other"}  # {in the record: the option}


def _shown(found: dict[str, Any]) -> str:
    return "/".join(f"{found[name]:.2f}" for name in KINDS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True, help="calibration, and held-out text of its kind")
    parser.add_argument("--other", required=True, help="held-out text of another kind")
    parser.add_argument("--mix", default="demo:train", help="what is mixed in (%(default)s)")
    parser.add_argument("--layers", default="5,6,7,9,25,26,28,29")
    parser.add_argument("--memory", type=int, metavar="RANK", help="maps with a memory, both kinds")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens-per-step", type=int, default=1024)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--calibration-tokens", type=int, default=98_304)
    parser.add_argument("--test-tokens", type=int, default=8192, help="of each kind of text")
    parser.add_argument("--only", action="append", choices=WAYS, help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--json", metavar="FILE", help=f"none: nowhere (default: {RESULT}, or {WITH_MEMORY.name})"
    )
    options = parser.parse_args()
    options.json = options.json or str(RESULT if options.memory is None else WITH_MEMORY)
    options.layers = [int(layer) for layer in options.layers.split(",")]
    options.only = options.only or list(WAYS)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results.environment()  # that of the start
    measure(options)


if __name__ == "__main__":
    main()
