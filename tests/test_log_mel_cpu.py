"""The C++ front end against the float64 reference, the golden files and its own promises."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avser_fast import _engine, reference
from avser_fast.config import FrontEnd
from avser_fast.errors import BackendError, ConfigError, InputError
from avser_fast.inference.features import features
from avser_fast.testing import assert_close

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = np.load(ROOT / "tests" / "data" / "frontend.npz")
ISAS = ("scalar", "avx2", "avx512")

#: Option sets: bands, transform lengths with and without a radix-2 pass, rates, steps longer and shorter than a frame.
OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "80 bands": {"mel_bands": 80},
    "128 bands, some of them empty": {"mel_bands": 128},
    "20 bands, 8 kHz": {
        "mel_bands": 20, "sampling_rate": 8000, "frame_length": 200, "frame_step": 80, "n_fft": 256, "high_hz": 4000.0,
    },
    "48 kHz": {"sampling_rate": 48000, "frame_length": 1200, "frame_step": 480, "n_fft": 2048, "high_hz": 24000.0},
    "smallest transform": {"mel_bands": 3, "frame_length": 16, "frame_step": 5, "n_fft": 16},
    "32 points": {"mel_bands": 4, "frame_length": 31, "frame_step": 31, "n_fft": 32},
    "step longer than a frame": {"frame_length": 100, "frame_step": 333, "n_fft": 128},
    "step of 1": {"frame_length": 50, "frame_step": 1, "n_fft": 64, "mel_bands": 10},
    "frame as long as the transform": {"frame_length": 512},
    "band limits, no pre-emphasis": {"low_hz": 300.0, "high_hz": 3400.0, "preemphasis": 0.0},
    "4096 points": {"n_fft": 4096, "mel_bands": 64},
}  # fmt: skip


def speech(samples: int, seed: int = 0) -> np.ndarray:
    """Noise whose level changes over six orders of magnitude, at int16 scale, with stretches of exact silence."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(samples) * 10 ** random.uniform(-2, 4, samples // 500 + 1).repeat(500)[:samples]
    x[random.uniform(size=samples // 700 + 1).repeat(700)[:samples] < 0.1] = 0
    return np.clip(x, -32768, 32767)


def expected(waveform: np.ndarray, **options: Any) -> np.ndarray:
    return reference.log_mel(torch.from_numpy(np.asarray(waveform, dtype=np.float64)), **options).numpy()


@pytest.mark.parametrize("samples", (16000, 40000))
def test_golden_features(samples: int) -> None:
    wave, wanted = GOLDEN[f"wave/{samples}"], GOLDEN[f"logfbank/{samples}"]
    assert np.abs(_engine.log_mel(wave, dtype="float64") - wanted).max() < 1e-12
    assert np.abs(_engine.log_mel(wave) - wanted).max() < 1e-6


@pytest.mark.parametrize("name", OPTIONS)
def test_matches_reference_over_lengths(name: str) -> None:
    options = OPTIONS[name]
    length, step = options.get("frame_length", 400), options.get("frame_step", 160)
    edges = {
        1,
        2,
        length - 1,
        length,
        length + 1,
        length + step,
        length + step + 1,
        7 * step + length,
        8 * step + length,
    }
    random = np.random.default_rng(len(name))
    for samples in sorted(edges | set(random.integers(1, 40 * step + length, 6).tolist())):
        wave = speech(samples, samples)
        out = _engine.log_mel(wave, dtype="float64", **options)
        assert_close(out, expected(wave, **options), 1e-12, f"{samples} samples")


@pytest.mark.parametrize("vtlp", (0.5, 0.85, 0.9, 0.999, 1.0, 1.03, 1.1, 1.37, 2.0))
@pytest.mark.parametrize("name", OPTIONS)
def test_warped_filters_match_reference(name: str, vtlp: float) -> None:
    options = OPTIONS[name]
    rate = options.get("sampling_rate", 16000)
    wave = speech(7 * options.get("frame_step", 160) + options.get("frame_length", 400), 4)
    for share in (0.3, 0.01, 0.4999):
        warp = {"vtlp": vtlp, "vtlp_high_hz": share * rate, **options}
        out = _engine.log_mel(wave, dtype="float64", **warp)
        assert_close(out, expected(wave, **warp), 1e-12, f"vtlp_high_hz {share * rate}")


def test_warps_by_chance_match_reference() -> None:
    """Each draw ends in other bins: the two round the same edges."""
    random = np.random.default_rng(12)
    wave = np.random.default_rng(0).standard_normal(700) * 1000
    for _ in range(300):
        rate = int(random.choice((8000, 11025, 16000, 44100)))
        warp = {
            "vtlp": float(random.uniform(0.5, 2)),
            "vtlp_high_hz": float(random.uniform(0, rate / 2)),
            "sampling_rate": rate,
            "mel_bands": int(random.integers(1, 200)),
            "low_hz": float(random.uniform(0, 300)),
            "high_hz": float(random.uniform(3000, rate / 2)) if random.random() < 0.5 else rate / 2,
        }
        assert_close(_engine.log_mel(wave, dtype="float64", **warp), expected(wave, **warp), 1e-12, str(warp))


@pytest.mark.parametrize("rate", (8000, 16000, 22050, 24000, 44100, 48000))
@pytest.mark.parametrize("vtlp", (0.5, 0.7, 0.9))
def test_the_steepest_warp_stays_inside_the_spectrum(vtlp: float, rate: int) -> None:
    """The last edge may be rounded to just above half the rate: a slope of 1e15 must not take it further."""
    warp = {"vtlp": vtlp, "vtlp_high_hz": float(np.nextafter(rate / 2, 0)), "sampling_rate": rate, "high_hz": rate / 2}
    flat = np.zeros(400)
    flat[0] = 1000 * math.sqrt(512)  # energy of every bin: 1e6
    left = int(513 * vtlp * 700 * ((1 + rate / 1400) ** (39 / 41) - 1) / rate)  # of the last of 40 bands
    for out in (_engine.log_mel(flat, preemphasis=0.0, **warp), expected(flat, preemphasis=0.0, **warp)):
        assert math.exp(out[0, -1]) / 1e6 < (256 - left) / 2 + 1e-3  # the area of its triangle


@pytest.mark.parametrize("name", OPTIONS)
def test_no_warp_has_the_same_bits(name: str) -> None:
    """Also where vtlp_high_hz, which then means nothing, would not do."""
    wave, options = speech(5000), OPTIONS[name]
    plain = _engine.log_mel(wave, dtype="float64", **options)
    for high in (4800.0, 1.0, 0.0, -1.0, 1e9, math.inf, math.nan):
        assert (_engine.log_mel(wave, dtype="float64", vtlp=1.0, vtlp_high_hz=high, **options) == plain).all()
        assert (expected(wave, vtlp=1.0, vtlp_high_hz=high, **options) == expected(wave, **options)).all()
    rate = options.get("sampling_rate", 16000)
    assert (_engine.log_mel(wave, dtype="float64", vtlp=1.1, vtlp_high_hz=0.3 * rate, **options) != plain).any()


@pytest.mark.parametrize("vtlp", (0.8, 0.9, 1.1, 1.25))
@pytest.mark.parametrize("hz", (500.0, 1000.0, 2000.0, 3000.0, 6000.0))
def test_vtlp_above_1_lowers_a_tone(hz: float, vtlp: float) -> None:
    """By as many bands as lie between the tone and the frequency that the map takes to it."""

    def band_of(hz: float) -> float:
        return 65 * math.log10(1 + hz / 700) / math.log10(1 + 8000 / 700) - 1

    bend = 4800 * min(vtlp, 1)
    heard = hz / vtlp if hz <= bend else 8000 - (8000 - hz) * (8000 - bend / vtlp) / (8000 - bend)
    assert (heard < hz) == (vtlp > 1)
    wave = 1000 * np.sin(2 * np.pi * hz / 16000 * np.arange(16000))
    settings: dict[str, Any] = {"mel_bands": 64, "n_fft": 4096, "frame_length": 4096, "preemphasis": 0.0}
    peaks = [int(_engine.log_mel(wave, vtlp=v, **settings)[0].argmax()) for v in (1.0, vtlp)]
    for peak, wanted in zip(peaks, (band_of(hz), band_of(heard))):
        assert abs(peak - wanted) < 0.75  # the nearest band, bins rounded down
    assert (peaks[1] < peaks[0]) == (vtlp > 1) and peaks[0] != peaks[1]


@pytest.mark.parametrize("threads", (1, 2))
def test_features_take_the_factor(threads: int) -> None:
    front = FrontEnd(mel_bands=64, channels=2, normalization="utterance")
    wave = speech(20000, 8).astype(np.float32)
    assert (features(wave, front, threads, vtlp=1.0) == features(wave, front)).all()
    static = reference.log_mel(torch.from_numpy(wave).double(), mel_bands=64, vtlp=0.93)
    wanted = reference.normalize(reference.add_deltas(static, 2, front.delta_window), front)
    assert_close(features(wave, front, threads, vtlp=0.93), wanted, 1e-5)


def test_factors_drawn_for_ever_take_no_memory() -> None:
    code = """
import resource, numpy
from avser_fast import _engine
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
x = numpy.ones(100, numpy.float32)
def draw(count):
    for vtlp in numpy.random.default_rng(count).uniform(0.9, 1.1, count):
        _engine.log_mel(x, n_fft=8192, vtlp=float(vtlp))
draw(100)
before = peak()
draw(3000)  # 150 kB each
print(peak() - before)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 30  # all of them would be 450 MB


def test_ten_minutes() -> None:
    wave = np.tile(speech(16000 * 60), 10)
    out = _engine.log_mel(wave.astype(np.float32), dtype="float64", threads=2)
    assert out.shape == (1 + math.ceil((len(wave) - 400) / 160), 40)
    tail = len(out) - 300
    assert_close(out[-299:], expected(wave.astype(np.float32)[tail * 160 :])[1:], 1e-12)


@pytest.mark.parametrize("dtype", (np.int16, np.float32, np.float64))
@pytest.mark.parametrize("stride", (1, 3, -1, -2))
def test_dtypes_and_strides(dtype: type, stride: int) -> None:
    wave = speech(9001).astype(dtype)
    view = wave[::stride]
    for result in ("float32", "float64"):
        out = _engine.log_mel(view, dtype=result)
        assert out.dtype == result
        assert_close(out, expected(view.copy()), 1e-12 if result == "float64" else 1e-7)


def test_unaligned_view() -> None:
    records = np.zeros(2000, dtype=np.dtype([("flag", "u1"), ("value", "<f4")]))
    records["value"] = speech(2000)
    assert_close(_engine.log_mel(records["value"]), expected(records["value"].copy()), 1e-7)
    assert_close(_engine.log_mel(np.lib.stride_tricks.as_strided(records["value"][:1], (900,), (0,))),
                 expected(np.full(900, records["value"][0])), 1e-7)  # fmt: skip


def test_silence_is_the_floor_and_not_minus_infinity() -> None:
    assert (_engine.log_mel(np.zeros(1000), dtype="float64") == math.log(2.220446049250313e-16)).all()


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_nan_spreads_over_its_frames_only(bad: float) -> None:
    wave = speech(8000)
    clean = _engine.log_mel(wave, mel_bands=128)
    wave[4000] = bad
    out = _engine.log_mel(wave, mel_bands=128)
    touched = np.array([160 * i <= 4001 and 160 * i + 400 > 4000 for i in range(len(out))])
    assert np.isnan(out[touched]).all()
    assert (out[~touched] == clean[~touched]).all()


@pytest.mark.parametrize("name", ("published", "32 points", "128 bands, some of them empty"))
def test_a_frame_has_the_same_bits_everywhere(name: str) -> None:
    """In any lane, next to any neighbours, in any length, with any number of threads, from any dtype that holds it."""
    options = OPTIONS[name]
    length, step = options.get("frame_length", 400), options.get("frame_step", 160)
    wave = speech(100 * step + length, 3).astype(np.int16)
    whole = _engine.log_mel(wave, dtype="float64", preemphasis=0.0, **options)
    assert len(whole) == 101
    for first, count in itertools.product((0, 1, 2, 3, 5, 7, 50), (1, 2, 3, 7, 8, 9, 33)):
        part = wave[first * step : first * step + (count - 1) * step + length]
        out = _engine.log_mel(part, dtype="float64", preemphasis=0.0, **options)
        assert (out == whole[first : first + count]).all(), (first, count)
    for threads, dtype in itertools.product((2, 3, 8), (np.int16, np.float32, np.float64)):
        out = _engine.log_mel(wave.astype(dtype), dtype="float64", preemphasis=0.0, threads=threads, **options)
        assert (out == whole).all(), (threads, dtype)


def test_concurrent_callers_share_the_pool() -> None:
    waves = [speech(30000 + 977 * i, i) for i in range(6)]
    wanted = [_engine.log_mel(wave) for wave in waves]
    failures: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not (_engine.log_mel(waves[index], threads=1 + index % 3) == wanted[index]).all():
                failures.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(waves))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_the_pool_survives_a_fork() -> None:
    code = (
        "import os, numpy as np\n"
        "from avser_fast import _engine\n"
        "x = np.random.default_rng(0).standard_normal(50000)\n"
        "a = _engine.log_mel(x, threads=2)\n"
        "pid = os.fork()\n"
        "same = (_engine.log_mel(x, threads=2) == a).all()\n"
        "if pid == 0: os._exit(0 if same else 1)\n"
        "assert same and os.waitpid(pid, 0)[1] == 0\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_many_option_sets_in_turn() -> None:
    """More than the tables that are kept."""
    wave = speech(3000)
    for bands in [*range(20, 100), 20]:
        assert_close(_engine.log_mel(wave, mel_bands=bands, dtype="float64"), expected(wave, mel_bands=bands), 1e-12)


def test_logarithm_within_one_ulp() -> None:
    random = np.random.default_rng(5)
    x = np.concatenate(
        (
            np.exp(random.uniform(-745, 709, 200_000)),
            random.uniform(0.5, 2.0, 200_000),
            1 + random.uniform(-1e-6, 1e-6, 50_000),
            [
                5e-324,
                2.2250738585072014e-308,
                2.2e-308,
                1.0,
                np.nextafter(1, 0),
                np.nextafter(1, 2),
                1.7976931348623157e308,
            ],
            [math.sqrt(0.5), np.nextafter(math.sqrt(0.5), 0), math.sqrt(2), np.nextafter(math.sqrt(2), 3)],
        )
    )
    y = _engine._log(x)
    exact = np.log(x.astype(np.longdouble))
    if np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("long double is double here: no finer logarithm to compare with")
    assert float(np.max(np.abs(y - exact) / np.spacing(np.abs(exact.astype(np.float64))))) < 1.0
    assert np.isnan(_engine._log(np.array([np.nan]))).all() and _engine._log(np.array([np.inf]))[0] == np.inf


PROBE = """
import sys
import numpy as np
from avser_fast import _engine
x = np.load(sys.argv[1])
np.savez(sys.argv[2], isa=_engine.cpu_isa(), mel=_engine.log_mel(x, dtype="float64"),
         short=_engine.log_mel(x, dtype="float64", frame_length=30, frame_step=7, n_fft=32, mel_bands=6),
         warped=_engine.log_mel(x, dtype="float64", mel_bands=64, vtlp=1.07),
         down=_engine.resample(x.astype("f4"), 44100, 16000), log=_engine._log(np.abs(x) + 1e-300))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    """Forced in a subprocess: right results, or one sentence where this machine or build does not have it."""
    wave = speech(6000, 11)
    np.save(tmp_path / "x.npy", wave)
    run = subprocess.run(
        [sys.executable, "-c", PROBE, tmp_path / "x.npy", tmp_path / "y.npz"],
        env={**os.environ, "AVSER_FAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if isa not in _engine.supported_isas():
        assert run.returncode != 0 and "AVSER_FAST_CPU_ISA" in run.stderr and isa in run.stderr
        return
    assert run.returncode == 0, run.stderr
    out = np.load(tmp_path / "y.npz")
    assert str(out["isa"]) == isa
    assert_close(out["mel"], expected(wave), 1e-12)
    assert_close(out["short"], expected(wave, frame_length=30, frame_step=7, n_fft=32, mel_bands=6), 1e-12)
    assert_close(out["warped"], expected(wave, mel_bands=64, vtlp=1.07), 1e-12)
    assert_close(out["down"], reference.resample(torch.from_numpy(wave.astype("f4")), 44100, 16000), 1e-7)
    assert_close(out["log"], np.log(np.abs(wave) + 1e-300), 1e-15)


@pytest.mark.parametrize("name", ("neon", "AVX512", "scalar,avx2"))
def test_unknown_instruction_set(name: str) -> None:
    code = (
        "from avser_fast import _engine, errors\n"
        "for call in (_engine.cpu_isa, lambda: _engine.log_mel(__import__('numpy').zeros(9))):\n"
        "    try: call()\n"
        "    except errors.BackendError as error: print(error)\n"
        "    else: raise SystemExit('no error')\n"
        "print(_engine.supported_isas())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "AVSER_FAST_CPU_ISA": name}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    first, second, isas = run.stdout.splitlines()
    assert first == second and name in first and "scalar" in isas


# ---- clips, deltas, resampling


@pytest.mark.parametrize("frames", sorted(int(k.split("/")[1]) for k in GOLDEN.files if k.startswith("clips/")))
def test_golden_clip_tables(frames: int) -> None:
    assert (_engine.clip_table(frames, 5, 224, "published") == GOLDEN[f"clips/{frames}"]).all()


@pytest.mark.parametrize("rule", ("published", "even"))
def test_clip_tables_and_clips_match_reference(rule: str) -> None:
    random = np.random.default_rng(7)
    for _ in range(120):
        frames, width = int(random.integers(1, 400)), int(random.integers(1, 90))
        clips = None if rule == "even" and random.uniform() < 0.3 else int(random.integers(1, 9))
        table, valid = reference.clip_table(frames, clips, width, rule)
        assert (_engine.clip_table(frames, clips, width, rule) == table.numpy()).all(), (frames, clips, width)
        big = random.standard_normal((4, frames + 3, 7)).astype(np.float32 if frames % 2 else np.float64)
        features = big[::2, 1 : frames + 1, ::-2]  # a view: real strides
        out, votes = _engine.frame_clips(features, clips, width, rule)
        wanted, _ = reference.frame_clips(torch.from_numpy(features.copy()), clips, width, rule)
        assert out.dtype == features.dtype and (out == wanted.numpy()).all(), (frames, clips, width)
        assert votes.dtype == bool and (votes == valid.numpy()).all()


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_add_deltas_matches_reference(dtype: type) -> None:
    random = np.random.default_rng(1)
    for frames, channels, window in itertools.product((1, 2, 3, 5, 300), (1, 2, 3), (1, 2, 4)):
        features = random.standard_normal((2 * frames, 9)).astype(dtype)[::-2, ::2]
        out = _engine.add_deltas(features, channels, window)
        wanted = reference.add_deltas(torch.from_numpy(features.astype(np.float64)), channels, window)
        assert out.dtype == dtype
        assert_close(out, wanted, 1e-14 if dtype == np.float64 else 1e-6, f"{frames}, {channels}, {window}")


@pytest.mark.parametrize(
    ("channels", "frames", "bands"), [(1, 1, 1), (2, 7, 1), (1, 300, 2), (3, 1000, 40), (3, 2, 128)]
)
def test_normalize_matches_reference_and_numpy(channels: int, frames: int, bands: int) -> None:
    random = np.random.default_rng(frames)
    values = random.normal(8, 5, (channels, frames, bands)).astype(np.float32)
    values[0, :, 0] = -36.04365  # what a band without a bin holds
    mean, std = random.uniform(0.1, 9, (2, channels)).tolist()
    for rule in ("none", "global", "utterance"):
        known = {"mean": tuple(mean), "std": tuple(std)} if rule == "global" else {}
        out = _engine.normalize(values, rule, **known)
        front = FrontEnd(mel_bands=bands, channels=channels, normalization=rule, **known)
        wanted = reference.normalize(torch.from_numpy(values).double(), front)
        assert out.dtype == np.float32 and out is not values
        assert_close(out, wanted, 1e-6, rule)
        assert np.array_equal(_engine.normalize(values[:, :, ::-1], rule, **known), out[:, :, ::-1])
    if bands > 1:  # NumPy, too, adds the frames one after the other then
        low = values.mean(1, dtype=np.float64, keepdims=True)
        scale = np.maximum(values.std(1, dtype=np.float64, keepdims=True), 1e-5)
        assert np.array_equal(out, ((values - low) / scale).astype(np.float32))
    values[0, 0, 0] = np.nan
    assert np.isnan(_engine.normalize(values, "utterance")[0, :, 0]).all()


RATES = ((44100, 16000), (48000, 16000), (8000, 16000), (22050, 16000), (16000, 44100), (44101, 16000), (11025, 16000),
         (192000, 16000), (16000, 16001), (3, 2), (1, 3), (384000, 100), (7, 7))  # fmt: skip


@pytest.mark.parametrize(("from_rate", "to_rate"), RATES)
def test_resample_matches_reference(from_rate: int, to_rate: int) -> None:
    random = np.random.default_rng(from_rate)
    for samples in (1, 2, 100, 5001):
        wave = random.standard_normal(2 * samples).astype(np.float32)[::2]
        out = _engine.resample(wave, from_rate, to_rate)
        wanted = reference.resample(torch.from_numpy(wave.astype(np.float64)), from_rate, to_rate)
        assert out.shape == (math.ceil(samples * to_rate / from_rate),)
        scale = float(np.abs(wave).max())
        assert np.abs(out - wanted.numpy()).max() < 1e-6 * scale, samples


def test_resample_keeps_tones_and_removes_what_would_alias() -> None:
    t = np.arange(44100) / 44100
    middle = slice(1000, -1000)
    kept = _engine.resample(np.sin(2 * np.pi * 1000 * t).astype(np.float32), 44100, 16000)
    wanted = np.sin(2 * np.pi * 1000 * np.arange(len(kept)) / 16000)
    assert np.abs(kept - wanted)[middle].max() < 2e-4
    removed = _engine.resample(np.sin(2 * np.pi * 9000 * t).astype(np.float32), 44100, 16000)
    assert np.abs(removed)[middle].max() < 2e-4


def test_resample_computes_unusual_ratios_without_a_table() -> None:
    """A table of 383,999 filters would be larger than the signal by far."""
    wave = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    out = _engine.resample(wave, 383998, 383999)
    assert out.shape == (41,)
    assert np.abs(out[:40] - wave).max() < 0.5  # nearly the same rate: nearly the same samples, low-passed


# ---- bad arguments


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (InputError, ("log_mel", "waveform", "(2, 8)"), lambda: _engine.log_mel(np.zeros((2, 8)))),
        (InputError, ("log_mel", "waveform", "int32"), lambda: _engine.log_mel(np.zeros(8, np.int32))),
        (InputError, ("log_mel", "waveform", "0"), lambda: _engine.log_mel(np.zeros(0))),
        (ConfigError, ("log_mel", "n_fft", "500"), lambda: _engine.log_mel(np.zeros(8), n_fft=500)),
        (ConfigError, ("log_mel", "mel_bands", "257"), lambda: _engine.log_mel(np.zeros(8), mel_bands=257)),
        (ConfigError, ("log_mel", "frame_length", "513"), lambda: _engine.log_mel(np.zeros(8), frame_length=513)),
        (ConfigError, ("log_mel", "frame_step", "0"), lambda: _engine.log_mel(np.zeros(8), frame_step=0)),
        (ConfigError, ("log_mel", "high", "8001"), lambda: _engine.log_mel(np.zeros(8), high_hz=8001)),
        (ConfigError, ("log_mel", "preemphasis", "nan"), lambda: _engine.log_mel(np.zeros(8), preemphasis=math.nan)),
        (ConfigError, ("log_mel", "vtlp", "0.5 to 2", "2.1"), lambda: _engine.log_mel(np.zeros(8), vtlp=2.1)),
        (ConfigError, ("log_mel", "vtlp", "0.5 to 2", "nan"), lambda: _engine.log_mel(np.zeros(8), vtlp=math.nan)),
        (
            ConfigError,
            ("log_mel", "vtlp_high_hz", "half the sampling rate 16000", "8000"),
            lambda: _engine.log_mel(np.zeros(8), vtlp=0.9, vtlp_high_hz=8000),
        ),
        (
            ConfigError,
            ("log_mel", "vtlp_high_hz", "more than 0", "nan"),
            lambda: _engine.log_mel(np.zeros(8), vtlp=1.1, vtlp_high_hz=math.nan),
        ),
        (
            ConfigError,
            ("log_mel", "vtlp_high_hz", "rate 8000", "4800"),
            lambda: _engine.log_mel(np.zeros(8), vtlp=1.1, sampling_rate=8000, high_hz=4000),
        ),
        (ConfigError, ("log_mel", "dtype", "float16"), lambda: _engine.log_mel(np.zeros(8), dtype="float16")),
        (ConfigError, ("threads", "0"), lambda: _engine.log_mel(np.zeros(8), threads=0)),
        (ConfigError, ("clip_table", "rule", "odd"), lambda: _engine.clip_table(9, 5, 4, "odd")),
        (ConfigError, ("clip_table", "clips", "None"), lambda: _engine.clip_table(9, None, 4, "published")),
        (ConfigError, ("clip_table", "clips", "-1"), lambda: _engine.clip_table(9, -1, 4, "even")),
        (ConfigError, ("clip_table", "clip_frames", "0"), lambda: _engine.clip_table(9, 5, 0, "even")),
        (InputError, ("clip_table", "frames", "0"), lambda: _engine.clip_table(0, 5, 4, "even")),
        (
            InputError,
            ("frame_clips", "features", "(3, 4)"),
            lambda: _engine.frame_clips(np.zeros((3, 4)), 5, 4, "even"),
        ),
        (ConfigError, ("add_deltas", "channels", "4"), lambda: _engine.add_deltas(np.zeros((3, 4)), 4)),
        (ConfigError, ("add_deltas", "window", "0"), lambda: _engine.add_deltas(np.zeros((3, 4)), 2, 0)),
        (InputError, ("add_deltas", "features", "(3,)"), lambda: _engine.add_deltas(np.zeros(3), 2)),
        (
            ConfigError,
            ("normalize", "rule", "loud"),
            lambda: _engine.normalize(np.zeros((1, 2, 3), np.float32), "loud"),
        ),
        (ConfigError, ("normalize", "mean", "0"), lambda: _engine.normalize(np.zeros((1, 2, 3), np.float32), "global")),
        (InputError, ("normalize", "features", "float64"), lambda: _engine.normalize(np.zeros((1, 2, 3)), "none")),
        (InputError, ("resample", "waveform", "float64"), lambda: _engine.resample(np.zeros(3), 2, 3)),
        (InputError, ("resample", "waveform", "0"), lambda: _engine.resample(np.zeros(0, np.float32), 2, 3)),
        (ConfigError, ("resample", "to_rate", "384001"), lambda: _engine.resample(np.zeros(3, np.float32), 2, 384001)),
        (ConfigError, ("resample", "from_rate", "0"), lambda: _engine.resample(np.zeros(3, np.float32), 0, 3)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_arguments_are_named(error: type[Exception], words: tuple[str, ...], call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words) and "expected" in message and "\n" not in message


def test_backend_error_is_the_packages_own() -> None:
    assert issubclass(BackendError, RuntimeError)  # what the modules raise for AVSER_FAST_CPU_ISA, see above


def test_resampling_long_audio_takes_no_memory_but_its_output() -> None:
    code = """
import resource, numpy
from avser_fast import _engine
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
x = numpy.ones(192000 * 200, numpy.float32)  # 154 MB
_engine.resample(x[:1000], 192000, 16000)
before = peak()
_engine.resample(x, 192000, 16000)
print(peak() - before)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 60  # the result is 13 MB, the input as float64 would be 307 MB
