"""Block sizes of the kernels by shape and element type: the one place where they are chosen.

They depend on nothing else (not on the GPU, not on a measurement at run time), so that results are the same bits
everywhere.  Limits held: 163 KB of shared memory (sm_80) and 255 registers of a thread, see ``tests/test_triton.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .common import cdiv, power

#: Programs that a kernel with a loop of its own is split into, at most: several per multiprocessor of a large GPU.
PROGRAMS = 1024


class Product(NamedTuple):
    """A product of (M, K) and (K, N): block of the result, step in K, warps, stages.

    One stage where a side is computed in registers from many loads: more would take each through shared memory.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int = 1


def convolution(columns: int, depth: int, dtype: torch.dtype) -> Product:
    """Rows are positions, of which there are many; all columns in one block where registers allow it, so that the
    left side, which is computed on the fly, is computed once."""
    narrow = dtype != torch.float32
    n = power(columns, 16, 256 if narrow else 64)
    return Product(64, n, power(depth, 16, 32), 8 if n > 64 or not narrow else 4)


def weight_gradient(rows: int, columns: int, dtype: torch.dtype) -> Product:
    """The product over positions that gives the gradient of a weight (rows, columns); k counts positions."""
    narrow = dtype != torch.float32
    m = power(rows, 16, 128 if narrow else 64)
    return Product(m, power(columns, 16, 64 if narrow else 32), 32, 8 if m > 64 else 4)


def separable(columns: int, depth: int, dtype: torch.dtype) -> Product:
    """``convolution`` whose left side is nine loads: a quarter of it at once where channels are loaded one by one, as
    otherwise their addresses spill."""
    block = convolution(columns, depth, dtype)
    return block if depth % 16 == 0 else block._replace(m=32, k=16)


def separable_gradient(rows: int, columns: int, dtype: torch.dtype) -> Product:
    """``weight_gradient`` whose right side is nine loads, as above."""
    block = weight_gradient(rows, columns, dtype)
    return block if columns % 16 == 0 else block._replace(n=16)


def splits(tiles: int, steps: int) -> int:
    """Into how many runs the positions of a weight gradient are split, beside the ``tiles`` of its result."""
    return max(1, min(steps, cdiv(256, tiles)))


def elementwise(channels: int) -> tuple[int, int, int]:
    """Rows, channels and warps of kernels that go through a map without a product."""
    c = power(channels, 16, 64)
    return 2048 // c, c, 4


def attention(tokens: int, size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens, columns of a head at a time, and warps of the attention over one clip and head."""
    t = power(tokens)
    d = power(size, 16, 32 if dtype == torch.float32 or t > 64 else 64)
    return t, d, {16: 1, 32: 2, 64: 8}.get(t, 16)


def whole_rows(width: int) -> tuple[int, int, int]:
    """Rows, columns and warps of kernels that reduce over a row: all its columns, about 4,096 elements at once."""
    columns = power(width)
    return max(1, min(16, 4096 // columns)), columns, 8 if columns >= 4096 else 4


def smaller(channels: int) -> tuple[int, int, int]:
    """Half of that, for kernels that hold several blocks at once or have few rows (42 of a clip in cs_attention)."""
    c = power(channels, 16, 64)
    return 1024 // c, c, 4


def window(channels: int) -> tuple[int, int, int]:
    """Half of that again where the gradients of nine taps are summed and channels are loaded one by one."""
    rows, c, warps = smaller(channels)
    return rows if channels % 16 == 0 else rows // 2, c, warps


def units(hidden: int) -> tuple[int, int]:
    """Units of a small layer, and columns of its weight at a time, that are held in registers."""
    block = power(hidden)
    return block, max(16, min(128, 4096 // block))


def head(classes: int, tokens: int, width: int) -> tuple[int, int, int]:
    """Classes, tokens and columns at a time of the emotion head."""
    k = power(classes, 4)
    return k, power(tokens, 4, 16), power(width, 16, max(16, min(128, 4096 // k)))


def votes(clips: int, classes: int) -> tuple[int, int]:
    """Clips at a time, and classes, of the loss."""
    k = power(classes, 4)
    return power(clips, 4, max(4, min(32, 1024 // k))), k
