"""The command `nbl`: parses, calls the library, prints.

Results go to stdout (a table, or JSON with --json), everything else to stderr. Exit codes: 0 done,
1 something failed, 2 something was asked for wrongly, 130 interrupted. With NBL_DEBUG=1 errors show
their traceback.
"""

import contextlib
import datetime
import functools
import importlib.util
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import nbl
from nbl import benchmark, measure, report
from nbl.output import new_folder, plain, write_file, write_record
from nbl.text import count_tokens, load_texts, split_documents, token_batches

LOSS_TOKENS = 16_384  # of the calibration text, one pass per layer: enough for a stable order
CALIBRATION_TOKENS = 262_144  # 64 per feature dimension at width 4096
PAPER = {"features": "pre-norm", "criterion": "cca", "length": 2048, "max_tokens": 256 * 2048}

_out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
_err = Console(stderr=True, highlight=False)


# ---- the application: errors, --json, and one option for many texts ------------------------------


class _Commands(TyperGroup):
    """Turns every error into one line and an exit code, whoever calls."""

    def main(self, args=None, prog_name=None, complete_var=None, standalone_mode=True, **extra):
        args = _spread_texts(list(sys.argv[1:] if args is None else args))
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except Exception as error:
            if os.environ.get("NBL_DEBUG"):
                raise
            code = _explain(error)
        except KeyboardInterrupt:
            code = 130
        if code == 130:
            _err.print("interrupted: nothing was written", style="yellow")
        sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> int:
    """One red line; the exit code."""
    if isinstance(error, BrokenPipeError):  # `nbl rank CAL | head` is no error worth a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if type(error).__name__ == "Abort":  # what older versions of typer make of ctrl-C
        return 130
    usage = hasattr(error, "format_message")  # typer's own: unknown option, missing argument, ...
    asked_wrongly = usage or isinstance(error, ValueError | OSError)
    message = " ".join((error.format_message() if usage else str(error)).split())
    if not asked_wrongly:
        message = f"{type(error).__name__}: {message} (NBL_DEBUG=1 shows where)"
    _err.print(Text(f"error: {message}", style="bold red"), soft_wrap=True)
    return 2 if asked_wrongly else 1


def _spread_texts(args: list[str]) -> list[str]:
    """`nbl eval MODEL --text a b c` as `--text a --text b --text c`, as a shell writes *.txt out.

    Only where the command's argument comes first: in `--text a MODEL`, MODEL is not a text.
    """
    if len(args) < 2 or args[1].startswith("-"):
        return args
    spread, option = [], None
    for arg in args:
        if arg.startswith("-") and arg != "-":
            name = arg.partition("=")[0]
            option = name if name in ("--text", "--eval-text") else None
        elif option and spread[-1] != option:
            spread.append(option)
        spread.append(arg)
    return spread


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Replace attention layers of Llama-family models by closed-form linear maps: "
    "no training, a smaller KV cache, faster prefill and decode.\n\n"
    "Start with `nbl demo`. MODEL is a folder, a name on the Hugging Face hub, or `demo`, "
    "the small model that ships with nbl.",
)


def main() -> None:
    """The entry point of the command `nbl`."""
    # A temporary folder is removed on the way out, which an unhandled signal would not go.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    app(prog_name="nbl")


def _command(function: Callable[..., dict]) -> Callable[..., dict]:
    """Registers a command. With --json, what it returns is all that stdout gets; the tables that it
    prints meanwhile go to stderr."""

    @functools.wraps(function)
    def run(**options):
        if options.get("threads"):
            torch.set_num_threads(options["threads"])
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _note(str(message))
            as_json = options["as_json"]
            with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
                result = function(**options)
        if as_json:
            print(json.dumps(plain(result), indent=1))
        if result.get("ok") is False:
            raise typer.Exit(1)

    app.command(function.__name__.strip("_"))(run)
    return function


