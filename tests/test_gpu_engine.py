"""The GPU engine on the emulated GPU: every kernel's own source, thread by thread, against the float64 reference."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import emulated
import numpy as np
import pytest
import torch
from test_engine import MEMBERS, assert_outputs, assert_same_bits, random_clips, reference, spec_json

from avser_fast import nn
from avser_fast.config import MDSCM
from avser_fast.errors import BackendError, ConfigError, InputError, ModelError
from avser_fast.inference.weights import random_tensors
from avser_fast.testing import max_error
from benchmarks.macs import mdscm_macs

# Small ones of every kind: widths that fill no tile, three channels, no encoder, a clip of one frame, long scores, the
# statistics path; what was drawn at random; and the statistics path with a voice.
FAMILY = [0, 2, 3, 4, 5, 7, 8, 9, 11, 14, len(MEMBERS) - 1]
PRECISIONS = ("float32", "tf32", "bf16", "fp16", "fp8")
# Teams of blocks that meet, of one block, of a launch per stage; groups that do not divide the clips; maps in memory;
# maps on chip where blocks have one row or none.
SCHEDULES: tuple[dict[str, Any], ...] = (
    {},
    {"team": 1, "group": 4},
    {"team": 3, "staged": True},
    {"team": 2, "group": 2},
    {"team": 8, "through_memory": True},
    {"team": 7 if emulated.on_gpu() else 13, "direct_weights": True},  # clusters of 13 are no GPU's promise
)


@pytest.fixture(autouse=True)
def fresh_device() -> None:
    gpu = emulated.module()
    gpu.set_device()
    gpu.set_order("forward")


def make(network: MDSCM, tensors: dict[str, np.ndarray], **options: Any) -> Any:
    return emulated.module().GpuEngine(spec_json(network), tensors, poison=True, **options)


def case(member: int) -> tuple[MDSCM, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    network = MEMBERS[member]
    clips = random_clips(network, 2, 3, member)
    clips[1, 1] = 0
    clips[0, 0, :, : network.clip_frames // 3] = 0  # padding in front
    return network, random_tensors(network, member), clips, np.array([[True, False, True], [False, True, True]])


@pytest.mark.parametrize("member", FAMILY)
def test_float32_agrees_with_the_reference_under_every_schedule(member: int) -> None:
    network, tensors, clips, valid = case(member)
    expected = reference(network, tensors, clips, valid)
    first = make(network, tensors).forward(clips, valid)
    assert_outputs(first, expected)
    for order, schedule in zip(itertools.cycle(("backward", "shuffled")), SCHEDULES[1:]):
        emulated.module().set_order(order, member)
        assert_same_bits(make(network, tensors, **schedule).forward(clips, valid), first, f"{order} {schedule}")


def test_rows_that_fit_no_registers() -> None:
    """Tokens of 1280 features: a warp reads their rows from memory again and again."""
    network = MDSCM(
        mel_bands=128, clip_frames=7, stem=(4,), blocks=(40,), encoder_layers=1, encoder_heads=4, encoder_ff=8
    )
    assert network.token_width == 1280
    tensors, clips = random_tensors(network, 1), random_clips(network, 1, 2, 1)
    found = make(network, tensors, team=1, group=2).forward(clips)
    assert_outputs(found, reference(network, tensors, clips, None))


@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("member", (0, 2, 7, 9))
def test_other_precisions_err_like_autocast(member: int, precision: str) -> None:
    network, tensors, clips, valid = case(member)
    expected = reference(network, tensors, clips, None)
    module = nn.MDSCM(network).eval()
    module.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        peer = [x.float().numpy() for x in module(torch.from_numpy(clips))]
    # bf16 has 8 bits of mantissa, fp16 and tf32 have 11; 8-bit floats have 4, in the encoder's weights alone.
    allowed = {"bf16": 2.0, "fp16": 0.5, "tf32": 0.5, "fp8": 16.0}[precision]
    found = make(network, tensors, precision=precision).forward(clips)
    for name, a, p, e in zip(("probabilities", "features", "logits"), found, peer, expected):
        scale = np.abs(e).max()
        ours, theirs = (np.sqrt(np.mean((x - e) ** 2)) / scale for x in (a, p))
        assert ours <= allowed * max(theirs, 1e-4), f"{name}: {ours:.2e}, autocast {theirs:.2e}"
    assert_same_bits(make(network, tensors, precision=precision, team=1, group=4).forward(clips), found)


@pytest.mark.skipif(emulated.on_gpu(), reason="a GPU is what it is, and counts nothing")
@pytest.mark.parametrize("order", ("forward", "backward", "shuffled"))
@pytest.mark.parametrize(
    ("member", "precision"), [(0, p) for p in PRECISIONS] + [(2, "bf16"), (2, "fp8"), (3, "float32")]
)
def test_weights_ahead_of_the_stages_or_not(member: int, precision: str, order: str) -> None:
    """Through shared memory, where there is enough and tokens are one row tile, or not: the bits are the same."""
    gpu = emulated.module()
    network, tensors, clips, valid = case(member)
    gpu.set_order(order, member)

    def run(ahead: bool, device: dict[str, int], **schedule: Any) -> Any:
        gpu.set_device(9, 0, **device)
        before = gpu.group_waits()
        found = make(network, tensors, precision=precision, **schedule).forward(clips, valid)
        assert (gpu.group_waits() > before) == ahead
        return found

    expected = run(False, {"shared_bytes": 128 << 10})
    assert_same_bits(run(True, {}), expected)
    # Teams that carry one group after the other.
    assert_same_bits(run(True, {"multiprocessors": 4}, team=2, group=1), expected)
    run(False, {}, team=3, staged=True)
    assert_same_bits(run(False, {}, direct_weights=True), expected)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ("bf16", "float32"))
def test_published_network(precision: str) -> None:
    network = MDSCM()
    tensors, clips = random_tensors(network, 1), random_clips(network, 1, 1)
    expected = reference(network, tensors, clips, None)
    found = make(network, tensors, precision=precision).forward(clips)
    for a, e in zip(found, expected):
        assert max_error(a, e) <= {"float32": 1e-5, "bf16": 5e-3}[precision]


def test_maps_stay_on_chip_where_they_fit() -> None:
    """The published network's for one utterance in 16-bit precisions; in one block's memory, only a small network's."""
    published = MDSCM()
    for precision, team, on_chip in (("bf16", 8, True), ("fp8", 16, True), ("bf16", 1, False), ("float32", 2, False)):
        engine = make(published, random_tensors(published, 0), precision=precision, team=team)
        found = engine.schedule(1, 5)
        assert found["team"] == team and found["through_memory"] is not on_chip, (precision, found)
    network, tensors, *_ = case(0)
    assert make(network, tensors).schedule(1, 5)["through_memory"] is False
    assert make(network, tensors, team=1, group=4).schedule(1, 5)["through_memory"] is False
    for options in ({"team": 3, "staged": True}, {"through_memory": True}):
        assert make(network, tensors, **options).schedule(1, 5)["through_memory"] is True


