"""lmmse_solve, cca_bound: against numpy's lstsq, scipy's eigh + SVD, errors on tokens."""

from __future__ import annotations

import dataclasses
import math
import warnings

import devices
import numpy as np
import pytest
import scipy.linalg
import torch
from cases.lmmse import exact_moments, tokens
from torch import Tensor

import nbl_kernels as nk

path = devices.paths(None, "linalg", capabilities=False)


def moments_of(f, t, b=None) -> nk.Moments:
    acc = nk.CovarianceAccumulator(f.shape[1], t.shape[1], block_dim=0 if b is None else b.shape[1])
    acc.update(f, t, b)
    return acc.moments()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d_f, d_t", [(24, 24), (40, 7), (5, 60), (1, 1)])
def test_weight_and_bias_are_those_of_least_squares(bias, d_f, d_t):
    f, t = tokens(800, d_f, d_t)
    solved = nk.lmmse_solve(exact_moments(f, t), ridge=0.0, bias=bias)
    a = np.hstack([f.double().numpy(), np.ones((len(f), 1))]) if bias else f.double().numpy()
    best = np.linalg.lstsq(a, t.double().numpy(), rcond=None)[0]
    scale = np.abs(best).max()
    np.testing.assert_allclose(solved.weight.numpy(), best[:d_f].T, atol=1e-8 * scale)
    if bias:
        np.testing.assert_allclose(solved.bias.numpy(), best[d_f], atol=1e-8 * scale)
    else:
        assert solved.bias is None
    assert solved.ridge == 0


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1e-1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [None, 1, 6])
def test_nmse_is_the_error_on_the_tokens(ridge, bias, rank):
    f, t = tokens(500, 16, 12)
    solved = nk.lmmse_solve(exact_moments(f, t), ridge=ridge, bias=bias, rank=rank)
    f, t = f.double(), t.double()
    error = t - f @ solved.weight.T - (solved.bias if bias else 0)
    measured = error.square().sum() / (t - t.mean(0)).square().sum()
    assert float(solved.nmse) == pytest.approx(float(measured), rel=1e-9)


