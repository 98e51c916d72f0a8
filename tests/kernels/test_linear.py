"""residual_linear, norm_linear, norm_swiglu: against float64, on every path."""

from __future__ import annotations

import math

import devices
import pytest
import torch
from cases import DTYPES
from cases.linear import (
    layer_calls,
    make,
    torch_norm_linear,
    torch_norm_swiglu,
    torch_residual_linear,
)
from devices import Path
from tolerance import assert_as_exact_as_torch, assert_rounding_only
from torch import Tensor

import nbl_kernels as nk
from nbl_kernels import _C

every_path = devices.paths("linear", "kernel", "plain")
path = devices.paths("linear", "kernel", "plain", capabilities=False)

# (K, N): vector loads or not, tails of every vector width and of both dimensions, less and more
# than one block, long and wide.
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


def numbers_of_rows(path: Path) -> list[int]:
    """One, some, all that the skinny kernels take, and more; on a GPU each has code of its own."""
    return [*range(1, 18), 32, 100] if path.on_gpu else [1, 3, 16, 17]


def poison(*shape: int, dtype: torch.dtype, device: str) -> None:
    """Leaves NaN in the memory that the next result of this size is likely to get."""
    blocks = [torch.full(shape, math.nan, dtype=dtype, device=device) for _ in range(3)]
    del blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, n", SHAPES)
@pytest.mark.parametrize("bias, norm", [(True, True), (False, False), (True, False), (False, True)])
def test_residual_linear(every_path, dtype, k, n, bias, norm):
    on = {"dtype": dtype, "device": every_path.device}
    weight = make(n, k, scale=k**-0.5, **on)
    b, gamma = make(n, **on) if bias else None, make(k, **on) if norm else None
    for m in numbers_of_rows(every_path):
        x, residual = make(m, k, **on), make(m, n, **on)
        poison(m, n, **on)
        actual = nk.residual_linear(x, weight, b, residual, norm_weight=gamma)
        assert_as_exact_as_torch(actual, torch_residual_linear, [x, weight, b, residual, gamma])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, n", SHAPES)
def test_norm_linear_and_norm_swiglu(every_path, dtype, k, n):
    on = {"dtype": dtype, "device": every_path.device}
    weight, gamma = make(n, k, scale=k**-0.5, **on), make(k, **on)
    gate_up, bias = make(2 * n, k, scale=k**-0.5, **on), make(n, **on)
    for m in numbers_of_rows(every_path):
        x = make(m, k, **on)
        for b in (bias, None):
            poison(m, n, **on)
            actual = nk.norm_linear(x, gamma, weight, b)
            assert_as_exact_as_torch(actual, torch_norm_linear, [x, gamma, weight, b])
        poison(m, n, **on)
        actual = nk.norm_swiglu(x, gamma, gate_up)
        assert_as_exact_as_torch(actual, torch_norm_swiglu, [x, gamma, gate_up])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", range(1, 18))
def test_every_number_of_rows(every_path, dtype, m):
    on, k, n = {"dtype": dtype, "device": every_path.device}, 136, 90
    x, weight, b = make(m, k, **on), make(n, k, **on), make(n, **on)
    residual, gamma = make(m, n, **on), make(k, **on)
    actual = nk.residual_linear(x, weight, b, residual, norm_weight=gamma)
    assert_as_exact_as_torch(actual, torch_residual_linear, [x, weight, b, residual, gamma])
    actual = nk.norm_linear(x, gamma, weight, b)
    assert_as_exact_as_torch(actual, torch_norm_linear, [x, gamma, weight, b])
    actual = nk.norm_swiglu(x, gamma, weight)
    assert_as_exact_as_torch(actual, torch_norm_swiglu, [x, gamma, weight])


def test_references_are_the_formulas():
    x, w = make(3, 40, dtype=torch.float64), make(40, 40, dtype=torch.float64)
    g = torch.rand(40).double()
    torch.testing.assert_close(
        nk.residual_linear_ref(x, w, norm_weight=g), torch_residual_linear(x, w, None, None, g)
    )
    torch.testing.assert_close(nk.norm_linear_ref(x, g, w), torch_norm_linear(x, g, w, None))
    torch.testing.assert_close(nk.norm_swiglu_ref(x, g, w), torch_norm_swiglu(x, g, w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 7, 16, 17, 40])
