"""Text for calibration and evaluation: from files, folders, stdin, `datasets` or the shipped demo.

A source is one of

    PATH                           a UTF-8 file, or .gz of one; .jsonl and .parquet: rows, see below
    FOLDER                         every text file below it, by path; hidden and binary skipped
    -                              standard input, one document
    dataset:NAME[:CONFIG][:SPLIT]  rows of a dataset of the `datasets` library
    demo:train|calibration|test    the text that ships with nbl

and becomes a list of documents: strings, and chats. A row with "messages", a list of {"role",
"content"}, is a :class:`Chat`; any other is its "text". Every error names the source it came from.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import math
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError  # transformers renders chat templates with it
from transformers import PreTrainedTokenizerBase

__all__ = [
    "Chat",
    "Document",
    "count_tokens",
    "load_texts",
    "mix_texts",
    "split_documents",
    "token_batches",
]

DEMO_SPLITS = ("train", "calibration", "validation", "test")
_DATASET_SPLITS = ("train", "validation", "valid", "dev", "test")
_LONG = 1 << 14  # characters: what is longer is cut where kinds of text take turns
_MIN_REST = 32  # tokens: a shorter last piece says more about its first words than about the text


@dataclass(frozen=True)
class Chat:
    """A conversation; what its text is, the tokenizer's chat template says.

    messages: [{"role": str, "content": str, ...}, ...], at least one. source: where it was read.
    """

    messages: list[dict[str, Any]]
    source: str

    def __str__(self) -> str:
        """What was said, for all that needs no tokenizer."""
        return "\n".join(message["content"] for message in self.messages)


Document = str | Chat


def load_texts(sources: Iterable[str | Path], *, max_chars: int | None = None) -> list[Document]:
    """The documents of all sources, in the order given.

    `max_chars` bounds what is read from a `dataset:` source, which may be larger than the disk, or
    from a .parquet file.
    """
    documents: list[Document] = []
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
            found = _folder(Path(name), max_chars)
        else:
            found = _file(Path(name), max_chars)
        found = [document for document in found if str(document).strip()]
        if not found:
            raise ValueError(f"text: expected text, but {name!r} holds none")
        documents += found
    if not documents:
        raise ValueError("text: expected at least one source, got none")
    return documents


def mix_texts(
    kinds: Sequence[Sequence[Document]], weights: Sequence[float] | None = None
) -> list[Document]:
    """Documents of several kinds in turns: wherever a reader stops, each kind has about its share.

    Maps fit the kinds of text that they are calibrated on; read one after another, with a limit on
    the tokens, the last kinds are never seen. Long documents are cut into pieces, where a line or a
    word ends.

    Args:
        kinds: the documents of each kind, as :func:`load_texts` gives them.
        weights: each kind's share of the characters, in any unit. It ends where one kind has no
            more. None: shares are what there is of each, and everything is there.

    Raises:
        ValueError: no kind, an empty one, weights that are not positive, or not one per kind.
    """
    pieces = [[piece for document in kind for piece in _cut(document)] for kind in kinds]
    if not pieces or not all(pieces):
        raise ValueError(f"kinds: expected documents of each, got {[len(kind) for kind in kinds]}")
    sizes = [sum(len(str(piece)) for piece in kind) for kind in pieces]
    shares = list(sizes if weights is None else weights)
    if len(shares) != len(pieces) or not all(math.isfinite(w) and w > 0 for w in shares):
        raise ValueError(
            f"weights: expected {len(pieces)} positive numbers, one for each kind, got {shares}"
        )
    mixed: list[Document] = []
    taken, places = [0.0] * len(pieces), [0] * len(pieces)
    while True:
        left = [i for i, place in enumerate(places) if place < len(pieces[i])]
        turn = left if weights is None else range(len(pieces))
        least = min(turn, key=lambda i: taken[i] / shares[i], default=None)
        if least not in left:
            return mixed
        piece = pieces[least][places[least]]
        mixed.append(piece)
        taken[least] += len(str(piece))
        places[least] += 1


def _cut(document: Document) -> Iterator[Document]:
    """A long text in pieces, each up to the end of a line, or of a word."""
    if isinstance(document, Chat):
        yield document
        return
    start = 0
    while len(document) - start > _LONG:
        end = max(document.rfind(mark, start + 1, start + _LONG) for mark in ("\n", " ")) + 1
        end = document.rfind("\n", start + _LONG // 2, start + _LONG) + 1 or end
        end = end if end > start else start + _LONG
        yield document[start:end]
        start = end
    if document[start:].strip() or start == 0:
        yield document[start:]


def split_documents(
    documents: list[Document], held_out: float = 0.1
) -> tuple[list[Document], list[Document]]:
    """(kept, held out): about a share `held_out` of the documents, the same ones every time.

    A document's side depends on its own text only, so equal documents are never on both sides and
    adding documents moves none of the others. Of two or more different documents each side gets
    at least one.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    hashes = [_hash(document) for document in documents]
    ranked = sorted(set(hashes))
    if len(ranked) < 2:
        raise ValueError(
            "text: expected at least two different documents to hold some out, got "
            f"{len(ranked)}; name the text to evaluate on explicitly"
        )
    out = {share for share in ranked[:-1] if share < held_out} or {ranked[0]}
    sides = list(zip(documents, hashes, strict=True))
    return [d for d, share in sides if share not in out], [d for d, share in sides if share in out]


