"""The CUDA steps of the LMMSE solves, emulated, against numpy; the batched flow on small layers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cases.lmmse import exact_moments, tokens
from emulation.build import EmulationError, build_driver, mutated_sources, run_driver

import nbl_kernels as nk

EQUILIBRATE, ASSEMBLE, CHECK_PIVOTS, SCALE, SUBTRACT_SQUARES = range(5)
SIZES = [1, 7, 33, 130]
HEADER = "nbl/cuda/lmmse.cuh"


def i32(*values):
    return np.array(values, "i4").tobytes()


def i64(*values):
    return np.array(values, "i8").tobytes()


def f64(*arrays):
    return b"".join(np.ascontiguousarray(a, "f8").tobytes() for a in arrays)


def run(step: int, layers: int, *problem: bytes, seed: int = 0, sources=None) -> np.ndarray:
    driver = build_driver("lmmse", sources)
    return np.frombuffer(run_driver(driver, i32(step, layers, seed) + b"".join(problem)), "f8")


def normals(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@dataclasses.dataclass
class Sum:
    """base (+ other + cross + crossᵀ), symmetric; below the diagonal the kernels see NaN."""

    layers: int
    n: int
    residual: bool
    seed: int = 0

    def __post_init__(self):
        def symmetric(seed):
            a = normals(self.layers, self.n, self.n + 3, seed=seed)
            return a @ a.swapaxes(1, 2)

        self.base, self.other = symmetric(self.seed), symmetric(self.seed + 1)
        self.cross = normals(self.layers, self.n, self.n, seed=self.seed + 2)

    def payload(self) -> bytes:
        upper = np.where(np.triu(np.ones((self.n, self.n), bool)), 0, np.nan)
        parts = [self.base + upper]
        if self.residual:
            parts += [self.cross, self.other + upper]
        return i64(self.n) + i32(self.residual) + f64(*parts)

    def value(self) -> np.ndarray:
        if not self.residual:
            return self.base
        return self.base + self.other + self.cross + self.cross.swapaxes(1, 2)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """To a few roundings of float64 for sums of this many terms of either sign."""
    tolerance = 1e-14 * np.abs(expected).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=tolerance)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_equilibrate(n, residual):
    c = Sum(3, n, residual)
    out = run(EQUILIBRATE, 3, c.payload(), f64([1e-3]))
    diagonal = np.diagonal(c.value(), axis1=1, axis2=2)
    lam = 1e-3 * diagonal.mean(1)
    assert_close(out[:3], lam)
    assert_close(out[3:].reshape(3, n), (diagonal + lam[:, None]) ** -0.5)


def test_equilibrate_what_is_no_covariance():
    """No variance: as if its mean were 1. Elsewhere no scale that check_pivots would accept."""
    c = Sum(5, 4, False)
    c.base[0] = 0
    c.base[1, 2, 2] = np.nan
    c.base[2, 1, 1] = np.inf
    c.base[3] *= -1
    c.base[4, 0, 0] = 0
    out = run(EQUILIBRATE, 5, c.payload(), f64([1e-2]))
    lam, scale = out[:5], out[5:].reshape(5, 4)
    assert lam[0] == 1e-2 and np.allclose(scale[0], 10)
    for layer in (1, 2, 3):
        assert not np.all(np.isfinite(scale[layer]) & (scale[layer] > 0))
    assert np.all(np.isfinite(scale[4])) and scale[4, 0] == lam[4] ** -0.5
    exact = run(EQUILIBRATE, 5, c.payload(), f64([0.0]))[5:].reshape(5, 4)
    assert np.all(exact[0] == np.inf) and exact[4, 0] == np.inf


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_assemble(n, residual):
    c = Sum(2, n, residual)
    scale = np.random.default_rng(5).uniform(0.1, 2, (2, n))
    untouched = np.full((2, n, n), -7.0)
    out = run(ASSEMBLE, 2, c.payload(), f64(scale, untouched)).reshape(2, n, n)
    expected = c.value() * scale[:, :, None] * scale[:, None, :]
    expected[:, np.arange(n), np.arange(n)] = 1
    upper = np.triu(np.ones((n, n), bool))
    assert_close(out[:, upper], expected[:, upper])
    assert np.all(out[:, ~upper] == -7)  # Cholesky reads the other triangle only


def test_assemble_keeps_what_is_not_finite():
    c = Sum(1, 40, True)
    c.cross[0, 35, 2] = np.nan
    c.base[0, 1, 39] = np.inf
    out = run(ASSEMBLE, 1, c.payload(), f64(np.ones(40), np.zeros((40, 40)))).reshape(40, 40)
    assert np.isnan(out[2, 35]) and out[1, 39] == np.inf
    assert np.isfinite(out).sum() == 1600 - 2


@pytest.mark.parametrize("n", [*SIZES, 300])
def test_check_pivots(n):
    """One fault per layer; layer 0 has none, and the last pivot of layer 1 is just large enough."""
    layers, bad = 8, n - 1
    scale, info = np.ones((layers, n)), np.zeros(layers, "i4")
    factor = np.full((layers, n, n), np.nan)
    factor[:, np.arange(n), np.arange(n)] = 1
    factor[1, bad, bad] = -0.11  # the sign of a diagonal is not looked at
    factor[2, bad, bad] = 0.09
    factor[3, bad, bad] = np.nan
    info[4] = n
    scale[5, bad] = np.inf
    scale[6, bad] = np.nan
    scale[7, bad] = 0
    problem = i64(n) + f64([0.01, 1e-4], scale, factor) + info.tobytes()
    used = run(CHECK_PIVOTS, layers, problem)
    np.testing.assert_array_equal(used, [1e-4, 1e-4] + [np.nan] * 6)


@pytest.mark.parametrize("rows, cols", [(1, 1), (7, 33), (33, 7), (130, 130), (300, 2), (1, 65)])
@pytest.mark.parametrize("has_b, has_row_scale, in_place", [(0, 0, 0), (0, 0, 1), (1, 1, 0)])
def test_scale(rows, cols, has_b, has_row_scale, in_place):
    layers = 2
    a, b = normals(layers, rows, cols), normals(layers, rows, cols, seed=1)
    row, col = normals(layers, rows, seed=2), normals(layers, cols, seed=3)
    problem = i64(rows, cols) + i32(has_b, has_row_scale, in_place) + f64(a)
    problem += f64(b) * has_b + f64(row) * has_row_scale + f64(col)
    expected = (a + b * has_b) * col[:, None, :]
    if has_row_scale:
        expected *= row[:, :, None]
    assert_close(run(SCALE, layers, problem), expected.ravel())


@pytest.mark.parametrize("n", [1, 7, 255, 2049, 33 * 130, 130 * 130])
@pytest.mark.parametrize("has_factor", [0, 1])
def test_subtract_squares(n, has_factor):
    a, factor = normals(3, n), normals(3, seed=1)
    before = normals(3, seed=2)
    problem = i64(n) + i32(has_factor) + f64(a) + f64(factor) * has_factor + f64(before)
    squares = (a**2).sum(1)
    expected = before - (factor * squares if has_factor else squares)
    out = run(SUBTRACT_SQUARES, 3, problem)
    np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-14 * squares.max())


def test_squares_that_are_not_finite_stay_in_their_layer():
    a = normals(3, 500)
    a[1, 499] = np.nan
    out = run(SUBTRACT_SQUARES, 3, i64(500) + i32(0) + f64(a, np.zeros(3)))
    assert np.isnan(out[1]) and np.all(np.isfinite(out[[0, 2]]))


def test_the_order_of_blocks_and_threads_changes_no_bit():
    c = Sum(2, 70, True)
    problems = [
        (EQUILIBRATE, 2, c.payload() + f64([1e-3])),
        (ASSEMBLE, 2, c.payload() + f64(normals(2, 70), np.zeros((2, 70, 70)))),
        (SUBTRACT_SQUARES, 2, i64(9000) + i32(0) + f64(normals(2, 9000), np.zeros(2))),
    ]
    for step, layers, problem in problems:
        first = run(step, layers, problem, seed=1)
        for seed in (2, 3):
            assert first.tobytes() == run(step, layers, problem, seed=seed).tobytes()


BARRIER_OF_SUM = """  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  sync_block();
"""
BARRIER_OF_TILE = """    sync_block();
  }
  const double* scale"""


@pytest.mark.parametrize("old", [BARRIER_OF_SUM, BARRIER_OF_TILE], ids=["sum", "tile"])
def test_a_dropped_barrier_is_caught(tmp_path, old):
    broken = mutated_sources(tmp_path, HEADER, old, old.replace("sync_block();", ""))
    c = Sum(1, 33, True)
    wrong = 0
    for seed in range(4):
        try:
            lam, *_ = run(EQUILIBRATE, 1, c.payload(), f64([1.0]), seed=seed, sources=broken)
            scale, out = np.ones(33), np.zeros((33, 33))
            problem = c.payload() + f64(scale, out)
            tile = run(ASSEMBLE, 1, problem, seed=seed, sources=broken).reshape(33, 33)
        except EmulationError:
            wrong += 1
            continue
        value = c.value()[0]
        off_diagonal = np.triu(value, 1)
        right = np.isclose(lam, np.trace(value) / 33) and np.allclose(
            np.triu(tile, 1), off_diagonal
        )
        wrong += not right
    assert wrong >= 3


# The flow of csrc/lmmse_solve.h is the same on every device. On the CPU layers of up to 8 channels
# take its batched branch.


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("d_f, d_t", [(6, 5), (3, 8), (8, 8), (1, 1)])
def test_batched_layers_are_the_layers_one_by_one(d_f, d_t, rank):
    if rank and rank > min(d_f, d_t):
        pytest.skip("no such rank")
    layers = [exact_moments(*tokens(300, d_f, d_t, seed)) for seed in range(6)]
    singular = layers[2].cov_ff.clone()  # its ridge grows; those of its neighbours do not
    singular[:, 0], singular[0, :] = 0, 0
    layers[2] = dataclasses.replace(layers[2], cov_ff=singular)
    with pytest.warns(UserWarning, match=r"moments\[2\]"):
        batch = nk.lmmse_solve(layers, ridge=0.0, rank=rank)
    assert batch.ridge[2] > 0 and batch.ridge[[0, 1, 3, 4, 5]].eq(0).all()
    for i, m in enumerate(layers):
        if i == 2:  # W is not determined there
            continue
        weight, nmse = nk.lmmse_solve_ref(m.cov_ff, m.cov_tf, m.cov_tt, ridge=0.0, rank=rank)
        torch.testing.assert_close(batch.weight[i], weight, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(batch.nmse[i], nmse, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("d", [8, 21])
def test_a_residual_block_is_features_plus_targets(d):
    layers = [exact_moments(*tokens(300, d, d, seed)) for seed in range(3)]
    ff, tf, tt = (torch.stack([getattr(m, f"cov_{x}") for m in layers]) for x in ("ff", "tf", "tt"))
    fused, ridge = torch.ops.nbl.residual_cca_matrix(ff, tf, tt)
    plain, _ = torch.ops.nbl.cca_matrix(ff, tf + ff, tt + tf + tf.mT + ff)
    assert ridge.eq(0).all()
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)
    torch.library.opcheck(torch.ops.nbl.residual_cca_matrix.default, (ff, tf, tt))


def test_only_the_upper_triangle_of_what_is_factored_is_read():
    m = exact_moments(*tokens(300, 12, 5))
    below = torch.full((12, 12), float("nan")).double().tril(-1)
    args = m.cov_tf[None], m.cov_tt.trace()[None], 1e-4, 0
    whole = torch.ops.nbl.lmmse_solve(m.cov_ff[None], *args)
    upper = torch.ops.nbl.lmmse_solve((m.cov_ff + below)[None], *args)
    assert torch.equal(whole[0], upper[0]) and torch.equal(whole[3], upper[3])


def test_empty_batches_and_dimensions():
    def zeros(*shape):
        return torch.zeros(shape, dtype=torch.float64)

    weight, _, _, error, used = torch.ops.nbl.lmmse_solve(
        zeros(0, 4, 4), zeros(0, 3, 4), zeros(0), 0.0, 0
    )
    assert weight.shape == (0, 3, 4) and error.shape == used.shape == (0,)
    weight, *_ = torch.ops.nbl.lmmse_solve(zeros(2, 4, 4), zeros(2, 0, 4), zeros(2), 0.0, 0)
    assert weight.shape == (2, 0, 4)
    matrix, ridge = torch.ops.nbl.cca_matrix(zeros(0, 4, 4), zeros(0, 3, 4), zeros(0, 3, 3))
    assert matrix.shape == (0, 3, 4) and ridge.shape == (0,)
