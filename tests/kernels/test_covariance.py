"""CovarianceAccumulator: against float64 on the same inputs, on every path."""

from __future__ import annotations

import math
import re

import devices
import pytest
import torch
from cases import DTYPES
from cases.covariance import accumulate, assert_moments_exact, hard_tokens

import nbl_kernels as nk

CUDA_PATHS = ("hopper", "portable", "plain")
every_path = devices.paths("covariance", *CUDA_PATHS)
path = devices.paths("covariance", *CUDA_PATHS, capabilities=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(101, 60, 49), (264, 136, 72)], ids=str)
def test_hard_inputs_in_one_update(every_path, dtype, dims):
    f, t, b = (hard_tokens(3000, d, dtype, seed=d) for d in dims)
    acc = accumulate(3000, f, t, b, device=every_path.device)
    assert_moments_exact(acc.moments(), f, t, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 7, 300, 5000])
def test_splitting_and_order_do_not_matter(path, dtype, splits):
    n = 600 if splits == 1 else 5000
    f, t = hard_tokens(n, 64, dtype, 1), hard_tokens(n, 48, dtype, 2)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    acc = accumulate(splits, f[order], t[order], device=path.device)
    assert_moments_exact(acc.moments(), f, t)


def test_outliers_of_shifted_channels_are_counted_exactly(path):
    """Values that leave the factor of two around the mean cannot be shifted in bf16."""
    f = hard_tokens(4000, 80, torch.bfloat16)
    f[::50, :] *= -0.3
    f[7, 0], f[9, 3] = 1e5, -3e4
    acc = accumulate(4000, f, f[:, :20], device=path.device)
    assert_moments_exact(acc.moments(), f, f[:, :20])


def test_massive_first_token_does_not_spoil_the_rest(path):
    f = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    f[0, 5] = 3000.0
    acc = accumulate([1, 1999], f, f[:, :8], device=path.device)
    assert_moments_exact(acc.moments(), f, f[:, :8])


def test_chunks_of_large_inputs(path):
    """More tokens than one packed chunk holds, more than one tile in each direction."""
    f, t = hard_tokens(20000, 200, torch.bfloat16, 1), hard_tokens(20000, 120, torch.bfloat16, 2)
    assert_moments_exact(accumulate(20000, f, t, device=path.device).moments(), f, t)