def test_strided_and_unaligned(path, dtype, offset, m):
    """Rows that begin anywhere: vector loads where they are allowed, the same result elsewhere."""
    k, n = 136, 72
    on = {"dtype": dtype, "device": path.device}
    base = [make(rows, 2 * k + 16, scale=0.1, **on) for rows in (m, 2 * n, m)]
    rows = [t[:, offset : offset + k] for t in base]
    columns = [t[:, offset : offset + 2 * k : 2] for t in base]
    transposed = [t[:, offset : offset + k].T.contiguous().T for t in base]
    vector = make(2 * k + 16, **on)
    gamma, bias = vector[offset : offset + k], vector[: 2 * n : 2]
    for x, w, r in (rows, columns, transposed):
        inputs = [x, w[:n], bias, r[:, :n], gamma]
        actual = nk.residual_linear(*inputs[:4], norm_weight=gamma)
        assert_as_exact_as_torch(actual, torch_residual_linear, inputs)
        if not path.on_gpu:
            dense = [t.contiguous() for t in inputs]
            assert torch.equal(actual, nk.residual_linear(*dense[:4], norm_weight=dense[4]))
        actual = nk.norm_swiglu(x, gamma, w)
        assert_as_exact_as_torch(actual, torch_norm_swiglu, [x, gamma, w])


def test_leading_dimensions_and_default_residual(path):
    x = make(2, 3, 32, device=path.device)
    w = make(32, 32, device=path.device)
    out = nk.residual_linear(x, w)
    assert out.shape == x.shape
    assert torch.equal(out.reshape(6, 32), nk.residual_linear(x.reshape(6, 32), w))
    assert torch.equal(out, nk.residual_linear(x, w, None, x))
    assert nk.residual_linear(x[0, 0], w).shape == (32,)


def test_empty_sizes(path):
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=path.device)

    for shape in [(0, 8), (2, 0, 8)]:
        assert nk.residual_linear(zeros(*shape), zeros(8, 8)).shape == shape
        assert nk.norm_linear(zeros(*shape), zeros(8), zeros(5, 8)).shape == (*shape[:-1], 5)
        assert nk.norm_swiglu(zeros(*shape), zeros(8), zeros(6, 8)).shape == (*shape[:-1], 3)
    for m in (2, 40):  # no features: bias and residual are what is left
        bias, residual = make(4, device=path.device), make(m, 4, device=path.device)
        out = nk.residual_linear(zeros(m, 0), zeros(4, 0), bias, residual)
        torch.testing.assert_close(out, residual + bias)
        assert nk.norm_linear(zeros(m, 0), zeros(0), zeros(0, 0)).shape == (m, 0)


@pytest.mark.parametrize("m", [1, 9, 33])
def test_non_finite_values_stay_in_their_row_or_column(path, m):
    on = {"dtype": torch.bfloat16, "device": path.device}
    x, w = make(m, 64, **on), make(64, 64, **on)
    clean = nk.residual_linear(x, w)
    x[0, 5], w[7, 3] = math.nan, math.inf
    out = nk.residual_linear(x, w)
    assert out[0].isnan().all()
    assert not out[1:, 7].isfinite().any()
    rest = [i for i in range(64) if i != 7]
    assert torch.equal(out[1:, rest], clean[1:, rest])


def test_reads_nothing_past_the_end(path):
    """A weight and an x whose neighbours are NaN."""
    for dtype in DTYPES:
        on = {"dtype": dtype, "device": path.device}
        for m in (1, 5, 16):
            storage, xs = torch.full((90, 150), math.nan, **on), torch.full((m + 3, 150), math.nan)
            storage[:73, :137], xs = make(73, 137, **on), xs.to(**on)
            xs[:m, :137] = make(m, 137, **on)
            gamma = torch.ones(137, **on)
            assert nk.norm_linear(xs[:m, :137], gamma, storage[:73, :137]).isfinite().all()
            assert nk.norm_swiglu(xs[:m, :137], gamma, storage[:72, :137]).isfinite().all()


