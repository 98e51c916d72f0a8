"""The CUDA kernels of the skinny linear and its row operations, run on the CPU under sanitizers
(tests/emulation), against float64."""

from __future__ import annotations

import dataclasses
import shutil
import struct
from pathlib import Path

import pytest
import torch
from cases import DTYPES
from cases.linear import EPS, torch_norm_linear, torch_norm_swiglu, torch_residual_linear
from emulation.build import ROOT, EmulationError, build_driver, run_driver
from tolerance import assert_as_exact_as_torch
from torch import Tensor
from torch.nn import functional as F

import nbl_kernels as nk

FORMATS = [None, *nk.quantization.FORMATS]  # in the order of WeightFormat


ROWS = ["rms_norm_rows", "silu_mul_rows", "dequantize_rows"]


@dataclasses.dataclass
class Problem:
    """One launch. Rows are `gap` elements longer than used, all arrays start `shift` elements past
    a multiple of 16 bytes."""

    dtype: torch.dtype
    m: int
    n: int
    k: int
    op: str = "residual_linear"  # or norm_linear, norm_swiglu, or the kernels of ROWS
    format: str | None = None  # of a quantized weight
    norm: bool = False
    bias: bool = False
    residual: bool = False
    gap: int = 0
    shift: int = 0
    splits: int = 0
    sm_count: int = (
        1  # no splits, and more than 8 tokens: the large tile from n = 48, unless asked for
    )
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
        if self.op in ("rms_norm_rows", "dequantize_rows"):
            self.n = self.k
        self.x = make(self.m, self.k)
        self.gamma = make(self.k) if self.norm else None
        rows = 2 * self.n if self.swiglu else self.m if self.op == "dequantize_rows" else self.n
        self.weight = make(rows, self.k, scale=max(self.k, 1) ** -0.5)
        self.scale = None
        if self.format is not None:
            self.weight, self.scale = nk.quantize(self.weight, self.format)
        self.b = make(self.n) if self.bias else None
        self.r = make(self.m, self.n) if self.residual else None

    def torch(self, x, weight, b, r, gamma):
        """The same by PyTorch."""
        if self.format is not None:
            weight = nk.dequantize(self.weight, self.scale, self.k, x.dtype)
        if self.op == "dequantize_rows":
            return weight
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
        # A quantized weight is not an input: PyTorch dequantizes it in each dtype.
        weight = self.weight if self.format is None else None
        return [self.x, weight, self.b, self.r, self.gamma]

    @property
    def stride(self):
        return self.k + self.gap

    @property
    def out_stride(self):
        # dequantize_rows writes granules, whatever becomes of what is past k
        return -(-self.n // 8) * 8 + 8 if self.op == "dequantize_rows" else self.n + self.gap

    @property
    def vector(self) -> bool:
        granule = 16 // self.dtype.itemsize
        sizes = [self.k, self.shift, self.stride]
        if self.format is not None:
            whole = (self.weight.shape[1], self.weight.shape[1] + self.gap, self.shift)
            if any(bytes % 16 for bytes in whole):
                return False
        if self.op == "dequantize_rows":
            return True
        if self.op == "silu_mul_rows":
            sizes.append(self.n)
        if self.op.endswith("_rows"):
            sizes.append(self.n + self.gap)
        return all(size % granule == 0 for size in sizes)

    def payload(self) -> bytes:
        kernel = ROWS.index(self.op) + 1 if self.op in ROWS else 0
        header = struct.pack(
            "<20if",
            *(kernel, DTYPES.index(self.dtype), FORMATS.index(self.format)),
            *(self.swiglu, self.norm, self.bias, self.residual, self.vector),
            *(self.m, self.n, self.k, self.stride, self.weight.shape[1] + self.gap),
            *(self.n + self.gap, self.out_stride),
            *(self.shift, self.splits, self.sm_count, self.seed, self.runs, EPS),
        )
        scale = b"" if self.scale is None else raw(self.scale)
        if self.op == "dequantize_rows":
            return header + self.rows(self.weight) + scale
        arrays = [self.rows(self.x), self.rows(self.gamma)]
        if kernel == 0:
            arrays += [self.rows(self.weight), scale, self.rows(self.b), self.rows(self.r)]
        return header + b"".join(arrays)

    def rows(self, t: Tensor | None) -> bytes:
        """As a strided view lies in memory: NaN between the rows, nothing after the last."""
        if t is None or t.numel() == 0:
            return b""
        t = torch.atleast_2d(t)
        if (
            t.dtype.itemsize == 1
        ):  # bytes that would be noticed: NaN in fp8, far from zero elsewhere
            t, nothing = t.view(torch.uint8), 127
        else:
            nothing = float("nan")
        padded = torch.full((len(t), t.shape[1] + self.gap), nothing, dtype=t.dtype)
        padded[:, : t.shape[1]] = t
        return raw(padded.flatten()[: padded.numel() - self.gap])

    def results(self, output: bytes, offset: int) -> tuple[list[Tensor], list[int], int]:
        """The outputs of all runs, and which instance ran."""
        stride, used, end = self.out_stride, self.n, 0
        if self.op == "dequantize_rows":
            used, end = stride - 8, 8
        size = ((self.m - 1) * stride + used + end) * self.dtype.itemsize
        outs = []
        for _ in range(self.runs):
            flat = torch.frombuffer(bytearray(output[offset : offset + size]), dtype=self.dtype)
            padding = torch.full((stride - used - end,), float("nan"), dtype=self.dtype)
            rows = torch.cat([flat, padding]).view(self.m, stride)
            assert rows[:, used:].isnan().all(), "written between the rows"
            outs.append(rows[:, : self.n])
            offset += size
        instance = []
        if not self.op.endswith("_rows"):
            instance = list(struct.unpack_from("<5i", output, offset))
            offset += 20
        return outs, instance, offset


def raw(t: Tensor) -> bytes:
    return t.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def run(problems: list[Problem], driver: Path | None = None) -> list[tuple[Tensor, list[int]]]:
    """The result of each, and (grid x, grid y, mma, rows, tokens) of the instance that gave it;
    checks that runs in another order gave the same bits."""
    payload = struct.pack("<i", len(problems)) + b"".join(p.payload() for p in problems)
    name = "linear" if problems[0].format is None else "linear_quantized"
    output = run_driver(driver or build_driver(name), payload)
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


# float32 has one kind of tile, without mma, which is slow to emulate.
ROW_COUNTS = {torch.float32: (3,), torch.bfloat16: (1, 3, 11), torch.float16: (1, 3, 11)}
SIZES = [(1, 1), (7, 8), (8, 7), (24, 40), (40, 63), (63, 24), (136, 1), (1, 136), (8, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["residual_linear", "norm_linear", "norm_swiglu"])
def test_odd_sizes(op, dtype):
    check([Problem(dtype, m, n, k, op) for n, k in SIZES for m in ROW_COUNTS[dtype]])


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
    assert [i[3] for i in instances] == [16, 16, 32, 32]


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
            Problem(torch.bfloat16, 2, 32, 8192, sm_count=8),
            Problem(torch.bfloat16, 2, 128, 8192, sm_count=8),
        ]
    )
    assert few[:2] == [2, 4] and many[:2] == [8, 1]


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


