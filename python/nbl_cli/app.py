"""The application: errors, --json, and one option for many texts.

Results go to stdout (a table, or JSON with --json), everything else to stderr. Exit codes: 0 done,
1 something failed, 2 something was asked for wrongly, 130 interrupted. With NBL_DEBUG=1 errors show
their traceback, and other libraries' output is shown.
"""

import faulthandler
import functools
import importlib.util
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import typer
from rich.text import Text
from typer.core import TyperGroup

from .commands import COMMANDS
from .output import plain
from .show import note
from .streams import debugging, err, open_closed, own_streams, silence


class _Commands(TyperGroup):
    """Turns every error into one line and an exit code, whoever calls."""

    def main(self, args=None, prog_name=None, complete_var=None, standalone_mode=True, **extra):
        args = _spread_texts(list(sys.argv[1:] if args is None else args))
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except Exception as error:
            if debugging():
                raise
            code = _explain(error)
        except KeyboardInterrupt:
            code = 130
        if code == 130:
            err.print("interrupted: nothing was written", style="yellow")
        sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> int:
    """One red line; the exit code."""
    if isinstance(error, BrokenPipeError):  # `nbl rank CAL | head` is no error worth a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if type(error).__name__ == "Abort":  # what older versions of typer make of ctrl-C
        return 130
    usage = hasattr(error, "format_message")  # typer's own: unknown option, missing argument, ...
    asked_wrongly = usage or isinstance(error, ValueError | OSError)
    message = " ".join((error.format_message() if usage else str(error)).split())
    name, colon, rest = message.partition(":")
    if name.isidentifier():  # an argument of the library, whose option has hyphens
        message = name.replace("_", "-") + colon + rest
    if not asked_wrongly:
        message = f"{type(error).__name__}: {message} (NBL_DEBUG=1 shows where)"
    err.print(Text(f"error: {message}", style="bold red"), soft_wrap=True)
    return 2 if asked_wrongly else 1


def _spread_texts(args: list[str]) -> list[str]:
    """`nbl eval MODEL --text a b c` as `--text a --text b --text c`, as a shell writes *.txt out.

    Only where the command's argument comes first: in `--text a MODEL`, MODEL is not a text.
    """
    if len(args) < 2 or args[1].startswith("-"):
        return args
    spread, option = [], None
    for arg in args:
        if arg.startswith("-") and arg != "-":
            name = arg.partition("=")[0]
            option = name if name in ("--text", "--eval-text") else None
        elif option and spread[-1] != option:
            spread.append(option)
        spread.append(arg)
    return spread


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Replace attention layers of Llama-family models by closed-form linear maps: "
    "no training, a smaller KV cache, faster prefill and decode.\n\n"
    "Start with `nbl demo`. MODEL is a folder, a name on the Hugging Face hub, or `demo`, "
    "the small model that ships with nbl.",
)


def _run(function: Callable[..., dict]) -> Callable[..., None]:
    """The command, among its own streams. With --json, what the function returns is all that stdout
    gets; the tables that it shows meanwhile go to stderr."""

    @functools.wraps(function)
    def run(**options):
        as_json = options["as_json"]
        with own_streams(as_json=as_json) as stdout, warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if options.get("threads"):
                import torch

                torch.set_num_threads(options["threads"])
            result = function(**options)
            if as_json:
                print(json.dumps(plain(result), indent=1), file=stdout)
        if result.get("ok") is False:
            raise typer.Exit(1)

    return run


def _show_warning(message, category, filename, *_, **__) -> None:
    """Our own warnings are notes; those of other libraries are not for the user of a command."""
    packages = map(importlib.util.find_spec, ("nbl", "nbl_cli", "nbl_kernels"))
    ours = {Path(package.origin).parent for package in packages}
    if ours & set(Path(filename).parents):
        note(str(message))
    elif debugging():
        err.print(Text(f"{filename}: {category.__name__}: {message}"), soft_wrap=True)


for _function in COMMANDS:
    app.command(_function.__name__.strip("_"))(_run(_function))


def main() -> None:
    """The entry point of the command `nbl`."""
    open_closed()
    faulthandler.enable(os.dup(2))  # what a C library says when it aborts is not seen
    # A temporary folder is removed on the way out, which an unhandled signal would not go.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        app(prog_name="nbl")
    finally:
        silence()
