"""Fake kernels, derivatives and autocast behaviour of the network's ops.

A ``*_backward`` op is differentiated no further: asking for it raises, and names the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .schemas import LIBRARY, autocast, autograd, fake, no_second_derivative

_ops = torch.ops.avser_fast


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _map_like(x: Tensor, n: Any, channels: Any, height: Any, width: Any) -> Tensor:
    """An empty channels-last map (N, C, H, W)."""
    return x.new_empty((n, height, width, channels)).permute(0, 3, 1, 2)


def _dense(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _vector(x: Tensor, channels: Any) -> Tensor:
    return x.new_empty((channels,), dtype=_statistics_dtype(x))


def _or_empty(wanted: bool, tensor: Tensor) -> Tensor:
    return tensor if wanted else tensor.new_empty((0,))


def _given(wanted: bool, grad: Tensor, like: Tensor | None) -> Tensor | None:
    """The gradient of an argument, in its dtype; None for one that was not given or not asked for."""
    return grad.to(like.dtype) if wanted and like is not None else None


def _minus(scale: Tensor | None, shift_grad: Tensor) -> Tensor | None:
    """Gradient of the mean in (x - mean) scale + shift."""
    return None if scale is None else -scale * shift_grad


# ---- strided_conv2d, separable_conv2d


@fake("strided_conv2d")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = weight.shape[0]
    y = _map_like(x, x.shape[0], out, (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)
    return y, _vector(x, out), _vector(x, out)


@fake("separable_conv2d")
def _(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = pointwise.shape[0]
    return _map_like(x, x.shape[0], out, x.shape[2], x.shape[3]), _vector(x, out), _vector(x, out)


def _input_grads(x: Tensor, mean: Tensor | None, need_input: bool) -> tuple[Tensor, Tensor, Tensor]:
    vector = _or_empty(need_input and mean is not None, _vector(x, x.shape[1]))
    return _or_empty(need_input, _map_like(x, *x.shape)), vector, torch.empty_like(vector)


@fake("strided_conv2d_backward")
def _(
    grad: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    y: Tensor,
    y_mean: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    need_input: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    dx, dscale, dshift = _input_grads(x, mean, need_input)
    dweight, dbias = _dense(weight), weight.new_empty((weight.shape[0],))
    return dx, _or_empty(need_weights, dweight), _or_empty(need_weights, dbias), dscale, dshift


@fake("separable_conv2d_backward")
def _(
    grad: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    y: Tensor,
    y_mean: Tensor,
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    need_input: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    dx, dscale, dshift = _input_grads(x, mean, need_input)
    return dx, _or_empty(need_weights, _dense(depthwise)), _or_empty(need_weights, _dense(pointwise)), dscale, dshift


def _convolution_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """inputs: x, two weights (the second may be a bias, which the backward does not read), mean, scale, shift, relu."""
    x, first, second, mean, scale, shift, ctx.relu = inputs
    y, y_mean, _ = output
    ctx.save_for_backward(x, first, second, mean, scale, shift, y, y_mean)


def _of_output(grads: Sequence[Tensor | None], y: Tensor, y_mean: Tensor) -> tuple[Tensor, ...]:
    """What the backward of a convolution reads first: the gradients of its three outputs, and two of these."""
    given = (torch.zeros_like(like) if grad is None else grad for grad, like in zip(grads, (y, y_mean, y_mean)))
    return (*given, y, y_mean)


def _convolution_grad(backward: Any, weights: int) -> Callable[..., tuple[Any, ...]]:
    """The derivative of a convolution whose backward op reads the first ``weights`` of its two tensors of weights."""

    def grad(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, first, second, mean, scale, shift, y, y_mean = ctx.saved_tensors
        need = ctx.needs_input_grad
        dx, dfirst, dsecond, dscale, dshift = backward(
            *_of_output(grads, y, y_mean),
            x,
            *(first, second)[:weights],
            mean,
            scale,
            shift,
            ctx.relu,
            need[0] or any(need[3:6]),
            need[1] or need[2],
        )
        return (
            _given(need[0], dx, x),
            _given(need[1], dfirst, first),
            _given(need[2], dsecond, second),
            _minus(scale, dshift) if need[3] else None,
            _given(need[4], dscale, scale),
            _given(need[5], dshift, shift),
            None,
        )

    return grad


def _low(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Floating tensors in autocast's dtype, float64 left alone as autocast does."""
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


