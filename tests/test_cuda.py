"""The CUDA kernels on a GPU, every path of every op, against float64 on the CPU.

Skipped without a GPU. NBL_TEST_DEVICE=cpu runs those tests that mean anything there on the CPU
kernels, which shows that the tests themselves are in order.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import os
import warnings

import pytest
import torch
from test_covariance import assert_moments_exact, hard_tokens
from test_linear import torch_norm_linear, torch_norm_swiglu, torch_residual_linear
from test_lmmse import exact_moments, tokens
from test_memory import (
    FILTERS,
    assert_scan_right,
    assert_states_rounding_only,
    copied,
    make_scan,
    positional,
)
from test_memory_covariance import assert_right as assert_moments_right
from test_memory_covariance import exact_moments as memory_moments
from test_memory_covariance import texts
from test_rope import SHAPES as ROPE_SHAPES
from test_rope import assert_right, make_inputs
from tolerance import assert_as_exact_as_torch, assert_rounding_only
from torch import Tensor

import nbl_kernels as nk

DEVICE = os.environ.get("NBL_TEST_DEVICE", "cuda")
ON_GPU = DEVICE.startswith("cuda")


def _why_not() -> str:
    if not ON_GPU:
        return ""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    return "" if nk.build_info()["cuda"] else f"no CUDA kernels: {nk.build_info()['cuda_reason']}"


if _why_not():
    pytest.skip(_why_not(), allow_module_level=True)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a matter of CUDA alone")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [*range(1, 18), 32, 100]
# (K, N): vector loads or not, tails of both, less and more than one block, long and wide.
SHAPES = [
    (64, 64),
    (136, 90),
    (200, 40),
    (37, 37),
    (1, 1),
    (8, 129),
    (1031, 70),
    (4096, 24),
    (24, 4100),
    (2048, 264),
]


def paths(op: str, *names: str):
    """A fixture that runs a test on each path of op, and puts the default back."""

    @pytest.fixture(params=names if ON_GPU else ["cpu"])
    def path(request):
        if not ON_GPU:
            yield request.param
            return
        if request.param == "hopper" and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("this GPU is no Hopper")
        nk.set_cuda_path(op, request.param)
        assert nk.cuda_paths()[op] == request.param
        yield request.param
        nk.set_cuda_path(op, "auto")

    return path


linear_path = paths("linear", "kernel", "plain")
gram_path = paths("gram", "hopper", "portable", "cublas", "plain")
solve_path = paths("solve", "kernel", "plain")
rope_path = paths("rope", "kernel", "plain")
memory_path = paths("memory", "kernel", "plain")


@pytest.fixture(autouse=True)
def full_precision():
    """PyTorch's own products, which are the measure, are not to be reduced."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction")
    names += ("allow_fp16_reduced_precision_reduction",)
    before = {name: getattr(matmul, name) for name in names}
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in before.items():
        setattr(matmul, name, value)


