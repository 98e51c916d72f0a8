"""What gpu_report.py makes of its measurements: targets, suggested paths, Markdown, a short table.

Rows are dicts, those of comparison.GpuRow or, where a path did not run, with a key "failed".
"""

from __future__ import annotations

import statistics
from collections import defaultdict

SWITCHES = {
    "residual_linear": "linear",
    "norm_linear": "linear",
    "norm_swiglu": "linear",
    "quantized_linear": "linear",
    "covariance": "covariance",
    "rope_append": "rope",
    "memory_linear": "memory",
    "memory_scan": "memory",
    "memory moments": "covariance",
}
SHOWN_ROWS = (1, 4, 16, 17, 512)  # of x, in the short table
FEW_ROWS = 16  # of x, up to which bytes are the limit
BITS_PER_WEIGHT = {"int8": 8, "fp8": 8, "int4": 4.125}  # and, per row, those of a scale
BITS_PER_ROW = {"int8": 32, "fp8": 32, "int4": 0}
# Of DESIGN.md, section 7: these take a whole model, which this report does not run.
WHOLE_MODEL_TARGETS = {
    "calibration of an 8B-shaped model, 256 × 2048 tokens": "≤ 1.25× its forward pass",
    "decode, 8B shape, batch 1": "≥ 85 % of the byte floor; NBL-12 ≥ 95 % of the ceiling",
    "prefill, NBL-12 over dense": "≥ 95 % of the ceiling at 2k, 8k, 32k",
}


def measured(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "failed" not in row]


def rows_of_x(row: dict) -> int:
    """Of a linear of shape "MxKxN"."""
    return int(row["shape"].split("x")[0])


def limits(rows: list[dict]) -> dict[str, str]:
    """What the device reached beside the rows: copies within the memory, matrix products."""
    reached = defaultdict(list)
    for row in measured(rows):
        dtype = f", {row['dtype']}" if row["unit"] == "TFLOP/s" else ""
        reached[f"{row['limit_name']}{dtype}", row["unit"]].append(row["limit"])
    return {
        name: f"{statistics.median(v):.4g} {unit} ({min(v):.4g} to {max(v):.4g})"
        for (name, unit), v in reached.items()
    }


