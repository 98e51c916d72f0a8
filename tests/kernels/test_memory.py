"""memory_scan and memory_linear: against a float64 loop, however the tokens are split over calls,
on every path."""

from __future__ import annotations

import itertools

import devices
import numpy as np
import pytest
import torch
from cases import DTYPES
from cases.memory import (
    FILTERS,
    assert_scan_right,
    assert_states_rounding_only,
    copied,
    in_float64,
    make_scan,
    padding,
    plain,
    positional,
    selecting,
)
from tolerance import assert_rounding_only
from torch import Tensor

import nbl_kernels as nk
from nbl_kernels.filters import Filters, filter_features

every_path = devices.paths("memory", "kernel", "plain")
path = devices.paths("memory", "kernel", "plain", capabilities=False)
instruction_set = devices.paths("memory")  # for what only the CPU's kernel promises

# batch, tokens, K, r, N
SHAPES = [
    (1, 1, 64, 16, 64),
    (2, 7, 40, 24, 40),
    (3, 5, 32, 7, 48),  # tails of every vector width
    (1, 3, 96, 130, 20),  # more than two groups of channels
    (2, 40, 32, 16, 32),  # many rows: the wide linears
    (1, 100, 24, 9, 24),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_scan(every_path, dtype, shape):
    for filters in FILTERS[:3]:
        options = {"norm": True, "history": 3, "device": every_path.device}
        assert_scan_right(make_scan(*shape, dtype, filters, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("masked, started", [(True, False), (False, True), (True, True)])
def test_masks_and_starts(path, dtype, filters, masked, started):
    """One token, some, a token more than a block of a GPU takes, many; tails of its channels."""
    flags = {"masked": masked, "started": started, "history": 4, "device": path.device}
    shapes = [(3, 9, 24, 24, 24), (4, 21, 16, 11, 30), (3, 1, 8, 8, 8)]
    if path.on_gpu:
        shapes += [(1, 64, 40, 7, 40), (2, 65, 96, 130, 96), (2, 300, 48, 24, 48)]
    for seed, shape in enumerate(shapes):
        a = make_scan(*shape, dtype, filters, map_u=seed != 0, bias=seed != 1, seed=seed, **flags)
        assert_scan_right(a, nk.memory_scan, plain, nk.memory_scan_ref)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_optional_left_out(path, dtype):
    for map_u in (True, False):
        options = {"bias": False, "residual": False, "map_u": map_u, "device": path.device}
        a = make_scan(2, 5, 24, 24, 24, dtype, **options)
        assert_scan_right(a, nk.memory_scan, plain)
        short = {name: a[name] for name in ("x", "weight_v", "weight_u", "state")}  # the defaults
        assert_scan_right(short | {"lags": (1,), "decays": (0.6, 0.95)})
        assert torch.equal(nk.memory_scan(**copied(short)), nk.memory_scan(**copied(a)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format_v", [None, "int8", "fp8", "int4"])
@pytest.mark.parametrize("format_u", [None, "int8", "fp8", "int4"])
def test_quantized(path, dtype, format_v, format_u):
    for tokens in (1, 40):
        options = {"norm": True, "masked": True, "device": path.device}
        a = make_scan(2, tokens, 150, 40, 150, dtype, **options)
        for name, format in (("weight_v", format_v), ("weight_u", format_u)):
            if format is not None:
                a[name], a[f"{name}_scale"] = nk.quantize(a[name].float(), format)
        assert_scan_right(a, nk.memory_scan, plain)


def test_reference_is_the_formula():
    """c = V₀ f + Σ V_l f_{t-l} + Σ_a (1 - a) Σ_s a^s V_a f_{t-s}, written out."""
    a = in_float64(make_scan(1, 9, 6, 4, 6, filters=((2, 3), (0.5, 0.9)), bias=False))
    a["state"].zero_()
    f, v = a["x"][0], a["weight_v"].view(5, 4, 6)
    for t in range(9):
        c = v[0] @ f[t]
        c = c + (v[1] @ f[t - 2] if t >= 2 else 0) + (v[2] @ f[t - 3] if t >= 3 else 0)
        for i, decay in ((3, 0.5), (4, 0.9)):
            c = c + sum((1 - decay) * decay**s * (v[i] @ f[t - s]) for s in range(t + 1))
        state = a["state"].clone()
        cut = a | {name: a[name][:, : t + 1] for name in ("x", "residual")} | {"state": state}
        expected = a["residual"][0, t] + a["weight_u"] @ c
        torch.testing.assert_close(nk.memory_scan_ref(**cut)[0, t], expected)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("own", [True, False])
def test_filter_features_is_the_loop(filters, own):
    """Its branches and states beside those of the reference, where V selects."""
    lags, decays = filters
    branches, slots = 1 + len(lags) + len(decays), sum(lags) + len(decays)
    g = torch.Generator().manual_seed(3)
    batch, tokens, r = 4, 150, 3
    x = torch.randn((batch, tokens, branches if own else 1, r), generator=g, dtype=torch.float64)
    state = torch.randn((batch, slots, r), generator=g, dtype=torch.float64)
    for masked in (False, True):
        for started in (False, True):
            mask = padding(batch, tokens, g) if masked else None
            starts = torch.rand((batch, tokens), generator=g) < 0.05 if started else None
            mine = x if mask is None else x.masked_fill(~mask[..., None, None], float("nan"))
            got, states = filter_features(
                mine if own else mine[:, :, 0],
                Filters(lags, decays),
                own=own,
                state=state,
                mask=mask,
                starts=starts,
            )
            wide = x.expand(-1, -1, branches, -1).flatten(2)
            history, last = state.new_empty(batch, tokens, slots, r), state.clone()
            c = nk.memory_scan_ref(
                wide,
                torch.eye(branches * r, dtype=torch.float64),
                residual=torch.zeros(batch, tokens, r, dtype=torch.float64),
                state=last,
                history=history,
                lags=lags,
                decays=decays,
                mask=mask,
                starts=starts,
            )
            torch.testing.assert_close(got.sum(dim=2), c)
            torch.testing.assert_close(states, history)
            assert torch.equal(history[:, -1], last)


# ---- However the tokens are split ----------------------------------------------------------------


def in_parts(a: dict[str, object], cuts: list[int], scan=nk.memory_scan) -> tuple[Tensor, Tensor]:
    """(out, state) of calls on the tokens between the cuts."""
    state, outs = a["state"].clone(), []
    names = [n for n in ("x", "residual", "mask", "starts") if a.get(n) is not None]
    for begin, end in itertools.pairwise(cuts):
        part = {name: a[name][:, begin:end] for name in names}
        outs.append(scan(**(a | part | {"state": state})))
    return torch.cat(outs, dim=1), state


def one_by_one(a: dict[str, object]) -> tuple[Tensor, Tensor]:
    state, outs = a["state"].clone(), []
    options = {n: v for n, v in a.items() if n not in ("x", "residual", "starts", "mask", "state")}
    for t in range(a["x"].shape[1]):
        residual = None if a["residual"] is None else a["residual"][:, t]
        reset = None if a.get("starts") is None else a["starts"][:, t]
        token = {"residual": residual, "reset": reset, "state": state}
        outs.append(nk.memory_linear(a["x"][:, t], **(options | token)))
    return torch.stack(outs, dim=1), state


SPLITS = [[0, 50], [0, 1, 50], [0, 3, 3, 20, 21, 50], [*range(0, 50, 7), 50], [*range(51)]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_filter_leaves_the_same_bits_however_tokens_are_split(instruction_set, dtype, filters):
    a = selecting(make_scan(3, 50, 40, 70, 70, dtype, filters, map_u=False, started=True))
    a["residual"] = a["residual"].where(torch.rand(3, 50, 1) < 0.5, 0)
    for masked in (False, True):
        if masked:
            a["mask"] = padding(3, 50, torch.Generator().manual_seed(1))
        whole = in_parts(a, [0, 50])
        for cuts in SPLITS:
            assert all(map(torch.equal, in_parts(a, cuts), whole))
        if not masked:
            assert all(map(torch.equal, one_by_one(a), whole))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls_of_few_rows_leave_the_same_bits(instruction_set, dtype):
    """Up to 16 rows, which the skinny linears take one like the other: a draft of tokens that is
    verified at once is what it would be token by token."""
    a = make_scan(2, 8, 200, 24, 72, dtype, norm=True, started=True)
    whole = in_parts(a, [0, 8])
    for cuts in ([0, 1, 8], [0, 3, 4, 8], [*range(9)]):
        assert all(map(torch.equal, in_parts(a, cuts), whole))
    assert all(map(torch.equal, one_by_one(a), whole))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_split_is_as_exact_as_one_call(path, dtype):
    """The linears sum in another order for one row than for many: that, and nothing else."""
    a = make_scan(2, 150, 64, 24, 64, dtype, norm=True, started=True, device=path.device)
    splits = [[0, 150], [0, 1, 150], [0, 3, 3, 64, 70, 71, 150], [*range(0, 150, 7), 150]]
    theirs, exact = copied(a), in_float64(a)
    torchs, exact_out = plain(**theirs), nk.memory_scan_ref(**exact)
    for out, state in [*(in_parts(a, cuts) for cuts in [*splits, [*range(151)]]), one_by_one(a)]:
        assert_rounding_only(out, torchs, exact_out)
        both = state.cpu(), theirs["state"].cpu()
        assert_states_rounding_only(*both, exact["state"], dtype)


def test_history_is_what_the_state_was():
    a = selecting(make_scan(2, 12, 16, 20, 20, torch.bfloat16, ((2,), (0.7,)), map_u=False))
    whole = a | {"state": a["state"].clone(), "history": torch.empty(2, 5, 3, 20)}
    nk.memory_scan(**whole)
    for i in range(5):
        assert torch.equal(in_parts(a, [0, 8 + i])[1], whole["history"][:, i])
    assert torch.equal(whole["history"][:, -1], whole["state"])


def test_packed_sequences_do_not_see_each_other():
    """Sequences side by side, padded anyhow, or one after another with starts: the same bits."""
    for filters in FILTERS:
        a = selecting(make_scan(1, 15, 16, 20, 20, filters=filters, map_u=False, started=False))
        cuts = [0, 4, 5, 15]
        starts = torch.zeros(1, 15, dtype=torch.bool)
        starts[0, cuts[1:-1]] = True
        packed = copied(a | {"starts": starts})
        packed_out = nk.memory_scan(**packed)
        state = a["state"]
        for begin, end in itertools.pairwise(cuts):
            alone = a | {"state": state.clone()}
            alone |= {name: a[name][:, begin:end] for name in ("x", "residual")}
            out = nk.memory_scan(**alone)
            assert torch.equal(out, packed_out[:, begin:end])
            mask = torch.zeros(1, 15, dtype=torch.bool)
            mask[:, torch.randperm(15)[: end - begin].sort().values] = True
            padded = a | {"state": state.clone(), "mask": mask}
            for name in ("x", "residual"):
                padded[name] = torch.full_like(a[name], float("nan"))
                padded[name][mask] = a[name][0, begin:end]
            assert torch.equal(nk.memory_scan(**padded)[mask], out[0])
            assert torch.equal(padded["state"], alone["state"])
            state = torch.zeros_like(state)
        assert torch.equal(packed["state"], alone["state"])


def test_tokens_that_are_not_there_change_nothing(path):
    a = make_scan(2, 6, 16, 8, 16, history=6, device=path.device)
    a["x"].fill_(float("nan"))
    before = a["state"].clone()
    absent = torch.zeros(2, 6, dtype=torch.bool, device=path.device)
    out = nk.memory_scan(**(a | {"mask": absent, "starts": ~absent}))
    assert torch.equal(out, a["residual"] + a["bias"])
    assert torch.equal(a["state"], before)
    assert torch.equal(a["history"], before[:, None].expand(-1, 6, -1, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reset_forgets(path, dtype):
    a = make_scan(3, 1, 24, 8, 24, dtype, device=path.device)
    a |= {name: a[name][:, 0] for name in ("x", "residual")}
    fresh = copied(a)
    fresh["state"][1] = 0
    state = a["state"]
    out = nk.memory_linear(**a, reset=torch.tensor([False, True, False], device=path.device))
    assert out.shape == (3, 24) and torch.equal(out, nk.memory_linear(**fresh))
    assert torch.equal(state, fresh["state"])
    exact = in_float64(fresh)
    reference = nk.memory_linear_ref(**exact, reset=torch.tensor([False, True, False]))
    assert reference.shape == (3, 24)


def test_is_deterministic(path):
    options = {"masked": True, "started": True, "history": 9, "device": path.device}
    a = make_scan(3, 200, 64, 100, 64, torch.bfloat16, **options)
    calls = [copied(a) for _ in range(5)]
    outs = [nk.memory_scan(**call) for call in calls]
    for call, out in zip(calls, outs):
        assert torch.equal(out, outs[0])
        assert all(torch.equal(call[name], calls[0][name]) for name in ("state", "history"))


def test_results_do_not_depend_on_threads():
    a = make_scan(5, 33, 96, 200, 96, torch.bfloat16, norm=True, masked=True, started=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            mine = copied(a)
            results.append((nk.memory_scan(**mine), mine["state"]))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


# ---- Arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("map_u", [True, False])
@pytest.mark.parametrize("tokens", [5, 70])
def test_strides(path, dtype, map_u, tokens):
    """Views of everything; nothing beside what is written."""
    flags = {"masked": True, "started": True, "history": 3, "norm": True, "map_u": map_u}
    a = make_scan(3, tokens, 24, 7, 24, dtype, **flags, device=path.device)
    expected = copied(a)
    expected_out = nk.memory_scan(**expected)

    def inside(t: Tensor, last: int) -> tuple[Tensor, Tensor]:
        sizes = [2 * n + 1 for n in t.shape[:-1]] + [last * t.shape[-1] + 1]
        fill = 1 if t.dtype is torch.bool else -7
        storage = torch.full(sizes, fill, dtype=t.dtype, device=path.device)
        steps = [slice(1, None, 2)] * (t.dim() - 1) + [slice(1, None, last)]
        return storage, storage[tuple(steps)].copy_(t)

    views, storages = dict(a), {}
    for name, t in a.items():
        if isinstance(t, Tensor):
            storages[name], views[name] = inside(t, 1 if name in ("state", "history") else 2)

    exact = in_float64(a)
    exact_out = nk.memory_scan_ref(**exact)

    def assert_same(out: Tensor, written: dict[str, object]) -> None:
        if not path.on_gpu:
            assert torch.equal(out, expected_out)
            assert all(torch.equal(written[name], expected[name]) for name in ("state", "history"))
            return
        # There the strides decide in which order PyTorch's products, and ours, are summed.
        assert_rounding_only(out, expected_out, exact_out)
        for name in ("state", "history"):
            both = written[name].cpu(), expected[name].cpu()
            assert_states_rounding_only(*both, exact[name], dtype)

    assert_same(nk.memory_scan(**views), views)
    for name in ("state", "history"):
        views[name].fill_(-7)
        assert (storages[name] == -7).all()
    a["x"] = a["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert_same(nk.memory_scan(**a), a)


@pytest.mark.parametrize("map_u", [True, False])
def test_empty(path, map_u):
    options = {"map_u": map_u, "device": path.device}
    for batch, tokens, r in [(0, 3, 8), (2, 0, 8), (0, 0, 8), (2, 3, 0)]:
        a = make_scan(batch, tokens, 16, r, 16, history=2, **options)
        before = a["state"].clone()
        for scan in (nk.memory_scan, plain):
            out = scan(**a)
            assert out.shape == (batch, tokens, 16 if map_u else r)
            assert torch.equal(a["state"], before)
            if map_u and r == 0:
                torch.testing.assert_close(out, a["residual"] + a["bias"])
    a = make_scan(0, 1, 16, 8, 16, **options)
    a |= {name: a[name][:, 0] for name in ("x", "residual")}
    assert nk.memory_linear(**a).shape == a["residual"].shape


BAD = {
    "x must be float32": lambda a: {"x": a["x"].int()},
    r"x must have shape \(batch, tokens, K\), got \(2, 16\)": lambda a: {"x": a["x"][:, 0]},
    r"weight_v must have shape \(4 · r, K\)": lambda a: {"weight_v": a["weight_v"][1:]},
    r"weight_v must have shape \(N, 16\) for x": lambda a: {"weight_v": a["weight_v"][:, 1:]},
    "weight_v must have the dtype of x": lambda a: {"weight_v": a["weight_v"].half()},
    "weight_v_scale must be given": lambda a: {"weight_v": a["weight_v"].to(torch.int8)},
    "weight_v_scale must be None": lambda a: {"weight_v_scale": torch.ones(32)},
    r"weight_u must have shape \(N, 8\) for weight_v of shape \(32, 16\)": lambda a: {
        "weight_u": a["weight_u"][:, 1:]
    },
    "weight_u must have 2 dimensions": lambda a: {"weight_u": a["weight_u"][0]},
    "weight_u_scale must have shape": lambda a: {
        "weight_u": a["weight_u"].to(torch.int8),
        "weight_u_scale": torch.ones(1),
    },
    "weight_u_scale must be None without": lambda a: {
        "weight_u": None,
        "weight_u_scale": torch.ones(16),
    },
    "bias must have shape": lambda a: {"bias": torch.ones(15)},
    r"residual must have shape \(2, 3, 16\)": lambda a: {"residual": torch.ones(2, 16)},
    r"residual must be given .* N = 8": lambda a: {
        "weight_u": None,
        "residual": None,
        "bias": None,
    },
    "norm_weight must have shape": lambda a: {"norm_weight": torch.ones(8)},
    r"state must have shape \(2, 3, 8\)": lambda a: {"state": torch.ones(2, 2, 8)},
    "state must be float32, got bfloat16": lambda a: {"state": torch.ones(2, 3, 8).bfloat16()},
    "state must be contiguous in its last": lambda a: {"state": torch.ones(2, 8, 3).mT},
    r"history must have shape \(2, at most 3, 3, 8\)": lambda a: {
        "history": torch.ones(2, 4, 3, 8)
    },
    "history must be float32": lambda a: {"history": torch.ones(2, 2, 3, 8).half()},
    "history must be contiguous": lambda a: {"history": torch.ones(2, 2, 8, 3).mT},
    r"mask must have shape \(2, 3\)": lambda a: {"mask": torch.ones(3).bool()},
    "mask must be bool, got int64": lambda a: {"mask": torch.ones(2, 3).long()},
    "starts must be bool": lambda a: {"starts": torch.ones(2, 3)},
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument_and_nothing_is_written(path, message):
    a = make_scan(2, 3, 16, 8, 16, history=2, device=path.device)
    before = copied(a)
    changes = {n: t if t is None else t.to(path.device) for n, t in BAD[message](a).items()}
    bad = a | changes
    with pytest.raises(RuntimeError, match="memory_scan: " + message):
        nk.memory_scan(**bad)
    if path.on_gpu:
        with pytest.raises(RuntimeError, match="memory_scan: state must be on the device of x"):
            nk.memory_scan(**(a | {"state": a["state"].cpu()}))
    if bad["x"].is_floating_point() and not {"contiguous", "None"} & set(message.split()):
        bad["x"] = bad["x"].clone().requires_grad_()  # the checks of gradients and of tracing
        with pytest.raises(RuntimeError, match="memory_scan: "):
            nk.memory_scan(**bad)
    assert all(torch.equal(a[name], before[name]) for name in ("state", "history"))


@pytest.mark.parametrize(
    "message, change",
    [
        (r"lags: expected positive ints, got \(0,\)", {"lags": (0,)}),
        ("lags: expected positive ints", {"lags": (1.0,)}),
        ("lags: expected distinct ones", {"lags": (1, 1)}),
        ("decays: expected numbers between 0 and 1", {"decays": (1.0,)}),
        ("lags, decays: expected at most 8 vectors", {"lags": (9,)}),
    ],
)
def test_filters_are_checked(message, change):
    with pytest.raises(ValueError, match=message):
        nk.memory_scan(**(make_scan(1, 1, 8, 4, 8) | change))


def test_the_operator_checks_filters_itself():
    a = make_scan(1, 1, 8, 4, 8)
    for change, message in (
        ({"lags": [0]}, "lags must be from 1 to 8, got 0"),
        ({"lags": [5, 4]}, "lags and decays must be at most 8 vectors of state"),
        ({"decays": [0.5, float("nan")]}, "decays must be between 0 and 1, got nan"),
    ):
        with pytest.raises(RuntimeError, match="memory_scan: " + message):
            torch.ops.nbl.memory_scan(*positional(**(a | change)))


def test_memory_linear_checks_dimensions():
    a = make_scan(2, 1, 8, 4, 8)
    flat = a | {name: a[name][:, 0] for name in ("x", "residual")}
    for name, bad in (("x", a["x"]), ("residual", a["residual"]), ("reset", torch.ones(2, 1))):
        with pytest.raises(RuntimeError, match=f"memory_linear: {name} must have shape"):
            nk.memory_linear(**(flat | {name: bad}))


def test_numpy_arrays():
    a = make_scan(2, 5, 16, 8, 16, norm=True, masked=True, started=True, history=2)
    expected = copied(a)
    expected_out = nk.memory_scan(**expected)

    def arrays() -> dict[str, object]:
        return {n: v.clone().numpy() if isinstance(v, Tensor) else v for n, v in a.items()}

    mine = arrays()
    mine["x"].flags.writeable = False
    out = nk.memory_scan(**mine)
    assert isinstance(out, np.ndarray) and np.array_equal(out, expected_out.numpy())
    for name in ("state", "history"):
        assert np.array_equal(mine[name], expected[name].numpy())
        read_only = arrays()
        read_only[name].flags.writeable = False
        with pytest.raises(ValueError, match=f"memory_scan: {name} is written to"):
            nk.memory_scan(**read_only)
    with pytest.raises(TypeError, match="memory_scan: x must be a tensor, got ndarray"):
        nk.memory_scan(**(arrays() | {"state": a["state"]}))
    token = {n: v for n, v in arrays().items() if n not in ("mask", "starts", "history")}
    token |= {"x": token["x"][:, -1].copy(), "residual": token["residual"][:, -1].copy()}
    token["x"][:] = 1
    out = nk.memory_linear(**token, reset=np.array([True, False]))
    assert isinstance(out, np.ndarray) and out.shape == (2, 16)


# ---- Tracing and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(path, everything):
    flags = {"norm": True, "started": True, "history": 2} if everything else {"map_u": False}
    a = make_scan(2, 3, 16, 16, 16, **flags, device=path.device)
    if everything:
        a["mask"] = padding(2, 3, torch.Generator().manual_seed(0)).to(path.device)
    torch.library.opcheck(torch.ops.nbl.memory_scan.default, positional(**a))


def test_compiles_without_graph_breaks(path):
    options = {"norm": True, "masked": True, "started": True, "history": 2}
    a = make_scan(2, 5, 16, 8, 16, **options, device=path.device)
    a["x"] = a["x"].nan_to_num(1.0)
    # A layer's state is a view.
    whole = torch.zeros(3, *a["state"].shape, device=path.device)

    def step(x: Tensor, whole: Tensor, history: Tensor) -> Tensor:
        inputs = a | {"x": x * 2, "state": whole[1], "history": history}
        out = nk.memory_scan(**inputs) + 1
        token = {name: a[name] for name in ("weight_v", "weight_u", "lags", "decays")}
        return out + nk.memory_linear(x[:, 0], **token, state=whole[2])[:, None]

    compiled_whole, compiled_history = whole.clone(), a["history"].clone()
    torch.compiler.reset()
    out = torch.compile(step, fullgraph=True)(a["x"], compiled_whole, compiled_history)
    torch.testing.assert_close(out, step(a["x"], whole, a["history"]))
    torch.testing.assert_close(compiled_whole, whole)
    torch.testing.assert_close(compiled_history, a["history"])
    assert whole[1].count_nonzero() and whole[2].count_nonzero() and not whole[0].any()


def test_compiles_once_for_every_length():
    """With sizes, and norm_eps, that are known when it runs. Not by inductor: with unknown sizes
    that of torch 2.13 has what an operator writes to a view of an input end up elsewhere."""

    def step(tensors: dict[str, Tensor], norm_eps: float) -> Tensor:
        return nk.memory_scan(**tensors, norm_eps=norm_eps, lags=(1,), decays=(0.6, 0.95)) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9, 33):
        a = make_scan(2, tokens, 16, 8, 16, norm=True, started=True, history=2)
        tensors = {name: t for name, t in a.items() if isinstance(t, Tensor)}
        expected = copied(tensors)
        out = compiled(tensors, a["norm_eps"])
        assert torch.equal(out, step(expected, a["norm_eps"]))
        assert torch.equal(tensors["state"], expected["state"])


DIFFERENTIABLE = ("x", "weight_v", "weight_u", "bias", "residual", "norm_weight")


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("map_u", [True, False])
def test_gradients(filters, map_u):
    """Those of the float64 loop; state and history move as without them."""
    flags = {"norm": True, "started": True, "history": 2, "map_u": map_u}
    a = make_scan(3, 9, 12, 12, 12, torch.float32, filters, **flags)
    a["mask"] = padding(3, 9, torch.Generator().manual_seed(0))
    clean = in_float64(a)
    a["x"][~a["mask"]] = float("nan")
    names = [name for name in DIFFERENTIABLE if a[name] is not None]
    weight = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(1))

    def gradients(scan, a: dict[str, object]) -> list[Tensor]:
        leaves = {name: a[name].clone().requires_grad_() for name in names}
        out = scan(**(a | leaves))
        (out * weight.to(out.dtype)).sum().backward()
        return [out.detach(), *(leaves[name].grad for name in names)]

    mine, unasked = copied(a), copied(a)
    got, expected = gradients(nk.memory_scan, mine), gradients(nk.memory_scan_ref, clean)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-5)
    nk.memory_scan(**unasked)
    for name in ("state", "history"):
        torch.testing.assert_close(mine[name], unasked[name])
        assert not mine[name].requires_grad
    if names[1:]:
        only = mine | {"weight_v": mine["weight_v"].clone().requires_grad_()}
        assert nk.memory_scan(**only).requires_grad
        with torch.no_grad():
            assert not nk.memory_scan(**only).requires_grad


def test_gradients_of_the_state_are_refused():
    a = make_scan(1, 2, 8, 4, 8, history=1)
    for name in ("state", "history"):
        with pytest.raises(RuntimeError, match=f"memory_scan: {name} requires a gradient"):
            nk.memory_scan(**(a | {name: a[name].clone().requires_grad_()}))
