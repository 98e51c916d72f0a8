"""Where and with what a benchmark ran, and what that machine can do (nbl_kernels.machine)."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from nbl_kernels import build_info
from nbl_kernels.machine import (
    BLOCK_BYTES,
    READ_LOOPS,
    best_read_loops,
    cpu_model,
    gemm_rate,
    read_rates,
    seconds,
)

__all__ = [
    "BLOCK_BYTES",
    "READ_LOOPS",
    "best_read_loops",
    "cpu_model",
    "environment",
    "gemm_rate",
    "read_rates",
    "seconds",
]


def _git(*args: str) -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def environment() -> dict[str, object]:
    """The columns of a result row that say where and with what it was measured."""
    info = build_info()
    changes = _git("status", "--porcelain", "--", ":/", ":!/benchmarks/results")
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": "unknown" if changes is None else int(bool(changes)),
        "device": cpu_model(),
        "threads": info["threads"],
        "torch": info["torch"],
        "python": info["python"],
        "nbl_kernels": info["version"],
        "cpu_capability": info["cpu_capability"],
    }