autograd("strided_conv2d", _convolution_grad(_ops.strided_conv2d_backward, 1), _convolution_context)
autograd("separable_conv2d", _convolution_grad(_ops.separable_conv2d_backward, 2), _convolution_context)
autocast("strided_conv2d", lambda dtype, *a: (*_low(dtype, *a[:3]), *a[3:]))
autocast("separable_conv2d", lambda dtype, *a: (*_low(dtype, *a[:3]), *a[3:]))


# ---- pool_shortcut


@fake("pool_shortcut")
def _(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcut: Tensor,
    shortcut_mean: Tensor,
    shortcut_scale: Tensor,
    shortcut_shift: Tensor,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    return _map_like(shortcut, *shortcut.shape)


@fake("pool_shortcut_backward")
def _(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcut: Tensor,
    shortcut_mean: Tensor,
    shortcut_scale: Tensor,
    shortcut_shift: Tensor,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, ...]:
    def vector() -> Tensor:
        return _vector(x, x.shape[1])

    return _map_like(x, *x.shape), vector(), vector(), _map_like(shortcut, *shortcut.shape), vector(), vector()


def _pool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8], inputs[9])
    ctx.dropout = inputs[8]


def _pool_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *paths, seed = ctx.saved_tensors
    dx, dscale, dshift, dshortcut, dshortcut_scale, dshortcut_shift = _ops.pool_shortcut_backward(
        grad, *paths, ctx.dropout, seed
    )
    of_x = (dx, _minus(paths[2], dshift), dscale, dshift)
    of_shortcut = (dshortcut, _minus(paths[6], dshortcut_shift), dshortcut_scale, dshortcut_shift)
    return (*of_x, *of_shortcut, None, None)


autograd("pool_shortcut", _pool_grad, _pool_context)


