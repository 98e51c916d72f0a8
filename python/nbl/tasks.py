"""Multiple-choice questions: which of the choices a causal language model finds likeliest.

    questions = nbl.tasks.load_questions("piqa.jsonl")
    before = nbl.tasks.answer(model, tokenizer, questions)
    nbl.linearize(model, calibration, layers=8)
    after = nbl.tasks.answer(model, tokenizer, questions)
    nbl.tasks.compare(after, before)  # the questions are the same: far sharper than two accuracies

And :func:`passkey`: whether a number that stood somewhere in a long text is found again.

A file of questions is read here, and not as a task of lm-eval with local data, which gives the same
scores: it reads a question again for every choice, where here its keys and values are kept, and so
takes three times as long (100 questions of ARC-Easy, SmolLM2-135M, one thread: 18 s and 6 s); and
it brings scikit-learn and a dozen other packages along. Its own tasks: :mod:`nbl.harness`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .perplexity import eval_mode, read_logits
from .pipeline import length_limit
from .progress import progress_bar
from .upstream import CACHE, execution_device, output_cache

__all__ = [
    "STYLES",
    "Accuracy",
    "Difference",
    "Question",
    "Style",
    "accuracy_of",
    "answer",
    "compare",
    "load_questions",
    "log_likelihoods",
    "passkey",
]

# Tokens of a batch: the questions once, and their choices.
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Style:
    """prompt: what a choice follows, after a space; per_character: whether a choice's score is its
    log-likelihood, or that divided by its number of characters."""

    prompt: str
    per_character: bool


STYLES = {
    "question": Style("Question: {question}\nAnswer:", per_character=False),
    "continuation": Style("{question}", per_character=True),
}


@dataclass(frozen=True)
class Question:
    """choices: at least two; answer: the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Accuracy:
    """value: the share of right answers; stderr: its binomial standard error; questions: how many;
    right: bool (questions,), on the CPU."""

    value: float
    stderr: float
    questions: int
    right: Tensor


@dataclass(frozen=True)
class Difference:
    """value: of two accuracies over the same questions; stderr: its standard error, paired; gained,
    lost: how many questions only the first, only the second has right."""

    value: float
    stderr: float
    gained: int
    lost: int


