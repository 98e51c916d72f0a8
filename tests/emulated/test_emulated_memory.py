"""The CUDA kernels of memory_scan's filter, run on the CPU under sanitizers (tests/emulation),
against float64. The linears around it are PyTorch's here."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import DTYPES
from cases.memory import FILTERS, assert_scan_right, copied, make_scan, selecting
from emulation.build import EmulationError, build_driver, mutated_sources, run_driver
from torch import Tensor
from torch.nn import functional as F

import nbl_kernels as nk
from nbl_kernels import _C

CHUNK = 64  # kMemoryChunk
FILL = -7.0  # between the rows of what is written


@dataclass
class Launched:
    chunks: int
    tiles: int
    two_launches: bool


def placed(t: Tensor, gap: int, fill: float, outermost: int = 0) -> tuple[Tensor, Tensor]:
    """(the storage, a view of it that looks like t): rows `gap` elements longer than used, nothing
    after the last one, dimension `outermost` the slowest."""
    moved = t.movedim(outermost, 0)
    rows = torch.empty((*moved.shape[:-1], moved.shape[-1] + gap), dtype=t.dtype, device="meta")
    size = max(0, rows.numel() - gap) if t.numel() else 0
    storage = torch.full((size,), fill, dtype=t.dtype)
    view = storage.as_strided(moved.shape, rows.stride()).movedim(0, outermost)
    return storage, view.copy_(t)


def emulated(
    *,
    x: Tensor,
    weight_v: Tensor,
    weight_u: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    state: Tensor,
    lags: tuple[int, ...],
    decays: tuple[float, ...],
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    history: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gap: int = 0,
    driver: Path | None = None,
    seed: int = 0,
    launched: list[Launched] | None = None,
) -> Tensor:
    """nk.memory_scan with the emulated filter; checks that it wrote nothing between the rows."""
    batch, tokens, k = x.shape
    channels = weight_v.shape[0] // (1 + len(lags) + len(decays))
    features = x if norm_weight is None else F.rms_norm(x, (k,), norm_weight, norm_eps)
    g = F.linear(features, weight_v)
    added = [None, None] if weight_u is not None else [x if residual is None else residual, bias]
    nothing = torch.empty(0)
    if added[0] is None:
        filter_residual, residual_stride = nothing, 0
    else:
        rows = added[0].reshape(batch * tokens, channels)
        filter_residual, view = placed(rows, gap, math.nan)
        residual_stride = view.stride(0)
    flags = []
    for t in (mask, starts):  # tokens outermost
        swapped = (nothing, nothing[None]) if t is None else placed(t.byte(), gap, 77, 1)
        flags.append((swapped[0], list(swapped[1].stride())))
    states = placed(state, gap, FILL)
    history = state.new_empty(batch, 0, *state.shape[1:]) if history is None else history
    histories = placed(history, gap, FILL, 1)
    out = torch.full((batch, tokens, channels), math.nan).to(x)

    numbers = [DTYPES.index(x.dtype), seed, batch, tokens, channels, len(lags), len(decays)]
    numbers += [history.shape[1], *lags, *[0] * (8 - len(lags))]
    numbers += [*states[1].stride()[:2], *histories[1].stride()[:3]]
    numbers += [*flags[0][1], *flags[1][1], residual_stride]
    payload = struct.pack(f"<{len(numbers)}q8d", *numbers, *decays, *[0.0] * (8 - len(decays)))
    filter_bias = nothing if added[1] is None else added[1]
    arrays = (
        g,
        filter_residual,
        filter_bias,
        flags[0][0],
        flags[1][0],
        states[0],
        histories[0],
        out,
    )
    for t in arrays:
        payload += struct.pack("<q", t.numel())
        payload += t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    output = bytearray(run_driver(driver or build_driver("memory"), payload))

    position = 0
    for t in (out, states[0], histories[0]):
        if t.numel():
            new = torch.frombuffer(output, dtype=t.dtype, count=t.numel(), offset=position)
            t.copy_(new.view_as(t))
        position += t.nbytes
    chunks, tiles, two_launches, fits = struct.unpack_from("<4q", output, position)
    assert position + 32 == len(output) and fits
    if launched is not None:
        launched.append(Launched(chunks, tiles, bool(two_launches)))
    for t, (storage, view) in ((state, states), (history, histories)):
        t.copy_(view)
        view.fill_(FILL)
        assert (storage == FILL).all(), "written between the rows"
    if weight_u is None:
        return out
    return (x if residual is None else residual) + F.linear(out, weight_u, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("masked, started", [(False, False), (True, False), (False, True)])
def test_against_float64(dtype, filters, masked, started):
    """One token, one chunk, a token more than one, several; tails of a block's channels."""
    launched = []
    cases = [(2, 1, 5), (1, CHUNK, 64), (2, CHUNK + 1, 70), (3, 2 * CHUNK + 20, 3)]
    for seed, (batch, tokens, r) in enumerate(cases):
        a = make_scan(
            *(batch, tokens, 8, r, 8),
            dtype,
            filters,
            masked=masked,
            started=started,
            history=3,
            map_u=seed % 2 == 0,
            bias=seed != 1,
            seed=seed,
        )
        assert_scan_right(a, functools.partial(emulated, seed=seed, launched=launched))
    assert [run.chunks for run in launched] == [1, 1, 2, 3]
    assert [run.tiles for run in launched] == [1, 1, 2, 1]
    assert [run.two_launches for run in launched] == [False, False, *[filters != ((), ())] * 2]


