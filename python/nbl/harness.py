"""Tasks of lm-eval, EleutherAI's harness, by name: with its data, its prompts and its rules, as
published figures have them. Their data come from the network. Needs the extra nbl_kernels[eval].
"""

from __future__ import annotations

import functools
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedModel

from .perplexity import eval_mode
from .tasks import Accuracy, accuracy_of

__all__ = ["answer", "check_task"]


def check_task(task: str) -> None:
    """ValueError where lm-eval is not installed, or knows no task, group or tag of this name."""
    known = _task_manager().all_tasks
    if task not in known:
        near = ", ".join(get_close_matches(task, known)) or "lm-eval ls tasks lists them"
        raise ValueError(
            f"tasks: expected FILE.jsonl[:STYLE] or a task of lm-eval, got {task!r} (near: {near})"
        )


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    task: str | dict[str, Any],
    *,
    metric: str = "acc",
    limit: int | None = None,
    batch_size: int = 16,
) -> Accuracy:
    """As :func:`nbl.tasks.answer`, of a task of lm-eval.

    Args:
        model, tokenizer: a transformers causal LM, used in eval mode, and its tokenizer.
        task: its name, or its configuration as lm-eval takes it. The questions of a group, or of a
            tag, are taken together.
        metric: one that says right or wrong of every question, as "acc" and "acc_norm" do.
        limit: only the first so many questions of each task.
        batch_size: sequences at a time.

    Raises:
        ValueError: lm-eval is not installed, its task cannot be loaded, or has no such metric.
    """
    manager = _task_manager()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        tasks = list(manager.load([task])["tasks"].values())
    except (
        Exception
    ) as error:  # network, unknown name, a task that runs code, ...: all end the same
        raise ValueError(f"tasks: lm-eval could not load {task!r:.80}: {error}") from None
    with eval_mode(model):
        harness = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            device=str(model.device),
            softmax_dtype="float32",  # a sum of log-likelihoods in bfloat16 has two digits
        )
        options = {"bootstrap_iters": 0, "log_samples": True, "limit": limit}
        found = simple_evaluate(harness, tasks=tasks, task_manager=manager, **options)
    samples = [
        sample
        for of_task in found["samples"].values()
        for sample in sorted(of_task, key=lambda sample: sample["doc_id"])
    ]
    values = [sample.get(metric) for sample in samples]
    if not values or any(value not in (0, 1) for value in values):
        metrics = sorted({name for sample in samples for name in sample["metrics"]})
        raise ValueError(
            f"metric: expected one that says right or wrong of every question, of "
            f"{', '.join(metrics)}, got {metric!r}"
        )
    return accuracy_of(value == 1 for value in values)


@functools.cache  # it reads thousands of files
def _task_manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError(
            "tasks: a task by name needs lm-eval, the extra nbl_kernels[eval]: pip install lm_eval"
        ) from None
    return TaskManager()
