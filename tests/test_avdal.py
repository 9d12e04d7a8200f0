"""Training in stages: the same numbers after any interruption, with any number of processes, on either backend."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_corpus import TINY

import avser_fast
from avser_fast import reference
from avser_fast.errors import AvserError, ConfigError
from avser_fast.ops import backends
from python_training import loop, metrics
from python_training.__main__ import main
from python_training.data import PreparedCorpus
from python_training.data.augment import Augmentation
from python_training.data.batches import SampleError, Samples
from python_training.distributed import Processes
from python_training.health import linear_probe, warnings_of
from python_training.html_report import write_report
from python_training.log import RunLog
from python_training.loop import Stop, Stopped, TrainingError
from python_training.losses import class_weights, domain_loss, emotion_loss, learning_rate, reversal_lambda
from python_training.run import Division, Options, shown_faces, train_stages, write_models
from python_training.run_folder import read_lines
from python_training.settings import Adversarial, Optimisation, Settings, load_settings
from python_training.stages import Data, stage_of
from python_training.system import System, measured_front_end, score

ROOT = Path(__file__).resolve().parents[1]
ALL = ["mdscm", "avdal", "fusion", "joint"]

pytestmark = pytest.mark.skipif(backends.INTERPRETED, reason="minutes in the interpreter")


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings("avdal-small", TINY)


def division(corpus: PreparedCorpus, validation: str | None = "Ses02M") -> Division:
    held = [i for i, u in enumerate(corpus.utterances) if u.speaker == validation]
    rest = [i for i in range(len(corpus)) if i not in held]
    return Division(rest, held, rest)


def run(
    settings: Settings, corpus: PreparedCorpus, folder: Path, stages: list[str], **options: Any
) -> tuple[System, dict[str, Any]]:
    validation = options.pop("validation", "Ses02M")
    keywords = {k: options.pop(k) for k in ("stop", "progress") if k in options}
    keywords.update(seed=3, faces=corpus, options=Options(**options))
    system, _, fitted = train_stages(settings, corpus, division(corpus, validation), stages, folder, **keywords)
    return system, fitted


def same(a: System, b: System) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values())
    return all(torch.equal(x, y) for x, y in pairs)


def without_time(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_lines(path)]


@pytest.fixture(scope="module")
def whole(
    settings: Settings, artificial: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[System, Path, dict[str, Any]]:
    """All four stages in one go."""
    folder = tmp_path_factory.mktemp("whole")
    system, fitted = run(settings, artificial, folder, ALL)
    return system, folder, fitted


# The stages


def test_a_run_writes_down_what_it_did(whole: tuple[System, Path, dict[str, Any]], artificial: PreparedCorpus) -> None:
    _, folder, fitted = whole
    steps = read_lines(folder / "log.jsonl")
    # 15 utterances of training speakers, 6 in a batch: 2 steps an epoch, 3 epochs a stage.
    assert [(r["stage"], r["step"], r["epoch"]) for r in steps] == [
        (stage, step, 1 + (step - 1) // 2) for stage in ALL for step in range(1, 7)
    ]
    avdal = [r for r in steps if r["stage"] == "avdal"]
    assert all(0 <= r["domain_accuracy"] <= 1 and r["face_loss"] > 0 for r in avdal)
    assert avdal[0]["lambda"] == 0 and avdal[-1]["lambda"] == pytest.approx(reference.reversal_schedule(1.0))
    assert all(
        r["loss"] == pytest.approx(r["speech_loss"] + r["face_loss"] + r["domain_loss"], rel=1e-5) for r in avdal
    )
    table = (folder / "log.csv").read_text().splitlines()
    assert table[0].startswith("stage,step,epoch,loss,") and len(table) == 1 + len(steps)
    epochs = read_lines(folder / "epochs.jsonl")
    assert len(epochs) == 12 and all("validation_ua" in e for e in epochs if e["epoch"] == 3)
    assert all(
        0 <= e["probe_accuracy"] <= 1 and e["gradient_ratio"] > 0 for e in epochs if e["stage"] in ("avdal", "joint")
    )
    validated = json.loads((folder / "validation.json").read_text())
    assert validated["labels"] == list(artificial.labels) and list(validated["stages"]) == ALL
    for stage, entry in validated["stages"].items():
        (picked,) = (e for e in epochs if e["stage"] == stage and e["epoch"] == entry["epoch"])
        matrix = np.array(entry["confusion"])
        assert metrics.unweighted_accuracy(matrix) == picked["validation_ua"]
    page = write_report(folder).read_text()
    assert page.count('class="matrix"') == 4 and "of the validation speakers" in page and "class 0" not in page
    kept = np.load(folder / "embeddings.npz")
    assert set(kept) == {f"{d}_{w}" for d in ("speech", "face") for w in ("before", "after", "labels")}
    assert len(kept["speech_before"]) == len(kept["speech_labels"]) == 15
    assert not np.array_equal(kept["face_before"], kept["face_after"])
    about = json.loads((folder / "environment.json").read_text())
    assert about["manifest_sha256"] == artificial.manifest_sha256 and about["seed"] == 3
    assert json.loads((folder / "settings.json").read_text())["stages"] == ALL
    assert set(fitted) == set(ALL) and not list(folder.glob("checkpoint-*"))


def test_a_stage_trains_its_own_networks_alone(settings: Settings, artificial: PreparedCorpus, tmp_path: Path) -> None:
    systems = [run(settings, artificial, tmp_path / str(n), ALL[: n + 1])[0] for n in range(4)]
    parts = [{k: v.clone() for k, v in s.state_dict().items()} for s in systems]
    for n, trained in enumerate(("mdscm", "avre", "fusion", "")):
        if n == 0:
            continue
        changed = {k.partition(".")[0] for k in parts[n] if not torch.equal(parts[n][k], parts[n - 1][k])}
        assert changed == ({trained} if trained else {"mdscm", "avre", "fusion"})


def test_joint_training_fuses_what_inference_fuses(settings: Settings, artificial: PreparedCorpus) -> None:
    """The clips of the clip rule, in order, and each network asked once."""
    from python_training.distributed import Processes

    system = System(settings)
    front = measured_front_end(artificial, artificial.with_speech, settings)
    data = Data(artificial, artificial.with_speech, (), front, artificial, artificial.with_face)
    stage = stage_of("joint", system, settings, data, Processes(), 0)
    (batch,) = stage.batches(0, 1)
    assert batch.clips.shape[1] == settings.clip_rule.clips == 3
    asked: list[str] = []
    for name, network in (("mdscm", system.mdscm), ("avre", system.avre), ("fusion", system.fusion)):
        assert network is not None
        network.register_forward_hook(lambda *_, name=name: asked.append(name))
    loss, parts = stage.module(batch, {"lambda": 0.5})
    assert (
        sorted(asked) == ["avre", "fusion", "mdscm"] and float(loss.detach()) > float(parts["fusion_loss"].detach()) > 0
    )


def test_the_gradient_of_the_domain_is_reversed_in_the_encoder_alone(
    settings: Settings, artificial: PreparedCorpus
) -> None:
    from python_training.distributed import Processes

    system = System(settings).eval()
    front = measured_front_end(artificial, artificial.with_speech, settings)
    data = Data(artificial, artificial.with_speech, (), front, artificial, artificial.with_face)
    stage = stage_of("avdal", system, settings, data, Processes(), 0)
    (batch,) = stage.batches(0, 1)
    assert system.avre is not None
    body, domain = list(system.avre.body.parameters()), list(system.avre.domain.parameters())

    def gradients(lam: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        half = stage.module.losses(batch, lam).domain  # type: ignore[operator]
        found = torch.autograd.grad(half, body + domain, allow_unused=True)
        return [g for g in found[: len(body)] if g is not None], list(found[len(body) :])

    (one, domain_one), (half, domain_half) = gradients(1.0), gradients(0.5)
    for a, b in zip(one, half):
        torch.testing.assert_close(a, 2 * b, rtol=1e-4, atol=1e-7)
    for a, b in zip(domain_one, domain_half):
        torch.testing.assert_close(a, b)
    assert all(not g.any() for g in gradients(0.0)[0])


def test_both_backends_give_the_same(settings: Settings, artificial: PreparedCorpus, tmp_path: Path) -> None:
    fused, _ = run(settings, artificial, tmp_path / "fused", ["mdscm", "avdal"], backend="cpu")
    plain, _ = run(settings, artificial, tmp_path / "plain", ["mdscm", "avdal"], backend="reference")
    a, b = (read_lines(tmp_path / n / "log.jsonl") for n in ("fused", "plain"))
    for x, y in zip(a, b):
        assert x["loss"] == pytest.approx(y["loss"], rel=2e-3), (x["stage"], x["step"])
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], rel=1e-5)
    assert not same(fused, plain), "two references would be compared"


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_is_near(settings: Settings, artificial: PreparedCorpus, tmp_path: Path, amp: str) -> None:
    half = dataclasses.replace(settings, avdal=dataclasses.replace(settings.avdal, amp=amp))
    run(half, artificial, tmp_path / "half", ["avdal"])
    run(settings, artificial, tmp_path / "whole", ["avdal"])
    a, b = (read_lines(tmp_path / n / "log.jsonl") for n in ("half", "whole"))
    assert [r["loss"] for r in a] != [r["loss"] for r in b]
    for x, y in zip(a, b):
        assert x["loss"] == pytest.approx(y["loss"], rel=0.05)


def test_steps_that_fp16_skips_are_logged_as_json(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(settings.avdal, amp="fp16", gradient_clip=0.0)
    steep = dataclasses.replace(settings, avdal=recipe, adversarial=Adversarial(face_weight=1e4))
    system, _ = run(steep, artificial, tmp_path, ["avdal"])
    assert read_lines(tmp_path / "log.jsonl")[0]["gradient_norm"] is None
    assert all(value.isfinite().all() for value in system.state_dict().values())


def test_refit_trains_again_on_everybody(settings: Settings, artificial: PreparedCorpus, tmp_path: Path) -> None:
    again = dataclasses.replace(settings, optimisation=dataclasses.replace(settings.optimisation, refit=True))
    system, fitted = run(again, artificial, tmp_path / "a", ["mdscm"])
    # The same epochs on the same utterances without any to pick from; the front end is that of the training speakers.
    shorter = dataclasses.replace(settings, optimisation=dataclasses.replace(settings.optimisation, refit=False))
    once, _ = run(shorter, artificial, tmp_path / "b", ["mdscm"])
    assert not same(system, once) and fitted["mdscm"].epoch >= 2


@pytest.mark.parametrize("paired", [False, True])
def test_a_refit_sees_the_validation_utterances(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their speech and, being of one corpus with the others, their faces."""
    parts = division(artificial)
    seen: list[tuple[set[int], set[int]]] = []
    original = Samples.__getitem__

    def get(self: Samples, draw: Any) -> Any:
        seen.append(({draw.speech}, {draw.face}))
        return original(self, draw)

    monkeypatch.setattr(Samples, "__getitem__", get)
    again = dataclasses.replace(
        settings,
        avdal=dataclasses.replace(settings.avdal, refit=True, epochs=6),
        batches=dataclasses.replace(settings.batches, paired=paired),
    )
    system, spec = System(again), measured_front_end(artificial, parts.training, again)
    first = Data(artificial, parts.training, parts.validation, spec, artificial, parts.faces)
    for data, expected in ((first, set(parts.training)), (first.with_validation(), set(range(len(artificial))))):
        seen.clear()
        stage = stage_of("avdal", system, again, data, Processes(), 3)
        list(stage.batches(0, 6 * stage.steps_per_epoch))
        speech, faces = (set.union(*(s[k] for s in seen)) for k in (0, 1))
        assert speech == faces == expected


