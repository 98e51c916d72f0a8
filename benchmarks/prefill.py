"""Prefill: prompt tokens per second, ours beside everyone else and the ceiling.

One run, the same threads, weights and prompt for all, a real KV cache; engines take turns,
repetition by repetition, and medians are shown. The ceiling: FLOPs over the best matmul rate
that the same run measured, of bfloat16 or float32.

    python benchmarks/prefill.py --llama-cpp-python LLAMA/bin/python --vllm-python VLLM/bin/python
    python benchmarks/prefill.py --device cuda
    python benchmarks/prefill.py --shape small --engines eager,dense,nbl --layers 2 --json none

benchmarks/engines.py says how to make the peers' environments.
"""

import engines

if __name__ == "__main__":
    engines.run("prefill", engines.arguments("prefill", __doc__, repetitions=5))
