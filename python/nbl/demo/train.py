"""Trains the shipped demo model: `python -m nbl.demo.train --out DIR --minutes 40`.

A byte-level BPE tokenizer and a small Llama, from the texts of `corpus`, within a time budget: the
learning rate follows the share of the budget that is spent, so it has always decayed at the end.
The corpus is small and is seen many times, hence dropout on every branch and weight decay, and the
weights that are kept are those with the lowest loss on the validation files.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import documents, token_batches

CHECKS = 15  # validations per run
SHORT_UNTIL = 0.7  # share of the time that trains on rows of half the length
END_OF_TEXT = "<|endoftext|>"  # before every document: bos and eos in one, as in GPT-2


def train_tokenizer(texts: list[str], *, vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    end = tokenizer.eos_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            max_position_embeddings=args.length,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def add_dropout(model: LlamaForCausalLM, p: float) -> list:
    """Dropout of channels, on the embeddings and on what every branch adds to the residual stream.

    Llama itself has dropout on attention weights only, which would rule out the fused attention.
    One mask for all tokens of a row costs next to nothing.
    """

    def hook(module: Any, args: Any, output: Any) -> Any:
        if not module.training:
            return output
        mask = output.new_full((output.shape[0], 1, output.shape[-1]), 1 - p).bernoulli_()
        return output * mask.div_(1 - p)

    branches = [model.model.embed_tokens]
    for layer in model.model.layers:
        branches += [layer.self_attn.o_proj, layer.mlp.down_proj]
    return [branch.register_forward_hook(hook) for branch in branches]


def shuffled_rows(
    texts: list[list[int]], length: int, rng: random.Random
) -> Iterator[torch.Tensor]:
    """Endless rows of `length` + 1 tokens; documents reordered, so cut elsewhere, each time."""
    buffer: list[int] = []
    while True:
        for text in rng.sample(texts, len(texts)):
            buffer += text
            while len(buffer) > length:
                yield buffer[: length + 1]
                buffer = buffer[length:]


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, batches: list[torch.Tensor]) -> float:
    """Mean negative log-likelihood per predicted token: every row but its first token."""
    training = model.training
    model.eval()
    total = count = 0.0
    for batch in batches:
        predicted = batch.shape[0] * (batch.shape[1] - 1)
        total += model(batch, labels=batch).loss.item() * predicted
        count += predicted
    model.train(training)
    return total / count


def optimizers_of(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which needs fewer steps; AdamW for embeddings and norms."""
    matrices = [w for w in model.model.layers.parameters() if w.ndim == 2]
    gains = [w for w in model.parameters() if w.ndim == 1]
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay),
        torch.optim.AdamW(
            [
                {"params": [model.model.embed_tokens.weight], "weight_decay": args.weight_decay},
                {"params": gains, "weight_decay": 0.0},
            ],
            lr=args.lr,
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]


def schedule(progress: float, warmup: float = 0.02, floor: float = 0.01) -> float:
    """The learning rate's factor when `progress` of the time is spent: warm-up, then cosine."""
    if progress < warmup:
        return (progress + 1e-3) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
    return floor + (1 - floor) * cosine


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> dict[str, Any]:
    """Trains in place, leaves the best weights in the model, returns the log."""
    texts = [
        [tokenizer.eos_token_id, *tokenizer.encode(text, verbose=False)]
        for text in documents("train")
    ]
    rows = shuffled_rows(texts, args.length, random.Random(args.seed))
    validation = token_batches(tokenizer, "validation", length=args.length, batch_size=8)
    optimizers = optimizers_of(model, args)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    hooks = add_dropout(model, args.dropout)

    best, best_weights, curve = math.inf, None, []
    step, tokens, running = 0, 0, None
    budget, start = args.minutes * 60, time.monotonic()
    next_check = budget / CHECKS
    model.train()
    while True:
        spent = time.monotonic() - start
        if step and spent >= min(next_check, budget):
            loss = mean_loss(model, validation)
            curve.append(
                {
                    "minutes": round(spent / 60, 2),
                    "step": step,
                    "tokens": tokens,
                    "train_loss": round(running, 4),
                    "validation_loss": round(loss, 4),
                }
            )
            print(json.dumps(curve[-1]), flush=True)
            if loss < best:
                best, best_weights = loss, copy.deepcopy(model.state_dict())
            next_check += budget / CHECKS
        if step and spent >= budget:
            break
        progress = spent / budget
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * schedule(progress)

        batch = torch.tensor([next(rows) for _ in range(args.batch_size)])
        # Short rows first: attention is the slow part on a CPU, and long context is learned last.
        length = args.length // 2 if progress < SHORT_UNTIL else args.length
        inputs, targets = batch[:, :-1].reshape(-1, length), batch[:, 1:].flatten()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = model(inputs, use_cache=False).logits.flatten(0, 1)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, tokens = step + 1, tokens + targets.numel()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()

    for hook in hooks:
        hook.remove()
    model.load_state_dict(best_weights)
    return {
        "steps": step,
        "tokens_seen": tokens,
        "epochs": round(tokens / sum(map(len, texts)), 1),
        "wall_minutes": round((time.monotonic() - start) / 60, 1),
        "best_validation_loss": round(best, 4),
        "curve": curve,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=40, help="training time")
    parser.add_argument("--start", type=Path, help="continue from this model, with its log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="context, in tokens")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        earlier = json.loads((args.start / "training_log.json").read_text())
    else:
        tokenizer = train_tokenizer(
            documents("train"), vocab_size=args.vocab_size, length=args.length
        )
        model = build_model(tokenizer, args)
        earlier = None
    log = train(model, tokenizer, args)

    model = model.to(torch.bfloat16)  # as shipped; the perplexities below are of these weights
    model.float()
    perplexity = {
        limit: math.exp(
            mean_loss(
                model,
                token_batches(
                    tokenizer, "test", length=args.length, batch_size=8, max_tokens=limit
                ),
            )
        )
        for limit in (None, 4096)
    }
    log = {
        "test_perplexity": round(perplexity[None], 3),
        "test_perplexity_first_4096": round(perplexity[4096], 3),
        "test_perplexity_is": f"exp of the mean loss over tokens 2 to {args.length} of the rows of "
        f"token_batches(tokenizer, 'test', length={args.length}), the second "
        "with max_tokens=4096; bfloat16 weights, float32 arithmetic",
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "characters": {
            name: sum(map(len, documents(name)))
            for name in ("train", "validation", "calibration", "test")
        },
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "settings": {
            name: value for name, value in vars(args).items() if name not in ("out", "start")
        },
        **log,
        "continued_from": earlier,
    }
    save(model.to(torch.bfloat16), tokenizer, log, args.out)
    print(f"test perplexity {perplexity[None]:.2f}; saved in {args.out}")


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, log: dict[str, Any], out: Path
) -> None:
    """Everything is written beside `out` first, then each file replaced in one step."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (Path(scratch) / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
        for file in Path(scratch).iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
            os.replace(file, out / file.name)


if __name__ == "__main__":
    main()
