"""Weights in 8 or 4 bits, for the linears: how they are rounded and what they mean.

========  =============================  ==============================  ===============
format    weight                         weight_scale                    bits per weight
========  =============================  ==============================  ===============
``int8``  int8 (N, K), -127 to 127       float32 (N,)                    8 + 32 / K
``fp8``   float8_e4m3fn (N, K)           float32 (N,)                    8 + 32 / K
``int4``  uint8 (N, 64 · ceil(K / 128))  bfloat16 (N, ceil(K / 128))     4.125
========  =============================  ==============================  ===============

A weight is its number times the scale of its row or, for int4, of its group of 128 columns. The 64
bytes of a group are 32 little-endian words of 16 bits; bits 4 s to 4 s + 3 of word j hold column
32 s + j of the group, plus 8. Columns past K hold 8, which is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FORMATS", "dequantize", "quantize"]

FORMATS = ("int8", "fp8", "int4")

_GROUP = 128
_DTYPES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.uint8: "int4"}
# Of the largest weight of a group over the scale, in eighths of what reaches the number -8. Above 1
# nothing is clipped on either side; below, large weights are, and the others are finer.
_CLIPPING = (8 / 7, 1.07, 1.0, 0.93, 0.86, 0.79)
_AT_ONCE = 1 << 20  # weights: their float32 copies stay in the cache


@torch.no_grad()
def quantize(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """A weight (N, K) in 8 or 4 bits: (weight, weight_scale) as the linears take them.

    int8 and fp8 spread the largest magnitude of each row over 127 and 448. int4 takes, for each
    group of 128 columns, the bfloat16 scale (of either sign: there is one more number below zero
    than above) with the least squared error among a few that clip more or less. Numbers are rounded
    to the nearest, ties to even; zero rows and groups stay zero. See the module for the layouts.

    Args:
        weight: (N, K), floating point, any strides; rounded from float32.
        format: "int8", "fp8" (float8_e4m3fn) or "int4".

    Returns:
        weight and weight_scale, on the weight's device. Nothing is mutated.

    Raises:
        ValueError: another format, another number of dimensions, an infinity or NaN in the weight.
        TypeError: weight is no floating-point tensor.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight: expected a floating-point tensor, got {got}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected 2 dimensions, got shape {tuple(weight.shape)}")
    n, k = weight.shape
    groups = -(-k // _GROUP)
    shapes = {"int8": (n, k), "fp8": (n, k), "int4": (n, groups * _GROUP // 2)}
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    numbers = weight.new_empty(shapes[format], dtype=dtypes[format])
    if format == "int4":
        scales = weight.new_empty((n, groups), dtype=torch.bfloat16)
    else:
        scales = weight.new_empty((n,), dtype=torch.float32)
    rows = max(1, _AT_ONCE // max(k, 1))
    for first in range(0, n, rows):
        block = slice(first, first + rows)
        part = weight[block].float()
        if not part.isfinite().all():
            row = first + int((~part.isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(f"weight: expected finite values, row {row} has infinities or NaNs")
        numbers[block], scales[block] = _ROUNDED[format](part)
    return numbers, scales


@torch.no_grad()
def dequantize(
    weight: Tensor, weight_scale: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """What :func:`quantize` kept of a weight: (N, in_features) in `dtype`.

    Products with the scales are float32 (float64 for float64) and rounded once. ValueError for
    shapes or dtypes that are of no format.
    """
    format = check_scale("", weight, weight_scale, in_features, error=ValueError)
    acc = torch.promote_types(dtype, torch.float32)
    if format != "int4":
        return (weight.to(acc) * weight_scale.to(acc)[:, None]).to(dtype)
    n, groups = weight_scale.shape
    pairs = weight.view(n, groups, 32, 2)  # (…, j, half): the nibbles 2 · half and 2 · half + 1
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1)  # (…, j, half, nibble of the half)
    numbers = nibbles.flatten(3).transpose(2, 3).to(acc) - 8  # (…, s, j)
    values = numbers * weight_scale.to(acc)[:, :, None, None]
    return values.reshape(n, groups * _GROUP)[:, :in_features].to(dtype)


def format_of(weight: Tensor) -> str | None:
    """ "int8", "fp8" or "int4" by the weight's dtype; None: not quantized."""
    return _DTYPES.get(weight.dtype)


def check_scale(
    prefix: str,
    weight: Tensor,
    weight_scale: Tensor,
    in_features: int,
    error: type[Exception] = RuntimeError,
) -> str:
    """The format of a quantized weight; an error whose message begins with `prefix` for none."""
    format = format_of(weight)
    if format is None or weight.dim() != 2:
        raise error(
            f"{prefix}weight must be int8, float8_e4m3fn or uint8 with 2 dimensions where there is "
            f"a weight_scale, got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    n, groups = weight.shape[0], -(-in_features // _GROUP)
    expected = {"int4": ((n, groups * _GROUP // 2), (n, groups), torch.bfloat16)}
    shape, scale_shape, scale_dtype = expected.get(format, ((n, in_features), (n,), torch.float32))
    if weight.shape != shape:
        raise error(
            f"{prefix}weight must have shape {shape} for {in_features} features in {format}, got "
            f"{tuple(weight.shape)}"
        )
    if weight_scale.shape != scale_shape or weight_scale.dtype != scale_dtype:
        raise error(
            f"{prefix}weight_scale must be {scale_dtype} of shape {scale_shape} for a weight in "
            f"{format}, got {weight_scale.dtype} of shape {tuple(weight_scale.shape)}"
        )
    return format


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = _largest(weight) / 127
    return _over(weight, scale[:, None]).round_().clamp_(-127, 127), scale


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = _largest(weight) / 448
    numbers = _over(weight, scale[:, None]).clamp_(-448, 448)
    return numbers.to(torch.float8_e4m3fn), scale


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    groups = -(-k // _GROUP)
    grouped = torch.nn.functional.pad(weight, (0, groups * _GROUP - k)).view(n, groups, _GROUP)
    low, high = (grouped.amin(dim=2), grouped.amax(dim=2)) if k else (weight, weight)
    to_lowest = torch.where(-low > high, low, high) / -8  # the scale that makes the largest -8
    best = scale = numbers = None
    for clipping in _CLIPPING:
        s = (to_lowest * clipping).bfloat16().float()[:, :, None]
        q = _over(grouped, s).round_().clamp_(-8, 7)
        error = (q * s).sub_(grouped).square_().sum(dim=2, keepdim=True)
        if best is None:
            best, scale, numbers = error, s, q
            continue
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, s, scale)
        numbers = torch.where(better, q, numbers)
    s0, s1, s2, s3 = numbers.add(8).to(torch.uint8).view(n, groups, 4, 32).unbind(2)
    packed = torch.stack([s0 | s1 << 4, s2 | s3 << 4], dim=-1)
    return packed.view(n, groups * _GROUP // 2), scale[:, :, 0].bfloat16()


_ROUNDED = {"int8": _int8, "fp8": _fp8, "int4": _int4}


def _largest(weight: Tensor) -> Tensor:
    """The largest magnitude of each row; 0 where there is none."""
    return weight.abs().amax(dim=1) if weight.shape[1] else weight.new_zeros(len(weight))


def _over(weight: Tensor, scale: Tensor) -> Tensor:
    """weight / scale, 0 where the scale is: rows of zeros, or of less than float32 can divide."""
    return (weight / scale).masked_fill_(scale == 0, 0)
