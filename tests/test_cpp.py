"""C++ without Python: the installed package, the example that uses it, and SpeechModel beside the Python way."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from safetensors.numpy import save
from sanitizers import link_concurrent

import avser_fast
from avser_fast import _engine, config
from avser_fast.errors import BackendError, ConfigError, InputError, ModelError
from avser_fast.inference import features as front_end
from avser_fast.inference.weights import find_model, random_tensors, read_model, write_model

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = find_model("default")


def member(
    bands: int, channels: int, width: int, normalization: str, rule: config.ClipRule, **network: Any
) -> config.ModelSpec:
    values = {"mean": (9.0, 0.1, -0.02)[:channels], "std": (4.0, 1 / 3, 0.07)[:channels]}
    return config.ModelSpec(
        front_end=config.FrontEnd(
            mel_bands=bands, channels=channels, normalization=normalization,
            **(values if normalization == "global" else {}),
        ),
        clip_rule=rule,
        network=config.MDSCM(
            mel_bands=bands, in_channels=channels, clip_frames=rule.clip_frames, stem=(4, width), blocks=(8, 16),
            attention_reduction=4, encoder_ff=24, **network,
        ),
    )  # fmt: skip


FAMILY = {
    "published": member(40, 1, 8, "none", config.ClipRule(), encoder_layers=1),
    "global": member(24, 3, 5, "global", config.ClipRule("even", None, 100), encoder_layers=0, pooling="mean_std"),
    "utterance": member(30, 3, 8, "utterance", config.ClipRule("even", 2, 64), encoder_layers=1),
    "one band": member(1, 2, 3, "utterance", config.ClipRule("published", 3, 50), encoder_layers=0),
}


def both(spec: config.ModelSpec) -> tuple[Any, Any, dict[str, np.ndarray]]:
    tensors, text = random_tensors(spec.network, 3), json.dumps(spec.to_dict())
    return _engine.SpeechModel(text, tensors), _engine.Engine(text, tensors), tensors


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 3000).astype(np.int16)


def same_bits(actual: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> bool:
    return all(a.shape == e.shape and a.tobytes() == e.tobytes() for a, e in zip(actual, expected, strict=True))


# ---- SpeechModel and the Python way


@pytest.mark.parametrize("name", FAMILY)
def test_speech_model_has_the_bits_of_the_python_way(name: str) -> None:
    spec = FAMILY[name]
    model, engine, _ = both(spec)
    assert model.labels == spec.labels and model.sampling_rate == spec.front_end.sampling_rate
    for samples in (1, 2, 399, 400, 401, 561, 16000, 37123, 90001):
        pcm = noise(samples)
        wave = pcm.astype(np.float32)
        values = front_end.features(wave, spec.front_end)
        clips, table = front_end.clips_and_table(values, spec.clip_rule)
        probabilities, features, logits = engine.forward(clips[None])
        expected = (probabilities[0], features[0], logits[0])
        for given_samples in (pcm, wave, np.repeat(wave, 3)[::3]):
            found = model.run(given_samples)
            assert same_bits(found[:3], expected), samples
        heard = [row[row > 0] for row in table]
        frames = [(row[0] - 1, row[-1]) if len(row) else (0, 0) for row in heard]
        assert found[3].tolist() == [list(map(int, pair)) for pair in frames]


@pytest.mark.parametrize("rate", (8000, 22050, 48000))
def test_speech_model_resamples_as_the_python_way_does(rate: int) -> None:
    spec = FAMILY["global"]
    model, _, _ = both(spec)
    pcm = noise(rate)
    wave = front_end.resample(pcm.astype(np.float32), rate, spec.front_end.sampling_rate)
    for given_samples in (pcm, pcm.astype(np.float32)):
        assert same_bits(model.run(given_samples, rate)[:4], model.run(wave)[:4])


@pytest.mark.parametrize("name", FAMILY)
def test_speech_model_answers_like_infer(name: str, emodb: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, FAMILY[name], random_tensors(FAMILY[name].network, 3))
    model, recognizer = _engine.SpeechModel.open(path), avser_fast.load(path, threads=1)
    for file in [*sorted(emodb.glob("*.flac"))[::90]]:
        pcm, rate = soundfile.read(file, dtype="int16")
        for item in ({"array": pcm, "sampling_rate": rate}, {"array": pcm[:70], "sampling_rate": 11025}):
            (result,) = recognizer.infer([item])
            probabilities, features, _, frames, seconds = model.run(item["array"], item["sampling_rate"], threads=2)
            assert {k: np.float32(v) for k, v in result.scores.items()} == dict(zip(model.labels, probabilities))
            heard = [tuple(s) for s, f in zip(seconds.tolist(), frames) if f[1] > 0]
            assert heard == [(s.start_s, s.end_s) for s in result.segments]
            assert features.tobytes() == recognizer.embed([item])[0].tobytes()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_speech_model_runs_every_precision(precision: str, emodb: Path, tmp_path: Path) -> None:
    spec, path = FAMILY["global"], tmp_path / "model.safetensors"
    tensors = random_tensors(spec.network, 3)
    clips = np.random.default_rng(0).standard_normal(
        (1, 9, spec.network.in_channels, spec.network.clip_frames, spec.network.mel_bands), np.float32
    )
    ranges = _engine.Engine(json.dumps(spec.to_dict()), tensors).calibrate(clips)
    write_model(path, spec, tensors, calibration=ranges)
    opened = _engine.SpeechModel.open(path, precision=precision)
    made = _engine.SpeechModel(
        json.dumps(spec.to_dict()), tensors, precision=precision, calibration=ranges if precision == "int8" else None
    )
    recognizer = avser_fast.load(path, precision=precision, threads=1)
    pcm, rate = soundfile.read(sorted(emodb.glob("*.flac"))[0], dtype="int16")
    found = opened.run(pcm, rate)
    assert same_bits(found, made.run(pcm, rate))
    assert found[1].tobytes() == recognizer.embed([{"array": pcm, "sampling_rate": rate}])[0].tobytes()
    assert not same_bits(found[:3], _engine.SpeechModel.open(path).run(pcm, rate)[:3])


def test_speech_model_says_what_a_precision_needs(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    small_file(tmp_path)
    with pytest.raises(ModelError, match="expected ranges for precision int8, got none; make them with avser-fast"):
        _engine.SpeechModel.open(path, precision="int8")
    with pytest.raises(ModelError, match="precision: expected float32, bf16 or int8, got 'half'"):
        _engine.SpeechModel.open(path, precision="half")
    spec = FAMILY["one band"]
    tensors = random_tensors(spec.network)
    for name, wrong in (("flat", np.zeros(4)), ("three", np.zeros((3, 4))), ("turned", np.array([[1.0], [0.0]]))):
        header = {"format": 2, "kind": "mdscm", "spec": spec.to_dict(), "card": {}}
        extra = {f"calibration.{name}": wrong.astype(np.float32)}
        path.write_bytes(save({**tensors, **extra}, {"avser_fast": json.dumps(header)}))
        assert f"calibration.{name}" in refusal(path)
        with pytest.raises(ModelError, match=f"calibration.{name}"):
            read_model(path)


def test_any_number_of_threads_and_callers_gives_the_same_bits() -> None:
    models = [both(spec)[0] for spec in FAMILY.values()]
    jobs = [(model, noise(samples, samples)) for model in models for samples in (1, 5000, 60000)]
    alone = [model.run(pcm) for model, pcm in jobs]
    for threads in (2, 3, 8):
        assert all(same_bits(model.run(pcm, threads=threads), a) for (model, pcm), a in zip(jobs, alone))

    def work(seed: int) -> bool:
        order = list(range(len(jobs)))
        random.Random(seed).shuffle(order)
        return all(same_bits(jobs[i][0].run(jobs[i][1], threads=1 + seed % 2), alone[i]) for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of a Linux process")
def test_memory_does_not_grow() -> None:
    model, pcm = both(FAMILY["global"])[0], noise(40000)

    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    for _ in range(50):
        model.run(pcm, 8000)
    before = pages()
    for _ in range(500):
        model.run(pcm, 8000)
    assert pages() - before < 256


# ---- what is refused


def test_samples_that_are_refused() -> None:
    model, _, _ = both(FAMILY["published"])
    wave = noise(500).astype(np.float32)
    for bad, words in (
        (wave[:0], "at least 1 sample, got 0"),
        (np.where(np.arange(500) == 499, np.nan, wave).astype(np.float32), "finite samples, got NaN"),
        (np.where(np.arange(500) == 1, -np.inf, wave).astype(np.float32), "finite samples, got infinity"),
        (wave * 100, "samples at int16 scale, got a peak of"),
        (wave[None], "a 1-D array of int16 or float32"),
        (wave.astype(np.float64), "a 1-D array of int16 or float32"),
        (wave.astype(">f4"), "a 1-D array of int16 or float32"),
    ):
        with pytest.raises(InputError, match=f"waveform: expected {words}"):
            model.run(bad)
    for rate in (-1, 0, 3999, 384001, 2**62):
        with pytest.raises(InputError, match=f"rate: expected 4000..384000 hertz, got {rate}"):
            model.run(wave, rate)
    with pytest.raises(ConfigError, match="threads"):
        model.run(wave, threads=0)
    tensors = random_tensors(FAMILY["published"].network)
    tensors["head.weight"][:] = 3e38
    with pytest.raises(ModelError, match="finite scores"):
        _engine.SpeechModel(json.dumps(FAMILY["published"].to_dict()), tensors).run(wave)


def test_tensors_that_are_refused() -> None:
    spec = FAMILY["published"]
    text = json.dumps(spec.to_dict())
    for name, value in (
        ("head.bias", None),
        ("head.bias", np.zeros(4)),
        ("head.bias", [0.0] * 4),
        ("head.bias", np.zeros(5, np.float32)),
        ("head.scale", np.zeros(4, np.float32)),
        ("body.blocks.0.norm1.running_var", np.full(8, -1, np.float32)),
    ):
        tensors: dict[str, Any] = dict(random_tensors(spec.network))
        tensors[name] = value
        if value is None:
            del tensors[name]
        with pytest.raises(ModelError, match=name):
            _engine.SpeechModel(text, tensors)


def spec_cases() -> list[tuple[tuple[str, ...], Any]]:
    """Places in the JSON form of a specification, and what may stand there."""
    default = config.ModelSpec().to_dict()
    values: list[Any] = [
        None, True, -1, 0, 1, 2, 3, 5, 16, 40, 41, 1000, 1001, 384001, 2**31 - 1, 2**31, 2**63, 10**30, -(2**31), 0.0,
        0.5, 1.0, -0.5, 5.0, 1e300, float("nan"), float("inf"), "", "none", "global", "utterance", "even", "published",
        "mean", "mean_std", [], [1], [0], [1, 2, 3, 4], [1.5], [-1.0], [True], ["a"], ["a", "b", "c", "d"],
        ["a", "a", "b", "c"], [None], {}, {"x": 1},
    ]  # fmt: skip
    places: list[tuple[str, ...]] = [(name,) for name in default]
    places += [(room, name) for room in ("front_end", "clip_rule", "network") for name in default[room]]
    return [(place, value) for place in [*places, ("extra",), ("network", "extra")] for value in values]


def test_the_spec_has_the_checks_of_config() -> None:
    """One value of the default replaced: either side takes it or both refuse it."""
    tensors: dict[str, np.ndarray] = {}
    taken = refused = 0
    for bases in ({}, {"normalization": "global", "mean": [1.0], "std": [2.0]}):
        base = config.ModelSpec().to_dict()
        base["front_end"].update(bases)
        for place, value in spec_cases():
            changed = copy.deepcopy(base)
            room = changed
            for name in place[:-1]:
                room = room[name]
            room[place[-1]] = value
            try:
                config.ModelSpec.from_dict(changed)
                fine = True
            except (ConfigError, TypeError):
                fine = False
            huge = (
                fine and place == ("clip_rule", "clips") and value is not None and value > 30000
            )  # config.py has no such limit
            with pytest.raises((ConfigError, ModelError)) as found:
                _engine.SpeechModel(json.dumps(changed), tensors)
            # Without tensors it ends in any case: at the first tensor that is missing when the spec is fine.
            assert (found.type is ModelError) == (fine and not huge), (place, value, str(found.value))
            assert "\n" not in str(found.value) and "expected" in str(found.value)
            taken, refused = taken + fine, refused + (not fine)
    assert taken > 100 and refused > 1000


def test_every_member_and_an_empty_spec_are_read() -> None:
    for spec in config.MEMBERS.values():
        with pytest.raises(ModelError, match="which is missing"):
            _engine.SpeechModel(json.dumps(spec.to_dict()), {})
    with pytest.raises(ModelError, match="which is missing"):
        _engine.SpeechModel("{}", {})


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "{", "}", "[", "[1,]", "[1 2]", '{"a"}', '{"a":}', '{"a":1,}', "{a:1}", "nul", "tru", "True", "'a'",
        '"', '"\\', '"\\x"', '"\\u12"', '"\\u12g4"', '"\\ud800"', '"\\ud800\\u0041"', '"\\udc00"', '"\n"', '"\x00"',
        "01", "-", "+1", "1.", ".5", "1e", "1e+", "0x10", "NaN", "Infinity", "-Infinity", "1e999", "9" * 20, "1 2",
        "{}{}", "[" * 65 + "]" * 65, "[" * 1000000, '{"a":' * 1000000, '{"a":1,"a":2}', "\ufeff{}", "/**/{}", "\0",
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_text_that_is_no_json(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^spec_json: expected [^\n]* in JSON, got [^\n]*$"):
        _engine.SpeechModel(text, {})


def test_text_that_is_json() -> None:
    labels = ['"\\/\b\f\n\r\t\u00e4\u20ac\U0001f600', "\\u0041", "\x7f", " "]
    spec = dataclasses.replace(FAMILY["published"], labels=tuple(labels))
    for ascii_only in (True, False):
        text = "\r\n\t " + json.dumps(spec.to_dict(), ensure_ascii=ascii_only, indent=3) + " \n"
        assert _engine.SpeechModel(text, random_tensors(spec.network)).labels == spec.labels


# ---- hostile files


def small_file(tmp_path: Path) -> bytes:
    path = tmp_path / "good.safetensors"
    write_model(path, FAMILY["one band"], random_tensors(FAMILY["one band"].network), {"licence": "CC0-1.0"})
    return path.read_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as found:
        _engine.SpeechModel.open(path)
    sentence = str(found.value)
    assert sentence.startswith(f"model '{path}': expected ") or f"model '{path}': " in sentence
    assert "\n" not in sentence and ", got " in sentence or ", found " in sentence or "which is missing" in sentence
    return sentence


def with_header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The same file with another table of tensors."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def entry(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["head.bias"].update({name: values["to"]})


def inner(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Changes of our own header; None removes a key."""

    def change(header: dict[str, Any]) -> None:
        own = {**json.loads(header["__metadata__"]["avser_fast"]), **values}
        header["__metadata__"]["avser_fast"] = json.dumps({k: v for k, v in own.items() if v is not None})

    return change


