"""Utterances and their features in memory, the way cross-validation takes them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avser_fast import reference
from avser_fast.config import FrontEnd

from .corpus import Utterance
from .prepared import PreparedCorpus


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

    @classmethod
    def of(
        cls,
        corpus: PreparedCorpus,
        front_end: FrontEnd,
        speeds: Sequence[float] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> FeatureSet:
        """The utterances of a corpus with speech; each of ``speeds`` adds a copy of every recording (1.1 plays 10 %
        faster)."""
        own, *others = [corpus.features(front_end, speed, progress=progress) for speed in (1.0, *speeds)]
        chosen = corpus.with_speech
        return cls(
            tuple(corpus.utterances[i] for i in chosen),
            tuple(torch.from_numpy(own[i]) for i in chosen),
            corpus.labels,
            front_end,
            tuple(tuple(torch.from_numpy(copy[i]) for copy in others) for i in chosen),
        )

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
