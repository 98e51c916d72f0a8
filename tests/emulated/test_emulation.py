"""The emulation of a CUDA block: right for a right kernel, and it catches a wrong one."""

from __future__ import annotations

import numpy as np
import pytest
from emulation.build import EmulationError, build_driver, run_driver

FAULTS = ["no barrier", "no wait", "part of a block", "lone lane", "overrun", "unaligned"]


def block_sums(fault: int, seed: int, blocks: int = 3, threads: int = 96) -> bool:
    """Whether the sums are those expected."""
    values = np.random.default_rng(seed).integers(1, 9, 4 * blocks * threads + 4).astype("f4")
    header = np.array([fault, blocks, threads, seed], "i4")
    out = run_driver(build_driver("self"), header.tobytes() + values.tobytes())
    sums = values[: 4 * blocks * threads].reshape(blocks, -1).sum(1)
    return np.array_equal(np.frombuffer(out, "f4"), sums)


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_a_right_kernel(threads):
    assert all(block_sums(0, seed, threads=threads) for seed in range(4))


@pytest.mark.parametrize("fault", range(1, len(FAULTS) + 1), ids=FAULTS)
def test_a_wrong_kernel_is_caught(fault):
    caught = 0
    for seed in range(8):
        try:
            caught += not block_sums(fault, seed)
        except EmulationError as error:
            assert "emulation:" in str(error) or "Sanitizer" in str(error)
            caught += 1
    assert caught >= 7  # a schedule may happen to be the right one
