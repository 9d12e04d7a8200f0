"""The network's stems as differentiable functions; blocks are made of ops that hand batch norms to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..reference import batch_norm_affine, rectified_affine
from ..reference.batch_norm import Before, Norm
from . import (
    backends,
    network,  # noqa: F401  (fake kernels and derivatives)
)
from .triton_kernels import register

register()
_ops = torch.ops.avser_fast
NOTHING: Before = (None, None, None)
_LARGEST_SEED = 2**63 - 1


def _shape(op: str, argument: str, value: Tensor | None, *expected: int | str) -> None:
    """Raises InputError unless the sizes are the expected ones; a word stands for a size that may be anything."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise InputError(f"{op}: {argument}: expected a tensor, got {type(value).__name__}")
    if len(expected) != value.dim() or any(isinstance(e, int) and e != s for e, s in zip(expected, value.shape)):
        words = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        raise InputError(f"{op}: {argument}: expected shape ({words}), got {tuple(value.shape)}")


def _same(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Raises InputError for a weight of another dtype or on another device than x, unless autocast is going to cast."""
    casting = torch.is_autocast_enabled(x.device.type)
    for name, value in others.items():
        if value is None:
            continue
        if value.device != x.device:
            raise InputError(f"{op}: {name}: expected a tensor on {x.device}, got one on {value.device}")
        if not casting and value.dtype != x.dtype:
            raise InputError(f"{op}: {name}: expected {x.dtype} as x is, got {value.dtype}")


def _wide(value: Tensor | None) -> Tensor | None:
    """Norms and statistics are float32."""
    return None if value is None else value.float()


def _before(op: str, channels: int, mean: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> tuple[Any, ...]:
    given = [v is not None for v in (mean, scale, shift)]
    if any(given) and not all(given):
        raise InputError(f"{op}: mean, scale, shift: expected all three or none")
    for name, value in (("mean", mean), ("scale", scale), ("shift", shift)):
        _shape(op, name, value, channels)
    return _wide(mean), _wide(scale), _wide(shift)


def _seed(x: Tensor, dropout: float, seed: int | Tensor | None) -> Tensor:
    """The seed as a tensor on x's device; drawn from torch's generator where dropout needs one that is not given."""
    if isinstance(seed, Tensor):
        return seed.to(device=x.device, dtype=torch.int64)
    if seed is None and dropout > 0.0:
        return torch.randint(_LARGEST_SEED, (), dtype=torch.int64, device=x.device)
    return torch.full((), seed or 0, dtype=torch.int64, device=x.device)


def strided_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.strided_conv2d``: y in x's dtype and channels-last, statistics float32."""
    op = "strided_conv2d"
    _shape(op, "x", x, "N", "in", "H", "W")
    kernel = 1 if isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[3] == 1 else 3
    _shape(op, "weight", weight, "out", x.shape[1], kernel, kernel)
    _shape(op, "bias", bias, weight.shape[0])
    _same(op, x, weight=weight, bias=bias)
    backends.check(op, x)
    before = _before(op, x.shape[1], mean, scale, shift)
    return _ops.strided_conv2d(x, weight, bias, *before, relu)


def separable_conv2d(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.separable_conv2d``: y in x's dtype and channels-last, statistics float32."""
    op = "separable_conv2d"
    _shape(op, "x", x, "N", "in", "H", "W")
    _shape(op, "depthwise", depthwise, x.shape[1], 1, 3, 3)
    _shape(op, "pointwise", pointwise, "out", x.shape[1], 1, 1)
    _same(op, x, depthwise=depthwise, pointwise=pointwise)
    backends.check(op, x)
    before = _before(op, x.shape[1], mean, scale, shift)
    return _ops.separable_conv2d(x, depthwise, pointwise, *before, relu)


def pool_shortcut(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcut: Tensor,
    shortcut_mean: Tensor,
    shortcut_scale: Tensor,
    shortcut_shift: Tensor,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``reference.pool_shortcut`` in x's dtype; without a seed one is drawn from torch's generator."""
    op = "pool_shortcut"
    _shape(op, "x", x, "N", "C", "H", "W")
    channels = x.shape[1]
    _shape(op, "shortcut", shortcut, x.shape[0], channels, (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)
    _same(op, x, shortcut=shortcut)
    backends.check(op, x)
    of_x = _before(op, channels, mean, scale, shift)
    of_shortcut = _before(op, channels, shortcut_mean, shortcut_scale, shortcut_shift)
    return _ops.pool_shortcut(x, *of_x, shortcut, *of_shortcut, dropout, _seed(x, dropout, seed))


def _positions(y: Tensor) -> int:
    return y.shape[0] * y.shape[2] * y.shape[3]


def open_stem(
    x: Tensor, weights: Sequence[Tensor], norms: Sequence[Norm], *, training: bool = False
) -> tuple[Tensor, Before]:
    """``conv_stem`` but for its last batch norm and ReLU, which are left to ``dsc_block`` as ``before``."""
    before: Before = NOTHING
    for weight, norm in zip(weights, norms):
        x, mean, var = strided_conv2d(x, weight, None, *before, relu=before[0] is not None)
        before = batch_norm_affine(mean, var, _positions(x), norm, training=training)
    return x, before


def conv_stem(x: Tensor, weights: Sequence[Tensor], norms: Sequence[Norm], *, training: bool = False) -> Tensor:
    """``reference.conv_stem``: a layer's batch norm and ReLU are done by the layer that follows."""
    return rectified_affine(*open_stem(x, weights, norms, training=training), relu=True)


def dsc_block(
    x: Tensor,
    depthwise1: Tensor,
    pointwise1: Tensor,
    norm1: Norm,
    depthwise2: Tensor,
    pointwise2: Tensor,
    norm2: Norm,
    shortcut_weight: Tensor,
    shortcut_bias: Tensor,
    shortcut_norm: Norm,
    *,
    relu_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    before: Before = NOTHING,
) -> Tensor:
    """``reference.dsc_block``; ``before`` is a batch norm of x that is still to be done, with a ReLU behind it
    whatever ``relu_first`` says."""
    relu = relu_first or before[0] is not None
    y, mean, var = separable_conv2d(x, depthwise1, pointwise1, *before, relu=relu)
    norm = batch_norm_affine(mean, var, _positions(y), norm1, training=training)
    y, mean, var = separable_conv2d(y, depthwise2, pointwise2, *norm, relu=True)
    norm = batch_norm_affine(mean, var, _positions(y), norm2, training=training)
    shortcut, mean, var = strided_conv2d(x, shortcut_weight, shortcut_bias, *before, relu=relu)
    other = batch_norm_affine(mean, var, _positions(shortcut), shortcut_norm, training=training)
    return pool_shortcut(y, *norm, shortcut, *other, dropout=dropout if training else 0.0)


def cs_attention(
    x: Tensor,
    spatial_weight: Tensor | None = None,
    spatial_bias: Tensor | None = None,
    channel_weight1: Tensor | None = None,
    channel_bias1: Tensor | None = None,
    channel_weight2: Tensor | None = None,
    channel_bias2: Tensor | None = None,
) -> Tensor:
    """``reference.cs_attention``; x itself where both kinds are left out."""
    op = "cs_attention"
    _shape(op, "x", x, "N", "C", "H", "W")
    channels = x.shape[1]
    if spatial_weight is None and channel_weight1 is None:
        return x
    hidden = channels if channel_weight1 is None else channel_weight1.shape[0]
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "spatial_weight": (spatial_weight, (1, 2, 3, 3)),
        "spatial_bias": (spatial_bias, (1,)),
        "channel_weight1": (channel_weight1, (hidden, channels)),
        "channel_bias1": (channel_bias1, (hidden,)),
        "channel_weight2": (channel_weight2, (channels, hidden)),
        "channel_bias2": (channel_bias2, (channels,)),
    }
    for name, (value, expected) in shapes.items():
        _shape(op, name, value, *expected)
    tensors = {name: value for name, (value, _) in shapes.items()}
    for kind in (("spatial_weight", "spatial_bias"), tuple(name for name in shapes if name.startswith("channel"))):
        absent = [name for name in kind if tensors[name] is None]
        if absent and len(absent) < len(kind):
            raise InputError(f"{op}: {absent[0]}: expected a tensor beside the others of its kind, got None")
    _same(op, x, **tensors)
    backends.check(op, x)
    return _ops.cs_attention(x, *tensors.values())


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
    """``reference.temporal_attention`` in x's dtype; without a seed one is drawn from torch's generator."""
    op = "temporal_attention"
    _shape(op, "x", x, "N", "tokens", "D")
    width, hidden = x.shape[2], ff1_weight.shape[0]
    if heads < 1 or width % heads:
        raise ValueError(f"temporal_attention: heads: expected a divisor of the width {width}, got {heads}")
    products = {
        "in_weight": (in_weight, (3 * width, width)),
        "in_bias": (in_bias, (3 * width,)),
        "out_weight": (out_weight, (width, width)),
        "out_bias": (out_bias, (width,)),
        "ff1_weight": (ff1_weight, (hidden, width)),
        "ff1_bias": (ff1_bias, (hidden,)),
        "ff2_weight": (ff2_weight, (width, hidden)),
        "ff2_bias": (ff2_bias, (width,)),
    }
    norms = {
        "norm1_weight": norm1_weight,
        "norm1_bias": norm1_bias,
        "norm2_weight": norm2_weight,
        "norm2_bias": norm2_bias,
    }
    for name, (value, expected) in products.items():
        _shape(op, name, value, *expected)
    for name, value in norms.items():
        _shape(op, name, value, width)
    _same(op, x, **{name: value for name, (value, _) in products.items()})
    backends.check(op, x, x.shape[1])
    rate = dropout if training else 0.0
    tensors = [value for value, _ in products.values()] + [value.float() for value in norms.values()]
    return _ops.temporal_attention(x, *tensors, heads, rate, _seed(x, rate, seed), eps)[0]


def emotion_head(
    tokens: Tensor, weight: Tensor, bias: Tensor, *, pooling: str = "mean", statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``reference.emotion_head`` in the dtype of the tokens."""
    op = "emotion_head"
    if pooling not in ("mean", "mean_std"):
        raise ValueError(f"emotion_head: pooling: expected 'mean' or 'mean_std', got {pooling!r}")
    _shape(op, "tokens", tokens, "N", "tokens", "D")
    _shape(op, "statistics", statistics, tokens.shape[0], "H")
    pooled = tokens.shape[2] * (2 if pooling == "mean_std" else 1)
    features = pooled + (0 if statistics is None else statistics.shape[1])
    _shape(op, "weight", weight, "classes", features)
    _shape(op, "bias", bias, weight.shape[0])
    _same(op, tokens, weight=weight, bias=bias, statistics=statistics)
    backends.check(op, tokens)
    return _ops.emotion_head(tokens, weight, bias, pooling, statistics)


def clip_cross_entropy(
    clip_logits: Tensor,
    targets: Tensor,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``reference.clip_cross_entropy``, float32.  Targets get no gradient."""
    op = "clip_cross_entropy"
    _shape(op, "clip_logits", clip_logits, "B", "L", "K")
    batch, count, classes = clip_logits.shape
    hard = not targets.is_floating_point()
    _shape(op, "targets", targets, *((batch,) if hard else (batch, classes)))
    _shape(op, "valid", valid, batch, count)
    _shape(op, "weight", weight, classes)
    backends.check(op, clip_logits)
    wide = clip_logits if clip_logits.dtype == torch.float32 else clip_logits.float()
    soft = F.one_hot(targets, classes).to(wide.dtype) if hard else targets.detach().to(wide.dtype)
    total: Tensor | int = batch
    if weight is not None:
        total = weight.to(wide.dtype)[targets].sum() if hard else batch
    soft = soft * (1.0 - label_smoothing) + label_smoothing / classes
    if weight is not None:
        soft = soft * weight.to(wide.dtype)
    return _ops.clip_cross_entropy(wide, soft, valid) / total


def gradient_reversal(x: Tensor, lam: Tensor | float = 1.0) -> Tensor:
    """``reference.gradient_reversal``: a view; runs on any device, dtype and backend."""
    if isinstance(lam, Tensor):
        _shape("gradient_reversal", "lam", lam)
        return _ops.gradient_reversal(x, lam)
    return _ops.gradient_reversal.Scalar(x, float(lam))
