"""Evaluation under a protocol: every fold trains its own networks and tests them on speech alone.

OUT/<fold>-seed<k>/    the run of a fold (``run.py``), without its networks
OUT/evaluation/        one file per fold (``evaluation.py``)
OUT/summary.json, OUT/report.html
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from avser_fast.config import ModelSpec

from .data.corpus import Utterance
from .data.prepared import PreparedCorpus
from .distributed import Processes
from .evaluation import Fold, fold_path, fold_result, read_folds, summarize, write_fold
from .html_report import write_report
from .loop import TrainingError
from .precisions import heard_clips, low_precisions
from .protocols import CROSS_CORPUS, RANDOM, Split, check_leakage, cross_corpus, map_labels, relabelled, splits
from .run import Division, Options, check_stages, environment, shown_faces, taught, train_stages, usable
from .run_folder import write_json
from .settings import Settings
from .system import System, halves, score

Progress = Callable[[str, int, int, Mapping[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a fold needs to be run in any process."""

    settings: Settings
    speech: Path
    faces: Path | None
    target: Path | None
    target_labels: Mapping[int, int] | None
    split: Split
    stages: tuple[str, ...]
    out: Path
    options: Options
    device: str = "auto"
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return fold_path(self.out, self.split.name, self.split.seed).with_suffix("")


def run_fold(task: Task, progress: Progress | None = None) -> Fold:
    """Train and test one fold and write its file; an interrupted one goes on where it was.

    Faces of utterances under test are never shown, those of validation in a refit alone; of a corpus apart all are
    that ``unseen_faces`` leaves.
    """
    speech = PreparedCorpus(task.speech)
    faces = None if task.faces is None else speech if task.faces == task.speech else PreparedCorpus(task.faces)
    target = speech if task.target is None else PreparedCorpus(task.target)
    split = task.split
    held = split.validation if task.target is not None else (*split.validation, *split.test)
    shown = shown_faces(faces, speech, held, split.training)
    if task.target is not None and faces is not None:
        shown = unseen_faces(faces, target, shown)
    division = Division(split.training, split.validation, shown)
    division = usable(division, speech, task.settings, task.options.skip_bad)
    system, spec, fitted = train_stages(
        task.settings,
        speech,
        division,
        task.stages,
        task.folder,
        seed=split.seed,
        faces=faces,
        processes=Processes(device=torch.device(task.device)),
        options=dataclasses.replace(task.options, resume=True),
        progress=progress,
    )
    tested: Sequence[Utterance] = target.utterances
    rows = list(split.test)
    if task.target_labels is not None:
        kept = target.spoken(task.target_labels)
        tested, rows = _tested(target, task.target_labels), [kept[i] for i in split.test]
    trained = set(task.stages)
    names = [m for m, s in (("mdscm", "mdscm"), ("avdal", "avdal"), ("fusion", "fusion")) if {s, "joint"} & trained]
    models = _answers(system, spec, names, target, rows)
    precisions = {}
    if "mdscm" in names:
        heard = heard_clips(speech, taught(division, task.settings, task.stages), spec)
        tested_clips = heard_clips(target, rows, spec)
        precisions["mdscm"] = low_precisions(spec, system.mdscm.state_dict(), heard, tested_clips)
    validation = {}
    for stage, model in (("mdscm", "mdscm"), ("avdal", "avdal"), ("fusion", "fusion"), ("joint", "fusion")):
        if stage in fitted and "validation_ua" in fitted[stage].kept:
            validation[model] = fitted[stage].kept["validation_ua"]
    fold = fold_result(
        split, speech.utterances, speech.labels, models, validation, target=None if target is speech else tested,
        epochs={stage: kept.epoch for stage, kept in fitted.items()}, precisions=precisions, notes=task.notes,
    )  # fmt: skip
    write_fold(fold, task.out / "evaluation")
    for path in task.folder.glob("*.pt"):
        path.unlink()
    return fold


def _answers(
    system: System, spec: ModelSpec, names: Sequence[str], target: PreparedCorpus, rows: Sequence[int]
) -> dict[str, list[list[float]]]:
    """Probabilities by each of the models ``names``, and by each path of an MDSCM with two."""

    def probabilities(model: str) -> list[list[float]]:
        logits = score(system, model, target, rows, spec.front_end, spec.clip_rule, len(spec.labels))
        return logits.softmax(1).tolist()

    models = {name: probabilities(name) for name in names}
    if "mdscm" in names:
        whole = {name: value.clone() for name, value in system.mdscm.state_dict().items()}
        for path, weights in halves(whole, spec.network).items():
            system.mdscm.load_state_dict(weights)
            models[path] = probabilities("mdscm")
        system.mdscm.load_state_dict(whole)
    return models


