"""Inputs of the linears, and what they are in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import nbl_kernels as nk

EPS = 1e-6


def make(
    *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, device: str = "cpu"
) -> Tensor:
    """Normal numbers, the same for the same shape."""
    generator = torch.Generator().manual_seed(sum(shape) + 17 * len(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)


def torch_residual_linear(x, weight, bias, residual, norm_weight):
    f = x if norm_weight is None else F.rms_norm(x, x.shape[-1:], norm_weight, EPS)
    return (x if residual is None else residual) + F.linear(f, weight, bias)


def torch_norm_linear(x, norm_weight, weight, bias):
    return F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, EPS), weight, bias)


def torch_norm_swiglu(x, norm_weight, gate_up_weight):
    f = F.rms_norm(x, x.shape[-1:], norm_weight, EPS)
    gate, up = F.linear(f, gate_up_weight).chunk(2, -1)
    return F.silu(gate) * up


def quantized(n: int, k: int, format: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    weight, scale = nk.quantize(make(n, k, scale=k**-0.5), format)
    return weight.to(device), scale.to(device)


def dequantizing(torch_function: Callable, weight: Tensor, scale: Tensor, k: int) -> Callable:
    """``torch_function`` where its weight, None, is the dequantized one in the dtype of x."""

    def function(x, *inputs):
        dense = nk.dequantize(weight.to(x.device), scale.to(x.device), k, x.dtype)
        position = 0 if torch_function is torch_residual_linear else 1
        return torch_function(x, *inputs[:position], dense, *inputs[position + 1 :])

    return function


def layer_calls(m: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Callable]:
    """x, and a layer's worth of calls on it."""
    shapes = ((m, d), (d, d), (d,), (2 * d, d))
    x, w, g, up = (make(*s, dtype=dtype, scale=0.05, device=device) for s in shapes)

    def layer(x: Tensor) -> Tensor:
        h = nk.residual_linear(x, w, g, norm_weight=g)
        return nk.residual_linear(nk.norm_swiglu(h, g, up), w, None, h) + nk.norm_linear(h, g, w)

    return x * 20, layer


def quantized_layer(d: int, format: str, device: str) -> Callable:
    weight, scale = quantized(d, d, format, device)
    gate_up, gate_up_scale = quantized(2 * d, d, format, device)
    g = make(d, dtype=torch.bfloat16, scale=0.3, device=device)

    def layer(x: Tensor) -> Tensor:
        h = nk.residual_linear(x, weight, g, norm_weight=g, weight_scale=scale)
        y = nk.norm_swiglu(h, g, gate_up, weight_scale=gate_up_scale)
        y = nk.residual_linear(y, weight, None, h, weight_scale=scale)
        return y + nk.norm_linear(h, g, weight, weight_scale=scale)

    return layer
