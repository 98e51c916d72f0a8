"""nbl eval: perplexity of a model on any text, and the questions it answers right."""

import time
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..options import BatchSize, Device, Dtype, Json, Length, Model, Threads, Weights
from ..show import note, progress, show_facts, show_tasks


def _eval(
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="PATH...",
            show_default="demo:test for the demo model",
            help="Files, folders, - (stdin), dataset:NAME[:CONFIG][:SPLIT], demo:test.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="T,...",
            help="Multiple-choice questions, besides or instead of text: FILE.jsonl[:question or "
            ":continuation], rows with question, choices, answer; or tasks of lm-eval, "
            "NAME[:METRIC] (the extra nbl_kernels[eval]).",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Only the first so many questions of each task.", show_default="all"
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Measure this one, too (its weights as they are), and compare: differences over "
            "the same questions, perplexities.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Read at most so many tokens.", show_default="all")
    ] = None,
    length: Length = None,
    batch_size: BatchSize = None,
    weights: Weights = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> dict:
    """Perplexity of a model, dense or linearized, on any text; multiple-choice questions.

    Examples: `nbl eval llama-nbl-6 --text dataset:wikitext:wikitext-2-raw-v1:test`,
    `nbl eval llama-nbl-6 --tasks piqa.jsonl,arc_easy --against meta-llama/Llama-3.2-1B`
    """
    if limit is not None and tasks is None:
        raise ValueError("limit: expected --tasks beside it")
    from .. import models
    from ..tasks import read_tasks, task_row

    asked = [] if tasks is None else read_tasks(tasks, limit)
    documents, sources = [], []
    if text or not asked:
        documents, sources = models.read_texts(
            model, text, max_tokens, demo_split="test", in_turns=False
        )
    sizes = {"length": length, "batch_size": batch_size, "max_tokens": max_tokens}
    place = {"dtype": dtype, "device": device}
    first = _measure(model, weights, documents, asked, sizes, place)
    result = {"model": model, **({"text": sources} if documents else {}), **first.facts}
    second = None
    if against is not None:
        second = _measure(against, None, documents, asked, sizes | first.length, place)
        result["against"] = {"model": against, **second.facts}
        if documents:
            result["perplexity_ratio"] = _ratio(first, second)
    if asked:
        answers = [second.answers if second else [None] * len(asked)]
        result["tasks"] = [*map(task_row, asked, first.answers, *answers)]
    _show(result)
    return result


@dataclass(frozen=True)
class _Measured:
    """facts: of the result; answers: (accuracy, seconds) of each task; batches: of the text."""

    facts: dict[str, Any]
    answers: list
    batches: list

    @property
    def length(self) -> dict[str, int]:
        return {"length": self.facts["length"]} if self.batches else {}


def _measure(
    name: str,
    weights: str | None,
    documents: list,
    asked: list,
    sizes: dict[str, int | None],
    place: dict[str, str],
) -> _Measured:
    """One model, loaded for this only."""
    import nbl
    from nbl import measure, pipeline

    from .. import models

    loaded, tokenizer = models.load(name, **place, weights=weights)
    batches = pipeline.make_batches(loaded, tokenizer, documents, **sizes) if documents else []
    facts = {}
    with progress() as watch:
        if batches:
            start = time.perf_counter()
            found = nbl.perplexity(loaded, watch(batches, "evaluating"))
            seconds = time.perf_counter() - start
            facts |= {
                "perplexity": found.value,
                "nll": found.nll,
                "tokens": found.tokens,
                "length": int(batches[0].shape[1]),
                "seconds": seconds,
                "tokens_per_second": found.tokens / seconds,
            }
        answers = [task.answer(loaded, tokenizer, watch.counter) for task in asked]
    facts |= {
        "linearized_layers": nbl.linearized_layers(loaded),
        "windowed_layers": nbl.windowed_layers(loaded),
        "kv_bytes_per_token": measure.kv_bytes_per_token(loaded),
        "state_bytes": measure.state_bytes(loaded),
        "weights": weights,
        "weight_bytes": nbl.weight_bytes(loaded),
    }
    return _Measured(facts, answers, batches)


def _ratio(first: _Measured, second: _Measured) -> float | None:
    """Of perplexities, where both models read the same tokens."""
    pairs = list(zip(first.batches, second.batches))
    same = len(first.batches) == len(second.batches) and all(a.equal(b) for a, b in pairs)
    if not same:
        note("the models read the text as different tokens: perplexities do not compare")
        return None
    return first.facts["perplexity"] / second.facts["perplexity"]


def _show(result: dict[str, Any]) -> None:
    facts = {}
    if "perplexity" in result:
        facts |= {
            "perplexity": f"[bold]{result['perplexity']:,.3f}[/]",
            "nll": f"{result['nll']:.4f} nats per token",
            "tokens": f"{result['tokens']:,} predicted, in sequences of {result['length']}",
            "speed": f"{result['tokens_per_second']:,.0f} tokens/s",
        }
    if result.get("perplexity_ratio") is not None:
        other = result["against"]
        facts["against"] = (
            f"{other['perplexity']:,.3f}, {escape(other['model'])}: "
            f"[bold]{result['perplexity_ratio']:.3f}[/] times its perplexity"
        )
    facts |= {
        "linearized layers": ", ".join(map(str, result["linearized_layers"])) or "none",
        "with a window": ", ".join(map(str, result["windowed_layers"])) or "none",
        "KV cache": f"{result['kv_bytes_per_token']:,} bytes per token",
        "bounded": f"{result['state_bytes']:,} bytes per sequence (states, windows)",
        "weights": f"{result['weight_bytes']:,} bytes per decode step",
    }
    show_facts(facts)
    if "tasks" in result:
        show_tasks(result["tasks"], result.get("against", {}).get("model"))
