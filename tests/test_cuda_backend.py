"""Models of every kind through the CUDA backend, on the emulated GPU; what it says where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated
import numpy as np
import pytest
import torch
from test_triton_backend import ITEMS, SPECS, write

import avser_fast
from avser_fast import _engine, info
from avser_fast.errors import BackendError, InputError
from avser_fast.inference import cuda_backend, features


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    emulated.module().set_device()
    emulated.module().set_order("forward")
    monkeypatch.setattr(features, "engine_module", emulated.OnEmulatedGpu)
    monkeypatch.setattr(cuda_backend, "why_no_gpu", lambda device: None)
    return emulated.module()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", SPECS)
def test_every_kind_agrees_with_the_engine(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, SPECS[kind])
    items = ITEMS[:1] if "ResNet" in kind else ITEMS  # emulated, a ResNet takes a second per clip
    expected = avser_fast.load(path, precision="float32").infer(items)
    recognizer = avser_fast.load(path, device="cuda", precision="float32")
    assert recognizer.info()["backend"] == "cuda" and recognizer.info()["gpu"] == emulated.module().gpu_info()["name"]
    found = recognizer.infer(items)
    for one, other in zip(found, expected):
        assert one.backend == "cuda" and one.label == other.label
        np.testing.assert_allclose(list(one.scores.values()), list(other.scores.values()), rtol=2e-5)
    assert recognizer.infer(items[1:2]) == found[1:2]
    for one, other in zip(recognizer.embed(items), avser_fast.load(path, precision="float32").embed(items)):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.skipif(emulated.on_gpu(), reason="its tensors are the host's; test_gpu_streams.py has the real thing")
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", [kind for kind in SPECS if "ResNet" not in kind])
def test_tensors_in_the_gpus_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend.Cuda, "holds", lambda self, tensor: isinstance(tensor, torch.Tensor))
    monkeypatch.setattr(cuda_backend.Cuda, "_stream", lambda self, tensor: 0)
    path = tmp_path / "model.safetensors"
    write(path, SPECS[kind])
    recognizer = avser_fast.load(path, device="cuda", precision="float32")
    waves = np.random.default_rng(0).integers(-9000, 9000, (2, 3201)).astype(np.int16)
    expected = avser_fast.load(path, precision="float32").forward_samples(waves)
    on_host = recognizer.forward_samples(waves)
    held = torch.from_numpy(np.pad(waves, ((0, 0), (0, 7))))[:, :3201]
    for samples in (held, held.float()):
        found = recognizer.forward_samples(samples)
        for a, b, e in zip(found, on_host, expected):
            assert isinstance(a, torch.Tensor) and a.shape == b.shape == e.shape
            np.testing.assert_allclose(a, e, atol=1e-5 * np.abs(e).max())
            np.testing.assert_allclose(b, e, atol=1e-5 * np.abs(e).max())
    spec = recognizer.spec
    shape = (2, 3, spec.front_end.channels, spec.clip_rule.clip_frames, spec.front_end.mel_bands)
    clips = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    valid = np.array([[True, False, True], [True, True, False]])
    for votes in (None, valid):
        for a, e in zip(recognizer.forward(torch.from_numpy(clips), votes), recognizer.forward(clips, votes)):
            np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6)
    assert [tuple(x.shape) for x in recognizer.forward(torch.zeros((0, *shape[1:])))] == [
        (0, len(spec.labels)), (0, 3, spec.features), (0, 3, len(spec.labels)),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"forward_samples: samples: expected .* \(B, n\), got float64 \(2, 3201\)"):
        recognizer.forward_samples(held.double())


@pytest.mark.usefixtures("gpu")
def test_precisions_are_those_of_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, SPECS["MDSCM"])
    reference = avser_fast.load(path, precision="float32").infer(ITEMS)
    for precision in ("tf32", "bf16", "fp16", "fp8"):
        for one, other in zip(avser_fast.load(path, device="cuda:0", precision=precision).infer(ITEMS), reference):
            assert one.backend == f"cuda/{precision}"
            assert abs(one.scores[other.label] - other.score) < 0.05
    with pytest.raises(
        BackendError, match="threads: expected None with backend 'cuda', whose work is the GPU's, got 2"
    ):
        avser_fast.load(path, device="cuda", threads=2)
    with pytest.raises(BackendError, match=r"precision: expected 'auto', 'float32', 'tf32', .* with backend 'cuda'"):
        avser_fast.load(path, device="cuda", precision="int8")


@pytest.mark.usefixtures("gpu")
def test_a_tensor_of_another_gpu_is_named() -> None:
    model = avser_fast.load("default", device="cuda", precision="float32")
    with pytest.raises(InputError, match="tensor: expected one on cuda:0 or on the CPU, got one on cuda:1"):
        model._backend.holds(SimpleNamespace(is_cuda=True, device="cuda:1"))  # type: ignore[attr-defined]


def test_an_old_gpu_and_one_that_is_not_there_are_named(gpu: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, SPECS["MDSCM"])
    with pytest.raises(BackendError, match="backend 'cuda': CUDA: expected a GPU from 0 to 0, got 3"):
        avser_fast.load(path, device="cuda:3", backend="cuda")
    gpu.set_device(7, 5)
    with pytest.raises(BackendError, match=r"expected compute capability 8\.0 or newer, got emulated GPU \(7\.5\)"):
        avser_fast.load(path, device="cuda", backend="cuda")


def test_a_build_without_the_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(emulated.OnEmulatedGpu):
        def build_info(self) -> dict[str, Any]:
            return {**_engine.build_info(), "cuda": False, "cuda_reason": "no nvcc"}

    monkeypatch.setattr(cuda_backend, "why_no_gpu", lambda device: None)
    monkeypatch.setattr(features, "engine_module", Plain)
    with pytest.raises(BackendError, match=r"^backend 'cuda': the CUDA kernels .* this build \(no nvcc\)$"):
        avser_fast.load("default", device="cuda", backend="cuda")


@pytest.mark.skipif("driver" in info.cuda_driver(), reason="there is a driver")
def test_without_a_driver_one_sentence_says_so() -> None:
    for backend in ("cuda", "auto"):
        with pytest.raises(BackendError, match="^device 'cuda': expected an NVIDIA driver, got none") as raised:
            avser_fast.load("default", device="cuda", backend=backend)
        assert "\n" not in str(raised.value) and ";" not in str(raised.value)


@pytest.mark.skipif(not _engine.build_info()["cuda"] or "driver" in info.cuda_driver(), reason="no CUDA, or a driver")
def test_the_module_itself_imports_without_a_driver_and_says_so() -> None:
    with pytest.raises(BackendError, match="^CUDA: expected an NVIDIA driver, found none on this machine$"):
        _engine.gpu_info()
