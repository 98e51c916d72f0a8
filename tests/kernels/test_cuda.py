"""What there is on a GPU alone: streams, graphs, tensors of more than 2^31 elements, Hopper beside
the portable kernels, CuPy. What must come out of an operator is tested on every device, in its own
file."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import devices
import pytest
import torch
from cases import DTYPES, FORMATS
from cases import memory as memory_cases
from cases import rope as rope_cases
from cases.covariance import accumulate, assert_moments_exact, hard_tokens
from cases.linear import (
    dequantizing,
    layer_calls,
    make,
    quantized,
    quantized_layer,
    torch_norm_linear,
    torch_norm_swiglu,
    torch_residual_linear,
)
from devices import cuda_path
from tolerance import assert_as_exact_as_torch
from torch import Tensor

import nbl_kernels as nk
from nbl_kernels import _C

pytestmark = devices.needs_gpu

linear_path = devices.cuda_paths("linear", "kernel", "plain")
gram_path = devices.cuda_paths("covariance", "hopper", "portable", "plain")
rope_path = devices.cuda_paths("rope", "kernel", "plain")
memory_path = devices.cuda_paths("memory", "kernel", "plain")


def on_gpu(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return make(*shape, dtype=dtype, scale=scale, device="cuda")


def captured(function):
    """(a graph of one call of function, its result), after a call on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph, out


# ---- Linears -------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 4, 16, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_in_a_cuda_graph(linear_path, m, dtype):
    x, layer = layer_calls(m, 256, dtype, "cuda")
    graph, out = captured(lambda: layer(x))
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(out, layer(x))


def test_linear_chains_keep_the_order_of_the_stream(linear_path):
    """Each launch reads what the one before wrote: nothing may start to read early."""
    for m in (1, 8, 16, 17):
        x, layer = layer_calls(m, 1024, torch.bfloat16, "cuda")

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


def test_linear_on_a_side_stream(linear_path):
    for m in (1, 16, 40):
        x, layer = layer_calls(m, 512, torch.bfloat16, "cuda")
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


