"""Linears whose weights are kept in 8 or 4 bits, in place of the plain ones they were.

As a fused layer is the layer it was, so is a quantized linear: :func:`quantize_linears` exchanges
the class of the object. Whoever shares it (a draft and its original) sees the same weights, and
hooks stay. The formats are those of :func:`nbl_kernels.quantize`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nbl_kernels as nk
from nbl_kernels.quantization import format_of

__all__ = [
    "QuantizedLinear",
    "quantize_linears",
    "quantized_linears",
    "restore_linears",
    "scale_of",
]


class QuantizedLinear(nn.Module):
    """y = W x + b, W in 8 or 4 bits.

    The buffers ``weight`` and ``weight_scale`` are as :func:`nbl_kernels.quantize` lays them out,
    on the device of the model; x (…, in_features) and the bias have the model's dtype, sums are
    float32 (float64 for float64). Gradients reach x and the bias, not the weight. ``.to(dtype)``
    leaves the buffers as they are, and load_state_dict takes the same format only.
    """

    in_features: int
    out_features: int
    _original: tuple[nn.Parameter, ...]  # the weight it was, hidden from state_dict and .to()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.dtype == torch.float64:  # no kernel
            weight = nk.dequantize(self.weight, self.weight_scale, self.in_features, x.dtype)
            return F.linear(x, weight, bias)
        nothing = x.new_zeros(()).expand(*x.shape[:-1], self.out_features)
        return nk.residual_linear(
            x, self.weight, bias, residual=nothing, weight_scale=self.weight_scale
        )

    @property
    def format(self) -> str:
        """ "int8", "fp8" or "int4"."""
        return format_of(self.weight)

    @property
    def original(self) -> nn.Parameter | None:
        return self._original[0] if self._original else None

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            + (f"weights={self.format!r}")
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Numbers and scales change their place, never their dtype."""
        kept = {name: self._buffers.pop(name) for name in ("weight", "weight_scale")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = fn(tensor)
            same = moved.dtype == tensor.dtype
            self._buffers[name] = moved if same else tensor.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Copying would round other formats to whatever fits: they are refused instead."""
        error_msgs = args[-1]
        for name in ("weight", "weight_scale"):
            own, given = self._buffers[name], state_dict.get(prefix + name)
            if given is not None and (given.dtype, given.shape) != (own.dtype, own.shape):
                error_msgs.append(
                    f"{prefix}{name}: expected {own.dtype} of shape {tuple(own.shape)}, as this "
                    f"linear is quantized, got {given.dtype} of shape {tuple(given.shape)}"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)


def quantized_linears(*modules: nn.Module) -> Iterator[QuantizedLinear]:
    """Those inside the modules, or that are the modules."""
    for module in modules:
        yield from (m for m in module.modules() if type(m) is QuantizedLinear)


def scale_of(linear: nn.Module) -> Tensor | None:
    """The linear's weight_scale, as the kernels take it."""
    return linear._buffers.get("weight_scale")


@torch.no_grad()
def quantize_linears(module: nn.Module, format: str, *, keep_original: bool) -> None:
    """Every plain linear inside `module`, or `module` itself, becomes a quantized one, in place.

    The weights must be finite. Kept originals cost their memory; otherwise each is freed, unless
    something else (an embedding) holds it, before the next is quantized.
    """
    for linear in [m for m in module.modules() if type(m) is nn.Linear]:
        numbers, scale = nk.quantize(linear.weight, format)
        weight = linear._parameters.pop("weight")
        linear.__class__ = QuantizedLinear
        linear._original = (weight,) if keep_original else ()
        linear.register_buffer("weight", numbers)
        linear.register_buffer("weight_scale", scale)
        del weight


def restore_linears(module: nn.Module, like: Tensor) -> None:
    """Undoes :func:`quantize_linears`, in place: the original weights, which must have been kept,
    on the device and in the dtype of `like`."""
    for linear in quantized_linears(module):
        weight, bias = linear.original, linear._parameters.pop("bias")
        weight.data = weight.data.to(device=like.device, dtype=like.dtype)
        linear._buffers.clear()
        del linear._original
        linear.__class__ = nn.Linear
        linear.register_parameter("weight", weight)
        linear.register_parameter("bias", bias)
