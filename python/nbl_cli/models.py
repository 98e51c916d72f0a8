"""A model of the command line: found, loaded, run, saved; its text; its record."""

import datetime
import time
from pathlib import Path
from typing import Any

import nbl
import torch
import transformers
from nbl import gguf_file, measure, saving
from nbl.selfcheck import check_installed
from nbl.text import Document, load_texts, mix_texts

from .options import parse_weights
from .output import write_record
from .streams import err, out


def load(name: str, dtype: str, device: str, weights: str | None = None):
    """(model in evaluation mode on the device, tokenizer)."""
    if weights is not None:
        loaded, tokenizer = load(name, dtype, device)
        return nbl.optimize(loaded, weights=weights), tokenizer
    target = _device(device)
    check_installed()
    err.print(f"loading {name} ...", style="dim", markup=False, soft_wrap=True)
    if name == "demo":
        from nbl import demo

        if not (demo.model_dir() / "config.json").is_file():
            raise ValueError("model: this installation of nbl lacks the demo model, give another")
        model, tokenizer = demo.load(torch.float32 if dtype == "auto" else getattr(torch, dtype))
        return model.to(target), tokenizer
    expected = (
        "model: expected a folder with a model, a .gguf file, a hub name, 'demo' or 'smollm2', "
        f"got {name!r}"
    )
    if name == "smollm2" or name.lower().endswith(".gguf"):
        path = gguf_file.smollm2() if name == "smollm2" else Path(name)
        given = None if dtype == "auto" else getattr(torch, dtype)
        model, tokenizer = gguf_file.load(path, given)
        return model.to(target), tokenizer
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


def read_texts(
    model: str,
    text: list[str] | None,
    max_tokens: int | None,
    demo_split: str = "calibration",
    mix: str | None = None,
    in_turns: bool = True,
) -> tuple[list[Document], list[str]]:
    """(documents, sources); the demo model brings its own text. Several sources take turns, so that
    each has its share wherever reading stops (mix says which); or follow one another."""
    if not text and model != "demo":
        raise ValueError("text: expected --text with files, folders, - or dataset:NAME, got none")
    sources = list(text or [f"demo:{demo_split}"])
    weights = parse_weights(mix, len(sources))
    most = max_tokens and 8 * max_tokens
    kinds = [load_texts([source], max_chars=most) for source in sources]
    if len(kinds) == 1 or not in_turns:
        return [document for kind in kinds for document in kind], sources
    return mix_texts(kinds, weights), sources


def read_held_out(
    model: str, text: list[str] | None, sources: list[str], max_tokens: int
) -> tuple[list[Document] | None, list[str]]:
    """(documents, sources) to evaluate on; None: a part of the calibration text, which nbl.compress
    then holds out."""
    if not text and model != "demo":
        return None, [f"held out of {source}" for source in sources]
    found = list(text or ["demo:test"])
    return load_texts(found, max_chars=8 * max_tokens), found


def read_other(
    text: list[str] | None, read: list[str], max_tokens: int
) -> tuple[list[Document] | None, list[str]]:
    """(documents, sources) of another kind than what is read: as given, or what ships with nbl;
    None where that is what is read."""
    if not text and any("demo:" in source for source in read):
        return None, []
    found = list(text or ["demo:test"])
    return load_texts(found, max_chars=8 * max_tokens), found


def prepare_saving(model, tokenizer, folder: Path, layers: int, memory=None, rank=None) -> None:
    """Before the work: all that is saved but the weights, and room for these with so many maps."""
    saving.try_saving(model, tokenizer, folder)
    maps = saving.map_bytes(model, layers, memory=memory, rank=rank)
    saving.check_space(folder, saving.parameter_bytes(model) + maps)


def save(model, folder: Path, record: dict, start: float, reload_with=None) -> None:
    """The model beside its tokenizer, and the record; with `reload_with` (token ids) the proof that
    it loads again."""
    model.save_pretrained(folder)
    if reload_with is not None:
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        with torch.inference_mode():
            if not torch.equal(again(reload_with).logits, model(reload_with).logits):
                raise RuntimeError("the saved model's logits differ from those of the model saved")
    write_record(folder, {**record, "seconds": time.perf_counter() - start})


def new_record(command: str, name: str, model) -> dict:
    from nbl.doctor import conditions

    return {
        "nbl_report": 1,
        "command": command,
        "date": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "model": measure.describe_model(model, name),
        "conditions": conditions(str(model.device), str(model.dtype).removeprefix("torch.")),
    }


def compressed_part(
    compressed: nbl.Compressed,
    sources: list[str],
    eval_sources: list[str],
    other_sources: list[str] | None = None,
) -> dict[str, Any]:
    """What a record says of a compressed model, and of the texts that were read."""
    part = {
        "scores": compressed.scores,
        "choice": dict(compressed.choice),
        "notes": compressed.notes,
        "points": compressed.points,
    }
    if compressed.text is not None:
        features = {"features": compressed.calibration.features}
        part["calibration"] = {"text": sources, **compressed.text, **features}
    if compressed.evaluation is not None:
        part["evaluation"] = {"text": eval_sources, **compressed.evaluation}
        part["speed"] = compressed.speed
    if compressed.other is not None:
        part["other"] = {"text": other_sources, **compressed.other}
    return part


class _Printer(transformers.TextStreamer):
    """Prints where results go, not to sys.stdout, which libraries write to."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="\n" if stream_end else "", file=out.file, flush=True)


def continue_text(
    model, tokenizer, ids, max_new_tokens: int, *, stream: bool = False, **sampling
) -> dict:
    """Generates; with `stream`, prints the text as it grows."""
    printer = _Printer(tokenizer, skip_special_tokens=True)
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
