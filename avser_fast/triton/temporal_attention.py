"""A transformer encoder layer: torch's matrix products, and between them kernels that read and write each tensor once.

``attention_kernel`` does the short attention of one clip and head; ``residual_norm_kernel`` bias, dropout, residual and
layer norm; ``hidden_kernel`` ReLU and dropout.  Backward the attention weights, the dropout masks and the layer
norms are computed again from what the forward returned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import BackendError
from . import blocks
from .common import (
    below_autocast,
    cdiv,
    dot,
    dropout_arguments,
    kept,
    launch,
    narrow,
    new_wide,
    none,
    precision,
    shares,
    sum_partials,
    zeros,
)

#: Tokens of a clip that one program holds; columns of the layer that one program normalises.
MOST_TOKENS = 128
MOST_WIDTH = 8192


@triton.jit
def attention_scores(qkv, row, there, D, size, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T (tokens, tokens) of one clip and head; qkv points at the head's first query."""
    scores = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for start in range(0, size, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        at = row[:, None] * (3 * D) + column[None, :]
        mask = there[:, None] & (column < size)[None, :]
        q = tl.load(qkv + at, mask=mask, other=0.0)
        k = tl.load(qkv + D + at, mask=mask, other=0.0)
        scores = dot(q, tl.trans(k), scores, PRECISION)
    return scores


@triton.jit
def attention_weights(scores, there):
    """Softmax over the keys that are there; the scores carry a factor log2(e)."""
    scores = tl.where(there[None, :], scores, -float("inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def weight_numbers(T, BLOCK_T: tl.constexpr):
    """Numbers of the attention weights of this program, as dropout counts them in (N, heads, tokens, tokens)."""
    row = tl.arange(0, BLOCK_T)
    return tl.program_id(0).to(tl.int64) * T * T + (row[:, None] * T + row[None, :])


@triton.jit
def attention_kernel(
    qkv, mixed, seed, T, D, heads, size, scale, threshold, factor,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mixed (N, T, D) from qkv (N, T, 3 D); program: clip * heads + head.  scale: log2(e) / sqrt(size)."""
    clip = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    row = tl.arange(0, BLOCK_T)
    there = row < T
    qkv += clip * T * 3 * D + head * size
    mixed += clip * T * D + head * size
    weights = attention_weights(
        attention_scores(qkv, row, there, D, size, BLOCK_T, BLOCK_D, PRECISION) * scale, there
    )  # fmt: skip
    if DROPOUT:
        keep = kept(tl.load(seed), weight_numbers(T, BLOCK_T), 0, threshold)
        weights = tl.where(keep, weights * factor, 0.0)
    left = narrow(weights, mixed.dtype.element_ty)
    for start in range(0, size, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = there[:, None] & (column < size)[None, :]
        v = tl.load(qkv + 2 * D + row[:, None] * (3 * D) + column[None, :], mask=mask, other=0.0)
        out = dot(left, v, tl.zeros((BLOCK_T, BLOCK_D), tl.float32), PRECISION)
        tl.store(mixed + row[:, None] * D + column[None, :], narrow(out, mixed.dtype.element_ty), mask=mask)


@triton.jit
def attention_backward_kernel(
    qkv, grad, dqkv, seed, T, D, heads, size, scale, threshold, factor,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dqkv (N, T, 3 D) from the gradient of mixed (N, T, D)."""
    dtype: tl.constexpr = dqkv.dtype.element_ty
    clip = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    row = tl.arange(0, BLOCK_T)
    there = row < T
    qkv += clip * T * 3 * D + head * size
    dqkv += clip * T * 3 * D + head * size
    grad += clip * T * D + head * size
    weights = attention_weights(
        attention_scores(qkv, row, there, D, size, BLOCK_T, BLOCK_D, PRECISION) * scale, there
    )  # fmt: skip
    dropped = weights
    if DROPOUT:
        keep = kept(tl.load(seed), weight_numbers(T, BLOCK_T), 0, threshold)
        dropped = tl.where(keep, weights * factor, 0.0)
    # Rows that are not there hold weights, too: what meets them below is zero.
    left = tl.trans(narrow(dropped, dtype))
    of_weights = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for start in range(0, size, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = there[:, None] & (column < size)[None, :]
        at = row[:, None] * (3 * D) + column[None, :]
        g = tl.load(grad + row[:, None] * D + column[None, :], mask=mask, other=0.0)
        v = tl.load(qkv + 2 * D + at, mask=mask, other=0.0)
        of_weights = dot(g, tl.trans(v), of_weights, PRECISION)
        dv = dot(left, g, tl.zeros((BLOCK_T, BLOCK_D), tl.float32), PRECISION)
        tl.store(dqkv + 2 * D + at, narrow(dv, dtype), mask=mask)
    if DROPOUT:
        of_weights = tl.where(keep, of_weights * factor, 0.0)
    of_scores = weights * (of_weights - tl.sum(of_weights * weights, 1)[:, None])
    of_scores *= scale * 0.6931471805599453
    of_scores = narrow(of_scores, dtype)
    turned = tl.trans(of_scores)
    for start in range(0, size, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = there[:, None] & (column < size)[None, :]
        at = row[:, None] * (3 * D) + column[None, :]
        q = tl.load(qkv + at, mask=mask, other=0.0)
        k = tl.load(qkv + D + at, mask=mask, other=0.0)
        dq = dot(of_scores, k, tl.zeros((BLOCK_T, BLOCK_D), tl.float32), PRECISION)
        tl.store(dqkv + at, narrow(dq, dtype), mask=mask)
        dk = dot(turned, q, tl.zeros((BLOCK_T, BLOCK_D), tl.float32), PRECISION)
        tl.store(dqkv + D + at, narrow(dk, dtype), mask=mask)


@triton.jit
def normalised(value, inside, D, eps):
    """(value - mean) / deviation over the columns, and 1 / deviation; value (rows, columns) in float32."""
    mean = tl.sum(value, 1)[:, None] / D
    apart = tl.where(inside, value - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(apart * apart, 1)[:, None] / D + eps)
    return apart * inverse, inverse


@triton.jit(do_not_specialize=["M", "site"])
def residual_norm_kernel(
    branch, bias, residual, weight, shift, total, y, seed, M, D, eps, threshold, factor, site,
    BRANCH: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """total = residual + dropout(branch + bias); y = its layer norm.  Without BRANCH: y from a total that is there."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    inside = (column < D)[None, :]
    mask = (row < M)[:, None] & inside
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    if BRANCH:
        value = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
        value += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
        if DROPOUT:
            value = tl.where(kept(tl.load(seed), at, site, threshold), value * factor, 0.0)
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + at, narrow(value, total.dtype.element_ty), mask=mask)
    else:
        value = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
    unit, _inverse = normalised(tl.where(mask, value, 0.0), inside, D, eps)
    out = unit * tl.load(weight + column, mask=column < D, other=0.0)[None, :]
    out += tl.load(shift + column, mask=column < D, other=0.0)[None, :]
    tl.store(y + at, narrow(out, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "site", "steps"])
def residual_norm_backward_kernel(
    grad, total, weight, seed, dtotal, dbranch, partial, M, D, steps, eps, threshold, factor, site,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of residual (dtotal) and branch, and per run of rows those of weight, shift and bias (3, D)."""
    run = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    inside = (column < D)[None, :]
    gain = tl.load(weight + column, mask=column < D, other=0.0)[None, :]
    of_weight = tl.zeros((BLOCK_D,), tl.float32)
    of_shift = tl.zeros((BLOCK_D,), tl.float32)
    of_bias = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(0, steps):
        row = (run * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < M)[:, None] & inside
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        unit, inverse = normalised(tl.load(total + at, mask=mask, other=0.0).to(tl.float32), inside, D, eps)
        of_weight += tl.sum(g * unit, 0)
        of_shift += tl.sum(g, 0)
        g *= gain
        g = (g - tl.sum(g, 1)[:, None] / D - unit * (tl.sum(g * unit, 1)[:, None] / D)) * inverse
        g = tl.where(mask, g, 0.0)
        tl.store(dtotal + at, narrow(g, dtotal.dtype.element_ty), mask=mask)
        if DROPOUT:
            g = tl.where(kept(tl.load(seed), at, site, threshold), g * factor, 0.0)
            tl.store(dbranch + at, narrow(g, dbranch.dtype.element_ty), mask=mask)
        of_bias += tl.sum(g, 0)
    at = run.to(tl.int64) * 3 * D + column
    tl.store(partial + at, of_weight, mask=column < D)
    tl.store(partial + at + D, of_shift, mask=column < D)
    tl.store(partial + at + 2 * D, of_bias, mask=column < D)


@triton.jit(do_not_specialize=["M"])
def hidden_kernel(
    value, seed, hidden, M, D, threshold, factor,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hidden (M, D) = dropout(relu(value))."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (row < M)[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    out = tl.load(value + at, mask=mask, other=0.0).to(tl.float32)
    out = tl.where(out < 0.0, 0.0, out)
    if DROPOUT:
        out = tl.where(kept(tl.load(seed), at, 2, threshold), out * factor, 0.0)
    tl.store(hidden + at, narrow(out, hidden.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "steps"])
def hidden_backward_kernel(
    grad, hidden, dvalue, partial, M, D, steps, factor, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Gradient before ReLU and dropout, which left a zero or multiplied by ``factor``; its sums for the bias."""
    run = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(0, steps):
        row = (run * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < M)[:, None] & (column < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        out = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(out == 0.0, 0.0, g * factor)
        tl.store(dvalue + at, narrow(g, dvalue.dtype.element_ty), mask=mask)
        total += tl.sum(g, 0)
    tl.store(partial + run.to(tl.int64) * D + column, total, mask=column < D)


def limits(tokens: int, width: int) -> str | None:
    """Why clips of so many tokens, or a layer of this width, cannot be computed; None if they can."""
    if tokens > MOST_TOKENS:
        return f"temporal_attention: x: expected at most {MOST_TOKENS} tokens in a clip, got {tokens}"
    if width > MOST_WIDTH:
        return f"temporal_attention: x: expected a width of at most {MOST_WIDTH}, got {width}"
    return None


class _Layer:
    """One layer's shapes and dropout, and the launches that forward and backward share."""

    def __init__(self, x: Tensor, heads: int, dropout: float, seed: Tensor, eps: float):
        self.n, self.tokens, self.width = x.shape
        why = limits(self.tokens, self.width)
        if why is not None:
            raise BackendError(why)
        self.m = self.n * self.tokens
        self.heads, self.seed, self.eps = heads, seed, eps
        self.threshold, self.factor = dropout_arguments(dropout) if dropout > 0.0 else (0, 1.0)
        self.dropout = dropout > 0.0
        self.precision = precision(x)

    def attention(self, kernel: object, qkv: Tensor, *maps: Tensor) -> None:
        """``attention_kernel`` or ``attention_backward_kernel``, one program for a clip and head."""
        size = self.width // self.heads
        block_t, block_d, warps = blocks.attention(self.tokens, size, qkv.dtype)
        launch(
            kernel,
            (self.n * self.heads,),
            qkv,
            *maps,
            self.seed,
            self.tokens,
            self.width,
            self.heads,
            size,
            1.4426950408889634 / size**0.5,
            self.threshold,
            self.factor,
            DROPOUT=self.dropout,
            PRECISION=self.precision,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=warps,
            num_stages=1,
        )

    def norm(
        self,
        branch: Tensor | None,
        bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        shift: Tensor,
        total: Tensor,
        site: int,
    ) -> Tensor:
        """y of ``residual_norm_kernel``; a branch of None: total is there already."""
        y = torch.empty_like(residual)
        block_m, block_d, warps = blocks.whole_rows(self.width)
        launch(
            residual_norm_kernel,
            (cdiv(self.m, block_m),),
            total if branch is None else branch,
            bias.contiguous(),
            residual,
            weight.contiguous(),
            shift.contiguous(),
            total,
            y,
            self.seed,
            self.m,
            self.width,
            self.eps,
            self.threshold,
            self.factor,
            site,
            BRANCH=branch is not None,
            DROPOUT=self.dropout,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            num_warps=warps,
        )
        return y

    def norm_backward(
        self, grad: Tensor, total: Tensor, weight: Tensor, sums: tuple[Tensor, ...], site: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of residual and branch; fills ``sums`` with those of norm weight, norm bias and branch bias."""
        block_m, block_d, warps = blocks.whole_rows(self.width)
        steps, runs = shares(cdiv(self.m, block_m), blocks.PROGRAMS // 4)
        dtotal = torch.empty_like(total)
        dbranch = torch.empty_like(total) if self.dropout else dtotal
        partial = new_wide(total, runs, 3 * self.width)
        launch(
            residual_norm_backward_kernel,
            (runs,),
            grad,
            total,
            weight.contiguous(),
            self.seed,
            dtotal,
            dbranch,
            partial,
            self.m,
            self.width,
            steps,
            self.eps,
            self.threshold,
            self.factor,
            site,
            DROPOUT=self.dropout,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            num_warps=warps,
        )
        sum_partials(partial, *sums)
        return dtotal, dbranch


@below_autocast
def temporal_attention(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    ff1_weight: Tensor,
    ff1_bias: Tensor,
    ff2_weight: Tensor,
    ff2_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    heads: int,
    dropout: float,
    seed: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """``reference.temporal_attention``, and what its backward reads: qkv, mixed, sum1, hidden, sum2."""
    layer = _Layer(x, heads, dropout, seed, eps)
    n, tokens, width = x.shape
    inner = ff1_weight.shape[0]
    if layer.m == 0:
        return tuple(x.new_empty((n, tokens, c)) for c in (width, 3 * width, width, width, inner, width))
    x = x.contiguous().view(-1, width)
    qkv = torch.addmm(in_bias, x, in_weight.t())
    mixed, sum1, sum2 = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    layer.attention(attention_kernel, qkv, mixed)
    branch = mixed @ out_weight.t()
    y = layer.norm(branch, out_bias, x, norm1_weight, norm1_bias, sum1, 1)
    value = torch.addmm(ff1_bias, y, ff1_weight.t())  # one rounding: a second one can turn the sign before the ReLU
    hidden = torch.empty_like(value)
    block_m, block_d, warps = blocks.elementwise(inner)
    launch(
        hidden_kernel,
        (cdiv(layer.m, block_m), cdiv(inner, block_d)),
        value,
        seed,
        hidden,
        layer.m,
        inner,
        layer.threshold,
        layer.factor,
        DROPOUT=layer.dropout,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    branch = hidden @ ff2_weight.t()
    y = layer.norm(branch, ff2_bias, y, norm2_weight, norm2_bias, sum2, 3)
    return tuple(t.view(n, tokens, -1) for t in (y, qkv, mixed, sum1, hidden, sum2))


@below_autocast
def temporal_attention_backward(
    grad: Tensor,
    x: Tensor,
    qkv: Tensor,
    mixed: Tensor,
    sum1: Tensor,
    hidden: Tensor,
    sum2: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    ff1_weight: Tensor,
    ff1_bias: Tensor,
    ff2_weight: Tensor,
    ff2_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    heads: int,
    dropout: float,
    seed: Tensor,
    eps: float,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x and, in the order of the arguments, of the twelve weights."""
    layer = _Layer(x, heads, dropout, seed, eps)
    n, tokens, width = x.shape
    inner = ff1_weight.shape[0]
    weights = (in_weight, in_bias, out_weight, out_bias, ff1_weight, ff1_bias, ff2_weight, ff2_bias)
    norms = (norm1_weight, norm1_bias, norm2_weight, norm2_bias)
    if layer.m == 0:
        dx = x.new_empty(x.shape)
        return (dx, *(zeros([w.new_empty(w.shape)])[0] if need_weights else none(w) for w in (*weights, *norms)))
    grad, x, qkv, mixed, sum1, hidden, sum2 = (
        t.contiguous().view(layer.m, -1) for t in (grad, x, qkv, mixed, sum1, hidden, sum2)
    )
    dnorm1, dnorm1_bias, dnorm2, dnorm2_bias = (new_wide(x, width) for _ in range(4))
    dout_bias, dff1_bias, dff2_bias = x.new_empty((width,)), x.new_empty((inner,)), x.new_empty((width,))

    sums = (dnorm2, dnorm2_bias, dff2_bias)
    d_residual, d_branch = layer.norm_backward(grad, sum2, norm2_weight, sums, 3)
    d_hidden = d_branch @ ff2_weight
    dff2 = d_branch.t() @ hidden if need_weights else none(ff2_weight)
    block_m, block_d, warps = blocks.elementwise(inner)
    columns = cdiv(inner, block_d)
    steps, runs = shares(cdiv(layer.m, block_m), cdiv(blocks.PROGRAMS, columns))
    partial = new_wide(x, runs, inner)
    d_value = torch.empty_like(d_hidden)
    launch(
        hidden_backward_kernel,
        (runs, columns),
        d_hidden,
        hidden,
        d_value,
        partial,
        layer.m,
        inner,
        steps,
        layer.factor,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    if need_weights:
        sum_partials(partial, dff1_bias)
        y = layer.norm(None, out_bias, x, norm1_weight, norm1_bias, sum1, 1)
        dff1 = d_value.t() @ y
    else:
        dff1 = none(ff1_weight)
    d_y = torch.addmm(d_residual, d_value, ff1_weight)
    sums = (dnorm1, dnorm1_bias, dout_bias)
    d_residual, d_branch = layer.norm_backward(d_y, sum1, norm1_weight, sums, 1)
    d_mixed = d_branch @ out_weight
    d_qkv = torch.empty_like(qkv)
    layer.attention(attention_backward_kernel, qkv, d_mixed, d_qkv)
    dx = torch.addmm(d_residual, d_qkv, in_weight).view(n, tokens, width)
    if not need_weights:
        return (dx, *(none(w) for w in (*weights, *norms)))
    products = (d_qkv.t() @ x, d_qkv.sum(0), d_branch.t() @ mixed, dout_bias, dff1, dff1_bias, dff2, dff2_bias)
    return (dx, *products, dnorm1, dnorm1_bias, dnorm2, dnorm2_bias)
