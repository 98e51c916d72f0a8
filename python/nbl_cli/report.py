"""The report: what a run measured, as one self-contained HTML file or as PNG plots.

Everything shown comes from the record (record.py). A part that it lacks is said to be missing.
"""

import base64
from collections.abc import Callable
from html import escape

from .output import MARK, RECORD
from .plots import DARK, LIGHT, PLOTS, draw_plot, render_plot
from .record import (
    NONE,
    choice_of,
    front_of,
    ids,
    names_of,
    number,
    part_of,
    plain_number,
    points_of,
    read_record,
    readable,
    scores_of,
    short,
)
from .scores import order

__all__ = ["HTML", "RECORD", "read_record", "render_html", "render_png"]

HTML = "nbl_report.html"
CRITERIA = {
    "greedy": "loss added by the layers up to this one together, each the next to add the least",
    "loss": "loss added when this layer alone is linearized, nats per token",
    "residual": "error of the linear map relative to each token's residual stream",
    "cca": "CCA bound on the error (the paper's), Σ(1−ρ²)",
    "nmse": "error of the linear map relative to the attention output",
    "cosine": "cosine distance between the stream before and after attention, as in layer dropping",
}


def render_html(record: dict) -> str:
    """The whole report: no script, no reference to anything outside the file."""
    sections = [_headline(record)]
    for title, (draw, caption) in PLOTS.items():
        sections.append(_figure(title, draw, caption, record))
    sections += [
        _measurements(record),
        _plan(record),
        _criteria(record),
        _samples(record),
        _conditions(record),
    ]
    body = "\n".join(section for section in sections if section)
    return _PAGE.format(mark=MARK, title=escape(_title(record)), style=_STYLE, body=body)


def render_png(record: dict) -> dict[str, bytes]:
    """File name -> PNG of every plot that the record has the numbers for."""
    images = {}
    for title, (draw, _) in PLOTS.items():
        data = render_plot(draw, record)
        if data is not None:
            images[title.lower().replace(" ", "_").replace("-", "_") + ".png"] = data
    return images


def _figure(title: str, draw: Callable, caption: str, record: dict) -> str:
    images = [draw_plot(draw, record, theme, "svg") for theme in (LIGHT, DARK)]
    if images[0] is None and title not in _MISSING:
        return ""
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
    name = str(part_of(record, "model").get("name", "a model"))
    layers = choice_of(record)["layers"]
    if not layers:
        return f"NBL: {name}"
    choice = choice_of(record)
    verb = "dropped" if choice.get("method") == "drop" else "linearized"
    if "kinds" in choice or "window" in choice:
        verb = "replaced" if "kinds" in choice else "with a window"
    healed = ", the maps trained" if part_of(record, "healing").get("kept") is True else ""
    return f"NBL: {name}, {len(layers)} attention layers {verb}{healed}"


