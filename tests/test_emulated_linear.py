"""The CUDA kernels of the skinny linear and its row operations, run on the CPU under sanitizers
(tests/emulation), against float64."""

from __future__ import annotations

import dataclasses
import shutil
import struct
from pathlib import Path

import pytest
import torch
from emulation.build import ROOT, EmulationError, build_driver, run_driver
from test_linear import torch_norm_linear, torch_norm_swiglu, torch_residual_linear
from tolerance import assert_as_exact_as_torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


@dataclasses.dataclass
class Problem:
    """One launch. Rows are `gap` elements longer than used, all arrays start `shift` elements past
    a multiple of 16 bytes."""

    dtype: torch.dtype
    m: int
    n: int
    k: int
    op: str = "residual_linear"  # or norm_linear, norm_swiglu, rms_norm_rows, silu_mul_rows
    norm: bool = False
    bias: bool = False
    residual: bool = False
    gap: int = 0
    shift: int = 0
    splits: int = 0
    sm_count: int = 1  # no splits, and the large tile from n = 128 on, unless asked for
    seed: int = 0
    runs: int = 1

    def __post_init__(self):
        self.swiglu = self.op in ("norm_swiglu", "silu_mul_rows")
        self.norm = self.norm or self.op in ("norm_linear", "norm_swiglu", "rms_norm_rows")
        generator = torch.Generator().manual_seed(self.m + 31 * self.n + 17 * self.k)

        def make(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(self.dtype)

        if self.op == "silu_mul_rows":
            self.k = 2 * self.n
        if self.op == "rms_norm_rows":
            self.n = self.k
        self.x = make(self.m, self.k)
        self.gamma = make(self.k) if self.norm else None
        rows = 2 * self.n if self.swiglu else self.n
        self.weight = make(rows, self.k, scale=max(self.k, 1) ** -0.5)
        self.b = make(self.n) if self.bias else None
        self.r = make(self.m, self.n) if self.residual else None

    def torch(self, x, weight, b, r, gamma):
        """The same by PyTorch."""
        if self.op == "norm_swiglu":
            return torch_norm_swiglu(x, gamma, weight)
        if self.op == "norm_linear":
            return torch_norm_linear(x, gamma, weight, b)
        if self.op == "rms_norm_rows":
            return F.rms_norm(x, x.shape[-1:], gamma, EPS)
        if self.op == "silu_mul_rows":
            return F.silu(x[:, : self.n]) * x[:, self.n :]
        residual = x.new_zeros(self.m, self.n) if r is None else r
        return torch_residual_linear(x, weight, b, residual, gamma)

    @property
    def inputs(self):
        return [self.x, self.weight, self.b, self.r, self.gamma]

    @property
    def stride(self):
        return self.k + self.gap

    @property
    def vector(self) -> bool:
        granule = 16 // self.dtype.itemsize
        sizes = [self.k, self.shift, self.stride]
        if self.op == "silu_mul_rows":
            sizes.append(self.n)
        if self.op.endswith("_rows"):
            sizes.append(self.n + self.gap)
        return all(size % granule == 0 for size in sizes)

    def payload(self) -> bytes:
        kernel = {"rms_norm_rows": 1, "silu_mul_rows": 2}.get(self.op, 0)
        header = struct.pack(
            "<19if",
            *(kernel, DTYPES.index(self.dtype), self.swiglu, self.norm, self.bias, self.residual),
            *(self.vector, self.m, self.n, self.k),
            *(self.stride, self.stride, self.n + self.gap, self.n + self.gap),
            *(self.shift, self.splits, self.sm_count, self.seed, self.runs, EPS),
        )
        arrays = [self.rows(self.x), self.rows(self.gamma)]
        if kernel == 0:
            arrays += [self.rows(t) for t in (self.weight, self.b, self.r)]
        return header + b"".join(arrays)

    def rows(self, t: Tensor | None) -> bytes:
        """As a strided view lies in memory: NaN between the rows, nothing after the last."""
        if t is None or t.numel() == 0:
            return b""
        t = torch.atleast_2d(t)
        padded = torch.full((len(t), t.shape[1] + self.gap), float("nan"), dtype=t.dtype)
        padded[:, : t.shape[1]] = t
        used = padded.flatten()[: padded.numel() - self.gap]
        return used.view(torch.uint8).numpy().tobytes()

    def results(self, output: bytes, offset: int) -> tuple[list[Tensor], list[int], int]:
        """The outputs of all runs, and which instance ran."""
        stride = self.n + self.gap
        size = ((self.m - 1) * stride + self.n) * self.dtype.itemsize
        outs = []
        for _ in range(self.runs):
            flat = torch.frombuffer(bytearray(output[offset : offset + size]), dtype=self.dtype)
            padding = torch.full((self.gap,), float("nan"), dtype=self.dtype)
            rows = torch.cat([flat, padding]).view(self.m, stride)
            assert rows[:, self.n :].isnan().all(), "written between the rows"
            outs.append(rows[:, : self.n])
            offset += size
        instance = []
        if not self.op.endswith("_rows"):
            instance = list(struct.unpack_from("<5i", output, offset))
            offset += 20
        return outs, instance, offset


def run(problems: list[Problem], driver: Path | None = None) -> list[tuple[Tensor, list[int]]]:
    """The result of each, and (grid x, grid y, mma, rows, tokens) of the instance that gave it;
    checks that runs in another order gave the same bits."""
    payload = struct.pack("<i", len(problems)) + b"".join(p.payload() for p in problems)
    output = run_driver(driver or build_driver("linear"), payload)
    offset, results = 0, []
    for p in problems:
        outs, instance, offset = p.results(output, offset)
        for other in outs[1:]:
            assert torch.equal(bits(other), bits(outs[0])), p
        results.append((outs[0], instance))
    assert offset == len(output)
    return results


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32 if t.dtype is torch.float32 else torch.int16)


