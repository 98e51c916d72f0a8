"""What `nbl bench` measured, a case of :mod:`nbl.benchmark`, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbl.engines import EAGER
from rich.box import SIMPLE_HEAD
from rich.table import Table


def table(case: dict[str, Any]) -> Table:
    """The case as a table: engines, the ceiling of each number of layers, and who is absent."""
    unit = "GB/s" if case["kind"] == "decode" else "GFLOP/s"
    shown = Table(
        title=f"{case['kind']}, batch {case['batch']}, context {case['context']:,}",
        title_justify="left",
        title_style="bold",
        caption=_caption(case),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    shown.add_column("engine")
    for name in ("tokens/s", "quartiles", "x transformers eager", "% of ceiling"):
        shown.add_column(name, justify="right")
    for row in case["rows"]:
        low, high = row["quartiles"]
        times = row["times_eager"]
        shown.add_row(
            row["engine"],
            _short(row["tokens_per_second"]),
            f"{_short(low)} – {_short(high)}",
            f"{times:.2f}x" if times else "",
            f"{row['percent_of_ceiling']:.0f} %",
            style="bold" if row["engine"].startswith("ours") else None,
        )
    for name, (ceiling, work) in _ceilings(case).items():
        rate = f"{case['limit']['rate'] / 1e9:,.1f} {unit}"
        amount = f"{_short(work / 1e9)} G{'B' if case['kind'] == 'decode' else 'FLOP'} at {rate}"
        shown.add_row(name, _short(ceiling), amount, "", "100 %", style="dim")
    for name, why in case["absent"].items():
        shown.add_row(name, "absent", why, "", "", style="yellow")
    return shown


def _caption(case: dict[str, Any]) -> str:
    turns = "in turns" if case["in_turns"] else "one engine after the other: memory is short"
    limit = case["limit"]["name"] if case["limit"] else "none"
    text = f"Medians of {case['repetitions']} repetitions, {turns}. Ceiling: {limit}."
    differ = [r["engine"] for r in case["rows"] if r["first_token_agrees"] is False]
    if differ:
        text += f" First token not that of {EAGER}: {', '.join(differ)}."
    return text


def _ceilings(case: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """{name: (tokens/s, work)}: one of engines that do the same work."""
    seen: dict[float, tuple[str, float]] = {}
    for row in case["rows"]:
        ours = row["engine"].startswith("ours ")
        kind = row["engine"].removeprefix("ours ") if ours else "dense"
        seen.setdefault(row["work"], (f"ceiling, {kind}", row["ceiling"]))
    return {name: (ceiling, work) for work, (name, ceiling) in seen.items()}


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(cases: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: tokens per second of every engine, a panel per case, each bar with its ceiling. Needs
    matplotlib."""
    from .plots import render_plot

    def draw(figure: Any, cases: Sequence[dict[str, Any]], theme: Any) -> None:
        count = max(len(case["rows"]) for case in cases)
        figure.set_size_inches(7.2, len(cases) * (0.27 * count + 0.8))
        panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
        for axes, case in zip(panels, cases):
            rows = case["rows"]
            for place, row in enumerate(rows):
                ours = row["engine"].startswith("ours")
                colour = theme.nbl if ours else theme.muted
                speed = row["tokens_per_second"]
                axes.barh(place, speed, height=0.66, color=colour)
                axes.vlines(row["ceiling"], place - 0.4, place + 0.4, color=theme.drop, linewidth=2)
                axes.annotate(
                    f"{_short(speed)}  ({row['percent_of_ceiling']:.0f} %)",
                    (max(0, speed), place),
                    (5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
            axes.set_yticks(range(len(rows)), [row["engine"] for row in rows])
            axes.invert_yaxis()
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.margins(x=0.2)
            axes.set_xlim(left=0)
            axes.grid(axis="x")
            axes.set_title(
                f"{case['kind']}, batch {case['batch']}, context {case['context']:,}: tokens/s "
                "(line: ceiling)"
            )

    return render_plot(draw, cases)