def test_writes_nothing_but_its_result(path):
    for dtype in DTYPES:
        for m in (1, 7, 16, 33):
            shapes = [(m, 72), (72, 72), (72,)]
            inputs = [make(*s, dtype=dtype, device=path.device) for s in shapes]
            before = [t.clone() for t in inputs]
            x, w, v = inputs
            nk.residual_linear(x, w, v, norm_weight=v)
            nk.norm_linear(x, v, w, v)
            nk.norm_swiglu(x, v, w)
            assert all(torch.equal(a, b) for a, b in zip(inputs, before))


def test_inputs_may_be_read_only():
    import numpy as np

    array = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    array.flags.writeable = False
    with pytest.warns(UserWarning, match="not writable"):
        x = torch.from_numpy(array)
    nk.residual_linear(x, torch.randn(16, 16))
    assert np.array_equal(array, x.numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_deterministic(path, dtype):
    on = {"dtype": dtype, "device": path.device}
    for k, n in [(2048, 2048), (8192, 64), (1031, 70)]:
        w, g, b = make(n, k, scale=k**-0.5, **on), make(k, **on), make(n, **on)
        for m in (1, 2, 8, 16, 40):
            x, r = make(m, k, **on), make(m, n, **on)
            for call in (
                lambda: nk.residual_linear(x, w, b, r),  # noqa: B023
                lambda: nk.norm_linear(x, g, w, b),  # noqa: B023
                lambda: nk.norm_swiglu(x, g, w),  # noqa: B023
            ):
                first = call()
                assert all(torch.equal(first, call()) for _ in range(5 if path.on_gpu else 1))


def test_results_do_not_depend_on_threads():
    x, w = make(3, 300, dtype=torch.bfloat16), make(700, 300, dtype=torch.bfloat16)
    g, threads = make(300, dtype=torch.bfloat16), torch.get_num_threads()
    outs = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outs.append((nk.norm_linear(x, g, w), nk.norm_swiglu(x, g, w)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for out in outs for a, b in zip(out, outs[0]))


def test_errors_name_the_argument(path):
    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=path.device)

    x, w, v = ones(2, 8), ones(8, 8), ones(8)
    cases = [
        (lambda: nk.residual_linear(x, ones(8, 9)), "weight must have shape"),
        (lambda: nk.residual_linear(x, v), "weight must have 2 dimensions"),
        (lambda: nk.residual_linear(x, ones(5, 8)), "residual must have the shape"),
        (lambda: nk.residual_linear(x, w, ones(7)), "bias must have shape"),
        (lambda: nk.residual_linear(x, w.bfloat16()), "weight must have the dtype of x"),
        (lambda: nk.residual_linear(x.int(), w.int()), "x must be float32, bfloat16 or float16"),
        (lambda: nk.residual_linear(x, w, norm_weight=ones(9)), "norm_weight must have shape"),
        (lambda: nk.residual_linear(x[0, 0], w), "x must have at least one dimension"),
        (lambda: nk.norm_swiglu(x, v, ones(7, 8)), "even number of rows"),
        (lambda: nk.norm_linear(x, v, w, ones(3)), "bias must have shape"),
    ]
    if path.on_gpu:
        cases.append((lambda: nk.residual_linear(x, w.cpu()), "weight must be on the device of x"))
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(TypeError, match="weight must be a tensor, got ndarray"):
        nk.residual_linear(x, w.cpu().numpy())


def test_unknown_instruction_sets_are_refused():
    with pytest.raises(RuntimeError, match="cpu capability must be one of"):
        _C.set_cpu_capability("altivec")


def op_samples(device: str = "cpu") -> dict[str, tuple]:
    x, w, b, g = (make(*s, device=device) for s in [(3, 16), (16, 16), (16,), (16,)])
    return {
        "residual_linear": (x, w, b, None, g, 1e-6),
        "norm_linear": (x, g, w, None, 1e-6),
        "norm_swiglu": (x, g, w, 1e-6),
    }


@pytest.mark.parametrize("name", ["residual_linear", "norm_linear", "norm_swiglu"])
def test_opcheck(path, name):
    sample = op_samples(path.device)[name]
    torch.library.opcheck(getattr(torch.ops.nbl, f"{name}_inference").default, sample)
    torch.library.opcheck(getattr(torch.ops.nbl, name).default, sample)
    leaves = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in sample]
    torch.library.opcheck(getattr(torch.ops.nbl, name).default, leaves)


