"""Residual block of two depthwise-separable convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .conv_stem import Norm, batch_norm


def separable_conv2d(x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
    """3x3 depthwise convolution, padding 1, then 1x1: (N, in, H, W) -> (N, out, H, W); neither has a bias.

    depthwise: (in, 1, 3, 3); pointwise: (out, in, 1, 1).
    """
    return F.conv2d(F.conv2d(x, depthwise, padding=1, groups=x.shape[1]), pointwise)


def dsc_block(
    x: Tensor,
    depthwise1: Tensor,
    pointwise1: Tensor,
    norm1: Norm,
    depthwise2: Tensor,
    pointwise2: Tensor,
    norm2: Norm,
    shortcut_weight: Tensor,
    shortcut_bias: Tensor,
    shortcut_norm: Norm,
    *,
    relu_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Residual path: separable, BN, ReLU, separable, BN, 3x3 max-pool of stride 2 and padding 1; shortcut: 1x1 of
    stride 2 with bias, BN; then their sum and dropout.

    x: (N, in, H, W) -> (N, out, ceil(H / 2), ceil(W / 2)).  ``relu_first`` rectifies the input of both paths: the
    published second block starts with an in-place ReLU, so its shortcut sees the rectified input too.
    """
    if relu_first:
        x = F.relu(x)
    y = F.relu(batch_norm(separable_conv2d(x, depthwise1, pointwise1), norm1, training=training))
    y = batch_norm(separable_conv2d(y, depthwise2, pointwise2), norm2, training=training)
    y = F.max_pool2d(y, kernel_size=3, stride=2, padding=1)
    # Sliced, then stride 1: torch's strided 1x1 backward on channels-last tensors overruns its memory on CPUs when the
    # batch is odd and there are fewer than 8 channels (seen with 2.14).
    shortcut = F.conv2d(x[:, :, ::2, ::2], shortcut_weight, shortcut_bias)
    shortcut = batch_norm(shortcut, shortcut_norm, training=training)
    return F.dropout(y + shortcut, dropout, training)
