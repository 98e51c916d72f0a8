"""The report: what a run measured, as one self-contained HTML file or as PNG plots.

`calibrate`, `compress` and `demo` leave an `nbl_report.json` in the folder they write: the record.
Everything shown comes from it. A part that the record lacks is said to be missing.

The record's parts, all optional but the first two:

    nbl_report    1, the version of this list
    command       calibrate | compress | demo
    date, seconds, model {name, type, layers, hidden_size, parameters}, conditions {...}
    calibration   {text, tokens, length, features}
    scores        {criterion: [score of layer 0, 1, ...]}, null for a layer not calibrated
    choice        {method, criterion, layers, bias, rank, ridge, ridge_used, nmse}
    points        [{layers, perplexity, kv_bytes_per_token, prefill, decode, drop: {layers,
                  perplexity}, drop_same: {layers, perplexity}}, ...], the first one dense
    evaluation    {text, tokens, length};  speed {prompt_tokens, new_tokens, repetitions}
    samples       {prompt, continuations: {name: text}};  notes [text, ...]
"""

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from .output import MARK, RECORD
from .scores import order

HTML = "nbl_report.html"
CRITERIA = {
    "loss": "loss added when this layer alone is linearized, nats per token",
    "residual": "error of the linear map relative to the residual stream",
    "cca": "CCA bound on the error (the paper's), Σ(1−ρ²)",
    "nmse": "error of the linear map relative to the attention output",
    "cosine": "cosine distance between the stream before and after attention, as in layer dropping",
}


def read_record(folder: str | Path) -> dict:
    """The record in a folder that nbl wrote."""
    path = Path(folder) / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"dir: expected a folder written by nbl calibrate, compress or demo, but "
            f"{str(folder)!r} has no {RECORD}"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"dir: expected JSON in {str(path)!r}, got: {error}") from None
    if not isinstance(record, dict) or record.get("nbl_report") != 1:
        raise ValueError(f"dir: expected a record of version 1 in {str(path)!r}")
    return record


def render_html(record: dict) -> str:
    """The whole report: no script, no reference to anything outside the file."""
    sections = [_headline(record)]
    for title, (draw, caption) in _PLOTS.items():
        sections.append(_figure(title, draw, caption, record))
    sections += [_measurements(record), _criteria(record), _samples(record), _conditions(record)]
    body = "\n".join(section for section in sections if section)
    return _PAGE.format(mark=MARK, title=escape(_title(record)), style=_STYLE, body=body)


def render_png(record: dict) -> dict[str, bytes]:
    """File name -> PNG of every plot that the record has the numbers for."""
    images = {}
    for title, (draw, _) in _PLOTS.items():
        data = render_plot(draw, record)
        if data is not None:
            images[title.lower().replace(" ", "_").replace("-", "_") + ".png"] = data
    return images


def render_plot(draw: Callable, record: Any) -> bytes | None:
    """One plot as PNG: draw(figure, record, theme) returns False where the numbers are missing."""
    return _draw(draw, record, _LIGHT, "png")


# ---- plots -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Theme:
    """Colours of one mode: Okabe and Ito's palette, told apart with any kind of colour vision."""

    ink: str
    muted: str
    grid: str
    paper: str
    nbl: str
    drop: str
    same: str


_LIGHT = _Theme("#1b1f24", "#667080", "#e3e6ea", "#ffffff", "#0072b2", "#d55e00", "#b8860b")
_DARK = _Theme("#e6e9ee", "#9aa4b2", "#333b47", "#14181d", "#56b4e9", "#ee7733", "#f0c040")


