"""`nbl heal`: the maps of a folder trained, all else in it as it was; where the original is."""

import json
import shutil
from pathlib import Path

import nbl as library
import pytest
import torch
import transformers
from command import nbl, refusal_of, result_of
from nbl import demo
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("offline")

SIZES = ("--max-tokens", 4096, "--length", 128)
QUICK = ("--steps", 8, "--tokens-per-step", 256, "--lr", 1e-3)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """The shipped model, two layers of it replaced."""
    folder = tmp_path_factory.mktemp("compressed") / "out"
    found = nbl("compress", "demo", "--layers", "2,5", *SIZES, "-o", folder)
    assert found.exit_code == 0, found.stderr
    return folder


def test_only_the_maps_change(compressed, tmp_path):
    options = (*SIZES, *QUICK, "--eval", "--eval-tokens", 1024)
    found = result_of("heal", compressed, *options, "-o", "healed")
    healing = found["healing"]
    assert found["command"] == "heal" and found["model"]["name"] == "demo"
    assert healing["kept"] and healing["kl_after"] < healing["kl_before"]
    assert healing["text"] == ["demo:calibration"] and healing["tokens"] == 8 * 256
    assert (healing["steps"], healing["lr"], healing["rank"]) == (8, 1e-3, None)
    before = json.loads((compressed / "nbl_report.json").read_text())
    assert found["choice"] == before["choice"] and found["scores"] == before["scores"]
    dense, point = found["points"]
    assert dense["layers"] == [] and point["layers"] == [2, 5]
    assert point["kv_bytes_per_token"] == 0.75 * dense["kv_bytes_per_token"]
    measured = healing["perplexity"]
    assert (dense["perplexity"], point["perplexity"]) == (measured["original"], measured["after"])
    assert found["evaluation"] == {"text": ["demo:test"], "tokens": 1024, "length": 128}

    old, new = (load_file(folder / "model.safetensors") for folder in (compressed, Path("healed")))
    maps = {f"model.layers.{i}.linear.{part}" for i in (2, 5) for part in ("weight", "bias")}
    assert {name for name in old if not torch.equal(old[name], new[name])} == maps
    model = transformers.AutoModelForCausalLM.from_pretrained("healed")
    assert library.linearized_layers(model) == [2, 5]
    batches = demo.token_batches(
        transformers.AutoTokenizer.from_pretrained("healed"),
        "test",
        length=128,
        batch_size=16,
        max_tokens=1024,
    )
    assert library.perplexity(model, batches).value == pytest.approx(measured["after"])
    result_of("report", "healed")
    page = (tmp_path / "healed" / "nbl_report.html").read_text()
    assert "the maps trained" in page and "before healing" in page

    again = result_of("heal", "healed", *SIZES, *QUICK, "-o", "again", "--rank", 4)
    assert again["healing"]["compressed"] == "healed" and "perplexity" not in again["healing"]
    assert "perplexity" not in again["points"][1]


def test_it_says_that_it_trains_and_when_nothing_was_kept(compressed):
    done = nbl("heal", compressed, *SIZES, *QUICK, "--lr", 10, "-o", "healed")
    assert done.exit_code == 0
    said = " ".join(done.stderr.split())
    assert "note: this is training" in said and "maps are as they were" in said
    assert "nats per token from the original" in done.stdout
    old, new = (load_file(folder / "model.safetensors") for folder in (compressed, Path("healed")))
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert json.loads(Path("healed/nbl_report.json").read_text())["healing"]["kept"] is False


def test_the_original_is_where_the_record_says_or_is_given(tiny, book, tmp_path):
    shutil.copytree(tiny, "models")
    result_of("compress", "./models", "--text", book, "--layers", "1,2", "-o", "out")
    options = ("--text", book, "--length", 64, *QUICK, "-o", "healed", "--overwrite")
    assert result_of("heal", "out", *options)["model"]["name"] == "./models"
    shutil.move("models", "moved")
    refused = refusal_of("heal", "out", *options)
    assert "original: expected a folder" in refused and "--original says where it is" in refused
    found = result_of("heal", "out", *options, "--original", "moved", "--eval")
    assert found["evaluation"]["text"] == [f"held out of {book}"]
    assert found["healing"]["perplexity"].keys() == {"original", "before", "after"}
    (tmp_path / "out" / "nbl_report.json").unlink()
    assert "original: expected --original MODEL" in refusal_of("heal", "out", *options)
    assert result_of("heal", "out", *options, "--original", "moved")["choice"] == {"layers": [1, 2]}


def test_refusals(tiny, book, compressed, tmp_path):
    options = ("--text", book, "-o", "healed")
    dense = refusal_of("heal", tiny, *options, "--original", tiny)
    assert "model: expected one with linear maps" in dense
    assert "original: expected a model like" in refusal_of(
        "heal", compressed, *options, "--original", tiny
    )
    assert "attention, got one with layers [2, 5] replaced" in refusal_of(
        "heal", compressed, *options, "--original", compressed
    )
    assert "lr: expected a number above 0" in refusal_of("heal", compressed, *options, "--lr", 0)
    assert "text: expected --text" in refusal_of("heal", tiny, "-o", "healed", "--original", tiny)
    assert list(tmp_path.iterdir()) == []
