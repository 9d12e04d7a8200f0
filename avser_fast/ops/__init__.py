"""The stems as torch ops: compiled arithmetic, fake kernels and derivatives (``torch.ops.avser_fast.*``).

Every function here has the name, the arguments and the result of its twin in ``avser_fast.reference``.  Tensors on the
CPU are computed by ``avser_fast._torch_ops``, those on a GPU by ``avser_fast.triton``.  BackendError, with the loader's
own words, where that is missing or cannot run the case; ``backends.why_not`` says so beforehand.
"""

from __future__ import annotations

from . import backends
from .backends import load_error
from .features import add_deltas, frame_clips, log_mel, resample
from .stems import (
    NOTHING,
    clip_cross_entropy,
    conv_stem,
    cs_attention,
    dsc_block,
    emotion_head,
    gradient_reversal,
    open_stem,
    pool_shortcut,
    separable_conv2d,
    strided_conv2d,
    temporal_attention,
)

__all__ = [
    "NOTHING",
    "add_deltas",
    "backends",
    "clip_cross_entropy",
    "conv_stem",
    "cs_attention",
    "dsc_block",
    "emotion_head",
    "frame_clips",
    "gradient_reversal",
    "load_error",
    "log_mel",
    "open_stem",
    "pool_shortcut",
    "resample",
    "separable_conv2d",
    "strided_conv2d",
    "temporal_attention",
]
