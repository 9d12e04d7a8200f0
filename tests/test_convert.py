"""Precisions from the outside: which one runs and why, ``convert``, the model's card, real speech."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import torch

import avser_fast
from avser_fast import _engine, cli, config, info, precision
from avser_fast.errors import BackendError, ConfigError, InputError, ModelError
from avser_fast.inference import backends, convert
from avser_fast.inference.convert import HEADROOM, agreement, convert_model, find_audio, merged, with_headroom
from avser_fast.inference.weights import random_tensors, read_model_file, write_model, write_tensors

SPEECH = sorted((Path(__file__).parent.parent / "data" / "emodb4").glob("*.flac"))
SMALL = config.MDSCM(mel_bands=24, stem=(4, 8), blocks=(8, 12), attention_reduction=2, encoder_layers=1, encoder_ff=9)
SPEC = config.ModelSpec(front_end=config.FrontEnd(mel_bands=24), clip_rule=config.ClipRule("even", None), network=SMALL)
NATIVE = "avx512_bf16"
GOOD = {"precisions": {"bf16": {"agreement": 0.995, "utterances": 339}}}


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    made = random_tensors(SMALL)
    made["head.weight"] *= 5  # decisions, not ties
    return made


@pytest.fixture
def model(tensors: dict[str, np.ndarray], tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    write_model(path, SPEC, tensors, {"licence": "CC0-1.0"})
    return path


@pytest.fixture(scope="module")
def converted(tensors: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    write_model(folder / "small.safetensors", SPEC, tensors, {"licence": "CC0-1.0"})
    convert_model(
        folder / "small.safetensors", folder / "int8.safetensors", precision="int8",
        calibrate_on=SPEECH[0].parent, limit=12,
    )  # fmt: skip
    return folder / "int8.safetensors"


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Recordings at several depths, among other files."""
    folder = tmp_path / "speech"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for target, source in (("b/z.FLAC", 0), ("b/c/y.flac", 1), ("a.flac", 2), (".hidden/x.flac", 3), ("b/._z.flac", 3)):
        (folder / target).write_bytes(SPEECH[source].read_bytes())
    (folder / "notes.txt").write_text("no sound")
    return folder


# Which precision runs


@pytest.mark.parametrize(
    ("card", "isa", "expected", "words"),
    [
        (GOOD, NATIVE, "bf16", "has instructions for bf16, which decides as float32 does on 99.5 % of 339 utterances"),
        (GOOD, "avx512_vnni", "float32", "avx512_vnni has no instructions for bf16"),
        (GOOD, "scalar", "float32", "scalar has no instructions for bf16"),
        ({}, NATIVE, "float32", "has no measured agreement of bf16"),
        ({"precisions": None}, NATIVE, "float32", "has no measured agreement"),
        ({"precisions": {"int8": {"agreement": 1.0, "utterances": 339}}}, NATIVE, "float32", "no measured agreement"),
        ({"precisions": {"bf16": {"agreement": 0.98, "utterances": 339}}}, NATIVE, "float32", "98.0 %.*below 99 %"),
        ({"precisions": {"bf16": {"agreement": 1.0, "utterances": 99}}}, NATIVE, "float32", "fewer than 100"),
        ({"precisions": {"bf16": {"agreement": True, "utterances": 339}}}, NATIVE, "float32", "no measured agreement"),
        ({"precisions": {"bf16": {"agreement": 2.0, "utterances": 339}}}, NATIVE, "float32", "no measured agreement"),
        ({"precisions": {"bf16": {"agreement": "1.0", "utterances": 339}}}, NATIVE, "float32", "no measured agreement"),
        ({"precisions": {"bf16": {"agreement": 1.0}}}, NATIVE, "float32", "no measured agreement"),
        ({"precisions": {"bf16": [1.0, 339]}}, NATIVE, "float32", "no measured agreement"),
    ],
)  # fmt: skip
def test_automatic(card: dict[str, Any], isa: str, expected: str, words: str) -> None:
    chosen, reason = precision.automatic(card, isa)
    assert chosen == expected and reason.startswith("auto: ") and re.search(words, reason), reason


