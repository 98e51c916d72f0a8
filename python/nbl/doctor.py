"""What is installed, what runs here and why not: the findings that `nbl doctor` prints."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Literal

import torch

from nbl_kernels import __version__

from . import selfcheck, upstream

__all__ = [
    "conditions",
    "diagnose",
    "self_check",
    "versions",
]

OPTIONAL = {
    "matplotlib": "nbl report, plots of nbl bench",
    "datasets": "--text dataset:NAME",
    "cupy": "CuPy arrays as arguments",
    "flashinfer": "attention of nbl.Runner on a GPU",
    "vllm": "serving",
    "gguf": "llama.cpp files",
    "peft": "LoRA",
    "torchao": "quantization",
    "lm_eval": "evaluation tasks",
}


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; only "problem" means that something is broken."""

    status: Literal["ok", "note", "problem"]
    name: str
    detail: str


def diagnose() -> dict:
    """{"ok": no problem found, "build": build_info, "versions": ..., "findings": [...]}."""
    findings = [*_environment()]
    build: dict = {}
    try:
        import nbl_kernels

        build = nbl_kernels.build_info()
    except Exception as error:
        findings.append(Finding("problem", "nbl_kernels", f"cannot be imported: {error}"))
    else:
        findings += [*_build(build), *self_check()]
    return {
        "ok": all(finding.status != "problem" for finding in findings),
        "versions": versions(),
        "build": build,
        "findings": [asdict(finding) for finding in findings],
    }


def versions() -> dict[str, str | None]:
    """{package: version, or None where it is not installed}."""
    return {
        "python": platform.python_version(),
        "nbl": __version__,
        **{name: _version(name) for name in ("torch", "transformers", *OPTIONAL)},
    }


def conditions(device: str = "cpu", dtype: str = "") -> dict:
    """What a measurement needs beside it to mean something."""
    found = versions()
    on_gpu = device.startswith("cuda")
    return {
        **{name: found[name] for name in ("nbl", "python", "torch", "transformers")},
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "dtype": dtype,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def self_check(seed: int = 0) -> Iterator[Finding]:
    """Every op against its reference in float64, on small random inputs.

    An op passes when its error is at most twice that of the same formula in plain PyTorch and the
    same dtype, plus one rounding of the result.
    """
    import nbl_kernels as nk

    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 5, 40):
            x, gamma, bias = random(rows, 96), random(96), random(96)
            weight, gate_up = random(96, 96) / 10, random(2 * 160, 96) / 10
            cases = {
                "residual_linear": (x, weight, bias),
                "norm_linear": (x, gamma, weight, bias),
                "norm_swiglu": (x, gamma, gate_up),
            }
            for name, arguments in cases.items():
                arguments = [argument.to(dtype) for argument in arguments]
                # A line for each dtype and size would be a wall: only failures are told apart.
                problem = _compare(getattr(nk, name), getattr(nk, name + "_ref"), arguments)
                if problem:
                    where = f"{name} ({str(dtype).removeprefix('torch.')}, {rows} rows)"
                    yield Finding("problem", where, problem)
                elif dtype == torch.float16 and rows == 40:
                    yield Finding("ok", name, "agrees with its reference")
    yield from _check_statistics(nk, random)


