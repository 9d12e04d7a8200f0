"""The loops that measure the machine's own limits."""

from __future__ import annotations

import pytest

from avser_fast import _engine
from avser_fast.errors import ConfigError


def test_float32_has_a_peak_everywhere() -> None:
    assert _engine.measure_peak("float32", 0.02) > 1e8
    assert _engine.measure_peak("float32", 0.02, threads=2) > 1e8


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_precisions_are_native_or_nothing(precision: str) -> None:
    peak = _engine.measure_peak(precision, 0.02)  # type: ignore[arg-type]
    assert peak == 0.0 or peak > 1e8


def test_reading_from_near_and_far() -> None:
    assert _engine.measure_read(1 << 14, 0.02) > 1e8
    assert _engine.measure_read(1 << 24, 0.02, threads=2) > 1e8


def test_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="precision: expected float32, bf16 or int8, got 'fp8'"):
        _engine.measure_peak("fp8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"seconds: expected more than 0, up to 60, got 0"):
        _engine.measure_peak("float32", 0.0)
    with pytest.raises(ConfigError, match=r"bytes: expected 4096\.\.1073741824, got 5"):
        _engine.measure_read(5)
    with pytest.raises(ConfigError, match=r"threads: expected 1\.\.1024, got 0"):
        _engine.measure_peak("float32", 0.02, threads=0)
