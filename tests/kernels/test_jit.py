"""nbl_kernels.jit: NVRTC compiles every header; the launches it prepares, emulated on the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import nbl_kernels as nk
from nbl_kernels import _C, jit

try:
    jit.compile("nbl/dtypes.h")
    no_nvrtc = ""
except ImportError as error:
    no_nvrtc = str(error)
needs_nvrtc = pytest.mark.skipif(bool(no_nvrtc), reason=no_nvrtc)

try:
    import cupy

    has_gpu = cupy.cuda.is_available()
except ImportError:
    has_gpu = False

DTYPES = {"float32": "float", "float16": "nbl::float16", "bfloat16": "nbl::bfloat16"}
HEADERS = sorted(
    str(path.relative_to(jit.include_dir())) for path in jit.include_dir().rglob("cuda/*.cuh")
)
# Templates are compiled when they are named; the rest of a header always.
TEMPLATES = {
    "nbl/cuda/row_ops.cuh": [
        "rms_norm_rows<{T}, true>",
        "silu_mul_rows<{T}, false>",
        "dequantize_rows<nbl::bfloat16, nbl::float8_e4m3>",
        "dequantize_rows<nbl::float16, nbl::int4_group>",
    ],
    "nbl/cuda/rope.cuh": ["rope_append<{T}, true>", "rope_append<{T}, false>"],
    "nbl/cuda/memory.cuh": ["memory_ends<{T}>", "memory_filter<{T}>"],
    "nbl/cuda/column_stats.cuh": ["column_stats<{T}>", "first_bad_token<{T}>"],
    "nbl/cuda/gram.cuh": ["gram_portable<nbl::bfloat16>", "gram_portable<nbl::float16>"],
    "nbl/cuda/gram_sm90.cuh": ["gram_hopper<nbl::bfloat16>", "gram_hopper<nbl::float16>"],
}


def kernels_of(header: str) -> list[str]:
    if header == "nbl/cuda/skinny_linear.cuh":
        cases = [("bfloat16", False, True, True), ("float16", True, True, True)]
        cases += [("bfloat16", False, False, False), ("float32", False, False, True)]
        plans = [_C.skinny_linear_plan(*c, m, 4096, 4096, 132) for c in cases for m in (1, 8, 16)]
        rows = {"int8": (1, 8), "fp8": (1, 16), "int4": (8, 16)}
        plans += [
            _C.skinny_linear_plan(dtype, False, True, True, m, 4096, 4096, 132, format)
            for dtype, formats in (("bfloat16", rows), ("float16", ["int8"]), ("float32", ["int4"]))
            for format in formats
            for m in rows[format]
        ]
        return sorted({plan["kernel"] for plan in plans})
    names = {f"nbl::{t.format(T=T)}" for t in TEMPLATES.get(header, []) for T in DTYPES.values()}
    return sorted(names)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a"])
@pytest.mark.parametrize("header", HEADERS)
def test_every_header_compiles(header, arch):
    if (arch == "sm_90a") != header.endswith("_sm90.cuh"):
        pytest.skip("Hopper's instructions for Hopper's kernels, and only for them")
    kernels = kernels_of(header)
    compiled = jit.compile(header, kernels, arch=arch)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert list(compiled.names) == kernels
    for symbol in compiled.names.values():
        assert symbol.encode() in compiled.cubin


@needs_nvrtc
def test_messages_of_the_compiler_are_passed_on():
    with pytest.raises(RuntimeError, match=r"no_such_kernel"):
        jit.compile("nbl/cuda/row_ops.cuh", ["nbl::no_such_kernel<float>"])
    with pytest.raises(RuntimeError, match=r"no_such_header\.cuh"):
        jit.compile("nbl/cuda/no_such_header.cuh")
    with pytest.raises(RuntimeError, match=r"gpu-architecture|INVALID_OPTION"):
        jit.compile("nbl/cuda/row_ops.cuh", arch="sm_1")


def test_headers_are_at_hand():
    assert (jit.include_dir() / "nbl" / "cuda" / "skinny_linear.cuh").is_file()


# ---- The launch, with NumPy in the place of CuPy and the emulation in that of the GPU ------------


def emulated(plan: dict):
    """The kernel of a plan for this process's memory, as a function of its launch."""
    include, emulation = jit.include_dir(), Path(__file__).parents[1] / "emulated" / "emulation"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = f"""
        #include "nbl/cuda/skinny_linear.cuh"
        extern "C" void run(const void* params, unsigned x, unsigned y, unsigned threads,
                            unsigned shared_bytes, unsigned seed) {{
          using namespace nbl;
          emulate({plan["kernel"]}, dim3{{x, y, 1}}, threads, shared_bytes, seed,
                  *static_cast<const LinearParams*>(params));
        }}"""
    content = hashlib.sha256(source.encode())
    for file in [*sorted(include.rglob("*.*h")), emulation / "emulation.h"]:
        content.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"nbl-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"jit-{content.hexdigest()[:24]}.so"
    if not library.exists():
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-DNBL_EMULATE", "-Wno-unknown-pragmas"]
        unfinished = library.with_suffix(f".{os.getpid()}")
        flags += ["-I", str(include), "-I", str(emulation), "-x", "c++", "-"]
        command = [compiler, *flags, "-o", str(unfinished)]
        built = subprocess.run(command, input=source, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        unfinished.replace(library)
    return ctypes.CDLL(str(library)).run


def run(op: str, x, weight, bias=None, residual=None, norm_weight=None, eps=1e-6, sm_count=4):
    arguments = (x, weight, bias, residual, norm_weight, eps)
    launch = jit._prepare(np, sm_count, op, *arguments)
    plan = launch.plan
    params = launch.params.ctypes.data_as(ctypes.c_void_p)
    emulated(plan)(params, *plan["grid"], plan["threads"], plan["shared_bytes"], 3)
    return launch


def inputs(dtype: str, m: int, n: int, k: int, weight_rows: int | None = None):
    g = torch.Generator().manual_seed(m + n + k)
    shapes = {"x": (m, k), "weight": (weight_rows or n, k), "bias": (n,), "residual": (m, n)}
    shapes["norm_weight"] = (k,)
    return {
        name: torch.randn(shape, generator=g).to(getattr(torch, dtype)).numpy()
        for name, shape in shapes.items()
    }


def assert_close(out: np.ndarray, op, dtype: str, *args, **kwargs):
    """Within twice the error of the same in PyTorch at this dtype, against float64."""
    tensors = [None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in args]
    exact = op(*[None if t is None else t.double() for t in tensors], **kwargs)
    error = (torch.from_numpy(out).double() - exact).abs().max()
    allowed = (op(*tensors, **kwargs).double() - exact).abs().max()
    assert error <= 2 * allowed + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype, m, n, k", [("float16", 3, 20, 64), ("float32", 1, 7, 33)])
def test_emulated_linears(dtype, m, n, k):
    a = inputs(dtype, m, n, k)
    launch = run("residual_linear", a["x"], a["weight"], a["bias"], a["residual"])
    assert launch.out.shape == (m, n) and launch.out.dtype == dtype
    args = a["x"], a["weight"], a["bias"], a["residual"]
    assert_close(launch.out, nk.residual_linear_ref, dtype, *args)
    out = run("norm_linear", a["x"], a["weight"], norm_weight=a["norm_weight"], eps=1e-3).out
    args = a["x"], a["norm_weight"], a["weight"]
    assert_close(out, nk.norm_linear_ref, dtype, *args, norm_eps=1e-3)


def test_emulated_swiglu_with_leading_dimensions():
    a = inputs("float16", 4, 10, 40, weight_rows=20)
    x = a["x"].reshape(2, 2, 40)
    out = run("norm_swiglu", x, a["weight"], norm_weight=a["norm_weight"]).out
    assert out.shape == (2, 2, 10)
    args = x, a["norm_weight"], a["weight"]
    assert_close(out, nk.norm_swiglu_ref, "float16", *args)


def test_emulated_splits_and_strides():
    """Few rows of weight: k is split; its workspace and every stride get where they should."""
    wide = inputs("float32", 2, 3, 20000)
    x, weight = wide["x"][:, 4:19996], wide["weight"][:, 4:19996]
    launch = run("residual_linear", x, weight, residual=wide["residual"], sm_count=132)
    assert launch.plan["grid"][1] > 1 and launch.plan["partials"] > 0
    x_used, weight_used, *_, counters = launch.keep
    assert x_used.ctypes.data == x.ctypes.data and weight_used.ctypes.data == weight.ctypes.data
    assert not counters.any()  # ready for the next launch
    assert_close(launch.out, nk.residual_linear_ref, "float32", x, weight, None, wide["residual"])
    gaps = wide["x"][:, ::2], wide["weight"][:, ::2]  # these rows must be copied
    out = run("residual_linear", *gaps, residual=wide["residual"]).out
    assert_close(out, nk.residual_linear_ref, "float32", *gaps, None, wide["residual"])


def test_vector_path_where_addresses_and_strides_allow_it():
    def kernel(x, weight):
        launch = jit._prepare(np, 4, "residual_linear", x, weight, None, None, None, 1e-6)
        return launch.plan["kernel"]

    def aligned(*shape):
        flat = np.zeros(int(np.prod(shape)) + 16, "float16")
        start = -flat.ctypes.data // 2 % 8
        return flat[start : start + int(np.prod(shape))].reshape(shape)

    x, weight = aligned(2, 64), aligned(64, 64)
    assert kernel(x, weight).endswith("true>>")
    assert kernel(x[:, :60], weight[:, :60]).endswith("false>>")  # not whole granules
    assert kernel(x[:, 1:57], weight[:, :56]).endswith("false>>")  # an odd address
    assert kernel(aligned(2, 60)[:, :56], weight[:, :56]).endswith("false>>")  # odd rows


def test_empty_arrays_launch_nothing():
    a = inputs("float16", 2, 8, 16)
    for x, weight in ((a["x"][:0], a["weight"]), (a["x"], a["weight"][:0])):
        launch = jit._prepare(np, 4, "norm_linear", x, weight, None, None, a["norm_weight"], 1e-6)
        assert launch.out.shape == (len(x), len(weight)) and not launch.plan


def test_what_is_refused():
    a = inputs("float16", 2, 8, 8)
    x, weight = a["x"], a["weight"]

    def prepare(op="residual_linear", x=x, weight=weight, bias=None, residual=None, norm=None):
        return jit._prepare(np, 4, op, x, weight, bias, residual, norm, 1e-6)

    cases = [
        (lambda: prepare(x=np.zeros((17, 8), "f2")), ValueError, "at most 16 rows, got 17"),
        (lambda: prepare(x=x.astype("f8")), TypeError, "x must be float32, float16 or bfloat16"),
        (lambda: prepare(weight=weight[:, :5]), ValueError, r"weight must have shape \(N, 8\)"),
        (lambda: prepare("norm_swiglu", weight=weight[:3]), ValueError, "gate_up_weight must have"),
        (lambda: prepare(bias=x), ValueError, r"bias must have shape \(8,\)"),
        (lambda: prepare(weight=weight.astype("f4")), TypeError, "weight must have x's float16"),
        (lambda: prepare(residual=x[:1]), ValueError, r"residual must have shape \(2, 8\)"),
        (lambda: prepare(norm=x[0, :3]), ValueError, r"norm_weight must have shape \(8,\)"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(ValueError, match="dtype must be float32"):
        _C.skinny_linear_plan("int8", False, False, False, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="format must be int8, fp8, int4 or empty"):
        _C.skinny_linear_plan("float32", False, False, False, 1, 1, 1, 1, "int3")


# ---- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.skipif(not has_gpu, reason="needs CuPy and a GPU")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("m", [1, 5, 16])
def test_on_a_gpu(dtype, m):
    a = inputs(dtype, m, 200, 200)
    c = {name: cupy.asarray(value) for name, value in a.items()}
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream:
        out = jit.residual_linear(c["x"], c["weight"], c["bias"], norm_weight=c["norm_weight"])
        gated = jit.norm_swiglu(c["x"], c["norm_weight"], c["weight"])
        plain = jit.norm_linear(c["x"], c["norm_weight"], c["weight"], c["bias"])
    stream.synchronize()

    def residual_ref(x, weight, bias, norm_weight):
        return nk.residual_linear_ref(x, weight, bias, norm_weight=norm_weight)

    args = (a["x"], a["weight"], a["bias"], a["norm_weight"])
    assert_close(out.get(), residual_ref, dtype, *args)
    args = (a["x"], a["norm_weight"], a["weight"])
    assert_close(gated.get(), nk.norm_swiglu_ref, dtype, *args)
    assert_close(plain.get(), nk.norm_linear_ref, dtype, *args, a["bias"])
