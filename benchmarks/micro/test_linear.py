"""The fused skinny linears beside the PyTorch chains they replace, weights out of cache."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nbl_kernels as nk

EPS = 1e-6
CPU_ROWS = (1, 4, 16, 17, 64, 512)
CUDA_ROWS = (1, 2, 4, 8, 16, 17, 64, 512, 2048, 8192)
DRY_ROWS = (1, 17)
# Trying every matrix product template takes the compiler long: only here, and at d = 4096.
AUTOTUNED_ROWS = (1, 16, 512)
# The shapes of Llama-3.2-1B and Llama-3.1-8B, and a tiny one.
QKV = {64: 96, 2048: 3072, 4096: 6144}
INTERMEDIATE = {64: 128, 2048: 8192, 4096: 14336}


@functools.lru_cache(maxsize=1)
def copies_of_weight(n: int, k: int, dtype: torch.dtype, device: str, block_bytes: int) -> Tensor:
    """(copies, n, k), together larger than the caches; kept for the next number of rows."""
    weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    copies = max(2, math.ceil(block_bytes / weight.nbytes))
    return weight.expand(copies, n, k).contiguous()


@functools.lru_cache(maxsize=1)
def copies_of_quantized(
    n: int, k: int, format: str, device: str, block_bytes: int
) -> tuple[Tensor, Tensor]:
    """The same in 8 or 4 bits: weights (copies, n, …) and their scales."""
    weight, scale = nk.quantize(torch.randn(n, k, device=device) / k**0.5, format)
    copies = max(2, math.ceil(block_bytes / weight.nbytes))
    return tuple(t.expand(copies, *t.shape).contiguous() for t in (weight, scale))


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def run(compare, compiled, op, shape, x, weights, ours, chain, ref, exact) -> None:
    pytorch = {"eager": lambda i: chain(x, weights[i])}
    modes = ["default"] if compiled else []
    if modes and x.is_cuda and x.shape[-1] == 4096 and len(x) in AUTOTUNED_ROWS:
        modes.append("max-autotune-no-cudagraphs")
    torch.compiler.reset()  # or the next shape is compiled for every shape, or not at all
    for mode in modes:
        fast_chain = torch.compile(chain, mode=mode, dynamic=False)
        pytorch["compiled" if mode == "default" else "autotuned"] = (
            lambda i, fast_chain=fast_chain: fast_chain(x, weights[i])
        )
    exact_out = exact(x.double(), weights[0].double())
    with torch.inference_mode():
        compare(
            op,
            shape,
            x.dtype,
            switch="linear",
            ours=lambda i: ours(x, weights[i]),
            pytorch=pytorch,
            ref=lambda i: ref(x, weights[i]),
            copies=len(weights),
            flops=2 * x.shape[0] * weights[0].numel(),
            bytes_read=weights[0].nbytes + x.nbytes + exact_out.numel() * x.element_size(),
            weights=weights,
            error=lambda: relative_error(ours(x, weights[0]), exact_out),
            pytorch_error=relative_error(chain(x, weights[0]), exact_out),
        )


@pytest.mark.sizes(
    cpu=[{"d": (2048, 4096), "dtype": ("bfloat16", "float32", "float16"), "m": CPU_ROWS}],
    cuda=[
        {"d": (4096, 8192), "dtype": ("bfloat16",), "m": CUDA_ROWS},
        {"d": (2048,), "dtype": ("bfloat16",), "m": (1, 4, 16, 64, 512)},
        {"d": (4096,), "dtype": ("float16", "float32"), "m": (1, 16, 512)},
    ],
    dry=[{"d": (64,), "dtype": ("bfloat16", "float32"), "m": DRY_ROWS}],
)
def test_residual_linear(compare, compiled, d: int, dtype: str, m: int) -> None:
    weights = copies_of_weight(d, d, getattr(torch, dtype), compare.device, compare.block_bytes)
    x = torch.randn(m, d, device=compare.device).to(weights.dtype)
    b = torch.randn(d, device=compare.device).to(weights.dtype)
    run(
        compare,
        compiled,
        "residual_linear",
        f"{m}x{d}x{d}",
        x,
        weights,
        ours=lambda x, w: nk.residual_linear(x, w, b),
        chain=lambda x, w: x + F.linear(x, w, b),
        ref=lambda x, w: nk.residual_linear_ref(x, w, b),
        exact=lambda x, w: nk.residual_linear_ref(x, w, b.double()),
    )


@pytest.mark.sizes(
    cpu=[{"d": (2048, 4096), "format": ("int8", "fp8", "int4"), "m": (1, 4, 16)}],
    cuda=[
        {"d": (4096,), "format": ("int8", "fp8", "int4"), "m": (1, 4, 16, 17, 512)},
        {"d": (8192,), "format": ("int8", "fp8", "int4"), "m": (1, 16)},
    ],
    dry=[{"d": (64,), "format": ("int8", "fp8", "int4"), "m": DRY_ROWS}],
)
def test_quantized_linear(compare, d: int, format: str, m: int) -> None:
    """Beside PyTorch on the weight in bfloat16. With few rows the time is that of the bytes, so a
    format should be as much faster as it is smaller: the GPU report has a table of both."""
    weights, scales = copies_of_quantized(d, d, format, compare.device, compare.block_bytes)
    dense = nk.dequantize(weights[0], scales[0], d, torch.bfloat16)
    copies = max(2, math.ceil(compare.block_bytes / dense.nbytes))
    dense = dense.expand(copies, d, d).contiguous()
    x = torch.randn(m, d, device=compare.device).bfloat16()
    exact = nk.residual_linear_ref(x.double(), weights[0], weight_scale=scales[0])

    def ours(i: int) -> Tensor:
        return nk.residual_linear(x, weights[i], weight_scale=scales[i])

    with torch.inference_mode():
        compare(
            "quantized_linear",
            f"{m}x{d}x{d} {format}",
            x.dtype,
            switch="linear",
            ours=ours,
            pytorch={"eager, bfloat16 weight": lambda i: x + F.linear(x, dense[i % copies])},
            ref=lambda i: nk.residual_linear_ref(x, weights[i], weight_scale=scales[i]),
            copies=len(weights),
            flops=2 * m * d * d,
            bytes_read=weights[0].nbytes + scales[0].nbytes + 2 * x.nbytes,
            weights=weights,
            error=lambda: relative_error(ours(0), exact),
            pytorch_error=relative_error(x + F.linear(x, dense[0]), exact),
        )


@pytest.mark.sizes(
    cpu=[{"d": (2048, 4096), "m": CPU_ROWS}],
    cuda=[{"d": (4096,), "m": (1, 4, 16, 17, 64, 512, 2048)}],
    dry=[{"d": (64,), "m": DRY_ROWS}],
)
def test_norm_linear(compare, compiled, d: int, m: int) -> None:
    weights = copies_of_weight(QKV[d], d, torch.bfloat16, compare.device, compare.block_bytes)
    x, norm = inputs_and_norm(m, d, compare.device)
    run(
        compare,
        compiled,
        "norm_linear",
        f"{m}x{d}x{QKV[d]}",
        x,
        weights,
        ours=lambda x, w: nk.norm_linear(x, norm, w, norm_eps=EPS),
        chain=lambda x, w: F.linear(F.rms_norm(x, (d,), norm, EPS), w),
        ref=lambda x, w: nk.norm_linear_ref(x, norm, w, norm_eps=EPS),
        exact=lambda x, w: nk.norm_linear_ref(x, norm.double(), w, norm_eps=EPS),
    )


@pytest.mark.sizes(
    cpu=[{"d": (2048, 4096), "m": CPU_ROWS}],
    cuda=[{"d": (4096,), "m": (1, 4, 16, 17, 64, 512, 2048)}],
    dry=[{"d": (64,), "m": DRY_ROWS}],
)
def test_norm_swiglu(compare, compiled, d: int, m: int) -> None:
    n = 2 * INTERMEDIATE[d]
    weights = copies_of_weight(n, d, torch.bfloat16, compare.device, compare.block_bytes)
    x, norm = inputs_and_norm(m, d, compare.device)

    def chain(x: Tensor, w: Tensor) -> Tensor:
        gate, up = F.linear(F.rms_norm(x, (d,), norm, EPS), w).chunk(2, dim=-1)
        return F.silu(gate) * up

    run(
        compare,
        compiled,
        "norm_swiglu",
        f"{m}x{d}x2·{INTERMEDIATE[d]}",
        x,
        weights,
        ours=lambda x, w: nk.norm_swiglu(x, norm, w, norm_eps=EPS),
        chain=chain,
        ref=lambda x, w: nk.norm_swiglu_ref(x, norm, w, norm_eps=EPS),
        exact=lambda x, w: nk.norm_swiglu_ref(x, norm.double(), w, norm_eps=EPS),
    )


def inputs_and_norm(m: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    x, norm = torch.randn(m, d, device=device), torch.rand(d, device=device).add(0.5)
    return x.bfloat16(), norm.bfloat16()