def _draw(draw: Callable, record: dict, theme: _Theme, kind: str) -> bytes | None:
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
    panels = [(name, title) for name, title in panels if order(_scores(record).get(name, []))]
    if not panels:
        return False
    figure.set_size_inches(5.4, 1.9 * len(panels) + 0.4)
    chosen = set(_choice(record)["layers"])
    for axes, (name, title) in zip(
        figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True
    ):
        scores = _scores(record)[name]
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
                        _short(score),
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
    points = [p for p in _points(record) if _number(p.get("perplexity")) is not None]
    if len(points) < 2:
        return False
    axes = figure.subplots()
    dense = next((p["perplexity"] for p in points if not p["layers"]), None)
    lines = [
        ("NBL", theme.nbl, "o", lambda p: p.get("perplexity")),
        ("drop, same layers", theme.same, "^", lambda p: _part(p, "drop_same").get("perplexity")),
        ("drop, by cosine", theme.drop, "s", lambda p: _part(p, "drop").get("perplexity")),
    ]
    labels = []
    for name, colour, marker, value in lines:
        line = [(len(p["layers"]), dense if not p["layers"] else _number(value(p))) for p in points]
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


def _plot_memory(figure, record, theme):
    named = [
        (name, p)
        for name, p in zip(_names(record), _points(record), strict=True)
        if _number(p.get("kv_bytes_per_token")) is not None
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
        for name, p in zip(_names(record), _points(record), strict=True)
        if _number(p.get("decode")) and _number(p.get("prefill"))
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


_PLOTS = {
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


# ---- page --------------------------------------------------------------------------------------


def _figure(title: str, draw: Callable, caption: str, record: dict) -> str:
    images = [_draw(draw, record, theme, "svg") for theme in (_LIGHT, _DARK)]
    if images[0] is None:
        return _section(title, f'<p class="missing">{_MISSING[title]}</p>')
    light, dark = (
        "data:image/svg+xml;base64," + base64.b64encode(image).decode() for image in images
    )
    return _section(
        title,
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(title)}: the numbers are in the tables below"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>",
    )


_MISSING = {
    "Error per layer": "Not in this record: no layer was scored.",
    "Perplexity": "Not measured in this run: add --eval or --sweep to nbl compress.",
    "KV cache": "Not in this record: no model was compressed.",
    "Speed": "Not measured in this run: add --eval or --sweep to nbl compress.",
}


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"


def _title(record: dict) -> str:
    name = str(_part(record, "model").get("name", "a model"))
    layers = _choice(record)["layers"]
    if not layers:
        return f"NBL: {name}"
    verb = "dropped" if _choice(record).get("method") == "drop" else "linearized"
    return f"NBL: {name}, {len(layers)} attention layers {verb}"


def _headline(record: dict) -> str:
    """What was done, and the two or three figures that matter, before against after."""
    choice, points = _choice(record), _points(record)
    model = _part(record, "model")
    facts = [
        f"{model['layers']} layers" if "layers" in model else None,
        f"{_plain_number(model['parameters'])} parameters" if "parameters" in model else None,
        str(model["type"]) if "type" in model else None,
    ]
    line = " · ".join(escape(fact) for fact in facts if fact)
    if choice["layers"]:
        line += f"<br>Replaced: layers {_ids(choice['layers'])}"
        line += f", chosen by {escape(str(choice['criterion']))}" if choice.get("criterion") else ""
    tiles = []
    layers = choice["layers"]
    after = next((p for p in points if p["layers"] and set(p["layers"]) == set(layers)), None)
    if after and not points[0]["layers"]:
        dense, instead, other = points[0], _part(after, "drop").get("perplexity"), "dropping"
        if choice.get("method") == "drop":
            instead, other = after.get("perplexity"), "NBL"
            after = {**after, "perplexity": _part(after, "drop_same").get("perplexity")}
        for key, name in (
            ("perplexity", "perplexity"),
            ("kv_bytes_per_token", "KV bytes per token"),
            ("prefill", "prefill, tokens/s"),
            ("decode", "decode, tokens/s"),
        ):
            old, new = _number(dense.get(key)), _number(after.get(key))
            if not old or new is None:
                continue
            change = f"{new / old:.2f}×"
            if key == "perplexity":
                change = f"{other}: {_plain_number(instead)}"
            elif key == "kv_bytes_per_token":
                change = f"{new / old - 1:+.0%}".replace("-", "−")
            tiles.append(
                f'<div class="tile"><div>{name}</div><b>{_plain_number(new)}</b>'
                f"<div>dense: {_plain_number(old)}</div><div>{escape(change)}</div></div>"
            )
    notes = record.get("notes")
    notes = "".join(
        f'<p class="note">{escape(str(note))}</p>'
        for note in (notes if isinstance(notes, list) else [])
    )
    return (
        f"<header><h1>{escape(_title(record))}</h1><p>{line}</p></header>"
        + (f'<div class="tiles">{"".join(tiles)}</div>' if tiles else "")
        + notes
    )


def _measurements(record: dict) -> str:
    points = _points(record)
    if len(points) < 2:
        return ""
    columns = {
        "layers": lambda p: _ids(p["layers"]) or "none",
        "perplexity": lambda p: _plain_number(p.get("perplexity")),
        "drop, cosine": lambda p: _plain_number(_part(p, "drop").get("perplexity")),
        "drop, same": lambda p: _plain_number(_part(p, "drop_same").get("perplexity")),
        "KV bytes/ token": lambda p: _plain_number(p.get("kv_bytes_per_token")),
        "prefill tokens/s": lambda p: _plain_number(p.get("prefill")),
        "decode tokens/s": lambda p: _plain_number(p.get("decode")),
    }
    head = ["model", *columns]
    rows = [
        [name, *(value(point) for value in columns.values())]
        for name, point in zip(_names(record), points, strict=True)
    ]
    keep = [i for i in range(len(head)) if any(row[i] != _NONE for row in rows)]
    return _section(
        "Measurements",
        _table([head[i] for i in keep], [[row[i] for i in keep] for row in rows], text_columns=2),
    )


def _criteria(record: dict) -> str:
    scores = {name: values for name, values in _scores(record).items() if order(values)}
    if not scores:
        return _section("Criteria", '<p class="missing">Not in this record.</p>')
    chosen = set(_choice(record)["layers"])
    ranks = {
        name: {layer: n for n, layer in enumerate(order(values), 1)}
        for name, values in scores.items()
    }
    head = "".join(f"<th>{escape(name)}</th>" for name in scores)
    rows = []
    for layer in range(max(map(len, scores.values()))):
        cells = [f'<th scope="row">{layer}</th>']
        for name, values in scores.items():
            rank = ranks[name].get(layer)
            if rank is None:
                cells.append(f"<td>{_NONE}</td>")
                continue
            # The earlier a layer would be replaced, the stronger the tint: columns that agree
            # look alike from across the room.
            tint = 40 * (1 - (rank - 1) / max(1, len(ranks[name]) - 1))
            cells.append(
                f'<td style="background:color-mix(in srgb, var(--nbl) {tint:.0f}%, transparent)">'
                f"<b>{rank}</b> <small>{_short(values[layer])}</small></td>"
            )
        css = ' class="chosen"' if layer in chosen else ""
        rows.append(f"<tr{css}>{''.join(cells)}</tr>")
    keys = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(CRITERIA.get(name, ''))}</dd>" for name in scores
    )
    return _section(
        "Criteria",
        "<p>The order in which each criterion would replace the layers (1 = first), and its score."
        + (" The layers replaced are marked." if chosen else "")
        + "</p>"
        f'<div class="scroll"><table class="criteria"><thead><tr><th>layer</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><dl>{keys}</dl>",
    )


