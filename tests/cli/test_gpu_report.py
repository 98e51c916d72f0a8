"""benchmarks/gpu_report.py without a GPU: its dry run, its refusal, what it makes of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = ("linear", "covariance", "memory", "rope", "lmmse")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("runs from the source folder only", allow_module_level=True)

sys.path.insert(0, str(BENCHMARKS.parent))
from benchmarks.gpu import report  # noqa: E402

sys.path.remove(str(BENCHMARKS.parent))


def run_report(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_report.py"), *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_a_gpu_nothing_is_run_or_written(tmp_path):
    done = run_report("--output", str(tmp_path / "results"))
    assert done.returncode == 2
    assert "needs a GPU" in done.stderr and "nothing was run" in done.stderr
    assert not (tmp_path / "results").exists()


def test_arguments_are_checked_by_name(tmp_path):
    for arguments, message in [
        (("--only", "tests,play"), "--only must name stages of build"),
        (("--wheel", str(tmp_path / "none.whl")), "--wheel must be a file"),
        (("--minutes", "0"), "--minutes must be positive"),
    ]:
        done = run_report(*arguments)
        assert done.returncode == 2 and message in done.stderr


def test_dry_run_writes_marked_files(tmp_path):
    done = run_report(
        "--device", "cpu", "--only", "tests,sanitizer,bench,decode", "--output", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    json_file, markdown_file = sorted(tmp_path.iterdir())
    assert json_file.name.startswith("dry-run-") and markdown_file.suffix == ".md"
    result = json.loads(json_file.read_text())
    assert result["dry_run"] is True
    assert result["environment"]["torch"] == torch.__version__
    stages = {stage["name"]: stage["status"] for stage in result["stages"]}
    assert stages == {
        "tests rope": "ok",
        "tests interop": "skipped",
        "memcheck": "ok",
        "racecheck": "ok",
        **{f"bench {file}": "ok" for file in FILES},
        "decode": "ok",
    }
    names = [stage["name"] for stage in result["stages"]]
    assert names.index("bench linear") < names.index("decode") < names.index("bench covariance")
    benchmarks = {row["benchmark"] for row in result["rows"]}
    assert benchmarks == {*report.SWITCHES, "solve + bound"}
    assert all(row["us"] > 0 and row["error"] < 1e-2 for row in result["rows"])
    engines = {row["engine"] for case in result["decode"] for row in case["rows"]}
    assert {"ours dense", "ours NBL-2"} <= engines
    text = markdown_file.read_text()
    assert "| 64 | ours NBL-2 |" in text
    assert text.startswith("# DRY RUN on a CPU: no result of any GPU")
    assert "| met |" not in text and "| missed |" not in text
    assert "DRY RUN, no GPU result" in done.stdout


def test_a_stage_out_of_time_does_not_stop_the_others(tmp_path):
    done = run_report(
        "--device", "cpu", "--only", "sanitizer,bench,decode", "--output", str(tmp_path),
        "--minutes", "0.001",
    )  # fmt: skip
    assert done.returncode == 1
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    stages = {stage["name"]: stage["status"] for stage in result["stages"]}
    files = {f"bench {file}": "timeout" for file in FILES}
    assert stages == {"memcheck": "timeout", "racecheck": "timeout", "decode": "timeout", **files}
    assert result["rows"] == []


def test_a_broken_package_is_reported(tmp_path):
    broken = tmp_path / "broken.whl"
    broken.write_text("no wheel")
    wheel = os.path.relpath(broken)  # pip runs in another folder
    done = run_report("--device", "cpu", "--wheel", wheel, "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    result = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    (stage,) = result["stages"]
    assert (stage["name"], stage["status"]) == ("build", "failed") and stage["log"]
    assert not any("No such file" in line for line in stage["log"])


def row(benchmark: str, shape: str, path: str, us: float, **changes) -> dict:
    values = {
        "benchmark": benchmark,
        "shape": shape,
        "dtype": "bfloat16",
        "path": path,
        "us": us,
        "spread_percent": 1.0,
        "call_us": us + 5,
        "rate": 2800.0,
        "unit": "GB/s",
        "limit": 3000.0,
        "limit_name": "copy bandwidth",
        "percent_of_limit": 93.3,
        "best_pytorch": "compiled, graph",
        "best_pytorch_us": 15.0,
        "speedup": 15.0 / us,
        "speedup_of_calls": 20.0 / (us + 5),
        "error": 2e-3,
        "pytorch_error": 2e-3,
        "pytorch_us": {"eager": 20.0, "compiled, graph": 15.0},
        "others_us": {},
    }
    return values | changes


ROWS = [
    row("residual_linear", "1x4096x4096", "plain", 16.0),
    row("residual_linear", "1x4096x4096", "kernel", 12.0),
    row("residual_linear", "1x8192x8192", "kernel", 14.0, percent_of_limit=91.0),
    row("residual_linear", "1x8192x8192", "plain", 13.0),
    row("residual_linear", "17x8192x8192", "kernel", 14.0, error=0.3),  # wrong, so not the fastest
    row("residual_linear", "17x8192x8192", "plain", 15.0),
    row("covariance", "8192x4096", "portable", 9.0, error=2e-7, speedup=1.75),
    row("covariance", "8192x4096", "hopper", 7.0, error=2e-7, speedup=2.0),
    row("covariance", "16384x4096", "hopper", 7.0, error=3e-6, speedup=1.8),
    {"benchmark": "solve + bound", "shape": "4096", "dtype": "float64", "path": "kernel",
     "failed": "out of memory"},
    row("quantized_linear", "1x4096x4096 int4", "kernel", 4.0),
    row("quantized_linear", "512x4096x4096 int4", "kernel", 4.0),
    row("quantized_linear", "4x4096x4096 int8", "kernel", 6.5),
]  # fmt: skip


SWEEP = [
    {"m": 1, "d": 4096, "products": "fma", "rows": rows, "tokens": 1, "unroll": 1, "splits": 2,
     "rule": True, "right": right, "us": us, "gb_per_s": 3050}
    for rows, right, us in ((4, True, 12.0), (8, True, 11.0), (2, False, 9.0))
]  # fmt: skip


def test_targets_are_judged_by_the_worst_row_of_each_path():
    judged = {(t["name"], t["path"]): t for t in report.targets(ROWS)}

    def find(words: str, path: str | None) -> dict:
        (found,) = (t for (name, p), t in judged.items() if words in name and p == path)
        return found

    bandwidth = find("M=1,", "kernel")
    assert bandwidth["passed"] is False and bandwidth["measured"].startswith("91.0 %")
    assert find("M=16,", None)["passed"] is None
    assert find("against the best", "kernel")["passed"] is True
    assert find("both called from Python", "kernel")["passed"] is False
    assert find("N ≥ 8192", "hopper")["passed"] and find("N ≥ 8192", "portable")["passed"]
    assert find("covariance update, error", "portable")["passed"] is True
    error = find("covariance update, error", "hopper")
    assert error["passed"] is False and error["measured"] == "3.0e-06 (16384x4096)"
    assert not any(path == "plain" for _, path in judged), "PyTorch itself is not judged"
    assert find("decode, 8B shape", None)["passed"] is None


def test_suggested_paths_are_the_fastest_of_the_right_ones():
    suggested = report.suggested_paths(ROWS)
    assert suggested["linear"]["fastest"] == {
        "residual_linear 1x4096x4096 bfloat16": "kernel",
        "residual_linear 1x8192x8192 bfloat16": "plain",
        "residual_linear 17x8192x8192 bfloat16": "plain",
    }
    assert suggested["linear"]["path"] == "plain"  # the kernel is not right everywhere
    assert suggested["covariance"]["fastest"] == {"covariance 8192x4096 bfloat16": "hopper"}


def test_quantized_weights_stand_beside_bfloat16_and_what_the_bytes_predict():
    lines = report.quantized_table(ROWS)[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 1x4096x4096", "| 4x4096x4096"]
    assert "| int4 | kernel | 4.0 | 12.0 | 3.00 | 3.87 |" in lines[0]  # 16 / 4.125, and x
    assert "| int8 | kernel | 6.5 |  |  | 1.99 |" in lines[1]  # there is no such row in bfloat16


def test_report_shows_what_was_not_measured():
    result = {
        "dry_run": False,
        "date": "2026-01-01T00:00:00",
        "tree": "commit 0",
        "command": "",
        "environment": {"device": "GPU", "nvidia_smi": {"clocks.sm": "1980 MHz"}},
        "limits": report.limits(ROWS),
        "stages": [
            {"name": "build", "status": "ok", "seconds": 60.0, "detail": "a | b", "log": []}
        ],
        "targets": report.targets(ROWS),
        "suggested_paths": report.suggested_paths(ROWS),
        "rows": ROWS,
        "decode": [],
        "sweep": SWEEP,
    }
    text = report.markdown(result)
    assert "out of memory" in text and "a \\| b" in text and "1980 MHz" in text
    assert "| missed |" in text and "| met |" in text and "DRY RUN" not in text
    assert report.limits(ROWS) == {"copy bandwidth": "3000 GB/s (3000 to 3000)"}
    assert "| 1 | 4096 | fastest | fma, 8 rows, 1 tokens, unroll 1 | 2 | 11.00 | 3050 |" in text
    assert "| 1 | 4096 | in the table | fma, 4 rows" in text and "1 of 3 gave other results" in text
    table = report.short_table(result)
    assert "fastest paths: linear=plain,covariance=hopper" in table
