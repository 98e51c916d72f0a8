"""Decoder layers of Llama-3.2-1B's shape with random weights: the speed does not depend on them."""

from __future__ import annotations

import torch
from nbl.models import LayerSpec, NblLlamaConfig, NblLlamaForCausalLM, config_entry
from transformers import PreTrainedModel

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32_000,  # a head in proportion to the few layers
}


def random_model(layers: int, replaced: int, spec: LayerSpec) -> PreTrainedModel:
    """In bfloat16; the last `replaced` layers have random maps, as spec says."""
    specs = {i: spec for i in range(layers - replaced, layers)}
    config = NblLlamaConfig(
        **SHAPE,
        num_hidden_layers=layers,
        max_position_embeddings=4096,
        eos_token_id=None,
        nbl=config_entry(specs),
    )
    model = NblLlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for i in specs:
        for name, parameter in model.model.layers[i].named_parameters():
            if name.startswith("linear") and parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.01)
    return model
