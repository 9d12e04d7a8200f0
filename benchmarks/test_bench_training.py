"""A training step on the CPU: the published network, 8 utterances of 5 clips, forward, loss, backward and SGD.

Loss and gradients of every contender are compared with those of the float64 reference before anything is timed, without
dropout, whose masks differ; the timed steps have the published dropout.  bf16 is autocast, for ours and for the peers.
"""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from . import training  # noqa: E402
from .cases import CLIPS  # noqa: E402
from .compare import OURS  # noqa: E402
from .harness import Bench, plural  # noqa: E402
from .macs import mdscm_macs  # noqa: E402
from .peers import Peers  # noqa: E402

UTTERANCES = 8
GROUPS = {training.EAGER: "training-eager", training.COMPILED: "training-compile"}


@lru_cache(maxsize=1)
def _exact() -> dict[str, Any]:
    return training.exact(UTTERANCES)


def _gradients(name: str, precision: str) -> dict[str, Any]:
    return training.Step(name, UTTERANCES, dropout=False, precision=precision).gradients()


@lru_cache(maxsize=1)
def _plain_distances() -> dict[str, float]:
    """The larger of PyTorch eager's on one thread and on two: its sums, and with them signs at a ReLU, differ."""
    found = []
    for threads in (1, 2):
        with training.torch_threads(threads):
            found.append(training.distances(_gradients(training.EAGER, "bf16"), _exact()))
    return {name: max(one[name] for one in found) for name in found[0]}


def _contender(name: str, precision: str) -> Any:
    """The timed step, after its twin without dropout has shown that the gradients are right."""
    if precision == "float32":
        training.check_gradients(_gradients(name, precision), _exact())
    else:
        training.check_low_precision(_gradients(name, precision), _exact(), _plain_distances())
    return training.Step(name, UTTERANCES, precision=precision).run


def _finite(loss: Any) -> None:
    assert bool(torch.isfinite(loss)), f"expected a finite loss, got {loss}"


def _step_macs() -> int:
    """Forward, gradient of the input and of the weights; the first layer's input has no gradient."""
    network = training.NETWORK
    first = (
        ((network.clip_frames + 1) // 2) * ((network.mel_bands + 1) // 2) * 9 * network.in_channels * network.stem[0]
    )
    return UTTERANCES * CLIPS * (3 * mdscm_macs(network) - first)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("peer", GROUPS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_step(benchmark: Any, bench: Bench, precision: str, peer: str, threads: int) -> None:
    what = f"{UTTERANCES} utterances of {CLIPS} clips, {precision}, {plural(threads, 'thread')}"
    case = f"training step beside {peer}, {what}"
    facts = {
        "group": GROUPS[peer],
        "precision": precision,
        "threads": threads,
        "utterances": UTTERANCES,
        "macs": _step_macs(),
    }
    bench.needs(case, facts)
    with training.torch_threads(threads):
        peers = Peers()
        peers.add(peer, lambda: _contender(peer, precision), _finite, "torch")
        bench.measure(benchmark, case, lambda: _contender(OURS, precision), _finite, peers, facts)


def peak_mb(name: str) -> float:
    """Peak memory of a contender's steps, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training", name, str(UTTERANCES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout)


def test_memory(benchmark: Any, bench: Bench) -> None:
    if not bench.full:
        pytest.skip("peak memory is measured with --full or --results")
    found = {name: peak_mb(name) for name in (OURS, training.EAGER)}
    bench.files["training-memory"] = {"utterances": UTTERANCES, "clips": CLIPS, "peak_mb": found}
    benchmark.extra_info["peak_mb"] = found
    benchmark.pedantic(peak_mb, args=(OURS,), rounds=1)
