"""Weights in 8 and 4 bits: their rounding, their layout, and the linears that read them."""

from __future__ import annotations

import devices
import numpy as np
import pytest
import torch
from cases import DTYPES, FORMATS
from cases.linear import (
    EPS,
    dequantizing,
    make,
    quantized,
    quantized_layer,
    torch_norm_linear,
    torch_norm_swiglu,
    torch_residual_linear,
)
from tolerance import assert_as_exact_as_torch, assert_rounding_only
from torch import Tensor

import nbl_kernels as nk
from nbl_kernels import _ops

every_path = devices.paths("linear", "kernel", "plain")
path = devices.paths("linear", "kernel", "plain", capabilities=False)

# --- rounding and layout -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("n, k", [(5, 128), (3, 300), (1, 1), (70, 37)])
def test_every_weight_is_rounded_to_the_nearest(dtype, n, k):
    w = make(n, k, dtype=dtype)
    exact = w.float().double()

    numbers, scale = nk.quantize(w, "int8")
    assert numbers.dtype == torch.int8 and numbers.shape == (n, k) and scale.shape == (n,)
    assert numbers.abs().amax(1).eq(127).all()
    off = (nk.dequantize(numbers, scale, k, torch.float64) - exact).abs()
    assert (off <= scale.double()[:, None] * (0.5 + 1e-5)).all()

    numbers, scale = nk.quantize(w, "fp8")
    assert numbers.dtype == torch.float8_e4m3fn and scale.shape == (n,)
    assert numbers.float().abs().amax(1).eq(448).all()
    off = (nk.dequantize(numbers, scale, k, torch.float64) - exact).abs()
    step = torch.maximum(exact.abs() / 8, scale.double()[:, None] * 2.0**-9)  # spacing, or more
    assert (off <= step * (0.5 + 1e-5)).all()

    numbers, scale = nk.quantize(w, "int4")
    groups = -(-k // 128)
    assert numbers.dtype == torch.uint8 and numbers.shape == (n, 64 * groups)
    assert scale.dtype == torch.bfloat16 and scale.shape == (n, groups)
    off = nk.dequantize(numbers, scale, k, torch.float64) - exact
    for g in range(groups):
        columns = slice(128 * g, 128 * g + 128)
        s = scale[:, g : g + 1].double()
        q = (exact[:, columns] / s).round()
        inside = (q >= -8) & (q <= 7)
        assert (off[:, columns].abs() <= s.abs() * (0.5 + 1e-6))[inside].all()
        # No worse than the plain choice, which clips nothing.
        plain = (exact[:, columns].abs().amax(1, keepdim=True) / 7).bfloat16().double()
        rounded = (exact[:, columns] / plain).round().clamp(-8, 7) * plain
        best = (rounded - exact[:, columns]).square().sum(1)
        assert (off[:, columns].square().sum(1) <= best * 1.05).all()
        assert (inside.double().mean(1) > 0.9).all()


def test_clipping_pays_where_one_weight_is_far_outside():
    w = make(4, 128)
    w[:, 7] = 6.0
    values = nk.dequantize(*nk.quantize(w, "int4"), 128, torch.float32)
    plain = w.abs().amax(1, keepdim=True) / 7
    unclipped = ((w / plain).round() * plain - w).square().sum(1)
    assert ((values - w).square().sum(1) < 0.9 * unclipped).all()


def test_int4_bytes_are_laid_out_as_the_module_says():
    k = 300
    numbers, scale = nk.quantize(make(3, k), "int4")
    words = numbers.numpy().view("<u2").reshape(3, 3, 32)
    value = np.zeros((3, 3 * 128))
    for column in range(3 * 128):
        g, s, j = column // 128, column % 128 // 32, column % 32
        nibble = (words[:, g, j] >> (4 * s)) & 15
        value[:, column] = (nibble.astype(int) - 8) * scale[:, g].double().numpy()
    assert (value[:, k:] == 0).all()
    assert np.array_equal(value[:, :k], nk.dequantize(numbers, scale, k, torch.float64).numpy())


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_exact_stays_exact(format):
    levels = {"int8": torch.arange(-127, 128), "int4": torch.arange(-8, 8)}
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    row = levels.get(format, codes[codes.isfinite()]).float()
    w = torch.stack([row, row * 2.0**-10, torch.zeros_like(row)])
    numbers, scale = nk.quantize(w, format)
    assert torch.equal(nk.dequantize(numbers, scale, len(row), torch.float32), w)
    if format != "int4":
        assert torch.equal(numbers[0].float(), row)


@pytest.mark.parametrize("format", FORMATS)
def test_empty_and_strided_weights(format):
    for n, k in [(0, 5), (4, 0), (0, 0)]:
        numbers, scale = nk.quantize(torch.zeros(n, k), format)
        assert nk.dequantize(numbers, scale, k, torch.float32).shape == (n, k)
    w = make(40, 60)
    for a, b in zip(nk.quantize(w.T, format), nk.quantize(w.T.contiguous(), format)):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS)