def load_questions(path: str | Path, *, limit: int | None = None) -> list[Question]:
    """The questions of a UTF-8 file with a JSON object a line: {"question": str, "choices": [str,
    ...], "answer": the index of the right choice}; other keys are not read.

    limit: only the first so many.

    Raises:
        FileNotFoundError, ValueError: naming file and line.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    if not path.is_file():
        raise FileNotFoundError(f"tasks: expected a file, but {str(path)!r} does not exist")
    questions = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if len(questions) == limit:
                    break
                if line.strip():
                    questions.append(_question(line, f"{path}:{number}"))
    except UnicodeDecodeError as error:
        raise ValueError(f"tasks: expected UTF-8 in {str(path)!r}, got: {error.reason}") from None
    if not questions:
        raise ValueError(f"tasks: expected questions, but {str(path)!r} holds none")
    return questions


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    style: Literal["question", "continuation"] = "question",
    batch_tokens: int = _BATCH_TOKENS,
    progress: bool | Callable[[int, int | None], None] = False,
) -> Accuracy:
    """How many questions the model answers right: by the choice with the highest score.

    Of equal scores the first choice counts; a score that is no number is never the highest.

    Args:
        model, tokenizer, questions, batch_tokens, progress: see :func:`log_likelihoods`.
        style: "question": each choice after "Question: …\\nAnswer:", its score the log-likelihood;
            "continuation": after the question alone, its score the log-likelihood per character.

    Raises:
        ValueError: naming the argument, or the question by its index.
    """
    if style not in STYLES:
        raise ValueError(f"style: expected one of {', '.join(STYLES)}, got {style!r}")
    prompt, per_character = STYLES[style].prompt, STYLES[style].per_character
    read = log_likelihoods(
        model,
        tokenizer,
        questions,
        prompt=prompt,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    right = []
    for question, found in zip(questions, read, strict=True):
        scores = found.tolist()
        if per_character:
            scores = [s / len(choice) for s, choice in zip(scores, question.choices, strict=True)]
        known = [-math.inf if math.isnan(score) else score for score in scores]
        first = known.index(max(known))
        right.append(first == question.answer and not math.isnan(scores[first]))
    return accuracy_of(right)


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    prompt: str = STYLES["question"].prompt,
    batch_tokens: int = _BATCH_TOKENS,
    progress: bool | Callable[[int, int | None], None] = False,
) -> list[Tensor]:
    """For every question, log p(" " + choice | prompt) in nats of each choice, float64 (choices,).

    The prompt is read once for all its choices, on the model's own cache; prompts of as many tokens
    go together, and nothing is padded on the left. Prompt and choice are tokenized as one text, as
    the tokenizer does it by default; what is summed are the tokens that are not in the prompt's
    tokens, in all choices of the question alike.

    Args:
        model: a transformers causal LM whose logits are its head's of its last hidden states; used
            in eval mode and given back in the mode it was in.
        tokenizer: of the model.
        questions: see :func:`load_questions`.
        prompt: with "{question}" in the place of the question.
        batch_tokens: about so many tokens at a time.
        progress: True: a bar on stderr; or a function that is called with (tokens read, tokens in
            all).

    Raises:
        ValueError: no question; one that is longer than the model's limit, by its index.
    """
    if not questions:
        raise ValueError("questions: expected at least one, got none")
    items = []
    limit = length_limit(model)
    for number, question in enumerate(questions):
        before = prompt.replace("{question}", question.question)
        item = _tokens(tokenizer, before, [f"{before} {choice}" for choice in question.choices])
        if not item.prefix:
            raise ValueError(f"questions[{number}]: expected a token before the choices, got none")
        if item.length > limit:
            raise ValueError(
                f"questions[{number}]: expected at most {limit} tokens, the model's limit, "
                f"got {item.length}"
            )
        items.append(item)
    return [found.log_likelihoods for found in _read(model, items, batch_tokens, progress)]


def compare(a: Accuracy, b: Accuracy) -> Difference:
    """a - b, of two models' answers to the same questions, in the same order.

    The standard error is that of the mean of the questions' differences, each -1, 0 or 1: what the
    two models both know, or both do not, is no noise.

    Raises:
        ValueError: not as many questions.
    """
    if a.questions != b.questions:
        raise ValueError(
            f"b: expected the answers to the same {a.questions} questions, got {b.questions}"
        )
    differences = a.right.double() - b.right.double()
    value = float(differences.mean())
    variance = max(0.0, float(differences.square().mean()) - value**2)
    return Difference(
        value=value,
        stderr=math.sqrt(variance / a.questions),
        gained=int((differences > 0).sum()),
        lost=int((differences < 0).sum()),
    )


def accuracy_of(right: Iterable[bool]) -> Accuracy:
    """Of these answers, True where right, at least one."""
    found = torch.tensor([bool(r) for r in right])
    count, value = len(found), float(found.double().mean())
    return Accuracy(value, math.sqrt(value * (1 - value) / count), count, found)


# --- a number in a long text ----------------------------------------------------------------------

_HIDDEN = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
_ASKED = "\nWhat is the pass key? The pass key is"


@torch.no_grad()
def passkey(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    lengths: Sequence[int] = (256, 512, 1024),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 10,
    seed: int = 0,
    text: Iterable[str] | None = None,
    batch_tokens: int = _BATCH_TOKENS,
    progress: bool | Callable[[int, int | None], None] = False,
) -> dict[int, Accuracy]:
    """Whether a random number of five digits that stood in a long text is said again when it is
    asked for: {context length: accuracy}.

    An answer is right when every token of the number is the model's likeliest next one, as greedy
    generation would write it: nobody guesses that. What a layer without attention cannot do shows
    here, and not in perplexity.

    Args:
        model, tokenizer, batch_tokens, progress: see :func:`log_likelihoods`.
        lengths: tokens in all, the answer included.
        depths: where the number stands, from 0 (at the beginning) to 1 (right before it is asked
            for).
        samples: numbers for each length and depth; `right.view(len(depths), samples)` has them
            apart.
        seed: of the numbers and of the text around them; the same for every model.
        text: documents for the text around. Default: demo:train.

    Raises:
        ValueError: naming the argument.
    """
    lengths, depths = list(lengths), list(depths)
    for name, values in (("lengths", lengths), ("depths", depths)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}: expected different numbers, got {values}")
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths: expected numbers from 0 to 1, got {depths}")
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    limit = length_limit(model)
    if max(lengths) > limit:
        raise ValueError(f"lengths: expected at most {limit}, the model's limit, got {lengths}")
    if text is None:
        from nbl import demo

        text = demo.documents("train")
    documents = [document for document in text if document.strip()]
    if not documents:
        raise ValueError("text: expected documents, got none with text in it")
    items = [
        _hide(tokenizer, documents, length, depth, random.Random(f"{seed} {depth} {sample}"))
        for length in lengths
        for depth in depths
        for sample in range(samples)
    ]
    found = [bool(item.greedy[0]) for item in _read(model, items, batch_tokens, progress)]
    each = len(depths) * samples
    return {
        length: accuracy_of(found[n * each : (n + 1) * each]) for n, length in enumerate(lengths)
    }


def _hide(
    tokenizer: Any, documents: list[str], length: int, depth: float, choose: random.Random
) -> _Item:
    """A text of so many tokens with a number at this depth, which its end asks for."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    key = str(choose.randrange(10_000, 100_000))
    asked = _tokens(tokenizer, _ASKED, [f"{_ASKED} {key}"], add_special_tokens=False)
    hidden = tokens(_HIDDEN.format(key=key))
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length - len(start) - len(hidden) - asked.length
    if room < 0:
        raise ValueError(f"lengths: expected at least {length - room}, got {length}")
    around: list[int] = []
    while len(around) < room:
        around += tokens(choose.choice(documents) + "\n")
    at = round(depth * room)
    return _Item([*start, *around[:at], *hidden, *around[at:room], *asked.prefix], asked.choices)


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """Tokens that several others may follow."""

    prefix: list[int]
    choices: list[list[int]]

    @property
    def longest(self) -> int:
        return max(map(len, self.choices))

    @property
    def length(self) -> int:
        return len(self.prefix) + self.longest

    @property
    def cost(self) -> int:
        """Tokens that are read, padding included."""
        return len(self.prefix) + len(self.choices) * (self.longest - 1)


