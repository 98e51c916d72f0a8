"""Loads the compiled operators and gives them what C++ does not: shapes for tracing (fake kernels),
gradients, and plain PyTorch on devices that have no kernel of ours."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor
from torch.nn import functional as F

from nbl_kernels import reference, solves
from nbl_kernels.memory import check_scan, plain_scan
from nbl_kernels.quantization import check_scale, dequantize

try:
    from nbl_kernels import _C  # noqa: F401  registers torch.ops.nbl
except ImportError as error:
    raise ImportError(
        "nbl_kernels is not built for this Python: run `pip install .` (or, for development, "
        f"`pip install --no-build-isolation -e .`) in its source folder. {error}"
    ) from error

cuda_error = None
try:  # registers the kernels for CUDA tensors
    _C_cuda = importlib.import_module("nbl_kernels._C_cuda")
    if _C_cuda.cuda_version.split(".")[0] != (torch.version.cuda or "none").split(".")[0]:
        _C_cuda.set_cuda_path("all", "plain")
        cuda_error = ImportError(
            f"built for CUDA {_C_cuda.cuda_version}, torch has {torch.version.cuda}"
        )
        _C_cuda = None
except ImportError as error:  # not built, or a torch without CUDA: build_info() says which
    _C_cuda = None
    cuda_error = error


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


# Fake kernels: output shapes, with the checks that tracing would otherwise postpone.


@torch.library.register_fake("nbl::residual_linear")
@torch.library.register_fake("nbl::residual_linear_inference")
def _(x, weight, bias, residual, norm_weight, norm_eps, weight_scale=None):
    return _fake_linear("residual_linear", x, weight, weight_scale)


@torch.library.register_fake("nbl::norm_linear")
@torch.library.register_fake("nbl::norm_linear_inference")
def _(x, norm_weight, weight, bias, norm_eps, weight_scale=None):
    return _fake_linear("norm_linear", x, weight, weight_scale)


@torch.library.register_fake("nbl::norm_swiglu")
@torch.library.register_fake("nbl::norm_swiglu_inference")
def _(x, norm_weight, gate_up_weight, norm_eps, weight_scale=None):
    out = _fake_linear("norm_swiglu", x, gate_up_weight, weight_scale)
    return x.new_empty((*x.shape[:-1], out.shape[-1] // 2))


def _fake_linear(op: str, x: Tensor, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    if weight_scale is not None:
        check_scale(f"{op}: ", weight, weight_scale, x.shape[-1])
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    _check(
        weight.dim() == 2 and weight.shape[1] == x.shape[-1],
        f"{op}: the weight must have shape (N, {x.shape[-1]}), got {tuple(weight.shape)}",
    )
    _check(weight.dtype == x.dtype, f"{op}: the weight must have x's {x.dtype}, got {weight.dtype}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("nbl::rope_append")
def _(qkv, cos, sin, positions, slots, key_cache, value_cache, q_norm, k_norm, norm_eps):
    batch, tokens, heads, head_dim = qkv.shape
    _check(
        key_cache.dim() == 4 and key_cache.shape == value_cache.shape,
        f"rope_append: the caches must have shape (at least {batch}, kv_heads, slots, {head_dim}), "
        f"got {tuple(key_cache.shape)} and {tuple(value_cache.shape)}",
    )
    q = qkv.new_empty((batch, tokens, heads - 2 * key_cache.shape[1], head_dim))
    return q.transpose(1, 2)


@torch.library.register_fake("nbl::memory_scan")
def _(x, *arguments):
    return x.new_empty((*x.shape[:2], check_scan(x, *arguments)))


@torch.library.register_fake("nbl::covariance_update")
def _(features, targets, block, mask, count, sums, gram_ff, gram_tf, gram_tt, gram_bf, gram_bb):
    return None


@torch.library.register_fake("nbl::lmmse_solve")
def _(cov_ff, cov_tf, energy, ridge, rank):
    layers, d_t, d_f = cov_tf.shape
    return (
        cov_tf.new_empty((layers, d_t, d_f)),
        cov_tf.new_empty((layers, d_t, rank)),
        cov_tf.new_empty((layers, rank, d_f)),
        cov_tf.new_empty((layers,)),
        cov_tf.new_empty((layers,)),
    )


@torch.library.register_fake("nbl::cca_matrix")
@torch.library.register_fake("nbl::residual_cca_matrix")
def _(cov_ff, cov_bf, cov_bb):
    return cov_bf.new_empty(cov_bf.shape), cov_bf.new_empty((cov_bf.shape[0],))


# Plain PyTorch where no kernel of ours runs, in the operations that its users would write.


def _as_kernel(composite):
    """As kernels do: a contiguous result, of x's dtype under autocast too."""

    @functools.wraps(composite)
    def plain(x, *arguments):
        with torch.autocast(x.device.type, enabled=False):
            return composite(x, *arguments).contiguous()

    return plain


