"""`nbl bench` and what it counts; who takes turns when; peers in processes of their own."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nbl import benchmark, demo
from nbl.engines import EAGER, model_engines, our_engines, twin
from nbl_cli import app as cli
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEERS = BENCHMARKS / "studies" / "peers"
QUICK = ("--context", 16, "--repetitions", 2, "--steps", 2)
OURS = ["ours dense", "ours NBL-3"]


def bench(*args):
    done = CliRunner().invoke(cli.app, ["bench", "demo", *map(str, args)])
    assert "Traceback" not in done.stderr
    return done


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(the JSON result, the table, the plot) of one run."""
    plot = tmp_path_factory.mktemp("bench") / "speed.png"
    done = bench(*QUICK, "--batch", "1,2", "--layers", "0,3", "-o", plot, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout), done.stderr, plot.read_bytes()


def test_every_case_and_every_bar(measured):
    record, shown, _ = measured
    cases = [(case["kind"], case["batch"], case["context"]) for case in record["cases"]]
    assert cases == [(kind, batch, 16) for kind in ("decode", "prefill") for batch in (1, 2)]
    for case in record["cases"]:
        assert [row["engine"] for row in case["rows"]] == [EAGER, *OURS]
        assert [row["layers"] for row in case["rows"]] == [0, 0, 3]
        assert case["absent"] == {} and case["in_turns"]
        assert case["limit"]["rate"] == max(case["rates"].values())
        for row in case["rows"]:
            assert len(row["samples"]) == 2
            figures = ("tokens_per_second", "ceiling", "percent_of_ceiling", "times_eager", "work")
            assert all(row[name] > 0 for name in figures)
            low, high = row["quartiles"]
            assert low <= row["tokens_per_second"] <= high
    for text in (*OURS, "ceiling, dense", "ceiling, NBL-3", "% of ceiling", "maps are random"):
        assert text in shown
    assert record["conditions"]["threads"] == torch.get_num_threads()


def test_the_dense_engines_say_the_same(measured):
    for case in measured[0]["cases"]:
        assert [row["first_token_agrees"] for row in case["rows"]] == [True, True, None]


def test_the_plot_is_a_png_that_nbl_replaces(measured, tmp_path, monkeypatch):
    image = measured[2]
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    path = tmp_path / "speed.png"
    path.write_bytes(image)
    one = ("--kind", "prefill", "--layers", "0", "-o", path)
    assert bench(*QUICK, *one).exit_code == 0
    assert path.read_bytes() != image
    path.write_bytes(b"mine")
    monkeypatch.setattr(benchmark, "sweep", None)  # refused before anything is measured
    refused = bench(*QUICK, *one)
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "options, message",
    [
        (("--batch", "0"), "batch: expected numbers from 1 on"),
        (("--batch", "1,x"), "batch: expected numbers from 1 on (as 1,8), got '1,x'"),
        (("--layers", "2,2"), "layers: expected numbers"),
        (("--layers", "99"), "layers: expected numbers from 0"),
        (("--context", "1000000"), "context: expected at most"),
        (("--context", "8", "--steps", "8"), "context: expected at least"),
        (("--device", "cuda:9"), "device: expected"),
    ],
)
def test_what_is_refused(options, message):
    done = bench(*options)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


# ---- what is counted -----------------------------------------------------------------------------


def test_quantized_engines_read_fewer_bytes():
    done = bench(*QUICK, "--kind", "decode", "--layers", "0,3", "--weights", "int8", "--json")
    assert done.exit_code == 0, done.stderr
    eager, dense, nbl_3 = json.loads(done.stdout)["cases"][0]["rows"]
    assert [dense["engine"], nbl_3["engine"]] == ["ours dense, int8", "ours NBL-3, int8"]
    assert nbl_3["work"] < dense["work"] < eager["work"] / 2  # of float32


@pytest.mark.parametrize("tie", [True, False])
def test_decode_reads_every_weight_once_and_the_cache(tiny_model, tie):
    model = tiny_model("llama", tie_word_embeddings=tie)
    embedding = model.model.embed_tokens.weight.nbytes
    weights = sum(p.nbytes for p in model.parameters()) - (0 if tie else embedding)
    a_token = 4 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, float32
    assert benchmark.decode_bytes(model, 3, 10) == weights + 3 * 10 * a_token
    dense, nbl_3 = (e.model for e in our_engines(model, [0, 3]))
    assert benchmark.decode_bytes(dense, 3, 10) == weights + 3 * 10 * a_token
    q, k = 32 * 32, 16 * 32  # of each linearized layer go q, k, v and o, and a map with bias comes
    assert benchmark.decode_bytes(nbl_3, 3, 10) == (
        weights + 3 * 4 * (32 * 32 + 32 - 2 * q - 2 * k) + 3 * 10 * a_token // 4
    )


