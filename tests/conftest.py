"""Shared fixtures: tiny random models of every supported family, deterministic token batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbl
import pytest
import torch
from tiny import (
    FAMILY_CLASSES,
    MIXES,
    VOCAB_SIZE,
    linearize_tiny,
    make_tiny_model,
    make_token_batches,
)
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

# torch.compile's graphs on disk are looked up by the names of the operators in them, not by what
# their fake kernels say: after a change of a result's strides a graph of before it would run here.
torch.compiler.config.force_disable_caches = True


@pytest.fixture(params=FAMILY_CLASSES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    return make_tiny_model


@pytest.fixture
def token_batches() -> Callable[..., list[Tensor]]:
    return make_token_batches


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    """A model with linearized and dropped layers."""

    def make(
        family: str = "llama",
        mix: str = "mixed",
        dtype: torch.dtype = torch.float32,
        rank: int | None = None,
        **config: Any,
    ) -> PreTrainedModel:
        model = make_tiny_model(family, dtype, **config)
        linear, dropped = MIXES[mix]
        if linear:
            linearize_tiny(model, linear, rank=rank)
        return nbl.drop(model, dropped) if dropped else model

    return make


@pytest.fixture
def ids() -> Tensor:
    return make_token_batches(1, batch_size=2, length=11, seed=1)[0]


@pytest.fixture
def padded() -> tuple[Tensor, Tensor]:
    """Three prompts of lengths 11, 7 and 2, padded on the left."""
    ids = make_token_batches(1, batch_size=3, length=11, seed=6)[0].clone()
    mask = torch.ones_like(ids)
    for row, start in ((1, 4), (2, 9)):
        ids[row, :start], mask[row, :start] = 0, 0
    return ids, mask


@pytest.fixture
def padded_inputs() -> dict[str, Tensor]:
    """Two prompts, the second shorter: padded on the left."""
    ids = make_token_batches(1, batch_size=2, length=9, seed=6)[0].clone()
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    """Words that are numbers, for the tiny models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")
    fast.save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
