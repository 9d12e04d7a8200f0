"""From raw folders to prepared ones: what is stored, every planted fault by name, the report, the command."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from open_files import few_descriptors, held, mapped

from avser_fast.config import FrontEnd
from avser_fast.inference.features import features
from python_training.data import (
    Corpus,
    FaceSource,
    Fault,
    Prepared,
    PreparedCorpus,
    Utterance,
    prepare,
    read_corpus,
)
from python_training.data.boxes import Boxes, with_boxes
from python_training.data.report import corpus_report, report_text
from python_training.data.synthetic import SyntheticCorpus, write_iemocap
from python_training.settings import load_settings

cv2 = pytest.importorskip("cv2")
RATE = 16000


def tone(seconds: float = 0.5, rate: int = RATE, seed: int = 0) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(t))
    return (3000 * np.sin(2 * np.pi * 300 * t) + 200 * noise).astype(np.int16)


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE, width: int = 2) -> Path:
    """Samples at int16 scale, (n,) or (n, channels), as PCM of ``width`` bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 1:
            raw = (samples.astype(np.int32) // 256 + 128).astype(np.uint8).tobytes()
        elif width == 3:
            raw = (samples.astype("<i4") << 8).reshape(-1, 1).view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
        else:
            raw = samples.astype("<i2").tobytes()
        file.writeframes(raw)
    return path


def corpus_of(*utterances: Utterance, labels: Sequence[str] = ("ang", "hap")) -> Corpus:
    return Corpus("test", tuple(labels), tuple(sorted(utterances, key=lambda u: u.key)))


def kinds(prepared: Prepared) -> dict[str, str]:
    return {f.item: f.kind for f in prepared.faults}


def message(prepared: Prepared, item: str) -> str:
    (found,) = [f.message for f in prepared.faults if f.item == item]
    return found


# Sound


def test_waveforms_and_features_are_those_of_inference(tmp_path: Path) -> None:
    a = write_wav(tmp_path / "a.wav", tone())
    b = write_wav(tmp_path / "b.wav", tone(0.7, 48000), rate=48000)
    front_end = FrontEnd(mel_bands=20, channels=3)
    out = tmp_path / "out"
    prepared = prepare(corpus_of(Utterance("a", a, "s", 0), Utterance("b", b, "s", 1)), out, front_ends=[front_end])
    corpus = PreparedCorpus(out)
    assert prepared.faults == () and len(corpus) == 2 and corpus.with_speech == [0, 1] and corpus.with_face == []
    assert corpus.waveform(0).dtype == np.int16
    np.testing.assert_array_equal(corpus.waveform(0), tone())
    assert corpus.waveform(1).dtype == np.float32 and corpus.waveform(1).shape == (round(0.7 * RATE),)
    before = set(out.rglob("*"))
    stored = corpus.features(front_end)
    assert set(out.rglob("*")) == before, "prepare has made them already"
    for i, values in enumerate(stored):
        expected = features(corpus.waveform(i).astype(np.float32), front_end)
        np.testing.assert_array_equal(values, expected)
        assert values is not None and values.shape == (3, front_end.frames(len(corpus.waveform(i))), 20)
    assert corpus.item(0)["sampling_rate"] == RATE
    np.testing.assert_array_equal(corpus.item(1)["array"] * 32768, corpus.waveform(1))
    assert prepared.report["file_rates_hz"] == {"16000": 1, "48000": 1}


def test_other_features_are_made_when_they_are_asked_for(tmp_path: Path) -> None:
    a = write_wav(tmp_path / "a.wav", tone())
    prepare(corpus_of(Utterance("a", a, "", 0)), tmp_path / "out")
    corpus = PreparedCorpus(tmp_path / "out")
    slow = corpus.features(FrontEnd(mel_bands=20), speed=0.8)[0]
    plain = corpus.features(FrontEnd(mel_bands=20))[0]
    assert slow is not None and plain is not None and slow.shape[1] > plain.shape[1]
    assert len(list((tmp_path / "out" / "features").iterdir())) == 2
    again = PreparedCorpus(tmp_path / "out").features(FrontEnd(mel_bands=20), speed=0.8)[0]
    np.testing.assert_array_equal(again, slow)
    with pytest.raises(ValueError, match="expected a front end at 16000 Hz, got 8000 Hz"):
        corpus.features(FrontEnd(sampling_rate=8000, high_hz=4000.0))


def test_stereo_8_bit_24_bit_and_48_khz(tmp_path: Path) -> None:
    mono = tone()
    cases = {
        "stereo": (np.stack((mono, np.zeros_like(mono)), 1), RATE, 2),
        "bits8": (mono, RATE, 1),
        "bits24": (mono, RATE, 3),
        "rate48": (tone(0.5, 48000), 48000, 2),
        "rate8": (tone(0.5, 8000), 8000, 2),
    }
    utterances = [
        Utterance(name, write_wav(tmp_path / f"{name}.wav", x, rate, width), "", 0)
        for name, (x, rate, width) in cases.items()
    ]
    prepared = prepare(corpus_of(*utterances), tmp_path / "out")
    corpus = PreparedCorpus(tmp_path / "out")
    waveform = {u.key: corpus.waveform(i).astype(float) for i, u in enumerate(corpus.utterances)}
    assert prepared.faults == ()
    np.testing.assert_array_equal(waveform["bits24"], mono)
    np.testing.assert_array_equal(waveform["stereo"], mono / 2)
    assert np.abs(waveform["bits8"] - mono).max() <= 256
    for name in ("rate48", "rate8"):
        assert len(waveform[name]) == len(mono)
        tones = waveform[name][1000:-1000]
        assert 0.5 < np.std(tones) / (3000 / np.sqrt(2)) < 1.1, "the tone survives the change of rate"


def test_full_scale_stays_int16(tmp_path: Path) -> None:
    x = tone()
    x[100:102] = -32768, 32767
    path = write_wav(tmp_path / "a.wav", x)
    prepare(corpus_of(Utterance("a", path, "", 0), Utterance("b", path, "", 0, start=0.001)), tmp_path / "out")
    corpus = PreparedCorpus(tmp_path / "out")
    assert corpus.waveform(0).dtype == corpus.waveform(1).dtype == np.int16
    np.testing.assert_array_equal(corpus.waveform(0), x)
    np.testing.assert_array_equal(corpus.waveform(1), x[16:])


def test_spans_of_a_long_recording(tmp_path: Path) -> None:
    long = tone(2.0)
    path = write_wav(tmp_path / "long.wav", long)
    prepared = prepare(
        corpus_of(
            Utterance("a", path, "", 0, start=0.25, end=0.75),
            Utterance("b", path, "", 1, start=1.5),
            Utterance("c", path, "", 1, start=1.5, end=2.005),  # labels are rounded
            Utterance("late", path, "", 1, start=1.9, end=2.5),
            Utterance("later", path, "", 1, start=3.0),
        ),
        tmp_path / "out",
    )
    corpus = PreparedCorpus(tmp_path / "out")
    assert [u.key for u in corpus.utterances] == ["a", "b", "c"]
    np.testing.assert_array_equal(corpus.waveform(0), long[4000:12000])
    np.testing.assert_array_equal(corpus.waveform(1), long[24000:])
    assert "expected sound from 1.9 s to 2.5 s, got a recording of 2.00 s" in message(prepared, "late")
    assert "expected sound from 3 s to its end, got a recording of 2.00 s" in message(prepared, "later")
    assert {kinds(prepared)[k] for k in ("late", "later")} == {"unreadable-audio"}


def test_a_span_of_no_sample_is_named_and_the_others_stored(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone())
    spans = (Utterance("a", path, "", 0, start=0.1, end=0.10001), Utterance("b", path, "", 0, start=0.1, end=0.2))
    prepared = prepare(corpus_of(*spans), tmp_path / "out")
    assert "a.wav: expected a sample from 0.1 s to 0.10001 s, got none at 16000 Hz" in message(prepared, "a")
    assert [u.key for u in PreparedCorpus(tmp_path / "out").utterances] == ["b"]


def test_names_that_are_not_utf8_and_keys_with_separators_of_lines(tmp_path: Path, run: Any) -> None:
    latin = write_wav(tmp_path / os.fsdecode(b"f\xfcr.wav"), tone())
    broken = tmp_path / os.fsdecode(b"f\xfc.wav")
    broken.touch()
    keys = ("a\u2028b", "c\x85d", os.fsdecode(b"\xfc"))
    corpus = corpus_of(*(Utterance(k, latin, "", 0) for k in keys), Utterance("x", broken, "", 0))
    prepared = prepare(corpus, tmp_path / "out")
    ready = PreparedCorpus(tmp_path / "out")
    assert [u.key for u in ready.utterances] == list(keys) and {u.path for u in ready.utterances} == {latin}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == prepared.report
    manifest = tmp_path / "out" / "manifest.jsonl"
    assert read_corpus("manifest", manifest).utterances == ready.utterances
    assert run("prepare", "manifest", str(manifest), str(tmp_path / "again"))[0] == 0


def test_recordings_that_cannot_be_used_are_named_and_the_others_stored(tmp_path: Path) -> None:
    good = write_wav(tmp_path / "ordner mit leerzeichen é" / "gut ö.wav", tone())
    link = tmp_path / "link.wav"
    link.symlink_to(write_wav(tmp_path / "elsewhere" / "x.wav", tone(seed=1)))
    dangling = tmp_path / "dangling.wav"
    dangling.symlink_to(tmp_path / "gone.wav")
    cut = write_wav(tmp_path / "cut.wav", tone())
    cut.write_bytes(cut.read_bytes()[:20])
    (tmp_path / "text.wav").write_text("this is no sound")
    (tmp_path / "empty.wav").touch()
    silent = write_wav(tmp_path / "none.wav", np.zeros(0, np.int16))
    names = {
        "cut": cut, "dangling": dangling, "empty": tmp_path / "empty.wav", "folder": tmp_path, "good": good,
        "link": link, "missing": tmp_path / "nothing.wav", "none": silent, "text": tmp_path / "text.wav",
    }  # fmt: skip
    prepared = prepare(corpus_of(*(Utterance(k, p, "", 0) for k, p in names.items())), tmp_path / "out")
    assert kinds(prepared) == {
        "cut": "unreadable-audio", "dangling": "missing-wav", "empty": "unreadable-audio", "folder": "unreadable-audio",
        "missing": "missing-wav", "none": "unreadable-audio", "text": "unreadable-audio",
    }  # fmt: skip
    assert [u.key for u in PreparedCorpus(tmp_path / "out").utterances] == ["good", "link"]
    assert all(str(names[f.item]) in f.message and "\n" not in f.message for f in prepared.faults)
    assert "expected an audio file" in message(prepared, "text")


def test_a_pipe_is_a_fault_and_not_waited_for(tmp_path: Path) -> None:
    good, pipe = write_wav(tmp_path / "good.wav", tone()), tmp_path / "pipe.wav"
    os.mkfifo(pipe)
    face = FaceSource(video=pipe)
    prepared = prepare(corpus_of(Utterance("a", pipe, "", 0), Utterance("b", good, "", 0, face=face)), tmp_path / "out")
    assert kinds(prepared) == {"a": "unreadable-audio", "b": "unreadable-video"}
    assert message(prepared, "a") == f"expected a readable recording {pipe}, got an error (not a regular file)"
    assert str(pipe) in message(prepared, "b") and "not a regular file" in message(prepared, "b")


def test_nothing_that_can_be_used_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least one utterance .*, found none; the first of 1 faults: a: "):
        prepare(corpus_of(Utterance("a", tmp_path / "a.wav", "", 0)), tmp_path / "out")


def test_duplicates_are_named_and_kept(tmp_path: Path) -> None:
    a = write_wav(tmp_path / "a.wav", tone())
    b = shutil.copy(a, tmp_path / "b.wav")
    c = shutil.copy(a, tmp_path / "c.wav")
    prepared = prepare(
        corpus_of(Utterance("a", a, "1", 0), Utterance("b", Path(b), "1", 0), Utterance("c", Path(c), "2", 1)),
        tmp_path / "out",
    )
    assert kinds(prepared) == {"b": "duplicate", "c": "duplicate"} and not any(f.lost for f in prepared.faults)
    assert message(prepared, "b") == "expected a recording of its own, got the same bytes as a"
    assert message(prepared, "c").endswith("as a, though speaker (1, 2) and label (ang, hap) differ")
    assert len(PreparedCorpus(tmp_path / "out")) == 3


def test_preparing_again_decodes_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["python_training.data.recordings"]
    decoded: list[bytes] = []
    original = module.sndfile_decoder()  # type: ignore[attr-defined]

    def counting(files: list[np.ndarray], rate: int) -> Any:
        decoded.extend(bytes(content) for content in files)
        return original.decode(files, rate)

    monkeypatch.setattr(module, "sndfile_decoder", lambda: SimpleNamespace(decode=counting))
    a = write_wav(tmp_path / "a.wav", tone())
    b = write_wav(tmp_path / "b.wav", tone(seed=1))
    both = corpus_of(Utterance("a", a, "", 0), Utterance("b", b, "", 1))
    out = tmp_path / "out"
    one, two = a.read_bytes(), b.read_bytes()
    prepare(both, out, front_ends=[FrontEnd()], workers=1)
    first = PreparedCorpus(out).features(FrontEnd())
    assert decoded == [one, two]
    prepare(both, out, front_ends=[FrontEnd()], workers=1)
    assert decoded == [one, two]
    three = write_wav(b, tone(seed=2)).read_bytes()
    prepare(both, out, front_ends=[FrontEnd()], workers=1)
    assert decoded == [one, two, three]
    second = PreparedCorpus(out).features(FrontEnd())
    np.testing.assert_array_equal(first[0], second[0])
    assert not np.array_equal(first[1], second[1])
    prepare(both, out, front_ends=[FrontEnd(mel_bands=20)], workers=1)
    assert decoded == [one, two, three, one, three], "other options are other features"


def test_the_number_of_workers_changes_nothing(emodb: Path, tmp_path: Path) -> None:
    whole = read_corpus("emodb", emodb)
    part = Corpus(whole.name, whole.labels, whole.utterances[::12])
    for workers in (1, 3):
        prepare(part, tmp_path / str(workers), front_ends=[FrontEnd()], workers=workers)
    names = [sorted(p.relative_to(tmp_path / w) for p in (tmp_path / w).rglob("*") if p.is_file()) for w in "13"]
    assert names[0] == names[1] and len(names[0]) == 5
    for name in names[0]:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name


def test_an_interruption_keeps_what_was_decoded(tmp_path: Path) -> None:
    paths = [write_wav(tmp_path / f"{i}.wav", tone(seed=i)) for i in range(6)]
    corpus = corpus_of(*(Utterance(str(i), p, "", 0) for i, p in enumerate(paths)))

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", progress=stop)
    with pytest.raises(ValueError, match="expected a folder written by `avser-fast prepare`"):
        PreparedCorpus(tmp_path / "out")
    (waveforms,) = (tmp_path / "out" / "waveforms").iterdir()
    (shard,) = waveforms.iterdir()
    prepare(corpus, tmp_path / "out")
    assert shard.exists() and len(list(waveforms.iterdir())) == 2
    assert len(PreparedCorpus(tmp_path / "out")) == 6


def test_more_shards_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["python_training.data.store"], "SHARD_BYTES", 1)
    count = 40
    corpus = corpus_of(
        *(Utterance(f"{i:02d}", write_wav(tmp_path / f"{i}.wav", tone(0.1, seed=i)), "", 0) for i in range(count))
    )
    with few_descriptors(24):
        prepare(corpus, tmp_path / "out", front_ends=[FrontEnd()], workers=2)
        ready = PreparedCorpus(tmp_path / "out")
        waveforms, values = [ready.waveform(i) for i in range(count)], ready.features(FrontEnd())
    assert mapped(tmp_path / "out") == len(list(tmp_path.glob("out/*/*/*"))) == 2 * count
    assert not held(tmp_path), "a cache hit is a memory map that holds no descriptor"
    for i in range(count):
        np.testing.assert_array_equal(waveforms[i], tone(0.1, seed=i))
        np.testing.assert_array_equal(values[i], features(tone(0.1, seed=i).astype(np.float32), FrontEnd()))


