"""The GPU benchmarks without a GPU: what they keep, and what a failure leaves of their results."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import emulated
import numpy as np
import pytest
import torch
from test_engine import MEMBERS, random_clips, spec_json

from avser_fast.config import MDSCM
from avser_fast.inference.weights import random_tensors
from benchmarks import gpu_engine, gpu_parts, gpu_stages, render
from benchmarks.macs import mdscm_macs


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


STAGES = [
    {"name": "first", "flops": 2_000_000, "weight_bytes": 1000, "read_bytes": 30_000, "write_bytes": 20_000},
    {"name": "second", "flops": 0, "weight_bytes": 0, "read_bytes": 100, "write_bytes": 0},
]


def test_a_stage_is_what_its_steps_add() -> None:
    """Differences of the smallest times; what repetitions cannot tell from nothing has no rate."""
    found = gpu_stages.rows(STAGES, 5, [[0.003, 0.002], [0.014, 0.012], [0.011, 0.015]])
    gpu_stages.set_shares(found, {"bf16_tflops": 500.0, "copy_gbps": 2510.0})
    launch, first, second, whole = found
    assert [own["stage"] for own in found] == [gpu_stages.LAUNCH, "first", "second", gpu_stages.WHOLE]
    assert [own["us"] for own in found] == pytest.approx([2.0, 10.0, -1.0, 11.0])
    assert [own["resolution_us"] for own in found] == pytest.approx([1.0, 3.0, 6.0, 4.0])
    assert sum(own["us"] for own in found[:-1]) == pytest.approx(whole["us"])
    assert [own["flops"] for own in found] == [0, 10_000_000, 0, 10_000_000]
    assert [own["bytes"] for own in found] == [0, 251_000, 500, 251_500]
    assert first["tflops"] == pytest.approx(1.0) and first["gbps"] == pytest.approx(25.1)
    assert first["of_product"] == pytest.approx(0.002) and first["of_copy"] == pytest.approx(0.01)
    assert {own[key] for own in (launch, second) for key in ("tflops", "gbps", "of_product", "of_copy")} == {None}
    with pytest.raises(ValueError, match="times: expected 3, one more than stages, got 2"):
        gpu_stages.rows(STAGES, 5, [[1.0], [2.0]])


class StandIn:
    """Of ``OnDevice``, what the stages' part uses; the whole leaves a right answer, what is shorter leaves none."""

    def __init__(self, network: Any, tensors: Any, clips: torch.Tensor, **options: Any) -> None:
        assert options == {"precision": "bf16"}
        self.engine = MagicMock(stages=lambda: STAGES)
        self.output = torch.full((clips.shape[0], 4), float("nan"))
        self.calls: list[tuple[int, int]] = []

    def first_steps(self, end: int, calls: int) -> torch.Tensor:
        self.calls.append((end, calls))
        if end == len(STAGES):
            self.output.fill_(0.25)
        return self.output


@pytest.mark.usefixtures("stand_in_gpu")
def test_the_stages_part_and_the_ceilings_share_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repetition = iter(range(gpu_engine.REPETITIONS * 2))

    def interleaved(runs: dict[str, Any]) -> dict[str, dict[str, float]]:
        late = 0.004 * (next(repetition) % gpu_engine.REPETITIONS == 0)
        return {end: {"median_ms": 9.0, "min_ms": late + 0.04 * int(end)} for end in runs}

    monkeypatch.setattr(gpu_engine, "OnDevice", StandIn)
    monkeypatch.setattr(gpu_engine, "interleaved", interleaved)
    monkeypatch.setattr(gpu_engine, "CALLS_OF_GRAPH", {gpu_engine.ONE: 4, gpu_engine.MANY: 1})
    monkeypatch.setattr(gpu_engine, "tensors", dict)
    monkeypatch.setattr(gpu_engine, "case", lambda n: (torch.zeros(n, 5, 1, 8, 8), np.full((n, 4), 0.25)))
    ceilings = {"bf16_tflops": 100.0, "copy_gbps": 1000.0}
    parts = {**gpu_engine.PARTS, "ceilings": lambda: ceilings}

    def run(*chosen: str) -> dict[str, Any]:
        arguments = [str(tmp_path), *chosen]
        assert gpu_parts.run_parts("gpu-engine", parts, gpu_engine.goals, arguments, gpu_engine.set_shares) == 0
        content: dict[str, Any] = json.loads((tmp_path / "gpu-engine.json").read_text())
        return content

    alone = run("stages-1")["stages-1"]
    assert alone["clips"] == 5 and alone["calls_of_graph"] == 4
    # Four calls in a graph: a step more takes a fourth of 0.04 ms.
    assert [own["us"] for own in alone["rows"]] == pytest.approx([0.0, 10.0, 10.0, 20.0])
    assert [own["resolution_us"] for own in alone["rows"]] == pytest.approx([1.0, 2.0, 2.0, 1.0])
    assert alone["rows"][1]["tflops"] == pytest.approx(1.0) and alone["rows"][0]["tflops"] is None
    assert {own[share] for own in alone["rows"] for share in ("of_product", "of_copy")} == {None}
    both = run("ceilings", "stages-205")
    assert [both[part]["rows"][1]["of_product"] for part in ("stages-1", "stages-205")] == pytest.approx([0.01, 0.5125])
    # Rendered: what was measured, and nothing before that.
    assert gpu_stages.text({}) == ""
    page = gpu_stages.text(both)
    assert "in bf16, none." in page and "1025 clips:" in page
    assert "| first | 10.00 | 2.00 | 10 | 0.251 | 1 | 1.0 % | 25.1 | 2.5 % |" in page
    assert "| a launch without stages | 0.00 | 1.00 | 0 | 0 |  |  |  |  |" in page
    monkeypatch.setattr(render, "goals_table", lambda tables: "")
    table = MagicMock(rows=[], missing={}, facts={}, case="a case", share=lambda: None)
    monkeypatch.setattr(render, "read", lambda folder: ([table], {"gpu-engine": both}))
    assert page in render.details() and page.endswith("|\n")


