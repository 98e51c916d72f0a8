"""What the machine can do, measured: reading memory, multiplying matrices.

The limits that benchmarks compare with, so they are measured in the run that they judge.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from nbl_kernels import _C
from nbl_kernels.pages import use_huge_pages

BLOCK_BYTES = 256 << 20  # far more than any cache


def seconds(call: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """How long a call takes, with the work that it leaves a GPU to do."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


Name = TypeVar("Name", bound=Hashable)
Figure = TypeVar("Figure")


def in_turns(calls: Mapping[Name, Callable[[], Figure]], rounds: int) -> dict[Name, list[Figure]]:
    """What the calls return, seconds say, in so many rounds of one call each: a machine that slows
    down slows all of them, and figures of one round may be compared."""
    found: dict[Name, list[Figure]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(call())
    return found


def _sum(block: Tensor) -> None:
    block.sum()


def _loop(streams: int, ahead: int) -> Callable[[Tensor], None]:
    def read(block: Tensor) -> None:
        _C.read_loop(block.data_ptr(), block.nbytes, streams, ahead)

    return read


READ_LOOPS: dict[str, Callable[[Tensor], None]] = {
    "torch sum": _sum,
    "1 stream": _loop(1, 0),
    "4 streams": _loop(4, 0),
} | {
    f"{streams} stream{'s' * (streams > 1)}, prefetch {ahead} B ahead": _loop(streams, ahead)
    for streams in (1, 4)
    for ahead in (1024, 4096, 16384)
}


@functools.cache
def read_rates() -> dict[str, float]:
    """Bytes per second of every read loop over a block out of cache: medians, taken in turn."""
    block = torch.ones(BLOCK_BYTES // 4)
    use_huge_pages(block)  # the limit is what the machine can do
    loops = {
        name: functools.partial(seconds, functools.partial(read, block))
        for name, read in READ_LOOPS.items()
    }
    times = in_turns(loops, 11)
    return {name: block.nbytes / statistics.median(t) for name, t in times.items()}


def best_read_loops() -> list[str]:
    """Those worth repeating beside a kernel: which one is fastest varies a little with the data."""
    return sorted(read_rates(), key=read_rates().get, reverse=True)[:3]


def measure_gemm_rate(dtype: torch.dtype, device: str | torch.device = "cpu") -> float:
    """FLOP/s of torch.matmul, x Wᵀ of square matrices, as large as a quarter of a second allows."""
    rate, size, largest = 0.0, 256, 4096 if torch.device(device).type == "cpu" else 8192
    while size <= largest and (size == 256 or 2 * size**3 / rate < 0.25):
        x, w = torch.randn(2, size, size, device=device).to(dtype)
        times = [seconds(lambda x=x, w=w: x @ w.T, device) for _ in range(6)]
        rate = max(rate, 2 * size**3 / min(times[1:]))
        size *= 2
    return rate


@functools.cache
def gemm_rate(dtype: torch.dtype) -> float:
    """The same on the CPU, once; what converting to a dtype that is faster gives counts too."""
    rate = measure_gemm_rate(dtype)
    if dtype is torch.float16:  # slow on most processors: converting first is the limit there
        rate = max(rate, gemm_rate(torch.float32))
    return rate


@functools.cache
def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