def test_a_damaged_shard_is_named_and_made_again(tmp_path: Path, run: Any) -> None:
    recordings = [write_wav(tmp_path / f"0{i}a01Fa.wav", tone(seed=i)) for i in range(2)]
    command = ("prepare", "emodb", str(tmp_path), str(tmp_path / "out"))
    assert run(*command)[0] == 0
    PreparedCorpus(tmp_path / "out").features(FrontEnd(mel_bands=20))  # not what the command computes
    shards = list((tmp_path / "out").glob("*/*/*"))
    assert len(shards) == 3
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="expected a safetensors file of .* bytes, got .*; prepare it again"):
        PreparedCorpus(tmp_path / "out")
    code, printed, _ = run(*command)
    assert code == 0 and "file of the prepared folder that was damaged, made again: 3" in printed
    assert all(f"    {shard}: expected a safetensors file of " in printed for shard in shards)
    ready = PreparedCorpus(tmp_path / "out")
    for i in range(2):
        np.testing.assert_array_equal(ready.waveform(i), tone(seed=i))
    assert ready.features(FrontEnd(mel_bands=20))[0] is not None
    assert "faults: none" in run(*command)[1] and len(recordings) == 2


def test_what_other_corpora_left_is_counted_and_pruned(tmp_path: Path, run: Any) -> None:
    for i in range(3):
        write_wav(tmp_path / "all" / f"0{i}a01Fa.wav", tone(seed=i))
    shutil.copytree(tmp_path / "all", tmp_path / "one")
    (tmp_path / "one" / "00a01Fa.wav").unlink()
    (tmp_path / "one" / "02a01Fa.wav").unlink()
    out = tmp_path / "out"
    for corpus in ("all", "one"):
        _, printed, _ = run("prepare", "emodb", str(tmp_path / corpus), str(out))
    before = {p: p.stat().st_size for p in out.glob("*/*/*")}
    unused = json.loads((out / "report.json").read_text())["unused"]
    ready = PreparedCorpus(out)
    (values,) = ready.features(load_settings("mdscm-small").front_end.front_end())
    assert values is not None and unused == {"bytes": 2 * (tone().nbytes + values.nbytes), "removed": False}
    assert f"stored and not of this corpus: {unused['bytes'] / 1e6:.1f} MB (--prune removes it)" in printed
    _, printed, _ = run("prepare", "emodb", str(tmp_path / "one"), str(out), "--prune")
    assert f"stored and not of this corpus: {unused['bytes'] / 1e6:.1f} MB (removed)" in printed
    after = {p: p.stat().st_size for p in out.glob("*/*/*")}
    assert not set(before) & set(after) and sum(after.values()) < sum(before.values()) / 2
    ready = PreparedCorpus(out)
    np.testing.assert_array_equal(ready.waveform(0), tone(seed=1))
    assert "not of this corpus" not in run("prepare", "emodb", str(tmp_path / "one"), str(out))[1]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    a = write_wav(tmp_path / "a.wav", tone())
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    if os.access(out, os.W_OK):  # root may write everywhere, but not there
        out = Path("/proc/self")
    with pytest.raises(ValueError, match=f"{out}: expected a folder that can be written, got an error"):
        prepare(corpus_of(Utterance("a", a, "", 0)), out)


