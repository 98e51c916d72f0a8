"""nbl calibrate: what is needed to rank and linearize every layer, from one reading of a text."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ..options import (
    CALIBRATION_TOKENS,
    BatchSize,
    ChooseDecays,
    Decays,
    Device,
    Dtype,
    Features,
    Json,
    Lags,
    Length,
    MaxTokens,
    Memory,
    Mix,
    Model,
    Output,
    Overwrite,
    Texts,
    Threads,
    parse_memory,
)
from ..output import new_folder, write_record
from ..show import done, progress, show_scores


def calibrate(
    model: Model,
    text: Texts = None,
    mix: Mix = None,
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

    Maps fit the kinds of text that they are calibrated on: give all kinds that the model will read.

    Examples: `nbl calibrate meta-llama/Llama-3.2-1B --text book.txt notes/ -o cal`,
    `nbl calibrate smollm2 --text web.jsonl wiki.txt --mix 2,1 -o cal`
    """
    import nbl
    from nbl import measure, pipeline, saving
    from nbl.text import count_tokens

    from .. import models

    start = time.perf_counter()
    remembered = parse_memory(memory, lags, decays, choose_decays)
    with new_folder(output, overwrite=overwrite) as folder:
        loaded, tokenizer = models.load(model, dtype, device)
        limit = max_tokens or CALIBRATION_TOKENS
        documents, sources = models.read_texts(model, text, limit, mix=mix)
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
