"""Batch-normalised strided convolutions that open the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

#: Batch norm as four tensors: weight, bias, running mean, running variance, each (channels,).
Norm = Sequence[Tensor]


def batch_norm(x: Tensor, norm: Norm, *, training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """Batch normalisation of (N, channels, ...); in training the running statistics are updated in place."""
    weight, bias, mean, var = norm
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def conv_stem(x: Tensor, weights: Sequence[Tensor], norms: Sequence[Norm], *, training: bool = False) -> Tensor:
    """3x3 convolutions of stride 2 and padding 1 without bias, each with batch norm and ReLU.

    x: (N, channels, frames, bands).  weights[i]: (out, in, 3, 3).  Returns (N, out, ceil(frames / 2^n), ceil(bands
    / 2^n)) for n layers.  Published: two layers, 32 and 64 wide (section 2.1).
    """
    for weight, norm in zip(weights, norms):
        x = F.relu(batch_norm(F.conv2d(x, weight, stride=2, padding=1), norm, training=training))
    return x
