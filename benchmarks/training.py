"""A training step of the published network, done by the fused ops and by PyTorch.

A step: forward, cross-entropy of every clip, backward, AdamW.  The optimizer is the same for all and its learning rate
is 0, which costs the same and leaves the weights those that the truth was computed with; there is no dropout, whose
masks would be everybody's own.

``python -m benchmarks.training CONTENDER THREADS`` measures the memory of a contender's steps in a fresh process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avser_fast import nn
from avser_fast.config import MEMBERS

from . import cases
from .compare import OURS
from .peers import Build

EAGER, COMPILED = "PyTorch eager", "PyTorch compiled"
UTTERANCES = 8
#: Largest error of the loss, relative to it.
LOSS = 1e-5
#: Largest error of the gradient of a parameter, ours and a peer's, relative to that gradient's norm.  PyTorch's own, on
#: channels-last maps, err by half as much as they may.
GRADIENT, PEERS_GRADIENT = 2e-5, 1e-2
#: Of the largest gradient: an error as small as this is none.  (A bias in front of a batch norm has no other gradient.)
SMALL = 1e-6

Taken = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """clips (B, L, channels, frames, bands); targets (B L,), the class of every clip."""

    clips: Tensor
    targets: Tensor


def network() -> Any:
    return dataclasses.replace(MEMBERS["mdscm-published"].network, block_dropout=0.0, encoder_dropout=0.0)


def batch(utterances: int = UTTERANCES, clips: int = cases.CLIPS, device: str = "cpu") -> Batch:
    """Real speech; the classes are drawn."""
    spec = MEMBERS["mdscm-published"]
    values = torch.from_numpy(cases.speech_clips(spec, utterances * clips)).unflatten(0, (utterances, clips))
    classes = torch.from_numpy(np.random.default_rng(3).integers(0, spec.network.classes, utterances))
    return Batch(values.to(device), classes.repeat_interleave(clips).to(device))


def model(backend: str, device: str = "cpu") -> nn.MDSCM:
    """The same random weights whatever computes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.MDSCM(network(), backend=backend)
    return made.to(device).train()


def optimizer(module: nn.MDSCM) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.0, fused=True)


def loss_of(module: nn.MDSCM, clips: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(module(clips).clip_logits.flatten(0, 1), targets)


def stepper(module: nn.MDSCM, compiled: bool = False, **how: Any) -> Callable[[Batch], Taken]:
    """A function that does one step and returns loss and gradients."""
    update = optimizer(module)
    names = [name for name, _ in module.named_parameters()]
    parameters = list(module.parameters())
    forward = torch.compile(loss_of, fullgraph=True, dynamic=False, **how) if compiled else loss_of

    def step(given: Batch) -> Taken:
        update.zero_grad(set_to_none=True)
        loss = forward(module, given.clips, given.targets)
        loss.backward()
        update.step()
        return loss.detach(), {n: p.grad for n, p in zip(names, parameters) if p.grad is not None}

    return step


def channels_last(module: nn.MDSCM) -> nn.MDSCM:
    return module.to(memory_format=torch.channels_last)


def stepper_of(contender: str, setting: str = "channels-last") -> Callable[[Batch], Taken]:
    """``setting``: memory layout of the reference's weights."""
    if contender == OURS:
        return stepper(model("cpu"))
    module = model("reference")
    return stepper(channels_last(module) if setting == "channels-last" else module, contender == COMPILED)


def settings(contender: str, given: Batch, names: tuple[str, ...] = ("channels-last",)) -> dict[str, Build]:
    """How a peer may be set up, for ``Peers.best``."""

    def build(setting: str) -> Callable[[], Taken]:
        step = stepper_of(contender, setting)
        return lambda: step(given)

    return {name: (lambda name=name: build(name)) for name in names}  # type: ignore[misc]


def truth(given: Batch) -> Taken:
    """By the reference in float64 on the CPU."""
    exact = model("reference").double()
    return stepper(exact)(Batch(given.clips.cpu().double(), given.targets.cpu()))


def check(exact: Taken, gradient: float = GRADIENT, loss: float = LOSS) -> Callable[[Taken], None]:
    largest = max(float(g.norm()) for g in exact[1].values())

    def judge(taken: Taken) -> None:
        found, wanted = float(taken[0]), float(exact[0])
        assert abs(found - wanted) <= loss * abs(wanted), f"loss: expected {wanted:.7f}, got {found:.7f}"
        assert taken[1].keys() == exact[1].keys(), "gradients: expected those of all parameters"
        for name, value in exact[1].items():
            error = float((taken[1][name].cpu().double() - value).norm())
            allowed = gradient * float(value.norm()) + SMALL * largest
            assert error <= allowed, f"gradient of {name}: error {error:.3g}, allowed {allowed:.3g}"

    return judge


# ---- memory


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status: expected a line {name}")


def memory(contender: str, threads: int, steps: int = 3) -> dict[str, float]:
    """MB resident before the first step, model and optimizer state made, and the most during ``steps`` of them.

    A step on two clips beforehand loads code and makes the state.  What is compiled for one shape gets a step of the
    real one instead: whatever that leaves behind is not counted, which favours it.
    """
    if platform.system() != "Linux":
        raise OSError("benchmarks.training: expected Linux, whose peak of resident memory can be set back")
    torch.set_num_threads(threads)
    step, given = stepper_of(contender), batch()
    step(given if contender == COMPILED else Batch(given.clips[:1, :2], given.targets[:2]))
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now what is resident
    before = _status("VmRSS")
    for _ in range(steps):
        step(given)
    return {"before_mb": before, "peak_mb": _status("VmHWM"), "step_mb": _status("VmHWM") - before}


if __name__ == "__main__":
    print(json.dumps(memory(sys.argv[1], int(sys.argv[2]))))
