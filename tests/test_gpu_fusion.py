"""The fusion's LSTMs on the emulated GPU against the float64 module."""

from __future__ import annotations

import copy

import emulated
import numpy as np
import pytest
import torch
from test_avre_engine import arrays_of

from avser_fast import config, nn
from avser_fast.errors import InputError, ModelError
from avser_fast.testing import assert_close


@pytest.fixture(autouse=True)
def fresh_device() -> None:
    emulated.module().set_device()
    emulated.module().set_order("forward")


@pytest.mark.parametrize(
    ("features", "classes", "hidden", "batch", "clips"), [(37, 3, 20, 18, 3), (8, 4, 128, 1, 5), (3, 1, 1, 2, 1)]
)
def test_agrees_with_the_module_alone_and_in_a_batch(
    features: int, classes: int, hidden: int, batch: int, clips: int
) -> None:
    torch.manual_seed(0)
    module = nn.Fusion(config.Fusion(features=features, classes=classes, hidden=hidden)).eval()
    r = np.random.default_rng(1)
    x = r.standard_normal((batch, clips, features)).astype(np.float32)
    s = r.standard_normal((batch, clips, classes)).astype(np.float32)
    with torch.inference_mode():
        expected = copy.deepcopy(module).double()(torch.from_numpy(x).double(), torch.from_numpy(s).double())
    emulated.module().set_order("shuffled", 3)
    fusion = emulated.module().GpuFusion(arrays_of(module), features=features, classes=classes, hidden=hidden)
    found = fusion.forward(x, s)
    for name, a in zip(("fused", "a", "b"), found):
        assert_close(a, getattr(expected, name).numpy(), 1e-5, name)
    emulated.module().set_order("backward")
    for i in (0, batch - 1):
        for a, whole in zip(fusion.forward(x[i : i + 1], s[i : i + 1]), found):
            assert a.tobytes() == whole[i : i + 1].tobytes()


def test_faults_are_named() -> None:
    module = nn.Fusion(config.Fusion(features=5, classes=2, hidden=4))
    tensors = arrays_of(module)
    fusion = emulated.module().GpuFusion(tensors, features=5, classes=2, hidden=4)
    with pytest.raises(InputError, match=r"features: expected shape \(B, L, 5\), got \(1, 2, 4\)"):
        fusion.forward(np.zeros((1, 2, 4), np.float32), np.zeros((1, 2, 2), np.float32))
    with pytest.raises(InputError, match="expected at least 1 clip, got 0"):
        fusion.forward(np.zeros((1, 0, 5), np.float32), np.zeros((1, 0, 2), np.float32))
    with pytest.raises(ModelError, match="feature_branch.out.bias: expected a tensor of shape"):
        emulated.module().GpuFusion(
            {k: v for k, v in tensors.items() if k != "feature_branch.out.bias"}, features=5, classes=2, hidden=4
        )
