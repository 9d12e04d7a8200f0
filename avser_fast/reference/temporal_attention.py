"""Self-attention over the time steps of a clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import counted_dropout


def to_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) feature maps to (N, H, C * W) tokens: one per time step, channel-major."""
    return x.permute(0, 2, 1, 3).flatten(2)


def temporal_attention(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    ff1_weight: Tensor,
    ff1_bias: Tensor,
    ff2_weight: Tensor,
    ff2_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    *,
    heads: int = 4,
    dropout: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """One post-norm transformer encoder layer with ReLU, (N, tokens, D) -> the same (torch.nn.TransformerEncoderLayer).

    in_weight: (3 D, D), query, key and value stacked; ff1_weight: (d_ff, D); ff2_weight: (D, d_ff).  Dropout acts
    on the attention weights, the hidden layer and both residual branches, with torch's generator, or with
    ``counted_dropout`` of ``seed`` (sites 0 to 3: weights (N, heads, tokens, tokens), first branch, hidden layer,
    second branch, each numbered in C order).
    """
    rate = dropout if training else 0.0

    n, tokens, width = x.shape
    if width % heads:
        raise ValueError(f"temporal_attention: heads: expected a divisor of the width {width}, got {heads}")
    q, k, v = F.linear(x, in_weight, in_bias).view(n, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-1, -2) / (width // heads) ** 0.5, dim=-1)
    mixed = (counted_dropout(weights, rate, seed, 0) @ v).transpose(1, 2).reshape(n, tokens, width)
    y = counted_dropout(F.linear(mixed, out_weight, out_bias), rate, seed, 1)
    x = F.layer_norm(x + y, (width,), norm1_weight, norm1_bias, eps)
    hidden = counted_dropout(F.relu(F.linear(x, ff1_weight, ff1_bias)), rate, seed, 2)
    y = counted_dropout(F.linear(hidden, ff2_weight, ff2_bias), rate, seed, 3)
    return F.layer_norm(x + y, (width,), norm2_weight, norm2_bias, eps)
