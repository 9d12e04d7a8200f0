"""kernel_report.py OUT REPORT...: what `ptxas -v` says of the GPU kernels in nvcc's reports, as JSON.

One entry per kernel and architecture: object, kernel, arch, registers, spill_bytes, stack_bytes; and the warnings.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

COMPILING = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def kernels(name: str, report: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for line in report.splitlines():
        if match := COMPILING.search(line):
            found.append({"object": name, "kernel": match[1], "arch": match[2]})
        elif found and (match := FRAME.search(line)):
            found[-1] |= {"stack_bytes": int(match[1]), "spill_bytes": int(match[2]) + int(match[3])}
        elif found and (match := REGISTERS.search(line)):
            found[-1] |= {"registers": int(match[1])}
    return found


def main() -> None:
    out, *paths = map(Path, sys.argv[1:])
    reports = {path.name.split(".")[0]: path.read_text() for path in sorted(paths)}
    rows = [row for name, report in reports.items() for row in kernels(name, report)]
    warnings = [line for report in reports.values() for line in report.splitlines() if "warning" in line.lower()]
    out.write_text(json.dumps({"kernels": rows, "warnings": warnings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
