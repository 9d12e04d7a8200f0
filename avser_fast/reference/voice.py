"""Pitch and voicing of frames, from the power spectrum that the mel filters read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import VOICE_HZ, FrontEnd
from .log_mel import power_spectrum

#: Hertz below which a spectrum says nothing about a voice: what the microphone's stand and the mains hum.
LOWEST_HZ = 40.0
#: What an octave upwards is worth where peaks are compared, so that a multiple of the period does not win.
OCTAVE_GAIN = 0.02
#: Largest height of a peak; what the harmonics-to-noise ratio takes as least.
MOST_VOICED, LEAST_VOICED = 0.999, 0.01
#: Added to a power before its logarithm.
POWER_FLOOR = 1e-3


def voice(waveform: Tensor, front_end: FrontEnd) -> Tensor:
    """Pitch p, harmonics-to-noise ratio h, first less second harmonic q, and voicing s of each frame.

    waveform: (..., samples) at int16 scale, as for ``log_mel``; returns (..., frames, 4) in its float dtype (float32
    for integers); the arithmetic is float64.  With P[k] the power of the frame and |H[k]|^2 that of the pre-emphasis:

    * W = P / |H|^2, 0 below ``LOWEST_HZ``, and its inverse transform r over the length of the window is the
      autocorrelation rho(l) = r(l) / r(0) / (1 - l / frame_length);
    * of the local maxima of rho at the periods of ``VOICE_HZ`` that with the largest rho(l) + ``OCTAVE_GAIN``
      log2 of its pitch is taken and refined by a parabola: p = log2 of hertz, s its height within 0..``MOST_VOICED``;
    * h = 10 log10(s / (1 - s)) with s at least ``LEAST_VOICED``;
    * q: the difference of ln(P / |H|^2 + ``POWER_FLOOR``) at the pitch and at twice of it, each the largest of three
      bins.

    A frame without a maximum, such as silence, has s = 0 and the highest pitch.  The compiled kernels differ where
    floats do: in which of two bins a harmonic halfway between them lies.
    """
    rate, n_fft, length = front_end.sampling_rate, front_end.n_fft, front_end.frame_length
    power = power_spectrum(waveform, length, front_end.frame_step, n_fft, front_end.preemphasis)
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device=power.device)
    emphasis = 1 + front_end.preemphasis**2 - 2 * front_end.preemphasis * torch.cos(2 * math.pi / n_fft * bins)
    heard = bins * rate >= LOWEST_HZ * n_fft
    flat = torch.where(heard, power / torch.where(heard, emphasis, 1.0), 0.0)

    first, last = rate // VOICE_HZ[1], rate // VOICE_HZ[0]
    lags = torch.arange(first - 1, last + 2, dtype=torch.float64, device=power.device)
    products = torch.fft.irfft(flat, n=n_fft)
    whole = products[..., :1]
    rho = products[..., first - 1 : last + 2] / torch.where(whole > 0, whole, 1.0) / (1 - lags / length)
    before, here, after = rho[..., :-2], rho[..., 1:-1], rho[..., 2:]
    lags = lags[1:-1]
    peaks = (here > before) & (here >= after)
    height = torch.where(peaks, here + OCTAVE_GAIN * torch.log2(rate / VOICE_HZ[0] / lags), -math.inf)
    best = height.argmax(-1, keepdim=True)  # the first lag where there is no peak
    found = peaks.any(-1)
    a, b, c = (x.gather(-1, best).squeeze(-1) for x in (before, here, after))
    curve = torch.where(found, a - 2 * b + c, -1.0)
    off = torch.where(found, 0.5 * (a - c) / curve, 0.0)
    s = torch.where(found, b - 0.25 * (a - c) * off, 0.0).clamp(0.0, MOST_VOICED)
    period = lags[best.squeeze(-1)] + off
    p = torch.log2(rate / period)

    ratio = s.clamp(LEAST_VOICED)
    h = 10.0 * torch.log10(ratio / (1 - ratio))
    levels = torch.log(flat + POWER_FLOOR)

    def level(harmonic: int) -> Tensor:
        middle = (harmonic * n_fft / period.detach()).round().long()
        near = middle.unsqueeze(-1) + torch.arange(-1, 2, device=power.device)
        return levels.gather(-1, near).amax(-1)

    q = level(1) - level(2)
    dtype = waveform.dtype if waveform.dtype.is_floating_point else torch.float32
    return torch.stack((p, h, q, s), dim=-1).to(dtype)


def add_voice(features: Tensor, values: Tensor) -> Tensor:
    """Features (..., channels, frames, bands) and one more plane: ``voice`` (..., frames, 4), then zeros."""
    spare = features.shape[-1] - values.shape[-1]
    plane = torch.nn.functional.pad(values, (0, spare)).unsqueeze(-3)
    return torch.cat((features, plane.to(features.dtype)), dim=-3)
