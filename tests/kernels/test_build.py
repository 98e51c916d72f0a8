"""The build: what it says of itself, how kernels are chosen, what setup.py refuses."""

from __future__ import annotations

import ast
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import nbl_kernels as nk
from nbl_kernels import _C, _ops


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
    assert info["cuda"] is (info["cuda_reason"] == "")
    assert info["cuda"] is bool(info["cuda_paths"])
    assert torch.cuda.is_available() or not info["cuda"]
    assert bool(info["archs"]) is (_ops._C_cuda is not None)


@pytest.mark.parametrize("name", _C.cpu_capabilities())
def test_environment_selects_the_kernels(name):
    code = "import nbl_kernels as nk; print(nk.build_info()['cpu_capability'])"
    assert run_python(code, NBL_CPU_CAPABILITY=name).stdout.strip() == name


def test_unknown_capability_is_refused_by_name():
    code = "import nbl_kernels as nk; nk.build_info()"
    result = run_python(code, NBL_CPU_CAPABILITY="sse9")
    assert result.returncode != 0
    assert "cpu capability must be one of" in result.stderr and "sse9" in result.stderr


def test_the_headers_come_along():
    assert (nk.include_dir() / "nbl" / "cuda" / "skinny_linear.cuh").is_file()


def test_nbl_kernels_needs_torch_only():
    code = (
        "import sys, nbl_kernels; "
        "print(sorted({'transformers', 'nbl', 'rich', 'typer', 'scipy'} & set(sys.modules)))"
    )
    assert run_python(code).stdout.strip() == "[]"


def run_setup(**environment: str) -> subprocess.CompletedProcess:
    setup = Path(__file__).parents[2] / "setup.py"
    if not setup.is_file():
        pytest.skip("runs from the source folder only")
    return subprocess.run(
        [sys.executable, str(setup), "--version"],
        cwd=setup.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_insisting_on_cuda_kernels_is_an_error_that_says_what_is_missing(tmp_path):
    result = run_setup(NBL_CUDA="1", CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert "NBL_CUDA=1 asks for CUDA kernels:" in result.stderr
    missing = "build without CUDA" if torch.version.cuda is None else "does not run"
    assert missing in result.stderr


@pytest.mark.parametrize("environment", [{"NBL_CUDA": "0"}, {"CUDA_HOME": "/nowhere"}])
def test_without_cuda_kernels_the_build_goes_on_and_says_why(environment):
    result = run_setup(**environment)
    assert result.returncode == 0
    assert "building _C (CPU kernels); no CUDA kernels: " in result.stderr


def test_unknown_settings_of_the_build_are_refused():
    result = run_setup(NBL_CUDA="yes")
    assert result.returncode != 0 and "NBL_CUDA must be 1" in result.stderr
    if torch.version.cuda is not None:
        result = run_setup(TORCH_CUDA_ARCH_LIST="7.5")
        if "no CUDA kernels" not in result.stderr:
            assert result.returncode != 0 and "versions from 8.0 on" in result.stderr


def source_files(root: Path) -> list[str]:
    """Everything that is tracked; without git, everything that no build left there."""
    if shutil.which("git") and (root / ".git").exists():
        command = ["git", "-C", str(root), "ls-files"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return [name for name in names if (root / name).is_file()]
    folders = [p for p in ("csrc", "nbl_kernels", "python", "tests") if (root / p).is_dir()]
    found = [*root.glob("*.*"), *(path for p in folders for path in (root / p).rglob("*"))]
    left = {".so", ".pyc"}
    return [str(p.relative_to(root)) for p in found if p.is_file() and p.suffix not in left]


def test_the_source_distribution_is_complete(tmp_path):
    root = Path(__file__).parents[2]
    if not (root / "setup.py").is_file():
        pytest.skip("runs from the source folder only")
    names = source_files(root)
    copy = tmp_path / "copy"  # of the sources alone: setuptools adds what an earlier build listed
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, copy / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=300)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as file:
        packed = {member.name.partition("/")[2] for member in file if member.isfile()}
    needed = {n for n in names if n.startswith(("csrc/", "nbl_kernels/", "python/", "tests/"))}
    assert "csrc/include/nbl/cuda/gram.cuh" in needed
    assert "python/nbl/demo/model/model.safetensors" in needed
    assert not needed - packed
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= packed


def test_architectures_become_code_for_them_and_ptx():
    setup = Path(__file__).parents[2] / "setup.py"
    if not setup.is_file():
        pytest.skip("runs from the source folder only")
    gencode = runpy.run_path(str(setup), run_name="setup")["gencode"]
    assert gencode(["8.0", "9.0a+PTX", "8.0"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_paths_are_refused_by_name():
    if _ops._C_cuda is None:
        with pytest.raises(RuntimeError, match="CUDA"):
            nk.set_cuda_path("covariance", "hopper")
        return
    with pytest.raises(RuntimeError, match=r"op must be .*, rope or memory, got lienar"):
        nk.set_cuda_path("lienar", "plain")
    with pytest.raises(RuntimeError, match=r"the path of covariance must be one of .*, got wgmma"):
        nk.set_cuda_path("covariance", "wgmma")


MEASURED = dict.fromkeys(("linear", "rope", "memory"), "kernel") | {"covariance": "hopper"}


@pytest.mark.skipif(_ops._C_cuda is None, reason="built without CUDA kernels")
@pytest.mark.parametrize(
    "setting, changes",
    [
        ("", {}),
        ("all=kernel", {"covariance": "hopper"}),
        ("all=plain", dict.fromkeys(MEASURED, "plain")),
        ("gram=portable", {"covariance": "portable"}),
    ],
)
def test_paths_of_the_environment(setting, changes):
    code = "from nbl_kernels import _C_cuda; print(_C_cuda.cuda_paths(90))"
    paths = ast.literal_eval(run_python(code, NBL_CUDA_PATHS=setting).stdout)
    assert paths == MEASURED | changes
