"""Tiny random models of every supported family, linearized or not, and batches of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nbl
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

# Which layers are linearized, and which lose their attention.
MIXES = {"dense": ([], []), "mixed": ([0, 2], [1]), "linear": ([0, 1, 3], [2])}
# Every kind of map: what nbl.calibrate and nbl.linearize are told.
MAPS = {
    "full": {},
    "rank": {"rank": 6},
    "memory": {"memory": nbl.Memory(lags=(1,), decays=(0.8,))},
    "memory-rank": {"memory": nbl.Memory(lags=(1,), decays=(0.8,)), "rank": 6},
}


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As from_pretrained(dtype=...): model.to(dtype) would round the rotary frequencies too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


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


def linearize_tiny(
    model: PreTrainedModel,
    layers: Sequence[int],
    *,
    memory: nbl.Memory | None = None,
    features: str = "post-norm",
    **options: Any,
) -> PreTrainedModel:
    """In place, by maps of a few random tokens; ``options`` are those of nbl.linearize."""
    if "window" in options:
        return nbl.linearize(model, None, list(layers), **options)
    batches = make_token_batches(4)
    calibration = nbl.calibrate(model, batches, memory=memory, features=features, progress=False)
    return nbl.linearize(model, calibration, list(layers), **options)
