"""Models with a memory: the estimator, the layer, checkpoints, caches, optimize and the Runner.

``tests/test_generate.py`` runs every way to generate on such models too.
"""

from __future__ import annotations

import copy
import json

import nbl
import pytest
import torch
from nbl.layers.cache import MOST_ROLLED_BACK, MemoryCacheLayer
from nbl.models import layer_specs
from nbl.upstream import CACHE, output_cache
from tolerance import assert_rounding_only, exact_copy
from transformers import AutoModelForCausalLM, DynamicCache

import nbl_kernels as nk

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")  # as many as these tests need

MEMORY = nbl.Memory()
KINDS = {  # memory, features, bias, rank
    "default": (MEMORY, "post-norm", True, 6),
    "full": (MEMORY, "post-norm", True, None),
    "full-bias-free": (nbl.Memory(lags=(2,)), "pre-norm", False, None),
    "lags": (nbl.Memory(lags=(1, 3), decays=()), "pre-norm", True, 5),
    "averages": (nbl.Memory(lags=(), decays=(0.9,)), "post-norm", False, 4),
}
NEW = 12


def calibrated(model, batches, memory=MEMORY, **kwargs):
    return nbl.calibrate(model, batches, **{"memory": memory, "progress": False} | kwargs)


@pytest.fixture
def remembering(tiny_model, token_batches):
    """A model with a memory in some layers."""

    def make(layers=(0, 2), kind="default", family="llama", **config):
        memory, features, bias, rank = KINDS[kind]
        model = tiny_model(family, **config)
        cal = calibrated(model, token_batches(4), memory, features=features)
        return nbl.linearize(model, cal, layers, bias=bias, rank=rank)

    return make


@pytest.fixture
def ids(token_batches):
    return token_batches(1, batch_size=3, length=21, seed=5)[0]


# --- the estimator -------------------------------------------------------------------------------


def stacked(model, batches, layer, memory):
    """x, φ and y (n, ·) of every token that counts, float64, token by token."""
    seen, rows = [], []
    block = model.model.layers[layer]
    handles = [
        block.input_layernorm.register_forward_hook(lambda m, a, f: seen.append((a[0], f))),
        block.self_attn.register_forward_hook(lambda m, a, out: rows.append((*seen.pop(), out[0]))),
    ]
    results = []
    for batch in batches:
        batch = batch if isinstance(batch, dict) else {"input_ids": batch}
        with torch.no_grad():
            model(**batch, use_cache=False)
        x, f, y = (t.double() for t in rows.pop())
        mask = batch.get("attention_mask", torch.ones(x.shape[:2])).bool()
        positions = batch.get("position_ids", torch.arange(x.shape[1]).expand(mask.shape))
        for b in range(len(x)):
            past, averages = [], [torch.zeros_like(f[0, 0])] * len(memory.decays)
            for t in range(x.shape[1]):
                if not mask[b, t]:
                    continue
                if positions[b, t] == 0:
                    past, averages = [], [torch.zeros_like(f[0, 0])] * len(memory.decays)
                own = f[b, t]
                averages = [
                    a * e + (1 - a) * own for a, e in zip(memory.decays, averages, strict=True)
                ]
                before = [
                    past[-lag] if lag <= len(past) else torch.zeros_like(own) for lag in memory.lags
                ]
                past.append(own)
                results.append((x[b, t], torch.cat([own, *before, *averages]), y[b, t]))
    for handle in handles:
        handle.remove()
    return [torch.stack(rows) for rows in zip(*results)]


def texts(kind, token_batches):
    batches = token_batches(5, length=40)
    if kind == "padded":
        masks = [torch.ones_like(b) for b in batches]
        for n, mask in enumerate(masks):
            mask[0, : 3 + n], mask[1, -4:] = 0, 0
        return [{"input_ids": b, "attention_mask": m} for b, m in zip(batches, masks, strict=True)]
    if kind == "packed":
        positions = torch.cat([torch.arange(n) for n in (13, 1, 20, 6)]).expand(4, -1)
        return [{"input_ids": b, "position_ids": positions} for b in batches]
    return batches