# ---- options that several commands share ---------------------------------------------------------

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder, hub name, or `demo` (ships with nbl).", show_default=False
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="PATH...",
        show_default="demo:calibration for the demo model",
        help="Files, folders, - (stdin), dataset:NAME[:CONFIG][:SPLIT], "
        "demo:train|calibration|test.",
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
    Literal["loss", "residual", "cca", "nmse", "cosine"] | None,
    typer.Option(
        help="Which layers go first.",
        show_default="loss; residual without text; cosine with --drop",
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


# ---- commands ------------------------------------------------------------------------------------


@_command
def calibrate(
    model: Model,
    text: Texts = None,
    output: Output = ...,
    features: Features = None,
    memory: Memory = False,
    lags: Lags = None,
    decays: Decays = None,
    choose_decays: ChooseDecays = None,
    max_tokens: MaxTokens = None,
    length: Length = None,
    batch_size: BatchSize = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the state here; a killed run then resumes."),
    ] = None,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> dict:
    """Read a text once and keep what is needed to rank and linearize every layer.

    Example: `nbl calibrate meta-llama/Llama-3.2-1B --text book.txt notes/ -o cal`
    """
    start = time.perf_counter()
    remembered = _parse_memory(memory, lags, decays, choose_decays)
    with new_folder(output, overwrite=overwrite) as folder:
        loaded, tokenizer = _load(model, dtype, device)
        limit = max_tokens or CALIBRATION_TOKENS
        documents, sources = _documents(model, text, limit)
        plan = _Plan(features or "post-norm", None, length, batch_size, limit, remembered)
        batches = plan.batches(loaded, tokenizer, documents)
        calibration = plan.calibrate(loaded, batches, checkpoint=checkpoint)
        scores = measure.score_layers(calibration)
        calibration.save(folder)
        record = {
            **_record("calibrate", model, loaded),
            "calibration": _calibration_part(plan, batches, sources),
            "scores": scores,
            "seconds": time.perf_counter() - start,
        }
        write_record(folder, record)
    _show_scores(scores)
    _done(output, start)
    return {**record, "output": str(output)}


@_command
def rank(
    calibration: Annotated[
        Path,
        typer.Argument(metavar="CAL", help="Folder written by nbl calibrate.", show_default=False),
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="With --text: measures the criterion loss, too."),
    ] = None,
    text: Texts = None,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Measure the loss on so many tokens.")
    ] = LOSS_TOKENS,
    length: Length = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> dict:
    """Show in which order each criterion would replace the layers, and where they disagree.

    Example: `nbl rank cal --model meta-llama/Llama-3.2-1B --text book.txt`
    """
    if text and not model:
        raise ValueError("model: expected --model with --text, which the criterion loss needs")
    found = nbl.Calibration.load(calibration)
    loaded = batches = None
    if model:
        loaded, tokenizer = _load(model, dtype, device)
        documents, _ = _documents(model, text, max_tokens)
        plan = _Plan(found.features, None, length, batch_size, max_tokens)
        batches = plan.batches(loaded, tokenizer, documents)
    with _progress() as watch:
        scores = measure.score_layers(
            found,
            model=loaded,
            batches=batches and watch(batches, "measuring the loss", passes=len(found.layers) + 1),
        )
    notes = measure.disagreements(scores)
    _show_scores(scores)
    for note in notes:
        _note(note)
    return {
        "scores": scores,
        "order": {name: measure.order(s) for name, s in scores.items()},
        "notes": notes,
    }


