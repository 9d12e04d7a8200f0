"""Networks on the Triton kernels: ``avser_fast.nn`` in eval mode on a GPU, or on the CPU in Triton's interpreter.

An utterance is computed by itself, filled up to a number of clips that depends on its own alone.  In the Triton kernels
a clip's bits would not depend on its neighbours, but in torch's products between them they do: torch chooses those by
the number of rows.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from ..errors import BackendError
from .backends import (
    WAYS,
    CompiledFrontEnd,
    available_cpus,
    choose_precision,
    float32_products,
    join,
    load_modules,
    softmax,
    usable_gpu,
    verified,
    why_no_gpu,
)
from .weights import Spec

#: Clips of an utterance that go through the networks together, at most.
MOST_CLIPS = 64
GRAPHS = "AVSER_FAST_CUDA_GRAPHS"

#: A batch of one utterance's clips (1, N, C, W, M) to their features (1, N, D) and logits (1, N, K), on the device.
Network = Callable[[Any], "tuple[Any, Any]"]


def why_not(device: str) -> str | None:
    """What keeps the Triton kernels from running on "cpu" (they do in the interpreter), "cuda" or "cuda:N", or None."""
    cuda = device.startswith("cuda")
    reason = why_no_gpu(device) if cuda else None
    if reason is not None:
        return reason
    for package in ("torch", "triton"):
        if find_spec(package) is None:
            return f"backend 'triton': expected the package {package}, which is not installed"
    try:
        import torch

        from ..ops import backends as kernels

        if not cuda and not kernels.INTERPRETED:
            return f"backend 'triton': expected device 'cuda' or 'cuda:N', got {device!r}"
        return kernels.why_not("triton", torch.empty(0, device=usable_gpu(device) if cuda else device))
    except ImportError as error:
        return f"backend 'triton': torch cannot be imported ({error})"
    except BackendError as error:
        return str(error)


def bucket(clips: int) -> int:
    """The number of clips that so many are filled up to: a power of two, so that there are few shapes to compile."""
    return 1 << (clips - 1).bit_length()


class Capture(Protocol):
    """How a function without arguments becomes something that can be replayed; calls inside ``in_order`` that share
    buffers follow each other on the device."""

    def capture(self, run: Callable[[], tuple[Any, Any]]) -> tuple[Callable[[], object], tuple[Any, Any]]: ...
    def in_order(self) -> AbstractContextManager[None]: ...


class CudaGraphs:
    """``Capture`` on a GPU.  It has not been run on one yet."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = torch.cuda
        self._device = device
        self._done = torch.cuda.Event()

    def capture(self, run: Callable[[], tuple[Any, Any]]) -> tuple[Callable[[], object], tuple[Any, Any]]:
        cuda = self._cuda
        stream = cuda.Stream(self._device)
        stream.wait_stream(cuda.current_stream(self._device))
        with cuda.stream(stream):
            run()  # compiles kernels and allocates workspaces, which a graph cannot
        cuda.current_stream(self._device).wait_stream(stream)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = run()
        return graph.replay, outputs

    @contextmanager
    def in_order(self) -> Iterator[None]:
        stream = self._cuda.current_stream(self._device)
        stream.wait_event(self._done)
        yield
        self._done.record(stream)


class Replays:
    """A network that is captured at the first batch of each shape, and replayed from then on."""

    def __init__(self, network: Network, how: Capture) -> None:
        self._network, self._how = network, how
        self._shapes: dict[tuple[int, ...], tuple[Any, Callable[[], object], tuple[Any, Any]]] = {}
        self._lock = threading.Lock()

    def __call__(self, x: Any) -> tuple[Any, Any]:
        with self._lock, self._how.in_order():
            shape = tuple(x.shape)
            if shape not in self._shapes:
                own = x.clone()
                self._shapes[shape] = (own, *self._how.capture(lambda: self._network(own)))
            own, replay, (features, logits) = self._shapes[shape]
            own.copy_(x)
            replay()
            return features.clone(), logits.clone()


