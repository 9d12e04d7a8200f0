"""Residual block of two depthwise-separable convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .batch_norm import Norm, batch_norm, batch_statistics, rectified_affine
from .dropout import counted_dropout


def separable_conv2d(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """3x3 depthwise convolution, padding 1, then 1x1, neither with a bias, on ``rectified_affine`` of the input.

    x: (N, in, H, W); depthwise: (in, 1, 3, 3); pointwise: (out, in, 1, 1); mean, scale, shift: (in,), the batch norm
    that the producer of x left to do.  Returns y (N, out, H, W) and its ``batch_statistics``.
    """
    x = rectified_affine(x, (mean, scale, shift), relu=relu)
    y = F.conv2d(F.conv2d(x, depthwise, padding=1, groups=x.shape[1]), pointwise)
    return (y, *batch_statistics(y))


def pool_shortcut(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcut: Tensor,
    shortcut_mean: Tensor,
    shortcut_scale: Tensor,
    shortcut_shift: Tensor,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """End of a residual block: both paths are normalised, x is max-pooled (3x3, stride 2, padding 1), their sum dropped
    out with ``counted_dropout`` (element (n, h, w, c) is number ((n H + h) W + w) C + c).

    x: (N, C, H, W); shortcut and the result: (N, C, ceil(H / 2), ceil(W / 2)); the others (C,).
    """
    y = F.max_pool2d(rectified_affine(x, (mean, scale, shift), relu=False), kernel_size=3, stride=2, padding=1)
    y = y + rectified_affine(shortcut, (shortcut_mean, shortcut_scale, shortcut_shift), relu=False)
    return counted_dropout(y.permute(0, 2, 3, 1), dropout, seed).permute(0, 3, 1, 2)


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
    y = F.conv2d(F.conv2d(x, depthwise1, padding=1, groups=x.shape[1]), pointwise1)
    y = F.relu(batch_norm(y, norm1, training=training))
    y = F.conv2d(F.conv2d(y, depthwise2, padding=1, groups=y.shape[1]), pointwise2)
    y = batch_norm(y, norm2, training=training)
    y = F.max_pool2d(y, kernel_size=3, stride=2, padding=1)
    # Sliced, then stride 1: torch's strided 1x1 backward on channels-last tensors overruns its memory on CPUs when the
    # batch is odd and there are fewer than 8 channels (seen with 2.14).
    shortcut = F.conv2d(x[:, :, ::2, ::2], shortcut_weight, shortcut_bias)
    shortcut = batch_norm(shortcut, shortcut_norm, training=training)
    return F.dropout(y + shortcut, dropout, training)
