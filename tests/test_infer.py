"""``infer``, ``load``, ``Recognizer``: real speech in, the same answer whatever stands beside it."""

from __future__ import annotations

import io
import json
import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import avser_fast
from avser_fast import config, nn, reference
from avser_fast.inference import backends
from avser_fast.inference import recognizer as recognizer_module
from avser_fast.inference.audio import load_item
from avser_fast.inference.features import features
from avser_fast.inference.weights import random_tensors, read_model, write_model
from avser_fast.testing import assert_close

SPEECH = sorted((Path(__file__).parent.parent / "data" / "emodb4").glob("*.flac"))
PCM, RATE = soundfile.read(SPEECH[0], dtype="int16")

SPECS = {
    "even": config.ModelSpec(
        front_end=config.FrontEnd(mel_bands=24, normalization="global", mean=(9.0,), std=(4.0,)),
        clip_rule=config.ClipRule("even", None, 100),
        network=config.MDSCM(
            mel_bands=24, clip_frames=100, stem=(4, 8), blocks=(8, 16), encoder_layers=1, encoder_ff=24,
            pooling="mean_std",
        ),
    ),
    "even at most 2": config.ModelSpec(
        labels=("no", "maybe", "yes"),
        front_end=config.FrontEnd(mel_bands=30, channels=3, normalization="utterance"),
        clip_rule=config.ClipRule("even", 2, 64),
        network=config.MDSCM(
            mel_bands=30, in_channels=3, clip_frames=64, classes=3, stem=(8,), blocks=(12,), attention_reduction=3,
            encoder_layers=0, spatial_attention=False,
        ),
    ),
    "published": config.ModelSpec(
        clip_rule=config.ClipRule("published", 5, 224),
        network=config.MDSCM(stem=(4, 8), blocks=(8, 16), encoder_layers=1, encoder_ff=24),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The reference's pool waits long for its workers where something else runs beside the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for i, (name, spec) in enumerate(SPECS.items()):
        tensors = random_tensors(spec.network, i)
        tensors["head.weight"] *= 3  # decisions, not ties
        write_model(
            folder / f"{name}.safetensors", spec, tensors, {"data": {"licence": "CC0-1.0"}, "metrics": {"ua": 0.25}}
        )
    return {name: folder / f"{name}.safetensors" for name in SPECS}


@pytest.fixture(scope="module", params=list(SPECS))
def recognizer(request: pytest.FixtureRequest, files: dict[str, Path]) -> avser_fast.Recognizer:
    return avser_fast.load(files[request.param], backend="engine")


@pytest.fixture(scope="module")
def even(files: dict[str, Path]) -> avser_fast.Recognizer:
    return avser_fast.load(files["even"])


def various() -> list[Any]:
    """Items of every kind, rate and length."""
    random = np.random.default_rng(0)
    noise = random.uniform(-1, 1, (3, 30011)).astype(np.float32)
    return [
        SPEECH[0],
        str(SPEECH[1]),
        SPEECH[2].read_bytes(),
        bytearray(SPEECH[3].read_bytes()),
        memoryview(SPEECH[4].read_bytes()),
        io.BytesIO(SPEECH[5].read_bytes()),
        {"array": PCM, "sampling_rate": RATE},
        {"path": None, "array": noise, "sampling_rate": 44100},
        noise[0, :7777],
        noise[1, ::-2],
        torch.from_numpy(noise[:2, ::3]),
        np.array([0.5]),
        np.zeros(1000, np.int16),
        random.integers(-9999, 9999, 100000).astype(np.int16),
    ]


def fresh(items: list[Any]) -> list[Any]:
    """The same items once more: a file object is read only once."""
    for item in items:
        if hasattr(item, "seek"):
            item.seek(0)
    return items


# Real speech


def test_default_model_on_real_speech() -> None:
    """One recording of each emotion by each of two speakers; the shipped model has learned from them."""
    names = ["03a01Wa", "03a01Fa", "03a01Nc", "03a02Ta", "08a01Wa", "08a01Fd", "08a01Na", "08a02Tb"]
    letters = {"W": "ang", "F": "hap", "N": "neu", "T": "sad"}
    found = avser_fast.infer([SPEECH[0].parent / f"{name}.flac" for name in names])
    assert sum(r.label == letters[name[5]] for r, name in zip(found, names)) >= 7
    # The card admits bf16, which then runs where the processor has instructions for it.
    ran = {"float32": "engine", "bf16": "engine/bf16"}[avser_fast.load().info()["precision"]]
    for name, result in zip(names, found):
        assert result.ok and result.backend == ran and result.score == max(result.scores.values()) > 0.25
        assert result.duration_s == soundfile.info(SPEECH[0].parent / f"{name}.flac").duration
    info = avser_fast.load().info()
    for what in ("licence", "protocol", "metrics"):
        assert info[what], what


def test_engine_agrees_with_the_float64_reference(recognizer: avser_fast.Recognizer) -> None:
    """The whole way of real recordings against the reference in float64: front end, clips, network, vote."""
    spec, tensors, _ = read_model(str(recognizer.path))
    network = nn.MDSCM(spec.network).double().eval()
    network.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)
    front, rule = spec.front_end, spec.clip_rule
    for file in SPEECH[::97]:
        samples = torch.from_numpy(soundfile.read(file, dtype="int16")[0]).double()
        values = reference.log_mel(samples, mel_bands=front.mel_bands)
        values = reference.normalize(reference.add_deltas(values, front.channels), front)
        assert_close(features(samples.float().numpy(), front), values, 1e-6, "features")
        clips, valid = reference.frame_clips(values, rule.clips, rule.clip_frames, rule.rule)
        with torch.inference_mode():
            expected = network(clips[None], valid[None])
        probabilities, clip_features, clip_logits = recognizer.forward(clips[None].float(), valid[None])
        assert_close(probabilities, expected.probabilities, 1e-5, "probabilities")
        assert_close(clip_features[0][valid], expected.features[0][valid], 1e-5, "features")
        assert_close(clip_logits[0][valid], expected.clip_logits[0][valid], 1e-5, "logits")
        result = recognizer.infer([file])[0]
        assert_close([result.scores[label] for label in spec.labels], expected.probabilities[0], 1e-5, "scores")
        assert_close(recognizer.embed([file])[0], expected.features[0][valid], 1e-5, "embedding")
        real = [i for i, row in enumerate(clips) if row.any() and valid[i]]
        assert len(result.segments) == len(real)
        for segment, i in zip(result.segments, real):
            own = torch.softmax(expected.clip_logits[0, i], 0)
            assert_close([segment.scores[label] for label in spec.labels], own, 1e-5, "segment")


def test_reference_backend_agrees_and_says_so(files: dict[str, Path]) -> None:
    for name, path in files.items():
        engine, plain = (avser_fast.load(path, backend=b) for b in ("engine", "reference"))
        items = [SPEECH[7], {"array": PCM[:20000], "sampling_rate": 22050}]
        for a, b in zip(engine.infer(items), plain.infer(items)):
            assert (a.backend, b.backend) == ("engine", "reference")
            assert a.duration_s == b.duration_s and a.padded_fraction == b.padded_fraction
            assert [s[:2] for s in a.segments] == [s[:2] for s in b.segments]
            labels = engine.spec.labels
            assert_close([a.scores[k] for k in labels], [b.scores[k] for k in labels], 1e-4, name)
        assert plain.info()["backend"] == "reference" and plain.infer([items[0]]) == plain.infer(items)[:1]


def test_a_gpu_computes_in_float32_and_leaves_no_trace() -> None:
    """The switches alone, which exist without a GPU; ``test_cuda_device`` runs what stands behind them."""

    def state() -> tuple[Any, ...]:
        b = torch.backends
        precision = b.cuda.matmul.fp32_precision, b.cudnn.conv.fp32_precision, b.cudnn.rnn.fp32_precision
        return (*precision, b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.cudnn.deterministic, b.cudnn.benchmark)

    before = state()
    for benchmark in (False, True):
        torch.backends.cudnn.benchmark = benchmark
        with pytest.raises(ZeroDivisionError), backends.float32_products("ieee"):
            assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == (
                "ieee",
            ) * 2
            assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
            raise ZeroDivisionError
        assert torch.backends.cudnn.benchmark == benchmark
    torch.backends.cudnn.benchmark = before[-1]
    assert state() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine")
def test_cuda_device(files: dict[str, Path]) -> None:
    for name, path in files.items():
        gpu, cpu = avser_fast.load(path, device="cuda", backend="reference"), avser_fast.load(path)
        items = [SPEECH[0], SPEECH[9], {"array": PCM, "sampling_rate": 8000}]
        found = gpu.infer(items)
        assert gpu.info()["gpu"] and gpu.info()["device"] == "cuda:0" and gpu.infer(items[::-1]) == found[::-1]
        for a, b in zip(found, cpu.infer(items)):
            assert a.backend == "reference"
            assert_close([a.scores[k] for k in gpu.spec.labels], [b.scores[k] for k in gpu.spec.labels], 1e-4, name)


# Batch invariance


def test_alone_in_any_batch_at_any_place(recognizer: avser_fast.Recognizer) -> None:
    items = various()
    alone = [recognizer.infer([item], sampling_rate=RATE)[0] for item in items]
    embedded = [recognizer.embed([item], sampling_rate=RATE)[0] for item in fresh(items)]
    random = np.random.default_rng(1)
    for batch_size in (None, 1, 2, 5, 1000):
        order = random.permutation(np.repeat(np.arange(len(items)), 2))
        order = [i for i in order if not isinstance(items[i], io.BytesIO)]
        batch = [items[i] for i in order]
        assert recognizer.infer(batch, sampling_rate=RATE, batch_size=batch_size) == [alone[i] for i in order]
        for found, i in zip(recognizer.embed(batch, sampling_rate=RATE, batch_size=batch_size), order):
            assert found.dtype == np.float32 and np.array_equal(found, embedded[i])


@pytest.mark.parametrize("name", SPECS)
def test_any_number_of_threads(name: str, files: dict[str, Path]) -> None:
    items = various()
    results = []
    for threads in (1, 2, 3, 7, None):
        rec = avser_fast.load(files[name], threads=threads)
        assert rec.info()["threads"] == (threads or backends.available_cpus())
        results.append(rec.infer(fresh(items), sampling_rate=RATE))
    assert all(found == results[0] for found in results)


def test_forward_does_not_depend_on_the_batch(recognizer: avser_fast.Recognizer) -> None:
    net = recognizer.spec.network
    random = np.random.default_rng(2)
    clips = random.normal(9, 4, (5, 3, net.in_channels, net.clip_frames, net.mel_bands)).astype(np.float32)
    clips[1, 2] = 0
    valid = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 1, 0]], bool)
    whole = recognizer.forward(clips, valid)
    for part in whole:
        assert part.dtype == np.float32 and np.isfinite(part[valid] if part.ndim == 3 else part).all()
    for i in range(5):
        for out, alone in zip(whole, recognizer.forward(clips[i : i + 1], valid[i : i + 1])):
            assert np.array_equal(
                out[i][valid[i]] if out.ndim == 3 else out[i], alone[0][valid[i]] if out.ndim == 3 else alone[0]
            )
    assert np.array_equal(recognizer.forward(clips)[2], recognizer.forward(clips, np.ones((5, 3), bool))[2])
    # What a clip that does not vote holds is nobody's business.
    clips[2, 1:] = np.nan
    assert np.array_equal(recognizer.forward(clips, valid)[0], whole[0])
    strided = np.repeat(clips, 2, axis=3)[:, :, :, ::2]
    assert np.array_equal(recognizer.forward(strided, valid)[0], whole[0])
    assert np.array_equal(recognizer.forward(torch.from_numpy(clips), torch.from_numpy(valid))[0], whole[0])
    empty = recognizer.forward(clips[:0])
    assert [e.shape for e in empty] == [(0, net.classes), (0, 3, net.features), (0, 3, net.classes)]