def test_an_out_that_is_a_file_or_cannot_be_made_is_named(tmp_path: Path) -> None:
    a = write_wav(tmp_path / "a.wav", tone())
    for out in (a, a / "below"):
        with pytest.raises(ValueError, match=f"{out}: expected a folder that can be written, got an error"):
            prepare(corpus_of(Utterance("a", a, "", 0)), out)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    a = write_wav(tmp_path / "03a01Fa.wav", tone())
    prepare(corpus_of(Utterance("a", a, "", 0)), tmp_path / "out")
    corpus = PreparedCorpus(tmp_path / "out")

    def full(path: Path, *parts: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(sys.modules["python_training.data.shards"], "write_bytes", full)
    code, _, err = run("prepare", "emodb", str(tmp_path), str(tmp_path / "new"))
    expected = (
        f"error: {tmp_path / 'new'}: expected a folder that can be written, got an error (No space left on device, "
    )
    assert code == 1 and err.startswith(expected + str(tmp_path / "new"))
    with pytest.raises(
        ValueError, match="for features that are not there yet, got an error .No space left on device, "
    ):
        corpus.features(FrontEnd())


def test_several_at_once_into_one_folder(tmp_path: Path) -> None:
    corpus = corpus_of(Utterance("a", write_wav(tmp_path / "a.wav", tone()), "", 0))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: prepare(corpus, tmp_path / "out", workers=1), range(100)))
    assert len(PreparedCorpus(tmp_path / "out")) == 1


