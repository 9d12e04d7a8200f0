"""Inputs and weights that every contender of a benchmark gets."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from avser_fast.config import ClipRule, FrontEnd, ModelSpec
from avser_fast.inference import features as front_end

RECORDINGS = Path(__file__).resolve().parents[1] / "data" / "emodb4"

#: Length of the mean IEMOCAP utterance, 453 frames: 4.53 s at 16 kHz.
SECONDS = 4.53
#: Clips of an utterance under the published rule.
CLIPS = 5
#: Draws of clips: those that are timed, those that int8 is calibrated on, those that batch norms are measured on.
TIMED, CALIBRATION, STATISTICS = 0, 1, 2


def _recordings(count: int) -> list[np.ndarray]:
    import soundfile

    return [soundfile.read(path, dtype="int16")[0] for path in sorted(RECORDINGS.glob("*.flac"))[:count]]


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


@lru_cache(maxsize=4)
def _features(front: FrontEnd) -> np.ndarray:
    """(channels, frames, bands) of sixty recordings, one after the other."""
    parts = [front_end.features(samples.astype(np.float32), front) for samples in _recordings(60)]
    return np.concatenate(parts, axis=1)


def clips(front: FrontEnd, rule: ClipRule, count: int, draw: int = TIMED) -> np.ndarray:
    """(count, channels, frames, bands): windows of real speech, none of them padded."""
    values = _features(front)
    starts = np.random.default_rng(draw).integers(0, values.shape[1] - rule.clip_frames, count)
    return np.ascontiguousarray(np.stack([values[:, s : s + rule.clip_frames] for s in starts]), np.float32)


def speech_clips(spec: ModelSpec, count: int, draw: int = TIMED) -> np.ndarray:
    return clips(spec.front_end, spec.clip_rule, count, draw)


def as_served(spec: ModelSpec, clips: np.ndarray) -> np.ndarray:
    """Clips that the published rule never reaches stay zero, and are scored: here the last of every utterance."""
    clips = clips.copy()
    if spec.clip_rule.rule == "published":
        clips[CLIPS - 1 :: CLIPS] = 0
    return clips


def random_weights(module: Any, inputs: np.ndarray) -> Any:
    """A module with random weights whose batch norms hold the statistics of real speech.

    With statistics that nobody measured, activations fade or drown in the biases: every clip gets nearly the same
    answer, and an error of a whole clip would pass for rounding.  The module has no dropout.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in module.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        module.train()(torch.from_numpy(inputs)[None])
    return module.eval().requires_grad_(False)


def tensors(module: Any) -> dict[str, np.ndarray]:
    """The state dict as the engine takes it."""
    state = cast(dict[str, Any], module.state_dict())
    return {key: value.numpy() for key, value in state.items() if not key.endswith("num_batches_tracked")}