def test_bits_do_not_depend_on_batch_or_position() -> None:
    network, tensors, clips, valid = case(7)
    engine = make(network, tensors, precision="bf16")
    whole = engine.forward(clips, valid)
    for i in range(2):
        alone = engine.forward(clips[i : i + 1], valid[i : i + 1])
        assert_same_bits(alone, tuple(x[i : i + 1] for x in whole))
    many = engine.forward(np.tile(clips[::-1], (9, 1, 1, 1, 1)), np.tile(valid[::-1], (9, 1)))
    assert_same_bits(tuple(x[-2:][::-1] for x in many), whole)


@pytest.mark.parametrize("capability", ((8, 0), (8, 6), (9, 0)))
def test_devices_choose_different_schedules_and_get_the_same_bits(capability: tuple[int, int]) -> None:
    network, tensors, clips, _ = case(0)
    expected = make(network, tensors).forward(clips)
    shared = {(8, 0): 163 << 10, (8, 6): 99 << 10, (9, 0): 227 << 10}[capability]
    emulated.module().set_device(*capability, multiprocessors=6, shared_bytes=shared)
    assert_same_bits(make(network, tensors).forward(clips), expected)


def test_concurrent_callers_get_the_same_bits() -> None:
    network, tensors, clips, _ = case(3)
    engine = make(network, tensors)
    expected = engine.forward(clips)
    start = threading.Barrier(4)

    def call(_: int) -> Any:
        start.wait()
        return [engine.forward(clips) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, range(4)):
            for each in found:
                assert_same_bits(each, expected)


