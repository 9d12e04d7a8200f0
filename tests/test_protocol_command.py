"""Folds of a protocol: who trains, who is tested, what is written, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
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
from avser_fast.ops import backends
from python_training import data, protocol_command
from python_training.__main__ import main
from python_training.data import PreparedCorpus, prepare, read_corpus
from python_training.data.boxes import Boxes, with_boxes
from python_training.data.corpus import LABELS
from python_training.data.manifest import entry_of
from python_training.data.synthetic import write_iemocap
from python_training.evaluation import read_folds
from python_training.protocol_command import evaluate_protocol
from python_training.settings import Settings, load_settings
from python_training.tables import show

pytestmark = pytest.mark.skipif(backends.INTERPRETED, reason="minutes in the interpreter")
ROOT = Path(__file__).resolve().parents[1]
SET = [a for key, value in TINY.items() for a in ("--set", f"{key}={json.dumps(value)}")]
STAGES = ["mdscm", "avdal", "fusion"]


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings("avdal-small", TINY)


def evaluate(settings: Settings, corpus: PreparedCorpus, out: Path, **options: Any) -> dict[str, Any]:
    keywords: dict[str, Any] = {
        "protocol": "leave-one-session-out", "seeds": [0], "stages": STAGES, "faces": corpus, "say": lambda text: None,
    }  # fmt: skip
    return evaluate_protocol(settings, corpus, out, **{**keywords, **options})


@pytest.fixture(scope="module")
def evaluated(
    settings: Settings, artificial: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("evaluated")
    return out, evaluate(settings, artificial, out, seeds=[0, 1])


def test_every_fold_is_tested_on_speakers_it_never_heard(
    evaluated: tuple[Path, dict[str, Any]], artificial: PreparedCorpus
) -> None:
    out, summary = evaluated
    folds = read_folds(out / "evaluation")
    assert [(f["name"], f["seed"]) for f in folds] == [
        (f"session-{s}", seed) for seed in (0, 1) for s in ("Ses01", "Ses02")
    ]
    tested: list[str] = []
    for fold in folds:
        assert not fold["shares_speakers"] and set(fold["models"]) == set(STAGES)
        assert {k[:5] for k in fold["keys"]} == {fold["name"].removeprefix("session-")}
        assert fold["validation_of"].removeprefix("speaker ") not in fold["speakers"]
        for rows in fold["models"].values():
            np.testing.assert_allclose(np.sum(rows, 1), 1, atol=1e-5)
        tested += fold["keys"]
    assert sorted(tested) == sorted(2 * [u.key for u in artificial.utterances])
    assert set(summary["models"]) == set(STAGES) and summary["leakage"] == "" and summary["missing"] == []
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    text = show(summary, "title", artificial.name)
    assert "AVDAL less MDSCM" in text and "| fusion |" in text and "published" not in text
    assert "not of people" not in text
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "leave-one-session-out" in page and "NOT speaker-independent" not in page
    assert not list(out.rglob("*.pt"))


def test_finished_folds_are_not_run_again(
    evaluated: tuple[Path, dict[str, Any]],
    settings: Settings,
    artificial: PreparedCorpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, summary = evaluated

    def never(*arguments: Any) -> None:
        raise AssertionError("a finished fold was run")

    monkeypatch.setattr(protocol_command, "run_fold", never)
    assert evaluate(settings, artificial, out, seeds=[0, 1]) == summary
    with pytest.raises(ValueError, match="expected folds of the settings in settings.json, got others"):
        evaluate(settings, artificial, out, stages=["mdscm"])


def test_faces_of_tested_and_validation_speakers_are_never_shown(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, set[int]] = {}
    original = PreparedCorpus.face
    now = ["before"]

    def face(self: PreparedCorpus, i: int) -> np.ndarray:
        shown.setdefault(now[0], set()).add(i)
        return original(self, i)

    monkeypatch.setattr(PreparedCorpus, "face", face)
    real = protocol_command.train_stages

    def train_stages(settings: Settings, speech: PreparedCorpus, division: Any, *rest: Any, **more: Any) -> Any:
        now[0] = str(rest[1])
        hidden[now[0]] = set(range(len(speech))) - set(division.training)
        return real(settings, speech, division, *rest, **more)

    hidden: dict[str, set[int]] = {}
    monkeypatch.setattr(protocol_command, "train_stages", train_stages)
    evaluate(settings, artificial, tmp_path, stages=["avdal"])
    assert len(hidden) == 2
    for fold, kept in hidden.items():
        assert shown[fold] and not shown[fold] & kept


def test_a_protocol_that_shares_speakers_says_so_everywhere(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path
) -> None:
    summary = evaluate(settings, artificial, tmp_path, protocol="random-80-20", stages=["mdscm"])
    assert summary["leakage"].startswith("NOT speaker-independent: ")
    assert "NOT speaker-independent" in show(summary, "t", artificial.name)
    assert "NOT speaker-independent" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_another_corpus_is_tested_with_its_labels_mapped(
    settings: Settings, artificial: PreparedCorpus, prepared_emodb: PreparedCorpus, tmp_path: Path
) -> None:
    said: list[str] = []
    summary = evaluate(
        settings,
        artificial,
        tmp_path,
        protocol="cross-corpus",
        target=prepared_emodb,
        stages=["mdscm"],
        say=said.append,
    )
    (fold,) = read_folds(tmp_path / "evaluation")
    assert fold["protocol"] == "cross-corpus" and fold["keys"] == [u.key for u in prepared_emodb.utterances]
    assert fold["truth"] == [u.label for u in prepared_emodb.utterances]
    assert said == [f"label {x} of the target counts as {x}" for x in LABELS] and not summary["leakage"]
    assert fold["name"] == f"cross-{artificial.name}-to-{prepared_emodb.name}" and summary["notes"] == said
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"corpus <b>{artificial.name}, tested on {prepared_emodb.name}</b>" in page
    for text in (show(summary, "title", "corpora"), page):
        assert all(line in text for line in said)


@pytest.fixture(scope="module")
def partly_silent(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """An artificial corpus whose first turns have faces and no speech."""
    folder = tmp_path_factory.mktemp("silent")
    tree = write_iemocap(folder / "tree", sessions=2, dialogs=2, turns=8)
    corpus = with_boxes(read_corpus("iemocap", tree.root), Boxes(tree.boxes), detect=False)
    muted = tuple(dataclasses.replace(u, path=None) if u.key.endswith("F000") else u for u in corpus.utterances)
    prepare(dataclasses.replace(corpus, utterances=muted), folder / "out")
    return PreparedCorpus(folder / "out")


def test_utterances_without_speech_are_not_tested(
    settings: Settings, artificial: PreparedCorpus, partly_silent: PreparedCorpus, tmp_path: Path
) -> None:
    spoken = [partly_silent.utterances[i] for i in partly_silent.with_speech]
    assert 0 < len(spoken) < len(partly_silent)
    evaluate(settings, partly_silent, tmp_path / "own", faces=partly_silent, stages=["mdscm"])
    folds = read_folds(tmp_path / "own/evaluation")
    assert sorted(k for f in folds for k in f["keys"]) == [u.key for u in spoken]
    # Of another corpus too, each beside its own answer: those of the whole corpus for the same utterances.
    for name, target in (("part", partly_silent), ("whole", artificial)):
        cross = {"protocol": "cross-corpus", "target": target, "stages": ["mdscm"]}
        with pytest.raises(
            ValueError, match="cross-corpus: expected recordings that are not in .* that are trained on"
        ):
            evaluate(settings, artificial, tmp_path / name, **cross)
        summary = evaluate(settings, artificial, tmp_path / name, allow_leakage=True, **cross)
        assert summary["leakage"].startswith("NOT speaker-independent: recordings of ")
    (part,), (whole,) = (read_folds(tmp_path / name / "evaluation") for name in ("part", "whole"))
    assert part["keys"] == [u.key for u in spoken] and part["truth"] == [u.label for u in spoken]
    answers = dict(zip(whole["keys"], whole["models"]["mdscm"]))
    assert part["models"]["mdscm"] == [answers[key] for key in part["keys"]]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two artificial trees of the same speakers, dialogs and turns in which no recording is the same."""
    folder = tmp_path_factory.mktemp("trees")
    for name, seed in (("a", 0), ("b", 1)):
        write_iemocap(folder / name, sessions=2, dialogs=2, turns=8, seed=seed)
    return folder