def _check_statistics(nk: ModuleType, random: Callable) -> Iterator[Finding]:
    """The accumulator, the solver and the bound, on correlated bfloat16 activations."""
    features = (random(400, 24) @ random(24, 24) + 3).bfloat16()
    targets = (features.float() @ random(24, 24) / 10 + random(400, 24)).bfloat16()
    f, t = (x.double() - x.double().mean(0) for x in (features, targets))
    cov_ff, cov_tf, cov_tt = f.T @ f / 399, t.T @ f / 399, t.T @ t / 399
    # The solver and the bound are judged on exact moments, so that each op is to blame for itself.
    exact = nk.Moments(
        count=400,
        mean_features=features.double().mean(0),
        mean_targets=targets.double().mean(0),
        cov_ff=cov_ff,
        cov_tf=cov_tf,
        cov_tt=cov_tt,
    )

    def covariance() -> tuple[torch.Tensor, torch.Tensor]:
        accumulator = nk.CovarianceAccumulator(24, 24)
        accumulator.update(features[:150], targets[:150])
        accumulator.update(features[150:], targets[150:])
        found = accumulator.moments()
        return (
            torch.stack([found.cov_ff, found.cov_tf, found.cov_tt]),
            torch.stack([cov_ff, cov_tf, cov_tt]),
        )

    def solve() -> tuple[torch.Tensor, torch.Tensor]:
        weight, nmse = nk.lmmse_solve_ref(cov_ff, cov_tf, cov_tt, ridge=1e-4)
        found = nk.lmmse_solve(exact, ridge=1e-4)
        return torch.cat([found.weight.flatten(), found.nmse.reshape(1)]), torch.cat(
            [weight.flatten(), nmse.reshape(1)]
        )

    def bound() -> tuple[torch.Tensor, torch.Tensor]:
        expected = nk.cca_bound_ref(cov_ff, cov_tf + cov_ff, cov_tt + cov_tf + cov_tf.T + cov_ff)
        return nk.cca_bound(exact).reshape(1), expected.reshape(1)

    for name, check, allowed in (
        ("CovarianceAccumulator", covariance, 1e-6),
        ("lmmse_solve", solve, 1e-8),
        ("cca_bound", bound, 1e-8),
    ):
        try:
            found, expected = check()
            error = float((found.double() - expected).norm() / expected.norm())
        except Exception as exception:
            yield Finding("problem", name, f"{type(exception).__name__}: {exception}")
            continue
        if error <= allowed:
            yield Finding("ok", name, "agrees with its reference")
        else:
            yield Finding(
                "problem",
                name,
                f"expected a relative error of at most {allowed:.0e}, got {error:.1e}",
            )


def _compare(op: Callable, reference: Callable, arguments: list[torch.Tensor]) -> str | None:
    """What is wrong, or None."""
    exact = reference(*(argument.double() for argument in arguments))
    plain = reference(*arguments)
    try:
        found = op(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if found.shape != exact.shape or found.dtype != plain.dtype:
        return (
            f"expected {tuple(exact.shape)} {plain.dtype}, got {tuple(found.shape)} {found.dtype}"
        )
    rounding = torch.finfo(plain.dtype).eps * float(exact.abs().max())
    allowed = 2 * float((plain.double() - exact).abs().max()) + rounding
    error = float((found.double() - exact).abs().max())
    if error <= allowed:
        return None
    return f"expected an error of at most {allowed:.1e}, got {error:.1e}"


def _environment() -> Iterator[Finding]:
    found = versions()
    yield Finding("ok", "python", found["python"])
    yield Finding("ok", "torch", found["torch"])
    yield (
        Finding("ok", "transformers", found["transformers"])
        if upstream.is_tested()
        else Finding(
            "note", "transformers", f"{found['transformers']}, tested {upstream.tested_range()}"
        )
    )
    wrong = selfcheck.differences()
    yield Finding(
        "problem" if wrong else "ok",
        "nbl with transformers",
        "; ".join(wrong) or "a small model's cached steps, generate and fused layers agree",
    )
    yield Finding(
        "ok",
        "processor",
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used by torch",
    )
    if torch.cuda.is_available():
        yield Finding("ok", "GPU", torch.cuda.get_device_name())
    else:
        yield Finding("note", "GPU", f"none in use: {_cuda_reason()}")
    for name, use in OPTIONAL.items():
        version = found[name]
        yield Finding(
            "ok" if version else "note", name, version or f"not installed (only for: {use})"
        )


def _build(build: dict) -> Iterator[Finding]:
    """nbl_kernels.build_info(), a line for each entry that the lines above do not have."""
    for key, value in build.items():
        if key in ("python", "torch", "threads", "cuda") or value in (None, "", [], {}):
            continue
        if isinstance(value, dict):
            value = [f"{name}: {entry}" for name, entry in value.items()]
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        absent = key == "cuda_reason" and not build.get("cuda")
        yield Finding("note" if absent else "ok", f"nbl_kernels: {key.replace('_', ' ')}", shown)


def _cuda_reason() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()
        except Exception as error:
            return str(error).splitlines()[0]
    return "no device found"


def _version(name: str) -> str | None:
    """The installed version; "installed" where it is packaged under another name than its own."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed" if importlib.util.find_spec(name) else None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
