"""What the kernels of several stems share: launching, rounding, products, prologues, sums in a fixed order.

A map (N, C, H, W) is handled as the matrix of its channels-last memory: row ``(n H + h) W + w``, column ``c``.  Every
sum over rows is made of partial sums, one per program, which ``sum_partials`` adds in a fixed order: the same inputs
give the same bits, and no kernel uses atomics.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import BackendError

_F = TypeVar("_F", bound=Callable[..., Any])

#: Triton's interpreter keeps bfloat16 as 16-bit integers: it truncates where a GPU rounds and multiplies the integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


# ---- on the host


def below_autocast(function: _F) -> _F:
    """The function's own torch calls see the element types that it was given, whatever autocast is set to."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return function(*arguments)

    return call  # type: ignore[return-value]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device and current stream of its first argument; ``options`` are constexprs and warps."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power(n: int, least: int = 16, most: int = 1 << 30) -> int:
    """The power of two at or above n, kept within bounds."""
    return max(least, min(most, 1 << max(0, n - 1).bit_length()))


def precision(x: Tensor) -> str:
    """How products of float32 run: tf32 where torch's setting for matrix products allows it."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def rows(x: Tensor) -> Tensor:
    """The map with channels-last memory, copied only where it is laid out otherwise."""
    return x.contiguous(memory_format=torch.channels_last)


def new_map(x: Tensor, *shape: int) -> Tensor:
    """An empty channels-last map, with the strides that the fake kernels promise."""
    n, c, h, w = shape
    if c == 1 or h * w == 1:
        return x.new_empty(shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def new_wide(x: Tensor, *shape: int) -> Tensor:
    """An empty float32 tensor on x's device."""
    return x.new_empty(shape, dtype=torch.float32)


def none(x: Tensor) -> Tensor:
    """A result that was not asked for."""
    return x.new_empty((0,))


def or_x(x: Tensor, value: Tensor | None) -> Tensor:
    """A pointer for an argument that is absent: its flag keeps the kernel from reading it."""
    return x if value is None else value.contiguous()


def map_limits(op: str, n: int, c: int, h: int, w: int) -> str | None:
    """Why maps of this shape cannot be computed: rows are counted in 32 bits, as are elements from a block's first clip
    on; elements of a whole map in 64."""
    if n * h * w < 2**30 and c * h * w < 2**30 and c < 2**16:
        return None
    most = "fewer than 2^30 positions, 2^30 elements in a clip and 2^16 channels"
    return f"{op}: x: expected {most}, got shape {(n, c, h, w)}"


def check_map(op: str, x: Tensor) -> None:
    why = map_limits(op, *x.shape)
    if why is not None:
        raise BackendError(why)


def dropout_arguments(p: float) -> tuple[int, float]:
    """Threshold of the 24-bit draw and the factor of what is kept, as ``reference.counted_dropout`` has them."""
    return round(p * 2**24), 1.0 / (1.0 - p) if p < 1.0 else 0.0


