"""From samples to scores on the emulated GPU: every kernel's own source against the float64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import emulated
import numpy as np
import pytest
import torch
from test_engine import spec_json
from test_log_mel_cpu import OPTIONS, speech

from avser_fast import reference
from avser_fast.config import MDSCM, FrontEnd
from avser_fast.errors import BackendError, ConfigError, InputError
from avser_fast.inference.weights import random_tensors
from avser_fast.testing import assert_close

LOG_MEL = {
    "sampling_rate": 16000, "mel_bands": 40, "frame_length": 400, "frame_step": 160, "n_fft": 512, "preemphasis": 0.97,
    "low_hz": 0.0, "high_hz": 8000.0,
}  # fmt: skip
# Few frames, a small transform: an emulated frame takes a millisecond.
SMALL = {"mel_bands": 10, "frame_length": 40, "frame_step": 16, "n_fft": 64, "high_hz": 8000.0}
NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "global": {"mean": [3.0, 0.1, -0.2], "std": [2.0, 0.7, 0.3]},
    "utterance": {},
}
RULES: tuple[dict[str, Any], ...] = (
    {"rule": "published", "clips": 5, "clip_frames": 20},
    {"rule": "published", "clips": 3, "clip_frames": 64},
    {"rule": "even", "clips": None, "clip_frames": 16},
    {"rule": "even", "clips": 2, "clip_frames": 33},
)


@pytest.fixture(autouse=True)
def fresh_device() -> None:
    gpu = emulated.module()
    gpu.set_device()
    gpu.set_order("forward")


def recordings(options: dict[str, Any], seed: int = 0) -> list[np.ndarray]:
    """Of one sample, of a frame, of a few, of many; one of silence."""
    length, step = ({**LOG_MEL, **options}[name] for name in ("frame_length", "frame_step"))
    counts = (1, length, length + 1, 9 * step + length + 3, 70 * step + length // 2)
    waves = [speech(count, seed + count).astype(np.float32) for count in counts]
    return [*waves, np.zeros(5 * step + length, np.float32)]


def expected_clips(wave: np.ndarray, options: dict[str, Any], channels: int, window: int, normalization: str,
                   rule: dict[str, Any], voice: bool = False) -> np.ndarray:  # fmt: skip
    values = NORMALIZATIONS[normalization]
    front = FrontEnd(
        **options, channels=channels, delta_window=window, normalization=normalization, voice=voice,
        **{name: tuple(value[:channels]) for name, value in values.items()},
    )  # fmt: skip
    static = reference.log_mel(torch.from_numpy(wave).double(), **{**LOG_MEL, **options})
    features = reference.normalize(reference.add_deltas(static, channels, window), front)
    if voice:
        features = reference.add_voice(features, reference.voice(torch.from_numpy(wave).double(), front))
    clips, valid = reference.frame_clips(features, rule["clips"], rule["clip_frames"], rule["rule"])
    return np.asarray(clips[valid].numpy())


def front_end(options: dict[str, Any], channels: int, window: int, normalization: str, rule: dict[str, Any],
              networks: list[Any] | None = None, voice: bool = False) -> Any:  # fmt: skip
    values = {name: value[:channels] for name, value in NORMALIZATIONS[normalization].items()}
    return emulated.module().GpuSpeech(
        networks or [], **{**LOG_MEL, **options}, channels=channels, delta_window=window, normalization=normalization,
        **values, **rule, voice=voice,
    )  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_log_mel_agrees_with_the_reference(name: str) -> None:
    options = OPTIONS[name]
    rule = {"rule": "even", "clips": None, "clip_frames": 8}
    length, step = ({**LOG_MEL, **options}[key] for key in ("frame_length", "frame_step"))
    waves = [speech(count, count).astype(np.float32) for count in (1, length, length + 1, 9 * step + length + 3)]
    found = front_end(options, 1, 2, "none", rule).clips(waves)
    expected = np.concatenate([expected_clips(wave, options, 1, 2, "none", rule) for wave in waves])
    assert_close(found, expected, 1e-7, name)  # rounding to float32


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule['rule']}-{rule['clips']}")
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("channels", "window"), ((1, 2), (3, 2), (2, 1), (3, 4)))
def test_clips_agree_with_the_reference(channels: int, window: int, normalization: str, rule: dict[str, Any]) -> None:
    waves = recordings(SMALL, channels)
    maker = front_end(SMALL, channels, window, normalization, rule)
    alone = [expected_clips(wave, SMALL, channels, window, normalization, rule) for wave in waves]
    assert [maker.clips_of(len(wave)) for wave in waves] == [len(clips) for clips in alone]
    found = maker.clips(waves)
    # An utterance of one value, silence, is divided by the floor of 1e-5: so are the errors of float32.
    quiet = normalization == "utterance"
    kept = np.concatenate([np.full(len(c), not (quiet and np.ptp(w) == 0)) for c, w in zip(alone, waves)])
    assert np.isfinite(found).all()
    assert_close(found[kept], np.concatenate(alone)[kept], 1e-5 if quiet else 1e-6, "clips")
    for order in ("backward", "shuffled"):
        emulated.module().set_order(order, channels)
        again = front_end(SMALL, channels, window, normalization, rule)
        assert again.clips(waves).tobytes() == found.tobytes(), order
    begin = 0
    for wave, clips in zip(waves, alone):
        part = found[begin : begin + len(clips)]
        assert maker.clips([wave]).tobytes() == part.tobytes(), "alone and in a batch"
        begin += len(clips)


# The lowest pitch of 8 kHz takes 134 samples.
VOICE = {"sampling_rate": 8000, "mel_bands": 12, "frame_length": 200, "frame_step": 80, "n_fft": 512, "high_hz": 4000.0}


@pytest.mark.parametrize("rule", RULES[1:3], ids=lambda rule: rule["rule"])
def test_the_voice_agrees_with_the_reference(rule: dict[str, Any]) -> None:
    buzz = np.cumsum(np.linspace(90, 300, 2500)) / 8000 % 1
    waves = [*recordings(VOICE)[:4], (6000 * (buzz < 0.3)).astype(np.float32), np.zeros(500, np.float32)]
    maker = front_end(VOICE, 3, 2, "global", rule, voice=True)
    alone = [expected_clips(wave, VOICE, 3, 2, "global", rule, True) for wave in waves]
    found = maker.clips(waves)
    assert found.shape[1] == 4 and found[:, 3, :, :4].any((0, 1)).all() and not found[:, 3, :, 4:].any()
    assert_close(found[:, :3], np.concatenate(alone)[:, :3], 1e-6, "channels")
    for i, what in enumerate(("pitch", "harmonics to noise", "first harmonics", "periodicity")):
        assert_close(found[:, 3, :, i], np.concatenate(alone)[:, 3, :, i], 1e-6, what)
    for order in ("backward", "shuffled"):
        emulated.module().set_order(order, 1)
        again = front_end(VOICE, 3, 2, "global", rule, voice=True)
        assert again.clips(waves).tobytes() == found.tobytes(), order
    assert np.concatenate([maker.clips([wave]) for wave in waves]).tobytes() == found.tobytes(), "alone and in a batch"


def test_a_network_reads_the_voice_from_samples() -> None:
    rule = {"rule": "even", "clips": 3, "clip_frames": 32}
    options = {**VOICE, "mel_bands": 40}
    member = MDSCM(
        in_channels=3, clip_frames=32, stem=(4,), blocks=(8,), attention_reduction=2, encoder_layers=0, statistics=12,
        voice=True,
    )  # fmt: skip
    network = emulated.module().GpuEngine(spec_json(member), random_tensors(member), poison=True)
    whole = front_end(options, 3, 2, "global", rule, [network], voice=True)
    waves = recordings(options)
    clips = whole.clips(waves)
    ((features, logits),) = whole.forward(waves)
    _, wanted_features, wanted_logits = network.forward(clips[None])
    with pytest.raises(ConfigError, match="networks: expected clips of 3 channels and no voice, got 3 and a voice"):
        front_end(options, 3, 2, "global", rule, [network])
    with pytest.raises(ConfigError, match="networks: expected clips of 2 channels and voice, got 3 and a voice"):
        front_end(options, 2, 2, "global", rule, [network], voice=True)
    assert_same_bits((features, logits), (wanted_features[0], wanted_logits[0]))


def assert_same_bits(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for a, e in zip(found, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype and np.isfinite(e).all()
        np.testing.assert_array_equal(a.view(np.uint32), e.view(np.uint32))


def networks() -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Two networks that read clips of the same size, of three channels and of one, and what they want."""
    gpu = emulated.module()
    size = {"mel_bands": 40, "clip_frames": 32, "stem": (8,)}
    members = (
        MDSCM(in_channels=3, blocks=(16,), encoder_layers=0, pooling="mean_std", statistics=5, **size),
        MDSCM(in_channels=1, blocks=(12,), attention_reduction=4, encoder_heads=2, encoder_ff=24, **size),
    )
    made = [gpu.GpuEngine(spec_json(m), random_tensors(m, i), poison=True) for i, m in enumerate(members)]
    return made, {**SMALL, "mel_bands": 40, "n_fft": 512}, {"rule": "even", "clips": 3, "clip_frames": 32}


