"""What can run a model, and which of it is chosen: the engine without torch on a CPU or a GPU, the Triton kernels on a
GPU, the torch reference.  All offer the same calls."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from .. import config
from ..errors import BackendError, ModelError
from ..info import cuda_driver, gpu_verified
from ..precision import PRECISIONS, automatic
from . import features as front_end
from .weights import PARTS, Spec

if TYPE_CHECKING:
    from .. import nn

MAX_THREADS = 1024
#: Clips that go through a network on the CPU together; bounds the memory of long audio and of large batches.
CLIPS_AT_ONCE = 64
#: Clips (N, C, W, M) to their features (N, D) and logits (N, K).
Clipwise = Callable[[np.ndarray], "tuple[np.ndarray, np.ndarray]"]
#: Clips (B, L, C, W, M) and who votes (B, L), or None, to probabilities, features and logits.
Forward = Callable[[np.ndarray, "np.ndarray | None"], "tuple[np.ndarray, np.ndarray, np.ndarray]"]
#: Features (B, L, D) and logits (B, L, K) to the fused logits (B, K) and those of both branches.
Fuse = Callable[[np.ndarray, np.ndarray], "tuple[np.ndarray, np.ndarray, np.ndarray]"]


class Backend(Protocol):
    """``name``, ``device`` and ``precision`` are what ``info`` reports, ``ran`` what results say of all three.

    ``prepare`` makes of samples at the front end's rate what ``score`` takes, and says which frames the clips that vote
    hold: (L, clip_frames), 1-based, 0 = padding.  ``clips_at_once`` of them go through the networks together.
    """

    name: str
    ran: str
    device: str
    precision: str
    clips_at_once: int

    def resample(self, samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray: ...
    def prepare(
        self, samples: np.ndarray, front: config.FrontEnd, rule: config.ClipRule
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def forward(self, clips: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
    def score(self, utterances: Sequence[np.ndarray], features: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...
    def vote(self, clip_logits: np.ndarray, features: np.ndarray) -> np.ndarray: ...
    def info(self) -> dict[str, Any]: ...


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _parts(tensors: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The tensors of a system by network."""
    return [{k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in PARTS]


def join(found: Sequence[Any], concatenate: Any, maximum: Any) -> tuple[Any, Any]:
    """Features side by side and the larger logits of the networks' answers for the same clips."""
    (features, logits), *others = found
    for more, other in others:
        features, logits = concatenate((features, more), -1), maximum(logits, other)
    return features, logits


def split(logits: np.ndarray, features: np.ndarray, counts: Iterable[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both by utterance, of so many clips each."""
    begin = 0
    for count in counts:
        yield logits[begin : begin + count], features[begin : begin + count]
        begin += count


class Way(NamedTuple):
    """A way to run models on one kind of device, "cpu" or "cuda": ``why_not`` gives the sentence that says what keeps
    the backend from running on a device ("cpu", "cuda" or "cuda:N"), None for nothing."""

    device: str
    backend: str
    why_not: Callable[[str], str | None]
    precisions: tuple[str, ...]
    verified: str


def _engine_why_not(device: str) -> str | None:
    if device != "cpu":
        return f"backend 'engine': expected device 'cpu' in this version, got {device!r}"
    try:
        _engine()
    except BackendError as error:
        return str(error)
    return None


def _cuda_why_not(device: str) -> str | None:
    from .cuda_backend import why_not

    return why_not(device)


def _triton_why_not(device: str) -> str | None:
    from .triton_backend import why_not

    return why_not(device)


#: In the order of preference: "auto" is the first of its device that nothing keeps from running.  The reference, which
#: runs on both, has to be asked for.
WAYS = (
    Way(
        "cpu",
        "engine",
        _engine_why_not,
        PRECISIONS,
        "every instruction set against the float64 reference, on CPUs; the tiles of amx in emulation alone",
    ),
    Way(
        "cuda",
        "cuda",
        _cuda_why_not,
        ("float32", "tf32", "bf16", "fp16", "fp8"),
        "each kernel's own source, thread by thread, on an emulated GPU against the float64 reference",
    ),
    Way(
        "cuda",
        "triton",
        _triton_why_not,
        ("float32", "tf32", "bf16", "fp16"),
        "in Triton's interpreter on a CPU; ahead-of-time compiled for sm_80 and sm_90",
    ),
)


def ways() -> list[dict[str, Any]]:
    """``WAYS`` as plain data, ``why_not`` as the answer on this machine, ``verified`` with the GPUs that passed."""
    return [{**way._asdict(), "why_not": way.why_not(way.device), "verified": verified(way)} for way in WAYS]


def verified(way: Way) -> str:
    """How the kernels of a way were verified, and on what."""
    if way.device == "cpu":
        return way.verified
    gpus = [f"{x['gpu']} ({x['date']})" for x in gpu_verified().get(way.backend, ())]
    return f"{way.verified}; {'on ' + ', '.join(gpus) if gpus else 'not on a GPU yet'}"


def choose(device: str, backend: str) -> Way:
    """The way of the backend asked for, or of "auto" on the device; BackendError with what keeps each from running."""
    possible = [way for way in WAYS if backend == way.backend or (backend == "auto" and device.startswith(way.device))]
    reasons: dict[str, None] = {}
    for way in possible:
        why = way.why_not(device)
        if why is None:
            return way
        reasons[why] = None
    raise BackendError("; ".join(reasons))


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}"


def make_backend(
    spec: Spec,
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
    names = ("auto", *(way.backend for way in WAYS), "reference")
    if backend not in names:
        raise BackendError(f"backend: expected {_listed(names)}, got {backend!r}")
    whole = isinstance(threads, int) and not isinstance(threads, bool)
    if threads is not None and not (whole and 1 <= threads <= MAX_THREADS):
        raise BackendError(f"threads: expected a whole number from 1 to {MAX_THREADS} or None, got {threads!r}")
    device = "cpu" if device == "auto" else device
    precisions: tuple[str, ...] = ("float32",)
    if backend != "reference":
        way = choose(device, backend)
        backend, precisions = way.backend, way.precisions
    if precision not in ("auto", *precisions):
        raise BackendError(
            f"precision: expected {_listed(('auto', *precisions))} with backend {backend!r}, got {precision!r}"
        )
    if backend == "reference":
        if threads is not None:
            raise BackendError(
                f"threads: expected None with backend 'reference', which runs in torch's own pool, got {threads}"
            )
        return Reference(spec, tensors, device)
    if backend == "cuda":
        from .cuda_backend import Cuda

        return Cuda(spec, tensors, threads, precision, card or {}, device)
    if backend == "triton":
        from .triton_backend import Triton

        return Triton(spec, tensors, threads, precision, card or {}, device)
    if precision == "int8" and not isinstance(spec, config.ModelSpec):
        raise BackendError(
            f"precision 'int8': expected a model of kind 'mdscm', got one of kind {spec.kind!r}, which runs in float32 "
            "and bf16"
        )
    return Engine(spec, tensors, threads, precision, card or {}, calibration)


def _engine() -> tuple[Any, str]:
    """The compiled module and the instruction set that it runs, or BackendError."""
    module = front_end.engine_module()
    try:
        return module, module.cpu_isa()  # says so now when AVSER_FAST_CPU_ISA asks for what is not there
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"backend 'engine': {error}") from error


def choose_precision(spec: Spec, precision: str, card: Mapping[str, Any], processor: str) -> tuple[str, str]:
    """The precision that runs on ``processor``, an instruction set or "cuda", and why."""
    if precision != "auto":
        return precision, "asked for"
    if isinstance(spec, config.ModelSpec):
        return automatic(card, processor)
    return "float32", f"auto: a model of kind {spec.kind!r} is float32 unless asked"


class CompiledFrontEnd:
    """From samples to clips on the CPU without torch, in ``threads`` threads."""

    threads: int
    clips_at_once = CLIPS_AT_ONCE

    def resample(self, samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
        return front_end.resample(samples, from_rate, to_rate)

    def prepare(
        self, samples: np.ndarray, front: config.FrontEnd, rule: config.ClipRule
    ) -> tuple[np.ndarray, np.ndarray]:
        return front_end.clips_and_table(front_end.features(samples, front, self.threads), rule)


class Engine(CompiledFrontEnd):
    """``avser_fast._engine`` on the CPU; ``calibration`` are the ranges of int8, which the other precisions ignore.

    The fusion is float32 in every precision.
    """

    name = "engine"
    device = "cpu"

    def __init__(
        self,
        spec: Spec,
        tensors: Mapping[str, np.ndarray],
        threads: int | None,
        precision: str,
        card: Mapping[str, Any],
        calibration: Mapping[str, np.ndarray] | None,
    ) -> None:
        self._module, self.isa = _engine()
        self._choose(spec, precision, card, self.isa, threads)
        ranges = None
        if self.precision == "int8":
            if not calibration:
                raise ModelError(
                    "precision 'int8': expected a model file with calibrated ranges, got a model without; make one "
                    "with `avser-fast convert MODEL --precision int8 --calibrate DIR`"
                )
            ranges = dict(calibration)
        self._build(spec, tensors, ranges)

    def _choose(self, spec: Spec, precision: str, card: Mapping[str, Any], processor: str, threads: int | None) -> None:
        self.threads = threads or available_cpus()
        self.precision, self.reason = choose_precision(spec, precision, card, processor)
        self.ran = self.name if self.precision == "float32" else f"{self.name}/{self.precision}"

    def _build(self, spec: Spec, tensors: Mapping[str, np.ndarray], ranges: dict[str, np.ndarray] | None) -> None:
        """The networks of the model, and how a system fuses them."""
        self._whole: Forward | None = None
        self._fuse: Fuse | None = None
        self._networks: list[Clipwise] = []
        try:
            if isinstance(spec, config.ModelSpec):
                self._whole = self._add_mdscm(spec.network, tensors, ranges)
            elif isinstance(spec, config.EncoderSpec):
                self._add_encoder(spec, tensors)
            else:
                speech, encoder, fusion = _parts(tensors)
                self._add_mdscm(spec.network, speech)
                self._add_encoder(spec, encoder)
                self._fuse = self._fusion(spec.fusion, fusion)
        except (ValueError, TypeError, KeyError, MemoryError) as error:
            raise ModelError(f"backend {self.name!r}: the model cannot be packed ({error})") from error

    def _mdscm(
        self, network: config.MDSCM, tensors: Mapping[str, np.ndarray], ranges: dict[str, np.ndarray] | None
    ) -> Forward:
        engine = self._engine = self._module.Engine(
            json.dumps({"network": config.plain(network)}), dict(tensors),
            precision=self.precision, calibration=ranges,
        )  # fmt: skip
        return lambda clips, valid: engine.forward(clips, valid, self.threads)

    def _resnet18(self, encoder: config.AVRE, shape: tuple[int, int], tensors: Mapping[str, np.ndarray]) -> Forward:
        resnet = self._module.ResNet18(
            dict(tensors), in_channels=encoder.in_channels, classes=encoder.classes, precision=self.precision
        )
        return lambda clips, valid: resnet.forward(clips, valid, self.threads)

    def _fusion(self, fusion: config.Fusion, tensors: Mapping[str, np.ndarray]) -> Fuse:
        fuse = self._module.Fusion(dict(tensors), **dataclasses.asdict(fusion))
        return lambda features, scores: fuse.forward(features, scores, self.threads)

    def _add_mdscm(
        self, network: config.MDSCM, tensors: Mapping[str, np.ndarray], ranges: dict[str, np.ndarray] | None = None
    ) -> Forward:
        forward = self._mdscm(network, tensors, ranges)

        def run(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            _, features, logits = forward(np.ascontiguousarray(clips[:, : network.planes])[None], None)
            return features[0], logits[0]

        self._networks.append(run)
        return forward

    def _add_encoder(self, spec: config.EncoderSpec | config.SystemSpec, tensors: Mapping[str, np.ndarray]) -> None:
        encoder = spec.encoder
        if encoder.body == "mdscm":
            self._add_mdscm(encoder.mdscm, tensors)
            return
        size = (spec.clip_rule.clip_frames, spec.front_end.mel_bands)
        forward = self._resnet18(encoder, size, tensors)
        # A clip of padding alone, of which a short utterance has many under the published rule, is computed once.
        _, padding_features, padding_logits = forward(np.zeros((1, 1, encoder.in_channels, *size), np.float32), None)

        def run(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            clips = clips[:, : encoder.in_channels]
            heard = clips.any((1, 2, 3))
            features, logits = (np.repeat(x[0], len(clips), 0) for x in (padding_features, padding_logits))
            if heard.any():
                _, found, found_logits = forward(np.ascontiguousarray(clips[heard])[None], None)
                features[heard], logits[heard] = found[0], found_logits[0]
            return features, logits

        self._networks.append(run)

    def _clip_outputs(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return join([network(clips) for network in self._networks], np.concatenate, np.maximum)

    def vote(self, clip_logits: np.ndarray, features: np.ndarray) -> np.ndarray:
        """(L, K) logits and (L, D) features of an utterance's clips to its logits (K,) in float64."""
        if self._fuse is None:
            return np.asarray(clip_logits.astype(np.float64).mean(0))
        fused, _, _ = self._fuse(features[None], clip_logits[None])
        return np.asarray(fused[0].astype(np.float64))

    def forward(self, clips: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._whole is not None:
            return self._whole(np.ascontiguousarray(clips), None if valid is None else np.ascontiguousarray(valid))
        batch, count = clips.shape[:2]
        features, clip_logits = (
            part.reshape(batch, count, -1) for part in self._clip_outputs(clips.reshape(-1, *clips.shape[2:]))
        )
        rows = []
        for i in range(batch):
            voting = slice(None) if valid is None else valid[i]
            rows.append(softmax(self.vote(clip_logits[i][voting], features[i][voting])).astype(np.float32))
        return np.stack(rows), features, clip_logits

    def calibrate(self, clips: np.ndarray) -> dict[str, np.ndarray]:
        """Lowest and highest value, (2, channels), of all that int8 rounds on clips (L, C, W, M); float32 only."""
        ranges: dict[str, np.ndarray] = self._engine.calibrate(clips[None])
        return ranges

    def score(self, utterances: Sequence[np.ndarray], features: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The clips of all utterances, so many at a time: a clip's answer does not depend on its neighbours."""
        if not utterances:
            return
        clips = utterances[0] if len(utterances) == 1 else np.concatenate(utterances)
        logits, found = [], []
        for begin in range(0, len(clips), self.clips_at_once):
            part_features, part_logits = self._clip_outputs(clips[begin : begin + self.clips_at_once])
            logits.append(part_logits)
            if features:
                found.append(part_features)
        joined = np.concatenate(logits)
        yield from split(joined, np.concatenate(found) if features else joined, map(len, utterances))

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
    """``avser_fast.nn`` in torch, one utterance at a time, because torch's kernels change with the batch."""

    name = ran = "reference"
    precision = "float32"
    clips_at_once = CLIPS_AT_ONCE

    def __init__(self, spec: Spec, tensors: Mapping[str, np.ndarray], device: str) -> None:
        try:
            import torch
        except ImportError as error:
            raise BackendError(f"backend 'reference': torch cannot be imported ({error}); pip install torch") from error
        self.device = device if device == "cpu" else usable_gpu(device)
        self._torch = torch
        self._mdscm, self._encoder, self._fusion = load_modules(spec, tensors, self.name)
        for module in (self._mdscm, self._encoder, self._fusion):
            if module is not None:
                module.to(self.device)

    def resample(self, samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
        from ..reference import resample

        return resample(self._torch.from_numpy(samples), from_rate, to_rate).numpy()

    def prepare(
        self, samples: np.ndarray, front: config.FrontEnd, rule: config.ClipRule
    ) -> tuple[np.ndarray, np.ndarray]:
        from ..reference import add_deltas, add_voice, clip_table, frame_clips, log_mel, normalize, voice

        static = log_mel(self._torch.from_numpy(samples), **front_end.log_mel_options(front))
        values = normalize(add_deltas(static, front.channels, front.delta_window), front)
        if front.voice:
            values = add_voice(values, voice(self._torch.from_numpy(samples), front))
        clips, valid = frame_clips(values, rule.clips, rule.clip_frames, rule.rule)
        table, _ = clip_table(values.shape[1], rule.clips, rule.clip_frames, rule.rule)
        return clips[valid].numpy(), table[valid].numpy()

    def forward(self, clips: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = []
        for i in range(len(clips)):
            features, logits = self._clip_outputs(clips[i])
            voting = slice(None) if valid is None else valid[i]
            probabilities = softmax(self.vote(logits[voting], features[voting])).astype(np.float32)
            rows.append((probabilities, features, logits))
        probabilities, features, logits = (np.stack(parts) for parts in zip(*rows))
        return probabilities, features, logits

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with self._torch.inference_mode():
            if self.device == "cpu":
                yield
            else:
                with float32_products("ieee"):
                    yield

    def _clip_outputs(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Clips (N, C, W, M) of one utterance to their features (N, D) and logits (N, K)."""
        torch = self._torch
        with self._computing():
            x = torch.from_numpy(np.array(clips[None])).to(self.device)
            found = []
            if self._mdscm is not None:
                found.append(self._mdscm(x)[1:])
            if self._encoder is not None:
                found.append(self._encoder.encode(x[:, :, : self._encoder.encoder.in_channels]))
            features, logits = join(found, torch.cat, torch.maximum)
            return features[0].cpu().numpy(), logits[0].cpu().numpy()

    def vote(self, clip_logits: np.ndarray, features: np.ndarray) -> np.ndarray:
        """As ``Engine.vote``."""
        if self._fusion is None:
            return np.asarray(clip_logits.astype(np.float64).mean(0))
        with self._computing():
            inputs = (self._torch.from_numpy(np.array(part[None])).to(self.device) for part in (features, clip_logits))
            return np.asarray(self._fusion(*inputs).fused[0].double().cpu().numpy())

    def score(self, utterances: Sequence[np.ndarray], features: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        most = self.clips_at_once
        for clips in utterances:
            parts = [self._clip_outputs(clips[i : i + most]) for i in range(0, len(clips), most)]
            yield np.concatenate([p[1] for p in parts]), np.concatenate([p[0] for p in parts])

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


def load_modules(
    spec: Spec, tensors: Mapping[str, np.ndarray], backend: str
) -> tuple[nn.MDSCM | None, nn.AVRE | None, nn.Fusion | None]:
    """The networks that a model has, on the CPU in eval mode, without domain classifier."""
    import torch

    from .. import nn

    mdscm = encoder = fusion = None
    with torch.device("meta"):  # no random numbers are drawn for weights that are replaced
        if not isinstance(spec, config.EncoderSpec):
            mdscm = nn.MDSCM(spec.network, backend=backend)
        if not isinstance(spec, config.ModelSpec):
            encoder = nn.AVRE(spec.encoder, backend=backend)
            del encoder.domain
        if isinstance(spec, config.SystemSpec):
            fusion = nn.Fusion(spec.fusion)
    parts = _parts(tensors) if isinstance(spec, config.SystemSpec) else [tensors] * 3
    for module, part in zip((mdscm, encoder, fusion), parts):
        if module is None:
            continue
        module.to_empty(device="cpu")
        state = {name: torch.from_numpy(np.array(value)) for name, value in part.items()}
        for name in module.state_dict():
            if name.endswith(".num_batches_tracked"):
                state.setdefault(name, torch.zeros((), dtype=torch.int64))
        module.load_state_dict(state)
        module.eval().requires_grad_(False)
    return mdscm, encoder, fusion


def why_no_gpu(device: str) -> str | None:
    """What keeps the driver from showing a device ("cuda" or "cuda:N"), in one sentence, or None; needs no torch."""
    driver = cuda_driver()
    if "error" in driver:
        return f"device {device!r}: expected an NVIDIA driver, got {driver['error']}"
    count = len(driver["devices"])
    if count <= int(device.partition(":")[2] or 0):
        return f"device {device!r}: expected an NVIDIA GPU of this number, but the driver shows {count}"
    return None


def usable_gpu(device: str) -> str:
    """``device`` with its number, or BackendError if torch cannot use it."""
    import torch

    if not torch.cuda.is_available():
        raise BackendError(f"device {device!r}: torch {torch.__version__} finds no usable CUDA GPU")
    index = int(device.partition(":")[2] or torch.cuda.current_device())
    if index >= torch.cuda.device_count():
        raise BackendError(f"device {device!r}: this machine has {torch.cuda.device_count()} GPU(s)")
    return f"cuda:{index}"


_flags_lock = threading.Lock()


@contextmanager
def float32_products(how: str) -> Iterator[None]:
    """Within, torch and the Triton kernels multiply float32 on a GPU as "ieee" or as "tf32".

    Left alone, cuDNN multiplies in TF32 and may choose its algorithm by the clock.  The flags are the whole process's,
    so one thread at a time holds them, and they are put back.
    """
    import torch

    cudnn: Any = torch.backends.cudnn  # its parts are made at run time
    matmul, conv = torch.backends.cuda.matmul, cudnn.conv
    with _flags_lock:
        before = matmul.fp32_precision, conv.fp32_precision, cudnn.deterministic, cudnn.benchmark
        try:
            matmul.fp32_precision = conv.fp32_precision = how
            cudnn.deterministic, cudnn.benchmark = True, False
            yield
        finally:
            matmul.fp32_precision, conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = before


def available_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
