"""What 8 and 4 bits cost and what they give: perplexity of the demo model, decode of a larger one.

The perplexities are those of the shipped model on its held-out text, dense and with half of its
layers linearized. The decode times are of random weights, in layers of Llama-3.2-1B's shape and out
of cache. All models take turns in one run; a ratio compares two times of the same turn. What the
bytes predict: the bf16 model's bytes per step (weights, keys and values) over the model's own.

    python -m benchmarks.studies.quantization
    python -m benchmarks.studies.quantization --calibration-tokens 16384 --layers 2 --json none
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from typing import Any

import nbl
import nbl.demo
import torch
import transformers
from nbl import benchmark
from nbl.engines import Ours
from nbl.models import LayerSpec

from benchmarks import results
from benchmarks.studies.random_model import SHAPE, random_model
from nbl_kernels import machine
from nbl_kernels.quantization import FORMATS

RESULT = results.FOLDER / "quantization.json"
CONTEXT = 128


def perplexities(calibration_tokens: int) -> list[dict[str, Any]]:
    """The demo model in bf16 and in every format, dense and with half of its layers linearized."""
    model, tokenizer = nbl.demo.load(torch.bfloat16)
    settings = {"length": 512, "batch_size": 8}
    calibration = nbl.demo.token_batches(
        tokenizer, "calibration", **settings, max_tokens=calibration_tokens
    )
    test = nbl.demo.token_batches(tokenizer, "test", **settings, max_tokens=16_384)
    cal = nbl.calibrate(model, calibration, progress=False)
    half = model.config.num_hidden_layers // 2
    options = {"criterion": "loss", "batches": calibration[:4]}
    linearized = nbl.linearize(copy.deepcopy(model), cal, half, **options)
    rows = []
    for name, start in {"dense": model, f"NBL-{half}": linearized}.items():
        for weights in (None, *FORMATS):
            quantized = nbl.optimize(copy.deepcopy(start), weights=weights)
            found = nbl.perplexity(quantized, test)
            base = rows[-1]["base"] if weights else found.value
            rows.append(
                {
                    "model": name,
                    "layers": nbl.linearized_layers(start),
                    "weights": weights or "bf16",
                    "perplexity": found.value,
                    "base": base,
                    "tokens": found.tokens,
                    "weight_bytes": nbl.weight_bytes(quantized),
                }
            )
    return rows


def decode_speeds(layers: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    engines: dict[tuple[str, str], Ours] = {}
    for linearized in (0, layers // 2):
        model = random_model(layers, linearized, LayerSpec("linear", bias=True))
        for weights in (None, *FORMATS):
            own = nbl.optimize(copy.deepcopy(model), weights=weights)
            name = f"NBL-{linearized}" if linearized else "dense"
            engines[name, weights or "bf16"] = Ours(own, name)
    prompt = torch.randint(SHAPE["vocab_size"], (1, CONTEXT - steps // 2))  # CONTEXT on average

    def step_seconds(engine: Ours) -> float:
        engine.prefill(prompt, steps + 1)
        return engine.decode(steps) / steps

    calls = {key: functools.partial(step_seconds, engine) for key, engine in engines.items()}
    machine.in_turns(calls, 1)  # to warm up
    times = machine.in_turns(calls, repeats)
    rows = []
    for (name, weights), engine in engines.items():
        read = benchmark.decode_bytes(engine.model, 1, CONTEXT)
        base = rows[-1]["base_bytes"] if weights != "bf16" else read
        ratios = [b / t for b, t in zip(times[name, "bf16"], times[name, weights], strict=True)]
        seconds = statistics.median(times[name, weights])
        rows.append(
            {
                "model": name,
                "weights": weights,
                "bytes": read,
                "base_bytes": base,
                "milliseconds": 1e3 * seconds,
                "gigabytes_per_second": read / seconds / 1e9,
                "speedup_predicted": base / read,
                "speedup": statistics.median(ratios),
                "speedup_range": [min(ratios), max(ratios)],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration-tokens", type=int, default=98_304, help="of the demo model")
    parser.add_argument("--layers", type=int, default=8, help="of the random model")
    parser.add_argument("--steps", type=int, default=16, help="tokens per repetition")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default=str(RESULT), metavar="FILE", help="none: nowhere")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    quality = perplexities(options.calibration_tokens)
    print(f"{'demo model':<10} {'weights':<8} {'perplexity':>10} {'change':>8} {'bytes':>10}")
    for row in quality:
        change = row["perplexity"] / row["base"] - 1
        print(
            f"{row['model']:<10} {row['weights']:<8} {row['perplexity']:>10.2f} {change:>+8.2%} "
            f"{row['weight_bytes']:>10,}"
        )
    speed = decode_speeds(options.layers, options.steps, options.repeats)
    print(f"\n{'decode':<10} {'weights':<8} {'MB':>7} {'ms':>7} {'GB/s':>5} {'predicted':>9} ×bf16")
    for row in speed:
        low, high = row["speedup_range"]
        print(
            f"{row['model']:<10} {row['weights']:<8} {row['bytes'] / 1e6:>7.0f} "
            f"{row['milliseconds']:>7.1f} {row['gigabytes_per_second']:>5.1f} "
            f"{row['speedup_predicted']:>9.2f} {row['speedup']:.2f} ({low:.2f} to {high:.2f})"
        )
    record = {
        **results.stamp(),
        "calibration_tokens": options.calibration_tokens,
        "perplexity": quality,
        "shape": SHAPE | {"num_hidden_layers": options.layers, "context": CONTEXT},
        "repeats": options.repeats,
        "steps": options.steps,
        "decode": speed,
    }
    results.save(options.json, record)


if __name__ == "__main__":
    main()
