"""Convolutions of stride 2, 3x3 and 1x1, as products whose left side is gathered while they run.

Columns of the gathered matrix are numbered tap-major, ``k = tap C + channel``; a weight is read in that order, (OUT,
TAPS, C), which is its channels-last memory, and its gradient is written as (OUT, C, TAPS).  Backward: ``input_kernel``
takes the four classes of input positions (even or odd row and column) apart, each of which meets its own taps and no
others; ``weight_kernel`` has the gradients of weight and bias.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import blocks
from .common import (
    affine_gradient,
    cdiv,
    check_map,
    dot,
    launch,
    load_norm,
    load_output_terms,
    merge_statistics,
    narrow,
    new_map,
    new_wide,
    none,
    or_x,
    output_gradient,
    positions,
    precision,
    rectified_affine,
    rows,
    shares,
    store_statistics,
    sum_partials,
    zeros,
)


@triton.jit
def column(k, C, TAPS: tl.constexpr):
    """dy, dx and channel of a gathered column."""
    tap = k // C
    if TAPS == 1:
        return tap, tap, k
    else:
        return tap // 3 - 1, tap % 3 - 1, k - tap * C


@triton.jit
def gathered_block(
    x, mean, scale, shift, first, line, M, H, W, HO, WO, C, start, BLOCK_K: tl.constexpr,
    TAPS: tl.constexpr, ALIGNED: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Gathered matrix (rows ``first + line``, columns) in float32, zero outside the map.  ALIGNED: the columns share
    their tap."""
    k = start + tl.arange(0, BLOCK_K)
    if ALIGNED:
        dy, dx, lowest = column(start, C, TAPS)
        channel = lowest + tl.arange(0, BLOCK_K)
    else:
        dy, dx, channel = column(k, C, TAPS)
        dy = dy[None, :]
        dx = dx[None, :]
    inside = k < TAPS * C
    average, factor, offset = load_norm(mean, scale, shift, channel, inside, NORM)
    row = first + line
    n, h, w = positions(row, HO, WO)
    n0 = first // (HO * WO)
    y = 2 * h[:, None] + dy
    z = 2 * w[:, None] + dx
    mask = (row < M)[:, None] & inside[None, :] & (y >= 0) & (y < H) & (z >= 0) & (z < W)
    at = (((n - n0)[:, None] * H + y) * W + z) * C + channel[None, :]
    value = tl.load(x + n0.to(tl.int64) * H * W * C + at, mask=mask, other=0.0).to(tl.float32)
    value = rectified_affine(value, average, factor, offset, NORM, RELU)
    if NORM:
        value = tl.where(mask, value, 0.0)
    return value


