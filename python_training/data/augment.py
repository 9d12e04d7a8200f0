"""Augmentation of one sample: its waveform, its features, its face.  The sample's own generator draws everything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avser_fast.errors import ConfigError


@dataclass(frozen=True)
class Augmentation:
    """What training does to a sample; the defaults do nothing.

    Waveform: ``noise_snr`` adds white noise at a signal-to-noise ratio drawn from this range in dB (published: 15 to
    30); ``vtlp`` draws a factor of vocal-tract-length perturbation (published: 0.8 to 1.2); ``waveform_share`` is the
    share of samples that get them, each drawn apart.  ``speeds`` are copies of every recording, of which (the
    original among them) one is drawn.  ``time_shift`` is the most seconds by which a recording begins earlier or later.

    Features: warps are relative, 0.1 draws a factor from 0.9 to 1.1: ``time_warp`` stretches time, ``band_warp`` the
    mel axis (a cheap stand-in for ``vtlp``); ``band_mask`` and ``time_mask`` are the largest widths of two masks each
    (SpecAugment, Park et al., Interspeech 2019); ``level`` is the standard deviation of a shift of everything and
    ``noise`` that of white noise, both in units of the normalised features; ``mixup`` is the largest share of another
    sample (0: off, at most 0.5).

    Face: ``face_flip`` is the share that is mirrored, ``face_crop`` the largest part that is cut off in each direction
    before the rest is stretched to the whole again.
    """

    time_warp: float = 0.0
    band_warp: float = 0.0
    band_mask: int = 0
    time_mask: int = 0
    level: float = 0.0
    noise: float = 0.0
    mixup: float = 0.0
    speeds: tuple[float, ...] = ()
    noise_snr: tuple[float, ...] = ()
    vtlp: tuple[float, ...] = ()
    waveform_share: float = 0.5
    time_shift: float = 0.0
    face_flip: float = 0.0
    face_crop: float = 0.0

    def __post_init__(self) -> None:
        for name in ("noise_snr", "vtlp"):
            values = getattr(self, name)
            if values and (len(values) != 2 or not values[0] <= values[1]):
                raise ConfigError(f"{name}: expected nothing or a lowest and a highest value, got {values}")
        if self.vtlp and not 0.5 <= self.vtlp[0] <= self.vtlp[1] <= 2.0:
            raise ConfigError(f"vtlp: expected factors from 0.5 to 2, got {self.vtlp}")
        if not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise ConfigError(f"speeds: expected factors from 0.5 to 2, got {self.speeds}")
        for name, most in (("mixup", 0.5), ("waveform_share", 1.0), ("face_flip", 1.0), ("face_crop", 0.5)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ConfigError(f"{name}: expected 0 to {most}, got {value}")
        for name in ("time_warp", "band_warp"):
            if not getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected less than 1, got {getattr(self, name)}")
        for name in ("time_warp", "band_warp", "band_mask", "time_mask", "level", "noise", "time_shift"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}")

    @property
    def of_waveform(self) -> bool:
        """Whether features must be computed again because the waveform changes."""
        return bool(self.noise_snr or self.vtlp or self.time_shift)


def add_noise(waveform: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """The waveform (n,) with white noise ``snr_db`` dB below the mean power of its own; silence stays silent."""
    power = float(np.mean(np.square(waveform, dtype=np.float64)))
    deviation = np.sqrt(power / 10.0 ** (snr_db / 10.0))
    noise = rng.standard_normal(len(waveform), dtype=np.float32)
    return waveform + np.float32(deviation) * noise


def shift(waveform: np.ndarray, samples: int) -> np.ndarray:
    """The waveform (n,) ``samples`` later (earlier, if negative), silence where nothing is left of it."""
    moved = np.zeros_like(waveform)
    samples = max(-len(waveform), min(len(waveform), samples))
    if samples >= 0:
        moved[samples:] = waveform[: len(waveform) - samples]
    else:
        moved[:samples] = waveform[-samples:]
    return moved


@dataclass(frozen=True)
class WaveformChange:
    """What is drawn for one waveform, before its features are computed."""

    snr_db: float | None = None
    vtlp: float = 1.0
    shift: int = 0

    @classmethod
    def draw(cls, settings: Augmentation, sampling_rate: int, rng: np.random.Generator) -> WaveformChange:
        snr_db, vtlp = None, 1.0
        noisy, warped = rng.random(2) < settings.waveform_share
        if settings.noise_snr and noisy:
            snr_db = float(rng.uniform(settings.noise_snr[0], settings.noise_snr[1]))
        if settings.vtlp and warped:
            # Hundredths: the front end keeps the filters of each factor.
            vtlp = round(float(rng.uniform(settings.vtlp[0], settings.vtlp[1])), 2)
        most = round(settings.time_shift * sampling_rate)
        return cls(snr_db, vtlp, int(rng.integers(-most, most + 1)) if most else 0)

    @property
    def nothing(self) -> bool:
        return self == WaveformChange()

    def apply(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The shifted and noisy waveform, float32; ``vtlp`` is for ``compute_features``."""
        changed = waveform.astype(np.float32)
        if self.shift:
            changed = shift(changed, self.shift)
        if self.snr_db is not None:
            changed = add_noise(changed, self.snr_db, rng)
        return changed


