"""optimize: a transformers model on the fused kernels, in place."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

import nbl_kernels as nk

from .fused import FusedLayer, check_fusible, fuse
from .linearization import check_dtype, check_one_device
from .models import family_of

__all__ = ["optimize"]


def optimize(model: PreTrainedModel, *, weights: None = None) -> PreTrainedModel:
    """Runs a model's decoder layers on the fused kernels, in place: faster decode and prefill.

    An attention layer becomes ``norm_linear`` (q, k and v at once), transformers' own rotation,
    cache and attention function, and three fused launches; a linearized layer becomes three
    launches. The head reads its weight once. ``forward``, ``generate`` in all its modes, every
    cache and attention implementation, output_hidden_states and torch.compile go on working; so do
    training, autocast, output_attentions, calibration and adapters, in transformers' own code on
    the same weights (see :mod:`nbl.fused`). Logits differ by rounding only.

    The model keeps its modules and parameters. Weights that are read together are packed into one
    tensor, of which the parameters become views: memory grows by one layer's weights while packing
    and not at all afterwards. On a CPU the weights move into huge pages, where the system gives any
    (:func:`nbl_kernels.use_huge_pages`). ``save_pretrained`` writes the ordinary checkpoint;
    ``safetensors.torch.save_file(model.state_dict(), …)`` refuses shared memory, as ever.

    Args:
        model: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM,
            linearized or not. Mutated; optimizing again changes nothing. Layers that are linearized
            or dropped later are optimized too.
        weights: None, the model's own weights.

    Returns:
        model. Undone by :func:`nbl.restore`.

    Raises:
        ValueError: an unsupported model, dtype or activation; a model over several devices; linears
            that are quantized, wrapped or shared between layers. The model is untouched.
    """
    if weights is not None:
        raise ValueError(f"weights: expected None (the model's own weights), got {weights!r}")
    family_of(model)
    check_one_device(model)
    check_dtype(model)
    act = model.config.hidden_act
    if act not in ("silu", "swish"):
        raise ValueError(f"hidden_act: expected 'silu', got {act!r}; the fused MLP is SwiGLU")
    layers = {
        f"model.layers.{i}": layer
        for i, layer in enumerate(model.model.layers)
        if not isinstance(layer, FusedLayer)
    }
    seen: dict[int, str] = {}
    for name, layer in layers.items():
        check_fusible(layer, name)
        for where, parameter in layer.named_parameters():
            if id(parameter) in seen:
                raise ValueError(
                    f"{name}.{where} is shared with {seen[id(parameter)]}; it cannot be packed"
                )
            seen[id(parameter)] = f"{name}.{where}"
    for layer in layers.values():
        fuse(layer)
    if type(model.lm_head) is torch.nn.Linear:
        fuse(model.lm_head)
    for memory in {p.untyped_storage().data_ptr(): p for p in model.parameters()}.values():
        nk.use_huge_pages(memory)
    return model