def _headline(record: dict) -> str:
    """What was done, and the two or three figures that matter, before against after."""
    choice, points = choice_of(record), points_of(record)
    model = part_of(record, "model")
    facts = [
        f"{model['layers']} layers" if "layers" in model else None,
        f"{plain_number(model['parameters'])} parameters" if "parameters" in model else None,
        str(model["type"]) if "type" in model else None,
    ]
    line = " · ".join(escape(fact) for fact in facts if fact)
    if choice["layers"]:
        line += f"<br>Replaced: layers {ids(choice['layers'])}"
        line += f", chosen by {escape(str(choice['criterion']))}" if choice.get("criterion") else ""
    tiles = []
    layers = choice["layers"]
    after = next((p for p in points if p["layers"] and set(p["layers"]) == set(layers)), None)
    if after and not points[0]["layers"]:
        dense, instead, other = points[0], part_of(after, "drop").get("perplexity"), "dropping"
        if choice.get("method") == "drop":
            instead, other = after.get("perplexity"), "NBL"
            after = {**after, "perplexity": part_of(after, "drop_same").get("perplexity")}
        for key, name in (
            ("perplexity", "perplexity"),
            ("kv_bytes_per_token", "KV bytes per token"),
            ("prefill", "prefill, tokens/s"),
            ("decode", "decode, tokens/s"),
        ):
            old, new = number(dense.get(key)), number(after.get(key))
            if not old or new is None:
                continue
            change = f"{new / old:.2f}×"
            if key == "perplexity":
                change = f"{other}: {plain_number(instead)}"
                if part_of(record, "healing"):
                    before = part_of(part_of(record, "healing"), "perplexity").get("before")
                    change = f"before healing: {plain_number(before)}"
            elif key == "kv_bytes_per_token":
                change = f"{new / old - 1:+.0%}".replace("-", "−")
            tiles.append(
                f'<div class="tile"><div>{name}</div><b>{plain_number(new)}</b>'
                f"<div>dense: {plain_number(old)}</div><div>{escape(change)}</div></div>"
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
    points = points_of(record)
    if len(points) < 2:
        return ""
    columns = {
        "layers": lambda p: ids(p["layers"]) or "none",
        "perplexity": lambda p: plain_number(p.get("perplexity")),
        "drop, cosine": lambda p: plain_number(part_of(p, "drop").get("perplexity")),
        "drop, same": lambda p: plain_number(part_of(p, "drop_same").get("perplexity")),
        "other text": lambda p: plain_number(part_of(p, "other").get("perplexity")),
        "other text, drop": lambda p: plain_number(part_of(p, "other").get("drop")),
        "KV bytes/ token": lambda p: plain_number(p.get("kv_bytes_per_token")),
        "bytes/ sequence": lambda p: plain_number(p.get("state_bytes")),
        "prefill tokens/s": lambda p: plain_number(p.get("prefill")),
        "decode tokens/s": lambda p: plain_number(p.get("decode")),
    }
    head = ["model", *columns]
    rows = [
        [name, *(value(point) for value in columns.values())]
        for name, point in zip(names_of(record), points, strict=True)
    ]
    keep = [i for i in range(len(head)) if any(row[i] != NONE for row in rows)]
    return _section(
        "Measurements",
        _table([head[i] for i in keep], [[row[i] for i in keep] for row in rows], text_columns=2),
    )


def _plan(record: dict) -> str:
    """Every change of a plan, and what it was for."""
    front = front_of(record)
    if len(front) < 2:
        return ""
    first = front[0]
    rows = [
        [
            NONE if point["layer"] is None else str(point["layer"]),
            "as it is" if point["layer"] is None else f"{point['kind']}",
            NONE if point["layer"] is None else f"{point['instead_of']}",
            f"{point['loss']:+.4f}",
            f"{point['bytes'] / first['bytes']:.1%}",
            f"{point['kv_bytes'] / max(1, first['kv_bytes']):.1%}",
        ]
        for point in front
    ]
    head = ["layer", "kind", "instead of", "loss in all", "bytes of a step", "of the cache"]
    choice = choice_of(record)
    words = (
        f"Made for {choice.get('batch')} sequences of {choice.get('context')} tokens: a decode "
        f"step reads {plain_number(first['bytes'])} bytes as the model is, "
        f"{plain_number(first['kv_bytes'])} of them from the cache."
    )
    return _section(
        "Plan, step by step", f"<p>{escape(words)}</p>" + _table(head, rows, text_columns=3)
    )


def _criteria(record: dict) -> str:
    scores = {name: values for name, values in scores_of(record).items() if order(values)}
    if not scores:
        return _section("Criteria", '<p class="missing">Not in this record.</p>')
    chosen = set(choice_of(record)["layers"])
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
                cells.append(f"<td>{NONE}</td>")
                continue
            # The earlier a layer would be replaced, the stronger the tint: columns that agree
            # look alike from across the room.
            tint = 40 * (1 - (rank - 1) / max(1, len(ranks[name]) - 1))
            cells.append(
                f'<td style="background:color-mix(in srgb, var(--nbl) {tint:.0f}%, transparent)">'
                f"<b>{rank}</b> <small>{short(values[layer])}</small></td>"
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
    samples = part_of(record, "samples")
    texts = part_of(samples, "continuations")
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
    if number(record.get("seconds")) is not None:
        rows.append(("duration", f"{record['seconds']:.0f} s"))
    parts = ("conditions", "calibration", "healing", "evaluation", "other", "speed", "choice")
    for part in parts:
        for key, value in part_of(record, part).items():
            if key == "front":  # a table of its own
                continue
            if value is not None and value != [] and value != {}:
                name = key if part == "conditions" else f"{part}: {key}"
                rows.append((name.replace("_", " "), readable(value)))
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
