"""Which layer is replaced first, and perplexity, by which it is judged."""

from __future__ import annotations

import math
import sys

import nbl
import numpy as np
import pytest
import scipy.linalg
import torch
from nbl.calibration import CRITERIA
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")  # as many as these tests need


def calibrate(model, batches, **kwargs):
    return nbl.calibrate(model, batches, progress=False, **kwargs)


@pytest.fixture
def batches(token_batches):
    return token_batches(16)


def own_text(model) -> list[torch.Tensor]:
    """Sampled from the model itself: what it predicts best, so that every change is a loss."""
    torch.manual_seed(0)
    start = torch.ones(64, 1, dtype=torch.long)
    return [model.generate(start, max_new_tokens=31, do_sample=True, top_k=0)]


def make_linear(layer) -> None:
    """Gives a decoder layer an attention that is linear in its features: y = O V f.

    As if every token saw itself alone; by a hook, from the attention's own projections.
    """
    attention = layer.self_attn

    def hook(module, args, kwargs, output):
        values = module.v_proj(kwargs["hidden_states"])
        groups = module.num_key_value_groups
        shape = (*values.shape[:-1], -1, module.head_dim)
        values = values.view(shape).repeat_interleave(groups, dim=-2).flatten(-2)
        return module.o_proj(values), None

    attention.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("criterion", ["loss", "residual", "nmse"])
@pytest.mark.parametrize("linear", [0, 2])
def test_a_linear_attention_comes_first(criterion, linear, tiny_model, batches):
    model = tiny_model()
    make_linear(model.model.layers[linear])
    cal = calibrate(model, batches)
    measured = {"model": model, "batches": own_text(model)} if criterion == "loss" else {}
    scores = cal.rank(criterion, **measured, ridge=1e-9)
    assert scores[0].layer == linear
    assert sorted(s.layer for s in scores) == [0, 1, 2, 3]
    assert [s.score for s in scores] == sorted(s.score for s in scores)
    assert abs(scores[0].score) < 1e-3 * scores[1].score


@torch.no_grad()
def test_an_attention_without_effect_comes_first(tiny_model, batches):
    """Zero: every criterion; the CCA bound too, x itself being its linear function."""
    model = tiny_model()
    model.model.layers[2].self_attn.o_proj.weight.mul_(1e-3)
    for features in ("post-norm", "pre-norm"):
        cal = calibrate(model, batches, features=features)
        for criterion in CRITERIA:
            if criterion == "nmse" or (criterion, features) == ("cca", "post-norm"):
                continue  # relative to y, however small it is; f = RMSNorm(x) does not determine x
            scores = cal.rank(criterion, model=model, batches=own_text(model))
            assert scores[0].layer == 2, (criterion, features)


def test_cosine_and_residual_by_their_definition(tiny_model, batches):
    model = tiny_model()
    seen = {i: [] for i in range(4)}
    handles = []
    for i, layer in enumerate(model.model.layers):

        def keep_x(m, a, f, i=i):
            seen[i].append([a[0], f])

        def keep_y(m, a, out, i=i):
            seen[i][-1].append(out[0])

        handles.append(layer.input_layernorm.register_forward_hook(keep_x))
        handles.append(layer.self_attn.register_forward_hook(keep_y))
    with torch.no_grad():
        for ids in batches:
            model(ids)
    for handle in handles:
        handle.remove()
    cal = calibrate(model, batches)
    solved = cal.solve()
    residual = {s.layer: s.score for s in cal.rank("residual")}
    nmse = {s.layer: s.score for s in cal.rank("nmse")}
    cosine = {s.layer: s.score for s in cal.rank("cosine")}
    for i, rows in seen.items():
        x, f, y = (torch.cat([r[k].flatten(0, 1) for r in rows]).double() for k in range(3))
        missed = (y - f @ solved[i].weight.T - solved[i].bias).square().sum()
        # relative to n - 1 tokens in the score
        expected = float(missed / len(x) * (1 / x.square().sum(-1)).mean())
        assert math.isclose(residual[i], expected, rel_tol=1.1 / len(x))
        expected = float(missed / (y - y.mean(0)).square().sum())
        assert math.isclose(nmse[i], expected, rel_tol=1e-5)
        assert math.isclose(
            cosine[i], 1 - float(F.cosine_similarity(x, x + y).mean()), rel_tol=1e-5
        )


