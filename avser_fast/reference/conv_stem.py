"""Batch-normalised strided convolutions that open the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .batch_norm import Norm, batch_norm, batch_statistics, rectified_affine


def strided_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution of stride 2, 3x3 with padding 1 or 1x1 without, on ``rectified_affine`` of its input.

    x: (N, in, H, W); weight: (out, in, 3, 3) or (out, in, 1, 1); bias: (out,); mean, scale, shift: (in,), the batch
    norm that the producer of x left to do.  Returns y (N, out, ceil(H / 2), ceil(W / 2)) and its ``batch_statistics``.
    """
    x = rectified_affine(x, (mean, scale, shift), relu=relu)
    if weight.shape[-1] == 1:
        # Sliced, then stride 1: torch's strided 1x1 backward on channels-last tensors overruns its memory on CPUs when
        # the batch is odd and there are fewer than 8 channels (seen with 2.14).
        y = F.conv2d(x[:, :, ::2, ::2], weight, bias)
    else:
        y = F.conv2d(x, weight, bias, stride=2, padding=1)
    return (y, *batch_statistics(y))


def conv_stem(x: Tensor, weights: Sequence[Tensor], norms: Sequence[Norm], *, training: bool = False) -> Tensor:
    """3x3 convolutions of stride 2 and padding 1 without bias, each with batch norm and ReLU.

    x: (N, channels, frames, bands).  weights[i]: (out, in, 3, 3).  Returns (N, out, ceil(frames / 2^n), ceil(bands
    / 2^n)) for n layers.  Published: two layers, 32 and 64 wide (section 2.1).
    """
    for weight, norm in zip(weights, norms):
        x = F.relu(batch_norm(F.conv2d(x, weight, stride=2, padding=1), norm, training=training))
    return x
