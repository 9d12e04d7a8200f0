"""The torch-free Engine against the float64 reference over the family, on every instruction set of this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import golden
import numpy as np
import pytest
import torch

from avser_fast import _engine, nn
from avser_fast.av4ser import load_av4ser
from avser_fast.config import MDSCM
from avser_fast.errors import ConfigError, InputError, ModelError
from avser_fast.inference.weights import random_tensors
from avser_fast.testing import assert_close, max_error

OUTPUTS = ("probabilities", "features", "clip_logits")
Tensors = dict[str, np.ndarray]
SMALL = MDSCM(mel_bands=24, clip_frames=40, stem=(5, 9), blocks=(12, 18), attention_reduction=4, encoder_layers=1)


def random_member(seed: int) -> MDSCM:
    """Widths below, at and above whole vectors, anything that the family admits; cheap enough for float64."""
    r = np.random.default_rng(seed)

    def widths(least: int, most: int) -> tuple[int, ...]:
        return tuple(int(w) for w in r.choice([3, 5, 8, 16, 17, 32, 33, 40], r.integers(least, most + 1)))

    stem, blocks, bands = widths(1, 3), widths(1, 3), int(r.choice([40, 80, 128]))
    common = MDSCM(mel_bands=bands, stem=stem, blocks=blocks, encoder_layers=0, attention_reduction=1)
    divisors = [h for h in range(1, 9) if common.token_width % h == 0]
    return dataclasses.replace(
        common,
        in_channels=int(r.choice([1, 3])),
        clip_frames=int(r.integers(32, 225)),
        classes=int(r.integers(1, 8)),
        spatial_attention=bool(r.integers(2)),
        channel_attention=bool(r.integers(2)),
        attention_reduction=int(r.integers(1, blocks[-1] + 1)),
        encoder_layers=int(r.integers(3)) if common.token_width <= 320 else 0,
        encoder_heads=int(r.choice(divisors)),
        encoder_ff=int(r.choice([1, 19, 64])),
        pooling=str(r.choice(["mean", "mean_std"])),
    )


MEMBERS = [
    SMALL,
    MDSCM(stem=(16, 32), blocks=(64, 128), encoder_layers=0, pooling="mean_std"),
    MDSCM(mel_bands=80, in_channels=3, clip_frames=97, stem=(4, 7), blocks=(33, 20), encoder_heads=5, encoder_ff=70),
    MDSCM(1, 1, 1, 2, (3,), (20,), attention_reduction=3, encoder_layers=1, encoder_heads=1, encoder_ff=5),
    MDSCM(2, 1, 2, 1, (17,), (3, 16), attention_reduction=1, encoder_layers=0),
    MDSCM(mel_bands=5, clip_frames=600, stem=(8,), blocks=(8,), attention_reduction=2, encoder_layers=1),  # long scores
    MDSCM(
        in_channels=3, clip_frames=320, stem=(16, 32), blocks=(64,), encoder_layers=0, pooling="mean_std", statistics=25
    ),
    MDSCM(
        mel_bands=24,
        in_channels=2,
        clip_frames=50,
        stem=(5, 9),
        blocks=(17,),
        attention_reduction=2,
        encoder_layers=1,
        encoder_heads=1,
        statistics=16,
        statistics_hidden=70,
    ),
    MDSCM(
        mel_bands=3,
        clip_frames=7,
        stem=(5,),
        blocks=(7,),
        attention_reduction=2,
        encoder_layers=0,
        statistics=1,
        statistics_hidden=1,
    ),
    # Tokens wide enough for products by halves, an even and an odd number of them; rows enough for workers of their own.
    *(
        MDSCM(
            mel_bands=128,
            clip_frames=frames,
            stem=(4,),
            blocks=(32,),
            attention_reduction=2,
            encoder_layers=1,
            encoder_ff=256,
        )
        for frames in (48, 52)
    ),
    *(random_member(seed) for seed in range(30)),
]


class Case(NamedTuple):
    network: MDSCM
    tensors: Tensors
    clips: np.ndarray
    valid: np.ndarray
    expected: tuple[np.ndarray, ...]


def spec_json(network: MDSCM) -> str:
    return json.dumps({"network": dataclasses.asdict(network)})


def make_engine(network: MDSCM, tensors: Tensors, **options: str) -> Any:
    return _engine.Engine(spec_json(network), tensors, poison=True, **options)


def random_clips(network: MDSCM, batch: int, count: int, seed: int = 0) -> np.ndarray:
    shape = (batch, count, network.in_channels, network.clip_frames, network.mel_bands)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference(network: MDSCM, tensors: Tensors, clips: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, ...]:
    module = nn.MDSCM(network).double().eval()
    module.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)
    with torch.inference_mode():
        out = module(torch.from_numpy(clips).double(), None if valid is None else torch.from_numpy(valid))
    return tuple(t.numpy() for t in out)


def assert_outputs(actual: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...], what: str = "") -> None:
    for name, a, e in zip(OUTPUTS, actual, expected, strict=True):
        assert a.dtype == np.float32
        assert_close(a, e, 1e-5, f"{what} {name}")


def assert_same_bits(actual: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...], what: str = "") -> None:
    for name, a, e in zip(OUTPUTS, actual, expected, strict=True):
        assert a.shape == e.shape and a.tobytes() == e.tobytes(), f"{what} {name}"


@pytest.fixture(scope="module")
def family() -> list[Case]:
    cases = []
    for seed, network in enumerate(MEMBERS):
        tensors, clips = random_tensors(network, seed), random_clips(network, 2, 3, seed)
        clips[1, 1] = 0
        clips[0, 0, :, : network.clip_frames // 3] = 0  # padding in front
        valid = np.array([[True, False, True], [False, True, True]])
        cases.append(Case(network, tensors, clips, valid, reference(network, tensors, clips, valid)))
    return cases


# What a subprocess of one instruction set computes for every member: the batch, each utterance alone, and the clips
# backwards and repeated until they fill more than one group.
CHILD = """
import json, sys
import numpy as np
from avser_fast import _engine

