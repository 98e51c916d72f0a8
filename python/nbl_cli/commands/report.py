"""nbl report: one HTML file of what a run measured."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..options import Json
from ..output import write_file
from ..show import need_matplotlib
from ..streams import out


def _report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder written by calibrate, compress, heal or demo.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The HTML file.",
            show_default="DIR/nbl_report.html",
        ),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Also write the plots, beside it.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that nbl report did not write.")
    ] = False,
    as_json: Json = False,
) -> dict:
    """Write what a run measured as one HTML file that needs nothing else.

    Example: `nbl report nbl-demo --png`
    """
    from .. import report

    need_matplotlib()
    record = report.read_record(folder)
    page = output or folder / report.HTML
    files = {page: report.render_html(record).encode()}
    if png:
        files |= {page.parent / name: image for name, image in report.render_png(record).items()}
    for path, data in files.items():
        write_file(path, data, overwrite=overwrite)
        out.print(escape(str(path)), soft_wrap=True)
    return {"files": [str(path) for path in files]}