def swap(header: dict[str, Any]) -> None:
    """Two tensors in one place."""
    names = [name for name in header if name.endswith("norm1.weight")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"] if len(names) > 1 else [0, 4]


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda d: b"",
    "seven bytes": lambda d: d[:7],
    "the length alone": lambda d: d[:8],
    "half a header": lambda d: d[:100],
    "without its last byte": lambda d: d[:-1],
    "a byte more": lambda d: d + b"\0",
    "a float more": lambda d: d + b"\0\0\0\0",
    "length 0": lambda d: struct.pack("<Q", 0) + d[8:],
    "length of the file": lambda d: struct.pack("<Q", len(d)) + d[8:],
    "length 2^64 - 1": lambda d: struct.pack("<Q", 2**64 - 1) + d[8:],
    "length 2^63": lambda d: struct.pack("<Q", 2**63) + d[8:],
    "length 2^64 - 8": lambda d: struct.pack("<Q", 2**64 - 8) + d[8:],
    "a pickle": lambda d: pickle.dumps({"head.bias": [1.0] * 100}),
    "a zip": lambda d: b"PK\x03\x04" + d,
    "text": lambda d: b"RIFF and other text that is long enough",
    "no object": lambda d: with_header(d, lambda h: b"[]"),
    "no JSON": lambda d: with_header(d, lambda h: b"{'a': 1}"),
    "deep": lambda d: with_header(d, lambda h: b'{"a":' * 200000),
    "no UTF-8": lambda d: with_header(d, lambda h: b'{"__metadata__":{"avser_fast":"\xff"}}'),
    "overlong UTF-8": lambda d: with_header(d, lambda h: b'{"__metadata__":{"avser_fast":"\xc0\x80"}}'),
    "no metadata": lambda d: with_header(d, lambda h: h.pop("__metadata__") and None),
    "another program's": lambda d: with_header(d, lambda h: h.update(__metadata__={"format": "pt"})),
    "metadata is a number": lambda d: with_header(d, lambda h: h.update(__metadata__={"avser_fast": 1})),
    "metadata is a list": lambda d: with_header(d, lambda h: h.update(__metadata__=[])),
    "header is no JSON": lambda d: with_header(d, lambda h: h.update(__metadata__={"avser_fast": "{"})),
    "header is a list": lambda d: with_header(d, lambda h: h.update(__metadata__={"avser_fast": "[]"})),
    "format 4": lambda d: with_header(d, inner(format=4)),
    "format true": lambda d: with_header(d, inner(format=True)),
    "no format": lambda d: with_header(d, inner(format=None)),
    "kind avre": lambda d: with_header(d, inner(kind="avre")),
    "kind system": lambda d: with_header(d, inner(kind="system", format=3)),
    "no kind": lambda d: with_header(d, inner(kind=None)),
    "card is a list": lambda d: with_header(d, inner(card=[])),
    "no spec": lambda d: with_header(d, inner(spec=None)),
    "spec of another": lambda d: with_header(d, inner(spec=config.ModelSpec().to_dict())),
    "spec with a new key": lambda d: with_header(d, inner(spec={"mood": 1})),
    "half precision": lambda d: with_header(d, entry("dtype", to="F16")),
    "doubles": lambda d: with_header(d, entry("dtype", to="F64")),
    "dtype is a number": lambda d: with_header(d, entry("dtype", to=32)),
    "shape is a number": lambda d: with_header(d, entry("shape", to=4)),
    "shape of nothing": lambda d: with_header(d, entry("shape", to=[])),
    "shape below 0": lambda d: with_header(d, entry("shape", to=[-4])),
    "shape of fractions": lambda d: with_header(d, entry("shape", to=[4.0])),
    "shape beyond int64": lambda d: with_header(d, entry("shape", to=[2**62, 4, 4])),
    "shape that overflows to its size": lambda d: with_header(d, entry("shape", to=[2**61, 2, 4])),
    "another shape": lambda d: with_header(d, entry("shape", to=[2, 2])),
    "one offset": lambda d: with_header(d, entry("data_offsets", to=[0])),
    "offsets beyond the file": lambda d: with_header(d, entry("data_offsets", to=[2**40, 2**40 + 16])),
    "offsets below 0": lambda d: with_header(d, entry("data_offsets", to=[-16, 0])),
    "offsets backwards": lambda d: with_header(d, entry("data_offsets", to=[16, 0])),
    "offsets at the end of int64": lambda d: with_header(d, entry("data_offsets", to=[2**63 - 17, 2**63 - 1])),
    "offsets beyond int64": lambda d: with_header(d, entry("data_offsets", to=[2**64, 2**64 + 16])),
    "two in one place": lambda d: with_header(d, swap),
    "one missing": lambda d: with_header(d, lambda h: h.pop("head.bias") and None),
    "an entry is a number": lambda d: with_header(d, lambda h: h.update({"head.bias": 1})),
    "infinity": lambda d: d[:-4] + struct.pack("<f", float("inf")),
    "NaN": lambda d: d[:-4] + struct.pack("<f", float("nan")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[name](small_file(tmp_path)))
    refusal(path)
    with pytest.raises(ModelError):  # Python reads it no better
        read_model(path)


def test_what_is_no_file_is_one_sentence(tmp_path: Path) -> None:
    assert "found no such file" in refusal(tmp_path / "nothing.safetensors")
    assert "got a directory" in refusal(tmp_path)
    assert "got a device or pipe" in refusal(Path(os.devnull))
    strange = tmp_path / os.fsdecode(b"\xff.safetensors")
    with pytest.raises(ModelError, match="found no such file"):
        _engine.SpeechModel.open(strange)
    strange.write_bytes(small_file(tmp_path))
    assert len(_engine.SpeechModel.open(strange).labels) == 4


def test_clips_without_end_are_refused(tmp_path: Path) -> None:
    even = dataclasses.replace(FAMILY["utterance"], clip_rule=config.ClipRule("even", None, 64))
    many = dataclasses.replace(even, clip_rule=config.ClipRule("even", 2**31 - 1, 64))
    assert same_bits(both(many)[0].run(noise(90000)), both(even)[0].run(noise(90000)))
    spec = dataclasses.replace(FAMILY["one band"], clip_rule=config.ClipRule("published", 2**31 - 1, 50))
    path = tmp_path / "long.safetensors"
    write_model(path, spec, random_tensors(spec.network))
    assert "clip_rule: expected clips of at most" in refusal(path)


def test_damaged_files_are_refused_as_python_refuses_them(tmp_path: Path) -> None:
    """Bytes of the header changed, removed and repeated: never a crash, and no verdict but Python's."""
    data = small_file(tmp_path)
    size = struct.unpack("<Q", data[:8])[0] + 8
    path = tmp_path / "damaged.safetensors"
    chance = random.Random(5)
    taken = 0
    for _ in range(1500):
        head, tail = bytearray(data[:size]), data[size:]
        for _ in range(chance.choice([1, 1, 2, 5])):
            at = chance.randrange(8, len(head))
            action = chance.randrange(3)
            if action == 0:
                head[at] = chance.choice([chance.randrange(256), ord(chance.choice('{}[]",:0123456789-.eE\\ '))])
            elif action == 1:
                del head[at : at + chance.choice([1, 2, 8])]
            else:
                head[at:at] = head[at : at + chance.choice([1, 2, 30])]
        if chance.random() < 0.9:
            head[:8] = struct.pack("<Q", len(head) - 8)
        path.write_bytes(bytes(head) + tail)
        try:
            read_model(path)
        except ModelError:
            with pytest.raises(ModelError):
                _engine.SpeechModel.open(path)
        else:
            taken += 1
            _engine.SpeechModel.open(path)
    assert 5 < taken < 500


def test_tensors_may_stand_in_any_order_and_be_empty(tmp_path: Path) -> None:
    spec = FAMILY["one band"]
    tensors = random_tensors(spec.network)
    header = {"format": 1, "kind": "mdscm", "spec": spec.to_dict(), "card": {}}
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(dict(reversed(tensors.items())), {"avser_fast": json.dumps(header), "other": "text"}))
    assert same_bits(_engine.SpeechModel.open(path).run(noise(900)), both_run(spec, tensors))
    path.write_bytes(save({**tensors, "more": np.zeros((0, 3), np.float32)}, {"avser_fast": json.dumps(header)}))
    assert "more" in refusal(path)


