"""The CUDA kernels without nvcc: NVRTC builds their headers when they are first used.

For machines with a GPU but no CUDA toolkit: ``nbl_kernels.jit.residual_linear(x, weight)`` and its
siblings compute what the functions of the same name in ``nbl_kernels`` do, on CuPy arrays of at
most 16 rows, with the kernels of ``csrc/include/nbl/cuda/skinny_linear.cuh``. CuPy compiles them
(its ``RawModule``), keeps them on disk and launches them on its current stream; which instance of
the kernel and which grid come from the same C++ functions that the compiled extension asks.

:func:`compile` needs neither CuPy nor a GPU: it returns the machine code of kernels for an
architecture, by way of NVRTC and its bindings (cuda.bindings), which CUDA builds of torch bring
along.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_kernels import _C
from nbl_kernels._build_info import include_dir

_OPTIONS = ("-std=c++17",)
# The headers' host functions become device functions: NVRTC knows no others. CuPy adds it itself.
_DEVICE_ONLY = "--device-as-default-execution-space"
_MOST_ROWS = 16
_LINEAR = "nbl/cuda/skinny_linear.cuh"


# ---- Compilation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What :func:`compile` returns."""

    cubin: bytes  # machine code, as cuModuleLoadData takes it
    names: dict[str, str]  # kernel as asked for -> symbol in the cubin


