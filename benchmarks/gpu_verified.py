"""``python -m benchmarks.gpu_verified OUT BACKEND...``: notes that the tests of these backends passed on this GPU.

Writes ``OUT/gpu_verified.json``, which goes to ``avser_fast/gpu_verified.json``: `avser-fast doctor` reads it there.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

from avser_fast import info

from .gpu_parts import device


def main(arguments: list[str]) -> None:
    out, *backends = arguments
    found = info.gpu_verified()
    one = {**device(), "date": datetime.date.today().isoformat(), "version": info.build_info()["version"]}
    for backend in backends:
        found[backend] = [*(x for x in found.get(backend, ()) if x["gpu"] != one["gpu"]), one]
    Path(out, info.GPU_VERIFIED).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
