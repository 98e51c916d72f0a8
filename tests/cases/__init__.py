"""Of each operator: inputs that are hard on it, and what must come out, in float64. Shared by the
tests of its CPU and CUDA kernels and by those that run the CUDA kernels under sanitizers."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["int8", "fp8", "int4"]  # of quantized weights
