"""nbl eval --tasks: questions of files and of lm-eval, one model and two, on the shipped model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import nbl, refusal_of, result_of
from nbl import demo, harness, tasks

pytestmark = pytest.mark.usefixtures("offline")

QUESTIONS = [
    ("A list of", ["strings.", "giraffes."], 0),
    ("Return the", ["sandwich", "value", "ocean"], 1),
    ("Raises an", ["elephant", "exception"], 1),
    ("If the argument is", ["None, it is ignored", "hungry"], 0),
    ("The number of", ["mountains", "items"], 0),  # wrong, as the model sees it
]


@pytest.fixture
def files(tmp_path):
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows[::-1])))
    return tmp_path


def test_tasks_of_one_model(files):
    found = result_of("eval", "demo", "--tasks", "a.jsonl:continuation,b.jsonl", "--limit", 4)
    assert "perplexity" not in found and "against" not in found
    assert found["kv_bytes_per_token"] and found["linearized_layers"] == []
    first, second = found["tasks"]
    assert (first["task"], first["style"]) == ("a.jsonl:continuation", "continuation")
    assert (second["task"], second["style"]) == ("b.jsonl", "question")
    model, tokenizer = demo.load()
    for row, style, file in ((first, "continuation", "a"), (second, "question", "b")):
        questions = tasks.load_questions(f"{file}.jsonl", limit=4)
        expected = tasks.answer(model, tokenizer, questions, style=style)
        assert row["right"] == expected.right.int().tolist()
        assert (row["accuracy"], row["stderr"]) == (expected.value, expected.stderr)
        assert row["questions"] == 4 and row["seconds"] > 0
    assert first["accuracy"] >= 0.75


def test_two_models_are_compared(files):
    args = ("eval", "demo", "--weights", "int4", "--against", "demo", "--text", "demo:test")
    args = (*args, "--max-tokens", 600, "--length", 100)
    found = result_of(*args, "--tasks", "a.jsonl")
    other = found["against"]
    assert other["model"] == "demo" and other["weights"] is None and found["weights"] == "int4"
    assert found["perplexity_ratio"] == found["perplexity"] / other["perplexity"] > 1
    (row,) = found["tasks"]
    right, beside = row["right"], row["against"]["right"]
    assert row["difference"] == pytest.approx((sum(right) - sum(beside)) / 5)
    assert row["gained"] - row["lost"] == sum(right) - sum(beside)
    assert row["difference_stderr"] >= 0
    shown = nbl(*args, "--tasks", "a.jsonl").stdout
    assert "times its perplexity" in shown and "difference, points" in shown
    alone = result_of(*args)
    assert "tasks" not in alone and alone["perplexity_ratio"] == found["perplexity_ratio"]


def test_other_tokens_do_not_compare(files, tiny):
    args = ("eval", "demo", "--against", tiny, "--tasks", "a.jsonl", "--text", "demo:test")
    done = nbl(*args, "--max-tokens", 200, "--length", 100, "--json")
    assert done.exit_code == 0 and "perplexities do not compare" in done.stderr
    found = json.loads(done.stdout)
    assert found["perplexity_ratio"] is None and found["tasks"][0]["difference_stderr"] >= 0


def test_a_task_of_lm_eval(monkeypatch, files):
    asked = []

    def answer(model, tokenizer, task, **options):
        asked.append((task, options))
        return tasks.accuracy_of([1, 0, 1])

    monkeypatch.setattr(harness, "check_task", lambda task: None)
    monkeypatch.setattr(harness, "answer", answer)
    found = result_of("eval", "demo", "--tasks", "arc_easy,piqa:acc_norm,a.jsonl", "--limit", 3)
    assert asked == [
        ("arc_easy", {"metric": "acc", "limit": 3}),
        ("piqa", {"metric": "acc_norm", "limit": 3}),
    ]
    assert [row.get("metric") for row in found["tasks"]] == ["acc", "acc_norm", None]
    assert found["tasks"][0]["right"] == [1, 0, 1]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--limit", 3], "limit: expected --tasks beside it"),
        (["--tasks", "a.jsonl", "--limit", 0], "--limit"),
        (["--tasks", ","], "tasks: expected FILE.jsonl[:STYLE] or a task of lm-eval, once each"),
        (["--tasks", "a.jsonl,a.jsonl"], "once each, got 'a.jsonl,a.jsonl'"),
        (["--tasks", "a.jsonl:loud"], "STYLE one of question, continuation, got 'a.jsonl:loud'"),
        (["--tasks", "none.jsonl"], "tasks: expected a file, but 'none.jsonl' does not exist"),
        (["--tasks", "bad.jsonl"], '"answer", an index from 0 to 1, at bad.jsonl:2, got 7'),
        (["--tasks", "empty.jsonl"], "tasks: expected questions, but 'empty.jsonl' holds none"),
        (["--tasks", "one.jsonl"], "a list of at least two, at one.jsonl:1, got ['a']"),
    ],
)
def test_refusals(files, args, message):
    good = {"question": "q", "choices": ["a", "b"], "answer": 0}
    for name, rows in (
        ("bad", [good, good | {"answer": 7}]),
        ("empty", []),
        ("one", [good | {"choices": ["a"]}]),
    ):
        (files / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert message in refusal_of("eval", "no/such/model", *args)  # before the model is looked for


def test_lm_eval_is_an_extra(monkeypatch):
    harness._task_manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    refused = refusal_of("eval", "demo", "--tasks", "arc_easy")
    assert "the extra nbl_kernels[eval]: pip install lm_eval" in refused


def test_the_study(files):
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks").is_dir():
        pytest.skip("the installed package has no benchmarks")
    options = "--model demo --text demo:calibration --calibration-tokens 4096 --threads 1"
    options += f" --tasks {files}/a.jsonl:continuation --passkey 96 --passkey-samples 1"
    options += f" --order mine=3,1 --counts 1,2 --json {files}/out.json"
    command = [sys.executable, "-m", "benchmarks.studies.tasks", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    rows = json.loads((files / "out.json").read_text())["rows"]
    found = [(row["kind"], row["order"], len(row["layers"])) for row in rows]
    maps = [("one-token", order, count) for order in ("cosine", "mine") for count in (1, 2)]
    assert found == [("attention", "", 0), *(("dropped", "cosine", n) for n in (1, 2)), *maps]
    assert rows[-1]["layers"] == [3, 1]
    for row in rows:
        assert list(row["tasks"]) == ["a.jsonl:continuation", "passkey, 96 tokens"]
        for name, facts in row["tasks"].items():
            base = rows[0]["tasks"][name]
            assert len(facts["right"]) == facts["questions"] == 5
            assert facts["difference"] == pytest.approx(facts["accuracy"] - base["accuracy"])
