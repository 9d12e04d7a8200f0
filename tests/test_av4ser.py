"""Published checkpoints: pickles read without running code, dicts of arrays, and what is written."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import torch

import avser_fast
from avser_fast import reference
from avser_fast.av4ser import checkpoint_kind, load_av4ser
from avser_fast.errors import ConfigError, ModelError
from avser_fast.inference.weights import read_tensors
from avser_fast.testing import assert_close

ARGUMENT = {"mdscm_w40": "mdscm", "mdscm_domain_w40": "avdal", "avre_resnet18_c1": "avdal", "fusion_lstm": "fusion"}


def float32(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value.astype(np.float32) for key, value in state.items()}


@pytest.mark.parametrize("name", ARGUMENT)
def test_pth_and_arrays_give_the_same_model(name: str, tmp_path: Path) -> None:
    state, _, _ = golden.case(name)
    tensors = {key: torch.from_numpy(value).float() for key, value in state.items()}
    torch.save(
        {**tensors, "conv1.1.num_batches_tracked": torch.tensor(3)} if "mdscm" in name else tensors, tmp_path / "x.pth"
    )
    (from_file,) = avser_fast.import_av4ser(
        **{ARGUMENT[name]: tmp_path / "x.pth"}, out=tmp_path / "a.safetensors"
    ).values()
    (from_dict,) = avser_fast.import_av4ser(**{ARGUMENT[name]: float32(state)}, out=tmp_path / "b.safetensors").values()
    assert from_file.read_bytes() == from_dict.read_bytes()
    header, arrays = read_tensors(from_file)
    assert header["kind"] == {"mdscm": "mdscm", "avdal": "avre", "fusion": "fusion"}[ARGUMENT[name]]
    assert sum(a.size for a in arrays.values()) == sum(a.size for a in state.values())


def test_an_imported_mdscm_scores_speech(tmp_path: Path, emodb: Path) -> None:
    state, inputs, expected = golden.case("mdscm_w40")
    path = avser_fast.import_av4ser(mdscm=float32(state), out=tmp_path / "m.safetensors")["mdscm"]
    recognizer = avser_fast.load(path)
    assert recognizer.info()["clip_rule"]["rule"] == "published"
    outputs = recognizer.forward(inputs[0].astype(np.float32))
    for i, (output, truth) in enumerate(zip(outputs, expected)):
        assert_close(output, truth, 1e-5, f"output {i}")
    (result,) = recognizer.infer([emodb / "03a01Fa.flac"])
    assert result.label in ("ang", "hap", "neu", "sad")


def test_several_checkpoints_go_into_a_folder(tmp_path: Path) -> None:
    states = {
        ARGUMENT[name]: float32(golden.case(name)[0]) for name in ("mdscm_w40", "avre_resnet18_c1", "fusion_lstm")
    }
    written = avser_fast.import_av4ser(**states, out=tmp_path / "all")
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == sorted(p.name for p in written.values())
    assert sorted(written) == ["avdal", "fusion", "mdscm", "system"]
    two = avser_fast.import_av4ser(mdscm=states["mdscm"], fusion=states["fusion"], out=tmp_path / "two")
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["fusion.safetensors", "mdscm.safetensors"]
    assert sorted(two) == ["fusion", "mdscm"]


@pytest.mark.parametrize("backend", ["engine", "reference"])
def test_the_imported_system_is_the_published_one(tmp_path: Path, emodb: Path, backend: str) -> None:
    """Each network on the inputs that its expected outputs are of: the golden data has no clips that all three saw."""
    cases = ("mdscm_w40", "avre_resnet18_c1", "fusion_lstm")
    states = {ARGUMENT[name]: float32(golden.case(name)[0]) for name in cases}
    written = avser_fast.import_av4ser(**states, out=tmp_path)
    recognizer = avser_fast.load(written["system"], backend=backend)
    assert recognizer.info()["networks"] == ["mdscm", "avre-resnet18", "fusion"]
    assert recognizer.card["source"] == "converted from published AV4SER checkpoints: mdscm, avre-resnet18, fusion"
    (speech, faces, (features, scores)) = (golden.case(name)[1] for name in cases)
    (mdscm, avre, fused) = (golden.case(name)[2] for name in cases)
    assert_close(recognizer.forward(speech[0].astype(np.float32))[1][..., :768], mdscm[1], 1e-5, "f_s")
    assert_close(recognizer.forward(faces[0].astype(np.float32))[1][..., 768:], avre[2], 1e-5, "f_v")
    for i, logits in enumerate(fused[0]):
        vote = recognizer._backend.vote(scores[i].astype(np.float32), features[i].astype(np.float32))
        assert_close(vote, logits, 1e-5, "fused")
    # All three on the same clips, in float64.
    modules = [load_av4ser(golden.case(name)[0])[1] for name in cases]
    clips = torch.from_numpy(speech[0])
    with torch.inference_mode():
        one, other = modules[0](clips), modules[1](clips)
        joined = reference.fuse_inputs(one.features, other.features, one.clip_logits, other.clip_logits)
        expected = modules[2](*joined).fused.softmax(-1), *joined
    for output, truth in zip(recognizer.forward(speech[0].astype(np.float32)), expected, strict=True):
        assert_close(output, truth, 1e-5)
    # The networks alone say what their own files say.
    assert recognizer.infer([emodb / "03a01Fa.flac"])[0].label in ("ang", "hap", "neu", "sad")
    encoder = avser_fast.load(written["avdal"], backend=backend)
    for output, truth in zip(encoder.forward(faces[0].astype(np.float32)), (None, *avre[2:]), strict=True):
        if truth is not None:
            assert_close(output, truth, 1e-5)


def test_three_checkpoints_that_are_no_system_are_refused(tmp_path: Path) -> None:
    states = {ARGUMENT[n]: float32(golden.case(n)[0]) for n in ("mdscm_w40", "mdscm_domain_w40", "fusion_lstm")}
    with pytest.raises(ConfigError, match=r"fusion\.features: expected 1536, those of both networks, got 1280"):
        avser_fast.import_av4ser(**states, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="labels: expected 4 names"):
        avser_fast.import_av4ser(avdal=states["avdal"], labels=("a", "b"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"conv1.0.weight": Bomb()}))
    torch.save({"conv1.0.weight": Bomb()}, tmp_path / "bomb2.pth")
    for name in ("bomb.pth", "bomb2.pth"):
        with pytest.raises(
            ModelError, match=rf"mdscm= \(.*{name}\): expected a state dict that can be read without running"
        ):
            avser_fast.import_av4ser(mdscm=tmp_path / name, out=tmp_path / "out.safetensors")
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "out.safetensors").exists()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = float32(golden.case("mdscm_w40")[0])
    out = tmp_path / "out.safetensors"

    def refuse(match: str, **sources: Any) -> None:
        with pytest.raises(ModelError, match=match):
            avser_fast.import_av4ser(**sources, out=out)
        assert not out.exists()

    refuse("expected at least one of mdscm=, avdal=, fusion=")
    refuse(r"fusion=: expected a checkpoint of kind fusion, got mdscm", fusion=state)
    refuse(r"mdscm=: expected the keys of MDSCM.pth, .* got a, b", mdscm={"a": np.zeros(1), "b": np.zeros(1)})
    refuse(r"mdscm=: expected the keys .* got no keys", mdscm={})
    refuse(r"mdscm=: extra.weight: expected a key of a published mdscm", mdscm={**state, "extra.weight": np.zeros(1)})
    refuse(r"mdscm=: expected an array for head.bias", mdscm={k: v for k, v in state.items() if k != "classifier.bias"})
    refuse(
        r"mdscm=: expected the key classifier.weight",
        mdscm={k: v for k, v in state.items() if k != "classifier.weight"},
    )
    wrong = {**state, "conv2.0.weight": np.zeros((64, 31, 3, 3), np.float32)}
    refuse(r"mdscm=: body.conv_stem.convs.1.weight: expected shape \(64, 32, 3, 3\), got \(64, 31, 3, 3\)", mdscm=wrong)
    refuse(r"mdscm=: conv1.0.weight: expected an array, got str", mdscm={**state, "conv1.0.weight": "x"})
    refuse(r"mdscm=: expected a path or a dict of arrays, got int", mdscm=3)
    refuse(r"mdscm= \(.*none.pth\): expected a .pth file, got nothing", mdscm=tmp_path / "none.pth")
    refuse(r"mdscm= \(.*\): expected a .pth file, got a directory", mdscm=tmp_path)


def test_data_parallel_prefix_and_wrapped_state() -> None:
    state = float32(golden.case("fusion_lstm")[0])
    kind, plain = load_av4ser(state)
    _, wrapped = load_av4ser({"state_dict": {f"module.{k}": v for k, v in state.items()}})
    assert kind == checkpoint_kind(state) == "fusion"
    for (name, a), b in zip(plain.state_dict().items(), wrapped.state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("bands", "channels"), [(40, 3), (80, 1), (128, 1)])
def test_other_published_widths_are_recognised(bands: int, channels: int) -> None:
    from avser_fast.nn import MDSCM

    published = golden.case("mdscm_w40")[0]
    network = MDSCM(mel_bands=bands, in_channels=channels).network
    width = network.token_width
    state = {}
    for key, value in published.items():
        shape = [width if n == 768 else 3 * width if n == 2304 else n for n in value.shape]
        if key == "conv1.0.weight":
            shape[1] = channels
        state[key] = np.ones(shape, np.float32)
    _, module = load_av4ser(state)
    assert module.network == network
