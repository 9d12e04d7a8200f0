"""Audio-visual encoders and whole systems as model files: the same promises as an MDSCM's."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import avser_fast
from avser_fast import _engine, config, nn, reference
from avser_fast.config import AVRE, MDSCM, ClipRule, EncoderSpec, FrontEnd, Fusion, ModelSpec, SystemSpec
from avser_fast.errors import BackendError, ConfigError, InputError, ModelError
from avser_fast.inference import weights
from avser_fast.inference.weights import read_any, read_model, read_tensors, write_avre, write_system, write_tensors
from avser_fast.testing import assert_close

SPEECH = sorted((Path(__file__).parent.parent / "data" / "emodb4").glob("*.flac"))
PCM, RATE = soundfile.read(SPEECH[0], dtype="int16")

SMALL = MDSCM(stem=(4, 8), blocks=(8, 16), encoder_layers=1, encoder_ff=24)
LITTLE = MDSCM(mel_bands=24, in_channels=3, clip_frames=60, classes=3, stem=(8,), blocks=(12,), attention_reduction=3,
               encoder_layers=0, statistics=12, statistics_hidden=20)  # fmt: skip
LABELS = ("no", "maybe", "yes")
FRONT = FrontEnd(mel_bands=24, channels=3, normalization="utterance")
SPECS: dict[str, EncoderSpec | SystemSpec] = {
    "system, ResNet-18, as published": SystemSpec(network=SMALL, fusion=Fusion(SMALL.features + 512)),
    "system, ResNet-18 of one channel, any number of clips": SystemSpec(
        LABELS, FRONT, ClipRule("even", None, 60), LITTLE, AVRE(classes=3), Fusion(LITTLE.features + 512, 3, 16, 0.6)
    ),
    "system, MDSCM body": SystemSpec(
        clip_rule=ClipRule("even", 2, 224),
        network=SMALL,
        encoder=AVRE("mdscm", mdscm=replace(SMALL, pooling="mean_std")),
        fusion=Fusion(3 * SMALL.features, hidden=32),
    ),
    "encoder, ResNet-18": EncoderSpec(LABELS, FRONT, ClipRule("even", None, 60), AVRE(in_channels=3, classes=3)),
    "encoder, MDSCM body": EncoderSpec(encoder=AVRE("mdscm", mdscm=SMALL)),
}

Modules = tuple[nn.MDSCM | None, nn.AVRE | None, nn.Fusion | None]


def modules_of(spec: EncoderSpec | SystemSpec) -> Modules:
    """Random weights whose batch norms have statistics worth folding and whose fusion decides."""
    torch.manual_seed(5)
    found: Modules = (None, nn.AVRE(spec.encoder), None)
    if isinstance(spec, SystemSpec):
        found = nn.MDSCM(spec.network), nn.AVRE(spec.encoder), nn.Fusion(spec.fusion)
    for module in found:
        for part in module.eval().requires_grad_(False).modules() if module is not None else ():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.2)  # type: ignore[union-attr,operator]
                part.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]
    if found[2] is not None:
        for branch in (found[2].feature_branch, found[2].score_branch):
            branch.out.weight.mul_(5)
    for module in found:
        if module is not None:
            module.double()  # the same numbers; files hold them as float32
    return found


def write(path: Path, spec: EncoderSpec | SystemSpec, modules: Modules, card: Any = None) -> None:
    states: list[Any] = [None if module is None else module.state_dict() for module in modules]
    if isinstance(spec, SystemSpec):
        write_system(path, spec, *states, card)
    else:
        write_avre(path, spec, states[1], card)


MODULES = {name: modules_of(spec) for name, spec in SPECS.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("systems")
    for i, (name, spec) in enumerate(SPECS.items()):
        write(folder / f"{i}.safetensors", spec, MODULES[name], {"metrics": {"ua": 0.25}})
    return {name: folder / f"{i}.safetensors" for i, name in enumerate(SPECS)}


@pytest.fixture(params=list(SPECS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.inference_mode()
def truth(name: str, clips: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, features, logits of one utterance's clips (L, C, W, M) in float64."""
    mdscm, avre, fusion = MODULES[name]
    assert avre is not None
    x, voting = torch.from_numpy(clips)[None].double(), torch.from_numpy(valid)
    encoded = avre(x[:, :, : avre.encoder.in_channels], voting[None])
    if mdscm is None or fusion is None:
        return encoded.logits.softmax(-1)[0].numpy(), encoded.features[0].numpy(), encoded.clip_logits[0].numpy()
    speech = mdscm(x)
    features, logits = reference.fuse_inputs(speech.features, encoded.features, speech.clip_logits, encoded.clip_logits)
    fused = fusion(features[:, voting], logits[:, voting]).fused
    return fused.softmax(-1)[0].numpy(), features[0].numpy(), logits[0].numpy()


