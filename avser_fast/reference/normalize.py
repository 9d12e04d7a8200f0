"""Normalisation of features before clips are cut."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import FrontEnd

#: Smallest standard deviation that an utterance is divided by.
STD_FLOOR = 1e-5


def normalize(features: Tensor, front_end: FrontEnd) -> Tensor:
    """Apply ``front_end.normalization`` to (..., channels, frames, bands); the shape is kept.

    ``utterance`` uses the population standard deviation over the frames of each channel and band, at least STD_FLOOR;
    both statistics and the quotient are float64 whatever the dtype, because a band that never changes (silence, a mel
    filter without a bin) would otherwise have its rounding error divided by that floor.
    """
    if front_end.normalization == "global":
        shape = (front_end.channels, 1, 1)
        mean = torch.tensor(front_end.mean, dtype=features.dtype, device=features.device).view(shape)
        std = torch.tensor(front_end.std, dtype=features.dtype, device=features.device).view(shape)
        return (features - mean) / std
    if front_end.normalization == "utterance":
        exact = features.double()
        mean = exact.mean(-2, keepdim=True)
        std = exact.var(-2, correction=0, keepdim=True).sqrt().clamp(min=STD_FLOOR)
        return ((exact - mean) / std).to(features.dtype)
    return features
