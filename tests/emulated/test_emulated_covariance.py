"""The CUDA kernels of the streaming moments, emulated, against float64 on the same inputs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cases import DTYPES
from cases.covariance import assert_moments_exact, hard_tokens, relative_error
from emulation.build import EmulationError, build_driver, mutated_sources, run_driver

import nbl_kernels as nk

GRAM = "nbl/cuda/gram.cuh"
STATS = "nbl/cuda/column_stats.cuh"
NO_BAD_VALUE = (-1, -1, -1, -1)


@dataclasses.dataclass
class Layer:
    """One layer's tokens; rows may lie apart (`gap` elements) and start unaligned (`offset`)."""

    inputs: list[torch.Tensor]
    mask: torch.Tensor | None = None
    gap: int = 0
    offset: int = 0
    left_out: tuple[str, ...] = ()  # Gram matrices

    def __post_init__(self):
        dims = [x.shape[1] for x in self.inputs]
        self.acc = nk.CovarianceAccumulator(*dims[:2], block_dim=dims[2] if dims[2:] else 0)

    def payload(self) -> bytes:
        tokens = self.inputs[0].shape[0]
        left_out = sum(1 << self.gram_names().index(name) for name in self.left_out)
        header = [len(self.inputs), tokens, int(self.mask is not None), left_out]
        for x in self.inputs:
            header += [x.shape[1], x.shape[1] + self.gap, self.offset]
        parts = [np.array(header, "i4").tobytes()]
        if self.mask is not None:
            parts.append(self.mask.numpy().tobytes())
        for x in self.inputs:
            # Between the rows NaN, which no kernel may take for a value.
            rows = torch.full((tokens, x.shape[1] + self.gap), float("nan"), dtype=x.dtype)
            rows[:, : x.shape[1]] = x
            flat = rows.flatten()[: rows.numel() - self.gap if tokens else 0]
            flat = torch.cat([torch.full((self.offset,), float("nan"), dtype=x.dtype), flat])
            parts.append(flat.view(torch.uint8).numpy().tobytes())
        state = self.acc.state_dict()
        parts += [state[name].numpy().tobytes() for name in self.state_names()]
        return b"".join(parts)

    def gram_names(self) -> list[str]:
        blocks = ["gram_bf", "gram_bb"] if len(self.inputs) == 3 else []
        return ["gram_ff", "gram_tf", "gram_tt", *blocks]

    def state_names(self) -> list[str]:
        return ["count", "sums", *(n for n in self.gram_names() if n not in self.left_out)]

    def take(self, data: memoryview) -> memoryview:
        state = self.acc.state_dict()
        for name in self.state_names():
            size = state[name].numel() * state[name].element_size()
            new = torch.frombuffer(bytearray(data[:size]), dtype=state[name].dtype)
            state[name] = new.reshape(state[name].shape)
            data = data[size:]
        self.acc.load_state_dict(state)
        return data


def update(*layers: Layer, seed=0, multiprocessors=1, sources=None):
    """Adds all layers' tokens to their accumulators; returns the refused value, if any."""
    driver = build_driver("covariance", sources)
    dtype = DTYPES.index(layers[0].inputs[0].dtype)
    header = np.array([dtype, seed, multiprocessors, len(layers)], "i4").tobytes()
    out = run_driver(driver, header + b"".join(layer.payload() for layer in layers))
    bad = tuple(int(v) for v in np.frombuffer(out[:32], "i8"))
    rest = memoryview(out)[32:]
    for layer in layers:
        rest = layer.take(rest)
    assert len(rest) == 0
    return bad


def counted(layer: Layer) -> list[torch.Tensor]:
    return [x if layer.mask is None else x[layer.mask] for x in layer.inputs]


def assert_exact(layer: Layer) -> None:
    assert_moments_exact(layer.acc.moments(), *counted(layer))


def hard_layer(tokens: int, dims, dtype, masked=False, **layout) -> Layer:
    inputs = [hard_tokens(tokens, d, dtype, seed=d) for d in dims]
    mask = None
    if masked:
        mask = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) < 0.7
        for x in inputs:
            x[~mask] = float("nan")
    return Layer(inputs, mask, **layout)


