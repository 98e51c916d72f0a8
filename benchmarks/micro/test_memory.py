"""Linear maps with a memory beside the PyTorch operations they replace, weights out of cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nbl_kernels as nk

LAG, DECAYS = 1, (0.6, 0.95)
BRANCHES, SLOTS = 2 + len(DECAYS), LAG + len(DECAYS)


def step(x: Tensor, v: Tensor, u: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """One token (B, K) of each sequence, as it is written in PyTorch."""
    own, lagged, *averaged = F.linear(x, v).float().chunk(BRANCHES, dim=-1)
    c = own + state[:, 0]
    state[:, 0] = lagged
    for slot, (decay, g) in enumerate(zip(DECAYS, averaged), start=LAG):
        state[:, slot] = state[:, slot].mul(decay).add(g, alpha=1 - decay)
        c = c + state[:, slot]
    return x + F.linear(c.to(x.dtype), u, b)


def scan(x: Tensor, v: Tensor, u: Tensor, b: Tensor, state: Tensor, kernels: Tensor) -> Tensor:
    """T tokens (B, T, K), the averages as products with triangles (T, T): PyTorch has no faster."""
    own, lagged, *averaged = F.linear(x, v).float().chunk(BRANCHES, dim=-1)
    c = own + torch.cat([state[:, :1], lagged[:, :-1]], dim=1)
    state[:, 0] = lagged[:, -1]
    steps = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
    for slot, (decay, kernel, g) in enumerate(zip(DECAYS, kernels, averaged), start=LAG):
        average = kernel @ g + decay**steps * state[:, slot, None]
        state[:, slot] = average[:, -1]
        c = c + average
    return x + F.linear(c.to(x.dtype), u, b)


def triangles(tokens: int, device: str) -> Tensor:
    """(1 - a) a^(t - s), s ≤ t, for every decay."""
    steps = torch.arange(tokens, device=device, dtype=torch.float32)
    apart = (steps[:, None] - steps).clamp_min(0)
    return torch.stack([((1 - decay) * decay**apart).tril() for decay in DECAYS])


def run(compare, compiled, op: str, d: int, rank: int, batch: int, tokens: int) -> None:
    device, dtype = compare.device, torch.bfloat16
    size_v, size_u = BRANCHES * rank * d, d * rank
    copies = max(2, math.ceil(compare.block_bytes / ((size_v + size_u) * dtype.itemsize)))
    weights = torch.cat([torch.randn(size_v) / d**0.5, torch.randn(size_u) / rank**0.5])
    weights = weights.to(device, dtype).expand(copies, -1).contiguous()
    vs = weights[:, :size_v].unflatten(1, (-1, d))
    us = weights[:, size_v:].unflatten(1, (-1, rank))
    x = torch.randn(batch, tokens, d, device=device).to(dtype)
    b = torch.randn(d, device=device).to(dtype)
    states = torch.zeros(copies, batch, SLOTS, rank, device=device)
    kernels = triangles(tokens, device) if tokens > 1 else None
    options = {"lags": (LAG,), "decays": DECAYS}

    def ours(i: int) -> Tensor:
        if tokens == 1:
            return nk.memory_linear(x[:, 0], vs[i], us[i], b, state=states[i], **options)
        return nk.memory_scan(x, vs[i], us[i], b, state=states[i], **options)

    def theirs(i: int, step=step, scan=scan) -> Tensor:
        if tokens == 1:
            return step(x[:, 0], vs[i], us[i], b, states[i])
        return scan(x, vs[i], us[i], b, states[i], kernels)

    def ref(i: int) -> Tensor:
        return nk.memory_scan_ref(x, vs[i], us[i], b, state=states[i], **options)

    pytorch = {"eager": theirs}
    if compiled:
        torch.compiler.reset()
        fast = [torch.compile(f, dynamic=False) for f in (step, scan)]
        pytorch["compiled"] = lambda i: theirs(i, *fast)
    doubles = (t.double() for t in (x, vs[0], us[0], b))
    exact = nk.memory_scan_ref(*doubles, state=states[0].double(), **options)

    def error(call) -> float:
        states[0] = 0
        return float((call(0).view_as(exact).double() - exact).norm() / exact.norm())

    with torch.inference_mode():
        compare(
            op,
            f"{batch}x{tokens}x{d}, {rank}",
            dtype,
            switch="memory",
            ours=ours,
            pytorch=pytorch,
            ref=ref,
            copies=copies,
            flops=2 * batch * tokens * (size_v + size_u),
            bytes_read=weights[0].nbytes + 2 * x.nbytes + 2 * states[0].nbytes,
            weights=weights,
            error=lambda: error(ours),
            pytorch_error=error(theirs),
        )


@pytest.mark.sizes(
    cpu=[{"d": (2048, 4096), "batch": (1, 4)}],
    cuda=[{"d": (2048, 4096), "batch": (1, 8, 16)}],
    dry=[{"d": (64,), "batch": (1, 2)}],
)
def test_memory_linear(compare, compiled, d: int, batch: int) -> None:
    """Decode, at rank d / 8."""
    run(compare, compiled, "memory_linear", d, d // 8, batch, 1)


@pytest.mark.sizes(
    cpu=[{"d": (2048,), "batch": (1,), "tokens": (448,)}],
    cuda=[{"d": (4096,), "batch": (1,), "tokens": (512, 2048)}],
    dry=[{"d": (64,), "batch": (2,), "tokens": (3, 70)}],
)
def test_memory_scan(compare, compiled, d: int, batch: int, tokens: int) -> None:
    """Prefill, at rank d / 8."""
    run(compare, compiled, "memory_scan", d, d // 8, batch, tokens)
