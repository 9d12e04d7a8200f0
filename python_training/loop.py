"""The training loop that every stage runs in: it can be stopped at any step and goes on to the same numbers.

Nothing random has a state: the batch of a step and every number drawn in it follow from the seed and the step, so a
checkpoint holds weights, optimizer and the step, and training again from any of them repeats what was lost.
"""

from __future__ import annotations

import io
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from avser_fast.errors import AvserError
from avser_fast.inference.whole_files import write_bytes

from .distributed import Processes
from .log import RunLog
from .losses import learning_rate
from .settings import Optimisation

#: What the loop needs of a checkpoint; one of another layout is refused.
CHECKPOINT = 1


class Stopped(Exception):
    """Somebody asked the run to end (SIGTERM); what was done is saved."""


class TrainingError(AvserError, RuntimeError):
    """Training cannot go on; the message says at which step and why."""


class Stage(Protocol):
    """What a stage is to the loop."""

    @property
    def name(self) -> str: ...

    #: What is trained: called with a batch and lambda it returns the loss and, by name, sums over the batch.
    @property
    def module(self) -> torch.nn.Module: ...
    @property
    def steps_per_epoch(self) -> int: ...

    def batches(self, first: int, last: int) -> Iterator[Any]: ...
    def facts(self, step: int, total: int) -> dict[str, float]:
        """What the schedule of the stage says at a step, ``lambda`` for one; handed to the module and the log."""

    def validate(self) -> dict[str, Any]:
        """Rates of the validation utterances by the module as it is: validation_wa, validation_ua, validation_loss,
        whatever else belongs to the epoch's record; empty without any."""

    def inspect(self, step: int, means: Mapping[str, float]) -> dict[str, Any]:
        """Further facts of the epoch that ended with ``step``, given the means over its steps."""


@dataclass
class Stop:
    """Whether the run was asked to end."""

    asked: bool = False


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """SIGTERM sets ``asked``; the loop then saves and ends."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.asked = True

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread: nobody's signals are ours
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class Fitted:
    """How a stage ended: the epoch whose weights were kept, and every epoch's record."""

    epoch: int
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kept(self) -> dict[str, Any]:
        """The record of the epoch whose weights were kept; empty where it was not reached."""
        return next((record for record in self.history if record["epoch"] == self.epoch), {})


def save_atomically(value: Any, path: Path) -> None:
    """torch.save to ``path``: a reader never sees half a file."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        write_bytes(path, buffer.getbuffer())
    except OSError as error:
        raise TrainingError(f"{path}: expected to write a checkpoint, got an error ({error.strerror})") from error


def optimizer_of(module: torch.nn.Module, recipe: Optimisation) -> torch.optim.Optimizer:
    """The recipe's optimizer; weight decay is for matrices and kernels alone."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.lr)


def average_into(averaged: dict[str, Tensor], module: torch.nn.Module, decay: float) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point() and decay > 0:
            averaged[name].lerp_(value, 1.0 - decay)
        else:
            averaged[name].copy_(value)


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


