"""The voice plane and its statistics: pitch of known tones, loops in NumPy, and the way of the plane to the network."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import avser_fast
from avser_fast import config, nn, reference
from avser_fast.errors import ConfigError
from avser_fast.inference.features import normalized
from avser_fast.inference.weights import write_model
from avser_fast.testing import assert_close
from python_training.data.augment import Augmentation, augment_features
from python_training.data.features import compute_features, feature_options

FRONT = config.FrontEnd(channels=3, frame_length=640, n_fft=1024, voice=True)
NETWORK = config.MDSCM(
    in_channels=3, clip_frames=40, stem=(4,), blocks=(8,), attention_reduction=2, encoder_layers=0, statistics=12,
    voice=True,
)  # fmt: skip


def tone(hz: float, harmonics: int = 1, samples: int = 8000) -> torch.Tensor:
    """Equally strong harmonics at int16 scale."""
    time = torch.arange(samples, dtype=torch.float64) / 16000
    return sum(3000 * torch.sin(2 * math.pi * hz * k * time) for k in range(1, harmonics + 1))  # type: ignore[return-value]


def values(frames: int, seed: int = 0, clips: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A voice whose pitch wanders, voiced and unvoiced frames, cepstra, and weights of which some are padding."""
    random = np.random.default_rng(seed)
    pitch = 7.5 + np.cumsum(random.normal(size=(clips, frames)) * 0.08, 1)
    rest = random.normal(size=(clips, frames, 2)), random.uniform(0, 1, (clips, frames, 1))
    weights = random.uniform(0.001, 1, (clips, frames)) * (random.random((clips, frames)) > 0.2)
    made = np.concatenate((pitch[..., None], *rest), -1), random.normal(size=(clips, frames, 13)), weights
    return tuple(torch.from_numpy(x) for x in made)  # type: ignore[return-value]


@pytest.mark.parametrize("hz", [100.0, 200.0, 400.0])
def test_pitch_of_tones(hz: float) -> None:
    for harmonics, error in ((1, 0.015), (5, 0.01)):
        found = reference.voice(tone(hz, harmonics), FRONT)[:-4]  # the last frames are padded with zeros
        assert_close(found[:, 0], torch.full_like(found[:, 0], math.log2(hz)), error, f"{harmonics} harmonics")
        assert found[:, 3].min() > 0.9 and found[:, 1].min() > 9


def test_frames_against_a_loop() -> None:
    """Of noise, a tone, and both, one frame and one lag after the other."""
    random = np.random.default_rng(3)
    waveform = tone(170, 4).numpy() * np.linspace(0, 1, 8000) + 400 * random.normal(size=8000)
    found = reference.voice(torch.from_numpy(waveform), FRONT).numpy()
    assert found.shape == (FRONT.frames(8000), 4)
    x = np.concatenate((waveform[:1], waveform[1:] - 0.97 * waveform[:-1], np.zeros(800)))
    k = np.arange(513)
    undone = np.abs(1 - 0.97 * np.exp(-2j * np.pi * k / 1024)) ** 2
    for t in range(0, len(found), 3):
        power = np.abs(np.fft.fft(x[160 * t : 160 * t + 640], 1024)[:513]) ** 2 / 1024
        flat = np.where(k * 16000 / 1024 < 40, 0, power / undone)
        rho = np.fft.irfft(flat)[:300]
        rho = rho / rho[0] / (1 - np.arange(300) / 640)
        tops = [n for n in range(32, 267) if rho[n] > rho[n - 1] and rho[n] >= rho[n + 1]]
        n = max(tops, key=lambda n: rho[n] + 0.02 * math.log2(16000 / n / 60))
        a, b, c = np.polyfit([-1, 0, 1], rho[n - 1 : n + 2], 2)
        period, s = n - b / (2 * a), min(max(c - b * b / (4 * a), 0), 0.999)
        level = [np.log(power / undone + 1e-3)[round(m * 1024 / period) + np.arange(-1, 2)].max() for m in (1, 2)]
        ratio = max(s, 0.01)
        expected = [math.log2(16000 / period), 10 * math.log10(ratio / (1 - ratio)), level[0] - level[1], s]
        np.testing.assert_allclose(found[t], expected, rtol=1e-7, atol=1e-7)


