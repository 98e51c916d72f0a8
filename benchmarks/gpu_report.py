"""Builds, tests and times everything on a GPU, in one command that needs no network.

    python -m benchmarks.gpu_report

1. build      this source tree (or --wheel) into a temporary folder
2. tests      those of the operators and models, a process per area: a crash costs one area
   sanitizer  memcheck and racecheck of compute-sanitizer, on small shapes, meanwhile
3. bench      pytest --benchmark --benchmark-device cuda, a process per file
   decode     benchmarks/studies/decode.py of the 8B shape, with all kernels
4. a dated JSON and Markdown file in benchmarks/results, and a short table

A stage that fails or runs out of time is recorded as such, and the next one runs all the same;
--minutes bounds the whole. The exit status is 1 when one did, 0 when none did, 2 when there is no
GPU. `--device cpu` tries the report itself without a GPU, on tiny sizes; its
files are marked as a dry run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # as a file, `python benchmarks/gpu_report.py`
    sys.path[0] = str(ROOT)

from benchmarks import results  # noqa: E402
from benchmarks.gpu import report  # noqa: E402
from benchmarks.gpu.devices import DEVICES  # noqa: E402

STAGES = ("build", "tests", "sanitizer", "bench", "decode")
# One process each: what pytest is told beside the device.
AREAS = {
    "linear": ["kernels/test_linear.py", "kernels/test_quantization.py"],
    "covariance": ["kernels/test_covariance.py", "kernels/test_memory_moments.py"],
    "solve": ["kernels/test_lmmse.py"],
    "rope": ["kernels/test_rope.py"],
    "memory": ["kernels/test_memory.py"],
    "streams": ["kernels/test_cuda.py"],  # and graphs, large tensors, CuPy
    "model": ["models/test_cuda_models.py"],
    "interop": ["kernels/test_dlpack.py", "kernels/test_jit.py"],
}
DRY_AREAS = ("rope", "interop")
# When each part must have ended, as a share of --minutes; what is left over is for the next.
BUILD_END, CHECKS_END, BENCH_END, SWEEP_END = 0.42, 0.62, 0.97, 0.97
# The files of benchmarks and the decode of a whole model, what matters most first, and when each
# must have ended, as a share of BENCH_END.
BENCHMARKS = {
    "linear": 0.7,
    "decode": 0.85,
    "covariance": 0.9,
    "memory": 0.95,
    "rope": 1,
    "lmmse": 1,
}
BENCH_END_BEFORE_SWEEP = 0.8
LONGEST_CASE = 6.0  # seconds that the benchmarks may need after the last case has begun
BUILD_INFO = "import json, nbl_kernels as nk; print(json.dumps(nk.build_info()))"


@dataclass
class Stage:
    name: str
    status: str  # ok, failed, timeout, absent (a tool), skipped (every test of an area)
    seconds: float
    detail: str = ""
    log: list[str] = field(default_factory=list)  # the end of it, where the status is not ok


class Run:
    """The temporary folder, the clock, and the environment of the processes of one report."""

    def __init__(self, folder: Path, minutes: float, dry_run: bool) -> None:
        self.folder, self.dry_run = folder, dry_run
        self.start, self.seconds = time.monotonic(), 60 * minutes
        self.site = folder / "site"
        # Away from the sources, so that what is tested is what was built.
        self.away = folder / "away"
        self.away.mkdir()
        for name in ("tests", "benchmarks"):
            shutil.copytree(ROOT / name, self.away / name, ignore=shutil.ignore_patterns("results"))
        for name in ("conftest.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.away)

    def left(self, share: float) -> float:
        return self.start + share * self.seconds - time.monotonic()

    def process(
        self, name: str, command: list[str], timeout: float, **environment: str
    ) -> tuple[int | None, float, list[str]]:
        """(exit status or None when out of time, seconds, lines of output); ends all it started."""
        log = self.folder / f"{name.replace(' ', '-')}.log"
        path = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH")]))
        settings = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
        if self.dry_run:
            settings |= {"OMP_NUM_THREADS": "1"}
        settings["NBL_TEST_DEVICE"] = "cpu" if self.dry_run else "cuda"
        start = time.monotonic()
        with log.open("w") as out:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=self.away,
                    env=os.environ | settings,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                return 127, 0.0, [str(error)]
            try:
                status = process.wait(max(timeout, 0.1))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        lines = log.read_text(errors="replace").splitlines()
        return status, time.monotonic() - start, lines


def stage(name: str, status: int | None, seconds: float, lines: list[str], detail: str) -> Stage:
    said = {0: "ok", None: "timeout"}.get(status, "failed")
    return Stage(name, said, seconds, detail, [] if said == "ok" else lines[-60:])


def build(run: Run, wheel: Path | None) -> Stage:
    source = wheel
    if source is None:
        source = run.folder / "source"
        ignored = shutil.ignore_patterns(
            ".*", "*.so", "*.egg-info", "build", "dist", "__pycache__", "results", "shared"
        )
        shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "install", "-v", "--disable-pip-version-check"]
    command += ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(run.site)]
    insist = {} if run.dry_run else {"NBL_CUDA": "1"}
    status, seconds, lines = run.process(
        "build", [*command, str(source)], run.left(BUILD_END), **insist
    )
    detail = f"a wheel, {wheel.name}" if wheel else "the source tree"
    if status not in (0, None):
        errors = [line for line in lines if re.search(r"\berror\b|Error:", line)]
        detail += ": " + " / ".join(errors[:3] or lines[-3:])
    return stage("build", status, seconds, lines, detail)


def installed(run: Run) -> tuple[dict[str, object], Stage | None]:
    """What the package says of itself; a failed stage where it cannot be imported, or has no CUDA
    kernels."""
    status, seconds, lines = run.process("import", [sys.executable, "-c", BUILD_INFO], 120)
    if status != 0:
        return {}, stage("import", status, seconds, lines, " / ".join(lines[-2:]))
    info = json.loads(lines[-1])
    if not info["cuda"] and not run.dry_run:
        return info, Stage("import", "failed", seconds, f"no CUDA kernels: {info['cuda_reason']}")
    return info, None


def tests(run: Run, area: str) -> Stage:
    junit = run.folder / f"{area}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    # A device is in the ids of its tests; CuPy, and what a GPU alone has, in the names.
    named = "cpu or cupy" if run.dry_run else "cuda or cupy or gpu"
    command += [f"--junitxml={junit}", "-k", named, *(f"tests/{file}" for file in AREAS[area])]
    name = f"tests {area}"
    status, seconds, lines = run.process(name, command, run.left(CHECKS_END))
    detail = "no report: the process was ended or died"
    if junit.exists():
        suite = ET.parse(junit).getroot().find("testsuite")
        counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        bad = [
            case.get("name")
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
        detail = f"{passed} passed, {counts['skipped']} skipped"
        if bad:
            detail += f", {len(bad)} failed: {', '.join(bad[:5])}{' …' * (len(bad) > 5)}"
        if status == 0 and not passed:
            return Stage(name, "skipped", seconds, f"{detail}: {skip_reasons(suite)}")
    return stage(name, status, seconds, lines, detail)


def skip_reasons(suite: ET.Element) -> str:
    reasons = {e.get("message", "") for e in suite.iter("skipped")}
    return "; ".join(sorted(reasons))


def find_sanitizer() -> str | None:
    """On PATH, or in a toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    homes += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    folders = [f"{home}/{sub}" for home in homes if home for sub in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )


