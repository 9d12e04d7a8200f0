"""Fusion of the speech model and the audio-visual encoder over the clips of an utterance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def lstm_branch(
    x: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    input_bias: Tensor,
    hidden_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:
    """LSTM over (B, clips, width), its last hidden state through a linear layer -> (B, classes).

    Gates are stacked input, forget, cell, output, as in torch.nn.LSTM; the state starts at zero.
    """
    hidden = cell = x.new_zeros(x.shape[0], hidden_weight.shape[1])
    for step in range(x.shape[1]):
        gates = F.linear(x[:, step], input_weight, input_bias) + F.linear(hidden, hidden_weight, hidden_bias)
        i, f, g, o = gates.chunk(4, dim=1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
    return F.linear(hidden, out_weight, out_bias)


def fusion_lstm(
    features: Tensor,
    scores: Tensor,
    feature_branch: Sequence[Tensor],
    score_branch: Sequence[Tensor],
    *,
    feature_weight: float = 0.7,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused logits, branch a (features) and branch b (scores), each (B, classes), fused = w a + (1 - w) b (section
    2.3).

    features: (B, clips, D), speech and audio-visual features side by side; scores: (B, clips, classes), the
    elementwise maximum of both models' clip logits (``fuse_inputs``).  A branch is the six tensors of ``lstm_branch``.
    """
    a = lstm_branch(features, *feature_branch)
    b = lstm_branch(scores, *score_branch)
    return feature_weight * a + (1.0 - feature_weight) * b, a, b


def fuse_inputs(
    speech_features: Tensor, av_features: Tensor, speech_logits: Tensor, av_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Per clip: features side by side (speech first) and the elementwise maximum of the logits."""
    return torch.cat((speech_features, av_features), dim=-1), torch.maximum(speech_logits, av_logits)
