"""The audio-visual encoders and the fusion without torch, against the float64 modules, on every instruction set."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avser_fast import _engine, config, nn
from avser_fast.errors import ConfigError, InputError, ModelError
from avser_fast.testing import assert_close, max_error

Arrays = tuple[np.ndarray, ...]


def arrays_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}


def random_avre(seed: int = 0, **fields: Any) -> nn.AVRE:
    """Random weights whose batch norms have statistics worth folding."""
    torch.manual_seed(seed)
    module = nn.AVRE(**fields).eval()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)  # type: ignore[union-attr,operator]
            part.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.normal_(part.bias, 0, 0.2)
    return module


def random_clips(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@torch.inference_mode()
def truth(module: nn.AVRE, clips: np.ndarray, valid: np.ndarray | None = None) -> Arrays:
    votes = None if valid is None else torch.from_numpy(valid)
    out = copy.deepcopy(module).double()(torch.from_numpy(clips).double(), votes)
    return out.logits.softmax(-1).numpy(), out.features.numpy(), out.clip_logits.numpy()


def assert_outputs(actual: Arrays, expected: Arrays, tolerance: float, what: str = "") -> None:
    for name, a, e in zip(("probabilities", "features", "clip_logits"), actual, expected, strict=True):
        assert a.dtype == np.float32
        assert_close(a, e, tolerance, f"{what} {name}")


def same_bits(actual: Arrays, expected: Arrays) -> bool:
    return all(a.shape == e.shape and a.tobytes() == e.tobytes() for a, e in zip(actual, expected, strict=True))


# Published clips; faces of other sizes, smaller than the strides and odd; more clips than a group.
SHAPES = [(1, 2, 1, 224, 40), (2, 1, 1, 33, 17), (1, 3, 1, 1, 1), (1, 11, 1, 40, 64), (1, 1, 1, 5, 300)]

CHILD = """
import sys
import numpy as np
from avser_fast import _engine
stored, out = np.load(sys.argv[1]), {}
tensors = {k[2:]: stored[k] for k in stored.files if k.startswith("t/")}
for precision in ("float32", "bf16"):
    engine = _engine.ResNet18(tensors, precision=precision, poison=True)
    assert engine.isa == sys.argv[3] and engine.precision == precision
    for i in range(int(stored["count"])):
        for j, array in enumerate(engine.forward(stored[f"clips{i}"], threads=1 + i % 3)):
            out[f"{precision}/{i}/{j}"] = array
