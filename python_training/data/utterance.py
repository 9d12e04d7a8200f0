"""What a corpus is to the trainer: labelled utterances and their features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avser_fast import reference
from avser_fast.config import INT16_SCALE, FrontEnd
from avser_fast.inference.features import features as compute_array
from avser_fast.inference.features import resample


@dataclass(frozen=True)
class Utterance:
    """One recording: ``label`` is an index into the corpus' class names, ``speaker`` whom evaluation must separate."""

    key: str
    path: Path
    speaker: str
    label: int


@dataclass(frozen=True)
class FeatureSet:
    """Utterances with their unnormalised features, each (channels, frames, bands) float32.

    ``copies[i]`` are features of utterance i at other speeds, which only training uses.
    """

    utterances: tuple[Utterance, ...]
    features: tuple[Tensor, ...]
    labels: tuple[str, ...]
    front_end: FrontEnd
    copies: tuple[tuple[Tensor, ...], ...] = ()

    @property
    def speakers(self) -> list[str]:
        return sorted({u.speaker for u in self.utterances})

    def subset(self, keep: Callable[[Utterance], bool]) -> FeatureSet:
        chosen = [i for i, u in enumerate(self.utterances) if keep(u)]
        return dataclasses.replace(
            self,
            utterances=tuple(self.utterances[i] for i in chosen),
            features=tuple(self.features[i] for i in chosen),
            copies=tuple(self.copies[i] for i in chosen) if self.copies else (),
        )

    def targets(self) -> Tensor:
        return torch.tensor([u.label for u in self.utterances])

    def measured_front_end(self, zero: str = "mean") -> FrontEnd:
        """The front end with mean and standard deviation of each channel over all frames and bands of this set.

        Only ``normalization='global'`` needs them; call this on training speakers only.  With ``zero='quiet'`` the 2nd
        percentile of the static channel stands in for its mean.
        """
        if self.front_end.normalization != "global":
            return self.front_end
        frames = torch.cat([f.double() for f in self.features], dim=1)
        mean, std = frames.mean((1, 2)), frames.std((1, 2), correction=0)
        if zero == "quiet":
            mean[0] = float(np.percentile(frames[0].numpy(), 2.0))
        return dataclasses.replace(
            self.front_end,
            mean=tuple(round(float(v), 4) for v in mean),
            std=tuple(round(float(v), 4) for v in std),
        )

    def normalized(self, front_end: FrontEnd) -> list[Tensor]:
        return [reference.normalize(f, front_end) for f in self.features]

    def normalized_copies(self, front_end: FrontEnd) -> list[list[Tensor]]:
        """Per utterance its features followed by those of its copies."""
        copies = self.copies or ((),) * len(self.features)
        return [
            [reference.normalize(f, front_end) for f in (own, *others)] for own, others in zip(self.features, copies)
        ]


def read_waveform(path: Path, sampling_rate: int) -> np.ndarray:
    """Mono waveform (n,) float32 at int16 scale, resampled to ``sampling_rate``."""
    import soundfile

    samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    waveform = np.ascontiguousarray(samples.mean(axis=1)) * np.float32(INT16_SCALE)
    return resample(waveform, rate, sampling_rate)


def compute_features(
    utterances: Sequence[Utterance],
    labels: Sequence[str],
    front_end: FrontEnd,
    progress: Callable[[int, int], None] | None = None,
    speeds: Sequence[float] = (),
) -> FeatureSet:
    """Read every recording and compute its log-mel features with the front end that inference uses.

    Each of ``speeds`` adds a copy: 1.1 plays the recording 10 % faster, which raises pitch and formants as another
    speaker's would be.  Normalisation is left to ``FeatureSet.normalized``, whose constants come from training
    speakers.
    """
    plain = dataclasses.replace(front_end, normalization="none", mean=(), std=())
    rate = front_end.sampling_rate

    def compute(waveform: np.ndarray) -> Tensor:
        return torch.from_numpy(compute_array(waveform, plain))

    features, copies = [], []
    for done, utterance in enumerate(utterances, start=1):
        waveform = read_waveform(utterance.path, rate)
        features.append(compute(waveform))
        copies.append(tuple(compute(resample(waveform, round(rate * speed), rate)) for speed in speeds))
        if progress is not None:
            progress(done, len(utterances))
    return FeatureSet(tuple(utterances), tuple(features), tuple(labels), front_end, tuple(copies))