@pytest.mark.parametrize("kind", ["rows", "padded", "packed"])
@pytest.mark.parametrize("memory", [MEMORY, nbl.Memory(lags=(1, 3), decays=(0.8,))], ids=str)
def test_maps_are_least_squares_on_the_stacked_features(kind, memory, tiny_model, token_batches):
    model, batches = tiny_model(), texts(kind, token_batches)
    cal = calibrated(model, batches, memory)
    _, phi, y = stacked(model, batches, 1, memory)
    assert cal.tokens == len(phi)
    solved = cal.solve(ridge=1e-6)[1]
    centered, target = phi - phi.mean(0), y - y.mean(0)
    gram = centered.T @ centered
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram + ridge, centered.T @ target).T
    assert (solved.weight - weight).norm() < 1e-3 * weight.norm()
    error = (target - centered @ weight.T).square().sum() / target.square().sum()
    assert abs(float(solved.nmse) - float(error)) < 1e-5
    # the joint rank: nothing of this rank does better on these tokens
    rank = cal.solve(ridge=0.0, rank=4)[1]
    u, v = rank.factors
    assert u.shape == (32, 4) and v.shape == (4, phi.shape[1])
    best = torch.linalg.lstsq(centered, target).solution
    fitted = centered @ best
    left = torch.linalg.svd(fitted, full_matrices=False).Vh[:4]
    optimum = (target - fitted @ left.T @ left).square().sum() / target.square().sum()
    assert abs(float(rank.nmse) - float(optimum)) < 1e-5


def test_bounds_and_scores_are_those_of_the_stacked_features(tiny_model, token_batches):
    model, batches = tiny_model(), token_batches(8)
    cal = calibrated(model, batches)
    x, phi, y = stacked(model, batches, 2, MEMORY)
    z = x + y

    def cov(a, b):
        return (a - a.mean(0)).T @ (b - b.mean(0)) / (len(a) - 1)

    expected = nk.cca_bound_ref(cov(phi, phi), cov(z, phi), cov(z, z))
    assert abs(cal.cca_bounds()[2] - float(expected)) < 1e-3
    m = calibrated(model, batches, features="pre-norm").moments(2)  # there f is x, z is f + y
    assert torch.allclose(m.cov_bf, m.cov_tf + m.cov_ff[: cal.hidden_size])
    for criterion in ("residual", "cca", "nmse", "cosine"):
        assert len(cal.rank(criterion)) == 4
    nmse = {s.layer: s.score for s in cal.rank("nmse", rank=6)}
    assert nmse[2] == float(cal.solve(rank=6)[2].nmse)


def test_ranking_by_loss_measures_the_memory(tiny_model, token_batches):
    """Padding on the left and packed texts too: what a memory must not see is not seen."""
    model = tiny_model()
    cal = calibrated(model, token_batches(4))
    for kind in ("rows", "padded", "packed"):
        batches = texts(kind, token_batches)
        base = nbl.perplexity(model, batches).nll
        scores = {s.layer: s.score for s in cal.rank("loss", model=model, batches=batches, rank=6)}
        for i in (0, 3):
            alone = nbl.linearize(model, cal, [i], rank=6)
            assert abs(nbl.perplexity(alone, batches).nll - base - scores[i]) < 1e-5
            nbl.restore(model)


def test_decays_are_chosen_by_the_least_error(tiny_model, token_batches, tmp_path):
    model, grid = tiny_model(), (0.5, 0.8, 0.95)
    cal = calibrated(model, token_batches(4), nbl.Memory(decays=grid, choose=2))
    solved = cal.solve(rank=6)
    pairs = [(0.5, 0.8), (0.5, 0.95), (0.8, 0.95)]
    alone = {p: calibrated(model, token_batches(4), nbl.Memory(decays=p)) for p in pairs}
    for i in cal.layers:
        errors = {p: float(c.solve(rank=6)[i].nmse) for p, c in alone.items()}
        assert solved[i].decays == min(errors, key=errors.get)
        assert abs(float(solved[i].nmse) - min(errors.values())) < 1e-6
    cal.save(tmp_path)
    again = nbl.Calibration.load(tmp_path)
    assert again.memory == cal.memory
    assert torch.equal(again.solve(rank=6)[1].weight, solved[1].weight)
    nbl.linearize(model, cal, [0, 1], rank=6)
    assert {i: s.decays for i, s in layer_specs(model.config).items()} == {
        i: solved[i].decays for i in (0, 1)
    }


