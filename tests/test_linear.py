"""residual_linear, norm_linear, norm_swiglu: against float64, on every instruction set here."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_as_exact_as_torch, assert_rounding_only
from torch.nn import functional as F

import nbl_kernels as nk
from nbl_kernels import _C

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Odd sizes, tails of every vector width, and more rows than the skinny kernels take.
SHAPES = [
    (1, 64, 64),
    (3, 72, 72),
    (16, 200, 200),
    (17, 96, 96),
    (2, 1, 1),
    (5, 37, 37),
    (1, 1031, 1031),
]


@pytest.fixture(params=_C.cpu_capabilities())
def capability(request):
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability("")


def make(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 17 * len(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def torch_residual_linear(x, weight, bias, residual, norm_weight):
    f = x if norm_weight is None else F.rms_norm(x, x.shape[-1:], norm_weight, 1e-6)
    return (x if residual is None else residual) + F.linear(f, weight, bias)


def torch_norm_linear(x, norm_weight, weight, bias):
    return F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, 1e-6), weight, bias)


def torch_norm_swiglu(x, norm_weight, gate_up_weight):
    f = F.rms_norm(x, x.shape[-1:], norm_weight, 1e-6)
    gate, up = F.linear(f, gate_up_weight).chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, k, n", SHAPES)
@pytest.mark.parametrize("bias, norm", [(True, True), (False, False), (True, False), (False, True)])
def test_residual_linear(capability, dtype, m, k, n, bias, norm):
    x = make(m, k, dtype=dtype)
    weight = make(n, k, dtype=dtype, scale=k**-0.5)
    b = make(n, dtype=dtype) if bias else None
    gamma = make(k, dtype=dtype) if norm else None
    actual = nk.residual_linear(x, weight, b, norm_weight=gamma)
    assert_as_exact_as_torch(actual, torch_residual_linear, [x, weight, b, None, gamma])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", range(1, 18))
def test_every_number_of_rows(capability, dtype, m):
    k, n = 136, 90
    x, weight, b = make(m, k, dtype=dtype), make(n, k, dtype=dtype), make(n, dtype=dtype)
    residual, gamma = make(m, n, dtype=dtype), make(k, dtype=dtype)
    actual = nk.residual_linear(x, weight, b, residual, norm_weight=gamma)
    assert_as_exact_as_torch(actual, torch_residual_linear, [x, weight, b, residual, gamma])
    actual = nk.norm_linear(x, gamma, weight, b)
    assert_as_exact_as_torch(actual, torch_norm_linear, [x, gamma, weight, b])
    actual = nk.norm_swiglu(x, gamma, weight)
    assert_as_exact_as_torch(actual, torch_norm_swiglu, [x, gamma, weight])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f, k", [(1, 8), (33, 70), (100, 257)])
def test_norm_swiglu_shapes(capability, dtype, f, k):
    for m in (1, 4, 20):
        x, gamma, w = make(m, k, dtype=dtype), make(k, dtype=dtype), make(2 * f, k, dtype=dtype)
        assert_as_exact_as_torch(nk.norm_swiglu(x, gamma, w), torch_norm_swiglu, [x, gamma, w])


def test_references_are_the_formulas():
    x, w, g = (
        make(3, 40, dtype=torch.float64),
        make(40, 40, dtype=torch.float64),
        torch.rand(40).double(),
    )
    torch.testing.assert_close(
        nk.residual_linear_ref(x, w, norm_weight=g), torch_residual_linear(x, w, None, None, g)
    )
    torch.testing.assert_close(nk.norm_linear_ref(x, g, w), torch_norm_linear(x, g, w, None))
    torch.testing.assert_close(nk.norm_swiglu_ref(x, g, w), torch_norm_swiglu(x, g, w))


@pytest.mark.parametrize("m", [1, 30])
def test_strided_inputs_equal_contiguous_ones(m):
    k, n = 64, 48
    big_x, big_w = make(m, 2 * k, dtype=torch.bfloat16), make(n, 3 * k, dtype=torch.bfloat16)
    big_r = make(m, 2 * n, dtype=torch.bfloat16)
    views = {
        "rows": (big_x[:, :k], big_w[:, :k], big_r[:, :n]),
        "columns": (big_x[:, ::2], big_w[:, ::3], big_r[:, ::2]),
        "transposed": (
            make(k, m, dtype=torch.bfloat16).T,
            make(k, n, dtype=torch.bfloat16).T,
            make(n, m, dtype=torch.bfloat16).T,
        ),
    }
    bias = make(2 * n, dtype=torch.bfloat16)[::2]
    for x, w, r in views.values():
        dense = nk.residual_linear(
            x.contiguous(), w.contiguous(), bias.contiguous(), r.contiguous()
        )
        assert torch.equal(nk.residual_linear(x, w, bias, r), dense)


def test_leading_dimensions_and_default_residual():
    x, w = make(2, 3, 32, dtype=torch.float32), make(32, 32, dtype=torch.float32)
    out = nk.residual_linear(x, w)
    assert out.shape == x.shape
    assert torch.equal(out.reshape(6, 32), nk.residual_linear(x.reshape(6, 32), w))
    assert torch.equal(out, nk.residual_linear(x, w, None, x))
    vector = make(32, dtype=torch.float32)
    assert nk.residual_linear(vector, w).shape == (32,)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape):
    x, w, g = torch.zeros(shape), torch.zeros(8, 8), torch.ones(8)
    assert nk.residual_linear(x, w).shape == shape
    assert nk.norm_linear(x, g, torch.zeros(5, 8)).shape == (*shape[:-1], 5)
    assert nk.norm_swiglu(x, g, torch.zeros(6, 8)).shape == (*shape[:-1], 3)


@pytest.mark.parametrize("m", [2, 40])
def test_no_features_leave_bias_and_residual(m):
    x, w = torch.zeros(m, 0), torch.zeros(4, 0)
    bias, residual = torch.randn(4), torch.randn(m, 4)
    torch.testing.assert_close(nk.residual_linear(x, w, bias, residual), residual + bias)
    assert nk.norm_linear(x, torch.zeros(0), torch.zeros(0, 0)).shape == (m, 0)


@pytest.mark.parametrize("m", [1, 9, 33])
def test_non_finite_values_stay_in_their_row_or_column(m):
    x, w = make(m, 64, dtype=torch.bfloat16), make(64, 64, dtype=torch.bfloat16)
    clean = nk.residual_linear(x, w)
    x[0, 5] = float("nan")
    w[7, 3] = float("inf")
    out = nk.residual_linear(x, w)
    assert out[0].isnan().all()
    assert not out[1:, 7].isfinite().any()
    rest = [i for i in range(64) if i != 7]
    assert torch.equal(out[1:, rest], clean[1:, rest])


def test_reads_nothing_past_the_end_of_the_weight():
    """The last row of a view whose neighbours are NaN: tails must not be read into the sums."""
    storage = torch.full((10, 70), float("nan"), dtype=torch.bfloat16)
    storage[:9, :37] = make(9, 37, dtype=torch.bfloat16)
    out = nk.norm_linear(
        make(2, 37, dtype=torch.bfloat16), torch.ones(37).bfloat16(), storage[:9, :37]
    )
    assert out.isfinite().all()


def test_inputs_are_not_changed_and_may_be_read_only():
    import numpy as np

    array = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    array.flags.writeable = False
    with pytest.warns(UserWarning, match="not writable"):
        x = torch.from_numpy(array)
    w = torch.randn(16, 16)
    before = w.clone()
    nk.residual_linear(x, w)
    assert np.array_equal(array, x.numpy()) and torch.equal(w, before)


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


def test_errors_name_the_argument():
    x, w = torch.randn(2, 8), torch.randn(8, 8)
    cases = [
        (lambda: nk.residual_linear(x, torch.randn(8, 9)), "weight must have shape"),
        (lambda: nk.residual_linear(x, torch.randn(8)), "weight must have 2 dimensions"),
        (lambda: nk.residual_linear(x, torch.randn(5, 8)), "residual must have the shape"),
        (lambda: nk.residual_linear(x, w, torch.randn(7)), "bias must have shape"),
        (lambda: nk.residual_linear(x, w.bfloat16()), "weight must have the dtype of x"),
        (lambda: nk.residual_linear(x.int(), w.int()), "x must be float32, bfloat16 or float16"),
        (
            lambda: nk.residual_linear(x, w, norm_weight=torch.ones(9)),
            "norm_weight must have shape",
        ),
        (lambda: nk.residual_linear(torch.tensor(1.0), w), "x must have at least one dimension"),
        (lambda: nk.norm_swiglu(x, torch.ones(8), torch.randn(7, 8)), "even number of rows"),
        (lambda: nk.norm_linear(x, torch.ones(8), w, torch.ones(3)), "bias must have shape"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(TypeError, match="weight must be a tensor, got ndarray"):
        nk.residual_linear(x, w.numpy())
    with pytest.raises(RuntimeError, match="cpu capability must be one of"):
        _C.set_cpu_capability("altivec")


def op_samples():
    x, w, b, g = (make(*s, dtype=torch.float32) for s in [(3, 16), (16, 16), (16,), (16,)])
    return {
        "residual_linear": (x, w, b, None, g, 1e-6),
        "norm_linear": (x, g, w, None, 1e-6),
        "norm_swiglu": (x, g, w, 1e-6),
    }


@pytest.mark.parametrize("name", ["residual_linear", "norm_linear", "norm_swiglu"])
def test_opcheck(name):
    sample = op_samples()[name]
    torch.library.opcheck(getattr(torch.ops.nbl, f"{name}_inference").default, sample)
    torch.library.opcheck(getattr(torch.ops.nbl, name).default, sample)
    leaves = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in sample]
    torch.library.opcheck(getattr(torch.ops.nbl, name).default, leaves)


@pytest.mark.parametrize("m", [2, 24])
def test_gradients_are_those_of_plain_torch(m):
    def gradients(residual_linear, dtype=torch.float32):
        shapes = [(m, 16), (16, 16), (16,), (16,)]
        x, w, b, g = (make(*s, dtype=dtype).requires_grad_() for s in shapes)
        return torch.autograd.grad(residual_linear(x, w, b, None, g).square().sum(), (x, w, b, g))

    plain, exact = (gradients(torch_residual_linear, t) for t in (torch.float32, torch.float64))
    ours = gradients(lambda x, w, b, r, g: nk.residual_linear(x, w, b, r, norm_weight=g))
    for a, p, e in zip(ours, plain, exact):
        assert_rounding_only(a, p, e)


def test_compiles_with_gradients():
    w = torch.randn(16, 16, requires_grad=True)
    x = torch.randn(3, 16)
    torch.compile(lambda x: nk.residual_linear(x, w).sum(), fullgraph=True)(x).backward()
    torch.testing.assert_close(w.grad, x.sum(0).expand(16, 16))


def test_compiles_without_graph_breaks():
    g, w, up = torch.randn(32), torch.randn(32, 32), torch.randn(64, 32)

    def layer(x):
        h = nk.residual_linear(x, w, norm_weight=g)
        return nk.residual_linear(nk.norm_swiglu(h, g, up), w, None, h) + nk.norm_linear(x, g, w)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (1, 5, 40):
        x = torch.randn(m, 32)
        assert torch.equal(compiled(x), layer(x))


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


@pytest.mark.parametrize("dtype", DTYPES)
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
