"""Rotary position embeddings and the append to a key-value cache, in one pass over q, k and v.

CPU kernel: ``csrc/include/nbl/cpu/rope.h``, launched by ``csrc/cpu/rope.cpp``.

CUDA kernel: ``csrc/include/nbl/cuda/rope.cuh``, launched by ``csrc/cuda/rope.cu`` where
``cuda_paths()`` says so. Otherwise CUDA tensors take plain PyTorch operations.

NumPy and CuPy arrays are as good as tensors here: see ``nbl_kernels/arrays.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nbl_kernels.arrays import takes_arrays


@takes_arrays("key_cache", "value_cache")
def rope_append(
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
    """Rotates q and k, writes k and v to the cache, returns q: what stands between a fused QKV
    projection and attention.

    A head x = [a | b | rest], with a and b as long as a row of cos, becomes
    ``[a·cos - b·sin | b·cos + a·sin | rest]`` (the half rotation of Hugging Face's Llama; `rest` is
    there with partial rotary embeddings only), with the rows of cos and sin at the token's
    position. Before it x becomes ``x / sqrt(mean(x²) + norm_eps) · norm_weight`` where a norm
    weight is given (Qwen3). All in float32, rounded once at the end; v is copied.

    Args:
        qkv: (B, T, H + 2 H_kv, D), the heads of q, then of k, then of v; float32, bfloat16 or
            float16; any strides.
        cos, sin: (positions, R/2) float32, R ≤ D the dimensions that rotate: see
            :func:`rope_tables`. Scaling (Llama 3's, linear, YaRN, …) is a matter of these tables.
        positions: int64, (B, T) or what broadcasts to it: the row of cos and sin of each token.
        slots: int64, (B, T) or what broadcasts to it: where in the cache each token goes;
            negative: nowhere (padding, say). The slots of one row of the batch must differ.
        key_cache, value_cache: (B or more, H_kv, L, D), qkv's dtype; any strides, the last
            dimension contiguous. MUTATED: row b of the batch writes to row b of the cache.
        q_norm_weight, k_norm_weight: (D,) of qkv's dtype, or None.
        norm_eps: added to the mean square.

    Returns:
        q, rotated: (B, H, T, D), as ``scaled_dot_product_attention`` takes it, in memory
        (B, T, H, D): attention answers in the layout of q, so that its result is a view of
        (B, T, H·D), what ``o_proj`` reads.

    Raises:
        TypeError: an argument is no tensor or array, or the arrays are not of one kind.
        ValueError: a cache is a read-only array.
        RuntimeError: a shape, dtype or device does not fit; a position or a slot is out of range;
            a gradient is asked for. Names the argument; nothing was written. On CUDA nobody waits
            to look at positions and slots: our kernel returns NaN for the q of a token that is out
            of range and leaves the caches alone; PyTorch's operations (the path "plain") fail with
            a device-side assertion.

    Everything that varies from step to step is in tensors, so that a CUDA graph can be replayed.
    """
    if torch.is_grad_enabled():
        for name, t in (("qkv", qkv), ("key_cache", key_cache), ("value_cache", value_cache)):
            if t.requires_grad:
                raise RuntimeError(
                    f"rope_append: {name} requires a gradient, which there is none of: "
                    "detach it, or call under torch.no_grad()"
                )
    return torch.ops.nbl.rope_append(
        qkv,
        cos,
        sin,
        positions,
        slots,
        key_cache,
        value_cache,
        q_norm_weight,
        k_norm_weight,
        norm_eps,
    )


def rope_tables(
    head_dim: int,
    length: int,
    theta: float,
    scaling: Mapping[str, object] | None = None,
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_dim / 2), float32, of the angles ``position · f_i``,
    ``f_i = theta^(-2i / head_dim)``: the tables of :func:`rope_append`.

    Angles are computed in float64, so that late positions are as exact as early ones.

    Args:
        head_dim: how many dimensions rotate; even. With partial rotary embeddings fewer than a
            head has.
        length: of the table: positions 0 to length - 1.
        theta: ``rope_theta`` of a model's configuration.
        scaling: None, or ``rope_scaling`` (``rope_parameters``) of a model's configuration:
            ``{"rope_type": "linear", "factor": s}`` divides every frequency by s;
            ``{"rope_type": "llama3", "factor": s, "low_freq_factor": l, "high_freq_factor": h,
            "original_max_position_embeddings": n}`` keeps those whose wavelength is below n / h,
            divides those above n / l by s, and blends linearly, in n / wavelength, in between.

    Raises:
        ValueError: names the argument or the entry of scaling; another rope_type.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: expected a positive even number, got {head_dim!r}")
    if length < 0:
        raise ValueError(f"length: expected 0 or more, got {length!r}")
    if not theta > 0:
        raise ValueError(f"theta: expected a positive number, got {theta!r}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = _scaled(torch.pow(theta, -exponents), scaling or {})
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = positions[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def _scaled(frequencies: Tensor, scaling: Mapping[str, object]) -> Tensor:
    def number(name: str) -> float:
        value = scaling.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"scaling[{name!r}]: expected a positive number, got {value!r}")
        return float(value)

    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "default":
        return frequencies
    if rope_type == "linear":
        return frequencies / number("factor")
    if rope_type == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if not low < high:
            raise ValueError(
                f"scaling['high_freq_factor']: expected more than low_freq_factor {low}, got {high}"
            )
        turns = number("original_max_position_embeddings") * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / number("factor"))
    raise ValueError(
        f"scaling['rope_type']: expected default, linear or llama3, got {rope_type!r}; "
        "make the tables of others from the model's own rotary embedding"
    )
