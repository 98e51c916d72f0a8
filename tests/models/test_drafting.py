"""Speculative decoding, ours and transformers': whoever drafts, the tokens are the target's."""

from __future__ import annotations

import copy

import nbl
import pytest
import torch
from nbl.runner.drafting import count_accepted

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")  # as many as these tests need

NEW = 12


@pytest.fixture
def prompts(token_batches):
    """Of 1 to 13 tokens each."""

    def make(n):
        rows = token_batches(1, batch_size=n, length=13, seed=9)[0]
        return [row[: 1 + i % 13].tolist() for i, row in enumerate(rows)]

    return make


@pytest.fixture
def good_draft(token_batches):
    """A draft that is often right: dropped layers of a model in which they matter little."""

    def make(model, layers=(1, 2), quiet=True):
        if quiet:
            with torch.no_grad():
                for i in layers:
                    model.model.layers[i].self_attn.o_proj.weight.mul_(0.1)
        cal = nbl.calibrate(model, token_batches(4), progress=False)
        return nbl.draft_model(model, cal, layers)

    return make


def alone(model, prompts, new=NEW):
    """Greedy tokens of each prompt, from whole forward passes: no cache, no generate."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(new):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=-1)
        rows.append(ids[0, len(prompt) :])
    return rows


@torch.no_grad()
@pytest.mark.parametrize("graphs", [False, True], ids=["", "graphs"])
def test_runner_on_many_prompts(family, graphs, tiny_model, good_draft, prompts, monkeypatch):
    model = tiny_model(family)
    draft = good_draft(model)
    many = prompts(20)
    expected = alone(model, many)
    runner = nbl.Runner(model, 4, 40, draft=draft)
    if graphs:  # the step that CUDA graphs capture, run as it is
        monkeypatch.setattr("nbl.runner.graphs._SMALLEST_BUCKET", 4)
        runner._graphs = runner._new_graphs()
        runner._graphs.run = runner._graphs.step
    proposed = accepted = 0
    for layers, tokens in ((1, None), (2, None), (2, 4)):
        for i, prompt in enumerate(many):
            new = runner.generate([prompt], NEW, draft_layers=layers, draft_tokens=tokens)
            assert torch.equal(new[0], expected[i])
            report = runner.last_draft
            assert report.accepted + report.passes + 1 >= NEW > report.passes
            proposed, accepted = proposed + report.proposed, accepted + report.accepted
    assert 0 < accepted < proposed  # both outcomes were tested
    for first in range(0, 20, 4):  # ragged batches
        new = runner.generate(many[first : first + 4], NEW, draft_layers=2)
        assert all(map(torch.equal, new, expected[first : first + 4]))


@torch.no_grad()
def test_a_draft_that_is_always_right_or_always_wrong(tiny_model, good_draft, prompts):
    model = tiny_model()
    with torch.no_grad():  # attention of no effect: dropping it changes nothing
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    draft = good_draft(model, quiet=False)
    runner = nbl.Runner(model, 1, 40, draft=draft)
    expected = alone(model, prompts(3))
    for prompt, tokens in zip(prompts(3), expected):
        assert torch.equal(runner.generate([prompt], NEW, draft_layers=2)[0], tokens)
        report = runner.last_draft
        # the prompt gives 1 of the 12 tokens, the passes 2, 3, 4 and the 2 that are left
        assert (report.rate, report.passes, report.accepted) == (1.0, 4, 7)
        assert report.tokens_per_pass == 11 / 4
    wrong = tiny_model()
    draft = good_draft(wrong, quiet=False)
    expected = alone(wrong, prompts(3))
    draft.model.layers[1].linear.bias.fill_(1e4)
    runner = nbl.Runner(wrong, 1, 40, draft=draft)
    for prompt, tokens in zip(prompts(3), expected):
        assert torch.equal(runner.generate([prompt], NEW, draft_layers=1)[0], tokens)
        assert runner.last_draft.rate < 0.5


@torch.no_grad()
def test_stop_tokens_and_streams(tiny_model, good_draft, prompts):
    model = tiny_model()
    draft = good_draft(model)
    plain, runner = nbl.Runner(model, 4, 40), nbl.Runner(model, 4, 40, draft=draft)
    batch = prompts(13)[5:9]
    stop = int(plain.generate(batch, NEW)[2][4])
    expected = plain.generate(batch, NEW, stop=stop)
    assert min(map(len, expected)) < NEW
    new = runner.generate(batch, NEW, stop=stop, draft_layers=2)
    assert all(map(torch.equal, new, expected))
    steps = torch.stack(list(runner.stream(batch, NEW, stop=stop, draft_layers=2)), 1)
    assert torch.equal(steps, torch.stack(list(plain.stream(batch, NEW, stop=stop)), 1))
    for new in (1, 2, 3):
        tokens = runner.generate(batch, new, draft_layers=2)
        assert all(map(torch.equal, tokens, plain.generate(batch, new)))


def test_counting():
    drafted = torch.tensor([[5, 6, 7], [5, 8, 7]])
    exact = torch.tensor([[5, 6, 7, 1], [5, 6, 7, 2]])
    none, stop = torch.zeros(2, dtype=torch.bool), torch.tensor([], dtype=torch.long)
    assert count_accepted(drafted, exact, none, stop) == 1
    assert count_accepted(drafted, exact, torch.tensor([False, True]), stop) == 3
    assert count_accepted(drafted, exact, torch.tensor([True, True]), stop) == 0
    assert count_accepted(drafted[:1], exact[:1], none[:1], torch.tensor([6])) == 1


@torch.no_grad()
@pytest.mark.parametrize("optimized", ["neither", "model", "int8"])
def test_transformers_assisted_generation(family, optimized, tiny_model, good_draft, prompts):
    """The linearized model assists its own original, and the other way round."""
    model = tiny_model(family)
    if optimized == "model":
        nbl.optimize(model)
    draft = good_draft(model)
    expected = alone(model, prompts(13)), alone(draft, prompts(13))
    if optimized == "int8":
        nbl.optimize(model, weights="int8")
        expected = alone(model, prompts(13)), alone(draft, prompts(13))
    options = {"max_new_tokens": NEW, "do_sample": False}
    differ = 0
    for prompt, of_model, of_draft in zip(prompts(13), *expected):
        ids = torch.tensor([prompt])
        new = model.generate(ids, assistant_model=draft, **options)[0, len(prompt) :]
        assert torch.equal(new, of_model)
        new = draft.generate(ids, assistant_model=model, **options)[0, len(prompt) :]
        assert torch.equal(new, of_draft)
        differ += not torch.equal(of_model, of_draft)
    assert differ > 0  # else nothing was ever rejected


@torch.no_grad()
@pytest.mark.parametrize("optimized", [False, True])
def test_an_nbl_model_as_the_target(optimized, tiny_model, token_batches, prompts):
    """Linearized layers have no cache to roll back; the first layer is the one that is asked."""
    for layers in ([0], [1, 3], [0, 1, 2, 3]):
        model, assistant = tiny_model(), tiny_model()
        cal = nbl.calibrate(model, token_batches(4), progress=False)
        nbl.linearize(model, cal, layers)
        nbl.linearize(assistant, cal, [0, 1, 2])
        expected = alone(model, prompts(13))
        if optimized:
            nbl.optimize(model), nbl.optimize(assistant)
        for prompt, tokens in zip(prompts(13), expected):
            ids = torch.tensor([prompt])
            for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}):
                new = model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)
                assert torch.equal(new[0, len(prompt) :], tokens)


@torch.no_grad()
def test_a_draft_shares_every_weight_but_its_maps(family, tiny_model, good_draft):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    draft = good_draft(model, quiet=False)
    own = {n for n, p in draft.named_parameters() if id(p) not in set(map(id, model.parameters()))}
    assert own == {f"model.layers.{i}.linear.{n}" for i in (1, 2) for n in ("weight", "bias")}
    assert nbl.linearized_layers(draft) == [1, 2] and nbl.linearized_layers(model) == []
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    ids = torch.tensor([[3, 4, 5]])
    twin = copy.deepcopy(model)
    cal_twin = tiny_model(family)
    assert not torch.equal(draft(ids).logits, model(ids).logits)
    assert torch.equal(twin(ids).logits, cal_twin(ids).logits)


def test_bad_drafts_are_refused(tiny_model, good_draft):
    model = tiny_model()
    draft = good_draft(model)
    with pytest.raises(ValueError, match="made of another model"):
        nbl.Runner(tiny_model(), 1, 40, draft=draft)
    with pytest.raises(ValueError, match=r"expected what nbl\.draft_model made"):
        nbl.Runner(model, 1, 40, draft=tiny_model())
    for function in (lambda: nbl.drop(draft, [0]), lambda: nbl.restore(draft)):
        with pytest.raises(ValueError, match="the model is a draft"):
            function()
    runner = nbl.Runner(model, 16, 40, draft=draft)
    bad = {
        "draft_layers: expected a number from 1 to 2": {"draft_layers": 3},
        "draft_tokens: expected a positive int": {"draft_layers": 1, "draft_tokens": 0},
        "draft_tokens: needs draft_layers": {"draft_tokens": 2},
        "drafting is greedy": {"draft_layers": 1, "temperature": 1.0},
    }
    for words, options in bad.items():
        with pytest.raises(ValueError, match=words):
            runner.generate([[3]], NEW, **options)
    with pytest.raises(ValueError, match="expected at most 8 prompts, got 9"):
        runner.generate([[3]] * 9, NEW, draft_layers=1)
    with pytest.raises(ValueError, match="this runner has no draft"):
        nbl.Runner(model, 1, 40).generate([[3]], NEW, draft_layers=1)