def _tested(target: PreparedCorpus, labels: Mapping[int, int]) -> list[Utterance]:
    """The utterances of another corpus that can be tested, with the labels of the one that is trained on."""
    return relabelled(_spoken(target), labels)


def _spoken(corpus: PreparedCorpus) -> list[Utterance]:
    return [corpus.utterances[i] for i in corpus.with_speech]


def _whole(corpus: PreparedCorpus, split: Split, *parts: str) -> Split:
    """A split of the utterances with speech with these parts as indices into the corpus."""
    spoken = corpus.with_speech
    rows: dict[str, Any] = {part: tuple(spoken[i] for i in getattr(split, part)) for part in parts}
    return dataclasses.replace(split, **rows)


def unseen_faces(faces: PreparedCorpus, target: PreparedCorpus, shown: Sequence[int]) -> list[int]:
    """Those of ``shown`` that are of no recording of ``target`` and, where both have the same people, of none of its
    speakers."""
    tested = target.all_recordings()
    people = set(target.speakers) if faces.same_people(target) else set()
    return [i for i in shown if tested.isdisjoint(faces.recordings(i)) and faces.utterances[i].speaker not in people]


def _overlap(speech: PreparedCorpus, target: PreparedCorpus, labels: Mapping[int, int]) -> tuple[str, str]:
    """What of another corpus' test is trained on: an error, and the sentence of a test that is allowed all the same;
    both empty where nothing is."""
    learnt: dict[str, str] = {}
    for i in speech.with_speech:
        for digest in speech.recordings(i):
            learnt.setdefault(digest, speech.utterances[i].key)
    rows = target.spoken(labels)
    twice = [i for i in rows if any(digest in learnt for digest in target.recordings(i))]
    if twice:
        key, share = target.utterances[twice[0]].key, f"{len(twice)} of {len(rows)}"
        digest = next(digest for digest in target.recordings(twice[0]) if digest in learnt)
        return (
            f"{CROSS_CORPUS}: expected recordings that are not in {speech.folder}, got {share} that are trained on; "
            f"the first is {key}, there {learnt[digest]}",
            f"NOT speaker-independent: recordings of {share} tested utterances are also in training (protocol "
            f"{CROSS_CORPUS})",
        )
    tested = {target.utterances[i].speaker for i in rows}
    shared = sorted(tested & {"", *(u.speaker for u in _spoken(speech))})
    if not shared or not speech.same_people(target):
        return "", ""
    names = ", ".join(speaker or "unknown ones" for speaker in shared)
    why = f"also called {target.name}" if target.name == speech.name else "which has recordings of it"
    error = (
        f"{CROSS_CORPUS}: expected test speakers that are not in {speech.folder}, {why}, got {names} in both; a corpus "
        "of other people needs another --name"
    )
    if "" in shared:
        return error, f"NOT known to be speaker-independent: speakers are unknown (protocol {CROSS_CORPUS})"
    return error, (
        f"NOT speaker-independent: {len(shared)} of {len(tested)} test speakers are also in training "
        f"(protocol {CROSS_CORPUS})"
    )


