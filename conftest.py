"""Adds ``pytest --benchmark``: the microbenchmarks in benchmarks/ instead of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark")
    group.addoption(
        "--benchmark",
        action="store_true",
        help="Run the microbenchmarks in benchmarks/ instead of the tests.",
    )
    group.addoption(
        "--benchmark-device",
        choices=["cpu", "cuda", "dry"],
        default="cpu",
        help="Where to measure. dry: what cuda does, on the CPU with tiny sizes, to test it.",
    )
    group.addoption(
        "--benchmark-results",
        metavar="PATH",
        help="CSV file for the rows (default: benchmarks/results/<device>.csv), or one ending in "
        ".jsonl, to which each row is appended as it is measured; none: no file.",
    )
    group.addoption(
        "--benchmark-minutes",
        type=float,
        metavar="N",
        help="Skip what has not begun after so long.",
    )
    group.addoption(
        "--benchmark-compile",
        action="store_true",
        help="Also time torch.compile of the plain PyTorch chains (takes minutes).",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install pytest-benchmark")
    if config.getoption("--benchmark-device") == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--benchmark-device cuda needs a GPU that this torch can use")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:  # no path on the command line
        config.args = [str(BENCHMARKS)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.is_relative_to(BENCHMARKS) and not config.getoption("--benchmark"):
        return True
    return None