def both_run(spec: config.ModelSpec, tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return tuple(_engine.SpeechModel(json.dumps(spec.to_dict()), tensors).run(noise(900)))


# ---- the installed package


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)


def build(source: Path, folder: Path, *definitions: str) -> None:
    for command in (
        ["cmake", "-S", source, "-B", folder, "-G", "Ninja", *(f"-D{d}" for d in definitions)],
        ["cmake", "--build", folder, "--parallel", "1"],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stdout, done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library is installed and the example built against it; once, however many workers run the tests."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are needed to build the library")
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "cpp"
    root.mkdir(exist_ok=True)
    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            isas = dict.fromkeys(["scalar", _engine.cpu_isa()])  # the one that runs here, and what every build has
            build(ROOT, root / "build", "AVSER_PYTHON=OFF", f"AVSER_ISAS={';'.join(isas)}", f"Python_EXECUTABLE={root}")
            done = run("cmake", "--install", root / "build", "--prefix", root / "prefix")
            assert done.returncode == 0, done.stderr
            build(ROOT / "examples" / "cpp", root / "example", f"CMAKE_PREFIX_PATH={root / 'prefix'}")
            (root / "done").touch()
    return root


@pytest.fixture(scope="module")
def classify(installed: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda *arguments: run(installed / "example" / "classify", *arguments)


@pytest.mark.slow
def test_what_is_installed(installed: Path) -> None:
    prefix = installed / "prefix"
    headers = sorted(str(p.relative_to(prefix)) for p in (prefix / "include").rglob("*.h"))
    assert headers == [f"include/avser_fast/{name}.h" for name in ("check", "executor", "speech_model")]
    for header in headers:  # they stand alone
        assert '#include "' not in (prefix / header).read_text()
    assert [p.name for p in prefix.rglob("libavser.a")] == ["libavser.a"]
    configs = "".join(p.read_text() for p in prefix.rglob("*.cmake"))
    assert str(ROOT) not in configs and "COMPILE_OPTIONS" not in configs  # our flags are our own
    version = json.loads((ROOT / "avser_fast" / "_build_info.json").read_text())["version"]
    assert f'PACKAGE_VERSION "{version}"' in configs


@pytest.mark.slow
def test_a_package_of_another_version_is_not_taken(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.21)\nproject(other LANGUAGES CXX)\nfind_package(avser_fast 99 REQUIRED)\n"
    )
    found = run("cmake", "-S", tmp_path, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={installed / 'prefix'}")
    assert found.returncode != 0 and 'compatible with requested version "99"' in " ".join(found.stderr.split())


def check_scores(found: subprocess.CompletedProcess[str], wav: Path, model: Path) -> None:
    assert found.returncode == 0 and found.stderr == "", found.stderr
    (expected,) = avser_fast.infer([wav], model=model, precision="float32")
    label, score = found.stdout.splitlines()[0].split()
    scores = dict(line.split() for line in found.stdout.splitlines()[1:])
    assert label == expected.label and score == scores[label]
    assert {k: np.float32(v) for k, v in scores.items()} == {k: np.float32(v) for k, v in expected.scores.items()}


@pytest.mark.slow
def test_the_example_answers_like_infer(
    classify: Callable[..., subprocess.CompletedProcess[str]], emodb: Path, tmp_path: Path
) -> None:
    wav = tmp_path / "speech.wav"
    for file in sorted(emodb.glob("*.flac"))[::60]:
        pcm, rate = soundfile.read(file, dtype="int16")
        soundfile.write(wav, pcm, rate)
        check_scores(classify(DEFAULT, wav), wav, DEFAULT)
    speech = pcm.astype(np.float64) / 32768
    stereo = np.stack([speech, 0.3 * speech[::-1], 0.1 * speech], 1)
    for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT"):
        for samples, rate in ((speech, 8000), (stereo, 44100)):
            for container in ("WAV", "WAVEX"):
                soundfile.write(wav, samples, rate, subtype=subtype, format=container)
                check_scores(classify(DEFAULT, wav), wav, DEFAULT)


@pytest.mark.slow
def test_the_example_refuses_in_one_sentence(
    classify: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    good = tmp_path / "good.wav"
    soundfile.write(good, noise(20000), 16000)
    data = good.read_bytes()
    assert classify(DEFAULT, good).returncode == 0
    files: dict[str, tuple[bytes | None, str]] = {
        "missing.wav": (None, "expected a wav file that can be read"),
        "empty.wav": (b"", "expected a wav file, got something else"),
        "text.wav": (b"this is no sound", "expected a wav file, got something else"),
        "short.wav": (data[:-1000], "expected the 40000 bytes of samples it announces, got fewer"),
        "header.wav": (data[:36], "expected samples, got a wav without"),
        "silent.wav": (data[:40] + struct.pack("<I", 0), "expected samples, got a wav without"),
        "adpcm.wav": (data[:20] + struct.pack("<H", 2) + data[22:], "got others"),
        "channels.wav": (data[:22] + struct.pack("<H", 9) + data[24:], "expected 1 to 8 channels, got 9"),
        "rate.wav": (data[:24] + struct.pack("<I", 1) + data[28:], "rate: expected 4000..384000 hertz, got 1"),
        "chunk.wav": (data[:16] + struct.pack("<I", 2**32 - 1) + data[20:], "expected samples, got a wav without"),
    }
    for name, (content, words) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        found = classify(DEFAULT, tmp_path / name)
        assert found.returncode == 1 and found.stdout == "" and words in found.stderr, (name, found)
        assert found.stderr.count("\n") == 1
    for name in ("a pickle", "half a header", "offsets beyond the file"):
        path = tmp_path / "model.safetensors"
        path.write_bytes(HOSTILE[name](small_file(tmp_path)))
        found = classify(path, good)
        assert found.returncode == 1 and found.stderr == refusal(path) + "\n"
    assert "found no such file" in classify(tmp_path / "no.safetensors", good).stderr
    assert classify(DEFAULT).returncode == 2


@pytest.mark.slow
def test_many_callers_at_once_get_the_bits_of_one(installed: Path, tmp_path: Path) -> None:
    """Models and training ops, with executors of one to four threads, on the same weights and inputs."""
    program = link_concurrent("c++", installed / "build" / "libavser.a", tmp_path / "concurrent")
    done = run(program, DEFAULT, "6", "2")
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.splitlines())) > 40


