"""rope_append beside the PyTorch operations it replaces, on layers' worth of data out of cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nbl_kernels as nk

EPS = 1e-6
CAPACITY = 256  # slots of the caches, if not more are written
# heads, kv_heads, head_dim: Llama-3.2-1B, Llama-3.1-8B (Qwen3-8B with norms), and a tiny one.
HEADS = {"1B": (32, 8, 64), "8B": (32, 8, 128), "tiny": (4, 2, 16)}


def chain(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    norms: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """What a model written in PyTorch does: norms and rotation in the dtype of the model."""
    kv_heads = key_cache.shape[1]
    q, k, v = qkv.split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    if norms is not None:
        q, k = (F.rms_norm(x, x.shape[-1:], norm, EPS) for x, norm in zip((q, k), norms))
    cos, sin = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)  # (…, head_dim)
    q, k = (x * cos + rotate_half(x) * sin for x in (q, k))
    rows = torch.arange(len(qkv), device=qkv.device)[:, None]
    key_cache[rows, :, slots] = k
    value_cache[rows, :, slots] = v
    return q.transpose(1, 2)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


@pytest.mark.sizes(
    cpu=[
        {"model": ("1B", "8B"), "norm": (False, True), "batch": (1,), "tokens": (512,)},
    ],
    cuda=[
        {"model": ("8B",), "norm": (False, True), "batch": (1, 8, 32), "tokens": (1,)},
        {"model": ("8B",), "norm": (False, True), "batch": (1,), "tokens": (16, 2048)},
        {"model": ("1B",), "norm": (False,), "batch": (1,), "tokens": (1, 2048)},
    ],
    dry=[{"model": ("tiny",), "norm": (False, True), "batch": (2,), "tokens": (1, 3)}],
)
def test_rope_append(compare, compiled, model: str, norm: bool, batch: int, tokens: int) -> None:
    heads, kv_heads, head_dim = HEADS[model]
    capacity = max(CAPACITY, tokens)
    device, dtype = compare.device, torch.bfloat16
    cos, sin = nk.rope_tables(head_dim, capacity, 500000.0, device=device)
    wide = [torch.cat([t, t], -1).to(dtype) for t in (cos, sin)]  # as transformers has them
    weights = [torch.rand(head_dim, device=device).add(0.5).to(dtype) for _ in range(2)]
    norms = {"q_norm_weight": weights[0], "k_norm_weight": weights[1]} if norm else {}
    slots = torch.arange(capacity - tokens, capacity, device=device).expand(batch, tokens)
    heads_of_all = heads + 2 * kv_heads
    qkv_bytes = batch * tokens * heads_of_all * head_dim * dtype.itemsize
    # Out of cache, but for a decode step, which finds in L2 what the projection before has written.
    copies = min(64, max(2, math.ceil(compare.block_bytes / (2 * qkv_bytes))))
    qkv = torch.randn(copies, batch, tokens, heads_of_all, head_dim, device=device).to(dtype)
    cache = torch.zeros(2, copies, batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)

    def arguments(i: int) -> tuple[Tensor, ...]:
        return qkv[i], cos, sin, slots, slots, cache[0, i], cache[1, i]

    def theirs(i: int, chain=chain) -> Tensor:
        mine = arguments(i)
        return chain(mine[0], *wide, *mine[3:], tuple(weights) if norm else None)

    def ours(i: int) -> Tensor:
        return nk.rope_append(*arguments(i), **norms, norm_eps=EPS)

    def ref(i: int) -> Tensor:
        return nk.rope_append_ref(*arguments(i), **norms, norm_eps=EPS)

    pytorch = {"eager": theirs}
    if compiled:
        torch.compiler.reset()
        fast_chain = torch.compile(chain, dynamic=False)
        pytorch["compiled"] = lambda i: theirs(i, fast_chain)
    exact_caches = [torch.zeros_like(cache[0, 0], dtype=torch.float64) for _ in range(2)]
    exact = nk.rope_append_ref(
        qkv[0].double(),
        *(cos, sin, slots, slots),
        *exact_caches,
        **{name: t.double() for name, t in norms.items()},
        norm_eps=EPS,
    )

    def error(call) -> float:
        """Of q, keys and values, the worst."""
        cache[:, 0] = 0
        pairs = [(call(0), exact), *zip(cache[:, 0], exact_caches)]
        return max(float((t.double() - e).norm() / e.norm()) for t, e in pairs)

    with torch.inference_mode():
        compare(
            "rope_append",
            f"{model}{'+norm' * norm}, {batch}x{tokens}",
            dtype,
            switch="rope",
            ours=ours,
            pytorch=pytorch,
            ref=ref,
            copies=copies,
            flops=3 * batch * tokens * (heads + kv_heads) * head_dim,
            bytes_read=2 * qkv_bytes,  # read and written
            weights=qkv,
            error=lambda: error(ours),
            pytorch_error=error(theirs),
        )
