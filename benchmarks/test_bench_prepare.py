"""Preparing a corpus, in short: ``python -m benchmarks.prepare FOLDER`` takes the time for 10,000 utterances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .prepare import measure


def test_prepare(benchmark: Any, tmp_path: Path) -> None:
    found = benchmark.pedantic(measure, (tmp_path, 200, 2, ("wav",)), rounds=1, iterations=1)
    figures = found["kinds"]["wav"]
    assert figures["hours"] > 0.1 and figures["prepare"]["seconds"] > figures["again"]["seconds"]
    assert figures["hit"]["resident_mb"] < figures["resident_mb"]
    assert set(figures["shares"]) == {"decoding", "digests", "features", "reading", "writing", "Python"}
    assert min(figures["shares"].values()) > 0
    assert list(tmp_path.iterdir()) == []