stored, out = np.load(sys.argv[1], allow_pickle=False), {}
for i, spec in enumerate(json.loads(str(stored["specs"]))):
    prefix = f"{i}/tensors/"
    tensors = {k[len(prefix):]: stored[k] for k in stored.files if k.startswith(prefix)}
    engine = _engine.Engine(json.dumps(spec), tensors, poison=True)
    assert engine.isa == _engine.cpu_isa() == sys.argv[3]
    clips, valid = stored[f"{i}/clips"], stored[f"{i}/valid"]
    runs = {"batch": engine.forward(clips, valid)}
    for b in range(2):
        runs[f"alone{b}"] = engine.forward(clips[b : b + 1], valid[b : b + 1], threads=2)
    runs["backwards"] = engine.forward(np.tile(clips[::-1, ::-1], (1, 7, 1, 1, 1)), None, 3)
    for run, arrays in runs.items():
        out.update({f"{i}/{run}/{j}": a for j, a in enumerate(arrays)})
np.savez(sys.argv[2], **out)
"""


@pytest.mark.parametrize("isa", _engine.supported_isas())
def test_family_agrees_with_the_reference(family: list[Case], isa: str, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {f"{i}/tensors/{k}": v for i, case in enumerate(family) for k, v in case.tensors.items()}
    arrays |= {f"{i}/{k}": getattr(case, k) for i, case in enumerate(family) for k in ("clips", "valid")}
    arrays["specs"] = np.array(json.dumps([{"network": dataclasses.asdict(case.network)} for case in family]))
    np.savez(tmp_path / "in.npz", **arrays)
    environment = {**os.environ, "AVSER_FAST_CPU_ISA": isa}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "in.npz"), str(tmp_path / "out.npz"), isa]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz", allow_pickle=False) as stored:
        for i, case in enumerate(family):

            def outputs(run: str, i: int = i, stored: Any = stored) -> tuple[np.ndarray, ...]:
                return tuple(stored[f"{i}/{run}/{j}"] for j in range(3))

            what = f"{isa} {case.network}"
            batch = outputs("batch")
            assert_outputs(batch, case.expected, what)
            for b in range(2):
                assert_same_bits(outputs(f"alone{b}"), tuple(a[b : b + 1] for a in batch), what)
            backwards = outputs("backwards")
            for a, e in zip(backwards[1:], batch[1:]):
                repeated = np.tile(e[::-1, ::-1], (1, 7, 1))
                assert a.shape == repeated.shape and a.tobytes() == repeated.tobytes(), what


def test_published_network_agrees_with_the_golden_vectors() -> None:
    state, inputs, expected = golden.case("mdscm_w40")
    kind, module = load_av4ser(state)
    assert kind == "mdscm"
    # The whole state dict, counters of the batch norms included, in double: the binding rounds it.
    tensors = {k: v.numpy() for k, v in module.state_dict().items()}
    engine = make_engine(module.network, tensors)  # type: ignore[arg-type]
    for threads in (1, 2, 3):
        assert_outputs(engine.forward(inputs[0], threads=threads), tuple(expected), f"{threads} threads")


def test_concurrent_callers_get_the_same_bits() -> None:
    engine = make_engine(SMALL, random_tensors(SMALL))
    # Batches of different sizes, so that workspaces change hands and grow.
    batches = [random_clips(SMALL, batch, 3, batch) for batch in (1, 4, 2, 9)]
    expected = [engine.forward(clips) for clips in batches]

    def call(i: int) -> None:
        assert_same_bits(engine.forward(batches[i % 4], threads=1 + i % 3), expected[i % 4])

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(call, i) for i in range(120)]:
            done.result()


def test_other_python_threads_run_meanwhile() -> None:
    engine = make_engine(MDSCM(), random_tensors(MDSCM()))
    clips = random_clips(MDSCM(), 1, 64)
    turns, busy = 0, threading.Event()

    def call() -> None:
        busy.set()
        engine.forward(clips)
        busy.clear()

    thread = threading.Thread(target=call)
    thread.start()
    while busy.is_set():
        time.sleep(0.001)  # needs the interpreter again to come back
        turns += 1
    thread.join()
    assert turns > 3


@pytest.mark.parametrize("member", [0, 1, 2, 5])
def test_clips_of_zeros(family: list[Case], member: int) -> None:
    """+0 is answered from a constant, -0 is computed: both must have the bits of the network."""
    network, tensors, clips, _, _ = family[member]
    engine = make_engine(network, tensors)
    silent, computed = np.zeros_like(clips), np.full_like(clips, -0.0)
    silent[0, 1] = computed[0, 1] = clips[0, 1]
    outputs = engine.forward(silent, threads=2)
    assert_same_bits(outputs, engine.forward(computed))
    assert_outputs(outputs, reference(network, tensors, silent, None))
    nearly = np.zeros_like(clips)
    nearly[0, 0, -1, -1, -1] = 1e3
    assert_outputs(engine.forward(nearly), reference(network, tensors, nearly, None))


def test_only_valid_clips_vote() -> None:
    tensors, clips = random_tensors(SMALL), random_clips(SMALL, 3, 4)
    engine = make_engine(SMALL, tensors)
    clips[0, 2] = np.nan
    valid = np.array([[True, True, False, True], [False, False, True, False], [False] * 4])
    outputs = engine.forward(clips, valid)
    expected = reference(SMALL, tensors, clips, valid)
    assert_outputs(outputs, expected)
    assert np.isfinite(outputs[0][:2]).all() and np.isnan(outputs[0][2]).all()
    strided = np.repeat(valid, 2, axis=1)[:, ::2]
    assert_same_bits(engine.forward(clips, strided), outputs)
    everyone = engine.forward(clips[1:], np.ones((2, 4), bool))
    assert_same_bits(everyone, engine.forward(clips[1:]))
    assert max_error(everyone[0], outputs[0][1:]) > 1e-3  # the mask changed something


@pytest.mark.parametrize("blocks", [(6,), (6, 10)])
def test_nan_spreads_as_in_torch(blocks: tuple[int, ...]) -> None:
    """Without attention a NaN reaches the mel rows of its receptive field: no ReLU and no max-pool may swallow it."""
    network = MDSCM(
        mel_bands=64, clip_frames=33, stem=(4,), blocks=blocks, encoder_layers=0, attention_reduction=1,
        spatial_attention=False, channel_attention=False,
    )  # fmt: skip
    tensors = random_tensors(network)
    clips = random_clips(network, 1, 64)
    for i in range(64):
        clips[0, i, 0, (5 * i) % 33, i] = np.nan
    _, features, logits = make_engine(network, tensors).forward(clips)
    _, expected, _ = reference(network, tensors, clips, None)
    partly = np.isnan(expected).any(-1) & np.isfinite(expected).any(-1)
    assert partly.all()
    assert_close(features, expected, 1e-5)
    assert np.isnan(logits).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("member", [0, 2])
def test_values_that_are_not_finite(family: list[Case], member: int, value: float) -> None:
    network, tensors, clips, _, _ = family[member]
    clips = clips.copy()
    clips[0, 0, -1, 17, 3] = value
    outputs = make_engine(network, tensors).forward(clips)
    expected = reference(network, tensors, clips, None)
    assert np.isnan(outputs[0][0]).all() and np.isfinite(outputs[0][1]).all()
    assert_outputs(tuple(a[1:] for a in outputs), tuple(e[1:] for e in expected))
    assert np.isnan(outputs[1][0, 0]).all() and np.isnan(expected[1][0, 0]).all()


def test_infinity_that_is_rectified_away_as_in_torch() -> None:
    """The padding behind a position's channels must stay finite where they are: the next window reads both."""
    network = MDSCM(mel_bands=8, clip_frames=16, stem=(3, 5), blocks=(6,), encoder_layers=0, attention_reduction=1)
    tensors, clips = random_tensors(network), random_clips(network, 1, 2)
    weight = tensors["body.conv_stem.convs.0.weight"]
    weight[:] = -np.abs(weight)  # infinity becomes minus infinity, then 0
    clips[0, 0, 0, 7, 3] = np.inf
    outputs = make_engine(network, tensors).forward(clips)
    assert np.isfinite(outputs[1]).all()
    assert_outputs(outputs, reference(network, tensors, clips, None))


