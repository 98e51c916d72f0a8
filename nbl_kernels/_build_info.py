"""How this package was built and which kernels run here."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from nbl_kernels import _C, _ops
from nbl_kernels._version import __version__


def include_dir() -> Path:
    """The folder of the kernels' headers, for ``#include "nbl/…"`` in C++ or CUDA code."""
    package = Path(__file__).resolve().parent
    # Installed with the package; beside it in a source tree.
    for folder in (package / "include", package.parent / "csrc" / "include"):
        if (folder / "nbl").is_dir():
            return folder
    raise FileNotFoundError(f"the kernels' headers are not in {package / 'include'}")


def build_info() -> dict[str, object]:
    """Versions, what was compiled, what runs here, and why CUDA kernels do not.

    Keys: ``version``, ``python``, ``torch``, ``built_with_torch``, ``compiler``, ``archs`` (CUDA
    architectures compiled for), ``cpu_capability`` (the instruction set in use),
    ``cpu_capabilities`` (those this processor can run), ``threads``, ``cuda`` (can the CUDA
    kernels run here), ``cuda_reason`` (why not), ``cuda_paths`` (:func:`cuda_paths`).
    """
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "built_with_torch": _C.torch_version,
        "compiler": _C.compiler,
        "archs": [] if _ops._C_cuda is None else _ops._C_cuda.archs.split(),
        "cpu_capability": _C.cpu_capability(),
        "cpu_capabilities": _C.cpu_capabilities(),
        "threads": torch.get_num_threads(),
        "cuda": cuda_reason() == "",
        "cuda_reason": cuda_reason(),
        "cuda_paths": cuda_paths(),
    }


def cuda_reason() -> str:
    """Why the CUDA kernels cannot run here; empty where they can."""
    if _ops._C_cuda is None:
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is a build without CUDA"
        if isinstance(_ops.cuda_error, ModuleNotFoundError):
            return (
                "the CUDA kernels were not built: reinstall from source with NBL_CUDA=1, "
                "which says what is missing"
            )
        return f"the CUDA kernels do not load: {_ops.cuda_error}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return f"the GPU is of compute capability {major}.{minor}; the kernels need 8.0"
    return ""


def cuda_paths() -> dict[str, str]:
    """Which implementation runs on tensors of the current GPU, for "linear", "covariance",
    "rope" and "memory".

    "plain" is PyTorch operations: the default until a GPU of that kind has shown our kernels to be
    right and faster (the table is in ``csrc/cuda/paths.cpp``). Empty where :func:`cuda_reason`
    says why nothing can run.
    """
    if cuda_reason():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return _ops._C_cuda.cuda_paths(10 * major + minor)


def set_cuda_path(op: str, path: str) -> None:
    """Selects the implementation of "linear", "covariance", "rope", "memory" or "all" on CUDA
    tensors.

    ``path``: "auto" (what has been measured to be the best), "plain", "kernel"; for covariance
    also "portable" (sm_80 and later) and "hopper". The environment variable
    ``NBL_CUDA_PATHS="linear=kernel,covariance=portable"`` does the same at start.
    Raises RuntimeError where the CUDA kernels are not there, or for an unknown name.
    """
    if _ops._C_cuda is None:
        raise RuntimeError(f"set_cuda_path: {cuda_reason()}")
    _ops._C_cuda.set_cuda_path(op, path)
