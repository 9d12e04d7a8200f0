"""Means and deviations over the frames of a clip, taken after a linear map that sees all bands at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: A frame that is there counts at least this much, however quiet it is.
QUIET_WEIGHT = 1e-3
#: Smallest sum of weights that is divided by: a clip of padding only has means of 0.
WEIGHT_FLOOR = 1e-5
#: Added to the variance before the square root.
VARIANCE_EPS = 1e-5


def cepstral_map(outputs: int, bands: int) -> Tensor:
    """First ``outputs`` rows of the orthonormal DCT-II over ``bands`` values, (outputs, bands) float64: cepstra."""
    row = torch.arange(outputs, dtype=torch.float64).unsqueeze(1)
    band = torch.arange(bands, dtype=torch.float64)
    waves = torch.cos(math.pi / bands * (band + 0.5) * row) * math.sqrt(2.0 / bands)
    return torch.where(row == 0, math.sqrt(1.0 / bands), waves)


def frame_weights(clips: Tensor, gate_weight: Tensor, gate_bias: Tensor) -> Tensor:
    """How much each frame counts: (N, channels, frames, bands) -> (N, frames).

    A frame whose features are all exactly 0 is padding and counts 0, any other sigmoid(w x + b) + QUIET_WEIGHT with the
    bands x of its static channel; gate_weight: (1, bands), gate_bias: (1,).
    """
    gate = torch.sigmoid(F.linear(clips[:, 0], gate_weight, gate_bias).squeeze(-1)) + QUIET_WEIGHT
    there = clips.detach().abs().sum((1, 3)) != 0  # quicker than any()
    return torch.where(there, gate, torch.zeros_like(gate))


def frame_statistics(cepstra: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean and population standard deviation over time of each mapped channel.

    cepstra: (N, channels, frames, n), every channel through the same map of its bands; weights: (N, frames),
    ``frame_weights``.  Returns (N, (1 + channels) n): means of the static channel, then deviations of every channel in
    turn (the mean of a derivative says little).
    """
    weights = (weights / weights.sum(1, keepdim=True).clamp(min=WEIGHT_FLOOR)).unsqueeze(1).unsqueeze(-1)
    mean = (weights * cepstra).sum(2, keepdim=True)
    variance = (weights * (cepstra - mean).square()).sum(2)
    return torch.cat((mean[:, 0, 0], (variance + VARIANCE_EPS).sqrt().flatten(1)), dim=1)
