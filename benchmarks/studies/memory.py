"""What a linear map gains from a memory: perplexity of the demo model, bytes, decode and prefill.

Perplexity against the number of layers replaced, on the held-out text of the shipped model: the
attention dropped, the map of one token (as in the paper, and at rank d/8) and the map with a memory
at several joint ranks. Every kind of map ranks the layers by its own residual; at three quarters of
the layers also by the measured loss. The sequential maps, each fitted on what those below it leave,
take half a minute to a minute per point and are measured for m = 2, 4, 6 unless --all. Where other
programs share the cores, --threads 1 is much faster than 2; perplexities do not depend on it.

    python -m benchmarks.studies.memory               # perplexity and bytes: the JSON and the plot
    python -m benchmarks.studies.memory --refit       # also sequential maps with refitted MLPs
    python -m benchmarks.studies.memory --speed       # decode and prefill, added to the same JSON
    python -m benchmarks.studies.memory --demo-speed  # those of the shipped model, added as well
    python -m benchmarks.studies.memory --recipe      # the paper's features and ranking
    python -m benchmarks.studies.memory --plot-only   # draws the JSON again
    python -m benchmarks.studies.memory --calibration-tokens 16384 --test-tokens 4096 --json none
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbl
import nbl.demo
import torch
import transformers
from nbl.engines import Ours
from nbl.models import LayerSpec
from nbl.upstream import output_cache
from transformers import PreTrainedModel

from benchmarks import results
from benchmarks.studies.random_model import SHAPE, random_model
from nbl_kernels import machine

RESULT = results.FOLDER / "memory.json"
MEMORY = nbl.Memory(lags=(1,), decays=(0.6, 0.95))
GRID = nbl.Memory(lags=(1,), decays=(0.5, 0.6, 0.8, 0.9, 0.95, 0.98), choose=2)
TARGET = 0.5  # of the paper's excess log-loss, at no more weights
CONTEXT = 512
PARTS = ("recipe", "speed", "demo_speed")  # of the JSON, measured apart


class Demo:
    """The shipped model, its texts, and its perplexity with some layers replaced."""

    def __init__(self, calibration_tokens: int, test_tokens: int) -> None:
        self.model, tokenizer = nbl.demo.load(torch.float32)
        settings = {"length": CONTEXT, "batch_size": 8}
        self.calibration = nbl.demo.token_batches(
            tokenizer, "calibration", **settings, max_tokens=calibration_tokens
        )
        self.test = nbl.demo.token_batches(tokenizer, "test", **settings, max_tokens=test_tokens)
        self.layers = self.model.config.num_hidden_layers
        self.hidden_size = self.model.config.hidden_size
        self.cals: dict[nbl.Memory | None, nbl.Calibration] = {}
        self.base = nbl.perplexity(self.model, self.test)

    def cal(self, memory: nbl.Memory | None) -> nbl.Calibration:
        if memory not in self.cals:
            self.cals[memory] = nbl.calibrate(
                self.model, self.calibration, memory=memory, progress=False
            )
        return self.cals[memory]

    def perplexity(self, replace: Callable[[PreTrainedModel], Any]) -> float:
        try:
            replace(self.model)
            return nbl.perplexity(self.model, self.test).value
        finally:
            nbl.restore(self.model)

    def order(self, memory: nbl.Memory | None, rank: int | None, criterion: str) -> list[int]:
        options = {}
        if criterion == "loss":
            options = {"model": self.model, "batches": self.calibration[:4]}
        return [s.layer for s in self.cal(memory).rank(criterion, rank=rank, **options)]

    def maps(
        self, memory: nbl.Memory | None, rank: int | None, layers: Sequence[int], **sequential: Any
    ) -> float:
        """The perplexity with maps in these layers."""
        if sequential:
            sequential["batches"] = self.calibration
        return self.perplexity(
            lambda model: nbl.linearize(model, self.cal(memory), layers, rank=rank, **sequential)
        )


# --- perplexity ----------------------------------------------------------------------------------


def kinds(d: int) -> list[dict[str, Any]]:
    """The maps that are compared: what is plotted as a curve each."""
    rows = [
        {"name": "NBL (one token)", "memory": None, "rank": None},
        {"name": "one token, rank d/8", "memory": None, "rank": d // 8},
        {"name": "memory, full rank", "memory": MEMORY, "rank": None},
    ]
    for share in (2, 4, 8, 16):
        rows.append({"name": f"memory, rank d/{share}", "memory": MEMORY, "rank": d // share})
    return rows


def curves(demo: Demo) -> list[dict[str, Any]]:
    """One row for every kind: the perplexity for 1, 2, ... layers in its own order."""
    everything = range(1, demo.layers + 1)
    rows = []
    first = demo.order(None, None, "residual")
    for name, order in (
        ("dropped, by cosine", demo.order(None, None, "cosine")),
        ("dropped, NBL's layers", first),
    ):
        found = [demo.perplexity(lambda m, n=n, o=order: nbl.drop(m, o[:n])) for n in everything]
        rows.append({"name": name, "order": order, "perplexity": found})
        show(rows[-1])
    for kind in kinds(demo.hidden_size):
        memory, rank = kind["memory"], kind["rank"]
        order = demo.order(memory, rank, "residual")
        found = [demo.maps(memory, rank, order[:n]) for n in everything]
        rows.append(described(kind) | {"order": order, "perplexity": found})
        show(rows[-1])
    return rows


def described(kind: dict[str, Any]) -> dict[str, Any]:
    """For JSON."""
    memory = kind["memory"]
    entry = None if memory is None else {"lags": memory.lags, "decays": memory.decays}
    return kind | {"memory": entry}


def by_loss(demo: Demo, count: int) -> list[dict[str, Any]]:
    """The same maps for `count` layers, ranked by the measured loss of replacing one at a time."""
    rows = []
    d = demo.hidden_size
    for kind in kinds(d):
        if kind["rank"] in (None, d // 8):
            memory, rank = kind["memory"], kind["rank"]
            layers = demo.order(memory, rank, "loss")[:count]
            value = demo.maps(memory, rank, layers)
            rows.append(described(kind) | {"layers": layers, "perplexity": value})
            print(
                f"  by loss: {kind['name']:<24} {value:8.2f}   layers {sorted(layers)}", flush=True
            )
    return rows


def chosen_decays(demo: Demo, count: int) -> dict[str, Any]:
    """Two decays of a grid for each layer, by the NMSE that they leave, at rank d/8."""
    rank, cal = demo.hidden_size // 8, demo.cal(GRID)
    layers = demo.order(GRID, rank, "residual")[:count]
    result = {
        "grid": GRID.decays,
        "rank": rank,
        "layers": layers,
        "decays": {i: cal.decays(i, rank=rank) for i in sorted(layers)},
        "perplexity": demo.maps(GRID, rank, layers),
    }
    print(f"  decays chosen: {result['perplexity']:.2f}   {result['decays']}")
    return result


def nmse(demo: Demo) -> dict[str, list[float]]:
    """What every map misses of the attention's variance, layer by layer, on the calibration."""
    found = {}
    for kind in kinds(demo.hidden_size):
        solved = demo.cal(kind["memory"]).solve(rank=kind["rank"])
        found[kind["name"]] = [float(solved[i].nmse) for i in sorted(solved)]
    return found


