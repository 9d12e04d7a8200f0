"""A training step of the published network on the CPU, and the memory that it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import training
from .cases import CLIPS
from .compare import OURS
from .harness import Bench, plural
from .peers import Peers
from .training import COMPILED, EAGER, UTTERANCES

ROOT = Path(__file__).resolve().parents[1]


def memory(contender: str, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.training", contender, str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("threads", [1, 2])
def test_step(benchmark: Any, bench: Bench, threads: int) -> None:
    import torch

    case = (
        f"training step of mdscm-published, {plural(UTTERANCES, 'utterance')} of {CLIPS} clips, float32, "
        f"{plural(threads, 'thread')}"
    )
    facts: dict[str, Any] = {"group": "training", "precision": "float32", "threads": threads, "utterances": UTTERANCES}
    bench.needs(case, facts)
    torch.set_num_threads(threads)
    given = training.batch()
    exact = training.truth(given)
    check = training.check(exact, training.PEERS_GRADIENT)
    peers = Peers()
    peers.best(EAGER, training.settings(EAGER, given, ("channels-last", "contiguous")), check, "torch")
    if bench.peers == "all":
        peers.best(COMPILED, training.settings(COMPILED, given), check, "torch")
    else:
        peers.missing[COMPILED] = "takes long to start, measured with --peers all"
    measured = [OURS, *(c.name for c in peers.contenders)]
    facts["memory_mb"] = {name: memory(name, threads) for name in measured}

    def ours() -> Any:
        step = training.stepper_of(OURS)
        return lambda: step(given)

    bench.measure(benchmark, case, ours, training.check(exact), peers, facts)
