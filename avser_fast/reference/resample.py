"""Band-limited change of the sampling rate."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

#: Kaiser-windowed sinc: zero crossings per side, pass band as a share of the lower Nyquist frequency, window shape.
#: The transition band ends at the Nyquist frequency with 80 dB attenuation.
ZERO_CROSSINGS, PASS_BAND, KAISER_BETA = 48, 0.948, 7.857


@lru_cache(maxsize=8)
def _phases(up: int, down: int) -> tuple[Tensor, Tensor]:
    """(up, taps) float64 filters, each summing to 1, and (up,) offsets of their first tap in input samples."""
    scale = min(1.0, up / down)
    half = ZERO_CROSSINGS / scale
    cutoff = PASS_BAND * scale
    centre = torch.arange(up, dtype=torch.float64) * down / up
    first = torch.floor(centre - half).to(torch.int64) + 1
    taps = torch.arange(2 * math.ceil(half) + 1, dtype=torch.float64)
    t = first[:, None] + taps - centre[:, None]
    window = torch.special.i0(KAISER_BETA * torch.sqrt((1 - (t / half) ** 2).clamp(min=0)))
    filters = torch.where(t.abs() < half, torch.sinc(cutoff * t) * window, 0.0)
    return filters / filters.sum(1, keepdim=True), first


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample (..., samples) from ``from_rate`` to ``to_rate`` hertz; ceil(samples * to / from) samples come back.

    Polyphase Kaiser-windowed sinc in float64, zero outside the signal; a constant keeps its value inside.  Equal rates
    return the waveform unchanged.
    """
    if from_rate < 1 or to_rate < 1:
        raise ValueError(f"resample: rates: expected positive hertz, got {from_rate} and {to_rate}")
    if waveform.dim() < 1 or waveform.shape[-1] < 1:
        raise ValueError(f"resample: waveform: expected (..., samples) with samples >= 1, got {tuple(waveform.shape)}")
    if from_rate == to_rate:
        return waveform.clone()
    gcd = math.gcd(from_rate, to_rate)
    up, down = to_rate // gcd, from_rate // gcd
    filters, first = _phases(up, down)
    filters, first = filters.to(waveform.device), first.to(waveform.device)
    samples = waveform.shape[-1]
    length = -(-samples * up // down)
    m = torch.arange(length, device=waveform.device)
    block, phase = m // up, m % up
    taps = torch.arange(filters.shape[1], device=waveform.device)
    x = waveform.double()
    out = x.new_empty(*x.shape[:-1], length)
    for begin in range(0, length, 1 << 15):  # bounds the gathered window of long audio
        part = slice(begin, begin + (1 << 15))
        index = (block[part] * down + first[phase[part]])[:, None] + taps
        inside = (index >= 0) & (index < samples)
        window = torch.where(inside, x[..., index.clamp(0, samples - 1)], 0.0)
        out[..., part] = (window * filters[phase[part]]).sum(-1)
    return out.to(waveform.dtype if waveform.dtype.is_floating_point else torch.float32)