def test_calibrations_are_split_merged_stored_and_grouped(tiny_model, token_batches, tmp_path):
    model, batches = tiny_model(), token_batches(6)
    whole = calibrated(model, batches)
    merged = calibrated(model, batches[:2]).merge(calibrated(model, batches[2:]))
    grouped = calibrated(model, batches, layers_at_once=3, checkpoint=tmp_path / "parts")
    calibrated(model, batches[:3], checkpoint=tmp_path / "resumed")
    resumed = calibrated(model, batches, checkpoint=tmp_path / "resumed")
    whole.save(tmp_path / "stored")
    stored = nbl.Calibration.load(tmp_path / "stored")
    for cal in (merged, grouped, resumed, stored):
        assert (cal.tokens, cal.layers) == (whole.tokens, whole.layers)
        for i in whole.layers:
            ours, theirs = cal.moments(i), whole.moments(i)
            for name in ("cov_ff", "cov_tf", "cov_tt", "cov_bf", "mean_features"):
                a, b = getattr(ours, name), getattr(theirs, name)
                assert (a - b).norm() <= 1e-6 * b.norm(), name
    assert "memory" in json.loads((tmp_path / "stored" / "calibration.json").read_text())
    with pytest.raises(ValueError, match="differ in memory"):
        calibrated(model, batches).merge(calibrated(model, batches, None))
    plain = calibrated(model, batches, None)
    plain.save(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "calibration.json").read_text())["format_version"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lags": (0,)}, "lags: expected positive ints"),
        ({"lags": (1, 1)}, "lags: expected distinct"),
        ({"decays": (1.0,)}, "decays: expected numbers between 0 and 1"),
        ({"lags": (5,), "decays": (0.1, 0.2, 0.3, 0.4)}, "at most 8"),
        ({"lags": (), "decays": ()}, "expected lags or decays"),
        ({"choose": 3}, "choose: expected None or a number from 1 to 2"),
    ],
)
def test_bad_memories(arguments, words):
    with pytest.raises(ValueError, match=words):
        nbl.Memory(**arguments)


def test_bad_arguments(tiny_model, token_batches, ids):
    model = tiny_model()
    with pytest.raises(TypeError, match=r"memory: expected nbl\.Memory"):
        calibrated(model, token_batches(2), (1,))
    positions = torch.arange(21).expand(3, -1)
    padded = {"input_ids": ids, "position_ids": positions, "attention_mask": (ids > 9).long()}
    with pytest.raises(ValueError, match="batch 0: position_ids: expected no padding"):
        calibrated(model, [padded])
    with pytest.raises(ValueError, match="batch 0: position_ids: expected shape"):
        calibrated(model, [{"input_ids": ids, "position_ids": positions[:, 1:]}])
    with pytest.raises(ValueError, match="layers_at_once: expected a positive int"):
        calibrated(model, token_batches(2), layers_at_once=0)


# --- the layer -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimized", [False, True], ids=["", "optimized"])
def test_logits_are_those_of_the_formula(kind, optimized, remembering, ids):
    model = remembering(kind=kind)
    exact, plain = exact_copy(model), exact_copy(model, torch.float32)
    if optimized:
        nbl.optimize(model)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = torch.cat([torch.arange(n) for n in (9, 1, 11)]).expand(3, -1)
    for inputs in ({}, {"attention_mask": mask}, {"position_ids": positions}):
        there = inputs.get("attention_mask", torch.ones_like(ids)) == 1
        logits = [m(ids, use_cache=False, **inputs).logits[there] for m in (model, plain, exact)]
        assert_rounding_only(*logits)