@pytest.mark.parametrize("m", [2, 24])
def test_gradients_are_those_of_plain_torch(path, m):
    def gradients(residual_linear, dtype=torch.float32, device=path.device):
        shapes = [(m, 16), (16, 16), (16,), (16,)]
        leaves = [make(*s, dtype=dtype, device=device).requires_grad_() for s in shapes]
        x, w, b, g = leaves
        return torch.autograd.grad(residual_linear(x, w, b, None, g).square().sum(), leaves)

    plain = gradients(torch_residual_linear)
    exact = gradients(torch_residual_linear, torch.float64, "cpu")
    ours = gradients(lambda x, w, b, r, g: nk.residual_linear(x, w, b, r, norm_weight=g))
    for a, p, e in zip(ours, plain, exact):
        assert_rounding_only(a, p, e)


def test_compiles_with_gradients():
    w = torch.randn(16, 16, requires_grad=True)
    x = torch.randn(3, 16)
    torch.compile(lambda x: nk.residual_linear(x, w).sum(), fullgraph=True)(x).backward()
    torch.testing.assert_close(w.grad, x.sum(0).expand(16, 16))


def test_compiles_without_graph_breaks(path):
    x, layer = layer_calls(40, 64, torch.float32, path.device)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (1, 5, 40):
        actual, expected = compiled(x[:m]), layer(x[:m])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert path.on_gpu or torch.equal(actual, expected)


def test_devices_without_kernels_run_plain_torch():
    """What CUDA, MPS, … get: the composite implementation, called here on CPU tensors."""
    from nbl_kernels import _ops

    samples = op_samples()
    x, w, bias, residual, gamma, _ = samples["residual_linear"]
    plain = {
        "residual_linear": (torch_residual_linear, [x, w, bias, residual, gamma]),
        "norm_linear": (torch_norm_linear, [x, gamma, w, None]),
        "norm_swiglu": (torch_norm_swiglu, [x, gamma, w]),
    }
    for name, sample in samples.items():
        for op in (getattr(_ops, f"_{name}"), getattr(torch.ops.nbl, name)):
            assert_as_exact_as_torch(op(*sample), *plain[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_composites_keep_what_kernels_promise(dtype):
    """What runs where no kernel of ours does: contiguous, of x's dtype, whatever surrounds it."""
    x = make(4, 3, 40, dtype=dtype).transpose(0, 1)
    weight = make(40, 40, dtype=dtype, scale=40**-0.5)
    gate_up = make(48, 40, dtype=dtype, scale=40**-0.5)
    b, gamma = make(40, dtype=dtype), make(40, dtype=dtype)
    plain, eps = torch.ops.nbl, 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = [
            plain.residual_linear_plain(x, weight, b, None, gamma, eps),
            plain.norm_linear_plain(x, gamma, weight, b, eps),
            plain.norm_swiglu_plain(x, gamma, gate_up, eps),
        ]
    assert all(out.is_contiguous() and out.dtype == dtype for out in outs)
    inputs = [
        (torch_residual_linear, [x, weight, b, None, gamma]),
        (torch_norm_linear, [x, gamma, weight, b]),
        (torch_norm_swiglu, [x, gamma, gate_up]),
    ]
    for out, (torch_fn, arguments) in zip(outs, inputs):
        assert_as_exact_as_torch(out, torch_fn, arguments)