def test_many_threads_share_one_recognizer(recognizer: avser_fast.Recognizer) -> None:
    items = [*SPEECH[:6], {"array": PCM, "sampling_rate": 8000}]
    expected = recognizer.infer(items)
    failures: list[Any] = []

    def work(shift: int) -> None:
        for _ in range(3):
            turned = items[shift:] + items[:shift]
            if recognizer.infer(turned) != expected[shift:] + expected[:shift]:
                failures.append(shift)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


# Items


def test_every_way_to_hand_over_the_same_sound(even: avser_fast.Recognizer) -> None:
    wav = io.BytesIO()
    soundfile.write(wav, PCM, RATE, format="WAV")
    floats = PCM.astype(np.float32) / 32768
    same = [
        SPEECH[0], str(SPEECH[0]), SPEECH[0].read_bytes(), open(SPEECH[0], "rb"), io.BytesIO(wav.getvalue()),
        PCM, floats, floats.astype(np.float64), PCM[None], np.stack([PCM, PCM]), np.repeat(PCM, 2)[::2],
        torch.from_numpy(PCM), torch.from_numpy(floats)[None].requires_grad_(),
        {"array": floats, "sampling_rate": RATE}, {"array": PCM, "sampling_rate": 16000.0},
        {"array": PCM, "sampling_rate": np.int64(RATE), "path": "x", "more": 1},
    ]  # fmt: skip
    found = even.infer(same, sampling_rate=RATE)
    assert len(found) == len(same) and all(result == found[0] for result in found)
    same[3].close()


