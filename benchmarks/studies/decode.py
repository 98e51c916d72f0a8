"""Decode: tokens per second, one after another, ours beside everyone else and the ceiling.

One run, the same threads, weights and prompt for all, a real KV cache; engines take turns,
repetition by repetition, and medians are shown. The ceiling: bytes (weights, keys and values)
over the best read bandwidth that the same run measured.

    python -m benchmarks.studies.decode --llama-cpp-python L/bin/python --vllm-python V/bin/python
    python -m benchmarks.studies.decode --device cuda
    python -m benchmarks.studies.decode --shape small --engines eager,nbl --layers 2 --json none

benchmarks/studies/engines.py says how to make the peers' environments.
"""

from benchmarks.studies import engines

if __name__ == "__main__":
    engines.run("decode", engines.arguments("decode", __doc__, repetitions=7))