@_command
def compress(
    model: Model,
    text: Texts = None,
    layers: Annotated[
        str, typer.Option(metavar="M", help="How many (12), or which (3,5,7).", show_default=False)
    ] = ...,
    output: Output = ...,
    preset: Annotated[
        Literal["paper"] | None,
        typer.Option(help="paper: pre-norm, cca, 256 sequences of 2048 tokens."),
    ] = None,
    criterion: Criterion = None,
    features: Features = None,
    bias: Annotated[bool, typer.Option(help="Give the maps a bias.")] = True,
    ridge: Annotated[
        float, typer.Option(min=0, help="Relative to the mean variance of the features.")
    ] = 1e-4,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Store W as a product of two matrices of this rank.", show_default="full"
        ),
    ] = None,
    memory: Memory = False,
    lags: Lags = None,
    decays: Decays = None,
    choose_decays: ChooseDecays = None,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential", help="Fit every map on what the replaced layers below it leave."
        ),
    ] = False,
    refit_mlp: Annotated[
        bool,
        typer.Option("--refit-mlp", help="With --sequential: refit the down projections, too."),
    ] = False,
    drop: Annotated[
        bool, typer.Option("--drop", help="Only remove the attention, without a map: the baseline.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(metavar="CAL", help="Use this instead of calibrating.")
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--eval",
            help="Measure perplexity on held-out text, and speed, against the dense model "
            "and against dropping.",
        ),
    ] = False,
    eval_text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH...", help="Text for --eval.", show_default="a tenth of the documents"
        ),
    ] = None,
    eval_tokens: Annotated[int, typer.Option(min=2, help="Tokens for --eval.")] = 65_536,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="--eval for every number of layers up to M.")
    ] = False,
    max_tokens: MaxTokens = None,
    length: Length = None,
    batch_size: BatchSize = None,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> dict:
    """Calibrate, rank, replace M attention layers by linear maps, and save the model.

    Examples: `nbl compress meta-llama/Llama-3.2-1B --text book.txt --layers 6 -o llama-nbl-6`,
    `nbl compress demo --layers 4 --eval -o demo-nbl-4`,
    `nbl compress demo --layers 6 --memory --rank 24 --eval -o demo-memory-6`
    """
    start = time.perf_counter()
    evaluate = evaluate or sweep or bool(eval_text)
    remembered = _parse_memory(memory, lags, decays, choose_decays)
    if drop and (memory or sequential):
        raise ValueError(
            "drop: expected neither --memory nor --sequential beside it: no map is fitted"
        )
    if refit_mlp and not sequential:
        raise ValueError("refit-mlp: expected --sequential beside it")
    if sequential and sweep:
        raise ValueError("sequential: expected no --sweep: its maps are for one number of layers")
    with new_folder(output, overwrite=overwrite) as folder:
        given = nbl.Calibration.load(calibration) if calibration else None
        plan = _Plan.from_options(
            preset,
            features,
            criterion,
            length,
            batch_size,
            max_tokens,
            drop,
            given,
            has_text=bool(text) or model == "demo",
            memory=remembered,
        )
        loaded, tokenizer = _load(model, dtype, device)
        if nbl.linearized_layers(loaded):
            raise ValueError(
                f"model: expected one with all its attention layers, but {model!r} is compressed "
                "already: start from the original"
            )
        asked = _parse_layers(layers, loaded.config.num_hidden_layers)
        need_text = given is None or plan.criterion == "loss" or sequential
        documents, sources = (
            _documents(model, text, plan.max_tokens)
            if (need_text or (evaluate and not eval_text))
            else ([], [])
        )
        held_out, eval_sources = [], eval_text
        if evaluate and (eval_text or model == "demo"):
            eval_sources = eval_text or ["demo:test"]
            held_out = load_texts(eval_sources, max_chars=8 * eval_tokens)
        elif evaluate:
            if given is not None:
                raise ValueError(
                    "eval-text: expected with --calibration, as nbl cannot know which part of the "
                    "text the calibration has not seen"
                )
            documents, held_out = split_documents(documents)
            eval_sources = [f"held out of {source}" for source in sources]
        batches = plan.batches(loaded, tokenizer, documents) if documents else []
        eval_batches = plan.batches(loaded, tokenizer, held_out, eval_tokens) if held_out else None
        notes = []
        if preset and given is None and count_tokens(batches) < PAPER["max_tokens"]:
            notes = [
                f"preset paper: expected {PAPER['max_tokens']:,} tokens (256 x 2048), "
                f"calibrating on {count_tokens(batches):,}"
            ]

        record = _record("compress", model, loaded)
        found = given or plan.calibrate(loaded, batches)
        measured, maps, found = _choose_and_measure(
            loaded,
            found,
            plan,
            asked,
            batches,
            eval_batches,
            bias=bias,
            ridge=ridge,
            rank=rank,
            drop=drop,
            sweep=sweep,
            sequential=sequential,
            refit_mlp=refit_mlp,
        )
        record |= measured
        record["notes"] += notes
        record["calibration"] = (
            _calibration_part(plan, batches, sources)
            if given is None
            else {"folder": str(calibration), "features": found.features}
        )
        if eval_batches:
            record["evaluation"] = _evaluation_part(eval_batches, eval_sources)
        chosen = record["choice"]["layers"]
        if drop:
            nbl.drop(loaded, chosen)
        else:
            nbl.linearize(loaded, found, chosen, bias=bias, rank=rank, maps=maps)
        _save(loaded, tokenizer, folder, record, start)
    _show_scores(record["scores"], chosen)
    _show_points(record)
    for note in record["notes"]:
        _note(note)
    _done(output, start)
    return {**record, "output": str(output)}


@_command
def _eval(
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="PATH...",
            show_default="demo:test for the demo model",
            help="Files, folders, - (stdin), dataset:NAME[:CONFIG][:SPLIT], demo:test.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Read at most so many tokens.", show_default="all")
    ] = None,
    length: Length = None,
    batch_size: BatchSize = None,
    weights: Weights = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> dict:
    """Perplexity of a model, dense or linearized, on any text.

    Example: `nbl eval llama-nbl-6 --text dataset:wikitext:wikitext-2-raw-v1:test`
    """
    loaded, tokenizer = _load(model, dtype, device, weights)
    documents, sources = _documents(model, text, max_tokens, demo_split="test")
    plan = _Plan(None, None, length, batch_size, max_tokens)
    batches = plan.batches(loaded, tokenizer, documents)
    start = time.perf_counter()
    with _progress() as watch:
        found = nbl.perplexity(loaded, watch(batches, "evaluating"))
    seconds = time.perf_counter() - start
    result = {
        "model": model,
        "text": sources,
        "perplexity": found.value,
        "nll": found.nll,
        "tokens": found.tokens,
        "length": int(batches[0].shape[1]),
        "seconds": seconds,
        "tokens_per_second": found.tokens / seconds,
        "linearized_layers": nbl.linearized_layers(loaded),
        "kv_bytes_per_token": measure.kv_bytes_per_token(loaded),
        "weights": weights,
        "weight_bytes": nbl.weight_bytes(loaded),
    }
    _show_facts(
        {
            "perplexity": f"[bold]{found.value:,.3f}[/]",
            "nll": f"{found.nll:.4f} nats per token",
            "tokens": f"{found.tokens:,} predicted, in sequences of {result['length']}",
            "speed": f"{result['tokens_per_second']:,.0f} tokens/s",
            "linearized layers": ", ".join(map(str, result["linearized_layers"])) or "none",
            "KV cache": f"{result['kv_bytes_per_token']:,} bytes per token",
            "weights": f"{result['weight_bytes']:,} bytes per decode step",
        }
    )
    return result


