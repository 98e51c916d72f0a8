"""rope_append and rope_tables: against float64 and transformers, on every path."""

from __future__ import annotations

import devices
import numpy as np
import pytest
import torch
import transformers
from cases import DTYPES
from cases.rope import SHAPES, assert_right, assert_same_bits, copied, make_inputs
from torch import Tensor

import nbl_kernels as nk

every_path = devices.paths("rope", "kernel", "plain")
path = devices.paths("rope", "kernel", "plain", capabilities=False)
LARGE = [(3, 17, 32, 8, 128, 128), (2, 70, 5, 3, 80, 32), (1, 3, 2, 1, 640, 602)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_rope_append(every_path, dtype, shape, norm):
    a = make_inputs(*shape, dtype, norm, device=every_path.device)
    assert_right(a)
    a["slots"][0, ::2] = -1
    assert_right(a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_plain_operations_and_the_reference_do_the_same(dtype, norm):
    """What runs where no kernel of ours does, and the specification."""

    def plain(q_norm_weight=None, k_norm_weight=None, *, norm_eps, **a):
        norms = (q_norm_weight, k_norm_weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.ops.nbl.rope_append_plain(*a.values(), *norms, norm_eps)

    for shape in SHAPES:
        a = make_inputs(*shape, dtype, norm)
        for pattern in ("all", "some", "none of a row"):
            if pattern == "some":
                a["slots"][:, ::2] = -1
            if pattern == "none of a row":
                a["slots"][0] = -3
            for append in (plain, nk.rope_append_ref, nk.rope_append):
                assert_right(a, append)


def test_only_one_of_the_norms(path):
    a = make_inputs(2, 3, 4, 2, 40, 40, torch.bfloat16, norm=True, device=path.device)
    for name in ("q_norm_weight", "k_norm_weight"):
        assert_right({k: v for k, v in a.items() if k != name})


def test_norm_eps_counts(path):
    a = make_inputs(1, 1, 2, 1, 16, 16, torch.float32, norm=True, device=path.device)
    small = nk.rope_append(**a, norm_eps=1e-6)
    actual = nk.rope_append(**a, norm_eps=3.0)
    assert_right(a, norm_eps=3.0)
    assert (actual.norm() < 0.8 * small.norm()).item()


def test_positions_and_slots_broadcast(path):
    def ints(values: list) -> Tensor:
        return torch.tensor(values, device=path.device)

    a = make_inputs(3, 4, 2, 1, 16, 16, torch.float32, device=path.device)
    row, token = ints([4, 2, 7, 0]), ints([[5], [0], [2]])
    for positions in (row, row[None], token, ints([3]), ints([[3]])):
        for slots in (row, row[None], ints([-1])):
            assert_right(a | {"positions": positions, "slots": slots})
    one = make_inputs(3, 1, 2, 1, 16, 16, torch.float32, device=path.device)
    for slots in (ints([5]), ints([[5]]), token):
        assert_right(one | {"slots": slots})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(path, dtype):
    """Views of everything; nothing is written beside what they show."""
    a = make_inputs(2, 6, 4, 2, 24, 20, dtype, norm=True, device=path.device)
    plain = copied(a)
    expected = nk.rope_append(**plain)

    def inside(t, *, last_contiguous):
        sizes = [2 * n + 1 for n in t.shape]
        storage = torch.full(sizes, -7, dtype=t.dtype, device=path.device)
        view = storage[tuple(slice(1, None, 2) for _ in sizes)]
        if last_contiguous:
            sizes = [*sizes[:-1], t.shape[-1] + 3]
            storage = torch.full(sizes, -7, dtype=t.dtype, device=path.device)
            view = storage[(*(slice(1, None, 2) for _ in sizes[:-1]), slice(1, t.shape[-1] + 1))]
        return view.copy_(t), storage

    for last in (True, False):
        caches = {name: inside(a[name], last_contiguous=True) for name in ("key_cache",)}
        caches["value_cache"] = inside(a["value_cache"].transpose(1, 2), last_contiguous=True)
        views = {name: inside(t, last_contiguous=last)[0] for name, t in a.items()}
        views["key_cache"] = caches["key_cache"][0]
        views["value_cache"] = caches["value_cache"][0].transpose(1, 2)
        around = {name: (storage == -7).sum() for name, (_, storage) in caches.items()}
        assert torch.equal(nk.rope_append(**views), expected)
        for name in ("key_cache", "value_cache"):
            assert torch.equal(views[name], plain[name])
            assert (caches[name][1] == -7).sum() == around[name]
    transposed = a["qkv"].transpose(0, 1).contiguous().transpose(0, 1)
    fresh = {name: a[name].clone() for name in ("key_cache", "value_cache")}
    assert torch.equal(nk.rope_append(**(a | fresh | {"qkv": transposed})), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_unaligned(path, dtype, offset):
    """The same bits with and without 16-byte accesses, and nothing written beside the rows."""
    dense = make_inputs(2, 5, 4, 2, 64, 48, dtype, norm=True, device=path.device)

    def apart(t: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.full((*t.shape[:-1], t.shape[-1] + 16), -7, dtype=t.dtype, device=t.device)
        return rows, rows[..., offset : offset + t.shape[-1]].copy_(t)

    for names in (dense.keys() - {"positions", "slots"}, {"qkv"}, {"key_cache"}, {"cos", "sin"}):
        a, rows = copied(dense), {}
        for name in names:
            rows[name], a[name] = apart(a[name])
        around = {name: (r == -7).sum() for name, r in rows.items()}
        assert_same_bits(a, copied(dense))
        assert all((r == -7).sum() == around[name] for name, r in rows.items())
    for name in ("qkv", "key_cache", "value_cache"):  # other dimensions outermost
        a = copied(dense)
        a[name] = a[name].transpose(1, 2).contiguous().transpose(1, 2)
        assert_same_bits(a, copied(dense))


def test_empty(path):
    for batch, tokens in [(0, 3), (2, 0)]:
        a = make_inputs(batch, tokens, 4, 2, 16, 16, torch.float32, device=path.device)
        before = a["key_cache"].clone()
        assert nk.rope_append(**a).shape == (batch, 4, tokens, 16)
        assert torch.ops.nbl.rope_append_plain(*a.values(), None, None, 1e-6).shape[2] == tokens
        assert torch.equal(a["key_cache"], before)


def test_non_finite_values_stay_in_their_head(path):
    a = make_inputs(1, 2, 3, 1, 16, 16, torch.bfloat16, norm=True, device=path.device)
    clean = nk.rope_append(**a)
    keys, values = a["key_cache"].clone(), a["value_cache"].clone()
    a["qkv"][0, 1, 1, 3] = float("nan")
    a["qkv"][0, 0, 4, 2] = float("inf")  # of v
    q = nk.rope_append(**a)
    assert q[0, 1, 1].isnan().any()
    q[0, 1, 1] = clean[0, 1, 1]
    assert torch.equal(q, clean) and torch.equal(a["key_cache"], keys)
    assert a["value_cache"][0, 0, a["slots"][0, 0], 2] == float("inf")
    assert (a["value_cache"] != values).sum() == 1


def test_is_deterministic(path):
    a = make_inputs(3, 40, 8, 4, 128, 128, torch.bfloat16, norm=True, device=path.device)
    for _ in range(5):
        assert_same_bits(copied(a), copied(a))


def test_results_do_not_depend_on_threads():
    a = make_inputs(3, 40, 8, 4, 128, 128, torch.bfloat16, norm=True)
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            caches = {name: a[name].clone() for name in ("key_cache", "value_cache")}
            outs.append([nk.rope_append(**(a | caches)), *caches.values()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for out in outs for x, y in zip(out, outs[0]))


BAD = {
    "qkv must be float32": lambda a: {"qkv": a["qkv"].int()},
    "qkv must have shape": lambda a: {"qkv": a["qkv"][0]},
    r"key_cache must have shape \(at least 2, kv_heads, slots, 16\)": lambda a: {
        "key_cache": a["key_cache"][:1]
    },
    r"qkv must have more than 2 · 2 heads": lambda a: {"qkv": a["qkv"][:, :, :4]},
    "value_cache must have shape": lambda a: {"value_cache": a["value_cache"][:, :, 1:]},
    "value_cache must have the dtype of qkv": lambda a: {"value_cache": a["value_cache"].half()},
    "key_cache must be contiguous in its last dimension": lambda a: {
        "key_cache": a["key_cache"].mT.contiguous().mT
    },
    r"cos must have shape \(positions, at most head_dim / 2 = 8\)": lambda a: {
        "cos": torch.cat([a["cos"], a["cos"]], -1)
    },
    "sin must have shape": lambda a: {"sin": a["sin"][1:]},
    "cos must be float32, got float64": lambda a: {"cos": a["cos"].double()},
    r"positions must broadcast to \(2, 3\), got shape \(2,? ?2\)": lambda a: {
        "positions": a["positions"][:, :2]
    },
    "slots must be int64": lambda a: {"slots": a["slots"].double()},
    "k_norm_weight must have shape": lambda a: {"k_norm_weight": torch.ones(15)},
    "q_norm_weight must have the dtype": lambda a: {"q_norm_weight": torch.ones(16).half()},
}


# Of values, which only a CPU's kernel looks at: a GPU's gives NaN, PyTorch's operations an error of
# their own (tests/kernels/test_cuda.py).
BAD_VALUES = {
    r"positions must be from 0 to 18, .* got 19 at \(1, 2\)": lambda a: {
        "positions": a["positions"].index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(19))
    },
    r"positions must be from 0 to 18, .* got -1 at \(0, 0\)": lambda a: {
        "positions": torch.full((3,), -1)
    },
    r"slots must be at most 7, .* got 8 at \(0, 1\)": lambda a: {"slots": torch.tensor([0, 8, 1])},
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument_and_nothing_is_written(path, message):
    a = make_inputs(2, 3, 4, 2, 16, 16, torch.float32, device=path.device)
    before = {name: a[name].clone() for name in ("key_cache", "value_cache")}
    bad = {name: t.to(path.device) for name, t in BAD[message](a).items()}
    with pytest.raises(RuntimeError, match="rope_append: " + message):
        nk.rope_append(**(a | bad))
    assert all(torch.equal(a[name], t) for name, t in before.items())
    if path.on_gpu:
        with pytest.raises(RuntimeError, match="slots must be on the device of qkv"):
            nk.rope_append(**(a | {"slots": a["slots"].cpu()}))


@pytest.mark.parametrize("message", BAD_VALUES)
def test_values_out_of_range_are_refused_and_nothing_is_written(message):
    a = make_inputs(2, 3, 4, 2, 16, 16, torch.float32)
    before = {name: a[name].clone() for name in ("key_cache", "value_cache")}
    with pytest.raises(RuntimeError, match="rope_append: " + message):
        nk.rope_append(**(a | BAD_VALUES[message](a)))
    assert all(torch.equal(a[name], t) for name, t in before.items())


def test_gradients_are_refused():
    a = make_inputs(1, 2, 2, 1, 8, 8, torch.float32)
    a["qkv"].requires_grad_()
    with pytest.raises(RuntimeError, match="rope_append: qkv requires a gradient"):
        nk.rope_append(**a)
    with torch.no_grad():
        nk.rope_append(**a)


def test_numpy_arrays():
    a = make_inputs(2, 3, 4, 2, 16, 16, torch.float32, norm=True)
    arrays = {name: t.clone().numpy() for name, t in a.items()}
    arrays["qkv"].flags.writeable = False
    q = nk.rope_append(**arrays)
    expected = nk.rope_append(**a)
    assert isinstance(q, np.ndarray) and np.array_equal(q, expected.numpy())
    assert np.array_equal(arrays["key_cache"], a["key_cache"].numpy())
    arrays["value_cache"].flags.writeable = False
    with pytest.raises(ValueError, match="rope_append: value_cache is written to"):
        nk.rope_append(**arrays)
    arrays["value_cache"] = arrays["value_cache"].copy()[:, :, ::-1]
    with pytest.raises(ValueError, match="rope_append: value_cache is written to"):
        nk.rope_append(**arrays)
    with pytest.raises(TypeError, match="rope_append: qkv must be a tensor, got ndarray"):
        nk.rope_append(**(arrays | {"key_cache": a["key_cache"]}))


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(path, norm):
    a = make_inputs(2, 3, 4, 2, 16, 12, torch.float32, norm, device=path.device)
    a["slots"][0, 1] = -1
    norms = [a.pop("q_norm_weight", None), a.pop("k_norm_weight", None)]
    torch.library.opcheck(torch.ops.nbl.rope_append.default, (*a.values(), *norms, 1e-5))


def test_compiles_without_graph_breaks(path):
    a = make_inputs(2, 3, 4, 2, 16, 16, torch.float32, device=path.device)
    # A layer's cache is a view.
    whole = torch.zeros(3, 2, *a["key_cache"].shape, device=path.device)

    def step(qkv, whole):
        inputs = a | {"qkv": qkv * 2, "key_cache": whole[1, 0], "value_cache": whole[1, 1]}
        return nk.rope_append(**inputs) + 1

    compiled_whole = whole.clone()
    torch.compiler.reset()
    out = torch.compile(step, fullgraph=True)(a["qkv"], compiled_whole)
    expected = step(a["qkv"], whole)
    torch.testing.assert_close(out, expected)
    assert path.on_gpu or torch.equal(out, expected)
    assert torch.equal(compiled_whole, whole)
    assert whole[1, 0, :2].count_nonzero() and not whole[[0, 2]].any()


# ---- Tables --------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3, 3.2": LLAMA3 | {"factor": 32.0},
    "llama3, short": LLAMA3 | {"original_max_position_embeddings": 64, "high_freq_factor": 16.0},
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tables_are_those_of_transformers(scaling, head_dim):
    """LlamaRotaryEmbedding rounds frequencies and angles to float32: that error and no more."""
    theta, length = 500000.0, 700
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=1000,
        rope_parameters=SCALINGS[scaling] | {"rope_theta": theta},
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    positions = torch.arange(length)
    theirs = [t[0, :, : head_dim // 2] for t in rotary(torch.zeros(1), positions[None])]
    ours = nk.rope_tables(head_dim, length, theta, SCALINGS[scaling])
    # A few roundings each of the frequency, the angle and the result.
    angles = positions[:, None] * rotary.inv_freq.double()
    allowed = torch.finfo(torch.float32).eps * (4 * angles + 1)
    for our, their in zip(ours, theirs):
        assert our.dtype == torch.float32 and our.shape == (length, head_dim // 2)
        assert our.is_contiguous()
        assert ((our - their).abs() <= allowed).all()


def test_scaling_changes_what_it_should():
    plain, _ = nk.rope_tables(128, 100, 500000.0)
    scaled, _ = nk.rope_tables(128, 100, 500000.0, LLAMA3)
    assert torch.equal(plain[:, :20], scaled[:, :20])  # fast
    assert not torch.equal(plain[:, 32:], scaled[:, 32:])  # slow
    halved, _ = nk.rope_tables(128, 100, 500000.0, {"type": "linear", "factor": 2})
    assert torch.equal(halved[::2], plain[:50])


def test_late_positions_are_exact():
    """cos(p · f) to one rounding where float32 angles would be wrong in the second digit."""
    import math

    _, sin = nk.rope_tables(64, 1_000_001, 10000.0)
    assert sin[1_000_000, 0].item() == pytest.approx(math.sin(1e6), rel=1e-6)
    frequency = 10000.0 ** (-2 / 64)
    assert sin[999_999, 1].item() == pytest.approx(math.sin(999_999 * frequency), abs=1e-7)


def test_errors_of_tables():
    for arguments, message in [
        ((7, 10, 1e4), "head_dim: expected a positive even number, got 7"),
        ((8, -1, 1e4), "length: expected 0 or more, got -1"),
        ((8, 10, 0.0), "theta: expected a positive number, got 0.0"),
        ((8, 10, 1e4, {"rope_type": "yarn"}), "scaling.'rope_type'.: expected .* got 'yarn'"),
        ((8, 10, 1e4, {"rope_type": "linear"}), "scaling.'factor'.: expected .* got None"),
        ((8, 10, 1e4, LLAMA3 | {"factor": 0}), "scaling.'factor'.: expected .* got 0"),
        ((8, 10, 1e4, LLAMA3 | {"high_freq_factor": 1}), "scaling.'high_freq_factor'.: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            nk.rope_tables(*arguments)