# ---- rounding, products, prologues


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """value (float32) rounded to nearest even in ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32; a and b in the element type of the maps."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def positions(row, H, W):
    """n, h, w of the rows of a map."""
    n = row // (H * W)
    rest = row - n * (H * W)
    h = rest // W
    return n, h, rest - h * W


@triton.jit
def load_norm(mean, scale, shift, channel, inside, NORM: tl.constexpr):
    """The batch norm of a block of channels, (1, channels); that which changes nothing without one."""
    if NORM:
        mean = tl.load(mean + channel, mask=inside, other=0.0)[None, :]
        scale = tl.load(scale + channel, mask=inside, other=0.0)[None, :]
        shift = tl.load(shift + channel, mask=inside, other=0.0)[None, :]
    else:
        mean = tl.zeros_like(channel).to(tl.float32)[None, :]
        scale = mean + 1.0
        shift = mean
    return mean, scale, shift


@triton.jit
def rectified_affine(value, mean, scale, shift, NORM: tl.constexpr, RELU: tl.constexpr):
    """``reference.rectified_affine`` in float32; NaN stays."""
    if NORM:
        value = (value - mean) * scale + shift
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)
    return value


@triton.jit
def affine_gradient(grad, x, mean, scale, shift, NORM: tl.constexpr, RELU: tl.constexpr):
    """From the gradient of ``rectified_affine(x)``: that of x, and the terms of those of scale and shift."""
    if RELU:
        grad = tl.where(rectified_affine(x, mean, scale, shift, NORM, False) <= 0.0, 0.0, grad)
    if NORM:
        return grad * scale, grad * (x - mean), grad
    else:
        return grad, grad, grad


@triton.jit
def load_output_terms(grad_mean, grad_var, y_mean, channel, inside, AXIS: tl.constexpr):
    """What ``output_gradient`` has of a block of channels, with a new axis."""
    grad_mean = tl.load(grad_mean + channel, mask=inside, other=0.0)
    grad_var = tl.load(grad_var + channel, mask=inside, other=0.0)
    y_mean = tl.load(y_mean + channel, mask=inside, other=0.0)
    return tl.expand_dims(grad_mean, AXIS), tl.expand_dims(grad_var, AXIS), tl.expand_dims(y_mean, AXIS)


@triton.jit
def output_gradient(grad, y, offset, mask, grad_mean, grad_var, y_mean, inverse_count):
    """Gradient of a convolution's output, through its statistics too, in float32.

    grad, y: pointers; grad_mean, grad_var, y_mean: a block of channels, to broadcast with ``offset``.
    """
    g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(y + offset, mask=mask, other=0.0).to(tl.float32)
    g += (grad_mean + 2.0 * (v - y_mean) * grad_var) * inverse_count
    return tl.where(mask, g, 0.0)


@triton.jit
def kept(seed, number, site, threshold):
    """Which elements ``reference.counted_dropout`` keeps: by the first Philox word of their numbers modulo 2^32."""
    count = number.to(tl.uint32)
    zero = count * 0
    word, _1, _2, _3 = tl.philox(seed, count, zero, zero + site, zero)
    return (word >> 8).to(tl.int32) >= threshold


# ---- statistics of an output


@triton.jit
def store_statistics(value, first_row, M, channel, inside, mean, m2, C, BLOCK_M: tl.constexpr):
    """Mean and sum of squared deviations of one block's rows below M: row ``first_row / BLOCK_M`` of (tiles, C)."""
    there = (first_row + tl.arange(0, BLOCK_M) < M)[:, None]
    count = tl.minimum(M - first_row, BLOCK_M).to(tl.float32)
    average = tl.sum(tl.where(there, value, 0.0), 0) / count
    deviation = tl.where(there, value - average[None, :], 0.0)
    offset = (first_row // BLOCK_M).to(tl.int64) * C + channel
    tl.store(mean + offset, average, mask=inside)
    tl.store(m2 + offset, tl.sum(deviation * deviation, 0), mask=inside)


@triton.jit(do_not_specialize=["tiles", "M"])
def merge_statistics_kernel(
    part_mean, part_m2, mean, var, tiles, M, C, TILE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and biased variance of M values from those of tiles of TILE values: Chan's formula for many parts."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (channel < C)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        count = tl.where(tile < tiles, tl.minimum(M - tile * TILE, TILE), 0).to(tl.float32)[:, None]
        offset = tile.to(tl.int64)[:, None] * C + channel[None, :]
        total += count * tl.load(part_mean + offset, mask=(tile < tiles)[:, None] & inside, other=0.0)
    average = tl.sum(total, 0) / M
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        mask = (tile < tiles)[:, None] & inside
        count = tl.where(tile < tiles, tl.minimum(M - tile * TILE, TILE), 0).to(tl.float32)[:, None]
        offset = tile.to(tl.int64)[:, None] * C + channel[None, :]
        apart = tl.load(part_mean + offset, mask=mask, other=0.0) - average[None, :]
        total += tl.load(part_m2 + offset, mask=mask, other=0.0) + count * apart * apart
    tl.store(mean + channel, average, mask=channel < C)
    tl.store(var + channel, tl.sum(total, 0) / M, mask=channel < C)


def merge_statistics(part_mean: Tensor, part_m2: Tensor, count: int, tile: int) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of ``count`` rows from the partial statistics (tiles, C) of ``tile`` rows each."""
    tiles, channels = part_mean.shape
    mean, var = new_wide(part_mean, channels), new_wide(part_mean, channels)
    block = 16
    launch(
        merge_statistics_kernel,
        (cdiv(channels, block),),
        part_mean,
        part_m2,
        mean,
        var,
        tiles,
        count,
        channels,
        TILE=tile,
        BLOCK_T=128,
        BLOCK_C=block,
        num_warps=4,
    )
    return mean, var


# ---- sums of partial results


@triton.jit(do_not_specialize=["parts"])
def sum_partials_kernel(partial, out0, out1, out2, parts, n0, n1, n2, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr):
    """Column sums of ``partial`` (parts, n0 + n1 + n2), split over three outputs and rounded to their element types."""
    column = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    length = n0 + n1 + n2
    sums = tl.zeros((BLOCK_P, BLOCK_L), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        offset = part.to(tl.int64)[:, None] * length + column[None, :]
        mask = (part < parts)[:, None] & (column < length)[None, :]
        sums += tl.load(partial + offset, mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    tl.store(out0 + column, narrow(total, out0.dtype.element_ty), mask=column < n0)
    in1 = (column >= n0) & (column < n0 + n1)
    tl.store(out1 + (column - n0), narrow(total, out1.dtype.element_ty), mask=in1)
    in2 = (column >= n0 + n1) & (column < length)
    tl.store(out2 + (column - n0 - n1), narrow(total, out2.dtype.element_ty), mask=in2)


def sum_partials(partial: Tensor, *outputs: Tensor) -> None:
    """Fill up to three outputs, as long together as a row of ``partial`` (parts, length), with its column sums."""
    filled = [*outputs, *[outputs[0]] * (3 - len(outputs))]
    sizes = [o.numel() for o in outputs] + [0] * (3 - len(outputs))
    parts = partial.shape[0]
    wide = sum(sizes) >= 4096
    block = 128 if wide else 32
    launch(
        sum_partials_kernel,
        (cdiv(sum(sizes), block),),
        partial,
        *filled,
        parts,
        *sizes,
        BLOCK_P=16 if wide else 64,
        BLOCK_L=block,
        num_warps=4,
    )


def shares(items: int, most: int) -> tuple[int, int]:
    """Split ``items`` tiles into at most ``most`` equal runs: (tiles in a run, runs)."""
    each = cdiv(items, max(1, min(items, most)))
    return each, cdiv(items, each)


def zeros(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results for no clips at all."""
    return tuple(o.zero_() for o in outputs)
