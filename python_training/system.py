"""The three networks of a recipe, how they see clips and faces, and how they answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avser_fast import config, reference
from avser_fast.config import FrontEnd
from avser_fast.inference.features import engine_module, normalized
from avser_fast.nn import AVRE, MDSCM, Fusion

from .data.batches import not_finite
from .data.prepared import PreparedCorpus
from .settings import Settings

#: Utterances that are scored together.
_TOGETHER = 32


class System(nn.Module):
    """MDSCM, and where the recipe has an encoder also AVRE and Fusion.

    ``backend`` is that of ``nn.MDSCM``.  AVRE sees the first channels of a clip (the static one), and faces
    stretched to the size of a clip.
    """

    def __init__(self, settings: Settings, backend: str = "auto"):
        super().__init__()
        network = settings.network
        self.mdscm = MDSCM(network, backend=backend)
        self.avre: AVRE | None = None
        self.fusion: Fusion | None = None
        if settings.encoder is not None:
            self.avre = AVRE(settings.encoder, backend=backend)
            recipe = settings.fusion_lstm
            width = network.features + settings.encoder.features
            self.fusion = Fusion(config.Fusion(width, network.classes, recipe.hidden, recipe.feature_weight))
        self.clip_size = (network.clip_frames, network.mel_bands)

    def encoder_clips(self, clips: Tensor) -> Tensor:
        """What AVRE sees of clips (B, L, planes, frames, bands)."""
        assert self.avre is not None
        return clips[:, :, : self.avre.encoder.in_channels]

    def encoder_faces(self, faces: Tensor) -> Tensor:
        """Faces (B, n, 1, 224, 40) at the size of a clip, the grey picture in every channel of AVRE."""
        assert self.avre is not None
        if tuple(faces.shape[-2:]) != self.clip_size:
            stretched = F.interpolate(faces.flatten(0, 1), self.clip_size, mode="bilinear", align_corners=False)
            faces = stretched.unflatten(0, faces.shape[:2])
        return faces.expand(-1, -1, self.avre.encoder.in_channels, -1, -1)

    def fuse_inputs(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Features side by side and the larger clip logits, by both encoders as they are: inputs of Fusion."""
        assert self.avre is not None
        speech, seen = self.mdscm(clips), self.avre(self.encoder_clips(clips))
        return reference.fuse_inputs(speech.features, seen.features, speech.clip_logits, seen.clip_logits)


def fused_logits(fusion: Fusion, features: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Logits (B, K) of ``fuse_inputs`` (B, L, ...): as in inference the LSTMs read only the clips that vote,
    ``valid`` (B, L)."""
    counts = valid.sum(1)
    rows, fused = [], []
    for count in counts.unique().tolist():
        rows.append(torch.nonzero(counts == count)[:, 0])
        votes = valid[rows[-1]]
        parts = (x[rows[-1]][votes].unflatten(0, (len(votes), count)) for x in (features, scores))
        fused.append(fusion(*parts).fused)
    return torch.cat(fused)[torch.cat(rows).argsort()]


def halves(state: Mapping[str, Tensor], network: config.MDSCM) -> dict[str, dict[str, Tensor]]:
    """Weights of the same MDSCM answering from one of its two paths alone (``stages.hear_speech``): ``convolutions``
    and ``statistics``; empty without a statistics path."""
    if not network.statistics:
        return {}
    width, doubled = network.pooled_width, 2.0 * state["head.weight"]
    nothing = torch.zeros_like(doubled)
    return {
        "convolutions": {**state, "head.weight": torch.cat((doubled[:, :width], nothing[:, width:]), dim=1)},
        "statistics": {**state, "head.weight": torch.cat((nothing[:, :width], doubled[:, width:]), dim=1)},
    }


def utterance_clips(values: np.ndarray, front_end: FrontEnd, rule: config.ClipRule) -> tuple[Tensor, Tensor]:
    """Clips (L, planes, frames, bands) and which of them vote (L,), of unnormalised features, as inference cuts."""
    normal = normalized(values, front_end)
    clips, valid = engine_module().frame_clips(normal, rule.clips, rule.clip_frames, rule.rule)
    return torch.from_numpy(np.asarray(clips)), torch.from_numpy(np.asarray(valid))


@torch.no_grad()
def score(
    system: System,
    model: str,
    corpus: PreparedCorpus,
    chosen: Sequence[int],
    front_end: FrontEnd,
    rule: config.ClipRule,
    classes: int | None = None,
) -> Tensor:
    """Logits (utterances, classes) on the CPU of ``model`` ("mdscm", "avdal", "fusion") for speech alone.

    ``classes``: of the networks, where the corpus has others.
    """
    system.eval()
    device = next(system.parameters()).device
    features = corpus.features(front_end)
    logits = torch.zeros(len(chosen), classes or len(corpus.labels))
    of_length: dict[int, list[int]] = {}
    clips: dict[int, tuple[Tensor, Tensor]] = {}

    def answer(rows: list[int]) -> None:
        together = torch.stack([clips[r][0] for r in rows]).to(device)
        valid = torch.stack([clips[r][1] for r in rows]).to(device)
        if model == "mdscm":
            found = reference.average_clips(system.mdscm(together).clip_logits, valid)
        elif model == "avdal":
            assert system.avre is not None
            found = system.avre(system.encoder_clips(together), valid).logits
        else:
            assert system.fusion is not None
            found = fused_logits(system.fusion, *system.fuse_inputs(together), valid)
        logits[rows] = found.float().cpu()
        for r in rows:
            del clips[r]

    for row, i in enumerate(chosen):
        values = features[i]
        if values is None:
            raise ValueError(f"{corpus.utterances[i].key}: expected speech, this utterance of {corpus.folder} has none")
        if not np.isfinite(values).all():
            raise not_finite(corpus, i)
        clips[row] = utterance_clips(values, front_end, rule)
        waiting = of_length.setdefault(len(clips[row][0]), [])
        waiting.append(row)
        if len(waiting) == _TOGETHER:
            answer(waiting)
            waiting.clear()
    for waiting in of_length.values():
        if waiting:
            answer(waiting)
    return logits


def measured_front_end(corpus: PreparedCorpus, chosen: Sequence[int], settings: Settings) -> FrontEnd:
    """The recipe's front end, its normalisation measured on the ``chosen`` (training) utterances.

    Mean and standard deviation of each channel over all frames and bands; with ``zero='quiet'`` the 2nd percentile of
    the static channel stands in for its mean.
    """
    front_end = settings.front_end.front_end()
    if front_end.normalization != "global":
        return front_end
    features = corpus.features(front_end)
    values = [f[: front_end.channels] for f in (features[i] for i in chosen) if f is not None]
    if not values:
        raise ValueError(f"{corpus.folder}: expected utterances with speech to train on, got none")
    count = sum(v.shape[1] * v.shape[2] for v in values)
    mean = np.sum([v.sum((1, 2), dtype=np.float64) for v in values], 0) / count
    spread = np.sum([((v - mean[:, None, None]) ** 2).sum((1, 2)) for v in values], 0) / count
    if settings.front_end.zero == "quiet":
        mean[0] = float(np.percentile(np.concatenate([v[0].ravel() for v in values]), 2.0))
    return dataclasses.replace(
        front_end,
        mean=tuple(round(float(v), 4) for v in mean),
        std=tuple(round(float(v), 4) for v in np.sqrt(spread)),
    )
