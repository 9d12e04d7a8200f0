"""The stages of training: MDSCM, AVDAL, fusion with both frozen, and all three together (section 3 of the paper)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avser_fast import reference
from avser_fast.config import FrontEnd
from avser_fast.nn import MDSCM

from .data.augment import Augmentation
from .data.batches import Batch, Plan, Samples, batches
from .data.prepared import PreparedCorpus
from .distributed import Processes
from .health import PROBE_ITEMS, linear_probe, warnings_of
from .losses import class_weights, domain_loss, emotion_loss, reversal_lambda
from .metrics import confusion_matrix, unweighted_accuracy, weighted_accuracy
from .settings import Settings
from .system import System, fused_logits, score, utterance_clips

Parts = dict[str, Tensor]


def _bad_share(batch: Batch) -> Tensor:
    """Share of the rows in which another sample stands in for one that cannot be used."""
    return batch.skipped.float().mean()


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).float().mean()


class _Module(nn.Module):
    """What a stage trains, as DistributedDataParallel wants it: one forward from a batch to its loss."""

    def __init__(self, system: System, weights: Tensor, smoothing: float):
        super().__init__()
        self.weights: Tensor
        self.register_buffer("weights", weights)
        self.smoothing = smoothing

    def emotion(self, logits: Tensor, targets: Tensor) -> Tensor:
        return emotion_loss(logits.float(), targets, self.weights, self.smoothing)


class MDSCMModule(_Module):
    def __init__(self, system: System, weights: Tensor, smoothing: float):
        super().__init__(system, weights, smoothing)
        self.mdscm = system.mdscm

    def forward(self, batch: Batch, schedule: Mapping[str, float]) -> tuple[Tensor, Parts]:
        heard = hear_speech(self, self.mdscm, batch)
        return heard.loss, {**heard.parts, "bad_share": _bad_share(batch)}


class Heard(NamedTuple):
    """What an MDSCM makes of a batch of speech: its loss, ``features`` (N, L, D) and ``clip_logits`` (N, L, K)."""

    loss: Tensor
    parts: Parts
    features: Tensor
    clip_logits: Tensor


def hear_speech(module: _Module, mdscm: MDSCM, batch: Batch) -> Heard:
    """Cross-entropy of a batch of speech.

    A statistics path learns apart from the convolutions: each path is asked for the whole answer from its half of the
    head (the bias is shared), so that neither leans on the other, and the logits of the network are the mean of both.
    Only the convolutions are shown augmented clips: masks and mixtures would spoil what the statistics measure.
    """
    if mdscm.statistics is None:
        output = mdscm(batch.clips)
        logits = reference.average_clips(output.clip_logits, batch.valid)
        loss = module.emotion(logits, batch.targets)
        parts = {"speech_loss": loss, "speech_accuracy": _right(logits, batch.labels)}
        return Heard(loss, parts, output.features, output.clip_logits)
    assert batch.clean is not None
    width, network, head = mdscm.network.pooled_width, mdscm.network, mdscm.head
    size = batch.clips.shape[:2]
    pooled = reference.pool_tokens(mdscm.body(batch.clips.flatten(0, 1)), network.pooling)
    said = mdscm.statistics(batch.clean.flatten(0, 1))
    of_body = F.linear(2.0 * pooled, head.weight[:, :width], head.bias).unflatten(0, size)
    of_frames = F.linear(2.0 * said, head.weight[:, width:], head.bias).unflatten(0, size)
    body = reference.average_clips(of_body, batch.valid)
    frames = reference.average_clips(of_frames, batch.valid)
    hard = F.one_hot(batch.labels, network.classes).to(batch.targets.dtype)
    loss = 0.5 * (module.emotion(body, batch.targets) + module.emotion(frames, hard))
    parts = {"speech_loss": loss, "speech_accuracy": _right(body + frames, batch.labels)}
    features = torch.cat((pooled, said), dim=1).unflatten(0, size)
    return Heard(loss, parts, features, 0.5 * (of_body + of_frames))


class Losses(NamedTuple):
    """Of a batch of both domains: the ``whole`` loss is that of the ``emotions`` plus that of the ``domain``, which
    gradient reversal turns around; ``features`` (N, L, D) and ``clip_logits`` (N, L, K) are those of the speech."""

    emotions: Tensor
    domain: Tensor
    parts: Parts
    features: Tensor
    clip_logits: Tensor

    @property
    def whole(self) -> Tensor:
        return self.emotions + self.domain


class AVDALModule(_Module):
    """Emotion losses of both domains and the domain loss behind gradient reversal, both domains in one forward."""

    def __init__(self, system: System, weights: Tensor, smoothing: float, face_weights: Tensor, settings: Settings):
        super().__init__(system, weights, smoothing)
        assert system.avre is not None
        self.avre = system.avre
        # Not a submodule: its other networks are not trained here.
        self._see = (system.encoder_clips, system.encoder_faces)
        self.face_weights: Tensor
        self.register_buffer("face_weights", face_weights)
        self.settings = settings.adversarial

    def forward(self, batch: Batch, schedule: Mapping[str, float]) -> tuple[Tensor, Parts]:
        losses = self.losses(batch, schedule["lambda"])
        return losses.whole, losses.parts

    def losses(self, batch: Batch, lam: float) -> Losses:
        assert batch.faces is not None and batch.face_labels is not None and batch.face_targets is not None
        clips, faces = self._see[0](batch.clips), self._see[1](batch.faces)
        count, seen = clips.shape[0], clips.shape[1]
        self.avre.domain.reversal.lam = lam
        together = torch.cat((clips.flatten(0, 1), faces.flatten(0, 1))).unsqueeze(1)
        output = self.avre(together)

        def split(values: Tensor) -> tuple[Tensor, Tensor]:
            flat = values[:, 0] if values.dim() == 3 else values
            return flat[: count * seen].unflatten(0, (count, seen)), flat[count * seen :].unflatten(0, (count, -1))

        speech, face = split(output.clip_logits)
        speech_domain, face_domain = split(output.domain_logits)
        of_speech = reference.average_clips(speech, batch.valid)
        of_faces = face.mean(1)
        speech_part = self.emotion(of_speech, batch.targets)
        face_part = emotion_loss(of_faces.float(), batch.face_targets, self.face_weights, self.smoothing)
        # Padding is no speech: only clips that vote are judged.
        domain = domain_loss(speech_domain, face_domain, batch.valid)
        spoken = reference.average_clips((speech_domain.detach() < 0).float(), batch.valid)
        emotions = speech_part + self.settings.face_weight * face_part
        reversed_ = self.settings.domain_weight * domain
        parts = {
            "speech_loss": speech_part,
            "face_loss": face_part,
            "domain_loss": domain,
            "speech_accuracy": _right(of_speech, batch.labels),
            "face_accuracy": _right(of_faces, batch.face_labels),
            "domain_accuracy": 0.5 * (spoken.mean() + (face_domain.detach() > 0).float().mean()),
            "bad_share": _bad_share(batch),
        }
        features, _ = split(output.features)
        return Losses(emotions, reversed_, parts, features, speech)


class FusionModule(_Module):
    """Fusion on the features of both networks as they are."""

    def __init__(self, system: System, weights: Tensor, smoothing: float):
        super().__init__(system, weights, smoothing)
        assert system.fusion is not None
        self.fusion = system.fusion

    def forward(self, batch: Inputs, schedule: Mapping[str, float]) -> tuple[Tensor, Parts]:
        fused = fused_logits(self.fusion, batch.features, batch.scores, batch.valid)
        loss = self.emotion(fused, batch.targets)
        return loss, {"speech_loss": loss, "speech_accuracy": _right(fused, batch.labels)}


class JointModule(_Module):
    """All three networks: the losses of the stages before, and that of the fusion of the same clips."""

    def __init__(self, system: System, weights: Tensor, smoothing: float, face_weights: Tensor, settings: Settings):
        super().__init__(system, weights, smoothing)
        self.system = system
        self.adversarial = AVDALModule(system, weights, smoothing, face_weights, settings)

    def forward(self, batch: Batch, schedule: Mapping[str, float]) -> tuple[Tensor, Parts]:
        assert self.system.fusion is not None
        seen = self.adversarial.losses(batch, schedule["lambda"])
        heard = hear_speech(self, self.system.mdscm, batch)
        inputs = reference.fuse_inputs(heard.features, seen.features, heard.clip_logits, seen.clip_logits)
        fused = fused_logits(self.system.fusion, *inputs, batch.valid)
        of_fusion = self.emotion(fused, batch.targets)
        parts = {**seen.parts, "fusion_loss": of_fusion, "speech_accuracy": _right(fused, batch.labels)}
        return seen.whole + heard.loss + of_fusion, parts


class Inputs:
    """A batch of the fusion stage: features (N, L, D), scores (N, L, K), the clips that vote (N, L), labels (N,),
    targets (N, K)."""

    def __init__(self, features: Tensor, scores: Tensor, valid: Tensor, labels: Tensor, targets: Tensor):
        self.features, self.scores, self.valid, self.labels, self.targets = features, scores, valid, labels, targets

    def to(self, device: torch.device) -> Inputs:
        return Inputs(*(x.to(device) for x in (self.features, self.scores, self.valid, self.labels, self.targets)))


class Data:
    """What a run learns from: ``training`` and ``validation`` utterances of a speech corpus, and faces.

    ``faces`` may be the same corpus; ``face_training`` are the items whose faces are shown.
    """

    def __init__(
        self,
        speech: PreparedCorpus,
        training: Sequence[int],
        validation: Sequence[int],
        front_end: FrontEnd,
        faces: PreparedCorpus | None = None,
        face_training: Sequence[int] = (),
        skip_bad: bool = False,
    ):
        self.speech, self.front_end = speech, front_end
        spoken = set(speech.with_speech)
        self.training = [i for i in training if i in spoken]
        self.validation = [i for i in validation if i in spoken]
        self.faces, self.face_training = faces, list(face_training)
        self.skip_bad = skip_bad

    def without_any(self) -> Data:
        """No validation utterances: a stage on it ends with its last epoch."""
        return Data(self.speech, self.training, (), self.front_end, self.faces, self.face_training, self.skip_bad)

    def with_validation(self) -> Data:
        """The validation utterances among the training ones, for a refit: their speech, and their faces where both are
        of one corpus."""
        faces = set(self.face_training)
        if self.faces is not None and self.faces.manifest_sha256 == self.speech.manifest_sha256:
            faces |= set(self.validation) & set(self.faces.with_face)
        training = [*self.training, *self.validation]
        return Data(self.speech, training, (), self.front_end, self.faces, sorted(faces), self.skip_bad)


class SpeechStage:
    """A stage on batches of speech, with faces or without: ``mdscm``, ``avdal`` and ``joint``."""

    def __init__(self, name: str, system: System, settings: Settings, data: Data, processes: Processes, seed: int):
        recipe = settings.of_stage(name)
        self.name, self.system, self.settings, self.data = name, system, settings, data
        self.processes, self.seed = processes, seed
        labels = [data.speech.utterances[i].label for i in data.training]
        classes = len(data.speech.labels)
        weights = class_weights(labels, classes, recipe.class_weights)
        adversarial = name in ("avdal", "joint")
        if adversarial and (data.faces is None or not data.face_training):
            raise ValueError(f"stage {name}: expected a corpus with faces, got none")
        smoothing = recipe.label_smoothing
        module: nn.Module
        if not adversarial:
            module = MDSCMModule(system, weights, smoothing)
        else:
            assert data.faces is not None
            seen = [data.faces.utterances[i].label for i in data.face_training]
            face_weights = class_weights(seen, classes, recipe.class_weights)
            kind = AVDALModule if name == "avdal" else JointModule
            module = kind(system, weights, smoothing, face_weights, settings)
        self.module = module.to(processes.device)
        paired = settings.batches.paired and adversarial
        if paired and data.faces is not None and data.faces.manifest_sha256 != data.speech.manifest_sha256:
            raise ValueError(
                f"stage {name}: batches.paired: expected faces of {data.speech.folder}, got those of "
                f"{data.faces.folder}; --set batches.paired=false shows faces of other people"
            )
        training = data.training
        if paired:
            shown = set(data.face_training)
            training = [i for i in training if i in shown]
        faces = data.face_training if adversarial else []
        self.plan = Plan(training, recipe.batch_size, seed=seed, faces=faces, paired=paired)
        self.samples = Samples(
            data.speech,
            data.front_end,
            settings.clip_rule,
            seed=seed,
            # Fusion reads the clips of an utterance one after the other.
            crops=settings.batches.crops and name != "joint",
            augmentation=settings.augmentation,
            faces=data.faces if adversarial else None,
            face_frames=settings.batches.face_frames,
            clean=system.mdscm.statistics is not None and name != "avdal",
            skip_bad=data.skip_bad,
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        if first >= last:
            return
        workers = self.settings.batches.workers
        rank, world = self.processes.rank, self.processes.world
        yield from batches(self.plan, self.samples, first=first, last=last, workers=workers, rank=rank, world=world)

    def facts(self, step: int, total: int) -> dict[str, float]:
        if self.name == "mdscm":
            return {}
        return {"lambda": reversal_lambda(step / max(1, total - 1), self.settings.adversarial)}

    def validate(self) -> dict[str, Any]:
        model = {"mdscm": "mdscm", "avdal": "avdal", "joint": "fusion"}[self.name]
        return validate(self.system, model, self.data, self.settings, self.processes)

    def inspect(self, step: int, means: Mapping[str, float]) -> dict[str, Any]:
        rows = self.plan.batch_size * self.plan.steps_per_epoch
        found: dict[str, Any] = {"skipped": round(means["bad_share"] * rows)}
        if self.name != "mdscm":
            found["probe_accuracy"] = self.probe()
            found["gradient_ratio"] = self.gradient_ratio(step, means["lambda"])
            found["warnings"] = warnings_of({**means, **found}, len(self.data.speech.labels))
        return found

    def gradient_ratio(self, step: int, lam: float) -> float | None:
        """Norm of the encoder's gradient of the reversed domain loss over that of the emotion losses, on the batch of
        ``step``; None where the emotions leave no gradient."""
        module = self.module.adversarial if isinstance(self.module, JointModule) else self.module
        assert isinstance(module, AVDALModule)
        (batch,) = batches(self.plan, self.samples, first=step, last=step + 1)
        body = [p for p in module.avre.body.parameters() if p.requires_grad]
        losses = module.losses(batch.to(self.processes.device), lam)
        norms = []
        for half in (losses.emotions, losses.domain):
            gradients = torch.autograd.grad(half, body, retain_graph=half is losses.emotions, allow_unused=True)
            norms.append(sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5)
        return norms[1] / norms[0] if norms[0] > 0 else None

    def probe(self) -> float | None:
        """``linear_probe`` on features of both domains; None for too few of them."""
        found = embeddings(self.system, self.data, self.settings, PROBE_ITEMS)
        if min(len(found["speech"]), len(found["faces"])) < 4:
            return None
        return linear_probe(found["speech"], found["faces"], self.seed)


class FusionStage:
    """Fusion on frozen networks: what they make of every utterance is computed once."""

    name = "fusion"

    def __init__(self, system: System, settings: Settings, data: Data, processes: Processes, seed: int):
        recipe = settings.fusion
        if settings.clip_rule.clips is None:
            raise ValueError("stage fusion: clip_rule.clips: expected a fixed number of clips, got as many as needed")
        self.system, self.settings, self.data, self.processes = system, settings, data, processes
        labels = [data.speech.utterances[i].label for i in data.training]
        classes = len(data.speech.labels)
        weights = class_weights(labels, classes, recipe.class_weights)
        self.module = FusionModule(system, weights, recipe.label_smoothing).to(processes.device)
        self.plan = Plan(range(len(data.training)), recipe.batch_size, seed=seed)
        self.labels = torch.tensor(labels)
        self.targets = F.one_hot(self.labels, classes).float()
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    @torch.no_grad()
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features (utterances, L, D), scores (utterances, L, K), the clips that vote (utterances, L), of training."""
        if self._inputs is None:
            self.system.eval()
            values = self.data.speech.features(self.data.front_end)
            found = []
            for i in self.data.training:
                known = values[i]
                assert known is not None
                clips, valid = utterance_clips(known, self.data.front_end, self.settings.clip_rule)
                fused = self.system.fuse_inputs(clips[None].to(self.processes.device))
                found.append([*(x.cpu() for x in fused), valid[None]])
            features, scores, votes = zip(*found)
            self._inputs = torch.cat(features), torch.cat(scores), torch.cat(votes)
        return self._inputs

    def batches(self, first: int, last: int) -> Iterator[Inputs]:
        features, scores, valid = self.inputs()
        for step in range(first, last):
            rows = torch.tensor([d.speech for d in self.plan.rows(step, self.processes.rank, self.processes.world)])
            yield Inputs(features[rows], scores[rows], valid[rows], self.labels[rows], self.targets[rows])

    def facts(self, step: int, total: int) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, Any]:
        return validate(self.system, "fusion", self.data, self.settings, self.processes)

    def inspect(self, step: int, means: Mapping[str, float]) -> dict[str, Any]:
        return {}


