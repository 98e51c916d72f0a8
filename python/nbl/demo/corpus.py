"""Text that every Python installation has: pydoc's topics and the standard library's docstrings.

A document is one file's docstrings, each under the signature it belongs to, or one pydoc topic.
Files are assigned to splits by a hash of their module name, which depends neither on Python's
version nor on where it is installed, so a held-out file stays held out on every installation:

    test         8 %  never trained on, never calibrated on
    validation   4 %  chooses the training checkpoint; never trained on
    train       88 %  trained on
    calibration 25 %  a part of the train files: one calibrates on text like the model's own

A paragraph found in several files (sync and async twins, topics that quote one another) is kept
once, in the most protected split it occurs in.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SPLITS", "documents", "token_batches"]

# [first, last) bucket of 100. Protected splits come first: they win a text that several share.
SPLITS = {"test": (0, 8), "validation": (8, 12), "train": (12, 100), "calibration": (12, 37)}

# Tests, other people's packages, and what some distributions leave out.
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "ensurepip",
    "lib2to3",
    "pydoc_data",
}
_MIN_CHARS = 24


def documents(split: str) -> list[str]:
    """The documents of one of `SPLITS`, in a fixed order."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    first, last = SPLITS[split]
    return [text for bucket, text in _corpus() if first <= bucket < last]


def token_batches(
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    *,
    length: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> list[torch.Tensor]:
    """A split's documents, each preceded by eos, packed into LongTensors (batch_size, length).

    At most `max_tokens` tokens; the last batch may have fewer rows, and a rest shorter than one row
    is left out.
    """
    tokens: list[int] = []
    for text in documents(split):
        if max_tokens is not None and len(tokens) >= max_tokens:
            break
        tokens += [
            tokenizer.eos_token_id,
            *tokenizer.encode(text, add_special_tokens=False, verbose=False),
        ]
    usable = len(tokens) if max_tokens is None else min(len(tokens), max_tokens)
    rows = torch.tensor(tokens[: usable // length * length], dtype=torch.long).view(-1, length)
    return list(rows.split(batch_size)) if len(rows) else []


@functools.cache
def _corpus() -> list[tuple[int, str]]:
    """(bucket, document) of every file, most protected first, without repeated paragraphs."""
    files = sorted(
        ((_bucket(name), name, parts) for name, parts in _files()),
        key=lambda file: (_protection(file[0]), file[1]),
    )
    seen: set[str] = set()
    corpus = []
    for bucket, name, parts in files:
        kept = [
            f"{title}\n{text}".strip()
            for title, docstring in parts
            if (text := _unseen(docstring, seen))
        ]
        if kept:
            corpus.append((bucket, "\n\n".join([name, *kept]) + "\n"))
    return corpus


def _unseen(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs in `seen`, to which the others are added."""
    kept = []
    for paragraph in text.split("\n\n"):
        words = re.sub(r"\W+", " ", paragraph).strip().lower()
        if words in seen:
            continue
        if len(words) >= _MIN_CHARS:  # shorter ones ("Examples:") are no text to be held out
            seen.add(words)
        kept.append(paragraph)
    return "\n\n".join(kept).strip()


def _bucket(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100


def _protection(bucket: int) -> int:
    """0 for test, 1 for validation, 2 for train."""
    return sum(bucket >= SPLITS[split][1] for split in ("test", "validation"))


def _files() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(name, [(title, text), ...]) of every pydoc topic and every standard library module."""
    if importlib.util.find_spec("pydoc_data.topics"):
        from pydoc_data.topics import topics

        for name, text in topics.items():
            yield f"topic {name}", [("", text.strip())]
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        if _SKIPPED.isdisjoint(folders):
            module = folders if path.stem == "__init__" else (*folders, path.stem)
            yield ".".join(module), _docstrings(path)


def _docstrings(path: Path) -> list[tuple[str, str]]:
    """(signature, docstring) of the module and of every class and function in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in the library's own sources
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            return []
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                found.append((_signature(node), inspect.cleandoc(docstring)))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"{node.name}({ast.unparse(node.args)})"