def test_a_sliding_window_bounds_what_is_read(tiny_model):
    model = tiny_model("mistral", sliding_window=8)
    assert benchmark.decode_bytes(model, 1, 8) == benchmark.decode_bytes(model, 1, 100)


def test_prefill_flops_are_those_that_pytorch_counts(tiny_model):
    model = tiny_model("llama")
    model.set_attn_implementation("eager")  # of others the counter misses the attention on a CPU
    length, q_size = 12, 4 * 8
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, length, dtype=torch.long), logits_to_keep=1, use_cache=False)
    masked = 4 * 2 * length * (length - 1) / 2 * q_size * 4  # PyTorch counts the upper half too
    rotary = sum(  # a product in some versions of transformers; of angles, not of the model
        sum(flops.values())
        for module, flops in counter.get_flop_counts().items()
        if module.endswith(".rotary_emb")
    )
    assert benchmark.prefill_flops(model, 2, length) == counter.get_total_flops() - masked - rotary


def test_engines_share_the_weights_and_transformers_has_its_own(tiny_model):
    eager, dense, nbl_2 = model_engines(tiny_model("llama"), [0, 2])

    def address(engine, layer):
        return engine.model.model.layers[layer].mlp.down_proj.weight.data_ptr()

    for layer in (0, 3):
        assert address(dense, layer) == address(nbl_2, layer) != address(eager, layer)
    shared = twin(dense.model, share=True)
    assert shared.model.layers[0].mlp.up_proj.weight.data_ptr() == (
        dense.model.model.layers[0].mlp.up_proj.weight.data_ptr()
    )
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        assert torch.equal(shared(ids).logits, eager.model(ids).logits)


def test_a_compressed_model_is_measured_as_it_is(tiny_model):
    model = tiny_model("llama")
    (nbl_2,) = our_engines(model, [2])
    with pytest.raises(ValueError, match=r"layers: expected numbers from 2 .* got 0"):
        our_engines(nbl_2.model, [0])


# ---- turns ---------------------------------------------------------------------------------------


class Fake:
    """An engine that writes down what it is asked."""

    def __init__(self, name, model, calls, fails=None, optional=False, room_for=9, lasts=9):
        self.name, self.model, self.calls, self.optional = name, model, calls, optional
        self.fails, self.room_for, self.lasts = fails, room_for, lasts
        self.is_open = False

    def prefill(self, prompts, room):
        if self.fails:
            raise self.fails
        self.is_open = True
        if sum(engine.is_open for engine in Fake.all) > self.room_for:
            raise torch.OutOfMemoryError("no room")
        self.calls.append(f"{self.name} begins")
        return 1.0, [7]

    def decode(self, steps):
        if self.calls.count(f"{self.name} {steps}") == self.lasts:
            raise RuntimeError("it ended")
        self.calls.append(f"{self.name} {steps}")
        return 0.5

    def close(self):
        self.is_open = False


def take_turns(engines):
    Fake.all = engines
    options = {"steps": 4, "repetitions": 2, "bandwidth": lambda: {"fake": 1e9}}
    return benchmark.measure_decode(engines, batch=2, context=16, **options)


def test_engines_take_turns(tiny_model):
    calls, model = [], tiny_model("llama")
    case = take_turns([Fake("a", model, calls), Fake("b", model, calls)])
    begun = ["a begins", "a 2", "b begins", "b 2"]
    assert calls == [*begun, "a 4", "b 4", "a 4", "b 4"]
    assert case["prompt_tokens"] + 11 // 2 == 16  # 1 + 2 + 2 x 4 new tokens, half of them before
    assert [row["tokens_per_second"] for row in case["rows"]] == [16.0, 16.0]
    assert case["rows"][0]["ceiling"] == 2 * 1e9 / benchmark.decode_bytes(model, 2, 16)
    assert case["rows"][0]["times_eager"] is None


