"""Text for calibration and evaluation: from files, folders, stdin, `datasets` or the shipped demo.

A source is one of

    PATH                           a UTF-8 file (.jsonl: the "text" of each line), or .gz of one
    FOLDER                         every text file below it, by path; hidden and binary skipped
    -                              standard input, one document
    dataset:NAME[:CONFIG][:SPLIT]  a dataset of the `datasets` library, its "text" column
    demo:train|calibration|test    the text that ships with nbl

and becomes a list of documents (strings). Every error names the source it came from.
"""

import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

DEMO_SPLITS = ("train", "calibration", "validation", "test")
_DATASET_SPLITS = ("train", "validation", "valid", "dev", "test")
_MIN_REST = 32  # tokens: a shorter last piece says more about its first words than about the text


def load_texts(sources: Iterable[str | Path], *, max_chars: int | None = None) -> list[str]:
    """The documents of all sources, in the order given.

    `max_chars` bounds what is read from a `dataset:` source, which may be larger than the disk.
    """
    documents: list[str] = []
    for source in [sources] if isinstance(sources, str | Path) else sources:
        name = str(source)
        kind, _, rest = name.partition(":")
        if name == "-":
            found = [_decode(sys.stdin.buffer.read(), "standard input")]
        elif kind == "demo" and rest:
            found = _demo(rest)
        elif kind == "dataset" and rest:
            found = _dataset(rest, max_chars)
        elif Path(name).is_dir():
            found = _folder(Path(name))
        else:
            found = _file(Path(name))
        found = [text for text in found if text.strip()]
        if not found:
            raise ValueError(f"text: expected text, but {name!r} holds none")
        documents += found
    if not documents:
        raise ValueError("text: expected at least one source, got none")
    return documents


def split_documents(documents: list[str], held_out: float = 0.1) -> tuple[list[str], list[str]]:
    """(kept, held out): about a share `held_out` of the documents, the same ones every time.

    A document's side depends on its own text only, so equal documents are never on both sides and
    adding documents moves none of the others. Of two or more different documents each side gets
    at least one.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    keys = {text: _hash(text) for text in documents}
    ranked = sorted(keys, key=keys.__getitem__)
    if len(ranked) < 2:
        raise ValueError(
            "text: expected at least two different documents to hold some out, got "
            f"{len(ranked)}; name the text to evaluate on explicitly"
        )
    out = {text for text in ranked[:-1] if keys[text] < held_out} or {ranked[0]}
    return [t for t in documents if t not in out], [t for t in documents if t in out]


def token_batches(
    tokenizer,
    documents: Iterable[str],
    *,
    length: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> list[torch.Tensor]:
    """Documents, with eos between, packed into LongTensors (batch_size, length).

    The stream starts with bos (eos where the tokenizer has none). The last batch may have fewer
    rows. What remains after the last full row becomes a batch of its own, (1, rest), when it has
    at least 32 tokens or is all there is, and is left out otherwise: nothing is ever padded.
    """
    for name, value in (("length", length), ("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if length < 2:
        raise ValueError(f"length: expected at least 2 (a token and the next), got {length}")
    end = tokenizer.eos_token_id
    start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    end = start if end is None else end
    tokens: list[int] = []
    for document in documents:
        tokens += [] if start is None else [end if tokens else start]
        for piece in _pieces(document):
            if max_tokens is not None and len(tokens) >= max_tokens:
                break
            tokens += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = tokens[:max_tokens]
    if len(tokens) < 2:
        raise ValueError(f"text: expected at least 2 tokens, got {len(tokens)}")
    full = len(tokens) // length * length
    rest = tokens[full:]
    batches = list(torch.tensor(tokens[:full]).view(-1, length).split(batch_size)) if full else []
    if len(rest) >= (_MIN_REST if full else 2):
        batches.append(torch.tensor([rest]))
    return batches


def count_tokens(batches: Iterable[torch.Tensor]) -> int:
    """How many tokens the batches hold."""
    return sum(batch.numel() for batch in batches)


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _pieces(document: str, size: int = 1 << 20) -> Iterator[str]:
    """The document in pieces that end with a line where it is long: a limit is then met early."""
    start = 0
    while len(document) - start > size:
        end = document.rfind("\n", start, start + size) + 1 or start + size
        yield document[start:end]
        start = end
    yield document[start:]


def _folder(folder: Path) -> list[str]:
    documents = []
    for root, folders, files in os.walk(folder):  # does not follow links to folders, so it ends
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file() and b"\0" not in _read(path, 8192):
                documents += _file(path)
    return documents


def _file(path: Path) -> list[str]:
    if not path.exists():
        raise FileNotFoundError(
            f"text: expected a file or a folder, but {str(path)!r} does not exist"
        )
    text = _decode(_read(path), str(path))
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        return [text]
    return [
        _json_text(line, f"{path}:{number}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _read(path: Path, size: int = -1) -> bytes:
    """The first bytes of a file, decompressed: a zero byte among them is git's mark of a binary."""
    if path.suffix != ".gz":
        with path.open("rb") as file:
            return file.read(size)
    try:
        with gzip.open(path) as file:
            return file.read(size)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"text: expected gzip data in {str(path)!r}, got: {error}") from None


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: expected UTF-8 in {name!r}, got byte 0x{data[error.start]:02x} at {error.start}"
        ) from None
    if "\0" in text:
        raise ValueError(f"text: expected text in {name!r}, got binary data")
    return text


def _json_text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"text: expected JSON at {where}, got: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'text: expected an object with a string "text" at {where}')
    try:
        row["text"].encode()
    except UnicodeEncodeError:
        raise ValueError(f"text: expected text at {where}, got half of a surrogate pair") from None
    return row["text"]


def _demo(split: str) -> list[str]:
    if split not in DEMO_SPLITS:
        raise ValueError(f"text: expected demo:{'|'.join(DEMO_SPLITS)}, got {'demo:' + split!r}")
    from nbl import demo

    return demo.documents(split)


def _dataset(spec: str, max_chars: int | None) -> list[str]:
    """NAME[:CONFIG][:SPLIT]; a single part after the name is a split where it sounds like one."""
    name, *parts = spec.split(":")
    if len(parts) == 1 and parts[0].split("[")[0] in _DATASET_SPLITS:
        parts = ["", *parts]
    config, split = (*parts, "", "")[:2]
    if not name or len(parts) > 2:
        raise ValueError(f"text: expected dataset:NAME[:CONFIG][:SPLIT], got {'dataset:' + spec!r}")
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"text: 'dataset:{spec}' needs the datasets library: pip install datasets"
        ) from None
    try:
        # A slice of a split ("train[:1%]") is not possible while streaming, and needs none.
        rows = datasets.load_dataset(
            name, config or None, split=split or "train", streaming="[" not in split
        )
        documents, chars = [], 0
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise ValueError(f'expected a column "text" of strings, got {", ".join(row)}')
            documents.append(row["text"])
            chars += len(row["text"])
            if max_chars is not None and chars >= max_chars:
                break
    except Exception as error:  # network, unknown name, script datasets, ...: all end the same way
        raise ValueError(f"text: could not load 'dataset:{spec}': {error}") from None
    return documents