def _stretched(values: np.ndarray, axis: int, positions: np.ndarray) -> np.ndarray:
    """Linear interpolation of an axis at fractional indices, held at its ends."""
    last = values.shape[axis] - 1
    positions = np.clip(positions, 0.0, last)
    below = np.floor(positions).astype(np.int64)
    above = np.minimum(below + 1, last)
    shape = [1] * values.ndim
    shape[axis] = len(positions)
    part = (positions - below).astype(values.dtype).reshape(shape)
    return values.take(below, axis) * (1 - part) + values.take(above, axis) * part


def augment_features(
    clips: np.ndarray, settings: Augmentation, rng: np.random.Generator, channels: int | None = None
) -> np.ndarray:
    """Warps, masks, level and noise of normalised features (..., planes, frames, bands) float32; every leading axis
    alike, but for the noise.

    Planes behind the ``channels`` (None: there are none) follow in time alone, frame by frame.
    """
    voice = clips[..., channels:, :, :] if channels is not None and channels < clips.shape[-3] else None
    if voice is not None:
        clips = clips[..., :channels, :, :]
    frames, bands = clips.shape[-2:]
    factors = rng.uniform(-1.0, 1.0, 2)
    if settings.time_warp:
        centre, factor = (frames - 1) / 2, 1 + settings.time_warp * factors[0]
        positions = centre + (np.arange(frames) - centre) * factor
        clips = _stretched(clips, clips.ndim - 2, positions)
        if voice is not None:
            voice = voice.take(np.rint(np.clip(positions, 0, frames - 1)).astype(np.int64), voice.ndim - 2)
    if settings.band_warp:
        # The lowest band stays where it is: a longer vocal tract moves every resonance by the same factor.
        clips = _stretched(clips, clips.ndim - 1, np.arange(bands) * (1 + settings.band_warp * factors[1]))
    if settings.level:
        clips = clips + np.float32(settings.level * rng.standard_normal())
    if settings.noise:
        clips = clips + np.float32(settings.noise) * rng.standard_normal(clips.shape, dtype=np.float32)
    for width, size, of in ((settings.band_mask, bands, "bands"), (settings.time_mask, frames, "frames")):
        for _ in range(2 if width else 0):
            wide = int(rng.integers(0, min(width, size) + 1))
            start = int(rng.integers(0, size - wide + 1))
            clips = clips.copy()
            if of == "bands":
                clips[..., start : start + wide] = 0.0
            else:
                clips[..., start : start + wide, :] = 0.0
                if voice is not None:
                    voice = voice.copy()
                    voice[..., start : start + wide, :] = 0.0
    return clips if voice is None else np.concatenate((clips, voice), axis=-3)


def augment_face(frames: np.ndarray, settings: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Mirror and crop of the frames (n, height, width) float32 of one face, all alike."""
    mirrored = rng.random() < settings.face_flip
    cut = rng.random(4)
    if mirrored:
        frames = frames[..., ::-1]
    if settings.face_crop:
        for axis, (size, kept, at) in enumerate(zip(frames.shape[1:], cut[:2], cut[2:]), start=1):
            lost = settings.face_crop * kept * (size - 1)
            frames = _stretched(frames, axis, at * lost + np.arange(size) * (size - 1 - lost) / (size - 1))
    return np.ascontiguousarray(frames)
