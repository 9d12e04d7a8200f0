"""What can run a model: the engine without torch, and the torch reference.  Both offer the same five calls."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from .. import config
from ..errors import BackendError, ModelError
from ..precision import PRECISIONS, automatic
from . import features as front_end

MAX_THREADS = 1024


class Backend(Protocol):
    """``name``, ``device`` and ``precision`` are what ``info`` reports, ``ran`` what results say of all three."""

    name: str
    ran: str
    device: str
    precision: str

    def resample(self, samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray: ...
    def features(self, samples: np.ndarray, front: config.FrontEnd) -> np.ndarray: ...
    def clips(self, values: np.ndarray, rule: config.ClipRule) -> tuple[np.ndarray, np.ndarray]: ...
    def forward(self, clips: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
    def score(
        self, utterances: Sequence[np.ndarray], at_once: int, features: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...
    def info(self) -> dict[str, Any]: ...


def make_backend(
    spec: config.ModelSpec,
    tensors: Mapping[str, np.ndarray],
    *,
    device: str,
    precision: str,
    threads: int | None,
    backend: str,
    card: Mapping[str, Any] | None = None,
    calibration: Mapping[str, np.ndarray] | None = None,
) -> Backend:
    """The backend that was asked for, or BackendError with one sentence that says why not; never another one."""
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise BackendError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if precision not in ("auto", *PRECISIONS):
        raise BackendError(f"precision: expected 'auto', 'float32', 'bf16' or 'int8', got {precision!r}")
    if backend not in ("auto", "engine", "reference"):
        raise BackendError(f"backend: expected 'auto', 'engine' or 'reference', got {backend!r}")
    whole = isinstance(threads, int) and not isinstance(threads, bool)
    if threads is not None and not (whole and 1 <= threads <= MAX_THREADS):
        raise BackendError(f"threads: expected a whole number from 1 to {MAX_THREADS} or None, got {threads!r}")
    cuda = device.startswith("cuda")
    if backend == "engine" and cuda:
        raise BackendError(f"backend 'engine': expected device 'cpu' in this version, got {device!r}")
    if backend == "reference" or cuda:
        if precision not in ("auto", "float32"):
            raise BackendError(
                f"precision: expected 'auto' or 'float32' with backend 'reference', which also runs on GPUs, "
                f"got {precision!r}"
            )
        if threads is not None:
            raise BackendError(
                f"threads: expected None with backend 'reference', which runs in torch's own pool, got {threads}"
            )
        return Reference(spec, tensors, device if cuda else "cpu")
    return Engine(spec, tensors, threads, precision, card or {}, calibration)


class Engine:
    """``avser_fast._engine`` on the CPU; ``calibration`` are the ranges of int8, which the other precisions ignore."""

    name = "engine"
    device = "cpu"

    def __init__(
        self,
        spec: config.ModelSpec,
        tensors: Mapping[str, np.ndarray],
        threads: int | None,
        precision: str,
        card: Mapping[str, Any],
        calibration: Mapping[str, np.ndarray] | None,
    ) -> None:
        module = front_end.engine_module()
        self._module = module
        self.threads = threads or available_cpus()
        try:
            self.isa = module.cpu_isa()  # says so now when AVSER_FAST_CPU_ISA asks for what is not there
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"backend 'engine': {error}") from error
        self.precision, self.reason = automatic(card, self.isa) if precision == "auto" else (precision, "asked for")
        self.ran = self.name if self.precision == "float32" else f"{self.name}/{self.precision}"
        ranges = None
        if self.precision == "int8":
            if not calibration:
                raise ModelError(
                    "precision 'int8': expected a model file with calibrated ranges, got a model without; make one "
                    "with `avser-fast convert MODEL --precision int8 --calibrate DIR`"
                )
            ranges = dict(calibration)
        try:
            self._engine = module.Engine(
                json.dumps(spec.to_dict()), dict(tensors), precision=self.precision, calibration=ranges
            )
        except (ValueError, TypeError, KeyError, MemoryError) as error:
            raise ModelError(f"backend 'engine': the model cannot be packed ({error})") from error

    def resample(self, samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
        return front_end.resample(samples, from_rate, to_rate)

    def features(self, samples: np.ndarray, front: config.FrontEnd) -> np.ndarray:
        return front_end.features(samples, front, self.threads)

    def clips(self, values: np.ndarray, rule: config.ClipRule) -> tuple[np.ndarray, np.ndarray]:
        return front_end.clips_and_table(values, rule)

    def forward(self, clips: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        probabilities, features, clip_logits = self._engine.forward(
            np.ascontiguousarray(clips), None if valid is None else np.ascontiguousarray(valid), self.threads
        )
        return probabilities, features, clip_logits

    def calibrate(self, clips: np.ndarray) -> dict[str, np.ndarray]:
        """Lowest and highest value, (2, channels), of all that int8 rounds on clips (L, C, W, M); float32 only."""
        ranges: dict[str, np.ndarray] = self._engine.calibrate(clips[None])
        return ranges

    def score(
        self, utterances: Sequence[np.ndarray], at_once: int, features: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The clips of all utterances, ``at_once`` at a time: a clip's answer does not depend on its neighbours."""
        if not utterances:
            return
        counts = [len(clips) for clips in utterances]
        ends = np.cumsum(counts)
        clips = utterances[0] if len(utterances) == 1 else np.concatenate(utterances)
        logits, found = [], []
        for begin in range(0, len(clips), at_once):
            _, part_features, part_logits = self.forward(clips[None, begin : begin + at_once], None)
            logits.append(part_logits[0])
            if features:
                found.append(part_features[0])
        joined = np.concatenate(logits)
        joined_features = np.concatenate(found) if features else joined
        for end, count in zip(ends, counts):
            yield joined[end - count : end], joined_features[end - count : end]

    def info(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "device": self.device,
            "precision": self.precision,
            "precision_reason": self.reason,
            "isa": self.isa,
            "gpu": None,
            "threads": self.threads,
        }