def random_clips(spec: EncoderSpec | SystemSpec, *shape: int) -> np.ndarray:
    inner = (spec.front_end.channels, spec.clip_rule.clip_frames, spec.front_end.mel_bands)
    return np.random.default_rng(3).normal(1, 2, (*shape, *inner)).astype(np.float32)


def various() -> list[Any]:
    random = np.random.default_rng(0)
    noise = random.uniform(-1, 1, (2, 100011)).astype(np.float32)
    return [SPEECH[0], {"array": PCM, "sampling_rate": 8000}, noise, noise[0, :50000], PCM[:700], str(SPEECH[9]),
            np.zeros(3000, np.int16)]  # fmt: skip


@pytest.mark.parametrize("backend", ["engine", "reference"])
def test_clips_agree_with_the_float64_modules(name: str, backend: str, files: dict[str, Path]) -> None:
    recognizer = avser_fast.load(files[name], backend=backend)
    spec = SPECS[name]
    clips = random_clips(spec, 3, 4)
    clips[1, 2] = clips[2] = 0
    valid = np.array([[1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 0]], bool)
    for votes in (valid, None):
        found = recognizer.forward(clips, votes)
        for i in range(3):
            expected = truth(name, clips[i], valid[i] if votes is not None else np.ones(4, bool))
            for what, a, e in zip(("probabilities", "features", "logits"), found, expected, strict=True):
                assert a.dtype == np.float32
                assert_close(a[i], e, 1e-5, what)
    clips[1, 0] = np.nan  # what a clip that does not vote holds is nobody's business
    assert np.array_equal(recognizer.forward(clips, valid)[0], recognizer.forward(np.nan_to_num(clips), valid)[0])
    shapes = [(0, len(spec.labels)), (0, 4, spec.features), (0, 4, len(spec.labels))]
    assert [a.shape for a in recognizer.forward(clips[:0])] == shapes


def test_speech_agrees_with_the_float64_modules(name: str, files: dict[str, Path]) -> None:
    """The whole way, padding clips of the published rule included: they vote, and the fusion reads them."""
    spec, recognizer = SPECS[name], avser_fast.load(files[name])
    front, rule = spec.front_end, spec.clip_rule
    for samples in (PCM, PCM[:9000], np.concatenate([PCM] * 4)):
        values = reference.log_mel(torch.from_numpy(samples).double(), mel_bands=front.mel_bands)
        values = reference.normalize(reference.add_deltas(values, front.channels), front)
        cut, votes = reference.frame_clips(values, rule.clips, rule.clip_frames, rule.rule)
        clips, valid = cut.numpy(), votes.numpy()
        probabilities, features, logits = truth(name, clips, valid)
        (result,) = recognizer.infer([samples], sampling_rate=RATE)
        assert_close([result.scores[label] for label in spec.labels], probabilities, 1e-5, "scores")
        (embedded,) = recognizer.embed([samples], sampling_rate=RATE)
        assert_close(embedded, features[valid], 1e-5, "embedding")
        heard = [i for i, clip in enumerate(clips) if valid[i] and clip.any()]
        assert len(result.segments) == len(heard)
        for segment, i in zip(result.segments, heard):
            own = torch.from_numpy(logits[i]).softmax(0)
            assert_close([segment.scores[label] for label in spec.labels], own, 1e-5, "segment")


