"""Training of one MDSCM: a plain loop that can be stopped and resumed to the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from avser_fast import nn, reference
from avser_fast.config import MDSCM, ModelSpec

from .data.crops import CropSampler, augment
from .data.feature_set import FeatureSet
from .loop import average_into, optimizer_of, pick, save_atomically
from .losses import learning_rate
from .metrics import confusion_matrix, unweighted_accuracy
from .settings import Settings


@dataclass(frozen=True)
class Trained:
    """A trained network: its spec (front end measured), its averaged weights and how it got there."""

    spec: ModelSpec
    state: dict[str, Tensor]
    epoch: int
    history: list[dict[str, float]]


@torch.no_grad()
def score(model: nn.MDSCM, features: list[Tensor], spec: ModelSpec) -> Tensor:
    """(utterances, classes) logits: each utterance is cut by the spec's clip rule, clips that vote are averaged."""
    model.eval()
    rule = spec.clip_rule
    logits = []
    for utterance in features:
        clips, valid = reference.frame_clips(utterance, rule.clips, rule.clip_frames, rule.rule)
        output = model(clips.unsqueeze(0), valid.unsqueeze(0))
        logits.append(reference.average_clips(output.clip_logits, valid.unsqueeze(0))[0])
    return torch.stack(logits)


def halves(state: dict[str, Tensor], network: MDSCM) -> dict[str, dict[str, Tensor]]:
    """Weights of the same network answering from one of its two paths alone (see ``_loss``): ``body``, ``statistics``;
    empty without a statistics path."""
    if not network.statistics:
        return {}
    width, weight = network.pooled_width, state["head.weight"]
    doubled = 2.0 * weight
    nothing = torch.zeros_like(weight)
    return {
        "body": {**state, "head.weight": torch.cat((doubled[:, :width], nothing[:, width:]), dim=1)},
        "statistics": {**state, "head.weight": torch.cat((nothing[:, :width], doubled[:, width:]), dim=1)},
    }


def _class_weights(targets: Tensor, classes: int, power: float) -> Tensor:
    counts = torch.bincount(targets, minlength=classes).clamp(min=1).float()
    return (counts.sum() / (classes * counts)) ** power


def _loss(
    model: nn.MDSCM,
    crops: Tensor,
    targets: Tensor,
    generator: torch.Generator,
    settings: Settings,
    weights: Tensor,
) -> Tensor:
    """Cross-entropy of a batch.

    A statistics path learns apart from the convolutions: each path is asked for the whole answer from its half of the
    head (the bias is shared), so that neither leans on the other, and the logits of the network are the mean of both.
    Only the convolutions are shown augmented crops: masks and mixtures would spoil what the statistics measure.
    """
    recipe, network = settings.optimisation, model.network
    changed, soft = augment(crops, targets, settings.augmentation, network.classes, generator)

    def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
        return F.cross_entropy(logits, truth, weight=weights, label_smoothing=recipe.label_smoothing)

    if model.statistics is None:
        return cross_entropy(model(changed.unsqueeze(1)).clip_logits[:, 0], soft)
    width = network.pooled_width
    pooled = reference.pool_tokens(model.body(changed), network.pooling)
    of_body = F.linear(2.0 * pooled, model.head.weight[:, :width], model.head.bias)
    of_statistics = F.linear(2.0 * model.statistics(crops), model.head.weight[:, width:], model.head.bias)
    hard = F.one_hot(targets, network.classes).to(crops.dtype)
    return 0.5 * (cross_entropy(of_body, soft) + cross_entropy(of_statistics, hard))


def train(
    settings: Settings,
    training: FeatureSet,
    validation: FeatureSet | None,
    *,
    seed: int,
    epochs: int | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Trained:
    """Train on ``training``; with ``validation``, keep the epoch that scores best on it, else the last of ``epochs``.

    ``epochs`` stops the schedule of ``settings`` early (the learning rate still follows the full schedule).  With
    ``checkpoint``, the state is written there after each epoch and read back if it exists: an interrupted training
    ends with the numbers of an uninterrupted one.  All randomness comes from ``seed``; the global generator of the
    caller is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        return _train(settings, training, validation, seed, epochs, checkpoint, progress)


def _train(
    settings: Settings,
    training: FeatureSet,
    validation: FeatureSet | None,
    seed: int,
    epochs: int | None,
    checkpoint: Path | None,
    progress: Callable[[int, int, dict[str, float]], None] | None,
) -> Trained:
    recipe = settings.optimisation
    spec = ModelSpec(
        training.labels,
        training.measured_front_end(settings.front_end.zero),
        settings.clip_rule,
        settings.network,
    )
    classes = settings.network.classes
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    # Channels-last is 1.6x as fast as the default layout for the depthwise convolutions on a CPU.
    model = nn.MDSCM(settings.network).to(memory_format=torch.channels_last)
    averaged_model = nn.MDSCM(settings.network)
    averaged = averaged_model.state_dict()
    average_into(averaged, model, 0.0)
    optimizer = optimizer_of(model, recipe)
    sampler = CropSampler(
        training.normalized_copies(spec.front_end), training.targets(), spec.clip_rule.clip_frames, recipe.batch_size
    )
    weights = _class_weights(training.targets(), classes, recipe.class_weights)
    held_out = validation.normalized(spec.front_end) if validation is not None else []
    steps, last = sampler.steps_per_epoch(), epochs or recipe.epochs
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    best_epoch, first = 0, 1

    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        averaged_model.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        torch.set_rng_state(saved["rng"])
        history, best, best_epoch = saved["history"], saved["best"], saved["best_epoch"]
        first = len(history) + 1

    for epoch in range(first, last + 1):
        model.train()
        total = 0.0
        for step, (crops, targets) in enumerate(sampler.epoch(generator)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((epoch - 1) * steps + step, steps, recipe)
            loss = _loss(model, crops, targets, generator, settings, weights)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
            optimizer.step()
            done = (epoch - 1) * steps + step
            average_into(averaged, model, min(recipe.ema, (1.0 + done) / (10.0 + done)))
            total += float(loss.detach())
        record = {"epoch": float(epoch), "loss": total / steps}
        eligible = epoch > (1.0 - recipe.pick_last) * last
        if validation is not None and eligible:
            logits = score(averaged_model, held_out, spec)
            truth = validation.targets()
            matrix = confusion_matrix(truth.tolist(), logits.argmax(1).tolist(), classes)
            record["validation_ua"] = unweighted_accuracy(matrix)
            record["validation_loss"] = float(F.cross_entropy(logits, truth, weight=weights))
        history.append(record)
        if epoch == (last if validation is None else pick(history)):
            best = {name: value.clone() for name, value in averaged.items()}
            best_epoch = epoch
        if checkpoint is not None:
            save_atomically(
                {
                    "model": model.state_dict(),
                    "averaged": averaged,
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "rng": torch.get_rng_state(),
                    "history": history,
                    "best": best,
                    "best_epoch": best_epoch,
                },
                checkpoint,
            )
        if progress is not None:
            progress(epoch, last, record)
    return Trained(spec, best, best_epoch, history)
