"""How a measurement is written down: when, where and with what it was made, then what was found."""

from __future__ import annotations

import csv
import functools
import json
import os
import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "ROOT", "append_rows", "environment", "now", "read", "save", "stamp", "tree"]

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"


def _git(*args: str) -> str | None:
    """What git says of this repository; None where it says nothing."""
    try:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def tree() -> tuple[str | None, bool | None]:
    """(commit, whether the tree differs from it), as far as git knows. Results do not count."""
    changes = _git("status", "--porcelain", "--", ":/", ":!/benchmarks/results")
    return _git("rev-parse", "--short=12", "HEAD"), None if changes is None else bool(changes)


@functools.cache
def environment() -> dict[str, object]:
    """Where and with what something is measured, as it was when first asked."""
    # Not above: the GPU report writes before the package is built, and where that fails.
    from nbl_kernels import build_info
    from nbl_kernels.machine import cpu_model

    info = build_info()
    commit, dirty = tree()
    return {
        "commit": commit or "unknown",
        "dirty": "unknown" if dirty is None else int(dirty),
        "device": cpu_model(),
        "threads": info["threads"],
        "torch": info["torch"],
        "python": info["python"],
        "nbl_kernels": info["version"],
        "cpu_capability": info["cpu_capability"],
    }


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def stamp(**more: object) -> dict[str, Any]:
    """What a record of a whole model begins with; `more` joins the environment."""
    import transformers

    where = environment() | {"transformers": transformers.__version__, **more}
    return {"date": now(), "environment": where}


def read(path: str | Path) -> dict[str, Any]:
    """A record; an empty one where there is none yet."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save(path: str | Path, record: dict[str, Any]) -> None:
    """Writes a record in the place of the one before. "none": nowhere."""
    if str(path) == "none":
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(record, indent=1, ensure_ascii=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def append_rows(path: Path, rows: Sequence[dict[str, object]], where: dict[str, object]) -> None:
    """Adds lines to a CSV file, each with the date and the environment in front."""
    date = now()
    lines = [{"date": date, **where, **row} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(lines)
