"""The fused skinny linears beside the PyTorch chains they replace, weights out of cache."""

from __future__ import annotations

import functools
import math

import machine
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nbl_kernels as nk

EPS = 1e-6
HALF_AND_FULL = ("bfloat16", "float32", "float16")
ROWS = (1, 4, 16, 17, 64, 512)
QKV = {2048: 3072, 4096: 6144}  # the shapes of Llama-3.2-1B and Llama-3.1-8B
INTERMEDIATE = {2048: 8192, 4096: 14336}


@functools.lru_cache(maxsize=1)
def copies_of_weight(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """(copies, n, k), together larger than the caches; kept for the next number of rows."""
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    copies = math.ceil(machine.BLOCK_BYTES / weight.nbytes)
    return weight.expand(copies, n, k).contiguous()


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def run(compare, compiled, op, shape, x, weights, ours, chain, ref, exact) -> None:
    pytorch = {"eager": lambda i: chain(x, weights[i])}
    if compiled:
        fast_chain = torch.compile(chain)
        pytorch["compiled"] = lambda i: fast_chain(x, weights[i])
    exact_out = exact(x.double(), weights[0].double())
    errors = [relative_error(f(x, weights[0]), exact_out) for f in (ours, chain)]
    out = ours(x, weights[0])
    with torch.inference_mode():
        compare(
            op,
            shape,
            x.dtype,
            ours=lambda i: ours(x, weights[i]),
            pytorch=pytorch,
            ref=lambda i: ref(x, weights[i]),
            copies=len(weights),
            flops=2 * x.shape[0] * weights[0].numel(),
            bytes_read=weights[0].nbytes + x.nbytes + out.nbytes,
            weights=weights,
            error="{:.1e} (PyTorch {:.1e})".format(*errors),
        )


@pytest.mark.parametrize("m", ROWS, ids="M{}".format)
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("d", [2048, 4096], ids="d{}".format)
def test_residual_linear(compare, compiled, d: int, dtype: str, m: int) -> None:
    weights = copies_of_weight(d, d, getattr(torch, dtype))
    x, b = torch.randn(m, d).to(weights.dtype), torch.randn(d).to(weights.dtype)
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


@pytest.mark.parametrize("m", ROWS, ids="M{}".format)
@pytest.mark.parametrize("d", [2048, 4096], ids="d{}".format)
def test_norm_linear(compare, compiled, d: int, m: int) -> None:
    weights = copies_of_weight(QKV[d], d, torch.bfloat16)
    x, norm = torch.randn(m, d).bfloat16(), torch.rand(d).add(0.5).bfloat16()
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


@pytest.mark.parametrize("m", ROWS, ids="M{}".format)
@pytest.mark.parametrize("d", [2048, 4096], ids="d{}".format)
def test_norm_swiglu(compare, compiled, d: int, m: int) -> None:
    weights = copies_of_weight(2 * INTERMEDIATE[d], d, torch.bfloat16)
    x, norm = torch.randn(m, d).bfloat16(), torch.rand(d).add(0.5).bfloat16()

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