def test_the_same_bits_alone_in_any_batch_with_any_threads(name: str, files: dict[str, Path]) -> None:
    items = various()
    recognizer = avser_fast.load(files[name], threads=1)
    alone = [recognizer.infer([item], sampling_rate=RATE)[0] for item in items]
    embedded = [recognizer.embed([item], sampling_rate=RATE)[0] for item in items]
    assert all(result.ok and sum(result.scores.values()) == pytest.approx(1) for result in alone)
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(len(items)), 2))
    for threads in (1, 3):
        recognizer = avser_fast.load(files[name], threads=threads)
        for batch_size in (None, 1, 3):
            batch = [items[i] for i in order]
            found = recognizer.infer(batch, sampling_rate=RATE, batch_size=batch_size)
            assert found == [alone[i] for i in order]
        for a, i in zip(recognizer.embed(batch, sampling_rate=RATE), order):
            assert a.dtype == np.float32 and np.array_equal(a, embedded[i])
    clips = random_clips(SPECS[name], 2, 3)
    clips[0, 1] = 0
    whole = recognizer.forward(clips)
    for i in range(2):
        assert all(np.array_equal(a[i], b[0]) for a, b in zip(whole, recognizer.forward(clips[i : i + 1])))


def test_bad_items_have_their_own_answers(name: str, files: dict[str, Path]) -> None:
    recognizer = avser_fast.load(files[name])
    found = recognizer.infer([SPEECH[0], "no.wav", SPEECH[1]], on_error="return", top_k=1)
    assert [r.ok for r in found] == [True, False, True] and "no.wav" in str(found[1].error)
    assert found[0] == recognizer.infer([SPEECH[0]], top_k=1)[0] and len(found[0].scores) == 1
    with pytest.raises(InputError, match=r"no\.wav"):
        recognizer.infer(["no.wav"])
    with pytest.raises(InputError, match=r"forward: clips: expected float32 of shape \(B, L, "):
        recognizer.forward(np.zeros((1, 2, 3), np.float32))


def test_reference_backend(name: str, files: dict[str, Path]) -> None:
    engine, plain = (avser_fast.load(files[name], backend=b) for b in ("engine", "reference"))
    items = various()
    found = plain.infer(items, sampling_rate=RATE)
    for a, b in zip(engine.infer(items, sampling_rate=RATE), found):
        assert (a.backend, b.backend) == ("engine", "reference")
        assert_close([a.scores[k] for k in SPECS[name].labels], [b.scores[k] for k in SPECS[name].labels], 1e-4)
    assert plain.infer(items[:2], sampling_rate=RATE, batch_size=1) == found[:2]


def test_info(name: str, files: dict[str, Path]) -> None:
    spec, recognizer = SPECS[name], avser_fast.load(files[name])
    info = recognizer.info()
    described = json.loads(json.dumps(info))
    assert type(spec).from_dict({k: described[k] for k in spec.to_dict()}) == spec == recognizer.spec
    assert info["kind"] == spec.kind == name.split(",")[0].replace("encoder", "avre")
    body = f"avre-{spec.encoder.body}"
    assert info["networks"] == (["mdscm", body, "fusion"] if spec.kind == "system" else [body])
    assert (info["backend"], info["precision"], info["metrics"]) == ("engine", "float32", {"ua": 0.25})
    assert info["precision_reason"] == f"auto: a model of kind '{spec.kind}' is float32 unless asked"
    assert pickle.loads(pickle.dumps(recognizer)).infer([PCM], sampling_rate=RATE) == recognizer.infer(
        [PCM], sampling_rate=RATE
    )


def test_precisions(name: str, files: dict[str, Path]) -> None:
    """bf16 where it is asked for, of both networks; a card that admits it changes nothing; no int8."""
    spec, modules = SPECS[name], MODULES[name]
    recognizer = avser_fast.load(files[name], precision="bf16")
    assert recognizer.infer([PCM], sampling_rate=RATE)[0].backend == "engine/bf16"
    clips = random_clips(spec, 1, 3)
    mdscm, avre, fusion = (
        None if m is None else {k: v.float().numpy() for k, v in m.state_dict().items() if not k.endswith("tracked")}
        for m in modules
    )
    encoder = spec.encoder
    seen = clips[:, :, : encoder.in_channels]
    engine: Any
    if encoder.body == "mdscm":
        engine = _engine.Engine(json.dumps({"network": config.plain(encoder.mdscm)}), avre or {}, precision="bf16")
    else:
        engine = _engine.ResNet18(
            avre or {}, in_channels=encoder.in_channels, classes=encoder.classes, precision="bf16"
        )
    _, features, logits = engine.forward(seen)
    if isinstance(spec, SystemSpec):
        _, f, z = _engine.Engine(json.dumps(spec.to_dict()), mdscm or {}, precision="bf16").forward(clips)
        features, logits = np.concatenate((f, features), -1), np.maximum(z, logits)
        fused, _, _ = _engine.Fusion(fusion or {}, **asdict(spec.fusion)).forward(features, logits)
        assert_close(recognizer.forward(clips)[0], torch.from_numpy(fused).softmax(-1), 1e-6)
    assert np.array_equal(recognizer.forward(clips)[1], features)
    assert np.array_equal(recognizer.forward(clips)[2], logits)

    made = avser_fast.Recognizer(
        *read_any(files[name])[:2], {"precisions": {"bf16": {"agreement": 1, "utterances": 999}}}
    )
    assert made.info()["precision"] == "float32"
    words = (
        f"precision 'int8': expected a model of kind 'mdscm', got one of kind '{spec.kind}', which runs in float32 and"
    )
    with pytest.raises(BackendError, match=words):
        avser_fast.load(files[name], precision="int8")
    with pytest.raises(BackendError, match="expected 'auto' or 'float32' with backend 'reference'"):
        avser_fast.load(files[name], precision="bf16", backend="reference")


