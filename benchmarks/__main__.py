"""``python -m benchmarks``: everything, on a machine that does nothing else; results and README are renewed at the end.

The ceilings first, then every case with every peer, then the memory of 10,000 calls and 10,000 utterances
prepared.  Stops at the first that fails.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
STEPS = [
    ["benchmarks.roofline", RESULTS],
    ["pytest", "benchmarks", "--benchmark-only", "-q", "--results", RESULTS, "--peers", "all"],
    ["benchmarks.memory", RESULTS],
    ["benchmarks.prepare", RESULTS],
    ["benchmarks.render"],
]


def main() -> int:
    for step in STEPS:
        print("python -m", *step, flush=True)
        code = subprocess.run([sys.executable, "-m", *step, *(sys.argv[1:] if step[0] == "pytest" else [])], cwd=ROOT)
        if code.returncode != 0:
            return code.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
