"""vLLM on a CPU, step by step: python vllm_worker.py MODEL_FOLDER THREADS MAX_LENGTH KV_BYTES."""

import os
import sys

folder, threads, max_length, kv_bytes = sys.argv[1], *map(int, sys.argv[2:])
os.environ |= {
    "OMP_NUM_THREADS": str(threads),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, which steps it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as everyone else here: the system places threads
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "KMP_BLOCKTIME": "1",  # ms until threads rest, where it runs on Intel's OpenMP
}


class Engine:
    def __init__(self, llm, params) -> None:
        self._engine = llm.llm_engine
        self._params = params
        self._requests: list[str] = []
        self._count = 0
        self._last: dict[str, list[int]] = {}

    def prepare(self, prompts, room) -> None:
        if self._requests:
            self._engine.abort_request(self._requests)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._room = room
        self._requests = [f"{self._count}-{row}" for row in range(len(prompts))]
        self._count += 1
        self._last = {}

    def prefill(self, prompts) -> None:
        params = self._params(temperature=0.0, max_tokens=self._room + 1, ignore_eos=True)
        params.detokenize = False
        for name, prompt in zip(self._requests, prompts):
            self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while len(self._last) < len(prompts):  # a long prompt takes several steps
            self._step()

    def decode(self, steps) -> None:
        wanted = {name: len(tokens) + steps for name, tokens in self._last.items()}
        while any(len(self._last[name]) < count for name, count in wanted.items()):
            self._step()

    def tokens(self) -> list[int]:
        return [self._last[name][0] for name in self._requests]

    def _step(self) -> None:
        for output in self._engine.step():
            if output.outputs and output.outputs[0].token_ids:
                self._last[output.request_id] = output.outputs[0].token_ids


def load():
    import torch
    import vllm

    settings = {
        "model": folder,
        "dtype": "bfloat16",
        "max_model_len": max_length,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,  # a prompt again is a prompt to be run again
        "kv_cache_memory_bytes": kv_bytes,
        "max_num_batched_tokens": max(512, min(max_length, 8192)),
        "seed": 0,
    }
    mode = "compiled"
    try:
        llm = vllm.LLM(**settings)
    except Exception as error:  # no compiler, or one that inductor cannot use
        print(f"compiling failed, running eager: {error}", file=sys.stderr)
        mode = "eager: compiling failed"
        llm = vllm.LLM(**settings, enforce_eager=True)
    torch.set_num_threads(threads)
    said = {"vllm": vllm.__version__, "torch": torch.__version__, "mode": mode, "threads": threads}
    return Engine(llm, vllm.SamplingParams), said


if __name__ == "__main__":
    from serve import serve

    serve(load)