def manifest(trees: Path, tree: str, out: Path, name: str = "", speaker: str = "", mute: str = "") -> PreparedCorpus:
    """A tree as a manifest that `avser-fast prepare` read; its keys are the same in every tree."""
    corpus = read_corpus("iemocap", trees / tree)
    corpus = with_boxes(corpus, Boxes.read(trees / tree / "boxes.json"), detect=False)
    lines = []
    for n, u in enumerate(corpus.utterances[:16]):
        line = entry_of(u, corpus.labels)
        line |= {"key": f"u{n:03d}", "emo": LABELS[n // 4 % 4], "speaker": f"{speaker}{n % 4}"}
        if line["speaker"] == mute:
            del line["wav"]
        lines.append(json.dumps(line))
    out.mkdir(exist_ok=True)
    (out / f"{tree}.jsonl").write_text("\n".join(lines))
    named = ["--name", name] if name else []
    assert main(["prepare", "manifest", str(out / f"{tree}.jsonl"), str(out / "p"), "--quiet", *named]) == 0
    return PreparedCorpus(out / "p")


@pytest.fixture
def divisions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each fold was trained on, one after the other."""
    found: list[Any] = []
    real = protocol_command.train_stages

    def train_stages(settings: Settings, speech: PreparedCorpus, division: Any, *rest: Any, **more: Any) -> Any:
        found.append(division)
        return real(settings, speech, division, *rest, **more)

    monkeypatch.setattr(protocol_command, "train_stages", train_stages)
    return found


CROSS: dict[str, Any] = {"protocol": "cross-corpus", "stages": ["avdal"]}


def test_names_in_unrelated_corpora_are_no_leakage_and_hide_no_face(
    settings: Settings, trees: Path, tmp_path: Path, divisions: list[Any]
) -> None:
    """Equal keys and speakers, in corpora of other names and other recordings."""
    a, b = manifest(trees, "a", tmp_path / "a"), manifest(trees, "b", tmp_path / "b")
    assert (a.name, b.name) == ("a", "b") and a.speakers == b.speakers
    assert [u.key for u in a.utterances] == [u.key for u in b.utterances]
    said: list[str] = []
    summary = evaluate(settings, a, tmp_path / "out", faces=a, target=b, say=said.append, **CROSS)
    assert summary["leakage"] == "" and summary["folds"] == ["cross-a-to-b"]
    assert sorted(divisions[0].faces) == sorted(divisions[0].training) and len(divisions[0].faces) == 12
    assert not any("faces" in line for line in said)
    # Faces of the corpus under test are hidden, all of them, and counted.
    with pytest.raises(ValueError, match="stage avdal: expected a corpus with faces, got none"):
        evaluate(settings, a, tmp_path / "own", faces=b, target=b, say=said.append, **CROSS)
    assert said[-1] == "16 of 16 faces of b are of b or its speakers and are not shown"


def test_speakers_of_corpora_of_one_name_are_the_same_people(settings: Settings, trees: Path, tmp_path: Path) -> None:
    a, b = manifest(trees, "a", tmp_path / "a", name="x"), manifest(trees, "b", tmp_path / "b", name="x")
    assert a.name == b.name == "x"
    with pytest.raises(ValueError) as error:
        evaluate(settings, a, tmp_path / "out", target=b, **{**CROSS, "stages": ["mdscm"]})
    assert str(error.value) == (
        f"cross-corpus: expected test speakers that are not in {a.folder}, also called x, got 0, 1, 2, 3 in both; a "
        "corpus of other people needs another --name"
    )
    summary = evaluate(settings, a, tmp_path / "out", target=b, allow_leakage=True, **{**CROSS, "stages": ["mdscm"]})
    assert summary["leakage"] == (
        "NOT speaker-independent: 4 of 4 test speakers are also in training (protocol cross-corpus)"
    )


def test_the_same_recordings_elsewhere_under_other_names_are_refused(
    settings: Settings, trees: Path, tmp_path: Path
) -> None:
    shutil.copytree(trees / "a", tmp_path / "trees/copy")
    a = manifest(trees, "a", tmp_path / "a", speaker="A")
    copy = manifest(tmp_path / "trees", "copy", tmp_path / "c", speaker="C")
    mdscm = {**CROSS, "stages": ["mdscm"], "target": copy}
    with pytest.raises(ValueError) as error:
        evaluate(settings, a, tmp_path / "out", **mdscm)
    assert str(error.value) == (
        f"cross-corpus: expected recordings that are not in {a.folder}, got 16 of 16 that are trained on; the first "
        "is u000, there u000"
    )
    summary = evaluate(settings, a, tmp_path / "out", allow_leakage=True, **mdscm)
    assert summary["leakage"] == (
        "NOT speaker-independent: recordings of 16 of 16 tested utterances are also in training (protocol cross-corpus)"
    )


def test_another_corpus_is_not_learnt_from_without_speech(
    settings: Settings, trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last speaker has faces alone: the one before him picks the epoch."""
    a, b = manifest(trees, "a", tmp_path / "a", mute="3"), manifest(trees, "b", tmp_path / "b")
    assert len(a) == 16 and len(a.with_speech) == 12
    evaluate(settings, a, tmp_path / "out", faces=a, target=b, **{**CROSS, "stages": ["mdscm"]})
    (fold,) = read_folds(tmp_path / "out/evaluation")
    assert fold["validation_of"] == "speaker 2 of a" and len(fold["keys"]) == 16
    command = ["train", "--dataset", str(a.folder), "--quiet", "--validation", "3", "--out", str(tmp_path / "run")]
    assert main(command) == 1
    assert "--validation: expected speakers out of 0, 1, 2, got 3, who has no speech" in capsys.readouterr().err


def test_faces_of_tested_speakers_are_hidden_where_they_are_prepared_again(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path, divisions: list[Any]
) -> None:
    shutil.copytree(artificial.folder, tmp_path / "again")
    faces = PreparedCorpus(tmp_path / "again")
    evaluate(settings, artificial, tmp_path / "out", stages=["avdal"], faces=faces)
    assert len(divisions) == 2
    for division in divisions:
        assert sorted(division.faces) == sorted(division.training)


def test_a_fold_that_fails_is_named_and_the_others_go_on(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path
) -> None:
    (tmp_path / "session-Ses01-seed0").mkdir()
    (tmp_path / "session-Ses01-seed0/settings.json").write_text("{}")
    said: list[str] = []
    with pytest.raises(ValueError, match="1 of 2 folds failed; session-Ses01, seed 0: .* expected to resume"):
        evaluate(settings, artificial, tmp_path, stages=["mdscm"], jobs=2, say=said.append)
    assert [f["name"] for f in read_folds(tmp_path / "evaluation")] == ["session-Ses02"] and len(said) == 2
    wild = dataclasses.replace(
        settings, optimisation=dataclasses.replace(settings.optimisation, lr=1e30, gradient_clip=0.0)
    )
    with pytest.raises(ValueError, match="session-Ses01, seed 0: stage mdscm, step .: expected a finite loss"):
        evaluate(wild, artificial, tmp_path / "wild", stages=["mdscm"])


def _hears_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_jobs(artificial: PreparedCorpus, tmp_path: Path, sent: int) -> None:
    command = [sys.executable, "-m", "python_training", "evaluate", "--dataset", str(artificial.folder), *SET]
    command += ["--config", "avdal-small", "--set", "optimisation.epochs=100000", "--stages", "mdscm", "--quiet"]
    command += ["--protocol", "leave-one-speaker-out", "--jobs", "2", "--out", str(tmp_path)]
    # A shell's background job ignores SIGINT, and so would whatever it starts.
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=_hears_sigint,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while len(list(tmp_path.glob("*/epochs.jsonl"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(sent)
        _, err = process.communicate(timeout=90)  # the workers hold standard error open: it ends with the last of them
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left where the test passes
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + sent, err
    assert ("goes on from what is finished" in err) == (sent == signal.SIGINT)


def test_folds_run_where_they_are_told_to(
    settings: Settings, artificial: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda': expected a GPU that torch can use, found none"):
        evaluate(settings, artificial, tmp_path, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(protocol_command, "environment", lambda *arguments: {})
    monkeypatch.setattr(protocol_command, "_side_by_side", lambda waiting, *rest: tasks.extend(waiting))
    with pytest.raises(ValueError, match="expected at least one fold"):
        evaluate(settings, artificial, tmp_path, protocol="leave-one-speaker-out", jobs=2)
    assert [task.device for task in tasks] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected to be started without torchrun, got several processes"):
        evaluate(settings, artificial, tmp_path)


def test_command_with_two_jobs(artificial: PreparedCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--dataset", str(artificial.folder), "--config", "avdal-small", *SET, "--quiet",
               "--protocol", "leave-one-session-out", "--stages", "mdscm", "--threads", "1",
               "--seeds", "0,0"]  # fmt: skip
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    alone = capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "two"), "--jobs", "2"]) == 0
    together = capsys.readouterr().out
    assert "(2 of 2)" in together and "| MDSCM |" in alone
    for fold in ("session-Ses01-seed0.json", "session-Ses02-seed0.json"):
        assert (tmp_path / "one/evaluation" / fold).read_text() == (tmp_path / "two/evaluation" / fold).read_text()


def test_reproduce_on_an_artificial_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_iemocap(tmp_path / "tree", sessions=2, dialogs=2, turns=8)
    command = ["reproduce", "iemocap", "--root", str(tree.root), "--out", str(tmp_path / "out"), "--quiet",
               "--boxes", str(tree.root / "boxes.json"), "--config", "avdal-small", *SET,
               "--protocols", "random-80-20,leave-one-session-out"]  # fmt: skip
    assert main([a for a in command if a not in ("--boxes", str(tree.root / "boxes.json"))]) == 1
    assert "expected faces for the stages mdscm, avdal, fusion, got none; prepare it with --boxes" in (
        capsys.readouterr().err
    )
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "counts that are not the release's" in printed
    assert printed.count("on iemocap (not the whole release)") == 2 and "NOT speaker-independent" in printed
    assert "73.22" not in printed, "figures of the release beside those of another tree"


def test_reproduce_of_a_release_with_unreadable_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its totals are right, and yet it is not the whole release; the detector is named by its file's content."""
    tree = write_iemocap(tmp_path / "tree", sessions=2, dialogs=2, turns=8, video=False)
    whole = dataclasses.replace(read_corpus("iemocap", tree.root), faults=())
    recording = whole.utterances[0].path
    assert recording is not None
    recording.write_bytes(b"RIFF")
    detectors: list[Any] = []

    def prepared(corpus: Any, folder: Path, detector: Any, progress: Any) -> Any:
        detectors.append(detector)
        return prepare(whole, folder)

    monkeypatch.setattr(data, "prepare", prepared)
    monkeypatch.setattr(sys.modules["python_training.data.command"], "parse_detector", lambda text: lambda picture: [])
    model = tmp_path / "model.onnx"
    model.write_text("a")
    command = ["reproduce", "iemocap", "--root", str(tree.root), "--out", str(tmp_path / "out"), "--quiet", *SET,
               "--config", "avdal-small", "--stages", "mdscm", "--protocols", "random-80-20",
               "--detector", f"yunet:{model}"]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "recording that cannot be used" in printed and "on iemocap (not the whole release)" in printed
    assert "73.22" not in printed
    assert detectors[0][0] == f"yunet:{hashlib.sha256(b'a').hexdigest()[:16]}"


def test_from_training_to_infer(artificial: PreparedCorpus, tmp_path: Path) -> None:
    """What the README's walk does after preparing: train all stages, then classify a recording with each file."""
    command = [sys.executable, "-m", "python_training", "train", "--dataset", str(artificial.folder), *SET]
    out = tmp_path / "run"
    done = subprocess.run(
        [*command, "--config", "avdal-small", "--validation", "Ses02M", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr, "no progress bar where nobody watches"
    item = artificial.item(0)
    for name in ("mdscm", "avdal", "system"):
        (result,) = avser_fast.load(out / f"{name}.safetensors").infer([item])
        assert result.label in artificial.labels and result.backend == "engine"
    assert (out / "report.html").is_file()