@_as_kernel
def _residual_linear(x, weight, bias, residual, norm_weight, norm_eps, weight_scale=None):
    weight = _in_dtype_of(x, weight, weight_scale)
    features = x if norm_weight is None else _rms_norm(x, norm_weight, norm_eps)
    return (x if residual is None else residual) + F.linear(features, weight, bias)


@_as_kernel
def _norm_linear(x, norm_weight, weight, bias, norm_eps, weight_scale=None):
    weight = _in_dtype_of(x, weight, weight_scale)
    features = x if norm_weight is None else _rms_norm(x, norm_weight, norm_eps)
    return F.linear(features, weight, bias)


@_as_kernel
def _norm_swiglu(x, norm_weight, gate_up_weight, norm_eps, weight_scale=None):
    weight = _in_dtype_of(x, gate_up_weight, weight_scale)
    gate, up = F.linear(_rms_norm(x, norm_weight, norm_eps), weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def _in_dtype_of(x, weight, weight_scale):
    if weight_scale is None:
        return weight
    return dequantize(weight, weight_scale, x.shape[-1], x.dtype)


def _rms_norm(x, norm_weight, norm_eps):
    return F.rms_norm(x, (x.shape[-1],), norm_weight, norm_eps)


def _rope_append(qkv, cos, sin, positions, slots, key_cache, value_cache, q_norm, k_norm, norm_eps):
    with torch.autocast(qkv.device.type, enabled=False):
        batch, length, heads = qkv.shape[:3]
        kv_heads = key_cache.shape[1]
        q, k, v = qkv.split([heads - 2 * kv_heads, kv_heads, kv_heads], dim=2)
        cos, sin = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
        q = reference._rotated(q, cos, sin, q_norm, norm_eps)
        k = reference._rotated(k, cos, sin, k_norm, norm_eps)
        if length > 0:
            _append(k, v, slots.expand(batch, length), key_cache, value_cache)
        return q.transpose(1, 2)


def _append(k, v, slots, key_cache, value_cache):
    """Without waiting for the device to say which slots are negative: those tokens write what
    the first of their row that is written writes, or, where there is none, what is there."""
    written = slots >= 0
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    tokens = torch.arange(slots.shape[1], device=slots.device)
    tokens = torch.where(written, tokens, written.int().argmax(dim=1, keepdim=True))
    slots = slots[rows, tokens]
    nothing = (slots < 0)[..., None, None]
    slots = slots.clamp_min(0)
    for new, cache in ((k, key_cache), (v, value_cache)):
        cache[rows, :, slots] = torch.where(nothing, cache[rows, :, slots], new[rows, tokens])


@_as_kernel
def _memory_scan(x, *arguments):
    check_scan(x, *arguments)
    return plain_scan(x, *arguments)


def _covariance_update_plain(
    features, targets, block, mask, count, sums, gram_ff, gram_tf, gram_tt, gram_bf, gram_bb
):
    """False, and nothing accumulated, where a value is not finite."""
    grams = {"ff": gram_ff, "tf": gram_tf, "tt": gram_tt, "bf": gram_bf, "bb": gram_bb}
    grams = {name: gram for name, gram in grams.items() if gram.numel() > 0}
    new = reference.covariance_update_ref(features, targets, block, mask, grams=tuple(grams))
    if not all(bool(torch.isfinite(s).all()) for s in new.values()):
        return False
    count += new["count"].to(count.device)
    names = ("f", "t") if block is None else ("f", "t", "b")
    sums += torch.cat([new[f"sum_{name}"] for name in names])
    for name, gram in grams.items():
        gram += new[f"sum_{name}"]
    return True


def _covariance_update(*arguments):
    _check(
        _covariance_update_plain(*arguments),
        "covariance_update: features, targets and block must be finite; nothing was accumulated",
    )


for _composite, _names in {
    _residual_linear: ("residual_linear", "residual_linear_inference", "residual_linear_plain"),
    _norm_linear: ("norm_linear", "norm_linear_inference", "norm_linear_plain"),
    _norm_swiglu: ("norm_swiglu", "norm_swiglu_inference", "norm_swiglu_plain"),
    _rope_append: ("rope_append", "rope_append_plain"),
    _memory_scan: ("memory_scan", "memory_scan_plain"),
    _covariance_update: ("covariance_update",),
    _covariance_update_plain: ("covariance_update_plain",),
    solves.lmmse_solve: ("lmmse_solve",),
    solves.cca_matrix: ("cca_matrix",),
    solves.residual_cca_matrix: ("residual_cca_matrix",),
}.items():
    for _name in _names:
        torch.library.impl(f"nbl::{_name}", "CompositeExplicitAutograd", _composite)


# Gradients: those of the references, recomputed. Inference is what the kernels are for; training
# through them (LoRA, say) must be right, not fast.


def _reference_residual_linear(x, weight, bias, residual, norm_weight, norm_eps, weight_scale=None):
    options = {"norm_weight": norm_weight, "norm_eps": norm_eps, "weight_scale": weight_scale}
    return reference.residual_linear_ref(x, weight, bias, residual, **options)


def _reference_norm_linear(x, norm_weight, weight, bias, norm_eps, weight_scale=None):
    options = {"norm_eps": norm_eps, "weight_scale": weight_scale}
    return reference.norm_linear_ref(x, norm_weight, weight, bias, **options)


def _reference_norm_swiglu(x, norm_weight, gate_up_weight, norm_eps, weight_scale=None):
    options = {"norm_eps": norm_eps, "weight_scale": weight_scale}
    return reference.norm_swiglu_ref(x, norm_weight, gate_up_weight, **options)


def _register_gradient(name: str, reference_fn) -> None:
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(i for i in inputs if isinstance(i, Tensor)))
        ctx.inputs = [None if isinstance(i, Tensor) else (i,) for i in inputs]

    def backward(ctx, grad):
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if i is None else i[0] for i in ctx.inputs]
        needed = [isinstance(i, Tensor) and n for i, n in zip(inputs, ctx.needs_input_grad)]
        leaves = [i.detach().requires_grad_() if n else i for i, n in zip(inputs, needed)]
        with torch.enable_grad():
            out = reference_fn(*leaves)
            wanted = [leaf for leaf, n in zip(leaves, needed) if n]
            grads = iter(torch.autograd.grad(out, wanted, grad))
        return tuple(next(grads) if n else None for n in needed)

    torch.library.register_autograd(f"nbl::{name}", backward, setup_context=setup_context)


_register_gradient("residual_linear", _reference_residual_linear)
_register_gradient("norm_linear", _reference_norm_linear)
_register_gradient("norm_swiglu", _reference_norm_swiglu)