def test_auto_runs_what_it_says(tensors: dict[str, np.ndarray], converted: Path) -> None:
    """bf16 with a good card and its instructions, else float32; the bits are those of the precision by its name."""
    automatic = avser_fast.Recognizer(SPEC, tensors, GOOD)
    expected = "bf16" if _engine.cpu_isa() == NATIVE else "float32"
    assert automatic.info()["precision"] == expected and automatic.info()["precision_reason"].startswith("auto: ")
    named = avser_fast.Recognizer(SPEC, tensors, GOOD, precision=expected)
    assert automatic.infer(SPEECH[:2]) == named.infer(SPEECH[:2])
    assert named.info()["precision_reason"] == "asked for"
    for card in ({}, read_model_file(converted).card, {"precisions": {"int8": {"agreement": 1.0, "utterances": 9999}}}):
        made = avser_fast.Recognizer(SPEC, tensors, card, calibration=read_model_file(converted).calibration)
        assert made.info()["precision"] == "float32", "int8 is never automatic, nor bf16 without a measurement"


def test_auto_follows_a_forced_instruction_set(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_model(tmp_path / "good.safetensors", SPEC, tensors, GOOD)
    code = (
        "import sys, avser_fast; rec = avser_fast.load(sys.argv[1])\n"
        "print(rec.info()['isa'], rec.info()['precision'], rec.infer([sys.argv[2]])[0].backend)"
    )
    for isa in _engine.supported_isas():
        command = [sys.executable, "-c", code, str(tmp_path / "good.safetensors"), str(SPEECH[0])]
        environment = {**os.environ, "AVSER_FAST_CPU_ISA": isa}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.split() == ([isa, "bf16", "engine/bf16"] if isa == NATIVE else [isa, "float32", "engine"])


@pytest.mark.parametrize("name", precision.PRECISIONS)
def test_every_precision_is_run_and_reported(converted: Path, name: str) -> None:
    recognizer = avser_fast.load(converted, precision=name)
    ran = "engine" if name == "float32" else f"engine/{name}"
    found = recognizer.info()
    assert (found["backend"], found["precision"], found["precision_reason"]) == ("engine", name, "asked for")
    assert ran in repr(recognizer)
    results = recognizer.infer([*SPEECH[:5], "no.wav"], on_error="return")
    assert {r.backend for r in results} == {ran} and results[-1].error is not None
    assert avser_fast.infer(SPEECH[:5], model=converted, precision=name) == results[:5]
    again = pickle.loads(pickle.dumps(recognizer))
    assert again.info() == found and again.infer(SPEECH[:5]) == results[:5]
    for i, file in enumerate(SPEECH[:5]):
        assert recognizer.infer([file]) == results[i : i + 1], "alone or in a batch"
    assert recognizer.infer(SPEECH[:5], batch_size=2) == results[:5]
    assert avser_fast.load(converted, precision=name, threads=1).infer(SPEECH[:5]) == results[:5]
    whole = avser_fast.load(converted, precision="float32").infer(SPEECH[:5])
    differences = [abs(a.scores[label] - b.scores[label]) for a, b in zip(results, whole) for label in SPEC.labels]
    assert max(differences) == 0 if name == "float32" else 0 < max(differences) < 0.2


def test_int8_needs_ranges(model: Path, tensors: dict[str, np.ndarray]) -> None:
    sentence = (
        r"^precision 'int8': expected a model file with calibrated ranges, got a model without; make one with "
        r"`avser-fast convert MODEL --precision int8 --calibrate DIR`$"
    )
    for call in (
        lambda: avser_fast.load(model, precision="int8"),
        lambda: avser_fast.infer([], model=model, precision="int8"),
        lambda: avser_fast.Recognizer(SPEC, tensors, GOOD, precision="int8"),
        lambda: avser_fast.Recognizer(SPEC, tensors, GOOD, precision="int8", calibration={}),
    ):
        with pytest.raises(ModelError, match=sentence):
            call()


def test_ranges_of_another_network_are_refused(model: Path, converted: Path) -> None:
    spec, tensors, card, ranges = read_model_file(converted)
    del ranges["dsc_block.0.hidden"]
    write_model(model, spec, tensors, card, ranges)
    assert avser_fast.load(model).infer(SPEECH[:1])[0].ok, "the other precisions do not read them"
    with pytest.raises(
        ModelError, match=r"cannot be packed \(Engine: calibration: expected the ranges dsc_block.0.hid"
    ):
        avser_fast.load(model, precision="int8")


def test_the_reference_runs_float32_only(converted: Path) -> None:
    recognizer = avser_fast.load(converted, backend="reference", precision="float32")
    found = recognizer.info()
    assert (found["precision"], found["precision_reason"]) == ("float32", "backend 'reference' runs float32 only")
    assert recognizer.infer(SPEECH[:1])[0].backend == "reference"
    for name in ("bf16", "int8"):
        with pytest.raises(BackendError, match="expected 'auto' or 'float32' with backend 'reference'"):
            avser_fast.load(converted, backend="reference", precision=name)


# What convert writes


def test_ranges_are_merged_and_widened() -> None:
    a = {"x": np.array([[0, -1], [2, -0.5]], np.float32)}
    b = {"x": np.array([[1, -3], [4, 0.5]], np.float32)}
    assert merged(None, a)["x"].tolist() == a["x"].tolist()
    assert merged(a, b)["x"].tolist() == [[0, -3], [4, 0.5]]
    wide = with_headroom(a)["x"]
    assert wide.dtype == np.float32 and wide.tolist() == [[0, -1 * (1 + HEADROOM)], [2 * (1 + HEADROOM), 0]]


def test_agreement() -> None:
    whole = np.array([[0.6, 0.4], [0.3, 0.7], [0.51, 0.49]])
    found = agreement(whole, np.array([[0.7, 0.3], [0.3, 0.7], [0.49, 0.51]]))
    assert found == {"agreement": 0.666667, "utterances": 3, "largest_difference": 0.1}


def test_find_audio(speech: Path) -> None:
    names = [str(path.relative_to(speech)) for path in find_audio(speech, "calibrate")]
    assert names == ["a.flac", "b/c/y.flac", "b/z.FLAC"]
    assert len(find_audio(speech, "calibrate", 2)) == 2 and len(find_audio(speech, "calibrate", 9)) == 3
    spread = [int(path.stem[:2]) for path in find_audio(SPEECH[0].parent, "calibrate", 20)]
    assert len(spread) == 20 and len(set(spread)) == 10, "all speakers"
    with pytest.raises(InputError, match="limit: expected a whole number of at least 1 or None, got 0"):
        find_audio(speech, "calibrate", 0)


def test_convert_to_int8(model: Path, tmp_path: Path, speech: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    out = tmp_path / "int8.safetensors"
    done = convert_model(
        model, out, precision="int8", calibrate_on=speech, progress=lambda *event: seen.append(event)
    )  # fmt: skip
    assert seen == [(what, i, 3) for what in ("calibrating", "measuring") for i in (1, 2, 3)]
    assert (done.output, done.calibrated_on, done.bad) == (out, 3, {})
    spec, tensors, card, ranges = read_model_file(out)
    before = read_model_file(model)
    assert spec == before.spec and all(np.array_equal(tensors[k], v) for k, v in before.tensors.items())
    assert card["licence"] == "CC0-1.0" and card["precisions"] == done.measured
    engine = _engine.Engine(json.dumps(spec.to_dict()), tensors)
    recognizer = avser_fast.load(model)
    clips = [recognizer._prepare(path, None, "x").item for path in find_audio(speech, "x")]
    expected = with_headroom(engine.calibrate(np.concatenate(clips)[None]))
    assert ranges.keys() == expected.keys() and all(np.array_equal(ranges[k], v) for k, v in expected.items())
    for name, entry in card["precisions"].items():
        files = find_audio(speech, "x")
        results = [avser_fast.load(out, precision=p).infer(files) for p in ("float32", name)]
        pairs = list(zip(*results))
        assert entry["agreement"] == round(sum(a.label == b.label for a, b in pairs) / 3, 6)
        worst = max(abs(a.scores[label] - b.scores[label]) for a, b in pairs for label in spec.labels)
        assert entry["largest_difference"] == pytest.approx(worst, abs=1e-6)
        assert entry["utterances"] == 3 and entry["isa"] == _engine.cpu_isa()
    assert card["precisions"]["int8"]["calibration"] == {"utterances": 3, "headroom": HEADROOM}
    assert card["precisions"]["int8"]["protocol"].endswith("'speech', on which the ranges were measured too")
    assert card["precisions"]["bf16"]["protocol"].endswith("recordings of 'speech'")
    assert "calibration" not in card["precisions"]["bf16"]
    first = out.read_bytes()
    convert_model(out, out, precision="int8", calibrate_on=speech)
    assert out.read_bytes() == first, "converting again, in place, gives the same file"


def test_measured_on_other_recordings(model: Path, tmp_path: Path, speech: Path) -> None:
    out = tmp_path / "int8.safetensors"
    done = convert_model(model, out, precision="int8", calibrate_on=speech, measure_on=speech / "b")
    assert done.measured["int8"]["utterances"] == 2 and done.calibrated_on == 3
    assert done.measured["int8"]["protocol"].endswith("recordings of 'b'")
    done = convert_model(model, out, precision="int8", calibrate_on=speech / "b", measure_on=speech, limit=1)
    assert done.measured["int8"]["utterances"] == 1 == done.calibrated_on


def test_bf16_measures_and_keeps_the_rest(converted: Path, tmp_path: Path, speech: Path) -> None:
    out = tmp_path / "bf16.safetensors"
    done = convert_model(converted, out, precision="bf16", measure_on=speech)
    assert set(done.measured) == {"bf16"} and done.measured["bf16"]["utterances"] == 3 and done.calibrated_on == 0
    before, after = read_model_file(converted), read_model_file(out)
    assert after.card["precisions"]["int8"] == before.card["precisions"]["int8"]
    assert after.card["precisions"]["bf16"] == done.measured["bf16"] != before.card["precisions"]["bf16"]
    assert all(np.array_equal(after.calibration[k], v) for k, v in before.calibration.items())
    # Ranges for int8 change nothing about bf16: what the card says of it stays.
    convert_model(out, out, precision="int8", calibrate_on=speech / "b")
    assert read_model_file(out).card["precisions"]["bf16"] == done.measured["bf16"]


def test_calibration_does_not_depend_on_other_cards(converted: Path, tmp_path: Path, speech: Path) -> None:
    """A card of the wrong kind is replaced, not read."""
    spec, tensors, _, _ = read_model_file(converted)
    write_model(tmp_path / "odd.safetensors", spec, tensors, {"precisions": [1, 2]})
    done = convert_model(
        tmp_path / "odd.safetensors", tmp_path / "o.safetensors", precision="int8", calibrate_on=speech
    )
    assert read_model_file(tmp_path / "o.safetensors").card["precisions"] == done.measured


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"precision": "float32"}, "precision: expected 'bf16' or 'int8', got 'float32'"),
        ({"precision": "int8"}, "precision 'int8': expected a folder of recordings to calibrate on, got none"),
        ({"precision": "bf16"}, "precision 'bf16': expected a folder of recordings to measure on, got none"),
        ({"precision": "bf16", "calibrate_on": "."}, "precision 'bf16': expected no folder to calibrate on"),
    ],
)
def test_wrong_arguments(model: Path, tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        convert_model(model, tmp_path / "out.safetensors", **arguments)
    assert not (tmp_path / "out.safetensors").exists()


# The command


def test_command(run: Any, model: Path, tmp_path: Path, speech: Path) -> None:
    out = tmp_path / "x.safetensors"
    code, text, err = run(
        "convert", str(model), "--precision", "int8", "--calibrate", str(speech), "--output", str(out)
    )
    assert (code, err) == (0, ""), "no progress bar where no terminal is"
    lines = text.splitlines()
    assert lines[0] == f"wrote {out}: ranges of 3 recordings"
    measured = read_model_file(out).card["precisions"]
    for line, name in zip(lines[2:4], ("bf16", "int8")):
        words = line.split()
        assert words[:2] == [name, "3"] and float(words[2]) == round(100 * measured[name]["agreement"], 1)
    assert lines[4].startswith("Compared on the recordings that calibrated it") and len(lines) == 5
    code, text, _ = run("infer", "--json", "--model", str(out), "--precision", "int8", str(SPEECH[0]))
    assert code == 0 and json.loads(text)[0]["backend"] == "engine/int8"
    bf16 = tmp_path / "b.safetensors"
    code, text, err = run("convert", str(out), "--precision", "bf16", "--measure", str(speech), "--output", str(bf16))
    assert (code, err) == (0, "") and text.splitlines()[0] == f"wrote {bf16}" and len(text.splitlines()) == 3


def test_default_output(run: Any, model: Path, tmp_path: Path, speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command = ["convert", str(model), "--precision", "int8", "--calibrate", str(speech), "--limit", "1"]
    code, out, _ = run(*command)
    assert code == 0 and out.startswith("wrote small-int8.safetensors: ranges of 1 recordings\n")
    assert os.listdir() == ["small-int8.safetensors"]
    code, out, err = run(*command)
    assert (code, out) == (1, "") and "expected a name, because the file 'small-int8.safetensors' is there" in err


def test_bad_files_are_reported_and_left_out(run: Any, model: Path, tmp_path: Path, speech: Path) -> None:
    (speech / "bad.wav").write_text("no sound")
    (speech / "empty.mp3").touch()
    out = tmp_path / "x.safetensors"
    command = ["convert", str(model), "--precision", "int8", "--calibrate", str(speech), "--output", str(out)]
    code, text, err = run(*command)
    assert code == 3 and text.startswith(f"wrote {out}: ranges of 3 recordings")
    errors = err.splitlines()
    assert len(errors) == 2, "each once, though every file is read twice"
    assert errors[0].startswith(f"avser-fast: {str(speech / 'bad.wav')!r}: expected an audio file (wav, flac")
    assert errors[1].startswith(f"avser-fast: {str(speech / 'empty.mp3')!r}: expected an audio file, got 0 bytes")
    assert read_model_file(out).card["precisions"]["int8"]["utterances"] == 3


def test_failures(run: Any, model: Path, tmp_path: Path, speech: Path) -> None:
    out = tmp_path / "x.safetensors"
    empty = tmp_path / "empty"
    empty.mkdir()
    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    (only_bad / "a.wav").write_text("no sound")

    def failure(source: Any, *more: Any) -> str:
        code, text, err = run("convert", str(source), "--output", str(out), *map(str, more))
        assert (code, text) == (1, "") and not out.exists()
        return str(err.splitlines()[-1])

    int8 = ("--precision", "int8", "--calibrate")
    assert failure(model, *int8, empty) == (
        f"avser-fast: calibrate {str(empty)!r}: expected recordings (.wav, .flac, .ogg, .mp3), found none"
    )
    assert failure(model, *int8, speech, "--measure", empty).startswith(f"avser-fast: measure {str(empty)!r}: expected")
    assert failure(model, *int8, tmp_path / "no").endswith("expected a folder of recordings, got no such folder")
    assert failure(model, *int8, SPEECH[0]).endswith("expected a folder of recordings, got a file")
    sentence = "expected recordings that can be used, got 1 that cannot"
    assert failure(model, *int8, only_bad) == f"avser-fast: calibrate {str(only_bad)!r}: {sentence}"
    for more in ((*int8, speech, "--measure", only_bad), ("--precision", "bf16", "--measure", only_bad)):
        assert failure(model, *more) == f"avser-fast: measure {str(only_bad)!r}: {sentence}"
    assert failure(tmp_path / "no.safetensors", *int8, speech).endswith("no such file")
    foreign = tmp_path / "fusion.safetensors"
    write_tensors(foreign, {"kind": "fusion"}, {"w": np.zeros(3, np.float32)})
    assert failure(foreign, *int8, speech).endswith("got a model of kind 'fusion'")
    code, text, err = run("convert", str(model), *int8, str(speech), "--output", str(tmp_path / "no" / "x"))
    assert (code, text) == (1, "") and "No such file or directory" in err


def test_progress_on_a_terminal_only(
    run: Any, model: Path, tmp_path: Path, speech: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (speech / "bad.wav").write_text("no sound")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    out = str(tmp_path / "x.safetensors")
    code, text, err = run("convert", str(model), "--precision", "int8", "--calibrate", str(speech), "--output", out)
    assert code == 3 and "files" not in text.splitlines()[0]
    assert "\rcalibrating: 1/4 files" in err and "\rmeasuring: 4/4 files\n" in err and "\navser-fast: " in err


def test_published_checkpoints(run: Any, tmp_path: Path, speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, _, _ = golden.case("mdscm_w40")
    torch.save({k: torch.as_tensor(v) for k, v in state.items()}, tmp_path / "MDSCM.pth")
    monkeypatch.chdir(tmp_path)
    code, out, err = run("convert", "MDSCM.pth", "--output", "plain.safetensors")
    assert (code, out, err) == (0, "wrote plain.safetensors: mdscm, float32\n", "")
    assert avser_fast.load("plain.safetensors").infer(SPEECH[:1])[0].ok
    command = ["convert", "MDSCM.pth", "--precision", "int8", "--calibrate", str(speech), "--limit", "1"]
    code, out, err = run(*command)
    assert (code, err) == (0, "") and out.startswith("wrote MDSCM-int8.safetensors: ranges of 1 recordings\n")
    assert avser_fast.load("MDSCM-int8.safetensors", precision="int8").infer(SPEECH[:1])[0].backend == "engine/int8"
    (tmp_path / "other.pth").write_text("no checkpoint")
    code, out, err = run("convert", "other.pth", "--output", "o.safetensors")
    assert (code, out) == (1, "") and "expected a state dict that can be read without running code" in err
    code, out, err = run("convert", "none.pth", "--output", "o.safetensors")
    assert (code, out) == (1, "") and "expected a .pth file, got nothing" in err
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    code, out, err = run("convert", "MDSCM.pth", "--output", "o.safetensors")
    assert (code, out) == (1, "") and "reading a published checkpoint needs torch" in err
    assert not (tmp_path / "o.safetensors").exists()


def test_convert_needs_no_torch(model: Path, tmp_path: Path, speech: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from avser_fast import cli; sys.exit(cli.main(sys.argv[1:]))"
    )  # fmt: skip
    command = ["convert", str(model), "--precision", "int8", "--calibrate", str(speech), "--limit", "1"]
    command += ["--output", str(tmp_path / "x.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# doctor


def test_doctor_says_what_is_native_and_what_auto_runs(
    tensors: dict[str, np.ndarray], converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    write_model(tmp_path / "models" / "good.safetensors", SPEC, tensors, GOOD)
    (tmp_path / "models" / "ranges.safetensors").write_bytes(converted.read_bytes())
    (tmp_path / "models" / "torn.safetensors").write_bytes(converted.read_bytes()[:100])
    (tmp_path / "models" / "vast.safetensors").write_bytes(b"\xff" * 100)
    monkeypatch.setattr(info, "PACKAGE", tmp_path)
    found = info.report()
    native = _engine.cpu_isa() == NATIVE
    assert found["precisions"]["float32"] == "native"
    assert found["precisions"]["bf16"] == ("native" if native else "emulated")
    assert found["model_precisions"]["good"]["auto"] == ("bf16" if native else "float32")
    assert found["model_precisions"]["ranges"]["calibrated"] and not found["model_precisions"]["good"]["calibrated"]
    text = info.doctor(found)
    assert "good: bf16 decides as float32 on 99.5 % of 339 utterances; int8 not measured, no ranges in the file" in text
    assert "ranges: bf16 decides as float32 on 100.0 % of 12 utterances" in text or "of 12 utterances" in text
    assert "torn: cannot be read: " in text and "vast: cannot be read: " in text
    assert json.loads(json.dumps(found["model_precisions"])) == found["model_precisions"]
    found["precisions"]["bf16"] = "emulated"
    assert "bf16 emulated (slower, the same numbers up to rounding)" in info.doctor(found)
    assert precision.is_native("int8", "avx512_vnni") and precision.is_native("int8", NATIVE)
    assert not precision.is_native("int8", "avx512") and not precision.is_native("bf16", "avx512_vnni")
    assert precision.is_native("float32", "scalar")


# Real speech


@pytest.fixture(scope="module")
def shipped() -> tuple[avser_fast.Recognizer, list[np.ndarray]]:
    """The shipped model and the clips of every recording of EMO-DB."""
    recognizer = avser_fast.load("default", precision="float32")
    return recognizer, [recognizer._prepare(path, None, path.name).item for path in SPEECH]


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_the_shipped_model_decides_as_in_float32(
    shipped: tuple[avser_fast.Recognizer, list[np.ndarray]], name: str
) -> None:
    """int8 with ranges of the other speakers: a speaker's own ranges are never used for it."""
    recognizer, clips = shipped
    spec, tensors, card, _ = read_model_file("default")
    whole = recognizer._backend
    assert isinstance(whole, backends.Engine)

    def scores(engine: backends.Engine, chosen: list[int]) -> np.ndarray:
        logits = [found.astype(np.float64).mean(0) for found, _ in engine.score([clips[i] for i in chosen], False)]
        exponents = np.exp(logits - np.max(logits, axis=1, keepdims=True))
        return np.asarray(exponents / exponents.sum(1, keepdims=True))

    speakers = sorted({path.stem[:2] for path in SPEECH})
    expected, actual = [], []
    for speaker in speakers if name == "int8" else [""]:
        own = [i for i, path in enumerate(SPEECH) if path.stem.startswith(speaker)]
        others = [clips[i] for i in range(len(SPEECH)) if i not in set(own)]
        ranges = convert.calibrate(whole, others) if name == "int8" else None
        expected.append(scores(whole, own))
        actual.append(scores(backends.Engine(spec, tensors, None, name, card, ranges), own))
    found = agreement(np.concatenate(expected), np.concatenate(actual))
    assert found["utterances"] == len(SPEECH)
    assert found["agreement"] >= precision.LEAST_AGREEMENT[name], found
    assert 0 < found["largest_difference"] < 0.1, found


def test_the_shipped_card_is_honest_about_precisions(shipped: tuple[avser_fast.Recognizer, list[np.ndarray]]) -> None:
    """Either it has no measurement, or one that can be read; what auto runs follows from it."""
    recognizer, _ = shipped
    automatic = avser_fast.load("default")
    expected, _ = precision.automatic(recognizer.card, _engine.cpu_isa())
    assert automatic.info()["precision"] == expected
    for name in recognizer.card.get("precisions") or ():
        assert precision.measured(recognizer.card, name) is not None


def test_spec_is_untouched_by_precision(converted: Path) -> None:
    assert dataclasses.asdict(avser_fast.load(converted, precision="int8").spec) == dataclasses.asdict(SPEC)