@_command
def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Option(help="Text to continue; - reads stdin.", show_default=False)
    ] = ...,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Sample from the likeliest tokens of this total probability."
        ),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample from the K likeliest tokens; 0: from all.")
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    weights: Weights = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> dict:
    """Continue a text, token by token, and say how fast that went.

    Example: `nbl generate llama-nbl-6 --prompt "The residual stream" --temperature 0.7`
    """
    prompt = load_texts(["-"])[0] if prompt == "-" else prompt
    loaded, tokenizer = _load(model, dtype, device, weights)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not prompt or not ids.numel():
        raise ValueError("prompt: expected some text, got none")
    limit = _limit(loaded)
    if ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"max-new-tokens: expected at most {max(0, limit - ids.shape[1])} after a prompt of "
            f"{ids.shape[1]} tokens (the model's limit is {limit}), got {max_new_tokens}"
        )
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": False}
    if temperature:
        sampling = {
            "do_sample": True,
            "temperature": temperature,
            "top_p": top_p or 1e-9,
            "top_k": top_k,
        }
    result = _continue(loaded, tokenizer, ids, max_new_tokens, stream=True, **sampling)
    result = {"model": model, "prompt": prompt, **result, "seed": seed, "weights": weights}
    speed = result["decode_tokens_per_second"]
    _err.print(
        f"prompt {result['prompt_tokens']} tokens, {result['prefill_tokens_per_second']:,.0f} "
        f"tokens/s; {result['new_tokens']} new tokens"
        + (f", {speed:,.1f} tokens/s" if speed else ""),
        style="dim",
    )
    return result


@_command
def _report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder written by calibrate, compress or demo.", show_default=False
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
    _need_matplotlib()
    record = report.read_record(folder)
    page = output or folder / report.HTML
    files = {page: report.render_html(record).encode()}
    if png:
        files |= {page.parent / name: image for name, image in report.render_png(record).items()}
    for path, data in files.items():
        write_file(path, data, overwrite=overwrite)
        _out.print(escape(str(path)), soft_wrap=True)
    return {"files": [str(path) for path in files]}


