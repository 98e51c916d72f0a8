"""The command `nbl`: every command's help, JSON and exit codes; hostile input."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import transformers
from command import COMMANDS, TEXT, nbl, refusal_of, result_of
from nbl import Calibration, demo, pipeline, windowed_layers
from nbl.pipeline import disagreements
from nbl_cli import app as cli
from nbl_cli import options

pytestmark = pytest.mark.usefixtures("offline")


def test_defaults_are_those_of_the_pipeline():
    for name in ("LOSS_TOKENS", "CALIBRATION_TOKENS"):
        assert getattr(options, name) == getattr(pipeline, name)


# ---- help, JSON, results -------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    done = nbl(command, "--help")
    assert done.exit_code == 0
    assert re.search(rf"Examples?: nbl {command}", done.stdout)
    assert "--json" in done.stdout


def test_help_lists_the_commands():
    done = nbl("--help")
    assert done.exit_code == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_calibrate_and_rank(tiny, book, tmp_path):
    found = result_of(
        "calibrate",
        tiny,
        "--text",
        book,
        "-o",
        "cal",
        "--length",
        64,
        "--max-tokens",
        2000,
        "--features",
        "pre-norm",
    )
    assert found["calibration"] == {
        "text": [book],
        "tokens": 2000 // 64 * 64,
        "length": 64,
        "features": "pre-norm",
    }
    assert set(found["scores"]) == {"residual", "cca", "nmse", "cosine"}
    assert (tmp_path / "cal" / "nbl_report.json").is_file()

    ranked = result_of("rank", "cal")
    assert ranked["scores"] == found["scores"]
    assert all(sorted(order) == [0, 1, 2, 3] for order in ranked["order"].values())
    with_loss = result_of("rank", "cal", "--model", tiny, "--text", book, "--max-tokens", 500)
    assert set(with_loss["scores"]) == {"loss", *found["scores"]}
    measured = ("--model", tiny, "--text", book, "--max-tokens", 500)
    greedy = result_of("rank", "cal", *measured, "--layers", 2)
    assert set(greedy["scores"]) == {"greedy", "loss", *found["scores"]}
    assert len(greedy["order"]["greedy"]) == 2 and len(greedy["order"]["loss"]) == 4
    assert "layers: expected --model" in refusal_of("rank", "cal", "--layers", 2)
    assert "count: expected a number from 1 to 4" in refusal_of(
        "rank", "cal", *measured, "--layers", 5
    )


def test_our_own_warnings_are_notes(tiny, book):
    done = nbl("calibrate", tiny, "--text", f"{book}/0.txt", "-o", "cal")
    assert done.exit_code == 0 and re.search(r"note: \d+ tokens are few for 32", done.stderr)


def test_rank_warns_where_criteria_disagree():
    scores = {"loss": [1, 2, 3, 4], "residual": [1, 3, 2, 4], "cca": [4, 3, 2, 1]}
    notes = disagreements(scores)
    assert len(notes) == 2
    assert notes[1] == "cca and loss disagree on 2 of the first 2 layers: 2, 3 by cca, 0, 1 by loss"
    assert disagreements({"residual": [1, 2, None], "cca": [1, 2, None]}) == []


def test_compress_evaluates_and_saves(tiny, book, tmp_path):
    found = result_of("compress", tiny, "--text", book, "--layers", 2, "--sweep", "-o", "out")
    assert found["choice"]["criterion"] == "greedy" and len(found["choice"]["layers"]) == 2
    assert found["choice"]["features"] == "post-norm" and found["choice"]["bias"] is True
    assert set(found["choice"]["ridge_used"].values()) == {1e-4}
    dense, one, two = found["points"]
    assert dense["layers"] == [] and two["layers"] == found["choice"]["layers"]
    per_layer = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8, float32
    assert [p["kv_bytes_per_token"] for p in found["points"]] == [n * per_layer for n in (4, 3, 2)]
    assert all(p["perplexity"] > 1 and p["prefill"] * p["decode"] > 0 for p in found["points"])
    assert one["drop"]["perplexity"] > 1 and two["drop_same"]["layers"] == two["layers"]
    assert found["evaluation"]["text"] == [f"held out of {book}"]
    assert found["other"]["text"] == ["demo:test"] and found["other"]["tokens"] > 0
    assert dense["other"].keys() == {"perplexity"} and two["other"].keys() == {"perplexity", "drop"}
    assert two["other"]["perplexity"] != two["perplexity"]

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("def f1")) == "def f1"
    assert model.config.model_type == "nbl_llama"

    assert "compressed already" in refusal_of(
        "compress", "out", "--text", book, "--layers", 1, "-o", "out2"
    )
    evaluated = result_of("eval", "out", "--text", f"{book}/3.txt")
    assert evaluated["linearized_layers"] == sorted(two["layers"])
    assert evaluated["kv_bytes_per_token"] == 2 * per_layer
    written = result_of("generate", "out", "--prompt", "def f", "--max-new-tokens", 8)
    assert written["new_tokens"] <= 8 and written["prefill_tokens_per_second"] > 0
    quantized = result_of("eval", "out", "--text", f"{book}/3.txt", "--weights", "int8")
    assert quantized["weights"] == "int8" and evaluated["weights"] is None
    assert quantized["weight_bytes"] < 0.4 * evaluated["weight_bytes"]  # of float32
    assert quantized["perplexity"] == pytest.approx(evaluated["perplexity"], rel=0.1)
    assert quantized["perplexity"] != evaluated["perplexity"]
    command = ("generate", "out", "--prompt", "def f", "--max-new-tokens", 3)
    assert result_of(*command, "--weights", "int4")["weights"] == "int4"

    files = result_of("report", "out", "--png")["files"]
    assert sorted(Path(name).name for name in files) == [
        "error_per_layer.png",
        "kv_cache.png",
        "nbl_report.html",
        "perplexity.png",
        "speed.png",
    ]
    again = result_of("compress", tiny, "--layers", "1", "--text", book, "-o", "out", "--overwrite")
    assert again["choice"]["layers"] and not (tmp_path / "out" / "speed.png").exists()


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--layers", "3,1"], {"layers": [3, 1], "criterion": "the user", "method": "nbl"}),
        (
            ["--layers", "1,", "--no-bias", "--rank", "4", "--ridge", "0.01"],
            {"layers": [1], "bias": False, "rank": 4, "ridge": 0.01},
        ),
        (["--layers", "1", "--drop"], {"method": "drop", "criterion": "cosine"}),
        (["--layers", "1", "--preset", "paper"], {"features": "pre-norm", "criterion": "cca"}),
        (
            [
                "--layers",
                "1",
                "--preset",
                "paper",
                "--features",
                "post-norm",
                "--criterion",
                "nmse",
            ],
            {"features": "post-norm", "criterion": "nmse"},
        ),
    ],
)
def test_compress_options(tiny, book, options, expected):
    found = result_of("compress", tiny, "--text", book, "-o", "out", *options)
    assert {key: found["choice"][key] for key in expected} == expected
    assert len(found["points"]) == 2 and "perplexity" not in found["points"][0]
    if "paper" in options:
        assert "expected 524,288 tokens" in found["notes"][-1]


def test_compress_with_a_memory(tiny, book, tmp_path):
    found = result_of("calibrate", tiny, "--text", book, "-o", "cal", "--memory", "--lags", "1,2")
    memory = ["--memory", "--lags", "1,2"]
    options = ["--text", book, "--rank", "4", "--layers", "2,0"]
    plain = result_of(
        "compress",
        tiny,
        "--calibration",
        "cal",
        *options,
        *memory,
        "-o",
        "out",
        "--criterion",
        "nmse",
    )
    assert found["scores"]["nmse"][0] <= plain["scores"]["nmse"][0]  # of full rank there
    expected = {"lags": [1, 2], "decays": {"0": [0.6, 0.95], "2": [0.6, 0.95]}}
    assert plain["choice"]["memory"] == expected
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert model.config.nbl["layers"]["2"]["lags"] == [1, 2]
    chosen = ["--memory", "--decays", "0.3,0.6,0.9", "--choose-decays", "1", "--sequential"]
    found = result_of(
        "compress",
        tiny,
        *options,
        *chosen,
        "--refit-mlp",
        "-o",
        "out2",
        "--eval-text",
        f"{book}/0.txt",
    )
    assert found["choice"]["sequential"] and found["choice"]["refit_mlp"]
    assert all(len(decays) == 1 for decays in found["choice"]["memory"]["decays"].values())
    assert found["points"][1]["perplexity"] > 1
    assert [point["state_bytes"] for point in found["points"]] == [0, 2 * 2 * 4 * 4]
    text = result_of("generate", "out2", "--prompt", "def f", "--max-new-tokens", 8)["text"]
    assert text
    for words, args in (
        ("memory: expected .*has, got", ["--calibration", "cal", "--memory", "--decays", "0.5"]),
        ("lags: expected --memory", ["--lags", "1"]),
        ("decays: expected numbers between commas", ["--memory", "--decays", "x"]),
        ("drop: expected neither", ["--drop", "--memory"]),
        ("refit-mlp: expected sequential", ["--refit-mlp"]),
        ("sequential: expected no sweep", ["--sequential", "--sweep"]),
    ):
        refused = refusal_of("compress", tiny, "--text", book, "--layers", 1, "-o", "no", *args)
        assert re.search(words, refused)
    assert not (tmp_path / "no").exists()


def test_compress_with_a_window(tiny, book):
    options = ["--text", book, "--layers", 2, "--window", 9, "--sinks", 2, "--eval"]
    found = result_of("compress", tiny, *options, "-o", "out")
    assert found["choice"]["window"] == {"size": 9, "sinks": 2}
    dense, point = found["points"]
    token = 2 * 2 * 8 * 4  # keys and values, heads, dimensions, bytes
    assert (dense["kv_bytes_per_token"], point["kv_bytes_per_token"]) == (4 * token, 2 * token)
    assert (dense["state_bytes"], point["state_bytes"]) == (0, 2 * 11 * token)
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert sorted(found["choice"]["layers"]) == windowed_layers(model)
    seen = result_of("eval", "out", "--text", f"{book}/1.txt")
    assert seen["windowed_layers"] == windowed_layers(model)
    assert seen["state_bytes"] == 2 * 11 * token and seen["linearized_layers"] == []
    for args, words in (
        (["--sinks", 1], "sinks: expected --window"),
        (["--window", 9, "--memory"], "window: expected no memory"),
    ):
        refused = refusal_of("compress", tiny, "--text", book, "--layers", 1, "-o", "no", *args)
        assert words in refused


def test_compress_by_a_plan(tiny, book, tmp_path):
    options = ["--text", book, "--context", 1000, "--batch", 4, "--window", 40]
    found = result_of("compress", tiny, *options, "--kv-bytes", 0.5, "--speedup", 1.2, "-o", "out")
    choice = found["choice"]
    assert choice["kv_share"] <= 0.5 and choice["byte_ratio"] >= 1.2
    assert (choice["context"], choice["batch"], choice["criterion"]) == (1000, 4, "plan")
    kinds = {int(layer): kind for layer, kind in choice["kinds"].items()}
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert sorted(kinds) == sorted(map(int, model.config.nbl["layers"]))
    assert set(kinds.values()) <= {"window 40+1", "map", "drop"}
    shown = nbl("compress", tiny, *options, "--kv-bytes", 0.5, "-o", "again")
    assert shown.exit_code == 0 and "The plan for 4 x 1,000 tokens" in shown.stdout
    report = nbl("report", "out", "-o", "report.html")
    assert report.exit_code == 0, report.stderr
    page = (tmp_path / "report.html").read_text()
    assert "Plan, step by step" in page and "Made for 4 sequences of 1000 tokens" in page
    for args, words in (
        ([], "layers, speedup, kv_bytes: expected"),
        (["--layers", 1, "--speedup", 1.2], "got both"),
        (["--speedup", 99], "speedup: expected at most"),
        (["--kv-bytes", 0.5, "--drop"], "drop: expected none with a plan"),
    ):
        assert words in refusal_of("compress", tiny, "--text", book, "-o", "no", *args)


def test_compress_from_a_calibration(tiny, book, calibrated):
    found = result_of("compress", tiny, "--calibration", calibrated, "--layers", 2, "-o", "out")
    assert found["choice"]["criterion"] == "residual"
    found = result_of(
        "compress",
        tiny,
        "--calibration",
        calibrated,
        "--layers",
        1,
        "-o",
        "out2",
        "--text",
        book,
        "--eval-text",
        f"{book}/0.txt",
    )
    assert found["choice"]["criterion"] == "greedy" and found["points"][1]["perplexity"] > 1
    assert "features: expected post-norm" in refusal_of(
        "compress",
        tiny,
        "--calibration",
        calibrated,
        "--layers",
        1,
        "-o",
        "out3",
        "--preset",
        "paper",
    )
    assert "eval-text: expected" in refusal_of(
        "compress",
        tiny,
        "--calibration",
        calibrated,
        "--layers",
        1,
        "-o",
        "out3",
        "--eval",
        "--text",
        book,
    )


def test_several_texts_after_one_option(tiny, book):
    texts = [f"{book}/{i}.txt" for i in range(3)]
    spread = result_of("eval", tiny, "--text", *texts, "--length", 64)
    repeated = result_of(
        "eval", tiny, *(x for text in texts for x in ("--text", text)), "--length", 64
    )
    assert spread["text"] == texts and spread["nll"] == repeated["nll"]
    assert cli._spread_texts(["eval", "--text", "a", "m"]) == ["eval", "--text", "a", "m"]
    assert cli._spread_texts(["eval", "m", "--text=a", "b", "--json"]) == [
        "eval",
        "m",
        "--text=a",
        "--text",
        "b",
        "--json",
    ]


def test_several_texts_take_turns(tiny, book, tmp_path):
    """Of each its share, however few tokens are read."""
    (tmp_path / "long.txt").write_text("zz qq " * 4000)
    read = ["--text", f"{book}/1.txt", "long.txt", "--max-tokens", 600]
    found = result_of("calibrate", tiny, *read, "--mix", "1,1", "-o", "cal")
    first = Calibration.load(found["output"]).batches_digest
    alone = result_of(
        "calibrate", tiny, "--text", f"{book}/1.txt", "--max-tokens", 600, "-o", "one"
    )
    assert first != Calibration.load(alone["output"]).batches_digest
    for given in ("1", "1,0", "1,x", "1,1,1"):
        refused = refusal_of("calibrate", tiny, *read, "--mix", given, "-o", "no")
        assert "mix: expected a positive number for each of 2 texts" in refused


def test_chats_go_through_the_template(tiny, book, tmp_path):
    rows = [{"messages": [{"role": "user", "content": TEXT[:300]}]}, {"text": TEXT[300:600]}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused = refusal_of("eval", tiny, "--text", "chat.jsonl")
    assert "chat template for the messages at chat.jsonl:1" in refused
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    shutil.copytree(tiny, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = result_of("eval", "model", "--text", "chat.jsonl", "--length", 100)
    contents = [
        tokenizer(TEXT[a:b], add_special_tokens=False).input_ids for a, b in ((0, 300), (300, 600))
    ]
    tokens = len(contents[0]) + 1 + len(contents[1])
    assert tokens % 100 >= 32  # so that none is left out
    assert found["tokens"] == tokens - -(-tokens // 100)  # the first of every row is not predicted
    chats = [
        json.dumps({"messages": [{"role": "user", "content": f"{i} {TEXT[:200]}"}]})
        for i in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    found = result_of(
        "compress", "model", "--text", "chats.jsonl", "--layers", 1, "--eval", "-o", "out"
    )
    assert found["points"][1]["perplexity"] > 1
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.chat_template == tokenizer.chat_template


def test_eval_and_generate_read_stdin(tiny):
    assert result_of("eval", tiny, "--text", "-", input=TEXT[:500])["tokens"] > 50
    assert (
        result_of("generate", tiny, "--prompt", "-", "--max-new-tokens", 2, input="def")["prompt"]
        == "def"
    )


def test_generate_streams_and_repeats_with_a_seed(tiny):
    sampled = [
        "generate",
        tiny,
        "--prompt",
        "def f1(",
        "--max-new-tokens",
        "12",
        "--temperature",
        "1.5",
        "--top-k",
        "50",
        "--top-p",
        "0.9",
    ]
    first, same = (result_of(*sampled, "--seed", 1) for _ in range(2))
    assert first["text"] == same["text"] != result_of(*sampled, "--seed", 2)["text"]
    done = nbl(*sampled, "--seed", 1)
    assert done.stdout.strip() == first["text"].strip()
    assert "tokens/s" in done.stderr


def test_demo(tiny, monkeypatch, tmp_path):
    """With another model in place of the shipped one: the real one takes a minute or two."""

    def load(dtype):
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(tiny)

    monkeypatch.setattr(demo, "load", load)
    monkeypatch.setattr(demo, "model_dir", lambda: Path(tiny))
    monkeypatch.setattr(demo, "documents", lambda split: [f"{split} {TEXT[:3000]}"])
    found = result_of("demo")
    assert [len(point["layers"]) for point in found["points"]] == [0, 1, 2]
    assert len(found["choice"]["layers"]) == 2
    assert set(found["samples"]["continuations"]) == {"dense", "NBL-2"}
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nbl-demo")
    assert saved.config.model_type == "nbl_llama"
    assert "is not empty" in refusal_of("demo")
    assert nbl("demo", "--overwrite").exit_code == 0


def test_doctor(monkeypatch):
    found = result_of("doctor")
    assert found["ok"] and found["build"]["cpu_capability"] and found["versions"]["torch"]
    import nbl_kernels

    right = nbl_kernels.norm_linear
    monkeypatch.setattr(nbl_kernels, "norm_linear", lambda *args, **more: 0 * right(*args, **more))
    done = nbl("doctor", "--json")
    assert done.exit_code == 1
    problems = {f["name"] for f in json.loads(done.stdout)["findings"] if f["status"] == "problem"}
    # the kernel by itself, and in the small model
    assert {name.partition(" (")[0] for name in problems} == {
        "norm_linear",
        "nbl with transformers",
    }


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, message",
    [
        (["eval", "no/such/model", "--text", "TEXT"], "model: expected .*'no/such/model'"),
        (["eval", "BOOK", "--text", "TEXT"], "model: expected .*no config.json"),
        (["eval", "TINY"], "text: expected --text"),
        (["eval", "TINY", "--text", "nowhere.txt"], "text: expected a file .*'nowhere.txt'"),
        (["eval", "TINY", "--text", "EMPTY"], "text: .*holds none"),
        (["eval", "TINY", "--text", "BINARY"], "text: expected UTF-8 .*binary.txt"),
        (
            ["eval", "TINY", "--text", "TEXT", "--length", "129"],
            "length: expected at most 128.* 129",
        ),
        (["eval", "TINY", "--text", "TEXT", "--length", "x"], "--length"),
        (["eval", "TINY", "--text", "TEXT", "--device", "cuda:99"], "device: .*'cuda:99'"),
        (["eval", "TINY", "--text", "TEXT", "--device", "abacus"], "device: .*'abacus'"),
        (["eval", "TINY", "--text", "TEXT", "--dtype", "int3"], "--dtype"),
        (["generate", "TINY", "--prompt", ""], "prompt: expected"),
        (
            ["generate", "TINY", "--prompt", "x", "--max-new-tokens", "500"],
            "max-new-tokens: .* 500",
        ),
        (["generate", "TINY"], "--prompt"),
        (["rank", "BOOK"], "calibration"),
        (["rank", "BOOK", "--text", "TEXT"], "model: expected --model"),
        (["report", "BOOK"], "dir: expected .*nbl_report.json"),
        (["calibrate", "TINY", "--text", "TEXT"], "output"),
        (["nonsense"], "nonsense"),
        (["eval", "TINY", "--nonsense"], "--nonsense"),
        (
            ["compress", "TINY", "--text", "TEXT", "-o", "out", "--layers", "1", "--eval"],
            "two different documents",
        ),
        *(
            (
                ["compress", "TINY", "--text", "TEXT", "-o", "out", "--layers", layers],
                f"layers: expected a number from 1 to 4.*{layers}",
            )
            for layers in ("0", "5", "-1", "x", "1,9", "1,1", ",", "1.5")
        ),
    ],
)
def test_refusals_name_what_is_wrong(tiny, book, tmp_path, args, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfd")
    places = {
        "TINY": tiny,
        "BOOK": book,
        "TEXT": f"{book}/1.txt",
        "EMPTY": "empty.txt",
        "BINARY": "binary.txt",
    }
    assert re.search(message, refusal_of(*(places.get(arg, arg) for arg in args)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary.txt", "empty.txt"]


def test_plots_name_the_extra_that_is_missing(calibrated, monkeypatch):
    monkeypatch.setattr("nbl_cli.show.has_matplotlib", lambda: False)
    assert "the extra nbl_kernels[report]" in refusal_of("report", calibrated)


@pytest.fixture
def before_the_work(monkeypatch):
    """Nothing is calibrated: what follows must be refused before."""

    def calibrate(*_, **__):
        pytest.fail("calibrated, then refused")

    monkeypatch.setattr(sys.modules["nbl"], "calibrate", calibrate)


COMPRESS = ("compress", "TINY", "--text", "BOOK", "--layers", 1, "-o", "out")
CALIBRATE = ("calibrate", "TINY", "--text", "BOOK", "-o", "out")


@pytest.mark.parametrize("command", [COMPRESS, CALIBRATE, ("demo", "-o", "out")])
def test_a_full_disk_is_found_before_the_work(
    tiny, book, tmp_path, monkeypatch, before_the_work, command
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12_345))
    args = [{"TINY": tiny, "BOOK": book}.get(arg, arg) for arg in command]
    refused = refusal_of(*args)
    assert re.search(r"output: expected [\d,]{6,} bytes free .* has 12,345", refused)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved_is_found_before_the_work(
    tiny, book, tmp_path, monkeypatch, before_the_work
):
    args = [{"TINY": tiny, "BOOK": book}.get(arg, arg) for arg in COMPRESS]
    assert "rank: expected at most 32" in refusal_of(*args, "--rank", 33)
    # The output is the first thing to be looked at: before the model, which is not there.
    refused = refusal_of("compress", "no/model", *args[2:-1], tmp_path / "no" / "out")
    assert "output: expected a path in an existing folder" in refused

    def save_vocabulary(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", save_vocabulary)
    assert "its tokenizer cannot: NotImplementedError" in refusal_of(*args)
    assert not list(tmp_path.iterdir())


def test_a_published_generation_config_is_kept(tiny, book, tmp_path):
    """What transformers warns about when it loads it, it may refuse to save."""
    published = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 1]}
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(published))
    result_of("compress", "model", "--text", book, "--layers", 1, "-o", "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {**saved, "transformers_version": None} == {**published, "transformers_version": None}


def test_an_inner_error_is_one_line_with_another_exit_code(tiny, book, monkeypatch):
    def broken(*_):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(sys.modules["nbl"], "perplexity", broken)
    line = refusal_of("eval", tiny, "--text", book, code=1)
    assert "RuntimeError: two lines (NBL_DEBUG=1" in line
    monkeypatch.setenv("NBL_DEBUG", "1")
    assert isinstance(nbl("eval", tiny, "--text", book).exception, RuntimeError)