def test_any_real_array_is_converted() -> None:
    engine = make_engine(SMALL, random_tensors(SMALL))
    clips = random_clips(SMALL, 2, 3)
    expected = engine.forward(clips)
    unaligned = np.frombuffer(b"x" + clips.tobytes(), np.uint8)[1:].view(np.float32).reshape(clips.shape)
    assert not unaligned.flags.aligned
    views = {
        "double": clips.astype(np.float64),
        "big-endian": clips.astype(">f4"),
        "fortran": np.asfortranarray(clips),
        "slice": np.repeat(np.repeat(clips, 2, axis=4), 3, axis=1)[:, ::3, :, :, ::2],
        "reversed": clips[::-1, :, :, ::-1].copy()[::-1, :, :, ::-1],
        "unaligned": unaligned,
        "tensor": torch.from_numpy(clips),
    }
    for what, view in views.items():
        assert_same_bits(engine.forward(view), expected, what)
    rounded = np.round(clips * 10)
    assert_same_bits(engine.forward(rounded.astype(np.int16)), engine.forward(rounded))
    halves = clips.astype(np.float16)
    assert_same_bits(engine.forward(halves), engine.forward(halves.astype(np.float32)))
    before = clips.copy()
    engine.forward(clips)
    assert (before == clips).all()


