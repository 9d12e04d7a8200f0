"""A training step of the published network: ours, PyTorch eager and torch.compile on the same weights and clips.

``python -m benchmarks.training NAME UTTERANCES`` prints the peak memory of one contender's steps, in a process of its
own.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avser_fast import nn, ops, reference

from .cases import CLIPS
from .models import MEMBERS

#: Contenders of a table, by the backend of the network and whether it is compiled.
OURS, EAGER, COMPILED = "avser_fast", "PyTorch eager", "torch.compile"
NETWORK = MEMBERS["mdscm-published"].network
#: A gradient's error, by the largest gradient of its tensor, or a thousandth of the largest of all: the bias in front
#: of a batch norm has a gradient of rounding errors only.  Where two values of a pooling window are nearly equal, or
#: one is nearly zero at a ReLU, rounding decides where a gradient goes: whole networks differ by more than their ops
#: (tests/test_training_ops.py), and a sign or a sum that is wrong by far more than this.
TOLERANCE = 2e-2
#: In bf16 (autocast) gradients of whole networks differ by tenths in single places; as vectors they must be within
#: twice the distance of PyTorch eager's from those of float64, which must itself be no more than this.
FARTHEST = 0.1
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclasses.dataclass
class Step:
    """Forward, cross-entropy over clips, backward and a step of SGD; ``run`` returns the loss."""

    name: str
    utterances: int
    device: str = "cpu"
    precision: str = "float32"
    dropout: bool = True
    mode: str | None = None  # of torch.compile

    def __post_init__(self) -> None:
        network = NETWORK
        if not self.dropout:
            network = dataclasses.replace(network, block_dropout=0.0, encoder_dropout=0.0)
        torch.manual_seed(0)
        backend = "auto" if self.name == OURS else "reference"
        model = nn.MDSCM(network, backend=backend).to(self.device, memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(1)
        shape = (self.utterances, CLIPS, network.planes, network.clip_frames, network.mel_bands)
        self.clips = torch.randn(shape, generator=generator).to(self.device)
        self.targets = torch.randint(network.classes, (self.utterances,), generator=generator).to(self.device)
        self.model = model
        self.forward: Any = torch.compile(model, mode=self.mode) if self.name == COMPILED else model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def loss(self) -> Tensor:
        low = self.precision != "float32"
        with torch.autocast(self.device.partition(":")[0], DTYPES[self.precision]) if low else nullcontext():
            logits = self.forward(self.clips).clip_logits
        if self.name == OURS:
            return ops.clip_cross_entropy(logits, self.targets)
        return F.cross_entropy(reference.average_clips(logits.float()), self.targets)

    def run(self) -> Tensor:
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Loss and gradients without a step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        found = {name: p.grad.detach().clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **found}


def exact(utterances: int) -> dict[str, Tensor]:
    """Loss and gradients of a step without dropout in float64."""
    step = Step(EAGER, utterances, dropout=False)
    step.model.double()
    step.clips = step.clips.double()
    logits = step.model(step.clips).clip_logits
    loss = F.cross_entropy(reference.average_clips(logits), step.targets)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}}


def check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Raise AssertionError naming the tensor whose gradient is wrong."""
    assert found.keys() == expected.keys(), f"expected gradients of {sorted(expected)}, got {sorted(found)}"
    largest = max(float(value.abs().max()) for name, value in expected.items() if name != "loss")
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-3 * largest)
        error = float((found[name].cpu().double() - value).abs().max()) / scale
        assert error <= tolerance, f"{name}: expected an error of at most {tolerance:g}, got {error:.3g}"


ALL, LOSS = "all gradients", "loss"


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of the loss, of every gradient and of ``ALL`` as one vector, in units of the expected one's length; a gradient
    much shorter than all together, such as that of a bias in front of a batch norm, is measured by a thousandth of
    them."""
    assert found.keys() == expected.keys(), f"expected gradients of {sorted(expected)}, got {sorted(found)}"
    away = {name: float((found[name].cpu().double() - value).square().sum()) for name, value in expected.items()}
    length = {name: float(value.square().sum()) for name, value in expected.items()}
    gradients = [name for name in expected if name != LOSS]
    away[ALL], length[ALL] = sum(away[n] for n in gradients), sum(length[n] for n in gradients)
    return {name: (away[name] / max(length[name], 1e-6 * length[ALL])) ** 0.5 for name in away}


def check_low_precision(found: dict[str, Tensor], expected: dict[str, Tensor], plain: dict[str, float]) -> None:
    """Raise AssertionError naming what is further away than twice ``plain``, PyTorch eager's distances; a gradient may
    be as far away as all of eager's together."""
    least = plain[ALL]
    assert least <= FARTHEST, f"expected PyTorch eager's gradients at a distance of at most {FARTHEST}, got {least:.3g}"
    for name, away in distances(found, expected).items():
        most = 2.0 * max(plain[name], least)
        assert away <= most, f"{name}: expected a distance of at most {most:.3g}, got {away:.3g}"


def resident_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status: expected a line {field}")


def peak_mb(name: str, utterances: int) -> float:
    """What steps need beyond network, optimizer and batch: the peak of resident memory in three steps, less what was
    resident before the first."""
    step = Step(name, utterances)
    small = Step(name, 1)  # whatever is loaded, allocated once or compiled at first use is not the step's
    small.run()
    for parameter in step.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    del small
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS")
    for _ in range(3):
        step.run()
    return resident_mb("VmHWM") - before


def main(arguments: list[str]) -> int:
    torch.set_num_threads(2)
    print(f"{peak_mb(arguments[0], int(arguments[1])):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
