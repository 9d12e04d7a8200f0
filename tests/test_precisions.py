"""bf16 and int8 on the engine: no worse than torch's autocast, no other than the rounding rules say, the same bits
anywhere in a batch, on every instruction set of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from int8_scheme import Int8Scheme
from test_engine import MEMBERS, SMALL, assert_same_bits, random_clips, random_member, spec_json

from avser_fast import _engine, config, nn, reference
from avser_fast.config import MDSCM
from avser_fast.errors import ConfigError, InputError, ModelError
from avser_fast.inference.weights import random_tensors
from avser_fast.testing import max_error

PRECISIONS = ("float32", "bf16", "int8")
LOW = PRECISIONS[1:]
FAMILY = [*MEMBERS[:16], *(random_member(seed) for seed in range(100, 108))]
Values = dict[str, np.ndarray]


def make(network: MDSCM, tensors: Values, precision: str, ranges: Values | None, **options: Any) -> Any:
    calibration = ranges if precision == "int8" else None
    return _engine.Engine(
        spec_json(network), tensors, precision=precision, calibration=calibration, poison=True, **options
    )


def in_torch(network: MDSCM, tensors: Values, clips: np.ndarray, dtype: torch.dtype, autocast: bool) -> Values:
    """Every stem as ``stop_after`` gives it, then ``features`` and ``clip_logits``, each (B, L, ...)."""
    module = nn.MDSCM(network, backend="reference").eval().to(dtype)
    module.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)
    body, out = module.body, {}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        flat = torch.from_numpy(clips).to(dtype).flatten(0, 1)
        out["conv_stem"] = x = body.conv_stem(flat)
        for i, block in enumerate(body.blocks):
            x = block(x)
            out[f"dsc_block.{i}"] = x.relu() if i + 1 < len(body.blocks) else x
        out["cs_attention"] = x = body.attention(x)
        x = reference.to_tokens(x)
        for i, layer in enumerate(body.encoder):
            out[f"temporal_attention.{i}"] = x = layer(x)
        path, hidden = module.statistics, None
        if path is not None:
            out["frame_statistics"], hidden = path.measure(flat), path(flat)
        head = module.head
        out["features"], out["clip_logits"] = reference.emotion_head(
            x, head.weight, head.bias, pooling=network.pooling, statistics=hidden
        )
    return {name: value.double().unflatten(0, clips.shape[:2]).numpy() for name, value in out.items()}


class Case(NamedTuple):
    network: MDSCM
    tensors: Values
    clips: np.ndarray
    ranges: Values
    exact: Values
    autocast: Values
    rounded: Values


@pytest.fixture(scope="module")
def family() -> list[Case]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = []
    for seed, network in enumerate(FAMILY):
        tensors, clips = random_tensors(network, seed), random_clips(network, 2, 4, seed)
        clips[1, 1] = 0
        ranges = make(network, tensors, "float32", None).calibrate(clips)
        exact = in_torch(network, tensors, clips, torch.float64, autocast=False)
        autocast = in_torch(network, tensors, clips, torch.float32, autocast=True)
        cases.append(
            Case(network, tensors, clips, ranges, exact, autocast, Int8Scheme(network, tensors, ranges).run(clips))
        )
    torch.set_num_threads(threads)
    return cases


def root_mean_square(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    return float(np.sqrt(np.mean((actual - expected) ** 2)))


# What a subprocess of one instruction set computes for every member and precision: the batch, each utterance alone, the
# clips backwards and repeated until they fill more than one group, and every stem.
CHILD = """
import json, sys
import numpy as np
from avser_fast import _engine

