"""Multiple-choice questions: scores are those of one pass over each text alone; files; passkeys."""

import json
import random
import sys
from types import SimpleNamespace

import lm_eval
import nbl
import pytest
import torch
from lm_eval.tasks import TaskManager
from nbl import demo, harness, tasks
from tiny import MAPS, linearize_tiny, make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")

KINDS = {"attention": None, **MAPS, "every layer": {}}


def words(count, seed):
    choose = random.Random(seed)
    return " ".join(f"w{choose.randrange(2, 97)}" for _ in range(count))


@pytest.fixture
def questions():
    """Questions of three lengths, with two to four choices of one to five words."""
    return [
        tasks.Question(
            words(3 + n % 3, n),
            tuple(words(1 + (n * c) % 5, 100 * n + c) for c in range(1, 3 + n % 3)),
            n % 2,
        )
        for n in range(11)
    ]


@pytest.fixture(params=KINDS)
def model(request):
    """With attention only, with some layers replaced by each kind of map, with all of them."""
    kind = request.param
    if kind == "attention":
        return make_tiny_model()
    layers = range(4) if kind == "every layer" else [0, 2]
    return linearize_tiny(make_tiny_model(), layers, **KINDS[kind])


@torch.no_grad()
def plainly(model, tokenizer, before, choice):
    """(log p of a choice's tokens, whether each is the likeliest), by one pass over the text."""
    start, whole = (tokenizer(text).input_ids for text in (before, f"{before} {choice}"))
    logits = model(torch.tensor([whole]), use_cache=False).logits[0].double()
    scores = logits[len(start) - 1 : -1].log_softmax(-1)
    new = torch.tensor(whole[len(start) :])
    return float(scores.gather(-1, new[:, None]).sum()), bool((scores.argmax(-1) == new).all())


def check_scores(model, tokenizer, questions, change=lambda model: None):
    """Against one pass over each text alone, by the model as it was before a change."""
    prompt = tasks.STYLES["question"].prompt
    expected = []
    for q in questions:
        before = prompt.format(question=q.question)
        scores = [plainly(model, tokenizer, before, choice)[0] for choice in q.choices]
        expected.append(torch.tensor(scores))
    change(model)
    for size in (1, 60, 2048):
        found = tasks.log_likelihoods(model, tokenizer, questions, batch_tokens=size)
        for row, right in zip(found, expected, strict=True):
            torch.testing.assert_close(row.float(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change", [lambda model: model.train(), nbl.optimize], ids=["", "optimized"]
)
def test_log_likelihoods(model, change, tokenizer, questions):
    check_scores(model, tokenizer, questions, change)
    assert model.training == (change is not nbl.optimize)


def test_log_likelihoods_of_every_family(family, tokenizer, questions):
    check_scores(make_tiny_model(family), tokenizer, questions)


def test_log_likelihoods_with_a_window(tokenizer, questions):
    """Of the attention, shorter than the questions: the cache has forgotten where they begin."""
    check_scores(make_tiny_model("mistral", sliding_window=6), tokenizer, questions)


def test_answers_do_not_depend_on_what_is_asked_beside_them(tokenizer, questions):
    model = make_tiny_model()
    found = tasks.answer(model, tokenizer, questions)
    back = tasks.answer(model, tokenizer, questions[::-1])
    alone = [tasks.answer(model, tokenizer, [q]).right for q in questions]
    assert torch.equal(found.right, back.right.flip(0))
    assert torch.equal(found.right, torch.cat(alone))
    assert found.questions == len(questions)
    assert found.value == pytest.approx(float(found.right.float().mean()))


def test_the_two_styles(tokenizer, questions):
    model = make_tiny_model()
    for style, prompt, power in (
        ("question", "Question: {question}\nAnswer:", 0),
        ("continuation", "{question}", 1),
    ):
        right = []
        for q in questions:
            before = prompt.format(question=q.question)
            scores = [plainly(model, tokenizer, before, c)[0] / len(c) ** power for c in q.choices]
            right.append(scores.index(max(scores)) == q.answer)
        found = tasks.answer(model, tokenizer, questions, style=style)
        assert found.right.tolist() == right


def test_a_choice_that_the_tokenizer_joins_to_the_prompt():
    """The pair of tokens where one choice begins is one token with the other: both are scored from
    where their texts part."""

    def tokenizer(text, **_):
        joined = text.replace("w5 w6", "w9")
        return SimpleNamespace(input_ids=[int(word[1:]) for word in joined.split()])

    model = make_tiny_model()
    found = tasks.log_likelihoods(
        model, tokenizer, [tasks.Question("w3 w5", ("w6 w7", "w8"), 0)], prompt="{question}"
    )
    with torch.no_grad():
        scores = [
            model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            for ids in ([3, 9, 7], [3, 5, 8])
        ]
    expected = [scores[0][0, 9] + scores[0][1, 7], scores[1][0, 5] + scores[1][1, 8]]
    torch.testing.assert_close(found[0].float(), torch.stack(expected))


@pytest.mark.parametrize(
    "scores, right",
    [
        ([-1.0, -2.0], [True, False]),
        ([-2.0, -2.0], [True, False]),  # the first of equal ones
        ([float("nan"), -2.0], [False, True]),
        ([float("nan"), float("nan")], [False, False]),
        ([float("-inf"), float("-inf")], [True, False]),
    ],
)
def test_ties_and_what_is_no_number(scores, right, monkeypatch):
    monkeypatch.setattr(tasks, "log_likelihoods", lambda *_, **__: [torch.tensor(scores)])
    for style in tasks.STYLES:
        for answer in (0, 1):
            question = tasks.Question("q", ("a", "b"), answer)
            found = tasks.answer(None, None, [question], style=style)
            assert found.right.tolist() == [right[answer]]


def test_standard_errors():
    a, b = tasks.accuracy_of([1, 1, 0, 0]), tasks.accuracy_of([1, 0, 0, 0])
    assert (a.value, a.stderr, a.questions) == (0.5, 0.25, 4)
    found = tasks.compare(a, b)
    assert (found.value, found.gained, found.lost) == (0.25, 1, 0)
    assert found.stderr == pytest.approx(
        (torch.tensor([0.0, 1, 0, 0]).var(correction=0) / 4) ** 0.5
    )
    same = tasks.compare(a, a)
    assert (same.value, same.stderr, same.gained, same.lost) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="the same 4 questions, got 1"):
        tasks.compare(a, tasks.accuracy_of([True]))


