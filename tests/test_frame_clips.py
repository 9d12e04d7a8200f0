"""Clip rules against a frame-by-frame construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from avser_fast import _engine, reference
from avser_fast.config import ClipRule, EncoderSpec
from avser_fast.errors import ConfigError


def published(frames: int, clips: int, width: int) -> np.ndarray:
    numbers = list(range(1, frames + 1))
    if frames < clips + width:
        numbers = [0] * (width // 2) + numbers + [0] * (width // 2)
    step = int(len(numbers) / clips)
    table = np.zeros((clips, width), dtype=np.int64)
    for i in range(clips):
        if i * step < len(numbers) - width:
            table[i] = numbers[i * step : i * step + width]
    return table


@pytest.mark.parametrize(("clips", "width"), [(5, 224), (1, 224), (3, 64), (8, 100), (2, 7), (4, 1)])
def test_published_rule(clips: int, width: int) -> None:
    for frames in [*range(1, 30), *range(width - 2, width + clips + 3), 2 * width, 5 * width + 3, 4000]:
        if frames < 1:
            continue
        table, valid = reference.clip_table(frames, clips, width, "published")
        np.testing.assert_array_equal(table.numpy(), published(frames, clips, width), err_msg=f"{frames} frames")
        assert valid.tolist() == [True] * clips


@pytest.mark.parametrize("clips", [None, 1, 2, 5])
@pytest.mark.parametrize("width", [1, 2, 10, 224])
def test_even_rule(clips: int | None, width: int) -> None:
    for frames in [1, 2, width - 1, width, width + 1, width + width // 2, 3 * width + 1, 60000 if width > 10 else 500]:
        if frames < 1:
            continue
        table, valid = reference.clip_table(frames, clips, width, "even")
        count = int(valid.sum())
        assert valid.tolist() == [i < count for i in range(len(table))]
        assert (table[count:] == 0).all()
        assert len(table) == (count if clips is None else clips)
        if frames <= width:
            assert count == 1
            left = (width - frames) // 2
            expected = [0] * left + list(range(1, frames + 1)) + [0] * (width - frames - left)
            assert table[0].tolist() == expected
            continue
        needed = 1 + math.ceil((frames - width) / max(1, width // 2))
        assert count == (needed if clips is None else min(needed, clips))
        starts = table[:count, 0] - 1
        assert (table[:count] - starts[:, None] == torch.arange(1, width + 1)).all()
        assert starts[0] == 0
        if count > 1:
            assert starts[-1] == frames - width
            hops = starts.diff()
            assert hops.max() - hops.min() <= 1
        if clips is None:
            assert set(range(1, frames + 1)) <= set(table.flatten().tolist()), "every frame is heard"


def test_clips_hold_the_frames_that_the_table_names() -> None:
    features = torch.randn(3, 90, 6)[:, ::2]
    for rule, clips in (("published", 5), ("even", None), ("even", 2)):
        cut, valid = reference.frame_clips(features, clips, 20, rule)
        table, expected_valid = reference.clip_table(45, clips, 20, rule)
        assert cut.shape == (len(table), 3, 20, 6)
        assert torch.equal(valid, expected_valid)
        for clip, row in zip(cut, table):
            for position, frame in enumerate(row.tolist()):
                expected = features[:, frame - 1] if frame else torch.zeros(3, 6)
                assert torch.equal(clip[:, position], expected)


def test_errors() -> None:
    for clips, frames, words in (
        (5, 2**28 + 1, "clip_frames: expected 1..268435456, got 268435457"),
        (5, 2**26, "clips: expected at most 4 of 67108864 frames, got 5"),
        (2**62, 2**27, "clips: expected at most 2 of 134217728 frames, got 4611686018427387904"),
    ):
        with pytest.raises(ConfigError, match=words):
            _engine.clip_table(10, clips, frames, "published")
    with pytest.raises(ConfigError, match=r"clip_frames: expected 1\.\.268435456, got 268435457"):
        ClipRule(clip_frames=2**28 + 1)
    with pytest.raises(ConfigError, match=r"clip_rule\.clip_frames: expected maps of at most 268435456 values, got"):
        EncoderSpec(clip_rule=ClipRule(clip_frames=419431))
    assert EncoderSpec(clip_rule=ClipRule(clip_frames=419430)).clip_rule.clip_frames == 419430
    with pytest.raises(ConfigError, match="rule: expected one of"):
        reference.clip_table(10, 5, 224, "middle")
    with pytest.raises(ConfigError, match="clips: expected at least 1"):
        reference.clip_table(10, None, 224, "published")
    with pytest.raises(ValueError, match="frames: expected at least 1, got 0"):
        reference.clip_table(0, 5, 224, "even")
    with pytest.raises(ValueError, match=r"expected \(channels, frames, bands\), got shape \(4, 5\)"):
        reference.frame_clips(torch.zeros(4, 5), 5, 224, "even")
