"""From the tokens of a clip to its feature and logits, and from clips to the utterance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Added to the variance before the square root of mean_std pooling.
POOL_EPS = 1e-5


def pool_tokens(tokens: Tensor, pooling: str = "mean") -> Tensor:
    """(N, tokens, D) to (N, D) means, or to (N, 2 D) means and population standard deviations."""
    mean = tokens.mean(1)
    if pooling == "mean":
        return mean
    if pooling == "mean_std":
        return torch.cat((mean, (tokens.var(1, correction=0) + POOL_EPS).sqrt()), dim=1)
    raise ValueError(f"emotion_head: pooling: expected 'mean' or 'mean_std', got {pooling!r}")


def emotion_head(
    tokens: Tensor, weight: Tensor, bias: Tensor, *, pooling: str = "mean", statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Clip feature f_s and class logits: (N, tokens, D) -> ((N, features), (N, classes)); weight (classes, features).

    ``statistics`` (N, H), what the statistics path says, is joined to the pooled tokens.
    """
    features = pool_tokens(tokens, pooling)
    if statistics is not None:
        features = torch.cat((features, statistics), dim=1)
    return features, F.linear(features, weight, bias)


def average_clips(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over the clips that vote: (B, L, K) values, (B, L) bool valid (None: all) -> (B, K)."""
    if valid is None:
        return values.mean(1)
    votes = valid.to(values.dtype).unsqueeze(-1)
    return torch.where(valid.unsqueeze(-1), values, 0.0).sum(1) / votes.sum(1)


def clip_cross_entropy(
    clip_logits: Tensor,
    targets: Tensor,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of the mean over the clips that vote, as ``torch.nn.functional.cross_entropy`` defines it.

    clip_logits: (B, L, K); targets: (B,) class numbers or (B, K) probabilities; valid: (B, L) bool (None: all); weight:
    (K,) class weights.  Returns the mean over utterances, a scalar.
    """
    return F.cross_entropy(average_clips(clip_logits, valid), targets, weight, label_smoothing=label_smoothing)
