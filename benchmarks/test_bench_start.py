"""The first answer of a fresh process: import, load, a 3 s file."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import avser_fast
from avser_fast.testing import assert_close

from .cases import speech
from .compare import OURS, Row, Table
from .harness import Bench, cores

ROOT = Path(__file__).resolve().parents[1]
SECONDS, RUNS = 3.0, 5
PEER = "reference (torch eager)"


def start(path: Path, backend: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.startup", str(path), backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_first_result(benchmark: Any, bench: Bench, tmp_path: Path) -> None:
    import soundfile

    path = tmp_path / "speech.wav"
    soundfile.write(path, speech(SECONDS), 16000)
    expected = avser_fast.load("default", backend="reference").infer([str(path)])[0].scores
    assert expected is not None
    rows, resident, missing = [], {}, {}
    backends = {OURS: "engine", PEER: "reference"}
    if not bench.full:
        missing[PEER] = "importing torch takes seconds, measured with --results"
        del backends[PEER]
    for name, backend in backends.items():
        # The first run only brings the files into the page cache.
        runs = [start(path, backend) for _ in range(RUNS + 1)][1:]
        for run in runs:
            scores = [run["scores"][label] for label in expected]
            assert_close(scores, list(expected.values()), 1e-4, f"{name}: scores")
            assert run["torch_imported"] == (backend == "reference"), f"{name}: torch_imported"
        times = sorted(1e3 * run["seconds"] for run in runs)
        rows.append(Row(name, f"avser_fast {avser_fast.__version__}", statistics.median(times), times[0], times[-1]))
        rows[-1].calls = len(times)
        resident[name] = max(run["resident_mb"] for run in runs)
    facts = {"group": "start-up", "precision": "float32", "threads": cores(), "utterances": 1, "resident_mb": resident}
    case = f"import, load and first result of a {SECONDS:g} s file, default model"
    bench.tables.append(Table(case, rows, missing, facts))
    benchmark.pedantic(lambda: start(path, "engine"), rounds=1)
