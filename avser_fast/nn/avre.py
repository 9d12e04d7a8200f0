"""Audio-visual representation encoders: one network for log-mel clips and grey faces."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .. import config, reference
from .gradient_reversal import DomainHead
from .mdscm import MDSCMBody, norm_tensors


class AVREOutput(NamedTuple):
    """logits (B, K), the mean over clips; domain_logits (B, 1); features (B, L, D), f_v; clip_logits (B, L, K)."""

    logits: Tensor
    domain_logits: Tensor
    features: Tensor
    clip_logits: Tensor


class BasicBlock(nn.Module):
    """Parameters of ``reference.basic_block``."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        projected = stride != 1 or in_channels != channels
        self.downsample = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False) if projected else None
        self.downsample_norm = nn.BatchNorm2d(channels) if projected else None

    def tensors(self) -> reference.BasicBlock:
        return reference.BasicBlock(
            self.conv1.weight,
            norm_tensors(self.norm1),
            self.conv2.weight,
            norm_tensors(self.norm2),
            None if self.downsample is None else self.downsample.weight,
            None if self.downsample_norm is None else norm_tensors(self.downsample_norm),
            self.stride,
        )


class ResNet18Body(nn.Module):
    """ResNet-18 without its classifier: (N, channels, frames, bands) to (N, 512)."""

    WIDTHS = (64, 128, 256, 512)

    def __init__(self, in_channels: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(64)
        inputs = (64, *self.WIDTHS)
        self.blocks = nn.ModuleList(
            block
            for stage, (i, o) in enumerate(zip(inputs, inputs[1:]))
            for block in (BasicBlock(i, o, 1 if stage == 0 else 2), BasicBlock(o, o, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        blocks = [block.tensors() for block in self.blocks]  # type: ignore[operator]
        return reference.resnet18(x, self.conv.weight, norm_tensors(self.norm), blocks, training=self.training)


class AVRE(nn.Module):
    """Body, emotion classifier per clip, domain classifier behind gradient reversal (section 2.2).

    The domain classifier judges every clip; its logits are averaged like the emotion logits.  ``backend`` is that of
    ``MDSCM`` for the MDSCM body; ResNet-18 is torch's own convolutions.
    """

    def __init__(
        self, encoder: config.AVRE | None = None, *, lam: float = 1.0, backend: str = "auto", **fields: object
    ):
        super().__init__()
        self.encoder = encoder or config.AVRE(**fields)  # type: ignore[arg-type]
        self.body: nn.Module
        if self.encoder.body == "resnet18":
            self.body = ResNet18Body(self.encoder.in_channels)
        else:
            self.body = MDSCMBody(self.encoder.mdscm, backend)
        self.head = nn.Linear(self.encoder.features, self.encoder.classes)
        assert self.encoder.domain_hidden is not None
        self.domain = DomainHead(self.encoder.features, self.encoder.domain_hidden, lam)

    def forward(self, clips: Tensor, valid: Tensor | None = None) -> AVREOutput:
        """clips: (B, L, channels, frames, bands), log-mel clips or face frames; valid: (B, L) bool (None: all)."""
        if clips.dim() != 5 or clips.shape[2] != self.encoder.in_channels:
            expected = f"(B, L, {self.encoder.in_channels}, frames, bands)"
            raise ValueError(f"AVRE: clips: expected shape {expected}, got {tuple(clips.shape)}")
        features, clip_logits = self.encode(clips)
        domain_logits = reference.average_clips(self.domain(features), valid)
        return AVREOutput(reference.average_clips(clip_logits, valid), domain_logits, features, clip_logits)

    def encode(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Features f_v (B, L, D) and clip logits (B, L, K), all that inference needs: no domain is judged."""
        hidden = self.body(clips.flatten(0, 1))
        if self.encoder.body == "mdscm":
            hidden = reference.pool_tokens(hidden, self.encoder.mdscm.pooling)
        features = hidden.unflatten(0, clips.shape[:2])
        return features, self.head(features)
