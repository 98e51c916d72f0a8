"""Builds the extension modules. pyproject.toml holds everything else.

NBL_CUDA=1 insists on the CUDA kernels, 0 forbids them; by default they are built where they can be.
TORCH_CUDA_ARCH_LIST names the architectures, e.g. "8.0;9.0a"; by default that of the GPU here, or
every supported one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# The oldest torch whose stable ABI is used: one build serves it and every later one.
TORCH_TARGET_VERSION = "0x020a000000000000"
CUDA_ARCHS = ("8.0", "8.6", "8.9", "9.0a", "10.0a", "12.0a")
CUDA_LIBRARIES = ("cublas", "cublasLt")
CUDA_HEADERS = ("cuda_runtime_api.h", "cublas_v2.h", "cublasLt.h")


class NoCuda(Exception):
    """Why the CUDA kernels cannot be built here."""


class Toolkit:
    """nvcc, and where the headers and libraries are: in its toolkit or in pip's nvidia packages."""

    def __init__(self) -> None:
        if torch.version.cuda is None:
            raise NoCuda(f"torch {torch.__version__} is a build without CUDA")
        self.home = self._find_home()
        self.version = self._nvcc_version()
        if self.version.split(".")[0] != torch.version.cuda.split(".")[0]:
            raise NoCuda(
                f"nvcc is of CUDA {self.version} and torch {torch.__version__} of CUDA "
                f"{torch.version.cuda}: the major versions must be the same"
            )
        roots = [self.home, *self.home.glob("targets/*-linux"), *self._pip_roots()]
        self.include_dirs = self._include_dirs(roots)
        self.libraries = [self._library(name, roots) for name in CUDA_LIBRARIES]
        self.library_dirs = self._library_dirs(self._library("cudart", roots))

    @staticmethod
    def _find_home() -> Path:
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = str(Path(named, "bin", "nvcc")) if named else shutil.which("nvcc")
        if nvcc is None:
            candidates = [*Toolkit._pip_roots(), Path("/usr/local/cuda")]
            found = [c / "bin" / "nvcc" for c in candidates if (c / "bin" / "nvcc").is_file()]
            if not found:
                raise NoCuda(
                    "no nvcc: install the CUDA toolkit (or `pip install nvidia-cuda-nvcc`) and put "
                    "it on PATH or in CUDA_HOME"
                )
            nvcc = str(found[0])
        # What is on PATH may be a wrapper; nvcc itself knows where it lives.
        try:
            run = subprocess.run(
                [nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise NoCuda(f"{nvcc} does not run: {error}") from error
        top = re.search(r"^#\$ TOP=(.*)$", run.stdout + run.stderr, re.MULTILINE)
        return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parents[1]

    def _nvcc_version(self) -> str:
        nvcc = self.home / "bin" / "nvcc"
        run = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False)
        release = re.search(r"release (\d+\.\d+)", run.stdout)
        if release is None:
            raise NoCuda(f"{nvcc} --version does not say which release it is")
        return release.group(1)

    def known(self, archs: Sequence[str]) -> list[str]:
        """Those that this nvcc compiles for: CUDA 12.6, say, has never heard of 10.0."""
        nvcc = self.home / "bin" / "nvcc"
        run = subprocess.run(
            [str(nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=False
        )
        names = run.stdout.split()
        return [a for a in archs if f"compute_{a.rstrip('a').replace('.', '')}" in names]

    @staticmethod
    def _pip_roots() -> list[Path]:
        nvidia = Path(torch.__file__).resolve().parents[1] / "nvidia"
        return [p for p in sorted(nvidia.glob("*")) if (p / "include").is_dir()]

    @staticmethod
    def _include_dirs(roots: list[Path]) -> list[str]:
        folders: dict[str, None] = {}
        for header in CUDA_HEADERS:
            found = next((r for r in roots if (r / "include" / header).is_file()), None)
            if found is None:
                raise NoCuda(f"no {header}: neither in the CUDA toolkit nor in pip's nvidia folder")
            folders[str(found / "include")] = None
        return list(folders)

    @staticmethod
    def _library_dirs(cudart: str) -> list[str]:
        """Where torch's -lcudart finds it: pip's package has no file of that plain name."""
        if cudart.endswith(".so"):
            return []
        folder = ROOT / "build" / "cuda_libraries"
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "libcudart.so"
        link.unlink(missing_ok=True)
        link.symlink_to(cudart)
        return [str(folder)]

    @staticmethod
    def _library(name: str, roots: list[Path]) -> str:
        for root in roots:
            for folder in ("lib64", "lib"):
                # pip's packages have lib*.so.<major> only: linked by its path
                found = sorted((root / folder).glob(f"lib{name}.so*"))
                if found:
                    return str(found[0])
        raise NoCuda(f"no lib{name}.so: neither in the CUDA toolkit nor in pip's nvidia folder")


def cuda_archs(toolkit: Toolkit) -> list[str]:
    """As in "9.0a": what TORCH_CUDA_ARCH_LIST says, or the GPUs here, or all."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if named.strip():
        archs = [a for a in re.split(r"[;,\s]+", named) if a]
    elif torch.cuda.is_available():
        capabilities = (
            torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())
        )
        archs = sorted({f"{major}.{minor}" for major, minor in capabilities})
    else:
        archs = ["8.0+PTX", *toolkit.known(CUDA_ARCHS[1:])]  # and whatever comes, by way of PTX
    return list(dict.fromkeys(_known_arch(a) for a in archs))


def _known_arch(arch: str) -> str:
    match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", arch)
    if match is None or int(match[1]) < 8:
        raise SystemExit(
            f'TORCH_CUDA_ARCH_LIST must hold versions from 8.0 on, such as "8.0;9.0a", got "{arch}"'
        )
    plain = f"{match[1]}.{match[2]}"
    # 9.0a runs where 9.0 does, and has the instructions that only that GPU has
    return (plain + "a" if plain + "a" in CUDA_ARCHS else plain) + (match[4] or "")


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        real = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{real},code=sm_{real}")
        if arch.endswith("+PTX"):
            virtual = real.rstrip("a")
            flags.append(f"-gencode=arch=compute_{virtual},code=compute_{virtual}")
    return list(dict.fromkeys(flags))


def sources(folder: str, *patterns: str) -> list[str]:
    found = (p for pattern in patterns for p in (ROOT / "csrc" / folder).glob(pattern))
    return sorted(f"csrc/{folder}/{p.name}" for p in found)


# pybind11's own headers before the copy that torch brings: that of 2.10 refuses to be included
# where only the stable ABI is used.
INCLUDES = [str(ROOT / "csrc"), str(ROOT / "csrc" / "include"), pybind11.get_include()]


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "nbl_kernels._C",
        ["csrc/pybind.cpp", "csrc/ops.cpp", *sources("cpu", "*.cpp")],
        include_dirs=INCLUDES,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        # No -march: the instruction set is chosen at run time (csrc/cpu/dispatch.cpp).
        extra_compile_args=[
            "-O3",
            "-std=c++17",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-maybe-uninitialized",  # both: GCC 12's own AVX-512 headers
            "-Wno-uninitialized",
        ],
    )


def cuda_extension(toolkit: Toolkit, archs: list[str]):
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        "nbl_kernels._C_cuda",
        sources("cuda", "*.cpp", "*.cu"),
        include_dirs=[*INCLUDES, *toolkit.include_dirs],
        library_dirs=toolkit.library_dirs,
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("USE_CUDA", None),  # the CUDA part of torch's stable C interface
            ("NBL_CUDA_VERSION", f'"{toolkit.version}"'),
            ("NBL_CUDA_ARCHS", f'"{" ".join(archs)}"'),
            ("NBL_HAS_SM90A", str(int(any(a.startswith("9.0a") for a in archs)))),
        ],
        extra_compile_args={
            "cxx": ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall"],
            "nvcc": [
                "-O3",
                "-std=c++17",
                "-lineinfo",
                "-Xcompiler=-fvisibility=hidden",
                "-Xptxas=-v",  # registers and spills of every kernel: .ci/check_ptxas.py reads it
                *gencode(archs),
            ],
        },
        extra_link_args=toolkit.libraries,
    )


def extensions() -> list:
    """What can be built; says what and why: the first question when a build is not as expected."""
    wanted = os.environ.get("NBL_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f'NBL_CUDA must be 1 (insist), 0 (forbid) or unset, got "{wanted}"')
    modules = []
    try:
        if wanted == "0":
            raise NoCuda("NBL_CUDA=0 forbids them")
        toolkit = Toolkit()
        archs = cuda_archs(toolkit)
        # Read by torch.utils.cpp_extension when it is imported, which is why that comes late here.
        os.environ["CUDA_HOME"] = str(toolkit.home)
        modules = [cuda_extension(toolkit, archs)]
        say(f"building _C and _C_cuda (CUDA {toolkit.version}, {toolkit.home}; {' '.join(archs)})")
    except NoCuda as reason:
        if wanted == "1":
            raise SystemExit(f"NBL_CUDA=1 asks for CUDA kernels: {reason}") from None
        say(f"building _C (CPU kernels); no CUDA kernels: {reason}")
    return [cpu_extension(), *modules]


def say(text: str) -> None:
    print(f"nbl_kernels: {text}", file=sys.stderr, flush=True)


class BuildPython(build_py):
    """The kernels' headers travel with the package: for C++ users, and for nbl_kernels.jit."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "nbl_kernels" / "include"
            shutil.copytree(ROOT / "csrc" / "include", target, dirs_exist_ok=True)


if __name__ == "__main__":
    modules = extensions()
    from torch.utils.cpp_extension import BuildExtension

    setup(
        ext_modules=modules,
        cmdclass={
            "build_ext": BuildExtension.with_options(use_ninja=True),
            "build_py": BuildPython,
        },
    )
