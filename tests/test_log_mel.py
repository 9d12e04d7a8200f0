"""reference.log_mel, add_deltas, normalize and resample against independent computations."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import python_speech_features as psf
import torch

from avser_fast import config, reference
from avser_fast.testing import assert_close


def wave(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-30000, 30000, samples).astype(np.int16)


@pytest.mark.parametrize("samples", [1, 2, 159, 399, 400, 401, 559, 560, 561, 720, 16000, 16001, 72480])
def test_matches_python_speech_features(samples: int) -> None:
    x = wave(samples, samples)
    expected = psf.logfbank(x, 16000, nfilt=40)
    assert expected.shape == (config.FrontEnd().frames(samples), 40)
    assert_close(reference.log_mel(torch.from_numpy(x).double()), expected, 1e-12, f"{samples} samples")


@pytest.mark.parametrize(
    ("rate", "bands", "length", "step", "n_fft", "preemphasis", "low", "high"),
    [
        (16000, 80, 400, 160, 512, 0.97, 0, 8000),
        (16000, 128, 400, 160, 512, 0.97, 0, 8000),
        (8000, 23, 200, 80, 256, 0.95, 100, 3800),
        (22050, 64, 551, 221, 1024, 0.0, 20, 11025),
        (16000, 1, 16, 5, 16, 0.97, 0, 8000),
    ],
)
def test_other_options(
    rate: int, bands: int, length: int, step: int, n_fft: int, preemphasis: float, low: float, high: float
) -> None:
    x = wave(5 * length + 7)
    expected = psf.logfbank(x, rate, length / rate, step / rate, bands, n_fft, low, high, preemphasis)
    actual = reference.log_mel(
        torch.from_numpy(x).double(), sampling_rate=rate, mel_bands=bands, frame_length=length, frame_step=step,
        n_fft=n_fft, preemphasis=preemphasis, low_hz=low, high_hz=high,
    )  # fmt: skip
    assert_close(actual, expected, 1e-12)


def warped_edges(rate: int, bands: int, n_fft: int, low: float, high: float, a: float, h: float) -> list[float]:
    """Edges of the filters in bins, not yet rounded, from the formula of the paper alone."""
    edges = []
    for i in range(bands + 2):
        mels = [2595 * math.log10(1 + f / 700) for f in (low, high)]
        f = 700 * (10 ** ((mels[0] + (mels[1] - mels[0]) * i / (bands + 1)) / 2595) - 1)
        if f <= h * min(a, 1) / a:
            f = f * a
        else:
            f = rate / 2 - (rate / 2 - h * min(a, 1)) / (rate / 2 - h * min(a, 1) / a) * (rate / 2 - f)
        edges.append((n_fft + 1) * f / rate)
    return edges


@pytest.mark.parametrize(
    ("rate", "bands", "n_fft", "low", "high", "h"),
    [
        (16000, 40, 512, 0.0, 8000.0, 4800.0),
        (16000, 128, 512, 0.0, 8000.0, 4800.0),
        (16000, 64, 4096, 50.0, 7600.0, 6500.0),
        (8000, 23, 256, 100.0, 3800.0, 2400.0),
        (44100, 80, 2048, 20.0, 22050.0, 4800.0),
    ],
)
@pytest.mark.parametrize("a", [0.5, 0.8, 0.9, 0.97, 1.0, 1.04, 1.1, 1.25, 2.0])
def test_warped_filters(rate: int, bands: int, n_fft: int, low: float, high: float, h: float, a: float) -> None:
    edges = warped_edges(rate, bands, n_fft, low, high, a, h)
    assert all(x < y for x, y in zip(edges, edges[1:])) and edges[-1] < n_fft // 2 + 0.5 + 1e-9
    filters = reference.mel_filters(rate, bands, n_fft, low, high, a, h).tolist()
    for band, (left, centre, right) in enumerate(zip(*(map(math.floor, edges[i : bands + i]) for i in range(3)))):
        for bin_ in range(n_fft // 2 + 1):
            rising = (bin_ - left) / (centre - left) if left <= bin_ < centre else 0.0
            falling = (right - bin_) / (right - centre) if centre <= bin_ < right else 0.0
            assert filters[band][bin_] == rising + falling, (band, bin_)
    plain = reference.mel_filters(rate, bands, n_fft, low, high)
    assert torch.equal(torch.tensor(filters, dtype=torch.float64), plain) == (a == 1)


@pytest.mark.parametrize("a", [0.8, 0.9, 1.1, 1.25])
@pytest.mark.parametrize("formant", [700.0, 1500.0, 2800.0, 6600.0])
def test_vtlp_above_1_lowers_a_formant(formant: float, a: float) -> None:
    """A voice with one formant: its band is that of the formant divided by a (below the bend of the map)."""

    def voice(hz: float) -> torch.Tensor:
        radius = math.exp(-math.pi * 60 / 16000)
        x = np.zeros(8000)
        x[::160] = 10000.0  # 100 Hz
        for t in range(2, len(x)):
            x[t] += 2 * radius * math.cos(2 * math.pi * hz / 16000) * x[t - 1] - radius * radius * x[t - 2]
        return torch.from_numpy(x)

    def band_of(hz: float, vtlp: float = 1.0) -> int:
        features = reference.log_mel(voice(hz), mel_bands=64, n_fft=2048, preemphasis=0.0, vtlp=vtlp)
        width = torch.diff(torch.floor(torch.tensor(warped_edges(16000, 64, 2048, 0, 8000, vtlp, 4800))))
        return int((features[10:].mean(0) - torch.log(width[1:] + width[:-1])).argmax())  # per bin: wide bands gain

    def mel(hz: float) -> float:
        return 2595 * math.log10(1 + hz / 700)

    heard = formant / a
    if heard > 4800 * min(a, 1) / a:  # the other line: what is moved to `formant`
        heard = 8000 - (8000 - formant) * (8000 - 4800 * min(a, 1) / a) / (8000 - 4800 * min(a, 1))
    moved = (mel(heard) - mel(formant)) / (mel(8000) / 65)
    assert (moved < 0) == (a > 1) and abs(moved) > 0.6  # 3 bands and more below the bend
    assert abs(band_of(formant, a) - band_of(formant) - moved) < 1.5
    assert abs(band_of(formant, a) - band_of(heard)) <= 1  # as a speaker with that formant is heard


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"vtlp": 0.49}, "log_mel: vtlp: expected a factor from 0.5 to 2, got 0.49"),
        ({"vtlp": 2.5}, "log_mel: vtlp: expected a factor from 0.5 to 2, got 2.5"),
        ({"vtlp": math.nan}, "log_mel: vtlp: expected a factor from 0.5 to 2, got nan"),
        ({"vtlp": 1.1, "vtlp_high_hz": 0.0}, "log_mel: vtlp_high_hz: expected more than 0 and .* rate 16000, got 0.0"),
        ({"vtlp": 0.9, "vtlp_high_hz": 8000.0}, "log_mel: vtlp_high_hz: .* half the sampling rate 16000, got 8000"),
        ({"vtlp": 0.9, "vtlp_high_hz": math.nan}, "log_mel: vtlp_high_hz: .* half the sampling rate 16000, got nan"),
        ({"vtlp": 1.1, "sampling_rate": 8000, "high_hz": 4000.0}, "log_mel: vtlp_high_hz: .* rate 8000, got 4800"),
    ],
)  # fmt: skip
def test_bad_warps(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(config.ConfigError, match=sentence):
        reference.log_mel(torch.ones(500), **options)  # type: ignore[arg-type]


def test_silence_becomes_the_floor() -> None:
    features = reference.log_mel(torch.zeros(1000, dtype=torch.float64))
    assert features.unique().tolist() == [math.log(np.finfo(np.float64).eps)]


def test_batches_strides_and_dtypes() -> None:
    x = torch.from_numpy(wave(3 * 4 * 2000).reshape(3, 4, 2000)).double()
    sliced = x[:, ::2, ::2]
    features = reference.log_mel(sliced)
    assert features.shape == (3, 2, 5, 40)
    for i in range(3):
        for j in range(2):
            assert_close(features[i, j], reference.log_mel(sliced[i, j].contiguous()), 1e-12)
    assert reference.log_mel(x.half()).dtype == torch.float16
    assert reference.log_mel(x.to(torch.int16)).dtype == torch.float32


def test_ten_minutes() -> None:
    x = torch.from_numpy(wave(600 * 16000))
    features = reference.log_mel(x)
    assert features.shape == (config.FrontEnd().frames(600 * 16000), 40)
    tail = reference.log_mel(torch.cat((torch.zeros(1), x[-401:].float())))
    assert features.isfinite().all() and tail.isfinite().all()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_no_samples(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="log_mel: waveform: expected .* samples >= 1, got"):
        reference.log_mel(torch.zeros(shape))


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_deltas(frames: int, window: int) -> None:
    x = np.random.default_rng(frames).standard_normal((frames, 7))
    stack = reference.add_deltas(torch.from_numpy(x), 3, window)
    assert stack.shape == (3, frames, 7)
    delta = psf.delta(x, window)
    assert_close(stack, np.stack((x, delta, psf.delta(delta, window))), 1e-12)
    assert torch.equal(reference.add_deltas(torch.from_numpy(x), 2, window), stack[:2])
    with pytest.raises(ValueError, match="channels: expected 1, 2 or 3, got 4"):
        reference.add_deltas(torch.from_numpy(x), 4)


def test_normalize() -> None:
    x = torch.randn(2, 50, 5, dtype=torch.float64) * 3 + 7
    x[1, :, 2] = 4.0  # a band that never changes must not be divided by zero
    plain = config.FrontEnd(channels=2, mel_bands=5)
    assert torch.equal(reference.normalize(x, plain), x)
    utterance = reference.normalize(x, dataclasses.replace(plain, normalization="utterance"))
    expected = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True).clamp(min=1e-5)
    assert_close(utterance, expected, 1e-12)
    assert (utterance[1, :, 2] == 0).all()
    # In float32 too: the mean of a constant may be off by its last bit, which the floor would make as large as speech.
    single = x.float()
    single[1, :, 2] = math.log(2.220446049250313e-16)  # silence, or a mel filter without a bin
    exact = reference.normalize(single.double(), dataclasses.replace(plain, normalization="utterance"))
    rounded = reference.normalize(single, dataclasses.replace(plain, normalization="utterance"))
    assert rounded.dtype == torch.float32 and (rounded[1, :, 2] == 0).all()
    assert_close(rounded, exact, 1e-7)
    known = dataclasses.replace(plain, normalization="global", mean=(1.0, -2.0), std=(4.0, 0.5))
    assert_close(reference.normalize(x, known)[1], (x[1] + 2.0) / 0.5, 1e-15)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 96000, 192000])
def test_resampling_keeps_a_tone_and_removes_what_would_alias(rate: int) -> None:
    def tone(hz: float, at: int, seconds: float = 0.5) -> torch.Tensor:
        return torch.sin(2 * math.pi * hz * torch.arange(int(seconds * at), dtype=torch.float64) / at)

    out = reference.resample(tone(1000.0, rate), rate, 16000)
    middle = slice(1000, -1000)
    assert len(out) == math.ceil(int(0.5 * rate) * 16000 / rate)
    assert_close(out[middle], tone(1000.0, 16000)[: len(out)][middle], 3e-4)
    if rate > 16000:
        assert reference.resample(tone(8300.0, rate), rate, 16000)[middle].abs().max() < 3e-4
    level = reference.resample(torch.full((4000,), 3.0, dtype=torch.float64), rate, 16000)
    assert_close(level[len(level) // 2], 3.0, 1e-12)


def test_resampling_edges() -> None:
    x = torch.randn(7, 3)
    assert torch.equal(reference.resample(x, 8000, 8000), x)
    assert reference.resample(torch.ones(1), 48000, 16000).shape == (1,)
    assert reference.resample(torch.ones(1), 8000, 16000).shape == (2,)
    assert reference.resample(torch.ones(2, 441), 44100, 16000).shape == (2, 160)
    assert reference.resample(torch.ones(100, dtype=torch.int16), 8000, 16000).dtype == torch.float32
    with pytest.raises(ValueError, match="expected positive hertz, got 0"):
        reference.resample(x, 0, 16000)
