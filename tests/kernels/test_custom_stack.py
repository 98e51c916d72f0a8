"""Every snippet of docs/custom_stack.md does what the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "custom_stack.md"
if not PAGE.is_file():
    pytest.skip("runs from the source folder only", allow_module_level=True)
SNIPPETS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def snippets(language: str) -> list[str]:
    return [text for name, text in SNIPPETS if name == language]


def test_python():
    names: dict[str, object] = {}
    for text in snippets("python"):
        if "on a GPU" not in text:
            exec(compile(text, str(PAGE), "exec"), names)
    assert names["h"].shape == (1, 64)


def test_cupy_on_a_gpu():
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("needs a GPU")
    (text,) = (text for text in snippets("python") if "on a GPU" in text)
    exec(compile(text, str(PAGE), "exec"), {})


def test_cpp(tmp_path):
    (source,), (command,) = snippets("cpp"), snippets("sh")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "linear.cpp").write_text(source)
    command = command.replace("g++", compiler, 1).replace("$(python ", f"$({sys.executable} ")
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        ["sh", "-c", f"{command.strip()} -o linear && ./linear"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "10\n"), done.stderr
