"""The MDSCM family as a torch module."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import config, ops, reference
from ..ops import backends
from ..reference.batch_norm import Before


class ClipOutput(NamedTuple):
    """probabilities (B, K); features (B, L, D), the clip features f_s; clip_logits (B, L, K)."""

    probabilities: Tensor
    features: Tensor
    clip_logits: Tensor


def norm_tensors(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four tensors that the reference calls a Norm."""
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def fused(backend: str, x: Tensor, network: config.MDSCM) -> bool:
    """Whether the stems run as ops or in the reference, which ``ops.backends.choose`` decides."""
    return backends.choose(backend, x, network.tokens if network.encoder_layers else 0) != "reference"


class ConvStem(nn.Module):
    """Parameters of ``reference.conv_stem``."""

    def __init__(self, in_channels: int, widths: tuple[int, ...]):
        super().__init__()
        inputs = (in_channels, *widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False) for i, o in zip(inputs, inputs[1:])
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)

    def _tensors(self) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        weights: list[Tensor] = [conv.weight for conv in self.convs]  # type: ignore[misc]
        return weights, [norm_tensors(norm) for norm in self.norms]  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return reference.conv_stem(x, *self._tensors(), training=self.training)

    def fused(self, x: Tensor) -> tuple[Tensor, Before]:
        """The map and its last batch norm, which whoever reads the map still has to do."""
        return ops.open_stem(x, *self._tensors(), training=self.training)


class DSCBlock(nn.Module):
    """Parameters of ``reference.dsc_block``."""

    def __init__(self, in_channels: int, out_channels: int, *, relu_first: bool, dropout: float):
        super().__init__()
        self.relu_first, self.dropout = relu_first, dropout
        self.depthwise1 = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.pointwise1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.depthwise2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, groups=out_channels, bias=False)
        self.pointwise2 = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=2)
        self.shortcut_norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, before: Before = ops.NOTHING, fuse: bool = False) -> Tensor:
        assert self.shortcut.bias is not None
        block = partial(
            (ops if fuse else reference).dsc_block,
            x,
            self.depthwise1.weight,
            self.pointwise1.weight,
            norm_tensors(self.norm1),
            self.depthwise2.weight,
            self.pointwise2.weight,
            norm_tensors(self.norm2),
            self.shortcut.weight,
            self.shortcut.bias,
            norm_tensors(self.shortcut_norm),
            relu_first=self.relu_first,
            dropout=self.dropout,
            training=self.training,
        )
        return block(before=before) if fuse else block()


class CSAttention(nn.Module):
    """Parameters of ``reference.cs_attention``; a kind that is off has no parameters."""

    def __init__(self, channels: int, hidden: int, *, spatial: bool, channel: bool):
        super().__init__()
        self.spatial = nn.Conv2d(2, 1, 3, padding=1) if spatial else None
        self.channel1 = nn.Linear(channels, hidden) if channel else None
        self.channel2 = nn.Linear(hidden, channels) if channel else None

    def forward(self, x: Tensor, fuse: bool = False) -> Tensor:
        tensors: list[Tensor | None] = []
        for layer in (self.spatial, self.channel1, self.channel2):
            tensors += [None, None] if layer is None else [layer.weight, layer.bias]
        return (ops if fuse else reference).cs_attention(x, *tensors)


