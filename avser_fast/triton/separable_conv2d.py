"""Depthwise 3x3 and pointwise convolution in one kernel: the depthwise output exists in registers only, both ways.

Backward: ``input_kernel`` gives the gradient of the depthwise output (the one temporary map), ``pointwise_kernel`` that
of the pointwise weight from the recomputed depthwise output, and ``depthwise_kernel`` those of x, the depthwise weight
and the batch norm before it from one reading of x.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import blocks
from .common import (
    affine_gradient,
    below_autocast,
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
def depthwise_block(
    x, weight, mean, scale, shift, first, line, M, H, W, C, channel, NORM: tl.constexpr, RELU: tl.constexpr
):
    """Depthwise output (lines, channels) in float32 by the weight (9, C); padding is zero after the batch norm and the
    ReLU."""
    inside = channel < C
    average, factor, offset = load_norm(mean, scale, shift, channel, inside, NORM)
    row = first + line
    _n, h, w = positions(row, H, W)
    start = x + first.to(tl.int64) * C
    total = tl.zeros((line.shape[0], channel.shape[0]), tl.float32)
    for tap in tl.static_range(9):
        dy = tap // 3 - 1
        dx = tap % 3 - 1
        there = (row < M) & (h + dy >= 0) & (h + dy < H) & (w + dx >= 0) & (w + dx < W)
        mask = there[:, None] & inside[None, :]
        at = (line + (dy * W + dx))[:, None] * C + channel[None, :]
        value = tl.load(start + at, mask=mask, other=0.0).to(tl.float32)
        value = rectified_affine(value, average, factor, offset, NORM, RELU)
        value = tl.where(mask, value, 0.0)  # without a norm, too: then it keeps the nine loads in one layout
        total += value * tl.load(weight + tap * C + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["M"])
def forward_kernel(
    x, depthwise, pointwise, mean, scale, shift, y, part_mean, part_m2, M, H, W, C, OUT,
    NORM: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (M, OUT) = depthwise_block(x) (M, C) pointwise^T, and the statistics of the rounded y per block of rows."""
    first = tl.program_id(0) * BLOCK_M
    line = tl.arange(0, BLOCK_M)
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        left = depthwise_block(x, depthwise, mean, scale, shift, first, line, M, H, W, C, channel, NORM, RELU)
        mask = (channel < C)[:, None] & (out < OUT)[None, :]
        right = tl.load(pointwise + out[None, :] * C + channel[:, None], mask=mask, other=0.0)
        acc = dot(narrow(left, x.dtype.element_ty), right, acc, PRECISION)
    rounded = narrow(acc, y.dtype.element_ty)
    mask = (line < M - first)[:, None] & (out < OUT)[None, :]
    tl.store(y + first.to(tl.int64) * OUT + line[:, None] * OUT + out[None, :], rounded, mask=mask)
    store_statistics(rounded.to(tl.float32), first, M, out, out < OUT, part_mean, part_m2, OUT, BLOCK_M)


@triton.jit(do_not_specialize=["M"])
def input_kernel(
    grad, y, grad_mean, grad_var, y_mean, pointwise, inner, M, C, OUT, inverse_count, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """inner (M, C), the gradient of the depthwise output: the gradient of y (M, OUT) times pointwise (OUT, C)."""
    first = tl.program_id(0) * BLOCK_M
    line = tl.arange(0, BLOCK_M)
    there = (line < M - first)[:, None]
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    grad += first.to(tl.int64) * OUT
    y += first.to(tl.int64) * OUT
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, OUT, BLOCK_K):
        out = start + tl.arange(0, BLOCK_K)
        inside = out < OUT
        gm, gv, ym = load_output_terms(grad_mean, grad_var, y_mean, out, inside, 0)
        at = line[:, None] * OUT + out[None, :]
        g = output_gradient(grad, y, at, there & inside[None, :], gm, gv, ym, inverse_count)
        mask = inside[:, None] & (channel < C)[None, :]
        right = tl.load(pointwise + out[:, None] * C + channel[None, :], mask=mask, other=0.0)
        acc = dot(narrow(g, inner.dtype.element_ty), right, acc, PRECISION)
    at = first.to(tl.int64) * C + line[:, None] * C + channel[None, :]
    tl.store(inner + at, narrow(acc, inner.dtype.element_ty), mask=there & (channel < C)[None, :])


