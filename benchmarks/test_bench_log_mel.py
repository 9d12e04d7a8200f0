"""The front end: 4.53 s of speech to 40 log-mel bands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from avser_fast import _engine, reference
from avser_fast.testing import assert_close

from .cases import SECONDS, speech
from .compare import Contender, Table, compare
from .peers import log_mel_peers


@pytest.mark.parametrize("threads", [1, 2])
def test_log_mel(benchmark: Any, tables: list[Table], threads: int) -> None:
    waveform = speech()
    expected = reference.log_mel(torch.from_numpy(waveform).double()).numpy()

    def run() -> np.ndarray:
        return _engine.log_mel(waveform, threads=threads)

    def check(result: np.ndarray) -> None:
        assert_close(result, expected, 1e-6, "log-mel")

    peers = log_mel_peers(waveform, expected, threads)
    case = f"log-mel of {SECONDS} s, {threads} thread{'s' if threads > 1 else ''}"
    table = compare(case, [Contender("avser_fast", run, check), *peers.contenders], peers.missing)
    tables.append(table)
    benchmark.extra_info["ratios"] = {row.name: round(table.ratio(row), 2) for row in table.rows}
    benchmark.pedantic(run, rounds=20, warmup_rounds=2)
    (torchaudio,) = [row for row in table.rows if row.name == "torchaudio MelSpectrogram"]
    assert table.ratio(torchaudio) > 1.0, "torchaudio's MelSpectrogram is faster than avser_fast"