def check(problems: list[Problem], driver: Path | None = None) -> list[list[int]]:
    """Runs them and checks the results; returns the instances."""
    results = run(problems, driver)
    for p, (out, _) in zip(problems, results):
        assert_as_exact_as_torch(out, p.torch, p.inputs)
    return [instance for _, instance in results]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["residual_linear", "norm_linear", "norm_swiglu"])
def test_every_number_of_rows(op, dtype):
    problems = [
        Problem(dtype, m, 24, 264, op, bias=op != "norm_swiglu", residual=op == "residual_linear")
        for m in range(1, 18)
    ]
    instances = check(problems)
    assert len({tuple(i[2:]) for i in instances}) == (2 if dtype is torch.float32 else 3)


SIZES = [(1, 1), (7, 8), (8, 7), (24, 40), (40, 63), (63, 24), (136, 1), (1, 136), (8, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["residual_linear", "norm_linear", "norm_swiglu"])
def test_odd_sizes(op, dtype):
    check([Problem(dtype, m, n, k, op) for n, k in SIZES for m in (1, 3, 11)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_arguments_that_may_be_absent(dtype):
    check(
        [
            Problem(dtype, m, 17, 72, norm=norm, bias=bias, residual=residual)
            for m in (1, 5)
            for norm in (False, True)
            for bias in (False, True)
            for residual in (False, True)
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["residual_linear", "norm_swiglu"])
@pytest.mark.parametrize("gap, shift", [(8, 0), (3, 0), (0, 1), (5, 3)])
def test_strides_and_addresses(op, dtype, gap, shift):
    residual = op == "residual_linear"
    problems = [
        Problem(dtype, m, 19, 88, op, residual=residual, norm=True, gap=gap, shift=shift)
        for m in (1, 6, 12)
    ]
    assert all(p.vector == (gap == 8) for p in problems)
    check(problems)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["residual_linear", "norm_linear", "norm_swiglu"])
def test_large_tile(op, dtype):
    n = 72 if op == "norm_swiglu" else 136  # more than four tiles of 32 rows
    instances = check([Problem(dtype, m, n, 136, op) for m in (2, 8, 9, 16)])
    assert [i[3] for i in instances] == [32] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["residual_linear", "norm_linear", "norm_swiglu"])
def test_long_rows_fill_the_ring_more_than_once(op, dtype):
    ks = {torch.float32: (4096 + 4, 2051)}.get(dtype, (8192 + 8, 2051))
    check([Problem(dtype, m, 5, k, op) for m in (1, 3) for k in ks])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["residual_linear", "norm_linear", "norm_swiglu"])
def test_split_k_in_any_order_gives_the_same_bits(op, dtype):
    instances = check(
        [
            Problem(dtype, 1, 9, 6000, op, splits=2, runs=3),
            Problem(dtype, 4, 19, 3000, op, splits=3, runs=3, seed=7),
            Problem(dtype, 17, 4, 4099, op, splits=4, runs=2),
        ]
    )
    assert [i[1] for i in instances] == ([2, 3, 4] if dtype is not torch.float32 else [2, 3, 3])


def test_splits_are_chosen_where_tiles_leave_sms_idle():
    few, many = check(
        [
            Problem(torch.bfloat16, 2, 32, 2048, sm_count=8),
            Problem(torch.bfloat16, 2, 128, 2048, sm_count=8),
        ]
    )
    assert few[:2] == [2, 2] and many[:2] == [8, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_before_and_after_a_wide_product(dtype):
    sizes = [1, 7, 8, 40, 63, 264, 2056]
    check(
        [
            Problem(dtype, 3, size, size, op, gap=gap, shift=shift)
            for op in ("rms_norm_rows", "silu_mul_rows")
            for size in sizes
            for gap, shift in ((0, 0), (8, 0), (1, 2))
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 5, 12])
def test_non_finite_values_stay_in_their_row_or_column(dtype, m):
    def problem(**kwargs):
        return Problem(dtype, m, 33, 72, residual=True, **kwargs)

    clean, marked, infinite, normed = (problem(norm=i == 3) for i in range(4))
    marked.x[0, 5] = float("nan")
    infinite.weight[7, 71] = float("inf")
    normed.x[m - 1, 3] = float("inf")
    results = [out for out, _ in run([clean, marked, infinite, normed])]
    assert results[1][0].isnan().all() and torch.equal(results[1][1:], results[0][1:])
    others = [i for i in range(33) if i != 7]
    assert not results[2][:, 7].isfinite().any()
    assert torch.equal(results[2][:, others], results[0][:, others])
    assert results[3][m - 1].isnan().all() and results[3][: m - 1].isfinite().all()


def test_the_norm_keeps_float16_from_overflowing():
    problem = Problem(torch.float16, 4, 24, 136, norm=True)
    problem.x *= 10000
    problem.gamma *= 100
    problem.weight /= 100
    check([problem])


# Kernels broken on purpose. One build holds all of them; the environment says which is awake.
MUTATIONS = {
    "no barrier before the warps' sums are added": (
        "Tile::kRecord, lane);\n  sync_block();",
        "Tile::kRecord, lane);\n  MUTANT ? void() : sync_block();",
    ),
    "no barrier before the outputs are written": (
        "sync_block();\n  write_outputs<Tile>",
        "MUTANT ? void() : sync_block();\n  write_outputs<Tile>",
    ),
    "no barrier before the scale of the norm is read": (
        "sync_block();\n    products.set_scale",
        "MUTANT ? void() : sync_block();\n    products.set_scale",
    ),
    "no barrier before the last block of a tile knows that it is": (
        "sync_block();\n  if (*arrived + 1",
        "MUTANT ? void() : sync_block();\n  if (*arrived + 1",
    ),
    "a granule of the weight past k": (
        "if (k < end) granule = load_streaming",
        "if (k < end + MUTANT) granule = load_streaming",
    ),
    "the last granule of x left out": (
        "if (k < end) granule = load_16",
        "if (k + kGranule<T> * MUTANT < end) granule = load_16",
    ),
    "an element of a row past k": ("if (k + i < end) {", "if (k + i < end + MUTANT) {"),
    "a weight row past n": (
        "column < p.n ? column : p.n - 1",
        "column < p.n + MUTANT ? column : p.n - 1",
    ),
    "an output past n": ("if (n >= p.n ||", "if (n >= p.n + MUTANT ||"),
    "a token past m": ("row < p.m ? row", "row < p.m + MUTANT ? row"),
    "an output row past m": ("m >= p.m) continue", "m >= p.m + MUTANT) continue"),
    "a counter that is not reset": (
        "p.counters[blockIdx.x] = 0",
        "p.counters[blockIdx.x] = MUTANT",
    ),
    "one split left out of the sum": (
        "split < splits; ++split",
        "split < splits - MUTANT; ++split",
    ),
    "splits that overlap": (
        "int64_t{blockIdx.y} * p.split_k;",
        "int64_t{blockIdx.y} * (p.split_k - 8 * MUTANT);",
    ),
    "mma operands that do not agree on the order of k": (
        "high.word[2 * part], low.word[2 * part + 1],",
        "high.word[2 * part], low.word[2 * part + 1 - MUTANT],",
    ),
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mutants")
    include = folder / "csrc" / "include"
    shutil.copytree(ROOT / "csrc" / "include", include)
    files = [include / "nbl" / "cuda" / name for name in ("row_ops.cuh", "skinny_linear.cuh")]
    texts = [file.read_text() for file in files]
    whole = "\0".join(texts)
    for number, (old, new) in enumerate(MUTATIONS.values(), 1):
        awake = f"int{{nbl_mutant == {number}}}"
        assert whole.count(old) == 1, f"{old!r} stands {whole.count(old)} times in the kernels"
        whole = whole.replace(old, new.replace("MUTANT", awake))
    header = (
        "#pragma once\n#include <cstdlib>\n"
        'static const int nbl_mutant = std::atoi(std::getenv("NBL_MUTANT"));\n'
    )
    for file, text in zip(files, whole.split("\0")):
        file.write_text(
            text.replace("#pragma once\n", header if file is files[0] else "#pragma once\n")
        )
    return build_driver("linear_few", folder)


def mutation_problems(seed: int) -> list[Problem]:
    return [
        Problem(torch.bfloat16, 1, 9, 136, bias=True, residual=True, seed=seed),
        Problem(torch.bfloat16, 3, 19, 264, gap=8, seed=seed),
        Problem(torch.bfloat16, 3, 19, 261, seed=seed),
        Problem(torch.bfloat16, 7, 4, 1200, splits=3, runs=2, seed=seed),
        Problem(torch.float16, 9, 17, 264, norm=True, seed=seed),
    ]


def test_the_unbroken_build_of_the_mutants_passes(mutants, monkeypatch):
    monkeypatch.setenv("NBL_MUTANT", "0")
    for seed in range(3):
        check(mutation_problems(seed), mutants)


@pytest.mark.parametrize("number", range(1, len(MUTATIONS) + 1), ids=list(MUTATIONS))
def test_mutations_are_caught(mutants, monkeypatch, number):
    monkeypatch.setenv("NBL_MUTANT", str(number))
    for seed in range(3):
        with pytest.raises((EmulationError, AssertionError)):
            check(mutation_problems(seed), mutants)