@torch.no_grad()
def test_packed_texts_are_independent(remembering, ids):
    model = remembering([0, 1, 2, 3])
    positions = torch.cat([torch.arange(n) for n in (9, 1, 11)]).expand(3, -1)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    apart = [model(part, use_cache=False).logits for part in ids.split([9, 1, 11], dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_masks_of_four_dimensions_need_another_beside_them(remembering, ids):
    model = remembering()
    causal = torch.ones(21, 21, dtype=torch.bool).tril().expand(3, 1, -1, -1)
    with pytest.raises(ValueError, match="attention_mask: a model with a memory"):
        model(ids, attention_mask=causal, use_cache=False)
    mask = torch.ones_like(ids)
    logits = model(ids, attention_mask=causal, token_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing, remembering, ids):
    model = remembering([1, 2])
    exact = exact_copy(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for m in (model, exact):
        m.train()
        m(ids, labels=ids, use_cache=False).loss.backward()
    for name in ("linear_v.weight", "linear_u.weight", "linear_u.bias"):
        ours = model.get_parameter(f"model.layers.1.{name}").grad
        theirs = exact.get_parameter(f"model.layers.1.{name}").grad
        assert (ours - theirs).norm() < 1e-3 * theirs.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, remembering, ids, tmp_path):
    model = remembering(kind=kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert layer_specs(loaded.config) == layer_specs(model.config)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    config["nbl"]["layers"]["0"]["decays"] = [1.5]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="decays: expected numbers between 0 and 1"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_restore_and_draw_again(remembering, tiny_model, token_batches, ids):
    model = remembering([0, 2])
    cal = calibrated(tiny_model(), token_batches(4), None)
    nbl.linearize(model, cal, [2])  # another map, without a memory
    assert not layer_specs(model.config)[2].has_memory and layer_specs(model.config)[0].has_memory
    model(ids)
    assert torch.equal(nbl.restore(model)(ids).logits, tiny_model()(ids).logits)


# --- caches --------------------------------------------------------------------------------------


def filled(model, ids, sizes):
    cache = DynamicCache()
    for part in ids.split(sizes, dim=1):
        model(part, **{CACHE: cache}, use_cache=True)
    return cache


def states(cache):
    return [e.state for e in cache.layers if isinstance(e, MemoryCacheLayer)]


@torch.no_grad()
def test_the_state_does_not_depend_on_how_the_text_came(remembering, ids):
    model = remembering([0, 1, 2, 3])
    at_once = filled(model, ids, [21])
    for sizes in ([1] * 21, [5, 1, 15], [20, 1]):
        for a, b in zip(states(filled(model, ids, sizes)), states(at_once), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[21], [10, 11], [12] + [1] * 9], ids=str)
@pytest.mark.parametrize("removed", [1, 4, 9])
def test_rolled_back_tokens_leave_no_trace(sizes, removed, remembering, ids):
    """The very state that was there: the bits of it, as it was after that token of that pass."""
    model = remembering([0, 1, 2, 3])
    cache = filled(model, ids, sizes)
    wanted = [
        e.past[:, -1 - removed].clone() for e in cache.layers if isinstance(e, MemoryCacheLayer)
    ]
    cache.crop(-removed)
    assert cache.get_seq_length() == 21 - removed
    for a, b in zip(states(cache), wanted, strict=True):
        assert torch.equal(a, b)
    if sizes[-1] == 1:  # then it is also that of a text which ended there
        shorter = filled(model, ids[:, : 21 - removed], [12] + [1] * (9 - removed))
        for a, b in zip(states(cache), states(shorter), strict=True):
            assert torch.equal(a, b)
    cache.crop(-2)  # once more, and on
    kept = 21 - removed - 2
    logits = model(ids[:, kept:], **{CACHE: cache}).logits
    exact = exact_copy(model)(ids, use_cache=False).logits[:, kept:]
    assert_rounding_only(logits, model(ids, use_cache=False).logits[:, kept:], exact)


@torch.no_grad()
def test_what_cannot_be_rolled_back_is_refused(remembering, token_batches):
    model = remembering([0, 2])
    ids = token_batches(1, batch_size=2, length=60)[0]
    cache = filled(model, ids, [60])
    with pytest.raises(ValueError, match=rf"layer 0 .*{MOST_ROLLED_BACK} tokens can be taken back"):
        cache.crop(-MOST_ROLLED_BACK - 1)
    cache = filled(model, ids, [60])
    cache.crop(-MOST_ROLLED_BACK)
    with pytest.raises(ValueError, match="0 tokens can be taken back"):
        cache.crop(-1)
    cache = filled(model, ids, [60])
    cache.crop(-60)  # all of it: begins anew
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, **{CACHE: cache}).logits, expected)
    other = copy.deepcopy(cache)
    other.batch_select_indices(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"layer 0: expected a state of shape \(2, "):
        model(ids, **{CACHE: other})


