"""Where a comparison runs: a CUDA GPU, or the CPU in its place to try the same code without one."""

from __future__ import annotations

import functools
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

PATHS = {
    "linear": ("plain", "kernel"),
    "covariance": ("plain", "portable", "hopper"),
    "rope": ("plain", "kernel"),
    "memory": ("plain", "kernel"),
}
ONLY_PATH = "linalg"  # of the solves, which are torch.linalg everywhere
NVIDIA_SMI_FIELDS = (
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


class Cuda:
    """The current CUDA device, timed by events."""

    name = "cuda"
    copy_bytes = 1 << 30  # read and written by one copy(), half each

    def __init__(self) -> None:
        self.index = torch.cuda.current_device()
        self.properties = torch.cuda.get_device_properties(self.index)
        self.device = f"cuda:{self.index}"
        # Copies of the data together: whoever comes back to one finds nothing of it in L2.
        self.block_bytes = max(256 << 20, 4 * self.properties.L2_cache_size)

    @functools.cached_property
    def _has_kernels(self) -> bool:
        import nbl_kernels as nk  # not above: gpu_report.py looks at the device before it builds

        return nk.build_info()["cuda"]

    def paths(self, switch: str | None) -> tuple[str, ...]:
        """Implementations of one op that this device can run; None: there is but one."""
        if switch is None:
            return (ONLY_PATH,)
        if not self._has_kernels:
            return ("plain",)
        hopper = (self.properties.major, self.properties.minor) == (9, 0)
        return tuple(path for path in PATHS[switch] if path != "hopper" or hopper)

    def use_path(self, switch: str | None, path: str) -> None:
        import nbl_kernels as nk

        if self._has_kernels and switch is not None:
            nk.set_cuda_path(switch, path)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3

    def capture(self, call: Callable[[int], object], numbers: list[int]) -> Callable[[], None]:
        """A CUDA graph of call(n) for every number; returns its replay."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is loaded or chosen at first use cannot be captured
            for number in numbers[:3]:
                call(number)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in numbers:
                call(number)
        return graph.replay

    @functools.cached_property
    def _blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode(False):  # wherever it is first asked for
            return tuple(torch.randn(2, self.copy_bytes // 8, device=self.device))

    def copy(self) -> None:
        target, source = self._blocks
        target.copy_(source)

    @functools.cache  # noqa: B019  one device in a process
    def gemm_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of torch.matmul on random square matrices."""
        size = 8192 if dtype.itemsize <= 2 else 4096
        x, w = torch.randn(2, size, size, device=self.device).to(dtype)
        return 2 * size**3 / self._median_seconds(lambda: x @ w.T)

    @functools.cache  # noqa: B019
    def copy_rate(self) -> float:
        """Bytes per second of a copy within the memory, read and written counted."""
        return self.copy_bytes / self._median_seconds(self.copy)

    def _median_seconds(self, call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        stamps = [self.stamp()]
        for _ in range(11):
            call()
            stamps.append(self.stamp())
        self.synchronize()
        return statistics.median(self.seconds(a, b) for a, b in itertools.pairwise(stamps))

    def environment(self) -> dict[str, object]:
        """What a result must say of the device; the clocks are those of this moment."""
        p = self.properties
        return {
            "device": p.name,
            "compute_capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "l2_mib": round(p.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "nvidia_smi": self._nvidia_smi(),
        }

    def _nvidia_smi(self) -> dict[str, str]:
        query = ",".join(NVIDIA_SMI_FIELDS)
        which = str(getattr(self.properties, "uuid", self.index))
        which = f"GPU-{which}" if "-" in which and not which.startswith("GPU-") else which
        command = ["nvidia-smi", f"--id={which}", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            return {"unavailable": str(error)}
        return dict(zip(NVIDIA_SMI_FIELDS, (v.strip() for v in out.stdout.split(","))))


class Dry(Cuda):
    """The CPU under the same interface. What it measures means nothing."""

    name = "dry"
    copy_bytes = 1 << 20

    def __init__(self) -> None:
        self.device = "cpu"
        self.block_bytes = 1 << 16

    def paths(self, switch: str | None) -> tuple[str, ...]:
        return ("cpu",)

    def use_path(self, switch: str | None, path: str) -> None: ...

    def synchronize(self) -> None: ...

    def stamp(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def capture(self, call: Callable[[int], object], numbers: list[int]) -> Callable[[], None]:
        def replay() -> None:
            for number in numbers:
                call(number)

        return replay

    @functools.cache  # noqa: B019
    def gemm_rate(self, dtype: torch.dtype) -> float:
        x, w = torch.randn(2, 128, 128).to(dtype)
        return 2 * 128**3 / self._median_seconds(lambda: x @ w.T)

    def environment(self) -> dict[str, object]:
        return {"device": "CPU", "cuda": None}


DEVICES = {"cuda": Cuda, "dry": Dry}