@contextmanager
def _weights(module: torch.nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other weights, within."""
    own = copied(module.state_dict())
    module.load_state_dict(dict(state))
    try:
        yield
    finally:
        module.load_state_dict(own)


def pick(history: list[dict[str, Any]]) -> int | None:
    """The epoch with the best validation UA, ties decided by its loss; None before the first was scored."""
    scored = [r for r in history if "validation_ua" in r]
    if not scored:
        return None
    return int(max(scored, key=lambda r: (r["validation_ua"], -r["validation_loss"]))["epoch"])


def fit(
    stage: Stage,
    recipe: Optimisation,
    *,
    seed: int,
    processes: Processes,
    log: RunLog,
    mark: str = "",
    epochs: int | None = None,
    checkpoint: Path | None = None,
    every: int = 200,
    resume: bool = False,
    stop: Stop | None = None,
    progress: Callable[[str, int, int, Mapping[str, Any]], None] | None = None,
) -> Fitted:
    """Train ``stage.module`` and leave the kept weights in it: the averaged ones of the epoch that scored best on the
    validation utterances, without any those of the last epoch.

    ``mark`` follows the stage's name in the log.  ``epochs`` ends the schedule early (the learning rate follows the
    whole one).  ``checkpoint`` is written every ``every`` steps, after each epoch and when ``stop`` is asked for (which
    raises Stopped); with ``resume`` training goes on from it, to the numbers of a run that was never interrupted.  All
    randomness comes from ``seed``; the global generators of the caller are left as they were.
    """
    devices = [processes.device] if processes.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        title, given = stage.name + mark, (epochs, checkpoint, every, resume, stop or Stop(), progress)
        return _fit(stage, recipe, seed, processes, log, title, *given)


def _fit(
    stage: Stage,
    recipe: Optimisation,
    seed: int,
    processes: Processes,
    log: RunLog,
    title: str,
    epochs: int | None,
    checkpoint: Path | None,
    every: int,
    resume: bool,
    stop: Stop,
    progress: Callable[[str, int, int, Mapping[str, Any]], None] | None,
) -> Fitted:
    module, steps = stage.module, stage.steps_per_epoch
    last_epoch = epochs or recipe.epochs
    total = last_epoch * steps
    optimizer = optimizer_of(module, recipe)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.amp == "fp16")
    averaged = copied(module.state_dict())
    history: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    best_epoch, first = 0, 0
    if resume and checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=processes.device)
        if saved.get("layout") != CHECKPOINT or saved["total"] != total or saved["seed"] != seed:
            raise TrainingError(f"{checkpoint}: expected a checkpoint of this run, got one of other settings")
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        averaged, best, best_epoch = saved["averaged"], saved["best"], saved["best_epoch"]
        history, first = saved["history"], saved["step"]
    steps_found = processes.total(torch.tensor(first, device=processes.device))
    if int(steps_found) != first * processes.world:
        raise TrainingError(f"{checkpoint}: expected a checkpoint that all processes see, got one that only some see")
    if processes.first:
        log.rewind(title, first)
    trained = module
    if processes.world > 1 and any(p.requires_grad for p in module.parameters()):
        ids = [processes.device.index] if processes.device.type == "cuda" else None
        # Running statistics are those of the whole batch in every process already.  Buckets in the order of the
        # gradients' first arrival would be others after a resume, and with them the order of the sums.
        trained = DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False, find_unused_parameters=True)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.amp)

    def save(step: int, sums: dict[str, float]) -> None:
        if checkpoint is not None and processes.first:
            save_atomically(
                {
                    "layout": CHECKPOINT,
                    "seed": seed,
                    "total": total,
                    "step": step,
                    "sums": sums,
                    "module": module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "averaged": averaged,
                    "best": best,
                    "best_epoch": best_epoch,
                    "history": history,
                },
                checkpoint,
            )

    sums: dict[str, float] = dict(saved["sums"]) if first else {}
    waiting: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for step, batch in enumerate(stage.batches(first, total), start=first):
        # The forward of a step draws (dropout) from the step's own seed.
        torch.manual_seed((seed * 1_000_003 + step * 8191 + processes.rank) % 2**63)
        module.train()
        rate = learning_rate(step, steps, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        schedule = stage.facts(step, recipe.epochs * steps)
        with torch.autocast(processes.device.type, dtype=half) if half is not None else nullcontext():
            loss, parts = trained(batch.to(processes.device), schedule)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        limit = recipe.gradient_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], limit)
        rows = processes.total(torch.stack([loss.detach(), *(v.detach().float() for v in parts.values())]))
        values = (rows / processes.world).tolist()
        if not math.isfinite(values[0]):
            raise TrainingError(f"stage {title}, step {step}: expected a finite loss, got {values[0]}")
        scaler.step(optimizer)
        scaler.update()
        average_into(averaged, module, min(recipe.ema, (1.0 + step) / (10.0 + step)) if recipe.ema else 0.0)
        done, epoch = step + 1, step // steps + 1
        record = {
            "stage": title,
            "step": done,
            "epoch": epoch,
            **dict(zip(("loss", *parts), values)),
            **schedule,
            "lr": rate,
            "gradient_norm": float(norm) if norm.isfinite() else None,  # fp16 seeks its scale by steps it skips
            "seconds": round(time.perf_counter() - begin, 3),
        }
        waiting.append(record)
        for name in ("loss", *parts, *schedule):
            sums[name] = sums.get(name, 0.0) + float(record[name])
        if done % steps == 0:
            means = {name: value / steps for name, value in sums.items()}
            entry = _epoch(stage, title, epoch, done, means, recipe, last_epoch, averaged)
            history.append(entry)
            sums = {}
            if epoch == (pick(history) or (last_epoch if epoch == last_epoch else None)):
                best, best_epoch = copied(averaged), epoch
            if processes.first:
                log.step(waiting)
                log.epoch(entry)
            waiting = []
            save(done, sums)
        elif done % every == 0:
            if processes.first:
                log.step(waiting)
            waiting = []
            save(done, sums)
        if progress is not None and processes.first:
            progress(title, done, total, history[-1] if history and done % steps == 0 else record)
        if (processes.any(stop.asked) if processes.world > 1 else stop.asked) and done < total:
            if processes.first:
                log.step(waiting)
            save(done, sums)
            raise Stopped
    if not best:  # nothing was left to do, or no epoch was eligible
        best, best_epoch = averaged, last_epoch
    module.load_state_dict(best)
    return Fitted(best_epoch, history)


def _epoch(
    stage: Stage,
    title: str,
    epoch: int,
    done: int,
    means: dict[str, float],
    recipe: Optimisation,
    last_epoch: int,
    averaged: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The record of an epoch: means over its steps, rates of the validation utterances, what the stage has to say."""
    entry: dict[str, Any] = {"stage": title, "epoch": epoch, "step": done, **means}
    with _weights(stage.module, averaged):
        stage.module.eval()
        if epoch > (1.0 - recipe.pick_last) * last_epoch:
            entry.update(stage.validate())
        entry.update(stage.inspect(done - 1, means))
    return entry