def test_items_are_not_changed(even: avser_fast.Recognizer) -> None:
    array = np.stack([PCM, PCM]).astype(np.float64) / 32768
    array.flags.writeable = False
    before = array.copy()
    file = io.BytesIO(b"before" + SPEECH[0].read_bytes())
    file.seek(6)
    even.infer([array, file], sampling_rate=RATE)
    assert np.array_equal(array, before) and not file.closed


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000, 192000, 384000, 15999])
def test_rates(rate: int, even: avser_fast.Recognizer) -> None:
    """A tone of 700 Hz stays where it is, and lasts as long, at every rate."""
    seconds = 1.3
    time = np.arange(int(seconds * rate)) / rate
    tone = 0.5 * np.sin(2 * np.pi * 700 * time)
    result = even.infer([tone], sampling_rate=rate)[0]
    assert result.ok and result.duration_s == len(tone) / rate
    assert result.segments[0].start_s == 0 and result.segments[-1].end_s == pytest.approx(seconds, abs=0.02)
    waveform = load_item(tone, rate, "tone")
    samples = even._backend.resample(waveform.samples, rate, 16000)
    assert len(samples) == math.ceil(len(tone) * 16000 / rate)
    found = np.abs(np.fft.rfft(samples[4000:12000]))
    assert np.argmax(found) * 2 == 700 and np.abs(samples[4000:12000]).max() == pytest.approx(16384, rel=1e-3)


