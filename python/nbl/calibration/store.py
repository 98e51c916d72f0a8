"""How a calibration is stored: its files, what identifies a model and the batches it read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from ..batches import Batch

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "JSON_FILE",
    "TENSOR_FILE",
    "batch_bytes",
    "digest",
    "fingerprint",
    "parse_header",
    "write_atomically",
]

FORMAT = "nbl-calibration"
FORMAT_VERSION = 2  # 1: without a memory, not sequential; still written for those
JSON_FILE = "calibration.json"
TENSOR_FILE = "calibration.safetensors"


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of what the model computes: its configuration and 256 elements of every weight."""
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        # what it is called, how it is run and what a token means do not matter
        if key not in ("architectures", "dtype", "transformers_version", "use_cache")
        and not key.startswith(("_", "output_"))
        and not key.endswith("_token_id")
    }
    found = hashlib.blake2b(
        json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16
    )
    for name, tensor in model.model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for plain in _plain_tensors(tensor.detach()):
            flat = plain.flatten()
            step = max(1, flat.numel() // 256)
            sample = flat[::step][:256].to("cpu")
            found.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Those that hold the numbers of one: itself, what a tensor of torchao's is made of, or none
    where accelerate keeps them on the disk."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _plain_tensors(getattr(tensor, name))
    elif tensor.device.type != "meta":
        yield tensor


def batch_bytes(batch: Batch) -> Iterator[bytes]:
    yield repr(tuple(batch.input_ids.shape)).encode()
    for tensor in (batch.input_ids, batch.attention_mask, batch.position_ids):
        if tensor is not None:
            yield tensor.cpu().contiguous().numpy().tobytes()


def digest(*parts: bytes) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def parse_header(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not a calibration file, or cut short") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path}: not a calibration file")
    if header.get("format_version") not in (1, FORMAT_VERSION):
        raise ValueError(
            f"{path}: format version {header.get('format_version')!r}, "
            f"this nbl reads 1 and {FORMAT_VERSION}"
        )
    return header


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """At `path` there is at every moment the old file or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