def test_silence_and_dtypes() -> None:
    found = reference.voice(torch.zeros(3, 1000, dtype=torch.float64), FRONT)
    assert found.shape == (3, 4, 4) and found.dtype == torch.float64
    assert torch.equal(found[..., 3], torch.zeros(3, 4, dtype=torch.float64)) and found.isfinite().all()
    assert reference.voice(torch.ones(1, dtype=torch.int16), FRONT).shape == (1, 4)
    assert reference.voice(tone(100).float(), FRONT).dtype == torch.float32


def loop(voice: np.ndarray, cepstra: np.ndarray, g: np.ndarray) -> list[float]:
    """Statistics of one clip with NumPy's own weighted average."""
    p, h, q, s = voice.T
    v = np.where(g > 0, g / (1 + np.exp(-15 * (s - 0.6))) + 1e-6, 0)

    def mean(x: np.ndarray, w: np.ndarray) -> float:
        return float(np.average(x, weights=w))

    def spread(x: np.ndarray, w: np.ndarray) -> float:
        return math.sqrt(mean((x - mean(x, w)) ** 2, w) + 1e-5)

    def together(x: np.ndarray, y: np.ndarray, w: np.ndarray, more: float = 0) -> float:
        return mean((x - mean(x, w)) * (y - mean(y, w)), w) / ((spread(x, w) + more) * spread(y, w))

    found = [together(cepstra[:, i], cepstra[:, j], g) for i in range(6) for j in range(i + 1, 6)]
    t = np.arange(len(p)) / 100
    risen = (p - mean(p, v)) / spread(p, v)
    slope = mean((p - mean(p, v)) * t, v) / (spread(t, v) ** 2 + 0.01)
    found += [mean(p, v), spread(p, v), mean(risen**3, v), slope, math.log(v.sum() / g.sum()), mean(s, g)]
    found += [f(x, v) for x in (h, q) for f in (mean, spread)]
    return found + [together(p, x, v, 0.02) for x in (*cepstra.T[:12], h, q)]


def test_statistics_against_a_loop() -> None:
    tensors = values(50)
    found = reference.voice_statistics(*tensors)
    assert found.shape == (2, config.VOICE_STATISTICS)
    expected = [loop(*(x[i].numpy() for x in tensors)) for i in range(2)]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), 1e-10)


def test_padding_does_not_count() -> None:
    tensors = values(30)
    padded = [torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (4, 7)) for x in tensors]
    assert_close(reference.voice_statistics(*padded), reference.voice_statistics(*tensors), 1e-12)
    nothing = reference.voice_statistics(*(torch.zeros_like(x) for x in tensors))
    floors = {i: 1e-5**0.5 for i in (16, 22, 24)}
    assert_close(nothing, torch.tensor([floors.get(i, 0.0) for i in range(39)]).expand(2, -1), 1e-6)
    assert reference.voice_statistics(*(x[:, :1] for x in tensors)).isfinite().all()


def test_gradients() -> None:
    voice, cepstra, weights = values(9, clips=1)
    weights[0, 3] = 0.0
    for x in (voice, cepstra):
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: reference.voice_statistics(a, b, weights), (voice, cepstra))
    gate = weights.clone().requires_grad_()
    reference.voice_statistics(voice, cepstra, gate).sum().backward()
    assert gate.grad is not None and gate.grad.isfinite().all()
    wave = tone(200, 3, 700).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.voice(torch.cat((wave[:350], x)), FRONT), (wave[350:360],))


def test_the_network_reads_the_plane_in_its_statistics_alone() -> None:
    torch.manual_seed(0)
    model = nn.MDSCM(NETWORK, backend="reference").double().eval()
    plain = nn.MDSCM(dataclasses.replace(NETWORK, voice=False), backend="reference").double().eval()
    assert NETWORK.planes == 4 and NETWORK.statistics_width == 4 * 12 + 39
    clips = torch.randn(2, 1, 4, 40, 40, dtype=torch.float64)
    plain.body.load_state_dict(model.body.state_dict())
    assert torch.equal(model.body(clips[:, 0]), plain.body(clips[:, 0, :3]))
    other = clips.clone()
    other[:, :, 3, :, :4] += 0.1
    assert not torch.equal(model(clips).features, model(other).features)
    other = clips.clone()
    other[:, :, 3, :, 4:] += 0.1
    assert torch.equal(model(clips).features, model(other).features)
    with pytest.raises(ValueError, match=r"expected shape \(B, L, 4, 40, 40\), got \(2, 1, 3, 40, 40\)"):
        model(clips[:, :, :3])


