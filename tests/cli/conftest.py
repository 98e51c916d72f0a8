"""What the tests of the command line run on: a tiny model, a book, a calibration; no network."""

import pytest
import torch
import transformers
from command import TEXT, nbl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random Llama of 4 layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<eos>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """A folder of twelve texts."""
    folder = tmp_path_factory.mktemp("book")
    for i in range(12):
        (folder / f"{i}.txt").write_text(TEXT[i * 900 : (i + 1) * 900])
    return str(folder)


@pytest.fixture(scope="session")
def calibrated(tiny, book, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "cal"
    assert nbl("calibrate", tiny, "--text", book, "-o", folder).exit_code == 0
    return str(folder)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No test reaches the hub, or writes to the folder it was started from."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("NBL_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