def _devices(device: str) -> list[str]:
    """Where folds run: every GPU in turn, or the CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("evaluation: expected to be started without torchrun, got several processes; use --jobs")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': expected a GPU that torch can use, found none")
    if device == "cpu" or not torch.cuda.is_available():
        return ["cpu"]
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends this process as an exception would, so that it does not leave its workers behind."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # whose signals are not ours
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _side_by_side(tasks: Sequence[Task], jobs: int, say: Callable[[str], None]) -> None:
    """The folds, ``jobs`` at a time; one that fails is named and the others go on.  An interruption ends them all."""
    failed: list[str] = []
    others = multiprocessing.active_children()
    with _sigterm_raises(), ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_worker, task): f"{task.split.name}, seed {task.split.seed}" for task in tasks}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                error = future.exception()
                if error is not None:
                    failed.append(f"{running[future]}: {error}")
                said = running[future] if error is None else f"failed: {failed[-1]}"
                say(f"{said} ({done} of {len(tasks)})")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise
    if failed:
        raise ValueError(f"{len(failed)} of {len(tasks)} folds failed; {failed[0]}")


def _worker(task: Task) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    torch.set_num_threads(1)
    run_fold(task)


def evaluate_protocol(
    settings: Settings,
    speech: PreparedCorpus,
    out: Path,
    *,
    protocol: str,
    seeds: Sequence[int],
    stages: Sequence[str],
    faces: PreparedCorpus | None = None,
    target: PreparedCorpus | None = None,
    mapping: Mapping[str, str] | None = None,
    allow_leakage: bool = False,
    options: Options | None = None,
    device: str = "auto",
    jobs: int = 1,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every fold of a protocol; returns and writes the summary, and the page of the run.

    With ``target`` (protocol ``cross-corpus``) the networks are tested on that corpus, its labels counted as
    ``mapping`` says.  Finished folds found in ``out`` are not run again.  Speakers and recordings that are in training
    and under test are refused unless the protocol is the random one or ``allow_leakage`` is set; every output then says
    so.
    """
    options, devices = options or Options(), _devices(device)
    check_stages(stages)
    if {"avdal", "joint"} & set(stages) and (faces is None or not faces.with_face):
        raise ValueError(
            f"{(faces or speech).folder}: expected faces for the stages {', '.join(stages)}, got none; prepare it with "
            "--boxes, --face-clips or --detector, or name another corpus with --faces"
        )
    labels: dict[int, int] | None = None
    notes: list[str] = []
    if target is not None:
        labels, notes = map_labels(speech.labels, target.labels, mapping)
        error, leakage = _overlap(speech, target, labels)
        if error and not allow_leakage:
            raise ValueError(error)
        tested, names = _tested(target, labels), (speech.name, target.name)
        found = [cross_corpus(_spoken(speech), tested, seed, names) for seed in seeds]
        chosen = [
            dataclasses.replace(
                _whole(speech, split, "training", "validation"), shares_speakers=bool(leakage), leakage=leakage
            )
            for split in found
        ]
        for line in notes:
            say(line)
        if faces is not None:
            hidden = len(faces.with_face) - len(unseen_faces(faces, target, faces.with_face))
            if hidden:
                of = f"{hidden} of {len(faces.with_face)} faces of {faces.name}"
                say(f"{of} are of {target.name} or its speakers and are not shown")
    else:
        found = splits(_spoken(speech), protocol, seeds)
        chosen = [_whole(speech, split, "training", "validation", "test") for split in found]
    for split in chosen:
        check_leakage(split, speech.utterances, allow_leakage or protocol == RANDOM)
    out.mkdir(parents=True, exist_ok=True)
    mark = out / "settings.json"
    asked = {**settings.to_dict(), "stages": list(stages), "protocol": protocol, "corpus": speech.name}
    asked["manifest_sha256"] = speech.manifest_sha256
    asked["face_manifest_sha256"] = None if faces is None else faces.manifest_sha256
    if target is not None:
        counted = {target.labels[a]: speech.labels[b] for a, b in (labels or {}).items()}
        asked["target"] = {"corpus": target.name, "manifest_sha256": target.manifest_sha256, "labels": counted}
    asked = json.loads(json.dumps(asked))
    if mark.exists() and json.loads(mark.read_text(encoding="utf-8")) != asked:
        raise ValueError(f"{out}: expected folds of the settings in settings.json, got others; choose another folder")
    write_json(asked, mark)
    about = environment(settings, speech, faces, min(seeds), Processes(device=torch.device(devices[0])))
    where = None if faces is None else faces.folder
    tasks = [
        Task(settings, speech.folder, where, None if target is None else target.folder, labels, split,
             tuple(stages), out, options, devices[n % len(devices)], tuple(notes))
        for n, split in enumerate(chosen)
    ]  # fmt: skip
    write_json({**about, "seeds": list(seeds), "curves_of": tasks[0].folder.name}, out / "environment.json")
    waiting = [t for t in tasks if not fold_path(out / "evaluation", t.split.name, t.split.seed).exists()]
    if jobs > 1 and len(waiting) > 1:
        _side_by_side(waiting, jobs, say)
    else:
        for task in waiting:
            try:
                run_fold(task, progress)
            except TrainingError as error:
                raise ValueError(f"{task.split.name}, seed {task.split.seed}: {error}") from error
    summary = summarize(read_folds(out / "evaluation"), chosen)
    write_json(summary, out / "summary.json")
    first = tasks[0].folder
    for name in ("log.jsonl", "epochs.jsonl", "embeddings.npz"):
        if (first / name).exists():
            shutil.copyfile(first / name, out / name)
    write_report(out)
    return summary