def _same_dtype(dtype: torch.dtype, x: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Both paths in x's dtype: it is what a convolution made."""
    return (x, *rest[:3], rest[3].to(x.dtype), *rest[4:])


autocast("pool_shortcut", _same_dtype)


# ---- cs_attention


@fake("cs_attention")
def _(x: Tensor, *weights: Tensor | None) -> Tensor:
    return _map_like(x, *x.shape)


@fake("cs_attention_backward")
def _(grad: Tensor, x: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
    return (_map_like(x, *x.shape), *(x.new_empty((0,)) if w is None else _dense(w) for w in weights))


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _attention_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    grads = _ops.cs_attention_backward(grad, *saved)
    return tuple(_given(n, g, s) for n, g, s in zip(ctx.needs_input_grad, grads, saved))


autograd("cs_attention", _attention_grad, _attention_context)
autocast("cs_attention", lambda dtype, x, *weights: (x, *_low(x.dtype, *weights)))


# ---- temporal_attention


@fake("temporal_attention")
def _(x: Tensor, in_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    n, tokens, width = x.shape
    hidden = rest[3].shape[0]

    def tensor(columns: Any) -> Tensor:
        return x.new_empty((n, tokens, columns))

    return tensor(width), tensor(3 * width), tensor(width), tensor(width), tensor(hidden), tensor(width)


@fake("temporal_attention_backward")
def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights, need_weights = rest[5:17], rest[-1]
    return (_dense(x), *(_or_empty(need_weights, _dense(w)) for w in weights))


def _layer_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.heads, ctx.dropout, seed, ctx.eps = inputs[13:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.save_for_backward(*inputs[:13], seed, *output[1:])


def _layer_grad(ctx: Any, grad: Tensor, *_unused: Tensor | None) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    weights, seed, saved = rest[:12], rest[12], rest[13:]
    need = ctx.needs_input_grad
    grads = _ops.temporal_attention_backward(
        grad, x, *saved, *weights, ctx.heads, ctx.dropout, seed, ctx.eps, any(need[1:13])
    )
    return (*(_given(n, g, s) for n, g, s in zip(need, grads, (x, *weights))), None, None, None, None)


autograd("temporal_attention", _layer_grad, _layer_context)
# y in autocast's dtype on every device; torch's layer norm alone makes float32 of it, and on a GPU only.
autocast("temporal_attention", lambda dtype, *a: (*_low(dtype, *a[:9]), *a[9:]))


# ---- emotion_head


@fake("emotion_head")
def _(tokens: Tensor, weight: Tensor, bias: Tensor, pooling: str, statistics: Tensor | None) -> tuple[Tensor, Tensor]:
    n = tokens.shape[0]
    return tokens.new_empty((n, weight.shape[1])), tokens.new_empty((n, weight.shape[0]))


@fake("emotion_head_backward")
def _(
    grad_features: Tensor,
    grad_logits: Tensor,
    tokens: Tensor,
    features: Tensor,
    weight: Tensor,
    pooling: str,
) -> tuple[Tensor, ...]:
    pooled = tokens.shape[2] * (2 if pooling == "mean_std" else 1)
    statistics = tokens.new_empty((tokens.shape[0], weight.shape[1] - pooled))
    return _dense(tokens), _dense(weight), weight.new_empty((weight.shape[0],)), statistics


def _head_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, weight, bias, ctx.pooling, statistics = inputs
    ctx.save_for_backward(tokens, weight, bias, statistics, output[0])


def _head_grad(ctx: Any, grad_features: Tensor | None, grad_logits: Tensor | None) -> tuple[Any, ...]:
    tokens, weight, bias, statistics, features = ctx.saved_tensors
    if grad_features is None:
        grad_features = torch.zeros_like(features)
    if grad_logits is None:
        grad_logits = features.new_zeros((features.shape[0], weight.shape[0]))
    dtokens, dweight, dbias, dstatistics = _ops.emotion_head_backward(
        grad_features, grad_logits, tokens, features, weight, ctx.pooling
    )
    need = ctx.needs_input_grad
    return (
        _given(need[0], dtokens, tokens),
        _given(need[1], dweight, weight),
        _given(need[2], dbias, bias),
        None,
        _given(need[4], dstatistics, statistics),
    )


autograd("emotion_head", _head_grad, _head_context)
autocast("emotion_head", lambda dtype, *a: (*_low(dtype, *a[:3]), a[3], *_low(dtype, a[4])))


# ---- clip_cross_entropy


@fake("clip_cross_entropy")
def _(clip_logits: Tensor, targets: Tensor, valid: Tensor | None) -> Tensor:
    return clip_logits.new_empty((), dtype=_statistics_dtype(clip_logits))


@fake("clip_cross_entropy_backward")
def _(grad: Tensor, clip_logits: Tensor, targets: Tensor, valid: Tensor | None) -> Tensor:
    return _dense(clip_logits)


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _loss_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _ops.clip_cross_entropy_backward(grad, *ctx.saved_tensors), None, None


autograd("clip_cross_entropy", _loss_grad, _loss_context)


# ---- gradient_reversal


class _GradientReversal(torch.autograd.Function):
    """A view whose gradient is turned around; the backward is made of torch's ops, so it has a derivative itself."""

    @staticmethod
    def forward(x: Tensor, lam: Tensor | float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | float], output: Tensor) -> None:
        lam = inputs[1]
        ctx.lam = None if isinstance(lam, Tensor) else lam
        if isinstance(lam, Tensor):
            ctx.save_for_backward(lam)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        lam = ctx.saved_tensors[0].to(grad.dtype) if ctx.lam is None else ctx.lam
        return -lam * grad, None


LIBRARY.impl("gradient_reversal", _GradientReversal.apply, "CompositeImplicitAutograd")
LIBRARY.impl("gradient_reversal.Scalar", _GradientReversal.apply, "CompositeImplicitAutograd")


for _name in (
    "strided_conv2d_backward",
    "separable_conv2d_backward",
    "pool_shortcut_backward",
    "cs_attention_backward",
    "temporal_attention_backward",
    "emotion_head_backward",
    "clip_cross_entropy_backward",
):
    no_second_derivative(_name)
