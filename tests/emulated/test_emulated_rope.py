"""The CUDA kernel of rope_append, run on the CPU under sanitizers (tests/emulation), against
float64."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import DTYPES
from cases.rope import SHAPES, assert_right, make_inputs
from emulation.build import EmulationError, build_driver, mutated_sources, run_driver
from torch import Tensor

FILL = -7.0  # between the rows of what is written


@dataclass(frozen=True)
class Layout:
    """How the arrays lie in memory: rows `gap` elements longer than used, beginning `shift`
    elements past a multiple of 16 bytes, tokens outermost in qkv, slots before heads in the caches.
    """

    gap: int = 0
    shift: int = 0
    swapped: bool = False

    def place(self, t: Tensor, fill: float, order: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """(the storage, a view of it that looks like t)."""
        order = order if self.swapped and order else tuple(range(t.dim()))
        moved = t.permute(order)
        rows = torch.full((*moved.shape[:-1], moved.shape[-1] + self.gap), fill, dtype=t.dtype)
        shift = self.shift if t.is_floating_point() else 0
        used = rows.numel() - self.gap if t.numel() else 0  # nothing after the last row
        storage = torch.full((shift + used,), fill, dtype=t.dtype)
        strides = dict(zip(order, rows.stride()))
        strides = [strides[i] for i in range(t.dim())]
        view = storage.as_strided(t.shape, strides, shift)
        return storage, view.copy_(t)


@dataclass
class Launched:
    vectors: bool
    lanes: int
    blocks: int


def emulated(
    *,
    layout: Layout = Layout(),
    other_layouts: dict[str, Layout] | None = None,
    driver: Path | None = None,
    seed: int = 0,
    launched: list[Launched] | None = None,
    norm_eps: float = 1e-6,
    **a: Tensor,
) -> Tensor:
    """nk.rope_append by the emulated kernel; checks that it wrote nothing between the rows. Arrays
    lie as `layout` says, or other_layouts by name."""
    qkv, batch, tokens = a["qkv"], *a["qkv"].shape[:2]
    kv_heads, num_slots = a["key_cache"].shape[1:3]
    heads, head_dim = qkv.shape[2] - 2 * kv_heads, qkv.shape[3]
    nan = math.nan
    storages, views = {}, {}
    orders = {"qkv": (1, 0, 2, 3), "key_cache": (0, 2, 1, 3), "value_cache": (0, 2, 1, 3)}
    for name, t in a.items():
        fill = 0 if not t.is_floating_point() else FILL if name.endswith("cache") else nan
        mine = (other_layouts or {}).get(name, layout)
        storages[name], views[name] = mine.place(t, fill, orders.get(name, ()))
    storages["q"], q = Layout(shift=0).place(
        torch.full((batch, tokens, heads, head_dim), nan).to(qkv), nan
    )
    q = q.transpose(1, 2)

    def broadcast_strides(t: Tensor) -> list[int]:
        return list(t.expand(batch, tokens).stride())

    numbers = [DTYPES.index(qkv.dtype), seed, batch, tokens, heads, kv_heads, head_dim]
    numbers += [a["cos"].shape[1], a["cos"].shape[0], num_slots]
    for t in (views["qkv"], q, views["key_cache"], views["value_cache"]):
        numbers += t.stride()[:3]
    numbers += [views["cos"].stride(0), views["sin"].stride(0)]
    numbers += broadcast_strides(views["positions"]) + broadcast_strides(views["slots"])
    payload = struct.pack(f"<{len(numbers)}qd", *numbers, norm_eps)
    names = ["qkv", "cos", "sin", "positions", "slots", "q_norm_weight", "k_norm_weight"]
    for name in (*names, "q", "key_cache", "value_cache"):
        storage = storages.get(name, torch.empty(0))
        offset = views[name].storage_offset() if name in views else 0
        payload += struct.pack("<2q", storage.numel(), offset)
        payload += storage.view(torch.uint8).numpy().tobytes()
    output = bytearray(run_driver(driver or build_driver("rope"), payload))

    position = 0
    for name in ("q", "key_cache", "value_cache"):
        storage = storages[name]
        if storage.numel():
            storage.copy_(
                torch.frombuffer(output, dtype=qkv.dtype, count=len(storage), offset=position)
            )
        position += storage.nbytes
    vectors, lane_bits, blocks = struct.unpack_from("<3q", output, position)
    assert position + 24 == len(output)
    if launched is not None:
        launched.append(Launched(bool(vectors), 1 << lane_bits, blocks))
    for name in ("key_cache", "value_cache"):
        a[name].copy_(views[name])
        views[name].fill_(FILL)
        assert (storages[name] == FILL).all(), f"written between the rows of {name}"
    return q


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_against_float64(dtype, norm):
    launched = []
    shapes = [*SHAPES, (1, 3, 5, 2, 256, 256), (1, 2, 2, 1, 80, 32), (2, 9, 28, 4, 8, 8)]
    for shape in shapes:
        for seed in range(2):
            append = functools.partial(emulated, seed=seed, launched=launched)
            assert_right(make_inputs(*shape, dtype, norm), append)
    assert {run.vectors for run in launched} == {True, False}
    assert {run.lanes for run in launched} >= {1, 2, 4, 8, 16}
    assert max(run.blocks for run in launched) > 2


def test_more_elements_than_lanes():
    """A row of cos that a warp takes in turns."""
    launched = []
    for shape in [(1, 2, 2, 1, 640, 640), (1, 2, 2, 1, 640, 24), (1, 2, 1, 1, 641, 602)]:
        arguments = make_inputs(*shape, torch.float32, norm=True)
        assert_right(arguments, functools.partial(emulated, launched=launched))
    assert [run.lanes for run in launched] == [32, 32, 32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap, shift", [(8, 0), (8, 8), (3, 0), (0, 1), (5, 3)])
@pytest.mark.parametrize("swapped", [False, True])
def test_strides_and_addresses(dtype, gap, shift, swapped):
    launched = []
    for norm in (False, True):
        arguments = make_inputs(3, 4, 4, 2, 64, 32, dtype, norm)
        append = functools.partial(emulated, layout=Layout(gap, shift, swapped), launched=launched)
        assert_right(arguments, append)
    assert all(run.vectors == (gap == 8) for run in launched)


def test_one_array_that_does_not_allow_16_bytes_is_enough():
    a = make_inputs(2, 2, 2, 2, 32, 32, torch.bfloat16, norm=True)
    for name in a.keys() - {"positions", "slots"}:
        for odd in (Layout(shift=1), Layout(gap=2)):
            launched = []
            layouts = {name: odd}
            assert_right(a, functools.partial(emulated, other_layouts=layouts, launched=launched))
            assert launched[0].vectors == (odd.gap > 0 and name.endswith("weight")), (name, odd)


def test_positions_and_slots_broadcast():
    a = make_inputs(3, 4, 2, 1, 16, 16, torch.float32)
    row, token = torch.tensor([4, 2, 7, 0]), torch.tensor([[5], [0], [2]])
    for positions in (row, row[None], token, torch.tensor([3]), torch.tensor([[3]])):
        for slots in (row, row[None], torch.tensor([-1])):
            assert_right(a | {"positions": positions, "slots": slots}, emulated)


@pytest.mark.parametrize("norm", [False, True])
def test_negative_slots_are_not_written(norm):
    a = make_inputs(3, 4, 2, 1, 16, 12, torch.bfloat16, norm)
    a["slots"][0, 1], a["slots"][1], a["slots"][2, 3] = -1, -5, torch.iinfo(torch.int64).min
    assert_right(a, emulated)


def test_only_one_of_the_norms():
    a = make_inputs(2, 3, 4, 2, 40, 40, torch.bfloat16, norm=True)
    for name in ("q_norm_weight", "k_norm_weight"):
        assert_right({k: v for k, v in a.items() if k != name}, emulated)


OUT_OF_RANGE = {
    "position": (19, -1, 2**62, -(2**63)),
    "slot": (9, 2**62),
}


@pytest.mark.parametrize("layout", [Layout(), Layout(shift=1)], ids=["vectors", "elements"])
@pytest.mark.parametrize("rotated", [32, 16, 0])
@pytest.mark.parametrize("which", OUT_OF_RANGE)
def test_tokens_out_of_range_give_nan_and_write_nothing(which, rotated, layout):
    clean = make_inputs(2, 4, 3, 2, 32, rotated, torch.bfloat16, norm=rotated == 32)
    expected = {name: t.clone() for name, t in clean.items()}
    expected["slots"][1, 2] = -1
    q = emulated(layout=layout, **expected)
    for value in OUT_OF_RANGE[which]:
        a = {name: t.clone() for name, t in clean.items()}
        a[f"{which}s"][1, 2] = value
        bad = emulated(layout=layout, **a)
        assert bad[1, :, 2].isnan().all()
        bad[1, :, 2] = q[1, :, 2]
        assert torch.equal(bad, q)
        for name in ("key_cache", "value_cache"):
            assert torch.equal(a[name], expected[name])


def test_a_position_out_of_range_counts_where_nothing_is_written():
    a = make_inputs(1, 2, 1, 1, 16, 16, torch.float32)
    a["positions"][0, 1], a["slots"][0, 1] = 19, -1
    q = emulated(**a)
    assert q[0, :, 1].isnan().all() and q[0, :, 0].isfinite().all()


def test_tables_and_caches_of_no_rows():
    a = make_inputs(2, 3, 2, 1, 16, 16, torch.float32)
    empty = {name: a[name][:0] for name in ("cos", "sin")}
    assert emulated(**(a | empty)).isnan().all()
    caches = {name: a[name][:, :, :0] for name in ("key_cache", "value_cache")}
    assert_right(a | caches | {"slots": torch.tensor([-1])}, emulated)
    assert emulated(**(a | caches)).isnan().all()


def test_values_are_copied_bit_by_bit():
    """NaN with a payload, an infinity, a subnormal."""
    for layout in (Layout(), Layout(shift=1)):
        for dtype in (torch.bfloat16, torch.float16):
            a = make_inputs(1, 2, 2, 2, 32, 16, dtype, norm=True)
            bits = a["qkv"].view(torch.int16)
            bits[0, :, 4:] = torch.randint(-(2**15), 2**15, (2, 2, 32), dtype=torch.int16)
            emulated(layout=layout, **a)
            rows = a["value_cache"][0, :, a["slots"][0]].transpose(0, 1)
            assert torch.equal(rows.view(torch.int16), bits[0, :, 4:])


def test_non_finite_values_stay_in_their_head():
    a = make_inputs(1, 2, 3, 1, 16, 16, torch.bfloat16, norm=True)
    clean = emulated(**a)
    keys = a["key_cache"].clone()
    a["qkv"][0, 1, 1, 3] = math.nan
    a["qkv"][0, 0, 4, 2] = math.inf  # of v
    q = emulated(**a)
    assert q[0, 1, 1].isnan().any()
    q[0, 1, 1] = clean[0, 1, 1]
    assert torch.equal(q, clean) and torch.equal(a["key_cache"], keys)


# Kernels broken on purpose. One build holds all of them; the environment says which is awake.
HEADER = "nbl/cuda/rope.cuh"
MUTATIONS = {
    "a position past the last row": (
        "position < p.num_positions &&",
        "position < p.num_positions + MUTANT &&",
    ),
    "a position before the first row": ("position >= 0 &&", "position + MUTANT >= 0 &&"),
    "a slot past the last": ("slot < p.num_slots;", "slot < p.num_slots + MUTANT;"),
    "a negative slot is written": ("|| slot < 0)", "|| slot + MUTANT < 0)"),
    "a token out of range is written": (
        "key >= 0 && (!in_range ||",
        "key >= 0 && ((!in_range && !MUTANT) ||",
    ),
    "q of a token out of range is not NaN": (
        "v[i] = in_range ? v[i]",
        "v[i] = in_range || MUTANT ? v[i]",
    ),
    "heads past the last are read": (
        "exists ? group : launch.heads - 1",
        "exists || MUTANT ? group : launch.heads - 1",
    ),
    "the last block is missing": (
        "(launch.heads + per_block - 1) / per_block",
        "(launch.heads + (MUTANT ? 0 : per_block - 1)) / per_block",
    ),
    "a rotation the other way": ("c[i], -(v[i] * s[i])", "c[i], (MUTANT ? 1 : -1) * (v[i] * s[i])"),
    "x of the first half that was rotated already": (
        "v[i] = fmaf(v[i], c[i], u[i] * s[i]);",
        "v[i] = fmaf(v[i], c[i], (MUTANT ? rotated : u[i]) * s[i]);",
    ),
    "the second half read one early": (
        "Bytes16 second = load_granule<T, kVector>(x, half + k,",
        "Bytes16 second = load_granule<T, kVector>(x, half + k - kElements * MUTANT,",
    ),
    "the turns of a lane overlap": (
        "first = load_granule<T, kVector>(x, k + step, half);",
        "first = load_granule<T, kVector>(x, k + step * (1 - MUTANT), half);",
    ),
    "the rest left out": (
        "for (k = 2 * half + lane * kElements; k < dim;",
        "for (k = 2 * half + lane * kElements; k < dim && !MUTANT;",
    ),
    "v is rotated": (
        "if (value < 0) {\n      Angles<T> c, s;",
        "if (value < 0 || MUTANT) {\n      Angles<T> c, s;",
    ),
    "the norm of half of the lanes": (
        "int mask = lanes / 2;",
        "int mask = lanes / (2 + 2 * MUTANT);",
    ),
    "the norms exchanged": ("(key < 0 ? p.q_norm", "((key < 0) != MUTANT ? p.q_norm"),
    "another token's slot": (
        "b * p.slot_strides[0] + t * p.slot_strides[1]",
        "b * p.slot_strides[0] + (MUTANT ? 0 : t) * p.slot_strides[1]",
    ),
    "an element past the end": ("if (k + i < end) {", "if (k + i < end + MUTANT) {"),
    "16 bytes at an odd address": (
        "at_16(p.cos) &&",
        "(at_16(p.cos) || MUTANT) &&",
    ),
    "16 bytes at an odd stride": (
        "strides[i] * element % 16 != 0) return false;",
        "strides[i] * element % 16 != 0) return MUTANT == 1;",
    ),
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> Path:
    include = '#include "nbl/rope.h"\n'
    header = (
        '#include <cstdlib>\nstatic const int nbl_mutant = std::atoi(std::getenv("NBL_MUTANT"));\n'
    )
    folder = mutated_sources(tmp_path_factory.mktemp("mutants"), HEADER, include, include + header)
    file = folder / "csrc" / "include" / HEADER
    text = file.read_text()
    for number, (old, new) in enumerate(MUTATIONS.values(), 1):
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {HEADER}"
        text = text.replace(old, new.replace("MUTANT", f"int{{nbl_mutant == {number}}}"))
    file.write_text(text)
    return build_driver("rope", folder)


def check_mutant(driver: Path) -> None:
    def run(arguments, **options):
        assert_right(arguments, functools.partial(emulated, driver=driver, **options))

    run(make_inputs(2, 3, 4, 2, 64, 48, torch.bfloat16, norm=True))
    run(make_inputs(1, 2, 1, 1, 40, 40, torch.bfloat16))
    run(make_inputs(1, 2, 2, 1, 264, 264, torch.float32))
    run(make_inputs(2, 2, 3, 1, 10, 6, torch.float16))
    for name, odd in (("cos", Layout(shift=1)), ("key_cache", Layout(gap=2))):
        run(make_inputs(2, 2, 2, 1, 32, 32, torch.bfloat16), other_layouts={name: odd})
    run(make_inputs(1, 3, 1, 1, 64, 64, torch.bfloat16) | {"slots": torch.tensor([3, -1, 2])})
    for name, value in (("positions", 19), ("positions", -1), ("slots", 9)):
        a = make_inputs(1, 4, 1, 1, 64, 64, torch.bfloat16)
        a[name][0, 1] = value
        before = {name: a[name].clone() for name in ("key_cache", "value_cache")}
        q = emulated(driver=driver, **a)
        assert q[0, :, 1].isnan().all() and q[0, :, ::2].isfinite().all()
        written = a["slots"][0, [0, 2, 3]]
        for name, cache in before.items():
            cache[0, :, written] = a[name][0, :, written]
            assert torch.equal(a[name], cache)


def test_the_unbroken_build_of_the_mutants_passes(mutants, monkeypatch):
    monkeypatch.setenv("NBL_MUTANT", "0")
    check_mutant(mutants)


@pytest.mark.parametrize("number", range(1, len(MUTATIONS) + 1), ids=list(MUTATIONS))
def test_mutations_are_caught(mutants, monkeypatch, number):
    monkeypatch.setenv("NBL_MUTANT", str(number))
    with pytest.raises((EmulationError, AssertionError)):
        check_mutant(mutants)