# ---- Quantized weights ---------------------------------------------------------------------------

QUANTIZED = [(format, dtype) for format in FORMATS[1:] for dtype in DTYPES]


@pytest.mark.parametrize("format, dtype", QUANTIZED)
@pytest.mark.parametrize("op", ["residual_linear", "norm_linear", "norm_swiglu"])
def test_quantized_every_number_of_rows(op, dtype, format):
    options = {"bias": op != "norm_swiglu", "residual": op == "residual_linear"}
    ms = (1, 2, 7, 16) if dtype is torch.float32 else range(1, 17)
    problems = [Problem(dtype, m, 20, 272, op, format, **options) for m in ms]
    kinds = {tuple(i[2:]) for i in check(problems)}
    assert len(kinds) == (1 if dtype is torch.float32 else 2 if format == "int4" else 3)


@pytest.mark.parametrize("format, dtype", QUANTIZED)
@pytest.mark.parametrize("op", ["residual_linear", "norm_linear", "norm_swiglu"])
def test_quantized_odd_sizes(op, dtype, format):
    sizes = [(1, 1), (7, 8), (40, 63), (17, 129), (5, 1031), (9, 528), (8, 0)]
    check([Problem(dtype, m, n, k, op, format) for n, k in sizes for m in ROW_COUNTS[dtype]])


@pytest.mark.parametrize("format, dtype", QUANTIZED)
@pytest.mark.parametrize("gap, shift", [(16, 0), (3, 0), (0, 1), (8, 8)])
def test_quantized_strides_and_addresses(dtype, format, gap, shift):
    problems = [
        Problem(dtype, m, 19, 144, op, format, norm=True, gap=gap, shift=shift)
        for m in ROW_COUNTS[dtype]
        for op in ("residual_linear", "norm_swiglu")
    ]
    assert all(p.vector == (gap == 16) for p in problems)
    check(problems)


@pytest.mark.parametrize("format, dtype", QUANTIZED)
def test_quantized_long_rows_and_split_k(dtype, format):
    """The ring fills more than once; splits end anywhere and give the same bits in any order."""
    instances = check(
        [
            Problem(dtype, 1, 5, 8192 + 16, format=format),
            Problem(dtype, 12, 5, 4096 + 16, norm=True, format=format),
            Problem(dtype, 1, 9, 20000, format=format, splits=2, runs=3),
            Problem(dtype, 4, 9, 5000, "norm_swiglu", format=format, splits=2, runs=2, seed=7),
            Problem(dtype, 10, 3, 4100, format=format, splits=4, runs=2),
        ]
    )
    if dtype is not torch.float32:
        assert all(i[1] > 1 for i in instances[2:])


