"""Writes the tables of the documents from the files in benchmarks/results.

    python -m benchmarks.measurements            # what stands between <!-- NAME --> and <!-- / -->
    python -m benchmarks.measurements --check    # only says which documents differ; make lint does

Every table ends with a line that says where, with what and when it was measured, and by which
command. A figure that is in no result file is in no table.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.results import FOLDER, ROOT, read

DOCUMENTS = (
    "README.md",
    "docs/measurements.md",
    "docs/memory.md",
    "docs/window.md",
    "docs/heal.md",
    "docs/cuda.md",
)
MARK = re.compile(r"(<!-- (\w+) -->\n)(.*?)(<!-- / -->)", re.DOTALL)
GPU = "gpu-nvidia-h200-2026-11-26T2218.json"
GPU_COVARIANCE = "gpu-nvidia-h200-2026-11-26T2226-covariance.json"


def grid(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def source(file: str, command: str, where: dict[str, Any], date: str) -> str:
    """The line below a table."""
    device = where.get("processor") or where["device"]
    facts = [device, _threads(where)]
    facts += [f"{name} {where[name]}" for name in ("torch", "transformers") if name in where]
    said = ", ".join(fact for fact in facts if fact)
    return f"\n{said}; {date[:10]}; `{command}`; [{file}](RESULTS/{file})\n"


def _threads(where: dict[str, Any]) -> str | None:
    count = where.get("threads")
    return None if count is None else f"{count} thread{'s' * (count not in (1, '1'))}"


def of_study(name: str, options: str = "", part: str | None = None) -> tuple[dict[str, Any], str]:
    """(record, its source line) of `python -m benchmarks.studies.NAME`."""
    record = read(FOLDER / f"{name}.json")
    record = record if part is None else record[part]
    command = f"python -m benchmarks.studies.{name}{options and ' ' + options}"
    return record, source(f"{name}.json", command, record["environment"], record["date"])


def times(value: float) -> str:
    return f"{value:.2f}×"


def spread(row: dict[str, Any]) -> str:
    if row["range"] == [1, 1]:  # what the others are compared with
        return "1"
    return f"{row['median']:.2f} ({row['range'][0]:.2f} to {row['range'][1]:.2f})"


# --- the shipped model ----------------------------------------------------------------------------


def _demo_rows(record: dict[str, Any], *middle: Callable[[dict[str, Any], int], object]) -> list:
    """Layers replaced, perplexity, the columns of `middle`, dropped, KV bytes, decode."""
    dense, rows = record["points"][0], []
    for point in record["points"][::2]:
        count = len(point["layers"])
        dropped = point["drop"] if count else dense
        rows.append(
            [
                count if count else f"{count} of {record['model']['layers']}",
                f"{point['perplexity']:.1f}",
                *(column(point, count) for column in middle),
                f"{dropped['perplexity']:.1f}",
                f"{point['kv_bytes_per_token']:,}",
                times(point["decode"] / dense["decode"]),
            ]
        )
    return rows


def demo() -> str:
    record = read(FOLDER / "demo.json")
    dense = record["points"][0]
    rows = _demo_rows(record, lambda point, _: times(point["prefill"] / dense["prefill"]))
    head = ["layers replaced", "perplexity, NBL", "prefill", "attention dropped (by cosine)"]
    head += ["KV bytes per token", "decode"]
    return grid(head, rows) + source("demo.json", "nbl demo", record["conditions"], record["date"])


def curves(record: dict[str, Any]) -> dict[str, list[float]]:
    """{name: perplexity with 0, 1, 2, … layers replaced}."""
    base = record["base_perplexity"]
    return {row["name"]: [base, *row["perplexity"]] for row in record["curves"]}


MAPS = {  # name in memory.json: in a table
    "dropped, by cosine": "attention dropped",
    "NBL (one token)": "one token",
    "one token, rank d/8": "one token, d/8",
    "memory, full rank": "memory, full rank",
    "memory, rank d/2": "d/2",
    "memory, rank d/4": "d/4",
    "memory, rank d/8": "d/8",
    "memory, rank d/16": "d/16",
}


def memory() -> str:
    record, said = of_study("memory")
    by_count, sizes = curves(record), record["bytes"]["layers"]
    layers, count = record["num_hidden_layers"], 3 * record["num_hidden_layers"] // 4
    by_loss = {row["name"]: f"{row['perplexity']:.1f}" for row in record["by_loss"]}
    excess = {(e["name"], e["criterion"]): f"{e['ratio']:.2f}" for e in record["excess_log_loss"]}
    excess |= {("NBL (one token)", criterion): "1" for criterion in ("residual", "loss")}
    rows: list[list[object]] = []
    for m in range(1, layers + 1):
        values = [by_count[name][m] for name in MAPS]
        rows.append([m, *(f"{v:.0f}" if v >= 1000 else f"{v:.1f}" for v in values)])
    rows.append([f"{count}, by loss", *(by_loss.get(name, "") for name in MAPS)])
    for text, criterion in (
        (f"excess log-loss at m = {count}, × one token's", "residual"),
        ("the same, by loss", "loss"),
    ):
        rows.append([text, *(excess.get((name, criterion), "") for name in MAPS)])
    nothing = {"weights_of_d2": 0, "weight_bytes": 0, "state_bytes": 0, "cache_state_bytes": 0}
    of_layer = [sizes.get(name, nothing) for name in MAPS]
    rows.append(["weights, × d²", *(f"{row['weights_of_d2']:.4g}" for row in of_layer)])
    rows.append(["weights and bias, bytes", *(f"{row['weight_bytes']:,}" for row in of_layer)])
    rows.append(["state per sequence, bytes", *(f"{row['state_bytes']:,}" for row in of_layer)])
    held = (f"{row['cache_state_bytes']:,}" for row in of_layer)
    rows.append(["with the states to roll back to", *held])
    return grid(["m", *MAPS.values()], rows) + said


def sequential() -> str:
    record, said = of_study("memory", "--refit")
    by_count = curves(record)
    fitted = {row["name"]: row["perplexity"] for row in record["sequential"]}
    counts = sorted(map(int, record["sequential"][0]["perplexity"]))
    rows = []
    for name, plain in (("one token", "NBL (one token)"), *[("memory, rank d/8",) * 2]):
        rows.append([name, *(f"{by_count[plain][m]:.1f}" for m in counts)])
        own = "sequential " + ("NBL" if name == "one token" else name)
        for more in ("", ", MLPs refitted"):
            found = fitted[own + more]
            rows.append([f"{name}, sequential{more}", *(f"{found[str(m)]:.1f}" for m in counts)])
    return grid(["maps", *(f"m = {m}" for m in counts)], rows) + said


def recipe() -> str:
    record, said = of_study("memory", "--recipe", "recipe")
    counts = (2, 4, 6)
    rows = [
        [row["name"], *(f"{row['perplexity'][m - 1]:.1f}" for m in counts)]
        for row in record["rows"]
    ]
    return grid(["one token, features and order", *(f"m = {m}" for m in counts)], rows) + said


def _memory_speed(part: str, options: str) -> str:
    record, said = of_study("memory", options, part)
    rows = []
    for row in record["rows"]:
        cells = [row["model"], f"{row['weight_bytes'] / 1e6:,.0f}"]
        for what in ("decode", "prefill"):
            speed = row[f"{what}_tokens_per_second"]
            cells += [f"{speed:,.1f}" if speed < 100 else f"{speed:,.0f}"]
            cells += [spread(row[f"{what}_times_nbl"])]
        rows.append(cells)
    head = ["maps", "weights, MB", "decode, tokens/s", "× one token"]
    return grid([*head, "prefill, tokens/s", "× one token"], rows) + said


def memory_speed() -> str:
    return _memory_speed("speed", "--speed")


def demo_speed() -> str:
    return _memory_speed("demo_speed", "--demo-speed")


def retrieval() -> str:
    record, said = of_study("retrieval")
    names = {"previous": ("previous, the only layer",)}
    names["recall"] = ("recall, the first layer", "recall, the second layer")
    rows = []
    for task, labels in names.items():
        found = record["tasks"][task]
        by_place = {(row["map"], tuple(row["layers"])): row["accuracy"] for row in found["rows"]}
        for layer, label in enumerate(labels):
            shares = [by_place["attention", ()]]
            shares += [by_place[name, (layer,)] for name in record["memories"]]
            rows.append([label, *(f"{s:.1%}" for s in [*shares, found["chance"]])])
    head = ["layer replaced", "attention", *record["memories"], "guessing"]
    return grid(head, rows) + said


# --- a real model ---------------------------------------------------------------------------------

KINDS = {  # in real.json: in a table
    "dropped": "attention dropped",
    "paper": "the paper's recipe: pre-norm features",
    "one-token": "one token",
    "one-token-mix": "one token, calibrated on both kinds",
    "memory-full": "memory, full rank",
    "memory-d4": "memory, rank d/4",
    "memory-d8": "memory, rank d/8",
    "window-128": "itself, seeing 128 tokens + 1",
    "window-32": "itself, seeing 32 tokens + 4",
    "window-32-no-sink": "itself, seeing 32 tokens, no sink",
}


def real() -> str:
    record, said = of_study("real", "--text TEXT --other OTHER")
    counts = [len(point["layers"]) for point in record["rows"][0]["points"]]
    nothing = ["the model itself", "", *[""] * len(counts)]
    base = record["base"]
    nothing[2] = f"{base['same kind']:.2f} / {base['other kind']:.2f}"
    rows = [nothing]
    found = [row for row in record["rows"] if row["kind"] in KINDS]
    for row in sorted(found, key=lambda row: list(KINDS).index(row["kind"])):
        cells = (f"{p['same kind']:.1f} / {p['other kind']:.1f}" for p in row["points"])
        rows.append([KINDS[row["kind"]], row["criterion"], *cells])
    total = record["num_hidden_layers"]
    head = ["in the place of attention", "layers by", *(f"{m} of {total}" for m in counts)]
    return grid(head, rows) + said


def plans() -> str:
    """Plans, beside single kinds that leave about as much of the cache."""
    record, said = of_study("real", "--text TEXT --other OTHER --only plan")
    by_kind = {(row["kind"], row["criterion"]): row["points"] for row in record["rows"]}
    dense = record["step"]
    singles = [
        kind for kind in ("window-128", "one-token", "dropped") if (kind, "cosine") in by_kind
    ]

    def cell(point: dict[str, Any]) -> str:
        return f"{point['same kind']:.1f} / {point['other kind']:.1f}"

    rows = []
    for n, point in enumerate(by_kind["plan", "plan"]):
        kinds = Counter(str(kind) for kind in point["layers"].values())
        row = [
            f"{point['kv_bytes'] / dense['kv_bytes']:.0%}",
            f"{dense['bytes'] / point['bytes']:.2f}×",
            ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
            cell(point),
        ]
        for kind in singles:
            points = by_kind[kind, "cosine"]
            row.append(cell(points[n]) if n < len(points) else "")
        rows.append(row)
    head = ["cache left", "bytes of a step, fewer", "the plan's kinds", "plan"]
    return grid([*head, *(KINDS[kind] for kind in singles)], rows) + said


def long_quality() -> str:
    record, said = of_study("long_context", "--text TEXT --calibration OTHER")
    first = next(iter(record["variants"].values()))
    keys = list(first.get("passkey", {}))
    rows = [
        [
            name,
            *(f"{value:.2f}" for value in row["perplexity"].values()),
            *(f"{row['passkey'][key]['accuracy']:.0%}" for key in keys),
        ]
        for name, row in record["variants"].items()
    ]
    head = ["layers, by cosine", *(f"perplexity, {n} tokens" for n in first["perplexity"])]
    return grid([*head, *(f"passkey in {n}" for n in keys)], rows) + said


def long_costs() -> str:
    record, said = of_study("long_context", "--text TEXT --calibration OTHER")
    base = next(iter(record["variants"].values()))
    rows = []
    for name, row in record["variants"].items():
        cells = [f"{value / 2**20:.1f}" for value in row["kv_bytes"].values()]
        for kind in ("decode", "prefill"):
            cells += [
                f"{value:,.0f} ({value / base[kind][context]:.2f}×)"
                for context, value in row[kind].items()
            ]
        rows.append([name, *cells])
    head = ["layers, by cosine", *(f"keys and values at {n}, MiB" for n in base["kv_bytes"])]
    head += [f"{kind} at {n}, tokens/s" for kind in ("decode", "prefill") for n in base[kind]]
    return grid(head, rows) + said


def heal() -> str:
    return _healed(*of_study("heal", "--text TEXT --other OTHER"))


def heal_memory() -> str:
    record = read(FOLDER / "heal_memory.json")
    file, command = "heal_memory.json", "python -m benchmarks.studies.heal … --memory RANK"
    return _healed(record, source(file, command, record["environment"], record["date"]))


def _healed(record: dict[str, Any], said: str) -> str:
    def cells(name: str, steps: object, kl: float, found: dict[str, Any]) -> list[object]:
        return [name, steps, f"{kl:.3f}", *(f"{found[text]:.2f}" for text in record["base"])]

    count, closed = len(record["layers"]), record["rows"][0]["kl_before"]
    rows = [
        cells("the model itself", "", 0, record["base"]),
        cells(f"{count} maps in closed form, not trained", "", closed, record["closed form"]),
    ]
    for row in sorted(record["rows"], key=lambda row: (row["steps"], row["kl_after"])):
        rows.append(cells(row["name"], row["steps"], row["kl_after"], row))
    head = ["what is trained, learning rate", "steps", "KL, nats per token"]
    return grid([*head, *(f"perplexity, {text}" for text in record["base"])], rows) + said


SUMMARY = {  # of the README: what is done to the layers, in real.json
    "bounded: 128 tokens + 1": ("window-128", "cosine"),
    "maps, calibrated on both kinds": ("one-token-mix", "residual"),
    "maps, on the first kind": ("one-token", "residual"),
    "the paper's recipe": ("paper", "cca"),
    "dropped": ("dropped", "cosine"),
}


def summary() -> str:
    """For the README: the real model."""
    record = read(FOLDER / "real.json")
    by_kind = {(row["kind"], row["criterion"]): row["points"] for row in record["rows"]}
    found = {name: by_kind[key] for name, key in SUMMARY.items() if key in by_kind}
    total, base = record["num_hidden_layers"], record["base"]
    rows = []
    for n, point in enumerate(found["dropped"]):
        cells = (_rises(points[n], base) for points in found.values())
        rows.append([f"{len(point['layers'])} of {total}", *cells])
    head = ["attention layers", *found]
    return grid(head, rows)


def _rises(point: dict[str, Any], base: dict[str, float]) -> str:
    return " / ".join(f"{point[name] / base[name]:.2f}" for name in base)


# --- speed ----------------------------------------------------------------------------------------


def engines() -> str:
    decode, said = of_study("decode")
    prefill, also = of_study("prefill")
    by_engine = {row["engine"]: row for row in prefill["cases"][0]["rows"]}
    rows = []
    for row in decode["cases"][0]["rows"]:
        cells = [row["engine"]]
        for found, digits in ((row, 2), (by_engine[row["engine"]], 0)):
            cells.append(f"{found['tokens_per_second']:.{digits}f}")
            cells.append(f"{found['times_eager']:.2f}")
            cells.append(f"{found['percent_of_ceiling']:.0f} %")
        rows.append(cells)
    head = ["engine"]
    for kind in ("decode", "prefill"):
        head += [f"{kind}, tokens/s", "× eager", "of the ceiling"]
    return grid(head, rows) + said + also


def quantization() -> str:
    record, said = of_study("quantization")
    perplexity = {(row["model"], row["weights"]): row["perplexity"] for row in record["perplexity"]}
    decode = {(row["model"], row["weights"]): row for row in record["decode"]}
    quality, speed = (list(dict.fromkeys(name for name, _ in of)) for of in (perplexity, decode))
    rows = []
    for weights in dict.fromkeys(row["weights"] for row in record["decode"]):
        cells = [weights, *(f"{perplexity[model, weights]:.2f}" for model in quality)]
        cells.append(f"{decode[speed[0], weights]['speedup_predicted']:.2f}")
        for model in speed:
            row = decode[model, weights]
            cells.append(spread({"median": row["speedup"], "range": row["speedup_range"]}))
        rows.append(cells)
    head = ["weights", *(f"perplexity, {model}" for model in quality)]
    head += ["speed-up the bytes predict", *(f"measured, {model}" for model in speed)]
    return grid(head, rows) + said


def speculative() -> str:
    record, said = of_study("speculative")
    rows = [
        [
            f"{row['engine']}, {row['layers']} of 8 layers linear",
            f"{row['acceptance']:.0%}" if "acceptance" in row else "",
            f"{row['tokens_per_pass']:.2f}" if "tokens_per_pass" in row else "",
            spread({"median": row["speedup"], "range": row["speedup_range"]}),
        ]
        for row in record["rows"]
    ]
    head = ["draft", "accepted", "tokens per pass of the model", "× without a draft"]
    return grid(head, rows) + said


KERNELS = (  # benchmark, shape, dtype
    ("residual_linear", "1x4096x4096", "bfloat16"),
    ("residual_linear", "1x2048x2048", "bfloat16"),
    ("residual_linear", "16x4096x4096", "bfloat16"),
    ("residual_linear", "16x4096x4096", "float16"),
    ("residual_linear", "16x4096x4096", "float32"),
    ("norm_linear", "1x4096x6144", "bfloat16"),
    ("norm_swiglu", "1x4096x2·14336", "bfloat16"),
    ("covariance", "4096x2048", "bfloat16"),
    ("covariance", "4096x2048", "float32"),
    ("solve + bound", "1024", "float64"),
)


def kernels() -> str:
    file = "amd-epyc.csv"
    with (FOLDER / file).open(encoding="utf-8", newline="") as lines:
        found = {(r["benchmark"], r["shape"], r["dtype"]): r for r in csv.DictReader(lines)}
    rows = []
    for key in KERNELS:
        row = found[key]  # the latest
        limit = float(row["percent_of_limit"])
        rows.append(
            [
                f"`{key[0]}`, {key[1].replace('x', ' × ')}",
                key[2],
                f"{float(row['median_us']):,.0f}",
                f"{float(row['rate']):.3g} {row['unit']}",
                f"{limit:.0f} %" if math.isfinite(limit) else "",
                f"{float(row['speedup']):.2f}",
                row["error"],
            ]
        )
    head = ["kernel", "dtype", "µs", "rate", "of the limit", "× best PyTorch", "error"]
    return grid(head, rows) + source(file, "pytest --benchmark", row, row["date"])


# --- on a GPU -------------------------------------------------------------------------------------

GPU_ROWS = {  # what the table calls it: benchmark, shapes
    "`residual_linear` 4096², 1 / 4 / 16 rows": ("residual_linear", "{}x4096x4096", (1, 4, 16)),
    "`residual_linear` 8192², 1 / 4 / 16 rows": ("residual_linear", "{}x8192x8192", (1, 4, 16)),
    "`norm_linear` 4096 → 6144, 1 / 16 rows": ("norm_linear", "{}x4096x6144", (1, 16)),
    "`norm_swiglu` 4096 → 2 · 14336, 1 / 16 rows": ("norm_swiglu", "{}x4096x2·14336", (1, 16)),
    "int8 / fp8 / int4 weight 8192², 1 row": (
        "quantized_linear",
        "1x8192x8192 {}",
        ("int8", "fp8", "int4"),
    ),
    "int8 / fp8 / int4 weight 4096², 17 rows": (
        "quantized_linear",
        "17x4096x4096 {}",
        ("int8", "fp8", "int4"),
    ),
    "`memory_linear` 4096, rank 512, 1 / 16 rows": ("memory_linear", "{}x1x4096, 512", (1, 16)),
    "`memory_scan` 4096, rank 512, 512 / 2048 tokens": (
        "memory_scan",
        "1x{}x4096, 512",
        (512, 2048),
    ),
    "`rope_append` 8B, 1 / 2048 tokens": ("rope_append", "8B, 1x{}", (1, 2048)),
    "covariance, 8192 tokens, d = 2048 / 4096": ("covariance", "8192x{}", (2048, 4096)),
    "solve + bound, 1024 / 2048": ("solve + bound", "{}", (1024, 2048)),
    "solve + bound, 4 layers of 4096": ("solve + bound", "4x{}", (4096,)),
}
BEST_PATHS = ("kernel", "hopper", "linalg")


def gpu() -> str:
    record = read(FOLDER / GPU)
    # The covariance was measured once more when its sums had become shorter.
    later = read(FOLDER / GPU_COVARIANCE)
    found = {}
    for row in [*record["rows"], *later["rows"]]:
        if row.get("path") in BEST_PATHS and row.get("dtype") in ("bfloat16", "float64"):
            found[row["benchmark"], row["shape"]] = row
    rows = []
    for name, (benchmark, shape, values) in GPU_ROWS.items():
        own = [found[benchmark, shape.format(value)] for value in values]
        limit = own[0]["limit_name"]
        rows.append(
            [
                name,
                " / ".join(f"{r['us']:,.1f}" if r["us"] < 1000 else f"{r['us']:,.0f}" for r in own),
                " / ".join(f"{r['percent_of_limit']:.0f}" for r in own) + f" % of {limit}",
                " / ".join(f"{r['speedup']:.2f}" for r in own),
            ]
        )
    head = ["", "µs", "of the limit", "× best PyTorch"]
    where = record["environment"]
    text = grid(head, rows) + source(GPU, "python -m benchmarks.gpu_report", where, record["date"])
    return text.rstrip() + f"; covariance: [{GPU_COVARIANCE}](RESULTS/{GPU_COVARIANCE})\n"


def gpu_decode() -> str:
    record = read(FOLDER / GPU)
    rows = []
    for case in record["decode"]:
        for row in case["rows"]:
            speed, share = row["tokens_per_second"], row["percent_of_ceiling"]
            rows.append([case["context"], row["engine"], f"{speed:.0f}", f"{share:.0f} %"])
    head = ["context", "engine", "tokens/s", "of the ceiling"]
    command = "python -m benchmarks.gpu_report --only build,decode"
    return grid(head, rows) + source(GPU, command, record["environment"], record["date"])


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        summary,
        demo,
        memory,
        sequential,
        recipe,
        memory_speed,
        demo_speed,
        retrieval,
        real,
        plans,
        long_quality,
        long_costs,
        heal,
        heal_memory,
        engines,
        quantization,
        speculative,
        kernels,
        gpu,
        gpu_decode,
    )
}


def filled(document: str) -> str:
    """The text of a document with its tables as the result files have them."""
    text = (ROOT / document).read_text(encoding="utf-8")
    results = "benchmarks/results" if "/" not in document else "../benchmarks/results"
    if unknown := {match[1] for match in MARK.findall(text)} - TABLES.keys():
        raise SystemExit(f"{document}: no table is called {', '.join(sorted(unknown))}")

    def table(match: re.Match[str]) -> str:
        return match[1] + TABLES[match[2]]().replace("RESULTS", results) + match[4]

    return MARK.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    differ = []
    for document in DOCUMENTS:
        path, text = ROOT / document, filled(document)
        if path.read_text(encoding="utf-8") == text:
            continue
        differ.append(document)
        if not check:
            path.write_text(text, encoding="utf-8")
    if differ:
        print(*differ, sep="\n")
        if check:
            sys.exit(
                "differ from benchmarks/results: python -m benchmarks.measurements writes them"
            )


if __name__ == "__main__":
    main()
