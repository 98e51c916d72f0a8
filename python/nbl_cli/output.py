"""Outputs that are whole or absent: written beside their place, then renamed into it.

Nothing is replaced unless it is asked for, and nothing that nbl did not write is ever deleted:
each folder's record (`nbl_report.json`) lists the files nbl put there.
"""

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RECORD = "nbl_report.json"
MARK = "nbl report"  # in every file that `nbl report` writes


@contextmanager
def new_folder(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes it when the block ends, or vanishes.

    A non-empty `target` is refused; with `overwrite`, only if it holds a file nbl did not write.
    """
    target = Path(os.path.realpath(target))
    _check_folder(target, overwrite)
    temporary = _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        _check_folder(target, overwrite)  # again: the block may have taken hours
        old = _beside(target)
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: str | Path, data: bytes, *, overwrite: bool = False) -> None:
    """Writes a file whole; an existing one is replaced if `nbl report` wrote it or on request."""
    path = check_file(path, overwrite=overwrite)
    temporary = _beside(path)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_file(path: str | Path, *, overwrite: bool = False) -> Path:
    """The path that :func:`write_file` would write to; OSError where it would refuse."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"output: expected a file to write, but {str(path)!r} is a folder")
    if path.exists() and not (overwrite or _from_report(path)):
        raise FileExistsError(
            f"output: expected a new file, but {str(path)!r} exists (--overwrite replaces it)"
        )
    _check_parent(path)
    return path


def write_record(folder: Path, record: dict) -> None:
    """The record of a folder that nbl has just filled, with the list of its files."""
    files = sorted(_files(folder) | {RECORD})
    text = json.dumps(plain({**record, "files": files}), indent=1, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def plain(value):
    """value as JSON knows it: text keys, lists, and null where a number is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _check_folder(target: Path, overwrite: bool) -> None:
    _check_parent(target)
    if not target.exists():
        return
    if not target.is_dir() or os.path.ismount(target):
        kind = "a mount point" if target.is_dir() else "a file"
        raise FileExistsError(f"output: expected a folder to create, but {str(target)!r} is {kind}")
    present = _files(target)
    if present and not overwrite:
        raise FileExistsError(
            f"output: expected a new or empty folder, but {str(target)!r} is not empty "
            "(--overwrite replaces what nbl wrote there)"
        )
    try:
        listed = json.loads((target / RECORD).read_text(encoding="utf-8"))["files"]
        ours = {str(name) for name in listed}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    foreign = sorted(name for name in present - ours if not _from_report(target / name))
    if foreign:
        raise FileExistsError(
            f"output: {str(target)!r} is not replaced, because nbl did not write {foreign[0]!r} "
            "in it: move it or choose another folder"
        )


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"output: expected a path in an existing folder, but {str(path.parent)!r} is none"
        )
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"output: no permission to write in {str(path.parent)!r}")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _files(folder: Path) -> set[str]:
    """Everything below the folder but plain folders themselves, unless these are empty."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    }


def _from_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(2048)