def _samples(record: dict) -> str:
    samples = _part(record, "samples")
    texts = _part(samples, "continuations")
    if not texts:
        return ""
    items = "".join(
        f"<dt>{escape(str(name))}</dt><dd><pre>{escape(str(text))}</pre></dd>"
        for name, text in texts.items()
    )
    prompt = f"<dt>prompt</dt><dd><pre>{escape(str(samples.get('prompt', '')))}</pre></dd>"
    return _section("Samples", f'<dl class="samples">{prompt}{items}</dl>')


def _conditions(record: dict) -> str:
    rows = [
        (name, record[key])
        for name, key in (("date", "date"), ("command", "command"))
        if record.get(key)
    ]
    if _number(record.get("seconds")) is not None:
        rows.append(("duration", f"{record['seconds']:.0f} s"))
    for part in ("conditions", "calibration", "evaluation", "speed", "choice"):
        for key, value in _part(record, part).items():
            if value is not None and value != [] and value != {}:
                name = key if part == "conditions" else f"{part}: {key}"
                rows.append((name.replace("_", " "), _readable(value)))
    if not rows:
        return _section("Conditions", '<p class="missing">Not in this record.</p>')
    items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in rows)
    return _section("Conditions", f'<dl class="conditions">{items}</dl>')


def _table(head: list[str], rows: list[list[str]], *, text_columns: int) -> str:
    def cells(row, tag):
        return "".join(
            f"<{tag}{' class=text' if i < text_columns else ''}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


# ---- the record, read without trust --------------------------------------------------------------

_NONE = "–"


def _part(record: dict, name: str) -> dict:
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, dict) else {}


