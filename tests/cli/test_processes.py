"""The command `nbl` as a process: its streams, its imports, signals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from command import COMMANDS, TEXT, process

pytestmark = pytest.mark.usefixtures("offline")


# ---- as a process --------------------------------------------------------------------------------


def test_json_on_stdout_and_nothing_else(tiny, book):
    running = process("eval", tiny, "--text", book, "--json", "--threads", 1)
    stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == 0, stderr
    assert json.loads(stdout)["perplexity"] > 1
    assert "evaluating" in stderr


# A library that talks while it is imported, in every way that there is, and once more at the end.
NOISE = """
import atexit, ctypes, logging, os, sys, warnings

def talk(when):
    print("NOISE", when, "print")
    print("NOISE", when, "stderr", file=sys.stderr)
    print("NOISE", when, "__stdout__", file=sys.__stdout__, flush=True)
    print("NOISE", when, "__stderr__", file=sys.__stderr__, flush=True)
    os.write(1, b"NOISE fd 1\\n")
    os.write(2, b"NOISE fd 2\\n")
    ctypes.CDLL(None).puts(b"NOISE from C, which is flushed at the end")
    warnings.warn("NOISE warning")
    logging.getLogger("noise").warning("NOISE log")

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            if os.environ.get("ABORT"):
                os.abort()
            talk("at import")
            atexit.register(talk, "at exit")

sys.meta_path.insert(0, Finder())
import nbl_cli.app
nbl_cli.app.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="a C library by another name")
def test_output_of_libraries_does_not_mix_into_ours(tiny, book, tmp_path):
    (tmp_path / "noise.py").write_text(NOISE)
    start = (str(tmp_path / "noise.py"),)
    command = ("eval", tiny, "--text", book)

    def run(*args, **env):
        running = process(*command, *args, start=start, env=env)
        return *running.communicate(timeout=120), running.returncode

    stdout, stderr, code = run("--json")
    assert code == 0 and json.loads(stdout)["perplexity"] > 1, stderr
    assert "NOISE" not in stderr and "evaluating" in stderr
    stdout, stderr, _ = run()
    assert "perplexity" in stdout and "NOISE" not in stdout + stderr
    stdout, stderr, code = run("--length", "9999")
    assert (stdout, code) == ("", 2)
    assert "NOISE" not in stderr and "length: expected at most 128" in stderr
    # Nothing is lost for who looks for it, and the JSON stays alone even then.
    stdout, stderr, code = run("--json", NBL_DEBUG="1")
    assert code == 0 and json.loads(stdout)["perplexity"] > 1
    for words in ("at import print", "at exit __stdout__", "fd 1", "fd 2", "from C", "warning"):
        assert f"NOISE {words}" in stderr
    stdout, stderr, code = run(ABORT="1")  # what C says then is hidden, but not where
    assert code == -signal.SIGABRT and "Fatal Python error: Aborted" in stderr


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(closed):
    script = (f'"$@" {closed}', "sh", sys.executable, "-m", "nbl_cli", "report", "nowhere")
    done = subprocess.run(
        ["sh", "-c", *script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert ("error: dir" in done.stderr) == ("2>&-" not in closed)


IMPORTED = """
import sys
import nbl_cli.app
try:
    nbl_cli.app.main()
finally:
    heavy = {"torch", "transformers", "numpy", "matplotlib", "datasets", "nbl", "nbl_kernels"}
    with open(%r, "w") as file:
        print(*sorted(heavy & set(sys.modules)), file=file)
"""


def imported_by(tmp_path, *args):
    """Which of the large libraries a command has imported when it is done."""
    found = tmp_path / "imported.txt"
    running = process(*args, start=("-c", IMPORTED % str(found)))
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 0, stderr
    return set(found.read_text().split())


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)])
def test_help_imports_no_large_library(command, tmp_path):
    assert imported_by(tmp_path, *command, "--help") == set()


def test_a_report_imports_what_draws_it(calibrated, tmp_path):
    imported = imported_by(tmp_path, "report", calibrated, "-o", tmp_path / "page.html", "--png")
    assert imported == {"matplotlib", "numpy"}


def test_a_refusal_is_one_line_and_nbl_debug_shows_the_traceback():
    for env, lines in (({}, 1), ({"NBL_DEBUG": "1"}, None)):
        running = process("report", "nowhere", env=env)
        stdout, stderr = running.communicate(timeout=120)
        assert running.returncode != 0 and stdout == ""
        assert ("Traceback" in stderr) == (lines is None)
        assert lines is None or len(stderr.strip().splitlines()) == lines


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(tiny, tmp_path, number, code):
    (tmp_path / "long.txt").write_text(TEXT * 200)
    running = process(
        "compress",
        tiny,
        "--text",
        "long.txt",
        "--layers",
        1,
        "-o",
        "out",
        "--max-tokens",
        10**7,
        "--length",
        8,
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".out.*.tmp")) and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    running.send_signal(number)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == code, stderr
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]
