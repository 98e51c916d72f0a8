"""Perplexity of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .batches import Batch, read_batches
from .layers.tokens import span_arguments
from .upstream import execution_device

__all__ = [
    "LOGITS_AT_ONCE",
    "Perplexity",
    "eval_mode",
    "perplexity",
    "read_logits",
    "sum_nll",
]

# Logits are made for so many of them at a time, whatever the vocabulary: 32 MiB of float32, which
# stay in a large cache (half the time of 128 MiB with 49,152 tokens, on two threads).
LOGITS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Perplexity:
    """value: exp(nll); tokens: how many were predicted; nll: mean per token, in nats."""

    value: float
    tokens: int
    nll: float


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Iterable[Any]) -> Perplexity:
    """exp of the mean of -log p(token | the tokens before it in its sequence).

    A sequence's first token is not predicted, padding is neither predicted nor predicted from.
    Logits are computed in the model's dtype, log-softmax in float32, sums in float64.

    Args:
        model: a transformers causal LM; used in eval mode and given back in the mode it was in.
        batches: LongTensors (B, T), or dicts with input_ids and attention_mask (B, T), or with
            input_ids and position_ids of packed texts, as :func:`nbl.calibrate` takes them.

    Raises:
        ValueError, TypeError: a bad batch, by its index; no token to predict.
    """
    total, tokens = 0.0, 0
    with eval_mode(model):
        for batch in read_batches(batches, model):
            inputs = batch.inputs | span_arguments(model.base_model, batch)
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
            nll, predicted = sum_nll(model, hidden, batch)
            total, tokens = total + nll, tokens + predicted
    if tokens == 0:
        raise ValueError("batches: no token to predict; a sequence needs two tokens")
    nll = total / tokens
    return Perplexity(value=math.exp(nll) if nll < 700 else math.inf, tokens=tokens, nll=nll)


def sum_nll(model: PreTrainedModel, hidden: Tensor, batch: Batch) -> tuple[float, int]:
    """(the sum of -log p over the tokens of a batch that are predicted, how many these are); hidden
    (B, T, d): what the head reads."""
    hidden, labels = hidden[:, :-1], batch.input_ids[:, 1:]
    predicted = None
    if batch.attention_mask is not None:
        predicted = batch.attention_mask[:, 1:] & batch.attention_mask[:, :-1]
    elif batch.starts is not None:
        predicted = ~batch.starts[:, 1:]
    if predicted is not None:
        hidden, labels = hidden[predicted], labels[predicted]
    total = torch.zeros((), dtype=torch.float64)
    for logits, label in read_logits(model, hidden.flatten(0, -2), labels.flatten()):
        total += F.cross_entropy(logits, label, reduction="none").double().sum().cpu()
    return total.item(), labels.numel()


def read_logits(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits (n, vocabulary) in float32, labels (n,)) of some rows at a time, all of hidden (N, d)
    and labels (N,) one after another."""
    head = model.get_output_embeddings()
    device = execution_device(head)
    rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    for h, label in zip(hidden.split(rows), labels.split(rows), strict=True):
        yield head(h.to(device)).float(), label.to(device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards each in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
