"""Spatial, then channel attention on maps so small that a launch costs more than their memory: few kernels, no copies.

Names: maps (N, 2, P), largest and mean value of each of the P = H W positions over the channels; gate (N, P), the
spatial sigmoid; pooled (N, 2, C), mean and largest value of each channel of x gate over the positions; channel gate
(N, C).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import blocks
from .common import (
    below_autocast,
    cdiv,
    check_map,
    launch,
    narrow,
    new_map,
    new_wide,
    none,
    or_x,
    positions,
    rows,
    shares,
    sum_partials,
    zeros,
)


@triton.jit(do_not_specialize=["M"])
def maps_kernel(x, maps, M, P, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """maps from x (M, C), M = N P."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = (row < M)[:, None]
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        inside = (channel < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + channel[None, :]
        value = tl.load(x + at, mask=there & inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.where(inside, value, -float("inf")), 1))
        total += tl.sum(value, 1)
    at = row + (row // P) * P
    tl.store(maps + at, largest, mask=row < M)
    tl.store(maps + at + P, total / C, mask=row < M)


@triton.jit(do_not_specialize=["M"])
def spatial_gate_kernel(maps, weight, bias, gate, M, H, W, BLOCK_M: tl.constexpr):
    """gate = sigmoid(conv3x3(maps)) with zero padding."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, h, w = positions(row, H, W)
    total = tl.zeros((BLOCK_M,), tl.float32) + tl.load(bias).to(tl.float32)
    for tap in tl.static_range(9):
        dy = tap // 3 - 1
        dx = tap % 3 - 1
        mask = (row < M) & (h + dy >= 0) & (h + dy < H) & (w + dx >= 0) & (w + dx < W)
        at = row + n * (H * W) + (dy * W + dx)
        total += tl.load(maps + at, mask=mask, other=0.0) * tl.load(weight + tap).to(tl.float32)
        total += tl.load(maps + H * W + at, mask=mask, other=0.0) * tl.load(weight + 9 + tap).to(tl.float32)
    tl.store(gate + row, 1.0 / (1.0 + tl.exp(-total)), mask=row < M)


@triton.jit
def gated_block(x, gate, place, mask, channel, P, C, SPATIAL: tl.constexpr):
    """x, gate and x gate of one clip (places, channels): x and gate point at the clip."""
    value = tl.load(x + place[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if SPATIAL:
        factor = tl.load(gate + place, mask=place < P, other=0.0)[:, None]
        return value, factor, value * factor
    else:
        return value, 1.0, value


@triton.jit
def channel_pool_kernel(
    x, grad, gate, pooled, dgate, count, P, C,
    SPATIAL: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """pooled; backward also the gradient of the channel gate (N, C) and how often the largest value occurs (N, C)."""
    clip = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    x += clip * P * C
    grad += clip * P * C
    gate += clip * P
    largest = tl.full((BLOCK_C,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    product = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, P, BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        mask = (place < P)[:, None] & inside[None, :]
        _value, _factor, seen = gated_block(x, gate, place, mask, channel, P, C, SPATIAL)
        largest = tl.maximum(largest, tl.max(tl.where(mask, seen, -float("inf")), 0))
        total += tl.sum(seen, 0)
        if BACKWARD:
            g = tl.load(grad + place[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            product += tl.sum(g * seen, 0)
    at = clip * 2 * C + channel
    tl.store(pooled + at, total / P, mask=inside)
    tl.store(pooled + at + C, largest, mask=inside)
    if BACKWARD:
        equal = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, P, BLOCK_P):
            place = start + tl.arange(0, BLOCK_P)
            mask = (place < P)[:, None] & inside[None, :]
            _value, _factor, seen = gated_block(x, gate, place, mask, channel, P, C, SPATIAL)
            equal += tl.sum(tl.where(mask & (seen == largest[None, :]), 1.0, 0.0), 0)
        tl.store(dgate + clip * C + channel, product, mask=inside)
        tl.store(count + clip * C + channel, equal, mask=inside)


@triton.jit
def hidden_sums(pooled, weight1, bias1, unit, C, R, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """The R units of the channel MLP's hidden layer before the ReLU, for the mean and for the largest value."""
    first = tl.load(bias1 + unit, mask=unit < R, other=0.0).to(tl.float32)
    second = first
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (unit < R)[:, None] & (k < C)[None, :]
        weight = tl.load(weight1 + unit[:, None] * C + k[None, :], mask=mask, other=0.0).to(tl.float32)
        first += tl.sum(weight * tl.load(pooled + k, mask=k < C, other=0.0)[None, :], 1)
        second += tl.sum(weight * tl.load(pooled + C + k, mask=k < C, other=0.0)[None, :], 1)
    return first, second


@triton.jit
def channel_gate(weight2, bias2, hidden, unit, channel, C, R):
    """Sigmoid of the MLP's second layer, and that layer's weights (channels, units); hidden: sum over both pools."""
    mask = (channel < C)[:, None] & (unit < R)[None, :]
    weight = tl.load(weight2 + channel[:, None] * R + unit[None, :], mask=mask, other=0.0).to(tl.float32)
    score = tl.sum(weight * hidden[None, :], 1)
    score += 2.0 * tl.load(bias2 + channel, mask=channel < C, other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-score)), weight


