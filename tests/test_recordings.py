"""Recordings read in runs by compiled code: what reading them one by one gives, or nothing."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avser_fast import _engine
from avser_fast.config import FrontEnd
from avser_fast.errors import ConfigError, InputError
from avser_fast.inference.audio import load_item
from avser_fast.inference.features import features, resample
from python_training.data import Fault, prepare, read_corpus
from python_training.data.features import compute_features
from python_training.data.recordings import Recording, read_recordings, sndfile_decoder

soundfile = pytest.importorskip("soundfile")
RATE = 16000
WHOLE = [(0.0, None)]
FORMATS = [
    ("WAV", "PCM_16"), ("WAV", "PCM_U8"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("FLAC", "PCM_S8"),
]  # fmt: skip


def tone(seconds: float = 0.3, rate: int = RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    """(n, channels) float64 in [-1, 1]."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal((len(t), channels))
    return 0.3 * np.sin(2 * np.pi * 300 * t)[:, None] + 0.05 * noise


def encoded(samples: np.ndarray, rate: int = RATE, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def decoded(content: bytes, rate: int = RATE) -> Any:
    (found,) = sndfile_decoder().decode([np.frombuffer(content, np.uint8)], rate)
    return found


def one_by_one(content: bytes, rate: int = RATE) -> tuple[np.ndarray, int]:
    sound = load_item(content, None, "x")
    return resample(sound.samples, sound.rate, rate), sound.rate


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16000, 44100, 8000])
@pytest.mark.parametrize(("form", "subtype"), FORMATS)
def test_waveforms_are_those_of_reading_one_by_one(form: str, subtype: str, rate: int, channels: int) -> None:
    content = encoded(tone(rate=rate, channels=channels), rate, form, subtype)
    waveform, file_rate = decoded(content)
    wanted, wanted_rate = one_by_one(content)
    np.testing.assert_array_equal(waveform, wanted)
    whole = bool((wanted == np.round(wanted)).all())
    assert file_rate == wanted_rate == rate and waveform.dtype == (np.int16 if whole else np.float32)


def test_what_is_not_plain_is_left_to_reading_one_by_one() -> None:
    x = tone()
    wav, flac = encoded(x), encoded(x, form="FLAC")
    streamed = bytearray(wav)
    streamed[40:44] = b"\xff" * 4
    loud, not_finite = x.copy(), x.copy()
    loud[100], not_finite[100] = 3.0, np.nan
    cases = {
        "nothing": b"", "text": b"this is no sound", "cut wav": wav[:-2], "cut flac": flac[:-100], "header": wav[:44],
        "streamed": bytes(streamed), "ogg": encoded(x, form="OGG", subtype="VORBIS"), "aiff": encoded(x, form="AIFF"),
        "loud": encoded(loud, subtype="FLOAT"), "nan": encoded(not_finite, subtype="FLOAT"),
        "3 channels": encoded(tone(channels=3)), "slow": encoded(x, rate=3000), "no sample": encoded(x[:0]),
    }  # fmt: skip
    assert {name for name, content in cases.items() if decoded(content) is not None} == set()
    assert decoded(wav) is not None and decoded(flac) is not None


@pytest.mark.parametrize(("form", "subtype"), [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("FLAC", "PCM_16")])
def test_a_damaged_file_is_never_read_as_something_else(form: str, subtype: str) -> None:
    whole = encoded(tone(0.1), form=form, subtype=subtype)
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(300):
        content = bytearray(whole)
        header = rng.random() < 0.7
        for _ in range(int(rng.integers(1, 4))):
            content[int(rng.integers(0, 64 if header else len(content)))] = int(rng.integers(0, 256))
        content = content[: int(rng.integers(1, len(content)))] if rng.random() < 0.2 else content
        found = decoded(bytes(content))
        if found is not None:
            read += 1
            wanted, rate = one_by_one(bytes(content))  # an error here is one that was not seen there
            np.testing.assert_array_equal(found[0], wanted)
            assert found[1] == rate
    assert read > 10, "some damage does not hurt"


def corpus_files(folder: Path) -> list[tuple[Path, list[tuple[float, float | None]]]]:
    """Files of every kind, plain and not, with the parts that are wanted of them."""
    contents = {
        "a.wav": encoded(tone()), "b.flac": encoded(tone(seed=1), form="FLAC"), "same as a.wav": encoded(tone()),
        os.fsdecode(b"f\xfcr \xc3\xa9.wav"): encoded(tone(seed=2)), "48.wav": encoded(tone(rate=48000), 48000),
        "c.ogg": encoded(tone(seed=3), form="OGG", subtype="VORBIS"), "cut.wav": encoded(tone())[:-2],
        "empty.wav": b"", "nan.wav": encoded(tone() * np.nan, subtype="FLOAT"), "text.wav": b"this is no sound",
        "long.wav": encoded(tone(2.0, seed=4)),
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.wav")
    files = [(folder / name, list(WHOLE)) for name in [*contents, "pipe.wav", "missing.wav"]] + [(folder, list(WHOLE))]
    return [*files, (folder / "long.wav", [(0.5, 1.0), *WHOLE, (1.0, 9.0), (0.5, 1.0)])]


def same(a: Recording | Fault, b: Recording | Fault) -> bool:
    if isinstance(a, Fault) or isinstance(b, Fault):
        return a == b
    return (a.digest, a.rate, len(a.made)) == (b.digest, b.rate, len(b.made)) and all(map(same_arrays, a.made, b.made))


def same_arrays(a: Any, b: Any) -> bool:
    if a is None or b is None or isinstance(a, InputError):
        return a is b or str(a) == str(b)
    one, other = [a[0], *a[1]], [b[0], *b[1]]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(one, other, strict=True))


