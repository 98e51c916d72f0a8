"""calibrate: the moments are those of the tokens, however they were read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings

import nbl
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import BatchEncoding

# What CovarianceAccumulator promises of a Gram matrix, relative to float64 (Frobenius).
GRAM_ERROR = 1e-6


def calibrate(model, batches, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tokens are few")
        return nbl.calibrate(model, batches, **{"progress": False} | kwargs)


def observed(model, batches, layer):
    """x, f, y of every token (n, d), float64, by a hook of our own."""
    rows = []
    block = model.model.layers[layer]
    pairs = []
    handles = [
        block.input_layernorm.register_forward_hook(lambda m, a, f: pairs.append((a[0], f))),
        block.self_attn.register_forward_hook(
            lambda m, a, out: rows.append((*pairs.pop(), out[0]))
        ),
    ]
    with torch.no_grad():
        for ids in batches:
            model(ids)
    for handle in handles:
        handle.remove()
    return [torch.cat([r[i].flatten(0, 1) for r in rows]).double() for i in range(3)]


def states(cal):
    return {
        f"{i}.{name}": t
        for i in cal.layers
        for name, t in cal._accumulators[i].state_dict().items()
    } | {f"{i}.sums": cal._sums[i] for i in cal.layers}


def assert_identical(a, b):
    assert (a.tokens, a.layers, a.features) == (b.tokens, b.layers, b.features)
    ours, theirs = states(a), states(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_equal_moments(a, b, tolerance):
    assert a.tokens == b.tokens
    for i in a.layers:
        m, n = a.moments(i), b.moments(i)
        for name in ("mean_features", "mean_targets", "cov_ff", "cov_tf", "cov_tt"):
            x, y = getattr(m, name), getattr(n, name)
            assert (x - y).norm() <= tolerance * y.norm(), (i, name)
        assert abs(a.mean_cosine(i) - b.mean_cosine(i)) < tolerance
        assert abs(a.mean_square(i) / b.mean_square(i) - 1) < tolerance


@pytest.mark.parametrize("features", ["post-norm", "pre-norm"])
def test_solution_is_least_squares(family, features, tiny_model, token_batches):
    """W and b equal numpy's lstsq in float64; the NMSE is the error measured on the tokens."""
    model, batches = tiny_model(family), token_batches(20)
    cal = calibrate(model, batches, features=features)
    solved = cal.solve(ridge=0.0)
    without_bias = cal.solve(ridge=0.0, bias=False)
    assert cal.tokens == 20 * 4 * 32 and sorted(solved) == [0, 1, 2, 3]
    for layer in (0, 3):
        x, f, y = observed(model, batches, layer)
        f = f if features == "post-norm" else x
        # an error of the Gram matrix enters W multiplied by at most its condition number
        tolerance = 4 * GRAM_ERROR * np.linalg.cond(f.T @ f)
        for s, ones in ((solved[layer], True), (without_bias[layer], False)):
            columns = torch.cat([f, torch.ones(len(f), 1)], 1) if ones else f
            coefficients = np.linalg.lstsq(columns.numpy(), y.numpy(), rcond=None)[0]
            weight = torch.from_numpy(coefficients[: f.shape[1]].T.copy())
            assert (s.weight - weight).norm() <= tolerance * weight.norm()
            error = y - f @ s.weight.T - (s.bias if ones else 0)
            total = (y - y.mean(0)).square().sum()
            measured = float(error.square().sum() / total)
            # the variance of y is normalized by n - 1, an uncentered error by n
            allowed = tolerance + (0 if ones else 1.01 / len(y))
            assert abs(float(s.nmse) - measured) <= allowed * measured
            best = y.numpy() - columns.numpy() @ coefficients
            assert measured <= float((best**2).sum() / total) * (1 + tolerance**2)
        z = x + y
        assert np.isclose(
            cal.mean_cosine(layer), torch.cosine_similarity(x, z).mean().item(), rtol=1e-6
        )
        assert np.isclose(cal.mean_square(layer), x.square().sum(-1).mean().item(), rtol=1e-6)