def compile(header: str, kernels: Sequence[str] = (), *, arch: str = "sm_80") -> Compiled:
    """Machine code of kernels in a header, by NVRTC; needs no GPU.

    Args:
        header: as it is included: ``"nbl/cuda/row_ops.cuh"``.
        kernels: C++ names: ``"nbl::rms_norm_rows<nbl::bfloat16, true>"``. None: the header is
            checked, and what is no template compiled.
        arch: ``"sm_80"``, ``"sm_90a"``, …

    Raises:
        ImportError: no NVRTC library, or no cuda.bindings.
        RuntimeError: the kernels do not compile; with NVRTC's messages.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise ImportError(f"pip install cuda-bindings nvidia-cuda-nvrtc ({error})") from error

    def call(name: str, *arguments: Any) -> Any:
        result, *found = getattr(nvrtc, f"nvrtc{name}")(*arguments)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"nvrtc{name}: {result.name}")
        return found[0] if found else None

    def content(what: str) -> bytes:
        buffer = b" " * call(f"Get{what}Size", program)
        call(f"Get{what}", program, buffer)
        return buffer

    options = [*_OPTIONS, _DEVICE_ONLY, f"-I{include_dir()}", f"--gpu-architecture={arch}"]
    try:
        program = call("CreateProgram", _including(header).encode(), b"nbl.cu", 0, [], [])
    except RuntimeError as error:  # cuda.bindings looks for the library when it is first called
        raise ImportError(f"pip install nvidia-cuda-nvrtc, or a CUDA toolkit ({error})") from error
    try:
        for kernel in kernels:
            call("AddNameExpression", program, kernel.encode())
        try:
            call("CompileProgram", program, len(options), [option.encode() for option in options])
        except RuntimeError as error:
            log = content("ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"{error}\n{log}") from None
        names = {k: call("GetLoweredName", program, k.encode()).decode() for k in kernels}
        return Compiled(content("CUBIN"), names)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _including(header: str) -> str:
    return f'#include "{header}"\n'


# ---- The skinny linears on CuPy arrays -----------------------------------------------------------


def residual_linear(
    x: Any,
    weight: Any,
    bias: Any = None,
    residual: Any = None,
    *,
    norm_weight: Any = None,
    norm_eps: float = 1e-6,
) -> Any:
    """``residual + W f(x) + b``: :func:`nbl_kernels.residual_linear` on CuPy arrays.

    x (…, K) of at most 16 rows, float32, float16 or (``ml_dtypes``) bfloat16; rows of x, weight and
    residual may be strided. Raises TypeError, ValueError: an argument does not fit; names it.
    """
    residual = x if residual is None else residual
    return _run("residual_linear", x, weight, bias, residual, norm_weight, norm_eps)


def norm_linear(
    x: Any, norm_weight: Any, weight: Any, bias: Any = None, *, norm_eps: float = 1e-6
) -> Any:
    """``W RMSNorm(x) + b``: :func:`nbl_kernels.norm_linear`; as :func:`residual_linear`."""
    return _run("norm_linear", x, weight, bias, None, norm_weight, norm_eps)


def norm_swiglu(x: Any, norm_weight: Any, gate_up_weight: Any, *, norm_eps: float = 1e-6) -> Any:
    """``silu(G f) · (U f)``: :func:`nbl_kernels.norm_swiglu`; as :func:`residual_linear`."""
    return _run("norm_swiglu", x, gate_up_weight, None, None, norm_weight, norm_eps)


def _run(
    op: str, x: Any, weight: Any, bias: Any, residual: Any, norm_weight: Any, norm_eps: float
) -> Any:
    import cupy

    arrays = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    for name, value in (arrays | {"norm_weight": norm_weight}).items():
        if value is not None and not isinstance(value, cupy.ndarray):
            raise TypeError(f"{op}: {name} must be a CuPy array, got {type(value).__name__}")
    with x.device:
        sm_count = _sm_count(x.device.id)
        launch = _prepare(cupy, sm_count, op, x, weight, bias, residual, norm_weight, norm_eps)
        if launch.out.size > 0:
            _kernel(x.device.id, launch.plan["kernel"], launch.plan["shared_bytes"])(
                launch.plan["grid"],
                (launch.plan["threads"],),
                (launch.params,),
                shared_mem=launch.plan["shared_bytes"],
            )
    return launch.out


@dataclass(frozen=True)
class _Launch:
    plan: dict[str, Any]  # what _C.skinny_linear_plan returns
    params: np.ndarray  # (1,), the struct as one element: what CuPy passes by value
    out: Any
    keep: tuple[Any, ...]  # what the params point to


def _prepare(
    xp: Any,
    sm_count: int,
    op: str,
    x: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    norm_weight: Any,
    norm_eps: float,
) -> _Launch:
    """Checks and packs the arguments of the kernel; xp is CuPy, or NumPy in tests."""
    swiglu = op == "norm_swiglu"
    weight_name = "gate_up_weight" if swiglu else "weight"
    dtype = x.dtype.name
    if dtype not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"{op}: x must be float32, float16 or bfloat16, got {dtype}")
    if x.ndim < 1:
        raise ValueError(f"{op}: x must have shape (…, K), got ()")
    k, lead = x.shape[-1], x.shape[:-1]
    m = int(np.prod(lead, dtype=np.int64))
    if m > _MOST_ROWS:
        raise ValueError(f"{op}: x must have at most {_MOST_ROWS} rows, got {m}")
    rows = weight.shape[0] if weight.ndim == 2 else -1
    if weight.ndim != 2 or weight.shape[1] != k or (swiglu and rows % 2):
        wanted = f"({'2F' if swiglu else 'N'}, {k})"
        raise ValueError(f"{op}: {weight_name} must have shape {wanted}, got {weight.shape}")
    n = rows // 2 if swiglu else rows
    shapes = {
        "x": (x, x.shape),
        weight_name: (weight, weight.shape),
        "bias": (bias, (n,)),
        "residual": (residual, (*lead, n)),
        "norm_weight": (norm_weight, (k,)),
    }
    for name, (value, shape) in shapes.items():
        if value is None:
            continue
        if value.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must have x's {dtype}, got {value.dtype.name}")
        if value.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {value.shape}")

    x, weight, residual = (_rows(xp, t, s) for t, s in ((x, m), (weight, rows), (residual, m)))
    bias, norm_weight = (
        None if t is None else xp.ascontiguousarray(t) for t in (bias, norm_weight)
    )
    out = xp.empty((m, n), dtype=x.dtype)
    vector = all(_is_vector(t, k) for t in (x, weight, norm_weight) if t is not None)
    plan = {}
    if m > 0 and n > 0:
        plan = _C.skinny_linear_plan(
            dtype, swiglu, norm_weight is not None, vector, m, n, k, sm_count
        )
    partials = xp.empty(plan.get("partials", 0), dtype="float32")
    counters = xp.zeros(plan.get("counters", 0), dtype="uint32")
    params = _C.skinny_linear_params(
        x=_address(x),
        x_stride=_row_stride(x),
        norm_weight=_address(norm_weight),
        norm_eps=norm_eps,
        weight=_address(weight),
        weight_stride=_row_stride(weight),
        bias=_address(bias),
        residual=_address(residual),
        residual_stride=0 if residual is None else _row_stride(residual),
        out=_address(out),
        out_stride=n,
        m=m,
        n=n,
        k=k,
        swiglu=swiglu,
        split_k=plan.get("split_k", 0),
        partials=_address(partials),
        counters=_address(counters),
    )
    keep = (x, weight, bias, residual, norm_weight, partials, counters)
    by_value = np.frombuffer(params, f"V{len(params)}")
    return _Launch(plan, by_value, out.reshape(*lead, n), keep)


def _rows(xp: Any, t: Any, rows: int) -> Any:
    """(rows, columns), a last dimension without gaps; a copy only where strides do not allow it."""
    if t is None:
        return None
    t = t.reshape(rows, t.shape[-1])
    return t if t.shape[-1] <= 1 or t.strides[-1] == t.itemsize else xp.ascontiguousarray(t)


def _row_stride(t: Any) -> int:
    return t.strides[0] // t.itemsize


def _address(t: Any) -> int:
    if t is None:
        return 0
    return t.ctypes.data if isinstance(t, np.ndarray) else t.data.ptr


def _is_vector(t: Any, k: int) -> bool:
    """Whether all rows allow accesses of 16 bytes."""
    one_row = t.ndim == 1 or t.shape[0] <= 1
    strides = 0 if one_row else t.strides[0]
    return _address(t) % 16 == 0 and strides % 16 == 0 and k * t.itemsize % 16 == 0


@functools.cache
def _sm_count(device: int) -> int:
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(device)["multiProcessorCount"]


@functools.cache
def _kernel(device: int, name: str, shared_bytes: int) -> Any:
    """Of the current device, which ``device`` is; compiled, or found in CuPy's cache on disk."""
    import cupy

    # CuPy knows its cached kernels by this text, so it names the headers' content.
    source = f"// headers {_headers_hash()}\n{_including(_LINEAR)}"
    options = (*_OPTIONS, f"-I{include_dir()}")
    module = cupy.RawModule(code=source, options=options, name_expressions=(name,))
    function = module.get_function(name)
    if shared_bytes > 48 << 10:
        function.max_dynamic_shared_size_bytes = shared_bytes
    return function


@functools.cache
def _headers_hash() -> str:
    content = hashlib.sha256()
    for file in sorted(include_dir().rglob("*.*h")):
        content.update(file.name.encode() + b"\0" + file.read_bytes())
    return content.hexdigest()
