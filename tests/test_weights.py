"""Model files: what is written is read back, and everything else is refused in one sentence that names the file."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import avser_fast
from avser_fast import config, nn
from avser_fast.errors import ModelError
from avser_fast.inference import weights
from avser_fast.inference.weights import (
    expected_tensors,
    random_tensors,
    read_model,
    read_model_file,
    read_tensors,
    write_model,
    write_tensors,
)

NETWORKS = [
    config.MDSCM(),
    config.MDSCM(mel_bands=80, in_channels=3, classes=7),
    config.MDSCM(spatial_attention=False, encoder_layers=0, pooling="mean_std"),
    config.MDSCM(channel_attention=False, encoder_layers=1, stem=(8,), blocks=(8, 12, 16)),
    config.MDSCM(in_channels=3, encoder_layers=0, stem=(8,), blocks=(16,), statistics=25, statistics_hidden=30),
    config.MDSCM(mel_bands=24, stem=(4, 8), blocks=(8,), attention_reduction=2, encoder_layers=1, encoder_ff=10),
]
SMALL = NETWORKS[-1]
SPEC = config.ModelSpec(
    front_end=config.FrontEnd(mel_bands=24, normalization="global", mean=(1 / 3,), std=(2.5,)),
    clip_rule=config.ClipRule("even", None),
    network=SMALL,
)
CARD = {"licence": "CC0-1.0", "protocol": "leave one speaker out", "metrics": {"ua": 0.9}, "labels": ["Ärger"]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    write_model(path, SPEC, random_tensors(SMALL), CARD)
    return path


def sentence(path: Path | str) -> str:
    """The refusal, which must be one sentence with the name of the file, wherever the file is used."""
    with pytest.raises(ModelError) as found:
        read_model(path)
    text = str(found.value)
    assert str(path) in text and "\n" not in text and len(text) < 500, text
    with pytest.raises(ModelError) as again:
        avser_fast.load(path)
    assert str(again.value) == text
    with pytest.raises(ModelError) as again:
        avser_fast.infer([], model=path)
    assert str(again.value) == text
    return text


@pytest.mark.parametrize("network", NETWORKS, ids=range(len(NETWORKS)))
def test_expected_tensors_are_those_of_the_torch_module(network: config.MDSCM) -> None:
    state = {k: tuple(v.shape) for k, v in nn.MDSCM(network).state_dict().items() if not k.endswith("tracked")}
    assert dict(expected_tensors(network)) == state


def test_round_trip(model: Path) -> None:
    spec, tensors, card = read_model(model)
    assert spec == SPEC and card == CARD
    expected = random_tensors(SMALL)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32 and np.array_equal(tensor, expected[name]), name


def test_a_torch_state_dict_is_written_as_it_is(tmp_path: Path) -> None:
    module = nn.MDSCM(SMALL)
    path = tmp_path / "torch.safetensors"
    for state in (module.state_dict(), module.double().state_dict(), module.bfloat16().state_dict()):
        write_model(path, SPEC, state)
        for name, tensor in read_model(path)[1].items():
            assert np.array_equal(tensor, state[name].float().numpy()), name


def test_strides_and_byte_orders_are_not_lost(tmp_path: Path) -> None:
    expected = random_tensors(SMALL)
    twisted = {}
    for i, (name, value) in enumerate(expected.items()):
        twisted[name] = np.asfortranarray(value) if i % 2 else np.repeat(value, 2, axis=0)[::2].astype(">f4")
    write_model(tmp_path / "m.safetensors", SPEC, twisted)
    for name, tensor in read_model(tmp_path / "m.safetensors")[1].items():
        assert np.array_equal(tensor, expected[name]), name


def test_writing_is_repeatable_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_model(path, SPEC, random_tensors(SMALL), CARD)
    first = path.read_bytes()
    write_model(path, SPEC, dict(reversed(random_tensors(SMALL).items())), dict(reversed(CARD.items())))
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_failed_write_keeps_the_old_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model.read_bytes()
    bad = random_tensors(SMALL)
    bad["head.bias"] = bad["head.bias"] * np.float32("nan")
    with pytest.raises(ModelError, match=r"small\.safetensors.*'head\.bias' holds NaN"):
        write_model(model, SPEC, bad)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"No space left on device.*/small\.safetensors'"):
        write_model(model, SPEC, random_tensors(SMALL, 1))
    assert model.read_bytes() == before and os.listdir(model.parent) == [model.name]


def test_writing_refuses_what_reading_would(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    missing = random_tensors(SMALL)
    del missing["head.weight"]
    with pytest.raises(ModelError, match=r"m\.safetensors.*'head\.weight' of shape \(4, 24\), which is missing"):
        write_model(path, SPEC, missing)
    with pytest.raises(ModelError, match=r"header cannot be written as JSON"):
        write_model(path, SPEC, random_tensors(SMALL), {"ua": float("nan")})
    with pytest.raises(ModelError, match=r"header cannot be written as JSON"):
        write_model(path, SPEC, random_tensors(SMALL), {"ua": object()})
    with pytest.raises(ModelError, match=r"'x': expected floats or integers, got <U1"):
        write_tensors(path, {"kind": "fusion"}, {"x": np.array(["a"])})
    with pytest.raises(ModelError, match=r"expected header\['kind'\] to be mdscm, avre, fusion, system, got 'svm'"):
        write_tensors(path, {"kind": "svm"}, {})
    assert not path.exists()


def test_names(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights, "MODELS", model.parent)
    model.rename(model.with_name("mdscm-small.safetensors"))
    write_model(model, SPEC, random_tensors(SMALL, 1))
    assert weights.shipped_models() == ["mdscm-small", "small"]
    for name in ("default", "mdscm-small"):
        assert np.array_equal(read_model(name)[1]["head.bias"], random_tensors(SMALL)["head.bias"])
    assert np.array_equal(read_model("small")[1]["head.bias"], random_tensors(SMALL, 1)["head.bias"])
    with pytest.raises(ModelError, match=r"model 'larger': expected default, mdscm-small, small or a path"):
        read_model("larger")
    monkeypatch.setattr(weights, "MODELS", tmp_path / "none")
    with pytest.raises(ModelError, match=r"model 'default': expected a path, because no model came with this copy"):
        read_model("default")
    monkeypatch.chdir(tmp_path)
    assert read_model("small.safetensors")[0] == SPEC
    for wrong in (None, 3, b"default", ["default"], "", "a\0b"):
        with pytest.raises(ModelError, match="expected a name or a path"):
            read_model(wrong)  # type: ignore[arg-type]


def test_missing_file_directory_and_permission(tmp_path: Path) -> None:
    assert sentence(tmp_path / "no.safetensors").endswith("no such file")
    assert sentence(str(tmp_path / "no" / "such")).endswith("no such file")
    assert sentence(tmp_path).endswith("expected a safetensors file, got a directory")
    (tmp_path / "empty.safetensors").touch()
    assert sentence(tmp_path / "empty.safetensors").endswith("got an empty file")
    if os.geteuid() != 0:  # root reads everything
        (tmp_path / "secret.safetensors").touch(0)
        assert "cannot be read (Permission denied)" in sentence(tmp_path / "secret.safetensors")


def test_truncated_and_corrupt_files(model: Path) -> None:
    whole = model.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (1, 7, 8, 9, 50, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        model.write_bytes(whole[:length])
        assert "is not a whole safetensors file (" in sentence(model)
    model.write_bytes(whole + b"\0")
    assert "is not a whole safetensors file (" in sentence(model)
    model.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])
    assert "is not a whole safetensors file (" in sentence(model)
    model.write_bytes(whole[:8] + b"\xff" * (header - 8) + whole[header:])
    assert "is not a whole safetensors file (" in sentence(model)
    model.write_text("these are no weights\n" * 100)
    assert "is not a whole safetensors file (" in sentence(model)


@pytest.mark.parametrize(
    ("part", "name", "value", "expected"),
    [
        ("front_end", "sampling_rate", 16000.0, "a whole number below"),
        ("front_end", "sampling_rate", 1000000, r"1\.\.384000 hertz"),
        ("front_end", "sampling_rate", True, "a whole number below"),
        ("front_end", "frame_step", 2**70, "a whole number below"),
        ("front_end", "n_fft", 1 << 21, "a power of two from 16 to 1048576"),
        ("front_end", "delta_window", 10**9, r"1\.\.1000 frames"),
        ("front_end", "preemphasis", "0.97", "a finite number"),
        ("front_end", "std", ["2.5"], "a list of finite numbers"),
        ("clip_rule", "clips", True, "a whole number below"),
        ("clip_rule", "rule", 1, "a string"),
        ("network", "stem", 8, "a list of whole numbers"),
        ("network", "spatial_attention", 1, "true or false"),
    ],
)
def test_header_values_of_another_kind(model: Path, part: str, name: str, value: Any, expected: str) -> None:
    """What the kernels would refuse at the first item, or never end on, is refused when the file is read."""
    header, tensors = weights.read_tensors(model)
    header["spec"][part][name] = value
    write_tensors(model, header, tensors)
    assert re.search(rf"{name}: expected {expected}.*, got", sentence(model))


@pytest.mark.parametrize("labels", [[1, 2, 3, 4], "abcd"])
def test_labels_are_a_list_of_names(model: Path, labels: Any) -> None:
    header, tensors = weights.read_tensors(model)
    header["spec"]["labels"] = labels
    write_tensors(model, header, tensors)
    assert "labels: expected a list of names, got" in sentence(model)


def test_random_damage_is_refused_or_harmless(model: Path) -> None:
    """Whatever bytes are overwritten, the answer is a model or a ModelError, never anything else."""
    whole = model.read_bytes()
    random = np.random.default_rng(5)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        begin = int(random.integers(0, min(3000, len(whole))))
        damaged[begin : begin + int(random.integers(1, 9))] = random.bytes(int(random.integers(1, 9)))
        model.write_bytes(damaged)
        try:
            read_model(model)
        except ModelError as error:
            refused += 1
            assert str(model) in str(error)
    assert refused > 100


def test_foreign_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"w": np.zeros((2, 2), np.float32)}, path)
    assert "of another program, without the header 'avser_fast'" in sentence(path)
    save_file({"w": np.zeros((2, 2), np.float32)}, path, metadata={"format": "pt"})
    assert "of another program" in sentence(path)
    save_file({}, path, metadata={"avser_fast": "no json"})
    assert "'avser_fast' is not JSON" in sentence(path)
    save_file({}, path, metadata={"avser_fast": "[" * 100000})
    assert "'avser_fast' is not JSON" in sentence(path)
    save_file({}, path, metadata={"avser_fast": "[1]"})
    assert "is not a JSON object" in sentence(path)


class Bomb:
    """A pickle that tells when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(Bomb.mark),))

    mark = Path()


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.pkl", "model.safetensors"])
@pytest.mark.parametrize("how", ["torch", "torch-legacy", 2, 4, 5])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, name: str, how: str | int) -> None:
    Bomb.mark = tmp_path / "it ran"
    path = tmp_path / name
    if isinstance(how, int):
        path.write_bytes(pickle.dumps({"w": Bomb()}, protocol=how))
    else:
        torch.save({"w": Bomb()}, path, _use_new_zipfile_serialization=how == "torch")
    text = sentence(path)
    assert "got a pickle, which could run code" in text and "avser_fast.import_av4ser" in text
    assert not Bomb.mark.exists()


