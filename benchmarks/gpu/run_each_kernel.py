"""Runs every kernel a few times on small shapes: what compute-sanitizer watches.

Results are compared with the float64 reference loosely, so that a run that computes nothing does
not pass; how exact they are is for tests/kernels. Inputs are made on the CPU: few kernels of
others are launched.
"""

from __future__ import annotations

import argparse
import sys

import torch

import nbl_kernels as nk
from benchmarks.gpu.devices import DEVICES

EPS = 1e-6
# (rows, K, N): one row and many, with and without vector loads, more than one block each way.
LINEAR_SHAPES = [(1, 136, 72), (1, 37, 19), (3, 264, 40), (9, 45, 33), (16, 520, 136), (17, 72, 72)]
GRAM_SHAPES = [(70, 48, 40), (131, 136, 24), (40, 33, 17), (300, 257, 130)]  # (tokens, d_f, d_t)
# (heads, kv_heads, head_dim, rotated): whole warps and parts of one, with and without 16 bytes.
ROPE_SHAPES = [(6, 2, 128, 128), (3, 1, 80, 32), (2, 1, 45, 30)]
# (tokens, K, r): one chunk and several, whole blocks of channels and parts of one
MEMORY_SHAPES = [(1, 64, 64), (5, 33, 7), (150, 40, 66)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def check(name: str, actual: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    error = float((actual.cpu().double() - exact).norm() / exact.norm())
    if not error <= tolerance:
        sys.exit(f"{name}: relative error {error:.1e}, expected at most {tolerance:.0e}")


def run_linears(device: str, name: str) -> None:
    for m, k, n in LINEAR_SHAPES:
        for dtype in DTYPES:
            x, w = torch.randn(m, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
            g, b, r = (torch.randn(*shape).to(dtype) for shape in ((k,), (n,), (m, n)))
            tolerance = 4 * torch.finfo(dtype).eps + 1e-5
            calls = {
                "residual_linear": ((x, w, b, r), {"norm_weight": g}),
                "norm_linear": ((x, g, w, b), {}),
                "norm_swiglu": ((x, g, torch.cat([w, w.flip(0)])), {}),
            }
            for op, (args, kwargs) in calls.items():
                moved = {k: t.to(device) for k, t in kwargs.items()}
                out = getattr(nk, op)(*(t.to(device) for t in args), **moved, norm_eps=EPS)
                doubles = {k: t.double() for k, t in kwargs.items()}
                reference = getattr(nk, f"{op}_ref")
                exact = reference(*(t.double() for t in args), **doubles, norm_eps=EPS)
                check(f"{op}, {name}, {dtype}, {(m, k, n)}", out, exact, tolerance)


def run_quantized_linears(device: str, name: str) -> None:
    for m, k, n in LINEAR_SHAPES:
        for dtype in DTYPES:
            for format in ("int8", "fp8", "int4"):
                x, g, r = (torch.randn(*shape).to(dtype) for shape in ((m, k), (k,), (m, n)))
                weight, scale = nk.quantize(torch.randn(n, k) / k**0.5, format)
                gate_up, gate_up_scale = nk.quantize(torch.randn(2 * n, k) / k**0.5, format)
                tolerance = 8 * torch.finfo(dtype).eps + 1e-5
                calls = {
                    "residual_linear": ((x, weight, None, r), scale),
                    "norm_linear": ((x, g, weight), scale),
                    "norm_swiglu": ((x, g, gate_up), gate_up_scale),
                }
                for op, (args, s) in calls.items():
                    moved = (t if t is None else t.to(device) for t in args)
                    out = getattr(nk, op)(*moved, norm_eps=EPS, weight_scale=s.to(device))
                    doubles = (
                        t.double() if t is not None and t.dtype == dtype else t for t in args
                    )
                    exact = getattr(nk, f"{op}_ref")(*doubles, norm_eps=EPS, weight_scale=s)
                    check(f"{op}, {format}, {name}, {dtype}, {(m, k, n)}", out, exact, tolerance)


def run_covariances(device: str, name: str) -> None:
    for tokens, d_f, d_t in GRAM_SHAPES:
        for dtype in DTYPES:
            f, t = (torch.randn(tokens, d).add(3).to(dtype) for d in (d_f, d_t))
            block, mask = f * 2, torch.rand(tokens) < 0.8
            acc = nk.CovarianceAccumulator(d_f, d_t, block_dim=d_f, device=device)
            acc.update(*(v.to(device) for v in (f, t, block)), mask=mask.to(device))
            exact = nk.covariance_update_ref(f, t, block, mask)
            state = acc.state_dict()
            for pair in ("ff", "tf", "tt", "bf", "bb"):
                actual, expected = state[f"gram_{pair}"].cpu(), exact[f"sum_{pair}"]
                if pair[0] == pair[1]:  # the upper triangle is what is kept
                    actual, expected = actual.triu(), expected.triu()
                check(f"gram_{pair}, {name}, {dtype}", actual, expected, 1e-6)


def run_ropes(device: str, name: str) -> None:
    for heads, kv_heads, dim, rotated in ROPE_SHAPES:
        for dtype in DTYPES:
            norm = torch.rand(2, dim).add(0.5).to(dtype)
            inputs = {
                "qkv": torch.randn(2, 5, heads + 2 * kv_heads, dim).to(dtype),
                "cos": torch.randn(9, rotated // 2),
                "sin": torch.randn(9, rotated // 2),
                "positions": torch.randint(0, 9, (2, 5)),
                "slots": torch.tensor([[3, 0, 5, -1, 7], [-1, 1, 2, 0, 6]]),
                "key_cache": torch.zeros(3, kv_heads, 8, dim, dtype=dtype),
                "value_cache": torch.zeros(3, kv_heads, 8, dim, dtype=dtype),
                "q_norm_weight": norm[0],
                "k_norm_weight": norm[1],
            }
            moved = {k: t.to(device) for k, t in inputs.items()}
            q = nk.rope_append(**moved, norm_eps=EPS)
            exact = {k: t.double() if t.dtype == dtype else t for k, t in inputs.items()}
            exact_q = nk.rope_append_ref(**exact, norm_eps=EPS)
            about, tolerance = f"{name}, {dtype}, {dim}", 4 * torch.finfo(dtype).eps + 1e-5
            check(f"rope_append, {about}", q, exact_q, tolerance)
            for cache in ("key_cache", "value_cache"):
                check(f"{cache}, {about}", moved[cache], exact[cache], tolerance)


def run_memories(device: str, name: str) -> None:
    for tokens, k, r in MEMORY_SHAPES:
        for dtype in DTYPES:
            inputs = {
                "x": torch.randn(2, tokens, k).to(dtype),
                "weight_v": (torch.randn(5 * r, k) / k**0.5).to(dtype),
                "residual": torch.randn(2, tokens, r).to(dtype),
                "bias": torch.randn(r).to(dtype),
                "state": torch.randn(2, 6, r),
                "history": torch.zeros(2, min(tokens, 3), 6, r),
                "mask": torch.rand(2, tokens) < 0.7,
                "starts": torch.rand(2, tokens) < 0.1,
            }
            filters = {"lags": (1, 3), "decays": (0.6, 0.95)}
            exact = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
            exact_out = nk.memory_scan_ref(**exact, **filters)
            moved = {k: t.to(device) for k, t in inputs.items()}
            out = nk.memory_scan(**moved, **filters)
            about, tolerance = f"{name}, {dtype}, {(tokens, k, r)}", 8 * torch.finfo(dtype).eps
            check(f"memory_scan, {about}", out, exact_out, tolerance + 1e-5)
            for written in ("state", "history"):
                check(f"{written}, {about}", moved[written], exact[written], tolerance + 1e-5)


def run_all_linears(device: str, name: str) -> None:
    run_linears(device, name)
    run_quantized_linears(device, name)


RUNS = {
    "linear": run_all_linears,
    "covariance": run_covariances,
    "rope": run_ropes,
    "memory": run_memories,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--op", choices=RUNS, action="append", help="default: all")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = DEVICES[arguments.device]()
    for op in arguments.op or RUNS:
        for path in device.paths(op):
            if path == "plain":  # kernels of others
                continue
            device.use_path(op, path)
            RUNS[op](device.device, path)
            device.synchronize()
            print(f"{op}: {path} ran", flush=True)


if __name__ == "__main__":
    main()
