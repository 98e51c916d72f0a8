"""Real packages around a linearized model: accelerate, peft, torchao, lm-eval, Trainer, export."""

from __future__ import annotations

import copy

import lm_eval
import nbl
import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny import MAPS, linearize_tiny, make_tiny_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")

MODULES = ["linear", "linear_u", "linear_v"]


@pytest.fixture
def linearized():
    def make(kind="full", model=None, **config):
        model = make_tiny_model(**config) if model is None else model
        return linearize_tiny(model, [0, 2], **MAPS[kind])

    return make


def generated(model, ids):
    return model.generate(ids, max_new_tokens=6, do_sample=False)


# --- accelerate ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", MAPS)
def test_offloaded_checkpoint(kind, linearized, ids, tmp_path):
    """Linear and attention layers on the disk: their weights are nowhere else."""
    model = linearized(kind)
    model.save_pretrained(tmp_path / "out")
    places = {f"model.layers.{i}": "disk" if i < 2 else "cpu" for i in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    places["lm_head"] = "disk"
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert next(offloaded.model.layers[0].parameters()).is_meta
    torch.testing.assert_close(offloaded(ids).logits, model(ids).logits)
    assert torch.equal(generated(offloaded, ids), generated(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("way", ["cpu", "disk", "map"])
@pytest.mark.parametrize("kind", ["full", "memory-rank"])
@pytest.mark.parametrize("optimized", [False, True], ids=["", "optimized"])
def test_offloading_a_model(optimized, kind, way, linearized, ids, tmp_path):
    """Also one that was optimized before: its packed weights move away."""
    model = linearized(kind)
    logits, tokens = model(ids).logits, generated(model, ids)
    if optimized:
        nbl.optimize(model)
    if way == "cpu":
        cpu_offload(model, "cpu")
    elif way == "disk":
        disk_offload(model, tmp_path, "cpu")
    else:
        places = {name: "cpu" for name, _ in model.named_children()} | {"model": "disk"}
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert all(p.is_meta for p in model.model.layers[2].parameters())
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(model, ids), tokens)


@torch.no_grad()
def test_calibrating_an_offloaded_model(tiny_model, token_batches, tmp_path):
    model = tiny_model()
    expected = nbl.calibrate(model, token_batches(4), progress=False).solve()
    disk_offload(model, tmp_path, "cpu")
    for layer, solved in nbl.calibrate(model, token_batches(4), progress=False).solve().items():
        torch.testing.assert_close(solved.weight, expected[layer].weight)
    found, alone = (nbl.perplexity(m, token_batches(2)) for m in (model, tiny_model()))
    assert found.value == pytest.approx(alone.value)


def test_an_offloaded_model_is_not_changed(tiny_model, token_batches):
    """Its weights are not there to be shared with, or packed into, anything."""
    cal = nbl.calibrate(tiny_model(), token_batches(4), progress=False)
    model = tiny_model()
    cpu_offload(model, "cpu")
    for change in (lambda: nbl.linearize(model, cal, [1]), lambda: nbl.optimize(model)):
        with pytest.raises(ValueError, match="is offloaded"):
            change()
    assert type(model).__name__ == "LlamaForCausalLM"


# --- torchao -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("optimized", [False, True], ids=["", "optimized"])
def test_quantized_by_torchao_after(optimized, kind, linearized, ids):
    model = linearized(kind)
    if optimized:
        nbl.optimize(model)
    rounded = copy.deepcopy(model)
    quantize_(model, Int8WeightOnlyConfig())
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "dequantize") and type(weight) is not torch.nn.Parameter:
            rounded.get_submodule(name).weight.data.copy_(weight.dequantize())
    torch.testing.assert_close(model(ids).logits, rounded(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(model, ids), generated(rounded, ids))


@torch.no_grad()
@pytest.mark.parametrize("kind", MAPS)
def test_quantized_by_torchao_before(kind, linearized, tiny_model, ids, tmp_path):
    """The maps are fitted to the rounded model; they are plain ones, and all of it is saved."""
    model = tiny_model()
    quantize_(model, Int8WeightOnlyConfig())
    model = linearized(kind, model)
    expected = model(ids).logits
    assert torch.equal(generated(model, ids)[:, : ids.shape[1]], ids)
    with pytest.raises(ValueError, match=r"plain nn\.Linear"):
        nbl.optimize(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = tiny_model()
    quantize_(again, Int8WeightOnlyConfig())
    again = linearized(kind, again)
    for parameter in again.model.layers[0].parameters():
        if type(parameter) is torch.nn.Parameter:
            parameter.zero_()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    assert torch.equal(again(ids).logits, expected)
    nbl.restore(model)


@torch.no_grad()
def test_a_checkpoint_quantized_by_torchao(linearized, ids, tmp_path):
    """Quantized when it is loaded, as transformers does it; saved, and loaded as it is."""
    from transformers import TorchAoConfig

    linearized(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "plain")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, device_map="cpu"
    )
    assert type(model.model.layers[0].linear.weight) is not torch.nn.Parameter
    model.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", device_map="cpu")
    assert torch.equal(again(ids).logits, model(ids).logits)


# --- peft ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAPS)
def test_lora_on_the_maps(kind, linearized, ids, tmp_path):
    """Trained for a step, saved and loaded, merged, and then optimized."""
    config = peft.LoraConfig(
        r=2, target_modules=MODULES, task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = peft.get_peft_model(linearized(kind), config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name and "linear" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(linearized(kind), tmp_path / "adapter").eval()
    model.eval()
    with torch.no_grad():
        expected = model(ids).logits
        assert not torch.allclose(expected, linearized(kind)(ids).logits, rtol=1e-2)
        torch.testing.assert_close(loaded(ids).logits, expected)
        tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        nbl.optimize(merged)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(merged.generate(ids, max_new_tokens=4, do_sample=False), tokens)


def test_lora_on_an_optimized_model(linearized, ids):
    model = nbl.optimize(linearized())
    config = peft.LoraConfig(
        r=2, target_modules=[*MODULES, "q_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    config.init_lora_weights = False
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        logits = adapted(ids).logits
        torch.testing.assert_close(
            adapted.merge_and_unload()(ids).logits, logits, rtol=1e-4, atol=1e-4
        )


# --- lm-eval -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full", "memory-rank"])
@pytest.mark.parametrize("optimized", [False, True], ids=["", "optimized"])
def test_lm_eval(optimized, kind, linearized, tokenizer):
    """Log-likelihoods of continuations, in padded batches, as one pass over each alone gives."""
    model = linearized(kind)
    cases = [("w5 w6 w7", " w8 w9"), ("w20", " w21 w22 w23"), ("w9 w9 w9 w9 w9", " w2")]
    expected = []
    for context, continuation in cases:
        whole = torch.tensor([tokenizer(context + continuation).input_ids])
        new = len(tokenizer(continuation).input_ids)
        scores = model(whole).logits[0, -new - 1 : -1].log_softmax(-1)
        expected.append(float(scores.gather(-1, whole[0, -new:, None]).sum()))
    if optimized:
        nbl.optimize(model)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")
    requests = [
        Instance("loglikelihood", {}, case, i, ("task", i, 1)) for i, case in enumerate(cases)
    ]
    found = [score for score, _ in harness.loglikelihood(requests)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert lm_eval.__version__


# --- transformers' Trainer, torch.export ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "memory-rank"])
def test_trainer_resumes_from_its_checkpoint(kind, linearized, token_batches, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in token_batches(4, length=8)[0].repeat(4, 1)]

    def trainer(folder, steps):
        arguments = TrainingArguments(
            output_dir=tmp_path / folder,
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model=linearized(kind), args=arguments, train_dataset=rows)

    whole = trainer("whole", 4)
    whole.train()
    trainer("parts", 2).train()
    resumed = trainer("parts", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    state = whole.model.state_dict()
    assert not torch.equal(
        state["model.layers.0.mlp.up_proj.weight"],
        linearized(kind).state_dict()["model.layers.0.mlp.up_proj.weight"],
    )
    for name, weight in resumed.model.state_dict().items():
        torch.testing.assert_close(weight, state[name], msg=lambda m, name=name: f"{name}: {m}")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "checkpoint-4")
    assert nbl.linearized_layers(again) == [0, 2]


@torch.no_grad()
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("optimized", [False, True], ids=["", "optimized"])
def test_export(optimized, kind, linearized, ids):
    model = linearized(kind).requires_grad_(False)
    if optimized:
        nbl.optimize(model)
    expected = model(ids, use_cache=False).logits
    exported = torch.export.export(model, (ids,), {"use_cache": False, "return_dict": True})
    found = exported.module()(ids, use_cache=False, return_dict=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
