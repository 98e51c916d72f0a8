"""Linear maps with a memory: a causal filter over time between two skinny linears.

``φ_t = [f_t | f_{t-l} for every lag l | e_t^a for every decay a]``, with the exponential averages
``e_t = a e_{t-1} + (1 - a) f_t`` and nothing before the first token of a sequence (``f_{-1} = 0``,
``e_{-1} = 0``), is what a token's features are stacked with; ``W φ + b`` of rank r is
``U [V₀ | V₁ | …] φ + b``. Filters commute with maps, so V comes first: ``g_t = V f_t``, r numbers
for every branch of φ, and what is remembered of a sequence are vectors of r numbers.

The state of a sequence, (S, r) float32, S = Σ lags + the number of decays: for every lag l the last
l of its g, the newest first, then for every decay its average.

V and U are the skinny linears of ``linear.py``. The filter between them on the CPU:
``csrc/include/nbl/cpu/memory.h``, launched by ``csrc/cpu/memory.cpp``; in plain PyTorch:
``filters.py``.

On CUDA: ``csrc/include/nbl/cuda/memory.cuh``, launched by ``csrc/cuda/memory.cu`` where
``cuda_paths()`` says so. Otherwise CUDA tensors take plain PyTorch operations.

NumPy and CuPy arrays are as good as tensors here: see ``nbl_kernels/arrays.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nbl_kernels.arrays import takes_arrays
from nbl_kernels.filters import Filters, remember
from nbl_kernels.linear import _needs_gradient
from nbl_kernels.quantization import check_scale, dequantize


def check_scan(
    x: Tensor,
    weight_v: Tensor,
    weight_u: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    state: Tensor,
    history: Tensor | None,
    lags: Sequence[int],
    decays: Sequence[float],
    mask: Tensor | None,
    starts: Tensor | None,
    weight_v_scale: Tensor | None = None,
    weight_u_scale: Tensor | None = None,
) -> int:
    """N, the width of the result. RuntimeError, as the operator's, where shapes or dtypes do not
    fit."""

    def fits(name: str, t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if t is not None and (t.shape != shape or t.dtype != dtype):
            raise RuntimeError(
                f"memory_scan: {name} must have shape {shape} and be {dtype}, got "
                f"{tuple(t.shape)} and {t.dtype}"
            )

    def weight_fits(name: str, weight: Tensor, scale: Tensor | None, features: int) -> None:
        if scale is None:
            fits(name, weight, (weight.shape[0], features), x.dtype)
        else:
            check_scale(f"memory_scan: {name}: ", weight, scale, features)

    if x.dim() != 3:
        raise RuntimeError(
            f"memory_scan: x must have shape (batch, tokens, K), got {tuple(x.shape)}"
        )
    filters = Filters(tuple(lags), tuple(decays))
    batch, length, in_features = x.shape
    if weight_v.dim() != 2 or weight_v.shape[0] % filters.branches:
        raise RuntimeError(
            f"memory_scan: weight_v must have shape ({filters.branches} · r, K), got "
            f"{tuple(weight_v.shape)}"
        )
    weight_fits("weight_v", weight_v, weight_v_scale, in_features)
    channels = out_features = weight_v.shape[0] // filters.branches
    if weight_u is not None:
        weight_fits("weight_u", weight_u, weight_u_scale, channels)
        out_features = weight_u.shape[0]
    if residual is None and out_features != in_features:
        raise RuntimeError(
            "memory_scan: residual must be given (it defaults to x) when N != K, got "
            f"N = {out_features} and x of shape {tuple(x.shape)}"
        )
    fits("bias", bias, (out_features,), x.dtype)
    fits("residual", residual, (batch, length, out_features), x.dtype)
    fits("norm_weight", norm_weight, (in_features,), x.dtype)
    fits("state", state, (batch, filters.slots, channels), torch.float32)
    if history is not None:
        kept = history.shape[1] if history.dim() == 4 else 0
        if kept > length:
            raise RuntimeError(
                f"memory_scan: history must hold the states after at most {length} tokens, got "
                f"{kept}"
            )
        fits("history", history, (batch, kept, filters.slots, channels), torch.float32)
    fits("mask", mask, (batch, length), torch.bool)
    fits("starts", starts, (batch, length), torch.bool)
    return out_features


def plain_scan(
    x: Tensor,
    weight_v: Tensor,
    weight_u: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    state: Tensor,
    history: Tensor | None,
    lags: Sequence[int],
    decays: Sequence[float],
    mask: Tensor | None,
    starts: Tensor | None,
    weight_v_scale: Tensor | None = None,
    weight_u_scale: Tensor | None = None,
) -> Tensor:
    """The operator in plain PyTorch; differentiable. The arguments fit."""

    def linear(features: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None):
        if scale is not None:
            weight = dequantize(weight, scale, features.shape[-1], features.dtype)
        return F.linear(features, weight, bias)

    filters = Filters(tuple(lags), tuple(decays))
    # What is not there may be NaN, and would be in the gradients of the weights: 0 · NaN.
    features = x if mask is None else torch.where(mask[..., None], x, 0)
    if norm_weight is not None:
        features = F.rms_norm(features, (x.shape[-1],), norm_weight, norm_eps)
    g = linear(features, weight_v, weight_v_scale, None)
    c = remember(g, filters, state, history, mask=mask, starts=starts)
    residual = x if residual is None else residual
    if weight_u is not None:
        return residual + linear(c.to(x.dtype), weight_u, weight_u_scale, bias)
    total = residual.to(c.dtype) + (c if bias is None else c + bias)
    return total.to(x.dtype)


@takes_arrays("state", "history")
def memory_scan(
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
    """``residual + U c_t + b``, ``c = V₀ f + Σ_l V_l f_{t-l} + Σ_a ema_a(V_a f)``: a linear map
    with a memory, over T tokens of B sequences.

    f is the identity or, when ``norm_weight`` is given, RMSNorm as in :func:`residual_linear`.
    ``e_t = a e_{t-1} + (1 - a) V_a f_t``; before the first token of a sequence f and e are zero.

    Args:
        x: (B, T, K), float32, bfloat16 or float16; any strides.
        weight_v: (P·r, K), x's dtype, P = 1 + len(lags) + len(decays): V₀, then the lags' in order,
            then the decays'. Or quantized, with weight_v_scale: see :func:`quantize`.
        weight_u: (N, r), or None: U is the identity, N = r.
        bias: (N,) or None.
        residual: (B, T, N) or None: then x itself, which needs N == K.
        state: (B, S, r) float32, S = Σ lags + len(decays): what is remembered of each sequence;
            zeros where nothing is. For every lag l the last l of its V_l f, the newest first, then
            the averages. The last dimension contiguous. MUTATED: what it is after the last token.
        lags: positive and distinct.
        decays: between 0 and 1, distinct. S is at most 8.
        mask: (B, T) bool, False: the token is not there (padding): it changes no state, its values
            are not looked at, and its c is zero. None: all are.
        starts: (B, T) bool, True: a sequence begins with this token (packed ones, or a reset): what
            was remembered is forgotten before it. None: none does.
        history: (B, H, S, r) float32, H ≤ T, or None. MUTATED: the states after each of the last H
            tokens, to go back to one of them.

    Returns:
        (B, T, N) in x's dtype. V f and c are each rounded once to x's dtype, between them the
        filter is float32. So the result does not depend, but for the order of the linears' sums, on
        how the tokens are split over calls. Differentiable in everything but the state and its
        history (by plain PyTorch).

    Raises:
        TypeError: an argument is no tensor or array, or the arrays are not of one kind.
        ValueError: lags or decays; state or history is a read-only array.
        RuntimeError: a shape, dtype or device does not fit; names the argument; nothing is mutated.

    Source: the causal Wiener filter of reduced rank; derived in docs/memory.md.
    """
    Filters(lags, decays)  # checks them
    arguments = (
        x,
        weight_v,
        weight_u,
        bias,
        residual,
        norm_weight,
        norm_eps,
        state,
        history,
        lags,
        decays,
        mask,
        starts,
        weight_v_scale,
        weight_u_scale,
    )
    if not _needs_gradient(*(a for a in arguments if isinstance(a, Tensor))):
        return torch.ops.nbl.memory_scan(*arguments)
    for name, t in (("state", state), ("history", history)):
        if t is not None and t.requires_grad:
            raise RuntimeError(
                f"memory_scan: {name} requires a gradient, which there is none of: detach it"
            )
    check_scan(*arguments)
    return plain_scan(*arguments)


@takes_arrays("state")
def memory_linear(
    x: Tensor,
    weight_v: Tensor,
    weight_u: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    state: Tensor,
    lags: Sequence[int] = (1,),
    decays: Sequence[float] = (0.6, 0.95),
    reset: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    weight_v_scale: Tensor | None = None,
    weight_u_scale: Tensor | None = None,
) -> Tensor:
    """The decode step of :func:`memory_scan`: one token of each of B sequences.

    x (B, K), residual (B, N), reset (B,) bool, True: the sequence begins with this token; the other
    arguments are those of :func:`memory_scan`. Returns (B, N); ``state`` (B, S, r) is mutated.
    """
    for name, t, shape in (
        ("x", x, ("B", "K")),
        ("residual", residual, ("B", "N")),
        ("reset", reset, ("B",)),
    ):
        if t is not None and t.dim() != len(shape):
            raise RuntimeError(
                f"memory_linear: {name} must have shape ({', '.join(shape)}), got {tuple(t.shape)}"
            )
    out = memory_scan(
        x[:, None],
        weight_v,
        weight_u,
        bias,
        None if residual is None else residual[:, None],
        state=state,
        lags=lags,
        decays=decays,
        starts=None if reset is None else reset[:, None],
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        weight_v_scale=weight_v_scale,
        weight_u_scale=weight_u_scale,
    )
    return out[:, 0]