stored, out = np.load(sys.argv[1], allow_pickle=False), {}
for i, spec in enumerate(json.loads(str(stored["specs"]))):
    def named(part):
        prefix = f"{i}/{part}/"
        return {k[len(prefix):]: stored[k] for k in stored.files if k.startswith(prefix)}
    tensors, ranges, clips = named("tensors"), named("ranges"), stored[f"{i}/clips"]
    for precision in ("float32", "bf16", "int8"):
        options = {"precision": precision, "calibration": ranges if precision == "int8" else None, "poison": True}
        engine = _engine.Engine(json.dumps(spec), tensors, **options)
        assert engine.isa == _engine.cpu_isa() == sys.argv[3] and engine.precision == precision
        runs = {"batch": engine.forward(clips)}
        for b in range(2):
            runs[f"alone{b}"] = engine.forward(clips[b : b + 1, :3], threads=2)
        runs["backwards"] = engine.forward(np.tile(clips[::-1, ::-1], (1, 3, 1, 1, 1)), None, 3)
        for run, arrays in runs.items():
            out.update({f"{i}/{precision}/{run}/{j}": a for j, a in enumerate(arrays)})
        for stem in engine.stems():
            stopped = _engine.Engine(json.dumps(spec), tensors, stop_after=stem, **options)
            out[f"{i}/{precision}/{stem}"] = stopped.forward(clips)
