"""Times a kernel beside PyTorch and the limits of the machine, on the CPU."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import Tensor

from nbl_kernels import machine

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

    device = "cpu"
    block_bytes = machine.BLOCK_BYTES

    def __init__(self, benchmark, add: Callable[[Row], None], deadline: float) -> None:
        self.benchmark, self.add, self.deadline = benchmark, add, deadline

    def skip_if_longer_than_left(self, seconds: float) -> None:
        if time.monotonic() + seconds > self.deadline:
            pytest.skip("out of time")

    def __call__(
        self,
        op: str,
        shape: str,
        dtype: torch.dtype,
        *,
        switch: str | None,
        ours: Call,
        pytorch: dict[str, Call],
        ref: Call,
        copies: int,
        flops: float,
        bytes_read: float = 0.0,
        weights: Tensor | None = None,
        pytorch_share: float = 1.0,
        others: dict[str, Callable[[], Call]] | None = None,
        error: Callable[[], float],
        pytorch_error: float | None = None,
    ) -> None:
        """Adds a row.

        Args:
            switch: whose paths are compared on a GPU: linear, covariance, rope, memory, or None.
            ours, pytorch, ref: what is compared; every call gets the number of the next copy.
            copies: of the data, together larger than the caches.
            flops, bytes_read: of one call. The limit is whichever takes longer on this machine.
            weights: where bytes may be the limit, all copies as one block: the best read loops
                go over it in turn with the others, so that all see the same machine.
            pytorch_share: of the work of one call of ours that a call of pytorch does.
            others: libraries to compare with on a GPU, made when they are needed.
            error, pytorch_error: relative to float64, of ours and of PyTorch's first.
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
        # The reference is plain PyTorch too, and at times the fastest of it.
        best = min(s for name, s in medians.items() if name in (*pytorch, "ref")) / pytorch_share
        of_pytorch = "" if pytorch_error is None else f" (PyTorch {pytorch_error:.1e})"
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
            error=f"{error():.1e}{of_pytorch}",
        )
        self.benchmark.extra_info.update(asdict(row))
        self.add(row)
