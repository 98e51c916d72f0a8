"""How this package was built and which kernels run here."""

from __future__ import annotations

import platform

import torch

from nbl_kernels import _C
from nbl_kernels._version import __version__


def build_info() -> dict[str, object]:
    """Versions, what was compiled, what runs here, and why CUDA kernels do not.

    Keys: ``version``, ``python``, ``torch``, ``built_with_torch``, ``compiler``, ``archs`` (CUDA
    architectures compiled for), ``cpu_capability`` (the instruction set in use),
    ``cpu_capabilities`` (those this processor can run), ``threads``, ``cuda`` (are the CUDA
    kernels available), and ``cuda_reason``.
    """
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "built_with_torch": _C.torch_version,
        "compiler": _C.compiler,
        "archs": [],
        "cpu_capability": _C.cpu_capability(),
        "cpu_capabilities": _C.cpu_capabilities(),
        "threads": torch.get_num_threads(),
        "cuda": False,
        "cuda_reason": "this version has no CUDA kernels; on CUDA tensors the operators run as "
        "PyTorch operations",
    }
