"""Gradient reversal and the domain classifier behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lam: Tensor | float) -> Tensor:
        ctx.lam = lam
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.lam * grads[0], None


def gradient_reversal(x: Tensor, lam: Tensor | float = 1.0) -> Tensor:
    """Identity in the forward pass (a view), ``-lam`` times the gradient in the backward pass (section 2.2; Ganin
    et al. 2016).

    ``lam`` is a float or a 0-d tensor and gets no gradient itself.
    """
    return _GradientReversal.apply(x, lam)


def reversal_schedule(progress: float) -> float:
    """The usual lambda of domain-adversarial training, 2 / (1 + exp(-10 p)) - 1 for training progress p in [0, 1]."""
    return 2.0 / (1.0 + math.exp(-10.0 * progress)) - 1.0


def domain_head(features: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Linear layers with ReLU between: (..., D) -> (..., 1) domain logit."""
    x = features
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        x = F.linear(F.relu(x) if i else x, weight, bias)
    return x