def _choice(record: dict) -> dict:
    choice = _part(record, "choice")
    return {**choice, "layers": _layers(choice)}


def _layers(part: dict) -> list[int]:
    layers = part.get("layers")
    return [i for i in layers if type(i) is int] if isinstance(layers, list) else []


def _scores(record: dict) -> dict[str, list]:
    return {
        str(name): [_number(value) for value in values]
        for name, values in _part(record, "scores").items()
        if isinstance(values, list)
    }


def _points(record: dict) -> list[dict]:
    points = record.get("points")
    points = points if isinstance(points, list) else []
    return [{**p, "layers": _layers(p)} for p in points if isinstance(p, dict) and "layers" in p]


def _number(value) -> float | None:
    """value where it is a finite number (NaN and infinity are written as null)."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return value if real and math.isfinite(value) else None


def _plain_number(value) -> str:
    value = _number(value)
    if value is None:
        return _NONE
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 4 if abs(value) < 1 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f}"


def _short(value) -> str:
    value = _number(value)
    if value is None:
        return _NONE
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}".replace("-", "−")


def _readable(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_readable(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_readable, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        _plain_number(value)
        if isinstance(value, int)
        else (f"{value:.4g}" if isinstance(value, float) else str(value))
    )


def _ids(layers: list) -> str:
    return ", ".join(str(layer) for layer in layers)


def _names(record: dict) -> list[str]:
    """What each point's cost was measured on: "dense", "NBL-4" or, if asked for, "drop-4"."""
    kind = "drop" if _choice(record).get("method") == "drop" else "NBL"
    return [f"{kind}-{len(p['layers'])}" if p["layers"] else "dense" for p in _points(record)]


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="{mark}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1b1f24; --muted: #667080; --line: #e3e6ea; --paper: #fff; --soft: #f6f7f9;
        --nbl: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --muted: #9aa4b2; --line: #333b47; --paper: #14181d; --soft: #1c2229;
          --nbl: #56b4e9; }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 46rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.75rem 0 .75rem; padding-top: .75rem;
     border-top: 1px solid var(--line) }
header p { color: var(--muted); margin: 0 0 1.5rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem }
.tile { background: var(--soft); border-radius: 8px; padding: .75rem 1rem }
.tile { color: var(--muted); font-size: .85rem; font-variant-numeric: tabular-nums }
.tile b { color: var(--nbl); font-size: 1.5rem; line-height: 1.6 }
.note { border-left: 3px solid var(--nbl); padding-left: .75rem }
.missing { color: var(--muted); font-style: italic }
figure { margin: 0 }
figure img { display: block; width: 100%; max-width: 36rem; height: auto; margin: 0 auto }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .75rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
        font-variant-numeric: tabular-nums }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--line) }
th { font-weight: 600; vertical-align: bottom }
thead th { color: var(--muted); white-space: normal }
th.text, td.text { text-align: left }
.criteria th, .criteria td { text-align: center }
.criteria small { color: var(--muted); margin-left: .25rem }
.criteria tr.chosen th { color: var(--nbl); box-shadow: inset 4px 0 var(--nbl) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; font-size: .9rem }
dt { color: var(--muted) }
dd { margin: 0; overflow-wrap: anywhere }
pre { margin: 0; white-space: pre-wrap; font: .85rem/1.5 ui-monospace, monospace }
@media (max-width: 34rem) {
  dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .6rem }
  th, td { padding: .35rem .4rem }
}
"""
