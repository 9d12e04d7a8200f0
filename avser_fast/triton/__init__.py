"""The network's ops in Triton, for CUDA tensors (and for CPU tensors in Triton's interpreter).

Every function has the name and the arguments of its schema in ``avser_fast.ops.schemas`` and returns what the fake
kernel of ``avser_fast.ops.network`` promises; ``avser_fast.ops`` registers them.  Inside this package ``import triton``
is the real one.  ``NOTES.md``: what each kernel should cost.
"""

from __future__ import annotations

from . import temporal_attention as _layer
from .clip_cross_entropy import clip_cross_entropy, clip_cross_entropy_backward
from .common import map_limits
from .cs_attention import cs_attention, cs_attention_backward
from .emotion_head import emotion_head, emotion_head_backward
from .pool_shortcut import pool_shortcut, pool_shortcut_backward
from .separable_conv2d import separable_conv2d, separable_conv2d_backward
from .strided_conv2d import strided_conv2d, strided_conv2d_backward
from .temporal_attention import temporal_attention, temporal_attention_backward

_layer_limits = _layer.limits


def limits(op: str, *shape: int) -> str | None:
    """Why ``op`` cannot run on an x of this shape, which its BackendError then says; None if it can."""
    if op == "temporal_attention":
        return _layer_limits(*shape[1:])
    return map_limits(op, *shape) if len(shape) == 4 else None


__all__ = [
    "clip_cross_entropy",
    "clip_cross_entropy_backward",
    "cs_attention",
    "cs_attention_backward",
    "emotion_head",
    "emotion_head_backward",
    "limits",
    "pool_shortcut",
    "pool_shortcut_backward",
    "separable_conv2d",
    "separable_conv2d_backward",
    "strided_conv2d",
    "strided_conv2d_backward",
    "temporal_attention",
    "temporal_attention_backward",
]
