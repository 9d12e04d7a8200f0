"""``python -m benchmarks.gpu_agreement MODEL RECORDINGS OUT [--limit N]``: what precisions of the CUDA engine decide.

Every recording of a folder through the model in every precision, against the CPU engine in float32. On the emulated GPU
where there is no real one (minutes: every thread of every kernel is a fiber), which the result says. Writes
``OUT/gpu-agreement.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import avser_fast
from avser_fast.errors import BackendError
from avser_fast.inference import backends, cuda_backend, features
from avser_fast.inference.convert import agreement, find_audio

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = next(way.precisions for way in backends.WAYS if way.backend == "cuda")


def emulate() -> None:
    """From here on "cuda" is the emulated GPU of the tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    import emulated

    features.engine_module = emulated.OnEmulatedGpu  # type: ignore[assignment]
    cuda_backend.why_no_gpu = lambda device: None


def scores(recognizer: avser_fast.Recognizer, files: list[Path]) -> np.ndarray:
    labels = recognizer.spec.labels
    return np.array([[result.scores[label] for label in labels] for result in recognizer.infer(files)])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("recordings")
    parser.add_argument("out")
    parser.add_argument("--limit", type=int, help="so many recordings, evenly spread")
    options = parser.parse_args(arguments)
    files = find_audio(options.recordings, "recordings", options.limit)
    expected = scores(avser_fast.load(options.model, precision="float32"), files)
    try:
        avser_fast.load(options.model, device="cuda", backend="cuda")
    except BackendError:
        print("gpu_agreement: no GPU that can be used: on the emulated one")
        emulate()
    content: dict[str, Any] = {}
    for precision in PRECISIONS:
        recognizer = avser_fast.load(options.model, device="cuda", backend="cuda", precision=precision)
        content.setdefault("device", recognizer.info()["gpu"])
        content.setdefault("network", recognizer.info()["network"])
        content.setdefault("precisions", {})[precision] = agreement(expected, scores(recognizer, files))
        print(precision, content["precisions"][precision], flush=True)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu-agreement.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
