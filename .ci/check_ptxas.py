"""Reads a build log with ptxas -v: fails where a kernel spills registers or keeps an array in
local memory. Usage: python .ci/check_ptxas.py BUILD_LOG [--show]"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def read_report(log: str) -> list[dict]:
    kernels: list[dict] = []
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            kernels.append({"name": entry[1], "arch": entry[2], "memory": None, "registers": None})
        elif kernels and (memory := MEMORY.search(line)) and kernels[-1]["memory"] is None:
            kernels[-1]["memory"] = tuple(map(int, memory.groups()))
        elif kernels and (registers := REGISTERS.search(line)):
            kernels[-1]["registers"] = int(registers[1])
    return kernels


def demangled(name: str) -> str:
    if shutil.which("c++filt") is None:
        return name
    return subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()


def main(arguments: list[str]) -> int:
    kernels = read_report(Path(arguments[0]).read_text(errors="replace"))
    bad = [k for k in kernels if k["memory"] is None or any(k["memory"])]
    for kernel in kernels if "--show" in arguments else bad:
        print(f"{kernel['arch']} {kernel['registers']} registers, stack/spills {kernel['memory']}:")
        print(f"    {demangled(kernel['name'])}")
    archs = sorted({k["arch"] for k in kernels})
    most = max((k["registers"] or 0 for k in kernels), default=0)
    print(
        f"{len(kernels)} kernels for {', '.join(archs)}; at most {most} registers; "
        f"{len(bad)} with spills or local memory"
    )
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