def test_progress(tokenizer, questions):
    seen = []
    tasks.answer(
        make_tiny_model(),
        tokenizer,
        questions,
        batch_tokens=30,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1][0] == seen[-1][1]


# ---- files ---------------------------------------------------------------------------------------

GOOD = {"question": "w3 w4", "choices": ["w5", "w6 w7"], "answer": 1}


def test_load_questions(tmp_path):
    rows = [json.dumps(GOOD | {"answer": n % 2, "more": n}) for n in range(3)]
    (tmp_path / "q.jsonl").write_text("\ufeff" + "\n\n".join(rows) + "\n", encoding="utf-8")
    found = tasks.load_questions(tmp_path / "q.jsonl")
    assert found == [tasks.Question("w3 w4", ("w5", "w6 w7"), n % 2) for n in range(3)]
    assert tasks.load_questions(tmp_path / "q.jsonl", limit=2) == found[:2]
    (tmp_path / "q.jsonl").write_text("\n".join([*rows, "no row"]))
    assert tasks.load_questions(tmp_path / "q.jsonl", limit=3) == found  # the rest is not read


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "expected JSON at .*q.jsonl:2, got"),
        ([1], "expected an object at .*q.jsonl:2, got list"),
        ({**GOOD, "question": None}, 'expected "question", a text, at .*q.jsonl:2, got None'),
        ({**GOOD, "question": " "}, 'expected "question", a text'),
        ({**GOOD, "choices": "ab"}, 'expected "choices", a list of at least two, at .*:2, got'),
        ({**GOOD, "choices": ["a"]}, r"a list of at least two, at .*:2, got \['a'\]"),
        ({**GOOD, "choices": ["a", ""]}, r'expected "choices"\[1\], a text, at .*:2, got'),
        ({**GOOD, "choices": ["a", 3]}, r'expected "choices"\[1\], a text, at .*:2, got 3'),
        ({**GOOD, "choices": ["a", "\ud800"]}, r'expected "choices"\[1\], a text'),
        ({**GOOD, "answer": 2}, 'expected "answer", an index from 0 to 1, at .*:2, got 2'),
        ({**GOOD, "answer": -1}, '"answer", an index from 0 to 1, at .*:2, got -1'),
        ({**GOOD, "answer": True}, '"answer", an index from 0 to 1, at .*:2, got True'),
        ({**GOOD, "answer": "b"}, "\"answer\", an index from 0 to 1, at .*:2, got 'b'"),
    ],
)
def test_bad_rows_are_named(row, message, tmp_path):
    text = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(GOOD)}\n{text}\n")
    with pytest.raises(ValueError, match=f"tasks: .*{message}"):
        tasks.load_questions(tmp_path / "q.jsonl")