def validate(system: System, model: str, data: Data, settings: Settings, processes: Processes) -> dict[str, Any]:
    """WA, UA, loss and confusion matrix of the validation utterances, each scored by one process; empty without any."""
    if not data.validation:
        return {}
    mine = data.validation[processes.rank :: processes.world]
    classes = len(data.speech.labels)
    truth = torch.tensor([data.speech.utterances[i].label for i in mine], dtype=torch.int64)
    logits = score(system, model, data.speech, mine, data.front_end, settings.clip_rule)
    counted = torch.from_numpy(confusion_matrix(truth.tolist(), logits.argmax(1).tolist(), classes))
    matrix = processes.total(counted.to(processes.device)).cpu().numpy()
    loss = F.cross_entropy(logits, truth, reduction="sum") if len(mine) else torch.zeros(())
    total = processes.total(loss.double().to(processes.device))
    return {
        "validation_wa": weighted_accuracy(matrix),
        "validation_ua": unweighted_accuracy(matrix),
        "validation_loss": float(total) / len(data.validation),
        "validation_confusion": matrix.tolist(),  # rows are the truth
    }


@torch.no_grad()
def embeddings(system: System, data: Data, settings: Settings, items: int) -> dict[str, np.ndarray]:
    """``speech`` and ``faces``, features (n, D) of the encoder as it is, with ``speech_labels`` and ``face_labels``.

    One clip that votes, or one frame, of up to ``items`` evenly spread training items of each domain.
    """
    assert system.avre is not None and data.faces is not None
    system.eval()
    device = next(system.parameters()).device
    samples = Samples(
        data.speech, data.front_end, settings.clip_rule, seed=0, crops=True,
        augmentation=Augmentation(), faces=data.faces, face_frames=1,
    )  # fmt: skip
    found: dict[str, np.ndarray] = {}
    for name, corpus, chosen in (
        ("speech", data.speech, data.training),
        ("faces", data.faces, data.face_training),
    ):
        spread = [chosen[i * len(chosen) // min(items, len(chosen))] for i in range(min(items, len(chosen)))]
        rows = []
        for begin in range(0, len(spread), 64):
            part = spread[begin : begin + 64]
            make = samples._clips if name == "speech" else samples._face
            values = np.stack([make(i, np.random.default_rng(i))[0] for i in part])
            batch = torch.from_numpy(values).to(device)
            seen = system.encoder_clips(batch) if name == "speech" else system.encoder_faces(batch)
            rows.append(system.avre(seen).features[:, 0].float().cpu().numpy())
        found[name] = np.concatenate(rows)
        key = "speech_labels" if name == "speech" else "face_labels"
        found[key] = np.array([corpus.utterances[i].label for i in spread])
    return found


def stage_of(
    name: str, system: System, settings: Settings, data: Data, processes: Processes, seed: int
) -> SpeechStage | FusionStage:
    """The stage of a name, on networks as the stages before left them."""
    if name != "mdscm" and settings.encoder is None:
        raise ValueError(f"stage {name}: expected a recipe with an [encoder], got {settings.name!r} without one")
    if name == "fusion":
        return FusionStage(system, settings, data, processes, seed)
    return SpeechStage(name, system, settings, data, processes, seed)