def test_what_cannot_be_quantized_is_refused(format):
    for bad in (float("nan"), float("inf")):
        w = make(9, 30)
        w[6, 3] = bad
        with pytest.raises(ValueError, match="weight: expected finite values, row 6"):
            nk.quantize(w, format)
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        nk.quantize(torch.randn(3), format)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch.int8"):
        nk.quantize(torch.zeros(3, 3, dtype=torch.int8), format)
    with pytest.raises(ValueError, match="format: expected one of int8, fp8, int4, got 'int3'"):
        nk.quantize(torch.randn(3, 3), "int3")
    numbers, scale = nk.quantize(torch.randn(3, 200), format)
    with pytest.raises(ValueError, match="weight must have shape"):
        nk.dequantize(numbers, scale, 300, torch.float32)
    with pytest.raises(ValueError, match="weight_scale must be"):
        nk.dequantize(numbers, scale[:2], 200, torch.float32)


# --- the linears ---------------------------------------------------------------------------------

# (K, N): whole granules of 16 bytes and groups of 128 or not, odd, less and more than a block.
SHAPES = [(256, 64), (72, 40), (384, 33), (136, 90), (1, 2), (37, 38), (1031, 70), (4096, 24)]


def assert_right(actual: Tensor, function, weight: Tensor, scale: Tensor, *inputs) -> None:
    """Beside ``function`` of PyTorch on the dequantized weight, None among ``inputs``."""
    k = inputs[0].shape[-1]
    assert_as_exact_as_torch(actual, dequantizing(function, weight, scale, k), list(inputs))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, n", SHAPES)
def test_linears(every_path, format, dtype, k, n):
    on = {"dtype": dtype, "device": every_path.device}
    weight, scale = quantized(n, k, format, every_path.device)
    gate_up, gate_up_scale = quantized(2 * n, k, format, every_path.device)
    gamma, bias = make(k, **on), make(n, **on)
    options = {"norm_eps": EPS, "weight_scale": scale}
    for m in [1, 2, 3, 8, 9, 16, 17, 40] if every_path.on_gpu else [1, 3, 16, 17]:
        x, r = make(m, k, **on), make(m, n, **on)
        actual = nk.residual_linear(x, weight, bias, r, weight_scale=scale)
        assert_right(actual, torch_residual_linear, weight, scale, x, None, bias, r, None)
        actual = nk.residual_linear(x, weight, None, r, norm_weight=gamma, **options)
        assert_right(actual, torch_residual_linear, weight, scale, x, None, None, r, gamma)
        actual = nk.norm_linear(x, gamma, weight, bias, **options)
        assert_right(actual, torch_norm_linear, weight, scale, x, gamma, None, bias)
        actual = nk.norm_swiglu(x, gamma, gate_up, norm_eps=EPS, weight_scale=gate_up_scale)
        assert_right(actual, torch_norm_swiglu, gate_up, gate_up_scale, x, gamma, None)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [*range(1, 18), 40])
