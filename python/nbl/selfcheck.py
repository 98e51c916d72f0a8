"""Whether nbl and the transformers that is installed understand each other, tried on a tiny model.

A tool that puts its own layers into another library's models goes wrong without a word when that
library hands things over differently. With a version that the tests have seen this was tried
before; with another one it is tried here, once per process, before a model is optimized or
compressed: models that would give other text are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from .layers.fused import fuse
from .layers.linearized import LinearizedDecoderLayer
from .layers.spec import LayerSpec, config_entry
from .models import FAMILIES, become_nbl
from .upstream import CACHE, is_tested, new_cache, tested_range

__all__ = ["check_installed", "differences"]

_PROMPT, _NEW = 6, 4


def check_installed() -> None:
    """RuntimeError under a version of transformers that nbl was not tested with, if results differ.

    Tried once per process, in about 0.2 s.
    """
    if is_tested():
        return
    found = _differences()
    if found:
        raise RuntimeError(
            f"transformers {transformers.__version__} is not one that nbl was tested with "
            f"({tested_range()}), and a small model goes wrong with it: {'; '.join(found)}. "
            f"Install transformers {tested_range()}"
        )


def differences() -> tuple[str, ...]:
    """What goes wrong, a phrase each: a model of two layers, its steps with a cache against one
    pass without, with a memory, with a linear first layer, optimized, and by ``generate``."""
    try:
        # Neither the user's random numbers nor the mode of the caller matter, or change.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return tuple(_try_all())
    except Exception as error:  # of any kind: what breaks is what is asked for
        return (f"{type(error).__name__}: {error}",)


_differences = functools.cache(differences)


def _try_all() -> Iterator[str]:
    torch.manual_seed(0)
    ids = torch.randint(3, 64, (2, _PROMPT + _NEW))
    memory = LayerSpec("linear", rank=8, lags=(1,), decays=(0.5,))
    for name, spec in (("a memory", memory), ("a linear layer", LayerSpec("linear", bias=True))):
        model = _model(spec)
        one_pass = model(ids, use_cache=False).logits
        yield from _differ(f"{name}, steps with a cache", _by_steps(model, ids), one_pass)
        yield from _differ(f"{name}, generate", *_generated(model, ids[:, :_PROMPT]))
        for layer in model.model.layers:
            fuse(layer)
        fused = model(ids, use_cache=False).logits
        yield from _differ(f"{name}, optimized", fused, one_pass)
        yield from _differ(
            f"{name}, optimized, steps with a cache", _by_steps(model, ids), one_pass
        )


def _model(spec: LayerSpec) -> PreTrainedModel:
    """Two layers, the first linear; weights large enough for attention to matter."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = FAMILIES["llama"].causal_lm(config).eval()
    become_nbl(model)
    layer = LinearizedDecoderLayer(model.model.layers[0], spec)
    for name, parameter in layer.named_parameters():
        if name.startswith("linear"):
            parameter.normal_(std=0.2)
    model.model.layers[0] = layer
    model.config.nbl = config_entry({0: spec})
    return model


def _by_steps(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits of a prompt, then of a token at a time."""
    cache = new_cache(model.config)
    parts = [ids[:, :_PROMPT], *ids[:, _PROMPT:].split(1, dim=1)]
    return torch.cat(
        [model(part, use_cache=True, **{CACHE: cache}).logits for part in parts], dim=1
    )


def _generated(model: PreTrainedModel, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of greedy generation and of one pass over its tokens, where they led to the next."""
    tokens = model.generate(prompt, max_new_tokens=_NEW, do_sample=False)
    chosen = tokens[:, _PROMPT:]
    logits = model(tokens, use_cache=False).logits[:, _PROMPT - 1 : -1]
    return logits.gather(-1, chosen[..., None])[..., 0], logits.amax(dim=-1)


def _differ(name: str, found: Tensor, expected: Tensor) -> Iterator[str]:
    """A phrase where they differ by more than rounding of float32."""
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < 1e-4:
        yield f"{name}: logits differ by {error:.1e} of the largest"
