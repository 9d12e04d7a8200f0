"""Models of every kind through the CUDA backend, on the emulated GPU; what it says where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emulated
import numpy as np
import pytest
from test_triton_backend import ITEMS, SPECS, write

import avser_fast
from avser_fast import _engine, info
from avser_fast.errors import BackendError
from avser_fast.inference import cuda_backend, features


class OnEmulatedGpu:
    """The engine's module as it is where a GPU is, with the emulated one's classes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(emulated.module() if name.lower().startswith("gpu") else _engine, name)

    def build_info(self) -> dict[str, Any]:
        return {**_engine.build_info(), "cuda": True, "cuda_reason": ""}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    emulated.module().set_device()
    emulated.module().set_order("forward")
    monkeypatch.setattr(features, "engine_module", OnEmulatedGpu)
    monkeypatch.setattr(cuda_backend, "why_no_gpu", lambda device: None)
    return emulated.module()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", SPECS)
def test_every_kind_agrees_with_the_engine(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, SPECS[kind])
    expected = avser_fast.load(path, precision="float32").infer(ITEMS)
    recognizer = avser_fast.load(path, device="cuda", precision="float32")
    assert recognizer.info()["backend"] == "cuda" and recognizer.info()["gpu"] == emulated.module().gpu_info()["name"]
    found = recognizer.infer(ITEMS)
    for one, other in zip(found, expected):
        assert one.backend == "cuda" and one.label == other.label
        np.testing.assert_allclose(list(one.scores.values()), list(other.scores.values()), rtol=2e-5)
    assert recognizer.infer(ITEMS[1:2]) == found[1:2]
    for one, other in zip(recognizer.embed(ITEMS), avser_fast.load(path, precision="float32").embed(ITEMS)):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.usefixtures("gpu")
def test_precisions_are_those_of_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, SPECS["MDSCM"])
    reference = avser_fast.load(path, precision="float32").infer(ITEMS)
    for precision in ("tf32", "bf16", "fp16", "fp8"):
        for one, other in zip(avser_fast.load(path, device="cuda:0", precision=precision).infer(ITEMS), reference):
            assert one.backend == f"cuda/{precision}"
            assert abs(one.scores[other.label] - other.score) < 0.05
    with pytest.raises(BackendError, match=r"precision: expected 'auto', 'float32', 'tf32', .* with backend 'cuda'"):
        avser_fast.load(path, device="cuda", precision="int8")


def test_an_old_gpu_and_one_that_is_not_there_are_named(gpu: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, SPECS["MDSCM"])
    with pytest.raises(BackendError, match="backend 'cuda': CUDA: expected a GPU from 0 to 0, got 3"):
        avser_fast.load(path, device="cuda:3", backend="cuda")
    gpu.set_device(7, 5)
    with pytest.raises(BackendError, match=r"expected compute capability 8\.0 or newer, got emulated GPU \(7\.5\)"):
        avser_fast.load(path, device="cuda", backend="cuda")


def test_a_build_without_the_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(OnEmulatedGpu):
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
