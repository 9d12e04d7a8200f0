"""What a corpus is to the trainer: labelled utterances and their features."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from avser_fast import reference
from avser_fast.config import FrontEnd


@dataclass(frozen=True)
class Utterance:
    """One recording: ``label`` is an index into the corpus' class names, ``speaker`` whom evaluation must separate."""

    key: str
    path: Path
    speaker: str
    label: int


@dataclass(frozen=True)
class FeatureSet:
    """Utterances with their unnormalised features, each (channels, frames, bands) float32."""

    utterances: tuple[Utterance, ...]
    features: tuple[Tensor, ...]
    labels: tuple[str, ...]
    front_end: FrontEnd

    @property
    def speakers(self) -> list[str]:
        return sorted({u.speaker for u in self.utterances})

    def subset(self, keep: Callable[[Utterance], bool]) -> FeatureSet:
        chosen = [i for i, u in enumerate(self.utterances) if keep(u)]
        return dataclasses.replace(
            self,
            utterances=tuple(self.utterances[i] for i in chosen),
            features=tuple(self.features[i] for i in chosen),
        )

    def targets(self) -> Tensor:
        return torch.tensor([u.label for u in self.utterances])

    def measured_front_end(self) -> FrontEnd:
        """The front end with mean and standard deviation of each channel over all frames and bands of this set.

        Only ``normalization='global'`` needs them; call this on training speakers only.
        """
        if self.front_end.normalization != "global":
            return self.front_end
        frames = torch.cat([f.double() for f in self.features], dim=1)
        mean, std = frames.mean((1, 2)), frames.std((1, 2), correction=0)
        return dataclasses.replace(
            self.front_end,
            mean=tuple(round(float(v), 4) for v in mean),
            std=tuple(round(float(v), 4) for v in std),
        )

    def normalized(self, front_end: FrontEnd) -> list[Tensor]:
        return [reference.normalize(f, front_end) for f in self.features]


def read_waveform(path: Path, sampling_rate: int) -> Tensor:
    """Mono waveform at int16 scale, resampled to ``sampling_rate``, float32."""
    import soundfile

    samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    waveform = torch.from_numpy(np.ascontiguousarray(samples.mean(axis=1))) * 32768.0
    return reference.resample(waveform, rate, sampling_rate)


def compute_features(
    utterances: Sequence[Utterance],
    labels: Sequence[str],
    front_end: FrontEnd,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureSet:
    """Read every recording and compute its log-mel features (with deltas when the front end asks for channels)."""
    features = []
    for done, utterance in enumerate(utterances, start=1):
        static = reference.log_mel(
            read_waveform(utterance.path, front_end.sampling_rate),
            sampling_rate=front_end.sampling_rate,
            mel_bands=front_end.mel_bands,
            frame_length=front_end.frame_length,
            frame_step=front_end.frame_step,
            n_fft=front_end.n_fft,
            preemphasis=front_end.preemphasis,
            low_hz=front_end.low_hz,
            high_hz=front_end.high_hz,
        )
        features.append(reference.add_deltas(static, front_end.channels, front_end.delta_window))
        if progress is not None:
            progress(done, len(utterances))
    return FeatureSet(tuple(utterances), tuple(features), tuple(labels), front_end)