@triton.jit(do_not_specialize=["M", "steps"])
def pointwise_kernel(
    grad, y, grad_mean, grad_var, y_mean, x, depthwise, mean, scale, shift, partial,
    M, H, W, C, OUT, steps, inverse_count,
    NORM: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[run] (OUT, C): gradient of y, transposed, times depthwise_block(x), over ``steps`` blocks of rows."""
    run = tl.program_id(0)
    out = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = out < OUT
    gm, gv, ym = load_output_terms(grad_mean, grad_var, y_mean, out, inside, 1)
    line = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, steps):
        first = (run * steps + step) * BLOCK_K
        skip = first.to(tl.int64) * OUT
        at = line[None, :] * OUT + out[:, None]
        mask = (line < M - first)[None, :] & inside[:, None]
        g = output_gradient(grad + skip, y + skip, at, mask, gm, gv, ym, inverse_count)
        right = depthwise_block(x, depthwise, mean, scale, shift, first, line, M, H, W, C, channel, NORM, RELU)
        acc = dot(narrow(g, x.dtype.element_ty), narrow(right, x.dtype.element_ty), acc, PRECISION)
    at = (run.to(tl.int64) * OUT + out)[:, None] * C + channel[None, :]
    tl.store(partial + at, acc, mask=inside[:, None] & (channel < C)[None, :])


@triton.jit(do_not_specialize=["M", "steps"])
def depthwise_kernel(
    inner, x, depthwise, mean, scale, shift, dx, partial, M, H, W, C, steps,
    NORM: tl.constexpr, RELU: tl.constexpr, NEED_INPUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of x (M, C), and per run of rows of the depthwise weight (C, 9), of scale (C) and of shift (C).

    x stands in the middle of the window: where tap t of an output's window meets it, that output's gradient is read
    once and serves the gradient of x and that of the weight.
    """
    run = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    average, factor, offset = load_norm(mean, scale, shift, channel, inside, NORM)
    line = tl.arange(0, BLOCK_M)
    # Summed over the rows of the block after the last step: a sum over threads costs two barriers.
    zero = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    sum_scale = zero
    sum_shift = zero
    for step in range(0, steps):
        first = (run * steps + step) * BLOCK_M
        skip = first.to(tl.int64) * C
        row = first + line
        _n, h, w = positions(row, H, W)
        here = (row < M)[:, None] & inside[None, :]
        at = line[:, None] * C + channel[None, :]
        value = tl.load(x + skip + at, mask=here, other=0.0).to(tl.float32)
        before = rectified_affine(value, average, factor, offset, NORM, RELU)
        total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for tap in tl.static_range(9):
            dy = 1 - tap // 3
            dw = 1 - tap % 3
            there = (row < M) & (h + dy >= 0) & (h + dy < H) & (w + dw >= 0) & (w + dw < W)
            near = (line + (dy * W + dw))[:, None] * C + channel[None, :]
            g = tl.load(inner + skip + near, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += g * tl.load(depthwise + tap * C + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
            sums = sums[:tap] + (sums[tap] + g * before,) + sums[tap + 1 :]
        grad, of_scale, of_shift = affine_gradient(total, value, average, factor, offset, NORM, RELU)
        if NEED_INPUT:
            tl.store(dx + skip + at, narrow(grad, dx.dtype.element_ty), mask=here)
        if NORM:
            sum_scale += tl.where(here, of_scale, 0.0)
            sum_shift += tl.where(here, of_shift, 0.0)
    partial += run.to(tl.int64) * ((11 if NORM else 9) * C)
    for tap in tl.static_range(9):
        tl.store(partial + channel * 9 + tap, tl.sum(sums[tap], 0), mask=inside)
    if NORM:
        tl.store(partial + 9 * C + channel, tl.sum(sum_scale, 0), mask=inside)
        tl.store(partial + 10 * C + channel, tl.sum(sum_shift, 0), mask=inside)


def by_tap(depthwise: Tensor) -> Tensor:
    """The depthwise weight as the kernels read it, (9, C): a block's channels lie beside each other."""
    return depthwise.reshape(-1, 9).t().contiguous()


def separable_conv2d(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.separable_conv2d``."""
    check_map("separable_conv2d", x)
    n, c, h, w = x.shape
    out = pointwise.shape[0]
    y = new_map(x, n, out, h, w)
    m = n * h * w
    if m == 0:
        return y, x.new_zeros((out,), dtype=new_wide(x).dtype), new_wide(x, out).zero_()
    block = blocks.separable(out, c, x.dtype)
    tiles = cdiv(m, block.m)
    part_mean, part_m2 = new_wide(x, tiles, out), new_wide(x, tiles, out)
    x = rows(x)
    launch(
        forward_kernel,
        (tiles, cdiv(out, block.n)),
        x,
        by_tap(depthwise),
        pointwise.contiguous(),
        or_x(x, mean),
        or_x(x, scale),
        or_x(x, shift),
        y,
        part_mean,
        part_m2,
        m,
        h,
        w,
        c,
        out,
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


@below_autocast
def separable_conv2d_backward(
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
    """Gradients of x, depthwise, pointwise, scale and shift."""
    n, c, h, w = x.shape
    out, m, norm = pointwise.shape[0], n * h * w, mean is not None
    dx = new_map(x, n, c, h, w) if need_input else none(x)
    ddepthwise, dpointwise = depthwise.new_empty(depthwise.shape), pointwise.new_empty(pointwise.shape)
    dscale, dshift = (new_wide(x, c), new_wide(x, c)) if norm else (none(new_wide(x)), none(new_wide(x)))
    if m > 0:
        grad, y, x = rows(grad), rows(y), rows(x)
        taps, pointwise = by_tap(depthwise), pointwise.contiguous()
        of_output = (grad, y, grad_mean.contiguous(), grad_var.contiguous(), y_mean.contiguous())
        before = (or_x(x, mean), or_x(x, scale), or_x(x, shift))
        inner = new_map(x, n, c, h, w)
        block = blocks.convolution(c, out, x.dtype)
        launch(
            input_kernel,
            (cdiv(m, block.m), cdiv(c, block.n)),
            *of_output,
            pointwise,
            inner,
            m,
            c,
            out,
            1.0 / m,
            PRECISION=precision(x),
            BLOCK_M=block.m,
            BLOCK_N=block.n,
            BLOCK_K=block.k,
            num_warps=block.warps,
        )
        if need_weights:
            block = blocks.separable_gradient(out, c, x.dtype)
            tiles = (cdiv(out, block.m), cdiv(c, block.n))
            steps, runs = shares(cdiv(m, block.k), blocks.splits(tiles[0] * tiles[1], cdiv(m, block.k)))
            partial = new_wide(x, runs, out * c)
            launch(
                pointwise_kernel,
                (runs, *tiles),
                *of_output,
                x,
                taps,
                *before,
                partial,
                m,
                h,
                w,
                c,
                out,
                steps,
                1.0 / m,
                NORM=norm,
                RELU=relu,
                PRECISION=precision(x),
                BLOCK_M=block.m,
                BLOCK_N=block.n,
                BLOCK_K=block.k,
                num_warps=block.warps,
                num_stages=block.stages,
            )
            sum_partials(partial, dpointwise)
        block_m, block_c, warps = blocks.window(c)
        columns = cdiv(c, block_c)
        steps, runs = shares(cdiv(m, block_m), cdiv(blocks.PROGRAMS, columns))
        partial = new_wide(x, runs, (11 if norm else 9) * c)
        launch(
            depthwise_kernel,
            (runs, columns),
            inner,
            x,
            taps,
            *before,
            dx,
            partial,
            m,
            h,
            w,
            c,
            steps,
            NORM=norm,
            RELU=relu,
            NEED_INPUT=need_input,
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            num_warps=warps,
        )
        sum_partials(partial, ddepthwise, *((dscale, dshift) if norm else ()))
    else:
        zeros((dx, ddepthwise, dpointwise, dscale, dshift))
    if not need_weights:
        ddepthwise, dpointwise = none(depthwise), none(pointwise)
    if not need_input:
        dscale, dshift = none(dscale), none(dshift)
    return dx, ddepthwise, dpointwise, dscale, dshift
