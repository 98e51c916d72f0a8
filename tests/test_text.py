"""nbl.text: sources, their errors, splitting and packing."""

import gzip
import io
import json
import sys

import pytest
import torch
from nbl.text import count_tokens, load_texts, split_documents, token_batches


class ByteTokenizer:
    """One token per UTF-8 byte, after bos = 1 and eos = 2."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, **_):
        return {"input_ids": [byte + 3 for byte in text.encode()]}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_a_folder_is_read_in_order_without_hidden_and_binary_files(tmp_path):
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.md", "first")
    write(tmp_path / "sub" / "c.py", "third")
    write(tmp_path / "sub" / "d.jsonl.gz", gzip.compress(b'{"text": "fourth"}\n\n{"text": "5"}\n'))
    write(tmp_path / ".hidden", "no")
    write(tmp_path / ".git" / "config", "no")
    write(tmp_path / "weights.bin", b"abc\0def")
    write(tmp_path / "archive.gz", gzip.compress(b"\0\1\2"))
    write(tmp_path / "empty.txt", "")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert load_texts([tmp_path]) == ["first", "second", "third", "fourth", "5"]


def test_files_stdin_and_the_order_of_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("from stdin é".encode())))
    bom = write(tmp_path / "bom.txt", b"\xef\xbb\xbftext")
    line = json.dumps({"text": "a\u2028b", "id": 3}, ensure_ascii=False)
    rows = write(tmp_path / "rows.jsonl", line)
    assert load_texts(["-", bom, str(rows)]) == ["from stdin é", "text", "a\u2028b"]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("latin1.txt", "café".encode("latin1"), "expected UTF-8 in .*latin1.txt.* byte 0xe9 at 3"),
        ("zero.txt", b"a\0b", "expected text in .*zero.txt.* binary"),
        ("empty.txt", b" \n\t", "empty.txt.* holds none"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": 1}', 'string "text" at .*rows.jsonl:2'),
        ("list.jsonl", b'["text"]', "list.jsonl:1"),
        ("broken.jsonl", b'{"text": ', "expected JSON at .*broken.jsonl:1"),
        ("half.jsonl", b'{"text": "\\ud800"}', "surrogate"),
        ("fake.gz", b"plain", "expected gzip data in .*fake.gz"),
        ("cut.txt.gz", gzip.compress(b"text" * 99)[:-9], "expected gzip data in .*cut.txt.gz"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        load_texts([write(tmp_path / name, data)])


def test_bad_sources_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="'no/such/path' does not exist"):
        load_texts(["no/such/path"])
    with pytest.raises(ValueError, match="holds none"):
        load_texts([tmp_path])
    with pytest.raises(ValueError, match="at least one source"):
        load_texts([])
    with pytest.raises(ValueError, match=r"demo:train\|calibration.*'demo:no'"):
        load_texts(["demo:no"])
    with pytest.raises(ValueError, match="CONFIG"):
        load_texts(["dataset:a:b:c:d"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_texts(["dataset:wikitext"])


def test_a_local_dataset(tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path / "set" / "train.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    write(tmp_path / "set" / "test.jsonl", '{"text": "three"}\n')
    assert load_texts([f"dataset:{tmp_path / 'set'}"]) == ["one", "two"]
    assert load_texts([f"dataset:{tmp_path / 'set'}"], max_chars=2) == ["one"]
    assert load_texts([f"dataset:{tmp_path / 'set'}:test"]) == ["three"]
    write(tmp_path / "other" / "train.jsonl", '{"words": "one"}\n')
    with pytest.raises(ValueError, match=r'could not load.*column "text".*words'):
        load_texts([f"dataset:{tmp_path / 'other'}"])


def test_splitting_depends_on_the_text_alone():
    documents = [f"document {i}" for i in range(1000)]
    kept, out = split_documents(documents, 0.1)
    assert sorted(kept + out) == sorted(documents)
    assert not set(kept) & set(out)
    assert 70 <= len(out) <= 130
    assert set(split_documents(documents[::-1] * 2, 0.1)[1]) == set(out)
    assert set(split_documents(documents[:500], 0.1)[1]) == set(out) & set(documents[:500])


def test_splitting_a_few_documents():
    for share in (0.01, 0.99):
        kept, out = split_documents(["a", "b"], share)
        assert len(kept) == len(out) == 1
    with pytest.raises(ValueError, match="two different documents"):
        split_documents(["same", "same"])
    with pytest.raises(ValueError, match="held_out"):
        split_documents(["a", "b"], 1.0)


def test_packing_keeps_every_token_in_order():
    documents = ["x" * 50, "y" * 70]
    stream = [1] + [ord("x") + 3] * 50 + [2] + [ord("y") + 3] * 70  # 122 tokens
    batches = token_batches(ByteTokenizer(), documents, length=40, batch_size=2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 40), (1, 40)]  # the rest of 2: dropped
    assert torch.cat([batch.flatten() for batch in batches]).tolist() == stream[:120]
    batches = token_batches(ByteTokenizer(), documents, length=90, batch_size=2)
    assert [tuple(batch.shape) for batch in batches] == [(1, 90), (1, 32)]
    assert count_tokens(batches) == 122
    batches = token_batches(ByteTokenizer(), documents, length=500, batch_size=2, max_tokens=9)
    assert [batch.tolist() for batch in batches] == [[stream[:9]]]
    assert all(batch.dtype == torch.long for batch in batches)


def test_a_long_document_is_not_tokenized_past_the_limit():
    calls = []

    class Counting(ByteTokenizer):
        def __call__(self, text, **kwargs):
            calls.append(len(text))
            return super().__call__(text, **kwargs)

    document = ("word " * 20 + "\n") * 50_000
    batches = token_batches(Counting(), [document], length=64, batch_size=1, max_tokens=128)
    assert count_tokens(batches) == 128 and sum(calls) < len(document) / 4
    calls.clear()
    token_batches(Counting(), [document], length=4096, batch_size=1)
    assert sum(calls) == len(document)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 1}, "length"),
        ({"length": 8, "batch_size": 0}, "batch_size"),
        ({"length": 8, "max_tokens": 0}, "max_tokens"),
        ({"length": 8, "max_tokens": 1}, "2 tokens"),
    ],
)
def test_packing_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        token_batches(ByteTokenizer(), ["text"], **{"batch_size": 1, **arguments})
    with pytest.raises(ValueError, match="got 0"):
        token_batches(ByteTokenizer(), [], length=8, batch_size=1)
