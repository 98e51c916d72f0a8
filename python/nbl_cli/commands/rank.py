"""nbl rank: every criterion side by side."""

from pathlib import Path
from typing import Annotated

import typer

from ..options import LOSS_TOKENS, BatchSize, Device, Dtype, Json, Length, Texts, Threads
from ..scores import order
from ..show import note, progress, show_scores


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
    layers: Annotated[
        int | None,
        typer.Option(
            metavar="M",
            min=1,
            help="With --text: measures the criterion greedy, too, for so many layers.",
            show_default="no greedy",
        ),
    ] = None,
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

    Example: `nbl rank cal --model meta-llama/Llama-3.2-1B --text book.txt --layers 6`
    """
    if text and not model:
        raise ValueError("model: expected --model with --text, which the criterion loss needs")
    if layers is not None and not model:
        raise ValueError("layers: expected --model and --text with --layers, which greedy needs")
    import nbl
    from nbl import measure, pipeline

    from .. import models

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
            batches=batches
            and watch(batches, "measuring the loss", passes=layers or len(found.layers) + 1),
            count=layers,
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
