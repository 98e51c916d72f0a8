"""nbl.heal: the divergence falls, all but the maps stays bit for bit, and it is all or nothing."""

from __future__ import annotations

import math
import sys

import nbl
import pytest
import torch
from nbl import models
from tiny import MAPS, linearize_tiny, make_tiny_model, make_token_batches
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

module = sys.modules["nbl.heal"]  # nbl.heal is the function
pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")

# Enough for a fall that is no accident.
QUICK = {"steps": 24, "tokens_per_step": 256, "lr": 3e-3, "progress": False}


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    """Names of the tensors that differ, in any bit."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def is_map(name):
    return name.rpartition(".layers.")[2].partition(".")[2].startswith("linear")


def divergence(model, original, batch):
    """Mean KL(original ‖ model) of a batch without padding, from whole logits in float64."""
    with torch.no_grad():
        q, p = (F.log_softmax(m(batch).logits.double(), dim=-1) for m in (model, original))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@pytest.mark.parametrize("kind", MAPS)
def test_the_divergence_falls_and_only_maps_change(kind, ids):
    model = nbl.drop(linearize_tiny(make_tiny_model(), [1, 2], **MAPS[kind]), [3])
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].train()
    flags = [p.requires_grad for p in model.parameters()]
    before, batches = weights_of(model), make_token_batches(12)
    state = torch.get_rng_state()
    healed = nbl.heal(model, None, batches, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert healed.kept and healed.after < healed.before
    names = changed(model, before)
    assert names and all(map(is_map, names))
    maps = {name for name in before if is_map(name)}
    assert names == maps  # every one of them learns
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.model.layers[0].training and not model.model.layers[1].training
    assert healed.steps == len(healed.losses) == 24 and healed.tokens == 24 * 256
    # what it says is what the models say
    held_out = torch.cat(batches)[-4:]
    assert healed.after == pytest.approx(divergence(model, make_tiny_model(), held_out), rel=1e-4)
    original = make_tiny_model()(ids).logits
    assert torch.equal(nbl.restore(model)(ids).logits, original)


def test_the_divergence_falls_on_what_is_trained_on():
    batches = make_token_batches(2)
    model = linearize_tiny(make_tiny_model(), [1, 2])
    healed = nbl.heal(model, None, batches, **QUICK | {"steps": 60}, validation=batches)
    assert healed.after < 0.7 * healed.before
    assert sum(healed.losses[-5:]) < sum(healed.losses[:5])


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_every_family(family):
    model = linearize_tiny(make_tiny_model(family), [0, 2])
    assert nbl.heal(model, None, make_token_batches(8), **QUICK).kept


def test_windows_are_the_compressed_models_not_the_originals(tmp_path):
    """A window below the first map is no part of what the original says."""
    batches, whole = make_token_batches(8), make_tiny_model()
    model = linearize_tiny(linearize_tiny(make_tiny_model(), [2]), [0, 3], window=nbl.Window(2, 1))
    other = linearize_tiny(linearize_tiny(make_tiny_model(), [2]), [0, 3], window=nbl.Window(2, 1))
    before = weights_of(model)
    healed = nbl.heal(model, None, batches, **QUICK)
    assert {name.split(".")[2] for name in changed(model, before)} == {"2"}
    held_out = torch.cat(batches)[-3:]
    assert healed.after == pytest.approx(divergence(model, whole, held_out), rel=1e-4)
    assert nbl.heal(other, whole, batches, **QUICK).losses == pytest.approx(healed.losses, rel=1e-4)
    assert nbl.windowed_layers(other) == [0, 3] and healed.kept


@pytest.mark.parametrize("fitted", [False, True], ids=["plain", "refitted"])
def test_the_layers_kept_aside_are_as_good_as_the_original(fitted):
    batches = make_token_batches(8)
    own, given = (make_tiny_model() for _ in range(2))
    for model in (own, given):
        cal = nbl.calibrate(model, batches, progress=False)
        more = {"sequential": True, "refit_mlp": True, "batches": batches} if fitted else {}
        nbl.linearize(model, cal, [1, 2], **more)
    found = nbl.heal(own, None, batches, **QUICK)
    expected = nbl.heal(given, make_tiny_model(), batches, **QUICK)
    assert found.before == pytest.approx(expected.before, rel=1e-5)
    assert found.after == pytest.approx(expected.after, rel=1e-3)
    for p, q in zip(own.parameters(), given.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)


def test_the_same_batches_give_the_same_maps():
    def run():
        model = linearize_tiny(make_tiny_model(), [1, 2])
        found = nbl.heal(model, None, (batch for batch in make_token_batches(8)), **QUICK, rank=4)
        return found, weights_of(model)

    (first, weights), (second, again) = run(), run()
    assert first == second and all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_correction_is_of_its_rank():
    model = linearize_tiny(make_tiny_model(), [1])
    before = model.model.layers[1].linear.weight.clone()
    assert nbl.heal(model, None, make_token_batches(8), **QUICK, rank=2).kept
    change = (model.model.layers[1].linear.weight - before).double()
    strengths = torch.linalg.svdvals(change)
    assert strengths[1] > 1e-4 and strengths[2] < 1e-3 * strengths[1]


@pytest.mark.parametrize("kind", ["full", "memory-rank"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(kind, side):
    """Rows with padding are healed as they are without it, each by itself."""
    (batch,) = make_token_batches(1, batch_size=4, length=24)
    rows = [row[None, : 24 - 3 * i] for i, row in enumerate(batch)]
    padded = []
    for i, row in enumerate(rows):
        edges = (3 * i, 0) if side == "left" else (0, 3 * i)
        mask = F.pad(torch.ones_like(row), edges)
        padded.append({"input_ids": F.pad(row, edges), "attention_mask": mask})
    together = {key: torch.cat([p[key] for p in padded]) for key in padded[0]}
    options = QUICK | {"steps": 6, "tokens_per_step": 1}
    found = []
    for batches in (rows, [together]):
        model = linearize_tiny(make_tiny_model(), [1, 2], **MAPS[kind])
        healed = nbl.heal(model, None, batches, validation=batches, **options)
        found.append((healed, model))
    (by_row, one), (padded_too, other) = found
    assert by_row.tokens == padded_too.tokens
    assert padded_too.losses == pytest.approx(by_row.losses, rel=1e-4)
    assert padded_too.after == pytest.approx(by_row.after, rel=1e-4)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "memory"])
def test_packed_texts_are_apart(kind):
    texts = [row[None] for row in torch.cat(make_token_batches(1, batch_size=4, length=12))]
    packed = {
        "input_ids": torch.cat(texts, dim=1),
        "position_ids": torch.arange(12).repeat(4)[None],
    }
    before = []
    for batches in (texts, [packed]):
        model = linearize_tiny(make_tiny_model(), [0, 2], **MAPS[kind])
        found = nbl.heal(model, None, batches, validation=batches, **QUICK | {"steps": 1})
        before.append(found.before)
    assert before[1] == pytest.approx(before[0], rel=1e-4)


def test_logits_are_made_for_some_tokens_at_a_time(monkeypatch):
    def run():
        model = linearize_tiny(make_tiny_model(), [1, 2])
        return nbl.heal(model, None, make_token_batches(4), **QUICK | {"steps": 3})

    whole = run()
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 200)  # 2 rows at a time
    assert run().losses == pytest.approx(whole.losses, rel=1e-5)


def test_gradients_are_those_of_autograd():
    """Of KL from whole logits, by transformers' own forward pass."""
    model, original = linearize_tiny(make_tiny_model(), [1, 2]), make_tiny_model()
    batch = make_token_batches(1)[0]
    read = next(module.read_batches([batch], model))
    parameters = [model.model.layers[1].linear.weight, model.model.layers[2].linear.bias]
    pair = module._Pair(model, None)
    with torch.no_grad():
        kl, found = pair.gradients(pair.read(read), parameters)
    log_q = F.log_softmax(model(batch).logits, dim=-1)
    p = original(batch).logits.softmax(dim=-1).detach()
    loss = F.kl_div(log_q, p, reduction="sum")
    assert kl == pytest.approx(loss.item(), rel=1e-5)
    for gradient, expected in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = linearize_tiny(make_tiny_model(dtype=dtype), [1, 2])
    healed = nbl.heal(model, None, make_token_batches(8), **QUICK)
    assert healed.kept and {p.dtype for p in model.parameters()} == {dtype}
    with pytest.raises(ValueError, match=r"lr: step \d+ of 24 is not finite in torch"):
        nbl.heal(model, None, make_token_batches(8), **QUICK | {"lr": 1e37})
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="model: its divergence from the original is not finite"):
        nbl.heal(model, None, make_token_batches(8), **QUICK)


