"""Sequential calibration: against its definition, token by token, and by what it is for."""

from __future__ import annotations

import nbl
import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")  # as many as these tests need

MEMORY = nbl.Memory()


def calibrated(model, batches, **kwargs):
    return nbl.calibrate(model, batches, **{"progress": False} | kwargs)


def texts(kind, token_batches):
    batches = token_batches(4, length=40)
    if kind == "padded":
        masks = [torch.ones_like(b) for b in batches]
        for mask in masks:
            mask[0, :9], mask[1, -4:] = 0, 0
        return [{"input_ids": b, "attention_mask": m} for b, m in zip(batches, masks, strict=True)]
    if kind == "packed":
        positions = torch.cat([torch.arange(n) for n in (13, 1, 26)]).expand(4, -1)
        return [{"input_ids": b, "position_ids": positions} for b in batches]
    return batches


def streams(model, batches, layer):
    """x, f and x + y at a layer (n, d), float64, of the tokens that count."""
    block, seen = model.model.layers[layer], {}
    handles = [
        block.register_forward_pre_hook(lambda m, a: seen.__setitem__("x", a[0])),
        block.post_attention_layernorm.register_forward_pre_hook(
            lambda m, a: seen.__setitem__("z", a[0])
        ),
    ]
    rows = []
    for batch in batches:
        batch = batch if isinstance(batch, dict) else {"input_ids": batch}
        with torch.no_grad():
            model(**batch, use_cache=False)
            f = block.input_layernorm(seen["x"])
        keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        rows.append([t[keep].double() for t in (seen["x"], f, seen["z"])])
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in zip(*rows)]


def fit(f, y, ridge):
    mean_f, mean_y = f.mean(0), y.mean(0)
    f, y = f - mean_f, y - mean_y
    gram = f.T @ f
    ridge = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram + ridge, f.T @ y).T
    return weight, mean_y - weight @ mean_f


