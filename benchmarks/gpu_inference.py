"""``python -m benchmarks.gpu_inference OUT [PART...]``: inference on the Triton kernels on a GPU, beside PyTorch.

The published network and the default model in bf16: one utterance of 5 clips on the way from host memory and back, as
``Recognizer.forward`` runs it, with and without a CUDA graph, and PyTorch eager on the same weights; torch.compile in
parts of its own, since it takes its time to compile.  Outputs are compared with the float32 reference before anything
is timed.  Writes ``OUT/gpu-inference.json`` after every part; a contender that fails is written down and does not hide
the others (exit code 1 where it is ours).
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import avser_fast
from avser_fast import nn
from avser_fast.config import ModelSpec
from avser_fast.inference.triton_backend import GRAPHS
from avser_fast.inference.weights import read_any
from avser_fast.testing import assert_close

from .cases import CLIPS
from .gpu_parts import OURS, command
from .models import MEMBERS
from .peers import reason

WARM_UP, ROUNDS, CALLS = 20, 25, 20
#: Probabilities in bf16 beside float32.
TOLERANCE = 0.05
TRITON, TRITON_GRAPHS = f"{OURS}, Triton", f"{OURS}, Triton with CUDA graphs"
EAGER, COMPILED = "PyTorch eager AMP, channels-last", "torch.compile with CUDA graphs"

Run = Callable[[np.ndarray], np.ndarray]


def published() -> tuple[ModelSpec, dict[str, np.ndarray]]:
    spec = ModelSpec(network=MEMBERS["mdscm-published"].network)
    torch.manual_seed(0)
    return spec, {name: value.numpy() for name, value in nn.MDSCM(spec.network).state_dict().items()}


def default() -> tuple[ModelSpec, dict[str, np.ndarray]]:
    spec, tensors, _, _ = read_any("default")
    assert isinstance(spec, ModelSpec)
    return spec, dict(tensors)


def ours(spec: ModelSpec, tensors: dict[str, np.ndarray], graphs: bool) -> Run:
    os.environ[GRAPHS] = "1" if graphs else "0"
    try:
        made = avser_fast.Recognizer(spec, tensors, device="cuda", backend="triton", precision="bf16")
    finally:
        del os.environ[GRAPHS]
    return lambda clips: made.forward(clips)[0]


def plain(spec: ModelSpec, tensors: dict[str, np.ndarray], compiled: bool) -> Run:
    model: Any = nn.MDSCM(spec.network, backend="reference").eval().requires_grad_(False)
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, strict=False)
    model = model.to("cuda", memory_format=torch.channels_last)
    network = torch.compile(model, mode="reduce-overhead") if compiled else model

    def run(clips: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            x = torch.from_numpy(clips).pin_memory().to("cuda", non_blocking=True)
            return np.asarray(network(x).probabilities.float().cpu().numpy())

    return run


def times(runs: dict[str, Run], clips: np.ndarray) -> dict[str, dict[str, float]]:
    """Microseconds of a call of every contender, in turns."""
    for run in runs.values():
        for _ in range(WARM_UP):
            run(clips)
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                run(clips)
            took[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    return {name: {"median_us": statistics.median(v), "min_us": min(v)} for name, v in took.items()}


def measure(model: Callable[[], tuple[ModelSpec, dict[str, np.ndarray]]], compiled: bool) -> dict[str, Any]:
    spec, tensors = model()
    network = spec.network
    shape = (1, CLIPS, network.planes, network.clip_frames, network.mel_bands)
    clips = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    expected = avser_fast.Recognizer(spec, tensors, backend="reference").forward(clips)[0]
    builders: dict[str, Callable[[], Run]] = {
        TRITON: lambda: ours(spec, tensors, False),
        TRITON_GRAPHS: lambda: ours(spec, tensors, True),
        EAGER: lambda: plain(spec, tensors, False),
    }
    if compiled:
        del builders[TRITON], builders[EAGER]
        builders[COMPILED] = lambda: plain(spec, tensors, True)
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for name, build in builders.items():
        try:
            run = build()
            assert_close(run(clips), expected, TOLERANCE, name)
            runs[name] = run
        except Exception as error:  # whatever keeps a contender from running is what the results say of it
            failed[name] = reason(error)
    return {"clips": CLIPS, "precision": "bf16", "times": times(runs, clips), "failed": failed}


MODELS = {"mdscm-published": published, "default": default}
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: functools.partial(measure, model, False) for name, model in MODELS.items()},
    **{f"{name}-compiled": functools.partial(measure, model, True) for name, model in MODELS.items()},
}


if __name__ == "__main__":
    command("gpu-inference", PARTS, lambda content: {})
