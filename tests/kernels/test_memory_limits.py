"""What a memory can and cannot do: filters of the past exactly, retrieval by content hardly at all.

No training: features and targets are made, and the maps solved from their moments.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nbl_kernels as nk

ROWS, LENGTH, KEYS, VALUE_DIM = 128, 256, 16, 4


def nmse(features: Tensor, targets: Tensor, decays: tuple[float, ...] | None) -> float:
    """Of the best map of one token (decays None) or with a memory of these decays and lag 1."""
    dims = features.shape[-1], targets.shape[-1]
    if decays is None:
        acc = nk.CovarianceAccumulator(*dims)
    else:
        acc = nk.MemoryAccumulator(*dims, lags=(1,), decays=decays)
    acc.update(features, targets)
    return float(nk.lmmse_solve(acc.moments(), ridge=1e-10).nmse)


def retrieval() -> tuple[Tensor, Tensor]:
    """Every token has a key, a value and a query; its target is the value of the latest token with
    the queried key (itself among them). What an attention head does, with keys that are random."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randint(KEYS, (ROWS, LENGTH), generator=g)
    queries = torch.randint(KEYS, (ROWS, LENGTH), generator=g)
    values = torch.randn(ROWS, LENGTH, VALUE_DIM, generator=g)
    steps = torch.arange(LENGTH)
    match = (queries[:, :, None] == keys[:, None, :]) & (steps[:, None] >= steps)
    latest = torch.where(match, steps, -1).amax(dim=2)
    targets = values.gather(1, latest.clamp_min(0)[..., None].expand_as(values))
    targets = torch.where(latest[..., None] >= 0, targets, 0)
    # one-hot, less one column each: the columns of all keys sum to the constant 1
    parts = [F.one_hot(keys, KEYS)[..., 1:], F.one_hot(queries, KEYS)[..., 1:], values]
    return torch.cat([p.float() for p in parts], dim=-1), targets


@pytest.mark.parametrize("decays", [(0.6, 0.95), (1 - 1 / KEYS,), (0.5, 0.8, 0.9, 0.95, 0.99)])
def test_a_memory_does_not_retrieve(decays):
    """The latest token with the queried key stands k tokens back with p_k = (1 - 1/K)^k / K, which
    keys independent of the values do not let a linear map improve on: the best it can do is the
    average Σ p_k v_{t-k}, an exponential one, and it misses 1 - Σ p_k² = 1 - 1 / (2K - 1)."""
    features, targets = retrieval()
    best = 1 - 1 / (2 * KEYS - 1)
    found = nmse(features, targets, decays)
    assert best - 0.015 < found < 1
    if 1 - 1 / KEYS in decays:
        assert found < best + 0.01


def test_one_token_does_not_retrieve():
    features, targets = retrieval()
    assert abs(nmse(features, targets, None) - (1 - 1 / KEYS**2)) < 0.01


def test_attention_does_retrieve():
    """The targets are not noise: scores that multiply queries by keys find them exactly."""
    features, targets = retrieval()
    keys, queries, values = features.split([KEYS - 1, KEYS - 1, VALUE_DIM], dim=-1)
    keys, queries = (torch.cat([1 - p.sum(-1, keepdim=True), p], dim=-1) for p in (keys, queries))
    steps = torch.arange(LENGTH)
    scores = 2 * LENGTH * queries @ keys.mT + steps  # the latest of those that match
    scores = scores.masked_fill(steps > steps[:, None], -torch.inf)
    out = scores.mul(10).softmax(-1) @ values
    there = targets.abs().amax(-1) > 0
    assert there.float().mean() > 0.9
    torch.testing.assert_close(out[there], targets[there], rtol=0, atol=1e-3)


def test_a_memory_is_a_filter():
    """Targets that are filters of the features are met exactly; one token's map misses them."""
    g = torch.Generator().manual_seed(0)
    d = 24
    features = torch.randn(32, 128, d, generator=g)
    stacked = nk.memory_features(features, (1,), (0.6, 0.95)).unflatten(-1, (4, d))
    a, b = torch.randn(2, d, d, generator=g) / d**0.5
    targets = stacked[:, :, 1] @ a.T + stacked[:, :, 3] @ b.T
    assert nmse(features, targets, (0.6, 0.95)) < 1e-6
    assert nmse(features, targets, None) > 0.9