def test_the_block_is_the_residual_sum(tiny_model, token_batches):
    """The block output that the CCA bound sees is x + y."""
    model, batches = tiny_model(), token_batches(3)
    cal = calibrate(model, batches)
    x, _, y = observed(model, batches, 1)
    cov = torch.from_numpy(np.cov((x + y).T.numpy()))
    assert (cal.moments(1).cov_bb - cov).norm() <= GRAM_ERROR * cov.norm()


def test_padding_is_not_counted(family, tiny_model, token_batches):
    model = tiny_model(family)
    ids = token_batches(1, batch_size=3, length=20)[0]
    mask = torch.ones_like(ids)
    mask[1, :7] = 0  # on the left
    mask[2, 11:] = 0  # on the right
    padded = ids * mask
    cal = calibrate(model, [{"input_ids": padded, "attention_mask": mask}])
    alone = calibrate(model, [ids[:1], ids[1:2, 7:], ids[2:, :11]])
    assert cal.tokens == alone.tokens == 20 + 13 + 11
    assert_equal_moments(cal, alone, 1e-5)
    encoded = BatchEncoding({"input_ids": padded, "attention_mask": mask.bool()})
    assert_identical(calibrate(model, [encoded]), cal)
    extra = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert_identical(calibrate(model, [extra]), calibrate(model, [ids.int()]))


def test_split_does_not_matter(tiny_model, token_batches):
    model = tiny_model()
    batches = token_batches(6)
    whole = calibrate(model, batches)
    rows = [row[None] for batch in batches for row in batch]
    assert_equal_moments(calibrate(model, iter(rows)), whole, 1e-5)


@pytest.mark.parametrize("features", ["post-norm", "pre-norm"])
def test_merged_halves_are_the_whole(features, tiny_model, token_batches):
    model, batches = tiny_model(), token_batches(6)
    whole = calibrate(model, batches, features=features)
    first = calibrate(model, batches[:2], features=features)
    first.solve()
    assert first.merge(calibrate(model, batches[2:], features=features)) is first
    assert_equal_moments(first, whole, 1e-12)
    assert abs(first.solve()[1].weight - whole.solve()[1].weight).max() < 1e-8


def test_merge_refuses_what_does_not_belong(tiny_model, token_batches):
    batches = token_batches(2)
    cal = calibrate(tiny_model(), batches)
    other_weights = tiny_model()
    with torch.no_grad():
        other_weights.model.layers[2].mlp.up_proj.weight.mul_(1.01)
    for other, name in (
        (calibrate(tiny_model(), batches, features="pre-norm"), "features"),
        (calibrate(tiny_model(), batches, layers=[1]), "layers"),
        (calibrate(tiny_model("mistral"), batches), "model_type"),
        (calibrate(other_weights, batches), "fingerprint"),
        (calibrate(tiny_model(rms_norm_eps=1e-3), batches), "fingerprint"),
    ):
        with pytest.raises(ValueError, match=name):
            cal.merge(other)
    with pytest.raises(TypeError):
        cal.merge({})
    assert_identical(cal, calibrate(tiny_model(), batches))


