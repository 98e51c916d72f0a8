"""The build: what it says of itself, how kernels are chosen, what setup.py refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nbl_kernels as nk
from nbl_kernels import _C


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_build_info():
    info = nk.build_info()
    assert info["version"] == nk.__version__
    assert info["torch"] == torch.__version__
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert info["cpu_capabilities"][-1] == "portable"
    assert info["cuda"] is False and info["archs"] == [] and "CUDA" in info["cuda_reason"]


@pytest.mark.parametrize("name", _C.cpu_capabilities())
def test_environment_selects_the_kernels(name):
    code = "import nbl_kernels as nk; print(nk.build_info()['cpu_capability'])"
    assert run_python(code, NBL_CPU_CAPABILITY=name).stdout.strip() == name


def test_unknown_capability_is_refused_by_name():
    code = "import nbl_kernels as nk; nk.build_info()"
    result = run_python(code, NBL_CPU_CAPABILITY="sse9")
    assert result.returncode != 0
    assert "cpu capability must be one of" in result.stderr and "sse9" in result.stderr


def test_nbl_kernels_needs_torch_only():
    code = (
        "import sys, nbl_kernels; "
        "print(sorted({'transformers', 'nbl', 'rich', 'typer', 'scipy'} & set(sys.modules)))"
    )
    assert run_python(code).stdout.strip() == "[]"


def test_asking_for_cuda_kernels_is_an_error_that_says_why():
    setup = Path(__file__).parents[1] / "setup.py"
    if not setup.is_file():
        pytest.skip("runs from the source folder only")
    result = subprocess.run(
        [sys.executable, str(setup), "--version"],
        cwd=setup.parent,
        env=os.environ | {"NBL_CUDA": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    assert "NBL_CUDA=1 asks for CUDA kernels, and this version has none yet" in result.stderr
