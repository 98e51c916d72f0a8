"""The `compare` fixture, the result rows, and the summary at the end of `pytest --benchmark`.

Every benchmark names its sizes per device in a mark, `sizes(cpu=[…], cuda=[…], dry=[…])`: grids of
arguments, the last argument of a grid varying fastest.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.gpu.comparison import GpuComparison, GpuRow, as_dict
from benchmarks.gpu.devices import DEVICES
from benchmarks.micro.comparison import Comparison, Row
from nbl_kernels import machine

ROWS = pytest.StashKey[list[Row | GpuRow]]()
DEVICE = pytest.StashKey()  # of gpu.devices; none on the CPU
DEADLINE = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sizes(cpu, cuda, dry): grids of arguments per device")
    config.stash[ROWS] = []
    minutes = config.getoption("--benchmark-minutes")
    config.stash[DEADLINE] = math.inf if minutes is None else time.monotonic() + 60 * minutes
    device = config.getoption("--benchmark-device")
    if device in DEVICES:
        config.stash[DEVICE] = DEVICES[device]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("sizes")
    if mark is None:
        return
    grids = mark.kwargs[metafunc.config.getoption("--benchmark-device")]
    names = list(dict.fromkeys(name for grid in grids for name in grid))
    cases = [case for grid in grids for case in itertools.product(*(grid[n] for n in names))]
    ids = ["-".join(_label(n, value) for n, value in zip(names, case)) for case in cases]
    metafunc.parametrize(names, cases, ids=ids)


def _label(name: str, value: object) -> str:
    letters = {"m": "M", "d": "d", "tokens": "N", "layers": "L"}
    return f"{letters.get(name, '')}{value}"


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Comparison | GpuComparison:
    config = request.config
    if time.monotonic() > config.stash[DEADLINE]:
        pytest.skip("out of time")

    def add(row: Row | GpuRow | dict[str, str]) -> None:
        config.stash[ROWS].append(row)
        path = _results_path(config)
        if path is not None and path.suffix == ".jsonl":
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(as_dict(row), ensure_ascii=False) + "\n")

    if DEVICE in config.stash:
        return GpuComparison(config.stash[DEVICE], add, config.stash[DEADLINE])
    return Comparison(request.getfixturevalue("benchmark"), add, config.stash[DEADLINE])


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


def _summarize(rows: list[Row | GpuRow | dict], terminalreporter, config: pytest.Config) -> None:
    terminalreporter.section("kernels beside PyTorch and the limits of this machine")
    say = terminalreporter.write_line
    env = _environment(config)
    on_gpu = DEVICE in config.stash
    place = f"{env['threads']} threads, {env['cpu_capability']}" if not on_gpu else env["device"]
    say(
        f"{machine.cpu_model()}, {place}, torch {env['torch']},"
        f" commit {env['commit']}{'+changes' * (env['dirty'] == 1)}"
    )
    if on_gpu:
        say(f"  copy {config.stash[DEVICE].copy_rate() / 1e9:6.1f} GB/s")
    elif any(row.unit == "GB/s" for row in rows):
        for name, rate in sorted(machine.read_rates().items(), key=lambda item: -item[1]):
            say(f"  read {rate / 1e9:6.1f} GB/s  {name}")
    gemm_rate = config.stash[DEVICE].gemm_rate if on_gpu else machine.gemm_rate
    for dtype in dict.fromkeys(as_dict(row)["dtype"] for row in rows):
        rate = gemm_rate(getattr(torch, dtype))
        say(f"  gemm {rate / 1e9:6.0f} GFLOP/s  {dtype}")
    for row in rows:
        say("  ".join(row.values()) if isinstance(row, dict) else str(row))
    path = _results_path(config)
    if path is not None:
        if path.suffix != ".jsonl":  # there the rows are already
            found = [as_dict(row) for row in rows if not isinstance(row, dict)]
            results.append_rows(path, found, env)
        say(f"{len(rows)} rows appended to {path}")


def _environment(config: pytest.Config) -> dict[str, object]:
    env = results.environment()
    if DEVICE in config.stash:
        env = {**env, **config.stash[DEVICE].environment()}
    return env


def _results_path(config: pytest.Config) -> Path | None:
    given = config.getoption("--benchmark-results")
    if given is None:
        device = _environment(config)["device"]
        name = re.sub(r"[^a-z0-9]+", "-", str(device).lower()).strip("-")
        return results.FOLDER / f"{name}.csv"
    return None if given == "none" else Path(given)