class Reference:
    """``avser_fast.nn.MDSCM`` in torch, one utterance at a time, because torch's kernels change with the batch."""

    name = ran = "reference"
    precision = "float32"

    def __init__(self, spec: config.ModelSpec, tensors: Mapping[str, np.ndarray], device: str) -> None:
        try:
            import torch
        except ImportError as error:
            raise BackendError(f"backend 'reference': torch cannot be imported ({error}); pip install torch") from error
        from .. import nn

        if device != "cpu":
            if not torch.cuda.is_available():
                raise BackendError(f"device {device!r}: torch {torch.__version__} finds no usable CUDA GPU")
            index = int(device.partition(":")[2] or torch.cuda.current_device())
            if index >= torch.cuda.device_count():
                raise BackendError(f"device {device!r}: this machine has {torch.cuda.device_count()} GPU(s)")
            device = f"cuda:{index}"
        self.device = device
        self._torch = torch
        with torch.device("meta"):  # no random numbers are drawn for weights that are replaced
            network = nn.MDSCM(spec.network, backend="reference")
        network = network.to_empty(device="cpu")
        state = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
        for name in network.state_dict():
            if name.endswith(".num_batches_tracked"):
                state.setdefault(name, torch.zeros((), dtype=torch.int64))
        network.load_state_dict(state)
        self._network = network.eval().requires_grad_(False).to(device)

    def resample(self, samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
        from ..reference import resample

        return resample(self._torch.from_numpy(samples), from_rate, to_rate).numpy()

    def features(self, samples: np.ndarray, front: config.FrontEnd) -> np.ndarray:
        from ..reference import add_deltas, log_mel, normalize

        static = log_mel(self._torch.from_numpy(samples), **front_end.log_mel_options(front))
        return normalize(add_deltas(static, front.channels, front.delta_window), front).numpy()

    def clips(self, values: np.ndarray, rule: config.ClipRule) -> tuple[np.ndarray, np.ndarray]:
        from ..reference import clip_table, frame_clips

        clips, valid = frame_clips(self._torch.from_numpy(values), rule.clips, rule.clip_frames, rule.rule)
        table, _ = clip_table(values.shape[1], rule.clips, rule.clip_frames, rule.rule)
        return clips[valid].numpy(), table[valid].numpy()

    def forward(self, clips: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = []
        for i in range(len(clips)):
            votes = None if valid is None else valid[i : i + 1]
            rows.append(self._one(clips[i : i + 1], votes))
        probabilities, features, clip_logits = (np.concatenate(parts) for parts in zip(*rows))
        return probabilities, features, clip_logits

    def _one(self, clips: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, ...]:
        torch = self._torch
        with torch.inference_mode():
            x = torch.from_numpy(np.array(clips)).to(self.device)
            votes = None if valid is None else torch.from_numpy(np.array(valid)).to(self.device)
            if self.device == "cpu":
                output = self._network(x, votes)
            else:
                with exact_float32(torch):
                    output = self._network(x, votes)
            return tuple(part.cpu().numpy() for part in output)

    def score(
        self, utterances: Sequence[np.ndarray], at_once: int, features: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for clips in utterances:
            parts = [self._one(clips[None, i : i + at_once], None) for i in range(0, len(clips), at_once)]
            yield np.concatenate([p[2][0] for p in parts]), np.concatenate([p[1][0] for p in parts])

    def info(self) -> dict[str, Any]:
        torch = self._torch
        cpu = self.device == "cpu"
        return {
            "backend": self.name,
            "device": self.device,
            "precision": self.precision,
            "precision_reason": "backend 'reference' runs float32 only",
            "isa": torch.backends.cpu.get_cpu_capability().lower() if cpu else None,
            "gpu": None if cpu else torch.cuda.get_device_name(self.device),
            "threads": torch.get_num_threads() if cpu else None,
        }


_flags_lock = threading.Lock()


@contextmanager
def exact_float32(torch: Any) -> Iterator[None]:
    """float32 means float32: left alone, cuDNN multiplies in TF32 and may choose its algorithm by the clock.

    The flags are the whole process's, so one thread at a time holds them, and they are put back.
    """
    matmul, conv, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn
    with _flags_lock:
        before = matmul.fp32_precision, conv.fp32_precision, cudnn.deterministic, cudnn.benchmark
        try:
            matmul.fp32_precision = conv.fp32_precision = "ieee"
            cudnn.deterministic, cudnn.benchmark = True, False
            yield
        finally:
            matmul.fp32_precision, conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = before


def available_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