class EncoderLayer(nn.Module):
    """Parameters of ``reference.temporal_attention``."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ff1 = nn.Linear(width, hidden)
        self.ff2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.qkv.weight)
        for layer in (self.qkv, self.out):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, fuse: bool = False) -> Tensor:
        parts = (self.qkv, self.out, self.ff1, self.ff2, self.norm1, self.norm2)
        tensors = [t for part in parts for t in (part.weight, part.bias)]
        room = ops if fuse else reference
        return room.temporal_attention(x, *tensors, heads=self.heads, dropout=self.dropout, training=self.training)


class MDSCMBody(nn.Module):
    """Everything before the classifier: (N, planes, frames, bands) clips to (N, tokens, D).

    ``backend`` says who computes (``MDSCM``); it may be changed at any time.
    """

    def __init__(self, network: config.MDSCM, backend: str = "auto"):
        super().__init__()
        self.backend, self.network = backend, network
        self.conv_stem = ConvStem(network.in_channels, network.stem)
        inputs = (network.stem[-1], *network.blocks)
        self.blocks = nn.ModuleList(
            DSCBlock(i, o, relu_first=n > 0, dropout=network.block_dropout)
            for n, (i, o) in enumerate(zip(inputs, inputs[1:]))
        )
        self.attention = CSAttention(
            network.blocks[-1],
            network.attention_width,
            spatial=network.spatial_attention,
            channel=network.channel_attention,
        )
        self.encoder = nn.ModuleList(
            EncoderLayer(network.token_width, network.encoder_heads, network.encoder_ff, network.encoder_dropout)
            for _ in range(network.encoder_layers)
        )

    def forward(self, clips: Tensor) -> Tensor:
        clips = clips[:, : self.network.in_channels]  # not the voice
        fuse = fused(self.backend, clips, self.network)
        x, before = self.conv_stem.fused(clips) if fuse else (self.conv_stem(clips), ops.NOTHING)
        for block in self.blocks:
            x, before = block(x, before, fuse), ops.NOTHING
        x = reference.to_tokens(self.attention(x, fuse))
        for layer in self.encoder:
            x = layer(x, fuse)
        return x


#: The gate before anybody trains it: (n, b) opens for frames whose mean band is above -b / n standard deviations from
#: the corpus' mean.  On the log-mel features of speech that is the level at which a frame is no longer a pause.
GATE = (4.0, 4.5)


class Statistics(nn.Module):
    """Parameters of ``reference.frame_statistics``, and ``voice_statistics``, and the hidden layer on them.

    The map starts as a cosine transform (cepstra) and the gate as one that tells speech from pauses; both are fixed
    unless a trainer asks for their gradients.
    """

    def __init__(self, network: config.MDSCM):
        super().__init__()
        self.dropout = network.statistics_dropout
        self.in_channels, self.voice = network.in_channels, network.voice
        self.gate = nn.Linear(network.mel_bands, 1)
        self.bands = nn.Linear(network.mel_bands, network.statistics, bias=False)
        self.norm = nn.BatchNorm1d(network.statistics_width)
        self.hidden = nn.Linear(network.statistics_width, network.statistics_hidden)
        for layer in (self.gate, self.bands):
            layer.requires_grad_(False)
        nn.init.constant_(self.gate.weight, GATE[0] / network.mel_bands)
        nn.init.constant_(self.gate.bias, GATE[1])
        self.bands.weight.copy_(reference.cepstral_map(network.statistics, network.mel_bands))

    def measure(self, clips: Tensor) -> Tensor:
        """The statistics (N, statistics_width) of clips (N, planes, frames, bands)."""
        channels = clips[:, : self.in_channels]
        weights = reference.frame_weights(channels, self.gate.weight, self.gate.bias)
        cepstra = self.bands(channels)
        values = reference.frame_statistics(cepstra, weights)
        if self.voice:
            heard = clips[:, self.in_channels, :, : config.VOICE_VALUES]
            values = torch.cat((values, reference.voice_statistics(heard, cepstra[:, 0], weights)), dim=1)
        return values

    def forward(self, clips: Tensor) -> Tensor:
        """(N, planes, frames, bands) to (N, statistics_hidden)."""
        values = reference.batch_norm(self.measure(clips), norm_tensors(self.norm), training=self.training)
        return F.dropout(F.relu(self.hidden(values)), self.dropout, self.training)


class MDSCM(nn.Module):
    """One member of the MDSCM family (section 2.1); ``network`` or its fields as keywords say which.

    ``backend``: "auto" (fused ops where there are kernels for the tensors, else the reference), "reference", "cpu" or
    "triton"; one that cannot run the tensors raises BackendError and says why.  It changes no parameter and no name.
    """

    def __init__(self, network: config.MDSCM | None = None, *, backend: str = "auto", **fields: object):
        super().__init__()
        if network is not None and fields:
            raise TypeError(f"MDSCM: expected a config.MDSCM or its fields, got both (fields {', '.join(fields)})")
        self.network = network or config.MDSCM(**fields)  # type: ignore[arg-type]
        self.body = MDSCMBody(self.network, backend)
        self.statistics = Statistics(self.network) if self.network.statistics else None
        self.head = nn.Linear(self.network.features, self.network.classes)

    @property
    def backend(self) -> str:
        return self.body.backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self.body.backend = backend

    def forward(self, clips: Tensor, valid: Tensor | None = None) -> ClipOutput:
        """clips: (B, L, planes, clip_frames, bands); valid: (B, L) bool, the clips that vote (None: all).

        Raises ValueError when the clips do not fit the network.
        """
        batch, count = check_clips(clips, self.network, "MDSCM")
        flat = clips.flatten(0, 1)
        room = ops if fused(self.backend, flat, self.network) else reference
        features, logits = room.emotion_head(
            self.body(flat),
            self.head.weight,
            self.head.bias,
            pooling=self.network.pooling,
            statistics=None if self.statistics is None else self.statistics(flat),
        )
        clip_logits = logits.unflatten(0, (batch, count))
        probabilities = torch.softmax(reference.average_clips(clip_logits, valid), dim=-1)
        return ClipOutput(probabilities, features.unflatten(0, (batch, count)), clip_logits)


def check_clips(clips: Tensor, network: config.MDSCM, what: str) -> tuple[int, int]:
    """(B, L) of a batch of clips, or ValueError naming the expected and the actual shape."""
    expected = (network.planes, network.clip_frames, network.mel_bands)
    if clips.dim() != 5 or tuple(clips.shape[2:]) != expected:
        shape = ", ".join(map(str, expected))
        raise ValueError(f"{what}: clips: expected shape (B, L, {shape}), got {tuple(clips.shape)}")
    return clips.shape[0], clips.shape[1]
