"""Hands CUDA tensors to ``avser_fast.triton``, imported at the first call; CPU tensors too when interpreting."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from .backends import INTERPRETED
from .schemas import LIBRARY

NAMES = (
    "strided_conv2d",
    "separable_conv2d",
    "pool_shortcut",
    "cs_attention",
    "temporal_attention",
    "emotion_head",
    "clip_cross_entropy",
)


@lru_cache(maxsize=1)
def _kernels() -> Any:
    from .. import triton

    return triton


def register() -> None:
    for stem in NAMES:
        for name in (stem, f"{stem}_backward"):

            def call(*arguments: Any, name: str = name) -> Any:
                return getattr(_kernels(), name)(*arguments)

            for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
                LIBRARY.impl(name, call, key, allow_override=True)
