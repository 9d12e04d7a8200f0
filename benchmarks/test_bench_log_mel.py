"""The front end: 4.53 s of speech to 40 log-mel bands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from avser_fast import _engine, reference
from avser_fast.testing import assert_close

from .cases import SECONDS, speech
from .harness import Bench, plural
from .peers import log_mel_peers


@pytest.mark.parametrize("threads", [1, 2])
def test_log_mel(benchmark: Any, bench: Bench, threads: int) -> None:
    case = f"log-mel of {SECONDS} s, {plural(threads, 'thread')}"
    facts = {"group": "log-mel", "precision": "float32", "threads": threads, "utterances": 1}
    bench.needs(case, facts)
    waveform = speech()
    expected = reference.log_mel(torch.from_numpy(waveform).double()).numpy()

    def run() -> np.ndarray:
        return _engine.log_mel(waveform, threads=threads)

    def check(result: np.ndarray) -> None:
        assert_close(result, expected, 1e-6, "log-mel")

    table = bench.measure(benchmark, case, lambda: run, check, log_mel_peers(waveform, expected, threads), facts)
    best = table.best_ratio()
    assert best is None or best > 1.0, "a library is faster than avser_fast"
