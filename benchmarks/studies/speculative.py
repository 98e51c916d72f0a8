"""Self-speculative decoding: how many drafted tokens are accepted, and what that is worth.

The shipped model continues held-out text greedily, alone and with its own linearized twin drafting:
by nbl.Runner (`draft_layers`) and by transformers' assisted generation (`assistant_model`). Alone
and drafted take turns, prompt by prompt; a ratio compares two times of the same turn, and the
tokens must be equal. A draft keeps the MLPs and the head: its pass is not much cheaper than the
model's own unless attention to a long KV cache is what costs.

    python -m benchmarks.studies.speculative
    python -m benchmarks.studies.speculative --calibration-tokens 16384 --prompts 2 --json none
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import nbl
import nbl.demo
import torch
import transformers
from torch import Tensor

from benchmarks import results
from nbl_kernels import machine

RESULT = results.FOLDER / "speculative.json"
PROMPT_TOKENS = 64


def compare(prompts: Tensor, alone: Callable, drafted: Callable, note: Callable) -> dict[str, Any]:
    """Speed-up of `drafted` over `alone`, prompt by prompt; `note` is called after each draft."""
    ratios = []
    for prompt in prompts.split(1):
        tokens: list[Tensor] = []
        generate = {"alone": alone, "drafted": drafted}
        calls = {
            name: lambda call=call, p=prompt, tokens=tokens: machine.seconds(
                lambda: tokens.append(call(p))
            )
            for name, call in generate.items()
        }
        drafted(prompt[:, :8]), alone(prompt[:, :8])  # warm
        times = machine.in_turns(calls, 1)
        assert torch.equal(*tokens), "drafting changed the greedy tokens"
        note()
        ratios.append(times["alone"][0] / times["drafted"][0])
    return {"speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)]}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    model, tokenizer = nbl.demo.load(torch.float32)
    settings = {"length": 512, "batch_size": 8}
    calibration = nbl.demo.token_batches(
        tokenizer, "calibration", **settings, max_tokens=options.calibration_tokens
    )
    test = nbl.demo.token_batches(tokenizer, "test", **settings, max_tokens=16_384)
    prompts = torch.cat(list(test))[: options.prompts, :PROMPT_TOKENS]
    cal = nbl.calibrate(model, calibration, progress=False)
    count = 3 * model.config.num_hidden_layers // 4
    draft = nbl.draft_model(model, cal, count, criterion="loss", batches=calibration[:4])
    nbl.optimize(model)
    nbl.optimize(draft)
    runner = nbl.Runner(model, 1, PROMPT_TOKENS + options.tokens, draft=draft)
    rows = []
    for layers in range(2, count + 1, 2):
        reports = []
        row = compare(
            prompts,
            lambda p: runner.generate(p, options.tokens, stop=[])[0],
            lambda p, m=layers: runner.generate(p, options.tokens, stop=[], draft_layers=m)[0],
            lambda reports=reports: reports.append(runner.last_draft),
        )
        proposed = sum(r.proposed for r in reports)
        accepted, passes = sum(r.accepted for r in reports), sum(r.passes for r in reports)
        rows.append(
            {
                "engine": "nbl.Runner",
                "layers": layers,
                "acceptance": accepted / proposed,
                "tokens_per_pass": 1 + accepted / passes,
                **row,
            }
        )
    exactly = {
        "max_new_tokens": options.tokens,
        "min_new_tokens": options.tokens,
        "do_sample": False,
    }
    row = compare(
        prompts,
        lambda p: model.generate(p, **exactly),
        lambda p: model.generate(p, **exactly, assistant_model=draft),
        lambda: None,
    )
    return [*rows, {"engine": "transformers, assisted", "layers": count, **row}]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration-tokens", type=int, default=98_304)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="new ones, of each prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default=str(RESULT), metavar="FILE", help="none: nowhere")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    rows = measure(options)
    print(f"{'engine':<24} draft layers  accepted  tokens per pass  × alone")
    for row in rows:
        low, high = row["speedup_range"]
        accepted, per_pass = row.get("acceptance"), row.get("tokens_per_pass")
        print(
            f"{row['engine']:<24} {row['layers']:>12}  "
            f"{'' if accepted is None else format(accepted, '.0%'):>8}  "
            f"{'' if per_pass is None else format(per_pass, '.2f'):>15}  "
            f"{row['speedup']:.2f} ({low:.2f} to {high:.2f})"
        )
    record = {
        **results.stamp(),
        "prompts": options.prompts,
        "tokens": options.tokens,
        "rows": rows,
    }
    results.save(options.json, record)


if __name__ == "__main__":
    main()
