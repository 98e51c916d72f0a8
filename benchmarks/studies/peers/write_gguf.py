"""A bf16 GGUF of a Llama checkpoint: python write_gguf.py MODEL_FOLDER OUT.gguf.

Runs in llama.cpp's environment (numpy and gguf): the checkpoint is read without torch.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read_bfloat16(path: Path):
    """(name, uint16 array) of every tensor of a safetensors file."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    header_size = int(data[:8].view(np.uint64)[0])
    header = json.loads(bytes(data[8 : 8 + header_size]))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name}: expected BF16, got {entry['dtype']}")
        start, end = (8 + header_size + offset for offset in entry["data_offsets"])
        yield name, data[start:end].view(np.uint16).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    known = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in known:
        return known[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleave(weight, heads: int):
    """transformers rotates the halves of a head, llama.cpp neighbouring pairs."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def main(folder: Path, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for file in sorted(folder.glob("*.safetensors")):
        for name, weight in read_bfloat16(file):
            if "q_proj" in name:
                weight = interleave(weight, heads)
            if "k_proj" in name:
                weight = interleave(weight, kv_heads)
            if weight.ndim == 1:  # llama.cpp wants norms in float32
                value = (weight.astype(np.uint32) << 16).view(np.float32)
                writer.add_tensor(gguf_name(name), value)
                continue
            bf16 = gguf.GGMLQuantizationType.BF16
            data = np.ascontiguousarray(weight).view(np.uint8)
            writer.add_tensor(gguf_name(name), data, raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