@pytest.mark.slow
def test_another_architecture_has_the_bits_of_the_scalar_kernels(
    installed: Path, emodb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library cross-compiled for 64-bit ARM and run in an emulator: the example, every precision, training ops."""
    compiler = "aarch64-linux-gnu-g++"
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if shutil.which(compiler) is None or emulator is None:
        pytest.skip(f"needs {compiler} and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    target = ["CMAKE_SYSTEM_NAME=Linux", "CMAKE_SYSTEM_PROCESSOR=aarch64", f"CMAKE_CXX_COMPILER={compiler}"]
    build(ROOT, tmp_path / "build", "AVSER_PYTHON=OFF", *target)
    done = run("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "prefix")
    assert done.returncode == 0, done.stderr
    static = "CMAKE_EXE_LINKER_FLAGS=-static"  # the emulator finds no libraries of ARM
    build(ROOT / "examples" / "cpp", tmp_path / "example", f"CMAKE_PREFIX_PATH={tmp_path / 'prefix'}", static, *target)
    there = link_concurrent(compiler, tmp_path / "build" / "libavser.a", tmp_path / "there", "-static")
    here = link_concurrent("c++", installed / "build" / "libavser.a", tmp_path / "here")
    pcm, rate = soundfile.read(sorted(emodb.glob("*.flac"))[0], dtype="int16")
    wav = tmp_path / "speech.wav"
    soundfile.write(wav, pcm, rate)
    monkeypatch.setenv("AVSER_FAST_CPU_ISA", "scalar")
    for ours, theirs, arguments in (
        (installed / "example" / "classify", tmp_path / "example" / "classify", [DEFAULT, wav]),
        (here, there, [DEFAULT, "0", "0"]),
    ):
        expected, found = run(ours, *arguments), run(emulator, theirs, *arguments)
        assert expected.returncode == 0 and found.returncode == 0, expected.stderr + found.stderr
        assert found.stdout == expected.stdout


def test_cmake_refuses_unknown_instruction_sets(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are needed to configure a build")
    for isas in ("avx2", "scalar;sse", "scalar;avx512;avx2"):
        found = run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DAVSER_PYTHON=OFF", f"-DAVSER_ISAS={isas}")
        assert found.returncode != 0 and "avser_fast: AVSER_ISAS: expected" in " ".join(found.stderr.split())


def test_a_bad_choice_of_instruction_set_stays_a_backend_error() -> None:
    code = (
        "from avser_fast import _engine\n"
        f"try: _engine.SpeechModel.open({str(DEFAULT)!r})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "AVSER_FAST_CPU_ISA": "quantum"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(f"{BackendError.__name__} ") and "'quantum'" in done.stdout, done.stderr