def test_a_few_enormous_tokens_do_not_decide_the_residual(tiny_model, batches):
    """As real models have them. Every token before layer 2 has the scale of one embedding row."""
    plain, massive = tiny_model(), tiny_model()
    with torch.no_grad():  # one token of the vocabulary, behind two layers that do nothing
        for model in (plain, massive):
            for layer in model.model.layers[:3]:
                layer.self_attn.o_proj.weight.mul_(0.05)
                layer.mlp.down_proj.weight.zero_()
        massive.model.embed_tokens.weight[7] *= 1e4
    scores = {}
    for name, model in (("plain", plain), ("massive", massive)):
        cal = calibrate(model, batches)
        scores[name] = {s.layer: s.score for s in cal.rank("residual")}
    share = float(sum((ids == 7).sum() for ids in batches) / sum(ids.numel() for ids in batches))
    assert 0 < share < 0.1
    for i in range(4):
        assert math.isclose(scores["massive"][i], scores["plain"][i], rel_tol=0.5)


def test_a_calibration_without_the_inverse_squares_still_ranks(tiny_model, batches, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    cal = calibrate(tiny_model(), batches)
    cal.save(tmp_path)
    path = tmp_path / "calibration.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        kept = {n: file.get_tensor(n) for n in file.keys() if "inverse_square" not in n}  # noqa: SIM118
    save_file(kept, path, metadata)
    old = nbl.Calibration.load(tmp_path)
    with pytest.warns(UserWarning, match="calibrate again"):
        scores = old.rank("residual")
    for score in scores:
        nmse = float(cal.solve()[score.layer].nmse)
        power = float(cal.moments(score.layer).cov_tt.diagonal().sum())
        assert math.isclose(score.score, nmse * power / cal.mean_square(score.layer), rel_tol=1e-9)
    assert old.rank("nmse") == cal.rank("nmse")


@pytest.mark.parametrize("features", ["post-norm", "pre-norm"])
def test_cca_bound_equals_the_papers_route(features, tiny_model, batches):
    """eigh of both covariances and an SVD, by scipy."""
    cal = calibrate(tiny_model(), batches, features=features)
    for score in cal.rank("cca"):
        m = cal.moments(score.layer)
        if features == "post-norm":
            cross, block = m.cov_bf.numpy(), m.cov_bb.numpy()
        else:
            cross = (m.cov_tf + m.cov_ff).numpy()
            block = (m.cov_tt + m.cov_tf + m.cov_tf.T + m.cov_ff).numpy()

        def inverse_root(c):
            values, vectors = scipy.linalg.eigh(c)
            return vectors / np.sqrt(values) @ vectors.T

        whitened = inverse_root(block) @ cross @ inverse_root(m.cov_ff.numpy())
        rho = np.clip(scipy.linalg.svdvals(whitened), 0, 1)
        assert math.isclose(score.score, float((1 - rho**2).sum()), rel_tol=1e-6)


@torch.no_grad()
def test_loss_is_the_measured_one(tiny_model, batches):
    model = tiny_model().train()
    cal = calibrate(model, batches)
    layers, state = list(model.model.layers), [m.training for m in model.modules()]
    logits = model(batches[0]).logits
    scores = cal.rank("loss", model=model, batches=iter(batches[:3]))
    assert all(a is b for a, b in zip(model.model.layers, layers, strict=True))
    assert [m.training for m in model.modules()] == state
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(model(batches[0]).logits, logits)
    base = nbl.perplexity(model, batches[:3]).nll
    for score in scores:
        nbl.linearize(model, cal, [score.layer])
        assert nbl.perplexity(model, batches[:3]).nll - base == score.score
        nbl.restore(model)
    nbl.linearize(model, cal, 2, criterion="loss", batches=batches[:3])
    assert nbl.linearized_layers(model) == sorted(s.layer for s in scores[:2])
    # what is linearized already stays so while the others are measured, and is not ranked
    rest = cal.rank("loss", model=model, batches=batches[:3])
    assert {s.layer for s in rest} == {s.layer for s in scores[2:]}
    assert nbl.linearized_layers(model) == sorted(s.layer for s in scores[:2])


@torch.no_grad()
@pytest.mark.parametrize("memory", [None, nbl.Memory()], ids=["one token", "memory"])
def test_greedy_takes_the_layer_that_adds_least_to_those_before(tiny_model, batches, memory):
    model = tiny_model(num_hidden_layers=5).train()
    cal = calibrate(model, batches, memory=memory)
    layers, state = list(model.model.layers), [m.training for m in model.modules()]
    text = own_text(model)  # every change is a loss
    scores = cal.rank("greedy", model=model, batches=iter(text), count=3)
    assert all(a is b for a, b in zip(model.model.layers, layers, strict=True))
    assert [m.training for m in model.modules()] == state
    base, taken = nbl.perplexity(model, text).nll, []
    for score in scores:
        added = {}
        for i in set(range(5)) - set(taken):
            nbl.linearize(model, cal, [*taken, i])
            added[i] = nbl.perplexity(model, text).nll - base
            nbl.restore(model)
        assert score.layer == min(added, key=added.get)
        assert math.isclose(score.score, added[score.layer], rel_tol=1e-4, abs_tol=1e-6)
        taken.append(score.layer)
    assert [s.score for s in scores] == sorted(s.score for s in scores)
    nbl.linearize(model, cal, 3, criterion="greedy", batches=text)
    assert nbl.linearized_layers(model) == sorted(taken)
    # the layers left are ranked with those taken in place
    (rest,) = cal.rank("greedy", model=model, batches=text, count=1)
    assert rest.layer not in taken and nbl.linearized_layers(model) == sorted(taken)


def test_greedy_reads_masks_and_counts(tiny_model, batches):
    model = tiny_model()
    cal = calibrate(model, batches)
    ids = batches[0]
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    padded = [{"input_ids": ids * mask, "attention_mask": mask}, *batches[1:5]]
    scores = cal.rank("greedy", model=model, batches=padded, count=1)
    nbl.linearize(model, cal, [scores[0].layer])
    linear = nbl.perplexity(model, padded).nll
    nbl.restore(model)
    assert math.isclose(scores[0].score, linear - nbl.perplexity(model, padded).nll, rel_tol=1e-4)
    for count in (0, 5, True, 1.5):
        with pytest.raises(ValueError, match="count: expected a number from 1 to 4"):
            cal.rank("greedy", model=model, batches=padded, count=count)
    with pytest.raises(ValueError, match="two tokens"):
        cal.rank("greedy", model=model, batches=[ids[:, :1]], count=1)


def test_a_failing_measurement_leaves_the_model(tiny_model, batches):
    model = tiny_model()
    cal = calibrate(model, batches)
    layers = list(model.model.layers)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("stop")

    model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        cal.rank("loss", model=model, batches=batches[:2])
    assert all(a is b for a, b in zip(model.model.layers, layers, strict=True))


def test_bad_arguments(tiny_model, batches):
    model = tiny_model()
    cal = calibrate(model, batches)
    with pytest.raises(ValueError, match="greedy, loss, residual, cca, nmse, cosine"):
        cal.rank("entropy")
    for kwargs in ({}, {"model": model}, {"batches": batches}):
        with pytest.raises(ValueError, match="model= and batches="):
            cal.rank("loss", **kwargs)
    with pytest.raises(ValueError, match="model= and batches="):
        nbl.linearize(model, cal, 2, criterion="loss")
    with pytest.raises(ValueError, match="another model"):
        cal.rank("loss", model=tiny_model("qwen2"), batches=batches)


def test_ties_by_layer(tiny_model, batches):
    model = tiny_model()
    with torch.no_grad():
        for i in (3, 1):
            model.model.layers[i].self_attn.o_proj.weight.zero_()
    scores = calibrate(model, batches).rank("residual")
    assert [s.layer for s in scores][:2] == [1, 3]
    assert [s.score for s in scores][:2] == [0.0, 0.0]


# --- perplexity ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_perplexity(family, dtype, tiny_model, token_batches, monkeypatch):
    model = tiny_model(family, dtype)
    ids = token_batches(1, batch_size=3, length=20)[0]
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, 11:] = 0, 0
    nll = tokens = 0
    for row, real in zip(ids, mask, strict=True):
        row = row[real == 1][None]
        logp = F.log_softmax(model(row).logits.double(), -1)[0, :-1]
        nll -= logp.gather(-1, row[0, 1:, None]).sum().item()
        tokens += row.shape[1] - 1
    result = nbl.perplexity(model, [{"input_ids": ids * mask, "attention_mask": mask}])
    assert result.tokens == tokens == 19 + 12 + 10
    # rounding of a logit enters the mean at most once
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    assert math.isclose(result.nll, nll / tokens, rel_tol=tolerance)
    assert result.value == math.exp(result.nll)
    module = sys.modules[nbl.perplexity.__module__]  # nbl.perplexity is the function in it
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 200)  # 2 rows at a time
    chunked = nbl.perplexity(model, [{"input_ids": ids * mask, "attention_mask": mask}])
    assert math.isclose(chunked.nll, result.nll, rel_tol=1e-6)


def test_perplexity_of_uniform_logits(tiny_model, token_batches):
    model = tiny_model().train()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = nbl.perplexity(model, token_batches(2))
    assert math.isclose(result.value, model.config.vocab_size, rel_tol=1e-6)
    assert result.tokens == 2 * 4 * 31 and model.training
    with pytest.raises(ValueError, match="two tokens"):
        nbl.perplexity(model, [torch.ones(3, 1, dtype=torch.long)])
