"""nbl eval: perplexity of a model on any text."""

import time
from typing import Annotated

import typer

from ..options import BatchSize, Device, Dtype, Json, Length, Model, Threads, Weights
from ..show import progress, show_facts


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

    from .. import models

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
        "windowed_layers": nbl.windowed_layers(loaded),
        "kv_bytes_per_token": measure.kv_bytes_per_token(loaded),
        "state_bytes": measure.state_bytes(loaded),
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
            "with a window": ", ".join(map(str, result["windowed_layers"])) or "none",
            "KV cache": f"{result['kv_bytes_per_token']:,} bytes per token",
            "bounded": f"{result['state_bytes']:,} bytes per sequence (states, windows)",
            "weights": f"{result['weight_bytes']:,} bytes per decode step",
        }
    )
    return result
