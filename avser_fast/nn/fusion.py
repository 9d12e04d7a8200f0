"""LSTM fusion as a module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .. import config, reference


class FusionOutput(NamedTuple):
    """fused = w a + (1 - w) b, branch a (features), branch b (scores); each (B, K) logits."""

    fused: Tensor
    a: Tensor
    b: Tensor


class LSTMBranch(nn.Module):
    """Parameters of ``reference.lstm_branch``."""

    def __init__(self, width: int, hidden: int, classes: int):
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.out = nn.Linear(hidden, classes)

    def tensors(self) -> tuple[Tensor, ...]:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        return (*(self.lstm.get_parameter(name) for name in names), self.out.weight, self.out.bias)


class Fusion(nn.Module):
    """``reference.fusion_lstm`` with its parameters (section 2.3)."""

    def __init__(self, fusion: config.Fusion | None = None, **fields: object):
        super().__init__()
        self.fusion = fusion or config.Fusion(**fields)  # type: ignore[arg-type]
        self.feature_branch = LSTMBranch(self.fusion.features, self.fusion.hidden, self.fusion.classes)
        self.score_branch = LSTMBranch(self.fusion.classes, self.fusion.hidden, self.fusion.classes)

    def forward(self, features: Tensor, scores: Tensor) -> FusionOutput:
        """features: (B, L, D) of both models side by side; scores: (B, L, K)."""
        for name, value, width in (
            ("features", features, self.fusion.features),
            ("scores", scores, self.fusion.classes),
        ):
            if value.dim() != 3 or value.shape[-1] != width:
                raise ValueError(f"Fusion: {name}: expected shape (B, L, {width}), got {tuple(value.shape)}")
        return FusionOutput(
            *reference.fusion_lstm(
                features,
                scores,
                self.feature_branch.tensors(),
                self.score_branch.tensors(),
                feature_weight=self.fusion.feature_weight,
            )
        )