@triton.jit
def apply_kernel(
    x, gate, pooled, weight1, bias1, weight2, bias2, out, P, C, R,
    SPATIAL: tl.constexpr, CHANNEL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = x gate (channel gate): one clip, one block of channels; the small MLP is computed by each of them."""
    clip = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    x += clip * P * C
    out += clip * P * C
    gate += clip * P
    if CHANNEL:
        unit = tl.arange(0, BLOCK_R)
        first, second = hidden_sums(pooled + clip * 2 * C, weight1, bias1, unit, C, R, BLOCK_K, BLOCK_R)
        hidden = tl.maximum(first, 0.0) + tl.maximum(second, 0.0)
        factor, _weight = channel_gate(weight2, bias2, hidden, unit, channel, C, R)
        factor = factor[None, :]
    else:
        factor = 1.0
    for start in range(0, P, BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        mask = (place < P)[:, None] & inside[None, :]
        _value, _factor, seen = gated_block(x, gate, place, mask, channel, P, C, SPATIAL)
        at = place[:, None] * C + channel[None, :]
        tl.store(out + at, narrow(seen * factor, out.dtype.element_ty), mask=mask)


@triton.jit
def mlp_backward_kernel(
    pooled, dgate, count, weight1, bias1, weight2, bias2, factor, dscore, hidden, dhidden, dmean, dlargest, P, C, R,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One clip's MLP, forward and backward.

    factor (N, C): channel gate; dscore (N, C): gradient before its sigmoid; hidden (N, R): sum of both rectified
    layers; dhidden (N, 2, R): gradients before their ReLUs; dmean, dlargest (N, C): what every position of a channel,
    and what every one of its largest values gets.
    """
    clip = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, BLOCK_R)
    known = unit < R
    first, second = hidden_sums(pooled + clip * 2 * C, weight1, bias1, unit, C, R, BLOCK_C, BLOCK_R)
    both = tl.maximum(first, 0.0) + tl.maximum(second, 0.0)
    tl.store(hidden + clip * R + unit, both, mask=known)
    grad = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        at = clip * C + channel
        value, weight = channel_gate(weight2, bias2, both, unit, channel, C, R)
        g = tl.load(dgate + at, mask=channel < C, other=0.0) * value * (1.0 - value)
        tl.store(factor + at, value, mask=channel < C)
        tl.store(dscore + at, g, mask=channel < C)
        grad += tl.sum(weight * g[:, None], 0)
    first = tl.where(first > 0.0, grad, 0.0)
    second = tl.where(second > 0.0, grad, 0.0)
    tl.store(dhidden + clip * 2 * R + unit, first, mask=known)
    tl.store(dhidden + clip * 2 * R + R + unit, second, mask=known)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        at = clip * C + channel
        mask = known[:, None] & (channel < C)[None, :]
        weight = tl.load(weight1 + unit[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dmean + at, tl.sum(weight * first[:, None], 0) / P, mask=channel < C)
        times = tl.load(count + at, mask=channel < C, other=1.0)
        tl.store(dlargest + at, tl.sum(weight * second[:, None], 0) / times, mask=channel < C)


@triton.jit
def before_channels(grad, seen, factor, pooled, dmean, dlargest, at, channel, mask, C, CHANNEL: tl.constexpr):
    """Gradient of x gate (places, channels) of one clip, to which the pointers point."""
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if CHANNEL:
        inside = channel < C
        g *= tl.load(factor + channel, mask=inside, other=0.0)[None, :]
        g += tl.load(dmean + channel, mask=inside, other=0.0)[None, :]
        largest = tl.load(pooled + C + channel, mask=inside, other=0.0)[None, :]
        g += tl.where(seen == largest, tl.load(dlargest + channel, mask=inside, other=0.0)[None, :], 0.0)
    return tl.where(mask, g, 0.0)


@triton.jit
def spatial_backward_kernel(
    x, grad, gate, maps, pooled, factor, dmean, dlargest, dlogit, count, P, C,
    CHANNEL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dlogit (N, P), gradient before the spatial sigmoid; count (N, P): how many channels hold the largest value."""
    clip = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    x += clip * P * C
    grad += clip * P * C
    largest = tl.load(maps + clip * 2 * P + place, mask=place < P, other=0.0)[:, None]
    total = tl.zeros((BLOCK_P,), tl.float32)
    equal = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        mask = (place < P)[:, None] & (channel < C)[None, :]
        at = place[:, None] * C + channel[None, :]
        value, _gate, seen = gated_block(x, gate + clip * P, place, mask, channel, P, C, True)
        g = before_channels(
            grad, seen, factor + clip * C, pooled + clip * 2 * C, dmean + clip * C, dlargest + clip * C,
            at, channel, mask, C, CHANNEL,
        )  # fmt: skip
        total += tl.sum(g * value, 1)
        equal += tl.sum(tl.where(mask & (value == largest), 1.0, 0.0), 1)
    s = tl.load(gate + clip * P + place, mask=place < P, other=0.0)
    tl.store(dlogit + clip * P + place, total * s * (1.0 - s), mask=place < P)
    tl.store(count + clip * P + place, equal, mask=place < P)


@triton.jit
def input_kernel(
    x, grad, gate, maps, pooled, factor, dmean, dlargest, dlogit, count, weight, dx, P, H, W, C,
    SPATIAL: tl.constexpr, CHANNEL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of one clip and a block of channels."""
    clip = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x += clip * P * C
    grad += clip * P * C
    dx += clip * P * C
    for start in range(0, P, BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        mask = (place < P)[:, None] & (channel < C)[None, :]
        at = place[:, None] * C + channel[None, :]
        value, s, seen = gated_block(x, gate + clip * P, place, mask, channel, P, C, SPATIAL)
        g = before_channels(
            grad, seen, factor + clip * C, pooled + clip * 2 * C, dmean + clip * C, dlargest + clip * C,
            at, channel, mask, C, CHANNEL,
        )  # fmt: skip
        if SPATIAL:
            _n, h, w = positions(place, H, W)
            of_largest = tl.zeros((BLOCK_P,), tl.float32)
            of_mean = tl.zeros((BLOCK_P,), tl.float32)
            for tap in tl.static_range(9):
                dy = 1 - tap // 3
                dw = 1 - tap % 3
                near = (place < P) & (h + dy >= 0) & (h + dy < H) & (w + dw >= 0) & (w + dw < W)
                z = tl.load(dlogit + clip * P + place + (dy * W + dw), mask=near, other=0.0)
                of_largest += z * tl.load(weight + tap).to(tl.float32)
                of_mean += z * tl.load(weight + 9 + tap).to(tl.float32)
            largest = tl.load(maps + clip * 2 * P + place, mask=place < P, other=0.0)
            of_largest /= tl.load(count + clip * P + place, mask=place < P, other=1.0)
            g = g * s + of_mean[:, None] / C + tl.where(value == largest[:, None], of_largest[:, None], 0.0)
        tl.store(dx + at, narrow(g, dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "steps"])
def spatial_weight_kernel(maps, dlogit, partial, M, H, W, steps, BLOCK_M: tl.constexpr):
    """partial[run] (19): gradients of the spatial weight (2, 9) and bias over ``steps`` blocks of positions."""
    run = tl.program_id(0)
    line = tl.arange(0, 32)
    sums = tl.zeros((32,), tl.float32)
    for step in range(0, steps):
        row = (run * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        n, h, w = positions(row, H, W)
        g = tl.load(dlogit + row, mask=row < M, other=0.0)
        sums += tl.where(line == 18, tl.sum(g, 0), 0.0)
        for tap in tl.static_range(9):
            dy = tap // 3 - 1
            dx = tap % 3 - 1
            mask = (row < M) & (h + dy >= 0) & (h + dy < H) & (w + dx >= 0) & (w + dx < W)
            at = row + n * (H * W) + (dy * W + dx)
            sums += tl.where(line == tap, tl.sum(g * tl.load(maps + at, mask=mask, other=0.0), 0), 0.0)
            of_mean = tl.load(maps + H * W + at, mask=mask, other=0.0)
            sums += tl.where(line == 9 + tap, tl.sum(g * of_mean, 0), 0.0)
    tl.store(partial + run * 19 + line, sums, mask=line < 19)


def _spatial(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """maps and gate."""
    n, c, h, w = x.shape
    m = n * h * w
    maps, gate = new_wide(x, n, 2, h * w), new_wide(x, n, h * w)
    block_m, block_c, warps = blocks.smaller(c)
    launch(
        maps_kernel, (cdiv(m, block_m),), x, maps, m, h * w, c, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=warps
    )  # fmt: skip
    launch(spatial_gate_kernel, (cdiv(m, 128),), maps, weight, bias, gate, m, h, w, BLOCK_M=128, num_warps=4)
    return maps, gate


def cs_attention(
    x: Tensor,
    spatial_weight: Tensor | None,
    spatial_bias: Tensor | None,
    channel_weight1: Tensor | None,
    channel_bias1: Tensor | None,
    channel_weight2: Tensor | None,
    channel_bias2: Tensor | None,
) -> Tensor:
    """``reference.cs_attention``."""
    check_map("cs_attention", x)
    n, c, h, w = x.shape
    out = new_map(x, n, c, h, w)
    p = h * w
    if n * p == 0:
        return out
    x = rows(x)
    gate, pooled = x, x
    spatial, channel = spatial_weight is not None, channel_weight1 is not None
    if spatial_weight is not None and spatial_bias is not None:
        _, gate = _spatial(x, spatial_weight.contiguous(), spatial_bias)
    block_p, block_c, warps = blocks.smaller(c)
    grid = (n, cdiv(c, block_c))
    sizes = {"SPATIAL": spatial, "BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps}
    if channel:
        pooled = new_wide(x, n, 2, c)
        launch(channel_pool_kernel, grid, x, x, gate, pooled, pooled, pooled, p, c, BACKWARD=False, **sizes)
    hidden = channel_weight1.shape[0] if channel_weight1 is not None else 1
    block_r, block_k = blocks.units(hidden)
    launch(
        apply_kernel,
        grid,
        x,
        gate,
        pooled,
        or_x(x, channel_weight1),
        or_x(x, channel_bias1),
        or_x(x, channel_weight2),
        or_x(x, channel_bias2),
        out,
        p,
        c,
        hidden,
        CHANNEL=channel,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        **sizes,
    )
    return out


@below_autocast
def cs_attention_backward(
    grad: Tensor,
    x: Tensor,
    spatial_weight: Tensor | None,
    spatial_bias: Tensor | None,
    channel_weight1: Tensor | None,
    channel_bias1: Tensor | None,
    channel_weight2: Tensor | None,
    channel_bias2: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of x and of the six weights; empty for those that are absent."""
    n, c, h, w = x.shape
    p = h * w
    weights = (spatial_weight, spatial_bias, channel_weight1, channel_bias1, channel_weight2, channel_bias2)
    dx = new_map(x, n, c, h, w)
    if n * p == 0:
        return (dx, *(none(x) if t is None else zeros([t.new_empty(t.shape)])[0] for t in weights))
    grad, x = rows(grad), rows(x)
    gate, maps, pooled, factor, dmean, dlargest = (x,) * 6
    spatial, channel = spatial_weight is not None, channel_weight1 is not None
    block_p, block_c, warps = blocks.smaller(c)
    grid = (n, cdiv(c, block_c))
    sizes = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps}
    spatial_grads = tuple(none(x) for _ in range(2))
    channel_grads = tuple(none(x) for _ in range(4))
    if spatial_weight is not None and spatial_bias is not None:
        spatial_weight = spatial_weight.contiguous()
        maps, gate = _spatial(x, spatial_weight, spatial_bias)
    if (
        channel_weight1 is not None
        and channel_bias1 is not None
        and channel_weight2 is not None
        and channel_bias2 is not None
    ):
        hidden = channel_weight1.shape[0]
        pooled, dgate, count = new_wide(x, n, 2, c), new_wide(x, n, c), new_wide(x, n, c)
        launch(
            channel_pool_kernel, grid, x, grad, gate, pooled, dgate, count, p, c,
            SPATIAL=spatial, BACKWARD=True, **sizes,
        )  # fmt: skip
        factor, dscore, dmean, dlargest = (new_wide(x, n, c) for _ in range(4))
        both, dhidden = new_wide(x, n, hidden), new_wide(x, n, 2, hidden)
        block_r, block_k = blocks.units(hidden)
        launch(
            mlp_backward_kernel,
            (n,),
            pooled,
            dgate,
            count,
            channel_weight1.contiguous(),
            channel_bias1.contiguous(),
            channel_weight2.contiguous(),
            channel_bias2.contiguous(),
            factor,
            dscore,
            both,
            dhidden,
            dmean,
            dlargest,
            p,
            c,
            hidden,
            BLOCK_C=block_k,
            BLOCK_R=block_r,
            num_warps=4,
        )
        of_units = dhidden.view(2 * n, hidden)
        sums = (of_units.t() @ pooled.view(2 * n, c), of_units.sum(0), dscore.t() @ both, 2.0 * dscore.sum(0))
        channel_grads = tuple(t.to(x.dtype) for t in sums)
    dlogit, equal = x, x
    if spatial_weight is not None and spatial_bias is not None:
        dlogit, equal = new_wide(x, n, p), new_wide(x, n, p)
        launch(
            spatial_backward_kernel,
            (n, cdiv(p, block_p)),
            x,
            grad,
            gate,
            maps,
            pooled,
            factor,
            dmean,
            dlargest,
            dlogit,
            equal,
            p,
            c,
            CHANNEL=channel,
            **sizes,
        )
        steps, runs = shares(cdiv(n * p, 128), 64)
        partial = new_wide(x, runs, 19)
        launch(spatial_weight_kernel, (runs,), maps, dlogit, partial, n * p, h, w, steps, BLOCK_M=128, num_warps=4)
        spatial_grads = (spatial_weight.new_empty(spatial_weight.shape), spatial_bias.new_empty(spatial_bias.shape))
        sum_partials(partial, *spatial_grads)
    launch(
        input_kernel,
        grid,
        x,
        grad,
        gate,
        maps,
        pooled,
        factor,
        dmean,
        dlargest,
        dlogit,
        equal,
        or_x(x, spatial_weight),
        dx,
        p,
        h,
        w,
        c,
        SPATIAL=spatial,
        CHANNEL=channel,
        **sizes,
    )
    return (dx, *spatial_grads, *channel_grads)
