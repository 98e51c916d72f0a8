"""Where an operator is tested: on this processor, with every instruction set that it has, and on
the GPU where there is one, on each of the operator's paths.

    path = devices.paths("rope", "kernel", "plain")  # in a test's module: a fixture

A test that takes ``path`` makes its inputs on ``path.device``. NBL_TEST_DEVICE=cuda or cpu leaves
the other out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

import nbl_kernels as nk
from nbl_kernels import _C

ASKED = os.environ.get("NBL_TEST_DEVICE", "")
ON_GPU = ASKED != "cpu" and nk.build_info()["cuda"]
if ASKED == "cuda" and not ON_GPU:
    raise pytest.UsageError(f"NBL_TEST_DEVICE=cuda: {nk.build_info()['cuda_reason']}")

# For what there is on a GPU alone: streams, graphs, tensors of more than 2^31 elements.
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")


@dataclass(frozen=True)
class Path:
    """One way to compute an operator."""

    device: str  # "cpu" or "cuda"
    name: str  # an instruction set, or a path that nk.set_cuda_path knows

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def __str__(self) -> str:
        return f"{self.device}-{self.name}"


def paths(op: str | None, *cuda_paths: str, capabilities: bool = True):
    """A fixture: each :class:`Path` of ``op`` in turn; afterwards the default is back. None: an
    operator that has but one on a GPU, whatever it is called here.

    ``capabilities`` False: of the CPU only the best one, for what does not depend on it.
    """
    places = []
    if ASKED != "cuda":
        names = _C.cpu_capabilities() if capabilities else [_C.cpu_capability()]
        places += [Path("cpu", name) for name in names]
    if ON_GPU:
        places += [Path("cuda", name) for name in cuda_paths]
    return _fixture(op, places)


def cuda_paths(op: str, *names: str):
    """The same on a GPU alone."""
    return _fixture(op, [Path("cuda", name) for name in names])


def _fixture(op: str | None, places: list[Path]):
    @pytest.fixture(params=places, ids=str)
    def path(request: pytest.FixtureRequest) -> Iterator[Path]:
        chosen = request.param
        if not chosen.on_gpu:
            _C.set_cpu_capability(chosen.name)
            yield chosen
            _C.set_cpu_capability("")
            return
        if chosen.name == "hopper" and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("this GPU is no Hopper")
        if op is None:
            with full_precision():
                yield chosen
            return
        with cuda_path(op, chosen.name), full_precision():
            assert nk.cuda_paths()[op] == chosen.name
            yield chosen

    return path


@contextmanager
def cuda_path(op: str, name: str) -> Iterator[None]:
    """``op`` ("all" for every one) by that path, on a GPU."""
    if ON_GPU:
        nk.set_cuda_path(op, name)
    try:
        yield
    finally:
        if ON_GPU:
            nk.set_cuda_path(op, "auto")


@contextmanager
def full_precision() -> Iterator[None]:
    """PyTorch's own products, which are the measure, are not to be reduced."""
    matmul = torch.backends.cuda.matmul
    reductions = [f"allow_{name}_reduced_precision_reduction" for name in ("bf16", "fp16")]
    before = {name: getattr(matmul, name) for name in ("allow_tf32", *reductions)}
    for name in before:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