np.savez(sys.argv[2], **out)
"""


@pytest.mark.parametrize("isa", _engine.supported_isas())
def test_family_in_every_precision(family: list[Case], isa: str, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {}
    for i, case in enumerate(family):
        arrays[f"{i}/clips"] = case.clips
        arrays |= {f"{i}/tensors/{k}": v for k, v in case.tensors.items()}
        arrays |= {f"{i}/ranges/{k}": v for k, v in case.ranges.items()}
    arrays["specs"] = np.array(json.dumps([{"network": config.plain(case.network)} for case in family]))
    np.savez(tmp_path / "in.npz", **arrays)
    environment = {**os.environ, "AVSER_FAST_CPU_ISA": isa}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "in.npz"), str(tmp_path / "out.npz"), isa]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    stored = dict(np.load(tmp_path / "out.npz", allow_pickle=False))
    for i, case in enumerate(family):
        for precision in PRECISIONS:
            what = f"{isa} {precision} {case.network}"

            def outputs(run: str, i: int = i, precision: str = precision) -> tuple[np.ndarray, ...]:
                return tuple(stored[f"{i}/{precision}/{run}/{j}"] for j in range(3))

            batch = outputs("batch")
            for b in range(2):
                for alone, all_ in zip(outputs(f"alone{b}")[1:], batch[1:]):
                    assert alone.tobytes() == all_[b : b + 1, :3].tobytes(), what
            for found, expected in zip(outputs("backwards")[1:], batch[1:]):
                repeated = np.tile(expected[::-1, ::-1], (1, 3, 1))
                assert found.shape == repeated.shape and found.tobytes() == repeated.tobytes(), what
            values = {"features": batch[1], "clip_logits": batch[2]}
            for name, exact in case.exact.items():
                value = values[name] if name in values else stored[f"{i}/{precision}/{name}"]
                kept = "float32" if name == "frame_statistics" else precision  # no precision rounds the statistics
                check(kept, value, exact, case.autocast[name], case.rounded[name], f"{what} {name}")


def check(
    precision: str, actual: np.ndarray, exact: np.ndarray, autocast: np.ndarray, rounded: np.ndarray, what: str
) -> None:
    """float32: 1e-5 of the scale.  bf16: in the worst value at most twice the error of torch's autocast, in the mean
    square no more than it.  int8: in the mean square no further from the rounding rules computed in float64 than a
    quarter of what these rules cost, which is what values that fall on the other side of a rounding make; 0.13 of it
    was the most that was seen."""
    if precision == "float32":
        assert max_error(actual, exact) <= 1e-5, what
    elif precision == "bf16":
        assert max_error(actual, exact) <= 2 * max_error(autocast, exact), what
        if actual.size >= 100:  # of a handful of values a single rounding decides
            assert root_mean_square(actual, exact) <= root_mean_square(autocast, exact), what
    else:
        cost = root_mean_square(rounded, exact)
        assert root_mean_square(actual, rounded) <= 0.25 * cost, what
        assert root_mean_square(actual, exact) <= 1.1 * cost, what


def test_int8_costs_about_what_autocast_costs(family: list[Case]) -> None:
    """With ranges that cover its clips, the worst logit of int8 is at most twice as far off as that of torch's bf16
    autocast in nine members of ten, and typically no further.  No rule of rounding to 256 steps promises it of all."""
    ratios = []
    for case in family:
        logits = make(case.network, case.tensors, "int8", case.ranges).forward(case.clips)[2]
        exact = case.exact["clip_logits"]
        ratios.append(max_error(logits, exact) / max_error(case.autocast["clip_logits"], exact))
    assert np.quantile(ratios, 0.9) <= 2 and np.median(ratios) <= 1, ratios


@pytest.mark.parametrize("precision", LOW)
def test_low_precisions_really_round(family: list[Case], precision: str) -> None:
    for case in family:
        whole = make(case.network, case.tensors, "float32", None).forward(case.clips)
        assert max_error(make(case.network, case.tensors, precision, case.ranges).forward(case.clips)[1], whole[1]) > 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("member", [0, 1, 2, 5])
def test_clips_of_zeros(family: list[Case], precision: str, member: int) -> None:
    """+0 is answered from a constant, -0 is computed: both must have the bits of the network."""
    case = family[member]
    engine = make(case.network, case.tensors, precision, case.ranges)
    silent, computed = np.zeros_like(case.clips), np.full_like(case.clips, -0.0)
    silent[0, 1] = computed[0, 1] = case.clips[0, 1]
    assert_same_bits(engine.forward(silent, threads=2), engine.forward(computed))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", LOW)
def test_clips_that_are_not_finite(family: list[Case], precision: str, value: float) -> None:
    """Their outputs are NaN and never a plausible number; nothing else changes."""
    for case in (family[0], family[2]):
        engine = make(case.network, case.tensors, precision, case.ranges)
        clips = case.clips.copy()
        clips[0, 2, -1, 17, 3] = value
        expected = engine.forward(case.clips)
        for threads in (1, 3):
            outputs = engine.forward(clips, threads=threads)
            assert np.isnan(outputs[0][0]).all() and np.isnan(outputs[1][0, 2]).all()
            assert np.isnan(outputs[2][0, 2]).all()
            assert outputs[0][1].tobytes() == expected[0][1].tobytes()
            for found, before in zip(outputs[1:], expected[1:]):
                assert found[0, :2].tobytes() == before[0, :2].tobytes()
                assert found[0, 3:].tobytes() == before[0, 3:].tobytes() and found[1].tobytes() == before[1].tobytes()
        votes = np.ones((2, 4), bool)
        votes[0, 2] = False
        assert np.isfinite(engine.forward(clips, votes)[0]).all(), "a clip that does not vote does not matter"


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("scale", [1e-20, 1e3, 1e18])
def test_levels_that_calibration_never_saw(precision: str, scale: float) -> None:
    """Values beyond their range stop at its end: coarse, but finite, the same on one thread or three."""
    tensors, clips = random_tensors(SMALL), random_clips(SMALL, 2, 3)
    ranges = make(SMALL, tensors, "float32", None).calibrate(clips)
    engine = make(SMALL, tensors, precision, ranges)
    outputs = engine.forward(clips * np.float32(scale))
    assert all(np.isfinite(values).all() for values in outputs)
    assert_same_bits(engine.forward(clips * np.float32(scale), threads=3), outputs)


def test_ranges_cover_what_was_seen(family: list[Case]) -> None:
    for case in family[:8]:
        engine = make(case.network, case.tensors, "float32", None)
        separate = [engine.calibrate(case.clips[b : b + 1]) for b in range(2)]
        for name, (low, high) in case.ranges.items():
            assert low.dtype == np.float32 and low.shape == high.shape and (low <= high).all(), name
            assert np.array_equal(low, np.minimum(separate[0][name][0], separate[1][name][0])), name
            assert np.array_equal(high, np.maximum(separate[0][name][1], separate[1][name][1])), name
        stem = case.exact["conv_stem"]
        last = case.ranges[f"conv_stem.{len(case.network.stem) - 1}"]
        np.testing.assert_allclose(last[1], stem.max((0, 1, 3, 4)), rtol=1e-4, atol=1e-4)
        assert (last[0] >= 0).all(), "a rectified value is never negative"


def test_ranges_of_silence_can_be_used() -> None:
    tensors, clips = random_tensors(SMALL), random_clips(SMALL, 1, 2)
    ranges = make(SMALL, tensors, "float32", None).calibrate(np.zeros_like(clips))
    assert all(np.isfinite(a).all() for a in make(SMALL, tensors, "int8", ranges).forward(clips))


def test_wrong_calibrations_are_named() -> None:
    tensors, clips = random_tensors(SMALL), random_clips(SMALL, 1, 2)
    ranges = make(SMALL, tensors, "float32", None).calibrate(clips)

    def message(kind: type[Exception], precision: str, calibration: Any) -> str:
        with pytest.raises(kind) as caught:
            _engine.Engine(spec_json(SMALL), tensors, precision=precision, calibration=calibration)
        return str(caught.value)

    assert message(ConfigError, "int8", None) == "Engine: precision int8: expected a calibration, got none"
    assert message(ConfigError, "int8", {}) == "Engine: precision int8: expected a calibration, got none"
    for precision in ("float32", "bf16"):
        words = f"expected none with precision {precision}, got {len(ranges)} ranges"
        assert message(ConfigError, precision, ranges) == f"Engine: calibration: {words}"
    words = "expected float32, bf16 or int8, got 'fp8'"
    assert message(ConfigError, "fp8", None) == f"Engine: precision: {words}"
    name = "dsc_block.0.hidden"
    assert message(ModelError, "int8", {k: v for k, v in ranges.items() if k != name}) == (
        f"Engine: calibration: expected the ranges {name} of shape (2, 12), which are missing"
    )
    assert message(ModelError, "int8", {**ranges, name: ranges[name][:, 1:]}) == (
        f"Engine: calibration: {name}: expected shape (2, 12), got (2, 11)"
    )
    assert message(ModelError, "int8", {**ranges, name: ranges[name] + np.inf}).startswith(
        f"Engine: calibration: {name}: expected finite ranges, got inf to inf"
    )
    assert message(ModelError, "int8", {**ranges, name: ranges[name] + np.nan}).startswith(
        f"Engine: calibration: {name}: expected finite ranges, got "
    )
    assert message(ModelError, "int8", {**ranges, "dsc_block.7": ranges[name]}) == (
        "Engine: calibration: dsc_block.7: expected a value of this network, got ranges of one that it does not have"
    )
    assert "expected an array of" in message(ModelError, "int8", {**ranges, name: "wide"})


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["body.blocks.0.depthwise1.weight", "body.encoder.0.qkv.weight"])
def test_int8_has_no_number_for_a_weight_that_is_not_finite(name: str, value: float) -> None:
    tensors = random_tensors(SMALL)
    ranges = make(SMALL, tensors, "float32", None).calibrate(random_clips(SMALL, 1, 2))
    tensors[name] = tensors[name].copy()
    tensors[name].flat[3] = value
    with pytest.raises(ModelError, match=f"^Engine: {name}: expected finite values in precision int8"):
        make(SMALL, tensors, "int8", ranges)


def test_sums_that_do_not_fit_32_bits_are_refused() -> None:
    """255 times 127 fits 66,311 times."""
    tiny = MDSCM(mel_bands=2, clip_frames=2, stem=(2,), blocks=(2,), attention_reduction=1, encoder_heads=1,
                 encoder_layers=1, encoder_ff=66312)  # fmt: skip
    name = "body.encoder.0.ff2.weight"
    tensors = random_tensors(tiny)
    ranges = make(tiny, tensors, "float32", None).calibrate(random_clips(tiny, 1, 2))
    make(tiny, tensors, "int8", ranges)
    ranges["temporal_attention.0.hidden"] = np.array([[0.0], [1.0]], np.float32).repeat(66312, 1)
    tensors[name] = np.ones_like(tensors[name])
    make(tiny, tensors, "bf16", None)
    with pytest.raises(
        ModelError, match=f"^Engine: {name}: expected rows whose sums of int8 products fit 32 bits, got"
    ):
        make(tiny, tensors, "int8", ranges)
    tensors[name][:, 0] = 0
    make(tiny, tensors, "int8", ranges)


def test_what_cannot_be_calibrated_is_named() -> None:
    tensors, clips = random_tensors(SMALL), random_clips(SMALL, 2, 2)
    engine = make(SMALL, tensors, "float32", None)
    ranges = engine.calibrate(clips)
    for precision in LOW:
        with pytest.raises(ConfigError, match=f"calibrate: expected an engine of precision float32, got {precision}"):
            make(SMALL, tensors, precision, ranges).calibrate(clips)
    with pytest.raises(InputError, match="calibrate: clips: expected at least 1, got 0"):
        engine.calibrate(clips[:, :0])
    with pytest.raises(InputError, match=r"Engine.calibrate: clips: expected shape \(B, L, 1, 40, 24\), got"):
        engine.calibrate(clips[..., 1:])
    clips[1, 0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"calibrate: clips\[2\]: expected finite values, got NaN or infinity"):
        engine.calibrate(clips)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_unknown_stems_are_named(precision: str) -> None:
    tensors = random_tensors(SMALL)
    ranges = make(SMALL, tensors, "float32", None).calibrate(random_clips(SMALL, 1, 2))
    stems = make(SMALL, tensors, precision, ranges).stems()
    assert stems == ["conv_stem", "dsc_block.0", "dsc_block.1", "cs_attention", "temporal_attention.0"]
    with pytest.raises(ConfigError, match="stop_after: expected one of conv_stem, .*, got 'dsc_block.2'"):
        make(SMALL, tensors, precision, ranges, stop_after="dsc_block.2")


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_profile_names_every_part(tmp_path: Path, value: str) -> None:
    code = (
        "import json, sys, numpy as np\n"
        "from avser_fast import _engine\n"
        "stored = np.load(sys.argv[1])\n"
        "tensors = {k: stored[k] for k in stored.files if k not in ('spec', 'clips')}\n"
        "engine = _engine.Engine(str(stored['spec']), tensors, precision='bf16')\n"
        "engine.forward(stored['clips'], threads=2); del engine; print('end', file=sys.stderr)"
    )
    tensors: dict[str, Any] = {**random_tensors(SMALL), "spec": np.array(spec_json(SMALL))}
    np.savez(tmp_path / "in.npz", clips=random_clips(SMALL, 2, 3), **tensors)
    environment = {**os.environ, "AVSER_FAST_PROFILE": value}
    command = [sys.executable, "-c", code, str(tmp_path / "in.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stderr.splitlines()
    assert lines[-1] == "end", "the profile is printed when the engine is closed"
    if value != "1":
        assert len(lines) == 1
        return
    assert lines[0] == f"avser_fast profile: bf16, {_engine.cpu_isa()}"
    parts = [line[2:26].strip() for line in lines[2:-1]]
    assert parts == [
        "load", "conv_stem.0", "conv_stem.1", "dsc_block.0 first", "dsc_block.0 second", "dsc_block.1 first",
        "dsc_block.1 second", "cs_attention", "temporal_attention.0", "emotion_head",
    ]  # fmt: skip
