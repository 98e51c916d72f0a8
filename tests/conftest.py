"""Shared fixtures: tiny random models of every supported family, deterministic token batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from transformers import PreTrainedModel

FAMILY_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
VOCAB_SIZE = 97

# torch.compile's graphs on disk are looked up by the names of the operators in them, not by what
# their fake kernels say: after a change of a result's strides a graph of before it would run here.
torch.compiler.config.force_disable_caches = True


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As from_pretrained(dtype=...): model.to(dtype) would round the rotary frequencies too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture(params=FAMILY_CLASSES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def make_tiny_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, **config
) -> PreTrainedModel:
    """A model of 4 layers with random weights, the same at every call."""
    config_class, model_class = FAMILY_CLASSES[family]
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 128,
        "initializer_range": 0.25,  # large enough for the attention to matter
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "sliding_window": None,
    }
    torch.manual_seed(0)
    model = model_class(config_class(**settings | config))
    with torch.no_grad():  # norms of ones would hide a norm that is left out
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return cast_parameters(model, dtype).eval()


def make_token_batches(
    n: int = 12, batch_size: int = 4, length: int = 32, seed: int = 0
) -> list[torch.Tensor]:
    """n batches (batch_size, length) of ids that are no special token."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(2, VOCAB_SIZE, (n, batch_size, length), generator=generator))


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    return make_tiny_model


@pytest.fixture
def token_batches() -> Callable[..., list[torch.Tensor]]:
    return make_token_batches


@pytest.fixture
def padded(token_batches: Callable[..., list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of lengths 11, 7 and 2, padded on the left."""
    ids = token_batches(1, batch_size=3, length=11, seed=6)[0].clone()
    mask = torch.ones_like(ids)
    for row, start in ((1, 4), (2, 9)):
        ids[row, :start], mask[row, :start] = 0, 0
    return ids, mask
