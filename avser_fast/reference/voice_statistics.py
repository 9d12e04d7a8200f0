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
#: What a frame that is there, and a step between two such, counts at least.
LEAST_WEIGHT, LEAST_STEP_WEIGHT = 1e-6, 1e-7
#: Octaves from one frame to the next that are still a step and no jump to a multiple of the period.
LARGEST_STEP = 0.15
#: Added to a mean step before its logarithm, octaves, and to the deviation of pitch that is divided by.
STEP_FLOOR, PITCH_FLOOR = 1e-4, 0.02
#: Smallest sum of weights that is divided by, below those of a single frame or step.
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
    * mean and sd of p by v;
    * of the steps d = p[t] - p[t - 1], weighted by sqrt(v[t] v[t - 1]) where |d| < 0.15, plus 1e-7: ln(mean |d| +
      1e-4), sd d, mean max(d, 0), mean max(-d, 0);
    * ln(sum v / sum g), mean s by g;
    * means and sds of h and of q by v;
    * 12 correlations of p with a cepstrum by v, the sd of p plus 0.02.

    A clip of padding alone has means of 0 and correlations of 0.
    """
    there = weights > 0
    p, s = voice[..., 0], voice[..., 3]
    voiced = torch.where(there, weights * torch.sigmoid(VOICED_SLOPE * (s - VOICED_MIDDLE)) + LEAST_WEIGHT, 0.0)
    of_g, of_v = _shares(weights), _shares(voiced)

    _, spread, rest = _centred(cepstra[..., :CORRELATED], of_g)
    unit = rest / spread.unsqueeze(1)
    upper = torch.triu_indices(CORRELATED, CORRELATED, 1, device=voice.device)
    correlations = ((of_g.unsqueeze(-1) * unit).transpose(1, 2) @ unit)[:, upper[0], upper[1]]

    means, deviations, moved = _centred(voice[..., :3], of_v)
    step = p[:, 1:] - p[:, :-1]
    both = there[:, 1:] & there[:, :-1]
    smooth = both & (step.abs() < LARGEST_STEP)
    pair = torch.where(smooth, voiced[:, 1:] * voiced[:, :-1], 1.0).sqrt()
    of_steps = _shares(torch.where(smooth, pair, 0.0) + LEAST_STEP_WEIGHT * both)
    _, step_deviation, _ = _centred(step.unsqueeze(-1), of_steps)
    steps = torch.stack(
        (
            ((of_steps * step.abs()).sum(1) + STEP_FLOOR).log(),
            step_deviation[:, 0],
            (of_steps * step.clamp(min=0)).sum(1),
            (of_steps * (-step).clamp(min=0)).sum(1),
        ),
        dim=1,
    )
    share = (voiced.sum(1).clamp(min=SUM_FLOOR) / weights.sum(1).clamp(min=SUM_FLOOR)).log()
    _, cepstral, swing = _centred(cepstra[..., :VOICE_CEPSTRA], of_v)
    with_pitch = ((of_v * moved[..., 0]).unsqueeze(-1) * swing).sum(1)
    return torch.cat(
        (
            correlations,
            torch.stack((means[:, 0], deviations[:, 0]), dim=1),
            steps,
            torch.stack((share, (of_g * s).sum(1)), dim=1),
            torch.stack((means[:, 1], deviations[:, 1], means[:, 2], deviations[:, 2]), dim=1),
            with_pitch / ((deviations[:, :1] + PITCH_FLOOR) * cepstral),
        ),
        dim=1,
    )