def test_every_number_of_rows(every_path, format, m):
    k, n = 264, 46
    weight, scale = quantized(n, k, format, every_path.device)
    for dtype in (torch.bfloat16, torch.float32):
        on = {"dtype": dtype, "device": every_path.device}
        x, bias, residual, gamma = (make(*s, **on) for s in ((m, k), (n,), (m, n), (k,)))
        options = {"norm_eps": EPS, "weight_scale": scale}
        actual = nk.residual_linear(x, weight, bias, residual, norm_weight=gamma, **options)
        assert_right(actual, torch_residual_linear, weight, scale, x, None, bias, residual, gamma)
        actual = nk.norm_swiglu(x, gamma, weight, **options)
        assert_right(actual, torch_norm_swiglu, weight, scale, x, gamma, None)


@pytest.mark.parametrize("m", [1, 3, 12, 20])
def test_every_fp8_number_means_what_pytorch_says(every_path, m):
    """Subnormals and NaN too: one weight each, times one."""
    for dtype in DTYPES:
        on = {"dtype": dtype, "device": every_path.device}
        for k in (1, 16):
            weight = torch.zeros(256, k, dtype=torch.uint8)
            weight[:, 0] = torch.arange(256)
            weight = weight.view(torch.float8_e4m3fn).to(every_path.device)
            x, zero = torch.zeros(m, k, **on), torch.zeros(m, 256, **on)
            x[:, 0] = 1
            one = torch.ones(256, device=every_path.device)
            out = nk.residual_linear(x, weight, None, zero, weight_scale=one)
            expected = weight[:, 0].to(dtype).expand(m, 256)
            assert torch.equal(out.isnan(), expected.isnan())
            assert torch.equal(out.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [1, 5, 12, 33])
def test_strided_and_unaligned_weights(every_path, format, m):
    k, n = 208, 24
    on = {"dtype": torch.bfloat16, "device": every_path.device}
    weight, scale = quantized(2 * n, k, format, every_path.device)
    x, residual = make(m, k, **on), make(m, n, **on)
    wide = torch.full((n, weight.shape[1] + 19), 127, dtype=torch.uint8, device=every_path.device)
    shifted = wide.view(weight.dtype)[:, 3 : 3 + weight.shape[1]]  # rows begin anywhere
    shifted.copy_(weight[:n])
    views = [
        (weight[::2], scale[::2]),
        (weight[n:], scale[n:]),
        (weight.T.contiguous().T[:n], scale.clone()[:n]),
        (shifted, scale[:n]),
    ]
    for w, s in views:
        actual = nk.residual_linear(x, w, None, residual, weight_scale=s)
        dense = w.contiguous(), s.contiguous()
        assert_right(actual, torch_residual_linear, *dense, x, None, None, residual, None)
        if not every_path.on_gpu:
            expected = nk.residual_linear(x, dense[0], None, residual, weight_scale=dense[1])
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_is_deterministic(path, format):
    layer = quantized_layer(1024 if path.on_gpu else 256, format, path.device)
    for m in (1, 4, 16, 17, 64):
        x = make(m, 1024 if path.on_gpu else 256, dtype=torch.bfloat16, device=path.device)
        first = layer(x)
        assert all(torch.equal(first, layer(x)) for _ in range(5))


@pytest.mark.parametrize("format", FORMATS)
def test_no_rows_and_no_features(every_path, format):
    device = every_path.device
    weight, scale = quantized(4, 40, format, device)
    x, gamma = torch.zeros(2, 0, 40, device=device), torch.ones(40, device=device)
    assert nk.norm_linear(x, gamma, weight, weight_scale=scale).shape == (2, 0, 4)
    assert nk.norm_swiglu(x, gamma, weight, weight_scale=scale).shape == (2, 0, 2)
    weight, scale = (t.to(device) for t in nk.quantize(torch.zeros(4, 0), format))
    for m in (2, 40):
        x, residual = torch.zeros(m, 0, device=device), torch.randn(m, 4, device=device)
        out = nk.residual_linear(x, weight, None, residual, weight_scale=scale)
        assert torch.equal(out, residual)
    weight, scale = (t.to(device) for t in nk.quantize(torch.zeros(0, 8), format))
    x, gamma = torch.ones(3, 8, device=device), torch.ones(8, device=device)
    assert nk.norm_linear(x, gamma, weight, weight_scale=scale).shape == (3, 0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [1, 9, 33])
