"""The record that nbl leaves in a folder that it wrote, nbl_report.json, read without trust.

The record's parts, all optional but the first two:

    nbl_report    1, the version of this list
    command       calibrate | compress | heal | demo
    date, seconds, model {name, type, layers, hidden_size, parameters}, conditions {...}
    calibration   {text, tokens, length, features}
    scores        {criterion: [score of layer 0, 1, ...]}, null for a layer not calibrated
    choice        {method, criterion, layers, bias, rank, ridge, ridge_used, nmse}; with a window
                  {window: {size, sinks}}; of a plan {kinds: {layer: kind}, context, batch, loss,
                  byte_ratio, kv_share, front: [{layer, kind, instead_of, loss, bytes, kv_bytes,
                  flops}, ...]}
    points        [{layers, perplexity, kv_bytes_per_token, state_bytes, prefill, decode, drop:
                  {layers, perplexity}, drop_same: {layers, perplexity}, other: {perplexity, drop}},
                  ...], the first one dense
    healing       {compressed, text, steps, tokens_per_step, lr, rank, tokens, kl_before, kl_after,
                  kept, perplexity: {original, before, after}}
    evaluation, other  {text, tokens, length};  speed {prompt_tokens, new_tokens, repetitions}
    samples       {prompt, continuations: {name: text}};  notes [text, ...]
"""

import json
import math
from pathlib import Path

from .output import RECORD


def read_record(folder: str | Path) -> dict:
    """The record in a folder that nbl wrote."""
    path = Path(folder) / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"dir: expected a folder written by nbl calibrate, compress, heal or demo, but "
            f"{str(folder)!r} has no {RECORD}"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"dir: expected JSON in {str(path)!r}, got: {error}") from None
    if not isinstance(record, dict) or record.get("nbl_report") != 1:
        raise ValueError(f"dir: expected a record of version 1 in {str(path)!r}")
    return record


NONE = "–"


def part_of(record: dict, name: str) -> dict:
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, dict) else {}


def choice_of(record: dict) -> dict:
    found = part_of(record, "choice")
    return {**found, "layers": layer_ids(found)}


def layer_ids(entry: dict) -> list[int]:
    layers = entry.get("layers")
    return [i for i in layers if type(i) is int] if isinstance(layers, list) else []


def scores_of(record: dict) -> dict[str, list]:
    return {
        str(name): [number(value) for value in values]
        for name, values in part_of(record, "scores").items()
        if isinstance(values, list)
    }


def points_of(record: dict) -> list[dict]:
    points = record.get("points")
    points = points if isinstance(points, list) else []
    return [{**p, "layers": layer_ids(p)} for p in points if isinstance(p, dict) and "layers" in p]


def front_of(record: dict) -> list[dict]:
    """The points of a plan that are whole."""
    front = choice_of(record).get("front")
    return [
        point
        for point in (front if isinstance(front, list) else [])
        if isinstance(point, dict)
        and all(number(point.get(key)) is not None for key in ("loss", "bytes", "kv_bytes"))
        and point["bytes"] > 0
        and {"layer", "kind", "instead_of"} <= point.keys()
    ]


def number(value) -> float | None:
    """value where it is a finite number (NaN and infinity are written as null)."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return value if real and math.isfinite(value) else None


def plain_number(value) -> str:
    value = number(value)
    if value is None:
        return NONE
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 4 if abs(value) < 1 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f}"


def short(value) -> str:
    value = number(value)
    if value is None:
        return NONE
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}".replace("-", "−")


def readable(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {readable(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(readable, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        plain_number(value)
        if isinstance(value, int)
        else (f"{value:.4g}" if isinstance(value, float) else str(value))
    )


def ids(layers: list) -> str:
    return ", ".join(str(layer) for layer in layers)


def names_of(record: dict) -> list[str]:
    """What each point's cost was measured on: "dense", "NBL-4" or, if asked for, "drop-4"."""
    kind = "drop" if choice_of(record).get("method") == "drop" else "NBL"
    return [f"{kind}-{len(p['layers'])}" if p["layers"] else "dense" for p in points_of(record)]
