"""Gradient reversal and domain classifier as modules."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops, reference


class GradientReversal(nn.Module):
    """``ops.gradient_reversal`` with its lambda as an attribute that a schedule may change.

    ``lam`` may be a 0-d tensor on the device, which a captured CUDA graph reads anew at every replay.
    """

    def __init__(self, lam: float | Tensor = 1.0):
        super().__init__()
        self.lam = lam

    def forward(self, x: Tensor) -> Tensor:
        return ops.gradient_reversal(x, self.lam)


class DomainHead(nn.Module):
    """Gradient reversal, then linear layers with ReLU between: (..., D) features to a (..., 1) logit (section 2.2)."""

    def __init__(self, features: int, hidden: tuple[int, ...], lam: float = 1.0):
        super().__init__()
        self.reversal = GradientReversal(lam)
        widths = (features, *hidden, 1)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, features: Tensor) -> Tensor:
        weights, biases = zip(*((layer.weight, layer.bias) for layer in self.layers))
        return reference.domain_head(self.reversal(features), weights, biases)
