"""Inputs that every contender of a benchmark gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import avser_fast
from avser_fast.config import ModelSpec

RECORDINGS = Path(__file__).resolve().parents[1] / "data" / "emodb4"

#: Length of the mean IEMOCAP utterance, 453 frames: 4.53 s at 16 kHz.
SECONDS = 4.53


def speech(seconds: float = SECONDS) -> np.ndarray:
    """Real speech as int16 at 16 kHz, recordings joined until they are long enough."""
    import soundfile

    parts: list[np.ndarray] = []
    wanted = round(seconds * 16000)
    for path in sorted(RECORDINGS.glob("*.flac")):
        parts.append(soundfile.read(path, dtype="int16")[0])
        if sum(map(len, parts)) >= wanted:
            break
    return np.concatenate(parts)[:wanted]


def clips(spec: ModelSpec, batch: int, count: int = 5) -> np.ndarray:
    """(batch, count, C, frames, bands) of random features, every clip real."""
    network = spec.network
    rng = np.random.default_rng(0)
    shape = (batch, count, network.in_channels, network.clip_frames, network.mel_bands)
    return rng.standard_normal(shape).astype(np.float32)


def recognizer(name: str, threads: int) -> avser_fast.Recognizer:
    return avser_fast.load(name, threads=threads)
