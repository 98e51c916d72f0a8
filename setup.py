"""Builds the extension modules. pyproject.toml holds everything else."""

from __future__ import annotations

import os
from pathlib import Path

import pybind11
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent

# The oldest torch whose stable ABI is used: one build serves it and every later one.
TORCH_TARGET_VERSION = "0x020a000000000000"


def cpu_extension() -> CppExtension:
    sources = ["csrc/pybind.cpp", "csrc/ops.cpp", *(f"csrc/cpu/{p.name}" for p in cpu_sources())]
    return CppExtension(
        "nbl_kernels._C",
        sources,
        # pybind11's own headers before the copy that torch brings: that of 2.10 refuses to be
        # included where only the stable ABI is used.
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc" / "include"), pybind11.get_include()],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        # No -march: the instruction set is chosen at run time (csrc/cpu/dispatch.cpp).
        extra_compile_args=[
            "-O3",
            "-std=c++17",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-maybe-uninitialized",  # GCC 12's own AVX-512 headers
        ],
    )


def cpu_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


def explain() -> None:
    """Says what is built and why: the first question when a build is not what one expected."""
    if os.environ.get("NBL_CUDA") == "1":
        raise SystemExit(
            "NBL_CUDA=1 asks for CUDA kernels, and this version has none yet: unset NBL_CUDA. "
            "On CUDA tensors the operators run as PyTorch operations."
        )
    print("nbl_kernels: building _C (CPU kernels); this version has no CUDA kernels", flush=True)


explain()
setup(
    ext_modules=[cpu_extension()],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