def test_who_fails_is_absent_if_it_may(tiny_model):
    calls, model = [], tiny_model("llama")
    broken = {"fails": RuntimeError("no compiler\nat all")}
    case = take_turns([Fake("a", model, calls), Fake("b", model, calls, optional=True, **broken)])
    assert case["absent"] == {"b": "RuntimeError: no compiler"}
    assert [row["engine"] for row in case["rows"]] == ["a"]
    with pytest.raises(RuntimeError, match="no compiler"):
        take_turns([Fake("a", model, calls), Fake("b", model, calls, **broken)])
    case = take_turns([Fake("b", model, [], optional=True, lasts=1), Fake("a", model, [])])
    assert case["absent"] == {"b": "RuntimeError: it ended"}  # in the second repetition
    assert [(row["engine"], len(row["samples"])) for row in case["rows"]] == [("a", 2)]


def test_without_room_for_all_they_go_one_by_one(tiny_model):
    calls, model = [], tiny_model("llama")
    engines = [Fake("a", model, calls, room_for=1), Fake("b", model, calls, room_for=1)]
    engines.append(Fake("c", model, calls, room_for=0))
    case = take_turns(engines)
    assert not case["in_turns"]
    assert [row["engine"] for row in case["rows"]] == ["a", "b"]
    assert case["absent"] == {"c": "out of memory"}
    one_by_one = [[f"{name} begins", f"{name} 2", f"{name} 4", f"{name} 4"] for name in "ab"]
    assert calls == ["a begins", "a 2", *one_by_one[0], *one_by_one[1]]


# ---- peers ---------------------------------------------------------------------------------------

WORKER = """
from serve import serve
class Engine:
    def prepare(self, prompts, room): self.first = [row[0] + room for row in prompts]
    def prefill(self, prompts): print("not an answer")
    def decode(self, steps): assert steps < 9, "too many"
    def tokens(self): return self.first
serve(lambda: (Engine(), {"fake": "1.0"}))
"""


@pytest.fixture
def engines(monkeypatch):
    if not BENCHMARKS.is_dir():
        pytest.skip("the installed package has no benchmarks")
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent))
    monkeypatch.setenv("PYTHONPATH", str(PEERS), prepend=os.pathsep)
    return importlib.import_module("benchmarks.studies.engines")


def test_a_peer_answers_from_its_own_process(engines, tmp_path):
    log = tmp_path / "log"
    peer = engines.Peer("fake", None, [sys.executable, "-c", WORKER], log)
    try:
        peer.wait()
        assert peer.settings == {"fake": "1.0"}
        seconds, first = peer.prefill(torch.tensor([[3, 4], [5, 6]]), room=10)
        assert seconds >= 0 and first == [13, 15]
        assert peer.decode(8) >= 0
        assert "not an answer" in log.read_text()
        with pytest.raises(RuntimeError, match="it ended: AssertionError: too many"):
            peer.decode(9)
    finally:
        peer.stop()


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_benchmarks_run_without_peers(engines, tmp_path, kind):
    out = tmp_path / "out.json"
    options = "--shape small --context 16 --layers 2 --repeats 1 --threads 1 --steps 1"
    chosen = "--engines eager,llama.cpp,vllm,dense,nbl --vllm-python /nowhere/python"
    command = [sys.executable, "-m", f"benchmarks.studies.{kind}", *options.split()]
    command += [*chosen.split(), "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    (case,) = record["cases"]
    assert [row["engine"] for row in case["rows"]] == [
        EAGER,
        "ours dense",
        "ours NBL-2",
    ]
    assert "no --llama-cpp-python given" in case["absent"]["llama.cpp"]
    assert "'/nowhere/python' is no program" in case["absent"]["vllm"]
    assert record["environment"]["commit"] and record["shape"]["hidden_size"] == 256
    assert "ceiling, NBL-2" in done.stdout


def test_gguf_holds_the_same_weights(engines, tmp_path):
    import gguf

    model = engines.random_model("small", "cpu")
    model.save_pretrained(tmp_path)
    writer = [sys.executable, PEERS / "write_gguf.py", tmp_path, tmp_path / "m.gguf"]
    subprocess.run(writer, check=True)
    written = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert len(written) == len(list(model.parameters()))
    down = model.model.layers[1].mlp.down_proj.weight
    data = torch.from_numpy(written["blk.1.ffn_down.weight"].data.copy())
    assert torch.equal(data.view(torch.bfloat16).view_as(down), down)


def test_the_demo_model_reads_less_when_linearized():
    model, _ = demo.load()
    dense, half = our_engines(model, [0, model.config.num_hidden_layers // 2])
    assert benchmark.decode_bytes(half.model, 1, 512) < benchmark.decode_bytes(dense.model, 1, 512)