def targets(rows: list[dict]) -> list[dict]:
    """Each target beside what was measured; "path" and "passed" are None where nothing was.

    Paths are judged one by one, as if each were the default; "plain" is PyTorch itself.
    """
    ours = [row for row in measured(rows) if row["path"] != "plain"]
    linear = [r for r in ours if r["benchmark"] == "residual_linear" and r["dtype"] == "bfloat16"]
    solves = [r for r in ours if r["benchmark"] == "solve + bound"]
    grams = [
        row
        for row in ours
        if row["benchmark"] == "covariance" and row["shape"] in ("8192x4096", "16384x4096")
    ]
    results: list[dict] = []

    def judge(name: str, target: str, value, good, text: str, among: list[dict]) -> None:
        """One line for each path; its worst row counts."""
        paths = defaultdict(list)
        for row in among:
            paths[row["path"]].append(row)
        for path, candidates in paths.items():
            worst = min(candidates, key=value)
            passed = all(good(row) for row in candidates)
            said = f"{text.format(**worst)} ({worst['shape']})"
            results.append(
                {"name": name, "target": target, "path": path, "measured": said, "passed": passed}
            )
        if not paths:
            results.append(
                {"name": name, "target": target, "path": None, "measured": "", "passed": None}
            )

    for m, percent in ((1, 92), (16, 85)):
        judge(
            f"residual_linear, M={m}, d=4096 and 8192, cold L2",
            f"≥ {percent} % of the copy bandwidth",
            lambda r: r["percent_of_limit"],
            lambda r, percent=percent: (
                r["percent_of_limit"] >= percent and r["limit_name"] == "copy bandwidth"
            ),
            "{percent_of_limit:.1f} % of {limit_name}",
            [r for r in linear if r["shape"] in (f"{m}x4096x4096", f"{m}x8192x8192")],
        )
    judge(
        "residual_linear against the best of eager, compiled and graphed PyTorch, M = 1 to 8192",
        "never slower",
        lambda r: r["speedup"],
        lambda r: r["speedup"] >= 1,
        "{speedup:.2f}× {best_pytorch}",
        linear,
    )
    judge(
        "residual_linear against eager PyTorch, both called from Python, M ≤ 4",
        "≥ 2×",
        lambda r: r["speedup_of_calls"],
        lambda r: r["speedup_of_calls"] >= 2,
        "{speedup_of_calls:.2f}×",
        [r for r in linear if rows_of_x(r) <= 4],
    )
    judge(
        "covariance update, d=4096, N ≥ 8192, bf16",
        "≥ 1.7× torch's full matrix products",
        lambda r: r["speedup"],
        lambda r: r["speedup"] >= 1.7,
        "{speedup:.2f}×",
        grams,
    )
    judge(
        "covariance update, error against float64",
        "≤ 1e-6",
        lambda r: -r["error"],
        lambda r: r["error"] <= 1e-6,
        "{error:.1e}",
        grams,
    )
    large_solves = [r for r in solves if r["shape"].endswith("4096")]
    judge(
        "solve + bound, layers of 4096, fp64",
        "≥ 30× eigh + SVD + inverse",
        lambda r: r["speedup"],
        lambda r: r["speedup"] >= 30,
        "{speedup:.1f}×",
        large_solves,
    )
    judge(
        "solve + bound, agreement with eigh + SVD + inverse",
        "≤ 1e-8",
        lambda r: -r["error"],
        lambda r: r["error"] <= 1e-8,
        "{error:.1e}",
        solves,
    )
    results += [
        {"name": name, "target": target, "path": None, "measured": "", "passed": None}
        for name, target in WHOLE_MODEL_TARGETS.items()
    ]
    return results


def suggested_paths(rows: list[dict]) -> dict[str, dict]:
    """Per switch: the fastest path of each benchmark and shape, and the one fastest over all.

    Over all: the least sum of log time ratios to the fastest, among paths that ran everywhere. A
    path whose error is more than twice that of the most exact (and above 1e-12) does not count.
    Quantized weights follow the path of the others, and have no say: PyTorch alone is slow on them.
    """
    shapes: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    groups = defaultdict(list)
    for row in measured(rows):
        if row["benchmark"] != "quantized_linear" and row["benchmark"] in SWITCHES:
            groups[row["benchmark"], row["shape"], row["dtype"]].append(row)
    for (benchmark, shape, dtype), group in groups.items():
        allowed = max(2 * min(row["error"] for row in group), 1e-12)
        if benchmark == "covariance":
            allowed = 1e-6
        times = {row["path"]: row["us"] for row in group if row["error"] <= allowed}
        if times:
            shapes[SWITCHES[benchmark]][f"{benchmark} {shape} {dtype}"] = times
    suggestion = {}
    for switch, per_shape in shapes.items():
        everywhere = set.intersection(*(set(times) for times in per_shape.values()))
        fastest = {name: min(times, key=times.get) for name, times in per_shape.items()}

        def slowdown(path: str, per_shape=per_shape) -> float:
            product = 1.0
            for times in per_shape.values():
                product *= times[path] / min(times.values())
            return product

        best = min(everywhere, key=slowdown) if everywhere else None
        suggestion[switch] = {"path": best, "fastest": fastest}
    return suggestion