def test_model_is_left_as_it_was(tiny_model, token_batches):
    model = tiny_model().train()
    model.model.layers[1].mlp.eval()
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    calibrate(model, token_batches(2))
    with pytest.raises(ValueError, match="batch 1"):
        calibrate(model, [*token_batches(1), torch.full((1, 4), 97)])
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert_identical(calibrate(model, token_batches(2)), calibrate(tiny_model(), token_batches(2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tiny_model, token_batches):
    model, batches = tiny_model(dtype=dtype), token_batches(8)
    cal = calibrate(model, batches)
    _, f, y = observed(model, batches, 2)
    cov = torch.from_numpy(np.cov(f.T.numpy()))
    assert (cal.moments(2).cov_ff - cov).norm() <= GRAM_ERROR * cov.norm() * 2
    cross = (y - y.mean(0)).T @ (f - f.mean(0)) / (len(f) - 1)
    assert (cal.moments(2).cov_tf - cross).norm() <= GRAM_ERROR * cov.norm() * 2


def test_partly_linearized_model(tiny_model, token_batches):
    model = tiny_model()
    cal = calibrate(model, token_batches())
    nbl.linearize(model, cal, [1])
    later = calibrate(model, token_batches())
    assert later.layers == [0, 2, 3]
    assert torch.equal(later.moments(0).cov_tf, cal.moments(0).cov_tf)
    assert not torch.equal(later.moments(2).cov_tf, cal.moments(2).cov_tf)
    with pytest.raises(ValueError, match=r"layers \[1\] have no attention"):
        calibrate(model, token_batches(1), layers=[0, 1])
    nbl.drop(model, [0, 2, 3])
    with pytest.raises(ValueError, match="none to observe"):
        calibrate(model, token_batches(1))


BAD_BATCHES = [
    ([], ValueError, "empty"),
    (5, TypeError, "iterable"),
    ("text", TypeError, "iterable"),
    ({"input_ids": torch.ones(1, 4, dtype=torch.long)}, TypeError, "iterable"),
    (torch.ones(2, 4, dtype=torch.long), ValueError, r"batch 0.*\(4,\)"),
    ([torch.ones(1, 4)], TypeError, "batch 0.*float32"),
    ([[1, 2, 3]], TypeError, "batch 0.*list"),
    ([torch.ones(0, 4, dtype=torch.long)], ValueError, r"batch 0.*\(0, 4\)"),
    ([torch.full((1, 4), -1)], ValueError, "batch 0.*-1"),
    ([torch.ones(1, 4, dtype=torch.long), torch.full((1, 4), 97)], ValueError, "batch 1.*97"),
    ([{"tokens": 1}], ValueError, "batch 0.*input_ids"),
    (
        [{"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 3)}],
        ValueError,
        "batch 0.*attention_mask",
    ),
    (
        [
            {
                "input_ids": torch.ones(1, 4, dtype=torch.long),
                "attention_mask": torch.full((1, 4), 0.5),
            }
        ],
        ValueError,
        "batch 0.*0 and 1",
    ),
]


@pytest.mark.parametrize(("batches", "error", "words"), BAD_BATCHES)
def test_bad_batches_are_named(batches, error, words, tiny_model):
    with pytest.raises(error, match=words):
        calibrate(tiny_model(), batches)
    with pytest.raises(error, match=words):
        nbl.perplexity(tiny_model(), batches)


def test_bad_arguments(tiny_model, token_batches):
    model = tiny_model()
    with pytest.raises(ValueError, match="features"):
        calibrate(model, token_batches(1), features="norm")
    with pytest.raises(TypeError, match="memory"):
        calibrate(model, token_batches(1), memory=object())
    with pytest.raises(ValueError, match="out of range"):
        calibrate(model, token_batches(1), layers=[7])
    with pytest.raises(ValueError, match="none to observe"):
        calibrate(model, token_batches(1), layers=[])
    with pytest.raises(ValueError, match="float64"):
        calibrate(model.double(), token_batches(1))


def test_not_finite_activations_are_named(tiny_model, token_batches):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="batch 0, layer 2"):
        calibrate(model, token_batches(2))


def test_few_tokens(tiny_model, token_batches):
    model = tiny_model()
    with pytest.warns(UserWarning, match="1600 or more"):
        cal = nbl.calibrate(model, [token_batches(1)[0][:1, :1]], progress=False)
    assert cal.tokens == 1
    with pytest.raises(ValueError, match="2 tokens"):
        cal.solve()
    masked = {"input_ids": token_batches(1)[0], "attention_mask": torch.zeros(4, 32)}
    empty = calibrate(model, [masked])
    assert empty.tokens == 0
    for call in (empty.solve, lambda: empty.rank("cosine"), lambda: empty.rank("cca")):
        with pytest.raises(ValueError, match="token"):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nbl.calibrate(model, token_batches(13), progress=False)  # 1664 tokens


def test_singular_moments_are_solved_or_named(tiny_model, token_batches):
    """Fewer tokens than features, and an attention that is always zero: finite maps."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    cal = calibrate(model, [token_batches(1)[0][:1, :9]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solved = cal.solve()
    for s in solved.values():
        assert s.weight.isfinite().all() and s.bias.isfinite().all()
    assert not solved[1].weight.any()
    with pytest.raises(ValueError, match="layer 5"):
        cal.moments(5)


def test_progress(tiny_model, token_batches, capfd):
    model, batches = tiny_model(), token_batches(3)
    calls = []
    calibrate(model, batches, progress=lambda *a: calls.append(a))
    assert calls == [(128, 384), (256, 384), (384, 384)]
    calls.clear()
    calibrate(model, iter(batches), progress=lambda *a: calls.append(a))
    assert calls == [(128, None), (256, None), (384, None)]
    calibrate(model, batches, progress=True)
    captured = capfd.readouterr()
    assert "384 tokens" in captured.err and captured.out == ""


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["post-norm", "pre-norm"])
def test_save_and_load(features, tiny_model, token_batches, tmp_path):
    model, batches = tiny_model(), token_batches(4)
    cal = calibrate(model, batches, features=features, layers=[0, 2])
    cal.save(tmp_path / "a" / "b")
    loaded = nbl.Calibration.load(str(tmp_path / "a" / "b"))
    assert_identical(loaded, cal)
    assert repr(loaded) == repr(cal) and loaded.fingerprint == cal.fingerprint
    assert loaded.rank("cca") == cal.rank("cca")
    loaded.merge(calibrate(model, batches, features=features, layers=[0, 2]))
    loaded.save(tmp_path / "a" / "b")  # over the former
    assert nbl.Calibration.load(tmp_path / "a" / "b").tokens == 2 * cal.tokens
    assert sorted(os.listdir(tmp_path / "a" / "b")) == [
        "calibration.json",
        "calibration.safetensors",
    ]
    header = json.loads((tmp_path / "a" / "b" / "calibration.json").read_text())
    assert header["format"] == "nbl-calibration" and header["model_type"] == "llama"


def test_damaged_files_are_refused(tiny_model, token_batches, tmp_path):
    cal = calibrate(tiny_model(), token_batches(2))
    tensors, header = tmp_path / "calibration.safetensors", tmp_path / "calibration.json"
    with pytest.raises(FileNotFoundError, match="no calibration"):
        nbl.Calibration.load(tmp_path)

    def refused(words):
        with pytest.raises(ValueError, match=words):
            nbl.Calibration.load(tmp_path)
        cal.save(tmp_path)

    cal.save(tmp_path)
    good = tensors.read_bytes()
    for size in (0, 4, 100, len(good) // 2, len(good) - 1):
        tensors.write_bytes(good[:size])
        refused("calibration.safetensors")
    tensors.write_bytes(os.urandom(5000))
    refused("calibration.safetensors")
    save_file({"weight": torch.zeros(3)}, tensors)
    refused("not a calibration file")
    text = header.read_text()
    header.write_text(text[:40])
    refused("calibration.json.*cut short")
    header.write_text('{"model_type": "llama"}')
    refused("calibration.json: not a calibration file")
    header.write_text(text.replace('"format_version": 1', '"format_version": 99'))
    refused("format version 99")

    def change(function):
        state = load_file(tensors)
        function(state)
        save_file(state, tensors, {"nbl-calibration": text})

    change(lambda s: s.pop("layers.1.cosine_and_square"))
    refused("not a complete calibration")
    name = next(n for n in load_file(tensors) if n.startswith("layers.2.") and "gram" in n)
    change(lambda s: s.pop(name))
    refused("not a complete calibration")
    change(lambda s: s.update({name: torch.zeros(3, 3, dtype=torch.float64)}))
    refused("not a complete calibration")
    change(lambda s: s.update({"layers.0.moments.count": torch.tensor(7)}))
    refused("tokens")
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r"calibration\.safetensors is missing"):
        nbl.Calibration.load(tmp_path)


# --- resuming ------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import nbl, tiny

def progress(tokens, total):
    if tokens >= 7 * 128:
        os.kill(os.getpid(), signal.SIGKILL)

nbl.calibrate(
    tiny.make_tiny_model(), tiny.make_token_batches(10), checkpoint=sys.argv[1],
    checkpoint_seconds=0, progress=progress,
)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_calibration_resumes_to_the_same_result(tiny_model, token_batches, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = tmp_path / "checkpoint"
    run = [sys.executable, str(script), str(folder), os.path.dirname(tiny.__file__)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    model, batches = tiny_model(), token_batches(10)
    stored = nbl.Calibration.load(folder)
    assert 0 < stored.batches <= 7
    forwards = []
    handle = model.model.register_forward_hook(lambda *_: forwards.append(1))
    resumed = calibrate(model, iter(batches), checkpoint=folder)
    handle.remove()
    assert len(forwards) == 10 - stored.batches
    assert_identical(resumed, calibrate(model, batches))
    assert_identical(nbl.Calibration.load(folder), resumed)
    # finished: nothing left to run, and more batches go on from there
    assert_identical(calibrate(model, batches, checkpoint=folder), resumed)
    more = token_batches(12)
    assert_identical(calibrate(model, more, checkpoint=folder), calibrate(model, more))


def test_checkpoint_of_something_else_is_refused(tiny_model, token_batches, tmp_path):
    model, batches = tiny_model(), token_batches(4)
    calibrate(model, batches[:3], checkpoint=tmp_path)
    before = nbl.Calibration.load(tmp_path)
    other = [batches[0], batches[2], batches[1], batches[3]]
    for words, kwargs in (
        ("features", {"features": "pre-norm"}),
        ("layers", {"layers": [0]}),
        ("model_type", {"model": tiny_model("qwen3")}),
        ("fingerprint", {"model": tiny_model(rms_norm_eps=1e-3)}),
        ("other batches", {"batches": other}),
        ("counted 3 batches", {"batches": batches[:2]}),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate(**{"model": model, "batches": batches, "checkpoint": tmp_path} | kwargs)
        assert_identical(nbl.Calibration.load(tmp_path), before)
    (tmp_path / "calibration.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        calibrate(model, batches, checkpoint=tmp_path)
    # killed before the first state was complete: as if nothing was there
    (tmp_path / "calibration.safetensors").unlink()
    assert_identical(calibrate(model, batches, checkpoint=tmp_path), calibrate(model, batches))


def test_an_error_between_batches_keeps_what_was_counted(tiny_model, token_batches, tmp_path):
    model, batches = tiny_model(), token_batches(5)

    def failing():
        yield from batches[:3]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        calibrate(model, failing(), checkpoint=tmp_path)
    assert nbl.Calibration.load(tmp_path).batches == 3
    assert_identical(calibrate(model, batches, checkpoint=tmp_path), calibrate(model, batches))


def test_an_error_within_a_batch_stores_no_half_counted_batch(tiny_model, token_batches, tmp_path):
    model, batches = tiny_model(), token_batches(5)
    seen = []

    def fail(*_):
        seen.append(1)
        if len(seen) == 3:
            raise MemoryError("of the device")

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        calibrate(model, batches, checkpoint=tmp_path)
    handle.remove()
    assert_identical(calibrate(model, batches, checkpoint=tmp_path), calibrate(model, batches))


def test_interrupt_in_the_middle_of_a_batch(tiny_model, token_batches, tmp_path):
    """Ctrl-C takes effect at the end of the batch, where the sums are right."""
    model, batches = tiny_model(), token_batches(5)
    seen = []

    def interrupt(*_):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handle = model.model.layers[1].register_forward_hook(interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, batches, checkpoint=tmp_path)
    handle.remove()
    assert signal.getsignal(signal.SIGINT) is before
    assert nbl.Calibration.load(tmp_path).batches == 3
    assert_identical(calibrate(model, batches, checkpoint=tmp_path), calibrate(model, batches))
