"""Spatial attention, then channel attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def spatial_attention(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x * sigmoid(conv3x3([max over channels, mean over channels])); weight (1, 2, 3, 3), bias (1,)."""
    maps = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), dim=1)
    return x * torch.sigmoid(F.conv2d(maps, weight, bias, padding=1))


def channel_attention(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """x * sigmoid(mlp(global mean) + mlp(global max)); weight1 (hidden, C), weight2 (C, hidden), ReLU between."""

    def mlp(pooled: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(pooled, weight1, bias1)), weight2, bias2)

    gate = torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))
    return x * gate[:, :, None, None]


def cs_attention(
    x: Tensor,
    spatial_weight: Tensor | None = None,
    spatial_bias: Tensor | None = None,
    channel_weight1: Tensor | None = None,
    channel_bias1: Tensor | None = None,
    channel_weight2: Tensor | None = None,
    channel_bias2: Tensor | None = None,
) -> Tensor:
    """Both attentions in the order of the released code, spatial first (the paper's figure names channel first).

    x: (N, C, H, W), the shape is kept.  A kind of attention whose tensors are None is left out.
    """
    if spatial_weight is not None:
        assert spatial_bias is not None
        x = spatial_attention(x, spatial_weight, spatial_bias)
    if channel_weight1 is not None:
        assert channel_bias1 is not None and channel_weight2 is not None and channel_bias2 is not None
        x = channel_attention(x, channel_weight1, channel_bias1, channel_weight2, channel_bias2)
    return x
