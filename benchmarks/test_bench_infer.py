"""The main job: a recording's samples to probabilities, front end and network together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from avser_fast import reference

from . import models
from .cases import SECONDS, speech
from .compare import OURS, Contender
from .harness import Bench, plural
from .models import probabilities
from .ours import ours_whole_way
from .peers import Peers, versions
from .runtimes import network_peers


def published_clips(features: np.ndarray, out: np.ndarray) -> None:
    """The published rule for an utterance that is longer than a clip, written with slices."""
    count, width = len(out), out.shape[2]
    assert len(features) >= count + width, "expected an utterance that is longer than a clip"
    out[:] = 0
    for i in range(count):
        start = i * (len(features) // count)
        if start < len(features) - width:
            out[i, 0] = features[start : start + width]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "bf16", "int8"])
def test_whole_way(benchmark: Any, bench: Bench, precision: str, threads: int) -> None:
    model = models.published()
    rule = model.spec.clip_rule
    waveform = speech()
    case = f"{SECONDS} s of samples to probabilities, mdscm-published, {precision}, {plural(threads, 'thread')}"
    facts = {"group": "whole way", "precision": precision, "threads": threads, "utterances": 1}
    bench.needs(case, facts)
    exact = reference.log_mel(torch.from_numpy(waveform).double())
    cut, _ = reference.frame_clips(exact[None], rule.clips, rule.clip_frames, rule.rule)
    clips = cut.float().numpy()
    check = model.check(precision, clips, probabilities)

    # The networks read this array, which the front end fills anew for every call.
    inputs = clips.copy()
    right_logits = model.check(precision, clips)

    def right(logits: np.ndarray) -> None:
        """A setting of a peer counts where its answer is right, too, not its logits alone."""
        right_logits(logits)
        check(probabilities(logits))

    networks = network_peers(model.deployed, precision, inputs, right, threads, bench.peers)

    def published_front_end(network: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        from python_speech_features import logfbank

        def run() -> np.ndarray:
            inputs.fill(np.nan)
            published_clips(logfbank(waveform, 16000, nfilt=40), inputs)
            return probabilities(network())

        return run

    peers = Peers()
    for network in networks.contenders:
        name = f"python_speech_features + {network.name}"
        package = versions("python_speech_features") + " + " + network.versions
        run = published_front_end(network.run)
        peers.contenders.append(Contender(name, run, check, package, network.setting, network.tried))
    peers.missing = {f"python_speech_features + {name}": why for name, why in networks.missing.items()}

    def ours() -> Callable[[], np.ndarray]:
        return ours_whole_way(model.spec, model.tensors, waveform, precision, threads, model.calibration)

    bench.measure(benchmark, case, ours, model.check(precision, clips, probabilities, OURS), peers, facts)