def token_batches(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    *,
    length: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> list[torch.Tensor]:
    """Documents, with eos between, packed into LongTensors (batch_size, length).

    The stream starts with bos (eos where the tokenizer has none). A chat is the tokens that the
    tokenizer's chat template makes of it, which writes its own bos and ends of turns: nothing is
    added. The last batch may have fewer rows. What remains after the last full row becomes a batch
    of its own, (1, rest), when it has at least 32 tokens or is all there is, and is left out
    otherwise: nothing is ever padded.
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
        if max_tokens is not None and len(tokens) >= max_tokens:
            break
        if isinstance(document, Chat):
            text = _rendered(tokenizer, document)
        else:
            text = document
            if start is not None and tokens[-1:] != [end]:
                tokens.append(end if tokens else start)
        for piece in _pieces(text):
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


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    """The chat as text, special tokens included."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"text: expected a tokenizer with a chat template for the messages at {chat.source}, "
            'but the model\'s has none: give rows with "text"'
        )
    try:
        return tokenizer.apply_chat_template(chat.messages, tokenize=False)
    except (TemplateError, ValueError, TypeError) as error:  # roles that it does not take, ...
        raise ValueError(
            f"text: expected messages that the chat template takes at {chat.source}, got: {error}"
        ) from None


def _hash(document: Document) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    text = document if isinstance(document, str) else json.dumps(document.messages, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _pieces(document: str, size: int = 1 << 20) -> Iterator[str]:
    """The document in pieces that end with a line where it is long: a limit is then met early."""
    start = 0
    while len(document) - start > size:
        end = document.rfind("\n", start, start + size) + 1 or start + size
        yield document[start:end]
        start = end
    yield document[start:]


def _folder(folder: Path, max_chars: int | None) -> list[Document]:
    documents = []
    for root, folders, files in os.walk(folder):  # does not follow links to folders, so it ends
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            if name.startswith(".") or not path.is_file():
                continue
            if path.suffix == ".parquet" or b"\0" not in _read(path, 8192):
                documents += _file(path, max_chars)
    return documents


def _file(path: Path, max_chars: int | None) -> list[Document]:
    if not path.exists():
        raise FileNotFoundError(
            f"text: expected a file or a folder, but {str(path)!r} does not exist"
        )
    if path.suffix == ".parquet":
        files = glob.escape(str(path.resolve()))  # the library takes patterns
        return _rows(str(path), max_chars, "parquet", data_files=files, streaming=True)
    text = _decode(_read(path), str(path))
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        return [text]
    return [
        _json_line(line, f"{path}:{number}")
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


def _json_line(line: str, where: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"text: expected JSON at {where}, got: {error}") from None
    return _row(row, where)


def _row(row: Any, where: str) -> Document:
    """A row with "messages" as a chat, any other as its "text"."""
    if isinstance(row, dict) and row.get("messages") is not None:
        return _chat(row["messages"], where)
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'text: expected an object with "messages" or a string "text" at {where}')
    return _text(row["text"], where)


def _chat(messages: Any, where: str) -> Chat:
    if not isinstance(messages, list) or not messages:
        got = "an empty list" if messages == [] else type(messages).__name__
        raise ValueError(f'text: expected "messages", a list of messages, at {where}, got {got}')
    for number, message in enumerate(messages):
        for name in ("role", "content"):
            value = message.get(name) if isinstance(message, dict) else None
            if not isinstance(value, str):
                raise ValueError(
                    f'text: expected "role" and "content", strings, in messages[{number}] at '
                    f"{where}, got {message!r:.80}"
                )
            _text(value, where)
    return Chat(messages, where)


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"text: expected text at {where}, got half of a surrogate pair") from None
    return text


def _demo(split: str) -> list[str]:
    if split not in DEMO_SPLITS:
        raise ValueError(f"text: expected demo:{'|'.join(DEMO_SPLITS)}, got {'demo:' + split!r}")
    from nbl import demo

    return demo.documents(split)


def _dataset(spec: str, max_chars: int | None) -> list[Document]:
    """NAME[:CONFIG][:SPLIT]; a single part after the name is a split where it sounds like one."""
    name, *parts = spec.split(":")
    if len(parts) == 1 and parts[0].split("[")[0] in _DATASET_SPLITS:
        parts = ["", *parts]
    config, split = (*parts, "", "")[:2]
    if not name or len(parts) > 2:
        raise ValueError(f"text: expected dataset:NAME[:CONFIG][:SPLIT], got {'dataset:' + spec!r}")
    # A slice of a split ("train[:1%]") is not possible while streaming, and needs none.
    options = {"split": split or "train", "streaming": "[" not in split}
    return _rows(f"dataset:{spec}", max_chars, name, config or None, **options)


def _rows(
    source: str, max_chars: int | None, *dataset: str | None, split: str = "train", **options: Any
) -> list[Document]:
    """The rows of what `datasets.load_dataset` takes, until `max_chars` characters are read."""
    documents, chars = [], 0
    for number, row in enumerate(_loaded(source, *dataset, split=split, **options), 1):
        if row.get("messages") is None and not isinstance(row.get("text"), str):
            raise ValueError(
                f'text: could not load {source!r}: expected a column "text" of strings, or '
                f'"messages", got {", ".join(row)}'
            )
        documents.append(_row(row, f"{source}:{number}"))
        chars += len(str(documents[-1]))
        if max_chars is not None and chars >= max_chars:
            break
    return documents


def _loaded(source: str, *dataset: str | None, **options: Any) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"text: {source!r} needs the datasets library: pip install datasets"
        ) from None
    try:
        yield from datasets.load_dataset(*dataset, **options)
    except Exception as error:  # network, unknown name, script datasets, ...: all end the same way
        raise ValueError(f"text: could not load {source!r}: {error}") from None