@torch.no_grad()
def test_bytes(remembering, ids):
    model = remembering([0, 2])
    cache = output_cache(model(ids, use_cache=True))
    size = nbl.cache_bytes(cache)
    assert size.keys_values == 2 * 2 * 3 * 2 * 21 * 8 * 4
    assert size.state == 2 * 3 * (3 * 6) * 4 * (1 + MOST_ROLLED_BACK + 1)
    assert size.total == size.keys_values + size.state
    longer = output_cache(model(ids.repeat(1, 2), use_cache=True))
    assert nbl.cache_bytes(longer).state == size.state


@torch.no_grad()
def test_drafting_by_and_for_a_memory(remembering, tiny_model, ids):
    stock, model = tiny_model(), remembering([1, 2])
    prompt = ids[:1]

    def tokens(m, **kwargs):
        return m.generate(prompt, max_new_tokens=30, do_sample=False, **kwargs)

    assert torch.equal(tokens(stock, assistant_model=model), tokens(stock, use_cache=False))
    assert torch.equal(tokens(model, assistant_model=stock), tokens(model, use_cache=False))
    lookup = tokens(model, prompt_lookup_num_tokens=4)
    assert torch.equal(lookup, tokens(model, use_cache=False))


# --- optimize and the Runner ---------------------------------------------------------------------


def expected_tokens(model, padded):
    """Of each prompt alone, without a cache."""
    rows = []
    for row, keep in zip(*padded, strict=True):
        ids = row[keep.bool()][None]
        new = model.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=False)
        rows.append(new[0, ids.shape[1] :])
    return rows


def as_graphs(runner, monkeypatch):
    """Decodes by the step that CUDA graphs capture, captured as they are: run twice for nothing."""
    monkeypatch.setattr("nbl.runner.graphs._SMALLEST_BUCKET", 4)
    runner._graphs = graphs = runner._new_graphs()

    def run(*step):
        saved = runner._states.save(step[1])
        graphs.step(*step)
        runner._states.restore(saved)
        graphs.step(*step)

    graphs.run = run


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("chunk", [5, 2048])
def test_runner(family, static, chunk, remembering, padded, monkeypatch):
    model = remembering([0, 2], family=family)
    expected = expected_tokens(model, padded)
    runner = nbl.Runner(model, 4, 40, prefill_chunk=chunk)
    if static:
        as_graphs(runner, monkeypatch)
    ids, mask = padded
    for _ in range(2):  # nothing of an earlier call is remembered
        new = runner.generate(ids, NEW, attention_mask=mask)
        assert all(torch.equal(a, b) for a, b in zip(new, expected, strict=True))
    assert runner.state_bytes == 2 * 4 * 3 * 6 * 4


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_runner_on_every_kind(kind, remembering, padded):
    model = remembering([0, 1, 2, 3], kind=kind)
    expected = expected_tokens(model, padded)
    ids, mask = padded
    new = nbl.Runner(model, 4, 40).generate(ids, NEW, attention_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(new, expected, strict=True))