@pytest.mark.parametrize("format", FORMATS[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantized_rows_before_a_wide_product(dtype, format):
    check(
        [
            Problem(dtype, 3, 0, k, "dequantize_rows", format, gap=gap, shift=shift)
            for k in (1, 8, 37, 128, 264, 4112)
            for gap, shift in ((0, 0), (16, 0), (1, 2))
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_every_number_means_what_pytorch_says(dtype):
    """All numbers of 8 bits, subnormal ones and NaN too, and of 4: one weight each, times one."""
    for m in (1,) if dtype is torch.float32 else (1, 3, 9):
        for format, k in (("int8", 16), ("fp8", 16), ("fp8", 3), ("int4", 8)):
            p = Problem(dtype, m, 16 if format == "int4" else 256, k, format=format)
            p.x.zero_()
            p.x[:, 1] = 1
            if format == "int4":
                p.weight[:] = 0x88
                p.weight[:, 2] = torch.arange(16, dtype=torch.uint8) | 0x80  # word 1: column 1
            else:
                p.weight.view(torch.uint8).zero_()
                p.weight.view(torch.uint8)[:, 1] = torch.arange(256, dtype=torch.uint8)
            p.scale.fill_(1)
            (out, _), expected = run([p])[0], p.torch(*p.inputs)
            assert torch.equal(out.isnan(), expected.isnan())
            assert torch.equal(out.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("driver", ["weights", "weights_converted"])
def test_quantized_every_byte_becomes_what_pytorch_says(driver):
    """With and without the instruction for fp8 that GPUs have from compute capability 8.9 on."""
    output = torch.frombuffer(bytearray(run_driver(build_driver(driver), b"")), dtype=torch.uint8)
    codes = torch.arange(256, dtype=torch.uint8)
    cases = [(f, t) for f in (torch.int8, torch.float8_e4m3fn) for t in (DTYPES[1], DTYPES[2])]
    for (format, dtype), part in zip(cases, output.split(512), strict=True):
        actual, expected = part.view(dtype), codes.view(format).to(dtype)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("format", FORMATS[1:])
@pytest.mark.parametrize("m", [1, 5, 12])
def test_quantized_non_finite_values_stay_in_their_row_or_column(format, m):
    for k in (144, 201):
        clean, marked, scaled = (
            Problem(torch.bfloat16, m, 33, k, residual=True, format=format) for _ in range(3)
        )
        marked.x[0, 5] = float("nan")
        scaled.scale[7] = float("inf")
        results = [out for out, _ in run([clean, marked, scaled])]
        assert results[1][0].isnan().all() and torch.equal(results[1][1:], results[0][1:])
        others = [i for i in range(33) if i != 7]
        assert not results[2][:, 7].isfinite().any()
        assert torch.equal(results[2][:, others], results[0][:, others])


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
    "an output row past m": ("m >= p.m ||", "m >= p.m + MUTANT ||"),
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
        "low.word[2 * half + 1],\n                               high",
        "low.word[2 * half + 1 - MUTANT],\n                               high",
    ),
    "the scale of another row": (
        "p.weight_scale)[weight_row]",
        "p.weight_scale)[weight_row - MUTANT * int{weight_row > 0}]",
    ),
    "the scale of a group only where the lane has some of it": (
        "if (k < end + static_cast<int>(threadIdx.x) % 4 * 8)",
        "if (k < end + static_cast<int>(threadIdx.x) % 4 * 8 * (1 - MUTANT))",
    ),
    "the scale of the next group": (
        "address[k / int{kInt4Group}]",
        "address[k / int{kInt4Group} + MUTANT]",
    ),
    "bytes of the wrong word": (
        "bytes.word[2 * part + i / 2]",
        "bytes.word[2 * part + i / 2 * (1 - MUTANT)]",
    ),
    "a bit of an fp8 number lost": (
        "halves >> 4 & 0x07f007f0u",
        "halves >> 4 & (0x07f007f0u - MUTANT * 0x00100000u)",
    ),
    "a nibble read twice": (
        "bytes.word[i] >> (4 * part)",
        "bytes.word[i] >> (4 * (part - MUTANT * int{part == 3}))",
    ),
}


MUTATED = ("row_ops.cuh", "weight_formats.cuh", "skinny_linear.cuh")  # as they are included


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mutants")
    include = folder / "csrc" / "include"
    shutil.copytree(ROOT / "csrc" / "include", include)
    files = [include / "nbl" / "cuda" / name for name in MUTATED]
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
        Problem(torch.bfloat16, 1, 9, 144, format="int8", seed=seed),
        Problem(torch.bfloat16, 3, 19, 144, format="fp8", seed=seed),
        Problem(torch.bfloat16, 10, 9, 264, format="int4", seed=seed),
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
