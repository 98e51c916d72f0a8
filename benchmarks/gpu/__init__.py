"""The parts of `python -m benchmarks.gpu_report`."""
