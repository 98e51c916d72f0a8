"""What every op computes, in plain PyTorch.

These functions are the specification: the tests compare the kernels with them (in float64), the
benchmarks show the kernels beside them, and devices without a kernel of ours run them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nbl_kernels.quantization import dequantize

__all__ = [
    "canonical_correlations_ref",
    "cca_bound_ref",
    "covariance_update_ref",
    "lmmse_solve_ref",
    "memory_linear_ref",
    "memory_scan_ref",
    "norm_linear_ref",
    "norm_swiglu_ref",
    "residual_linear_ref",
    "rope_append_ref",
]


def _rms_norm(x: Tensor, norm_weight: Tensor, norm_eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight in float32 (or float64), rounded once to x.dtype."""
    return _rms_norm_unrounded(x, norm_weight, norm_eps).to(x.dtype)


def _rms_norm_unrounded(x: Tensor, norm_weight: Tensor, norm_eps: float) -> Tensor:
    acc = torch.promote_types(x.dtype, torch.float32)
    xf = x.to(acc)
    scale = torch.rsqrt(xf.square().mean(-1, keepdim=True) + norm_eps)
    return xf * scale * norm_weight.to(acc)


def _linear(
    features: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None
) -> Tensor:
    """features · weightᵀ + bias with float32 (or float64) products and sums, not rounded."""
    acc = torch.promote_types(features.dtype, torch.float32)
    if weight_scale is not None:
        weight = dequantize(weight, weight_scale, features.shape[-1], acc)
    out = features.to(acc) @ weight.to(acc).T
    return out if bias is None else out + bias.to(acc)


def residual_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """``residual + W f(x) + b``; see :func:`nbl_kernels.residual_linear`."""
    features = x if norm_weight is None else _rms_norm(x, norm_weight, norm_eps)
    residual = x if residual is None else residual
    out = _linear(features, weight, bias, weight_scale)
    return (residual.to(out.dtype) + out).to(x.dtype)


