"""Saving a model: as it was published, and what can fail about it before hours of work, not after.

with as_published(model): model.save_pretrained(folder)
try_saving(model, tokenizer, folder)  # everything but the weights
check_space(folder, weight_bytes(model) + map_bytes(model, 12))
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

import nbl_kernels as nk

from .memory import Memory

__all__ = [
    "as_published",
    "check_space",
    "map_bytes",
    "moment_bytes",
    "parameter_bytes",
    "try_saving",
]


class _AsPublished:
    """Of a generation config that is saved. transformers refuses to save what it only warns about
    when it loads it: options without effect, such as a temperature without do_sample, which many
    published models have. What makes no sense at all still raises."""

    def validate(self, strict: bool = False, **options: Any) -> None:
        super().validate(strict=False, **options)


@contextmanager
def as_published(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the model's generation config is saved with the very content it has."""
    config = getattr(model, "generation_config", None)
    if config is None:  # a base model
        yield
        return
    kind = type(config)
    saved = copy.copy(config)
    saved.__class__ = type(kind.__name__, (_AsPublished, kind), {})
    model.generation_config = saved
    try:
        yield
    finally:
        model.generation_config = config


def try_saving(model: PreTrainedModel, tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Saves the tokenizer, the configuration and the generation config to a folder: all but the
    weights, which replace the last two by their own when they are saved there later.

    ValueError: one of them cannot be saved; it names which.
    """
    with as_published(model):
        parts = {"tokenizer": tokenizer, "configuration": model.config}
        if model.can_generate():
            parts["generation config"] = model.generation_config
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and not quantizer.is_serializable():
            method = type(quantizer).__name__
            raise ValueError(
                f"model: expected one that can be saved again, but {method} cannot save its weights"
            )
        for name, part in parts.items():
            try:
                part.save_pretrained(folder)
            except OSError:  # of the folder, which it names
                raise
            except Exception as error:  # whatever a tokenizer's own code raises: not to go on with
                raise ValueError(
                    f"model: expected one that can be saved again, but its {name} cannot: "
                    f"{type(error).__name__}: {error}"
                ) from error


def check_space(folder: str | os.PathLike[str], needed: int) -> None:
    """OSError where the filesystem of an existing folder has fewer bytes free than are needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"output: expected {needed:,} bytes free for what is to be saved, but the disk of "
            f"{os.fspath(folder)!r} has {free:,}"
        )


def parameter_bytes(model: nn.Module) -> int:
    """Of the weights that a checkpoint holds, shared ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def map_bytes(
    model: PreTrainedModel,
    layers: int,
    *,
    memory: Memory | None = None,
    rank: int | None = None,
) -> int:
    """Of so many linear maps in the model's dtype, at most: a map that is stored as factors, or has
    no bias, or chose a part of the decays, may need less."""
    outputs = model.config.hidden_size
    features = outputs * (1 if memory is None else memory.branches)
    weight = outputs * features if rank is None else rank * (outputs + features)
    return layers * (weight + outputs) * model.dtype.itemsize


def moment_bytes(
    model: PreTrainedModel, features: str, memory: Memory | None = None, *, sequences: int = 1
) -> int:
    """Of the sums that a calibration of all layers with so many sequences saves, at most."""
    size = model.config.hidden_size
    sizes = {"block_dim": size if features == "post-norm" else 0, "device": "meta"}
    if memory is None:
        sums = nk.CovarianceAccumulator(size, size, **sizes).state_dict()
    else:
        filters = {"lags": memory.lags, "decays": memory.decays}
        sums = nk.MemoryAccumulator(size, size, **filters, **sizes).state_dict()
    per_layer = sum(tensor.nbytes for tensor in sums.values()) + 3 * 8  # three sums of scalars
    if memory is not None:
        # A float32 row for the end of each sequence, or a float64 matrix of many.
        width = sums["end_sums"].numel()
        per_layer += 4 * min(sequences, width) * width + 8 * width * width * (sequences > width)
    return model.config.num_hidden_layers * per_layer
