"""The plots of a record, each as SVG in two themes or as PNG. Needs matplotlib."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .output import MARK
from .record import choice_of, front_of, names_of, number, part_of, points_of, scores_of, short
from .scores import order


@dataclass(frozen=True)
class Theme:
    """Colours of one mode: Okabe and Ito's palette, told apart with any kind of colour vision."""

    ink: str
    muted: str
    grid: str
    paper: str
    nbl: str
    drop: str
    same: str


LIGHT = Theme("#1b1f24", "#667080", "#e3e6ea", "#ffffff", "#0072b2", "#d55e00", "#b8860b")
DARK = Theme("#e6e9ee", "#9aa4b2", "#333b47", "#14181d", "#56b4e9", "#ee7733", "#f0c040")


def draw_plot(draw: Callable, record: dict, theme: Theme, kind: str) -> bytes | None:
    """One plot as SVG or PNG, or None where the record lacks its numbers."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": theme.ink,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "lines.linewidth": 2,
        "lines.markersize": 6,
        "svg.hashsalt": "nbl",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        if draw(figure, record, theme) is False:
            return None
        data = io.BytesIO()
        if kind == "png":
            figure.savefig(
                data, format="png", dpi=200, facecolor=theme.paper, metadata={"Software": MARK}
            )
        else:
            blank = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(data, format="svg", transparent=True, metadata=blank)
        return data.getvalue()


def _plot_layers(figure, record, theme):
    """Bound and NMSE per layer, the paper's figure 2; the replaced layers are filled."""
    panels = [("cca", "CCA bound Σ(1−ρ²)"), ("nmse", "NMSE of the linear map")]
    panels = [(name, title) for name, title in panels if order(scores_of(record).get(name, []))]
    if not panels:
        return False
    figure.set_size_inches(5.4, 1.9 * len(panels) + 0.4)
    chosen = set(choice_of(record)["layers"])
    for axes, (name, title) in zip(
        figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True
    ):
        scores = scores_of(record)[name]
        heights = [math.nan if score is None else score for score in scores]
        bars = axes.bar(range(len(scores)), heights, width=0.72, edgecolor=theme.nbl, linewidth=1.2)
        for layer, bar in enumerate(bars):
            bar.set_facecolor(theme.nbl if layer in chosen else "none")
        axes.set_title(title)
        axes.grid(axis="y")
        axes.margins(y=0.18)
        if len(scores) <= 16:
            for layer, score in enumerate(scores):
                if score is not None:
                    axes.annotate(
                        short(score),
                        (layer, score),
                        (0, 3),
                        ha="center",
                        textcoords="offset points",
                        fontsize=8,
                        color=theme.muted,
                    )
    axes.set_xlabel("layer" + (" (filled: replaced)" if chosen else ""))
    axes.set_xticks(range(0, len(scores), max(1, len(scores) // 16)))
    return True


def _plot_perplexity(figure, record, theme):
    points = [p for p in points_of(record) if number(p.get("perplexity")) is not None]
    if len(points) < 2:
        return False
    axes = figure.subplots()
    dense = next((p["perplexity"] for p in points if not p["layers"]), None)
    lines = [
        ("NBL", theme.nbl, "o", lambda p: p.get("perplexity")),
        ("drop, same layers", theme.same, "^", lambda p: part_of(p, "drop_same").get("perplexity")),
        ("drop, by cosine", theme.drop, "s", lambda p: part_of(p, "drop").get("perplexity")),
    ]
    labels = []
    for name, colour, marker, value in lines:
        line = [(len(p["layers"]), dense if not p["layers"] else number(value(p))) for p in points]
        line = [(m, y) for m, y in line if y is not None]
        if len(line) > 1 or (line and line[0][0]):
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, clip_on=False)
            labels.append((*line[-1], name, colour))
    values = [y for line in axes.get_lines() for y in line.get_ydata()]
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
        _plain_log_ticks(axes, min(values), max(values))
    if dense is not None:
        last = max(len(p["layers"]) for p in points)
        axes.hlines(dense, 0, last, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        labels.append((last, dense, "dense", theme.muted))
    _label_ends(axes, labels)
    axes.set_title("Perplexity on held-out text (lower is better)")
    axes.set_xlabel("attention layers replaced")
    axes.set_xticks([len(p["layers"]) for p in points])
    axes.grid(axis="y")
    return True


def _plot_plan(figure, record, theme):
    """Loss against bytes of a decode step, a point for every change of a plan."""
    front = front_of(record)
    if len(front) < 2:
        return False
    axes = figure.subplots()
    dense = front[0]["bytes"]
    x = [point["bytes"] / dense * 100 for point in front]
    y = [point["loss"] for point in front]
    axes.step(x, y, where="post", color=theme.muted, linewidth=1, zorder=1)
    marks = {"window": "o", "map": "s", "memory": "D", "drop": "X"}
    colours = {"window": theme.nbl, "map": theme.same, "memory": theme.drop, "drop": theme.muted}
    for name, mark in marks.items():
        own = [i for i, p in enumerate(front) if str(p["kind"]).split()[0] == name]
        if own:
            axes.scatter(
                [x[i] for i in own],
                [y[i] for i in own],
                marker=mark,
                color=colours[name],
                label=name,
                zorder=2,
            )
    axes.invert_xaxis()
    axes.set_title("Loss added by the plan's changes (nats per token)")
    axes.set_xlabel("bytes of a decode step, % of the model as it is")
    axes.grid(axis="y")
    axes.legend(loc="upper left", frameon=False)
    return True


def _plot_memory(figure, record, theme):
    named = [
        (name, p)
        for name, p in zip(names_of(record), points_of(record), strict=True)
        if number(p.get("kv_bytes_per_token")) is not None
    ]
    points = [p for _, p in named]
    if len(points) < 2 or not points[0]["kv_bytes_per_token"]:
        return False
    figure.set_size_inches(5.4, 0.34 * len(points) + 1.1)
    axes = figure.subplots()
    values = [p["kv_bytes_per_token"] for p in points]
    unit, scale = ("KiB", 1024) if max(values) >= 10240 else ("bytes", 1)
    bars = axes.barh(range(len(points)), [v / scale for v in values], height=0.66)
    for bar, point, value in zip(bars, points, values, strict=True):
        bar.set_color(theme.nbl if point["layers"] else theme.muted)
        share = f"{value / values[0] - 1:+.0%}".replace("-", "−") if point["layers"] else ""
        shown = f"{value:,}" if scale == 1 else f"{value / scale:,.1f}"
        axes.annotate(
            f"{shown}  {share}",
            (value / scale, _middle(bar)),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(points)), [name for name, _ in named])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.22)
    axes.set_title(f"KV cache, {unit} per token")
    axes.grid(axis="x")
    return True


def _plot_speed(figure, record, theme):
    named = [
        (name, p)
        for name, p in zip(names_of(record), points_of(record), strict=True)
        if number(p.get("decode")) and number(p.get("prefill"))
    ]
    points = [p for _, p in named]
    if len(points) < 2:
        return False
    figure.set_size_inches(5.4, 0.34 * len(points) + 1.1)
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("prefill", "decode"), strict=True):
        bars = axes.barh(range(len(points)), [p[kind] for p in points], height=0.66)
        for bar, point in zip(bars, points, strict=True):
            bar.set_color(theme.nbl if point["layers"] else theme.muted)
            ratio = f"  {point[kind] / points[0][kind]:.2f}×" if point["layers"] else ""
            axes.annotate(
                f"{point[kind]:,.0f}{ratio}",
                (point[kind], _middle(bar)),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_title(f"{kind.capitalize()}, tokens/s")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.55)
        axes.locator_params(axis="x", nbins=3)
        axes.grid(axis="x")
    axes.set_yticks(range(len(points)), [name for name, _ in named])
    axes.invert_yaxis()
    return True


