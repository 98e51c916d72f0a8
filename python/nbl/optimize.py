"""optimize: a transformers model on the fused kernels, in place."""

from __future__ import annotations

import itertools

import torch
from transformers import PreTrainedModel

import nbl_kernels as nk
from nbl_kernels.quantization import FORMATS

from .checks import check_model, check_no_draft
from .layers.fused import FusedLayer, check_fusible, check_plain, fuse, unfuse
from .layers.quantized import quantize_linears, quantized_linears
from .linearize import forget_originals
from .models import become_nbl
from .selfcheck import check_installed

__all__ = ["optimize", "weight_bytes"]


def optimize(
    model: PreTrainedModel, *, weights: str | None = None, keep_original: bool = False
) -> PreTrainedModel:
    """Runs a model's decoder layers on the fused kernels, in place: faster decode and prefill.

    An attention layer becomes ``norm_linear`` (q, k and v at once), transformers' own rotation,
    cache and attention function, and three fused launches; a linearized layer becomes three
    launches. The head reads its weight once. ``forward``, ``generate`` in all its modes, every
    cache and attention implementation, output_hidden_states and torch.compile go on working; so do
    training, autocast, output_attentions, calibration and adapters, in transformers' own code on
    the same weights (see :mod:`nbl.layers.fused`). Logits differ by rounding only.

    The model keeps its modules and parameters. Weights that are read together are packed into one
    tensor, of which the parameters become views: memory grows by one layer's weights while packing
    and not at all afterwards. On a CPU the weights move into huge pages, where the system gives any
    (:func:`nbl_kernels.use_huge_pages`). ``save_pretrained`` writes the ordinary checkpoint;
    ``safetensors.torch.save_file(model.state_dict(), …)`` refuses shared memory, as ever.

    With `weights` every linear, the maps and the head among them, keeps its weights in 8 or 4 bits
    (:func:`nbl_kernels.quantize`), rounded to the nearest without data; activations, norms, biases,
    the embedding and the KV cache stay in the model's dtype. Memory and the bytes that a decode
    step reads (:func:`weight_bytes`) fall accordingly. A head that is tied to the embedding becomes
    a quantized copy: rows of the embedding are looked up, the head is read whole at every step.
    Logits change by what the rounding costs. The weights are no parameters any more: gradients go
    through them, not to them. The model takes its NBL class, in which ``save_pretrained`` refuses:
    no checkpoint says what the numbers mean. ``model.state_dict()`` does, for a model that was
    quantized in the same way.

    Args:
        model: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM,
            linearized or not. Mutated; optimizing again changes nothing, or quantizes what was not.
            Layers that are linearized or dropped later are optimized, and quantized, too.
        weights: "int8" or "fp8" (a scale per row), "int4" (a scale per 128 weights), or None: as
            they are.
        keep_original: keep the original weights too, for :func:`nbl.restore`, which gives them back
            bit for bit. It costs their memory. By default they are freed, one linear at a time (and
            with them the attention layers that :func:`nbl.linearize` kept aside), and restore
            raises.

    Returns:
        model. Undone by :func:`nbl.restore`.

    Raises:
        ValueError: an unsupported model, dtype or activation; a model over several devices; linears
            that are quantized by others, wrapped or shared between layers; weights that are not
            finite, or quantized to another format already; a draft, with `weights`. The model is
            untouched.
        RuntimeError: under a version of transformers that nbl was not tested with, where a small
            model goes wrong (:mod:`nbl.selfcheck`).
    """
    check_installed()
    if weights not in (None, *FORMATS):
        raise ValueError(f"weights: expected None or one of {', '.join(FORMATS)}, got {weights!r}")
    if keep_original and weights is None:
        raise ValueError("keep_original: expected weights beside it; None keeps the weights anyway")
    check_model(model)
    act = model.config.hidden_act
    if act not in ("silu", "swish"):
        raise ValueError(f"hidden_act: expected 'silu', got {act!r}; the fused MLP is SwiGLU")
    quantized = next(quantized_linears(model), None)
    if quantized is not None and weights not in (None, quantized.format):
        raise ValueError(f"weights: expected None, they are {quantized.format} already")
    layers = {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    seen: dict[int, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, FusedLayer):
            continue
        check_fusible(layer, name)
        for where, parameter in layer.named_parameters():
            if id(parameter) in seen:
                raise ValueError(
                    f"{name}.{where} is shared with {seen[id(parameter)]}; it cannot be packed"
                )
            seen[id(parameter)] = f"{name}.{where}"
    head = model.lm_head
    if weights is not None and quantized is None:
        check_no_draft(model)
        for name, layer in layers.items():
            check_plain(layer, name)
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"{name}: expected finite weights")
        if not keep_original:
            forget_originals(model)
        become_nbl(model)
        unfuse(head)
        for module in (head, *layers.values()):
            quantize_linears(module, weights, keep_original=keep_original)
            if isinstance(module, FusedLayer):
                module.pack()
    for layer in layers.values():
        fuse(layer)
    if type(head) is torch.nn.Linear:
        fuse(head)
    tensors = itertools.chain(model.parameters(), model.buffers())
    for memory in {t.untyped_storage().data_ptr(): t for t in tensors}.values():
        nk.use_huge_pages(memory)
    return model


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: all of them once, as they are stored (of quantized
    ones the numbers and scales), but of the embedding, which is looked up, nothing, unless the head
    is tied to it. The KV cache is not included. Any transformers causal LM."""
    tensors = [*model.parameters()]
    tensors += [t for linear in quantized_linears(model) for t in linear.buffers()]
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return sum(t.nbytes for t in tensors if tied or t is not embedding)
