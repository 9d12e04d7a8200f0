"""Our own contenders, one function per case; what the engine does not have yet raises, and the table says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

import avser_fast
from avser_fast import _engine
from avser_fast.config import ModelSpec
from avser_fast.errors import BackendError, ConfigError

#: What says that this version or machine has no such thing.  Any other exception is a failure.
ABSENT = (AttributeError, TypeError, BackendError, ConfigError)

Tensors = dict[str, np.ndarray]


def _ranges(config: str, tensors: Tensors, precision: str, calibration: np.ndarray) -> Tensors | None:
    """What int8 needs to know of the calibration clips (N, ...)."""
    return _engine.Engine(config, tensors).calibrate(calibration[None]) if precision == "int8" else None


def ours_mdscm(
    spec: ModelSpec, tensors: Tensors, clips: np.ndarray, precision: str, threads: int, calibration: np.ndarray
) -> Callable[[], np.ndarray]:
    """Clip logits (N, classes) of (B, L, ...) clips; ``calibration``: (N, ...) clips for int8."""
    config = json.dumps(spec.to_dict())
    engine = _engine.Engine(
        config, tensors, precision=precision, calibration=_ranges(config, tensors, precision, calibration)
    )
    return lambda: engine.forward(clips, None, threads)[2].reshape(-1, spec.network.classes)


def ours_resnet18(
    module: Any, tensors: Tensors, clips: np.ndarray, precision: str, threads: int
) -> Callable[[], np.ndarray]:
    """Clip logits (N, classes) of ``avser_fast.nn.AVRE(body="resnet18")`` for (B, L, ...) clips."""
    encoder = module.encoder
    engine = _engine.ResNet18(tensors, in_channels=encoder.in_channels, classes=encoder.classes, precision=precision)
    return lambda: engine.forward(clips, None, threads)[2].reshape(-1, encoder.classes)


def ours_whole_way(
    spec: ModelSpec, tensors: Tensors, waveform: np.ndarray, precision: str, threads: int, calibration: np.ndarray
) -> Callable[[], np.ndarray]:
    """Probabilities (classes,) of int16 samples at 16 kHz, through the call that users make."""
    ranges = _ranges(json.dumps(spec.to_dict()), tensors, precision, calibration)
    recognizer = avser_fast.Recognizer(spec, tensors, precision=precision, threads=threads, calibration=ranges)
    item = {"array": waveform, "sampling_rate": 16000}

    def run() -> np.ndarray:
        scores = recognizer.infer([item])[0].scores
        return np.array([scores[label] for label in spec.labels])

    return run