def test_optimized_models_and_no_grad(recwarn):
    plain, fused = (linearize_tiny(make_tiny_model(), [1, 2]) for _ in range(2))
    nbl.optimize(fused)
    expected = nbl.heal(plain, None, make_token_batches(8), **QUICK)
    with torch.inference_mode():
        found = nbl.heal(fused, None, make_token_batches(8), **QUICK)
    assert found.after == pytest.approx(expected.after, rel=1e-3)
    assert not [w for w in recwarn if "gradients are recorded" in str(w.message)]
    assert isinstance(fused.model.layers[1], type(nbl.optimize(plain).model.layers[1]))


def test_a_checkpoint_is_healed_by_the_original(tmp_path, ids):
    linearize_tiny(make_tiny_model(), [1, 2]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"original: expected .* None, but .* layers \[1, 2\]"):
        nbl.heal(model, None, make_token_batches(8), **QUICK)
    assert nbl.heal(model, make_tiny_model(), make_token_batches(8), **QUICK).kept
    model.save_pretrained(tmp_path / "healed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_maps_that_do_not_get_better_stay():
    model = linearize_tiny(make_tiny_model(), [1, 2])
    before = weights_of(model)
    healed = nbl.heal(model, None, make_token_batches(8), **QUICK | {"lr": 10.0, "steps": 8})
    assert not healed.kept and healed.after == healed.before and len(healed.losses) == 8
    assert changed(model, before) == set()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_it_is_all_or_nothing(error):
    model = linearize_tiny(make_tiny_model(), [1, 2])
    before, layers = weights_of(model), list(model.model.layers)
    model.train()
    model.lm_head.weight.grad = gradient = torch.ones_like(model.lm_head.weight)

    def progress(tokens, total):
        if tokens > 0.7 * total:
            assert changed(model, before)
            raise error

    with pytest.raises(error):
        nbl.heal(model, None, make_token_batches(8), **QUICK | {"progress": progress})
    assert changed(model, before) == set() and list(model.model.layers) == layers
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight.grad is gradient
    assert model.model.layers[1].linear.weight.grad is None


def test_progress_counts_every_token_that_is_read():
    seen = []
    model = linearize_tiny(make_tiny_model(), [1])
    options = QUICK | {"progress": lambda *args: seen.append(args)}
    healed = nbl.heal(model, None, make_token_batches(10), **options)
    held_out = 4 * 32  # a tenth of 40 rows, measured before and after every quarter
    assert seen[-1] == (healed.tokens + 5 * held_out,) * 2
    assert seen == sorted(seen) and len({total for _, total in seen}) == 1


def test_an_order_of_chance_reads_all_rows():
    rows = module._rows(make_token_batches(3), make_tiny_model())
    first = list(module._plan(rows, 6, 64))
    assert [len(chosen) for chosen in first] == [2] * 6
    assert {id(row) for chosen in first for row in chosen} == set(map(id, rows))
    assert list(module._plan(rows, 6, 64)) == first
    shares = [module._share_of_lr(step, 100) for step in range(1, 101)]
    assert max(shares) == shares[9] > 0.97 and 0 < shares[-1] < 0.001 and shares[0] < 0.11


def two(model):
    return linearize_tiny(model, [1, 2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps: expected an int from 1 on, got 0"),
        ({"tokens_per_step": 1.5}, "tokens_per_step: expected an int from 1 on, got 1.5"),
        ({"lr": 0}, "lr: expected a number above 0, got 0"),
        ({"lr": math.nan}, "lr: expected a number above 0, got nan"),
        ({"rank": 33}, "rank: expected None or an int from 1 to 32, got 33"),
        ({"rank": True}, "rank: expected None or an int"),
        ({"batches": []}, "batches: empty"),
        ({"batches": [torch.full((1, 8), 97)]}, "batch 0: token ids 97 to 97"),
        ({"batches": [torch.ones(1, 8, dtype=torch.long)]}, "batches: expected two rows or more"),
        ({"validation": []}, "batches: empty"),
        ({"original": "itself"}, r"original: expected .* attention, got one with layers \[1"),
        ({"original": {"hidden_size": 48}}, r"original: expected a model like .* 32, .* 48,"),
        ({"original": {"family": "qwen2"}}, r"original: expected .*\('llama', .*\('qwen2', "),
        ({"original": {"vocab_size": 90}}, "original: expected a model like"),
        ({"original": "int8"}, "original: expected plain weights, got int8"),
        ({"model": "int8"}, "model: expected plain weights, got int8: heal before nbl.optimize"),
        ({"model": "dense"}, "model: expected one with linear maps .* no layer is"),
        ({"model": "dropped"}, "model: expected one .* all replaced layers are dropped"),
        ({"model": "draft"}, "the model is a draft"),
        ({"model": "rank", "rank": 4}, "rank: expected None for maps that are of reduced rank"),
    ],
    ids=str,
)
def test_refusals_leave_the_model(options, words):
    options = {"model": "plain", "original": None, "batches": make_token_batches(2)} | options
    kind, original = options.pop("model"), options.pop("original")
    model = make_tiny_model()
    if kind == "dropped":
        nbl.drop(model, [1])
    elif kind == "draft":
        cal = nbl.calibrate(model, make_token_batches(4), progress=False)
        model = nbl.draft_model(model, cal, [1])
    elif kind != "dense":
        linearize_tiny(model, [1, 2], **MAPS.get(kind, {}))
    if kind == "int8":
        nbl.optimize(model, weights="int8", keep_original=True)
    if original == "itself":
        original = model
    elif original == "int8":
        original = nbl.optimize(make_tiny_model(), weights="int8")
    elif original is not None:
        original = make_tiny_model(**original)
    before = weights_of(model)
    with pytest.raises(ValueError, match=words):
        nbl.heal(model, original, options.pop("batches"), **QUICK | options)
    assert changed(model, before) == set()


def test_a_map_that_is_wrapped_is_refused():
    model = linearize_tiny(make_tiny_model(), [1])
    model.model.layers[1].linear = torch.nn.Sequential(model.model.layers[1].linear)
    assert isinstance(model.model.layers[1], models.LinearizedDecoderLayer)
    with pytest.raises(ValueError, match=r"layers\.1\.linear: expected a plain nn.Linear, got Seq"):
        nbl.heal(model, None, make_token_batches(2), **QUICK)