@pytest.mark.parametrize("kind", ["rows", "padded", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_map_is_fitted_on_the_stream_below_it(kind, family, tiny_model, token_batches):
    model, batches = tiny_model(family), texts(kind, token_batches)
    original = tiny_model(family)
    cal = calibrated(model, batches, layers=[0, 2, 3], sequential=True)
    maps = cal.solve()
    compressed = tiny_model(family)
    for i in (0, 2, 3):
        x, f, _ = streams(compressed, batches, i)
        _, _, z = streams(original, batches, i)
        weight, bias = fit(f, z - x, 1e-4)
        assert (maps[i].weight - weight).norm() < 1e-3 * weight.norm()
        assert (maps[i].bias - bias).norm() < 1e-3 * bias.norm()
        nbl.linearize(compressed, calibrated(tiny_model(family), batches), [i], maps={i: maps[i]})
    assert torch.equal(
        model.model.layers[1].self_attn.q_proj.weight,
        original.get_parameter("model.layers.1.self_attn.q_proj.weight"),
    )
    nbl.linearize(model, cal, 3)
    ids = token_batches(1, seed=3)[0]
    assert torch.equal(model(ids).logits, compressed(ids).logits)


@pytest.mark.parametrize("memory", [None, MEMORY], ids=["", "memory"])
def test_it_lessens_the_loss(memory, tiny_model, token_batches):
    """On the text that it was fitted on, where the target is the very stream."""
    model, batches = tiny_model(), token_batches(12)
    cal = calibrated(model, batches, memory=memory)
    wanted = model.model(batches[0]).last_hidden_state

    def distance():
        with torch.no_grad():
            return float((model.model(batches[0]).last_hidden_state - wanted).norm())

    distances = {}
    for name, options in {
        "apart": {},
        "sequential": {"sequential": True, "batches": batches},
        "refitted": {"sequential": True, "batches": iter(batches), "refit_mlp": True},
    }.items():
        nbl.linearize(model, cal, [0, 1, 2], rank=8, **options)
        distances[name] = distance()
        nbl.restore(model)
    assert distances["refitted"] < distances["sequential"] < distances["apart"]


def test_the_first_map_is_the_usual_one(tiny_model, token_batches):
    model, batches = tiny_model(), token_batches(6)
    usual = calibrated(model, batches, memory=MEMORY).solve(rank=6)[1]
    cal = calibrated(model, batches, memory=MEMORY, layers=[1], sequential=True, rank=6)
    ours = cal.solve(rank=6)[1]
    assert (ours.weight - usual.weight).norm() < 1e-3 * usual.weight.norm()
    assert abs(float(ours.nmse) - float(usual.nmse)) < 1e-4


def test_down_projections_are_refitted_by_least_squares(tiny_model, token_batches):
    """The last one is checked: what is before it is as the calibration says."""
    model, batches = tiny_model(), token_batches(6)
    original = tiny_model()
    cal = calibrated(model, batches, layers=[0, 2], sequential=True, refit_mlp=True)
    assert sorted(cal.down_proj) == [0, 1, 2, 3]
    nbl.linearize(model, cal, [0, 2])
    block = model.model.layers[3]
    with torch.no_grad():
        block.mlp.down_proj.weight.copy_(original.model.layers[3].mlp.down_proj.weight)
    seen, above = {}, {}
    for m, target in ((model, seen), (original, above)):
        last = m.model.layers[3]
        last.mlp.down_proj.register_forward_pre_hook(
            lambda _, a, target=target: target.setdefault("a", []).append(a[0].flatten(0, 1))
        )
        last.register_forward_hook(
            lambda _, a, out, target=target: target.setdefault("z", []).append(out.flatten(0, 1))
        )
        with torch.no_grad():
            for ids in batches:
                m(ids, use_cache=False)
    a = torch.cat(seen["a"]).double()
    e = torch.cat(above["z"]).double() - torch.cat(seen["z"]).double()
    gram = a.T @ a
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    change = torch.linalg.solve(gram + ridge, a.T @ e).T
    expected = original.model.layers[3].mlp.down_proj.weight.double() + change
    assert (cal.down_proj[3].double() - expected).norm() < 1e-3 * change.norm()


@torch.no_grad()
def test_stored_applied_and_undone(tiny_model, token_batches, tmp_path):
    model, batches = tiny_model(), token_batches(4)
    ids = token_batches(1, seed=3)[0]
    before = model(ids).logits
    options = {"rank": 6, "ridge": 1e-3}
    cal = calibrated(
        model, batches, layers=[1, 3], memory=MEMORY, sequential=True, refit_mlp=True, **options
    )
    assert torch.equal(model(ids).logits, before)
    cal.save(tmp_path / "cal")
    again = nbl.Calibration.load(tmp_path / "cal")
    assert again.sequential == {"ridge": 1e-3, "bias": True, "rank": 6}
    nbl.linearize(model, again, [3, 1], **options)
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, logits)
    nbl.optimize(model)
    assert torch.equal(nbl.restore(model)(ids).logits, before)
    at_once = nbl.linearize(
        model,
        calibrated(model, batches, memory=MEMORY),
        [1, 3],
        sequential=True,
        refit_mlp=True,
        batches=batches,
        **options,
    )
    assert torch.equal(at_once(ids).logits, logits)


def test_refusals(tiny_model, token_batches, tmp_path):
    model, batches = tiny_model(), token_batches(2)
    usual = calibrated(model, batches)
    cal = calibrated(model, batches, layers=[0, 1], sequential=True)
    before = model(batches[0]).logits
    for error, words, function in (
        (
            "sequential",
            "no checkpoint",
            lambda: calibrated(model, batches, sequential=True, checkpoint=tmp_path),
        ),
        ("rank", "sequential=True", lambda: calibrated(model, batches, rank=3)),
        ("maps are those of", "rank", lambda: cal.solve(rank=3)),
        ("layers", "fitted together", lambda: nbl.linearize(model, cal, [1])),
        ("sequential", "cannot be merged", lambda: cal.merge(cal)),
        ("sequential", "expected batches", lambda: nbl.linearize(model, usual, 2, sequential=True)),
        ("refit_mlp", "sequential=True", lambda: nbl.linearize(model, usual, 2, refit_mlp=True)),
        (
            "maps",
            "expected None",
            lambda: nbl.linearize(
                model, usual, [1], sequential=True, batches=batches, maps=usual.solve()
            ),
        ),
        ("batches", "empty", lambda: nbl.linearize(model, usual, 2, sequential=True, batches=[])),
    ):
        with pytest.raises(ValueError, match=f"{error}.*{words}"):
            function()
    refitted = calibrated(model, batches, layers=[0, 1], sequential=True, refit_mlp=True)
    with pytest.raises(ValueError, match="refitted down projections"):
        nbl.draft_model(model, refitted, [0, 1])
    assert torch.equal(model(batches[0]).logits, before)