@triton.jit(do_not_specialize=["M"])
def forward_kernel(
    x, weight, bias, mean, scale, shift, y, part_mean, part_m2, M, H, W, HO, WO, C, OUT,
    TAPS: tl.constexpr, ALIGNED: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (M, OUT), M = N HO WO, with the statistics of the rounded y per block of rows."""
    first = tl.program_id(0) * BLOCK_M
    line = tl.arange(0, BLOCK_M)
    row = first + line
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, TAPS * C, BLOCK_K):
        left = gathered_block(
            x, mean, scale, shift, first, line, M, H, W, HO, WO, C, start, BLOCK_K, TAPS, ALIGNED, NORM, RELU
        )  # fmt: skip
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < TAPS * C)[:, None] & (out < OUT)[None, :]
        right = tl.load(weight + k[:, None] + out[None, :] * (TAPS * C), mask=mask, other=0.0)
        acc = dot(narrow(left, x.dtype.element_ty), right, acc, PRECISION)
    if BIAS:
        acc += tl.load(bias + out, mask=out < OUT, other=0.0).to(tl.float32)[None, :]
    rounded = narrow(acc, y.dtype.element_ty)
    mask = (row < M)[:, None] & (out < OUT)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * OUT + out[None, :], rounded, mask=mask)
    store_statistics(rounded.to(tl.float32), first, M, out, out < OUT, part_mean, part_m2, OUT, BLOCK_M)


@triton.jit(do_not_specialize=["N"])
def input_kernel(
    grad, y, grad_mean, grad_var, y_mean, x, weight, mean, scale, shift, dx, partial,
    N, H, W, HO, WO, C, OUT, inverse_count,
    TAPS: tl.constexpr, ALIGNED: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx, and per block the sums for scale and shift (2, C).

    Positions (2 a + p, 2 b + q) for one class (p, q): an even row meets the tap in the middle of output row a, an odd
    one the first tap of output row a + 1 and the last of row a.
    """
    p = tl.program_id(2) // 2
    q = tl.program_id(2) % 2
    height = (H - p + 1) // 2
    width = (W - q + 1) // 2
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    there = row < N * height * width
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = channel < C
    n, a, b = positions(row, tl.maximum(height, 1), tl.maximum(width, 1))  # a class may be empty
    n0 = first // (tl.maximum(height, 1) * tl.maximum(width, 1))
    grad += n0.to(tl.int64) * HO * WO * OUT
    y += n0.to(tl.int64) * HO * WO * OUT
    taps = (1 + p) * (1 + q) if TAPS == 9 else (1 - p) * (1 - q)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, taps * OUT, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if ALIGNED:
            tap = start // OUT
            out = start - tap * OUT + tl.arange(0, BLOCK_K)
        else:
            tap = (k // OUT)[None, :]
            out = k % OUT
        i = tap // (1 + q)
        j = tap % (1 + q)
        known = k < taps * OUT
        ho = a[:, None] + p * (1 - i)
        wo = b[:, None] + q * (1 - j)
        mask = there[:, None] & known[None, :] & (ho < HO) & (wo < WO)
        gm, gv, ym = load_output_terms(grad_mean, grad_var, y_mean, out, known, 0)
        at = (((n - n0)[:, None] * HO + ho) * WO + wo) * OUT + out[None, :]
        left = output_gradient(grad, y, at, mask, gm, gv, ym, inverse_count)
        if TAPS == 9:
            tap = (k // OUT) if not ALIGNED else tap + tl.zeros((BLOCK_K,), tl.int32)
            dy = (1 - p) + p * 2 * (tap // (1 + q))
            dz = (1 - q) + q * 2 * (tap % (1 + q))
            place = dy * 3 + dz
        else:
            place = tl.zeros((BLOCK_K,), tl.int32)
        at = ((out * TAPS + place) * C)[:, None] + channel[None, :]
        right = tl.load(weight + at, mask=known[:, None] & inside[None, :], other=0.0)
        acc = dot(narrow(left, weight.dtype.element_ty), right, acc, PRECISION)
    mask = there[:, None] & inside[None, :]
    at = ((n * H + 2 * a + p) * W + 2 * b + q).to(tl.int64)[:, None] * C + channel[None, :]
    average, factor, offset = load_norm(mean, scale, shift, channel, inside, NORM)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    result, of_scale, of_shift = affine_gradient(acc, value, average, factor, offset, NORM, RELU)
    tl.store(dx + at, narrow(result, dx.dtype.element_ty), mask=mask)
    if NORM:
        line = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 2 * C
        tl.store(partial + line + channel, tl.sum(tl.where(mask, of_scale, 0.0), 0), mask=inside)
        tl.store(partial + line + C + channel, tl.sum(tl.where(mask, of_shift, 0.0), 0), mask=inside)


@triton.jit(do_not_specialize=["M", "steps"])
def weight_kernel(
    grad, y, grad_mean, grad_var, y_mean, x, mean, scale, shift, partial,
    M, H, W, HO, WO, C, OUT, steps, inverse_count,
    TAPS: tl.constexpr, ALIGNED: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[run]: the weight's gradient (OUT, C, TAPS), then the bias's (OUT), over ``steps`` blocks of rows."""
    run = tl.program_id(0)
    out = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(2) * BLOCK_N
    inside = out < OUT
    gm, gv, ym = load_output_terms(grad_mean, grad_var, y_mean, out, inside, 1)
    line = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for step in range(0, steps):
        first = (run * steps + step) * BLOCK_K
        skip = first.to(tl.int64) * OUT
        at = line[None, :] * OUT + out[:, None]
        mask = (line < M - first)[None, :] & inside[:, None]
        g = output_gradient(grad + skip, y + skip, at, mask, gm, gv, ym, inverse_count)
        total += tl.sum(g, 1)
        right = gathered_block(
            x, mean, scale, shift, first, line, M, H, W, HO, WO, C, start, BLOCK_N, TAPS, ALIGNED, NORM, RELU
        )  # fmt: skip
        acc = dot(narrow(g, x.dtype.element_ty), narrow(right, x.dtype.element_ty), acc, PRECISION)
    k = start + tl.arange(0, BLOCK_N)
    partial += run.to(tl.int64) * (OUT * C * TAPS + OUT)
    at = out[:, None] * (C * TAPS) + ((k % C) * TAPS + k // C)[None, :]
    tl.store(partial + at, acc, mask=inside[:, None] & (k < TAPS * C)[None, :])
    if tl.program_id(2) == 0:
        tl.store(partial + OUT * C * TAPS + out, total, mask=inside)


def strided_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.strided_conv2d``."""
    check_map("strided_conv2d", x)
    n, c, h, w = x.shape
    out, taps = weight.shape[0], weight.shape[2] * weight.shape[3]
    ho, wo = (h + 1) // 2, (w + 1) // 2
    y = new_map(x, n, out, ho, wo)
    m = n * ho * wo
    if m == 0:
        return y, new_wide(x, out).zero_(), new_wide(x, out).zero_()
    block = blocks.convolution(out, taps * c, x.dtype)
    tiles = cdiv(m, block.m)
    part_mean, part_m2 = new_wide(x, tiles, out), new_wide(x, tiles, out)
    launch(
        forward_kernel,
        (tiles, cdiv(out, block.n)),
        rows(x),
        rows(weight),
        or_x(x, bias),
        or_x(x, mean),
        or_x(x, scale),
        or_x(x, shift),
        y,
        part_mean,
        part_m2,
        m,
        h,
        w,
        ho,
        wo,
        c,
        out,
        TAPS=taps,
        ALIGNED=c % block.k == 0,
        BIAS=bias is not None,
        NORM=mean is not None,
        RELU=relu,
        PRECISION=precision(x),
        BLOCK_M=block.m,
        BLOCK_N=block.n,
        BLOCK_K=block.k,
        num_warps=block.warps,
        num_stages=block.stages,
    )
    return (y, *merge_statistics(part_mean, part_m2, m, block.m))


def strided_conv2d_backward(
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
    """Gradients of x, weight, bias, scale and shift."""
    n, c, h, w = x.shape
    out, taps, norm = weight.shape[0], weight.shape[2] * weight.shape[3], mean is not None
    ho, wo = (h + 1) // 2, (w + 1) // 2
    m = n * ho * wo
    dx = new_map(x, n, c, h, w) if need_input else none(x)
    dweight = weight.new_empty(weight.shape) if need_weights else none(weight)
    dbias = weight.new_empty((out,)) if need_weights else none(weight)
    vectors = (new_wide(x, c), new_wide(x, c)) if need_input and norm else (none(new_wide(x)), none(new_wide(x)))
    results = (dx, dweight, dbias, *vectors)
    if m == 0:
        return zeros(results)
    grad, y, x, weight = rows(grad), rows(y), rows(x), rows(weight)
    of_output = (grad, y, grad_mean.contiguous(), grad_var.contiguous(), y_mean.contiguous())
    before = (or_x(x, mean), or_x(x, scale), or_x(x, shift))
    flags = {"TAPS": taps, "NORM": norm, "RELU": relu, "PRECISION": precision(x)}
    if need_input:
        block = blocks.convolution(c, out, x.dtype)
        tiles = cdiv(n * ho * wo, block.m)
        partial = new_wide(x, 4 * tiles, 2 * c if norm else 0)
        launch(
            input_kernel,
            (tiles, cdiv(c, block.n), 4),
            *of_output,
            x,
            weight,
            *before,
            dx,
            partial,
            n,
            h,
            w,
            ho,
            wo,
            c,
            out,
            1.0 / m,
            **flags,
            ALIGNED=out % block.k == 0,
            BLOCK_M=block.m,
            BLOCK_N=block.n,
            BLOCK_K=block.k,
            num_warps=block.warps,
            num_stages=block.stages,
        )
        if norm:
            sum_partials(partial, *vectors)
    if need_weights:
        block = blocks.weight_gradient(out, taps * c, x.dtype)
        grid = (cdiv(out, block.m), cdiv(taps * c, block.n))
        steps, runs = shares(cdiv(m, block.k), blocks.splits(grid[0] * grid[1], cdiv(m, block.k)))
        partial = new_wide(x, runs, out * c * taps + out)
        launch(
            weight_kernel,
            (runs, *grid),
            *of_output,
            x,
            *before,
            partial,
            m,
            h,
            w,
            ho,
            wo,
            c,
            out,
            steps,
            1.0 / m,
            **flags,
            ALIGNED=c % block.n == 0,
            BLOCK_M=block.m,
            BLOCK_N=block.n,
            BLOCK_K=block.k,
            num_warps=block.warps,
            num_stages=block.stages,
        )
        sum_partials(partial, dweight, dbias)
    return results
