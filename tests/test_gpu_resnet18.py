"""ResNet-18 on the emulated GPU against the float64 module."""

from __future__ import annotations

from typing import Any

import emulated
import numpy as np
import pytest
import torch
from test_avre_engine import arrays_of, assert_outputs, random_avre, random_clips, same_bits, truth

from avser_fast.errors import ConfigError, InputError, ModelError
from benchmarks.macs import resnet18_macs

SCHEDULES: tuple[dict[str, Any], ...] = ({"team": 1, "group": 2}, {"team": 3, "staged": True}, {"team": 2, "group": 3})


@pytest.fixture(autouse=True)
def fresh_device() -> None:
    emulated.module().set_device()
    emulated.module().set_order("forward")


def make(tensors: dict[str, np.ndarray], clips: np.ndarray, **options: Any) -> Any:
    return emulated.module().GpuResNet18(
        tensors, in_channels=clips.shape[2], height=clips.shape[3], width=clips.shape[4], poison=True, **options
    )


@pytest.mark.parametrize("shape", [(1, 2, 3, 1, 1), (2, 1, 1, 24, 40)])
def test_float32_agrees_with_the_module(shape: tuple[int, ...]) -> None:
    module, clips = random_avre(in_channels=shape[2]), random_clips(*shape)
    assert_outputs(make(arrays_of(module), clips).forward(clips), truth(module, clips), 1e-5)


def test_every_schedule_gives_the_same_bits() -> None:
    module, clips = random_avre(), random_clips(1, 3, 1, 17, 9)
    tensors = arrays_of(module)
    first = make(tensors, clips).forward(clips)
    assert_outputs(first, truth(module, clips), 1e-5)
    for order, schedule in zip(("backward", "shuffled", "shuffled"), SCHEDULES):
        emulated.module().set_order(order, 5)
        assert same_bits(make(tensors, clips, **schedule).forward(clips), first), f"{order} {schedule}"


def test_stages_count_what_the_network_multiplies() -> None:
    tensors = arrays_of(random_avre())
    for frames, bands in ((224, 40), (97, 33)):
        stages = make(tensors, np.zeros((1, 1, 1, frames, bands), np.float32)).stages()
        assert sum(stage["flops"] for stage in stages) == 2 * resnet18_macs(frames, bands)
    names = [stage["name"] for stage in stages]
    assert names[:4] == ["conv", "pool", "blocks.0.conv1", "blocks.0.conv2"] and names[-1] == "emotion_head"
    assert [name for name in names if "downsample" in name] == [f"blocks.{i}.downsample" for i in (2, 4, 6)]


@pytest.mark.skipif(emulated.on_gpu(), reason="its addresses are the host's")
@pytest.mark.parametrize("schedule", ({}, {"team": 2, "group": 3}, {"team": 3, "staged": True}), ids=str)
def test_steps_in_pieces_are_one_forward(schedule: dict[str, Any]) -> None:
    module, clips = random_avre(), random_clips(1, 3, 1, 17, 9)
    engine = make(arrays_of(module), clips, **schedule)
    expected = engine.forward(clips)
    found = tuple(np.full_like(x, np.nan) for x in expected)
    cuts = (0, 1, 7, len(engine.stages()))
    for begin, end in zip(cuts, cuts[1:]):
        engine.run_steps(clips.ctypes.data, 1, 3, *(x.ctypes.data for x in found), begin, end, 7)
    assert same_bits(found, expected)


@pytest.mark.parametrize(("precision", "allowed"), [("bf16", 2.0), ("fp16", 0.5), ("tf32", 0.5)])
def test_other_precisions_err_like_autocast(precision: str, allowed: float) -> None:
    module, clips = random_avre(), random_clips(1, 2, 1, 40, 24)
    expected = truth(module, clips)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        out = module(torch.from_numpy(clips))
    peer = [x.float().numpy() for x in (out.logits.softmax(-1), out.features, out.clip_logits)]
    found = make(arrays_of(module), clips, precision=precision).forward(clips)
    for a, p, e in zip(found, peer, expected):
        ours, theirs = (np.sqrt(np.mean((x - e) ** 2)) for x in (a, p))
        assert ours <= allowed * theirs


@pytest.mark.slow
def test_published_clip() -> None:
    module, clips = random_avre(), random_clips(1, 1, 1, 224, 40)
    assert_outputs(make(arrays_of(module), clips).forward(clips), truth(module, clips), 1e-5)


def test_faults_are_named() -> None:
    module, clips = random_avre(), random_clips(1, 1, 1, 8, 8)
    tensors = arrays_of(module)
    with pytest.raises(ConfigError, match="precision: expected float32, tf32, bf16 or fp16, which this encoder has"):
        make(tensors, clips, precision="fp8")
    with pytest.raises(ModelError, match="body.conv.weight: expected shape"):
        make({**tensors, "body.conv.weight": tensors["body.conv.weight"][:8]}, clips)
    with pytest.raises(InputError, match=r"clips: expected shape \(B, L, 1, 8, 8\), got \(1, 1, 1, 8, 7\)"):
        make(tensors, clips).forward(clips[..., :7])
