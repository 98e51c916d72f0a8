"""NumPy and CuPy arrays as arguments: no copy, the same results, the caller's kind back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cases.lmmse import exact_moments, tokens

import nbl_kernels as nk
from nbl_kernels.arrays import as_tensor, borrowed

try:
    import cupy

    has_gpu = torch.cuda.is_available() and cupy.cuda.runtime.getDeviceCount() > 0
except ImportError:
    has_gpu = False
needs_cupy = pytest.mark.skipif(not has_gpu, reason="needs CuPy and a GPU")

KINDS = ["numpy", pytest.param("cupy", marks=needs_cupy)]


def array(kind: str, tensor: torch.Tensor):
    return tensor.numpy() if kind == "numpy" else cupy.asarray(tensor.numpy())


def tensor(value) -> torch.Tensor:
    return torch.from_numpy(value if isinstance(value, np.ndarray) else value.get())


def linear_inputs(dtype: torch.dtype, m: int = 3, n: int = 24, k: int = 24):
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (m, k), "weight": (n, k), "bias": (n,), "residual": (m, n), "norm_weight": (k,)}
    return {name: torch.randn(s, generator=g).to(dtype) for name, s in shapes.items()}


def assert_same(kind: str, actual, expected: torch.Tensor) -> None:
    assert type(actual).__module__.startswith(kind)
    if kind == "numpy":
        assert torch.equal(tensor(actual), expected)
    else:
        torch.testing.assert_close(tensor(actual), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linears(kind, dtype):
    t = linear_inputs(dtype)
    a = {name: array(kind, value) for name, value in t.items()}
    assert_same(kind, nk.residual_linear(**a), nk.residual_linear(**t))
    plain = nk.residual_linear(t["x"], t["weight"])
    assert_same(kind, nk.residual_linear(a["x"], a["weight"]), plain)
    names = ("x", "norm_weight", "weight", "bias")
    expected = nk.norm_linear(*(t[n] for n in names), norm_eps=1e-3)
    assert_same(kind, nk.norm_linear(*(a[n] for n in names), norm_eps=1e-3), expected)
    names = ("x", "norm_weight", "weight")
    assert_same(
        kind, nk.norm_swiglu(*(a[n] for n in names)), nk.norm_swiglu(*(t[n] for n in names))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_accumulator(kind):
    f, t = tokens(50, 6, 4)
    b, mask = torch.cat([f, t], -1), torch.arange(50) % 3 > 0
    ours = nk.CovarianceAccumulator(6, 4, block_dim=10, device="cuda" if kind == "cupy" else "cpu")
    ours.update(array(kind, f), array(kind, t), array(kind, b), mask=array(kind, mask))
    theirs = nk.CovarianceAccumulator(6, 4, block_dim=10)
    theirs.update(f, t, b, mask=mask)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batched", [False, True])
def test_solves(kind, batched):
    layers = [exact_moments(*tokens(300, 8, 8, seed)) for seed in range(2)]
    arrays = [
        dataclasses.replace(
            m,
            **{
                f.name: array(kind, getattr(m, f.name))
                for f in dataclasses.fields(m)
                if isinstance(getattr(m, f.name), torch.Tensor)
            },
        )
        for m in layers
    ]
    moments, of_arrays = (layers, arrays) if batched else (layers[0], arrays[0])
    expected, solved = nk.lmmse_solve(moments, rank=3), nk.lmmse_solve(of_arrays, rank=3)
    u, v = solved.factors
    pairs = [
        (solved.weight, expected.weight),
        (solved.bias, expected.bias),
        (solved.nmse, expected.nmse),
        (solved.ridge, expected.ridge),
        (nk.cca_bound(of_arrays), nk.cca_bound(moments)),
        (nk.canonical_correlations(of_arrays), nk.canonical_correlations(moments)),
    ]
    for actual, value in pairs:
        assert type(actual).__module__.startswith(kind)
        torch.testing.assert_close(tensor(actual), value, rtol=1e-8, atol=1e-8)
    assert type(u).__module__.startswith(kind) and u.shape == expected.factors[0].shape
    torch.testing.assert_close(tensor(u @ v), tensor(solved.weight), rtol=1e-9, atol=1e-9)
    assert nk.lmmse_solve(of_arrays, bias=False).bias is None


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "?"])
def test_numpy_memory_is_shared(dtype):
    a = np.arange(60).reshape(6, 10).astype(dtype)
    frozen = a.copy()
    frozen.flags.writeable = False
    for value in (a, a[1::2, 2:5], a.T, a[:, :1], frozen, frozen[2:], a[:0]):
        shared = as_tensor(value, "a")
        assert shared.data_ptr() == value.ctypes.data or value.size == 0
        assert shared.shape == value.shape
        np.testing.assert_array_equal(shared.numpy(), value)
    reversed_rows = as_tensor(a[::-1], "a")  # no tensor has negative strides
    np.testing.assert_array_equal(reversed_rows.numpy(), a[::-1])


def test_memory_lives_as_long_as_the_tensor():
    a = np.full(1 << 16, 3.0)
    a.flags.writeable = False
    shared = as_tensor(a, "a")
    del a
    np.full(1 << 16, 4.0)
    assert shared.eq(3).all()


def test_read_only_arrays_are_arguments_like_others(recwarn):
    x, weight = (value.numpy() for value in list(linear_inputs(torch.float32).values())[:2])
    expected = nk.residual_linear(x, weight)
    before = x.copy()
    x.flags.writeable = weight.flags.writeable = False
    assert np.array_equal(nk.residual_linear(x, weight), expected)
    assert np.array_equal(x, before) and not x.flags.writeable
    assert not [w for w in recwarn if "writ" in str(w.message)]


@pytest.mark.parametrize("read_only", [False, True])
def test_bfloat16_by_ml_dtypes(read_only):
    from ml_dtypes import bfloat16

    t = linear_inputs(torch.bfloat16)
    a = {name: value.view(torch.uint16).numpy().view(bfloat16) for name, value in t.items()}
    for value in a.values():
        value.flags.writeable = not read_only
    assert as_tensor(a["x"], "x").data_ptr() == a["x"].ctypes.data
    out = nk.residual_linear(**a)
    assert out.dtype == bfloat16
    expected = nk.residual_linear(**t).view(torch.uint16).numpy()
    assert np.array_equal(out.view("uint16"), expected)


class Foreign:
    """An array of some other library that speaks DLPack."""

    def __init__(self, value: np.ndarray) -> None:
        self.value, self.dtype = value, value.dtype

    def __dlpack__(self, **options):
        return self.value.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.value.__dlpack_device__()


def test_other_libraries_get_tensors_back():
    t = linear_inputs(torch.float32)
    x, weight = Foreign(t["x"].numpy()), Foreign(t["weight"].numpy())
    out = nk.residual_linear(x, weight)
    assert torch.equal(out, nk.residual_linear(t["x"], t["weight"]))


def test_what_is_refused():
    t = linear_inputs(torch.float32)
    x, weight = t["x"].numpy(), t["weight"].numpy()
    f, target = tokens(9, 3, 3)
    accumulator = nk.CovarianceAccumulator(3, 3)
    m = exact_moments(*tokens(50, 4, 4))
    mixed = dataclasses.replace(m, cov_ff=m.cov_ff.numpy())
    cases = [
        (lambda: nk.residual_linear(x, t["weight"]), r"x must be a tensor, got ndarray: .* weight"),
        (lambda: nk.residual_linear(t["x"], weight), "weight must be a tensor, got ndarray"),
        (lambda: nk.residual_linear(x, weight, t["bias"]), "x must be a tensor, got ndarray"),
        (lambda: nk.residual_linear(x, Foreign(weight)), "weight must be a NumPy array, got Fore"),
        (lambda: nk.residual_linear(x, None), "residual_linear: weight must be a tensor or"),
        (lambda: nk.norm_linear(t["x"], None, t["weight"]), "norm_linear: norm_weight must be a"),
        (
            lambda: nk.norm_swiglu([1.0], x, weight),
            "norm_swiglu: x must be a tensor or .* got list",
        ),
        (lambda: nk.residual_linear(x.astype(">f4"), weight), "x: this NumPy array cannot be shar"),
        (lambda: nk.residual_linear(x.astype("O"), weight), "x: this NumPy array cannot be shared"),
        (lambda: accumulator.update(f.numpy(), target), "features must be a tensor, got ndarray"),
        (lambda: accumulator.update(f.numpy(), None), "targets must be a tensor or"),
        (lambda: nk.lmmse_solve([m, mixed]), r"moments\[1\].cov_ff must be a tensor"),
    ]
    for call, message in cases:
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(RuntimeError, match="weight must have shape"):
        nk.residual_linear(x, weight[:, :5])
    assert accumulator.count == 0


@needs_cupy
def test_work_is_on_the_current_stream_of_cupy():
    stream = cupy.cuda.Stream(non_blocking=True)
    x = cupy.ones((4, 8), "f4")
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream, borrowed("", {"x": x}) as (tensors, give_back):
        assert torch.cuda.current_stream().cuda_stream == stream.ptr
        assert tensors["x"].data_ptr() == x.data.ptr
        out = tensors["x"] * 2
        back = give_back(out)
        assert back.data.ptr == out.data_ptr()
    stream.synchronize()
    assert (back.get() == 2).all()


def test_borrowed_gives_optional_arguments_their_place():
    with borrowed("", {"x": np.ones(3)}, {"y": None, "z": np.ones(2)}) as (tensors, give_back):
        assert tensors["y"] is None and set(tensors) == {"x", "y", "z"}
        assert isinstance(give_back(tensors["z"]), np.ndarray)
