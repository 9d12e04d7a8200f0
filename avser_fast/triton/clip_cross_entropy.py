"""Cross-entropy of the mean over an utterance's clips that vote, summed over utterances; targets are probabilities."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import blocks
from .common import launch, narrow, new_wide, or_x, sum_partials


@triton.jit
def mean_logits(logits, valid, label, L, K, VALID: tl.constexpr, BLOCK_L: tl.constexpr):
    """Mean logits (K) of one utterance, to which the pointers point, and the number of its votes."""
    total = tl.zeros((label.shape[0],), tl.float32)
    votes = 0.0
    for start in range(0, L, BLOCK_L):
        clip = start + tl.arange(0, BLOCK_L)
        there = clip < L
        if VALID:
            there = there & (tl.load(valid + clip, mask=there, other=0).to(tl.int32) != 0)
        mask = there[:, None] & (label < K)[None, :]
        value = tl.load(logits + clip[:, None] * K + label[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value, 0)
        votes += tl.sum(tl.where(there, 1.0, 0.0), 0)
    return total / votes, votes


@triton.jit
def forward_kernel(
    logits, targets, valid, losses, L, K, VALID: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr
):
    """losses (B) = - sum of targets log_softmax(mean logits); logits (B, L, K), targets (B, K), valid (B, L)."""
    one = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, BLOCK_K)
    mean, _votes = mean_logits(logits + one * L * K, valid + one * L, label, L, K, VALID, BLOCK_L)
    mean = tl.where(label < K, mean, -float("inf"))
    top = tl.max(mean, 0)
    logarithm = top + tl.log(tl.sum(tl.exp(mean - top), 0))
    target = tl.load(targets + one * K + label, mask=label < K, other=0.0).to(tl.float32)
    tl.store(losses + one, tl.sum(tl.where(label < K, target * (logarithm - mean), 0.0), 0))


@triton.jit
def backward_kernel(
    grad, logits, targets, valid, dlogits, L, K, VALID: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr
):
    """dlogits (B, L, K), zero for clips that do not vote."""
    one = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, BLOCK_K)
    mean, votes = mean_logits(logits + one * L * K, valid + one * L, label, L, K, VALID, BLOCK_L)
    mean = tl.where(label < K, mean, -float("inf"))
    odds = tl.exp(mean - tl.max(mean, 0))
    target = tl.load(targets + one * K + label, mask=label < K, other=0.0).to(tl.float32)
    g = tl.load(grad).to(tl.float32) * (odds / tl.sum(odds, 0) * tl.sum(target, 0) - target) / votes
    for start in range(0, L, BLOCK_L):
        clip = start + tl.arange(0, BLOCK_L)
        vote = clip < L
        if VALID:
            vote = vote & (tl.load(valid + one * L + clip, mask=vote, other=0).to(tl.int32) != 0)
        value = tl.where(vote[:, None], g[None, :], 0.0)
        mask = (clip < L)[:, None] & (label < K)[None, :]
        at = one * L * K + clip[:, None] * K + label[None, :]
        tl.store(dlogits + at, narrow(value, dlogits.dtype.element_ty), mask=mask)


def clip_cross_entropy(clip_logits: Tensor, targets: Tensor, valid: Tensor | None) -> Tensor:
    """Sum over utterances, a float32 scalar; (B, L, K) logits, (B, K) targets, (B, L) bool valid or None."""
    batch, count, classes = clip_logits.shape
    losses, total = new_wide(clip_logits, batch, 1), new_wide(clip_logits)
    if batch == 0:
        return total.zero_()
    block_l, block_k = blocks.votes(count, classes)
    launch(
        forward_kernel,
        (batch,),
        clip_logits.contiguous(),
        targets.contiguous(),
        or_x(clip_logits, valid),
        losses,
        count,
        classes,
        VALID=valid is not None,
        BLOCK_L=block_l,
        BLOCK_K=block_k,
        num_warps=1,
    )
    sum_partials(losses, total)
    return total


def clip_cross_entropy_backward(grad: Tensor, clip_logits: Tensor, targets: Tensor, valid: Tensor | None) -> Tensor:
    """Gradient of the logits."""
    batch, count, classes = clip_logits.shape
    dlogits = clip_logits.new_empty(clip_logits.shape)
    if batch == 0:
        return dlogits
    block_l, block_k = blocks.votes(count, classes)
    launch(
        backward_kernel,
        (batch,),
        grad,
        clip_logits.contiguous(),
        targets.contiguous(),
        or_x(clip_logits, valid),
        dlogits,
        count,
        classes,
        VALID=valid is not None,
        BLOCK_L=block_l,
        BLOCK_K=block_k,
        num_warps=1,
    )
    return dlogits
