"""nbl doctor: what is installed, what runs here, and why not."""

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..options import Json, Threads
from ..streams import out


def doctor(as_json: Json = False, threads: Threads = None) -> dict:
    """Say what is installed, what runs here and why not, and check every op against its reference.

    Example: `nbl doctor`
    """
    from nbl.doctor import diagnose

    diagnosis = diagnose()
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table.grid(padding=(0, 2))
    for finding in diagnosis["findings"]:
        status = finding["status"]
        table.add_row(
            Text(status.upper() if status == "problem" else status, styles[status]),
            escape(finding["name"]),
            escape(finding["detail"]),
        )
    out.print(table)
    problems = sum(finding["status"] == "problem" for finding in diagnosis["findings"])
    out.print(
        Text(f"{problems} problem(s) found", "bold red")
        if problems
        else Text("everything works", "bold green")
    )
    return diagnosis
