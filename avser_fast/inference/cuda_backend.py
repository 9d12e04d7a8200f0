"""Inference on the CUDA kernels of ``avser_fast._engine``, without torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .. import config
from ..errors import BackendError, InputError
from . import features as front_end
from .backends import WAYS, Engine, Forward, Fuse, join, softmax, split, verified, why_no_gpu
from .weights import Spec


def device_index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def why_not(device: str) -> str | None:
    """What keeps the CUDA kernels from running on "cuda" or "cuda:N", or None."""
    if not device.startswith("cuda"):
        return f"backend 'cuda': expected device 'cuda' or 'cuda:N', got {device!r}"
    reason = why_no_gpu(device)
    if reason is not None:
        return reason
    try:
        module = front_end.engine_module()
        if not module.build_info()["cuda"]:
            return f"backend 'cuda': the CUDA kernels are not part of this build ({module.build_info()['cuda_reason']})"
        info = module.gpu_info(device_index(device))
    except BackendError as error:
        return f"backend 'cuda': {error}"
    if info["capability"] < (8, 0):
        capability = ".".join(map(str, info["capability"]))
        return f"backend 'cuda': expected compute capability 8.0 or newer, got {info['name']} ({capability})"
    return None


class Cuda(Engine):
    """Front end, clips and networks on a GPU; resampling and the vote are the host's.  The fusion is float32 in every
    precision."""

    name = "cuda"
    clips_at_once = 1024

    def __init__(
        self,
        spec: Spec,
        tensors: Mapping[str, np.ndarray],
        threads: int | None,
        precision: str,
        card: Mapping[str, Any],
        device: str,
    ) -> None:
        if threads is not None:
            raise BackendError(f"threads: expected None with backend 'cuda', whose work is the GPU's, got {threads}")
        self._module = front_end.engine_module()
        self._index = device_index(device)
        self.device = f"cuda:{self._index}"
        self._choose(spec, precision, card, "cuda", threads)
        self._gpu_networks: list[tuple[Any, int]] = []  # and the planes that they read
        self._classes = len(spec.labels)
        self._build(spec, tensors, None)
        self._speech = self._module.GpuSpeech(
            [network for network, _ in self._gpu_networks], device=self._index,
            **front_end.clip_options(spec.front_end, spec.clip_rule),
        )  # fmt: skip

    @property
    def _on(self) -> dict[str, Any]:
        return {"precision": self.precision, "device": self._index}

    def _mdscm(
        self, network: config.MDSCM, tensors: Mapping[str, np.ndarray], ranges: dict[str, np.ndarray] | None
    ) -> Forward:
        described = json.dumps({"network": config.plain(network)})
        return self._added(self._module.GpuEngine(described, dict(tensors), **self._on), network.planes)

    def _resnet18(self, encoder: config.AVRE, shape: tuple[int, int], tensors: Mapping[str, np.ndarray]) -> Forward:
        made = self._module.GpuResNet18(
            dict(tensors), in_channels=encoder.in_channels, height=shape[0], width=shape[1], classes=encoder.classes,
            **self._on,
        )  # fmt: skip
        return self._added(made, encoder.in_channels)

    def _added(self, network: Any, channels: int) -> Forward:
        self._gpu_networks.append((network, channels))
        forward: Forward = network.forward
        return forward

    def _fusion(self, fusion: config.Fusion, tensors: Mapping[str, np.ndarray]) -> Fuse:
        forward: Fuse = self._module.GpuFusion(dict(tensors), **dataclasses.asdict(fusion), device=self._index).forward
        return forward

    def calibrate(self, clips: np.ndarray) -> dict[str, np.ndarray]:
        raise BackendError("calibrate: expected backend 'engine', got 'cuda', which has no int8")

    def prepare(
        self, samples: np.ndarray, front: config.FrontEnd, rule: config.ClipRule
    ) -> tuple[np.ndarray, np.ndarray]:
        """The samples as they are; the GPU makes clips of them."""
        frames, voting = self._speech.frames_of(len(samples)), self._speech.clips_of(len(samples))
        table = self._module.clip_table(frames, rule.clips, rule.clip_frames, rule.rule)
        return samples, table[:voting]

    def score(self, utterances: Sequence[np.ndarray], features: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if not utterances:
            return
        found, logits = join(self._speech.forward(list(utterances)), np.concatenate, np.maximum)
        yield from split(logits, found, (self._speech.clips_of(len(samples)) for samples in utterances))

    # On torch's tensors in the GPU's memory, queued on torch's current stream

    def holds(self, tensor: Any) -> bool:
        """Whether it is a tensor in a GPU's memory; InputError where it is not this GPU's."""
        if not getattr(tensor, "is_cuda", False):
            return False
        if str(tensor.device) != self.device:
            raise InputError(f"tensor: expected one on {self.device} or on the CPU, got one on {tensor.device}")
        return True

    def forward_tensors(self, clips: Any, valid: Any) -> tuple[Any, Any, Any]:
        """As ``forward``, of and with torch tensors; ``valid`` is an array."""
        import torch

        batch, count = clips.shape[:2]
        votes = None if valid is None else torch.from_numpy(np.ascontiguousarray(valid)).to(clips.device)
        stream, found = self._stream(clips), []
        for network, channels in self._gpu_networks:
            own = clips[:, :, :channels].contiguous()
            outputs = self._outputs(clips, network, batch, count)
            addresses = (outputs[2], outputs[0], outputs[1])  # probabilities come first
            network.forward_on_device(
                own.data_ptr(), 0 if votes is None else votes.data_ptr(), batch, count,
                *(x.data_ptr() for x in addresses), stream,
            )  # fmt: skip
            found.append(outputs)
        return self._joined(found, valid)

    def forward_sample_tensors(self, samples: Any) -> tuple[Any, Any, Any]:
        """As ``forward_tensors``, from samples (B, n), int16 or float32, at int16 scale."""
        samples = samples if samples.stride(1) == 1 else samples.contiguous()
        batch, length = samples.shape
        count = self._speech.clips_of(length)
        found = [self._outputs(samples, network, batch, count) for network, _ in self._gpu_networks]
        self._speech.forward_on_device(
            samples.data_ptr(), str(samples.dtype).removeprefix("torch."), batch, length, samples.stride(0),
            [tuple(x.data_ptr() for x in outputs) for outputs in found], self._stream(samples),
        )  # fmt: skip
        return self._joined(found, None)

    def _stream(self, tensor: Any) -> int:
        import torch

        return int(torch.cuda.current_stream(tensor.device).cuda_stream)

    def _outputs(self, like: Any, network: Any, batch: int, count: int) -> tuple[Any, Any, Any]:
        """Features, logits and probabilities of a network, still to be computed."""
        import torch

        shapes = ((batch, count, network.features), (batch, count, self._classes), (batch, self._classes))
        features, logits, probabilities = (like.new_empty(shape, dtype=torch.float32) for shape in shapes)
        return features, logits, probabilities

    def _joined(self, found: Sequence[tuple[Any, Any, Any]], valid: Any) -> tuple[Any, Any, Any]:
        """(probabilities, features, logits) of all networks; two LSTMs of a system read them on the host."""
        import torch

        if self._fuse is None:
            ((features, logits, probabilities),) = found
            return probabilities, features, logits
        features, logits = join([outputs[:2] for outputs in found], torch.cat, torch.maximum)
        rows = []
        for i, parts in enumerate(zip(features.cpu().numpy(), logits.cpu().numpy())):
            voting = slice(None) if valid is None else valid[i]
            rows.append(softmax(self.vote(parts[1][voting], parts[0][voting])).astype(np.float32))
        return torch.from_numpy(np.stack(rows)).to(features.device), features, logits

    def info(self) -> dict[str, Any]:
        gpu = self._module.gpu_info(self._index)
        return {
            "backend": self.name,
            "device": self.device,
            "precision": self.precision,
            "precision_reason": self.reason,
            "isa": None,
            "gpu": gpu["name"],
            "threads": None,
            "verified": next(verified(way) for way in WAYS if way.backend == self.name),
        }
