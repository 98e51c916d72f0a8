"""The `compare` fixture, the result rows, and the summary at the end of `pytest --benchmark`."""

from __future__ import annotations

import csv
import itertools
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import machine
import pytest
import torch
from torch import Tensor

SECONDS_PER_ROW = 1.2  # of repetitions, split between everything that is compared
SECONDS_PER_REPETITION = 0.1  # a whole rotation over the copies, unless that takes longer
REF_REPETITIONS = 3  # the references are slow and need no precision

Call = Callable[[int], object]  # runs one candidate on the copy of that number


@dataclass(frozen=True)
class Row:
    """One line of the results file, beside machine.environment()."""

    benchmark: str
    shape: str
    dtype: str
    median_us: float
    iqr_us: float
    rate: float
    unit: str
    limit: float
    percent_of_limit: float
    best_pytorch_us: float
    ref_us: float
    speedup: float  # best_pytorch_us / median_us
    error: str  # relative to float64; ours, then others' for comparison

    def __str__(self) -> str:
        return (
            f"{self.benchmark:<15} {self.shape:<16} {self.dtype:<8} |"
            f" {self.median_us:9.0f} µs ±{50 * self.iqr_us / self.median_us:3.0f} % |"
            f" {self.rate:6.1f} {self.unit:<7} | {self.percent_of_limit:3.0f} % of limit |"
            f" {self.speedup:5.2f}x best PyTorch | {self.ref_us / self.median_us:6.1f}x ref |"
            f" error {self.error}"
        )


class Comparison:
    """Times ours beside PyTorch: interleaved, repetition by repetition, on data out of cache."""

    def __init__(self, benchmark, rows: list[Row]) -> None:
        self.benchmark, self.rows = benchmark, rows

    def __call__(
        self,
        op: str,
        shape: str,
        dtype: torch.dtype,
        *,
        ours: Call,
        pytorch: dict[str, Call],
        ref: Call,
        copies: int,
        flops: float,
        bytes_read: float = 0.0,
        weights: Tensor | None = None,
        error: str,
    ) -> None:
        """Adds a row.

        Args:
            ours, pytorch, ref: what is compared; every call gets the number of the next copy.
            copies: of the data, together larger than the caches.
            flops, bytes_read: of one call. The limit is whichever takes longer on this machine.
            weights: where bytes may be the limit, all copies as one block: the best read loops
                go over it in turn with the others, so that all see the same machine.
        """
        read_rate = max(machine.read_rates().values()) if weights is not None else float("inf")
        by_bytes = bytes_read / read_rate > flops / machine.gemm_rate(dtype)

        def rotation(call: Call) -> Callable[[], float]:
            numbers = itertools.cycle(range(copies))

            def repeat() -> float:
                def calls() -> None:
                    for _ in range(self.calls):
                        call(next(numbers))

                return machine.seconds(calls) / self.calls

            return repeat

        self.calls = 1
        once = rotation(ours)
        once()
        self.calls = max(1, min(copies, int(SECONDS_PER_REPETITION / once())))

        others = {name: rotation(call) for name, call in pytorch.items()}
        loops = machine.best_read_loops() if by_bytes else []
        for name in loops:
            read = machine.READ_LOOPS[name]
            others[name] = lambda read=read: machine.seconds(lambda: read(weights))
        reference = rotation(ref)
        warm_up = machine.seconds(lambda: [repeat() for repeat in (once, *others.values())])
        repetitions = max(3, min(40, int(SECONDS_PER_ROW / warm_up)))

        times: dict[str, list[float]] = {name: [] for name in (*others, "ref")}
        in_turn = itertools.count()

        def time_others() -> None:
            self.benchmark.stats.iterations = self.calls  # so that its table shows single calls
            for name, repeat in others.items():
                times[name].append(repeat())
            if next(in_turn) < REF_REPETITIONS:
                calls, self.calls = self.calls, 1
                times["ref"].append(reference())
                self.calls = calls

        numbers = itertools.cycle(range(copies))

        def time_ours() -> None:
            for _ in range(self.calls):
                ours(next(numbers))

        self.benchmark.group = op
        if self.benchmark.disabled:
            return time_ours()
        self.benchmark.pedantic(time_ours, setup=time_others, rounds=repetitions)

        medians = {name: statistics.median(t) for name, t in times.items()}
        ours_s = self.benchmark.stats["median"]
        if by_bytes:
            fastest = min(medians.pop(name) for name in loops)
            amount, unit, limit = bytes_read, "GB/s", weights.nbytes / fastest
        else:
            amount, unit, limit = flops, "GFLOP/s", machine.gemm_rate(dtype)
        best = min(medians.values())
        row = Row(
            benchmark=op,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            median_us=round(ours_s * 1e6, 1),
            iqr_us=round(self.benchmark.stats["iqr"] * 1e6, 1),
            rate=round(amount / ours_s / 1e9, 2),
            unit=unit,
            limit=round(limit / 1e9, 2),
            percent_of_limit=round(100 * amount / ours_s / limit, 1),
            best_pytorch_us=round(best * 1e6, 1),
            ref_us=round(medians["ref"] * 1e6, 1),
            speedup=round(best / ours_s, 3),
            error=error,
        )
        self.benchmark.extra_info.update(asdict(row))
        self.rows.append(row)


ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest) -> Comparison:
    return Comparison(benchmark, request.config.stash.setdefault(ROWS, []))


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> bool:
    """Whether torch.compile of the PyTorch chains is timed too."""
    return request.config.getoption("--benchmark-compile")


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config):
    yield  # pytest-benchmark's table, so that the rows come last
    rows = config.stash.get(ROWS, [])
    if rows:
        _summarize(rows, terminalreporter, config)


def _summarize(rows: list[Row], terminalreporter, config: pytest.Config) -> None:
    terminalreporter.section("kernels beside PyTorch and the limits of this machine")
    say = terminalreporter.write_line
    env = machine.environment()
    say(
        f"{env['device']}, {env['threads']} threads, {env['cpu_capability']}, torch {env['torch']},"
        f" commit {env['commit']}{'+changes' * (env['dirty'] == 1)}"
    )
    if any(row.unit == "GB/s" for row in rows):
        for name, rate in sorted(machine.read_rates().items(), key=lambda item: -item[1]):
            say(f"  read {rate / 1e9:6.1f} GB/s  {name}")
    for dtype in dict.fromkeys(row.dtype for row in rows):
        rate = machine.gemm_rate(getattr(torch, dtype))
        say(f"  gemm {rate / 1e9:6.0f} GFLOP/s  {dtype}")
    for row in rows:
        say(str(row))
    path = _results_path(config)
    if path is not None:
        _append(path, rows)
        say(f"{len(rows)} rows appended to {path}")


def _results_path(config: pytest.Config) -> Path | None:
    given = config.getoption("--benchmark-results")
    if given is None:
        name = re.sub(r"[^a-z0-9]+", "-", machine.cpu_model().lower()).strip("-")
        return Path(__file__).parent / "results" / f"{name}.csv"
    return None if given == "none" else Path(given)


def _append(path: Path, rows: list[Row]) -> None:
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    lines = [{"date": date, **machine.environment(), **asdict(row)} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(lines)