@pytest.mark.skipif(emulated.on_gpu(), reason="its addresses are the host's; test_gpu_streams.py has the real thing")
def test_addresses_on_the_device_and_a_stream_of_the_caller() -> None:
    network, tensors, clips, valid = case(8)
    engine = make(network, tensors)
    expected = engine.forward(clips, valid)
    found = tuple(np.full_like(x, np.nan) for x in expected)
    votes = valid.astype(np.uint8)
    addresses = [x.ctypes.data for x in (clips, votes, *found)]
    engine.forward_on_device(addresses[0], addresses[1], 2, 3, *addresses[2:], 7)
    assert_same_bits(found, expected)
    engine.forward_on_device(addresses[0], 0, 2, 3, *addresses[2:], 7)
    assert_same_bits(found, engine.forward(clips))


class Steps:
    """Calls of ``run_steps`` on one stream of the caller's, from and to the same arrays."""

    def __init__(self, engine: Any, clips: np.ndarray) -> None:
        self.engine = engine
        self.expected = engine.forward(clips)
        self.found = tuple(np.full_like(x, np.nan) for x in self.expected)
        self.clips = clips

    def __call__(self, begin: int, end: int) -> None:
        addresses = [x.ctypes.data for x in self.found]
        self.engine.run_steps(self.clips.ctypes.data, *self.clips.shape[:2], *addresses, begin, end, 7)


@pytest.mark.skipif(emulated.on_gpu(), reason="its addresses are the host's; test_gpu_streams.py has the real thing")
@pytest.mark.parametrize("member", (0, 7))
@pytest.mark.parametrize("schedule", ({}, {"team": 1}, {"team": 3, "staged": True}), ids=str)
def test_steps_in_pieces_are_one_forward(schedule: dict[str, Any], member: int) -> None:
    network, tensors, clips, _ = case(member)
    run = Steps(make(network, tensors, through_memory=True, **schedule), clips)
    steps = len(run.engine.stages())
    convolutions = len(network.stem) + 2 * len(network.blocks)
    for cuts in ((1, convolutions), (convolutions, steps - 1), (0, steps)):
        for x in run.found:
            x.fill(np.nan)
        for begin, end in zip((0, *cuts), (*cuts, steps)):
            run(begin, end)
        assert_same_bits(run.found, run.expected, str(cuts))
    # What a prefix leaves out is not there, and a launch without steps does nothing.
    for x in run.found:
        x.fill(np.nan)
    run(0, steps - 1)
    run(steps - 1, steps - 1)
    assert all(np.isnan(x).all() for x in run.found)
    run(steps - 1, steps)
    assert_same_bits(run.found, run.expected)


@pytest.mark.skipif(emulated.on_gpu(), reason="its addresses are the host's")
def test_steps_behind_the_convolutions_of_a_group_are_pieces() -> None:
    network, tensors, clips, _ = case(7)
    run = Steps(make(network, tensors, team=2, group=6), clips)
    tokens = len(network.stem) + 2 * len(network.blocks) + 1
    run(0, tokens)
    run(tokens, len(run.engine.stages()))
    assert_same_bits(run.found, run.expected)
    wanted = f"begin: expected 0 or at least {tokens} where maps on chip, or those of a clip at a time, are gone"
    for options in ({"team": 2, "group": 6, "through_memory": True}, {}):
        with pytest.raises(InputError, match=wanted):
            Steps(make(network, tensors, **options), clips)(1, tokens)


@pytest.mark.skipif(emulated.on_gpu(), reason="its addresses are the host's")
def test_steps_that_cannot_be_run_are_refused() -> None:
    network, tensors, clips, _ = case(0)
    run = Steps(make(network, tensors), clips)
    steps = len(run.engine.stages())
    for begin, end in ((-1, 2), (3, 2), (0, steps + 1)):
        wanted = f"begin, end: expected 0 <= begin <= end <= {steps}, got {begin} and {end}"
        with pytest.raises(InputError, match=wanted):
            run(begin, end)
    with pytest.raises(InputError, match="clips: expected at least 1 utterance of 1 clip, got 0 of 3"):
        Steps(run.engine, clips[:0])(0, steps)
    emulated.module().set_device(multiprocessors=2)
    run = Steps(make(network, tensors, team=1, group=2, through_memory=True), clips)
    run(0, steps)
    assert_same_bits(run.found, run.expected)
    with pytest.raises(InputError, match="begin: expected 0 where 2 teams of 2 clips carry 6 in turn, got 1"):
        run(1, steps)


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_stages_count_what_the_network_multiplies(member: int) -> None:
    network = MEMBERS[member]
    stages = make(network, random_tensors(network, member)).stages()
    assert sum(stage["flops"] for stage in stages) == 2 * mdscm_macs(network)
    convolutions = len(network.stem) + 2 * len(network.blocks) + 1
    assert len(stages) == convolutions + 5 * network.encoder_layers + 1


