"""Losses and schedules of the stages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from avser_fast import reference

from .settings import Adversarial, Optimisation


def class_weights(labels: Sequence[int], classes: int, power: float) -> Tensor:
    """(classes,) weights, the ``power`` of the inverse frequency, whose mean over the utterances is 1.

    A class without utterances, which label smoothing alone asks for, weighs 1.
    """
    counts = torch.bincount(torch.as_tensor(labels), minlength=classes).float()
    weights = (counts.sum() / (classes * counts.clamp(min=1))) ** power
    return torch.where(counts > 0, weights * (counts.sum() / (weights * counts).sum()), 1.0)


def emotion_loss(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of utterance logits (B, K) with soft targets (B, K), weighted by class, mean over the B rows.

    The weights do not enter the mean, as they would in ``torch.nn.functional.cross_entropy``: a row counts the same
    whatever else is in its batch, so parts of a batch add up to the whole.
    """
    soft = targets * (1 - smoothing) + smoothing / targets.shape[1]
    return -(soft * weights * F.log_softmax(logits, dim=1)).sum(1).mean()


def domain_loss(speech: Tensor, faces: Tensor, valid: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of domain logits, speech is 0, faces are 1: the mean of both domains' means.

    ``valid`` (B, L): the clips of ``speech`` (B, L, 1) that are judged; every row counts the same.
    """
    speech, faces = speech.float(), faces.float()
    of_clips = F.binary_cross_entropy_with_logits(speech, torch.zeros_like(speech), reduction="none")
    of_speech = of_clips if valid is None else reference.average_clips(of_clips, valid)
    return 0.5 * (of_speech.mean() + F.binary_cross_entropy_with_logits(faces, torch.ones_like(faces)))


def reversal_lambda(progress: float, settings: Adversarial) -> float:
    """lambda at a ``progress`` from 0 to 1 (see ``Adversarial``)."""
    if settings.schedule == "constant":
        return settings.lam
    if settings.schedule == "warm-up":
        return settings.lam * min(1.0, progress / settings.warmup)
    return settings.lam * reference.reversal_schedule(progress)


def learning_rate(step: int, steps_per_epoch: int, recipe: Optimisation) -> float:
    """Linear warm-up, then the schedule of the recipe, at a step counted from 0."""
    warmup, total = recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "step":
        return recipe.lr * recipe.step_factor ** (step // (recipe.step_epochs * steps_per_epoch))
    return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))
