"""Log-mel features as the published system computes them, and their delta channels."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..config import FrontEnd
from ..errors import ConfigError

#: Energies of exactly 0 become this before the logarithm (the spacing of float64 at 1).
ENERGY_FLOOR = 2.220446049250313e-16


def _warped(hz: Tensor, sampling_rate: int, vtlp: float, vtlp_high_hz: float) -> Tensor:
    half, least = sampling_rate / 2, min(vtlp, 1.0)
    bend = vtlp_high_hz * (least / vtlp)
    # An edge at half the sampling rate may have been rounded to above it.
    above = half - (half - vtlp_high_hz * least) / (half - bend) * (half - hz).clamp(min=0)
    return torch.where(hz <= bend, hz * vtlp, above)


@lru_cache(maxsize=64)
def mel_filters(
    sampling_rate: int,
    mel_bands: int,
    n_fft: int,
    low_hz: float,
    high_hz: float,
    vtlp: float = 1.0,
    vtlp_high_hz: float = 4800.0,
) -> Tensor:
    """Triangular filters on integer FFT bins, (mel_bands, n_fft // 2 + 1) float64.

    Edges are equally spaced on the scale 2595 log10(1 + f / 700) and rounded down to a bin of (n_fft + 1) /
    sampling_rate; narrow filters may be empty (python_speech_features.get_filterbanks).

    ``vtlp`` = a is vocal-tract-length perturbation (Jaitly and Hinton, ICML 2013 workshop): before they are rounded,
    the edges are moved from f to a f where f <= h min(a, 1) / a, with h = ``vtlp_high_hz``, and above that on the
    straight line that ends at half the sampling rate S: S/2 - (S/2 - h min(a, 1)) / (S/2 - h min(a, 1) / a) (S/2 - f).
    The filters look at frequencies a times as high, so a formant at F appears in the band of F / a: a > 1 lowers the
    formants (a longer vocal tract), a < 1 raises them, 1 changes nothing.  0.5 <= a <= 2, and 0 < h < S/2, which is
    what makes the map rise for every a; where a is 1 h means nothing.
    """
    if not 0.5 <= vtlp <= 2:
        raise ConfigError(f"log_mel: vtlp: expected a factor from 0.5 to 2, got {vtlp}")
    if vtlp != 1 and not 0 < vtlp_high_hz < sampling_rate / 2:
        raise ConfigError(
            "log_mel: vtlp_high_hz: expected more than 0 and less than half the sampling rate "
            f"{sampling_rate}, got {vtlp_high_hz}"
        )
    low, high = (2595.0 * torch.log10(torch.tensor(1.0 + hz / 700.0, dtype=torch.float64)) for hz in (low_hz, high_hz))
    steps = torch.arange(mel_bands + 2, dtype=torch.float64)
    hz = 700.0 * (10.0 ** ((low + steps * ((high - low) / (mel_bands + 1))) / 2595.0) - 1.0)
    if vtlp != 1:
        hz = _warped(hz, sampling_rate, vtlp, vtlp_high_hz)
    edges = [int(e) for e in torch.floor((n_fft + 1) * hz / sampling_rate)]
    filters = torch.zeros(mel_bands, n_fft // 2 + 1, dtype=torch.float64)
    for band, (left, centre, right) in enumerate(zip(edges, edges[1:], edges[2:])):
        for bin_ in range(left, centre):
            filters[band, bin_] = (bin_ - left) / (centre - left)
        for bin_ in range(centre, min(right, n_fft // 2 + 1)):
            filters[band, bin_] = (right - bin_) / (right - centre)
    return filters


def power_spectrum(waveform: Tensor, frame_length: int, frame_step: int, n_fft: int, preemphasis: float) -> Tensor:
    """Power of the pre-emphasised frames of waveforms (..., samples): (..., frames, n_fft // 2 + 1) float64."""
    x = waveform.double()
    x = torch.cat((x[..., :1], x[..., 1:] - preemphasis * x[..., :-1]), dim=-1)
    samples = x.shape[-1]
    frames = 1 if samples <= frame_length else 1 + -(-(samples - frame_length) // frame_step)
    x = torch.nn.functional.pad(x, (0, max(0, (frames - 1) * frame_step + frame_length - samples)))
    spectrum = torch.fft.rfft(x.unfold(-1, frame_length, frame_step), n=n_fft)
    return (spectrum.real.square() + spectrum.imag.square()) / n_fft


def log_mel(
    waveform: Tensor,
    *,
    sampling_rate: int = 16000,
    mel_bands: int = 40,
    frame_length: int = 400,
    frame_step: int = 160,
    n_fft: int = 512,
    preemphasis: float = 0.97,
    low_hz: float = 0.0,
    high_hz: float = 8000.0,
    vtlp: float = 1.0,
    vtlp_high_hz: float = 4800.0,
) -> Tensor:
    """Natural logarithm of mel-filter energies; values match ``python_speech_features.logfbank``.

    waveform: (..., samples) at int16 scale, any float dtype or integers, at least 1 sample.
    Returns (..., frames, mel_bands) in the waveform's float dtype (float32 for integers), with
    frames = 1 if samples <= frame_length else 1 + ceil((samples - frame_length) / frame_step); the last frame is
    zero-padded, the window is rectangular, energies of exactly 0 become ``ENERGY_FLOOR``.

    The arithmetic is float64 whatever the dtype: the energies of one frame of speech span more than float32 resolves.
    ``vtlp``, ``vtlp_high_hz``: see ``mel_filters``; an augmentation of training data, no property of a model.
    """
    if waveform.dim() < 1 or waveform.shape[-1] < 1:
        raise ValueError(f"log_mel: waveform: expected (..., samples) with samples >= 1, got {tuple(waveform.shape)}")
    FrontEnd(
        sampling_rate, mel_bands, 1, frame_length, frame_step, n_fft, preemphasis, low_hz, high_hz
    )  # names a bad one
    dtype = waveform.dtype if waveform.dtype.is_floating_point else torch.float32
    power = power_spectrum(waveform, frame_length, frame_step, n_fft, preemphasis)
    filters = mel_filters(sampling_rate, mel_bands, n_fft, float(low_hz), float(high_hz), vtlp, vtlp_high_hz)
    energy = power @ filters.to(power.device).T
    return torch.where(energy == 0, ENERGY_FLOOR, energy).log().to(dtype)


def add_deltas(features: Tensor, channels: int, window: int = 2) -> Tensor:
    """Static features with their derivatives over time as channels.

    features: (..., frames, bands).  Returns (..., channels, frames, bands) with channel 0 static, 1 delta, 2 delta of
    delta; delta_t = sum_n n (f[t+n] - f[t-n]) / (2 sum_n n^2) for n = 1..window, edge frames repeated
    (python_speech_features.delta).
    """
    if channels not in (1, 2, 3):
        raise ValueError(f"add_deltas: channels: expected 1, 2 or 3, got {channels}")
    frames = features.shape[-2]
    stack = [features]
    steps = torch.arange(frames, device=features.device)
    for _ in range(channels - 1):
        last = stack[-1]
        total = torch.zeros_like(last)
        for n in range(1, window + 1):
            later = last.index_select(-2, (steps + n).clamp(max=frames - 1))
            earlier = last.index_select(-2, (steps - n).clamp(min=0))
            total = total + n * (later - earlier)
        stack.append(total / (2 * sum(n * n for n in range(1, window + 1))))
    return torch.stack(stack, dim=-3)