def test_stages_of_the_published_network() -> None:
    network = MDSCM()
    tensors = random_tensors(network, 1)
    found = {p: make(network, tensors, precision=p).stages() for p in ("float32", "bf16", "fp8")}
    names = "conv_stem.0 conv_stem.1 dsc_block.0.first dsc_block.0.second dsc_block.1.first dsc_block.1.second".split()
    layers = [f"encoder.{i}.{part}" for i in range(2) for part in ("qkv", "attention", "out", "ff1", "ff2")]
    for stages in found.values():
        assert [stage["name"] for stage in stages] == [*names, "cs_attention", *layers, "emotion_head"]
        assert sum(stage["flops"] for stage in stages) == 2 * mdscm_macs(network)
    by_name = {p: {stage["name"]: stage for stage in stages} for p, stages in found.items()}
    # 14 tokens of 768 features, a hidden layer of 512; a clip of 224 frames and 40 bands.
    attention = {"flops": 4 * 14 * 14 * 768, "weight_bytes": 0, "read_bytes": 6 * 14 * 768, "write_bytes": 2 * 14 * 768}
    assert by_name["bf16"]["encoder.1.attention"] == {"name": "encoder.1.attention", **attention}
    first, out = by_name["bf16"]["conv_stem.0"], by_name["bf16"]["encoder.0.out"]
    assert first["read_bytes"] == 4 * 224 * 40 and first["write_bytes"] == 2 * 112 * 20 * 32
    assert first["weight_bytes"] == 4 * 32 * (9 + 1)
    assert out["read_bytes"] == (2 + 4) * 14 * 768 and out["write_bytes"] == 4 * 14 * 768
    weights = {p: stages["encoder.0.ff1"]["weight_bytes"] - 4 * 2 * 768 for p, stages in by_name.items()}
    assert weights == {p: 512 * (768 * e + 4 + 4 * (e == 1)) for p, e in (("float32", 4), ("bf16", 2), ("fp8", 1))}


def test_only_valid_clips_vote_and_no_vote_is_nan() -> None:
    network, tensors, clips, valid = case(8)
    engine = make(network, tensors)
    probabilities, _, logits = engine.forward(clips, np.array([[True, False, True], [False, False, False]]))
    mean = logits[0, [0, 2]].astype(np.float64).mean(0)
    weights = np.exp(mean - mean.max())
    np.testing.assert_allclose(probabilities[0], weights / weights.sum(), rtol=1e-5)
    assert np.isnan(probabilities[1]).all()
    assert np.isnan(engine.forward(clips[:, :0])[0]).all()
    assert engine.forward(clips[:0])[0].shape == (0, network.classes)


@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_values_that_are_not_finite_are_seen(value: float) -> None:
    network, tensors, clips, _ = case(0)
    clips[0, 1, 0, 17, 5] = value
    _, features, _ = make(network, tensors, precision="bf16").forward(clips)
    assert np.isnan(features[0, 1]).any()
    assert np.isfinite(features[[0, 0, 1], [0, 2, 0]]).all()


def test_faults_are_named() -> None:
    network, tensors, clips, _ = case(0)
    gpu = emulated.module()
    engine = make(network, tensors)
    with pytest.raises(InputError, match=r"clips: expected shape \(B, L, 1, 40, 24\), got \(2, 3, 1, 40, 23\)"):
        engine.forward(clips[..., :23])
    with pytest.raises(ConfigError, match="precision: expected one of float32, tf32, bf16, fp16 and fp8 on a GPU"):
        make(network, tensors, precision="int8")
    with pytest.raises(ModelError, match="head.bias: expected a tensor of shape"):
        make(network, {k: v for k, v in tensors.items() if k != "head.bias"})
    with pytest.raises(BackendError, match="expected a GPU from 0 to 0, got 1"):
        make(network, tensors, device=1)
    gpu.set_device(7, 5)
    with pytest.raises(BackendError, match=r"capability 8\.0 or newer, got emulated GPU \(7\.5\)"):
        make(network, tensors)
    gpu.set_device(8, 0)
    with pytest.raises(BackendError, match=r"fp8: expected a GPU of compute capability 8\.9 or newer"):
        make(network, tensors, precision="fp8")
    gpu.set_device(9, 0, shared_bytes=4096)
    with pytest.raises(BackendError, match="bytes of shared memory are needed in precision float32"):
        make(network, tensors)
