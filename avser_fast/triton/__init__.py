"""The network's ops in Triton, for CUDA tensors (and for CPU tensors in Triton's interpreter).

Every function has the name and the arguments of its schema in ``avser_fast.ops.schemas`` and returns what the fake kernel
of ``avser_fast.ops.network`` promises; ``avser_fast.ops`` registers them.  ``NOTES.md``: what each kernel should cost.
"""

from __future__ import annotations

from .pool_shortcut import pool_shortcut, pool_shortcut_backward
from .separable_conv2d import separable_conv2d, separable_conv2d_backward
from .strided_conv2d import strided_conv2d, strided_conv2d_backward
from .temporal_attention import temporal_attention, temporal_attention_backward

__all__ = [
    "pool_shortcut",
    "pool_shortcut_backward",
    "separable_conv2d",
    "separable_conv2d_backward",
    "strided_conv2d",
    "strided_conv2d_backward",
    "temporal_attention",
    "temporal_attention_backward",
]