@pytest.mark.parametrize("samples", [1, 2, 159, 160, 399, 400, 401, 560, 561])
@pytest.mark.parametrize("rate", [8000, 16000, 192000])
def test_short_audio(samples: int, rate: int, recognizer: avser_fast.Recognizer) -> None:
    random = np.random.default_rng(samples)
    result = recognizer.infer([random.uniform(-1, 1, samples)], sampling_rate=rate)[0]
    assert result.ok and result.duration_s == samples / rate
    assert sum(result.scores.values()) == pytest.approx(1, abs=1e-12)
    assert [s[:2] for s in result.segments] == [(0.0, samples / rate)]
    assert 0 < result.padded_fraction < 1


def test_long_audio_in_bounded_memory(files: dict[str, Path]) -> None:
    """Ten minutes score like anything else, and beyond the waveform itself hardly more memory than one minute."""
    code = """
import resource, sys, numpy, avser_fast
rec = avser_fast.load(sys.argv[1], threads=2)
def score(seconds):
    noise = numpy.random.default_rng(0).integers(-9999, 9999, seconds * 16000).astype(numpy.int16)
    result = rec.infer([noise], sampling_rate=16000)[0]
    assert result.ok and result.duration_s == seconds and result.segments[-1].end_s == seconds
    assert len(result.segments) == 1 + -(-(seconds * 100 - 1 - 100) // 50)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(-score(60) + score(600))
"""
    command = [sys.executable, "-c", code, str(files["even"])]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 250  # float32 samples 38 MB, float64 on their way in 77 MB, features and clips 18 MB


# What comes back