def test_newer_and_impossible_formats(model: Path) -> None:
    header, tensors = read_tensors(model)
    save_file(tensors, model, metadata={"avser_fast": json.dumps({**header, "format": 4})})
    assert "is of format 4, this version of avser_fast reads up to 3; update avser_fast" in sentence(model)
    for wrong in (None, "1", True, 0, 1.5):
        save_file({}, model, metadata={"avser_fast": json.dumps({"format": wrong, "kind": "mdscm"})})
        assert f"expected the header's format to be 1..3, got {wrong!r}" in sentence(model)


def test_other_kinds_are_read_but_do_not_score(tmp_path: Path) -> None:
    path = tmp_path / "fusion.safetensors"
    tensors = {"w": np.arange(6, dtype=np.float64).reshape(2, 3), "steps": np.array(7, np.int64)}
    for kind, got in (("avre", "one without a spec"), ("fusion", "a model of kind 'fusion'")):
        write_tensors(path, {"kind": kind, kind: {"a": 1}}, tensors)
        header, back = read_tensors(path)
        assert header == {"kind": kind, kind: {"a": 1}, "format": 1}
        assert all(np.array_equal(back[k], v) and back[k].shape == v.shape for k, v in tensors.items())
        assert f", got {got}" in sentence(path)
    save_file({}, path, metadata={"avser_fast": '{"format": 1, "kind": "svm"}'})
    assert "expected the header's kind to be mdscm, avre, fusion, system, got 'svm'" in sentence(path)


