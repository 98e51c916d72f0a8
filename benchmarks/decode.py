"""Decode: tokens per second, one after another, ours beside everyone else and the ceiling.

One run, the same threads, weights and prompt for all, a real KV cache; engines take turns,
repetition by repetition, and medians are shown. The ceiling: bytes (weights, keys and values)
over the best read bandwidth that the same run measured.

    python benchmarks/decode.py --llama-cpp-python LLAMA/bin/python --vllm-python VLLM/bin/python
    python benchmarks/decode.py --device cuda
    python benchmarks/decode.py --shape small --engines eager,dense,nbl --layers 2 --json none

benchmarks/engines.py says how to make the peers' environments.
"""

import engines

if __name__ == "__main__":
    engines.run("decode", engines.arguments("decode", __doc__, repetitions=7))
