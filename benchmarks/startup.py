"""``python -m benchmarks.startup FILE [BACKEND]``: what a fresh process pays for its first result, as one line of JSON.

``seconds`` run from before the import of avser_fast to the result, without the interpreter's own start.
"""

from __future__ import annotations

import json
import sys
import time


def resident_mb() -> float:
    """Largest resident memory of this process so far."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            (line,) = (line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    except OSError:  # no /proc: macOS, which counts bytes
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    begin = time.perf_counter()
    import avser_fast

    backend = sys.argv[2] if len(sys.argv) > 2 else "auto"
    recognizer = avser_fast.load("default", backend=backend, precision="float32")
    (result,) = recognizer.infer([sys.argv[1]])
    seconds = time.perf_counter() - begin
    found = {
        "seconds": seconds,
        "resident_mb": resident_mb(),
        "torch_imported": "torch" in sys.modules,
        "scores": result.scores,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
