"""The front end without torch: waveform at int16 scale to features, features to clips."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ..config import ClipRule, FrontEnd
from ..errors import BackendError


def engine_module() -> Any:
    """The compiled module, or BackendError with the reason why it is not there."""
    try:
        return import_module("avser_fast._engine")
    except ImportError as error:
        raise BackendError(
            f"backend 'engine': the compiled module avser_fast._engine cannot be imported ({error}); build it with "
            "pip install, or choose backend='reference'"
        ) from error


def log_mel_options(front_end: FrontEnd) -> dict[str, Any]:
    """The arguments of ``log_mel`` that a front end stands for."""
    return {
        "sampling_rate": front_end.sampling_rate,
        "mel_bands": front_end.mel_bands,
        "frame_length": front_end.frame_length,
        "frame_step": front_end.frame_step,
        "n_fft": front_end.n_fft,
        "preemphasis": front_end.preemphasis,
        "low_hz": front_end.low_hz,
        "high_hz": front_end.high_hz,
    }


def clip_options(front_end: FrontEnd, rule: ClipRule) -> dict[str, Any]:
    """The arguments of ``GpuSpeech`` that a front end and a clip rule stand for."""
    return {
        **log_mel_options(front_end),
        "channels": front_end.channels,
        "voice": front_end.voice,
        "delta_window": front_end.delta_window,
        "normalization": front_end.normalization,
        "mean": front_end.mean,
        "std": front_end.std,
        "rule": rule.rule,
        "clips": rule.clips,
        "clip_frames": rule.clip_frames,
    }


def raw_features(
    waveforms: Sequence[np.ndarray], front_end: FrontEnd, threads: int = 1, vtlp: float = 1.0
) -> list[np.ndarray]:
    """Features (planes, frames, bands) float32, not normalised, of waveforms (n,) int16 or float32 at int16 scale."""
    made: list[np.ndarray] = engine_module().front_end(
        [np.ascontiguousarray(x) for x in waveforms],
        channels=front_end.channels,
        delta_window=front_end.delta_window,
        voice=front_end.voice,
        vtlp=vtlp,
        threads=threads,
        **log_mel_options(front_end),
    )
    return made


def normalized(values: np.ndarray, front_end: FrontEnd) -> np.ndarray:
    """Features (planes, frames, bands) as the networks read them: the channels normalised, the voice as it is."""
    rule, channels = front_end.normalization, front_end.channels
    return np.asarray(engine_module().normalize(values, rule, front_end.mean, front_end.std, channels))


def features(waveform: np.ndarray, front_end: FrontEnd, threads: int = 1, vtlp: float = 1.0) -> np.ndarray:
    """Normalised features (planes, frames, bands) float32 of a waveform (n,) float32 at int16 scale.

    The waveform is at ``front_end.sampling_rate``; the result does not depend on ``threads``.  ``vtlp`` other than 1 is
    vocal-tract-length perturbation of training data (``reference.mel_filters``); more than 1 lowers the formants.
    """
    (values,) = raw_features([waveform], front_end, threads, vtlp)
    return normalized(values, front_end)


def clips_and_table(values: np.ndarray, rule: ClipRule) -> tuple[np.ndarray, np.ndarray]:
    """The clips that vote, (L, channels, clip_frames, bands), and which frames they hold.

    The second array is (L, clip_frames): 1-based frame numbers, 0 = padding.
    """
    engine = engine_module()
    clips, valid = engine.frame_clips(values, rule.clips, rule.clip_frames, rule.rule)
    table = engine.clip_table(values.shape[1], rule.clips, rule.clip_frames, rule.rule)
    return (clips, table) if valid.all() else (clips[valid], table[valid])


def resample(waveform: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Band-limited change of rate, (n,) float32 to (ceil(n * to / from),) float32."""
    if from_rate == to_rate:
        return waveform
    return np.asarray(engine_module().resample(waveform, from_rate, to_rate))
