"""Dropout whose mask is a function of a seed and of the element's number, so that every backend drops the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32-bit product, in int64: the halves of ``a`` are multiplied apart to stay below 2^63."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & _MASK


def philox(number: Tensor, site: int, seed: int | Tensor) -> Tensor:
    """First word of Philox 4x32 with ten rounds (Salmon et al. 2011): int64 below 2^32, in the shape of ``number``.

    The counter is (number mod 2^32, 0, site, 0); the key is the seed's low and high word.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=number.device)
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = number & _MASK, torch.zeros_like(number)
    c2, c3 = torch.full_like(number, site), torch.zeros_like(number)
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _KEY_STEPS[0]) & _MASK, (key1 + _KEY_STEPS[1]) & _MASK
    return c0


def counted_dropout(x: Tensor, p: float, seed: int | Tensor | None, site: int = 0) -> Tensor:
    """Dropout of x: element i in C order is kept, times 1 / (1 - p), if philox(i, site, seed) >> 8 >= round(p 2^24).

    ``seed`` None: torch's own dropout, with torch's generator.
    """
    if p == 0.0:
        return x
    if seed is None:
        return F.dropout(x, p)
    number = torch.arange(x.numel(), device=x.device).view(x.shape)
    kept = philox(number, site, seed) >> 8 >= round(p * 2**24)
    return torch.where(kept, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)