def test_against_reference_with_ridge_and_rank():
    f, t = tokens(400, 20, 15)
    m = exact_moments(f, t)
    for rank in (None, 4):
        solved = nk.lmmse_solve(m, ridge=1e-3, rank=rank)
        weight, nmse = nk.lmmse_solve_ref(m.cov_ff, m.cov_tf, m.cov_tt, ridge=1e-3, rank=rank)
        torch.testing.assert_close(solved.weight, weight, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(solved.nmse, nmse, rtol=1e-8, atol=1e-12)


def test_reduced_rank_is_the_best_of_its_rank():
    f, t = tokens(600, 20, 18)
    m = exact_moments(f, t)
    full = nk.lmmse_solve(m, ridge=0.0)
    errors = []
    for rank in (1, 3, 9, 18):
        solved = nk.lmmse_solve(m, ridge=0.0, rank=rank)
        u, v = solved.factors
        assert u.shape == (18, rank) and v.shape == (rank, 20)
        torch.testing.assert_close(u @ v, solved.weight)
        # Better than the truncated SVD of W, which minimizes another norm.
        left, s, right = torch.linalg.svd(full.weight, full_matrices=False)
        truncated = left[:, :rank] * s[:rank] @ right[:rank]
        delta = truncated - full.weight
        loss = full.nmse + (delta @ m.cov_ff * delta).sum() / m.cov_tt.trace()
        assert solved.nmse <= loss + 1e-12
        errors.append(float(solved.nmse))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(float(full.nmse), abs=1e-10)


def paper_bound(f, z) -> tuple[float, np.ndarray]:
    """Inverse square roots by scipy's eigh, then an SVD: the authors' route."""

    def inverse_root(c):
        values, vectors = scipy.linalg.eigh(c)
        return vectors @ np.diag(values**-0.5) @ vectors.T

    joint = np.cov(np.hstack([f, z]).T)
    d = f.shape[1]
    c_ff, c_zf, c_zz = joint[:d, :d], joint[d:, :d], joint[d:, d:]
    rho = scipy.linalg.svdvals(inverse_root(c_zz) @ c_zf @ inverse_root(c_ff))
    return z.shape[1] - float((rho**2).sum()), rho


def test_bound_and_correlations_against_eigh_and_svd():
    f, t = tokens(900, 24, 24)
    z = f + t
    bound, rho = paper_bound(f.double().numpy(), z.double().numpy())
    residual = exact_moments(f, t)  # no block: features + targets
    block = exact_moments(f, t, z)
    for m in (residual, block):
        assert float(nk.cca_bound(m)) == pytest.approx(bound, rel=1e-6)
        np.testing.assert_allclose(nk.canonical_correlations(m).numpy(), rho, atol=1e-6)
    ref = nk.cca_bound_ref(block.cov_ff, block.cov_bf, block.cov_bb)
    assert float(ref) == pytest.approx(bound, rel=1e-6)


def test_bound_with_blocks_of_other_dimensions():
    f, b = tokens(500, 10, 14)
    bound, rho = paper_bound(f.double().numpy(), b.double().numpy())
    m = exact_moments(f, b[:, :3], b)
    assert float(nk.cca_bound(m)) == pytest.approx(bound, rel=1e-6)
    np.testing.assert_allclose(nk.canonical_correlations(m).numpy(), rho, atol=1e-6)


def test_batched_over_layers(monkeypatch):
    layers = [exact_moments(*tokens(300, 12, 9, seed)) for seed in range(5)]
    batch = nk.lmmse_solve(layers, ridge=1e-3, rank=4)
    assert (
        batch.weight.shape == (5, 9, 12) and batch.bias.shape == (5, 9) and batch.nmse.shape == (5,)
    )
    monkeypatch.setattr("nbl_kernels.lmmse._GROUP_BYTES", 1)
    groups = nk.lmmse_solve(layers, ridge=1e-3, rank=4)
    for i, m in enumerate(layers):
        one = nk.lmmse_solve(m, ridge=1e-3, rank=4)
        for other in (batch, groups):
            assert torch.equal(other.weight[i], one.weight) and torch.equal(other.bias[i], one.bias)
            assert torch.equal(other.nmse[i], one.nmse) and torch.equal(other.ridge[i], one.ridge)
    square = [exact_moments(*tokens(300, 8, 8, seed)) for seed in range(3)]
    bounds = nk.cca_bound(square)
    assert torch.equal(bounds, torch.stack([nk.cca_bound(m) for m in square]))
    assert nk.canonical_correlations(square).shape == (3, 8)


def test_from_hard_bf16_tokens():
    """Through the accumulator: the predicted error is still that on the tokens."""
    f, t = tokens(4000, 32, 32)
    f = (f * torch.logspace(0, 2, 32) + 50).bfloat16()
    t = t.bfloat16()
    solved = nk.lmmse_solve(moments_of(f, t))
    error = t.double() - f.double() @ solved.weight.T - solved.bias
    centered = t.double() - t.double().mean(0)
    measured = float(error.square().sum() / centered.square().sum())
    # Both are shares of the variance, which the accumulator knows to 1e-6.
    assert float(solved.nmse) == pytest.approx(measured, abs=1e-6)


@pytest.mark.parametrize("case", ["duplicate", "constant", "few tokens"])
def test_singular_moments_are_regularized_and_reported(path, case):
    f, t = tokens(12 if case == "few tokens" else 300, 20, 6)
    if case == "duplicate":
        f[:, 7] = f[:, 3]
    if case == "constant":
        f[:, 4] = 2.0
    m = exact_moments(f, t).to(path.device)
    with pytest.warns(UserWarning, match="singular to working precision"):
        solved = nk.lmmse_solve(m, ridge=0.0)
    assert 0 < float(solved.ridge) <= 1e-6
    error = t.double() - f.double() @ solved.weight.cpu().T - solved.bias.cpu()
    variance = (t.double() - t.double().mean(0)).square().sum()
    assert float(solved.nmse) == pytest.approx(
        float(error.square().sum() / variance), rel=1e-3, abs=1e-6
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(nk.lmmse_solve(m).ridge) == 1e-4  # the default ridge needs no help


def test_no_variance_at_all():
    f, t = torch.ones(50, 4), torch.full((50, 3), 2.0)
    with pytest.warns(UserWarning, match="singular"):
        solved = nk.lmmse_solve(exact_moments(f, t), ridge=0.0)
    assert torch.equal(solved.weight, torch.zeros(3, 4).double()) and float(solved.nmse) == 0
    assert torch.allclose(solved.bias, torch.full((3,), 2.0).double())


def test_too_few_tokens_for_correlations_warn():
    f, t = tokens(6, 20, 20)
    with pytest.warns(UserWarning, match="1 by construction"):
        nk.cca_bound(exact_moments(f, t))


def test_what_is_not_a_covariance_is_refused_by_name(path):
    good = exact_moments(*tokens(200, 6, 6)).to(path.device)

    def broken(**changes):
        return dataclasses.replace(good, **changes)

    nan = good.cov_ff.clone()
    nan[2, 2] = math.nan
    cases = [
        (
            lambda: nk.lmmse_solve([good, broken(cov_ff=nan)]),
            ValueError,
            r"moments\[1\].cov_ff must be finite",
        ),
        (
            lambda: nk.lmmse_solve([good, broken(cov_ff=-good.cov_ff)]),
            ValueError,
            r"moments\[1\].*positive",
        ),
        (
            lambda: nk.cca_bound([broken(cov_tf=good.cov_tf * math.inf)]),
            ValueError,
            r"moments\[0\].cov_tf",
        ),
        (lambda: nk.lmmse_solve([]), ValueError, "at least one layer"),
        (lambda: nk.lmmse_solve("moments"), TypeError, r"moments\[0\] must be Moments"),
        (
            lambda: nk.lmmse_solve([good, exact_moments(*tokens(99, 7, 6)).to(path.device)]),
            ValueError,
            "dimensions of the first",
        ),
        (lambda: nk.lmmse_solve(good, ridge=-1.0), ValueError, "ridge must be finite and >= 0"),
        (lambda: nk.lmmse_solve(good, ridge=math.nan), ValueError, "ridge must be finite"),
        (lambda: nk.lmmse_solve(good, ridge="1"), TypeError, "ridge must be a number"),
        (lambda: nk.lmmse_solve(good, rank=0), ValueError, "rank must be between 1 and 6"),
        (lambda: nk.lmmse_solve(good, rank=7), ValueError, "rank must be between 1 and 6"),
        (lambda: nk.lmmse_solve(good, rank=2.0), TypeError, "rank must be an integer"),
        (lambda: nk.cca_bound(exact_moments(*tokens(99, 7, 6))), ValueError, "equal dimension"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


# ---- Beside the CPU ------------------------------------------------------------------------------


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-8) -> bool:
    return bool((actual.cpu() - expected).norm() <= tolerance * expected.norm())


@devices.needs_gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("d_f, d_t", [(24, 24), (40, 7), (5, 60), (130, 128), (512, 512)])
def test_agrees_with_the_cpu(path, bias, rank, d_f, d_t):
    layers = [exact_moments(*tokens(4 * (d_f + d_t), d_f, d_t, seed)) for seed in range(3)]
    expected = nk.lmmse_solve(layers, bias=bias, rank=rank)
    solved = nk.lmmse_solve([m.to(path.device) for m in layers], bias=bias, rank=rank)
    assert solved.weight.device.type == path.device
    for i in range(3):
        assert close(solved.weight[i], expected.weight[i])
        assert not bias or close(solved.bias[i], expected.bias[i])
        if rank is not None:
            u, v = (factor[i].cpu() for factor in solved.factors)
            assert u.shape == (d_t, rank) and v.shape == (rank, d_f)
            assert close(u @ v, expected.weight[i])
    assert close(solved.nmse, expected.nmse) and torch.equal(solved.ridge.cpu(), expected.ridge)


@devices.needs_gpu
@pytest.mark.parametrize("block", [False, True])
def test_bounds_agree_with_the_cpu(path, block):
    layers = []
    for seed in range(3):
        f, t = tokens(900, 64, 64, seed)
        layers.append(exact_moments(f, t, f + t.sin() if block else None))
    moved = [m.to(path.device) for m in layers]
    assert close(nk.cca_bound(moved), nk.cca_bound(layers))
    rho = nk.canonical_correlations(layers)
    assert close(nk.canonical_correlations(moved), rho, 1e-7)


def test_is_deterministic(path):
    m = exact_moments(*tokens(900, 128, 96)).to(path.device)
    first = nk.lmmse_solve([m, m])
    assert torch.equal(first.weight[0], first.weight[1])
    again = nk.lmmse_solve([m, m])
    assert torch.equal(first.weight, again.weight) and torch.equal(first.nmse, again.nmse)


@pytest.mark.parametrize("rank", [0, 3])
def test_opcheck(rank):
    m = exact_moments(*tokens(100, 6, 5))
    energy = m.cov_tt.trace()[None]
    args = (m.cov_ff[None], m.cov_tf[None], energy, 1e-4, rank)
    torch.library.opcheck(torch.ops.nbl.lmmse_solve.default, args)
    torch.library.opcheck(
        torch.ops.nbl.cca_matrix.default, (m.cov_ff[None], m.cov_tf[None], m.cov_tt[None])
    )


def test_errors_of_the_operators_name_the_argument():
    ff, tf, energy = (
        torch.eye(4).double()[None],
        torch.zeros(1, 3, 4).double(),
        torch.ones(1).double(),
    )
    op = torch.ops.nbl.lmmse_solve
    with pytest.raises(RuntimeError, match="cov_ff must have shape"):
        op(ff[:, :3], tf, energy, 0.0, 0)
    with pytest.raises(RuntimeError, match="cov_tf must be float64"):
        op(ff, tf.float(), energy, 0.0, 0)
    with pytest.raises(RuntimeError, match="rank must be between 0 and 3"):
        op(ff, tf, energy, 0.0, 4)
