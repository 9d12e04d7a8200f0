"""A run: the stages of one recipe on one division of the data, in a folder that says everything about it.

settings.json, environment.json   what was asked for, and of what it was made
log.jsonl, log.csv, epochs.jsonl  see ``log.py``
checkpoint-<stage>.pt             where a stage is; <stage>.pt once it is done
embeddings.npz                    features of both domains before and after adaptation
validation.json                   labels, and the confusion matrix of each stage's picked epoch
mdscm.safetensors, avdal.safetensors, system.safetensors
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import avser_fast
from avser_fast.config import EncoderSpec, ModelSpec, SystemSpec
from avser_fast.inference.weights import write_avre, write_model, write_system
from avser_fast.inference.whole_files import remove_unfinished, write_bytes

from .data.batches import bad_speech
from .data.prepared import PreparedCorpus
from .distributed import Processes
from .log import RunLog
from .loop import Fitted, Stop, copied, fit, save_atomically
from .run_folder import write_json
from .settings import STAGES, Settings
from .stages import Data, embeddings, stage_of
from .system import System, measured_front_end

#: Items of each domain in ``embeddings.npz``.
_SHOWN = 300


@dataclasses.dataclass(frozen=True)
class Division:
    """Which items of the corpora a run learns from; ``faces`` are items of the face corpus, ``left_out`` says what was
    wrong with those that ``usable`` has taken out (None: it has not looked)."""

    training: Sequence[int]
    validation: Sequence[int] = ()
    faces: Sequence[int] = ()
    left_out: Sequence[str] | None = None


def usable(division: Division, speech: PreparedCorpus, settings: Settings, skip_bad: bool) -> Division:
    """The division without utterances whose stored speech cannot be read or is not finite; SampleError naming the first
    unless ``skip_bad``.  They are looked through once."""
    if division.left_out is not None:
        return division
    bad = bad_speech(speech, [*division.training, *division.validation], settings.front_end.front_end())
    if bad and not skip_bad:
        raise next(iter(bad.values()))
    training, validation = ([i for i in part if i not in bad] for part in (division.training, division.validation))
    return Division(training, validation, division.faces, list(map(str, bad.values())))


def taught(division: Division, settings: Settings, stages: Sequence[str]) -> list[int]:
    """The utterances that some of the stages learnt from: those of validation too, where one refits."""
    refits = any(settings.of_stage(name).refit for name in stages)
    return sorted({*division.training, *(division.validation if refits else ())})


@dataclasses.dataclass(frozen=True)
class Options:
    """What changes no number: who computes, how often is saved, what is watched."""

    backend: str = "auto"
    every: int = 200
    resume: bool = False
    skip_bad: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: expected at least 1 step from one checkpoint to the next, got {self.every}")


def check_stages(stages: Sequence[str]) -> None:
    """ValueError for stages that do not exist or are out of order, and for a fusion of networks that nobody trained."""
    unknown = [s for s in stages if s not in STAGES]
    if unknown or not stages:
        raise ValueError(f"stages: expected some of {', '.join(STAGES)}, got {', '.join(unknown) or 'none'}")
    if list(stages) != [s for s in STAGES if s in stages]:
        raise ValueError(f"stages: expected each once, in the order {', '.join(STAGES)}, got {', '.join(stages)}")
    if "fusion" in stages and not {"mdscm", "avdal"} <= set(stages):
        raise ValueError(
            f"stages: expected mdscm and avdal before fusion, which trains neither, got {', '.join(stages)}"
        )


def shown_faces(
    faces: PreparedCorpus | None, corpus: PreparedCorpus, held: Sequence[int], training: Sequence[int] = ()
) -> list[int]:
    """Items of ``faces`` that may be shown: all of other people, and of the same none of an utterance ``held`` out of
    ``corpus``, in whichever folder it is, and none of a held speaker who is not in ``training``.

    They may be the same people where the corpora say so (``PreparedCorpus.same_people``) or have an utterance of one
    key and speaker, as the sound and the pictures of one corpus have that were prepared apart."""
    if faces is None:
        return []
    known = {(u.key, u.speaker) for u in corpus.utterances}
    if not faces.same_people(corpus) and not any((u.key, u.speaker) in known for u in faces.utterances):
        return list(faces.with_face)
    keys = {corpus.utterances[i].key for i in held}
    parts = {part for i in held for part in corpus.parts(i)}
    heard = {corpus.utterances[i].speaker for i in training}
    speakers = {corpus.utterances[i].speaker for i in held} - heard
    return [
        i
        for i in faces.with_face
        if faces.utterances[i].key not in keys
        and faces.utterances[i].speaker not in speakers
        and parts.isdisjoint(faces.parts(i))
    ]


def _fingerprint(speech: PreparedCorpus, faces: PreparedCorpus | None, division: Division) -> dict[str, Any]:
    """What a run learns from, as far as it must be the same when the run goes on."""
    parts = {part: [int(i) for i in getattr(division, part)] for part in ("training", "validation", "faces")}
    return {
        "manifest_sha256": speech.manifest_sha256,
        "face_manifest_sha256": None if faces is None else faces.manifest_sha256,
        "validation_speakers": sorted({speech.utterances[i].speaker for i in parts["validation"]}),
        "division_sha256": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
    }


def environment(
    settings: Settings, speech: PreparedCorpus, faces: PreparedCorpus | None, seed: int, processes: Processes
) -> dict[str, Any]:
    """Versions, machine and data of a run."""
    about: dict[str, Any] = {
        "avser_fast": avser_fast.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(processes.device),
        "processes": processes.world,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "corpus": speech.name,
        "manifest_sha256": speech.manifest_sha256,
        "utterances": len(speech),
    }
    if processes.device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(processes.device)
    if faces is not None:
        about.update(face_corpus=faces.name, face_manifest_sha256=faces.manifest_sha256, faces=len(faces.with_face))
    return about


def train_stages(
    settings: Settings,
    speech: PreparedCorpus,
    division: Division,
    stages: Sequence[str],
    folder: Path,
    *,
    seed: int = 0,
    faces: PreparedCorpus | None = None,
    processes: Processes | None = None,
    epochs: int | None = None,
    options: Options | None = None,
    stop: Stop | None = None,
    progress: Callable[[str, int, int, Mapping[str, Any]], None] | None = None,
) -> tuple[System, ModelSpec, dict[str, Fitted]]:
    """Train ``stages`` in order and return the networks, their spec and how each stage ended.

    ``folder`` is that of the run.  With ``options.resume`` finished stages found there are read, and the one that was
    interrupted goes on.  ``epochs`` ends the schedule of every stage early.  Raises Stopped when ``stop`` is asked for,
    TrainingError and ValueError in one sentence.
    """
    processes, options = processes or Processes(), options or Options()
    check_stages(stages)
    if not options.resume and any(folder.glob("*.pt")):
        raise ValueError(
            f"{folder}: expected a folder without checkpoints, got those of another run; resume it or choose another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if processes.first:
        remove_unfinished(folder)
    division = usable(division, speech, settings, options.skip_bad)
    data_asked = _fingerprint(speech, faces, division)
    asked = {**settings.to_dict(), "stages": list(stages), "seed": seed, "epochs": epochs, "data": data_asked}
    asked = json.loads(json.dumps(asked))
    mark = folder / "settings.json"
    if options.resume and mark.exists():
        known = json.loads(mark.read_text(encoding="utf-8"))
        others = sorted(k for k in {*known, *asked} if known.get(k) != asked.get(k))
        if others:
            raise ValueError(
                f"{folder}: expected to resume with the settings in settings.json, got others ({', '.join(others)})"
            )
    spec = ModelSpec(
        speech.labels, measured_front_end(speech, division.training, settings), settings.clip_rule, settings.network
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        system = System(settings, options.backend).to(processes.device)
    if processes.device.type == "cpu":
        system = system.to(memory_format=torch.channels_last)
    if system.avre is not None and system.fusion is not None:  # what does not fit is said now, not when it is written
        parts = (spec.network, system.avre.encoder, system.fusion.fusion)
        SystemSpec(spec.labels, spec.front_end, spec.clip_rule, *parts)
    data = Data(speech, division.training, division.validation, spec.front_end, faces, division.faces, options.skip_bad)
    for name in stages:  # nor is hours later what a later stage lacks
        stage_of(name, system, settings, data, processes, seed).plan.rows(0, processes.rank, processes.world)
    if processes.first:
        write_json(asked, mark)
        about = environment(settings, speech, faces, seed, processes)
        about["left_out"] = division.left_out
        write_json(about, folder / "environment.json")
        if not options.resume:  # lines of a run that left no checkpoint
            for name in ("log.jsonl", "log.csv", "epochs.jsonl", "embeddings.npz"):
                (folder / name).unlink(missing_ok=True)
    log = RunLog(folder if processes.first else None, options.tensorboard)
    run = _Run(system, settings, data, folder, seed, epochs, processes, options, log, stop, progress)
    again = trained_again(settings, stages) if data.validation else set()
    try:
        fitted = run.pick(stages, "picked-" if again else "")
        if again:
            run.refit(stages, again, fitted)
        if processes.first:
            write_json({"labels": list(speech.labels), "stages": _picked(fitted)}, folder / "validation.json")
    finally:
        log.close()
    return system, spec, fitted


def _picked(fitted: Mapping[str, Fitted]) -> dict[str, Any]:
    """Of the stages that were validated, the epoch that was picked and its confusion matrix."""
    found = {}
    for name, how in fitted.items():
        if "validation_confusion" in how.kept:
            found[name] = {"epoch": how.epoch, "confusion": how.kept["validation_confusion"]}
    return found


def trained_again(settings: Settings, stages: Sequence[str]) -> set[str]:
    """The stages that are trained a second time, once all have picked their epochs: those that refit, and after them
    those that read what a refit has changed.

    A stage must pick among networks that have not heard the validation utterances, so no refit may come before it.
    """
    again: set[str] = set()
    for name in stages:
        if settings.of_stage(name).refit or (again and name in ("fusion", "joint")):
            again.add(name)
    return again


#: The network that a stage trains alone.
_TRAINED = {"mdscm": "mdscm", "avdal": "avre", "fusion": "fusion"}


@dataclasses.dataclass
class _Run:
    system: System
    settings: Settings
    data: Data
    folder: Path
    seed: int
    epochs: int | None
    processes: Processes
    options: Options
    log: RunLog
    stop: Stop | None
    progress: Callable[[str, int, int, Mapping[str, Any]], None] | None
    #: Of a stage that trains one network, what it has made of it.
    picked: dict[str, dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)

    def pick(self, stages: Sequence[str], prefix: str) -> dict[str, Fitted]:
        """Train the stages in order on the training utterances; each picks its epoch on those of validation."""
        initial = copied(self.system.state_dict())
        fitted: dict[str, Fitted] = {}
        finished = self.options.resume and all((self.folder / f"{name}.pt").exists() for name in stages)
        for name in stages:
            done = self.folder / f"{'' if finished else prefix}{name}.pt"
            found = self._found(done)
            if found is None:
                if name == "avdal":
                    self._embeddings("before")
                found = self._fit(name, self.data, self.epochs, "")
                if not prefix:
                    self._ended(name)
                self._save(name, found, done)
            fitted[name] = found
            if name in _TRAINED:
                self.picked[name] = copied(getattr(self.system, _TRAINED[name]).state_dict())
        if prefix:
            self.system.load_state_dict(initial)
        return fitted

    def refit(self, stages: Sequence[str], again: set[str], fitted: Mapping[str, Fitted]) -> None:
        """From the beginning, ``again`` for as many epochs as were picked, on the validation utterances too where the
        recipe says so; the other stages keep what they learnt."""
        for name in stages:
            done = self.folder / f"{name}.pt"
            if self._found(done) is not None:
                continue
            if name in again:
                data = self.data.with_validation() if self.settings.of_stage(name).refit else self.data.without_any()
                self._fit(name, data, fitted[name].epoch, "-refit")
            else:
                getattr(self.system, _TRAINED[name]).load_state_dict(self.picked[name])
            self._ended(name)
            self._save(name, fitted[name], done)
        if self.processes.first:
            for name in stages:
                (self.folder / f"picked-{name}.pt").unlink(missing_ok=True)

    def _found(self, done: Path) -> Fitted | None:
        """How a stage ended that a run before has finished; its networks are read."""
        found = self.options.resume and done.exists()
        if self.processes.any(found) != found:
            raise ValueError(f"{done}: expected a folder that all processes see, got one that only some see")
        if not found:
            return None
        try:
            saved = torch.load(done, weights_only=True, map_location=self.processes.device)
            self.system.load_state_dict(saved["system"])
        except Exception as error:  # whatever a damaged file leads to: which one it was is the point
            raise ValueError(
                f"{done}: expected the checkpoint of a finished stage, got one that cannot be read "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
            ) from error
        return Fitted(saved["epoch"], saved["history"])

    def _fit(self, name: str, data: Data, epochs: int | None, mark: str) -> Fitted:
        stage = stage_of(name, self.system, self.settings, data, self.processes, self.seed)
        return fit(
            stage,
            self.settings.of_stage(name),
            seed=self.seed,
            processes=self.processes,
            log=self.log,
            mark=mark,
            epochs=epochs,
            checkpoint=self.folder / f"checkpoint-{name}{mark}.pt",
            every=self.options.every,
            resume=self.options.resume,
            stop=self.stop,
            progress=self.progress,
        )

    def _ended(self, name: str) -> None:
        if name in ("avdal", "joint"):
            self._embeddings("after")

    def _embeddings(self, when: str) -> None:
        if self.processes.first and self.data.faces is not None:
            _keep_embeddings(self.folder, when, self.system, self.data, self.settings)

    def _save(self, name: str, fitted: Fitted, done: Path) -> None:
        if self.processes.first:
            save_atomically(
                {"system": self.system.state_dict(), "epoch": fitted.epoch, "history": fitted.history}, done
            )
            for mark in ("", "-refit"):
                (self.folder / f"checkpoint-{name}{mark}.pt").unlink(missing_ok=True)


def _keep_embeddings(folder: Path, when: str, system: System, data: Data, settings: Settings) -> None:
    path = folder / "embeddings.npz"
    kept = dict(np.load(path)) if path.exists() else {}
    found = embeddings(system, data, settings, _SHOWN)
    kept.update({f"speech_{when}": found["speech"], f"faces_{when}": found["faces"]})
    kept.update(speech_labels=found["speech_labels"], face_labels=found["face_labels"])
    kept[f"face_{when}"] = kept.pop(f"faces_{when}")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **kept)
    write_bytes(path, buffer.getvalue())


def write_models(
    folder: Path, system: System, spec: ModelSpec, stages: Sequence[str], card: Mapping[str, Any]
) -> list[Path]:
    """The model files of the networks that were trained, which ``avser_fast.load`` runs; returns their paths."""
    mdscm, avre, fusion = (
        None if part is None else {k: v.detach().cpu() for k, v in part.state_dict().items()}
        for part in (system.mdscm, system.avre, system.fusion)
    )
    trained = set(stages)
    written: list[Path] = []
    assert mdscm is not None
    if trained & {"mdscm", "joint"}:
        written.append(folder / "mdscm.safetensors")
        write_model(written[-1], spec, mdscm, card)
    if system.avre is not None and avre is not None and trained & {"avdal", "joint"}:
        encoder = system.avre.encoder
        written.append(folder / "avdal.safetensors")
        heard = dataclasses.replace(spec.front_end, voice=False)
        write_avre(written[-1], EncoderSpec(spec.labels, heard, spec.clip_rule, encoder), avre, card)
        if system.fusion is not None and fusion is not None and trained & {"fusion", "joint"}:
            parts = (spec.network, encoder, system.fusion.fusion)
            whole = SystemSpec(spec.labels, spec.front_end, spec.clip_rule, *parts)
            written.append(folder / "system.safetensors")
            write_system(written[-1], whole, mdscm, avre, fusion, card)
    return written
