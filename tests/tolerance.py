"""One rule for every kernel's tolerance: its error against float64 may be at most a small multiple
of the error that plain PyTorch makes in the same dtype on the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import nbl_kernels as nk


def max_error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_rounding_only(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`plain` is PyTorch's result in the same dtype, `exact` the float64 one, on the CPU.

    Twice PyTorch's error; in float32 four times: there both errors are a few roundings that depend
    on the order of the sums, and of thousands of draws some are further off than PyTorch's by luck.
    On a GPU six times: its rsqrt alone may be off by two units in the last place.
    """
    assert actual.shape == plain.shape and actual.dtype == plain.dtype
    factor = 2 if plain.dtype is not torch.float32 else 6 if actual.is_cuda else 4
    actual, plain = actual.cpu(), plain.cpu()
    # PyTorch can be right by luck: one rounding of the largest result is always granted.
    rounding = torch.finfo(plain.dtype).eps / 2 * exact.abs().max().item() if exact.numel() else 0
    allowed = factor * max(max_error(plain, exact), rounding)
    assert max_error(actual, exact) <= allowed, (max_error(actual, exact), allowed)


def assert_as_exact_as_torch(
    actual: Tensor, torch_fn: Callable, inputs: list[Tensor | None]
) -> None:
    """`torch_fn(*inputs)` is PyTorch's way; on float64 inputs, on the CPU, it is the truth."""
    exact = torch_fn(*(None if t is None else t.double().cpu() for t in inputs))
    assert_rounding_only(actual, torch_fn(*inputs), exact)


def exact_copy(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A transformers model in float64, its maps in plain PyTorch: the truth for logits. Or in
    another dtype: PyTorch's way."""
    exact = copy.deepcopy(model).to(dtype)
    for layer in exact.model.layers:
        if getattr(layer, "spec", None) and layer.spec.kind == "linear":

            def attention(x, cache=None, span=None, layer=layer):
                pre_norm = layer.spec.features == "pre-norm"
                if layer.spec.has_memory:
                    return recalled(layer, x if pre_norm else layer.input_layernorm(x), x, span)
                maps = (
                    [layer.linear] if layer.spec.rank is None else [layer.linear_v, layer.linear_u]
                )
                return x + nn.Sequential(*maps)(x if pre_norm else layer.input_layernorm(x))

            layer._attention = attention
    return exact


def recalled(layer: nn.Module, features: Tensor, x: Tensor, span) -> Tensor:
    """x + W φ + b of a layer with a memory, token by token from nothing."""
    u, tokens = getattr(layer, "linear_u", None), {}
    if span is not None:
        tokens = {"mask": span.mask, "starts": span.starts}
    return nk.memory_scan_ref(
        features,
        layer.linear_v.weight,
        None if u is None else u.weight,
        layer.linear_bias if u is None else u.bias,
        x,
        state=layer.new_state(len(x)).to(x.dtype),
        lags=layer.spec.lags,
        decays=layer.spec.decays,
        **tokens,
    )