@torch.no_grad()
def test_runner_logits_from_within_the_padding(remembering, padded):
    model = remembering([0, 3])
    ids, mask = padded
    whole = nbl.Runner(model, 4, 40).logits(ids, attention_mask=mask)
    stepwise = nbl.Runner(model, 4, 40).logits(ids, attention_mask=mask, prompt_length=2)
    for a, b in zip(whole, stepwise, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("own", [False, True], ids=["dense", "memory"])
def test_runner_drafts(own, static, remembering, tiny_model, token_batches, padded, monkeypatch):
    """A draft with memories, of a model without and with one of its own."""
    model = remembering([0]) if own else tiny_model()
    for i in (1, 2):  # so that the draft is often right
        model.model.layers[i].self_attn.o_proj.weight.mul_(0.1)
    draft = nbl.draft_model(model, calibrated(model, token_batches(4)), [1, 2], rank=6)
    expected = expected_tokens(model, padded)
    runner = nbl.Runner(model, 4, 40, draft=draft)
    if static:
        as_graphs(runner, monkeypatch)
    ids, mask = padded
    for layers, tokens in ((2, None), (1, 3), (None, None), (2, 2)):
        options = {} if layers is None else {"draft_layers": layers, "draft_tokens": tokens}
        new = runner.generate(ids, NEW, attention_mask=mask, **options)
        assert all(torch.equal(a, b) for a, b in zip(new, expected, strict=True))
    alone = runner.generate(ids[:1], NEW, draft_layers=2)
    assert torch.equal(alone[0], expected[0])
    assert 0 < runner.last_draft.accepted <= runner.last_draft.proposed


@torch.no_grad()
def test_rejected_tokens_leave_no_trace_in_a_runner(remembering, tiny_model, token_batches):
    """The state of the first layer, which reads the embeddings, is then that without a draft to the
    bit: single tokens and drafted ones run through the same kernels."""
    model = remembering([0])
    draft = nbl.draft_model(model, calibrated(model, token_batches(4)), [1, 3], rank=6)
    prompt = token_batches(1, batch_size=1, length=9)[0]
    runner = nbl.Runner(model, 1, 40, draft=draft)
    runner.generate(prompt, NEW)
    layer = model.model.layers[0]
    plain = runner._states._states[layer].clone()
    runner.generate(prompt, NEW, draft_layers=2, draft_tokens=3)
    assert torch.equal(runner._states._states[layer], plain)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized(weights, remembering, padded):
    model = remembering([0, 2], hidden_size=64, intermediate_size=128, head_dim=16)
    dense = nbl.weight_bytes(model)
    nbl.optimize(model, weights=weights, keep_original=True)
    assert nbl.weight_bytes(model) < dense
    expected = expected_tokens(model, padded)
    ids, mask = padded
    new = nbl.Runner(model, 4, 40).generate(ids, NEW, attention_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(new, expected, strict=True))
    nbl.restore(model)


@pytest.mark.parametrize("optimized", [False, True], ids=["", "optimized"])
@pytest.mark.parametrize("kind", ["one token", "reduced", *KINDS])
def test_adapters_on_the_maps_take_part(kind, optimized, remembering, tiny_model, token_batches):
    """As a LoRA layer does: the weight that the kernels would read is not all there is to it."""

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            size = (base.out_features, base.in_features)
            self.change = torch.nn.Parameter(torch.randn(size) / 20)
            self.in_features, self.out_features = base.in_features, base.out_features

        @property
        def weight(self):
            return self.base.weight

        @property
        def bias(self):
            return self.base.bias

        def forward(self, x):
            return self.base(x) + x @ self.change.T

    ids = token_batches(1, batch_size=2, length=12, seed=4)[0]
    if kind in KINDS:
        model = remembering(kind=kind)
    else:
        cal = calibrated(tiny_model(), token_batches(4), None)
        rank = None if kind == "one token" else 5
        model = nbl.linearize(tiny_model(), cal, [0, 2], rank=rank)
    merged = copy.deepcopy(model)
    if optimized:
        nbl.optimize(model)
    for i in (0, 2):
        layer = model.model.layers[i]
        for name in ("linear", "linear_v", "linear_u"):
            if hasattr(layer, name):
                adapted = Adapted(getattr(layer, name))
                setattr(layer, name, adapted)
                with torch.no_grad():
                    getattr(merged.model.layers[i], name).weight += adapted.change
    with torch.no_grad():
        expected = merged(ids, use_cache=False).logits
        logits = model(ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        cache = output_cache(model(ids[:, :7], use_cache=True))
        last = model(ids[:, 7:], **{CACHE: cache}).logits
        torch.testing.assert_close(last, expected[:, 7:], rtol=1e-4, atol=1e-4)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[2].mlp.down_proj.weight.grad is not None
    changes = [m.change for m in model.modules() if isinstance(m, Adapted)]
    assert all(c.grad is not None and c.grad.abs().max() > 0 for c in changes)
