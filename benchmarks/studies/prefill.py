"""Prefill: prompt tokens per second, ours beside everyone else and the ceiling.

One run, the same threads, weights and prompt for all, a real KV cache; engines take turns,
repetition by repetition, and medians are shown. The ceiling: FLOPs over the best matmul rate
that the same run measured, of bfloat16 or float32.

    python -m benchmarks.studies.prefill --llama-cpp-python L/bin/python --vllm-python V/bin/python
    python -m benchmarks.studies.prefill --device cuda
    python -m benchmarks.studies.prefill --shape small --engines eager,nbl --layers 2 --json none

benchmarks/studies/engines.py says how to make the peers' environments.
"""

from benchmarks.studies import engines

if __name__ == "__main__":
    engines.run("prefill", engines.arguments("prefill", __doc__, repetitions=5))
