"""Builds and runs the emulated drivers: CUDA kernels on the CPU under the sanitizers."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-DNBL_EMULATE",
]


class EmulationError(AssertionError):
    """The emulated run ended badly: what the sanitizer or the emulation said."""


@functools.cache
def build_driver(name: str, sources_root: Path | None = None) -> Path:
    """Compiles drive_<name>.cpp against sources_root/csrc/include (default: this repository's).

    Built once for each content of the driver and what it includes; kept in the system's temporary
    folder.
    """
    root = Path(sources_root or ROOT)
    if not (root / "csrc" / "include").is_dir():
        pytest.skip("the kernels' sources are not beside these tests")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    includes = ["-I", str(root / "csrc" / "include"), "-I", str(HERE)]
    command = [compiler, *FLAGS, *includes, str(HERE / f"drive_{name}.cpp")]
    read = subprocess.run([*command, "-MM"], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    content = hashlib.sha256(" ".join([compiler, *FLAGS]).encode())
    for file in read.stdout.replace("\\\n", " ").split()[1:]:  # drive_x.o: drive_x.cpp a.h b.h …
        content.update(Path(file).name.encode() + b"\0" + Path(file).read_bytes())
    folder = Path(tempfile.gettempdir()) / f"nbl-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    driver = folder / f"{name}-{content.hexdigest()[:24]}"
    if not driver.exists():
        unfinished = driver.with_suffix(f".{os.getpid()}")
        built = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        unfinished.replace(driver)
    return driver


def run_driver(driver: Path, payload: bytes, timeout: float = 300) -> bytes:
    """Standard output of the driver for this standard input; EmulationError when it fails."""
    # Fibers end without unwinding: what they held is no leak of the kernel's.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    run = subprocess.run(
        [str(driver)], input=payload, capture_output=True, timeout=timeout, env=environment
    )
    if run.returncode != 0:
        raise EmulationError(run.stderr.decode(errors="replace")[-6000:])
    return run.stdout


def mutated_sources(folder: Path, header: str, old: str, new: str) -> Path:
    """A copy of the kernels in which one place of one header reads otherwise: a kernel broken on
    purpose. `header` is relative to csrc/include; `old` must stand there exactly once."""
    shutil.copytree(ROOT / "csrc" / "include", folder / "csrc" / "include")
    file = folder / "csrc" / "include" / header
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {header}"
    file.write_text(text.replace(old, new))
    return folder