def sequential(
    demo: Demo, memory: nbl.Memory | None, counts: Sequence[int], refit_mlp: bool
) -> dict[str, Any]:
    """For each count the perplexity of maps fitted bottom-up; memory at rank d/8, else full."""
    rank = None if memory is None else demo.hidden_size // 8
    name = "sequential " + ("NBL" if memory is None else "memory, rank d/8")
    order = demo.order(memory, rank, "residual")
    found = {}

    def measure() -> None:
        for count in counts:
            options = {"sequential": True, "refit_mlp": refit_mlp}
            found[count] = demo.maps(memory, rank, order[:count], **options)

    taken = machine.seconds(measure)
    row = {
        "name": name + (", MLPs refitted" if refit_mlp else ""),
        "refit_mlp": refit_mlp,
        "rank": rank,
        "order": order,
        "perplexity": found,
        "seconds_per_point": taken / len(counts),
    }
    values = "  ".join(f"m={n}: {value:.2f}" for n, value in found.items())
    print(f"  {row['name']:<40} {values}", flush=True)
    return row


def excess(record: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The log-loss that maps add, over what the paper's map adds, with `count` layers replaced."""
    base = math.log(record["base_perplexity"])
    by_residual = {row["name"]: row["perplexity"][count - 1] for row in record["curves"]}
    by_measured = {row["name"]: row["perplexity"] for row in record["by_loss"]}
    rows = []
    for criterion, values in (("residual", by_residual), ("loss", by_measured)):
        paper = math.log(values["NBL (one token)"]) - base
        for name, value in values.items():
            if name.startswith(("memory", "one token")):
                ratio = (math.log(value) - base) / paper
                weights = record["bytes"]["layers"][name]["weights_of_d2"]
                rows.append(
                    {
                        "name": name,
                        "criterion": criterion,
                        "layers": count,
                        "ratio": ratio,
                        "weights_of_d2": weights,
                        "meets_target": ratio <= TARGET and weights <= 1,
                    }
                )
    return rows


def recipe(options: argparse.Namespace) -> dict[str, Any]:
    """The paper's own choices, features before the norm and layers by CCA, one token, full rank."""
    demo = Demo(options.calibration_tokens, options.test_tokens)
    cal = nbl.calibrate(demo.model, demo.calibration, features="pre-norm", progress=False)
    rows = []
    for criterion in ("cca", "residual"):
        order = [s.layer for s in cal.rank(criterion)]
        found = [
            demo.perplexity(lambda m, n=n, o=order: nbl.linearize(m, cal, o[:n]))
            for n in range(1, demo.layers + 1)
        ]
        rows.append({"name": f"pre-norm, by {criterion}", "order": order, "perplexity": found})
        show(rows[-1])
    return {"base_perplexity": demo.base.value, "test_tokens": demo.base.tokens, "rows": rows}


def show(row: dict[str, Any]) -> None:
    values = " ".join(f"{value:7.2f}" for value in row["perplexity"])
    print(f"  {row['name']:<24} {values}   {row['order']}", flush=True)


# --- bytes ---------------------------------------------------------------------------------------


def layer_bytes(demo: Demo) -> dict[str, Any]:
    """What one layer keeps: weights, and keys and values or a state, in the demo's float32."""
    model, d = demo.model, demo.hidden_size
    attention = model.model.layers[0].self_attn
    tokens = demo.test[0][:1]
    runner_length = tokens.shape[1]

    def cached(batch: torch.Tensor) -> nbl.CacheBytes:
        with torch.inference_mode():
            return nbl.cache_bytes(output_cache(model(batch, use_cache=True)))

    key_values = cached(tokens).keys_values // demo.layers // tokens.shape[1]
    numbers = sum(p.numel() for p in attention.parameters())
    rows = {
        "attention": {
            "weight_numbers": numbers,
            "weights_of_d2": numbers / d**2,
            "weight_bytes": sum(p.nbytes for p in attention.parameters()),
            "kv_bytes_per_token": key_values,
            "state_bytes": 0,
        }
    }
    for kind in kinds(d):
        cal, rank = demo.cal(kind["memory"]), kind["rank"]
        try:
            nbl.linearize(model, cal, [1], rank=rank)
            held = cached(tokens).state
            assert held == cached(tokens[:, :64]).state, "a state grew with the text"
            own = [p for n, p in model.model.layers[1].named_parameters() if "linear" in n]
            matrices = [p for p in own if p.dim() == 2]
            state = nbl.Runner(model, 1, runner_length).state_bytes
        finally:
            nbl.restore(model)
        rows[kind["name"]] = {
            "weight_numbers": sum(p.numel() for p in own),
            "weights_of_d2": sum(p.numel() for p in matrices) / d**2,
            "weight_bytes": sum(p.nbytes for p in own),
            "kv_bytes_per_token": 0,
            "state_bytes": state,  # nbl.Runner's
            "cache_state_bytes": held,  # of a transformers cache, which can be rolled back
        }
    return {"dtype": "float32", "hidden_size": d, "layers": rows}


def show_bytes(found: dict[str, Any]) -> None:
    print(f"  {'one layer':<24} weights/d²  weight bytes  KV/token  state  with its past")
    for name, row in found["layers"].items():
        print(
            f"  {name:<24} {row['weights_of_d2']:>10.3f}  {row['weight_bytes']:>12,}  "
            f"{row['kv_bytes_per_token']:>8}  {row['state_bytes']:>5}  "
            f"{row.get('cache_state_bytes', 0):>13,}"
        )


def measure(options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    demo = Demo(options.calibration_tokens, options.test_tokens)
    count = 3 * demo.layers // 4
    d = demo.hidden_size
    print(f"demo model, d = {d}, {demo.layers} layers; perplexity {demo.base.value:.2f}")
    record: dict[str, Any] = {
        "calibration_tokens": sum(batch.numel() for batch in demo.calibration),
        "test_tokens": demo.base.tokens,
        "context": CONTEXT,
        "dtype": "float32",
        "hidden_size": d,
        "num_hidden_layers": demo.layers,
        "ridge": 1e-4,
        "features": "post-norm",
        "base_perplexity": demo.base.value,
    }
    record["bytes"] = layer_bytes(demo)
    show_bytes(record["bytes"])
    record["curves"] = curves(demo)
    record["nmse"] = nmse(demo)
    record["by_loss"] = by_loss(demo, count)
    record["excess_log_loss"] = excess(record, count)
    for row in record["excess_log_loss"]:
        print(
            f"  {row['name']:<24} by {row['criterion']:<8}  {row['ratio']:.2f} of NBL's excess "
            f"log-loss, {row['weights_of_d2']:.3f} d² weights"
            + ("  (target met)" if row["meets_target"] else "")
        )
    save(record)
    counts = range(1, demo.layers + 1) if options.all else range(2, count + 1, 2)
    record["sequential"] = []
    for refit in (False, True) if options.refit else (False,):
        for memory in (MEMORY, None):
            record["sequential"].append(sequential(demo, memory, counts, refit))
            save(record)
        if not refit:
            record["chosen_decays"] = chosen_decays(demo, count)
            save(record)


# --- speed ---------------------------------------------------------------------------------------


def speeds(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    layers, steps, length = options.layers, options.steps, options.prompt
    count = 3 * layers // 4
    models = {}
    one_token = LayerSpec("linear", bias=True)
    rank, filters = SHAPE["hidden_size"] // 8, {"lags": MEMORY.lags, "decays": MEMORY.decays}
    for name, replaced, spec in (
        ("dense", 0, one_token),
        (f"NBL-{count}", count, one_token),
        (f"memory-{count}", count, LayerSpec("linear", bias=True, rank=rank, **filters)),
    ):
        models[name] = random_model(layers, replaced, spec)
    prompt = torch.randint(SHAPE["vocab_size"], (1, length))
    return {
        "shape": SHAPE | {"num_hidden_layers": layers},
        "dtype": "bfloat16",
        "weights": "random, and so are the maps",
        "rank": rank,
        **compared(models, prompt, steps, options.repeats),
    }


def demo_speeds(options: argparse.Namespace) -> dict[str, Any]:
    """The shipped model, whose layers are so small that an operator's fixed cost shows."""
    model, tokenizer = nbl.demo.load()
    text = nbl.demo.token_batches(tokenizer, "calibration", length=512, batch_size=8)[:2]
    count, rank = 3 * model.config.num_hidden_layers // 4, model.config.hidden_size // 8
    prompt, models = text[0][:1, :256], {}
    for name, own in (("dense", {}), (f"NBL-{count}", {}), (f"memory-{count}", {"rank": rank})):
        variant = copy.deepcopy(model)
        if name != "dense":
            cal = nbl.calibrate(variant, text, memory=MEMORY if own else None, progress=False)
            nbl.linearize(variant, cal, range(count), **own)
        models[name] = variant
    found = compared(models, prompt, 128, options.repeats)
    return {"model": "demo", "dtype": "float32", "rank": rank, **found}


def compared(
    models: dict[str, PreTrainedModel], prompt: torch.Tensor, steps: int, repeats: int
) -> dict[str, Any]:
    """Prefill and decode of each, compared with dense and with one-token maps round by round."""
    nbl_name = next(name for name in models if name.startswith("NBL"))
    length = prompt.shape[1]
    engines = {name: Ours(model, name) for name, model in models.items()}

    def seconds(engine: Ours) -> tuple[float, float]:
        """Of the prompt with the first new token, and per new token after it."""
        return engine.prefill(prompt, steps + 1)[0], engine.decode(steps) / steps

    calls = {name: functools.partial(seconds, engine) for name, engine in engines.items()}
    machine.in_turns(calls, 1)  # to warm up
    times = machine.in_turns(calls, repeats)
    rows = []
    for name, engine in engines.items():
        row = {
            "model": name,
            "weight_bytes": nbl.weight_bytes(engine.model),
            "kv_cache_bytes": engine.runner.kv_cache_bytes,
            "state_bytes": engine.runner.state_bytes,
        }
        for what, place, tokens in (("prefill", 0, length), ("decode", 1, 1)):
            own = [t[place] for t in times[name]]
            row[f"{what}_tokens_per_second"] = tokens / statistics.median(own)
            for other in ("dense", nbl_name):
                ratios = [t[place] / s for t, s in zip(times[other], own, strict=True)]
                row[f"{what}_times_{other.split('-')[0].lower()}"] = {
                    "median": statistics.median(ratios),
                    "range": [min(ratios), max(ratios)],
                }
        rows.append(row)
    return {"prompt": length, "steps": steps, "repeats": repeats, "rows": rows}


def show_speeds(found: dict[str, Any]) -> None:
    print(f"  {'model':<10} {'MB':>6} {'state':>7}  decode tokens/s  × dense  prefill  × dense")
    for row in found["rows"]:
        print(
            f"  {row['model']:<10} {row['weight_bytes'] / 1e6:>6.0f} {row['state_bytes']:>7,}  "
            f"{row['decode_tokens_per_second']:>15.2f}  {row['decode_times_dense']['median']:>7.2f}"
            f"  {row['prefill_tokens_per_second']:>7.0f}  "
            f"{row['prefill_times_dense']['median']:>7.2f}"
        )


# --- the plot ------------------------------------------------------------------------------------

# name in the JSON: label, colour, line, marker
STYLES = {
    "dropped, by cosine": ("attention dropped", "#9a9a9a", ":", "x"),
    "NBL (one token)": ("one token, full rank (the paper's map)", "#c0392b", "-", "o"),
    "one token, rank d/8": ("one token, rank d/8", "#e59866", "--", "o"),
    "memory, full rank": ("memory, full rank", "#7fb3d5", "--", "s"),
    "memory, rank d/8": ("memory, joint rank d/8", "#1f618d", "-", "s"),
    "memory, rank d/16": ("memory, joint rank d/16", "#5dade2", ":", "s"),
}


def plot(record: dict[str, Any], path: Path) -> None:
    """Left: perplexity against the layers replaced. Right: against the weights, at 3/4 of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    base, layers = record["base_perplexity"], record["num_hidden_layers"]
    count = 3 * layers // 4
    by_name = {row["name"]: row for row in record["curves"]}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1.25, 1))
    for name, (label, colour, line, marker) in STYLES.items():
        values = [base, *by_name[name]["perplexity"]]
        left.plot(range(layers + 1), values, line, color=colour, marker=marker, ms=4.5, label=label)
    for row in record.get("sequential", []):
        if row["rank"] is not None and not row["refit_mlp"]:
            points = {int(m): value for m, value in row["perplexity"].items()}
            label = "memory, joint rank d/8, sequential"
            left.plot(points.keys(), points.values(), "*", color="#145a32", ms=10, label=label)
    top = max(by_name["NBL (one token)"]["perplexity"]) * 1.12
    left.set(
        xlabel=f"attention layers replaced, of {layers}",
        ylabel="perplexity, held-out text",
        ylim=(base * 0.96, top),
        title="Each map with the layers it ranks first",
    )
    left.axhline(base, color="#555555", lw=0.8)
    left.legend(fontsize=8, loc="upper left", frameon=False)

    weights = {name: row["weights_of_d2"] for name, row in record["bytes"]["layers"].items()}
    memories = sorted(
        (weights[n], r["perplexity"][count - 1], n)
        for n, r in by_name.items()
        if n.startswith("memory")
    )
    right.plot(*zip(*[m[:2] for m in memories]), "-s", color="#1f618d", ms=5, label="memory")
    tokens = [(weights[n], by_name[n]["perplexity"][count - 1]) for n in list(STYLES)[1:3]]
    right.plot(*zip(*sorted(tokens)), "-o", color="#c0392b", ms=5, label="one token")
    notes = [(x, y, name.split("memory, ")[1].removeprefix("rank ")) for x, y, name in memories]
    notes += [(*tokens[0], "full rank (the paper's)"), (*tokens[1], "d/8")]
    place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    for x, y, note in notes:
        right.annotate(note, (x, y), **place)
    right.axvline(weights["attention"], color="#9a9a9a", ls=":", lw=1.2, zorder=0)
    right.axhline(base, color="#555555", lw=0.8)
    low, high = base * 0.96, max(y for _, y in tokens) * 1.06
    middle = (tokens[0][1] + memories[0][1]) / 2
    right.text(weights["attention"] * 1.06, middle, "attention's\nown weights", fontsize=8)
    right.text(0.17, base * 1.004, "the model itself", fontsize=8, color="#555555")
    right.set_xscale("log", base=2)
    right.set_xticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
    right.set(
        xlim=(0.16, 6),
        ylim=(low, high),
        xlabel="weights of one replaced layer, × d²",
        ylabel="perplexity, held-out text",
        title=f"{count} of {layers} layers replaced",
    )
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(0, 0.7), frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25, lw=0.6)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration-tokens", type=int, default=98_304)
    parser.add_argument("--test-tokens", type=int, default=16_384, help="there are some 90,000")
    parser.add_argument("--all", action="store_true", help="sequential maps for every count")
    parser.add_argument("--refit", action="store_true", help="and with refitted down projections")
    parser.add_argument("--recipe", action="store_true", help="the paper's choices alone")
    parser.add_argument("--speed", action="store_true", help="decode and prefill alone")
    parser.add_argument("--demo-speed", action="store_true", help="those of the shipped model")
    parser.add_argument("--layers", type=int, default=8, help="of the random model")
    parser.add_argument("--prompt", type=int, default=448, help="tokens, of the random model")
    parser.add_argument("--steps", type=int, default=24, help="new tokens per round")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--json", default=str(RESULT), metavar="FILE", help="none: nowhere")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*tokens are few.*")

    results.environment()  # that of the start
    path = Path(options.json)
    old = results.read(path)

    def save(found: dict[str, Any]) -> None:
        stamp = results.stamp()
        part = next((p for p in PARTS if getattr(options, p)), None)
        if part:
            record = old | {part: stamp | found}
        else:
            record = stamp | found | {k: old[k] for k in PARTS if k in old}
        results.save(path, record)
        if "curves" in record and options.json != "none":
            plot(record, path.with_suffix(".png"))

    if options.plot_only:
        plot(old, path.with_suffix(".png"))
    elif options.recipe:
        save(recipe(options))
    elif options.speed or options.demo_speed:
        found = speeds(options) if options.speed else demo_speeds(options)
        show_speeds(found)
        save(found)
    else:
        measure(options, save)


if __name__ == "__main__":
    main()
