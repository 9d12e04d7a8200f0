"""How the voice and the cepstra of a clip move together: what means and deviations of cepstra leave out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import VOICE_CEPSTRA
from .frame_statistics import VARIANCE_EPS

#: Cepstra whose correlations with each other are taken.
CORRELATED = 6
#: The sigmoid that tells voiced frames: its steepness and the voicing at its middle.
VOICED_SLOPE, VOICED_MIDDLE = 15.0, 0.6
#: What a frame that is there counts at least.
LEAST_WEIGHT = 1e-6
#: Frames in the unit of time that the slope of the pitch is taken over: a second where a step is 10 ms.
UNIT_FRAMES = 100
#: Added to the variance of time that is divided by, and to the deviation of pitch, octaves.
TIME_FLOOR, PITCH_FLOOR = 0.01, 0.02
#: Smallest sum of weights that is divided by, below that of a single frame.
SUM_FLOOR = 1e-9


def _shares(weights: Tensor) -> Tensor:
    return weights / weights.sum(1, keepdim=True).clamp(min=SUM_FLOOR)


def _centred(values: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (N, n), deviation (N, n) and what is left of values (N, frames, n) without their mean."""
    shares = shares.unsqueeze(-1)
    mean = (shares * values).sum(1, keepdim=True)
    rest = values - mean
    return mean[:, 0], ((shares * rest.square()).sum(1) + VARIANCE_EPS).sqrt(), rest


def voice_statistics(voice: Tensor, cepstra: Tensor, weights: Tensor) -> Tensor:
    """Statistics (N, 39) of clips over the frames that count.

    voice: (N, frames, 4), pitch p, ratio h, harmonics q and voicing s (``reference.voice``); cepstra: (N, frames, at
    least 12) of the static channel; weights: (N, frames), ``frame_weights`` g, 0 for padding.  A frame is voiced by
    v = g sigmoid(15 (s - 0.6)) + 1e-6.  In this order, sd with 1e-5 under its root:

    * 15 correlations of the first 6 cepstra, weighted by g: (0, 1), (0, 2) .. (4, 5);
    * by v, of p: mean, sd, skewness, and slope over the time t of a frame in hundreds, cov(p, t) / (sd(t)^2 + 0.01);
    * ln(sum v / sum g), mean s by g;
    * means and sds of h and of q by v;
    * 14 correlations of p with 12 cepstra, h and q by v, the sd of p plus 0.02.

    A clip of padding alone has means of 0 and correlations of 0.
    """
    p, s = voice[..., 0], voice[..., 3]
    voiced = torch.where(weights > 0, weights * torch.sigmoid(VOICED_SLOPE * (s - VOICED_MIDDLE)) + LEAST_WEIGHT, 0.0)
    of_g, of_v = _shares(weights), _shares(voiced)

    _, spread, rest = _centred(cepstra[..., :CORRELATED], of_g)
    unit = rest / spread.unsqueeze(1)
    upper = torch.triu_indices(CORRELATED, CORRELATED, 1, device=voice.device)
    correlations = ((of_g.unsqueeze(-1) * unit).transpose(1, 2) @ unit)[:, upper[0], upper[1]]

    time = (torch.arange(p.shape[1], dtype=p.dtype, device=p.device) / UNIT_FRAMES).expand_as(p)
    series = torch.cat((torch.stack((p, time), dim=-1), cepstra[..., :VOICE_CEPSTRA], voice[..., 1:3]), dim=-1)
    means, deviations, rest = _centred(series, of_v)
    pitch = rest[..., :1]
    skewness = (of_v.unsqueeze(-1) * (pitch / deviations[:, None, :1]) ** 3).sum(1)
    with_pitch = (of_v.unsqueeze(-1) * pitch * rest[..., 1:]).sum(1)
    slope = with_pitch[:, :1] / (deviations[:, 1:2].square() + TIME_FLOOR)
    share = (voiced.sum(1).clamp(min=SUM_FLOOR) / weights.sum(1).clamp(min=SUM_FLOOR)).log()
    return torch.cat(
        (
            correlations,
            torch.cat((means[:, :1], deviations[:, :1], skewness, slope), dim=1),
            torch.stack((share, (of_g * s).sum(1)), dim=1),
            torch.stack((means[:, -2], deviations[:, -2], means[:, -1], deviations[:, -1]), dim=1),
            with_pitch[:, 1:] / ((deviations[:, :1] + PITCH_FLOOR) * deviations[:, 2:]),
        ),
        dim=1,
    )
