"""Batch normalisation, whole and in the parts that fused ops hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

#: Batch norm as four tensors: weight, bias, running mean, running variance, each (channels,).
Norm = Sequence[Tensor]
#: A batch norm that is still to be done, as mean, scale and shift, each (channels,); three times None for none.
Before = tuple[Tensor | None, Tensor | None, Tensor | None]
#: Mean and biased variance per channel of one process to those of all, and how many processes there are.
Joined = tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], int]

_joined: Joined | None = None


@contextmanager
def joined_statistics(joined: Joined | None) -> Iterator[None]:
    """Within, training statistics are those of all processes, whose batches are equally large (None: each its own).

    One setting for the whole process: every thread that trains meanwhile is joined.
    """
    global _joined
    before, _joined = _joined, joined
    try:
        yield
    finally:
        _joined = before


def batch_norm(x: Tensor, norm: Norm, *, training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """Batch normalisation of (N, channels, ...); in training the running statistics are updated in place."""
    weight, bias, mean, var = norm
    if training and _joined is not None:
        found = batch_statistics(x)
        affine = batch_norm_affine(*found, x.numel() // x.shape[1], norm, training=True, momentum=momentum, eps=eps)
        return rectified_affine(x, affine, relu=False)
    # torch's backward on CPUs is wrong for contiguous maps of width 1 whose gradient is channels-last (seen with 2.14).
    rows = x.flatten(2) if x.dim() == 4 and x.shape[3] == 1 else x
    return F.batch_norm(rows, mean, var, weight, bias, training, momentum, eps).reshape(x.shape)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of (N, channels, ...), in float32 or wider; 0 when there is nothing.

    What a fused op returns beside its output, so that nobody has to read the output again to normalise it.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    others = [0, *range(2, x.dim())]
    if x.numel() == 0:
        return x.sum(others), x.sum(others)
    var, mean = torch.var_mean(x, others, correction=0)
    return mean, var


def batch_norm_affine(
    mean: Tensor,
    var: Tensor,
    count: int,
    norm: Norm,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``batch_norm`` does to each channel, as (mean, scale, shift): x becomes (x - mean) scale + shift.

    mean, var: ``batch_statistics`` of the ``count`` values per channel.  In training they are used (those of all
    processes together, see ``joined_statistics``), and enter the
    running statistics in place (the variance unbiased, as torch does it); otherwise the running statistics are used.
    Differentiable with respect to mean and var, which is how gradients reach the statistics.  Raises ValueError in
    training on a single value per channel.
    """
    weight, bias, running_mean, running_var = norm
    if not training:
        return running_mean, weight * torch.rsqrt(running_var + eps), bias
    if _joined is not None:
        join, processes = _joined
        mean, var = join(mean, var)
        count *= processes
    if count == 1:
        raise ValueError("batch_norm: x: expected more than 1 value per channel in training, got 1")
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / max(1, count - 1))).to(running_var.dtype), momentum)
    return mean, weight * torch.rsqrt(var + eps), bias


def rectified_affine(x: Tensor, before: Before, *, relu: bool) -> Tensor:
    """(x - mean) scale + shift per channel, then ReLU if asked: what fused ops do to their input."""
    mean, scale, shift = before
    if mean is not None:
        assert scale is not None and shift is not None
        shape = (1, -1) + (1,) * (x.dim() - 2)
        wide = torch.promote_types(x.dtype, mean.dtype)
        x = ((x.to(wide) - mean.view(shape)) * scale.view(shape) + shift.view(shape)).to(x.dtype)
    return F.relu(x) if relu else x