def test_fusion_picks_among_networks_that_have_not_heard_the_validation_utterances(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path
) -> None:
    """Whoever refits: every stage picks as if nobody did, then those that refit and fusion are trained again."""
    again = dataclasses.replace(settings, optimisation=dataclasses.replace(settings.optimisation, refit=True))
    stages = ["mdscm", "avdal", "fusion"]
    plain, picked = run(settings, artificial, tmp_path / "plain", stages)
    system, fitted = run(again, artificial, tmp_path / "refit", stages)
    assert {n: f.history for n, f in fitted.items()} == {n: f.history for n, f in picked.items()}
    logged = dict.fromkeys(r["stage"] for r in read_lines(tmp_path / "refit" / "log.jsonl"))
    assert list(logged) == [*stages, "mdscm-refit", "fusion-refit"]
    parts = {"mdscm": True, "avre": False, "fusion": True}
    for name, changes in parts.items():
        pairs = zip(getattr(system, name).state_dict().values(), getattr(plain, name).state_dict().values())
        assert any(not torch.equal(a, b) for a, b in pairs) == changes, name


def test_stages_that_no_refit_touches_keep_what_they_learnt_before_joint_training(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path
) -> None:
    again = dataclasses.replace(settings, optimisation=dataclasses.replace(settings.optimisation, refit=True))
    plain, _ = run(settings, artificial, tmp_path / "plain", ["mdscm", "avdal"])
    run(again, artificial, tmp_path / "refit", ["mdscm", "avdal", "joint"])
    kept = torch.load(tmp_path / "refit" / "avdal.pt", weights_only=True)["system"]
    assert plain.avre is not None
    assert all(torch.equal(kept[f"avre.{name}"], value) for name, value in plain.avre.state_dict().items())