def test_spec_and_tensors_must_fit(model: Path) -> None:
    header, tensors = read_tensors(model)
    spec = header["spec"]

    def refusal(change: dict[str, Any] | None = None, **changed: np.ndarray | None) -> str:
        new = {k: v for k, v in {**tensors, **changed}.items() if v is not None}
        save_file(new, model, metadata={"avser_fast": json.dumps({**header, **(change or {})})})
        return sentence(model)

    assert "'head.bias' of shape (4,), which is missing" in refusal(**{"head.bias": None})
    assert "'head.bias': expected float32 (4,), got float32 (5,)" in refusal(**{"head.bias": np.zeros(5, np.float32)})
    assert "'head.bias': expected float32 (4,), got float64 (4,)" in refusal(**{"head.bias": np.zeros(4)})
    assert "tensor 'more' belongs to no part of the network" in refusal(more=np.zeros(4, np.float32))
    for bad in (np.nan, np.inf, -np.inf):
        assert "'head.bias' holds NaN or infinity" in refusal(**{"head.bias": np.full(4, bad, np.float32)})
    variance = "body.conv_stem.norms.0.running_var"
    assert "expected variances of at least 0, got -1" in refusal(**{variance: np.full(4, -1, np.float32)})
    assert "the header's spec is no model of this version" in refusal({"spec": None})
    assert "(network: expected only the keys" in refusal({"spec": {**spec, "network": {"kernel": 5}}})
    assert "spec is no model" in refusal({"spec": {**spec, "labels": ["a", "a", "b", "c"]}})
    assert "spec is no model" in refusal({"spec": {**spec, "network": {**spec["network"], "stem": ["4", 8]}}})
    assert "expected a tensor" in refusal({"spec": {**spec, "network": {**spec["network"], "encoder_layers": 10**9}}})
    assert "card to be a JSON object, got list" in refusal({"card": [1]})


