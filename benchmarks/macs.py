"""Multiply-adds of a network, from its configuration: what its speed is a share of the machine's peak with."""

from __future__ import annotations

import math

from avser_fast.config import MDSCM


def _half(size: int) -> int:
    """After a convolution or pool of kernel 3, stride 2, padding 1."""
    return (size - 1) // 2 + 1


def mdscm_macs(network: MDSCM) -> int:
    """Of one clip: products of convolutions, linear layers and attention; padding counts, norms and gates do not."""
    rows, columns = network.clip_frames, network.mel_bands
    total, inputs = 0, network.in_channels
    for width in network.stem:
        rows, columns = _half(rows), _half(columns)
        total += rows * columns * 9 * inputs * width
        inputs = width
    for width in network.blocks:
        total += rows * columns * (9 * inputs + inputs * width + 9 * width + width * width)
        rows, columns = _half(rows), _half(columns)
        total += rows * columns * inputs * width
        inputs = width
    if network.spatial_attention:
        total += rows * columns * 9 * 2
    if network.channel_attention:
        total += 2 * 2 * inputs * network.attention_width
    tokens, width = network.tokens, network.token_width
    layer = tokens * (4 * width * width + 2 * width * network.encoder_ff) + 2 * tokens * tokens * width
    if network.statistics:
        total += network.in_channels * network.clip_frames * network.mel_bands * network.statistics
        total += network.clip_frames * network.mel_bands  # the gate
        total += network.statistics_width * network.statistics_hidden
    return total + network.encoder_layers * layer + network.features * network.classes


def resnet18_macs(frames: int, bands: int, in_channels: int = 1, classes: int = 4) -> int:
    """Of one clip through the body of ``AVRE(body="resnet18")`` and its emotion classifier."""

    def half(size: tuple[int, int]) -> tuple[int, int]:
        return _half(size[0]), _half(size[1])

    size = half((frames, bands))  # kernel 7, padding 3 halves like kernel 3, padding 1
    total = math.prod(size) * 49 * in_channels * 64
    size, inputs = half(size), 64
    for stage, width in enumerate((64, 128, 256, 512)):
        if stage:
            size = half(size)
            total += math.prod(size) * inputs * width  # the projected shortcut
        total += math.prod(size) * 9 * (inputs * width + 3 * width * width)
        inputs = width
    return total + inputs * classes