def test_tensors_are_copied() -> None:
    tensors, clips = random_tensors(SMALL), random_clips(SMALL, 1, 2)
    strided = {k: np.repeat(v, 2, axis=-1)[..., ::2] for k, v in tensors.items()}
    engine = make_engine(SMALL, tensors)
    expected = engine.forward(clips)
    assert_same_bits(make_engine(SMALL, strided).forward(clips), expected)
    for values in tensors.values():
        values.fill(np.nan)
    assert_same_bits(engine.forward(clips), expected)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_empty_batches(shape: tuple[int, int]) -> None:
    engine = make_engine(SMALL, random_tensors(SMALL))
    probabilities, features, logits = engine.forward(random_clips(SMALL, *shape))
    assert probabilities.shape == (shape[0], 4) and np.isnan(probabilities).all()
    assert features.shape == (*shape, SMALL.features) and logits.shape == (*shape, 4)


@pytest.mark.parametrize("member", [SMALL, MDSCM(statistics=3, clip_frames=64, blocks=(16,), encoder_layers=0)])
def test_no_clips_have_the_shape_of_some(member: MDSCM) -> None:
    tensors = random_tensors(member)
    for stem in make_engine(member, tensors).stems():
        engine = make_engine(member, tensors, stop_after=stem)
        some, none = engine.forward(random_clips(member, 2, 3)), engine.forward(random_clips(member, 2, 0))
        assert none.shape == (2, 0, *some.shape[2:]), stem


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_beside_busy_threads() -> None:
    """The child has no thread that would give back a lock, and goes on all the same."""
    engine, clips = make_engine(SMALL, random_tensors(SMALL)), random_clips(SMALL, 1, 3)
    expected, stop = engine.forward(clips), threading.Event()

    def call() -> None:
        while not stop.is_set():
            engine.forward(clips[:, :1])

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                same = all(np.array_equal(a, e) for a, e in zip(engine.forward(clips, threads=2), expected))
                os._exit(0 if same else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("value", [-1e-3, np.nan])
def test_a_variance_below_zero_is_named(precision: str, value: float) -> None:
    tensors = random_tensors(SMALL)
    name = "body.blocks.0.norm2.running_var"
    tensors[name] = tensors[name].copy()
    tensors[name][3] = value
    with pytest.raises(ModelError, match=f"^Engine: {name}: expected variances of at least 0, got {value:g}$"):
        make_engine(SMALL, tensors, precision=precision)


def test_wrong_tensors_are_named() -> None:
    tensors = random_tensors(SMALL)

    def message(**changes: Any) -> str:
        changed = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        with pytest.raises(ModelError) as caught:
            make_engine(SMALL, changed)
        return str(caught.value)

    name = "body.blocks.1.pointwise2.weight"
    assert message(**{name: None}) == f"Engine: {name}: expected a tensor of shape (18, 18, 1, 1), which is missing"
    assert message(**{name: tensors[name][:, :, 0]}) == (
        f"Engine: {name}: expected shape (18, 18, 1, 1), got (18, 18, 1)"
    )
    for norm in ("body.conv_stem.norms.0.running_var", "body.blocks.0.norm2.bias", "body.encoder.0.norm1.weight"):
        assert f"Engine: {norm}: expected shape ({len(tensors[norm])},), got (3,)" == message(**{norm: np.zeros(3)})
    assert "Engine: head.bias: expected shape (4,), got ()" == message(**{"head.bias": np.float32(0)})
    extra = message(**{"body.blocks.2.norm1.bias": np.zeros(3)})
    assert extra.startswith(
        "Engine: body.blocks.2.norm1.bias: expected a tensor of this network, got one of shape (3,)"
    )
    assert "body.extra.num_batches_tracked" in message(**{"body.extra.num_batches_tracked": np.zeros(())})
    assert "head.bias: expected an array of real numbers, got dtype" in message(**{"head.bias": np.array(["a"] * 4)})
    for every in tensors:
        assert every in message(**{every: None})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "spec_json: expected the JSON form of a ModelSpec, got Expecting"),
        ("[]", "spec_json: expected the JSON form of a ModelSpec with a 'network', got"),
        ('{"labels": []}', "spec_json: expected the JSON form of a ModelSpec with a 'network', got"),
        ('{"network": {"classes": 0}}', "network.classes: expected at least 1, got 0"),
        ('{"network": {"classes": "4"}}', "network.classes: expected an integer, got '4'"),
        (
            '{"network": {"clip_frames": 4611686018427387904}}',
            "network.clip_frames: expected maps of at most 268435456",
        ),
        ('{"network": {"stem": 3}}', "network.stem: expected a list of integers, got 3"),
        ('{"network": {"stem": []}}', "network.stem: expected one or more widths, got none"),
        ('{"network": {"blocks": [8, -1]}}', "network.blocks: expected at least 1, got -1"),
        ('{"network": {"spatial_attention": 1}}', "network.spatial_attention: expected true or false, got 1"),
        ('{"network": {"pooling": "max"}}', "network.pooling: expected 'mean' or 'mean_std', got 'max'"),
        (
            '{"network": {"encoder_heads": 7}}',
            "network.encoder_heads: expected a divisor of the token width 768, got 7",
        ),
    ],
)
def test_wrong_configurations_are_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _engine.Engine(text, {})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"clip_frames": 6710887, "stem": (1,), "blocks": (1,), "encoder_layers": 0}, 6710887 * 40),
        ({"clip_frames": 1677721, "stem": (16,), "blocks": (2,), "encoder_layers": 0}, 838861 * 20 * 16),
        ({"clip_frames": 1677760, "stem": (2,), "blocks": (16,), "encoder_layers": 0}, 838880 * 20 * 16),
        ({"clip_frames": 16384 * 16 + 1, "mel_bands": 1}, 16385**2),
        ({"clip_frames": 2**31 - 1, "in_channels": 2**31 - 1, "mel_bands": 2**31 - 1}, (2**31 - 1) ** 3),
    ],
)
def test_maps_without_end_are_refused(changes: dict[str, Any], most: int) -> None:
    """A configuration whose maps no memory holds is one sentence, in Python and in C++."""
    with pytest.raises(ConfigError, match=f"clip_frames: expected maps of at most 268435456 values, got {most}$"):
        MDSCM(**changes)
    with pytest.raises(ConfigError) as caught:
        _engine.Engine(json.dumps({"network": changes}), {})
    words, got = str(caught.value).rsplit(" ", 1)
    assert words == "Engine: network.clip_frames: expected maps of at most 268435456 values, got one of"
    assert float(got) == pytest.approx(most, rel=1e-5)