@dataclass(frozen=True)
class _Found:
    """log_likelihoods: float64 (choices,); greedy: bool (choices,), whether each of a choice's
    tokens is the likeliest."""

    log_likelihoods: Tensor
    greedy: Tensor


def _tokens(tokenizer: Any, before: str, wholes: list[str], **options: Any) -> _Item:
    """The tokens of texts that begin with the same one, apart from those they share with it."""
    first, *rest = (
        tokenizer(text, verbose=False, **options).input_ids for text in (before, *wholes)
    )
    shared = len(first)
    for whole in rest:  # where the tokenizer joins a choice's first letters to the prompt's last
        least = min(shared, len(whole) - 1)
        shared = next((i for i in range(least) if whole[i] != first[i]), least)
    return _Item(rest[0][:shared], [whole[shared:] for whole in rest])


def _read(
    model: PreTrainedModel,
    items: list[_Item],
    batch_tokens: int,
    progress: bool | Callable[[int, int | None], None],
) -> list[_Found]:
    """What the model says of each item."""
    found: dict[int, _Found] = {}
    done, total = 0, sum(item.cost for item in items)
    with eval_mode(model), progress_bar(progress, total, "answering") as report:
        for numbers in _batches(items, batch_tokens):
            batch = [items[number] for number in numbers]
            found |= zip(numbers, _read_batch(model, batch), strict=True)
            done += sum(item.cost for item in batch)
            report(done)
    return [found[number] for number in range(len(items))]


def _batches(items: list[_Item], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of items whose prefixes are equally long, the longest first."""

    def length(number: int) -> int:
        return len(items[number].prefix)

    order = sorted(range(len(items)), key=lambda n: (length(n), items[n].longest), reverse=True)
    for _, equal in groupby(order, key=length):
        batch: list[int] = []
        for number in equal:
            if batch and sum(items[n].cost for n in (*batch, number)) > batch_tokens:
                yield batch
                batch = []
            batch.append(number)
        yield batch


def _read_batch(model: PreTrainedModel, batch: list[_Item]) -> list[_Found]:
    """Prefixes once, then their choices, padded on the right, where it changes nothing."""
    base = model.base_model
    device = execution_device(model.get_input_embeddings())
    prefixes = torch.tensor([item.prefix for item in batch], device=device)
    counts = [len(item.choices) for item in batch]
    of_prefix = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))
    choices = [torch.tensor(choice) for item in batch for choice in item.choices]
    labels = torch.nn.utils.rnn.pad_sequence(choices, batch_first=True)
    real = torch.arange(labels.shape[1]) < torch.tensor(list(map(len, choices)))[:, None]
    several = labels.shape[1] > 1
    outputs = base(prefixes, use_cache=several)
    hidden = outputs.last_hidden_state[:, -1:][of_prefix]
    if several:
        cache = output_cache(outputs)
        cache.batch_select_indices(of_prefix)
        more = base(labels[:, :-1].to(device), **{CACHE: cache}).last_hidden_state
        hidden = torch.cat([hidden, more], dim=1)
    scores, greedy = [], []
    for logits, label in read_logits(model, hidden[real], labels[real]):
        scores.append(-F.cross_entropy(logits, label, reduction="none").double().cpu())
        greedy.append((logits.argmax(-1) == label).cpu())
    nats, likeliest = torch.zeros(real.shape, dtype=torch.float64), torch.ones_like(real)
    nats[real], likeliest[real] = torch.cat(scores), torch.cat(greedy)
    each = zip(nats.sum(dim=1).split(counts), likeliest.all(dim=1).split(counts))
    return [_Found(*found) for found in each]


# --- checks ---------------------------------------------------------------------------------------


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tasks: expected JSON at {where}, got: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"tasks: expected an object at {where}, got {type(row).__name__}")
    question, choices, right = (row.get(name) for name in ("question", "choices", "answer"))
    if not _is_text(question):
        raise ValueError(f'tasks: expected "question", a text, at {where}, got {question!r:.80}')
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(
            f'tasks: expected "choices", a list of at least two, at {where}, got {choices!r:.80}'
        )
    for number, choice in enumerate(choices):
        if not _is_text(choice):
            raise ValueError(
                f'tasks: expected "choices"[{number}], a text, at {where}, got {choice!r:.80}'
            )
    if type(right) is not int or not 0 <= right < len(choices):
        raise ValueError(
            f'tasks: expected "answer", an index from 0 to {len(choices) - 1}, at {where}, '
            f"got {right!r:.80}"
        )
    return Question(question, tuple(choices), right)


def _is_text(value: Any) -> bool:
    """Whether a value is a string with more than blanks in it, all of which can be encoded."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)
