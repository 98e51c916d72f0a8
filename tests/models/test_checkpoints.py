"""save_pretrained and from_pretrained of linearized models: bit-identical, or refused."""

from __future__ import annotations

import json
import subprocess
import sys

import nbl
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import cast_parameters
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")  # as many as these tests need


@pytest.fixture
def linearized(tiny_model, token_batches):
    def make(family="llama", dtype=torch.float32, features="post-norm", rank=None, **config):
        """0 linear, 2 linear without bias, 3 dropped; 1 has attention."""
        model = tiny_model(family, dtype, **config)
        cal = nbl.calibrate(model, token_batches(4), features=features, progress=False)
        nbl.linearize(model, cal, [0], rank=rank)
        nbl.linearize(model, cal, [2], rank=rank, bias=False)
        return nbl.drop(model, [3])

    return make


def change_tensors(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def assert_same(loaded, model, ids) -> None:
    assert type(loaded) is type(model)
    assert loaded.config.nbl == model.config.nbl
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shards", ["one file", "sharded"])
def test_round_trip(family, dtype, shards, linearized, ids, tmp_path):
    model = linearized(family, dtype)
    size = {"max_shard_size": "20KB"} if shards == "sharded" else {}
    model.save_pretrained(tmp_path, **size)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(size)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model, ids)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == f"nbl_{family}"
    assert config["architectures"] == [type(model).__name__]
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 5},
        {"rank": 5, "features": "pre-norm"},
        {"features": "pre-norm"},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
    ],
    ids=str,
)
def test_round_trip_of_variants(options, linearized, ids, tmp_path):
    model = linearized(**options)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded, model, ids)
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied == options.get("tie_word_embeddings", False)


@torch.no_grad()
def test_loading_options(linearized, ids, tmp_path):
    model = linearized()
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(ids).logits, cast_parameters(model, torch.bfloat16)(ids).logits)
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.generate(ids[:1]).shape[1] == ids.shape[1] + 3
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config._attn_implementation == "eager"


@torch.no_grad()
def test_device_map(linearized, ids, tmp_path):
    model = linearized()
    model.save_pretrained(tmp_path)
    for device_map in ("cpu", "auto"):
        assert_same(
            AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map), model, ids
        )


def test_fresh_process(linearized, ids, tmp_path):
    """Another process needs `import nbl` and nothing else: no trust_remote_code."""
    model = linearized()
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch, nbl\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.tensor([[5, 6, 7, 8]])\n"
        "print(model.generate(ids, max_new_tokens=8, do_sample=False).tolist())\n"
    )
    run = [sys.executable, "-c", script, str(tmp_path)]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    expected = model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=8, do_sample=False)
    assert json.loads(out) == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "name", ["0.linear.weight", "0.linear.bias", "2.linear.weight", "3.mlp.up_proj.weight"]
)
def test_missing_weight_is_refused(family, name, linearized, tmp_path):
    linearized(family).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop(f"model.layers.{name}"))
    for auto in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=rf"lacks weights.*layers\.{name}"):
            auto.from_pretrained(tmp_path)


def test_wrong_shape_is_refused(linearized, tmp_path):
    linearized().save_pretrained(tmp_path)

    def cut(tensors):
        name = "model.layers.0.linear.weight"
        tensors[name] = tensors[name][:, :-1].contiguous()

    change_tensors(tmp_path, cut)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_truncated_weights_are_refused(linearized, tmp_path):
    linearized().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|header|safetensor|metadata"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda nbl: nbl.update(format_version=2), "format_version 1"),
        (lambda nbl: nbl["layers"].update({"9": nbl["layers"]["0"]}), r"names layers \[9\]"),
        (lambda nbl: nbl["layers"]["0"].update(kind="magic"), "magic"),
        (lambda nbl: nbl["layers"]["0"].update(features="mid-norm"), "mid-norm"),
        (lambda nbl: nbl["layers"]["0"].update(rank=0), "rank"),
        (lambda nbl: nbl["layers"]["0"].update(colour=1), "colour"),
        (lambda nbl: nbl["layers"].update(x=nbl["layers"]["0"]), "x"),
        (lambda nbl: nbl.update(layers=[0]), "layers"),
    ],
)
def test_bad_config_is_refused(change, words, linearized, tmp_path):
    linearized().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config["nbl"])
    path.write_text(json.dumps(config))
    with pytest.raises(Exception, match=words):
        AutoConfig.from_pretrained(tmp_path)


@torch.no_grad()
def test_loaded_model_can_go_on(linearized, token_batches, ids, tmp_path):
    linearized().save_pretrained(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"\[0, 2, 3\] were loaded from a checkpoint"):
        nbl.restore(model)
    cal = nbl.calibrate(model, token_batches(4), progress=False)
    assert cal.layers == [1]
    nbl.linearize(model, cal, 1)
    assert nbl.linearized_layers(model) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"\[0, 2, 3\] were loaded"):
        nbl.restore(model)
    assert nbl.linearized_layers(model) == [0, 1, 2, 3]
    model.save_pretrained(tmp_path / "b")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), model, ids)


@torch.no_grad()
def test_loaded_layer_gets_another_map(linearized, tiny_model, token_batches, ids, tmp_path):
    linearized().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    cal = nbl.calibrate(tiny_model(), token_batches(4), progress=False)
    nbl.linearize(model, cal, [0], bias=False)
    assert model.model.layers[0].linear.bias is None
    with pytest.raises(
        ValueError, match="layer 3 was loaded from a checkpoint without an input norm"
    ):
        nbl.linearize(model, cal, [3])  # it was dropped
    nbl.drop(model, [0])
    assert model.config.nbl["layers"]["0"]["kind"] == "drop"


@torch.no_grad()
def test_restored_model_saves_as_the_stock_one(tiny_model, linearized, ids, tmp_path):
    model = nbl.restore(linearized())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama" and "nbl" not in config
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not any(".linear" in name for name in file.keys())  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, tiny_model()(ids).logits)
