"""nbl.saving: published models are saved as they were published; bounds and refusals hold."""

import json
import shutil
from collections import namedtuple

import nbl
import pytest
import torch
from nbl import saving
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

# transformers warns about these when it loads them, and refuses to save them.
PUBLISHED = {
    "bos_token_id": 1,
    "do_sample": False,
    "eos_token_id": [2, 3],
    "length_penalty": 1.5,
    "temperature": 0.6,
    "top_p": 0.9,
    "somebody's own": {"key": 3},
}


def saved_generation_config(folder):
    content = json.loads((folder / "generation_config.json").read_text())
    content.pop("transformers_version")
    return content


@pytest.fixture
def published(tiny_model, tmp_path):
    """A model as from the hub, with one layer dropped."""
    tiny_model().save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "generation_config.json").write_text(json.dumps(PUBLISHED))
    return nbl.drop(AutoModelForCausalLM.from_pretrained(tmp_path / "published"), [1])


def test_a_generation_config_is_saved_as_it_was_published(published, tmp_path):
    config = published.generation_config
    published.save_pretrained(tmp_path / "out")
    assert saved_generation_config(tmp_path / "out") == PUBLISHED
    assert published.generation_config is config and type(config) is GenerationConfig
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again.save_pretrained(tmp_path / "again")
    assert saved_generation_config(tmp_path / "again") == PUBLISHED


def test_a_generation_config_of_the_user_is_saved_as_it_is(published, tmp_path):
    published.generation_config.top_k = 7
    published.save_pretrained(tmp_path / "out")
    assert saved_generation_config(tmp_path / "out") == {**PUBLISHED, "top_k": 7}


def test_a_generation_config_without_sense_is_refused(published, tmp_path):
    published.generation_config.max_new_tokens = -1
    with pytest.raises(ValueError, match="max_new_tokens"):
        published.save_pretrained(tmp_path / "out")
    tokenizer = unsavable_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"its generation config cannot: .*max_new_tokens"):
        saving.try_saving(published, tokenizer, tmp_path / "try")


def unsavable_tokenizer():
    class Own:  # written in Python: tokenizers cannot write it to a file
        def pre_tokenize(self, text):
            pass

    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Own())
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    wrapped._tokenizer = tokenizer
    return wrapped


def test_what_cannot_be_saved_is_named(published, tmp_path):
    with pytest.raises(ValueError, match=r"model: .* its tokenizer cannot: .*serialize"):
        saving.try_saving(published, unsavable_tokenizer(), tmp_path)
    tokenizer = unsavable_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    saving.try_saving(published, tokenizer, tmp_path / "good")
    assert saved_generation_config(tmp_path / "good") == PUBLISHED
    assert not list((tmp_path / "good").glob("*.safetensors"))
    published.config.callback = print
    with pytest.raises(ValueError, match=r"its configuration cannot: TypeError: .*serializable"):
        saving.try_saving(published, tokenizer, tmp_path)


def test_room_is_checked(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10_000, 7_655, 2_345)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    saving.check_space(tmp_path, 2_345)
    with pytest.raises(OSError, match=r"expected 2,346 bytes free .*'.*' has 2,345"):
        saving.check_space(tmp_path, 2_346)


def payload(folder):
    """Bytes of the tensors in the one safetensors file there."""
    (file,) = folder.glob("*.safetensors")
    return sum(tensor.nbytes for tensor in load_file(file).values())


MEMORY = nbl.Memory(lags=(1, 2), decays=(0.3, 0.6), choose=1)


@pytest.mark.filterwarnings("ignore:.* tokens are few")
@pytest.mark.parametrize("features", ["post-norm", "pre-norm"])
@pytest.mark.parametrize("memory, sequences", [(None, 48), (MEMORY, 48), (MEMORY, 400)])
def test_bytes_of_a_calibration(tiny_model, token_batches, tmp_path, features, memory, sequences):
    model, batches = tiny_model(), token_batches(sequences // 4, length=8)
    given = {"features": features, "memory": memory}
    nbl.calibrate(model, batches, **given, progress=False).save(tmp_path)
    bound = saving.moment_bytes(model, **given, sequences=sequences)
    # Only the rows of sequences after the last sum of many may be fewer.
    assert payload(tmp_path) <= bound <= 1.3 * payload(tmp_path)


@pytest.mark.filterwarnings("ignore:.* tokens are few")
@pytest.mark.parametrize("memory", [None, MEMORY])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_checkpoint(tiny_model, token_batches, tmp_path, memory, rank, dtype):
    model = tiny_model(dtype=dtype, tie_word_embeddings=True)
    calibration = nbl.calibrate(model, token_batches(), memory=memory, progress=False)
    bound = saving.parameter_bytes(model) + saving.map_bytes(model, 2, memory=memory, rank=rank)
    replaced = [model.model.layers[i].self_attn for i in (0, 1)]
    attention = sum(weight.nbytes for part in replaced for weight in part.parameters())
    nbl.linearize(model, calibration, [0, 1], rank=rank)
    model.save_pretrained(tmp_path / "out")
    assert payload(tmp_path / "out") == bound - attention  # which the maps replace
