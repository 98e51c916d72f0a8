"""Tables and progress bars."""

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .scores import order
from .streams import err, out


class Bars:
    """Progress bars in tokens: wraps batches so that reading them moves a bar; what nbl.compress
    takes as `watch`."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def __call__(self, batches: list, what: str, passes: int = 1) -> "_Watched":
        """A bar for so many passes over the batches."""
        task = self._add(what, passes * sum(batch.numel() for batch in batches))
        return _Watched(self._progress, task, batches)

    def counter(self, what: str) -> Callable[[int, int | None], None]:
        """A bar moved by (tokens so far, tokens in all): what nbl.heal takes as `progress`."""
        task = self._add(what, None)
        return lambda tokens, total: self._progress.update(task, completed=tokens, total=total)

    def _add(self, what: str, total: int | None):
        self._progress.start()
        return self._progress.add_task(what, total=total, what=what)


class _Watched:
    """A list of batches, read any number of times."""

    def __init__(self, progress: Progress, task, batches: list):
        self._progress, self._task, self._batches = progress, task, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator:
        for batch in self._batches:
            yield batch
            self._progress.advance(self._task, batch.numel())


class _TokensPerSecond(ProgressColumn):
    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} tokens/s" if speed else "", style="dim")


@contextlib.contextmanager
def progress() -> Iterator[Bars]:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        _TokensPerSecond(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    progress = Progress(*columns, console=err, redirect_stdout=False, redirect_stderr=False)
    try:
        yield Bars(progress)
        for task in progress.tasks:  # some need fewer passes than were planned
            progress.update(task.id, total=task.completed, description=task.fields["what"])
    finally:
        if progress.tasks:
            progress.stop()


def show_step(sentence: str) -> None:
    """What takes its time without a bar."""
    err.print(sentence, style="dim")


def show_scores(scores: dict[str, list], chosen: Iterable[int] = ()) -> None:
    table = _table("Which layer goes first: rank and score by each criterion")
    for name in ("layer", *scores):
        table.add_column(name, justify="right")
    places = {name: order(values) for name, values in scores.items()}
    for layer in range(max(map(len, scores.values()))):
        cells = []
        for name, values in scores.items():
            known = layer < len(values) and values[layer] is not None
            cells.append(
                f"{places[name].index(layer) + 1}  [dim]{values[layer]:8.3g}[/]" if known else ""
            )
        table.add_row(str(layer), *cells, style="bold cyan" if layer in chosen else None)
    out.print(table)


def show_points(record: dict) -> None:
    points = record["points"]
    dense = points[0]
    evaluated = "perplexity" in dense
    table = _table(
        "Perplexity and cost, against the dense model and against dropping attention"
        if evaluated
        else "Cost, against the dense model"
    )
    quality = ("NBL", "drop,\ncosine", "drop,\nsame") if evaluated else ()
    speed = ("prefill\ntokens/s", "decode\ntokens/s") if evaluated else ()
    table.add_column("m", justify="right")
    table.add_column("layers")
    remembers = "state_bytes" in dense
    state = ("state\nbytes",) if remembers else ()
    elsewhere = "other" in dense
    quality = (*quality, "NBL,\nother text") if elsewhere else quality
    for name in (*quality, "KV bytes\n/token", *state, *speed):
        table.add_column(name, justify="right")
    for point in points:
        m = len(point["layers"])
        cells = [f"{point['kv_bytes_per_token']:,}"]
        if remembers:
            cells.append(f"{point['state_bytes']:,}")
        if evaluated:
            cells = [
                f"[bold]{point['perplexity']:.2f}[/]",
                f"{point['drop']['perplexity']:.2f}" if m else "",
                f"{point['drop_same']['perplexity']:.2f}" if m else "",
                *([f"{point['other']['perplexity']:.2f}"] if elsewhere else []),
                *cells,
                *(
                    f"{point[kind]:,.0f} [dim]{point[kind] / dense[kind]:.2f}x[/]"
                    for kind in ("prefill", "decode")
                ),
            ]
        table.add_row(str(m), ",".join(map(str, point["layers"])) or "dense", *cells)
    out.print(table)
    if evaluated:
        name = "dropping the same layers" if record["choice"]["method"] == "drop" else "NBL"
        shape = record["speed"]
        out.print(
            f"KV bytes and speed are those of {name}: batch 1, {shape['prompt_tokens']} + "
            f"{shape['new_tokens']} tokens, medians of {shape['repetitions']} interleaved "
            "repetitions.",
            style="dim",
        )


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )


def show_facts(facts: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for name, fact in facts.items():
        table.add_row(name, fact)
    out.print(table)


def note(message: str) -> None:
    err.print(Text(f"note: {message}", style="yellow"), soft_wrap=True)


def done(output: Path, start: float) -> None:
    out.print(
        f"[green]done[/] in {time.perf_counter() - start:.0f} s: {escape(str(output))}",
        soft_wrap=True,
    )


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def need_matplotlib() -> None:
    if not has_matplotlib():
        raise ValueError(
            "report: needs matplotlib, the extra nbl_kernels[report]: pip install matplotlib"
        )