@pytest.fixture
def on_emulated_gpu(stand_in_gpu: None, monkeypatch: pytest.MonkeyPatch) -> MDSCM:
    """The engine's benchmark on a small network, one utterance of 5 clips in every case."""
    network = MEMBERS[3]
    values, clips = random_tensors(network, 3), random_clips(network, 1, 5, 3)
    emulated.module().set_device()
    gpu = emulated.OnEmulatedGpu()
    expected = gpu.GpuEngine(spec_json(network), values, precision="bf16").forward(clips)[0]
    monkeypatch.setattr(gpu_engine, "_engine", gpu)
    monkeypatch.setattr(gpu_engine, "NETWORK", network)
    monkeypatch.setattr(gpu_engine, "tensors", lambda: values)
    monkeypatch.setattr(gpu_engine, "case", lambda n: (torch.from_numpy(clips), expected))
    monkeypatch.setattr(gpu_engine, "MANY", 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: MagicMock(cuda_stream=7))
    return network


def test_blocks_beside_pytorch(on_emulated_gpu: MDSCM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    found = gpu_engine.measure_blocks()
    assert [*found] == [f"dsc_block.{i}" for i in range(len(on_emulated_gpu.blocks))]
    for own in found.values():
        assert [*own["min_ms"]] == [gpu_parts.OURS, gpu_engine.CUDNN, gpu_engine.INDUCTOR] and not own["failed"]
    names = ("depthwise and pointwise block over cuDNN", "depthwise and pointwise block over Inductor")
    times = {gpu_parts.OURS: 1.0, gpu_engine.CUDNN: 4.0, gpu_engine.INDUCTOR: 3.0}
    goals = gpu_engine.goals({"blocks": {"a": {"min_ms": times}, "b": {"min_ms": {**times, gpu_engine.CUDNN: 2.0}}}})
    assert [goals[name]["measured"] for name in names] == [2.0, 3.0]
    assert gpu_engine.goals({})[names[0]]["measured"] is None


def test_pytorch_computes_the_same_network(on_emulated_gpu: MDSCM) -> None:
    clips, _ = gpu_engine.case(1)
    exact = gpu_engine.module()(clips).probabilities
    with torch.autocast("cuda", enabled=False):
        found = gpu_engine.peer(clips, half=True)()
    np.testing.assert_allclose(found.numpy(), exact.detach().numpy(), atol=gpu_engine.PRECISIONS["bf16"])


def test_the_stages_part_runs_the_engine(on_emulated_gpu: MDSCM) -> None:
    network = on_emulated_gpu
    found = gpu_engine.measure_stages(1)["rows"]
    layer = [f"encoder.0.{part}" for part in ("qkv", "attention", "out", "ff1", "ff2")]
    names = ["conv_stem.0", "dsc_block.0.first", "dsc_block.0.second", "cs_attention", *layer, "emotion_head"]
    assert [own["stage"] for own in found] == [gpu_stages.LAUNCH, *names, gpu_stages.WHOLE]
    assert found[-1]["flops"] == 5 * 2 * mdscm_macs(network)


@pytest.mark.usefixtures("stand_in_gpu")
def test_stages_of_a_wrong_answer_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_engine, "OnDevice", StandIn)
    monkeypatch.setattr(gpu_engine, "tensors", dict)
    monkeypatch.setattr(gpu_engine, "case", lambda n: (torch.zeros(n, 5, 1, 8, 8), np.full((n, 4), 0.5)))
    with pytest.raises(AssertionError, match=gpu_parts.OURS):
        gpu_engine.measure_stages(1)