@pytest.mark.parametrize("filters", FILTERS[:5], ids=str)
def test_many_chunks(filters):
    """More than a block asks for at once."""
    for started in (False, True):
        a = make_scan(1, 11 * CHUNK + 7, 4, 2, 4, filters=filters, started=False, history=2)
        if started:
            a["starts"] = torch.zeros(1, 11 * CHUNK + 7, dtype=torch.bool)
            a["starts"][0, 3 * CHUNK + 5] = True
        assert_scan_right(a, emulated)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_few_tokens_in_a_chunk(filters):
    """Fewer than a lag is long, or none: what is remembered goes through."""
    tokens = 5 * CHUNK
    a = make_scan(4, tokens, 8, 3, 8, filters=filters, history=CHUNK + 2, map_u=False)
    mask = torch.zeros(4, tokens, dtype=torch.bool)
    mask[0, [3, CHUNK, 2 * CHUNK - 1, 3 * CHUNK + 1, tokens - 1]] = True
    mask[1, :CHUNK] = True  # all the others are padding on the right
    mask[2, -CHUNK - 2 :] = True  # … and on the left
    mask[3, CHUNK - 2 : CHUNK + 1] = True
    mask[3, 4 * CHUNK :] = True
    a["x"][~mask] = math.nan
    assert_scan_right(a | {"mask": mask}, emulated)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("at", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 1])
def test_starts_at_the_borders_of_chunks(filters, at):
    tokens = 3 * CHUNK
    a = make_scan(2, tokens, 8, 3, 8, filters=filters, history=2, map_u=False)
    starts = torch.zeros(2, tokens, dtype=torch.bool)
    starts[0, at] = True
    mask = torch.ones(2, tokens, dtype=torch.bool)
    for there in (True, False):  # where the token is not, nothing starts
        mask[0, at] = there
        a["x"][~mask] = math.nan
        assert_scan_right(a | {"mask": mask, "starts": starts}, emulated)


