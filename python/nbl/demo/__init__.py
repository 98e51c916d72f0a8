"""The small Llama that `nbl demo` compresses, and the text it was trained on and is judged by.

    model, tokenizer = nbl.demo.load()
    batches = nbl.demo.token_batches(tokenizer, "calibration", length=512, batch_size=8)

`train.py` made the model; `model/training_log.json` says how, and its test perplexity.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .corpus import documents, token_batches

if TYPE_CHECKING:  # transformers is imported where a model is loaded
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["documents", "load", "model_dir", "token_batches"]


def model_dir() -> Path:
    """The folder of the shipped checkpoint; give it to anything that takes a model's path."""
    return Path(__file__).resolve().parent / "model"


def load(
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The shipped model, in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir(), local_files_only=True)
    return model.eval(), tokenizer
