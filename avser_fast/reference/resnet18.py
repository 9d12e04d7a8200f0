"""ResNet-18 body of the audio-visual encoder (He et al. 2016), with a stem of any number of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .conv_stem import Norm, batch_norm


class BasicBlock(NamedTuple):
    """Tensors of one residual block; ``downsample`` is None where the shortcut is the identity."""

    weight1: Tensor
    norm1: Norm
    weight2: Tensor
    norm2: Norm
    downsample_weight: Tensor | None
    downsample_norm: Norm | None
    stride: int


def basic_block(x: Tensor, block: BasicBlock, *, training: bool = False) -> Tensor:
    """Two 3x3 convolutions with batch norm, the shortcut added before the last ReLU."""
    y = F.relu(batch_norm(F.conv2d(x, block.weight1, stride=block.stride, padding=1), block.norm1, training=training))
    y = batch_norm(F.conv2d(y, block.weight2, padding=1), block.norm2, training=training)
    if block.downsample_weight is not None:
        assert block.downsample_norm is not None
        x = batch_norm(
            F.conv2d(x, block.downsample_weight, stride=block.stride), block.downsample_norm, training=training
        )
    return F.relu(x + y)


def resnet18(
    x: Tensor, stem_weight: Tensor, stem_norm: Norm, blocks: Sequence[BasicBlock], *, training: bool = False
) -> Tensor:
    """(N, channels, frames, bands) -> (N, 512) globally averaged features f_v; stem 7x7 stride 2, max-pool 3x3
    stride 2."""
    x = F.relu(batch_norm(F.conv2d(x, stem_weight, stride=2, padding=3), stem_norm, training=training))
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for block in blocks:
        x = basic_block(x, block, training=training)
    return x.mean((2, 3))
