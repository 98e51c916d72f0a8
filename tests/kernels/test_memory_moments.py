"""MemoryAccumulator: against float64 moments of the features stacked with their past."""

from __future__ import annotations

import subprocess
import sys
import warnings

import devices
import pytest
import torch
from cases import DTYPES
from cases.covariance import relative_error
from cases.memory_moments import TOLERANCE, assert_right, block_errors, exact_moments, texts

import nbl_kernels as nk
from nbl_kernels import memory_moments

FILTERS = [
    ((1,), (0.6, 0.95)),
    ((1,), ()),
    ((2,), (0.95,)),
    ((1, 2), (0.6,)),
    ((3, 1), (0.99, 0.6)),
    ((1, 4), ()),
    ((), (0.6, 0.95, 0.99)),
    ((), ()),
]


def stacked(f, lags, decays, mask=None, starts=None) -> torch.Tensor:
    """φ in float64, token by token."""
    phi = torch.zeros(*f.shape[:2], 1 + len(lags) + len(decays), f.shape[2], dtype=torch.float64)
    for row in range(f.shape[0]):
        seen, averages = [], [0.0 for _ in decays]
        for token in range(f.shape[1]):
            if mask is not None and not mask[row, token]:
                continue
            if starts is not None and starts[row, token]:
                seen, averages = [], [0.0 for _ in decays]
            seen.append(f[row, token].double())
            averages = [a * e + (1 - a) * seen[-1] for a, e in zip(decays, averages)]
            branches = [seen[-1]]
            branches += [seen[-1 - lag] if lag < len(seen) else 0 * seen[-1] for lag in lags]
            phi[row, token] = torch.stack(branches + averages)
    return phi.flatten(2)


def accumulate(f, t, lags=(1,), decays=(0.6, 0.95), block=None, **where) -> nk.MemoryAccumulator:
    acc = nk.MemoryAccumulator(
        f.shape[2],
        t.shape[2],
        lags=lags,
        decays=decays,
        block_dim=0 if block is None else block.shape[2],
    )
    acc.update(f, t, block, **where)
    return acc