np.savez(sys.argv[2], **out)
"""


@pytest.mark.parametrize("isa", _engine.supported_isas())
def test_resnet18_agrees_with_the_reference(isa: str, tmp_path: Path) -> None:
    """bf16: at most twice the error of torch's own autocast."""
    module = random_avre()
    clips = [random_clips(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    stored = {f"clips{i}": c for i, c in enumerate(clips)} | {f"t/{k}": v for k, v in arrays_of(module).items()}
    np.savez(tmp_path / "in.npz", count=len(clips), **stored)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "in.npz"), str(tmp_path / "out.npz"), isa]
    environment = {**os.environ, "AVSER_FAST_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as found:
        for i, batch in enumerate(clips):
            expected = truth(module, batch)
            assert_outputs(tuple(found[f"float32/{i}/{j}"] for j in range(3)), expected, 1e-5, f"{isa} {batch.shape}")
            with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                cast = module(torch.from_numpy(batch))
            for j, theirs in ((1, cast.features), (2, cast.clip_logits)):
                allowed = 2 * max_error(theirs.float().numpy(), expected[j])
                assert_close(found[f"bf16/{i}/{j}"], expected[j], allowed, f"{isa} bf16 {batch.shape} output {j}")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resnet18_scores_a_clip_the_same_everywhere(precision: str) -> None:
    engine = _engine.ResNet18(arrays_of(random_avre(in_channels=3, classes=5)), in_channels=3, classes=5,
                              precision=precision, poison=True)  # fmt: skip
    clips = random_clips(1, 19, 3, 50, 21)
    together = engine.forward(clips, threads=2)
    assert same_bits(engine.forward(clips, threads=1), together)
    assert same_bits(engine.forward(clips, threads=3), together)
    for i in (0, 7, 8, 18):
        alone = engine.forward(clips[:, i : i + 1])
        assert same_bits(alone[1:], tuple(a[:, i : i + 1] for a in together[1:]))


def test_only_valid_clips_vote() -> None:
    module = random_avre()
    clips, valid = random_clips(2, 3, 1, 64, 40), np.array([[True, False, True], [False, False, False]])
    outputs = _engine.ResNet18(arrays_of(module)).forward(clips, valid)
    assert np.isnan(outputs[0][1]).all()
    expected = truth(module, clips[:1], valid[:1])
    assert_outputs(tuple(a[:1] for a in outputs), expected, 1e-5)


def test_mdscm_body_is_the_engine() -> None:
    """An encoder with the MDSCM body is an MDSCM whose domain classifier is left out."""
    member = config.MDSCM(mel_bands=24, clip_frames=40, stem=(8,), blocks=(16,), attention_reduction=4,
                          encoder_layers=1)  # fmt: skip
    module = random_avre(encoder=config.AVRE(body="mdscm", mdscm=member))
    engine = _engine.Engine(json.dumps({"network": config.plain(member)}), arrays_of(module), poison=True)
    clips = random_clips(2, 3, 1, 40, 24)
    assert_outputs(engine.forward(clips), truth(module, clips), 1e-5)


def test_wrong_resnet18_arguments_are_named() -> None:
    tensors = arrays_of(random_avre())
    with pytest.raises(ConfigError, match=r"ResNet18: precision: expected float32 or bf16.*got int8"):
        _engine.ResNet18(tensors, precision="int8")
    with pytest.raises(ConfigError, match=r"precision: expected float32, bf16 or int8, got 'half'"):
        _engine.ResNet18(tensors, precision="half")
    with pytest.raises(ModelError, match=r"^ResNet18: body\.blocks\.7\.conv2\.weight: expected a tensor of shape"):
        _engine.ResNet18({k: v for k, v in tensors.items() if k != "body.blocks.7.conv2.weight"})
    with pytest.raises(ModelError, match=r"^ResNet18: extra: expected a tensor of this network"):
        _engine.ResNet18({**tensors, "extra": np.zeros(1, np.float32)})
    engine = _engine.ResNet18(tensors)
    with pytest.raises(InputError, match=r"clips: expected shape \(B, L, 1, height, width\), got \(1, 1, 2, 8, 8\)"):
        engine.forward(np.zeros((1, 1, 2, 8, 8), np.float32))
    with pytest.raises(InputError, match=r"valid: expected shape \(1, 1\), got \(1, 2\)"):
        engine.forward(np.zeros((1, 1, 1, 8, 8), np.float32), np.ones((1, 2), bool))
    empty = engine.forward(np.zeros((2, 0, 1, 8, 8), np.float32))
    assert np.isnan(empty[0]).all() and empty[1].shape == (2, 0, 512)


@pytest.mark.parametrize("fields", [{}, {"features": 19, "classes": 7, "hidden": 13, "feature_weight": 0.25},
                                    {"features": 1, "classes": 1, "hidden": 1}])  # fmt: skip
@pytest.mark.parametrize(("batch", "clips"), [(1, 5), (3, 1), (4, 70)])
def test_fusion_agrees_with_the_reference(fields: dict[str, Any], batch: int, clips: int) -> None:
    torch.manual_seed(1)
    module = nn.Fusion(**fields)
    engine = _engine.Fusion(arrays_of(module), **fields, poison=True)
    features = random_clips(batch, clips, module.fusion.features)
    scores = 3 * random_clips(batch, clips, module.fusion.classes, seed=1)
    with torch.inference_mode():
        expected = module.double()(torch.from_numpy(features).double(), torch.from_numpy(scores).double())
    found = engine.forward(features, scores, threads=2)
    for name, a, e in zip(("fused", "a", "b"), found, expected, strict=True):
        assert_close(a, e.numpy(), 1e-5, name)
    for i in range(batch):
        assert same_bits(engine.forward(features[i : i + 1], scores[i : i + 1]), tuple(a[i : i + 1] for a in found))


def test_fusion_on_every_instruction_set(tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = nn.Fusion(features=50, hidden=21)
    features, scores = random_clips(2, 4, 50), random_clips(2, 4, 4, seed=3)
    tensors = {f"t/{k}": v for k, v in arrays_of(module).items()}
    np.savez(tmp_path / "in.npz", features=features, scores=scores, **tensors)
    code = (
        "import sys, numpy as np; from avser_fast import _engine; s = np.load(sys.argv[1]);"
        "e = _engine.Fusion({k[2:]: s[k] for k in s.files if k[:2] == 't/'}, features=50, hidden=21, poison=True);"
        "np.save(sys.argv[2], np.stack(e.forward(s['features'], s['scores'])))"
    )
    with torch.inference_mode():
        expected = module.double()(torch.from_numpy(features).double(), torch.from_numpy(scores).double())
    for isa in _engine.supported_isas():
        command = [sys.executable, "-c", code, str(tmp_path / "in.npz"), str(tmp_path / "out.npy")]
        subprocess.run(command, env={**os.environ, "AVSER_FAST_CPU_ISA": isa}, check=True, timeout=60)
        assert_close(np.load(tmp_path / "out.npy"), torch.stack(tuple(expected)).numpy(), 1e-5, isa)


def test_wrong_fusion_arguments_are_named() -> None:
    tensors = arrays_of(nn.Fusion(features=6))
    with pytest.raises(ModelError, match=r"^Fusion: feature_branch\.lstm\.weight_ih_l0: expected shape \(512, 1280\)"):
        _engine.Fusion(tensors)
    engine = _engine.Fusion(tensors, features=6)
    with pytest.raises(InputError, match=r"features: expected shape \(B, L, 6\), got \(1, 2, 5\)"):
        engine.forward(np.zeros((1, 2, 5), np.float32), np.zeros((1, 2, 4), np.float32))
    with pytest.raises(InputError, match=r"scores: expected shape \(1, 2, 4\), got \(1, 3, 4\)"):
        engine.forward(np.zeros((1, 2, 6), np.float32), np.zeros((1, 3, 4), np.float32))
    with pytest.raises(InputError, match=r"expected at least 1 clip, got 0"):
        engine.forward(np.zeros((1, 0, 6), np.float32), np.zeros((1, 0, 4), np.float32))
