"""Our own contenders, one function per case; what the engine does not have yet raises, and the table says so."""

from __future__ import annotations

import dataclasses
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


def ours_mdscm(
    spec: ModelSpec, tensors: Tensors, clips: np.ndarray, precision: str, threads: int, calibration: np.ndarray
) -> Callable[[], np.ndarray]:
    """Clip logits (N, classes) of (B, L, ...) clips; ``calibration``: (N, ...) clips for int8."""
    config = json.dumps(spec.to_dict())
    options: dict[str, Any] = {} if precision == "float32" else {"precision": precision}
    if precision == "int8":
        plain: Any = _engine.Engine(config, tensors)
        options["calibration"] = plain.calibrate(calibration[None])
    engine = _engine.Engine(config, tensors, **options)
    return lambda: engine.forward(clips, None, threads)[2].reshape(-1, spec.network.classes)


def ours_resnet18(
    module: Any, tensors: Tensors, clips: np.ndarray, precision: str, threads: int
) -> Callable[[], np.ndarray]:
    """Clip logits (N, classes) of ``avser_fast.nn.AVRE(body="resnet18")`` for (B, L, ...) clips."""
    make: Any = _engine.AvreEngine  # type: ignore[attr-defined]
    options = {} if precision == "float32" else {"precision": precision}
    engine = make(json.dumps(dataclasses.asdict(module.encoder)), tensors, **options)
    return lambda: engine.forward(clips, None, threads)[-1].reshape(-1, module.encoder.classes)


def ours_whole_way(
    spec: ModelSpec, tensors: Tensors, waveform: np.ndarray, precision: str, threads: int, calibration: np.ndarray
) -> Callable[[], np.ndarray]:
    """Probabilities (classes,) of int16 samples at 16 kHz, through the call that users make."""
    options: dict[str, Any] = {}
    if precision == "int8":
        plain: Any = _engine.Engine(json.dumps(spec.to_dict()), tensors)
        options["calibration"] = plain.calibrate(calibration[None])
    recognizer = avser_fast.Recognizer(spec, tensors, precision=precision, threads=threads, **options)
    item = {"array": waveform, "sampling_rate": 16000}

    def run() -> np.ndarray:
        scores = recognizer.infer([item])[0].scores
        return np.array([scores[label] for label in spec.labels])

    return run