def test_joint_training_hears_the_statistics_of_clean_clips(settings: Settings, artificial: PreparedCorpus) -> None:
    network = dataclasses.replace(settings.network, statistics=8)
    heard = dataclasses.replace(settings, network=network, augmentation=Augmentation(time_mask=20))
    parts = division(artificial)
    system, spec = System(heard), measured_front_end(artificial, parts.training, heard)
    data = Data(artificial, parts.training, parts.validation, spec, artificial, parts.faces)
    stage = stage_of("joint", system, heard, data, Processes(), 3)
    (batch,) = stage.batches(0, 1)
    assert not torch.equal(batch.clips, batch.clean)
    given, runs = [], []
    assert system.mdscm.statistics is not None
    system.mdscm.statistics.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    system.mdscm.body.register_forward_pre_hook(lambda _, inputs: runs.append(inputs[0]))
    stage.module(batch, {"lambda": 0.5})
    assert len(runs) == 1 and len(given) == 1 and torch.equal(given[0], batch.clean.flatten(0, 1))


def test_paired_faces_of_another_corpus_are_refused_before_anything_is_trained(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(artificial.folder, other)
    manifest, header = other / "manifest.jsonl", other / "corpus.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    header.write_text(header.read_text().replace(artificial.manifest_sha256, digest))
    paired = dataclasses.replace(settings, batches=dataclasses.replace(settings.batches, paired=True))
    parts, faces = division(artificial), PreparedCorpus(other)
    with pytest.raises(ValueError, match="stage avdal: batches.paired: expected faces of .*, got those of .*other"):
        train_stages(paired, artificial, parts, ["mdscm", "avdal"], tmp_path / "run", faces=faces)
    assert not list((tmp_path / "run").glob("*.pt"))


# Interruptions


def test_a_damaged_checkpoint_of_a_stage_is_named(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path
) -> None:
    run(settings, artificial, tmp_path, ["mdscm"])
    (tmp_path / "mdscm.pt").write_bytes((tmp_path / "mdscm.pt").read_bytes()[:500])
    with pytest.raises(
        ValueError, match="mdscm.pt: expected the checkpoint of a finished stage, got one that cannot be"
    ):
        run(settings, artificial, tmp_path, ["mdscm"], resume=True)


def test_stopped_at_any_step_and_resumed_to_the_same_numbers(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path, whole: tuple[System, Path, dict[str, Any]]
) -> None:
    rng = random.Random(5)
    stop = Stop()

    def progress(stage: str, done: int, total: int, record: Any) -> None:
        stop.asked = rng.random() < 0.4

    stops = 0
    while True:
        try:
            system, fitted = run(settings, artificial, tmp_path / "run", ALL, resume=True, stop=stop, progress=progress)
            break
        except Stopped:
            stops += 1
            stop.asked = False
    assert stops >= 4
    expected, folder, as_one = whole
    assert same(system, expected)
    assert without_time(tmp_path / "run" / "log.jsonl") == without_time(folder / "log.jsonl")
    assert without_time(tmp_path / "run" / "epochs.jsonl") == without_time(folder / "epochs.jsonl")
    assert (tmp_path / "run" / "log.csv").read_text().count("\n") == (folder / "log.csv").read_text().count("\n")
    assert {n: f.epoch for n, f in fitted.items()} == {n: f.epoch for n, f in as_one.items()}


def test_a_refit_stopped_at_any_step_and_resumed_to_the_same_numbers(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path
) -> None:
    recipes = {s: dataclasses.replace(getattr(settings, s), refit=True) for s in ("optimisation", "fusion")}
    again = dataclasses.replace(settings, **recipes)  # type: ignore[arg-type]
    stages = ["mdscm", "avdal", "fusion"]
    expected, as_one = run(again, artificial, tmp_path / "whole", stages)
    stop, steps = Stop(), [0]

    def progress(stage: str, done: int, total: int, record: Any) -> None:
        steps[0] += 1
        stop.asked = steps[0] % 4 == 0

    stops = 0
    while True:
        try:
            system, fitted = run(again, artificial, tmp_path / "run", stages, resume=True, stop=stop, progress=progress)
            break
        except Stopped:
            stops += 1
            stop.asked = False
    assert stops >= 4 and same(system, expected)
    assert without_time(tmp_path / "run" / "log.jsonl") == without_time(tmp_path / "whole" / "log.jsonl")
    assert {n: f.epoch for n, f in fitted.items()} == {n: f.epoch for n, f in as_one.items()}
    assert sorted(p.name for p in (tmp_path / "run").glob("*.pt")) == ["avdal.pt", "fusion.pt", "mdscm.pt"]


def command(corpus: PreparedCorpus, out: Path, *more: str) -> list[str]:
    small = [a for key, value in TINY.items() for a in ("--set", f"{key}={json.dumps(value)}")]
    return [
        "train", "--dataset", str(corpus.folder), "--config", "avdal-small", *small, "--threads", "1", "--quiet",
        "--stages", "mdscm,avdal", "--validation", "Ses02M", "--out", str(out), *more,
    ]  # fmt: skip


def states(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "avdal.pt", weights_only=True)["system"]
    return found


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_to_the_same_bits(artificial: PreparedCorpus, tmp_path: Path, kill: int) -> None:
    longer = ["--set", "optimisation.epochs=15", "--set", "avdal.epochs=8", "--every", "3"]
    assert main(command(artificial, tmp_path / "whole", *longer)) == 0
    arguments = [sys.executable, "-m", "python_training", *command(artificial, tmp_path / "run", *longer)]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log, at = tmp_path / "run" / "log.jsonl", random.Random(kill).randint(3, 40)
    deadline = time.monotonic() + 60
    while len(read_lines(log)) < at and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(kill)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if kill == signal.SIGKILL else 0), err
    if kill == signal.SIGTERM:
        assert "stopped; --resume goes on from" in err
    assert not (tmp_path / "run" / "avdal.pt").exists(), "it was interrupted"
    assert main(command(artificial, tmp_path / "run", *longer, "--resume")) == 0
    expected, found = states(tmp_path / "whole"), states(tmp_path / "run")
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert without_time(log) == without_time(tmp_path / "whole" / "log.jsonl")


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(
    settings: Settings, artificial: PreparedCorpus, whole: tuple[System, Path, dict[str, Any]]
) -> None:
    _, folder, _ = whole
    with pytest.raises(ValueError, match="expected a folder without checkpoints, got those of another run"):
        run(settings, artificial, folder, ALL)
    other = dataclasses.replace(settings, adversarial=Adversarial(lam=0.5))
    with pytest.raises(ValueError, match=r"to resume with the settings in settings.json, got others \(adversarial\)"):
        run(other, artificial, folder, ALL, resume=True)
    # What was trained on one division must not be validated on another.
    with pytest.raises(ValueError, match=r"to resume with the settings in settings.json, got others \(data\)"):
        run(settings, artificial, folder, ALL, resume=True, validation="Ses01F")


