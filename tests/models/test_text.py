"""nbl.text: sources, their errors, splitting and packing."""

import gzip
import io
import json
import sys

import pytest
import torch
from nbl.text import Chat, count_tokens, load_texts, mix_texts, split_documents, token_batches
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class ByteTokenizer:
    """One token per UTF-8 byte, after bos = 1 and eos = 2."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, **_):
        return {"input_ids": [byte + 3 for byte in text.encode()]}


CHATML = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'oracle' %}"
    "{{ raise_exception('no oracles') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
)
HI = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]


def chat_tokenizer(**kwargs):
    """A real tokenizer of bytes with <s> = 0, </s> = 1, <|user|> = 2, <|bot|> = 3; it adds <s>
    itself when it is not told otherwise."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|user|>", "<|bot|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **kwargs
    )


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
        ("none.jsonl", b'{"messages": []}', '"messages".* at .*none.jsonl:1, got an empty list'),
        ("dict.jsonl", b'{"messages": {"role": "user"}}', "at .*dict.jsonl:1, got dict"),
        (
            "role.jsonl",
            b'{"text": "a"}\n{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}',
            r'"role" and "content".* messages\[1\] at .*role.jsonl:2, got .*b',
        ),
        (
            "parts.jsonl",
            b'{"messages": [{"role": "user", "content": [{"text": "a"}]}]}',
            r"messages\[0\] at .*parts.jsonl:1",
        ),
        ("string.jsonl", b'{"messages": ["hi"]}', r"messages\[0\] at .*string.jsonl:1, got 'hi'"),
        ("null.jsonl", b'{"messages": null}', "at .*null.jsonl:1"),
        (
            "halfchat.jsonl",
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            "halfchat.jsonl:1, got half of a surrogate",
        ),
        ("deep.jsonl", b"[" * 100_000, "expected JSON at .*deep.jsonl:1"),
        ("half.jsonl", b'{"text": "\\ud800"}', "surrogate"),
        ("fake.gz", b"plain", "expected gzip data in .*fake.gz"),
        (
            "cut.txt.gz",
            gzip.compress(b"text" * 99, mtime=0)[:-9],
            "expected gzip data in .*cut.txt.gz",
        ),
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


def test_chats_and_texts_in_one_file(tmp_path):
    rows = [{"messages": HI}, {"text": "plain"}, {"messages": HI, "text": "ignored"}]
    data = "\n".join(map(json.dumps, rows))
    path = write(tmp_path / "chat.jsonl", data)
    expected = [Chat(HI, f"{path}:1"), "plain", Chat(HI, f"{path}:3")]
    assert load_texts([path]) == expected
    packed = write(tmp_path / "folder" / "chat.jsonl.gz", gzip.compress(data.encode()))
    assert [str(document) for document in load_texts([packed.parent])] == [
        "hi\nyo",
        "plain",
        "hi\nyo",
    ]
    blank = write(tmp_path / "blank.jsonl", '{"messages": [{"role": "user", "content": " "}]}')
    with pytest.raises(ValueError, match="holds none"):
        load_texts([blank])


def test_a_chat_is_what_its_template_makes_of_it_and_nothing_else():
    tokenizer = chat_tokenizer(chat_template=CHATML)
    hi, yo, bye = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("hi", "yo", "bye"))
    assert len(hi) == len(yo) == 2
    chat = [0, 2, *hi, 1, 3, *yo, 1]
    assert chat == tokenizer.apply_chat_template(HI, tokenize=True, return_dict=False)
    documents = [Chat(HI, "a:1"), Chat(HI, "a:2"), "bye", "bye", Chat(HI, "a:3")]
    (batch,) = token_batches(tokenizer, documents, length=100, batch_size=1)
    # No bos before a chat, which has its own; no second eos after one, which ends with it.
    assert batch[0].tolist() == [*chat, *chat, *bye, 1, *bye, *chat]
    (batch,) = token_batches(tokenizer, ["bye", documents[0]], length=100, batch_size=1)
    assert batch[0].tolist() == [0, *bye, *chat]
    first = token_batches(tokenizer, documents, length=4, batch_size=1, max_tokens=4)
    assert [batch.tolist() for batch in first] == [[chat[:4]]]


