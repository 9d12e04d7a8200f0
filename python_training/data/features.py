"""From recordings to waveforms, from waveforms to features: what ``prepare`` does once and augmentation again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avser_fast.config import FrontEnd
from avser_fast.errors import InputError
from avser_fast.inference.audio import load_item
from avser_fast.inference.features import engine_module, log_mel_options, raw_features, resample

#: Hertz of the waveforms of a prepared corpus.
SAMPLING_RATE = 16000
#: Changes with the numbers that decoding, resampling or the front end make, so that no cache answers with older ones.
_REVISION = 1


def read_spans(
    path: Path, spans: list[tuple[float, float | None]], sampling_rate: int = SAMPLING_RATE
) -> tuple[list[np.ndarray | InputError], int]:
    """The waveforms (n,) of ``spans`` (start and end in seconds, None: the end) of an audio file, and its own sampling
    rate.

    Decoded, averaged to mono and scaled as ``infer`` does, at int16 scale: int16 where that loses nothing, else
    float32.  A file that cannot be read raises InputError; a span outside of it is one, in its place.
    """
    sound = load_item(path, None, str(path))
    waveforms: list[np.ndarray | InputError] = []
    for start, end in spans:
        first = round(start * sound.rate)
        last = len(sound.samples) if end is None else round(end * sound.rate)
        # The times of labels are rounded: a hundredth of a second beyond the end is still the end.
        if first >= len(sound.samples) or last > len(sound.samples) + sound.rate // 100:
            until = "its end" if end is None else f"{end:g} s"
            waveforms.append(
                InputError(
                    f"{path}: expected sound from {start:g} s to {until}, got a recording of {sound.duration_s:.2f} s"
                )
            )
            continue
        if last <= first:
            span = f"{start:g} s to {end:g} s"
            waveforms.append(InputError(f"{path}: expected a sample from {span}, got none at {sound.rate} Hz"))
            continue
        waveforms.append(engine_module().at_rate(sound.samples[first:last], sound.rate, sampling_rate))
    return waveforms, sound.rate


def waveform_options() -> dict[str, Any]:
    """Everything beside the recording that its waveform depends on."""
    return {"revision": _REVISION, "sampling_rate": SAMPLING_RATE}


def feature_options(front_end: FrontEnd, speed: float = 1.0) -> dict[str, Any]:
    """Everything beside the waveform that its unnormalised features depend on."""
    own: dict[str, Any] = {"channels": front_end.channels, "delta_window": front_end.delta_window}
    if front_end.voice:
        own["voice"] = True
    return {"revision": _REVISION, "speed": speed, **own, **log_mel_options(front_end)}


def compute_features(
    waveforms: Sequence[np.ndarray], front_end: FrontEnd, speed: float = 1.0, vtlp: float = 1.0
) -> list[np.ndarray]:
    """Unnormalised features (planes, frames, bands) float32 of waveforms (n,), int16 or float32 at int16 scale.

    They are not normalised, because the constants of that come from training speakers alone.  ``speed`` 1.1 plays a
    recording 10 % faster, which raises pitch and formants as another speaker's would be.  ``vtlp`` is the factor of
    vocal-tract-length perturbation (``reference.mel_filters``).
    """
    if speed != 1.0:
        rate = front_end.sampling_rate
        waveforms = [resample(x.astype(np.float32, copy=False), round(rate * speed), rate) for x in waveforms]
    return raw_features(waveforms, front_end, vtlp=vtlp)