def norm_linear_ref(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_eps: float = 1e-6,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """``W RMSNorm(x) + b``; see :func:`nbl_kernels.norm_linear`."""
    features = _rms_norm(x, norm_weight, norm_eps)
    return _linear(features, weight, bias, weight_scale).to(x.dtype)


def norm_swiglu_ref(
    x: Tensor,
    norm_weight: Tensor,
    gate_up_weight: Tensor,
    *,
    norm_eps: float = 1e-6,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """``silu(G f) · (U f)``, f = RMSNorm(x); see :func:`nbl_kernels.norm_swiglu`."""
    gate_up = _linear(_rms_norm(x, norm_weight, norm_eps), gate_up_weight, None, weight_scale)
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def rope_append_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """q rotated (B, H, T, D); k rotated and v go to the caches; see
    :func:`nbl_kernels.rope_append`."""
    kv_heads = key_cache.shape[1]
    q, k, v = qkv.split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    cos, sin = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)  # for every head
    q = _rotated(q, cos, sin, q_norm_weight, norm_eps)
    k = _rotated(k, cos, sin, k_norm_weight, norm_eps)
    slots = slots.expand(qkv.shape[:2])
    rows, tokens = (slots >= 0).nonzero(as_tuple=True)
    key_cache[rows, :, slots[rows, tokens]] = k[rows, tokens]
    value_cache[rows, :, slots[rows, tokens]] = v[rows, tokens]
    return q.transpose(1, 2)


def _rotated(
    x: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor | None, norm_eps: float
) -> Tensor:
    """[a cos - b sin | b cos + a sin | rest] of x (normalized) = [a | b | rest], rounded once."""
    acc = torch.promote_types(x.dtype, torch.float32)
    xf = x.to(acc) if norm_weight is None else _rms_norm_unrounded(x, norm_weight, norm_eps)
    half = cos.shape[-1]
    a, b, rest = xf.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def memory_scan_ref(
    x: Tensor,
    weight_v: Tensor,
    weight_u: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    state: Tensor,
    lags: Sequence[int] = (1,),
    decays: Sequence[float] = (0.6, 0.95),
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    history: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    weight_v_scale: Tensor | None = None,
    weight_u_scale: Tensor | None = None,
) -> Tensor:
    """``residual + U c_t + b``, token after token; state (float64 is as good) and history are
    mutated; see :func:`nbl_kernels.memory_scan`."""
    acc = torch.promote_types(x.dtype, torch.float32)
    batch, length = x.shape[:2]
    features = x if norm_weight is None else _rms_norm(x, norm_weight, norm_eps)
    branches = 1 + len(lags) + len(decays)
    g = _linear(features, weight_v, None, weight_v_scale).to(x.dtype).to(acc)
    g = g.view(batch, length, branches, weight_v.shape[0] // branches)
    kept = 0 if history is None else history.shape[1]
    filtered = []
    for b in range(batch):
        now = state[b].detach().to(acc, copy=True)
        for t in range(length):
            c = torch.zeros_like(g[b, t, 0])
            if mask is None or mask[b, t]:
                if starts is not None and starts[b, t]:
                    now = torch.zeros_like(now)
                c, now = _remember(g[b, t], now, lags, decays)
            filtered.append(c)
            if t >= length - kept:
                history[b, t - (length - kept)] = now.detach()
        state[b] = now.detach()
    c = torch.stack(filtered).view_as(g[:, :, 0]) if filtered else g[:, :, 0]
    if weight_u is not None:
        total = _linear(c.to(x.dtype), weight_u, bias, weight_u_scale)
    else:
        total = c if bias is None else c + bias.to(acc)
    return ((x if residual is None else residual).to(acc) + total).to(x.dtype)


def _remember(
    g: Tensor, before: Tensor, lags: Sequence[int], decays: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """c and the state (S, r) after a token of numbers g (1 + len(lags) + len(decays), r)."""
    own, *branches = g.unbind(0)
    memories = list(before.split([*lags, *(1 for _ in decays)]))
    for i, lag in enumerate(lags):
        own = own + memories[i][-1]
        memories[i] = torch.cat([branches[i][None], memories[i][: lag - 1]])
    for i, decay in enumerate(decays, start=len(lags)):
        memories[i] = decay * memories[i] + (1 - decay) * branches[i]
        own = own + memories[i][0]
    return own, torch.cat(memories) if memories else before


def memory_linear_ref(
    x: Tensor,
    weight_v: Tensor,
    weight_u: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    state: Tensor,
    reset: Tensor | None = None,
    **options,
) -> Tensor:
    """:func:`memory_scan_ref` of one token of each sequence; see
    :func:`nbl_kernels.memory_linear`."""
    residual = residual if residual is None else residual[:, None]
    options["starts"] = reset if reset is None else reset[:, None]
    return memory_scan_ref(x[:, None], weight_v, weight_u, bias, residual, state=state, **options)[
        :, 0
    ]


def covariance_update_ref(
    features: Tensor,
    targets: Tensor,
    block: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    grams: Sequence[str] = ("ff", "tf", "tt", "bf", "bb"),
) -> dict[str, Tensor]:
    """The raw float64 sums of one update: count, Σf, Σt, Σffᵀ, Σtfᵀ, Σttᵀ (and Σb, Σbfᵀ, Σbbᵀ), of
    the Gram matrices those that ``grams`` names."""

    def rows(t: Tensor) -> Tensor:
        t = t.reshape(-1, t.shape[-1])
        return (t if mask is None else t[mask.reshape(-1)]).double()

    inputs = {"f": rows(features), "t": rows(targets)}
    if block is not None:
        inputs["b"] = rows(block)
    sums = {"count": torch.tensor(inputs["f"].shape[0])}
    sums |= {f"sum_{name}": value.sum(0) for name, value in inputs.items()}
    for x, y in grams:
        if x in inputs:
            sums[f"sum_{x}{y}"] = inputs[x].T @ inputs[y]
    return sums


def lmmse_solve_ref(
    cov_ff: Tensor, cov_tf: Tensor, cov_tt: Tensor, *, ridge: float = 1e-4, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """W = C_tf (C_ff + λI)⁻¹, λ = ridge · mean(diag C_ff), by LU instead of Cholesky; and its NMSE.

    With ``rank``, W is replaced by U_r U_rᵀ W, U_r the leading left singular vectors of
    C_tf (C_ff + λI)^(-1/2): the best rank-r map in the metric of the features.
    """
    d = cov_ff.shape[-1]
    lam = ridge * cov_ff.diagonal(dim1=-2, dim2=-1).mean(-1)
    a = cov_ff + lam[..., None, None] * torch.eye(d, dtype=cov_ff.dtype, device=cov_ff.device)
    weight = torch.linalg.solve(a, cov_tf, left=False)
    if rank is not None:
        values, vectors = torch.linalg.eigh(a)
        root = vectors @ (values.rsqrt()[..., None] * vectors.mT)
        u = torch.linalg.svd(cov_tf @ root, full_matrices=False).U[..., :rank]
        weight = u @ (u.mT @ weight)
    explained = 2 * (weight * cov_tf).sum((-2, -1)) - (weight @ cov_ff * weight).sum((-2, -1))
    total = cov_tt.diagonal(dim1=-2, dim2=-1).sum(-1)
    return weight, (total - explained) / total


def canonical_correlations_ref(cov_ff: Tensor, cov_bf: Tensor, cov_bb: Tensor) -> Tensor:
    """Singular values of C_bb^(-1/2) C_bf C_ff^(-1/2), by eigh and SVD as in the paper."""

    def inverse_root(c: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(c)
        return vectors @ (
            values.clamp_min(values[..., -1:] * 1e-15).rsqrt()[..., None] * vectors.mT
        )

    return torch.linalg.svdvals(inverse_root(cov_bb) @ cov_bf @ inverse_root(cov_ff))


def cca_bound_ref(cov_ff: Tensor, cov_bf: Tensor, cov_bb: Tensor) -> Tensor:
    """Σᵢ (1 − ρᵢ²) over the dimensions of the block output (ρᵢ = 0 beyond the rank)."""
    rho = canonical_correlations_ref(cov_ff, cov_bf, cov_bb)
    return cov_bb.shape[-1] - rho.square().sum(-1)
