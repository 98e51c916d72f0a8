"""The command `nbl` for tests: run in this process or in one of its own."""

import json
import os
import signal
import subprocess
import sys

from nbl_cli import app as cli
from typer.testing import CliRunner

COMMANDS = (
    "calibrate",
    "rank",
    "compress",
    "heal",
    "eval",
    "generate",
    "report",
    "bench",
    "demo",
    "doctor",
)
TEXT = "".join(f"def f{i}(x):\n    return {i} * x + {i * i % 97}\n" for i in range(400))


def nbl(*args, **kwargs):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], **kwargs)


def result_of(*args, **kwargs):
    """The JSON result of a command that succeeds; nothing but it is on stdout."""
    done = nbl(*args, "--json", **kwargs)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def refusal_of(*args, code=2, **kwargs):
    """The one line that a command which fails writes."""
    done = nbl(*args, **kwargs)
    assert done.exit_code == code, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


def process(*args, start=("-m", "nbl_cli"), **kwargs):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, *start, *map(str, args)],
        env=environment | kwargs.pop("env", {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **kwargs,
    )