def test_result_describes_the_clips(recognizer: avser_fast.Recognizer) -> None:
    rule, front = recognizer.spec.clip_rule, recognizer.spec.front_end
    for samples in (800, 16000, 22000, 40000, 50000, 90000):
        result = recognizer.infer(
            [np.random.default_rng(0).integers(-99, 99, samples).astype(np.int16)], sampling_rate=RATE
        )[0]
        frames = front.frames(samples)
        width, clips = rule.clip_frames, rule.clips
        if rule.rule == "published":
            pad = width // 2 if frames < clips + width else 0
            total = frames + 2 * pad
            starts = [i * (total // clips) - pad for i in range(clips) if i * (total // clips) < total - width]
            votes = clips
        else:
            count = 1 if frames <= width else 1 + math.ceil((frames - width) / (width // 2))
            count = min(count, clips or count)
            starts = [-((width - frames) // 2)] if frames <= width else [
                math.floor(i * (frames - width) / (count - 1) + 0.5) if count > 1 else 0 for i in range(count)
            ]  # fmt: skip
            votes = count
        spans = [(max(0, s), min(frames, s + width)) for s in starts]
        spans = [(a, b) for a, b in spans if b > a]
        assert result.padded_fraction == pytest.approx(1 - sum(b - a for a, b in spans) / (votes * width), abs=1e-12)
        seconds = [(a * 0.01, min((b - 1) * 0.01 + 0.025, samples / RATE)) for a, b in spans]
        assert np.allclose([s[:2] for s in result.segments], seconds, atol=1e-9)
        for start, end, scores in result.segments:
            assert 0 <= start < end <= result.duration_s
            assert set(scores) == set(recognizer.spec.labels) and sum(scores.values()) == pytest.approx(1)
            assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_scores_are_sorted_and_top_k_limits_them(even: avser_fast.Recognizer) -> None:
    full = even.infer([SPEECH[3]])[0]
    assert list(full.scores.values()) == sorted(full.scores.values(), reverse=True)
    assert full.label == next(iter(full.scores)) and full.score == full.scores[full.label]
    assert sum(full.scores.values()) == pytest.approx(1, abs=1e-12)
    for k in (1, 2, 4, 9):
        result = even.infer([SPEECH[3]], top_k=k)[0]
        assert list(result.scores.items()) == list(full.scores.items())[:k]
        for few, all_ in zip(result.segments, full.segments):
            assert few[:2] == all_[:2] and list(few.scores.items()) == list(all_.scores.items())[:k]
        assert (result.label, result.score, result.duration_s) == (full.label, full.score, full.duration_s)


def test_results_are_frozen_and_plain(even: avser_fast.Recognizer) -> None:
    result = even.infer([SPEECH[0]])[0]
    with pytest.raises(FrozenInstanceError):
        result.label = "hap"  # type: ignore[misc]
    plain = result.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert list(plain) == ["label", "score", "scores", "segments", "duration_s", "padded_fraction", "backend", "error"]
    assert pickle.loads(pickle.dumps(result)) == result
    assert all(
        type(v) is float for v in (*result.scores.values(), result.score, result.duration_s, result.padded_fraction)
    )


def test_embed(recognizer: avser_fast.Recognizer) -> None:
    results = recognizer.infer(SPEECH[:3])
    for found, result in zip(recognizer.embed(SPEECH[:3]), results):
        rows = 5 if recognizer.spec.clip_rule.rule == "published" else len(result.segments)
        assert found.shape == (rows, recognizer.spec.network.features) and found.dtype == np.float32
        assert np.isfinite(found).all() and found.flags.owndata or found.base is not None
    assert recognizer.embed([]) == []


# Batches


def test_empty_batch_and_other_iterables(even: avser_fast.Recognizer) -> None:
    expected = even.infer(SPEECH[:4])
    assert even.infer([]) == [] and even.infer(iter(())) == []
    assert even.infer(tuple(SPEECH[:4])) == even.infer(iter(SPEECH[:4])) == even.infer(map(str, SPEECH[:4])) == expected
    assert avser_fast.infer((p for p in SPEECH[:4]), model=even) == expected


def test_generators_are_read_as_results_are_needed(even: avser_fast.Recognizer) -> None:
    taken = []

    def endless() -> Iterator[Path]:
        while True:
            taken.append(1)
            yield SPEECH[0]

    results = even.iter_infer(endless(), batch_size=2)
    assert not taken
    first = [next(results) for _ in range(3)]
    assert len(taken) == 4 and first == even.infer([SPEECH[0]]) * 3
    del taken[:]
    next(even.iter_infer(endless()))
    assert len(taken) <= backends.CLIPS_AT_ONCE


def test_an_error_of_the_generator_itself_is_not_hidden(even: avser_fast.Recognizer) -> None:
    def broken() -> Iterator[Path]:
        yield SPEECH[0]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        even.infer(broken(), on_error="return")


def test_only_bad_items(even: avser_fast.Recognizer) -> None:
    found = even.infer(["no.wav", None], on_error="return")
    assert [r.ok for r in found] == [False, False] and "item 1 (NoneType)" in str(found[1].error)


def test_progress(even: avser_fast.Recognizer, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int | None]] = []
    even.infer([SPEECH[0], "no.wav", SPEECH[1]], on_error="return", progress=lambda *a: seen.append(a))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    del seen[:]
    even.infer(iter(SPEECH[:2]), progress=lambda *a: seen.append(a), batch_size=1)
    assert seen == [(1, None), (2, None)]
    assert capsys.readouterr() == ("", "")
    even.infer(SPEECH[:2], progress=True)
    out, err = capsys.readouterr()
    assert out == "" and err == "\r1/2 items\r2/2 items\n"
    with pytest.raises(ZeroDivisionError):
        even.infer(SPEECH[:2], progress=lambda *_: 1 // 0)


# Models


def test_info(recognizer: avser_fast.Recognizer) -> None:
    info = recognizer.info()
    assert json.loads(json.dumps(info)) is not None
    assert (info["backend"], info["device"], info["precision"], info["gpu"]) == ("engine", "cpu", "float32", None)
    assert info["isa"] in ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
    assert info["precision_reason"].startswith("auto: ")
    assert info["labels"] == list(recognizer.spec.labels) and info["path"] == recognizer.path
    assert (
        config.ModelSpec.from_dict(
            json.loads(json.dumps({k: info[k] for k in ("labels", "front_end", "clip_rule", "network")}))
        )
        == recognizer.spec
    )
    assert info["metrics"] == {"ua": 0.25} and info["licence"] == "CC0-1.0" and info["protocol"] is None
    info["card"]["metrics"]["ua"] = 1.0
    assert recognizer.info()["metrics"] == {"ua": 0.25}


def test_recognizers_cannot_be_changed(even: avser_fast.Recognizer) -> None:
    for name in ("spec", "card", "path", "new"):
        with pytest.raises(AttributeError, match="Recognizer is immutable"):
            setattr(even, name, None)
        with pytest.raises(AttributeError):
            delattr(even, name)
    again = pickle.loads(pickle.dumps(even))
    assert again.infer([SPEECH[0]]) == even.infer([SPEECH[0]]) and repr(again) == repr(even)
    assert "even.safetensors" in repr(even) and "engine" in repr(even)


def test_recognizer_from_tensors_in_memory(even: avser_fast.Recognizer) -> None:
    spec, tensors, card = read_model(str(even.path))
    made = avser_fast.Recognizer(spec, tensors, card)
    expected = even.infer(SPEECH[:2])
    for tensor in tensors.values():
        tensor[...] = np.nan  # the recognizer has its own copy
    assert made.infer(SPEECH[:2]) == expected and made.path is None
    with pytest.raises(TypeError, match="made from tensors in memory"):
        pickle.dumps(made)


def test_models_stay_loaded_until_their_file_changes(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    original = recognizer_module.load
    monkeypatch.setattr(recognizer_module, "load", lambda *a, **k: loads.append(a) or original(*a, **k))
    path = tmp_path / "m.safetensors"
    path.write_bytes(files["even"].read_bytes())
    first = avser_fast.infer([SPEECH[0]], model=path)
    assert avser_fast.infer([SPEECH[0]], model=str(path)) == first and len(loads) == 1
    path.write_bytes(files["published"].read_bytes())
    second = avser_fast.infer([SPEECH[0]], model=path)
    assert len(loads) == 2 and second != first
    assert avser_fast.infer([SPEECH[0]], model=path, device="cpu") == second and len(loads) == 3

    workers = [threading.Thread(target=avser_fast.infer, args=([],), kwargs={"model": files["even"]}) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(loads) <= 4
    for i in range(2 * recognizer_module._CACHE_SIZE):
        copy = tmp_path / f"{i}.safetensors"
        copy.write_bytes(files["even"].read_bytes())
        avser_fast.infer([], model=copy)
    assert len(recognizer_module._cache) == recognizer_module._CACHE_SIZE


def test_a_forced_instruction_set(files: dict[str, Path]) -> None:
    """AVSER_FAST_CPU_ISA is obeyed, reported, and refused in one sentence when it is unknown."""
    code = (
        "import sys, avser_fast\n"
        "try: print(avser_fast.load(sys.argv[1]).info()['isa'])\n"
        "except avser_fast.BackendError as error: print(error)"
    )

    def run(isa: str) -> str:
        import os

        environment = {**os.environ, "AVSER_FAST_CPU_ISA": isa}
        command = [sys.executable, "-c", code, str(files["even"])]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    assert run("scalar") == "scalar"
    refusal = run("mmx")
    assert refusal.startswith("backend 'engine': ") and "mmx" in refusal and "\n" not in refusal