def test_linear_on_another_device(linear_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x, layer = layer_calls(3, 64, torch.bfloat16, "cuda")
    there, layer_there = layer_calls(3, 64, torch.bfloat16, "cuda:1")
    out = layer_there(there)  # while cuda:0 is the current device
    assert out.device == there.device and torch.equal(out.cpu(), layer(x).cpu())


# ---- Linears whose k is split over blocks, which meet at counters --------------------------------


SPLIT = [(1, 256, 32768), (4, 1024, 8192), (16, 1024, 8192)]  # (rows of x, N, K)


def split_call(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16):
    """The inputs of a residual_linear, and that call with another x."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    name = str(dtype).removeprefix("torch.")
    assert _C.skinny_linear_plan(name, False, False, True, m, n, k, sms)["grid"][1] > 1
    inputs = [on_gpu(m, k, dtype=dtype), on_gpu(n, k, dtype=dtype, scale=k**-0.5)]
    inputs += [on_gpu(n, dtype=dtype), on_gpu(m, n, dtype=dtype)]
    return inputs, lambda x: nk.residual_linear(x, *inputs[1:])


@pytest.fixture
def split_kernel():
    with cuda_path("linear", "kernel"), devices.full_precision():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SPLIT, ids=str)
def test_linear_split(split_kernel, shape, dtype):
    """Exact, in a graph as outside, and back to back without a pause."""
    inputs, call = split_call(*shape, dtype)
    out = call(inputs[0])
    assert_as_exact_as_torch(out, torch_residual_linear, [*inputs, None])
    other = inputs[0].flip(0) * 0.5
    other_out = call(other)
    graph, graph_out = captured(lambda: call(inputs[0]))
    for _ in range(3):  # eager calls beside the replays of the graph
        graph.replay()
        beside = [call(x) for x in (other, inputs[0]) for _ in range(20)]
        assert torch.equal(graph_out, out)
        assert all(torch.equal(y, other_out) for y in beside[:20])
        assert all(torch.equal(y, out) for y in beside[20:])


@pytest.mark.parametrize("shape", SPLIT, ids=str)
def test_linear_split_on_two_streams_and_from_two_threads(split_kernel, shape):
    inputs, call = split_call(*shape)
    xs = [inputs[0], inputs[0] * 0.5]
    expected = [call(x) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(call(xs[i]))

    def from_a_thread(i: int) -> list[Tensor]:
        with torch.cuda.stream(streams[i]):
            return [call(xs[i]) for _ in range(50)]

    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        for i, more in enumerate(pool.map(from_a_thread, range(2))):
            results[i] += more
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(y, expected[i]) for y in results[i])


def test_linear_split_without_dependent_launches(split_kernel, tmp_path):
    """Bit for bit the same, also behind the kernels that make its input."""
    program = tmp_path / "layers.py"
    program.write_text(
        "import sys, torch, nbl_kernels as nk\n"
        "nk.set_cuda_path('linear', 'kernel')\n"
        "torch.manual_seed(0)\n"
        "outs = []\n"
        f"for m, n, k in {SPLIT}:\n"
        "    w = (torch.randn(n, k) / k**0.5).bfloat16().cuda()\n"
        "    x = torch.randn(m, k).bfloat16().cuda()\n"
        "    up = (torch.randn(k, n) / n**0.5).bfloat16().cuda()\n"
        "    for _ in range(20):\n"
        "        y = nk.residual_linear(x, w, residual=x[:, :n])\n"
        "        x = nk.residual_linear(y, up, residual=x * 0.5)\n"
        "    outs.append(x.cpu())\n"
        "torch.save(outs, sys.argv[1])\n"
    )
    outs = []
    for dependent in ("1", "0"):
        file = tmp_path / f"{dependent}.pt"
        environment = os.environ | {"NBL_DEPENDENT_LAUNCH": dependent}
        subprocess.run([sys.executable, program, file], env=environment, check=True)
        outs.append(torch.load(file))
    assert all(map(torch.equal, *outs)) and all(t.isfinite().all() for t in outs[0])


def test_linear_offsets_beyond_31_bits(linear_path):
    """A weight of more than 2³¹ elements: its last rows are those that count."""
    n, k = 65_600, 32_768
    if torch.cuda.mem_get_info()[0] < 3 * n * k * 2 or linear_path.name == "plain":
        pytest.skip("PyTorch's way, or too little memory")
    weight = torch.zeros(n, k, dtype=torch.bfloat16, device="cuda")
    weight[-16:] = on_gpu(16, k, dtype=torch.bfloat16, scale=k**-0.5)
    gamma = torch.ones(k, dtype=torch.bfloat16, device="cuda")
    for m in (1, 4):
        x = on_gpu(m, k, dtype=torch.bfloat16)
        out = nk.norm_linear(x, gamma, weight)
        few = [x, gamma, weight[-16:].clone(), None]
        assert_as_exact_as_torch(out[:, -16:], torch_norm_linear, few)
        assert not out[:, :-16].any()
    del weight
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [1, 4, 16, 40])
def test_linear_quantized_in_a_cuda_graph(linear_path, format, m):
    layer, x = quantized_layer(512, format, "cuda"), on_gpu(m, 512, dtype=torch.bfloat16)
    graph, out = captured(lambda: layer(x))
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(out, layer(x))


@pytest.mark.parametrize("format", FORMATS)
def test_linear_quantized_weights_are_never_there_as_a_whole(linear_path, format):
    """Many rows: of a weight of 512 MiB in bfloat16 a slab at a time is dequantized."""
    if linear_path.name == "plain":
        pytest.skip("PyTorch dequantizes all of it")
    n = k = 16384
    weight, scale = (
        t.repeat(n // 512, 1)[:n] if t.dim() == 2 else t.repeat(n // 512)
        for t in quantized(512, k, format, "cuda")
    )
    x, residual = on_gpu(64, k, dtype=torch.bfloat16), on_gpu(64, n, dtype=torch.bfloat16)
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
    assert_as_exact_as_torch(out[:, -512:], function, [x, None, None, last, None])


# ---- Covariance ----------------------------------------------------------------------------------


def test_covariance_hopper_agrees_with_portable():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU is no Hopper")
    states = {}
    f, t = hard_tokens(8192, 520, torch.bfloat16), hard_tokens(8192, 264, torch.bfloat16, 1)
    for path in ("portable", "hopper"):
        with cuda_path("covariance", path):
            states[path] = accumulate(4096, f, t, device="cuda").state_dict()
    assert torch.equal(states["portable"]["count"], states["hopper"]["count"])
    for name in ("sums", "gram_tf"):
        a, e = states["hopper"][name], states["portable"][name]
        assert (a - e).norm() <= 1e-6 * e.norm(), name
    for name in ("gram_ff", "gram_tt"):
        a, e = states["hopper"][name].triu(), states["portable"][name].triu()
        assert (a - e).norm() <= 1e-6 * e.norm(), name


def test_covariance_on_a_side_stream(gram_path):
    f, t = hard_tokens(3000, 136, torch.bfloat16), hard_tokens(3000, 72, torch.bfloat16, 1)
    source_f, source_t = f.to("cuda"), t.to("cuda")
    late_f, late_t = torch.zeros_like(source_f), torch.zeros_like(source_t)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        acc = nk.CovarianceAccumulator(136, 72, device="cuda")
        torch.cuda._sleep(50_000_000)
        late_f.copy_(source_f)
        late_t.copy_(source_t)
        acc.update(late_f, late_t)
        moments = acc.moments()
    side.synchronize()
    assert_moments_exact(moments, f, t)


def test_covariance_offsets_beyond_31_bits(gram_path):
    """Features of more than 2³¹ elements, of which the mask leaves the last tokens."""
    n, d = 530_000, 4096
    if gram_path.name == "plain" or torch.cuda.mem_get_info()[0] < 4 * n * d * 2:
        pytest.skip("PyTorch's way, or too little memory")
    f = torch.zeros(n, d, dtype=torch.bfloat16, device="cuda")
    t = torch.zeros(n, 8, dtype=torch.bfloat16, device="cuda")
    last_f, last_t = hard_tokens(300, d, torch.bfloat16), hard_tokens(300, 8, torch.bfloat16, 1)
    f[-300:], t[-300:] = last_f.to("cuda"), last_t.to("cuda")
    mask = torch.zeros(n, dtype=torch.bool, device="cuda")
    mask[-300:] = True
    acc = nk.CovarianceAccumulator(d, 8, device="cuda")
    acc.update(f, t, mask=mask)
    exact = last_t.double().T @ last_f.double()
    assert acc.count == 300
    assert (acc.state_dict()["gram_tf"].cpu() - exact).norm() <= 1e-6 * exact.norm()
    del f
    gc.collect()
    torch.cuda.empty_cache()


# ---- Rotation and cache append -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_tokens_out_of_range_give_nan_and_write_nothing(dtype):
    """Of the kernel alone: PyTorch's operations would end the process."""
    with cuda_path("rope", "kernel"):
        clean = rope_cases.make_inputs(2, 4, 3, 2, 64, 48, dtype, device="cuda", norm=True)
        unwritten = rope_cases.copied(clean)
        unwritten["slots"][1, 2] = -1
        q = nk.rope_append(**unwritten)
        for name, value in (("positions", 19), ("positions", -1), ("slots", 9), ("slots", 2**62)):
            a = rope_cases.copied(clean)
            a[name][1, 2] = value
            bad = nk.rope_append(**a)
            assert bad[1, :, 2].isnan().all()
            bad[1, :, 2] = q[1, :, 2]
            assert torch.equal(bad, q)
            assert torch.equal(a["key_cache"], unwritten["key_cache"])
            assert torch.equal(a["value_cache"], unwritten["value_cache"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_in_a_cuda_graph(rope_path, dtype):
    """Replayed with other tokens, positions and slots."""
    a = rope_cases.make_inputs(3, 1, 8, 2, 128, 128, dtype, device="cuda", norm=True)
    graph, q = captured(lambda: nk.rope_append(**a))
    for seed in range(3):
        new = rope_cases.make_inputs(3, 1, 8, 2, 128, 128, dtype, norm=True, seed=seed)
        new["slots"][seed % 3] = -1
        for name, t in new.items():
            a[name].copy_(t)
        expected = rope_cases.copied(a)
        graph.replay()
        assert torch.equal(q, nk.rope_append(**expected))
        assert torch.equal(a["key_cache"], expected["key_cache"])
        assert torch.equal(a["value_cache"], expected["value_cache"])


def test_rope_keeps_the_order_of_the_stream():
    """Between a projection whose result it reads and an attention that reads what it appends."""
    with cuda_path("linear", "kernel"), cuda_path("rope", "kernel"):
        a = rope_cases.make_inputs(4, 1, 8, 2, 64, 64, torch.bfloat16, device="cuda")
        w, gamma = (
            on_gpu(12 * 64, 256, dtype=torch.bfloat16, scale=0.06),
            on_gpu(256, dtype=torch.bfloat16),
        )
        out = on_gpu(256, 8 * 64, dtype=torch.bfloat16, scale=0.04)

        def chain(wait: bool) -> Tensor:
            x, caches = on_gpu(4, 1, 256, dtype=torch.bfloat16), rope_cases.copied(a)
            for step in range(20):
                slots = torch.full((4, 1), step % 6, device="cuda")
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


def test_rope_offsets_beyond_31_bits(rope_path):
    """Caches of more than 2³¹ elements each: the last slots are those that count."""
    length = (1 << 31) // 128 + 64
    if rope_path.name == "plain" or torch.cuda.mem_get_info()[0] < 6 * length * 128 * 2:
        pytest.skip("PyTorch's way, or too little memory")
    a = rope_cases.make_inputs(1, 9, 2, 1, 128, 128, torch.bfloat16, device="cuda")
    small = rope_cases.copied(a)
    for name in ("key_cache", "value_cache"):
        a[name] = torch.zeros(1, 1, length, 128, dtype=torch.bfloat16, device="cuda")
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 100])
def test_memory_in_a_cuda_graph(memory_path, dtype, length):
    """Replayed with other tokens and resets; the state goes on from replay to replay."""
    a = memory_cases.make_scan(3, length, 128, 64, 128, dtype=dtype, started=True, device="cuda")
    graph, out = captured(lambda: nk.memory_scan(**a))
    for seed in range(3):
        new = memory_cases.make_scan(3, length, 128, 64, 128, dtype, started=True, seed=seed)
        for name in ("x", "residual", "starts"):
            a[name].copy_(new[name])
        expected = memory_cases.copied(a)
        graph.replay()
        assert torch.equal(out, nk.memory_scan(**expected))
        assert torch.equal(a["state"], expected["state"])


def test_memory_keeps_the_order_of_the_stream():
    """Decode steps in a row, each of which reads what the one before has written."""
    with cuda_path("linear", "kernel"), cuda_path("memory", "kernel"):
        a = memory_cases.make_scan(
            4, 1, 256, 32, 256, dtype=torch.bfloat16, norm=True, device="cuda"
        )

        def steps(wait: bool) -> tuple[Tensor, Tensor]:
            mine = memory_cases.copied(a) | {"residual": None}
            for _ in range(30):
                mine["x"] = nk.memory_scan(**mine)
                if wait:
                    torch.cuda.synchronize()
            return mine["x"], mine["state"]

        waited = steps(True)
        assert waited[0].isfinite().all()
        for _ in range(5):
            assert all(map(torch.equal, steps(False), waited))


# ---- CuPy ----------------------------------------------------------------------------------------


def test_interop_with_cupy_arrays(linear_path):
    cupy = pytest.importorskip("cupy")
    x, w, b = (on_gpu(*s, dtype=torch.float16, scale=0.2) for s in ((3, 64), (64, 64), (64,)))
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


def test_interop_accumulates_cupy_arrays(gram_path):
    cupy = pytest.importorskip("cupy")
    f, t = hard_tokens(500, 40, torch.float16), hard_tokens(500, 24, torch.float16, 1)
    acc = nk.CovarianceAccumulator(40, 24, device="cuda")
    acc.update(cupy.from_dlpack(f.to("cuda")), cupy.from_dlpack(t.to("cuda")))
    assert_moments_exact(acc.moments(), f, t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_interop_kernels_built_by_cupy(dtype):
    """nbl_kernels.jit: the same kernels, compiled by NVRTC."""
    cupy = pytest.importorskip("cupy")
    from nbl_kernels import jit

    for k, n in [(64, 64), (136, 90), (200, 40), (37, 37), (1, 1)]:
        w, up = (
            on_gpu(n, k, dtype=dtype, scale=k**-0.5),
            on_gpu(2 * n, k, dtype=dtype, scale=k**-0.5),
        )
        g, b = on_gpu(k, dtype=dtype), on_gpu(n, dtype=dtype)
        for m in (1, 2, 5, 16):
            x, r = on_gpu(m, k, dtype=dtype), on_gpu(m, n, dtype=dtype)
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
                assert_as_exact_as_torch(torch.from_dlpack(actual), function, inputs)