def test_a_chat_that_cannot_be_rendered_is_named():
    chat = Chat(HI, "chat.jsonl:7")
    with pytest.raises(ValueError, match=r"chat template for the messages at chat.jsonl:7"):
        token_batches(chat_tokenizer(), [chat], length=8, batch_size=1)
    tokenizer = chat_tokenizer(chat_template=CHATML)
    oracle = Chat([{"role": "oracle", "content": "so"}], "chat.jsonl:8")
    with pytest.raises(ValueError, match=r"takes at chat.jsonl:8, got: no oracles"):
        token_batches(tokenizer, [oracle], length=8, batch_size=1)
    broken = chat_tokenizer(chat_template="{% for")
    with pytest.raises(ValueError, match=r"takes at chat.jsonl:7"):
        token_batches(broken, [chat], length=8, batch_size=1)


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "a [1]*"  # no pattern, but a name
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["one", "two", "three"]}).to_parquet(folder / "b.parquet")
    datasets.Dataset.from_list([{"messages": HI}]).to_parquet(folder / "c.parquet")
    chat = Chat(HI, f"{folder / 'c.parquet'}:1")
    assert load_texts([folder]) == ["one", "two", "three", chat]
    assert load_texts([folder / "b.parquet"], max_chars=4) == ["one", "two"]
    datasets.Dataset.from_dict({"words": ["one"]}).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r'd.parquet.*column "text".*"messages", got words'):
        load_texts([tmp_path / "d.parquet"])
    datasets.Dataset.from_dict({"messages": [["hi"]]}).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r"messages\[0\] at .*e.parquet:1, got 'hi'"):
        load_texts([tmp_path / "e.parquet"])
    with pytest.raises(ValueError, match=r"could not load .*f.parquet"):
        load_texts([write(tmp_path / "f.parquet", b"PAR1 no parquet")])


def test_parquet_needs_a_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"a.parquet.*pip install datasets"):
        load_texts([write(tmp_path / "a.parquet", b"PAR1")])


def test_chats_are_held_out_by_what_they_say():
    chats = [Chat([{"role": "user", "content": str(i)}], f"a:{i}") for i in range(300)]
    kept, out = split_documents([*chats, "text"], 0.1)
    assert 15 <= len(out) <= 45 and len(kept) + len(out) == 301
    moved = [Chat(chat.messages, "elsewhere") for chat in chats]
    said = {str(chat) for chat in split_documents(moved, 0.1)[1]}
    assert said == {str(document) for document in out} - {"text"}


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


# --- kinds of text in turns ----------------------------------------------------------------------


def test_kinds_take_turns():
    """Wherever one stops, each has its share; all is there, in the order of each kind."""
    kinds = [
        [f"a{i} " * 40 for i in range(300)],
        ["b\n" * 40_000],
        [f"c{i}" * 9 for i in range(50)],
    ]
    mixed = mix_texts(kinds)
    text = "".join(map(str, mixed))
    for kind, mark in zip(kinds, "abc", strict=True):
        assert "".join(d for d in mixed if d.startswith(mark)) == "".join(kind)
    sizes = [sum(map(len, kind)) for kind in kinds]
    for share in (0.3, 0.6, 0.9):
        seen = 0
        prefix = []
        for document in mixed:
            if seen > share * len(text):
                break
            prefix.append(document)
            seen += len(document)
        for size, mark in zip(sizes, "abc", strict=True):
            own = sum(len(d) for d in prefix if d.startswith(mark))
            assert abs(own - share * size) <= (1 << 14) + 2000
    assert max(map(len, mixed)) <= 1 << 14 and all(d.endswith("\n") for d in mixed if d[0] == "b")


def test_kinds_with_weights():
    """In these proportions, until one kind has no more."""
    kinds = [["a" * 100] * 90, ["b" * 50] * 1000]
    mixed = mix_texts(kinds, [3, 1])
    count = {mark: sum(len(d) for d in mixed if d[0] == mark) for mark in "ab"}
    assert count["a"] == 9000 and abs(count["b"] - 3000) <= 100
    assert [d[0] for d in mix_texts([["a"], ["b"] * 9], [1, 4])] == list("abbbb")
    chats = [Chat([{"role": "user", "content": "x" * 40_000}], "here")]
    assert mix_texts([chats, ["b"]])[0] is chats[0] or mix_texts([chats, ["b"]])[1] is chats[0]
    assert mix_texts([["word " * 8000], ["b"]])[0].endswith(" ")
    assert len(mix_texts([["x" * 40_000], ["b"]])) == 4  # where nothing ends, anywhere
    for wrong, words in (
        (([], None), "kinds: expected documents"),
        (([["a"], []], None), "kinds: expected documents"),
        (([["a"], ["b"]], [1]), "weights: expected 2 positive numbers"),
        (([["a"], ["b"]], [1, 0]), "weights: expected 2 positive numbers"),
        (([["a"], ["b"]], [1, float("inf")]), "weights: expected 2 positive numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            mix_texts(*wrong)
