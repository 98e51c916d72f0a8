"""What --tasks names: files of questions, read before a model is, and tasks of lm-eval."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl import harness, tasks

from .show import show_step

_EXPECTED = "tasks: expected FILE.jsonl[:STYLE] or a task of lm-eval"


@dataclass(frozen=True)
class Task:
    """name: as it was given; rule: the style of a file, the metric of a task of lm-eval; questions:
    of a file."""

    name: str
    rule: str
    questions: list[tasks.Question] | None
    limit: int | None

    @property
    def facts(self) -> dict[str, str]:
        kind = "metric" if self.questions is None else "style"
        return {"task": self.name, kind: self.rule}

    def answer(
        self, model: Any, tokenizer: Any, counter: Callable[[str], Callable]
    ) -> tuple[tasks.Accuracy, float]:
        """(accuracy, seconds)."""
        start = time.perf_counter()
        if self.questions is None:
            show_step(f"{self.name}: lm-eval is asking ...")
            name = self.name.partition(":")[0]
            options = {"metric": self.rule, "limit": self.limit}
            found = harness.answer(model, tokenizer, name, **options)
        else:
            options = {"style": self.rule, "progress": counter(Path(self.name).name)}
            found = tasks.answer(model, tokenizer, self.questions, **options)
        return found, time.perf_counter() - start


def read_tasks(given: str, limit: int | None) -> list[Task]:
    """ "a.jsonl,b.jsonl:continuation,arc_easy:acc_norm": each of them, its questions read."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{_EXPECTED}, once each, got {given!r}")
    return [_read(name, limit) for name in names]


def _read(name: str, limit: int | None) -> Task:
    source, _, rule = name.rpartition(":") if ":" in name else (name, "", "")
    if name.endswith(".jsonl"):  # a colon is part of its path
        source, rule = name, ""
    if not source.endswith(".jsonl"):
        harness.check_task(source)
        return Task(name, rule or "acc", None, limit)
    rule = rule or "question"
    if rule not in tasks.STYLES:
        raise ValueError(f"{_EXPECTED}, STYLE one of {', '.join(tasks.STYLES)}, got {name!r}")
    return Task(name, rule, tasks.load_questions(source, limit=limit), limit)


def task_row(
    task: Task, first: tuple[tasks.Accuracy, float], second: tuple[tasks.Accuracy, float] | None
) -> dict[str, Any]:
    """Of the result: one model's answers, and the other's beside them."""
    row = {**task.facts, "questions": first[0].questions, **_facts(*first)}
    if second is not None:
        found = tasks.compare(first[0], second[0])
        row["against"] = _facts(*second)
        row |= {"difference": found.value, "difference_stderr": found.stderr}
        row |= {"gained": found.gained, "lost": found.lost}
    return row


def _facts(found: tasks.Accuracy, seconds: float) -> dict[str, Any]:
    return {
        "accuracy": found.value,
        "stderr": found.stderr,
        "right": found.right.int().tolist(),
        "seconds": seconds,
    }