def test_what_is_forgotten_may_be_anything():
    """A state of NaN and infinities before a start, in whatever chunk."""
    a = make_scan(2, 3 * CHUNK, 8, 4, 8, filters=((2,), (0.5,)), map_u=False)
    a["state"][0], a["state"][1] = math.nan, math.inf
    starts = torch.zeros(2, 3 * CHUNK, dtype=torch.bool)
    starts[:, 0] = True
    expected = copied(a)
    expected["state"].zero_()
    outs = [emulated(**(a | {"starts": starts})), emulated(**expected)]
    assert torch.equal(*outs) and outs[0].isfinite().all()
    assert torch.equal(a["state"], expected["state"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [1, 8])
def test_strides(dtype, gap):
    for tokens in (3, CHUNK + 3):
        for map_u in (False, True):
            flags = {"masked": True, "started": True, "history": 4, "map_u": map_u}
            a = make_scan(3, tokens, 8, 7, 8, dtype, **flags)
            assert_scan_right(a, functools.partial(emulated, gap=gap))


@pytest.mark.skipif(_C.cpu_capabilities() == ["portable"], reason="without fused multiply-add")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_one_chunk_leaves_the_bits_of_the_cpu(dtype, filters):
    """The same operations in the same order. What chunks are joined by is not what tokens are."""
    a = selecting(make_scan(2, CHUNK, 16, 5, 5, dtype, filters, map_u=False, started=True))
    mine, theirs = copied(a), copied(a)
    assert torch.equal(emulated(**mine), nk.memory_scan(**theirs))
    assert torch.equal(mine["state"], theirs["state"])


# Kernels broken on purpose. One build holds all of them; the environment says which is awake.
HEADER = "nbl/cuda/memory.cuh"
MUTATIONS = {
    "a channel past the last": (
        "if (at.channel >= p.channels) return;\n  float* state",
        "if (at.channel >= p.channels + MUTANT) return;\n  float* state",
    ),
    "the oldest of a lag left out": ("launch.oldest[i]) c +=", "launch.oldest[i] && !MUTANT) c +="),
    "the newest of a lag is the second newest": (
        "const bool newest = launch.depth[i] == 0;",
        "const bool newest = launch.depth[i] == 0 || (MUTANT && launch.depth[i] == 1);",
    ),
    "a lag joined one token short": (
        "launch.depth[i] < count)) {",
        "launch.depth[i] < count - MUTANT)) {",
    ),
    "a lag joined one token long": ("moved < count &&", "moved < count + MUTANT &&"),
    "an average joined without what was before": (
        "fmaf(fading, slots[i], entry[i])",
        "fmaf(fading, MUTANT ? 0.0f : slots[i], entry[i])",
    ),
    "an average that does not fade": (
        "* static_cast<float>(count));",
        "* static_cast<float>(MUTANT ? 0 : count));",
    ),
    "a count of all tokens": (
        "if (there) {\n",
        "if (MUTANT && count >= 0) ++count;\n      if (there) {\n",
    ),
    "a start that the next chunk does not see": (
        "count = kNothingBefore;",
        "count = MUTANT ? 0 : kNothingBefore;",
    ),
    "a start that forgets nothing": ("slots[s] = 0.0f;", "slots[s] = MUTANT ? slots[s] : 0.0f;"),
    "a token that is not there starts": (
        "float c = 0.0f;\n",
        "float c = 0.0f;\n      if (MUTANT && p.starts && p.starts[at.b * p.start_strides[0] + t * "
        "p.start_strides[1]]) for (float& s : slots) s = 0.0f;\n",
    ),
    "tokens that are not there are taken": ("!p.mask || p.mask[", "!p.mask || MUTANT || p.mask["),
    "the state before the call is lost": (
        "if (at.chunk == 0)\n",
        "if (at.chunk == 0 && !MUTANT)\n",
    ),
    "the first chunk writes the state": (
        "if (at.chunk + 1 == launch.chunks)",
        "if (at.chunk == (MUTANT ? 0 : launch.chunks - 1))",
    ),
    "the last entry is left out": (
        "first <= at.chunk; first +=",
        "first + MUTANT <= at.chunk; first +=",
    ),
    "an entry is joined twice": (
        "if (first + i <= at.chunk) join",
        "if (first + i <= at.chunk + MUTANT) join",
    ),
    "history one token late": (
        "p.tokens - p.history_tokens)",
        "p.tokens - p.history_tokens + MUTANT)",
    ),
    "numbers past the last token": (
        "i < ahead * launch.branches; ++i",
        "i < (MUTANT ? kMemoryAhead : ahead) * launch.branches; ++i",
    ),
    "shared memory of one token less": (
        "return kMemoryAhead * launch",
        "return (kMemoryAhead - MUTANT) * launch",
    ),
    "another's numbers": (
        "slots[i] = newest ? g[launch.branch[i]",
        "slots[i] = newest ? g[(MUTANT ? 1 : launch.branch[i])",
    ),
    "a chunk too few": (
        "(tokens + kMemoryChunk - 1) / kMemoryChunk",
        "(tokens + kMemoryChunk - 1 - MUTANT) / kMemoryChunk",
    ),
    "no bias": ("if (bias) c", "if (bias && !MUTANT) c"),
    "another token's residual": ("residual[token * p", "residual[(MUTANT ? 0 : token) * p"),
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> Path:
    include = '#include "nbl/memory.h"\n'
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
    return build_driver("memory", folder)


def check_mutant(driver: Path) -> None:
    scan = functools.partial(emulated, driver=driver)
    filters = ((1, 3), (0.6, 0.9))
    a = make_scan(2, 2 * CHUNK + 9, 8, 5, 8, filters=filters, map_u=False, history=3, started=True)
    a["mask"] = torch.rand(2, 2 * CHUNK + 9, generator=torch.Generator().manual_seed(0)) < 0.8
    a["mask"][1, 1 : 2 * CHUNK - 2] = False  # fewer than a lag is long
    a["starts"][1, CHUNK:] = False
    a["starts"][0] = False
    a["starts"][0, CHUNK // 2] = a["mask"][0, CHUNK // 2] = True
    a["starts"][0, CHUNK + 7], a["mask"][0, CHUNK + 7] = True, False
    assert_scan_right(a, scan)
    assert_scan_right(make_scan(1, 3 * CHUNK + 1, 8, 3, 8, filters=filters), scan)
    assert_scan_right(make_scan(1, 3, 8, 3, 8, torch.bfloat16, map_u=False), scan)
    assert_scan_right(make_scan(1, CHUNK, 8, CHUNK, 8, filters=filters), scan)


def test_the_unbroken_build_of_the_mutants_passes(mutants, monkeypatch):
    monkeypatch.setenv("NBL_MUTANT", "0")
    check_mutant(mutants)


@pytest.mark.parametrize("number", range(1, len(MUTATIONS) + 1), ids=list(MUTATIONS))
def test_mutations_are_caught(mutants, monkeypatch, number):
    monkeypatch.setenv("NBL_MUTANT", str(number))
    with pytest.raises((EmulationError, AssertionError)):
        check_mutant(mutants)