def ranges() -> dict[str, np.ndarray]:
    return {"conv_stem.0": np.array([[0, -1.5], [2, -1]], np.float32), "anything": np.zeros((2, 1), np.float32)}


def test_ranges_of_int8_stand_beside_the_weights(model: Path) -> None:
    """Only a file with ranges is of the newer format, which older versions refuse by its number."""
    assert read_tensors(model)[0]["format"] == 1 and read_model_file(model).calibration == {}
    before = model.read_bytes()
    write_model(model, *read_model_file(model))
    assert model.read_bytes() == before
    write_model(model, SPEC, random_tensors(SMALL), CARD, ranges())
    assert read_tensors(model)[0]["format"] == 2
    spec, tensors, card, calibration = read_model_file(model)
    assert (spec, card) == (SPEC, CARD) and tensors.keys() == random_tensors(SMALL).keys()
    assert calibration.keys() == ranges().keys()
    assert all(np.array_equal(calibration[name], value) for name, value in ranges().items())
    assert [set(part) for part in read_model(model)[1:]] == [set(tensors), set(card)]
    written = model.read_bytes()
    write_model(model, *read_model_file(model))
    assert model.read_bytes() == written
    write_model(model, *read_model(model))
    assert model.read_bytes() == before


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros((2, 4)), r"expected float32 \(2, channels\), got float64 \(2, 4\)"),
        (np.zeros(4, np.float32), r"expected float32 \(2, channels\), got float32 \(4,\)"),
        (np.zeros((3, 4), np.float32), r"expected float32 \(2, channels\), got float32 \(3, 4\)"),
        (np.zeros((2, 0), np.float32), r"expected float32 \(2, channels\), got float32 \(2, 0\)"),
        (np.array([[0, 1], [0, 0.5]], np.float32), "channel 1: expected low <= high, got 1 and 0.5"),
        (np.array([[0, -np.inf], [0, 1]], np.float32), "holds NaN or infinity"),
        (np.array([[0, 0], [np.nan, 1]], np.float32), "holds NaN or infinity"),
    ],
)
def test_impossible_ranges(model: Path, value: np.ndarray, words: str) -> None:
    header, tensors = read_tensors(model)
    tensors["calibration.conv_stem.0"] = value
    save_file(tensors, model, metadata={"avser_fast": json.dumps(header)})
    assert re.search(rf"tensor 'calibration.conv_stem.0':? {words}", sentence(model))
    if value.dtype == np.float32:
        with pytest.raises(ModelError, match=words):
            write_model(model, SPEC, random_tensors(SMALL), CARD, {"conv_stem.0": value})


def test_reading_needs_no_torch(model: Path) -> None:
    code = (
        "import sys; from avser_fast.inference.weights import read_model, write_model\n"
        "write_model(sys.argv[1], *read_model(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert read_model(model)[2] == CARD


def test_specs_survive_json() -> None:
    for network in NETWORKS:
        front = config.FrontEnd(mel_bands=network.mel_bands, channels=network.in_channels)
        labels = tuple("abcdefg"[: network.classes])
        spec = config.ModelSpec(labels, front, dataclasses.replace(SPEC.clip_rule), network)
        assert config.ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
