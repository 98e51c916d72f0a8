"""The fused skinny linears: ``out = epilogue(W · prologue(x))``.

CPU kernels: ``csrc/include/nbl/cpu/skinny_linear.h`` up to 16 rows of x (decode; float32 64, in
passes of 16), ``wide_linear.h`` beside it for more (prefill), both launched by
``csrc/cpu/linear.cpp``, which says where ATen's matrix product is the faster wide one.

CUDA kernels: ``csrc/include/nbl/cuda/skinny_linear.cuh``, launched by
``csrc/cuda/linear.cu`` where ``cuda_paths()`` says so; above 16 rows cuBLASLt
(``csrc/cuda/matmul.cpp``), for which a quantized weight is dequantized 32 MiB at a time. Otherwise
CUDA tensors take plain PyTorch operations.

NumPy and CuPy arrays are as good as tensors here: see ``nbl_kernels/arrays.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbl_kernels.arrays import takes_arrays


@takes_arrays()
def residual_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """``residual + W f(x) + b``: a linearized attention layer, ``o_proj`` or ``down_proj``.

    f is the identity or, when ``norm_weight`` is given, RMSNorm:
    ``f = x / sqrt(mean(x²) + norm_eps) · norm_weight``, computed in float32 and rounded once to
    x's dtype.

    Args:
        x: (…, K), float32, bfloat16 or float16; any strides.
        weight: (N, K), x's dtype; rows may be strided. Or quantized, see :func:`quantize`.
        bias: (N,) or None.
        residual: (…, N) or None: then x itself, which needs N == K.
        norm_weight: (K,) or None.
        norm_eps: added to the mean square.
        weight_scale: of a quantized weight: float32 (N,) for int8 and float8_e4m3fn, bfloat16
            (N, ceil(K / 128)) for int4. Sums are scaled in float32.

    Returns:
        (…, N) in x's dtype. Products and sums are float32 and the result is rounded once; where
        ATen computes the product, residual + bias is rounded before the product is added.
        Nothing is mutated. Differentiable (by recomputation in plain PyTorch).

    Raises:
        TypeError: an argument is no tensor or array, or the arrays are not of one kind.
        RuntimeError: a shape, dtype or device does not fit; names the argument.

    Equivalent to ``residual + F.linear(F.rms_norm(x, (K,), norm_weight, norm_eps), weight, bias)``.
    Source: NBL (arXiv 2505.21077), section 3: the layer becomes ``x + W f + b``.
    """
    op = (
        torch.ops.nbl.residual_linear
        if _needs_gradient(x, weight, bias, residual, norm_weight, weight_scale)
        else torch.ops.nbl.residual_linear_inference
    )
    return op(x, weight, bias, residual, norm_weight, norm_eps, weight_scale)


@takes_arrays()
def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """``W RMSNorm(x) + b``: a fused QKV projection or the language-model head.

    x (…, K), norm_weight (K,), weight (N, K), bias (N,) or None, all of x's dtype (float32,
    bfloat16 or float16) -> (…, N) in x's dtype, accumulated in float32. The normalized x is
    rounded once to x's dtype. Nothing is mutated. A quantized weight, its weight_scale and errors
    as :func:`residual_linear`.

    Equivalent to ``F.linear(F.rms_norm(x, (K,), norm_weight, norm_eps), weight, bias)``.
    """
    op = (
        torch.ops.nbl.norm_linear
        if _needs_gradient(x, norm_weight, weight, bias, weight_scale)
        else torch.ops.nbl.norm_linear_inference
    )
    return op(x, norm_weight, weight, bias, norm_eps, weight_scale)


@takes_arrays()
def norm_swiglu(
    x: Tensor,
    norm_weight: Tensor,
    gate_up_weight: Tensor,
    *,
    norm_eps: float = 1e-6,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """``silu(G f) · (U f)``, f = RMSNorm(x): the first half of a Llama MLP.

    x (…, K), norm_weight (K,), gate_up_weight (2F, K) = F rows of G, then F rows of U, all of x's
    dtype (float32, bfloat16 or float16) -> (…, F) in x's dtype, accumulated in float32. Up to 16
    rows gate and up are not rounded before they are multiplied. Nothing is mutated. A quantized
    weight, its weight_scale and errors as :func:`residual_linear`.

    Equivalent to ``gate, up = F.linear(F.rms_norm(x, …), gate_up_weight).chunk(2, -1)`` and
    ``F.silu(gate) * up``.
    """
    op = (
        torch.ops.nbl.norm_swiglu
        if _needs_gradient(x, norm_weight, gate_up_weight, weight_scale)
        else torch.ops.nbl.norm_swiglu_inference
    )
    return op(x, norm_weight, gate_up_weight, norm_eps, weight_scale)


def _needs_gradient(*arguments: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(getattr(a, "requires_grad", False) for a in arguments)
