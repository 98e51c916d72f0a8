"""nbl.compress: it does what calibrate, rank and linearize do; what it measures; refusals."""

from __future__ import annotations

import nbl
import pytest
import torch
from nbl import pipeline
from nbl.text import token_batches
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")


@pytest.fixture(scope="module")
def tokenizer():
    """Words that are numbers, for the tiny models' vocabulary."""
    words = {f"w{i}": i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 97, (12, 90), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in row) for row in rows]


@pytest.fixture
def compress(tiny_model, tokenizer, documents):
    def run(text=documents, model=None, **options):
        model = tiny_model() if model is None else model
        return nbl.compress(model, tokenizer, text, **{"length": 32, "layers": 2} | options)

    return run


KINDS = {
    "defaults": {},
    "ids": {"layers": [3, 1]},
    "criterion": {"criterion": "cca", "features": "pre-norm", "bias": False},
    "memory": {"memory": nbl.Memory(decays=(0.8,)), "rank": 6, "criterion": "residual"},
    "sequential": {"sequential": True, "refit_mlp": True, "criterion": "residual"},
    "window": {"window": nbl.Window(3, 1)},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_calibrate_rank_and_linearize(kind, compress, tiny_model, tokenizer, documents):
    options = KINDS[kind]
    done = compress(**options)
    batches = token_batches(tokenizer, documents, length=32, batch_size=64)
    seen = {name: options[name] for name in ("features", "memory") if name in options}
    model = tiny_model()
    cal = nbl.calibrate(model, batches, progress=False, **seen)
    rest = {name: value for name, value in options.items() if name not in (*seen, "layers")}
    rest = {"criterion": "greedy"} | rest
    nbl.linearize(model, cal, options.get("layers", 2), batches=batches, **rest)
    ids = batches[0][:2]
    assert torch.equal(done.model(ids).logits, model(ids).logits)
    replaced = nbl.windowed_layers if "window" in options else nbl.linearized_layers
    assert sorted(done.layers) == replaced(done.model)
    assert done.choice["layers"] == done.layers and len(done.layers) == 2
    assert done.text == {"tokens": sum(b.numel() for b in batches), "length": 32}
    assert done.evaluation is None and done.speed is None
    assert set(done.maps) == (set() if "window" in options else set(done.layers))
    assert set(done.scores) >= {"residual", "cca"}


@torch.no_grad()
@pytest.mark.parametrize("memory", [None, nbl.Memory(decays=(0.8,))], ids=["", "memory"])
def test_a_plan(memory, compress, tiny_model, tokenizer, documents):
    said = []
    options = {"layers": None, "window": nbl.Window(6, 1), "context": 100, "batch": 2}
    asked = {"speedup": 1.3, "kv_bytes": 0.5}
    done = compress(**options, **asked, memory=memory, eval_text=documents[:3], say=said.append)
    made = done.plan
    assert made.speedup >= 1.3 and made.kv_share <= 0.5 and (made.context, made.batch) == (100, 2)
    assert done.layers == done.choice["layers"] and set(done.layers) == set(made.layers)
    assert done.choice["kinds"] == made.layers and len(done.choice["front"]) == len(made.front)
    again = nbl.plan(
        tiny_model(),
        [done.calibration]
        if memory is None
        else [
            nbl.calibrate(tiny_model(), batches, progress=False, memory=m)
            for batches in [token_batches(tokenizer, documents, length=32, batch_size=64)]
            for m in (None, memory)
        ],
        token_batches(tokenizer, documents, length=32, batch_size=64),
        context=100,
        batch=2,
        speedup=1.3,
        bytes=0.5,
        windows=[nbl.Window(6, 1)],
        ranks=(None,) if memory is None else (None, 8, 4),
    )
    assert again.layers == made.layers and again.loss == pytest.approx(made.loss, abs=1e-6)
    dense, point = done.points
    eval_batches = token_batches(tokenizer, documents[:3], length=32, batch_size=64)
    assert point["perplexity"] == pytest.approx(nbl.perplexity(done.model, eval_batches).value)
    growing = [i for i in range(4) if i not in made.layers]
    assert point["kv_bytes_per_token"] == 2 * 2 * 8 * 4 * len(growing)
    bounded = sum(kind.startswith("window") for kind in made.layers.values())
    states = sum(kind.startswith("memory") for kind in made.layers.values())
    if not states:
        assert point["state_bytes"] == bounded * 7 * 2 * 2 * 8 * 4
    assert dense["state_bytes"] == 0 and said[0] == "planning ..."


def test_a_note_says_that_a_window_is_not_seen(compress):
    options = {"layers": [1], "length": 32}
    (note,) = compress(**options, window=nbl.Window(32)).notes
    assert note.startswith("window: 32 tokens are no fewer") and "(32)" in note
    assert compress(**options, window=nbl.Window(31)).notes == []


def test_a_note_says_where_two_kinds_of_text_part():
    dense = {"layers": [], "perplexity": 10.0, "other": {"perplexity": 20.0}}
    point = {"layers": [1, 2], "perplexity": 11.0, "other": {"perplexity": 26.0, "drop": 30.0}}
    (note,) = pipeline._domain([dense, point])
    assert "2 layers" in note and "1.10 times" in note and "1.30 times" in note and "1.50" in note
    point["other"]["perplexity"] = 22.5  # 1.125: hardly worse than 1.1
    assert pipeline._domain([dense, point]) == []
    assert pipeline._domain([{"layers": [], "perplexity": 10.0}, {**point}]) == []


def test_other_text_is_measured_too(compress, tiny_model, tokenizer, documents):
    same, other = documents[:3], ["quite another text, over and over. " * 40]
    done = compress(eval_text=same, other_text=other)
    read = token_batches(tokenizer, other, length=32, batch_size=64)
    assert done.other == {"tokens": sum(batch.numel() for batch in read), "length": 32}
    dense, point = done.points
    assert dense["other"]["perplexity"] == pytest.approx(nbl.perplexity(tiny_model(), read).value)
    assert point["other"]["perplexity"] == pytest.approx(nbl.perplexity(done.model, read).value)
    dropped = nbl.drop(tiny_model(), point["drop"]["layers"])
    assert point["other"]["drop"] == pytest.approx(nbl.perplexity(dropped, read).value)
    with pytest.raises(ValueError, match="other_text: expected evaluate"):
        compress(other_text=other)


def test_what_it_measures(compress, tiny_model, tokenizer, documents, tmp_path):
    """Each point is what one would measure by hand; progress is told of every pass."""
    seen, said, read = [], [], {}

    def watch(batches, what, passes):
        class Counted(list):
            def __iter__(self):
                read[what] = read.get(what, 0) + 1
                yield from super().__iter__()

        seen.append(what)
        read[what, "planned"] = passes
        return Counted(batches)

    eval_text = documents[:3]
    done = compress(eval_text=eval_text, sweep=True, watch=watch, say=said.append)
    assert seen == ["calibrating", "ranking layers", "measuring perplexity"]
    assert said == ["measuring speed ..."]
    assert read["ranking layers"] == read["ranking layers", "planned"] == 2
    assert read["measuring perplexity"] <= read["measuring perplexity", "planned"]
    assert [point["layers"] for point in done.points] == [[], done.layers[:1], done.layers]
    eval_batches = token_batches(tokenizer, eval_text, length=32, batch_size=64)
    for point in done.points:
        model = tiny_model()
        if point["layers"]:
            nbl.linearize(model, done.calibration, point["layers"])
            dropped = nbl.perplexity(nbl.drop(tiny_model(), point["layers"]), eval_batches).value
            assert point["drop_same"]["perplexity"] == pytest.approx(dropped)
        assert point["perplexity"] == pytest.approx(nbl.perplexity(model, eval_batches).value)
        assert point["kv_bytes_per_token"] == 2 * 2 * 8 * 4 * (4 - len(point["layers"]))
        assert point["prefill"] > 0 and point["decode"] > 0
    assert done.evaluation["tokens"] == sum(b.numel() for b in eval_batches)
    done.model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert nbl.linearized_layers(again) == sorted(done.layers)
    assert type(nbl.restore(done.model)) is type(tiny_model())


def test_a_calibration_that_is_there(compress, tiny_model, token_batches):
    """No text is needed, and the criterion is one that reads none."""
    cal = nbl.calibrate(tiny_model(), token_batches(4), progress=False)
    done = compress(None, calibration=cal)
    assert done.text is None and done.calibration is cal
    assert done.choice["criterion"] == "residual"
    assert done.layers == [score.layer for score in cal.rank("residual")][:2]


def test_dropping(compress):
    done = compress(drop=True)
    assert done.choice == {"method": "drop", "layers": done.layers, "criterion": "cosine"}
    assert {done.model.model.layers[i].spec.kind for i in done.layers} == {"drop"}


def test_the_papers_preset(compress):
    done = compress(preset="paper")
    assert (done.choice["features"], done.choice["criterion"]) == ("pre-norm", "cca")
    assert any("expected 524,288 tokens" in note for note in done.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 0}, "layers: expected a number from 1 to 4, got 0"),
        ({"layers": 5}, "layers: expected a number from 1 to 4, got 5"),
        ({"layers": [1, 9]}, "out of range"),
        ({"criterion": "luck"}, "criterion: expected one of"),
        ({"preset": "fast"}, "preset: expected None or 'paper'"),
        ({"rank": 64}, "rank: expected at most 32"),
        ({"drop": True, "memory": nbl.Memory()}, "drop: expected neither"),
        ({"refit_mlp": True}, "refit_mlp: expected sequential"),
        ({"loss_tokens": 1}, "loss_tokens: expected an int"),
        ({"sweep": [1, 9]}, "sweep: expected True, False or numbers from 1 to 2"),
        ({"sequential": True, "sweep": True}, "sequential: expected no sweep"),
        ({"length": 1000}, "length: expected at most 128"),
        ({"text": None}, "text: expected documents"),
        ({"layers": None}, "layers, speedup, kv_bytes: expected a number of layers .*got neither"),
        ({"speedup": 1.2}, "what a plan is to reach, got both"),
        ({"layers": None, "speedup": 1.2, "drop": True}, "drop: expected none with a plan"),
        ({"layers": None, "kv_bytes": 0.5, "criterion": "cca"}, "criterion: expected none"),
        ({"layers": None, "kv_bytes": 0.5, "sweep": True}, "sweep: expected none with a plan"),
        ({"layers": None, "speedup": 90.0}, "speedup: expected at most"),
        ({"context": 100}, "context, batch: expected speedup or kv_bytes beside them"),
        ({"window": nbl.Window(4), "rank": 4}, "window: expected no memory or rank beside it"),
        ({"window": nbl.Window(4), "drop": True}, "window: expected no drop beside it"),
    ],
    ids=str,
)
def test_refusals_leave_the_model(options, words, compress, tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match=words):
        compress(model=model, **options)
    assert type(model) is type(tiny_model()) and not hasattr(model.config, "nbl")


def test_what_does_not_fit_a_calibration_is_refused(compress, tiny_model, token_batches):
    cal = nbl.calibrate(tiny_model(), token_batches(4), progress=False)
    for options, words in (
        ({"features": "pre-norm"}, "features: expected post-norm"),
        ({"memory": nbl.Memory()}, "memory: expected None"),
        ({"evaluate": True}, "eval_text: expected with a calibration"),
        ({"model": tiny_model(hidden_size=48)}, "of another model"),
    ):
        with pytest.raises(ValueError, match=words):
            compress(calibration=cal, **options)
    with pytest.raises(ValueError, match="compressed already"):
        compress(model=nbl.linearize(tiny_model(), cal, [1]))