def test_features_of_training_are_those_of_inference(tmp_path: Path) -> None:
    waveform = tone(150, 6, 9000).float().numpy()
    front = dataclasses.replace(FRONT, normalization="global", mean=(5.0, 0.0, 0.0), std=(4.0, 1.0, 1.0))
    spec = config.ModelSpec(front_end=front, clip_rule=config.ClipRule("even", 2, 40), network=NETWORK)
    state = nn.MDSCM(NETWORK).state_dict()
    write_model(tmp_path / "voice.safetensors", spec, state, {})
    model = avser_fast.load(tmp_path / "voice.safetensors", backend="reference")
    assert model.spec == spec
    clips, _ = model._backend.prepare(waveform, front, spec.clip_rule)
    (made,) = compute_features([waveform], front)
    cut, valid = reference.frame_clips(torch.from_numpy(normalized(made, front)), 2, 40, "even")
    assert_close(torch.from_numpy(clips), cut[valid], 1e-5)
    probabilities = model.forward(clips[None])[0]
    assert probabilities.shape == (1, 4) and np.isfinite(probabilities).all()
    (unvoiced,) = compute_features([waveform], dataclasses.replace(front, voice=False))
    assert np.array_equal(made[:3], unvoiced) and made.shape == (4, *unvoiced.shape[1:])
    assert feature_options(front) != feature_options(dataclasses.replace(front, voice=False))
    compiled = avser_fast.load(tmp_path / "voice.safetensors", backend="engine")
    ours, _ = compiled._backend.prepare(waveform, front, spec.clip_rule)
    assert_close(torch.from_numpy(ours), torch.from_numpy(clips), 1e-6)
    assert_close(torch.from_numpy(compiled.forward(clips[None])[0]), torch.from_numpy(probabilities), 1e-5)


def test_augmentation_moves_the_plane_in_time_alone() -> None:
    clips = np.random.default_rng(0).normal(size=(1, 4, 50, 40)).astype(np.float32)
    clips[0, 3, :, 0] = np.arange(50)
    settings = Augmentation(time_warp=0.2, band_warp=0.1, band_mask=9, time_mask=9, level=0.5, noise=0.5)
    made = augment_features(clips, settings, np.random.default_rng(1), 3)
    without = augment_features(clips[:, :3], settings, np.random.default_rng(1))
    assert np.array_equal(made[:, :3], without)
    masked = (without == 0).all((0, 1, 3))
    moved = made[0, 3]
    assert masked.any() and not moved[masked].any()
    steps = moved[~masked][:, 0].astype(int)
    assert np.array_equal(moved[~masked], clips[0, 3][steps]) and (np.diff(steps) >= 0).all()


def test_configurations() -> None:
    spec = config.ModelSpec(front_end=FRONT, clip_rule=config.ClipRule("even", None, 40), network=NETWORK)
    written = json.loads(json.dumps(spec.to_dict()))
    assert written["front_end"]["voice"] and config.ModelSpec.from_dict(written) == spec
    assert "voice" not in json.dumps(config.ModelSpec().to_dict())
    with pytest.raises(ConfigError, match="front_end.voice: expected True, got False"):
        config.ModelSpec(front_end=dataclasses.replace(FRONT, voice=False), clip_rule=spec.clip_rule, network=NETWORK)
    with pytest.raises(ConfigError, match="statistics: expected at least 12 with voice"):
        config.MDSCM(voice=True)
    for wrong in (
        {"frame_length": 200},
        {"n_fft": 512, "frame_length": 400},
        {"sampling_rate": 4000},
        {"mel_bands": 3},
        {"preemphasis": 1.0},
    ):
        with pytest.raises(ConfigError, match="with voice"):
            dataclasses.replace(FRONT, **{"high_hz": 2000.0, **wrong})  # type: ignore[arg-type]