def test_a_front_end_at_another_rate_is_named(tmp_path: Path) -> None:
    corpus = corpus_of(Utterance("a", write_wav(tmp_path / "a.wav", tone()), "", 0))
    with pytest.raises(ValueError, match="expected front ends at 16000 Hz, got one at 8000 Hz"):
        prepare(corpus, tmp_path / "out", front_ends=[FrontEnd(sampling_rate=8000, high_hz=4000.0)])


def test_a_corpus_in_a_read_only_folder_is_left_as_it_was(tmp_path: Path) -> None:
    tree = write_iemocap(tmp_path / "tree", sessions=1, dialogs=1, turns=8)
    before = {p: p.stat().st_mtime_ns for p in tree.root.rglob("*")}
    for path in [tree.root, *tree.root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        corpus = with_boxes(read_corpus("iemocap", tree.root), Boxes(tree.boxes), detect=False)
        prepare(corpus, tmp_path / "out")
    finally:
        for path in [tree.root, *tree.root.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert {p: p.stat().st_mtime_ns for p in tree.root.rglob("*")} == before
    assert PreparedCorpus(tmp_path / "out").with_face


def test_a_prepared_folder_that_is_not_whole_is_named(tmp_path: Path) -> None:
    a = write_wav(tmp_path / "a.wav", tone())
    out = tmp_path / "out"
    prepare(corpus_of(Utterance("a", a, "", 0)), out)
    (out / "manifest.jsonl").write_text((out / "manifest.jsonl").read_text().replace("ang", "hap"))
    with pytest.raises(ValueError, match="expected the manifest that corpus.json names, got another; prepare it again"):
        PreparedCorpus(out)
    prepare(corpus_of(Utterance("a", a, "", 0)), out)
    header = json.loads((out / "corpus.json").read_text())
    (out / "corpus.json").write_text(json.dumps({**header, "format": 99}))
    with pytest.raises(ValueError, match="expected a prepared corpus of format 1, got 99; prepare it again"):
        PreparedCorpus(out)
    with pytest.raises(ValueError, match="expected a folder written by `avser-fast prepare`"):
        PreparedCorpus(tmp_path / "nothing")
    (out / "corpus.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a prepared corpus of format 1, got None; prepare it again"):
        PreparedCorpus(out)
    prepare(corpus_of(Utterance("a", a, "", 0)), out)
    shutil.rmtree(out / "waveforms")
    with pytest.raises(
        ValueError, match=f"{out}: expected the sound of every utterance .* first is a.; prepare it again"
    ):
        PreparedCorpus(out)


def test_the_manifest_of_a_prepared_folder_is_a_corpus(tmp_path: Path, emodb: Path) -> None:
    whole = read_corpus("emodb", emodb)
    prepare(Corpus(whole.name, whole.labels, whole.utterances[:3]), tmp_path / "a")
    again = read_corpus("manifest", tmp_path / "a" / "manifest.jsonl")
    assert again.utterances == whole.utterances[:3] and again.faults == ()


def test_the_report_shows_a_key_in_one_line() -> None:
    faults = (Fault("missing-wav", "a\nb\x1b[2J", "expected ü, found none"),)
    report = corpus_report(Corpus("x", ("ang",), ()), (), {}, {}, set(), faults)
    assert report_text(report).splitlines()[-1] == "    a\\nb\\x1b[2J: expected ü, found none"
    assert report["faults"][0]["item"] == faults[0].item


def test_the_report_of_many_speakers_takes_no_time() -> None:
    utterances = tuple(Utterance(f"{i:06d}", None, f"s{i:06d}", i % 2, session=f"{i % 3}") for i in range(30_000))
    started = time.perf_counter()
    report = corpus_report(Corpus("x", ("ang", "hap"), utterances), utterances, {}, {}, set(), ())
    assert time.perf_counter() - started < 5
    assert report["by_speaker"]["s000001"] == {"ang": 0, "hap": 1} and len(report["by_speaker"]) == 30_000
    assert report["by_session"] == {s: {"ang": 5000, "hap": 5000} for s in "012"}


# Faces


@pytest.fixture(scope="module")
def artificial(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCorpus:
    return write_iemocap(tmp_path_factory.mktemp("faces") / "tree", sessions=2, dialogs=2, turns=8)


def test_iemocap_from_its_tree_to_speech_and_faces(artificial: SyntheticCorpus, tmp_path: Path) -> None:
    corpus = with_boxes(read_corpus("iemocap", artificial.root), Boxes(artificial.boxes), detect=False)
    prepared = prepare(corpus, tmp_path / "out")
    ready = PreparedCorpus(tmp_path / "out")
    assert {f.kind for f in prepared.faults} == {"wrong-totals"}
    assert ready.with_face == ready.with_speech == list(range(len(corpus.utterances)))
    turns = {t.name: t for t in artificial.turns}
    for i, u in enumerate(ready.utterances):
        with wave.open(str(turns[u.key].wav)) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        np.testing.assert_array_equal(ready.waveform(i), sound)
        face = ready.face(i)
        assert face.shape == (5, 224, 40) and face.dtype == np.uint8
        assert face[:, 60:160, 10:30].mean() > face[:, :20].mean() + 20, "a lit face on a dark ground"
    assert prepared.report["with_face"] == len(ready) and (tmp_path / "out" / "contact-sheet.png").is_file()
    sheet = cv2.imread(str(tmp_path / "out" / "contact-sheet.png"))
    assert sheet is not None and sheet.shape[1] > 500


def test_without_box_or_detector_no_face_is_made_up(artificial: SyntheticCorpus, tmp_path: Path) -> None:
    prepared = prepare(read_corpus("iemocap", artificial.root), tmp_path / "out")
    ready = PreparedCorpus(tmp_path / "out")
    assert ready.with_face == [] and not (tmp_path / "out" / "contact-sheet.png").exists()
    assert prepared.report["faces_left_out"].startswith(f"left out, {len(ready)} faces: ")
    boxed = with_boxes(read_corpus("iemocap", artificial.root), Boxes(artificial.boxes), detect=False)
    prepare(boxed, tmp_path / "out")
    assert (tmp_path / "out" / "contact-sheet.png").exists()
    prepare(read_corpus("iemocap", artificial.root), tmp_path / "out")
    assert not (tmp_path / "out" / "contact-sheet.png").exists(), "the faces of before"
    pictures = corpus_of(Utterance("a", None, "", 0, face=FaceSource(Path("a.mp4"), crop="detect")))
    with pytest.raises(ValueError, match="found none; left out, 1 faces: .* need crop boxes or a detector"):
        prepare(pictures, tmp_path / "none")
    with pytest.raises(ValueError, match=f"{ready.utterances[0].key}: expected a face, this utterance of .* has none"):
        ready.face(0)


def test_planted_faults_of_faces(artificial: SyntheticCorpus, tmp_path: Path) -> None:
    root = Path(shutil.copytree(artificial.root, tmp_path / "baum mit ö"))
    corpus = with_boxes(read_corpus("iemocap", root), Boxes(artificial.boxes), detect=False)
    videos = sorted({u.face.video for u in corpus.utterances if u.face and u.face.video})
    assert len(videos) == 4
    of = {v: [u.key for u in corpus.utterances if u.face and u.face.video == v] for v in videos}
    missing, truncated, black, whole = videos
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    writer = cv2.VideoWriter(str(black), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (192, 96))
    for _ in range(600):
        writer.write(np.zeros((96, 192, 3), np.uint8))
    writer.release()
    prepared = prepare(corpus, tmp_path / "out")
    found = {f.item: f for f in prepared.faults if f.kind != "wrong-totals"}
    assert {found[k].kind for k in of[missing]} == {"missing-video"}
    assert {found[k].kind for k in of[black]} == {"blank-video"}
    late = [k for k in of[truncated] if k in found]
    assert late and {found[k].kind for k in late} == {"unreadable-video"}
    assert not set(of[whole]) & set(found)
    ready = PreparedCorpus(tmp_path / "out")
    with_face = {ready.utterances[i].key for i in ready.with_face}
    assert with_face == {*of[whole], *of[truncated]} - set(found)
    assert len(ready.with_speech) == len(corpus.utterances), "the sound of these turns is kept"
    assert all("\n" not in f.message for f in prepared.faults)


def test_a_detector_is_asked_and_its_silence_is_a_fault(artificial: SyntheticCorpus, tmp_path: Path) -> None:
    corpus = read_corpus("iemocap", artificial.root)
    asked: list[tuple[int, ...]] = []

    def left_half(picture: np.ndarray) -> list[tuple[int, int, int, int]]:
        asked.append(picture.shape)
        return [(10, 5, 60, 80)]

    prepare(corpus, tmp_path / "a", detector=("left", left_half))
    assert asked and len(PreparedCorpus(tmp_path / "a").with_face) == len(corpus.utterances)
    count = len(asked)
    prepare(corpus, tmp_path / "a", detector=("left", left_half))
    assert len(asked) == count, "faces are kept under the detector's name"
    prepared = prepare(corpus, tmp_path / "a", detector=("nobody", lambda picture: []))
    assert {f.kind for f in prepared.faults} == {"wrong-totals", "no-face"}
    assert PreparedCorpus(tmp_path / "a").with_face == []


def test_a_face_corpus_without_speech(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for emotion in ("ang", "sad"):
        for i in range(3):
            path = tmp_path / "stills" / emotion / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), rng.integers(0, 255, (60, 50, 3)).astype(np.uint8))
    (tmp_path / "stills" / "ang" / "broken.png").write_bytes(b"no picture")
    prepared = prepare(read_corpus("faces", tmp_path / "stills"), tmp_path / "out")
    ready = PreparedCorpus(tmp_path / "out")
    assert kinds(prepared) == {"ang/broken.png": "unreadable-video"}
    assert ready.with_speech == [] and ready.with_face == list(range(6)) and prepared.report["duration"] is None


# The command


def test_command(artificial: SyntheticCorpus, tmp_path: Path, run: Any) -> None:
    out, boxes = tmp_path / "out", artificial.root / "boxes.json"
    code, printed, err = run("prepare", "iemocap", str(artificial.root), str(out), "--boxes", str(boxes))
    assert code == 0 and err == ""
    lines = printed.splitlines()
    utterances = len(PreparedCorpus(out))
    assert (
        lines[0] == f"iemocap, artificial: {utterances} utterances, {utterances} with speech, {utterances} with a face"
    )
    assert "class  utterances  minutes  faces" in lines and "speaker  ang  hap  neu  sad  all" in lines
    assert any(line.startswith("left out, not among the classes: ") and "xxx" in line for line in lines)
    assert "    iemocap: expected 5531 = 1708/1636/1103/1084 utterances (neu/hap/ang/sad), found " in printed
    report = json.loads((out / "report.json").read_text())
    code, printed, _ = run("prepare", "iemocap", str(artificial.root), str(out), "--boxes", str(boxes), "--json")
    assert code == 0 and json.loads(printed) == report
    assert sum(report["by_class"].values()) == utterances and report["dropped"]["oth"] > 0
    assert len(report["by_speaker"]) == 4 and set(report["by_session"]) == {"Ses01", "Ses02"}


def test_the_command_asks_another_detector_again(
    artificial: SyntheticCorpus, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def parse(text: str) -> Any:
        asked.append(model.read_text())
        return lambda picture: [(10, 5, 60, 80)]

    monkeypatch.setattr(sys.modules["python_training.data.command"], "parse_detector", parse)
    model, out = tmp_path / "model.onnx", tmp_path / "out"
    stores = []
    for content in ("a", "a", "b"):
        model.write_text(content)
        assert run("prepare", "iemocap", str(artificial.root), str(out), "--detector", f"yunet:{model}")[0] == 0
        stores.append(json.loads((out / "corpus.json").read_text())["faces"])
    assert asked == ["a", "a", "b"] and stores[0] == stores[1] != stores[2]


def test_command_exit_codes_and_sentences(tmp_path: Path, run: Any) -> None:
    wavs = [write_wav(tmp_path / f"{n}.wav", tone(seed=i)) for i, n in enumerate("ab")]
    entries = [{"key": p.stem, "wav": p.name, "emo": "ang"} for p in wavs]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps(e) for e in [*entries, {"key": "c", "wav": "c.wav", "emo": "joy"}]))
    out = str(tmp_path / "out")
    code, printed, _ = run("prepare", "manifest", str(path), out)
    assert code == 3 and "line of the manifest that cannot be used: 1 (left out)" in printed
    assert f"{path}, line 3: field 'emo': expected one of ang, " in printed and len(PreparedCorpus(Path(out))) == 2
    code, printed, err = run("prepare", "manifest", str(path), str(tmp_path / "strict"), "--strict")
    assert code == 1 and "--strict: expected a corpus without faults, found 1" in err
    assert not (tmp_path / "strict").exists()
    assert run("prepare", "manifest", str(path), out, "--merge", "joy=hap")[0] == 3  # c.wav is not there
    assert run("prepare", "nothing", str(path), out)[0] == 2
    assert json.loads((tmp_path / "out/corpus.json").read_text())["name"] == "m"
    assert run("prepare", "manifest", str(path), out, "--name", " my corpus ")[0] == 3
    assert json.loads((tmp_path / "out/corpus.json").read_text())["name"] == "my corpus"
    assert "--name: expected the corpus manifest" in run("prepare", "emodb", str(tmp_path), out, "--name", "x")[2]
    assert run("prepare", "manifest", str(path), out, "--name", " ")[0] == 2
    code, _, err = run("prepare", "manifest", str(tmp_path / "none.jsonl"), out)
    assert code == 1 and "none.jsonl: expected a readable manifest" in err
    code, _, err = run("prepare", "manifest", str(path), out, "--detector", "eyes")
    assert code == 1 and "eyes" in err
    code, _, err = run("prepare", "manifest", str(path), out, "--no-faces", "--boxes", "b.json")
    assert code == 1 and "--no-faces: expected no other option about faces, got --boxes" in err


def test_prepare_needs_no_torch(tmp_path: Path) -> None:
    a = write_wav(tmp_path / "03a01Fa.wav", tone())
    code = (
        "import sys; from python_training.__main__ import main; "
        f"code = main(['prepare', 'emodb', {str(a.parent)!r}, {str(tmp_path / 'out')!r}]); "
        "print(code, 'torch' in sys.modules, 'cv2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False False"


def test_face_sources_that_contradict_themselves() -> None:
    with pytest.raises(ValueError, match="face: got neither"):
        FaceSource()
    with pytest.raises(ValueError, match="expected a video or images, got both"):
        FaceSource(video=Path("a"), images=(Path("b"),))
    with pytest.raises(ValueError, match="or box with a box, got 'box', None"):
        FaceSource(video=Path("a"), crop="box")