@_command
def bench(
    model: Model,
    batch: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Sequences generated at once.")
    ] = "1",
    context: Annotated[
        str,
        typer.Option(
            metavar="N[,N...]",
            help="Tokens of the prompt (prefill), or attended to on average (decode).",
        ),
    ] = "128",
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="M[,M...]",
            help="How many layers are linear maps.",
            show_default="0, a quarter and a half of them; as it is, for a compressed model",
        ),
    ] = None,
    kind: Annotated[
        Literal["both", "decode", "prefill"], typer.Option(help="What to measure.")
    ] = "both",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Also transformers with a static cache and torch.compile (takes minutes).",
        ),
    ] = False,
    weights: Annotated[
        Literal["int8", "fp8", "int4"] | None,
        typer.Option(help="Quantize the weights of ours.", show_default="as they are"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="CAL", help="Take the maps from it.", show_default="random maps, just as fast"
        ),
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Of which the median is shown.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Tokens per repetition of decode.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Also draw a plot, a PNG.", show_default="none"
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that nbl did not write.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> dict:
    """Measure decode and prefill: transformers, nbl dense and linearized, and what the machine can.

    Example: `nbl bench meta-llama/Llama-3.2-1B --batch 1,8 --context 512 --layers 0,8 -o speed.png`
    """
    if output is not None:
        _need_matplotlib()
    start = time.perf_counter()
    batches, contexts = _parse_counts("batch", batch, 1), _parse_counts("context", context, 2)
    counts = None if layers is None else _parse_counts("layers", layers, 0)
    loaded, _ = _load(model, dtype, device)
    limit = _limit(loaded)
    if max(contexts) > limit:
        raise ValueError(f"context: expected at most {limit}, the model's, got {max(contexts)}")
    own, total = len(nbl.linearized_layers(loaded)), loaded.config.num_hidden_layers
    if counts is None:
        counts = [own] if own else sorted({0, total // 4, total // 2})
    found = nbl.Calibration.load(calibration) if calibration else None
    record = _record("bench", model, loaded)
    cases = benchmark.sweep(
        loaded,
        kinds=("decode", "prefill") if kind == "both" else (kind,),
        batches=batches,
        contexts=contexts,
        layers=counts,
        compiled=compiled,
        weights=weights,
        calibration=found,
        steps=steps,
        repetitions=repetitions,
        say=lambda text: _err.print(text, style="dim"),
        show=lambda case: _out.print(benchmark.table(case)),
    )
    record |= {"cases": cases, "weights": weights, "seconds": time.perf_counter() - start}
    if found is None and any(m > own for m in counts):
        record["notes"] = [benchmark.RANDOM_MAPS]
        _out.print(benchmark.RANDOM_MAPS, style="dim")
    if output is not None:
        write_file(output, benchmark.plot(cases), overwrite=overwrite)
        _done(output, start)
    return {**record, "output": output and str(output)}


@_command
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to create.")
    ] = Path("nbl-demo"),
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
) -> dict:
    """The whole thing on a small model that ships with nbl: a minute or two on a laptop.

    Example: `nbl demo`
    """
    start = time.perf_counter()
    with new_folder(output, overwrite=overwrite) as folder:
        loaded, tokenizer = _load("demo", "auto", "cpu")
        count = loaded.config.num_hidden_layers
        plan = _Plan("post-norm", "loss", None, None, 98_304)
        batches = plan.batches(loaded, tokenizer, load_texts(["demo:calibration"]))
        eval_batches = plan.batches(loaded, tokenizer, load_texts(["demo:test"]), 16_384)
        record = _record("demo", "demo", loaded)
        _show_facts(
            {
                "model": f"{count} layers of width {loaded.config.hidden_size}, "
                f"{record['model']['parameters']:,} parameters, trained on Python's own docs",
                "calibration": f"{count_tokens(batches):,} tokens",
                "held out": f"{count_tokens(eval_batches):,} tokens of other files",
            }
        )
        found = plan.calibrate(loaded, batches)
        measured, maps, _ = _choose_and_measure(
            loaded, found, plan, count - 2, batches, eval_batches, sweep=True
        )
        record |= measured
        record["calibration"] = _calibration_part(plan, batches, ["demo:calibration"])
        record["evaluation"] = _evaluation_part(eval_batches, ["demo:test"])
        _show_scores(record["scores"])
        for note in record["notes"]:
            _note(note)
        _show_points(record)

        half = record["choice"]["layers"][: count // 2]
        record["choice"]["layers"] = half
        name, prompt = f"NBL-{len(half)}", "open(file, mode='r')\nOpen the file and return"
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        sample = functools.partial(_continue, loaded, tokenizer, ids, 48, do_sample=False)
        texts = {"dense": sample()["text"]}
        nbl.linearize(loaded, found, half, maps=maps)  # what is saved
        texts[name] = sample()["text"]
        record["samples"] = {"prompt": prompt, "continuations": texts}
        _show_facts({"prompt": escape(prompt), **{k: escape(v) for k, v in texts.items()}})
        _save(loaded, tokenizer, folder, record, start, reload_with=eval_batches[0][:1])
        if _has_matplotlib():
            (folder / report.HTML).write_bytes(report.render_html(record).encode())
    _out.print(
        f"[bold]{name}[/] is saved in {escape(str(output))}, and loads again with\n"
        f"    import nbl; AutoModelForCausalLM.from_pretrained({escape(repr(str(output)))})",
        soft_wrap=True,
    )
    if _has_matplotlib():
        _out.print(f"The report, with plots: {escape(str(output / report.HTML))}", soft_wrap=True)
    _done(output, start)
    return {**record, "output": str(output)}


@_command
def doctor(as_json: Json = False, threads: Threads = None) -> dict:
    """Say what is installed, what runs here and why not, and check every op against its reference.

    Example: `nbl doctor`
    """
    from nbl.doctor import diagnose

    diagnosis = diagnose()
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table.grid(padding=(0, 2))
    for finding in diagnosis["findings"]:
        status = finding["status"]
        table.add_row(
            Text(status.upper() if status == "problem" else status, styles[status]),
            escape(finding["name"]),
            escape(finding["detail"]),
        )
    _out.print(table)
    problems = sum(finding["status"] == "problem" for finding in diagnosis["findings"])
    _out.print(
        Text(f"{problems} problem(s) found", "bold red")
        if problems
        else Text("everything works", "bold green")
    )
    return diagnosis


# ---- what the commands share ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How to calibrate and choose, after presets and defaults; None: as fits the model."""

    features: str | None
    criterion: str | None
    length: int | None
    batch_size: int | None
    max_tokens: int | None
    memory: nbl.Memory | None = None

    @classmethod
    def from_options(
        cls,
        preset,
        features,
        criterion,
        length,
        batch_size,
        max_tokens,
        drop,
        given,
        has_text,
        memory=None,
    ):
        """Explicit options, then the preset, then the defaults. `given`: a calibration or None."""
        base = PAPER if preset else {}
        features = features or base.get("features")
        if given and features and features != given.features:
            raise ValueError(
                f"features: expected {given.features}, as the calibration has, got {features}"
            )
        if given and memory is not None and memory != given.memory:
            raise ValueError(
                f"memory: expected {given.memory}, as the calibration has, got {memory}"
            )
        fallback = "cosine" if drop else "loss" if has_text else "residual"
        return cls(
            features or (given.features if given else "post-norm"),
            criterion or base.get("criterion") or fallback,
            length,
            batch_size,
            max_tokens or base.get("max_tokens") or CALIBRATION_TOKENS,
            given.memory if given else memory,
        )

    def batches(self, model, tokenizer, documents, max_tokens: int | None = None) -> list:
        limit = _limit(model)
        length = self.length or min(PAPER["length"], limit)
        if length > limit:
            raise ValueError(f"length: expected at most {limit}, the model's limit, got {length}")
        batch_size = self.batch_size or max(1, 2048 // length)
        return token_batches(
            tokenizer,
            documents,
            length=length,
            batch_size=batch_size,
            max_tokens=max_tokens or self.max_tokens,
        )

    def calibrate(self, model, batches, checkpoint: Path | None = None):
        with _progress() as bars:
            return nbl.calibrate(
                model,
                bars(batches, "calibrating"),
                features=self.features,
                memory=self.memory,
                progress=False,
                checkpoint=checkpoint,
            )


def _choose_and_measure(
    model,
    calibration,
    plan,
    asked,
    batches,
    eval_batches,
    *,
    bias=True,
    ridge=1e-4,
    rank=None,
    drop=False,
    sweep=False,
    sequential=False,
    refit_mlp=False,
) -> tuple[dict, dict, nbl.Calibration]:
    """(scores, choice, points, notes and speed of the record, the maps of the chosen layers, the
    calibration that these are from).

    `asked` is a number of layers or their ids. The model is as it was afterwards.
    """
    by_number = isinstance(asked, int)
    sample = _first(batches, LOSS_TOKENS) if by_number and plan.criterion == "loss" else None
    with _progress() as bars:
        scores = measure.score_layers(
            calibration,
            model=model,
            ridge=ridge,
            bias=bias,
            rank=rank,
            batches=sample and bars(sample, "ranking layers", passes=len(calibration.layers) + 1),
        )
    chosen = measure.order(scores[plan.criterion])[:asked] if by_number else asked
    choice = {
        "method": "drop" if drop else "nbl",
        "layers": chosen,
        "criterion": plan.criterion if by_number else "the user",
    }
    if sequential and chosen:
        fitted = {"ridge": ridge, "bias": bias, "rank": rank, "refit_mlp": refit_mlp}
        with _progress() as bars:
            calibration = nbl.calibrate(
                model,
                bars(batches, "fitting layer by layer"),
                features=calibration.features,
                memory=calibration.memory,
                layers=chosen,
                sequential=True,
                progress=False,
                **fitted,
            )
    maps = calibration.solve(ridge=ridge, bias=bias, rank=rank, layers=chosen)
    if not drop:
        choice |= {
            "features": calibration.features,
            "bias": bias,
            "rank": rank,
            "ridge": ridge,
            "ridge_used": {layer: float(maps[layer].ridge) for layer in chosen},
            "nmse": {layer: float(maps[layer].nmse) for layer in chosen},
            "sequential": sequential,
            "refit_mlp": refit_mlp,
        }
        if calibration.memory is not None:
            choice["memory"] = {
                "lags": calibration.memory.lags,
                "decays": {layer: maps[layer].decays for layer in chosen},
            }
    options = {"bias": bias, "rank": rank, "maps": maps}
    choices = [chosen[:m] for m in range(1, len(chosen) + 1)] if sweep else [chosen]
    record = {
        "scores": scores,
        "choice": choice,
        "notes": measure.disagreements(scores, None if sweep else len(chosen)) if by_number else [],
    }
    with _progress() as bars:
        passes = 1 + 3 * len(choices)
        record["points"] = measure.measure_points(
            model,
            calibration,
            choices,
            measure.order(scores["cosine"]),
            batches=eval_batches,
            options=options,
            drop=drop,
            watch=bars.together("measuring perplexity", passes),
        )
    if eval_batches:
        _err.print("measuring speed ...", style="dim")
        new_tokens, repetitions = 32, 5
        prompt = eval_batches[0][:1, : max(1, min(256, _limit(model) - new_tokens))]
        speeds = measure.compare_speed(
            model,
            [
                functools.partial(
                    measure.variant, model, calibration, point["layers"], options, drop=drop
                )
                for point in record["points"]
            ],
            prompt,
            new_tokens=new_tokens,
            repetitions=repetitions,
        )
        for point, speed in zip(record["points"], speeds, strict=True):
            point.update(speed)
        record["speed"] = {
            "prompt_tokens": prompt.shape[1],
            "new_tokens": new_tokens,
            "batch": 1,
            "repetitions": repetitions,
        }
    return record, maps, calibration


def _load(name: str, dtype: str, device: str, weights: str | None = None):
    """(model in evaluation mode on the device, tokenizer)."""
    if weights is not None:
        loaded, tokenizer = _load(name, dtype, device)
        return nbl.optimize(loaded, weights=weights), tokenizer
    target = _device(device)
    if name == "demo":
        from nbl import demo

        if not (demo.model_dir() / "config.json").is_file():
            raise ValueError("model: this installation of nbl lacks the demo model, give another")
        model, tokenizer = demo.load(torch.float32 if dtype == "auto" else getattr(torch, dtype))
        return model.to(target), tokenizer
    expected = f"model: expected a folder with a model, a hub name or 'demo', got {name!r}"
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise ValueError(f"{expected}, which has no config.json")
    if not Path(name).exists() and (name.count("/") != 1 or name[0] in "./~") and "/" in name:
        raise ValueError(f"{expected}, which does not exist")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{expected}: {reason}") from error
    return model.eval().to(target), tokenizer


def _parse_memory(
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

    options = {} if choose is None else {"choose": choose}
    if lags is not None:
        options["lags"] = numbers("lags", lags, int)
    if decays is not None:
        options["decays"] = numbers("decays", decays, float)
    return nbl.Memory(**options)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one of {torch.cuda.device_count()} GPUs, got {name!r} "
            "(nbl doctor says what is missing)"
        )
    return device


def _limit(model) -> int:
    """The longest sequence the model was made for."""
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30


def _documents(
    model: str, text: list[str] | None, max_tokens: int | None, demo_split: str = "calibration"
) -> tuple[list[str], list[str]]:
    """(documents, sources); the demo model brings its own text."""
    if not text and model != "demo":
        raise ValueError("text: expected --text with files, folders, - or dataset:NAME, got none")
    sources = list(text or [f"demo:{demo_split}"])
    return load_texts(sources, max_chars=max_tokens and 8 * max_tokens), sources


def _parse_layers(given: str, count: int) -> int | list[int]:
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


def _parse_counts(name: str, given: str, least: int) -> list[int]:
    """ "1,8" as [1, 8]."""
    try:
        counts = [int(part) for part in given.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < least or len(set(counts)) < len(counts):
        raise ValueError(f"{name}: expected numbers from {least} on (as 1,8), got {given!r}")
    return counts


def _first(batches: list, tokens: int) -> list:
    """Batches that hold about the first so many tokens: whole sequences, at least one."""
    kept = []
    for batch in batches:
        left = tokens - count_tokens(kept)
        if left <= 0:
            break
        kept.append(batch[: max(1, left // batch.shape[1])])
    return kept


def _continue(
    model, tokenizer, ids, max_new_tokens: int, *, stream: bool = False, **sampling
) -> dict:
    """Generates; with `stream`, prints the text as it grows."""
    printer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    watch = measure.Stopwatch(printer.put if stream else None)
    ids = ids.to(model.device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.inference_mode():
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=0 if pad is None else pad,
            streamer=watch,
            **sampling,
        )
    if stream:
        printer.end()
    new = tokens[0, ids.shape[1] :]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "prefill_tokens_per_second": ids.shape[1] / watch.prefill,
        "decode_tokens_per_second": watch.decode and 1 / watch.decode,
    }


def _save(model, tokenizer, folder: Path, record: dict, start: float, reload_with=None) -> None:
    """Model, tokenizer and record; with `reload_with` (token ids) the proof that it loads again."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if reload_with is not None:
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        with torch.inference_mode():
            if not torch.equal(again(reload_with).logits, model(reload_with).logits):
                raise RuntimeError("the saved model's logits differ from those of the model saved")
    write_record(folder, {**record, "seconds": time.perf_counter() - start})


def _record(command: str, name: str, model) -> dict:
    from nbl.doctor import conditions

    return {
        "nbl_report": 1,
        "command": command,
        "date": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "model": measure.describe_model(model, name),
        "conditions": conditions(str(model.device), str(model.dtype).removeprefix("torch.")),
    }


def _calibration_part(plan: _Plan, batches: list, sources: list[str]) -> dict:
    return {
        "text": sources,
        "tokens": count_tokens(batches),
        "length": batches[0].shape[1],
        "features": plan.features,
    }


def _evaluation_part(batches: list, sources: list[str]) -> dict:
    return {"text": sources, "tokens": count_tokens(batches), "length": batches[0].shape[1]}


# ---- what is shown -------------------------------------------------------------------------------


class _Bars:
    """Progress bars in tokens: wraps batches so that reading them moves a bar."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def __call__(self, batches: list, what: str, passes: int = 1) -> "_Watched":
        """A bar for so many passes over the batches."""
        return _Watched(self._progress, self._add(batches, what, passes), batches)

    def together(self, what: str, passes: int) -> Callable:
        """One bar for about so many passes over the same batches, each named while it runs."""
        task = None

        def watch(batches: list, name: str) -> _Watched:
            nonlocal task
            task = self._add(batches, what, passes) if task is None else task
            self._progress.update(task, description=name)
            return _Watched(self._progress, task, batches)

        return watch

    def _add(self, batches: list, what: str, passes: int):
        self._progress.start()
        return self._progress.add_task(what, total=passes * count_tokens(batches), what=what)


class _Watched:
    """A list of batches, read any number of times."""

    def __init__(self, progress: Progress, task, batches: list):
        self._progress, self._task, self._batches = progress, task, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self._batches:
            yield batch
            self._progress.advance(self._task, batch.numel())


class _TokensPerSecond(ProgressColumn):
    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} tokens/s" if speed else "", style="dim")


@contextlib.contextmanager
def _progress() -> Iterator[_Bars]:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        _TokensPerSecond(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    progress = Progress(*columns, console=_err)
    try:
        yield _Bars(progress)
        for task in progress.tasks:  # a shared bar may have needed fewer passes than were planned
            progress.update(task.id, total=task.completed, description=task.fields["what"])
    finally:
        if progress.tasks:
            progress.stop()


def _show_scores(scores: dict[str, list], chosen: Iterable[int] = ()) -> None:
    table = _table("Which layer goes first: rank and score by each criterion")
    for name in ("layer", *scores):
        table.add_column(name, justify="right")
    places = {name: measure.order(values) for name, values in scores.items()}
    for layer in range(max(map(len, scores.values()))):
        cells = []
        for name, values in scores.items():
            known = layer < len(values) and values[layer] is not None
            cells.append(
                f"{places[name].index(layer) + 1}  [dim]{values[layer]:8.3g}[/]" if known else ""
            )
        table.add_row(str(layer), *cells, style="bold cyan" if layer in chosen else None)
    _out.print(table)


def _show_points(record: dict) -> None:
    points = record["points"]
    dense = points[0]
    evaluated = "perplexity" in dense
    table = _table(
        "Perplexity and cost, against the dense model and against dropping attention"
        if evaluated
        else "Cost, against the dense model"
    )
    quality = ("NBL", "drop,\ncosine", "drop,\nsame") if evaluated else ()
    speed = ("prefill\ntokens/s", "decode\ntokens/s") if evaluated else ()
    table.add_column("m", justify="right")
    table.add_column("layers")
    remembers = "state_bytes" in dense
    state = ("state\nbytes",) if remembers else ()
    for name in (*quality, "KV bytes\n/token", *state, *speed):
        table.add_column(name, justify="right")
    for point in points:
        m = len(point["layers"])
        cells = [f"{point['kv_bytes_per_token']:,}"]
        if remembers:
            cells.append(f"{point['state_bytes']:,}")
        if evaluated:
            cells = [
                f"[bold]{point['perplexity']:.2f}[/]",
                f"{point['drop']['perplexity']:.2f}" if m else "",
                f"{point['drop_same']['perplexity']:.2f}" if m else "",
                *cells,
                *(
                    f"{point[kind]:,.0f} [dim]{point[kind] / dense[kind]:.2f}x[/]"
                    for kind in ("prefill", "decode")
                ),
            ]
        table.add_row(str(m), ",".join(map(str, point["layers"])) or "dense", *cells)
    _out.print(table)
    if evaluated:
        name = "dropping the same layers" if record["choice"]["method"] == "drop" else "NBL"
        shape = record["speed"]
        _out.print(
            f"KV bytes and speed are those of {name}: batch 1, {shape['prompt_tokens']} + "
            f"{shape['new_tokens']} tokens, medians of {shape['repetitions']} interleaved "
            "repetitions.",
            style="dim",
        )


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )


def _show_facts(facts: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for name, fact in facts.items():
        table.add_row(name, fact)
    _out.print(table)


def _note(message: str) -> None:
    _err.print(Text(f"note: {message}", style="yellow"), soft_wrap=True)


def _done(output: Path, start: float) -> None:
    _out.print(
        f"[green]done[/] in {time.perf_counter() - start:.0f} s: {escape(str(output))}",
        soft_wrap=True,
    )


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _need_matplotlib() -> None:
    if not _has_matplotlib():
        raise ValueError("report: needs matplotlib: pip install matplotlib")
