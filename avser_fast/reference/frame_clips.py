"""From the frames of an utterance to clips of fixed length."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ClipRule


def clip_table(
    frames: int, clips: int | None = 5, clip_frames: int = 224, rule: str = "published"
) -> tuple[Tensor, Tensor]:
    """Which frame stands where: ((L, clip_frames) int64 of 1-based frame numbers, 0 = padding; (L,) bool valid).

    ``published``: with fewer than L + clip_frames frames, clip_frames // 2 zero frames are added on both sides.  Clip i
    starts at i * (frames // L) and is taken only while start < frames - clip_frames; clips never reached stay all
    zero and are valid all the same: they vote.

    ``even``: an utterance of at most clip_frames frames is one centred clip.  A longer one is covered by
    1 + ceil((frames - clip_frames) / (clip_frames // 2)) clips, at most L of them, whose starts are evenly spaced from
    the first frame to the last possible one; only these are valid.
    """
    ClipRule(rule, clips, clip_frames)  # names what is wrong with the arguments
    if frames < 1:
        raise ValueError(f"clip_table: frames: expected at least 1, got {frames}")
    width = clip_frames
    pad = 0
    if rule == "published":
        assert clips is not None
        pad = width // 2 if frames < clips + width else 0
        total = frames + 2 * pad
        starts = [i * (total // clips) for i in range(clips)]
        starts = [s for s in starts if s < total - width]
        rows, valid = clips, clips
    else:
        count = 1 if frames <= width else 1 - (-(frames - width) // max(1, width // 2))
        count = count if clips is None else min(count, clips)
        span = frames - width
        pad = max(0, -span) // 2
        starts = [0] if count == 1 else [(2 * i * span + count - 1) // (2 * (count - 1)) for i in range(count)]
        rows, valid = clips or count, count
    table = torch.zeros(rows, width, dtype=torch.int64)
    position = torch.arange(width)
    for row, start in enumerate(starts):
        frame = start - pad + position
        table[row] = torch.where((frame >= 0) & (frame < frames), frame + 1, 0)
    return table, torch.arange(rows) < valid


def frame_clips(
    features: Tensor, clips: int | None = 5, clip_frames: int = 224, rule: str = "published"
) -> tuple[Tensor, Tensor]:
    """Cut (channels, frames, bands) features into ((L, channels, clip_frames, bands) clips, (L,) bool valid).

    The rules are those of ``clip_table``; padding is 0.
    """
    if features.dim() != 3:
        raise ValueError(
            f"frame_clips: features: expected (channels, frames, bands), got shape {tuple(features.shape)}"
        )
    table, valid = clip_table(features.shape[1], clips, clip_frames, rule)
    padded = torch.nn.functional.pad(features, (0, 0, 1, 0))  # frame number 0 is the padding frame
    cut = padded.index_select(1, table.flatten().to(features.device))
    return cut.unflatten(1, (-1, clip_frames)).transpose(0, 1).contiguous(), valid.to(features.device)
