"""The main job: a recording's samples to probabilities, front end and network together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import avser_fast
from avser_fast import reference
from avser_fast.testing import assert_close

from .cases import SECONDS, recognizer, speech
from .compare import Contender, Table, compare
from .peers import Peers


def test_infer(benchmark: Any, tables: list[Table]) -> None:
    waveform = speech()
    ours = recognizer("default", threads=1)
    truth = avser_fast.load("default", backend="reference")
    item = {"array": waveform, "sampling_rate": 16000}

    def scores(rec: avser_fast.Recognizer) -> np.ndarray:
        found = rec.infer([item])[0].scores
        return np.array([found[label] for label in rec.spec.labels])

    expected = scores(truth)

    def check(result: np.ndarray) -> None:
        assert_close(result, expected, 1e-4, "probabilities")

    def published_front_end() -> Any:
        from python_speech_features import delta, logfbank

        spec = avser_fast.read_model("default")[0]
        front = spec.front_end

        def run() -> np.ndarray:
            torch.set_num_threads(1)
            stack = [logfbank(waveform, 16000, nfilt=front.mel_bands)]
            while len(stack) < front.channels:
                stack.append(delta(stack[-1], front.delta_window))
            features = torch.from_numpy(np.stack(stack)).float()
            rule = spec.clip_rule
            clips, _ = reference.frame_clips(
                reference.normalize(features, front), rule.clips, rule.clip_frames, rule.rule
            )
            return truth.forward(clips[None].numpy())[0][0]

        return run

    peers = Peers()
    peers.add("reference (torch eager)", lambda: lambda: scores(truth), check, "torch")
    peers.add("python_speech_features + torch eager", published_front_end, check, "python_speech_features")
    table = compare(
        f"{SECONDS} s of samples to probabilities, default model, 1 thread",
        [Contender("avser_fast", lambda: scores(ours), check), *peers.contenders],
        peers.missing,
    )
    tables.append(table)
    benchmark.extra_info["ratios"] = {row.name: round(table.ratio(row), 2) for row in table.rows}
    benchmark.pedantic(lambda: scores(ours), rounds=20, warmup_rounds=2)