def make(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 17 * len(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def poison(*shape: int, dtype: torch.dtype) -> None:
    """Leaves NaN in the memory that the next result of this size is likely to get."""
    blocks = [torch.full(shape, math.nan, dtype=dtype, device=DEVICE) for _ in range(3)]
    del blocks


def assert_exact(actual: Tensor, torch_function, inputs: list[Tensor | None]) -> None:
    """Of float64 on the CPU, that is, by other code than the GPU's."""

    def function(*inputs):
        if inputs[0].dtype != torch.float64:
            return torch_function(*inputs)
        on_cpu = (None if t is None else t.cpu() for t in inputs)
        return torch_function(*on_cpu).to(inputs[0].device)

    assert_as_exact_as_torch(actual, function, inputs)


def on_cpu(moments: nk.Moments) -> nk.Moments:
    return moments.to("cpu")


# ---- Linears -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, n", SHAPES)
@pytest.mark.parametrize("bias, norm", [(True, True), (False, False), (True, False), (False, True)])
def test_linear_residual(linear_path, dtype, k, n, bias, norm):
    weight = make(n, k, dtype=dtype, scale=k**-0.5)
    b, gamma = make(n, dtype=dtype) if bias else None, make(k, dtype=dtype) if norm else None
    for m in ROWS:
        x, residual = make(m, k, dtype=dtype), make(m, n, dtype=dtype)
        poison(m, n, dtype=dtype)
        actual = nk.residual_linear(x, weight, b, residual, norm_weight=gamma)
        inputs = [x, weight, b, residual, gamma]
        assert_exact(actual, torch_residual_linear, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, n", SHAPES)
def test_linear_norm_and_swiglu(linear_path, dtype, k, n):
    weight, gamma = make(n, k, dtype=dtype, scale=k**-0.5), make(k, dtype=dtype)
    gate_up, bias = make(2 * n, k, dtype=dtype, scale=k**-0.5), make(n, dtype=dtype)
    for m in ROWS:
        x = make(m, k, dtype=dtype)
        for b in (bias, None):
            poison(m, n, dtype=dtype)
            actual = nk.norm_linear(x, gamma, weight, b)
            inputs = [x, gamma, weight, b]
            assert_exact(actual, torch_norm_linear, inputs)
        poison(m, n, dtype=dtype)
        actual = nk.norm_swiglu(x, gamma, gate_up)
        assert_exact(actual, torch_norm_swiglu, [x, gamma, gate_up])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 7, 16, 17, 40])
def test_linear_strided_and_unaligned(linear_path, dtype, offset, m):
    """Rows that begin anywhere: vector loads where they are allowed, the same result elsewhere."""
    k, n = 136, 72
    base = [make(rows, 2 * k + 16, dtype=dtype, scale=0.1) for rows in (m, 2 * n, m)]
    rows = [t[:, offset : offset + k] for t in base]
    columns = [t[:, offset : offset + 2 * k : 2] for t in base]
    transposed = [t[:, offset : offset + k].T.contiguous().T for t in base]
    vector = make(2 * k + 16, dtype=dtype)
    gamma, bias = vector[offset : offset + k], vector[offset : offset + n]
    for x, w, r in (rows, columns, transposed):
        r = r[:, :n]
        actual = nk.residual_linear(x, w[:n], bias, r, norm_weight=gamma)
        inputs = [x, w[:n], bias, r, gamma]
        assert_exact(actual, torch_residual_linear, inputs)
        actual = nk.norm_swiglu(x, gamma, w)
        assert_exact(actual, torch_norm_swiglu, [x, gamma, w])


def test_linear_reads_nothing_past_the_end(linear_path):
    """A weight and an x whose neighbours are NaN."""
    for dtype in DTYPES:
        for m in (1, 5, 16):
            storage = torch.full((90, 150), math.nan, dtype=dtype, device=DEVICE)
            storage[:73, :137] = make(73, 137, dtype=dtype)
            xs = torch.full((m + 3, 150), math.nan, dtype=dtype, device=DEVICE)
            xs[:m, :137] = make(m, 137, dtype=dtype)
            gamma = torch.ones(137, dtype=dtype, device=DEVICE)
            assert nk.norm_linear(xs[:m, :137], gamma, storage[:73, :137]).isfinite().all()
            assert nk.norm_swiglu(xs[:m, :137], gamma, storage[:72, :137]).isfinite().all()


def test_linear_writes_nothing_but_its_result(linear_path):
    for dtype in DTYPES:
        for m in (1, 7, 16, 33):
            inputs = [make(m, 72, dtype=dtype), make(72, 72, dtype=dtype), make(72, dtype=dtype)]
            before = [t.clone() for t in inputs]
            x, w, v = inputs
            nk.residual_linear(x, w, v, norm_weight=v)
            nk.norm_linear(x, v, w, v)
            nk.norm_swiglu(x, v, w)
            assert all(torch.equal(a, b) for a, b in zip(inputs, before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_deterministic(linear_path, dtype):
    for k, n in [(2048, 2048), (8192, 64), (1031, 70)]:
        w, g, b = make(n, k, dtype=dtype, scale=k**-0.5), make(k, dtype=dtype), make(n, dtype=dtype)
        for m in (1, 2, 8, 16, 40):
            x, r = make(m, k, dtype=dtype), make(m, n, dtype=dtype)
            for call in (
                lambda: nk.residual_linear(x, w, b, r),  # noqa: B023
                lambda: nk.norm_linear(x, g, w, b),  # noqa: B023
                lambda: nk.norm_swiglu(x, g, w),  # noqa: B023
            ):
                first = call()
                assert all(torch.equal(first, call()) for _ in range(5))


def test_linear_non_finite_values_stay_in_their_row_or_column(linear_path):
    for m in (1, 9, 33):
        x, w = make(m, 64, dtype=torch.bfloat16), make(64, 64, dtype=torch.bfloat16)
        clean = nk.residual_linear(x, w)
        x[0, 5], w[7, 3] = math.nan, math.inf
        out = nk.residual_linear(x, w)
        assert out[0].isnan().all()
        assert not out[1:, 7].isfinite().any()
        rest = [i for i in range(64) if i != 7]
        assert torch.equal(out[1:, rest], clean[1:, rest])


def test_linear_empty_sizes_and_leading_dimensions(linear_path):
    def zeros(*shape):
        return torch.zeros(shape, device=DEVICE)

    for shape in [(0, 8), (2, 0, 8)]:
        assert nk.residual_linear(zeros(*shape), zeros(8, 8)).shape == shape
        assert nk.norm_linear(zeros(*shape), zeros(8), zeros(5, 8)).shape == (*shape[:-1], 5)
        assert nk.norm_swiglu(zeros(*shape), zeros(8), zeros(6, 8)).shape == (*shape[:-1], 3)
    for m in (2, 40):  # no features: bias and residual are what is left
        bias, residual = make(4, dtype=torch.float32), make(m, 4, dtype=torch.float32)
        out = nk.residual_linear(zeros(m, 0), zeros(4, 0), bias, residual)
        torch.testing.assert_close(out, residual + bias)
        assert nk.norm_linear(zeros(m, 0), zeros(0), zeros(0, 0)).shape == (m, 0)
    x, w = make(2, 3, 32, dtype=torch.float32), make(32, 32, dtype=torch.float32)
    assert torch.equal(
        nk.residual_linear(x, w).reshape(6, 32), nk.residual_linear(x.reshape(6, 32), w)
    )
    assert nk.residual_linear(x[0, 0], w).shape == (32,)


def test_linear_errors_name_the_argument(linear_path):
    x, w, v = (make(*s, dtype=torch.float32) for s in ((2, 8), (8, 8), (8,)))
    cases = [
        (lambda: nk.residual_linear(x, w[:, :7]), "weight must have shape"),
        (lambda: nk.residual_linear(x, v), "weight must have 2 dimensions"),
        (lambda: nk.residual_linear(x, w[:5]), "residual must have the shape"),
        (lambda: nk.residual_linear(x, w, v[:7]), "bias must have shape"),
        (lambda: nk.residual_linear(x, w.bfloat16()), "weight must have the dtype of x"),
        (lambda: nk.residual_linear(x.int(), w.int()), "x must be float32, bfloat16 or float16"),
        (lambda: nk.norm_swiglu(x, v, w[:7]), "even number of rows"),
    ]
    if ON_GPU:
        cases.append((lambda: nk.residual_linear(x, w.cpu()), "weight must be on the device of x"))
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


def linear_calls(m: int, d: int, dtype: torch.dtype, device: str = DEVICE):
    """x, and a layer's worth of calls on it."""
    shapes = ((m, d), (d, d), (d,), (2 * d, d))
    x, w, g, up = (make(*s, dtype=dtype, scale=0.05).to(device) for s in shapes)

    def layer(x: Tensor) -> Tensor:
        h = nk.residual_linear(x, w, g, norm_weight=g)
        return nk.residual_linear(nk.norm_swiglu(h, g, up), w, None, h) + nk.norm_linear(h, g, w)

    return x * 20, layer


@needs_gpu
@pytest.mark.parametrize("m", [1, 4, 16, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_in_a_cuda_graph(linear_path, m, dtype):
    x, layer = linear_calls(m, 256, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(out, layer(x))


@needs_gpu
def test_linear_chains_keep_the_order_of_the_stream(linear_path):
    """Each launch reads what the one before wrote: nothing may start to read early."""
    for m in (1, 8, 16, 17):
        x, layer = linear_calls(m, 1024, torch.bfloat16)

        def chain(wait: bool, x=x, layer=layer) -> Tensor:
            h = x
            for _ in range(30):
                h = layer(h)
                h = h / h.abs().amax().clamp_min(1e-3)
                if wait:
                    torch.cuda.synchronize()
            return h

        waited = chain(True)
        assert all(torch.equal(chain(False), waited) for _ in range(5))


@needs_gpu
def test_linear_on_a_side_stream(linear_path):
    for m in (1, 16, 40):
        x, layer = linear_calls(m, 512, torch.bfloat16)
        expected = layer(x)
        late = torch.zeros_like(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # x is there late, on this stream alone
            late.copy_(x)
            out = layer(late)
        side.synchronize()
        assert torch.equal(out, expected)


@needs_gpu
def test_linear_on_another_device(linear_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x, layer = linear_calls(3, 64, torch.bfloat16)
    there, layer_there = linear_calls(3, 64, torch.bfloat16, "cuda:1")
    out = layer_there(there)  # while cuda:0 is the current device
    assert out.device == there.device and torch.equal(out.cpu(), layer(x).cpu())


def test_linear_compiles_without_graph_breaks(linear_path):
    for m in (1, 5, 40):
        x, layer = linear_calls(m, 64, torch.float32)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["residual_linear", "norm_linear", "norm_swiglu"])
def test_linear_opcheck(linear_path, name):
    x, w, g, b = (make(*s, dtype=torch.float32) for s in ((3, 16), (16, 16), (16,), (16,)))
    sample = {
        "residual_linear": (x, w, b, None, g, 1e-6),
        "norm_linear": (x, g, w, None, 1e-6),
        "norm_swiglu": (x, g, w, 1e-6),
    }[name]
    torch.library.opcheck(getattr(torch.ops.nbl, f"{name}_inference").default, sample)
    torch.library.opcheck(getattr(torch.ops.nbl, name).default, sample)


def test_linear_gradients_are_those_of_plain_torch(linear_path):
    for m in (2, 24):
        ours = [make(*s, dtype=torch.float32) for s in ((m, 16), (16, 16), (16,), (16,))]
        plain = [t.clone() for t in ours]
        for leaves, function in (
            (ours, lambda x, w, b, g: nk.residual_linear(x, w, b, norm_weight=g)),
            (plain, lambda x, w, b, g: torch_residual_linear(x, w, b, None, g)),
        ):
            for t in leaves:
                t.requires_grad_()
            (function(*leaves) ** 2).sum().backward()
        for a, e in zip(ours, plain):
            torch.testing.assert_close(a.grad, e.grad, rtol=1e-4, atol=1e-4)


@needs_gpu
def test_linear_offsets_beyond_31_bits(linear_path):
    """A weight of more than 2³¹ elements: its last rows are those that count."""
    n, k = 65_600, 32_768
    if torch.cuda.mem_get_info()[0] < 3 * n * k * 2 or linear_path == "plain":
        pytest.skip("PyTorch's way, or too little memory")
    weight = torch.zeros(n, k, dtype=torch.bfloat16, device=DEVICE)
    weight[-16:] = make(16, k, dtype=torch.bfloat16, scale=k**-0.5)
    gamma = torch.ones(k, dtype=torch.bfloat16, device=DEVICE)
    for m in (1, 4):
        x = make(m, k, dtype=torch.bfloat16)
        out = nk.norm_linear(x, gamma, weight)
        few = [x, gamma, weight[-16:].clone(), None]
        assert_exact(out[:, -16:], torch_norm_linear, few)
        assert not out[:, :-16].any()
    del weight
    gc.collect()
    torch.cuda.empty_cache()


# ---- Linears with quantized weights --------------------------------------------------------------

FORMATS = ["int8", "fp8", "int4"]
QUANTIZED_ROWS = [1, 2, 3, 8, 9, 16, 17, 40]
# (K, N): K of whole granules of 16 bytes or not, odd, shorter and longer than a block's step.
QUANTIZED_SHAPES = [(64, 64), (136, 90), (37, 37), (1031, 70), (4096, 24), (2048, 264)]


def quantized(n: int, k: int, format: str) -> tuple[Tensor, Tensor]:
    weight, scale = nk.quantize(make(n, k, dtype=torch.float32, scale=k**-0.5), format)
    return weight.to(DEVICE), scale.to(DEVICE)


def dequantizing(torch_function, weight: Tensor, scale: Tensor, k: int):
    """torch_function where its weight, None, is the dequantized one in the dtype of x."""

    def function(x, *inputs):
        dense = nk.dequantize(weight.to(x.device), scale.to(x.device), k, x.dtype)
        position = 0 if torch_function is torch_residual_linear else 1
        return torch_function(x, *inputs[:position], dense, *inputs[position + 1 :])

    return function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k, n", QUANTIZED_SHAPES)
def test_linear_quantized(linear_path, format, dtype, k, n):
    weight, scale = quantized(n, k, format)
    gate_up, gate_up_scale = quantized(2 * n, k, format)
    b, gamma = make(n, dtype=dtype), make(k, dtype=dtype)
    for m in QUANTIZED_ROWS:
        x, residual = make(m, k, dtype=dtype), make(m, n, dtype=dtype)
        function = dequantizing(torch_residual_linear, weight, scale, k)
        for bias, norm in ((b, gamma), (None, None)):
            poison(m, n, dtype=dtype)
            actual = nk.residual_linear(
                x, weight, bias, residual, norm_weight=norm, weight_scale=scale
            )
            assert_exact(actual, function, [x, None, bias, residual, norm])
        poison(m, n, dtype=dtype)
        actual = nk.norm_linear(x, gamma, weight, b, weight_scale=scale)
        function = dequantizing(torch_norm_linear, weight, scale, k)
        assert_exact(actual, function, [x, gamma, None, b])
        actual = nk.norm_swiglu(x, gamma, gate_up, weight_scale=gate_up_scale)
        function = dequantizing(torch_norm_swiglu, gate_up, gate_up_scale, k)
        assert_exact(actual, function, [x, gamma, None])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [1, 5, 12, 33])
def test_linear_quantized_strided_weights_equal_contiguous_ones(linear_path, format, m):
    k, n = 208, 24
    weight, scale = quantized(2 * n, k, format)
    x, residual = make(m, k, dtype=torch.bfloat16), make(m, n, dtype=torch.bfloat16)
    wide = torch.full((n, weight.shape[1] + 19), 127, dtype=torch.uint8, device=DEVICE)
    shifted = wide.view(weight.dtype)[:, 3 : 3 + weight.shape[1]]  # rows begin anywhere
    shifted.copy_(weight[:n])
    views = [
        (weight[::2], scale[::2]),
        (weight[n:], scale[n:]),
        (weight.T.contiguous().T[:n], scale[:n]),
        (shifted, scale[:n]),
    ]
    for w, s in views:
        dense = nk.dequantize(w.contiguous(), s.contiguous(), k, torch.float64)
        actual = nk.residual_linear(x, w, None, residual, weight_scale=s)
        function = dequantizing(torch_residual_linear, w.contiguous(), s.contiguous(), k)
        assert_exact(actual, function, [x, None, None, residual, None])
        assert dense.isfinite().all()


@pytest.mark.parametrize("m", [1, 3, 12, 20])
def test_linear_quantized_every_fp8_number_means_what_pytorch_says(linear_path, m):
    """Subnormals and NaN too: one weight each, times one."""
    for dtype in DTYPES:
        for k in (1, 16):
            weight = torch.zeros(256, k, dtype=torch.uint8, device=DEVICE)
            weight[:, 0] = torch.arange(256)
            x = torch.zeros(m, k, dtype=dtype, device=DEVICE)
            x[:, 0] = 1
            zero, one = torch.zeros(m, 256, dtype=dtype, device=DEVICE), torch.ones(256)
            weight = weight.view(torch.float8_e4m3fn)
            out = nk.residual_linear(x, weight, None, zero, weight_scale=one.to(DEVICE))
            expected = weight[:, 0].to(dtype).expand(m, 256)
            assert torch.equal(out.isnan(), expected.isnan())
            assert torch.equal(out.nan_to_num(0), expected.nan_to_num(0))


def quantized_layer(d: int, format: str):
    weight, scale = quantized(d, d, format)
    gate_up, gate_up_scale = quantized(2 * d, d, format)
    g = make(d, dtype=torch.bfloat16, scale=0.3)

    def layer(x: Tensor) -> Tensor:
        h = nk.residual_linear(x, weight, g, norm_weight=g, weight_scale=scale)
        y = nk.norm_swiglu(h, g, gate_up, weight_scale=gate_up_scale)
        y = nk.residual_linear(y, weight, None, h, weight_scale=scale)
        return y + nk.norm_linear(h, g, weight, weight_scale=scale)

    return layer


@pytest.mark.parametrize("format", FORMATS)
def test_linear_quantized_is_deterministic(linear_path, format):
    layer = quantized_layer(1024, format)
    for m in (1, 4, 16, 17, 64):
        x = make(m, 1024, dtype=torch.bfloat16)
        first = layer(x)
        assert all(torch.equal(first, layer(x)) for _ in range(5))


@needs_gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [1, 4, 16, 40])
def test_linear_quantized_in_a_cuda_graph(linear_path, format, m):
    layer, x = quantized_layer(512, format), make(m, 512, dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(out, layer(x))


@needs_gpu
@pytest.mark.parametrize("format", FORMATS)
def test_linear_quantized_weights_are_never_there_as_a_whole(linear_path, format):
    """Many rows: of a weight of 512 MiB in bfloat16 a slab at a time is dequantized."""
    if linear_path == "plain":
        pytest.skip("PyTorch dequantizes all of it")
    n = k = 16384
    weight, scale = (
        t.repeat(n // 512, 1)[:n] if t.dim() == 2 else t.repeat(n // 512)
        for t in quantized(512, k, format)
    )
    x, residual = make(64, k, dtype=torch.bfloat16), make(64, n, dtype=torch.bfloat16)
    out = nk.residual_linear(x, weight, None, residual, weight_scale=scale)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = nk.residual_linear(x, weight, None, residual, weight_scale=scale)
    assert torch.cuda.memory_allocated() <= before
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= (32 + 32 << 20) + 2 * out.nbytes  # a slab, and what cuBLASLt may ask for
    function = dequantizing(torch_residual_linear, weight[-512:], scale[-512:], k)
    last = residual[:, -512:].contiguous()
    assert_exact(out[:, -512:], function, [x, None, None, last, None])


# ---- Covariance ----------------------------------------------------------------------------------


def accumulate(splits, f, t, b=None, mask=None) -> nk.CovarianceAccumulator:
    dims = f.shape[1], t.shape[1]
    block_dim = 0 if b is None else b.shape[1]
    acc = nk.CovarianceAccumulator(*dims, block_dim=block_dim, device=DEVICE)
    for start in range(0, len(f), splits):
        part = slice(start, start + splits)
        acc.update(
            f[part].to(DEVICE),
            t[part].to(DEVICE),
            None if b is None else b[part].to(DEVICE),
            mask=None if mask is None else mask[part].to(DEVICE),
        )
    return acc


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(101, 60, 49), (128, 128, 128), (264, 136, 72)], ids=str)
def test_covariance_of_hard_inputs(gram_path, dtype, dims):
    f, t, b = (hard_tokens(3000, d, dtype, seed=d) for d in dims)
    assert_moments_exact(on_cpu(accumulate(3000, f, t, b).moments()), f, t, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 7, 300, 1000])
def test_covariance_splitting_does_not_matter(gram_path, dtype, splits):
    n = 200 if splits == 1 else 2600
    f, t = hard_tokens(n, 64, dtype, 1), hard_tokens(n, 48, dtype, 2)
    assert_moments_exact(on_cpu(accumulate(splits, f, t).moments()), f, t)


@pytest.mark.parametrize("d_f, d_t", [(1, 1), (2, 49), (97, 3), (128, 256), (385, 1), (520, 136)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_covariance_of_odd_dimensions(gram_path, d_f, d_t, dtype):
    for n in (1, 63, 257):
        f, t = hard_tokens(n, d_f, dtype, 1), hard_tokens(n, d_t, dtype, 2)
        acc = accumulate(n, f, t)
        state, exact = acc.state_dict(), nk.covariance_update_ref(f, t)
        assert int(state["count"]) == n
        for pair in ("ff", "tf", "tt"):
            actual, expected = state[f"gram_{pair}"].cpu(), exact[f"sum_{pair}"]
            if pair[0] == pair[1]:
                actual, expected = actual.triu(), expected.triu()
            assert (actual - expected).norm() <= 1e-6 * expected.norm()


def test_covariance_outliers_and_constant_channels(gram_path):
    f = hard_tokens(4000, 80, torch.bfloat16)
    f[::50, :] *= -0.3
    f[7, 0], f[9, 3] = 1e5, -3e4
    assert_moments_exact(on_cpu(accumulate(4000, f, f[:, :20]).moments()), f, f[:, :20])
    f = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    f[0, 5] = 3000.0
    f[:, 2], f[:, 6] = 3.0, 0.0
    m = on_cpu(accumulate(500, f, f[:, :8]).moments())
    assert m.cov_ff[2].abs().max() < 1e-12 and m.cov_ff[6].abs().max() == 0


def test_covariance_of_many_tokens(gram_path):
    """More than one chunk of tokens, more than one tile in each direction."""
    f, t = hard_tokens(20000, 200, torch.bfloat16, 1), hard_tokens(20000, 120, torch.bfloat16, 2)
    assert_moments_exact(on_cpu(accumulate(20000, f, t).moments()), f, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_covariance_masked_tokens_are_not_looked_at(gram_path, dtype):
    f, t = hard_tokens(700, 72, dtype, 1), hard_tokens(700, 40, dtype, 2)
    mask = torch.rand(700, generator=torch.Generator().manual_seed(0)) < 0.6
    bad_f, bad_t = f.clone(), t.clone()
    bad_f[~mask], bad_t[~mask] = math.nan, math.inf
    acc = accumulate(700, bad_f, bad_t, mask=mask)
    assert_moments_exact(on_cpu(acc.moments()), f[mask], t[mask])
    nothing = torch.zeros(700, dtype=torch.bool, device=DEVICE)
    acc.update(bad_f.to(DEVICE), bad_t.to(DEVICE), mask=nothing)
    assert acc.count == int(mask.sum())


def test_covariance_strided_and_unaligned_inputs(gram_path):
    wide = hard_tokens(300, 180, torch.bfloat16).to(DEVICE)
    for start in (0, 1, 8):
        f, t = wide[:, start : start + 80], wide[:, start + 80 : start + 160]
        for f_view, t_view in [(f, t), (f.T.contiguous().T, t.T.contiguous().T), (f[::2], t[::2])]:
            m = on_cpu(accumulate(300, f_view, t_view).moments())
            assert_moments_exact(m, f_view.cpu(), t_view.cpu())


def test_covariance_is_deterministic(gram_path):
    f, t = hard_tokens(5000, 264, torch.bfloat16), hard_tokens(5000, 136, torch.bfloat16, 1)
    states = [accumulate(2500, f, t).state_dict() for _ in range(4)]
    for state in states[1:]:
        for name, expected in states[0].items():
            square = expected.dim() == 2 and expected.shape[0] == expected.shape[1]
            a, e = (v.triu() if square else v for v in (state[name], expected))
            assert torch.equal(a, e), name


@needs_gpu
def test_covariance_hopper_agrees_with_portable():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU is no Hopper")
    states = {}
    try:
        for path in ("portable", "hopper"):
            nk.set_cuda_path("gram", path)
            f, t = hard_tokens(8192, 520, torch.bfloat16), hard_tokens(8192, 264, torch.bfloat16, 1)
            states[path] = accumulate(4096, f, t).state_dict()
    finally:
        nk.set_cuda_path("gram", "auto")
    assert torch.equal(states["portable"]["count"], states["hopper"]["count"])
    for name in ("sums", "gram_tf"):
        a, e = states["hopper"][name], states["portable"][name]
        assert (a - e).norm() <= 1e-6 * e.norm(), name
    for name in ("gram_ff", "gram_tt"):
        a, e = states["hopper"][name].triu(), states["portable"][name].triu()
        assert (a - e).norm() <= 1e-6 * e.norm(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_covariance_non_finite_tokens_are_refused_and_nothing_is_added(gram_path, dtype, value):
    f, t = torch.randn(600, 24).to(dtype), torch.randn(600, 16).to(dtype)
    acc = accumulate(600, f, t)
    before = acc.state_dict()
    t[417, 3] = value
    match = "must be finite" if gram_path == "plain" else "targets must be finite.*token 417"
    with pytest.raises(RuntimeError, match=match):
        acc.update(f.to(DEVICE), t.to(DEVICE))
    assert all(torch.equal(before[k], v) for k, v in acc.state_dict().items())
    t[417, 3] = 0  # and the accumulator goes on
    acc.update(f.to(DEVICE), t.to(DEVICE))
    assert acc.count == 1200


def test_covariance_empty_updates(gram_path):
    acc = nk.CovarianceAccumulator(3, 2, device=DEVICE)
    acc.update(torch.zeros(0, 3, device=DEVICE), torch.zeros(0, 2, device=DEVICE))
    assert acc.count == 0
    acc.update(torch.ones(3, device=DEVICE), torch.ones(2, device=DEVICE))
    assert torch.equal(acc.moments(ddof=0).mean_features.cpu(), torch.ones(3).double())


def test_covariance_errors_name_the_argument(gram_path):
    acc = nk.CovarianceAccumulator(4, 3, device=DEVICE)
    f, t = torch.randn(10, 4, device=DEVICE), torch.randn(10, 3, device=DEVICE)
    cases = [
        (lambda: acc.update(t, t), ValueError, r"features must have shape \(10, 4\)"),
        (lambda: acc.update(f, t, mask=f[:, 0]), TypeError, "mask must be a bool tensor"),
    ]
    if ON_GPU:
        cases.append((lambda: acc.update(f.cpu(), t), ValueError, "features must be on cuda"))
    if gram_path != "plain":
        cases += [
            (lambda: acc.update(f, t.bfloat16()), RuntimeError, "targets must have the dtype"),
            (lambda: acc.update(f.double(), t.double()), RuntimeError, "features must be float32"),
        ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    assert acc.count == 0


def test_covariance_gram_matrices_left_out(gram_path):
    f, t, b = (hard_tokens(600, d, torch.bfloat16, seed=d).to(DEVICE) for d in (264, 72, 40))
    full = nk.CovarianceAccumulator(264, 72, block_dim=40, device=DEVICE).state_dict()
    names = [name for name in full if name.startswith("gram")]
    for left_out in (*([name] for name in names), names[::2], names):
        state = {k: torch.zeros_like(v[:0] if k in left_out else v) for k, v in full.items()}
        torch.ops.nbl.covariance_update(f, t, b, None, *state.values())
        if not full["count"]:
            torch.ops.nbl.covariance_update(f, t, b, None, *full.values())
        for name, value in state.items():
            if name not in left_out:
                assert (value - full[name]).double().norm() <= 1e-6 * full[name].double().norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_of_features_with_a_memory(gram_path, dtype):
    f, t = texts(6, 200, 40, dtype, mean=20.0)
    mask = torch.rand(6, 200, generator=torch.Generator().manual_seed(0)) < 0.8
    starts = torch.rand(6, 200, generator=torch.Generator().manual_seed(1)) < 0.02
    exact = memory_moments(f, t, (1, 3), (0.6, 0.95), mask, starts)
    acc = nk.MemoryAccumulator(40, 40, lags=(1, 3), device=DEVICE)
    f, t = (torch.where(mask[..., None], x, float("nan")).to(DEVICE) for x in (f, t))
    acc.update(f, t, mask=mask.to(DEVICE), starts=starts.to(DEVICE))
    assert_moments_right(on_cpu(acc.moments()), exact, 40, dtype, means=True)
    before = acc.state_dict()
    f[2, mask[2].nonzero()[0, 0], 3] = float("inf")
    with pytest.raises(RuntimeError, match="must be finite"):
        acc.update(f, t, mask=mask.to(DEVICE))
    assert all(torch.equal(before[k], v) for k, v in acc.state_dict().items())


def test_covariance_opcheck_and_compile(gram_path):
    f, t, b = (torch.randn(12, d, device=DEVICE) for d in (5, 4, 3))
    state = nk.CovarianceAccumulator(5, 4, block_dim=3, device=DEVICE).state_dict().values()
    mask = torch.rand(12, device=DEVICE) < 0.7
    torch.library.opcheck(torch.ops.nbl.covariance_update.default, (f, t, b, mask, *state))

    acc, compiled_acc = (nk.CovarianceAccumulator(6, 6, device=DEVICE) for _ in range(2))

    def step(a, x):
        a.update(x, x * 2)
        return x + 1

    x = torch.randn(30, 6, device=DEVICE)
    torch.compiler.reset()
    torch.compile(step, fullgraph=True)(compiled_acc, x)
    step(acc, x)
    assert torch.equal(acc.moments().cov_tf, compiled_acc.moments().cov_tf)


@needs_gpu
def test_covariance_on_a_side_stream(gram_path):
    f, t = hard_tokens(3000, 136, torch.bfloat16), hard_tokens(3000, 72, torch.bfloat16, 1)
    source_f, source_t = f.to(DEVICE), t.to(DEVICE)
    late_f, late_t = torch.zeros_like(source_f), torch.zeros_like(source_t)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        acc = nk.CovarianceAccumulator(136, 72, device=DEVICE)
        torch.cuda._sleep(50_000_000)
        late_f.copy_(source_f)
        late_t.copy_(source_t)
        acc.update(late_f, late_t)
        moments = acc.moments()
    side.synchronize()
    assert_moments_exact(on_cpu(moments), f, t)


@needs_gpu
def test_covariance_offsets_beyond_31_bits(gram_path):
    """Features of more than 2³¹ elements, of which the mask leaves the last tokens."""
    n, d = 530_000, 4096
    if gram_path == "plain" or torch.cuda.mem_get_info()[0] < 4 * n * d * 2:
        pytest.skip("PyTorch's way, or too little memory")
    f = torch.zeros(n, d, dtype=torch.bfloat16, device=DEVICE)
    t = torch.zeros(n, 8, dtype=torch.bfloat16, device=DEVICE)
    last_f, last_t = hard_tokens(300, d, torch.bfloat16), hard_tokens(300, 8, torch.bfloat16, 1)
    f[-300:], t[-300:] = last_f.to(DEVICE), last_t.to(DEVICE)
    mask = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    mask[-300:] = True
    acc = nk.CovarianceAccumulator(d, 8, device=DEVICE)
    acc.update(f, t, mask=mask)
    exact = last_t.double().T @ last_f.double()
    assert acc.count == 300
    assert (acc.state_dict()["gram_tf"].cpu() - exact).norm() <= 1e-6 * exact.norm()
    del f
    gc.collect()
    torch.cuda.empty_cache()


# ---- Solves --------------------------------------------------------------------------------------


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-8) -> bool:
    return bool((actual.cpu() - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("d_f, d_t", [(24, 24), (40, 7), (5, 60), (130, 128), (512, 512)])
def test_solve_agrees_with_the_cpu(solve_path, bias, rank, d_f, d_t):
    layers = [exact_moments(*tokens(4 * (d_f + d_t), d_f, d_t, seed)) for seed in range(3)]
    expected = nk.lmmse_solve(layers, bias=bias, rank=rank)
    solved = nk.lmmse_solve([m.to(DEVICE) for m in layers], bias=bias, rank=rank)
    assert solved.weight.device.type == torch.device(DEVICE).type
    for i in range(3):
        assert close(solved.weight[i], expected.weight[i])
        assert not bias or close(solved.bias[i], expected.bias[i])
        if rank is not None:
            u, v = (factor[i].cpu() for factor in solved.factors)
            assert u.shape == (d_t, rank) and v.shape == (rank, d_f)
            assert close(u @ v, expected.weight[i])
    assert close(solved.nmse, expected.nmse) and torch.equal(solved.ridge.cpu(), expected.ridge)


@pytest.mark.parametrize("block", [False, True])
def test_solve_bounds_agree_with_the_cpu(solve_path, block):
    layers = []
    for seed in range(3):
        f, t = tokens(900, 64, 64, seed)
        layers.append(exact_moments(f, t, f + t.sin() if block else None))
    moved = [m.to(DEVICE) for m in layers]
    assert close(nk.cca_bound(moved), nk.cca_bound(layers))
    rho = nk.canonical_correlations(layers)
    assert close(nk.canonical_correlations(moved), rho, 1e-7)


@pytest.mark.parametrize("case", ["duplicate", "constant", "few tokens"])
def test_solve_regularizes_and_reports_singular_moments(solve_path, case):
    f, t = tokens(12 if case == "few tokens" else 300, 20, 6)
    if case == "duplicate":
        f[:, 7] = f[:, 3]
    if case == "constant":
        f[:, 4] = 2.0
    m = exact_moments(f, t)
    with pytest.warns(UserWarning, match="singular to working precision"):
        expected = nk.lmmse_solve(m, ridge=0.0)
    with pytest.warns(UserWarning, match="singular to working precision"):
        solved = nk.lmmse_solve(m.to(DEVICE), ridge=0.0)
    # How much is needed is a matter of rounding; what it predicts is not.
    assert 0 < float(solved.ridge) <= max(1e-6, 10 * float(expected.ridge))
    assert float(solved.nmse) == pytest.approx(float(expected.nmse), rel=1e-3, abs=1e-6)


def test_solve_refuses_what_is_not_a_covariance(solve_path):
    good = exact_moments(*tokens(200, 6, 6)).to(DEVICE)
    bad = dataclasses.replace(good, cov_ff=-good.cov_ff)
    nan = dataclasses.replace(good, cov_ff=good.cov_ff * math.nan)
    with pytest.raises(ValueError, match=r"moments\[1\].*positive"):
        nk.lmmse_solve([good, bad])
    with pytest.raises(ValueError, match=r"moments\[1\].cov_ff must be finite"):
        nk.lmmse_solve([good, nan])


def test_solve_is_deterministic(solve_path):
    m = exact_moments(*tokens(900, 128, 96)).to(DEVICE)
    first = nk.lmmse_solve([m, m])
    assert torch.equal(first.weight[0], first.weight[1])
    again = nk.lmmse_solve([m, m])
    assert torch.equal(first.weight, again.weight) and torch.equal(first.nmse, again.nmse)


# ---- Rotation and cache append ------------------------------------------------------------------


def rope_inputs(*shape: int, dtype: torch.dtype, norm: bool = False) -> dict[str, Tensor]:
    return {name: t.to(DEVICE) for name, t in make_inputs(*shape, dtype, norm).items()}


def same_rope(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same bits from both, in q and in the caches."""
    assert torch.equal(nk.rope_append(**actual), nk.rope_append(**expected))
    for name in ("key_cache", "value_cache"):
        assert torch.equal(actual[name], expected[name])


def rope_copy(a: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in a.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "shape",
    [*ROPE_SHAPES, (3, 17, 32, 8, 128, 128), (2, 70, 5, 3, 80, 32), (1, 3, 2, 1, 640, 602)],
    ids=str,
)
def test_rope_against_float64(rope_path, dtype, norm, shape):
    a = rope_inputs(*shape, dtype=dtype, norm=norm)
    poison(*shape[:3], shape[4], dtype=dtype)
    assert_right(a)
    a["slots"][0, ::2] = -1
    assert_right(a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_rope_strided_and_unaligned(rope_path, dtype, offset):
    """The same bits with and without 16-byte accesses, and nothing written beside the rows."""
    dense = rope_inputs(2, 5, 4, 2, 64, 48, dtype=dtype, norm=True)

    def apart(t: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.full((*t.shape[:-1], t.shape[-1] + 16), -7, dtype=t.dtype, device=DEVICE)
        return rows, rows[..., offset : offset + t.shape[-1]].copy_(t)

    for names in (dense.keys() - {"positions", "slots"}, {"qkv"}, {"key_cache"}, {"cos", "sin"}):
        a = rope_copy(dense)
        rows = {}
        for name in names:
            rows[name], a[name] = apart(a[name])
        around = {name: (r == -7).sum() for name, r in rows.items()}
        same_rope(a, rope_copy(dense))
        assert all((r == -7).sum() == around[name] for name, r in rows.items())
    for name in ("qkv", "key_cache", "value_cache"):  # other dimensions outermost
        a = rope_copy(dense)
        a[name] = a[name].transpose(1, 2).contiguous().transpose(1, 2)
        same_rope(a, rope_copy(dense))


def test_rope_broadcasts_positions_and_slots(rope_path):
    a = rope_inputs(3, 4, 2, 1, 16, 16, dtype=torch.float32)
    row, token = (torch.tensor(v, device=DEVICE) for v in ([4, 2, 7, 0], [[5], [0], [2]]))
    for positions in (row, row[None], token):
        for slots in (row, row[None], torch.tensor([-1], device=DEVICE)):
            assert_right(a | {"positions": positions, "slots": slots})


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_tokens_out_of_range_give_nan_and_write_nothing(dtype):
    """Of the kernel alone: PyTorch's operations would end the process."""
    nk.set_cuda_path("rope", "kernel")
    try:
        clean = rope_inputs(2, 4, 3, 2, 64, 48, dtype=dtype, norm=True)
        unwritten = rope_copy(clean)
        unwritten["slots"][1, 2] = -1
        q = nk.rope_append(**unwritten)
        for name, value in (("positions", 19), ("positions", -1), ("slots", 9), ("slots", 2**62)):
            a = rope_copy(clean)
            a[name][1, 2] = value
            bad = nk.rope_append(**a)
            assert bad[1, :, 2].isnan().all()
            bad[1, :, 2] = q[1, :, 2]
            assert torch.equal(bad, q)
            assert torch.equal(a["key_cache"], unwritten["key_cache"])
            assert torch.equal(a["value_cache"], unwritten["value_cache"])
    finally:
        nk.set_cuda_path("rope", "auto")


def test_rope_empty(rope_path):
    for batch, length in [(0, 3), (2, 0)]:
        a = rope_inputs(batch, length, 4, 2, 16, 16, dtype=torch.float32)
        assert nk.rope_append(**a).shape == (batch, 4, length, 16)


def test_rope_errors_name_the_argument(rope_path):
    a = rope_inputs(2, 3, 4, 2, 16, 16, dtype=torch.float32)
    cases = {
        "key_cache must have shape": {"key_cache": a["key_cache"][:1]},
        "value_cache must have the dtype of qkv": {"value_cache": a["value_cache"].half()},
        "cos must be float32": {"cos": a["cos"].double()},
        "slots must be int64": {"slots": a["slots"].int()},
        "positions must broadcast": {"positions": a["positions"][:, :2]},
    }
    if ON_GPU:
        cases["slots must be on the device of qkv"] = {"slots": a["slots"].cpu()}
    for message, changes in cases.items():
        with pytest.raises(RuntimeError, match=f"rope_append: {message}"):
            nk.rope_append(**(a | changes))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_in_a_cuda_graph(rope_path, dtype):
    """Replayed with other tokens, positions and slots."""
    a = rope_inputs(3, 1, 8, 2, 128, 128, dtype=dtype, norm=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        nk.rope_append(**a)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = nk.rope_append(**a)
    for seed in range(3):
        new = make_inputs(3, 1, 8, 2, 128, 128, dtype, norm=True, seed=seed)
        new["slots"][seed % 3] = -1
        for name, t in new.items():
            a[name].copy_(t)
        expected = rope_copy(a)
        graph.replay()
        assert torch.equal(q, nk.rope_append(**expected))
        assert torch.equal(a["key_cache"], expected["key_cache"])
        assert torch.equal(a["value_cache"], expected["value_cache"])


@needs_gpu
def test_rope_keeps_the_order_of_the_stream():
    """Between a projection whose result it reads and an attention that reads what it appends."""
    for op in ("linear", "rope"):
        nk.set_cuda_path(op, "kernel")
    try:
        a = rope_inputs(4, 1, 8, 2, 64, 64, dtype=torch.bfloat16)
        w, gamma = (
            make(12 * 64, 256, dtype=torch.bfloat16, scale=0.06),
            make(256, dtype=torch.bfloat16),
        )
        out = make(256, 8 * 64, dtype=torch.bfloat16, scale=0.04)

        def chain(wait: bool) -> Tensor:
            x, caches = make(4, 1, 256, dtype=torch.bfloat16), rope_copy(a)
            for step in range(20):
                slots = torch.full((4, 1), step % 6, device=DEVICE)
                qkv = nk.norm_linear(x, gamma, w).view(4, 1, 12, 64)
                q = nk.rope_append(**(caches | {"qkv": qkv, "slots": slots}))
                keys, values = (
                    caches[name][:4].repeat_interleave(4, dim=1)
                    for name in ("key_cache", "value_cache")
                )
                y = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
                x = nk.residual_linear(y.transpose(1, 2).reshape(4, 1, -1), out, residual=x)
                if wait:
                    torch.cuda.synchronize()
            return x

        waited = chain(True)
        assert waited.isfinite().all()
        assert all(torch.equal(chain(False), waited) for _ in range(5))
    finally:
        for op in ("linear", "rope"):
            nk.set_cuda_path(op, "auto")


def test_rope_is_deterministic(rope_path):
    a = rope_inputs(3, 40, 8, 4, 128, 128, dtype=torch.bfloat16, norm=True)
    for _ in range(5):
        same_rope(rope_copy(a), rope_copy(a))


def test_rope_opcheck_and_compile(rope_path):
    a = rope_inputs(2, 3, 4, 2, 16, 12, dtype=torch.float32)
    torch.library.opcheck(torch.ops.nbl.rope_append.default, (*a.values(), None, None, 1e-5))
    expected = rope_copy(a)
    torch.compiler.reset()
    compiled = torch.compile(lambda a: nk.rope_append(**a) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(a), nk.rope_append(**expected) + 1)
    torch.testing.assert_close(a["key_cache"], expected["key_cache"])


@needs_gpu
def test_rope_offsets_beyond_31_bits(rope_path):
    """Caches of more than 2³¹ elements each: the last slots are those that count."""
    length = (1 << 31) // 128 + 64
    if rope_path == "plain" or torch.cuda.mem_get_info()[0] < 6 * length * 128 * 2:
        pytest.skip("PyTorch's way, or too little memory")
    a = rope_inputs(1, 9, 2, 1, 128, 128, dtype=torch.bfloat16)
    small = rope_copy(a)
    for name in ("key_cache", "value_cache"):
        a[name] = torch.zeros(1, 1, length, 128, dtype=torch.bfloat16, device=DEVICE)
        a[name][0, 0, -14:] = small[name][0, 0]
    q = nk.rope_append(**(a | {"slots": a["slots"] + length - 14}))
    assert torch.equal(q, nk.rope_append(**small))
    for name in ("key_cache", "value_cache"):
        assert torch.equal(a[name][0, 0, -14:], small[name][0, 0])
        assert not a[name][0, 0, :-14].any()
    del a
    gc.collect()
    torch.cuda.empty_cache()


# ---- Linear maps with a memory -------------------------------------------------------------------


def scan_inputs(*shape: int, **options) -> dict[str, object]:
    a = make_scan(*shape, **options)
    return {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in a.items()}


def same_scan(actual: dict[str, object], expected: dict[str, object]) -> None:
    """The same bits from both, in the result and in what is remembered."""
    assert torch.equal(nk.memory_scan(**actual), nk.memory_scan(**expected))
    for name in ("state", "history"):
        if isinstance(actual.get(name), Tensor):
            assert torch.equal(actual[name], expected[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("masked, started", [(False, False), (True, False), (True, True)])
def test_memory_against_float64(memory_path, dtype, filters, masked, started):
    """One token, a chunk, a token more, several; tails of a block's channels."""
    cases = [(3, 1, 64, 64), (1, 64, 40, 7), (2, 65, 96, 130), (2, 300, 48, 24)]
    for seed, (batch, length, k, r) in enumerate(cases):
        options = {"masked": masked, "started": started, "history": 3, "seed": seed}
        options |= {"map_u": seed % 2 == 0, "norm": seed < 2}
        a = scan_inputs(batch, length, k, r, k, dtype=dtype, filters=filters, **options)
        poison(batch, length, r, dtype=dtype)
        assert_scan_right(a)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_memory_quantized(memory_path, format):
    for length in (1, 70):
        a = scan_inputs(2, length, 256, 128, 256, dtype=torch.bfloat16, norm=True)
        for name in ("weight_v", "weight_u"):
            weight, scale = nk.quantize(a[name].float(), format)
            a |= {name: weight, f"{name}_scale": scale}
        assert_scan_right(a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_strided(memory_path, dtype):
    """The same bits from views, and nothing written beside the rows."""
    for length in (1, 70):
        options = {"masked": True, "started": True, "history": 2, "map_u": False}
        a = scan_inputs(3, length, 24, 70, 70, dtype=dtype, **options)
        views, storages = dict(a), {}
        for name in ("x", "residual", "state", "history", "mask", "starts"):
            sizes = [*(2 * n for n in a[name].shape[:-1]), a[name].shape[-1] + 3]
            storages[name] = torch.full(sizes, 1, dtype=a[name].dtype, device=DEVICE)
            rows = tuple(slice(1, None, 2) for _ in sizes[:-1])
            views[name] = storages[name][(*rows, slice(2, -1))].copy_(a[name])
        same_scan(views, copied(a))
        for name in ("state", "history"):
            views[name].fill_(1)
            assert (storages[name] == 1).all()


def test_memory_empty(memory_path):
    for batch, length, r in [(0, 3, 8), (2, 0, 8), (2, 3, 0)]:
        for map_u in (False, True):
            a = scan_inputs(batch, length, 16, r, 16, map_u=map_u, history=2)
            before = a["state"].clone()
            assert nk.memory_scan(**a).shape == a["residual"].shape
            assert torch.equal(a["state"], before)


def test_memory_errors_name_the_argument(memory_path):
    a = scan_inputs(2, 3, 16, 8, 16, history=2)
    cases = {
        "weight_v must have shape": {"weight_v": a["weight_v"][1:]},
        "state must be float32": {"state": a["state"].half()},
        "history must have shape": {"history": torch.ones(2, 4, 3, 8, device=DEVICE)},
        "mask must be bool": {"mask": torch.ones(2, 3, device=DEVICE)},
    }
    if ON_GPU:
        cases["state must be on the device of x"] = {"state": a["state"].cpu()}
    for message, changes in cases.items():
        with pytest.raises(RuntimeError, match=f"memory_scan: {message}"):
            nk.memory_scan(**(a | changes))


def test_memory_however_tokens_are_split(memory_path):
    """A prompt at once, in parts or token by token: within the rule of one call."""
    a = scan_inputs(2, 150, 64, 24, 64, dtype=torch.bfloat16)
    exact = {n: v.double().cpu() if isinstance(v, Tensor) else v for n, v in a.items()}
    expected = nk.memory_scan_ref(**exact)
    torchs = copied(a)
    plain = torch.ops.nbl.memory_scan_plain(*positional(**torchs))
    for cuts in ([0, 150], [0, 64, 150], [0, 1, 70, 71, 150], [*range(151)]):
        state, outs = a["state"].clone(), []
        for begin, end in itertools.pairwise(cuts):
            part = {name: a[name][:, begin:end] for name in ("x", "residual")}
            outs.append(nk.memory_scan(**(a | part | {"state": state})))
        assert_rounding_only(torch.cat(outs, dim=1).cpu(), plain.cpu(), expected)
        both = state.cpu(), torchs["state"].cpu()
        assert_states_rounding_only(*both, exact["state"], torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 100])
def test_memory_in_a_cuda_graph(memory_path, dtype, length):
    """Replayed with other tokens and resets; the state goes on from replay to replay."""
    a = scan_inputs(3, length, 128, 64, 128, dtype=dtype, started=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        nk.memory_scan(**a)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nk.memory_scan(**a)
    for seed in range(3):
        new = make_scan(3, length, 128, 64, 128, dtype, started=True, seed=seed)
        for name in ("x", "residual", "starts"):
            a[name].copy_(new[name])
        expected = copied(a)
        graph.replay()
        assert torch.equal(out, nk.memory_scan(**expected))
        assert torch.equal(a["state"], expected["state"])


@needs_gpu
def test_memory_keeps_the_order_of_the_stream():
    """Decode steps in a row, each of which reads what the one before has written."""
    for op in ("linear", "memory"):
        nk.set_cuda_path(op, "kernel")
    try:
        a = scan_inputs(4, 1, 256, 32, 256, dtype=torch.bfloat16, norm=True)

        def steps(wait: bool) -> tuple[Tensor, Tensor]:
            mine = copied(a) | {"residual": None}
            for _ in range(30):
                mine["x"] = nk.memory_scan(**mine)
                if wait:
                    torch.cuda.synchronize()
            return mine["x"], mine["state"]

        waited = steps(True)
        assert waited[0].isfinite().all()
        for _ in range(5):
            assert all(map(torch.equal, steps(False), waited))
    finally:
        for op in ("linear", "memory"):
            nk.set_cuda_path(op, "auto")


def test_memory_is_deterministic(memory_path):
    a = scan_inputs(3, 200, 64, 100, 64, dtype=torch.bfloat16, masked=True, started=True, history=9)
    for _ in range(5):
        same_scan(copied(a), copied(a))


def test_memory_opcheck_and_compile(memory_path):
    a = scan_inputs(2, 3, 16, 8, 16, norm=True, history=2)
    torch.library.opcheck(torch.ops.nbl.memory_scan.default, positional(**a))
    expected = copied(a)
    torch.compiler.reset()
    compiled = torch.compile(lambda a: nk.memory_scan(**a) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(a), nk.memory_scan(**expected) + 1)
    torch.testing.assert_close(a["state"], expected["state"])


# ---- Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["post-norm", "pre-norm"])
@pytest.mark.parametrize("path", ["kernel", "plain"])
def test_model_from_text_to_tokens(path, features, tiny_model, token_batches):
    """Calibrated, linearized and run on the GPU: as the same model does on the CPU."""
    import nbl

    if ON_GPU:
        for op in ("linear", "gram", "solve", "rope", "memory"):
            nk.set_cuda_path(op, path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tokens are few")
            model = tiny_model("llama").to(DEVICE)
            calibration = nbl.calibrate(model, token_batches(20), features=features, progress=False)
            expected = nbl.calibrate(
                tiny_model("llama"), token_batches(20), features=features, progress=False
            )
            for layer, bound in expected.cca_bounds().items():
                assert calibration.cca_bounds()[layer] == pytest.approx(bound, rel=1e-3)
            nbl.linearize(model, calibration, [1, 3])
        prompt = token_batches(1, batch_size=2, length=9, seed=5)[0].to(DEVICE)
        with torch.no_grad():
            ids = model.generate(prompt, max_new_tokens=8, do_sample=False)
            greedy = prompt
            for _ in range(8):
                logits = model(greedy, use_cache=False).logits
                greedy = torch.cat([greedy, logits[:, -1:].argmax(-1)], dim=-1)
            assert torch.equal(ids, greedy)
            on_gpu = model(ids, use_cache=False).logits.cpu()
            model.cpu()
            on_cpu_logits = model(ids.cpu(), use_cache=False).logits
        torch.testing.assert_close(on_gpu, on_cpu_logits, rtol=1e-3, atol=1e-3)
    finally:
        if ON_GPU:
            for op in ("linear", "gram", "solve", "rope", "memory"):
                nk.set_cuda_path(op, "auto")


@pytest.mark.parametrize("cuda_graphs", [False, True] if ON_GPU else [False])
@pytest.mark.parametrize("path", ["kernel", "plain"])
def test_model_generates_by_the_runner(path, cuda_graphs, family, tiny_model, token_batches):
    """The tokens of the CPU, for prompts of different lengths."""
    import nbl

    prompts = [row[cut:] for row, cut in zip(token_batches(1, length=9, seed=5)[0], (0, 3, 7, 0))]
    expected = nbl.Runner(tiny_model(family), 4, 40).generate(prompts, 12)
    if ON_GPU:
        nk.set_cuda_path("all", path)
    try:
        runner = nbl.Runner(tiny_model(family).to(DEVICE), 4, 40, cuda_graphs=cuda_graphs)
        for _ in range(2):
            assert torch.equal(torch.stack(runner.generate(prompts, 12)), torch.stack(expected))
    finally:
        if ON_GPU:
            nk.set_cuda_path("all", "auto")


@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_model_runs_with_flashinfer(window, cuda_graphs, tiny_model, token_batches):
    """Prompts, and token by token, across pages: as exact as with PyTorch's attention."""
    pytest.importorskip("flashinfer")
    import nbl

    config = {"hidden_size": 256, "head_dim": 64, "sliding_window": window}
    config["initializer_range"] = 0.08  # of wider layers, so that no rounding decides the rest
    ids = token_batches(1, batch_size=3, length=60, seed=5)[0].to(DEVICE)
    prompts = [ids[0], ids[1, 31:], ids[2, 58:]]
    double = tiny_model("mistral", torch.bfloat16, **config).double().to(DEVICE)
    exact = [double(p[None]).logits[0] for p in prompts]
    model = tiny_model("mistral", torch.bfloat16, **config).to(DEVICE)
    runners = [
        nbl.Runner(model, 3, 80, attention=a, cuda_graphs=cuda_graphs, prefill_chunk=90)
        for a in ("flashinfer", "sdpa")
    ]
    for length in (None, 7):
        ours, theirs = (r.logits(prompts, prompt_length=length) for r in runners)
        for row in zip(ours, theirs, exact):
            assert_rounding_only(*row)


# ---- CuPy ----------------------------------------------------------------------------------------


@needs_gpu
def test_interop_with_cupy_arrays(linear_path):
    cupy = pytest.importorskip("cupy")
    x, w, b = (make(*s, dtype=torch.float16, scale=0.2) for s in ((3, 64), (64, 64), (64,)))
    arrays = [cupy.from_dlpack(t) for t in (x, w, b)]
    expected = nk.residual_linear(x, w, b)
    assert torch.equal(torch.from_dlpack(nk.residual_linear(*arrays)), expected)
    stream = cupy.cuda.Stream(non_blocking=True)
    late = cupy.zeros_like(arrays[0])
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(200):  # x is there late, on CuPy's stream alone
            cupy.linalg.norm(cupy.ones((512, 512)) @ cupy.ones((512, 512)))
        late[:] = arrays[0]
        out = nk.residual_linear(late, *arrays[1:])
    stream.synchronize()
    assert torch.equal(torch.from_dlpack(out), expected)


@needs_gpu
def test_interop_accumulates_cupy_arrays(gram_path):
    cupy = pytest.importorskip("cupy")
    f, t = hard_tokens(500, 40, torch.float16), hard_tokens(500, 24, torch.float16, 1)
    acc = nk.CovarianceAccumulator(40, 24, device=DEVICE)
    acc.update(cupy.from_dlpack(f.to(DEVICE)), cupy.from_dlpack(t.to(DEVICE)))
    assert_moments_exact(on_cpu(acc.moments()), f, t)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_interop_kernels_built_by_cupy(dtype):
    """nbl_kernels.jit: the same kernels, compiled by NVRTC."""
    cupy = pytest.importorskip("cupy")
    from nbl_kernels import jit

    for k, n in SHAPES[:5]:
        w, up = make(n, k, dtype=dtype, scale=k**-0.5), make(2 * n, k, dtype=dtype, scale=k**-0.5)
        g, b = make(k, dtype=dtype), make(n, dtype=dtype)
        for m in (1, 2, 5, 16):
            x, r = make(m, k, dtype=dtype), make(m, n, dtype=dtype)
            cx, cw, cup, cg, cb, cr = (cupy.from_dlpack(t) for t in (x, w, up, g, b, r))
            for actual, function, inputs in [
                (
                    jit.residual_linear(cx, cw, cb, cr, norm_weight=cg),
                    torch_residual_linear,
                    [x, w, b, r, g],
                ),
                (jit.norm_linear(cx, cg, cw, cb), torch_norm_linear, [x, g, w, b]),
                (jit.norm_swiglu(cx, cg, cup), torch_norm_swiglu, [x, g, up]),
            ]:
                assert isinstance(actual, cupy.ndarray)
                assert_exact(torch.from_dlpack(actual), function, inputs)