def random_mask(batch: int, length: int, share=0.7, seed=0) -> torch.Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("lags, decays", FILTERS)
def test_memory_features(lags, decays):
    f, _ = texts(3, 90, 5)
    f = f.double()
    mask, starts = random_mask(3, 90), random_mask(3, 90, 0.1, seed=1)
    nowhere = torch.where(mask[..., None], f, float("nan"))
    for value, where in [
        (f, {}),
        (f, {"starts": starts}),
        (nowhere, {"mask": mask}),
        (nowhere, {"mask": mask, "starts": starts}),
    ]:
        exact = stacked(f, lags, decays, **where)
        actual = nk.memory_features(value, lags, decays, **where)
        assert (actual - exact).abs().max() <= 1e-13 * exact.abs().max()
        single = nk.memory_features(value.float(), lags, decays, **where)
        assert single.dtype == torch.float32
        assert (single - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lags, decays", FILTERS)
def test_moments(lags, decays, dtype):
    f, t = texts(8, 200, 16, dtype)
    acc = accumulate(f, t, lags, decays)
    assert_right(acc.moments(), exact_moments(f, t, lags, decays), 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lags, decays", FILTERS)
def test_means_of_many_standard_deviations(lags, decays, dtype):
    f, t = texts(6, 300, 12, dtype, mean=50.0)
    m, exact = accumulate(f, t, lags, decays).moments(), exact_moments(f, t, lags, decays)
    assert_right(m, exact, 12, dtype, means=True)
    assert torch.linalg.eigvalsh(m.cov_ff)[0] > 0
    naive = nk.CovarianceAccumulator(m.cov_ff.shape[0], 12)
    naive.update(nk.memory_features(f, lags, decays).to(dtype), t)
    errors, theirs = (block_errors(x, exact, 12)["cov_ff"] for x in (m, naive.moments()))
    assert errors <= max(2 * theirs, 1e-5), "no worse than multiplying the stacked features"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("where", ["left", "right", "inside", "packed", "packed and masked"])
def test_sequences(where, mean, dtype):
    """Padding anywhere, and several sequences to a row."""
    batch, length, lags, decays = 5, 160, (1, 3), (0.6, 0.95)
    f, t = texts(batch, length, 10, dtype, mean=mean)
    b = (f + t).to(dtype)[..., :7]
    lengths = torch.tensor([160, 3, 1, 0, 77])[:, None]
    token = torch.arange(length)
    mask = {
        "left": token >= length - lengths,
        "right": token < lengths,
        "inside": random_mask(batch, length),
        "packed and masked": random_mask(batch, length),
    }.get(where)
    starts = random_mask(batch, length, 0.05, seed=2) if "packed" in where else None
    exact = exact_moments(f, t, lags, decays, mask, starts, b)
    if mask is not None:
        f, t, b = (torch.where(mask[..., None], x, float("nan")) for x in (f, t, b))
    acc = accumulate(f, t, lags, decays, b, mask=mask, starts=starts)
    assert_right(acc.moments(), exact, 10, dtype, means=mean > 0)


def test_sequences_of_one_token():
    f, t = texts(400, 1, 6)
    acc = accumulate(f, t)
    m, exact = acc.moments(), exact_moments(f, t, (1,), (0.6, 0.95))
    assert relative_error(m.cov_ff, exact.cov_ff) <= 1e-6
    assert relative_error(m.cov_tf, exact.cov_tf) <= 1e-6
    before_the_first = m.cov_ff[6:12]
    assert before_the_first.norm() <= 1e-6 * exact.cov_ff.norm()
    packed = accumulate(
        f.transpose(0, 1), t.transpose(0, 1), starts=torch.ones(1, 400, dtype=torch.bool)
    )
    assert relative_error(packed.moments().cov_ff, acc.moments().cov_ff) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splitting_merging_and_chunks_do_not_matter(dtype, monkeypatch):
    f, t = texts(12, 50, 8, dtype)
    lags, decays = (2, 1), (0.95, 0.6)
    exact = exact_moments(f, t, lags, decays)
    whole, first, second = (nk.MemoryAccumulator(8, 8, lags=lags, decays=decays) for _ in "abc")
    monkeypatch.setattr(memory_moments, "_CHUNK_BYTES", 4 * 50 * 5 * 8 * 5)  # five rows
    whole.update(f, t)
    assert_right(whole.moments(), exact, 8, dtype)
    for i, (x, y) in enumerate(zip(f.split(3), t.split(3))):
        (first if i % 2 else second).update(x, y)
    before = second.state_dict()
    first.merge(second)
    assert_right(first.moments(), exact, 8, dtype)
    assert all(torch.equal(before[k], v) for k, v in second.state_dict().items())
    assert first.count == 600 and second.count == 300


def test_many_ends_are_kept_as_their_gram_matrix():
    f, t = texts(150, 9, 6)
    exact = exact_moments(f, t, (1, 2), (0.6,))
    acc = nk.MemoryAccumulator(6, 6, lags=(1, 2), decays=(0.6,))
    width = 3 * 6
    for x, y in zip(f.split(10), t.split(10)):
        acc.update(x, y)
        assert len(acc.state_dict()["ends"]) <= width
    assert acc.state_dict()["gram_ends"].shape == (width, width)
    assert_right(acc.moments(), exact, 6)
    restored = nk.MemoryAccumulator(6, 6, lags=(1, 2), decays=(0.6,))
    restored.load_state_dict(acc.state_dict())
    assert_right(restored.moments(), exact, 6)
    other = accumulate(f[:4], t[:4], (1, 2), (0.6,))
    other.merge(acc)
    both = exact_moments(torch.cat([f[:4], f]), torch.cat([t[:4], t]), (1, 2), (0.6,))
    assert_right(other.moments(), both, 6)


def test_decays_from_a_grid():
    f, t = texts(4, 300, 7)
    acc = accumulate(f, t, (1,), (0.5, 0.8, 0.9, 0.95))
    for decays in [(0.95, 0.5), (0.8,), ()]:
        assert_right(acc.moments(decays=decays), exact_moments(f, t, (1,), decays), 7)
    with pytest.raises(ValueError, match=r"decays must be distinct ones of .*got \(0.7,\)"):
        acc.moments(decays=(0.7,))
    with pytest.raises(ValueError, match="decays must be distinct"):
        acc.moments(decays=(0.5, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_block(dtype):
    f, t = texts(4, 300, 7, dtype)
    m = accumulate(f, t).moments(residual_block=True)
    exact = exact_moments(f, t, (1,), (0.6, 0.95), block=f.double() + t.double())
    assert max(block_errors(m, exact, 7).values()) <= TOLERANCE[dtype]
    assert relative_error(m.mean_block, exact.mean_block) <= 1e-6
    assert abs(nk.cca_bound(m) - nk.cca_bound(exact)) <= 1e-3 * 7
    with_block = accumulate(f, t, block=(f + t).to(dtype))
    with pytest.raises(ValueError, match="residual_block needs block_dim 0"):
        with_block.moments(residual_block=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_the_solution_is_that_of_the_stacked_features(dtype, mean):
    """Judged by the error that a map makes on the exact moments."""
    f, t = texts(16, 256, 24, dtype, mean=mean)
    lags, decays = (1,), (0.6, 0.95)
    exact = exact_moments(f, t, lags, decays)
    naive = nk.CovarianceAccumulator(4 * 24, 24)
    naive.update(nk.memory_features(f, lags, decays).to(dtype), t)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no larger ridge was needed
        ours = nk.lmmse_solve(accumulate(f, t, lags, decays).moments())
    best, stack = nk.lmmse_solve(exact), nk.lmmse_solve(naive.moments())

    def true_nmse(solution: nk.Lmmse) -> float:
        w = solution.weight
        error = exact.cov_tt - w @ exact.cov_tf.T - exact.cov_tf @ w.T + w @ exact.cov_ff @ w.T
        return float(error.trace() / exact.cov_tt.trace())

    assert true_nmse(ours) <= true_nmse(best) * (1 + 1e-3)
    assert abs(float(ours.nmse - best.nmse)) <= 2e-3 * float(best.nmse)
    if mean == 0:  # else averages rounded to 16 bits are useless to the stacked route
        assert true_nmse(ours) <= true_nmse(stack) * (1 + 1e-3)
        assert relative_error(ours.weight, stack.weight) <= 2e-2
    assert relative_error(ours.weight, best.weight) <= 2e-2


def test_state_dict():
    f, t = texts(6, 40, 5)
    b = f[..., :3] + 1
    acc = accumulate(f, t, (1, 3), (0.9,), b)
    state = acc.state_dict()
    restored = nk.MemoryAccumulator(5, 5, lags=(1, 3), decays=(0.9,), block_dim=3)
    restored.load_state_dict(state)
    for name in ("cov_ff", "cov_tf", "cov_tt", "cov_bf", "cov_bb", "mean_features"):
        assert torch.equal(getattr(restored.moments(), name), getattr(acc.moments(), name))
    restored.update(f, t, b)
    assert acc.count == 240 and state["count"] == 240, "the state is a copy"
    assert relative_error(restored.moments(0).cov_ff, acc.moments(0).cov_ff) <= 1e-6
    for other in [
        nk.MemoryAccumulator(5, 5, lags=(1, 3), decays=(0.8,), block_dim=3),
        nk.MemoryAccumulator(5, 5, lags=(1, 2), decays=(0.9,), block_dim=3),
        nk.MemoryAccumulator(5, 5, lags=(1, 3), decays=(0.9, 0.5), block_dim=3),
        nk.MemoryAccumulator(5, 5, lags=(1, 3), decays=(0.9,)),
    ]:
        with pytest.raises(ValueError, match="must be"):
            other.load_state_dict(state)
        assert other.count == 0
        with pytest.raises(ValueError, match="other must have"):
            other.merge(acc)
    with pytest.raises(ValueError, match="state must have the keys"):
        acc.load_state_dict({})
    with pytest.raises(TypeError, match="other must be"):
        acc.merge(None)


def _reduce(rank: int, store: str, folded: bool) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    f, t = texts(40, 12, 4)
    # One process has seen more sequences than the other, perhaps more than it keeps as rows.
    share = slice(0, 5) if rank == 0 else slice(5, 40 if folded else 8)
    acc = accumulate(f[share], t[share])
    assert (acc.state_dict()["gram_ends"].numel() > 0) == (folded and rank == 1)
    acc.all_reduce()
    every = slice(0, 40 if folded else 8)
    assert_right(acc.moments(), exact_moments(f[every], t[every], (1,), (0.6, 0.95)), 4)
    dist.destroy_process_group()


@pytest.mark.parametrize("folded", [False, True])
def test_all_reduce(tmp_path, folded):
    torch.multiprocessing.spawn(_reduce, (str(tmp_path / "store"), folded), nprocs=2)


# In a process of its own, whose memory nothing else grows. Resident memory in MB after a warm-up
# and 200 updates on, of several accumulators, as those of a model's layers.
GROWTH = """
import resource, sys, torch, nbl_kernels as nk

torch.set_num_threads(1)

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize() / 2**20

kind, block = sys.argv[1], int(sys.argv[2])
accumulators = [getattr(nk, kind)(128, 128, block_dim=block) for _ in range(4)]
for step in range(220):
    inputs = [torch.randn(2, 128, 128).bfloat16() for _ in range(3 if block else 2)]
    for accumulator in accumulators:
        accumulator.update(*inputs)
    if step in (19, 219):
        print(resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["MemoryAccumulator", "CovarianceAccumulator"])
@pytest.mark.parametrize("block_dim", [0, 128])
def test_memory_does_not_grow_with_the_tokens(kind, block_dim):
    command = [sys.executable, "-c", GROWTH, kind, str(block_dim)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    warm, end = map(float, run.stdout.split())
    # of the sequences: rows, and the Gram matrix that takes their place
    last_states = 0 if kind == "CovarianceAccumulator" else 4 * (3 * 128) ** 2 * (4 + 8) / 2**20
    assert end - warm < last_states + 16


def test_nothing_to_add():
    f, t = texts(3, 10, 4)
    acc = nk.MemoryAccumulator(4, 4)
    acc.update(f[:0], t[:0])
    acc.update(f[:, :0], t[:, :0])
    acc.update(f, t, mask=torch.zeros(3, 10, dtype=torch.bool))
    assert acc.count == 0
    with pytest.raises(ValueError, match="needs more than 1 tokens, got 0"):
        acc.moments()


def test_numpy_arrays():
    f, t = texts(3, 20, 4)
    acc = nk.MemoryAccumulator(4, 4)
    acc.update(f.numpy(), t.numpy(), mask=random_mask(3, 20).numpy())
    same = accumulate(f, t, mask=random_mask(3, 20))
    assert torch.equal(acc.moments().cov_ff, same.moments().cov_ff)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["features", "targets", "block"])
def test_non_finite_tokens_are_refused_and_nothing_is_added(dtype, name, monkeypatch):
    monkeypatch.setattr(memory_moments, "_CHUNK_BYTES", 1)  # row by row
    f, t = texts(4, 30, 5, dtype)
    b = f.clone()
    acc = accumulate(f, t, block=b)
    before = acc.state_dict()
    {"features": f, "targets": t, "block": b}[name][2, 7, 3] = float("inf")
    with pytest.raises(RuntimeError, match=f"{name} must be finite.* at token 67, channel 3"):
        acc.update(f, t, b)
    after = acc.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_float16_beyond_its_range():
    """f less its mean lies beyond float16, which is no reason to stop half-way."""
    f = torch.full((2, 40, 2), 65504.0)
    f[0] = -65504.0
    f[1, :, 1] = -65504.0
    acc = accumulate(f.half(), f.half(), (), (0.01,))
    assert acc.moments().cov_ff.isfinite().all()


def test_under_autocast():
    f, t = texts(3, 100, 6)
    with torch.autocast("cpu", torch.bfloat16):
        m, phi = accumulate(f, t).moments(), nk.memory_features(f)
    assert torch.equal(m.cov_ff, accumulate(f, t).moments().cov_ff)
    assert torch.equal(phi, nk.memory_features(f))


def test_errors_name_the_argument():
    f, t = texts(3, 10, 4)
    acc, mask = nk.MemoryAccumulator(4, 4), torch.ones(3, 10, dtype=torch.bool)
    cases = [
        (lambda: acc.update(f[0], t[0]), ValueError, r"features must have shape \(B, T, 4\)"),
        (lambda: acc.update(f[..., :3], t), ValueError, r"features must have shape \(3, 10, 4\)"),
        (lambda: acc.update(f, t[:2]), ValueError, "targets must have shape"),
        (lambda: acc.update(f, t, f), ValueError, "block must be absent"),
        (lambda: acc.update(f, t, mask=mask.int()), TypeError, "mask must be a bool tensor"),
        (lambda: acc.update(f, t, mask=mask[0]), ValueError, "mask must have shape"),
        (lambda: acc.update(f, t, starts=mask.int()), TypeError, "starts must be a bool tensor"),
        (lambda: acc.update(f, t, starts=mask[:, :9]), ValueError, "starts must have shape"),
        (lambda: acc.update(f, t.bfloat16()), RuntimeError, "targets must have the dtype"),
        (lambda: acc.update(f.double(), t.double()), RuntimeError, "features must be float32"),
        (lambda: acc.update(f.to("meta"), t), ValueError, "features must be on cpu"),
        (lambda: acc.update(f.tolist(), t), TypeError, "features must be"),
        (lambda: acc.moments(ddof=-1), ValueError, "ddof"),
        (lambda: nk.MemoryAccumulator(0, 4), ValueError, "feature_dim must be"),
        (lambda: nk.MemoryAccumulator(4, 4, lags=(0,)), ValueError, "lags: expected"),
        (lambda: nk.MemoryAccumulator(4, 4, decays=(1.0,)), ValueError, "decays: expected"),
        (lambda: nk.MemoryAccumulator(4, 4, lags=(9,)), ValueError, "at most 8"),
        (lambda: nk.memory_features(f[0]), ValueError, "features must be floating point of shape"),
        (lambda: nk.memory_features(f.int()), ValueError, "features must be floating point"),
        (lambda: nk.memory_features(f.tolist()), TypeError, "features must be a tensor"),
        (lambda: nk.memory_features(f, mask=mask[0]), ValueError, "mask must have shape"),
        (lambda: nk.memory_features(f, starts=mask.int()), TypeError, "starts must be a bool"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    assert acc.count == 0 and not any(v.any() for v in acc._added().values())


path = devices.paths("covariance", "hopper", "portable", "plain", capabilities=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_packed_and_non_finite_on_every_path(path, dtype):
    f, t = texts(6, 200, 40, dtype, mean=20.0)
    mask = torch.rand(6, 200, generator=torch.Generator().manual_seed(0)) < 0.8
    starts = torch.rand(6, 200, generator=torch.Generator().manual_seed(1)) < 0.02
    exact = exact_moments(f, t, (1, 3), (0.6, 0.95), mask, starts)
    acc = nk.MemoryAccumulator(40, 40, lags=(1, 3), device=path.device)
    f, t = (torch.where(mask[..., None], x, float("nan")).to(path.device) for x in (f, t))
    acc.update(f, t, mask=mask.to(path.device), starts=starts.to(path.device))
    assert_right(acc.moments(), exact, 40, dtype, means=True)
    before = acc.state_dict()
    f[2, mask[2].nonzero()[0, 0], 3] = float("inf")
    with pytest.raises(RuntimeError, match="must be finite"):
        acc.update(f, t, mask=mask.to(path.device))
    assert all(torch.equal(before[k], v) for k, v in acc.state_dict().items())
