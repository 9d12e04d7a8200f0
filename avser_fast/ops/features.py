"""The front end's stems as functions: arguments are checked here, with the words of the errors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..config import ClipRule, FrontEnd
from ..errors import ConfigError, InputError
from . import front_end  # noqa: F401  (fake kernels and derivatives)
from .backends import require_compiled
from .schemas import LOG_MEL_NAMES


def _check(op: str, argument: str, value: Any, dimensions: str, least: int, *dtypes: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{op}: {argument}: expected a tensor, got {type(value).__name__}")
    if value.dim() < least:
        raise InputError(f"{op}: {argument}: expected {dimensions}, got shape {tuple(value.shape)}")
    if dtypes and value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputError(f"{op}: {argument}: expected {names}, got {str(value.dtype).removeprefix('torch.')}")


@lru_cache(maxsize=256)
def _front_end(*options: Any) -> tuple[Any, ...]:
    FrontEnd(**dict(zip(LOG_MEL_NAMES, options)))  # names the option that is wrong
    return options


def log_mel(
    waveform: Tensor,
    *,
    sampling_rate: int = 16000,
    mel_bands: int = 40,
    frame_length: int = 400,
    frame_step: int = 160,
    n_fft: int = 512,
    preemphasis: float = 0.97,
    low_hz: float = 0.0,
    high_hz: float = 8000.0,
) -> Tensor:
    """Log-mel features of waveforms at int16 scale (``reference.log_mel``).

    waveform: (..., samples) int16, float32 or float64, at least 1 sample, any strides, on the CPU or a CUDA device.
    Returns (..., frames, mel_bands), float64 for float64 and float32 otherwise; all arithmetic inside is float64.  A
    frame's features do not depend, bit for bit, on its neighbours, the batch or the threads.  Differentiable once.
    Raises InputError for the waveform, ConfigError for an option, BackendError when nothing compiled can run it.
    """
    _check("log_mel", "waveform", waveform, "(..., samples)", 1, torch.int16, torch.float32, torch.float64)
    if waveform.shape[-1] < 1:
        raise InputError(f"log_mel: waveform: expected at least 1 sample, got shape {tuple(waveform.shape)}")
    options = _front_end(
        sampling_rate, mel_bands, frame_length, frame_step, n_fft, float(preemphasis), float(low_hz), float(high_hz)
    )
    require_compiled("log_mel")
    return torch.ops.avser_fast.log_mel(waveform, *options)


def add_deltas(features: Tensor, channels: int, window: int = 2) -> Tensor:
    """Static features with their derivatives over time as channels (``reference.add_deltas``).

    features: (..., frames, bands) float32 or float64.  Returns (..., channels, frames, bands), channels 1, 2 or 3.
    """
    _check("add_deltas", "features", features, "(..., frames, bands)", 2, torch.float32, torch.float64)
    if channels not in (1, 2, 3):
        raise ConfigError(f"add_deltas: channels: expected 1, 2 or 3, got {channels}")
    if window < 1:
        raise ConfigError(f"add_deltas: window: expected at least 1, got {window}")
    require_compiled("add_deltas")
    return torch.ops.avser_fast.add_deltas(features, channels, window)


def frame_clips(
    features: Tensor, clips: int | None = 5, clip_frames: int = 224, rule: str = "published"
) -> tuple[Tensor, Tensor]:
    """Cut features into clips by a named rule (``reference.frame_clips``, ``reference.clip_table``).

    features: (channels, frames, bands), any dtype, at least 1 frame.  Returns ((L, channels, clip_frames, bands) clips,
    (L,) bool: which of them vote); L is ``clips``, or for rule "even" with None as many as coverage needs.
    """
    _check("frame_clips", "features", features, "(channels, frames, bands)", 3)
    if features.dim() != 3 or features.shape[1] < 1:
        raise InputError(
            "frame_clips: features: expected (channels, frames, bands) with at least 1 frame, "
            f"got shape {tuple(features.shape)}"
        )
    ClipRule(rule, clips, clip_frames)  # names the argument that is wrong
    require_compiled("frame_clips")
    return torch.ops.avser_fast.frame_clips(features, clips, clip_frames, rule)


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Change the sampling rate by a band-limited interpolation (``reference.resample``).

    waveform: (..., samples) float32 or float64, at least 1 sample; rates in hertz, 1 to 384000.  Returns
    (..., ceil(samples * to_rate / from_rate)); equal rates copy.
    """
    _check("resample", "waveform", waveform, "(..., samples)", 1, torch.float32, torch.float64)
    if waveform.shape[-1] < 1:
        raise InputError(f"resample: waveform: expected at least 1 sample, got shape {tuple(waveform.shape)}")
    for name, rate in (("from_rate", from_rate), ("to_rate", to_rate)):
        if not 1 <= rate <= 384000:
            raise ConfigError(f"resample: {name}: expected 1..384000 hertz, got {rate}")
    require_compiled("resample")
    return torch.ops.avser_fast.resample(waveform, from_rate, to_rate)