def test_non_finite_values_stay_in_their_row(every_path, format, m):
    on = {"dtype": torch.bfloat16, "device": every_path.device}
    weight, scale = quantized(16, 200, format, every_path.device)
    x, zero = make(m, 200, **on), torch.zeros(m, 16, **on)
    clean = nk.residual_linear(x, weight, None, zero, weight_scale=scale)
    x[0, 5] = float("nan")
    out = nk.residual_linear(x, weight, None, zero, weight_scale=scale)
    assert out[0].isnan().all()
    assert torch.equal(out[1:], clean[1:])


def test_errors_name_the_argument():
    x, int8, int4 = (
        torch.randn(2, 200),
        nk.quantize(torch.randn(200, 200), "int8"),
        nk.quantize(torch.randn(200, 200), "int4"),
    )
    cases = [
        ((int8[0], None), "weight_scale must be given for a weight of dtype int8"),
        ((int4[0], None), "weight_scale must be given for a weight of dtype uint8"),
        ((torch.randn(200, 200), int8[1]), "weight_scale must be None for a weight in the dtype"),
        ((int8[0][:, :9], int8[1]), r"weight must have shape \(N, 200\)"),
        ((int4[0][:, :9], int4[1]), r"weight must have shape \(N, 128\), 64 bytes for every 128"),
        ((int8[0], int8[1][:3]), r"weight_scale must have shape \(200,\), got \(3\)"),
        ((int4[0], int4[1][:, :1]), r"weight_scale must have shape \(200, 2\)"),
        ((int8[0], int8[1].half()), "weight_scale must be float32 for a weight of dtype int8"),
        ((int4[0], int4[1].float()), "weight_scale must be bfloat16 for a weight of dtype uint8"),
        ((int8[0].int(), int8[1]), "weight must have the dtype of x"),
    ]
    for (weight, scale), message in cases:
        with pytest.raises(RuntimeError, match=message):
            nk.residual_linear(x, weight, weight_scale=scale)
    with pytest.raises(RuntimeError, match="gate_up_weight must have an even number of rows"):
        nk.norm_swiglu(x, torch.ones(200), int8[0][:7], weight_scale=int8[1][:7])
    with pytest.raises(TypeError, match=r"weight_scale must be a tensor or an array.*got list"):
        nk.residual_linear(x.numpy(), int8[0].numpy(), weight_scale=[1.0])


