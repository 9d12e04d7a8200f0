"""The networks as a deployer would write them for another runtime: batch norms folded into the convolutions, strided
convolutions where the reference slices, attention as one call, batch and clips as one axis of constant length.

The peers get this form because it is faster than the reference in all of them; nobody has to undo a batch norm to lose.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avser_fast import nn as family


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, stride: int | None = None) -> nn.Conv2d:
    """conv, then norm, as one convolution with a bias."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        cast(Any, conv.kernel_size),
        stride=cast(Any, conv.stride) if stride is None else stride,
        padding=cast(Any, conv.padding),
        groups=conv.groups,
    )
    assert folded.bias is not None
    folded.weight.data = (conv.weight.double() * scale[:, None, None, None]).float()
    folded.bias.data = (norm.bias.double() + (bias - norm.running_mean.double()) * scale).float()
    return folded


class FoldedBlock(nn.Module):
    """A ``DSCBlock``."""

    def __init__(self, block: Any):
        super().__init__()
        self.relu_first = block.relu_first
        self.depthwise1, self.pointwise1 = copy.deepcopy(block.depthwise1), fold(block.pointwise1, block.norm1)
        self.depthwise2, self.pointwise2 = copy.deepcopy(block.depthwise2), fold(block.pointwise2, block.norm2)
        self.shortcut = fold(block.shortcut, block.shortcut_norm, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.relu_first:
            x = F.relu(x)
        y = F.relu(self.pointwise1(self.depthwise1(x)))
        y = F.max_pool2d(self.pointwise2(self.depthwise2(y)), kernel_size=3, stride=2, padding=1)
        return y + self.shortcut(x)


class _Layer(nn.Module):
    """An ``EncoderLayer``."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        heads = self.layer.heads
        q, k, v = (
            part.view(n, tokens, heads, width // heads).transpose(1, 2)
            for part in self.layer.qkv(x).split(width, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = self.layer.norm1(x + self.layer.out(mixed))
        return self.layer.norm2(x + self.layer.ff2(F.relu(self.layer.ff1(x))))


class _Attention(nn.Module):
    """A ``CSAttention``."""

    def __init__(self, attention: Any):
        super().__init__()
        self.spatial = copy.deepcopy(attention.spatial)
        self.channel1, self.channel2 = copy.deepcopy(attention.channel1), copy.deepcopy(attention.channel2)

    def forward(self, x: Tensor) -> Tensor:
        if self.spatial is not None:
            maps = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), dim=1)
            x = x * torch.sigmoid(self.spatial(maps))
        if self.channel1 is not None:
            # Both pooled vectors in one product.
            pooled = torch.stack((x.mean((2, 3)), x.amax((2, 3))), dim=1)
            gate = torch.sigmoid(self.channel2(F.relu(self.channel1(pooled))).sum(1))
            x = x * gate[:, :, None, None]
        return x


class FoldedMDSCM(nn.Module):
    """(N, planes, frames, bands), the clips of all utterances, to (N, classes) clip logits."""

    def __init__(self, module: family.MDSCM):
        super().__init__()
        body = cast(Any, module.body)
        self.stem = nn.ModuleList(fold(c, n) for c, n in zip(body.conv_stem.convs, body.conv_stem.norms))
        self.blocks = nn.ModuleList(FoldedBlock(block) for block in body.blocks)
        self.attention = _Attention(body.attention)
        self.encoder = nn.ModuleList(_Layer(layer) for layer in body.encoder)
        self.statistics = copy.deepcopy(module.statistics)
        self.head = copy.deepcopy(module.head)
        self.deviation = module.network.pooling == "mean_std"
        self.in_channels = module.network.in_channels

    def forward(self, x: Tensor) -> Tensor:
        path = [] if self.statistics is None else [self.statistics(x)]
        x = x[:, : self.in_channels]  # not the voice
        for conv in self.stem:
            x = F.relu(conv(x))
        for block in self.blocks:
            x = block(x)
        x = self.attention(x).permute(0, 2, 1, 3).flatten(2)
        for layer in self.encoder:
            x = layer(x)
        pooled = x.mean(1)
        if self.deviation:
            pooled = torch.cat((pooled, (x.var(1, correction=0) + 1e-5).sqrt()), dim=1)
        return self.head(torch.cat((pooled, *path), dim=1))


class _Basic(nn.Module):
    """A ``BasicBlock`` of ResNet-18."""

    def __init__(self, block: Any):
        super().__init__()
        self.conv1, self.conv2 = fold(block.conv1, block.norm1), fold(block.conv2, block.norm2)
        self.downsample = None if block.downsample is None else fold(block.downsample, block.downsample_norm)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv2(F.relu(self.conv1(x))) + shortcut)


class FoldedResNet18(nn.Module):
    """The emotion side of ``AVRE(body="resnet18")``: (N, channels, frames, bands) to (N, classes) clip logits."""

    def __init__(self, module: family.AVRE):
        super().__init__()
        body = cast(Any, module.body)
        self.stem = fold(body.conv, body.norm)
        self.blocks = nn.Sequential(*(_Basic(block) for block in body.blocks))
        self.head = copy.deepcopy(module.head)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), kernel_size=3, stride=2, padding=1)
        return self.head(self.blocks(x).mean((2, 3)))