def test_a_full_disk_is_named(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "write_bytes", full)
    with pytest.raises(
        TrainingError, match="checkpoint-mdscm.pt: expected to write a checkpoint, got an error .No space"
    ):
        run(settings, artificial, tmp_path, ["mdscm"])
    assert not list(tmp_path.glob(".*.pt*"))


def test_bad_samples_are_named_or_counted(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = artificial.with_speech[2]
    key = artificial.utterances[bad].key
    original = Samples._clips

    def clips(self: Samples, item: int, rng: np.random.Generator) -> Any:
        if item == bad:
            raise OSError(5, "Input/output error")
        return original(self, item, rng)

    monkeypatch.setattr(Samples, "_clips", clips)
    with pytest.raises(SampleError, match=f"{key}: expected a sample that can be read, got OSError"):
        run(settings, artificial, tmp_path / "a", ["mdscm"])
    run(settings, artificial, tmp_path / "b", ["mdscm"], skip_bad=True)
    counted = [e["skipped"] for e in read_lines(tmp_path / "b" / "epochs.jsonl")]
    assert sum(counted) >= 2 and sum(counted) == round(
        sum(6 * r["bad_share"] for r in read_lines(tmp_path / "b" / "log.jsonl"))
    )
    # A run that is stopped after every step counts the same: the sums are part of the checkpoint.
    stop = Stop()

    def progress(*_: Any) -> None:
        stop.asked = True

    for _ in range(6):
        stop.asked = False
        with contextlib.suppress(Stopped):
            options = {"skip_bad": True, "resume": True, "stop": stop, "progress": progress}
            run(settings, artificial, tmp_path / "c", ["mdscm"], **options)
    assert [e["skipped"] for e in read_lines(tmp_path / "c" / "epochs.jsonl")] == counted


def test_stored_speech_that_is_not_finite_is_named_or_left_out(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By everything that reads it: the front end's measurement, fusion, validation, the probe."""
    parts = division(artificial)
    bad = {parts.training[1], parts.validation[0]}
    original = PreparedCorpus.features

    def features(self: PreparedCorpus, *arguments: Any) -> list[np.ndarray | None]:
        known = original(self, *arguments)
        return [np.full_like(v, np.nan) if i in bad and v is not None else v for i, v in enumerate(known)]

    monkeypatch.setattr(PreparedCorpus, "features", features)
    key = artificial.utterances[parts.training[1]].key
    with pytest.raises(SampleError, match=f"{key}: expected finite values, got NaN or infinity"):
        run(settings, artificial, tmp_path / "a", ["mdscm", "avdal", "fusion"])
    _, fitted = run(settings, artificial, tmp_path / "b", ["mdscm", "avdal", "fusion"], skip_bad=True)
    assert all(0 <= f.history[-1]["validation_ua"] <= 1 for f in fitted.values())
    named = json.loads((tmp_path / "b" / "environment.json").read_text())["left_out"]
    assert len(named) == 2 and key in named[0]


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(AvserError, match="log.jsonl: expected to write the log, got an error"):
        RunLog(tmp_path).step([{"stage": "mdscm", "step": 1}])
    with pytest.raises(ValueError, match="every: expected at least 1 step"):
        Options(every=0)


def test_a_loss_that_is_not_finite_ends_the_run(settings: Settings, artificial: PreparedCorpus, tmp_path: Path) -> None:
    wild = dataclasses.replace(
        settings, optimisation=dataclasses.replace(settings.optimisation, lr=1e30, gradient_clip=0.0)
    )
    with pytest.raises(TrainingError, match=r"stage mdscm, step \d+: expected a finite loss, got (nan|inf)"):
        run(wild, artificial, tmp_path, ["mdscm"])


# Several processes


def test_two_processes_are_one(artificial: PreparedCorpus, tmp_path: Path) -> None:
    """Both halves of every batch in two processes: losses, rates and weights as in one, but for rounding."""
    # Plain gradient descent: AdamW would blow up the rounding of gradients that are 0 (biases before a batch norm).
    sgd = [a for s in ("optimisation", "avdal") for a in ("--set", f"{s}.optimizer=sgd", "--set", f"{s}.lr=0.05")]
    assert main(command(artificial, tmp_path / "one", *sgd)) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "python_training", *command(artificial, tmp_path / "two", *sgd)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_lines(tmp_path / n / "log.jsonl") for n in ("one", "two"))
    assert len(one) == len(two) == 12
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), (a["stage"], a["step"])
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
        assert a["speech_accuracy"] == pytest.approx(b["speech_accuracy"], abs=1e-6)
    first, second = states(tmp_path / "one"), states(tmp_path / "two")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4, msg=name)
    rates = [
        [e["validation_ua"] for e in read_lines(tmp_path / n / "epochs.jsonl") if "validation_ua" in e]
        for n in ("one", "two")
    ]
    assert rates[0] == rates[1]
    assert "processes" in json.loads((tmp_path / "two" / "environment.json").read_text())


