"""nbl heal: the maps of a compressed model trained against the original's logits."""

import time
from typing import Annotated

import typer

from .. import options as given
from ..options import CALIBRATION_TOKENS
from ..output import new_folder
from ..record import choice_of, part_of, read_record
from ..show import done, note, progress, show_facts


def heal(
    model: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="Folder that nbl compress or demo wrote.", show_default=False
        ),
    ],
    text: given.Texts = None,
    output: given.Output = ...,
    original: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What OUT was made from.", show_default="as OUT says"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 100,
    tokens_per_step: Annotated[int, typer.Option(min=1, help="At least so many.")] = 1024,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Train a correction of this rank to every full W.", show_default="W itself"
        ),
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--eval", help="Measure perplexity on held-out text, before and after.")
    ] = False,
    eval_text: given.EvalText = None,
    eval_tokens: given.EvalTokens = 65_536,
    max_tokens: given.MaxTokens = None,
    length: given.Length = None,
    batch_size: given.BatchSize = None,
    overwrite: given.Overwrite = False,
    dtype: given.Dtype = "auto",
    device: given.Device = "auto",
    threads: given.Threads = None,
    as_json: given.Json = False,
) -> dict:
    """Train the maps of a compressed model to say what the original says, and save the result.

    Optional, and the only command that trains: gradient steps on the maps, all else stays as it is.
    They lower the KL divergence from the original's distribution of the next token to the model's.

    Example: `nbl heal llama-nbl-6 --text book.txt --eval -o llama-nbl-6-healed`
    """
    import nbl
    from nbl import measure, pipeline
    from nbl.text import split_documents

    from .. import models

    start = time.perf_counter()
    with new_folder(output, overwrite=overwrite) as folder:
        old, name = _made_from(model, original)
        loaded, tokenizer = models.load(model, dtype, device)
        right = _load_original(name, dtype, device, named=original is not None)
        models.prepare_saving(loaded, tokenizer, folder, 0)
        record = models.new_record("heal", name, right)
        documents, sources = models.read_texts(name, text, max_tokens or CALIBRATION_TOKENS)
        held_out, eval_sources = [], []
        if evaluate or eval_text:
            held_out, eval_sources = models.read_held_out(name, eval_text, sources, eval_tokens)
            if held_out is None:
                documents, held_out = split_documents(documents)
        sizes = {"length": length, "batch_size": batch_size}
        batches = pipeline.make_batches(
            loaded, tokenizer, documents, **sizes, max_tokens=max_tokens or CALIBRATION_TOKENS
        )
        tests = held_out and pipeline.make_batches(
            loaded, tokenizer, held_out, **sizes, max_tokens=eval_tokens
        )
        note("this is training: the maps are no longer the closed-form ones")
        with progress() as watch:
            read = tests and watch(tests, "measuring perplexity", 3)

            def measured(of) -> float | None:
                return nbl.perplexity(of, read).value if tests else None

            perplexity = {"original": measured(right), "before": measured(loaded)}
            training = {"steps": steps, "tokens_per_step": tokens_per_step, "lr": lr, "rank": rank}
            healed = nbl.heal(loaded, right, batches, **training, progress=watch.counter("healing"))
            perplexity["after"] = measured(loaded)
        choice = {"layers": nbl.linearized_layers(loaded)} | part_of(old, "choice")
        record |= {key: old[key] for key in ("scores", "calibration") if key in old}
        record["choice"] = choice
        record["healing"] = {
            "compressed": model,
            "text": sources,
            **training,
            "tokens": healed.tokens,
            "kl_before": healed.before,
            "kl_after": healed.after,
            "kept": healed.kept,
        }
        record["points"] = [
            {"layers": layers, "kv_bytes_per_token": measure.kv_bytes_per_token(of)}
            for of, layers in ((right, []), (loaded, choice_of(record)["layers"]))
        ]
        if tests:
            record["healing"]["perplexity"] = perplexity
            record["evaluation"] = {
                "text": eval_sources,
                "tokens": sum(batch.numel() for batch in tests),
                "length": int(tests[0].shape[1]),
            }
            for point, key in zip(record["points"], ("original", "after"), strict=True):
                point["perplexity"] = perplexity[key]
        if not healed.kept:
            record["notes"] = [
                "healing did not lower the divergence on held-out tokens: the maps are as they were"
            ]
        models.save(loaded, folder, record, start)
    facts = {
        "divergence": f"[bold]{healed.after:.4f}[/] nats per token from the original on held-out "
        f"tokens, {healed.before:.4f} before",
        "trained on": f"{healed.tokens:,} tokens in {healed.steps} steps",
    }
    if tests:
        facts["perplexity"] = (
            f"[bold]{perplexity['after']:,.3f}[/], {perplexity['before']:,.3f} before; "
            f"the original's {perplexity['original']:,.3f}"
        )
    show_facts(facts)
    for sentence in record.get("notes", []):
        note(sentence)
    done(output, start)
    return {**record, "output": str(output)}


def _made_from(model: str, original: str | None) -> tuple[dict, str]:
    """(the record in OUT, the original's name)."""
    try:
        old = read_record(model)
    except (OSError, ValueError):
        old = {}
    name = original or part_of(old, "model").get("name")
    if not name:
        raise ValueError(
            f"original: expected --original MODEL, as no record in {model!r} says what it was made "
            "from"
        )
    return old, str(name)


def _load_original(name: str, dtype: str, device: str, *, named: bool):
    from .. import models

    try:
        return models.load(name, dtype, device)[0]
    except ValueError as error:
        message = str(error).replace("model:", "original:", 1)
        if not named:
            message += " (so says the record in OUT; --original says where it is now)"
        raise ValueError(message) from error
