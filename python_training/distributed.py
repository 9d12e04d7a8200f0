"""The processes of one training: alone, or those that ``torchrun`` started (on any number of machines)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from avser_fast import reference


@dataclass(frozen=True)
class Processes:
    """``rank`` of ``world`` processes on ``device``."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum over all processes; whole numbers stay exact."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process: all of them get the same answer."""
        return bool(self.total(torch.tensor(int(flag), device=self.device)).item())


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that torchrun started (its environment says so), else be the only one.

    ``device``: ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.  gloo on CPUs; NCCL on GPUs, one for each.
    Within, training statistics of batch norm are those of the whole batch of all processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': expected a GPU that torch can use, found none")
    gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    where = torch.device("cuda", local) if gpu else torch.device("cpu")
    if world == 1:
        yield Processes(device=where)
        return
    if gpu:
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        with reference.joined_statistics((_joined, world)):
            yield Processes(dist.get_rank(), world, where)
    finally:
        dist.destroy_process_group()


def _joined(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of all processes out of each one's, differentiably; their numbers of values are equal."""
    world = dist.get_world_size()
    whole = all_reduce(mean) / world
    return whole, all_reduce(var + (mean - whole).square()) / world
