"""Weights, inputs and outputs of the published system in float64 (see data/README.md for the recipe)."""

from __future__ import annotations

import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"


def _normal(salt: str, shape: list[int]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(salt.encode())))
    return np.asarray(generator.standard_normal(shape))


def _parameter(salt: str, key: str, shape: list[int]) -> np.ndarray:
    normal, last = _normal(f"{salt}/{key}", shape), key.rsplit(".", 1)[-1]
    if last == "running_var":
        return np.exp(0.2 * normal)
    if last == "running_mean" or last.startswith("bias") or last.endswith("bias"):
        return 0.1 * normal
    if len(shape) == 1:
        return 1.0 + 0.1 * normal
    return normal * np.sqrt(1.5 / np.prod(shape[1:]))


@lru_cache(maxsize=1)
def _description() -> dict[str, Any]:
    return json.loads((DATA / "models.json").read_text(encoding="utf-8"))


def cases() -> list[str]:
    return list(_description()["cases"])


def case(name: str) -> tuple[dict[str, np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """(state dict, inputs, expected outputs) of a case, all float64."""
    salt, described = _description()["salt"], _description()["cases"][name]
    state = {
        key: _parameter(salt, key, shape)
        for key, shape in described["state_dict"].items()
        if not key.endswith("num_batches_tracked")
    }
    inputs = [_normal(f"{salt}/input/{name}/{i}", shape) for i, shape in enumerate(described["inputs"])]
    with np.load(DATA / "models.npz", allow_pickle=False) as stored:
        outputs = [stored[f"{name}/out{i}"] for i in range(len(described["outputs"]))]
    return state, inputs, outputs


def front_end() -> dict[str, np.ndarray]:
    """``wave/<n>``, ``logfbank/<n>`` and ``clips/<T>`` arrays."""
    with np.load(DATA / "frontend.npz", allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
