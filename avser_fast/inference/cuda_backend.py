"""Inference on the CUDA kernels of ``avser_fast._engine``, without torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import config
from ..errors import BackendError
from . import features as front_end
from .backends import WAYS, Engine, Forward, Fuse, verified, why_no_gpu
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
    """The engine's networks on a GPU; the front end stays on the CPU.  The fusion is float32 in every precision."""

    name = "cuda"

    def __init__(
        self,
        spec: Spec,
        tensors: Mapping[str, np.ndarray],
        threads: int | None,
        precision: str,
        card: Mapping[str, Any],
        device: str,
    ) -> None:
        self._module = front_end.engine_module()
        self.device = f"cuda:{device_index(device)}"
        self._choose(spec, precision, card, "cuda", threads)
        self._build(spec, tensors, None)

    @property
    def _on(self) -> dict[str, Any]:
        return {"precision": self.precision, "device": device_index(self.device)}

    def _mdscm(
        self, network: config.MDSCM, tensors: Mapping[str, np.ndarray], ranges: dict[str, np.ndarray] | None
    ) -> Forward:
        described = json.dumps({"network": dataclasses.asdict(network)})
        forward: Forward = self._module.GpuEngine(described, dict(tensors), **self._on).forward
        return forward

    def _resnet18(self, encoder: config.AVRE, shape: tuple[int, int], tensors: Mapping[str, np.ndarray]) -> Forward:
        forward: Forward = self._module.GpuResNet18(
            dict(tensors), in_channels=encoder.in_channels, height=shape[0], width=shape[1], classes=encoder.classes,
            **self._on,
        ).forward  # fmt: skip
        return forward

    def _fusion(self, fusion: config.Fusion, tensors: Mapping[str, np.ndarray]) -> Fuse:
        forward: Fuse = self._module.GpuFusion(
            dict(tensors), **dataclasses.asdict(fusion), device=device_index(self.device)
        ).forward
        return forward

    def calibrate(self, clips: np.ndarray) -> dict[str, np.ndarray]:
        raise BackendError("calibrate: expected backend 'engine', got 'cuda', which has no int8")

    def info(self) -> dict[str, Any]:
        gpu = self._module.gpu_info(device_index(self.device))
        return {
            "backend": self.name,
            "device": self.device,
            "precision": self.precision,
            "precision_reason": self.reason,
            "isa": None,
            "gpu": gpu["name"],
            "threads": self.threads,  # of the front end
            "verified": next(verified(way) for way in WAYS if way.backend == self.name),
        }