def plain_layer(tokens: int, dims, dtype, seed=0) -> Layer:
    """Nothing that needs a shift: aligned 16-bit inputs are then read in place."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(max(dims), max(dims), generator=g)
    inputs = [(torch.randn(tokens, d, generator=g) @ mix[:d, :d]).to(dtype) for d in dims]
    return Layer(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_inputs(dtype):
    """Means of 100 std, scales from 1e-2 to 1e3, a block, more than one tile in each direction."""
    tokens = 100 if dtype == torch.float32 else 300  # float32 is six products
    layer = hard_layer(tokens, (136, 40, 24), dtype)
    assert update(layer) == NO_BAD_VALUE
    assert_exact(layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 17, 129])
def test_few_tokens(dtype, tokens):
    layer = hard_layer(tokens, (24, 8), dtype)
    assert update(layer) == NO_BAD_VALUE
    f, t = (x.double() for x in layer.inputs)
    state = layer.acc.state_dict()
    assert layer.acc.count == tokens
    assert relative_error(state["gram_ff"], (f.T @ f).triu()) <= 1e-6
    assert relative_error(state["gram_tf"], t.T @ f) <= 1e-6
    assert relative_error(state["gram_tt"], (t.T @ t).triu()) <= 1e-6
    if tokens > 100:
        assert_exact(layer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_shift(dtype):
    layer = plain_layer(129, (136, 40), dtype)
    assert update(layer) == NO_BAD_VALUE
    assert_exact(layer)


@pytest.mark.parametrize("multiprocessors", [1, 60])
@pytest.mark.parametrize(
    "left_out",
    [
        ("gram_ff",),
        ("gram_tf",),
        ("gram_tt",),
        ("gram_bf",),
        ("gram_bb",),
        ("gram_ff", "gram_tt", "gram_bb"),
        ("gram_ff", "gram_tf", "gram_tt", "gram_bf", "gram_bb"),
    ],
)
def test_gram_matrices_may_be_left_out(left_out, multiprocessors):
    """Null pointers, no tiles: of one layer among others, with tokens split and not."""
    dims = (136, 24, 40)
    full, part = (hard_layer(300, dims, torch.bfloat16, masked=True) for _ in range(2))
    part.left_out = left_out
    others = [hard_layer(40, (8, 24), torch.bfloat16), hard_layer(40, (24, 8), torch.bfloat16)]
    update(full, multiprocessors=multiprocessors)
    layers = others[0], part, others[1]
    assert update(*layers, multiprocessors=multiprocessors) == NO_BAD_VALUE
    for layer in others:
        assert layer.acc.count == 40
        f, t = (x.double() for x in layer.inputs)
        assert relative_error(layer.acc.state_dict()["gram_tf"], t.T @ f) <= 1e-6
    exact, state = full.acc.state_dict(), part.acc.state_dict()
    for name, value in state.items():
        if name in left_out:
            assert not value.any()
        else:
            assert relative_error(value.double(), exact[name].double()) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(1, 1), (3, 130), (200, 7)])
def test_odd_dimensions(dtype, dims):
    layer = hard_layer(150, dims, dtype)
    assert update(layer) == NO_BAD_VALUE
    assert_exact(layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [plain_layer, hard_layer])
def test_rows_apart_and_unaligned(dtype, make):
    for gap, offset in [(8, 0), (3, 0), (8, 1)]:
        layer = make(40, (40, 24, 8), dtype)
        layer.gap, layer.offset = gap, offset
        assert update(layer) == NO_BAD_VALUE
        assert_exact(layer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_are_not_looked_at(dtype):
    layer = hard_layer(200, (40, 24), dtype, masked=True)
    assert update(layer) == NO_BAD_VALUE
    assert_exact(layer)
    count = layer.acc.count
    plain = plain_layer(200, (40, 24), dtype)
    plain.mask = layer.mask
    for x in plain.inputs:
        x[~plain.mask] = float("inf")
    assert update(plain) == NO_BAD_VALUE
    assert_exact(plain)
    before = layer.acc.state_dict()
    layer.mask = torch.zeros(200, dtype=torch.bool)
    assert update(layer) == NO_BAD_VALUE
    assert layer.acc.count == count
    assert all(torch.equal(before[k], v) for k, v in layer.acc.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype):
    layer = hard_layer(0, (24, 8), dtype)
    assert update(layer) == NO_BAD_VALUE
    assert layer.acc.count == 0
    assert not any(v.any() for v in layer.acc.state_dict().values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_updates_add_up(dtype):
    f, t = hard_tokens(400, 40, dtype, 1), hard_tokens(400, 16, dtype, 2)
    layer = Layer([f, t])
    for begin, end in [(0, 1), (1, 8), (8, 100), (100, 400)]:
        layer.inputs = [f[begin:end], t[begin:end]]
        assert update(layer) == NO_BAD_VALUE
    assert_moments_exact(layer.acc.moments(), f, t)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_split_where_tiles_are_few(dtype):
    for make in (plain_layer, hard_layer):
        layer = make(700, (24, 16), dtype)
        assert update(layer, multiprocessors=108) == NO_BAD_VALUE
        assert_exact(layer)


def test_spans_of_long_updates():
    """More tokens than one launch takes: the shift is put right once."""
    f = hard_tokens(8192 + 100, 16, torch.bfloat16)
    f[8192:] *= 1.01
    layer = Layer([f, f[:, 4:12].contiguous()])
    assert update(layer, multiprocessors=4) == NO_BAD_VALUE
    assert_exact(layer)


def test_several_layers_in_one_launch():
    dtype = torch.bfloat16
    layers = [
        hard_layer(150, (24, 40), dtype),
        hard_layer(70, (136, 8, 24), dtype, masked=True),
        plain_layer(40, (8, 8), dtype),
        hard_layer(0, (8, 8), dtype),
        *(plain_layer(33, (8, 16), dtype, seed) for seed in range(7)),
    ]
    assert update(*layers, multiprocessors=30) == NO_BAD_VALUE
    for layer in layers:
        if layer.inputs[0].shape[0]:
            assert_exact(layer)
    assert layers[3].acc.count == 0


def test_more_tiles_than_a_band():
    """Ten tile rows: the second band, its triangle and what is right of it."""
    layer = plain_layer(16, (1160, 1048), torch.bfloat16)
    assert update(layer) == NO_BAD_VALUE
    f, t = (x.double() for x in layer.inputs)
    state = layer.acc.state_dict()
    for name, exact in [("ff", (f.T @ f).triu()), ("tf", t.T @ f), ("tt", (t.T @ t).triu())]:
        gram = state[f"gram_{name}"]
        assert ((gram - exact).abs() <= 1e-6 * exact.abs().max()).all(), name


def test_outliers_of_shifted_channels_are_counted_exactly():
    f = hard_tokens(600, 40, torch.bfloat16)
    f[::50, :] *= -0.3
    f[7, 0], f[9, 3] = 1e5, -3e4
    layer = Layer([f, f[:, :16].contiguous()])
    assert update(layer) == NO_BAD_VALUE
    assert_exact(layer)


def test_massive_token():
    """One token that outweighs all others by far, as the first of a text often does."""
    f = torch.randn(600, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    f[0, 5] = 3000.0
    layer = Layer([f, f[:, :8].contiguous()])
    assert update(layer) == NO_BAD_VALUE
    assert_exact(layer)


def test_constant_channels_have_no_variance():
    f = torch.randn(100, 8).bfloat16()
    f[:, 2], f[:, 5] = 3.0, 0.0
    layer = Layer([f, f[:, :3].contiguous()])
    assert update(layer) == NO_BAD_VALUE
    m = layer.acc.moments()
    assert m.cov_ff[2].abs().max() < 1e-12 and m.cov_ff[5].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_schedule(dtype):
    results = []
    for seed in (1, 2):
        layer = hard_layer(300, (136, 24), dtype)
        update(layer, seed=seed, multiprocessors=12)
        results.append(layer.acc.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@pytest.mark.parametrize("dtype, value", list(zip(DTYPES, map(float, ("nan", "inf", "-inf")))))
def test_values_that_are_not_finite_are_refused(dtype, value):
    first, second = plain_layer(300, (24, 16), dtype), plain_layer(300, (24, 16), dtype)
    assert update(first, second) == NO_BAD_VALUE
    before = [layer.acc.state_dict() for layer in (first, second)]
    second.inputs[1][217, 3] = second.inputs[1][250, 3] = second.inputs[1][0, 9] = value
    assert update(first, second) == (1, 1, 3, 217)
    for layer, state in zip((first, second), before):
        assert all(torch.equal(state[k], v) for k, v in layer.acc.state_dict().items())


def test_values_too_large_to_square_are_refused():
    f = torch.ones(20, 3)
    f[7, 1] = 1e30
    assert update(Layer([f, f])) == (0, 0, 1, 7)
    f[:, 1] = 9e17  # none too large by itself
    f = f.repeat(30, 1)
    assert update(Layer([f, f])) == (0, 0, 1, -1)


# Kernels broken on purpose. One build holds all faults; the environment chooses one of them.

FAULTS = [
    "copies not waited for",
    "one copy too many in flight",
    "no barrier in the ring",
    "a token too few",
    "a token too many",
    "columns past the end",
    "never promoted",
    "stages overlap",
    "statistics before the barrier",
    "low parts forgotten",
]
WAIT, STATS_BARRIER = "copy_async_wait<kGramStages - 2>();", "sync_block();\n  const int mine"
CHANGES = [  # header, what stands there once, what takes its place: fault(i) says whether i is on
    (GRAM, WAIT, f"if (fault(1)) copy_async_wait<kGramStages - 1>(); else if (!fault(0)) {WAIT}"),
    (GRAM, "sync_block();  // all have this", "if (!fault(2)) sync_block();  // all have this"),
    (GRAM, "const bool valid = t < end;", "const bool valid = t + fault(3) < end + fault(4);"),
    (GRAM, "in_cols = col < c.dim;", "in_cols = fault(5) || col < c.dim;"),
    (
        GRAM,
        "    multiply_slab<T>(accumulators, stage, stage + kSlabBytes, first_row, first_col);\n",
        "    multiply_slab<T>(accumulators, stage, stage + kSlabBytes, first_row, first_col);\n"
        "    if (fault(6) && step + 1 != steps) continue;\n",
    ),
    (GRAM, "= stages + step % kGramStages *", "= stages + step % (fault(7) ? 1 : kGramStages) *"),
    (STATS, STATS_BARRIER, f"if (!fault(8)) {STATS_BARRIER}"),
    (STATS, "if (nonzero[part]) p", "if (nonzero[part] && !fault(9)) p"),
]
CHOICE = """#include <cstdlib>
namespace nbl {
inline bool fault(int i) {
  const char* chosen = std::getenv("NBL_FAULT");
  return chosen && std::atoi(chosen) == i;
}
}  // namespace nbl
"""


@pytest.fixture(scope="module")
def faulty_sources(tmp_path_factory):
    include = '#include "ptx.cuh"\n'
    sources = mutated_sources(tmp_path_factory.mktemp("faulty"), STATS, include, include + CHOICE)
    for header, old, new in CHANGES:
        file = sources / "csrc" / "include" / header
        text = file.read_text()
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {header}"
        file.write_text(text.replace(old, new))
    return sources


def error_of(layer: Layer, **options) -> float:
    """Of the Gram matrices, relative; infinite where the run itself fails."""
    try:
        update(layer, **options)
    except EmulationError:
        return float("inf")
    f, t = (x.double() for x in layer.inputs)
    state = layer.acc.state_dict()
    error = max(
        relative_error(state["gram_ff"], (f.T @ f).triu()),
        relative_error(state["gram_tf"], t.T @ f),
        relative_error(state["gram_tt"], (t.T @ t).triu()),
    )
    return float("inf") if error != error else error


def layer_for(fault: str) -> Layer:
    if fault == "low parts forgotten":
        return plain_layer(65, (24, 16), torch.float32)
    if fault == "statistics before the barrier":  # a shift that is wrong, not put right
        return hard_layer(65, (24, 16), torch.bfloat16)
    return plain_layer(1500 if fault == "never promoted" else 161, (40, 24), torch.bfloat16)


def test_the_faulty_build_is_right_without_a_fault(faulty_sources):
    for fault in FAULTS[-4:]:
        assert error_of(layer_for(fault), sources=faulty_sources) <= 1e-6


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_caught(faulty_sources, monkeypatch, fault):
    monkeypatch.setenv("NBL_FAULT", str(FAULTS.index(fault)))
    errors = [error_of(layer_for(fault), seed=seed, sources=faulty_sources) for seed in range(4)]
    assert max(errors) > 1e-6, f"{fault}: errors {errors}"