@pytest.mark.parametrize("d_f, d_t", [(1, 1), (2, 49), (97, 3), (128, 256), (385, 1), (520, 136)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_dimensions(every_path, d_f, d_t, dtype):
    for n in (1, 63, 257):
        f, t = hard_tokens(n, d_f, dtype, 1), hard_tokens(n, d_t, dtype, 2)
        acc = accumulate(n, f, t, device=every_path.device)
        state, exact = acc.state_dict(), nk.covariance_update_ref(f, t)
        assert int(state["count"]) == n
        for pair in ("ff", "tf", "tt"):
            actual, expected = state[f"gram_{pair}"].cpu(), exact[f"sum_{pair}"]
            if pair[0] == pair[1]:
                actual, expected = actual.triu(), expected.triu()
            assert (actual - expected).norm() <= 1e-6 * expected.norm()
    assert_moments_exact(acc.moments(), f, t)


def test_constant_channels_have_no_variance(path):
    f = torch.randn(500, 8).bfloat16()
    f[:, 2], f[:, 5] = 3.0, 0.0
    m = accumulate([100, 400], f, f[:, :3], device=path.device).moments()
    assert m.cov_ff[2].abs().max() < 1e-12 and m.cov_ff[5].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_tokens_are_not_looked_at(path, dtype):
    f, t = hard_tokens(700, 72, dtype, 1), hard_tokens(700, 40, dtype, 2)
    mask = torch.rand(7, 100, generator=torch.Generator().manual_seed(0)) < 0.6
    keep = mask.reshape(-1)
    bad_f, bad_t = f.clone(), t.clone()
    bad_f[~keep], bad_t[~keep] = math.nan, math.inf
    bad_f, bad_t = bad_f.to(path.device), bad_t.to(path.device)
    acc = nk.CovarianceAccumulator(72, 40, device=path.device)
    acc.update(bad_f.view(7, 100, 72), bad_t.view(7, 100, 40), mask=mask.to(path.device))
    assert_moments_exact(acc.moments(), f[keep], t[keep])
    acc.update(bad_f, bad_t, mask=torch.zeros(700, dtype=torch.bool, device=path.device))
    assert acc.count == int(keep.sum())


def test_merge_and_state_dict():
    f, t = hard_tokens(900, 24, torch.bfloat16, 1), hard_tokens(900, 24, torch.bfloat16, 2)
    first, second = accumulate(300, f[:300], t[:300]), accumulate(600, f[300:], t[300:])
    restored = nk.CovarianceAccumulator(24, 24)
    restored.load_state_dict(second.state_dict())
    first.merge(restored)
    assert_moments_exact(first.moments(), f, t)
    assert second.count == 600
    state = first.state_dict()
    first.update(f, t)
    assert state["count"] == 900, "state_dict is a copy"


def test_all_reduce(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        f = torch.randn(50, 4)
        acc = accumulate(50, f, f)
        acc.all_reduce()
        assert_moments_exact(acc.moments(), f, f)
    finally:
        dist.destroy_process_group()


def test_strided_and_unaligned_inputs(path):
    wide = hard_tokens(300, 180, torch.bfloat16).to(path.device)
    for start in (0, 1, 8):
        f, t = wide[:, start : start + 80], wide[:, start + 80 : start + 160]
        for f_view, t_view in [(f, t), (f.T.contiguous().T, t.T.contiguous().T), (f[::2], t[::2])]:
            acc = nk.CovarianceAccumulator(80, 80, device=path.device)
            acc.update(f_view, t_view)
            assert_moments_exact(acc.moments(), f_view.cpu(), t_view.cpu())
            if not path.on_gpu:
                dense = accumulate(300, f_view.contiguous(), t_view.contiguous())
                assert torch.equal(acc.moments().cov_tf, dense.moments().cov_tf)


def test_is_deterministic(path):
    f, t = hard_tokens(5000, 264, torch.bfloat16), hard_tokens(5000, 136, torch.bfloat16, 1)
    states = [accumulate(2500, f, t, device=path.device).state_dict() for _ in range(4)]
    for state in states[1:]:
        for name, expected in states[0].items():
            square = expected.dim() == 2 and expected.shape[0] == expected.shape[1]
            a, e = (v.triu() if square else v for v in (state[name], expected))
            assert torch.equal(a, e), name


def test_results_do_not_depend_on_threads():
    f, threads, results = hard_tokens(3000, 150, torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(accumulate(3000, f, f[:, :70]).state_dict())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r[k], results[0][k]) for r in results for k in r if "gram" not in k)
    assert all(
        torch.equal(r[k].triu(), results[0][k].triu()) for r in results for k in ("gram_ff",)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_tokens_are_refused_and_nothing_is_added(path, dtype, value):
    f, t = torch.randn(600, 24).to(dtype), torch.randn(600, 16).to(dtype)
    acc = accumulate(600, f, t, device=path.device)
    before = acc.state_dict()
    t[417, 3] = value
    match = "targets must be finite.* at token 417, channel 3"
    if path.on_gpu:
        match = "must be finite" if path.name == "plain" else "targets must be finite.*token 417"
    with pytest.raises(RuntimeError, match=match):
        acc.update(f.to(path.device), t.to(path.device))
    assert all(torch.equal(before[k], v) for k, v in acc.state_dict().items())
    t[417, 3] = 0  # and the accumulator goes on
    acc.update(f.to(path.device), t.to(path.device))
    assert acc.count == 1200


def test_values_too_large_to_square_are_refused():
    f = torch.full((4, 3), 1e30)
    with pytest.raises(RuntimeError, match="features must be finite and below 1e18"):
        nk.CovarianceAccumulator(3, 3).update(f, f)


def test_empty_and_single_token(path):
    acc = nk.CovarianceAccumulator(3, 2, device=path.device)
    acc.update(torch.zeros(0, 3, device=path.device), torch.zeros(0, 2, device=path.device))
    with pytest.raises(ValueError, match="needs more than 1 tokens, got 0"):
        acc.moments()
    acc.update(torch.ones(3, device=path.device), torch.ones(2, device=path.device))
    with pytest.raises(ValueError, match="needs more than 1 tokens, got 1"):
        acc.moments()
    m = acc.moments(ddof=0).to("cpu")
    assert torch.equal(m.mean_features, torch.ones(3).double())
    assert torch.equal(m.cov_ff, torch.zeros(3, 3).double())


def test_errors_name_the_argument(path):
    acc = nk.CovarianceAccumulator(4, 3, device=path.device)
    f, t = torch.randn(10, 4, device=path.device), torch.randn(10, 3, device=path.device)
    ones = torch.ones(10, device=path.device)
    cases = [
        (lambda: acc.update(t, t), ValueError, r"features must have shape \(10, 4\)"),
        (lambda: acc.update(f, f), ValueError, r"targets must have shape \(10, 3\)"),
        (lambda: acc.update(f, t[:9]), ValueError, "targets must have shape"),
        (lambda: acc.update(f, t, f), ValueError, "block must be absent"),
        (lambda: acc.update(f.cpu().numpy(), t), TypeError, "features must be a tensor"),
        (lambda: acc.update(f, t, mask=ones), TypeError, "mask must be a bool tensor"),
        (lambda: acc.update(f, t, mask=ones[:9] > 0), ValueError, "mask must have shape"),
        (lambda: acc.update(f.to("meta"), t), ValueError, f"features must be on {path.device}"),
        (lambda: acc.merge(nk.CovarianceAccumulator(4, 4)), ValueError, "dimensions"),
        (lambda: acc.merge(None), TypeError, "other must be"),
        (lambda: acc.load_state_dict({}), ValueError, "state must have the keys"),
        (lambda: nk.CovarianceAccumulator(0, 3), ValueError, "feature_dim must be"),
        (lambda: nk.CovarianceAccumulator(3, True), ValueError, "target_dim must be"),
    ]
    if path.on_gpu:
        cases.append((lambda: acc.update(f.cpu(), t), ValueError, "features must be on cuda"))
    if path.name != "plain":
        cases += [
            (lambda: acc.update(f, t.bfloat16()), RuntimeError, "targets must have the dtype"),
            (lambda: acc.update(f.double(), t.double()), RuntimeError, "features must be float32"),
        ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    assert acc.count == 0


def update_arguments(block: bool, device: str = "cpu"):
    f, t, b = (torch.randn(12, d, device=device) for d in (5, 4, 3))
    acc = nk.CovarianceAccumulator(5, 4, block_dim=3 if block else 0, device=device)
    mask = torch.rand(12, device=device) < 0.7
    return (f, t, b if block else None, mask, *acc.state_dict().values())


@pytest.mark.parametrize("block", [False, True])
def test_opcheck(path, block):
    arguments = update_arguments(block, path.device)
    torch.library.opcheck(torch.ops.nbl.covariance_update.default, arguments)


GRAMS = ["gram_ff", "gram_tf", "gram_tt", "gram_bf", "gram_bb"]


@pytest.mark.parametrize("left_out", [*([name] for name in GRAMS), GRAMS[::2], GRAMS[1::2], GRAMS])
def test_gram_matrices_may_be_left_out(path, left_out):
    from nbl_kernels import _ops

    f, t, b = (hard_tokens(300, d, torch.bfloat16, seed=d) for d in (264, 60, 49))
    f, t, b, mask = (x.to(path.device) for x in (f, t, b, torch.rand(300) < 0.7))
    zeros = nk.CovarianceAccumulator(264, 60, block_dim=49, device=path.device).state_dict()
    nothing = torch.zeros(0, 0, dtype=torch.float64, device=path.device)
    for update in (torch.ops.nbl.covariance_update, _ops._covariance_update):
        full = {k: v.clone() for k, v in zeros.items()}
        part = {k: nothing if k in left_out else v.clone() for k, v in zeros.items()}
        update(f, t, b, mask, *full.values())
        update(f, t, b, mask, *part.values())
        for name, value in part.items():
            if name in left_out:
                assert value.numel() == 0
            elif path.on_gpu:
                assert (value - full[name]).double().norm() <= 1e-6 * full[name].double().norm()
            else:
                assert torch.equal(value, full[name])
        # What has no elements anyway, and what is not there, may be of any empty shape.
        part = {k: v[:0] if k in left_out else v for k, v in part.items()}
        update(f, t, b, mask, *part.values())


def test_gram_matrices_of_another_shape_are_refused():
    for name, shape in [("gram_ff", "(5, 5)"), ("gram_tf", "(4, 5)"), ("gram_bb", "(3, 3)")]:
        arguments = list(update_arguments(block=True))
        at = 4 + ["count", "sums", *GRAMS].index(name)
        arguments[at] = arguments[at][1:].contiguous()
        before = [a.clone() for a in arguments[4:]]
        message = re.escape(f"{name} must have shape {shape} or no elements (left out), got")
        with pytest.raises(RuntimeError, match=message):
            torch.ops.nbl.covariance_update(*arguments)
        assert all(torch.equal(a, e) for a, e in zip(arguments[4:], before))


def test_compiles_without_graph_breaks(path):
    acc, compiled_acc = (nk.CovarianceAccumulator(6, 6, device=path.device) for _ in range(2))

    def step(a, x):
        a.update(x, x * 2)
        return x + 1

    x = torch.randn(30, 6, device=path.device)
    torch.compiler.reset()
    torch.compile(step, fullgraph=True)(compiled_acc, x)
    step(acc, x)
    assert torch.equal(acc.moments().cov_tf, compiled_acc.moments().cov_tf)


@pytest.mark.parametrize("block", [False, True])
def test_devices_without_kernels_run_plain_torch(block):
    from nbl_kernels import _ops

    ours, plain = update_arguments(block), None
    plain = tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in ours)
    torch.ops.nbl.covariance_update(*ours)
    _ops._covariance_update(*plain)
    for a, e in zip(ours, plain):
        if isinstance(a, torch.Tensor):
            square = a.dim() == 2 and a.shape[0] == a.shape[1]
            a, e = (t.double().triu() if square else t.double() for t in (a, e))
            assert (a - e).norm() <= 1e-6 * e.norm()
