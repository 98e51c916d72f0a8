"""nbl bench: speed beside transformers and the machine's limits."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..options import Device, Dtype, Json, Model, Threads, parse_counts
from ..output import check_file, write_file
from ..show import done, need_matplotlib
from ..streams import err, out


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

    from .. import cases, models

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
