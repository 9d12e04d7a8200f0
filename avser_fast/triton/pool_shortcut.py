"""Batch norms of both paths, 3x3 max-pool of stride 2, sum and dropout in one kernel; two kernels backward.

Backward: ``window_kernel`` finds the maxima again, writes for every window which of its nine places held it (15:
dropped out), and has all the sums; ``input_kernel`` hands the gradients of at most four windows to each input without
reading x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import blocks
from .common import (
    cdiv,
    check_map,
    dropout_arguments,
    kept,
    launch,
    load_norm,
    narrow,
    new_map,
    new_wide,
    positions,
    rectified_affine,
    rows,
    shares,
    sum_partials,
    zeros,
)


@triton.jit
def largest_in_window(x, mean, scale, shift, n, h, w, there, H, W, C, channel, inside):
    """Normalised maximum of each window (rows, channels), its value before the norm and its place, 0 to 8.

    As torch chooses: the first of equal maxima in the window's order, and NaN before everything.
    """
    best = tl.zeros((n.shape[0], channel.shape[0]), tl.float32) - float("inf")
    raw = tl.zeros((n.shape[0], channel.shape[0]), tl.float32)
    place = tl.full((n.shape[0], channel.shape[0]), 15, tl.int32)
    for tap in tl.static_range(9):
        y = 2 * h + (tap // 3 - 1)
        z = 2 * w + (tap % 3 - 1)
        mask = (there & (y >= 0) & (y < H) & (z >= 0) & (z < W))[:, None] & inside[None, :]
        at = ((n * H + y) * W + z).to(tl.int64)[:, None] * C + channel[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        normed = rectified_affine(value, mean, scale, shift, True, False)
        take = mask & ((normed > best) | (normed != normed) | (place == 15))
        best = tl.where(take, normed, best)
        raw = tl.where(take, value, raw)
        place = tl.where(take, tap, place)
    return best, raw, place


@triton.jit(do_not_specialize=["M"])
def forward_kernel(
    x, mean, scale, shift, shortcut, s_mean, s_scale, s_shift, seed, out, M, H, W, HO, WO, C, threshold, factor,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (M, C), M = N HO WO."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    n, h, w = positions(row, HO, WO)
    m, s, b = load_norm(mean, scale, shift, channel, inside, True)
    best, _raw, _place = largest_in_window(x, m, s, b, n, h, w, row < M, H, W, C, channel, inside)
    m, s, b = load_norm(s_mean, s_scale, s_shift, channel, inside, True)
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    mask = (row < M)[:, None] & inside[None, :]
    other = tl.load(shortcut + at, mask=mask, other=0.0).to(tl.float32)
    value = best + rectified_affine(other, m, s, b, True, False)
    if DROPOUT:
        value = tl.where(kept(tl.load(seed), at, 0, threshold), value * factor, 0.0)
    tl.store(out + at, narrow(value, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "steps"])
def window_kernel(
    grad, x, mean, scale, shift, shortcut, s_mean, s_scale, s_shift, seed, places, dshortcut, partial,
    M, H, W, HO, WO, C, steps, threshold, factor,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """places (M, C), gradient of the shortcut, and per run of windows the sums for scale, shift and s_scale (3, C).

    Each window gives its gradient to one input, so the sums of the pooled path are sums over windows, too, and both
    paths have the same gradient of their shift.
    """
    run = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    m, s, b = load_norm(mean, scale, shift, channel, inside, True)
    other_m, other_s, _other_b = load_norm(s_mean, s_scale, s_shift, channel, inside, True)
    of_scale = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    of_shift = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    of_other = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(0, steps):
        row = (run * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        n, h, w = positions(row, HO, WO)
        _best, raw, place = largest_in_window(x, m, s, b, n, h, w, row < M, H, W, C, channel, inside)
        at = row.to(tl.int64)[:, None] * C + channel[None, :]
        mask = (row < M)[:, None] & inside[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = kept(tl.load(seed), at, 0, threshold)
            g = tl.where(keep, g * factor, 0.0)
            place = tl.where(keep, place, 15)
        tl.store(places + at, place.to(tl.uint8), mask=mask)
        tl.store(dshortcut + at, narrow(g * other_s, dshortcut.dtype.element_ty), mask=mask)
        other = tl.load(shortcut + at, mask=mask, other=0.0).to(tl.float32)
        of_scale += tl.where(mask, g * (raw - m), 0.0)
        of_shift += g
        of_other += tl.where(mask, g * (other - other_m), 0.0)
    at = run.to(tl.int64) * 3 * C + channel
    tl.store(partial + at, tl.sum(of_scale, 0), mask=inside)
    tl.store(partial + at + C, tl.sum(of_shift, 0), mask=inside)
    tl.store(partial + at + 2 * C, tl.sum(of_other, 0), mask=inside)


@triton.jit(do_not_specialize=["M"])
def input_kernel(grad, places, scale, dx, M, H, W, HO, WO, C, factor, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """dx (M, C), M = N H W: input (h, w) lies in the windows (h + 1) / 2 and, if h is odd, the one before; so for w."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    n, h, w = positions(row, H, W)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for corner in tl.static_range(4):
        y = (h + 1) // 2 - corner // 2
        z = (w + 1) // 2 - corner % 2
        dy = h - 2 * y + 1
        dz = w - 2 * z + 1
        there = (row < M) & (dy <= 2) & (y >= 0) & (y < HO) & (dz <= 2) & (z >= 0) & (z < WO)
        mask = there[:, None] & inside[None, :]
        at = ((n * HO + y) * WO + z).to(tl.int64)[:, None] * C + channel[None, :]
        place = tl.load(places + at, mask=mask, other=15).to(tl.int32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(place == (dy * 3 + dz)[:, None], g, 0.0)
    total *= factor * tl.load(scale + channel, mask=inside, other=0.0)[None, :]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(dx + at, narrow(total, dx.dtype.element_ty), mask=(row < M)[:, None] & inside[None, :])


def pool_shortcut(
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
    """``reference.pool_shortcut``."""
    check_map("pool_shortcut", x)
    _, c, h, w = x.shape
    n, _, ho, wo = shortcut.shape
    out = new_map(shortcut, n, c, ho, wo)
    m = n * ho * wo
    if m == 0:
        return out
    block_m, block_c, warps = blocks.elementwise(c)
    threshold, factor = dropout_arguments(dropout)
    launch(
        forward_kernel,
        (cdiv(m, block_m), cdiv(c, block_c)),
        rows(x),
        *(t.contiguous() for t in (mean, scale, shift)),
        rows(shortcut),
        *(t.contiguous() for t in (shortcut_mean, shortcut_scale, shortcut_shift)),
        seed,
        out,
        m,
        h,
        w,
        ho,
        wo,
        c,
        threshold,
        factor,
        DROPOUT=dropout > 0.0,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    return out


def pool_shortcut_backward(
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
    """Gradients of x, scale, shift, shortcut, shortcut_scale and shortcut_shift."""
    _, c, h, w = x.shape
    n, _, ho, wo = shortcut.shape
    dx, dshortcut = new_map(x, n, c, h, w), new_map(shortcut, n, c, ho, wo)
    dscale, dshift, dshortcut_scale = new_wide(x, c), new_wide(x, c), new_wide(x, c)
    m = n * ho * wo
    if m == 0:
        zeros((dscale, dshift, dshortcut_scale))
        return dx, dscale, dshift, dshortcut, dshortcut_scale, dshift.clone()
    block_m, block_c, warps = blocks.smaller(c)
    columns = cdiv(c, block_c)
    steps, runs = shares(cdiv(m, block_m), cdiv(blocks.PROGRAMS, columns))
    grad, scale = rows(grad), scale.contiguous()
    places = x.new_empty((m, c), dtype=torch.uint8)
    partial = new_wide(x, runs, 3 * c)
    threshold, factor = dropout_arguments(dropout)
    launch(
        window_kernel,
        (runs, columns),
        grad,
        rows(x),
        mean.contiguous(),
        scale,
        shift.contiguous(),
        rows(shortcut),
        *(t.contiguous() for t in (shortcut_mean, shortcut_scale, shortcut_shift)),
        seed,
        places,
        dshortcut,
        partial,
        m,
        h,
        w,
        ho,
        wo,
        c,
        steps,
        threshold,
        factor,
        DROPOUT=dropout > 0.0,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    sum_partials(partial, dscale, dshift, dshortcut_scale)
    launch(
        input_kernel,
        (cdiv(n * h * w, block_m), columns),
        grad,
        places,
        scale,
        dx,
        n * h * w,
        h,
        w,
        ho,
        wo,
        c,
        factor if dropout > 0.0 else 1.0,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    return dx, dscale, dshift, dshortcut, dshortcut_scale, dshift.clone()