def op_samples(format):
    x, g = make(3, 150), make(150)
    weight, scale = nk.quantize(make(150, 150), format)
    return {
        "residual_linear": (x, weight, make(150), None, g, 1e-6, scale),
        "norm_linear": (x, g, weight, None, 1e-6, scale),
        "norm_swiglu": (x, g, weight, 1e-6, scale),
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["residual_linear", "norm_linear", "norm_swiglu"])
def test_opcheck(format, name):
    sample = op_samples(format)[name]
    tests = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    if format == "fp8":  # compares inputs before and after by arithmetic that PyTorch lacks
        tests.remove("test_schema")
    op = getattr(torch.ops.nbl, name).default
    inference = getattr(torch.ops.nbl, f"{name}_inference").default
    leaves = list(sample)
    leaves[0] = sample[0].clone().requires_grad_()
    for function, arguments in [(inference, sample), (op, sample), (op, leaves)]:
        torch.library.opcheck(function, arguments, test_utils=tests)


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_are_those_of_the_dequantized_weight(format):
    weight, scale = nk.quantize(make(48, 48, scale=0.2), format)

    def gradients(residual_linear, norm_linear, norm_swiglu, dtype=torch.float32):
        x, b, g = (make(*s).to(dtype).requires_grad_() for s in [(5, 48), (48,), (48,)])
        h = residual_linear(x, weight, scale, b, None, g)
        y = norm_linear(h, g, weight, scale, None).square().sum()
        y = y + norm_swiglu(h, g, weight, scale).square().sum()
        return torch.autograd.grad(y, (x, b, g))

    def dense(dtype):
        return nk.dequantize(weight, scale, 48, dtype)

    plain_ops = (
        lambda x, w, s, b, r, g: torch_residual_linear(x, dense(x.dtype), b, r, g),
        lambda x, g, w, s, b: torch_norm_linear(x, g, dense(x.dtype), b),
        lambda x, g, w, s: torch_norm_swiglu(x, g, dense(x.dtype)),
    )
    actual = gradients(
        lambda x, w, s, b, r, g: nk.residual_linear(
            x, w, b, r, norm_weight=g, norm_eps=EPS, weight_scale=s
        ),
        lambda x, g, w, s, b: nk.norm_linear(x, g, w, b, norm_eps=EPS, weight_scale=s),
        lambda x, g, w, s: nk.norm_swiglu(x, g, w, norm_eps=EPS, weight_scale=s),
    )
    for a, p, e in zip(actual, gradients(*plain_ops), gradients(*plain_ops, torch.float64)):
        assert_rounding_only(a, p, e)


def test_compiles_without_graph_breaks():
    g = make(150)
    squares = [quantized(150, 150, format) for format in FORMATS]
    gate_ups = [quantized(300, 150, format) for format in FORMATS]

    def layers(x):  # one graph for all formats: compiling is what takes the time
        for (weight, scale), (gate_up, gate_up_scale) in zip(squares, gate_ups):
            h = nk.residual_linear(x, weight, norm_weight=g, weight_scale=scale)
            y = nk.norm_swiglu(h, g, gate_up, weight_scale=gate_up_scale)
            y = nk.residual_linear(y, weight, None, h, weight_scale=scale)
            x = y + nk.norm_linear(x, g, weight, weight_scale=scale)
        return x

    compiled = torch.compile(layers, fullgraph=True, dynamic=True)
    for m in (1, 5, 40):
        assert torch.equal(compiled(make(m, 150)), layers(make(m, 150)))


@pytest.mark.parametrize("format", FORMATS)
def test_devices_without_kernels_run_plain_torch(format):
    """What MPS, …, and CUDA on its plain path get: the composite implementation, called on CPU
    tensors. (CUDA's kernels: tests/emulated/.)"""
    samples = op_samples(format)
    x, weight, bias, residual, gamma, _, scale = samples["residual_linear"]
    plain = {
        "residual_linear": (torch_residual_linear, x, None, bias, residual, gamma),
        "norm_linear": (torch_norm_linear, x, gamma, None, None),
        "norm_swiglu": (torch_norm_swiglu, x, gamma, None),
    }
    for name, sample in samples.items():
        function, *inputs = plain[name]
        for op in (getattr(_ops, f"_{name}"), getattr(torch.ops.nbl, name)):
            assert_right(op(*sample), function, weight, scale, *inputs)


def test_numpy_arrays():
    x, (weight, scale) = make(2, 40), nk.quantize(make(40, 40), "int8")
    out = nk.residual_linear(x.numpy(), weight.numpy(), weight_scale=scale.numpy())
    assert isinstance(out, np.ndarray)
    assert np.array_equal(out, nk.residual_linear(x, weight, weight_scale=scale).numpy())


def test_results_do_not_depend_on_threads():
    x, g, threads = (
        make(3, 300, dtype=torch.bfloat16),
        make(300).bfloat16(),
        torch.get_num_threads(),
    )
    for format in FORMATS:
        weight, scale = nk.quantize(make(700, 300), format)
        outs = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                outs.append(nk.norm_linear(x, g, weight, weight_scale=scale))
                outs.append(nk.norm_linear(x.repeat(9, 1), g, weight, weight_scale=scale)[:3])
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(out, outs[i % 2]) for i, out in enumerate(outs))
