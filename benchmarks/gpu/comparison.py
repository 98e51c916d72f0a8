"""Times every path of an op beside PyTorch on a GPU.

Short kernels are captured in CUDA graphs of a few milliseconds, PyTorch's chains too, so that the
kernels are measured and not the launches; how long plain calls take is a figure of its own. Graphs
are replayed in turn, in several rounds, with events between them; a copy within the memory takes
part, and is the limit where bytes are. Each call of a graph reads another copy of the data, all
copies together several times the L2 cache.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.devices import Cuda

SECONDS_PER_REPETITION = 2e-3  # of a graph: enough for its launch not to matter
MAX_CALLS = 256  # of a graph
SECONDS_PER_CANDIDATE = 0.15  # of repetitions
MAX_ROUNDS = 25
TOO_LONG_TO_REPEAT = 1.0  # seconds: the first run is the measurement

SHORT = ("linear", "rope", "memory")  # ops of microseconds, which are timed in CUDA graphs

Call = Callable[[int], object]  # runs one candidate on the copy of that number


@dataclass(frozen=True)
class GpuRow:
    """One path of one op at one shape. Times are microseconds per call, medians."""

    benchmark: str
    shape: str
    dtype: str
    path: str
    us: float  # in a graph, where the op is short
    spread_percent: float | None  # half the interquartile range; None: measured once
    call_us: float  # called from Python
    rate: float
    unit: str
    limit: float  # measured in the same rounds (bytes) or the same run (FLOPs)
    limit_name: str
    percent_of_limit: float
    best_pytorch: str
    best_pytorch_us: float
    speedup: float  # best_pytorch_us / us
    speedup_of_calls: float  # PyTorch's eager chain / call_us, both called from Python
    error: float  # relative to float64
    pytorch_error: float | None
    pytorch_us: dict[str, float] = field(default_factory=dict)
    others_us: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        spread = "once " if self.spread_percent is None else f"±{self.spread_percent:4.1f} %"
        pytorch_error = "" if self.pytorch_error is None else f" (PyTorch {self.pytorch_error:.1e})"
        return (
            f"{self.benchmark:<15} {self.shape:<16} {self.dtype:<8} {self.path:<8} |"
            f" {self.us:9.1f} µs {spread} |"
            f" {self.rate:7.1f} {self.unit:<7} |"
            f" {self.percent_of_limit:5.1f} % of {self.limit_name} |"
            f" {self.speedup:5.2f}x best PyTorch ({self.best_pytorch}) |"
            f" calls {self.speedup_of_calls:5.2f}x eager | error {self.error:.1e}{pytorch_error}"
        )


class GpuComparison:
    """What `compare` is on a GPU; the arguments are those of micro.comparison.Comparison."""

    def __init__(
        self, device: Cuda, add: Callable[[GpuRow | dict[str, str]], None], deadline: float
    ) -> None:
        self._device, self._add, self._deadline = device, add, deadline
        self.device, self.block_bytes = device.device, device.block_bytes

    def skip_if_longer_than_left(self, seconds: float) -> None:
        if time.monotonic() + seconds > self._deadline:
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
        ref: Call,  # not timed: on a GPU it is the path "plain"
        copies: int,
        flops: float,
        bytes_read: float = 0.0,
        weights: Tensor | None = None,
        pytorch_share: float = 1.0,
        others: dict[str, Callable[[], Call]] | None = None,
        error: Callable[[], float],
        pytorch_error: float | None = None,
    ) -> None:
        device = self._device
        about = {
            "benchmark": op,
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
        }
        errors: dict[str, float] = {}
        try:
            for path in device.paths(switch):
                device.use_path(switch, path)
                try:
                    errors[path] = error()
                except RuntimeError as failure:
                    self._add({**about, "path": path, "failed": str(failure)})
            if not errors:
                pytest.fail(f"no path of {op} ran")
            calls = {f"ours: {path}": (ours, path) for path in errors}
            calls |= {name: (call, None) for name, call in pytorch.items()}
            extra, absent = {}, {}
            for name, make in (others or {}).items():
                try:
                    extra[name] = make()
                    extra[name](0)  # compiles what it needs
                except Exception as failure:  # a library that is absent, or cannot do this
                    absent[name] = f"{type(failure).__name__}: {failure}"
            calls |= {name: (call, None) for name, call in extra.items()}
            seconds, copy_rate = self._time(switch, calls, copies, captured=switch in SHORT)
        finally:
            device.use_path(switch, "auto")
        if absent:
            self._add({**about, "path": "", "failed": f"not compared with {absent}"})

        by_bytes = bytes_read / copy_rate > flops / device.gemm_rate(dtype)
        amount, unit, limit, limit_name = (
            (bytes_read / 1e9, "GB/s", copy_rate / 1e9, "copy bandwidth")
            if by_bytes
            else (flops / 1e12, "TFLOP/s", device.gemm_rate(dtype) / 1e12, "GEMM rate")
        )
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        theirs = {
            name: round(medians[name] / pytorch_share * 1e6, 2)
            for name in medians
            if name.removesuffix(", graph") in pytorch
        }
        best = min(theirs, key=theirs.get)
        for path in errors:
            called = medians[f"ours: {path}"]
            name = f"ours: {path}, graph" if f"ours: {path}, graph" in medians else f"ours: {path}"
            s = medians[name]
            self._add(
                GpuRow(
                    **about,
                    path=path,
                    us=round(s * 1e6, 2),
                    spread_percent=_spread(seconds[name]),
                    call_us=round(called * 1e6, 2),
                    rate=round(amount / s, 2),
                    unit=unit,
                    limit=round(limit, 2),
                    limit_name=limit_name,
                    percent_of_limit=round(100 * amount / s / limit, 1),
                    best_pytorch=best,
                    best_pytorch_us=theirs[best],
                    speedup=round(theirs[best] / (s * 1e6), 3),
                    speedup_of_calls=round(next(iter(theirs.values())) / (called * 1e6), 3),
                    error=errors[path],
                    pytorch_error=pytorch_error,
                    pytorch_us=theirs,
                    others_us={name: round(medians[name] * 1e6, 2) for name in extra},
                )
            )

    def _time(
        self,
        switch: str | None,
        calls: dict[str, tuple[Call, str | None]],
        copies: int,
        captured: bool,
    ) -> tuple[dict[str, list[float]], float]:
        """Seconds per call of every candidate, round by round, and the copy rate among them."""
        device = self._device
        numbers = list(range(copies))

        def loop(call: Call, path: str | None) -> Callable[[], None]:
            def run() -> None:
                if path is not None:
                    device.use_path(switch, path)
                for number in numbers:
                    call(number)

            return run

        def once(run: Callable[[], None]) -> float:
            device.synchronize()
            start = device.stamp()
            run()
            end = device.stamp()
            device.synchronize()
            return device.seconds(start, end)

        called = {name: loop(call, path) for name, (call, path) in calls.items()}
        first = {name: once(run) for name, run in called.items()}
        graphs: dict[str, Callable[[], None]] = {}
        if captured:
            shortest = min(once(run) for run in called.values()) / copies
            rounds = math.ceil(min(SECONDS_PER_REPETITION / shortest, MAX_CALLS) / copies)
            numbers[:] = numbers * max(1, rounds)
            for name, (call, path) in calls.items():
                if path is not None:
                    device.use_path(switch, path)
                graphs[f"{name}, graph"] = device.capture(call, numbers)

        seconds: dict[str, list[float]] = {}
        repetitions: dict[str, int] = {}
        for name, run in (graphs | called).items():
            if not captured and first[name] > TOO_LONG_TO_REPEAT:
                seconds[name], repetitions[name] = [first[name]], 0
            else:
                seconds[name] = []  # the first run was to warm up
                affordable = int(SECONDS_PER_CANDIDATE / once(run))
                repetitions[name] = max(3, min(MAX_ROUNDS, affordable))
        copy_seconds: list[float] = []
        order = list(graphs)
        for number in range(max(3, *repetitions.values())):
            # One behind the other without a pause; the first copy covers the launch of the rest.
            replayed = [name for name in order if number < repetitions[name]]
            device.copy()
            stamps = [device.stamp()]
            device.copy()
            stamps.append(device.stamp())
            for name in replayed:
                graphs[name]()
                stamps.append(device.stamp())
            device.synchronize()
            durations = [device.seconds(a, b) for a, b in itertools.pairwise(stamps)]
            copy_seconds.append(durations[0])
            for name, duration in zip(replayed, durations[1:]):
                seconds[name].append(duration)
            for name, run in called.items():
                if number < repetitions[name]:
                    seconds[name].append(once(run))
            order = order[1:] + order[:1]
        per_call = {name: [t / len(numbers) for t in times] for name, times in seconds.items()}
        return per_call, device.copy_bytes / statistics.median(copy_seconds)


def _spread(times: list[float]) -> float | None:
    if len(times) < 3:
        return None
    low, middle, high = statistics.quantiles(times, n=4)
    return round(50 * (high - low) / middle, 1)


def as_dict(row: GpuRow | dict[str, str]) -> dict[str, object]:
    return row if isinstance(row, dict) else asdict(row)
