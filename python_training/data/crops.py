"""Random crops of utterances and their augmentation, a whole batch at a time from one generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import Augmentation


class CropSampler:
    """Batches of random crops: every utterance once per epoch, in an order drawn from ``generator``.

    ``features[i]`` are the copies of utterance i, of which one is drawn.
    """

    def __init__(self, features: Sequence[Sequence[Tensor]], targets: Tensor, clip_frames: int, batch_size: int):
        self.features, self.targets = features, targets
        self.clip_frames, self.batch_size = clip_frames, batch_size

    def steps_per_epoch(self) -> int:
        # The rest of an epoch that is smaller than half a batch would give batch norm too few samples: it is dropped.
        full, rest = divmod(len(self.features), self.batch_size)
        return max(1, full + (rest >= self.batch_size / 2))

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (crops (N, channels, clip_frames, bands), targets (N,))."""
        order = torch.randperm(len(self.features), generator=generator)
        for step in range(self.steps_per_epoch()):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            crops = [self._crop(self._copy(self.features[int(i)], generator), generator) for i in chosen]
            yield torch.stack(crops), self.targets[chosen]

    @staticmethod
    def _copy(copies: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        return copies[int(torch.randint(0, len(copies), (1,), generator=generator))]

    def _crop(self, features: Tensor, generator: torch.Generator) -> Tensor:
        spare = features.shape[1] - self.clip_frames
        offset = int(torch.randint(0, abs(spare) + 1, (1,), generator=generator))
        if spare >= 0:
            return features[:, offset : offset + self.clip_frames]
        return F.pad(features, (0, 0, offset, -spare - offset))


def _warp(crops: Tensor, time: Tensor, bands: Tensor) -> Tensor:
    theta = torch.zeros(crops.shape[0], 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = bands, time
    # The lowest band stays where it is: a longer vocal tract moves every resonance by the same factor.
    theta[:, 0, 2] = bands - 1.0
    grid = F.affine_grid(theta, list(crops.shape), align_corners=True)
    return F.grid_sample(crops, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _mask(crops: Tensor, width: int, axis: int, generator: torch.Generator) -> Tensor:
    n, size = crops.shape[0], crops.shape[axis]
    widths = torch.randint(0, min(width, size) + 1, (n, 1), generator=generator)
    starts = (torch.rand(n, 1, generator=generator) * (size - widths + 1)).long()
    position = torch.arange(size)
    hidden = (position >= starts) & (position < starts + widths)
    shape = [n, 1, 1, 1]
    shape[axis] = size
    return crops.masked_fill(hidden.view(shape), 0.0)


def augment(
    crops: Tensor, targets: Tensor, settings: Augmentation, classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Augmented crops and soft targets (N, classes); all randomness comes from ``generator``."""
    n = crops.shape[0]

    def uniform(spread: float) -> Tensor:
        return 1.0 + spread * (2.0 * torch.rand(n, generator=generator) - 1.0)

    if settings.time_warp or settings.band_warp:
        crops = _warp(crops, uniform(settings.time_warp), uniform(settings.band_warp))
    if settings.level:
        crops = crops + settings.level * torch.randn(n, 1, 1, 1, generator=generator)
    if settings.noise:
        crops = crops + settings.noise * torch.randn(crops.shape, generator=generator)
    for width, axis in ((settings.band_mask, 3), (settings.time_mask, 2)):
        for _ in range(2 if width else 0):
            crops = _mask(crops, width, axis, generator)
    soft = F.one_hot(targets, classes).to(crops.dtype)
    if settings.mixup:
        share = 1.0 - settings.mixup * torch.rand(n, generator=generator)
        other = torch.randperm(n, generator=generator)
        crops = crops * share.view(-1, 1, 1, 1) + crops[other] * (1.0 - share).view(-1, 1, 1, 1)
        soft = soft * share.view(-1, 1) + soft[other] * (1.0 - share).view(-1, 1)
    return crops, soft