def quantized_table(rows: list[dict]) -> list[str]:
    """Each quantized linear beside the same path on the weight in bfloat16, and how much faster its
    bytes alone would make it."""
    dense = {
        (row["shape"], row["path"]): row
        for row in measured(rows)
        if row["benchmark"] == "residual_linear" and row["dtype"] == "bfloat16"
    }
    lines = [
        "| shape | weight | path | µs | µs, bfloat16 | × bfloat16 | × the bytes predict |"
        " of the limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in measured(rows):
        if row["benchmark"] != "quantized_linear" or rows_of_x(row) > FEW_ROWS:
            continue
        shape, format = row["shape"].split()
        m, k, n = map(int, shape.split("x"))
        activations = 16 * m * (k + n)
        bits = n * (k * BITS_PER_WEIGHT[format] + BITS_PER_ROW[format]) + activations
        predicted = (16 * n * k + activations) / bits
        beside = dense.get((shape, row["path"]))
        theirs, times = (
            ("", "")
            if beside is None
            else (f"{beside['us']:.1f}", f"{beside['us'] / row['us']:.2f}")
        )
        lines.append(
            f"| {shape} | {format} | {row['path']} | {row['us']:.1f} | {theirs} | {times} |"
            f" {predicted:.2f} | {row['percent_of_limit']:.1f} % of {row['limit_name']} |"
        )
    return lines


def decode_table(cases: list[dict]) -> list[str]:
    lines = ["| context | engine | tokens/s | of the ceiling |", "|---|---|---|---|"]
    for case in cases:
        for row in case["rows"]:
            lines.append(
                f"| {case['context']} | {row['engine']} | {row['tokens_per_second']:.1f} |"
                f" {row['percent_of_ceiling']:.1f} % |"
            )
    return lines


def sweep_table(sweep: list[dict]) -> list[str]:
    """Of every shape the tile of the table of sizes, which comes first, and the fastest."""
    shapes = defaultdict(list)
    for row in sweep:
        shapes[row["m"], row["d"]].append(row)
    lines = ["| M | d | | tile | splits | µs | GB/s |", "|---|---|---|---|---|---|---|"]
    for (m, d), rows in sorted(shapes.items()):
        right = [row for row in rows if row["right"]]
        fastest = min(right, key=lambda row: row["us"], default=None)
        for name, r in (("in the table", rows[0]), ("fastest", fastest)):
            if r is None:
                continue
            tile = f"{r['products']}, {r['rows']} rows, {r['tokens']} tokens, unroll {r['unroll']}"
            time = f"{r['us']:.2f} | {r['gb_per_s']}"
            lines.append(f"| {m} | {d} | {name} | {tile} | {r['splits']} | {time} |")
    wrong = sum(not row["right"] for row in sweep)
    if wrong:
        lines.append(f"\n{wrong} of {len(sweep)} gave other results than the first.")
    return lines


def markdown(report: dict) -> str:
    """The same report for people."""
    env, limits = report["environment"], report["limits"]
    lines = []
    say = lines.append
    title = "GPU report" if not report["dry_run"] else "DRY RUN on a CPU: no result of any GPU"
    say(f"# {title}: {env['device']}, {report['date'][:10]}\n")
    if report["dry_run"]:
        say("This file tests the report itself. Its figures mean nothing.\n")
    say("| | |\n|---|---|")
    for name, value in {**env, "tree": report["tree"], "command": report["command"]}.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        say(f"| {name} | {value} |")
    for name, value in limits.items():
        say(f"| measured {name} | {value} |")
    say("\n## Stages\n\n| stage | result | seconds | |\n|---|---|---|---|")
    for stage in report["stages"]:
        say(
            f"| {stage['name']} | {stage['status']} | {stage['seconds']:.0f} |"
            f" {_cell(stage['detail'])} |"
        )
    say("\n## Targets\n\n| | target | path | measured (worst) | |\n|---|---|---|---|---|")
    for t in report["targets"]:
        result = verdict(t, report["dry_run"])
        say(f"| {t['name']} | {t['target']} | {t['path'] or ''} | {t['measured']} | {result} |")
    say("\n## Paths\n\nThe fastest path where all errors are in order:\n")
    for switch, choice in report["suggested_paths"].items():
        counts = defaultdict(int)
        for path in choice["fastest"].values():
            counts[path] += 1
        each = ", ".join(f"{path} at {n}" for path, n in sorted(counts.items()))
        say(f"- {switch}: {choice['path']} over all shapes ({each} of them fastest)")
    say("\n## Quantized weights\n")
    lines.extend(quantized_table(report["rows"]))
    say("\n## Rows\n")
    say("Medians; a call from Python beside a launch in a CUDA graph; weights out of L2.\n")
    say(
        "| | shape | dtype | path | µs | ± % | µs called | rate | of the limit | best PyTorch |"
        " × best PyTorch | × eager, called | error | PyTorch's |"
    )
    say("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for r in measured(report["rows"]):
        theirs = "" if r["pytorch_error"] is None else f"{r['pytorch_error']:.1e}"
        spread = "once" if r["spread_percent"] is None else f"{r['spread_percent']:.1f}"
        others = "".join(f"; {name} {us:.1f} µs" for name, us in r["others_us"].items())
        say(
            f"| {r['benchmark']} | {r['shape']} | {r['dtype']} | {r['path']} | {r['us']:.1f} |"
            f" {spread} | {r['call_us']:.1f} | {r['rate']:.1f} {r['unit']} |"
            f" {r['percent_of_limit']:.1f} % of {r['limit_name']} |"
            f" {r['best_pytorch']}, {r['best_pytorch_us']:.1f} µs{others} | {r['speedup']:.2f} |"
            f" {r['speedup_of_calls']:.2f} | {r['error']:.1e} | {theirs} |"
        )
    if report["decode"]:
        say("\n## Decode\n\nRandom weights, batch 1; the ceiling is that of the bytes.\n")
        lines.extend(decode_table(report["decode"]))
    if report["sweep"]:
        say("\n## Sweep\n\nTiles of the skinny linear, weights out of L2, in a CUDA graph.\n")
        lines.extend(sweep_table(report["sweep"]))
    failed = [row for row in report["rows"] if "failed" in row]
    if failed:
        say("\n## Not measured\n")
        for r in failed:
            say(f"- {r['benchmark']} {r['shape']} {r['dtype']} {r['path']}: {_cell(r['failed'])}")
    return "\n".join(lines) + "\n"


def short_table(report: dict) -> str:
    """What is printed last: stages, targets, and the rows that the targets are about."""
    mark = "DRY RUN, no GPU result. " if report["dry_run"] else ""
    lines = [f"{mark}{report['environment']['device']}, {report['tree']}"]
    for name, value in report["limits"].items():
        lines.append(f"  measured {name}: {value}")
    for stage in report["stages"]:
        detail = _cell(stage["detail"])[:100]
        lines.append(
            f"  {stage['name']:<10} {stage['status']:<8} {stage['seconds']:5.0f} s  {detail}"
        )
    for r in measured(report["rows"]):
        linear = SWITCHES.get(r["benchmark"]) == "linear"
        if r["path"] == "plain" or (linear and rows_of_x(r) not in SHOWN_ROWS):
            continue
        lines.append(
            f"  {r['benchmark']:<15} {r['shape']:<18} {r['dtype']:<8} {r['path']:<8}"
            f" {r['us']:10.1f} µs {r['rate']:8.1f} {r['unit']:<7}"
            f" {r['percent_of_limit']:5.1f} % {r['speedup']:6.2f}x best PyTorch"
        )
    for t in report["targets"]:
        found = f"{t['path']}: {t['measured']}" if t["path"] else ""
        result = verdict(t, report["dry_run"])
        lines.append(f"  {result:<13} {t['name']}: {t['target']}; {found}".rstrip("; "))
    choices = ",".join(f"{s}={c['path']}" for s, c in report["suggested_paths"].items())
    lines.append(f"  fastest paths: {choices or 'none measured'}")
    return "\n".join(lines)


def verdict(target: dict, dry_run: bool) -> str:
    if dry_run:
        return "dry run"
    return {True: "met", False: "missed", None: "not measured"}[target["passed"]]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:400]
