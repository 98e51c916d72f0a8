"""The shipped demo model: complete, small, as good as logged, and in need of its attention."""

import json
import math
import re

import pytest
import torch
from nbl import demo

TOKENS = 4096  # of the test split: all of it would take too long


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """(model, tokenizer), loaded while the current folder is another one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        return demo.load()


@pytest.fixture(scope="module")
def batches(shipped):
    return demo.token_batches(shipped[1], "test", length=512, batch_size=8, max_tokens=TOKENS)


@torch.no_grad()
def perplexity(model, batches) -> float:
    losses = [model(row[None], labels=row[None]).loss.item() for batch in batches for row in batch]
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def base(shipped, batches):
    return perplexity(shipped[0], batches)


def test_folder_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in demo.model_dir().iterdir()}
    assert sum(files.values()) <= 10e6
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.json",
        "NOTICE",
    } <= files.keys()
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]


def test_tokenizer_round_trip(shipped):
    model, tokenizer = shipped
    text = 'def spam(self, *args):\n    """Return \'é\', 漢字 and\ttabs."""\n\n\n'
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def paragraphs(split: str) -> set[str]:
    texts = "\n\n".join(demo.documents(split)).split("\n\n")
    words = (re.sub(r"\W+", " ", text).strip().lower() for text in texts)
    return {text for text in words if len(text) >= 40}


def test_splits_are_disjoint():
    held_out, train = paragraphs("test"), paragraphs("train")
    assert len(held_out) > 300
    assert not held_out & train
    assert not held_out & paragraphs("validation")
    assert paragraphs("calibration") < train
    assert set(demo.documents("calibration")) < set(demo.documents("train"))


def test_unknown_split():
    with pytest.raises(ValueError, match="split: expected one of"):
        demo.documents("dev")


def test_token_batches(shipped):
    tokenizer = shipped[1]
    batches = demo.token_batches(tokenizer, "test", length=100, batch_size=8, max_tokens=1999)
    assert [tuple(batch.shape) for batch in batches] == [(8, 100), (8, 100), (3, 100)]
    assert batches[0].dtype == torch.long
    assert batches[0][0, 0] == tokenizer.eos_token_id
    assert demo.token_batches(tokenizer, "test", length=100, batch_size=8, max_tokens=99) == []


def test_perplexity_is_the_logged_one(base):
    log = json.loads((demo.model_dir() / "training_log.json").read_text())
    if sum(map(len, demo.documents("test"))) == log["characters"]["test"]:
        # 1 %: the order of summation differs between machines, the weights do not.
        assert base == pytest.approx(log["test_perplexity_first_4096"], rel=0.01)
    else:  # another Python, or one without tkinter: other text of the same kind
        assert base < 2 * log["test_perplexity"]


def test_attention_matters(shipped, batches, base):
    model, _ = shipped
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda module, args, output: (torch.zeros_like(output[0]), *output[1:])
        )
        for layer in model.model.layers[::2]
    ]
    try:
        without = perplexity(model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    assert without > 1.3 * base