def test_refused(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    model, question = make_tiny_model(), tasks.Question("w3", ("w4", "w5"), 0)
    long = tasks.Question(words(150, 0), ("w4", "w5"), 0)
    for message, call in (
        ("holds none", lambda: tasks.load_questions(tmp_path / "empty.jsonl")),
        ("expected UTF-8", lambda: tasks.load_questions(tmp_path / "latin.jsonl")),
        ("limit: expected at least 1", lambda: tasks.load_questions("x", limit=0)),
        ("at least one, got none", lambda: tasks.answer(model, tokenizer, [])),
        ("style: expected one of", lambda: tasks.answer(model, tokenizer, [question], style="x")),
        (
            r"questions\[1\]: expected at most 128 tokens, the model's limit, got 175",
            lambda: tasks.answer(model, tokenizer, [question, long]),
        ),
        (
            r"questions\[0\]: expected a token before the choices",
            lambda: tasks.log_likelihoods(model, tokenizer, [question], prompt=""),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        tasks.load_questions(tmp_path / "none.jsonl")


# ---- lm-eval -------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path, monkeypatch, questions):
    """A task of lm-eval with the same questions, from a file."""
    monkeypatch.setattr(harness, "_task_manager", lambda: TaskManager(include_defaults=False))
    rows = [vars(question) for question in questions]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"data_files": {"test": str(tmp_path / "q.jsonl")}, "cache_dir": str(tmp_path)}
    return {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def test_lm_eval_answers_the_same(task, tokenizer, questions):
    assert lm_eval.__version__
    model = linearize_tiny(make_tiny_model(), [0, 2], **MAPS["memory"])
    model.train()
    found = harness.answer(model, tokenizer, task)
    assert torch.equal(found.right, tasks.answer(model, tokenizer, questions).right)
    limited = harness.answer(model, tokenizer, task, limit=4, metric="acc_norm")
    assert limited.questions == 4 and model.training
    with pytest.raises(ValueError, match=r"metric: .* of acc, acc_norm, got 'f1'"):
        harness.answer(model, tokenizer, task, limit=1, metric="f1")
    with pytest.raises(ValueError, match="lm-eval could not load 'no-such-task'"):
        harness.answer(model, tokenizer, "no-such-task")


def test_lm_eval_is_an_extra(monkeypatch):
    harness._task_manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"the extra nbl_kernels\[eval\]: pip install lm_eval"):
        harness.check_task("arc_easy")


# ---- passkey -------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_is_what_generate_writes(model):
    prefix = torch.randint(2, 97, (1, 20), generator=torch.Generator().manual_seed(0))
    new = model.generate(prefix, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 20:].tolist()
    other = [*new[:-1], (new[-1] + 1) % 97]
    items = [tasks._Item(prefix[0].tolist(), [new, other, new[:1]])]
    assert tasks._read(model, items, 2048, False)[0].greedy.tolist() == [True, False, True]


def test_where_a_passkey_stands():
    model, tokenizer = demo.load()
    for depth, least, most in ((0.0, 0, 0), (0.5, 0.4, 0.6), (1.0, 0.6, 1)):
        item = tasks._hide(tokenizer, ["some text. " * 9], 200, depth, random.Random(0))
        text = tokenizer.decode(item.prefix, skip_special_tokens=True)
        key = tokenizer.decode(item.choices[0]).strip()
        assert item.length == 200 and len(key) == 5
        assert text.count(key) == 2 and text.endswith("The pass key is")
        place = text.index("\nThe pass key is") / len(text)
        assert least <= place <= most
    found = tasks.passkey(
        model, tokenizer, lengths=(128, 96), depths=(0, 1), samples=2, text=["some text. "]
    )
    assert {n: a.questions for n, a in found.items()} == {128: 4, 96: 4}
    for message, options in (
        ("lengths: expected at most", {"lengths": [10**6]}),
        ("lengths: expected at least .* got 20", {"lengths": [20]}),
        ("lengths: expected different", {"lengths": []}),
        ("depths: expected numbers from 0 to 1", {"depths": [2]}),
        ("samples: expected at least 1", {"samples": 0}),
        ("text: expected documents", {"text": [""]}),
        ("text: expected documents", {"text": []}),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.passkey(model, tokenizer, **{"lengths": [128], "text": ["some text."], **options})