def test_no_torch_is_imported(name: str, files: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import avser_fast\n"
        "r = avser_fast.load(sys.argv[1]); r.embed([sys.argv[2]]); print(r.infer([sys.argv[2]])[0].label)"
    )
    command = [sys.executable, "-c", code, str(files[name]), str(SPEECH[0])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == avser_fast.infer([SPEECH[0]], model=files[name])[0].label


def test_command_line(run: Any, name: str, files: dict[str, Path], tmp_path: Path) -> None:
    path = str(files[name])
    code, out, err = run("infer", "--model", path, "--json", str(SPEECH[0]), "no.wav")
    assert code == 3 and "no.wav" in err
    assert json.loads(out)[0] == {
        "file": str(SPEECH[0]), **avser_fast.infer([SPEECH[0]], model=path)[0].to_dict()
    }  # fmt: skip
    output = str(tmp_path / "x.safetensors")
    for more in (["int8", "--calibrate"], ["bf16", "--measure"]):
        code, out, err = run("convert", path, "--precision", *more, str(SPEECH[0].parent), "--output", output)
        assert (code, out, Path(output).exists()) == (1, "", False)
        assert err == (
            f"avser-fast: model {path!r}: expected an MDSCM to convert, got a model of kind {SPECS[name].kind!r}, "
            "which has no int8 and runs in bf16 as it is where that is asked for\n"
        )


# Files


def test_files(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    spec, path = SPECS[name], tmp_path / "again.safetensors"
    found, tensors, card, ranges = read_any(files[name])
    assert (found, card, ranges) == (spec, {"metrics": {"ua": 0.25}}, {})
    write(path, spec, MODULES[name], card)
    assert path.read_bytes() == files[name].read_bytes()
    header, stored = read_tensors(path)
    assert (header["kind"], header["format"]) == (spec.kind, 3 if spec.kind == "system" else 1)
    if isinstance(spec, SystemSpec):
        assert stored.keys() == tensors.keys() and not any("domain" in key for key in stored)
    else:  # the domain classifier is kept and not needed
        assert {key for key in stored if key not in tensors} == {k for k, _ in weights.domain_tensors(spec.encoder)}
        write_avre(path, spec, tensors, card)
        assert read_any(path)[1].keys() == tensors.keys() == read_tensors(path)[1].keys()
        assert avser_fast.infer([PCM], model=path, sampling_rate=RATE) == avser_fast.infer(
            [PCM], model=files[name], sampling_rate=RATE
        )
    with pytest.raises(ModelError, match=f"expected an MDSCM, got a model of kind '{spec.kind}'; avser_fast.load runs"):
        read_model(path)


@pytest.mark.parametrize("encoder", [AVRE(), AVRE(in_channels=3, classes=7, domain_hidden=()), AVRE("mdscm")])
def test_expected_tensors_are_those_of_the_torch_modules(encoder: AVRE) -> None:
    state = {k: tuple(v.shape) for k, v in nn.AVRE(encoder).state_dict().items() if not k.endswith("tracked")}
    assert {**dict(weights.encoder_tensors(encoder)), **dict(weights.domain_tensors(encoder))} == state
    fusion = Fusion(9, 5, 7)
    state = {k: tuple(v.shape) for k, v in nn.Fusion(fusion).state_dict().items()}
    assert dict(weights.fusion_tensors(fusion)) == state


def test_what_does_not_fit_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "wrong.safetensors"

    def refusal(name: str, change: Any = None, **changed: np.ndarray | None) -> str:
        header, tensors = read_tensors(files[name])
        if change:
            change(header)
        write_tensors(path, header, {k: v for k, v in {**tensors, **changed}.items() if v is not None})
        with pytest.raises(ModelError) as found:
            avser_fast.load(path)
        text = str(found.value)
        assert text.startswith(f"model {str(path)!r}: ") and "\n" not in text
        return text

    system, encoder = "system, MDSCM body", "encoder, ResNet-18"
    missing = refusal(system, **{"avre.head.bias": None})
    assert "expected a tensor 'avre.head.bias' of shape (4,), which is missing" in missing
    wrong = refusal(system, **{"fusion.score_branch.out.bias": np.zeros(5, np.float32)})
    assert "'fusion.score_branch.out.bias': expected float32 (4,), got float32 (5,)" in wrong
    for extra in ("more", "head.bias", "avre.domain.layers.0.bias", "calibration.conv_stem.0"):
        assert f"tensor '{extra}' belongs to no part" in refusal(system, **{extra: np.zeros((2, 4), np.float32)})
    assert "(model: expected only labels" in refusal(system, lambda h: h["spec"].update(mood=1))
    assert "'domain.layers.1.bias' of shape (20,), which is" in refusal(encoder, **{"domain.layers.1.bias": None})
    assert "tensor 'domain.x' belongs" in refusal(encoder, **{"domain.x": np.zeros(1, np.float32)})
    assert "encoder: expected a mapping, got None" in refusal(encoder, lambda h: h.pop("avre"))
    assert "(mdscm: expected a mapping, got 3)" in refusal(encoder, lambda h: h["avre"].update(mdscm=3))
    assert "domain_hidden: expected a list of" in refusal(encoder, lambda h: h["avre"].update(domain_hidden=[1.5]))
    assert "the header's spec is no model" in refusal(encoder, lambda h: h.update(spec=[1]))
    assert "expected the header's card to be a JSON object" in refusal(encoder, lambda h: h.update(card=[1]))


def test_older_encoders_say_what_they_lack(files: dict[str, Path], tmp_path: Path) -> None:
    header, tensors = read_tensors(files["encoder, ResNet-18"])
    path = tmp_path / "old.safetensors"
    write_tensors(path, {"kind": "avre", "avre": header["avre"], "card": {}}, tensors)
    assert read_tensors(path)[1].keys() == tensors.keys()
    with pytest.raises(ModelError, match="expected an encoder that knows its labels, front end and clip rule, got one"):
        avser_fast.load(path)


@pytest.mark.parametrize(
    ("spec", "changed", "words"),
    [
        ("system, MDSCM body", {"fusion": Fusion(1280)}, "fusion.features: expected 144, those of both"),
        ("system, MDSCM body", {"fusion": Fusion(144, 5)}, "fusion.classes: expected 4, got 5"),
        ("system, MDSCM body", {"encoder": AVRE(classes=5)}, "encoder.classes: expected 4, got 5"),
        ("system, MDSCM body", {"encoder": AVRE(in_channels=3)}, r"encoder.in_channels: expected 1\.\.1, got 3"),
        ("system, MDSCM body", {"encoder": AVRE("mdscm", mdscm=MDSCM(mel_bands=80))}, "mel_bands: expected 80, got 40"),
        ("system, MDSCM body", {"clip_rule": ClipRule(clip_frames=100)}, "clip_frames: expected 224, got 100"),
        ("system, MDSCM body", {"labels": ("a", "b")}, "labels: expected 4 names"),
        ("encoder, ResNet-18", {"front_end": FrontEnd()}, "front_end.channels: expected 3, got 1"),
        ("encoder, ResNet-18", {"labels": ("a", "a", "b")}, "labels: expected distinct names"),
        ("encoder, MDSCM body", {"clip_rule": ClipRule(clip_frames=100)}, "clip_frames: expected 224, got 100"),
    ],
)  # fmt: skip
def test_specs_that_contradict_themselves(spec: str, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(SPECS[spec], **changed)


def test_the_published_system_is_the_default() -> None:
    spec = SystemSpec()
    assert spec.features == 1280 and spec.network == ModelSpec().network and spec.fusion.feature_weight == 0.7
    assert config.SystemSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
