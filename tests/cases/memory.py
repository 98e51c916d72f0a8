"""Arguments of memory_scan, and what must come out."""

from __future__ import annotations

import torch
from tolerance import assert_rounding_only, max_error
from torch import Tensor

import nbl_kernels as nk
from cases import DTYPES

FILTERS = [
    ((1,), (0.6, 0.95)),
    ((2,), ()),
    ((1, 3), (0.3, 0.8, 0.99)),
    ((), (0.9,)),
    ((3, 1), (0.5,)),
    ((8,), ()),
    ((), ()),
]


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
    device: str = "cpu",
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
        "weight_u": normal(n, r, scale=max(r, 1) ** -0.5) if map_u else None,
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
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in a.items()}


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


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def assert_scan_right(a: dict[str, object], *scans) -> None:
    """The result, the state and the history of one call of each, against float64."""
    theirs, exact = copied(a), in_float64(a)
    torchs, exact_out = plain(**theirs), nk.memory_scan_ref(**exact)
    for scan in scans or [nk.memory_scan]:
        mine = copied(a)
        out = scan(**mine)
        assert out.is_contiguous()
        for name in a.keys() - {"state", "history"}:
            if isinstance(a[name], Tensor):
                assert torch.equal(bits(mine[name]), bits(a[name])), f"{name} was changed"
        assert_rounding_only(out, torchs, exact_out)
        for name in ("state", "history"):
            if isinstance(a.get(name), Tensor):
                both = mine[name].cpu(), theirs[name].cpu()
                assert_states_rounding_only(*both, exact[name], a["x"].dtype)


def assert_states_rounding_only(
    actual: Tensor, torchs: Tensor, exact: Tensor, dtype: torch.dtype
) -> None:
    """tolerance.assert_rounding_only for float32 numbers that are made of some rounded to dtype."""
    assert actual.shape == exact.shape and actual.dtype is torch.float32
    if exact.numel():
        rounding = torch.finfo(dtype).eps / 2 * exact.abs().max().item()
        allowed = max(max_error(torchs, exact), rounding) * (4 if dtype is torch.float32 else 2)
        assert max_error(actual, exact) <= allowed, (max_error(actual, exact), allowed)


def selecting(a: dict[str, object]) -> dict[str, object]:
    """With a V whose products are exact, so that g does not depend on which linear makes it."""
    rows, k = a["weight_v"].shape
    v = torch.zeros(rows, k)
    v[torch.arange(rows), torch.arange(rows) * 7 % k] = 0.5
    return a | {"weight_v": v.to(a["weight_v"])}
