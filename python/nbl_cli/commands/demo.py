"""nbl demo: the whole thing on the shipped model."""

import functools
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..options import Json, Overwrite, Threads
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
from ..streams import out


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

    from .. import models, report

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
