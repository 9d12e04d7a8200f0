"""Pooling over the tokens, the joined statistics and the last linear layer in one kernel, and back."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..reference.emotion_head import POOL_EPS
from . import blocks
from .common import below_autocast, cdiv, launch, narrow, or_x, zeros


@triton.jit
def token_moments(tokens, column, T, D, BLOCK_T: tl.constexpr):
    """Mean and population variance over one clip's tokens, in float32; tokens points at the clip."""
    inside = (column < D)[None, :]
    total = tl.zeros((column.shape[0],), tl.float32)
    for start in range(0, T, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        at = row[:, None] * D + column[None, :]
        total += tl.sum(tl.load(tokens + at, mask=(row < T)[:, None] & inside, other=0.0).to(tl.float32), 0)
    mean = total / T
    total = tl.zeros((column.shape[0],), tl.float32)
    for start in range(0, T, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        at = row[:, None] * D + column[None, :]
        mask = (row < T)[:, None] & inside
        apart = tl.load(tokens + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        total += tl.sum(tl.where(mask, apart * apart, 0.0), 0)
    return mean, total / T


@triton.jit
def scores(weight, value, label, column, known, F, K):
    """What a block of features adds to the logits; weight points at the first of ``known`` features of its kind."""
    mask = (label < K)[:, None] & (column < known)[None, :]
    part = tl.load(weight + label[:, None] * F + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(part * value[None, :], 1)


@triton.jit
def forward_kernel(
    tokens, weight, bias, statistics, features, logits, T, D, H, F, K, eps,
    STD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """features (N, F): means (D), deviations (D) if STD, statistics (H); logits (N, K).  One program for a clip."""
    clip = tl.program_id(0).to(tl.int64)
    tokens += clip * T * D
    features += clip * F
    label = tl.arange(0, BLOCK_K)
    total = tl.load(bias + label, mask=label < K, other=0.0).to(tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mean, variance = token_moments(tokens, column, T, D, BLOCK_T)
        mean = tl.where(column < D, mean, 0.0)
        tl.store(features + column, narrow(mean, features.dtype.element_ty), mask=column < D)
        total += scores(weight, mean, label, column, D, F, K)
        if STD:
            deviation = tl.where(column < D, tl.sqrt(variance + eps), 0.0)
            tl.store(features + D + column, narrow(deviation, features.dtype.element_ty), mask=column < D)
            total += scores(weight + D, deviation, label, column, D, F, K)
    pooled = F - H
    for start in range(0, H, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        value = tl.load(statistics + clip * H + column, mask=column < H, other=0.0)
        tl.store(features + pooled + column, value, mask=column < H)
        total += scores(weight + pooled, value.to(tl.float32), label, column, H, F, K)
    tl.store(logits + clip * K + label, narrow(total, logits.dtype.element_ty), mask=label < K)


@triton.jit
def feature_gradient(grad_features, grad_logits, weight, label, column, known, F, K):
    """Gradient of a block of one clip's features, through the logits too; pointers as for ``scores``."""
    mask = (label < K)[:, None] & (column < known)[None, :]
    part = tl.load(weight + label[:, None] * F + column[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_logits + label, mask=label < K, other=0.0).to(tl.float32)
    total = tl.load(grad_features + column, mask=column < known, other=0.0).to(tl.float32)
    return total + tl.sum(part * g[:, None], 0)


@triton.jit
def backward_kernel(
    grad_features, grad_logits, tokens, weight, dtokens, dstatistics, T, D, H, F, K, eps,
    STD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens and of the statistics.  One program for a clip and a block of columns of either."""
    clip = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    label = tl.arange(0, BLOCK_K)
    grad_features += clip * F
    grad_logits += clip * K
    of_mean = feature_gradient(grad_features, grad_logits, weight, label, column, D, F, K) / T
    if STD:
        mean, variance = token_moments(tokens + clip * T * D, column, T, D, BLOCK_T)
        of_deviation = feature_gradient(grad_features + D, grad_logits, weight + D, label, column, D, F, K)
        slope = of_deviation / (tl.sqrt(variance + eps) * T)
    for start in range(0, T, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        mask = (row < T)[:, None] & (column < D)[None, :]
        at = clip * T * D + row[:, None] * D + column[None, :]
        g = of_mean[None, :] + tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        if STD:
            g += slope[None, :] * (tl.load(tokens + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :])
        tl.store(dtokens + at, narrow(g, dtokens.dtype.element_ty), mask=mask)
    pooled = F - H
    g = feature_gradient(grad_features + pooled, grad_logits, weight + pooled, label, column, H, F, K)
    tl.store(dstatistics + clip * H + column, narrow(g, dstatistics.dtype.element_ty), mask=column < H)


def emotion_head(
    tokens: Tensor, weight: Tensor, bias: Tensor, pooling: str, statistics: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``reference.emotion_head``."""
    n, t, d = tokens.shape
    k, f = weight.shape
    features, logits = tokens.new_empty((n, f)), tokens.new_empty((n, k))
    if n > 0:
        block_k, block_t, block_d = blocks.head(k, t, d)
        launch(
            forward_kernel,
            (n,),
            tokens.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            or_x(tokens, statistics),
            features,
            logits,
            t,
            d,
            0 if statistics is None else statistics.shape[1],
            f,
            k,
            POOL_EPS,
            STD=pooling == "mean_std",
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            BLOCK_K=block_k,
            num_warps=4,
        )
    return features, logits


@below_autocast
def emotion_head_backward(
    grad_features: Tensor, grad_logits: Tensor, tokens: Tensor, features: Tensor, weight: Tensor, pooling: str
) -> tuple[Tensor, ...]:
    """Gradients of tokens, weight, bias and statistics."""
    n, t, d = tokens.shape
    k, f = weight.shape
    h = f - d * (2 if pooling == "mean_std" else 1)
    dtokens, dstatistics = tokens.new_empty((n, t, d)), tokens.new_empty((n, h))
    if n == 0:
        return dtokens, *zeros((weight.new_empty((k, f)), weight.new_empty((k,)))), dstatistics
    block_k, block_t, block_d = blocks.head(k, t, d)
    launch(
        backward_kernel,
        (n, cdiv(max(d, h), block_d)),
        grad_features.contiguous(),
        grad_logits.contiguous(),
        tokens.contiguous(),
        weight.contiguous(),
        dtokens,
        dstatistics,
        t,
        d,
        h,
        f,
        k,
        POOL_EPS,
        STD=pooling == "mean_std",
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return dtokens, grad_logits.t() @ features, grad_logits.sum(0), dstatistics
