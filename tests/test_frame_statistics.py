"""Statistics over the frames against a loop in NumPy and SciPy's cosine transform."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dct

from avser_fast import config, nn, reference
from avser_fast.testing import assert_close

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 9, 5, 4), (3, 2, 20, 8, 8), (1, 3, 33, 40, 25)]


def loop(clips: np.ndarray, gate: np.ndarray, bias: float, bands: np.ndarray) -> np.ndarray:
    """One frame after the other, and NumPy's own weighted average."""
    rows = []
    for clip in clips:
        weights = []
        for t in range(clip.shape[1]):
            there = bool(np.any(clip[:, t]))
            weights.append(1.0 / (1.0 + np.exp(-(clip[0, t] @ gate + bias))) + 0.001 if there else 0.0)
        mapped = [np.array([bands @ frame for frame in channel]) for channel in clip]
        means = [np.average(m, axis=0, weights=weights) for m in mapped]
        spread = [np.average((m - mean) ** 2, axis=0, weights=weights) for m, mean in zip(mapped, means)]
        rows.append(np.concatenate([means[0], *(np.sqrt(v + 1e-5) for v in spread)]))
    return np.array(rows)


def statistics(clips: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, bands: torch.Tensor) -> torch.Tensor:
    return reference.frame_statistics(clips @ bands.T, reference.frame_weights(clips, gate, bias))


@pytest.mark.parametrize("shape", SHAPES)
def test_against_a_loop(shape: tuple[int, ...]) -> None:
    n, channels, frames, bands, outputs = shape
    random = np.random.default_rng(sum(shape))
    clips = random.normal(size=(n, channels, frames, bands))
    clips[0, :, 1 : frames // 2] = 0.0
    gate, bias, matrix = random.normal(size=bands), random.normal(), random.normal(size=(outputs, bands))
    tensors = [torch.from_numpy(np.asarray(x)) for x in (clips, gate[None], np.array([bias]), matrix)]
    got = statistics(*tensors)
    assert got.shape == (n, (1 + channels) * outputs)
    assert_close(got, torch.from_numpy(loop(clips, gate, float(bias), matrix)), 1e-12)


@pytest.mark.parametrize(("outputs", "bands"), [(1, 1), (5, 8), (25, 40), (40, 40)])
def test_the_map_is_the_cosine_transform(outputs: int, bands: int) -> None:
    expected = dct(np.eye(bands), axis=0, norm="ortho")[:outputs]
    assert_close(reference.cepstral_map(outputs, bands), torch.from_numpy(expected), 1e-12)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    clips = torch.randn(2, 3, 17, 6, dtype=torch.float64)
    tensors = (torch.randn(1, 6).double(), torch.randn(1).double(), torch.randn(4, 6).double())
    padded = torch.nn.functional.pad(clips, (0, 0, 5, 8))
    assert_close(statistics(padded, *tensors), statistics(clips, *tensors), 1e-12)
    empty = statistics(torch.zeros_like(clips), *tensors)
    expected = torch.tensor([0.0] * 4 + [1e-5**0.5] * 12, dtype=torch.float64)
    assert_close(empty, expected.expand(2, -1), 1e-12)


def test_the_untrained_gate_tells_speech_from_pauses() -> None:
    path = nn.MDSCM(config.MDSCM(in_channels=3, statistics=25)).statistics
    assert path is not None
    levels = torch.tensor([-2.5, -1.2, 0.5]).view(1, 1, 3, 1).expand(1, 3, 3, 40)
    weights = reference.frame_weights(levels, path.gate.weight, path.gate.bias)[0]
    assert weights[0] < 0.01 and 0.3 < weights[1] < 0.6 and weights[2] > 0.99
    assert not path.gate.weight.requires_grad and not path.bands.weight.requires_grad
