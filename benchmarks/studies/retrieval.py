"""What a linear map with a memory cannot do: look something up by its content.

Two small Llamas are trained here, seeded, on made-up tokens; then their attention layers are
replaced by linear maps, calibrated on the very task, and the answers are counted.

recall: pairs of a key and a value, then keys of these pairs, drawn at random: which value follows?
    Two layers: the first tells every token which one stood before it, the second finds the key.
    Which value is asked for depends on a product, key times key; a linear map sums, however long it
    remembers. Knowing the values that occurred, but not which one belongs to the key: 1 / pairs.
previous: which token stood before this one? One layer. Chance: 1 / tokens.

    python -m benchmarks.studies.retrieval                    # about two minutes
    python -m benchmarks.studies.retrieval --steps 50 --json none
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import nbl
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import results

RESULT = results.FOLDER / "retrieval.json"
PAIRS, QUERIES, KEYS, VALUES = 8, 16, 16, 16
TOKENS, LENGTH = 32, 32  # of the control
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
MAPS = {
    "one token": None,
    "memory": nbl.Memory(lags=(1,), decays=(0.6, 0.95)),
    "memory, long": nbl.Memory(lags=(1,), decays=(0.6, 0.9, 0.95, 0.98, 0.99, 0.995)),
}


def recall(rows: int, g: torch.Generator, pairs: int = PAIRS) -> tuple[Tensor, Tensor]:
    """Tokens (rows, 2 (pairs + QUERIES)) and the answer at each, -100 where none is asked for."""
    keys = torch.rand(rows, KEYS, generator=g).argsort(dim=1)[:, :pairs]
    values = torch.rand(rows, VALUES, generator=g).argsort(dim=1)[:, :pairs] + KEYS
    again = torch.randint(pairs, (rows, QUERIES), generator=g)
    order = torch.cat([torch.arange(pairs).expand(rows, -1), again], dim=1)
    tokens = torch.stack([keys.gather(1, order), values.gather(1, order)], dim=2).flatten(1)
    answers = torch.full_like(tokens, -100)
    answers[:, 2 * pairs :: 2] = tokens[:, 2 * pairs + 1 :: 2]
    return tokens, answers


def previous(rows: int, g: torch.Generator, pairs: int = PAIRS) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(TOKENS, (rows, LENGTH), generator=g)
    answers = tokens.roll(1, dims=1)
    answers[:, 0] = -100
    return tokens, answers


def train(
    task: Callable, layers: int, vocabulary: int, steps: int, rate: float
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """The model, and how it was trained: on few pairs first, one more whenever these are learned;
    until nothing is left to learn."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        num_key_value_heads=SIZES["num_attention_heads"],
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    g = torch.Generator().manual_seed(1)
    start, mean, pairs = time.perf_counter(), 5.0, 2
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(step / 100, 1.0, 4 * (1 - (step - 1) / steps))
        tokens, answers = task(32, g, pairs)
        logits = model(tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = 0.95 * mean + 0.05 * loss.item()
        if step % 250 == 0:
            print(f"    step {step}: loss {mean:.3f}, {pairs} pairs", flush=True)
        if mean < (0.1 if pairs < PAIRS else 0.01):
            if pairs == PAIRS:
                break
            pairs, mean = pairs + 1, 1.0
    log = {"steps": step, "loss": mean, "seconds": time.perf_counter() - start}
    return model.eval(), log


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, tokens: Tensor, answers: Tensor) -> float:
    asked = answers >= 0
    return float((model(tokens).logits.argmax(-1) == answers)[asked].float().mean())


def replaced(
    model: LlamaForCausalLM, task: Callable, choices: Sequence[Sequence[int]], rows: int
) -> list[dict[str, Any]]:
    """The share of right answers with each map in each choice of layers, full rank."""
    g = torch.Generator().manual_seed(2)
    calibration = [task(256, g)[0] for _ in range(rows // 256)]
    test = task(2048, g)
    found = [{"layers": [], "map": "attention", "accuracy": accuracy(model, *test)}]
    for name, memory in MAPS.items():
        cal = nbl.calibrate(model, calibration, memory=memory, progress=False)
        solved = cal.solve()
        for layers in choices:
            nbl.linearize(model, cal, layers)
            row = {"layers": list(layers), "map": name, "accuracy": accuracy(model, *test)}
            nbl.restore(model)
            row["nmse"] = [float(solved[i].nmse) for i in layers]
            found.append(row)
    for row in found:
        errors = ", ".join(f"{e:.3f}" for e in row.get("nmse", []))
        print(f"  {row['layers']!s:<8} {row['map']:<14} {row['accuracy']:7.2%}   NMSE {errors}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6000, help="of training, at most")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--rows", type=int, default=8192, help="sequences of the calibration")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default=str(RESULT), metavar="FILE", help="none: nowhere")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    results.environment()

    tasks = {}
    for name, task, layers, vocabulary, chance, choices in (
        ("recall", recall, 2, KEYS + VALUES, 1 / PAIRS, ([0], [1])),
        ("previous", previous, 1, TOKENS, 1 / TOKENS, ([0],)),
    ):
        print(name, flush=True)
        model, log = train(task, layers, vocabulary, options.steps, options.rate)
        found = replaced(model, task, choices, options.rows)
        tasks[name] = {
            "chance": chance,
            "num_hidden_layers": layers,
            "training": log,
            "rows": found,
        }
    record = {
        **results.stamp(),
        "model": SIZES,
        "pairs": PAIRS,
        "queries": QUERIES,
        "keys": KEYS,
        "values": VALUES,
        "memories": {
            name: None if m is None else {"lags": m.lags, "decays": m.decays}
            for name, m in MAPS.items()
        },
        "rank": None,
        "calibration_sequences": options.rows,
        "test_sequences": 2048,
        "tasks": tasks,
    }
    results.save(options.json, record)


if __name__ == "__main__":
    main()