def sanitizer(run: Run, tool: str) -> Stage:
    script = [sys.executable, "-m", "benchmarks.gpu.run_each_kernel"]
    if run.dry_run:
        command = [*script, "--device", "dry"]
    else:
        found = find_sanitizer()
        if found is None:
            return Stage(tool, "absent", 0.0, "compute-sanitizer is not on PATH or in a toolkit")
        command = [found, "--tool", tool, "--error-exitcode", "9", "--print-limit", "30", *script]
    # Without PyTorch's pool every tensor is an allocation whose end memcheck knows.
    status, seconds, lines = run.process(
        tool, command, run.left(CHECKS_END), PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    ran = [line for line in lines if line.endswith(" ran")]
    summary = [line.strip("= ") for line in lines if "SUMMARY" in line]
    detail = "; ".join([*summary, *ran]) or " / ".join(lines[-2:])
    if run.dry_run:
        detail = f"without the sanitizer, which needs a GPU; {detail}"
    return stage(tool, status, seconds, lines, detail)


def bench(run: Run, file: str, end: float, compiled: bool) -> tuple[Stage, list[dict]]:
    """One file of benchmarks in a process of its own: what hangs or dies costs its rows alone."""
    name = f"bench {file}"
    rows_file = run.folder / f"{file}.jsonl"
    device = "dry" if run.dry_run else "cuda"
    minutes = max(0.0, run.left(end) - LONGEST_CASE) / 60
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--benchmark", f"--benchmark-device={device}", f"--benchmark-minutes={minutes}"]
    command += [f"--benchmark-results={rows_file}"]
    if compiled and not run.dry_run:
        command.append("--benchmark-compile")
    command.append(f"benchmarks/micro/test_{file}.py")
    status, seconds, lines = run.process(name, command, run.left(end))
    text = rows_file.read_text(encoding="utf-8") if rows_file.exists() else ""
    rows = json_lines(text.splitlines())
    totals = [line for line in lines if re.search(r"\d+ (passed|failed|skipped)", line)]
    detail = f"{len(report.measured(rows))} rows; {totals[-1].strip('= ') if totals else ''}"
    if status == 0 and not report.measured(rows):
        return Stage(name, "failed", seconds, f"{detail}: nothing was measured", lines[-60:]), []
    return stage(name, status, seconds, lines, detail), rows


def decode(run: Run, end: float) -> tuple[Stage, list[dict]]:
    """Tokens per second of the 8B shape, all paths ours, beside transformers and the ceiling."""
    file = run.folder / "decode.json"
    command = [sys.executable, "-m", "benchmarks.studies.decode"]
    command += ["--engines=eager,dense,nbl", "--batch=1"]
    command += [f"--json={file}", "--repeats=5"]
    if run.dry_run:
        command += ["--device=cpu", "--shape=small", "--context=64", "--layers=2"]
    else:
        command += ["--device=cuda", "--context=128,4096", "--layers=12"]
    status, seconds, lines = run.process(
        "decode", command, run.left(end), NBL_CUDA_PATHS="all=kernel"
    )
    cases = json.loads(file.read_text())["cases"] if file.exists() else []
    return stage("decode", status, seconds, lines, f"{len(cases)} contexts"), cases


def json_lines(lines: list[str]) -> list[dict]:
    """Those of lines that are whole objects: the last one may have been cut off."""
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def sweep(run: Run, compute_capability: str) -> tuple[Stage, list[dict]]:
    """Compiles and runs benchmarks/gpu/sweep.cu."""
    homes = [os.environ.get(name, "") + "/bin" for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(homes))
    if nvcc is None:
        return Stage("sweep", "absent", 0.0, "nvcc is not on PATH or in CUDA_HOME"), []
    arch = compute_capability.replace(".", "") + ("a" if float(compute_capability) >= 9 else "")
    program = run.folder / "sweep"
    command = [nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += [f"-I{ROOT / 'csrc' / 'include'}", "benchmarks/gpu/sweep.cu", "-o", str(program)]
    status, compiling, lines = run.process("sweep build", command, run.left(SWEEP_END))
    if status != 0:
        return stage("sweep", status, compiling, lines, "not compiled"), []
    limit = run.left(SWEEP_END)
    status, seconds, lines = run.process("sweep", [str(program), str(limit - 5)], limit)
    rows = json_lines(lines)
    wrong = sum(not row["right"] for row in rows)
    detail = f"{len(rows)} tiles and shapes, {wrong} of them wrong"
    return stage("sweep", status if not wrong else 1, compiling + seconds, lines, detail), rows


def tree(commit: str | None) -> str:
    """The commit, and whether the tree differs from it."""
    if commit:
        return f"commit {commit} (as told)"
    head, changed = results.tree()
    return "unknown commit" if head is None else f"commit {head}{' with local changes' * changed}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    description, _, more = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheel", type=Path, help="test this one instead of building the sources")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: 8)")
    parser.add_argument(
        "--only",
        default=",".join(STAGES),
        metavar="STAGES",
        help=f"of {','.join(STAGES)}; without build: the nbl_kernels this Python imports",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: dry run")
    parser.add_argument(
        "--sweep", action="store_true", help="also time other tiles of the skinny linear"
    )
    parser.add_argument(
        "--compile", action="store_true", help="time torch.compile of PyTorch's chains too: minutes"
    )
    parser.add_argument("--commit", help="what to write in place of what git says of the tree")
    arguments = parser.parse_args(argv)
    arguments.only = arguments.only.split(",")
    if arguments.wheel is not None:
        arguments.wheel = arguments.wheel.resolve()  # pip runs elsewhere
    for name in arguments.only:
        if name not in STAGES:
            parser.error(f"--only must name stages of {', '.join(STAGES)}, got {name!r}")
    if arguments.wheel is not None and not arguments.wheel.is_file():
        parser.error(f"--wheel must be a file, got {arguments.wheel}")
    if arguments.wheel is not None and "build" not in arguments.only:
        parser.error("--wheel is installed by the stage build, which --only leaves out")
    if arguments.minutes <= 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    dry_run = arguments.device == "cpu"
    if not dry_run and not torch.cuda.is_available():
        reason = (
            "this torch is a CPU build"
            if torch.version.cuda is None
            else f"torch {torch.__version__} finds no GPU that its driver and CUDA can use"
        )
        print(
            f"gpu_report: needs a GPU, and {reason}; nothing was run. "
            "(--device cpu tries the report itself.)",
            file=sys.stderr,
        )
        return 2
    output = arguments.output
    if output is None:
        output = (
            Path(tempfile.gettempdir()) / "nbl-gpu-report-dry-run" if dry_run else results.FOLDER
        )

    with tempfile.TemporaryDirectory(prefix="nbl-gpu-report-") as folder:
        run = Run(Path(folder), arguments.minutes, dry_run)
        date = results.now()
        device = DEVICES["dry" if dry_run else "cuda"]()
        environment = device.environment()
        stages, rows, info, decoded = collect(run, arguments)
        swept = []
        if arguments.sweep and not dry_run:
            stage_of_sweep, swept = sweep(run, environment["compute_capability"])
            stages.append(stage_of_sweep)
        at_the_end = device.environment()
    if "nvidia_smi" in environment:
        environment["nvidia_smi_at_the_end"] = at_the_end["nvidia_smi"]
    environment |= {"torch": torch.__version__, "python": platform.python_version()}
    environment |= {"nbl_kernels": info}
    result = {
        "dry_run": dry_run,
        "date": date,
        "tree": tree(arguments.commit),
        "command": " ".join(["gpu_report.py", *(sys.argv[1:] if argv is None else argv)]),
        "environment": environment,
        "limits": report.limits(rows),
        "stages": [asdict(s) for s in stages],
        "targets": report.targets(rows),
        "suggested_paths": report.suggested_paths(rows),
        "rows": rows,
        "decode": decoded,
        "sweep": swept,
    }
    name = re.sub(r"[^a-z0-9]+", "-", str(environment["device"]).lower()).strip("-")
    stem = f"{'dry-run' if dry_run else 'gpu'}-{name}-{date[:16].replace(':', '')}"
    results.save(output / f"{stem}.json", result)
    (output / f"{stem}.md").write_text(report.markdown(result))
    for s in stages:
        if s.log:
            print(f"\n--- the end of {s.name} ({s.status})", *s.log, sep="\n")
    print(f"\n{report.short_table(result)}\n  written: {output / stem}.json, .md")
    return 1 if any(s.status in ("failed", "timeout") for s in stages) else 0


def collect(
    run: Run, arguments: argparse.Namespace
) -> tuple[list[Stage], list[dict], dict[str, object], list[dict]]:
    """Runs the stages; returns them, the rows, what the package says of itself, decode's cases."""
    stages: list[Stage] = []

    def done(s: Stage) -> Stage:
        stages.append(s)
        print(f"{s.name}: {s.status} after {s.seconds:.0f} s; {s.detail}", flush=True)
        return s

    if "build" in arguments.only and done(build(run, arguments.wheel)).status != "ok":
        return stages, [], {}, []
    info, failure = installed(run)
    if failure is not None:
        done(failure)
        return stages, [], info, []
    checks = []
    if "tests" in arguments.only:
        checks += [(tests, area) for area in (DRY_AREAS if run.dry_run else AREAS)]
    if "sanitizer" in arguments.only:
        checks += [(sanitizer, tool) for tool in ("memcheck", "racecheck")]
    # Correctness does not mind company; the benchmarks run alone. (A dry run shares few cores.)
    with ThreadPoolExecutor(2 if run.dry_run else max(1, len(checks))) as pool:
        for future in [pool.submit(check, run, what) for check, what in checks]:
            done(future.result())
    rows: list[dict] = []
    decoded: list[dict] = []
    end = BENCH_END_BEFORE_SWEEP if arguments.sweep else BENCH_END
    for name, share in BENCHMARKS.items():
        if name == "decode":
            if "decode" in arguments.only:
                decoding, decoded = decode(run, share * end)
                done(decoding)
        elif "bench" in arguments.only:
            benched, more = bench(run, name, share * end, arguments.compile)
            done(benched)
            rows += more
    return stages, rows, info, decoded


if __name__ == "__main__":
    sys.exit(main())
