"""The GPU benchmarks without a GPU: what they keep, and what a failure leaves of their results."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from benchmarks import gpu_parts


@pytest.fixture
def stand_in_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU benchmarks use of torch.cuda, doing nothing: streams, events, graphs that replay nothing."""
    for name in ("Stream", "Event", "CUDAGraph", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: MagicMock(elapsed_time=lambda _: 1.0))
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_parts, "device", lambda: {"gpu": "none"})


@pytest.mark.usefixtures("stand_in_gpu")
def test_a_captured_run_lives_as_long_as_its_graph() -> None:
    """A graph reads and writes the memory of what was captured, and does not keep it."""

    class Run:
        def __call__(self) -> torch.Tensor:
            return torch.ones(1)

    run = Run()
    alive = weakref.ref(run)
    made, output = gpu_parts.graph(run)
    del run, output
    gc.collect()
    assert alive() is not None
    del made
    gc.collect()
    assert alive() is None


@pytest.mark.usefixtures("stand_in_gpu")
def test_parts_on_a_gpu_are_kept_one_by_one(tmp_path: Path) -> None:
    def times(value: float, wrong: float) -> dict[str, Any]:
        made = {"avser_fast": value, "torch": 1.0, "avser_fast, odd": wrong}
        makers = {name: (lambda v=v: gpu_parts.graph(lambda: torch.full((2,), v)), 0.1) for name, v in made.items()}
        return gpu_parts.timed(makers, np.ones(2))

    def lost() -> dict[str, Any]:
        raise RuntimeError("CUDA: the work on the GPU failed")

    parts = {"good": lambda: times(1.0, 1.05), "lost": lost, "wrong": lambda: times(2.0, 1.0)}
    code = [
        gpu_parts.run_parts("gpu-x", parts, lambda found: {"parts": [*found]}, [str(tmp_path), *chosen])
        for chosen in (["good"], ["lost", "wrong"], ["other"])
    ]
    assert code == [0, 1, 2]
    found = json.loads((tmp_path / "gpu-x.json").read_text())
    assert found["device"] == {"gpu": "none"} and "good" in found["goals"]["parts"]
    assert found["failed"] == {"lost": "RuntimeError: CUDA: the work on the GPU failed"}
    assert found["good"]["failed"] == {} and found["good"]["times"]["torch"] == {"median_ms": 0.1, "min_ms": 0.1}
    assert list(found["wrong"]["failed"]) == ["avser_fast"] and list(found["wrong"]["times"]) == [
        "torch",
        "avser_fast, odd",
    ]