class Triton(CompiledFrontEnd):
    """``ran`` names who computed the networks: the Triton kernels, torch's convolutions for a ResNet-18 body, or both.

    The front end runs on the CPU, in ``threads`` threads; so does the fusion, in torch and float32 in every precision.
    In bf16 and fp16 the products of the bodies are narrow; norms, statistics path and classifiers are float32.
    """

    name = "triton"

    def __init__(
        self,
        spec: Spec,
        tensors: Mapping[str, np.ndarray],
        threads: int | None,
        precision: str,
        card: Mapping[str, Any],
        device: str,
    ) -> None:
        import torch

        from ..nn.mdscm import MDSCMBody, fused

        graphs = os.environ.get(GRAPHS, "0")
        if graphs not in ("0", "1"):
            raise BackendError(f"{GRAPHS}: expected 0 or 1, got {graphs!r}")
        self._torch = torch
        self._cuda = device != "cpu"
        self.device = usable_gpu(device) if self._cuda else device
        self.threads = threads or available_cpus()
        self.precision, self.reason = choose_precision(spec, precision, card, "cuda")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        mdscm, encoder, self._fusion = load_modules(spec, tensors, self.name)
        self.parts = {"front end": "engine on the CPU"}
        for part, module in (("mdscm", mdscm), ("encoder", encoder)):
            if module is None:
                continue
            if isinstance(module.body, MDSCMBody):
                # Raises where the network has more than the kernels take.
                fused(self.name, torch.empty(0, device=self.device, dtype=dtype), module.body.network)
            self.parts[part] = self.name if isinstance(module.body, MDSCMBody) else "torch"
            if dtype is not None:
                narrow(module.body, dtype)
            module.to(self.device)
        networks: list[Network] = []
        if mdscm is not None:
            networks.append(lambda x: mdscm(x)[1:])
        if encoder is not None:
            networks.append(lambda x: encoder.encode(x[:, :, : encoder.encoder.in_channels]))
        ran = "+".join(dict.fromkeys(self.parts[part] for part in ("mdscm", "encoder") if part in self.parts))
        self.ran = ran if self.precision == "float32" else f"{ran}/{self.precision}"
        if self._fusion is not None:
            self.parts["fusion"] = "torch on the CPU"

        def network(x: Any) -> tuple[Any, Any]:
            return join([each(x) for each in networks], torch.cat, torch.maximum)

        self.graphs = self._cuda and graphs == "1"
        self._network: Network = Replays(network, CudaGraphs(self.device)) if self.graphs else network

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        with self._torch.inference_mode(), float32_products("tf32" if self.precision == "tf32" else "ieee"):
            if self._cuda:
                with self._torch.cuda.device(self.device):
                    yield
            else:
                yield

    def _queue(self, clips: np.ndarray) -> tuple[Any, Any]:
        """Features (N, D) and logits (N, K) of one utterance's clips (N, C, W, M), still to be computed on a GPU, on
        their way into host memory."""
        torch = self._torch
        found = []
        for begin in range(0, len(clips), MOST_CLIPS):
            part = clips[begin : begin + MOST_CLIPS]
            filled = torch.zeros((1, bucket(len(part)), *part.shape[1:]), pin_memory=self._cuda)
            filled.numpy()[0, : len(part)] = part
            features, logits = self._network(filled.to(self.device, non_blocking=True))
            found.append((features[0, : len(part)], logits[0, : len(part)]))
        features, logits = (torch.cat(parts).to("cpu", non_blocking=True) for parts in zip(*found))
        return features, logits

    def _outputs(self, utterances: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Features and logits of each utterance's clips; waits for the device once, at the end."""
        with self._on_device():
            queued = [self._queue(clips) for clips in utterances]
        if self._cuda:
            done = self._torch.cuda.Event()
            done.record(self._torch.cuda.current_stream(self.device))
            done.synchronize()  # of an event, which torch's search for waiting (set_sync_debug_mode) lets pass
        return [(features.numpy(), logits.numpy()) for features, logits in queued]

    def forward(self, clips: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        outputs = self._outputs(list(clips))
        rows = []
        for i, (features, logits) in enumerate(outputs):
            voting = slice(None) if valid is None else valid[i]
            rows.append(softmax(self.vote(logits[voting], features[voting])).astype(np.float32))
        return np.stack(rows), np.stack([found for found, _ in outputs]), np.stack([logits for _, logits in outputs])

    def score(self, utterances: Sequence[np.ndarray], features: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All utterances are queued before the first is waited for; they go alone."""
        for found, logits in self._outputs(utterances):
            yield logits, found

    def vote(self, clip_logits: np.ndarray, features: np.ndarray) -> np.ndarray:
        """As ``Engine.vote``."""
        if self._fusion is None:
            return np.asarray(clip_logits.astype(np.float64).mean(0))
        with self._torch.inference_mode():
            inputs = (self._torch.from_numpy(np.array(part[None])) for part in (features, clip_logits))
            return np.asarray(self._fusion(*inputs).fused[0].double().numpy())

    def info(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "device": self.device,
            "precision": self.precision,
            "precision_reason": self.reason,
            "isa": None,
            "gpu": self._torch.cuda.get_device_name(self.device) if self._cuda else None,
            "threads": self.threads,
            "parts": dict(self.parts),
            "cuda_graphs": self.graphs,
            "verified": next(verified(way) for way in WAYS if way.backend == self.name),
        }


def narrow(body: Any, dtype: Any) -> None:
    """Products and maps of a body in ``dtype``, its norms and what comes out in float32."""
    import torch

    for part in body.modules():
        if isinstance(part, (torch.nn.Conv2d, torch.nn.Linear)):
            part.to(dtype)
    body.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    body.register_forward_hook(lambda _, inputs, output: output.float())
