"""``python -m benchmarks.memory [FOLDER]``: memory of a process that answers 10,000 calls of mixed lengths.

Exit code 1 where the last nine tenths of the calls need more than the first tenth did; with a folder the figures are
written to ``memory.json`` there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import avser_fast

CALLS, SAMPLES = 10_000, 20
#: What an allocator may add over thousands of calls without anything leaking.
SLACK_MB = 2.0


def resident_mb() -> float:
    """Resident memory now."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status: expected a line VmRSS")


def lengths(calls: int) -> np.ndarray:
    """Samples of each call: 0.2 to 12 s, the longest of all first."""
    random = np.random.default_rng(0)
    seconds = np.exp(random.uniform(np.log(0.2), np.log(12.0), calls))
    return (16000 * np.concatenate([[12.0], seconds[1:]])).astype(np.int64)


def growth(call: Callable[[int], Any], calls: int = CALLS) -> tuple[list[float], float]:
    """Resident MB after every twentieth of the calls, and by how much the largest exceeds that of the first tenth."""
    series: list[float] = []
    for done, samples in enumerate(lengths(calls), start=1):
        call(int(samples))
        if done % (calls // SAMPLES) == 0:
            series.append(resident_mb())
    warm = SAMPLES // 10
    return series, max(series[warm:]) - max(series[:warm])


def main(folder: Path | None) -> int:
    from .cases import speech
    from .harness import cores, write_result

    waveform = speech(12.0)
    recognizer = avser_fast.load("default", threads=min(2, cores()))

    def call(samples: int) -> Any:
        return recognizer.infer([{"array": waveform[:samples], "sampling_rate": 16000}])

    series, grown = growth(call)
    print(f"{CALLS} calls: {series[0]:.1f} MB after the first {CALLS // SAMPLES}, {series[-1]:.1f} MB at the end")
    if folder is not None:
        write_result(folder / "memory.json", {"calls": CALLS, "resident_mb": series, "grown_mb": grown})
    if grown > SLACK_MB:
        print(f"memory: expected no growth beyond {SLACK_MB} MB after {CALLS // 10} calls, got {grown:.1f} MB")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
