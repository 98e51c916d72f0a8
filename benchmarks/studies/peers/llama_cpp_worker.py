"""llama.cpp, batch by batch: python llama_cpp_worker.py GGUF THREADS FLASH.

FLASH: 0 or 1, flash attention. The calls are those of llama.cpp's own C API (llama_decode), so that
nothing of the Python package is in what is timed but an argmax and the filling of a batch.
"""

import sys

import numpy as np

path = sys.argv[1]
threads, flash = map(int, sys.argv[2:])


class Engine:
    def __init__(self, api, model) -> None:
        self._api, self._model = api, model
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._sizes = self._context = self._batch = None

    def prepare(self, prompts, room) -> None:
        api, rows, length = self._api, len(prompts), len(prompts[0])
        if self._sizes != (rows, length + room):
            self._close()
            self._sizes = (rows, length + room)
            params = api.llama_context_default_params()
            params.n_ctx = rows * (-(-(length + room) // 256) * 256)
            params.n_seq_max = rows
            params.n_batch = params.n_ubatch = max(512, min(rows * length, 2048))
            params.n_threads = params.n_threads_batch = threads
            if hasattr(params, "flash_attn_type"):
                params.flash_attn_type = flash
            else:
                params.flash_attn = bool(flash)
            params.no_perf = True
            self._context = api.llama_init_from_model(self._model, params)
            if not self._context:
                raise RuntimeError(f"llama.cpp made no context for {rows} x {length + room} tokens")
            self._n_batch = params.n_batch
            self._batch = api.llama_batch_init(self._n_batch, 0, 1)
        api.llama_memory_clear(api.llama_get_memory(self._context), False)
        self._next = np.zeros(rows, dtype=np.int64)
        self._position = 0

    def prefill(self, prompts) -> None:
        for row, prompt in enumerate(prompts):
            for start in range(0, len(prompt), self._n_batch):
                part = prompt[start : start + self._n_batch]
                is_last = start + len(part) == len(prompt)
                entries = [(token, start + i, row) for i, token in enumerate(part)]
                self._run(entries, wanted=[len(part) - 1] if is_last else [])
            self._next[row] = self._best(-1)
        self._position = len(prompts[0])

    def decode(self, steps) -> None:
        rows = range(len(self._next))
        for _ in range(steps):
            entries = [(int(self._next[row]), self._position, row) for row in rows]
            self._run(entries, wanted=rows)
            for row in rows:
                self._next[row] = self._best(row)
            self._position += 1

    def tokens(self) -> list[int]:
        return self._next.tolist()

    def _run(self, entries, wanted) -> None:
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, row) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = 0
        for i in wanted:
            batch.logits[i] = 1
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _best(self, index: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())

    def _close(self) -> None:
        if self._context:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
            self._context = None


def load():
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.use_mmap = False  # weights in memory of their own, read before anything is timed
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot read {path}")
    info = llama_cpp.llama_print_system_info().decode()
    said = {"llama_cpp_python": llama_cpp.__version__, "system": info, "flash_attention": flash}
    return Engine(llama_cpp, model), said | {"threads": threads}


if __name__ == "__main__":
    from serve import serve

    serve(load)