def test_a_run_gives_what_its_files_give_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = corpus_files(tmp_path)
    front_ends = [FrontEnd(channels=3), FrontEnd(mel_bands=20)]
    module = sys.modules["python_training.data.recordings"]
    plain = module.read_spans  # type: ignore[attr-defined]
    alone: list[str] = []

    def counting(path: Path, *rest: Any) -> Any:
        alone.append(path.name)
        return plain(path, *rest)

    monkeypatch.setattr(module, "read_spans", counting)
    nothing_stored = [read_recordings(files, lambda key: False, front_ends)]
    assert alone == ["c.ogg", "cut.wav", "empty.wav", "nan.wav", "text.wav", "long.wav"]
    monkeypatch.setattr(module, "_RUN_BYTES", 20_000)  # two files at a time, and the long ones by themselves
    nothing_stored += [read_recordings(files, lambda key: False, front_ends)]
    assert alone.count("long.wav") == 3 and alone.count("a.wav") == 0
    monkeypatch.setattr(module, "sndfile_decoder", lambda: None)
    nothing_stored += [read_recordings(files, lambda key: False, front_ends)]
    assert all(all(map(same, nothing_stored[0], other)) for other in nothing_stored[1:])
    kinds = {path.name: found.kind for (path, _), found in zip(files, nothing_stored[0]) if isinstance(found, Fault)}
    assert kinds == {
        "cut.wav": "unreadable-audio", "empty.wav": "unreadable-audio", "nan.wav": "unreadable-audio",
        "text.wav": "unreadable-audio", "pipe.wav": "unreadable-audio", "missing.wav": "missing-wav",
        tmp_path.name: "unreadable-audio",
    }  # fmt: skip


def test_what_is_stored_is_not_made_again(tmp_path: Path) -> None:
    files = corpus_files(tmp_path)[:2]
    first, second = read_recordings(files, lambda key: False, [])
    assert isinstance(first, Recording) and isinstance(second, Recording)
    again = read_recordings(files, lambda key: key == first.digest[:32], [])
    assert again[0] == Recording(first.digest, [None]) and same(again[1], second)


def test_files_are_read_until_there_are_enough_bytes(tmp_path: Path) -> None:
    paths = []
    for i, size in enumerate((10, 30, 101, 0, 80, 5)):
        (tmp_path / str(i)).write_bytes(bytes([i]) * size)
        paths.append(os.fsencode(tmp_path / str(i)))
    read = _engine.read_files(paths, 100)
    assert [None if x is None else bytes(x) for x in read] == [b"\0" * 10, b"\1" * 30, None, None, b"\4" * 80]
    assert _engine.read_files([paths[0] + b"\0x", os.fsencode(tmp_path), b""], 100) == [None] * 3


def test_a_pipe_is_not_even_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert _engine.read_files([os.fsencode(tmp_path / "pipe")], 100) == [None]
    with pytest.raises(OSError, match="No such device or address"):  # what there is without a reader
        os.close(os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK))


def test_features_of_several_waveforms_are_those_of_inference() -> None:
    waveforms: Sequence[np.ndarray] = [
        (tone(seconds)[:, 0] * 32768).astype(dtype) for seconds, dtype in ((0.3, "i2"), (0.01, "f4"), (0.5, "i2"))
    ]
    for front_end in (FrontEnd(channels=3, delta_window=3), FrontEnd(mel_bands=20), FrontEnd(mel_bands=90, channels=2)):
        for vtlp in (1.0, 0.9):
            found = compute_features(waveforms, front_end, vtlp=vtlp)
            for waveform, values in zip(waveforms, found, strict=True):
                np.testing.assert_array_equal(values, features(waveform.astype("f4"), front_end, vtlp=vtlp))
    assert compute_features([], FrontEnd()) == []
    (fast,) = compute_features([waveforms[2]], FrontEnd(), 1.1)
    np.testing.assert_array_equal(fast, features(resample(waveforms[2].astype("f4"), 17600, RATE), FrontEnd()))


def test_arguments_that_make_no_sense_are_named() -> None:
    x = np.zeros(500, np.int16)
    for bad in (x[::2], x[None], x[:0], x.astype(np.int32)):
        with pytest.raises(
            InputError, match="front_end: waveforms: expected contiguous 1-D arrays of int16 or float32"
        ):
            _engine.front_end([x, bad])
    with pytest.raises(ConfigError, match="front_end: channels: expected 1, 2 or 3, got 4"):
        _engine.front_end([x], channels=4)
    with pytest.raises(ConfigError, match="window: expected at least 1, got 0"):
        _engine.front_end([x], channels=2, delta_window=0)
    with pytest.raises(InputError, match="at_rate: waveform: expected a 1-D array, got 2 dimensions"):
        _engine.at_rate(x[None], RATE, RATE)


def test_without_soundfile_wavs_are_prepared_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "03a01Fa.wav").write_bytes(encoded(tone()))
    corpus = read_corpus("emodb", tmp_path)
    prepare(corpus, tmp_path / "with", front_ends=[FrontEnd()])
    monkeypatch.setitem(sys.modules, "soundfile", None)
    sndfile_decoder.cache_clear()
    try:
        assert sndfile_decoder() is None
        prepare(corpus, tmp_path / "without", front_ends=[FrontEnd()])
    finally:
        sndfile_decoder.cache_clear()
    shards = sorted(p.relative_to(tmp_path / "with") for p in tmp_path.glob("with/*/*/*"))
    assert len(shards) == 2
    for shard in shards:
        assert (tmp_path / "with" / shard).read_bytes() == (tmp_path / "without" / shard).read_bytes()
