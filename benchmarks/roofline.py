"""``python -m benchmarks.roofline [FOLDER]``: the limits of this machine, written to ``roofline.json`` in a folder.

Multiply-adds per second of loops on registers, and bytes read per second by working set.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from avser_fast import _engine

from .harness import ceiling, cores, write_result

PRECISIONS = ("float32", "bf16", "int8")
#: From a first-level cache to main memory, per thread.
KIB = (16, 256, 768, 2048, 6144, 12288, 24576, 98304)


def measure() -> dict[str, Any]:
    """By thread count: G multiply-adds per second (None: no such instruction), and GB/s by working set in KiB."""
    counts = sorted({1, min(2, cores())})
    return {
        "peak_gmacs": {str(t): {p: ceiling(p, t) for p in PRECISIONS} for t in counts},
        "read_gbs": {str(t): {str(k): _engine.measure_read(k << 10, 0.4, t) / 1e9 for k in KIB} for t in counts},
    }


def text(found: dict[str, Any]) -> str:
    lines = []
    for threads, peaks in found["peak_gmacs"].items():
        values = ", ".join(f"{p} {'none' if v is None else f'{v:.0f}'}" for p, v in peaks.items())
        lines.append(f"{threads} thread(s): G multiply-adds per second: {values}")
        rates = ", ".join(f"{int(k) / 1024:g} MiB {v:.0f}" for k, v in found["read_gbs"][threads].items())
        lines.append(f"{threads} thread(s): GB read per second and working set: {rates}")
    return "\n".join(lines)


def main(folder: Path | None) -> None:
    found = measure()
    print(text(found))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_result(folder / "roofline.json", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