# Parts


def test_class_weights_and_emotion_loss() -> None:
    labels = [0] * 6 + [1] * 2
    weights = class_weights(labels, 3, 1.0)
    assert weights[torch.tensor(labels)].mean() == pytest.approx(1.0) and weights[1] == pytest.approx(
        3 * float(weights[0])
    )
    assert torch.equal(class_weights(labels, 3, 0.0), torch.ones(3)) and weights[2] == 1
    logits, targets = torch.randn(8, 3), torch.eye(3)[labels]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), label_smoothing=0.1)
    torch.testing.assert_close(emotion_loss(logits, targets, torch.ones(3), 0.1), expected)
    whole = emotion_loss(logits, targets, weights)
    parts = [emotion_loss(logits[i : i + 4], targets[i : i + 4], weights) for i in (0, 4)]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)


def test_domain_loss_weighs_both_domains_alike() -> None:
    speech, faces = torch.full((6, 1), -2.0), torch.full((3, 1), -2.0)
    expected = 0.5 * (math.log1p(math.exp(-2)) + math.log1p(math.exp(2)))
    assert float(domain_loss(speech, faces)) == pytest.approx(expected)


def test_every_utterance_counts_the_same_in_the_domain_loss() -> None:
    """However many of its clips vote: so the parts of a batch in several processes add up to the whole."""
    speech, faces = torch.randn(4, 5, 1), torch.randn(4, 2, 1)
    valid = torch.arange(5) < torch.tensor([[5], [1], [2], [1]])
    whole = domain_loss(speech, faces, valid)
    parts = [domain_loss(speech[i : i + 2], faces[i : i + 2], valid[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)
    rows = [torch.nn.functional.softplus(s[v]).mean() for s, v in zip(speech, valid)]
    judged = torch.nn.functional.softplus(-faces).mean()
    torch.testing.assert_close(whole, 0.5 * (sum(rows) / 4 + judged))


def test_schedules() -> None:
    assert [reversal_lambda(p, Adversarial("constant", 0.7)) for p in (0.0, 1.0)] == [0.7, 0.7]
    assert [reversal_lambda(p, Adversarial("warm-up", 2.0, 0.5)) for p in (0.0, 0.25, 0.5, 1.0)] == [0, 1, 2, 2]
    dann = [reversal_lambda(p, Adversarial()) for p in (0.0, 0.1, 1.0)]
    assert (
        dann[0] == 0
        and dann[1] == pytest.approx(2 / (1 + math.exp(-1)) - 1)
        and dann[2] == pytest.approx(0.9999, abs=1e-4)
    )
    step = Optimisation(lr=1.0, warmup_epochs=0, schedule="step", step_epochs=2, epochs=6)
    assert [learning_rate(s, 3, step) for s in (0, 5, 6, 11, 12)] == [1, 1, 0.5, 0.5, 0.25]
    cosine = Optimisation(lr=1.0, warmup_epochs=1, epochs=3)
    assert learning_rate(0, 2, cosine) == 0.5 and learning_rate(1, 2, cosine) == 1 == learning_rate(2, 2, cosine)
    assert learning_rate(4, 2, cosine) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="schedule: expected 'constant', 'dann' or 'warm-up', got 'x'"):
        Adversarial("x")
    with pytest.raises(ConfigError, match="amp: expected 'off', 'bf16' or 'fp16', got 'x'"):
        Optimisation(amp="x")


@pytest.mark.parametrize("width", [5, 300])
def test_the_probe_sees_what_is_there_and_nothing_else(width: int) -> None:
    rng = np.random.default_rng(0)
    speech, faces = rng.standard_normal((200, width)), rng.standard_normal((150, width))
    assert 0.35 < linear_probe(speech, faces) < 0.65
    assert linear_probe(speech, faces + 3.0 * (np.arange(width) < width // 5)) > 0.9
    with pytest.raises(ValueError, match="probe: expected at least 4 items of each domain, got 3 and 150"):
        linear_probe(speech[:3], faces)


def test_warnings_say_what_is_wrong() -> None:
    good = {"lambda": 1.0, "domain_accuracy": 0.6, "probe_accuracy": 0.6, "gradient_ratio": 0.5, "speech_accuracy": 0.8}
    assert warnings_of(good, 4) == []
    cases = {
        "discriminator at 99 %: reversal too weak": {"domain_accuracy": 0.99},
        "probe still separates the domains (97 %)": {"probe_accuracy": 0.97},
        "the domain loss pulls the encoder 20 times": {"gradient_ratio": 20.0},
        "the domain loss moves the encoder 1000 times less": {"gradient_ratio": 0.001},
        "speech accuracy 26 % is chance": {"speech_accuracy": 0.26},
    }
    for text, change in cases.items():
        (found,) = warnings_of({**good, **change}, 4)
        assert found.startswith(text)
    assert warnings_of({**good, "lambda": 0.0, "domain_accuracy": 1.0}, 4) == []


def test_the_front_end_is_measured_on_training_utterances_alone(prepared_emodb: PreparedCorpus) -> None:
    recipe = load_settings("mdscm-small")
    chosen = [i for i, u in enumerate(prepared_emodb.utterances) if u.speaker != "03"]
    front_end = measured_front_end(prepared_emodb, chosen, recipe)
    features = prepared_emodb.features(front_end)
    heard = np.concatenate([np.asarray(features[i][:3], np.float64).reshape(3, -1) for i in chosen], axis=1)
    np.testing.assert_allclose(front_end.mean, heard.mean(1), atol=6e-5)
    np.testing.assert_allclose(front_end.std, heard.std(1), atol=6e-5)
    assert front_end != measured_front_end(prepared_emodb, prepared_emodb.with_speech, recipe)


def test_scores_are_those_of_single_utterances(settings: Settings, artificial: PreparedCorpus) -> None:
    system = System(settings).eval()
    front = measured_front_end(artificial, artificial.with_speech, settings)
    chosen = artificial.with_speech[:7]
    for model in ("mdscm", "avdal", "fusion"):
        together = score(system, model, artificial, chosen, front, settings.clip_rule)
        alone = torch.cat([score(system, model, artificial, [i], front, settings.clip_rule) for i in chosen])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stages", [["mdscm", "avdal", "fusion"], ["joint"]])
def test_a_file_answers_as_training_scored(artificial: PreparedCorpus, tmp_path: Path, stages: list[str]) -> None:
    """With more clips than most utterances fill: only those that vote are averaged, and fused."""
    settings = load_settings("avdal-small", {**TINY, "clip_rule.clips": 9})
    speech = artificial.with_speech
    parts = division(artificial)
    system, spec, _ = train_stages(settings, artificial, parts, stages, tmp_path, faces=artificial)
    assert len(write_models(tmp_path, system, spec, stages, {})) == 3
    for model, name in (("mdscm", "mdscm"), ("avdal", "avdal"), ("fusion", "system")):
        scored = score(system, model, artificial, speech, spec.front_end, spec.clip_rule).softmax(1)
        for backend in ("engine", "reference"):
            recognizer = avser_fast.load(tmp_path / f"{name}.safetensors", backend=backend)
            found = recognizer.infer([artificial.item(i) for i in speech])
            answered = torch.tensor([[result.scores[label] for label in artificial.labels] for result in found])
            torch.testing.assert_close(answered, scored, rtol=1e-5, atol=1e-6, msg=f"{model}, {backend}")


def test_what_cannot_be_trained_is_named(settings: Settings, artificial: PreparedCorpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stages: expected some of mdscm, avdal, fusion, joint, got x"):
        run(settings, artificial, tmp_path / "a", ["x"])
    with pytest.raises(ValueError, match="stage avdal: expected a corpus with faces, got none"):
        train_stages(settings, artificial, Division(artificial.with_speech), ["avdal"], tmp_path / "b")
    alone = dataclasses.replace(settings, encoder=None)
    with pytest.raises(ValueError, match=r"stage avdal: expected a recipe with an \[encoder\]"):
        run(alone, artificial, tmp_path / "c", ["mdscm", "avdal"])
    with pytest.raises(ValueError, match="stages: expected each once, in the order mdscm, .*, got avdal, mdscm"):
        run(settings, artificial, tmp_path / "d", ["avdal", "mdscm"])
    with pytest.raises(ValueError, match="stages: expected each once, in the order mdscm, .*, got mdscm, mdscm"):
        run(settings, artificial, tmp_path / "d", ["mdscm", "mdscm"])
    with pytest.raises(ValueError, match="stages: expected mdscm and avdal before fusion, .*, got avdal, fusion"):
        run(settings, artificial, tmp_path / "d", ["avdal", "fusion"])
    with pytest.raises(ValueError, match="expected utterances with speech to train on, got none"):
        train_stages(settings, artificial, Division(()), ["mdscm"], tmp_path / "e")
    for change, wanted in (
        ({"epochs": 2.5}, "epochs: expected a whole number of at least 1, got 2.5"),
        ({"epochs": True}, "epochs: expected a whole number of at least 1, got True"),
        ({"lr": "high"}, "lr: expected a number of at least 0, got 'high'"),
        ({"pick_last": 2.0}, "pick_last: expected a number from 0 to 1, got 2.0"),
    ):
        with pytest.raises(ConfigError, match=wanted):
            Optimisation(**change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected epochs of avdal.epochs.x to be a section, got the value 30"):
        load_settings("avdal-small", {"avdal.epochs.x": 1})


def test_what_a_later_stage_lacks_is_said_before_the_first_is_trained(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="stage avdal: expected a corpus with faces, got none"):
        train_stages(settings, artificial, Division(artificial.with_speech), ["mdscm", "avdal"], tmp_path / "a")
    three = load_settings("avdal-small", {**TINY, "encoder.classes": 3, "encoder.mdscm.classes": 3})
    with pytest.raises(ConfigError, match="encoder.classes: expected 4, got 3"):
        run(three, artificial, tmp_path / "b", ["mdscm", "avdal"])
    assert not list(tmp_path.rglob("log.jsonl")) and not list(tmp_path.rglob("settings.json"))


def test_faces_of_held_speakers_are_hidden_in_every_folder(
    artificial: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(artificial.folder, tmp_path / "again")
    again, parts = PreparedCorpus(tmp_path / "again"), division(artificial)
    for faces in (artificial, again):
        shown = shown_faces(faces, artificial, parts.validation, parts.training)
        assert shown and not {faces.utterances[i].speaker for i in shown} & {"Ses02M"}
        # A speaker who also trains is heard already; the held utterances themselves are not shown.
        assert shown_faces(faces, artificial, [0], range(1, 20)) == [i for i in faces.with_face if i != 0]
    assert shown_faces(None, artificial, []) == []
    # The same files under other keys, with other speakers; and the same keys and speakers with other files.
    renamed, apart, strangers = (PreparedCorpus(tmp_path / "again") for _ in range(3))
    others = [dataclasses.replace(u, key=f"x{u.key}", speaker=f"x{u.speaker}") for u in artificial.utterances]
    renamed.utterances = strangers.utterances = others
    held = set(parts.validation)
    assert shown_faces(renamed, artificial, parts.validation) == [i for i in renamed.with_face if i not in held]
    for faces in (apart, strangers):
        faces.name = "another"
        monkeypatch.setattr(faces, "parts", lambda i: (f"another {i}",))
    assert shown_faces(apart, artificial, parts.validation) == [i for i in apart.with_face if i not in held]
    # Other people hide nothing, whatever they are called.
    strangers.utterances = [dataclasses.replace(u, key=u.key[1:]) for u in others]
    assert shown_faces(strangers, artificial, parts.validation) == list(strangers.with_face)


def test_a_card_names_the_speakers_of_a_refit(
    artificial: PreparedCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--stages", "mdscm", "--set", "optimisation.epochs=2"]
    everybody = ["Ses01F", "Ses01M", "Ses02F", "Ses02M"]
    for refit, taught in (("true", everybody), ("false", everybody[:3])):
        out = tmp_path / refit
        assert main([*command(artificial, out, *small, "--set", f"optimisation.refit={refit}")]) == 0
        model = out / "mdscm.safetensors"
        protocol = avser_fast.load(model).info()["protocol"]
        assert protocol["training_speakers"] == taught and protocol["validation_speakers"] == ["Ses02M"]
        assert sorted(p.name for p in out.glob("*.pt")) == ["mdscm.pt"]
        capsys.readouterr()
        assert main(["evaluate", "--dataset", str(artificial.folder), "--model", str(model), "--quiet"]) == 0
        picked = "the model was picked by its score on the speakers Ses02M" in capsys.readouterr().out
        assert picked == (refit == "false")


def test_command_line_errors(artificial: PreparedCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(artificial, tmp_path / "x"), "--validation", "nobody"]) == 1
    assert (
        "--validation: expected speakers out of Ses01F, Ses01M, Ses02F, Ses02M, got nobody" in capsys.readouterr().err
    )
    assert main([*command(artificial, tmp_path / "x"), "--dataset", str(tmp_path / "nothing")]) == 1
    assert "expected a folder written by `avser-fast prepare`" in capsys.readouterr().err