def test_wrong_inputs_are_named() -> None:
    engine = make_engine(SMALL, random_tensors(SMALL))
    clips = random_clips(SMALL, 2, 3)

    def message(*arguments: Any) -> str:
        with pytest.raises(InputError) as caught:
            engine.forward(*arguments)
        return str(caught.value)

    expected = "Engine.forward: clips: expected shape (B, L, 1, 40, 24), got "
    for wrong in (clips[0], clips[..., :-1], clips[:, :, :, 1:], clips.repeat(2, 2), np.float32(0)):
        assert message(wrong) == expected + str(np.shape(wrong))
    assert message(clips.astype(complex)).startswith(
        "Engine.forward: clips: expected an array of real numbers, got dtype"
    )
    assert message("clips").startswith("Engine.forward: clips: expected an array of real numbers, got dtype")
    valid = "Engine.forward: valid: expected "
    assert message(clips, np.ones((3, 2), bool)) == valid + "shape (2, 3), got (3, 2)"
    assert message(clips, np.ones(6, bool)) == valid + "shape (2, 3), got (6,)"
    assert message(clips, np.ones((2, 3), np.int64)) == valid + "an array of bool, got dtype int64"
    for threads in (0, -1):
        with pytest.raises(ConfigError, match=f"threads: expected 1.*got {threads}"):
            engine.forward(clips, None, threads)