def test_networks_read_those_clips_from_the_host_and_from_the_gpu() -> None:
    made, options, rule = networks()
    whole = front_end(options, 3, 2, "global", rule, made)
    waves = recordings(options)
    clips = whole.clips(waves)
    found = whole.forward(waves)
    for network, channels, (features, logits) in zip(made, (3, 1), found):
        _, wanted_features, wanted_logits = network.forward(np.ascontiguousarray(clips[None, :, :channels]))
        assert_same_bits((features, logits), (wanted_features[0], wanted_logits[0]))
    alone = [whole.forward([wave]) for wave in waves]
    for i, batch in enumerate(found):
        assert_same_bits(batch, [np.concatenate([one[i][j] for one in alone]) for j in range(2)])
    with ThreadPoolExecutor(3) as pool:
        for again in pool.map(lambda _: whole.forward(waves[:3]), range(3)):
            for i, batch in enumerate(again):
                assert_same_bits(batch, [np.concatenate([one[i][j] for one in alone[:3]]) for j in range(2)])


@pytest.mark.skipif(emulated.on_gpu(), reason="its addresses are the host's; test_gpu_streams.py has the real thing")
@pytest.mark.parametrize("dtype", ("float32", "int16"))
def test_recordings_in_the_gpus_memory(dtype: str) -> None:
    made, options, rule = networks()
    whole = front_end(options, 3, 2, "utterance", rule, made)
    wave = np.clip(np.round(speech(3 * 1200, 5)), -32768, 32767).reshape(3, 1200)
    held = np.zeros((3, 1300), dtype)
    held[:, :1200] = wave
    rows = [row.astype(np.float32) for row in wave]
    count = whole.clips_of(1200)
    outputs = [
        tuple(np.full(shape, np.nan, np.float32) for shape in ((3 * count, f.shape[1]), (3 * count, k), (3, k)))
        for f, k in ((f, logits.shape[1]) for f, logits in whole.forward(rows[:1]))
    ]
    for _ in range(2):
        addresses = [tuple(x.ctypes.data for x in output) for output in outputs]
        whole.forward_on_device(held.ctypes.data, dtype, 3, 1200, 1300, addresses, 0)
        for (features, logits, probabilities), wanted in zip(outputs, whole.forward(rows)):
            assert_same_bits((features, logits), wanted)
            mean = logits.reshape(3, count, -1).astype(np.float64).mean(1)
            weights = np.exp(mean - mean.max(1, keepdims=True))
            np.testing.assert_allclose(probabilities, weights / weights.sum(1, keepdims=True), rtol=1e-5)
        for output in outputs:
            for x in output:
                x.fill(np.nan)


def test_what_cannot_be_is_named() -> None:
    gpu = emulated.module()
    made, options, rule = networks()
    with pytest.raises(ConfigError, match="networks: expected clips of at most 1 channels, got 3"):
        front_end(options, 1, 2, "none", rule, made)
    with pytest.raises(ConfigError, match=r"normalize: mean: expected 2 value\(s\), one per channel, got 1"):
        gpu.GpuSpeech([], channels=2, normalization="global", mean=[0.0], std=[1.0, 1.0])
    with pytest.raises(ConfigError, match="clip_table: rule: expected published or even, got 'odd'"):
        gpu.GpuSpeech([], rule="odd")
    with pytest.raises(BackendError, match="log_mel: n_fft: expected at most 4096 on a CUDA device, got 8192"):
        gpu.GpuSpeech([], n_fft=8192)
    whole = gpu.GpuSpeech([])
    for wrong in (np.zeros((2, 3), np.float32), np.zeros(0, np.float32)):
        with pytest.raises(InputError, match="recordings: expected 1-D arrays of at least one sample, got shape"):
            whole.clips([wrong])
    assert whole.forward([]) == [] and whole.clips([]).shape == (0, 1, 224, 40)
