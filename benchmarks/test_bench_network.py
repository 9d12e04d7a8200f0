"""The network alone: clips to clip logits, the same weights in every runtime."""

from __future__ import annotations

from typing import Any

import pytest

from . import models
from .cases import CLIPS
from .compare import OURS
from .harness import Bench, plural
from .macs import mdscm_macs, resnet18_macs
from .models import Model
from .ours import ours_mdscm, ours_resnet18
from .runtimes import network_peers

PRECISIONS = ["float32", "bf16", "int8"]


def _measure(
    benchmark: Any,
    bench: Bench,
    model: Model,
    precision: str,
    threads: int,
    utterances: int,
    macs: int,
    ours: Any,
) -> None:
    count = utterances * CLIPS
    case = f"{model.name}, {plural(utterances, 'utterance')} of {CLIPS} clips, {precision}, {plural(threads, 'thread')}"
    facts = {
        "group": model.name,
        "precision": precision,
        "threads": threads,
        "utterances": utterances,
        "macs": macs * count,
    }
    bench.needs(case, facts)
    clips = model.clips(count)
    peers = network_peers(model.deployed, precision, clips, model.check(precision, clips), threads, bench.peers)
    batch = clips.reshape(utterances, CLIPS, *clips.shape[1:])
    check = model.check(precision, clips, who=OURS)
    bench.measure(benchmark, case, lambda: ours(batch), check, peers, facts)


@pytest.mark.parametrize("utterances", [1, 16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_published(benchmark: Any, bench: Bench, precision: str, threads: int, utterances: int) -> None:
    model = models.published()

    def ours(batch: Any) -> Any:
        return ours_mdscm(model.spec, model.tensors, batch, precision, threads, model.calibration)

    macs = mdscm_macs(model.spec.network)
    _measure(benchmark, bench, model, precision, threads, utterances, macs, ours)


@pytest.mark.parametrize("threads", [1, 2])
def test_small(benchmark: Any, bench: Bench, threads: int) -> None:
    model = models.shipped()

    def ours(batch: Any) -> Any:
        return ours_mdscm(model.spec, model.tensors, batch, "float32", threads, model.calibration)

    _measure(benchmark, bench, model, "float32", threads, 1, mdscm_macs(model.spec.network), ours)


@pytest.mark.parametrize("utterances", [1, 16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resnet18(benchmark: Any, bench: Bench, precision: str, threads: int, utterances: int) -> None:
    model = models.resnet18()

    def ours(batch: Any) -> Any:
        return ours_resnet18(model.module, model.tensors, batch, precision, threads)

    network = model.spec.network
    macs = resnet18_macs(network.clip_frames, network.mel_bands)
    _measure(benchmark, bench, model, precision, threads, utterances, macs, ours)