PLOTS = {
    "Error per layer": (
        _plot_layers,
        "How well a linear map of the layer's input can stand in for its attention. The bound is "
        "the paper's criterion; it does not know how large the attention output is beside the "
        "residual stream, which loss and residual do.",
    ),
    "Perplexity": (
        _plot_perplexity,
        "NBL replaces attention by a linear map; dropping removes it. Both keep everything else.",
    ),
    "Plan": (
        _plot_plan,
        "Every change is the one that adds least to the measured loss for the bytes that it saves, "
        "those before it in place.",
    ),
    "KV cache": (
        _plot_memory,
        "What one token of context occupies: a linearized layer keeps no keys and values.",
    ),
    "Speed": (
        _plot_speed,
        "Measured in this run, transformers' generate, batch 1, medians of interleaved "
        "repetitions. NBL saves most where batch × context is large; this is the small end.",
    ),
}


def _middle(bar) -> float:
    return bar.get_y() + bar.get_height() / 2


def _plain_log_ticks(axes, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    ticks = [digit * 10.0**power for power in range(-2, 12) for digit in (1, 1.5, 2, 3, 5, 7)]
    axes.yaxis.set_major_locator(FixedLocator([t for t in ticks if low * 0.8 <= t <= high * 1.25]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label_ends(axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Names at the right end of each line, kept a line's height apart."""
    axes.figure.draw_without_rendering()
    height = 13 * axes.figure.dpi / 72
    previous = -math.inf
    for x, y, name, colour in sorted(labels, key=lambda label: label[1]):
        at = axes.transData.transform((x, y))[1]
        shifted = max(at, previous + height)
        previous = shifted
        axes.annotate(
            name,
            (x, y),
            (9, (shifted - at) * 72 / axes.figure.dpi),
            color=colour,
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold",
            annotation_clip=False,
        )


def render_plot(draw: Callable, record: Any) -> bytes | None:
    """One plot as PNG: draw(figure, record, theme) returns False where the numbers are missing."""
    return draw_plot(draw, record, LIGHT, "png")
