"""Kernels for linearizing attention: skinny linears, with a memory too, RoPE, covariances, solves.

Needs torch only. Every function here is also an operator, ``torch.ops.nbl.*``, with a plain PyTorch
specification, ``*_ref``. The kernels are in ``csrc/include/nbl``.
"""

from nbl_kernels import _ops
from nbl_kernels._build_info import build_info, cuda_paths, include_dir, set_cuda_path
from nbl_kernels._version import __version__
from nbl_kernels.covariance import CovarianceAccumulator, Moments
from nbl_kernels.linear import norm_linear, norm_swiglu, residual_linear
from nbl_kernels.lmmse import Lmmse, canonical_correlations, cca_bound, lmmse_solve
from nbl_kernels.memory import memory_linear, memory_scan
from nbl_kernels.memory_moments import MemoryAccumulator, memory_features
from nbl_kernels.pages import use_huge_pages
from nbl_kernels.quantization import dequantize, quantize
from nbl_kernels.reference import (
    canonical_correlations_ref,
    cca_bound_ref,
    covariance_update_ref,
    lmmse_solve_ref,
    memory_linear_ref,
    memory_scan_ref,
    norm_linear_ref,
    norm_swiglu_ref,
    residual_linear_ref,
    rope_append_ref,
)
from nbl_kernels.rope import rope_append, rope_tables

__all__ = [
    "CovarianceAccumulator",
    "Lmmse",
    "MemoryAccumulator",
    "Moments",
    "__version__",
    "build_info",
    "canonical_correlations",
    "canonical_correlations_ref",
    "cca_bound",
    "cca_bound_ref",
    "covariance_update_ref",
    "cuda_paths",
    "dequantize",
    "include_dir",
    "lmmse_solve",
    "lmmse_solve_ref",
    "memory_features",
    "memory_linear",
    "memory_linear_ref",
    "memory_scan",
    "memory_scan_ref",
    "norm_linear",
    "norm_linear_ref",
    "norm_swiglu",
    "norm_swiglu_ref",
    "quantize",
    "residual_linear",
    "residual_linear_ref",
    "rope_append",
    "rope_append_ref",
    "rope_tables",
    "set_cuda_path",
    "use_huge_pages",
]
del _ops
