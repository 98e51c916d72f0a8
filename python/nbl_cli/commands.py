"""The commands: each parses its options, calls the library, shows and returns its result.

Libraries are imported where they are used: `--help` needs none, nor does `nbl report` need torch.
"""

import functools
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .options import (
    CALIBRATION_TOKENS,
    LOSS_TOKENS,
    BatchSize,
    ChooseDecays,
    Criterion,
    Decays,
    Device,
    Dtype,
    Features,
    Json,
    Lags,
    Length,
    MaxTokens,
    Memory,
    Model,
    Output,
    Overwrite,
    Texts,
    Threads,
    Weights,
    parse_counts,
    parse_layers,
    parse_memory,
)
from .output import check_file, new_folder, write_file, write_record
from .scores import order
from .show import (
    done,
    has_matplotlib,
    need_matplotlib,
    note,
    progress,
    show_facts,
    show_points,
    show_scores,
    show_step,
)
from .streams import err, out


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
    import nbl
    from nbl import measure, pipeline, saving
    from nbl.text import count_tokens

    from . import models

    start = time.perf_counter()
    remembered = parse_memory(memory, lags, decays, choose_decays)
    with new_folder(output, overwrite=overwrite) as folder:
        loaded, tokenizer = models.load(model, dtype, device)
        limit = max_tokens or CALIBRATION_TOKENS
        documents, sources = models.read_texts(model, text, limit)
        features = features or "post-norm"
        sizes = {"length": length, "batch_size": batch_size, "max_tokens": limit}
        batches = pipeline.make_batches(loaded, tokenizer, documents, **sizes)
        needed = saving.moment_bytes(loaded, features, remembered, sequences=sum(map(len, batches)))
        saving.check_space(folder, needed)
        if checkpoint is not None:
            checkpoint.mkdir(parents=True, exist_ok=True)
            saving.check_space(checkpoint, needed)
        record = models.new_record("calibrate", model, loaded)
        with progress() as watch:
            calibration = nbl.calibrate(
                loaded,
                watch(batches, "calibrating"),
                features=features,
                memory=remembered,
                progress=False,
                checkpoint=checkpoint,
            )
        scores = measure.score_layers(calibration)
        calibration.save(folder)
        record |= {
            "calibration": {
                "text": sources,
                "tokens": count_tokens(batches),
                "length": batches[0].shape[1],
                "features": features,
            },
            "scores": scores,
            "seconds": time.perf_counter() - start,
        }
        write_record(folder, record)
    show_scores(scores)
    done(output, start)
    return {**record, "output": str(output)}


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
    import nbl
    from nbl import measure, pipeline

    from . import models

    found = nbl.Calibration.load(calibration)
    loaded = batches = None
    if model:
        loaded, tokenizer = models.load(model, dtype, device)
        documents, _ = models.read_texts(model, text, max_tokens)
        sizes = {"length": length, "batch_size": batch_size, "max_tokens": max_tokens}
        batches = pipeline.make_batches(loaded, tokenizer, documents, **sizes)
    with progress() as watch:
        scores = measure.score_layers(
            found,
            model=loaded,
            batches=batches and watch(batches, "measuring the loss", passes=len(found.layers) + 1),
        )
    notes = pipeline.disagreements(scores)
    show_scores(scores)
    for sentence in notes:
        note(sentence)
    return {
        "scores": scores,
        "order": {name: order(values) for name, values in scores.items()},
        "notes": notes,
    }


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
    import nbl
    from nbl import pipeline
    from nbl.text import load_texts

    from . import models

    start = time.perf_counter()
    remembered = parse_memory(memory, lags, decays, choose_decays)
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
        loaded, tokenizer = models.load(model, dtype, device)
        asked = parse_layers(layers, loaded.config.num_hidden_layers)
        maps = 0 if drop else asked if isinstance(asked, int) else len(asked)
        own = remembered if given is None else given.memory
        models.prepare_saving(loaded, tokenizer, folder, maps, own, rank)
        record = models.new_record("compress", model, loaded)
        documents, sources = [], []
        if given is None or text or model == "demo":
            most = max_tokens or (pipeline.PAPER["max_tokens"] if preset else CALIBRATION_TOKENS)
            documents, sources = models.read_texts(model, text, most)
        eval_sources = eval_text or (["demo:test"] if model == "demo" else [])
        evaluate = evaluate or sweep or bool(eval_text)
        held_out = None
        if evaluate and eval_sources:
            held_out = load_texts(eval_sources, max_chars=8 * eval_tokens)
        elif evaluate and given is not None:
            raise ValueError(
                "eval-text: expected with --calibration, as nbl cannot know which part of the text "
                "the calibration has not seen"
            )
        elif evaluate:
            eval_sources = [f"held out of {source}" for source in sources]
        with progress() as watch:
            compressed = nbl.compress(
                loaded,
                tokenizer,
                documents,
                layers=asked,
                preset=preset,
                criterion=criterion,
                features=features,
                memory=remembered,
                ridge=ridge,
                bias=bias,
                rank=rank,
                sequential=sequential,
                refit_mlp=refit_mlp,
                drop=drop,
                calibration=given,
                evaluate=evaluate,
                eval_text=held_out,
                eval_tokens=eval_tokens,
                sweep=sweep,
                max_tokens=max_tokens,
                length=length,
                batch_size=batch_size,
                watch=watch,
                say=show_step,
            )
        chosen = compressed.layers
        record |= models.compressed_part(compressed, sources, eval_sources)
        if given is not None:
            record["calibration"] = {"folder": str(calibration), "features": given.features}
        models.save(loaded, folder, record, start)
    show_scores(record["scores"], chosen)
    show_points(record)
    for sentence in record["notes"]:
        note(sentence)
    done(output, start)
    return {**record, "output": str(output)}


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
    import nbl
    from nbl import measure, pipeline

    from . import models

    loaded, tokenizer = models.load(model, dtype, device, weights)
    documents, sources = models.read_texts(model, text, max_tokens, demo_split="test")
    sizes = {"length": length, "batch_size": batch_size}
    batches = pipeline.make_batches(loaded, tokenizer, documents, **sizes, max_tokens=max_tokens)
    start = time.perf_counter()
    with progress() as watch:
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
    show_facts(
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
    import torch
    from nbl.pipeline import length_limit
    from nbl.text import load_texts

    from . import models

    prompt = load_texts(["-"])[0] if prompt == "-" else prompt
    loaded, tokenizer = models.load(model, dtype, device, weights)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not prompt or not ids.numel():
        raise ValueError("prompt: expected some text, got none")
    limit = length_limit(loaded)
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
    result = models.continue_text(loaded, tokenizer, ids, max_new_tokens, stream=True, **sampling)
    result = {"model": model, "prompt": prompt, **result, "seed": seed, "weights": weights}
    speed = result["decode_tokens_per_second"]
    err.print(
        f"prompt {result['prompt_tokens']} tokens, {result['prefill_tokens_per_second']:,.0f} "
        f"tokens/s; {result['new_tokens']} new tokens"
        + (f", {speed:,.1f} tokens/s" if speed else ""),
        style="dim",
    )
    return result


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
    from . import report

    need_matplotlib()
    record = report.read_record(folder)
    page = output or folder / report.HTML
    files = {page: report.render_html(record).encode()}
    if png:
        files |= {page.parent / name: image for name, image in report.render_png(record).items()}
    for path, data in files.items():
        write_file(path, data, overwrite=overwrite)
        out.print(escape(str(path)), soft_wrap=True)
    return {"files": [str(path) for path in files]}


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
        need_matplotlib()
        check_file(output, overwrite=overwrite)
    import nbl
    from nbl import benchmark
    from nbl.pipeline import length_limit

    from . import cases, models

    start = time.perf_counter()
    batches, contexts = parse_counts("batch", batch, 1), parse_counts("context", context, 2)
    counts = None if layers is None else parse_counts("layers", layers, 0)
    loaded, _ = models.load(model, dtype, device)
    limit = length_limit(loaded)
    if max(contexts) > limit:
        raise ValueError(f"context: expected at most {limit}, the model's, got {max(contexts)}")
    own, total = len(nbl.linearized_layers(loaded)), loaded.config.num_hidden_layers
    if counts is None:
        counts = [own] if own else sorted({0, total // 4, total // 2})
    found = nbl.Calibration.load(calibration) if calibration else None
    record = models.new_record("bench", model, loaded)
    measured = benchmark.sweep(
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
        say=lambda text: err.print(text, style="dim"),
        show=lambda case: out.print(cases.table(case)),
    )
    record |= {"cases": measured, "weights": weights, "seconds": time.perf_counter() - start}
    if found is None and any(m > own for m in counts):
        record["notes"] = [benchmark.RANDOM_MAPS]
        out.print(benchmark.RANDOM_MAPS, style="dim")
    if output is not None:
        write_file(output, cases.plot(measured), overwrite=overwrite)
        done(output, start)
    return {**record, "output": output and str(output)}


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
    import nbl
    from nbl.text import load_texts

    from . import models, report

    start = time.perf_counter()
    with new_folder(output, overwrite=overwrite) as folder:
        loaded, tokenizer = models.load("demo", "auto", "cpu")
        count = loaded.config.num_hidden_layers
        models.prepare_saving(loaded, tokenizer, folder, count)
        record = models.new_record("demo", "demo", loaded)
        show_facts(
            {
                "model": f"{count} layers of width {loaded.config.hidden_size}, "
                f"{record['model']['parameters']:,} parameters, trained on Python's own docs"
            }
        )
        name, prompt = f"NBL-{count // 2}", "open(file, mode='r')\nOpen the file and return"
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        sample = functools.partial(
            models.continue_text, loaded, tokenizer, ids, 48, do_sample=False
        )
        texts = {"dense": sample()["text"]}
        with progress() as watch:
            compressed = nbl.compress(
                loaded,
                tokenizer,
                load_texts(["demo:calibration"]),
                layers=count - 2,
                eval_text=load_texts(["demo:test"]),
                eval_tokens=16_384,
                sweep=True,
                max_tokens=98_304,
                watch=watch,
                say=show_step,
            )
        record |= models.compressed_part(compressed, ["demo:calibration"], ["demo:test"])
        show_facts(
            {
                "calibration": f"{compressed.text['tokens']:,} tokens",
                "held out": f"{compressed.evaluation['tokens']:,} tokens of other files",
            }
        )
        show_scores(record["scores"])
        for sentence in record["notes"]:
            note(sentence)
        show_points(record)

        half = compressed.layers[: count // 2]
        record["choice"]["layers"] = half
        nbl.linearize(nbl.restore(loaded), compressed.calibration, half, maps=compressed.maps)
        texts[name] = sample()["text"]
        record["samples"] = {"prompt": prompt, "continuations": texts}
        show_facts({"prompt": escape(prompt), **{k: escape(v) for k, v in texts.items()}})
        models.save(loaded, folder, record, start, reload_with=ids)
        if has_matplotlib():
            (folder / report.HTML).write_bytes(report.render_html(record).encode())
    out.print(
        f"[bold]{name}[/] is saved in {escape(str(output))}, and loads again with\n"
        f"    import nbl; AutoModelForCausalLM.from_pretrained({escape(repr(str(output)))})",
        soft_wrap=True,
    )
    if has_matplotlib():
        out.print(f"The report, with plots: {escape(str(output / report.HTML))}", soft_wrap=True)
    done(output, start)
    return {**record, "output": str(output)}


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
    out.print(table)
    problems = sum(finding["status"] == "problem" for finding in diagnosis["findings"])
    out.print(
        Text(f"{problems} problem(s) found", "bold red")
        if problems
        else Text("everything works", "bold green")
    )
    return diagnosis


COMMANDS = (calibrate, rank, compress, _eval, generate, _report, bench, demo, doctor)
