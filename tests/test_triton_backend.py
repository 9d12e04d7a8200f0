"""Inference on the Triton kernels: on a GPU where there is one, else on the CPU in Triton's interpreter.

``test_interpreted`` runs this file again with the interpreter; what needs no kernel runs without.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_log_mel_cpu import GOLDEN

import avser_fast
from avser_fast import info, nn, ops
from avser_fast.config import AVRE, MDSCM, ClipRule, EncoderSpec, FrontEnd, Fusion, ModelSpec, SystemSpec
from avser_fast.errors import BackendError
from avser_fast.inference import backends, triton_backend
from avser_fast.inference.weights import Spec, read_any, write_avre, write_model, write_system
from avser_fast.ops.backends import INTERPRETED
from avser_fast.testing import assert_close, max_error

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="neither a GPU nor TRITON_INTERPRET=1")
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA GPU in this machine")

ROOT = Path(__file__).resolve().parents[1]
#: Not from a recording: a machine with a GPU may have nothing that reads one.
PCM, RATE = GOLDEN["wave/16000"], 16000
#: Sound of one and of three clips, and digital silence.
ITEMS = [{"array": pcm, "sampling_rate": RATE} for pcm in (PCM[2000:4500], PCM[4000:9000], np.zeros(2500, np.int16))]

LABELS = ("no", "maybe", "yes")
FRONT = FrontEnd(mel_bands=8, channels=3, normalization="utterance")
RULE = ClipRule("even", None, 16)
PLAIN = MDSCM(mel_bands=8, in_channels=3, clip_frames=16, classes=3, stem=(8,), blocks=(12,), attention_reduction=3,
              encoder_layers=1, encoder_ff=20)  # fmt: skip
JOINED = MDSCM(mel_bands=8, in_channels=3, clip_frames=16, classes=3, stem=(4, 8), blocks=(8, 16), encoder_layers=0,
               pooling="mean_std", statistics=6, statistics_hidden=10)  # fmt: skip
RESNET, BODY = AVRE(classes=3), AVRE("mdscm", mdscm=PLAIN, in_channels=3, classes=3)
SPECS: dict[str, Spec] = {
    "MDSCM": ModelSpec(LABELS, FRONT, RULE, PLAIN),
    "encoder, MDSCM body": EncoderSpec(LABELS, FRONT, RULE, BODY),
    "encoder, ResNet-18": EncoderSpec(LABELS, FRONT, RULE, AVRE(in_channels=3, classes=3)),
    "system, MDSCM body": SystemSpec(
        LABELS, FRONT, RULE, JOINED, BODY, Fusion(JOINED.features + BODY.features, 3, hidden=16)
    ),
    "system, ResNet-18": SystemSpec(LABELS, FRONT, RULE, JOINED, RESNET, Fusion(JOINED.features + 512, 3, hidden=16)),
}
RAN = {name: "triton" for name in SPECS} | {"encoder, ResNet-18": "torch", "system, ResNet-18": "triton+torch"}


def write(path: Path, spec: Spec) -> None:
    """Random weights whose batch norms have statistics of their own."""
    torch.manual_seed(7)
    modules: list[Any] = []
    if not isinstance(spec, EncoderSpec):
        modules.append(nn.MDSCM(spec.network))
    if not isinstance(spec, ModelSpec):
        modules.append(nn.AVRE(spec.encoder))
    if isinstance(spec, SystemSpec):
        modules.append(nn.Fusion(spec.fusion))
    for part in (part for module in modules for part in module.modules()):
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)  # type: ignore[union-attr,operator]
            part.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]
    states = [module.state_dict() for module in modules]
    if isinstance(spec, SystemSpec):
        write_system(path, spec, *states)
    elif isinstance(spec, EncoderSpec):
        write_avre(path, spec, *states)
    else:
        write_model(path, spec, *states)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("triton")
    for i, spec in enumerate(SPECS.values()):
        write(folder / f"{i}.safetensors", spec)
    return {name: folder / f"{i}.safetensors" for i, name in enumerate(SPECS)}


@pytest.fixture(params=list(SPECS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(path: Path, precision: str = "float32") -> avser_fast.Recognizer:
    return avser_fast.load(path, device=DEVICE, backend="triton", precision=precision)


# What it answers


@runs
def test_agrees_with_the_reference(files: dict[str, Path], name: str) -> None:
    ours, plain = load(files[name]), avser_fast.load(files[name], backend="reference")
    found, expected = ours.infer(ITEMS), plain.infer(ITEMS)
    assert [len(r.segments) for r in found] == [1, 3, 1]
    assert {r.backend for r in found} == {RAN[name]}
    for a, b in zip(found, expected):
        assert_close([a.scores[k] for k in LABELS], [b.scores[k] for k in LABELS], 1e-4, name)
    clips = np.random.default_rng(0).normal(1, 2, (2, 2, 3, 16, 8)).astype(np.float32)
    valid = np.array([[True, True], [False, True]])
    for actual, wanted in zip(ours.forward(clips, valid), plain.forward(clips, valid)):
        assert_close(actual, wanted, 1e-4, name)
    said = ours.info()
    assert said["backend"] == "triton" and said["precision"] == "float32" and not said["cuda_graphs"]
    assert "on a CPU; ahead-of-time" in said["verified"] and json.dumps(said)
    assert (said["parts"].get("fusion") == "torch on the CPU") == name.startswith("system")


#: Distance from float32 by the largest value, and the step of the narrow type: a few roundings.
STEPS = {"bf16": 2.0**-8, "fp16": 2.0**-11}


@runs
@pytest.mark.parametrize("precision", list(STEPS))
@pytest.mark.parametrize("name", ["system, MDSCM body", "encoder, ResNet-18"])
def test_narrow_precisions(files: dict[str, Path], name: str, precision: str) -> None:
    exact, narrow = load(files[name]), load(files[name], precision)
    assert narrow._backend.ran == f"{RAN[name]}/{precision}"
    (wide,), (found,) = exact.embed(ITEMS[:1]), narrow.embed(ITEMS[:1])
    assert found.dtype == np.float32
    assert 0.01 * STEPS[precision] < max_error(found, wide) < 8 * STEPS[precision]


@runs
def test_tf32_reaches_the_kernels(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from avser_fast.triton import common, strided_conv2d

    assert strided_conv2d.__module__.endswith("strided_conv2d")
    module = sys.modules[strided_conv2d.__module__]
    seen = []
    monkeypatch.setattr(module, "precision", lambda x: seen.append(common.precision(x)) or seen[-1])
    for precision, product in (("float32", "ieee"), ("tf32", "tf32")):
        seen.clear()
        result = load(files["MDSCM"], precision).infer(ITEMS[:1])[0]
        assert set(seen) == {product} and result.error is None
        assert result.backend == ("triton" if precision == "float32" else "triton/tf32")


# Bits


@runs
@pytest.mark.parametrize(
    ("name", "precision"),
    [("system, MDSCM body", "float32"), ("encoder, ResNet-18", "float32"), ("system, ResNet-18", "bf16")],
)
def test_bits_do_not_depend_on_the_batch(files: dict[str, Path], name: str, precision: str) -> None:
    recognizer = load(files[name], precision)
    together = recognizer.infer(ITEMS)
    assert recognizer.infer(ITEMS[:0:-1], batch_size=1) == together[:0:-1]
    clips = np.random.default_rng(0).normal(1, 2, (3, 2, 3, 16, 8)).astype(np.float32)
    for alone, batch in zip(recognizer.forward(clips[2:]), recognizer.forward(clips)):
        assert np.array_equal(alone[0], batch[2])


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_a_clip_in_the_kernels_does_not_see_its_neighbours(dtype: torch.dtype) -> None:
    """Convolutions, pooling, attention gates and head: the stems that are Triton alone, at every place of a batch whose
    maps are no multiple of a block of positions."""
    torch.manual_seed(3)
    model = nn.MDSCM(JOINED, backend="triton").eval().to(DEVICE)
    clips = torch.randn(5, 3, 16, 8, device=DEVICE)
    with torch.inference_mode():
        for module in (model.body, model.head):
            for part in module.modules():
                if isinstance(part, (torch.nn.Conv2d, torch.nn.Linear)):
                    part.to(dtype)
        statistics = torch.randn(5, JOINED.statistics_hidden, device=DEVICE).to(dtype)

        def outputs(chosen: slice) -> tuple[torch.Tensor, ...]:
            tokens = model.body(clips[chosen].to(dtype))
            head = (model.head.weight, model.head.bias)
            return tokens, *ops.emotion_head(tokens, *head, pooling="mean_std", statistics=statistics[chosen])

        whole = outputs(slice(None))
        for i in (0, 2, 4):
            for alone, batch in zip(outputs(slice(i, i + 1)), whole):
                assert torch.equal(alone[0], batch[i])


@runs
def test_long_utterances_go_in_parts(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    clips = np.random.default_rng(1).normal(1, 2, (1, 5, 3, 16, 8)).astype(np.float32)
    recognizer = load(files["system, MDSCM body"])
    sizes = []
    network = recognizer._backend._network  # type: ignore[attr-defined]
    monkeypatch.setattr(recognizer._backend, "_network", lambda x: sizes.append(x.shape[1]) or network(x))
    whole = recognizer.forward(clips)
    monkeypatch.setattr(triton_backend, "MOST_CLIPS", 2)
    parts = recognizer.forward(clips)
    assert sizes == [8, 2, 2, 1]
    for a, b in zip(parts, whole):
        assert_close(a, b, 1e-5)


def test_few_shapes() -> None:
    assert [triton_backend.bucket(n) for n in (1, 2, 3, 4, 5, 33, 64)] == [1, 2, 4, 4, 8, 64, 64]
    assert triton_backend.bucket(triton_backend.MOST_CLIPS) == triton_backend.MOST_CLIPS


@runs
def test_threads_share_a_recognizer(files: dict[str, Path]) -> None:
    recognizer = load(files["MDSCM"], "tf32")
    expected = recognizer.infer(ITEMS[:1])
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: recognizer.infer(ITEMS[:1])})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: expected for i in range(3)}


# Graphs


class OnTheCPU:
    """Captures by remembering the function, and replays by running it into the same outputs."""

    def __init__(self) -> None:
        self.captured, self.inside = 0, False

    def capture(self, run: Callable[[], tuple[Any, Any]]) -> tuple[Callable[[], object], tuple[Any, Any]]:
        assert self.inside
        self.captured += 1
        outputs = run()
        return lambda: [old.copy_(new) for old, new in zip(outputs, run())], outputs

    @contextmanager
    def in_order(self) -> Iterator[None]:
        assert not self.inside
        self.inside = True
        yield
        self.inside = False


def test_replays_by_shape() -> None:
    def network(x: Any) -> tuple[Any, Any]:
        return 2.0 * x, x.sum(-1)

    how = OnTheCPU()
    replays = triton_backend.Replays(network, how)
    inputs = [torch.randn(1, n, 3) for n in (2, 4, 2, 4, 2)]
    found = [replays(x) for x in inputs]
    assert how.captured == 2 and not how.inside
    for x, outputs in zip(inputs, found):  # looked at only now: no later replay wrote into an earlier answer
        assert all(torch.equal(a, b) for a, b in zip(outputs, network(x)))


@on_a_gpu
def test_graphs_on_a_gpu(files: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as without, at the first call, at a second one and from another stream; nothing waits meanwhile."""
    for precision in ("float32", "bf16"):
        expected = load(files[name], precision).infer(ITEMS)
        monkeypatch.setenv(triton_backend.GRAPHS, "1")
        recognizer = load(files[name], precision)
        monkeypatch.delenv(triton_backend.GRAPHS)
        assert recognizer.info()["cuda_graphs"]
        assert recognizer.infer(ITEMS) == expected
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert recognizer.infer(ITEMS) == expected
            with torch.cuda.stream(torch.cuda.Stream()):
                assert recognizer.infer(ITEMS[::-1]) == expected[::-1]
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_nothing_waits_but_the_end(files: dict[str, Path], name: str) -> None:
    recognizer = load(files[name])
    expected = recognizer.infer(ITEMS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert recognizer.infer(ITEMS) == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")


# What is chosen, and what is said where nothing can be


def test_the_order_of_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def way(name: str, device: str, why: str | None) -> backends.Way:
        return backends.Way(device, name, lambda _: why, ("float32",), "")

    ways = way("c", "cpu", None), way("first", "cuda", "it is broken"), way("second", "cuda", None)
    monkeypatch.setattr(backends, "WAYS", ways)
    assert backends.choose("cuda:1", "auto").backend == "second" and backends.choose("cpu", "auto").backend == "c"
    with pytest.raises(BackendError, match="^it is broken$"):
        backends.choose("cuda", "first")
    monkeypatch.setattr(backends, "WAYS", (*ways[:2], way("second", "cuda", "it is broken")))
    with pytest.raises(BackendError, match="^it is broken$"):  # once, whoever says it
        backends.choose("cuda", "auto")
    monkeypatch.setattr(backends, "WAYS", (*ways[:2], way("second", "cuda", "no luck")))
    with pytest.raises(BackendError, match="^it is broken; no luck$"):
        backends.choose("cuda", "auto")


def test_what_is_missing_for_a_gpu(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(**arguments: Any) -> str:
        with pytest.raises(BackendError) as found:
            avser_fast.load(files["MDSCM"], **arguments)
        return str(found.value)

    def driver(**found: Any) -> None:
        monkeypatch.setattr(backends, "cuda_driver", lambda: found)

    driver(error="none (libcuda.so.1: no such file)")
    expected = "expected an NVIDIA driver, got none (libcuda.so.1: no such file)"
    for backend in ("auto", "triton"):
        assert refusal(device="cuda", backend=backend) == f"device 'cuda': {expected}"
    driver(driver="13.0", devices=[])
    none = "expected an NVIDIA GPU of this number, but the driver shows 0"
    assert refusal(device="cuda") == f"device 'cuda': {none}"
    driver(driver="13.0", devices=["a", "b"])
    assert refusal(device="cuda:2") == "device 'cuda:2': expected an NVIDIA GPU of this number, but the driver shows 2"
    for package in ("torch", "triton"):
        monkeypatch.setattr(triton_backend, "find_spec", lambda name, package=package: None if name == package else 1)
        expected = f"backend 'triton': expected the package {package}, which is not installed"
        assert refusal(device="cuda:1", backend="triton") == expected
    monkeypatch.undo()
    driver(driver="13.0", devices=["a"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = f"device 'cuda': torch {torch.__version__} finds no usable CUDA GPU"
    assert refusal(device="cuda", backend="triton") == expected
    if not INTERPRETED:
        expected = "backend 'triton': expected device 'cuda' or 'cuda:N', got 'cpu'"
        for device in ("cpu", "auto"):
            assert refusal(device=device, backend="triton") == expected


@runs
def test_bad_choices(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for precision in ("int8", "fp8"):
        words = "precision: expected 'auto', 'float32', 'tf32', 'bf16' or 'fp16' with backend 'triton', got "
        with pytest.raises(BackendError, match=re.escape(words + repr(precision))):
            load(files["MDSCM"], precision)
    long = MDSCM(mel_bands=8, clip_frames=1040, stem=(4,), blocks=(4, 4), attention_reduction=1, encoder_layers=1)
    spec = ModelSpec(front_end=FrontEnd(mel_bands=8), clip_rule=ClipRule("even", None, 1040), network=long)
    write(tmp_path / "long.safetensors", spec)
    with pytest.raises(BackendError, match="temporal_attention: expected at most 128 tokens, got 130"):
        load(tmp_path / "long.safetensors")
    monkeypatch.setenv(triton_backend.GRAPHS, "yes")
    with pytest.raises(BackendError, match="AVSER_FAST_CUDA_GRAPHS: expected 0 or 1, got 'yes'"):
        load(files["MDSCM"])


@runs
def test_auto_precision_follows_the_card(files: dict[str, Path]) -> None:
    good = {"precisions": {"bf16": {"agreement": 0.995, "utterances": 339}}}
    for name, card, expected, words in (
        ("MDSCM", good, "bf16", r"decides as float32 does on 99.5 % of 339 utterances \(measured on a CPU\)"),
        ("MDSCM", {}, "float32", "no measured agreement"),
        ("system, MDSCM body", good, "float32", "a model of kind 'system' is float32 unless asked"),
    ):
        spec, tensors, _, _ = read_any(files[name])
        said = avser_fast.Recognizer(spec, tensors, card, device=DEVICE, backend="triton").info()
        assert said["precision"] == expected and re.search(words, said["precision_reason"]), said


@runs
def test_command_line(files: dict[str, Path], run: Any, tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(PCM[2000:4500].tobytes())
    arguments = ["--model", str(files["MDSCM"]), "--device", DEVICE, "--backend", "triton", "--precision", "bf16"]
    code, out, err = run("infer", "--json", *arguments, str(tmp_path / "a.wav"))
    assert (code, err) == (0, "") and json.loads(out)[0]["backend"] == "triton/bf16"


def test_doctor_says_how_each_way_was_verified() -> None:
    found = info.report()
    way = {way["backend"]: way for way in found["ways"]}
    assert list(way) == ["engine", "cuda", "triton"] and way["engine"]["why_not"] is None
    if not torch.cuda.is_available():
        assert way["triton"]["why_not"].startswith("device 'cuda': ")
    text = info.doctor(found)
    assert "inference on a CPU, backend 'engine': runs" in text
    assert f"inference on a GPU, backend 'triton': {way['triton']['why_not'] or 'runs'}" in text
    if not info.gpu_verified():
        assert "ahead-of-time compiled for sm_80 and sm_90; not on a GPU yet" in text
        assert "on an emulated GPU against the float64 reference; not on a GPU yet" in text


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_interpreted() -> None:
    """Everything above that needs the kernels, on the CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) >= 22, done.stdout[-2000:]
