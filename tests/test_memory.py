"""memory_scan and memory_linear: against a float64 loop, however the tokens are split over calls, on
every instruction set here."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_rounding_only
from torch import Tensor

import nbl_kernels as nk
from nbl_kernels import _C

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS = [
    ((1,), (0.6, 0.95)),
    ((2,), ()),
    ((1, 3), (0.3, 0.8, 0.99)),
    ((), (0.9,)),
    ((3, 1), (0.5,)),
    ((8,), ()),
    ((), ()),
]
# batch, tokens, K, r, N
SHAPES = [
    (1, 1, 64, 16, 64),
    (2, 7, 40, 24, 40),
    (3, 5, 32, 7, 48),  # tails of every vector width
    (1, 3, 96, 130, 20),  # more than two groups of channels
    (2, 40, 32, 16, 32),  # many rows: the wide linears
    (1, 100, 24, 9, 24),
]


@pytest.fixture(params=_C.cpu_capabilities())
def capability(request):
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability("")


def make_scan(
    batch: int,
    tokens: int,
    k: int,
    r: int,
    n: int,
    dtype: torch.dtype = torch.float32,
    filters: tuple[tuple[int, ...], tuple[float, ...]] = FILTERS[0],
    *,
    norm: bool = False,
    map_u: bool = True,
    bias: bool = True,
    residual: bool = True,
    masked: bool = False,
    started: bool = False,
    history: int | None = None,
    seed: int = 0,
) -> dict[str, object]:
    """Arguments of memory_scan. `map_u` False: no weight_u, and then n is r. `masked`: padding on
    the left, on the right and in between, whole rows of it too, all NaN in x."""
    g = torch.Generator().manual_seed(seed)
    n = n if map_u else r

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    lags, decays = filters
    branches, slots = 1 + len(lags) + len(decays), sum(lags) + len(decays)
    a: dict[str, object] = {
        "x": normal(batch, tokens, k),
        "weight_v": normal(branches * r, k, scale=k**-0.5),
        "weight_u": normal(n, r, scale=r**-0.5) if map_u else None,
        "bias": normal(n) if bias else None,
        "residual": normal(batch, tokens, n) if residual or n != k else None,
        "state": torch.randn((batch, slots, r), generator=g),
        "lags": lags,
        "decays": decays,
    }
    if norm:
        a |= {"norm_weight": normal(k).add(1), "norm_eps": 1e-3}
    if masked:
        a["mask"] = padding(batch, tokens, g)
        a["x"][~a["mask"]] = float("nan")
        if a["residual"] is None:  # which is x then: the result must be a number
            a["residual"] = normal(batch, tokens, n)
    if started:
        a["starts"] = torch.rand((batch, tokens), generator=g) < 0.2
    if history is not None:
        a["history"] = torch.full((batch, min(history, tokens), slots, r), -7.0)
    return a


def padding(batch: int, tokens: int, g: torch.Generator) -> Tensor:
    mask = torch.rand((batch, tokens), generator=g) < 0.7
    for b in range(batch):
        cut = tokens // 3
        if b % 3 == 0:
            mask[b, :cut] = False
        elif b % 3 == 1:
            mask[b, tokens - cut :] = False
    if batch > 2:
        mask[2] = False
    return mask


def copied(a: dict[str, object]) -> dict[str, object]:
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in a.items()}


def plain(**a) -> Tensor:
    """The plain PyTorch operator, with memory_scan's arguments."""
    with torch.autocast(a["x"].device.type, dtype=torch.bfloat16):
        return torch.ops.nbl.memory_scan_plain(*positional(**a))


def positional(
    *,
    x,
    weight_v,
    weight_u=None,
    bias=None,
    residual=None,
    state,
    lags,
    decays,
    mask=None,
    starts=None,
    history=None,
    norm_weight=None,
    norm_eps=1e-6,
    weight_v_scale=None,
    weight_u_scale=None,
) -> tuple:
    first = (x, weight_v, weight_u, bias, residual, norm_weight, norm_eps, state, history)
    return (*first, lags, decays, mask, starts, weight_v_scale, weight_u_scale)


def in_float64(a: dict[str, object]) -> dict[str, object]:
    """The same numbers in float64 (quantized weights as they are)."""
    kept = ("weight_v_scale", "weight_u_scale")
    return {
        name: v.double().cpu()
        if isinstance(v, Tensor) and name not in kept and v.dtype in (*DTYPES, torch.float64)
        else v.clone().cpu()
        if isinstance(v, Tensor)
        else v
        for name, v in a.items()
    }


def assert_scan_right(a: dict[str, object], scan=nk.memory_scan) -> None:
    """The result, the state and the history of one call, against float64."""
    mine, theirs, exact = copied(a), copied(a), in_float64(a)
    outs = [scan(**mine), plain(**theirs), nk.memory_scan_ref(**exact)]
    assert outs[0].is_contiguous()
    for name in a.keys() - {"state", "history"}:
        if isinstance(a[name], Tensor):
            assert torch.equal(mine[name].nan_to_num(9.0), a[name].nan_to_num(9.0)), name
    assert_rounding_only(*(t.cpu() for t in outs))
    for name in ("state", "history"):
        if isinstance(a.get(name), Tensor):
            assert mine[name].dtype is torch.float32
            # What is remembered are sums of numbers of x's dtype: the rule of that one.
            rounded = [t[name].cpu() for t in (mine, theirs)]
            assert_state_rounding_only(*rounded, exact[name], a["x"].dtype)


def assert_state_rounding_only(actual: Tensor, torchs: Tensor, exact: Tensor, dtype) -> None:
    """tolerance.assert_rounding_only for float32 numbers made of some that were rounded to dtype."""
    assert actual.shape == exact.shape
    if not exact.numel():
        return
    eps = torch.finfo(dtype).eps / 2 * exact.abs().max().item()
    error, allowed = ((t.double() - exact).abs().max().item() for t in (actual, torchs))
    assert error <= (4 if dtype is torch.float32 else 2) * max(allowed, eps), (error, allowed, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS[:4], ids=str)
def test_memory_scan(capability, dtype, shape, filters):
    assert_scan_right(make_scan(*shape, dtype, filters, norm=True, history=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("map_u", [True, False])
@pytest.mark.parametrize("masked, started", [(True, False), (False, True), (True, True)])
def test_masks_and_starts(dtype, filters, map_u, masked, started):
    for seed, shape in enumerate([(3, 9, 24, 24, 24), (4, 33, 16, 11, 30), (3, 1, 8, 8, 8)]):
        a = make_scan(
            *shape,
            dtype,
            filters,
            map_u=map_u,
            masked=masked,
            started=started,
            history=5,
            bias=seed != 1,
            seed=seed,
        )
        for scan in (nk.memory_scan, plain, nk.memory_scan_ref):
            assert_scan_right(a, scan)
