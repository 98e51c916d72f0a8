"""What we write to stdout and stderr, apart from what other libraries write there.

Libraries print: loading bars, warnings at import, lines of C. While a command runs, both file
descriptors lead elsewhere, and the consoles here alone still reach what they led to before. With
NBL_DEBUG=1 the libraries' output is not lost: all of it goes to stderr.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from rich.console import Console

_on_terminal = sys.stdout is not None and sys.stdout.isatty()
out = Console(width=None if _on_terminal else 120, highlight=False)  # results
err = Console(stderr=True, highlight=False)  # everything else


def open_closed() -> None:
    """A standard stream that the caller closed leads nowhere: a file opened later would get its
    number, and what a library prints would end up in the file."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            os.dup2(_nowhere().fileno(), number)
            setattr(sys, name, _nowhere())


def debugging() -> bool:
    return bool(os.environ.get("NBL_DEBUG"))


@contextlib.contextmanager
def own_streams(*, as_json: bool) -> Iterator[TextIO]:
    """A context in which `out` and `err` are the only ones to write to stdout and stderr; `out`,
    too, writes to stderr with `as_json`. Yields the stdout of before, for the JSON."""
    with contextlib.ExitStack() as stack:
        stdout, stderr = (stack.enter_context(_kept(s)) for s in (sys.stdout, sys.stderr))
        others = sys.stderr if debugging() else _nowhere()
        for number, target in _diverted():
            stack.enter_context(_redirected(number, target))
        stack.enter_context(contextlib.redirect_stdout(others))
        stack.enter_context(contextlib.redirect_stderr(others))
        stack.callback(_use, None, None)
        _use(stderr if as_json else stdout, stderr)
        yield stdout


def silence() -> None:
    """The command is over: what libraries print while the interpreter ends is no result."""
    for number, target in _diverted():
        os.dup2(target, number)


def _diverted() -> Iterable[tuple[int, int]]:
    """(file descriptor, where it shall lead)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader is gone
            stream.flush()
    if debugging():
        return [(1, 2)]
    return [(number, _nowhere().fileno()) for number in (1, 2)]


def _use(stdout: TextIO | None, stderr: TextIO | None) -> None:
    out.file, err.file = stdout, stderr  # None: sys.stdout and sys.stderr, whatever they are then


@contextlib.contextmanager
def _kept(stream: TextIO) -> Iterator[TextIO]:
    """A stream to where this one leads, also when its file descriptor is redirected."""
    try:
        number = os.dup(stream.fileno())
    except OSError:  # no file, but a test's or a notebook's: it cannot be redirected either
        yield stream
        return
    with open(number, "w", encoding=stream.encoding, errors=stream.errors, buffering=1) as copy:
        yield copy


@contextlib.contextmanager
def _redirected(number: int, target: int) -> Iterator[None]:
    """A context in which a file descriptor leads to where `target` does."""
    before = os.dup(number)
    os.dup2(target, number)
    try:
        yield
    finally:
        os.dup2(before, number)
        os.close(before)


@functools.cache
def _nowhere() -> TextIO:
    """Never closed: a library's logger that was made meanwhile goes on writing to it."""
    return open(os.devnull, "w", encoding="utf-8", errors="replace")
