"""The trainer: data, seeds, resume, protocol, report, command line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_corpus import SPEAKERS, two_per_class

import avser_fast
from avser_fast import nn
from avser_fast.errors import ConfigError
from python_training import protocol_command, saved_model
from python_training.__main__ import main
from python_training.data import PreparedCorpus
from python_training.data.augment import Augmentation
from python_training.data.batches import Batch
from python_training.losses import learning_rate
from python_training.metrics import confusion_matrix, unweighted_accuracy, weighted_accuracy
from python_training.protocol_command import Task, run_fold
from python_training.protocols import SPEAKER, Split
from python_training.run import Division, Options, train_stages
from python_training.run_folder import read_lines
from python_training.settings import CONFIGS, Settings, load_settings
from python_training.stages import MDSCMModule
from python_training.system import System, halves

TINY = {
    "network.stem": (2, 4),
    "network.blocks": (6, 8),
    "network.attention_reduction": 2,
    "network.encoder_layers": 0,
    "network.block_dropout": 0.0,
    "network.statistics": 12,
    "network.statistics_hidden": 8,
    "optimisation.epochs": 3,
    "optimisation.batch_size": 8,
    "optimisation.warmup_epochs": 1,
    "optimisation.refit": False,
}


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings("mdscm-small", TINY)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert load_settings(path.stem).name == path.stem
    assert load_settings(path).network.mel_bands == load_settings(path).front_end.mel_bands


def test_wrong_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing: expected a TOML file or one of .*mdscm-small"):
        load_settings("nothing")
    (tmp_path / "a.toml").write_text("[network\n")
    with pytest.raises(ConfigError, match="a.toml: expected TOML"):
        load_settings(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text("[speed]\nx = 1\n")
    with pytest.raises(ConfigError, match=r"b.toml: expected the sections .* got \[speed\]"):
        load_settings(tmp_path / "b.toml")
    with pytest.raises(ConfigError, match=r"\[network\]: .*widht"):
        load_settings("mdscm-small", {"network.widht": 3})
    with pytest.raises(ConfigError, match="optimizer: expected 'adamw' or 'sgd', got 'lion'"):
        load_settings("mdscm-small", {"optimisation.optimizer": "lion"})


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("optimisation.refit", "False", "optimisation.refit: expected true or false, got 'False'"),
        ("batches.crops", "no", "batches.crops: expected true or false, got 'no'"),
        ("batches.workers", "two", "batches.workers: expected a whole number, got 'two'"),
        ("optimisation.epochs", True, "optimisation.epochs: expected a whole number, got True"),
        ("network.stem", 4, "network.stem: expected a list of whole numbers, got 4"),
        ("network.stem", ["a"], r"network.stem: expected a list of whole numbers, got \['a'\]"),
        ("encoder.domain_hidden", 8, "encoder.domain_hidden: expected a list of whole numbers, got 8"),
        ("adversarial.lam", float("nan"), "adversarial.lam: expected a number, got nan"),
        ("optimisation", 3, "expected optimisation to be a section, got the value 3"),
        ("clip_rule.clips", False, "clip_rule.clips: expected a whole number, got False"),
        ("augmentation.nonsense", 1, r"\[augmentation\]: expected some of .*mixup.*, got nonsense"),
    ],
)
def test_a_value_of_another_type_is_named(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_settings("avdal-small", {key: value})


def test_learning_rate(settings: Settings) -> None:
    rates = [learning_rate(s, 10, settings.optimisation) for s in range(30)]
    assert rates[9] == pytest.approx(settings.optimisation.lr) and max(rates) <= settings.optimisation.lr
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.02 * settings.optimisation.lr


def test_metrics() -> None:
    matrix = confusion_matrix([0, 0, 0, 1, 3], [0, 0, 1, 1, 0], 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert weighted_accuracy(matrix) == pytest.approx(3 / 5)
    assert unweighted_accuracy(matrix) == pytest.approx((2 / 3 + 1 + 0) / 3), "class 2 is not in the truth"
    with pytest.raises(ValueError, match=r"expected as many predictions as truths \(2\), got 1"):
        confusion_matrix([0, 1], [0], 2)


def test_training_learns(settings: Settings, prepared_emodb: PreparedCorpus, tmp_path: Path) -> None:
    """Without augmentation even a tiny network learns its few utterances."""
    recipe = dataclasses.replace(settings.optimisation, epochs=25, lr=1e-2, label_smoothing=0.0)
    longer = dataclasses.replace(settings, optimisation=recipe, augmentation=Augmentation())
    division = Division(two_per_class(prepared_emodb))
    _, _, fitted = train_stages(longer, prepared_emodb, division, ["mdscm"], tmp_path)
    assert fitted["mdscm"].epoch == 25
    assert fitted["mdscm"].history[-1]["loss"] < 0.75 * math.log(4), "three quarters of the loss of guessing"


def test_a_schedule_that_is_ended_early_is_the_same_until_then(
    settings: Settings, prepared_emodb: PreparedCorpus, tmp_path: Path
) -> None:
    division, logs = Division(two_per_class(prepared_emodb)), []
    for name, epochs in (("whole", None), ("early", 2)):
        folder = tmp_path / name
        _, _, fitted = train_stages(settings, prepared_emodb, division, ["mdscm"], folder, epochs=epochs)
        assert fitted["mdscm"].epoch == (epochs or 3)
        logs.append([(r["loss"], r["lr"]) for r in read_lines(folder / "log.jsonl")])
    assert logs[1] == logs[0][: len(logs[1])] and len(logs[1]) == 8
    with pytest.raises(ValueError, match=r"got others \(epochs\)"):
        train_stages(
            settings, prepared_emodb, division, ["mdscm"], tmp_path / "early", epochs=3, options=Options(resume=True)
        )


def batch_of(clips: torch.Tensor, clean: torch.Tensor) -> Batch:
    """One clip a row, of the classes 0, 1, 2, 3, 0, ..."""
    labels = torch.arange(len(clips)) % 4
    valid = torch.ones(len(clips), 1, dtype=torch.bool)
    return Batch(clips, valid, labels, torch.eye(4)[labels], torch.zeros(len(clips), dtype=torch.bool), clean)


def test_the_two_paths_learn_apart(settings: Settings, prepared_emodb: PreparedCorpus, tmp_path: Path) -> None:
    """What the convolutions are shown changes what they learn, not what the statistics path learns."""
    torch.manual_seed(0)
    network = dataclasses.replace(settings.network, statistics_dropout=0.0)
    system = System(dataclasses.replace(settings, network=network))
    module = MDSCMModule(system, torch.ones(4), 0.05)
    clean = torch.randn(8, 1, network.planes, network.clip_frames, 40)
    gradients = []
    for clips in (clean, clean + torch.randn_like(clean)):
        module.zero_grad()
        loss, _ = module(batch_of(clips, clean), {})
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in system.mdscm.named_parameters() if p.grad is not None})
    a, b = gradients
    path = [n for n in a if n.startswith("statistics.")]
    assert len(path) == 4 and all(torch.equal(a[n], b[n]) for n in path)
    assert not torch.equal(a["body.conv_stem.convs.0.weight"], b["body.conv_stem.convs.0.weight"])
    trained, _, _ = train_stages(settings, prepared_emodb, Division(two_per_class(prepared_emodb)), ["mdscm"], tmp_path)
    fixed, state = nn.MDSCM(network).state_dict(), trained.mdscm.state_dict()
    for name in ("statistics.gate.weight", "statistics.gate.bias", "statistics.bands.weight"):
        assert torch.equal(state[name], fixed[name]), "map and gate are not trained"


def test_the_logits_are_the_mean_of_both_paths(settings: Settings) -> None:
    system = System(settings).eval()
    model = system.mdscm
    clips = torch.randn(4, 1, settings.network.planes, settings.network.clip_frames, 40)
    loss, _ = MDSCMModule(system, torch.ones(4), 0.05).eval()(batch_of(clips, clips), {})
    out = model(clips)
    alone = []
    for name, state in halves(model.state_dict(), settings.network).items():
        part = nn.MDSCM(settings.network).eval()
        part.load_state_dict(state)
        alone.append(part(clips).clip_logits[:, 0])
        missing = "statistics.hidden.weight" if name == "convolutions" else "body.conv_stem.convs.0.weight"
        dict(part.named_parameters())[missing].data.zero_()
        assert torch.equal(part(clips).clip_logits[:, 0], alone[-1]), f"{name} does not use the other path"
    assert torch.allclose((alone[0] + alone[1]) / 2, out.clip_logits[:, 0], atol=1e-5)
    both = [torch.nn.functional.cross_entropy(h, torch.arange(4), label_smoothing=0.05) for h in alone]
    assert torch.allclose(loss, (both[0] + both[1]) / 2, atol=1e-5)


def test_front_end_recipes_reach_the_front_end(settings: Settings) -> None:
    front_end = settings.front_end.front_end()
    assert (front_end.frame_length, front_end.n_fft) == (settings.front_end.frame_length, settings.front_end.n_fft)
    assert front_end.mean == (0.0,) * 3 and front_end.std == (1.0,) * 3
    plain = load_settings("mdscm-published").front_end.front_end()
    assert (plain.frame_length, plain.n_fft, plain.mean) == (400, 512, ())


def fold_task(settings: Settings, corpus: PreparedCorpus, out: Path) -> Task:
    """Speaker 03 is tested, 08 picks the epoch, 10 and 12 train."""
    test, held, *rest = SPEAKERS
    parts = [tuple(two_per_class(corpus, some)) for some in (rest, [held], [test])]
    split = Split(SPEAKER, f"speaker{test}", 0, *parts, f"speaker {test}", f"speaker {held}", False)
    return Task(settings, corpus.folder, None, None, None, split, ("mdscm",), out, Options(), "cpu")


def test_the_test_speaker_cannot_influence_a_fold(
    settings: Settings, prepared_emodb: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training data, normalisation and the picked epoch stay the same whatever the test speaker's labels are."""

    class Swapped(PreparedCorpus):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self.utterances = tuple(
                dataclasses.replace(u, label=3 - u.label) if u.speaker == "03" else u for u in self.utterances
            )

    a = run_fold(fold_task(settings, prepared_emodb, tmp_path / "a"))
    monkeypatch.setattr(protocol_command, "PreparedCorpus", Swapped)
    b = run_fold(fold_task(settings, prepared_emodb, tmp_path / "b"))
    assert a["truth"] == [3 - label for label in b["truth"]]
    assert a["models"].keys() == {"mdscm", "convolutions", "statistics"}
    assert all(a[name] == b[name] for name in ("models", "precisions", "epochs", "validation_ua"))
    histories = [read_lines(tmp_path / name / "speaker03-seed0" / "epochs.jsonl") for name in ("a", "b")]
    assert histories[0] == histories[1] and len(histories[0]) == 3


def test_folds_are_scored_in_every_precision(
    settings: Settings, prepared_emodb: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 with ranges of the utterances that trained the network, those under test are not among them."""
    heard: list[list[int]] = []
    original = protocol_command.heard_clips

    def heard_clips(corpus: PreparedCorpus, items: list[int], spec: Any) -> Any:
        heard.append(sorted(items))
        return original(corpus, items, spec)

    monkeypatch.setattr(protocol_command, "heard_clips", heard_clips)
    for refit, speakers in ((False, SPEAKERS[2:]), (True, SPEAKERS[1:])):
        recipe = dataclasses.replace(settings.optimisation, refit=refit)
        again = dataclasses.replace(settings, optimisation=recipe)
        fold = run_fold(fold_task(again, prepared_emodb, tmp_path / str(refit)))
        assert heard == [two_per_class(prepared_emodb, speakers), two_per_class(prepared_emodb, SPEAKERS[:1])]
        heard.clear()
        whole = np.array(fold["models"]["mdscm"])
        for name in ("bf16", "int8"):
            low = np.array(fold["precisions"]["mdscm"][name])
            assert low.shape == whole.shape and np.abs(low.sum(1) - 1).max() < 1e-5
            assert 0 < np.abs(low - whole).max() < 0.05


def test_command_line_trains_evaluates_and_labels_leakage(
    emodb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [a for key, value in TINY.items() for a in ("--set", f"{key}={json.dumps(value)}")]
    data = tmp_path / "corpus"
    data.mkdir()
    for path in emodb.glob("*.flac"):
        if path.stem[:2] in SPEAKERS[:3] and path.stem[2:5] in ("a01", "b01", "a02"):
            (data / path.name).write_bytes(path.read_bytes())
    common = ["--dataset", "emodb4", "--data", str(data), "--prepared", str(tmp_path / "p"), "--quiet", *small]
    assert main(["evaluate", *common, "--seeds", "0,1", "--out", str(tmp_path / "loso")]) == 0
    printed = capsys.readouterr().out
    assert "| int8 | " in printed
    assert "protocol leave-one-speaker-out, 2 seeds" in printed and "rows: truth" in printed
    assert json.loads((tmp_path / "loso" / "summary.json").read_text())["seeds"] == [0, 1]
    model = tmp_path / "m.safetensors"
    assert main(["release", *common, "--out", str(model), "--evaluation", str(tmp_path / "loso")]) == 0
    card = avser_fast.load(model).info()
    assert card["protocol"]["training_speakers"] == ["03", "08", "10"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    entries = card["card"]["precisions"]
    assert entries["bf16"]["protocol"] == entries["int8"]["protocol"] == SPEAKER
    assert entries["int8"]["calibration"]["utterances"] == len(list(data.iterdir()))
    assert 0 <= entries["int8"]["agreement"] <= 1 and "precisions" not in card["metrics"]
    assert card["metrics"]["seeds"] == [0, 1] and 0 <= card["metrics"]["ua"]["mean"] <= 100
    assert set(card["metrics"]["paths"]) == {"convolutions", "statistics"}
    assert avser_fast.load(model, precision="int8").infer([next(data.iterdir())])[0].backend == "engine/int8"
    capsys.readouterr()
    assert main(["evaluate", *common, "--model", str(model), "--out", str(tmp_path / "saved")]) == 0
    printed = capsys.readouterr().out
    assert "NOT speaker-independent: the model was trained on the speakers 03, 08, 10" in printed
    assert "| MDSCM | " in printed and "rows: truth" in printed and "% interval of the UA" in printed
    summary = json.loads((tmp_path / "saved" / "summary.json").read_text())
    assert summary["protocol"] == "saved-model" and summary["notes"] == []
    assert main(["evaluate", *common, "--model", str(model), "--map", "hap=neu"]) == 0
    printed = capsys.readouterr().out
    assert "label hap of the target counts as neu" in printed
    assert "labels of the source that are never tested: hap" in printed and "| no utterances |" in printed
    assert main(["evaluate", *common, "--model", str(model), "--out", str(tmp_path / "loso")]) == 1
    assert "loso: expected a folder of no other run, got one" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "loso"), "--collect", str(tmp_path / "kept")]) == 0
    table = capsys.readouterr().out
    assert "| loso | 2 |" in table
    assert main(["report", str(tmp_path / "kept" / "loso.json")]) == 0
    assert capsys.readouterr().out == table, "the collected file says the same as the folder"
    page = (tmp_path / "m.md").read_text()
    assert "| precision | UA % | same decision as float32 % |" in page and "| bf16 | " in page
    assert "CC0-1.0" in page and "2 seeds" in page and "| loso | 2 |" in page
    assert main(["release", *common, "--set", "optimisation.lr=1", "--out", str(model), "--evaluation",
                 str(tmp_path / "loso")]) == 1  # fmt: skip
    assert "expected an evaluation of 'mdscm-small' as it is now, got other settings (optimisation)" in (
        capsys.readouterr().err
    )
    kept = next((tmp_path / "loso" / "evaluation").glob("*.json"))
    text = kept.read_text()
    assert "never heard the speaker under test" in page and "on the speaker they never heard" in page
    kept.write_text(json.dumps(json.loads(text) | {"shares_speakers": True, "leakage": "NOT speaker-independent: 03"}))
    assert main(["release", *common, "--out", str(model), "--evaluation", str(tmp_path / "loso")]) == 0
    page = (tmp_path / "m.md").read_text()
    assert "NOT speaker-independent: 03: no figure here holds for" in page and "**loso: NOT speaker-ind" in page
    assert "never heard" not in page
    kept.write_text(text.replace(f'"{SPEAKER}"', '"cross-corpus"'))
    assert main(["release", *common, "--out", str(model), "--evaluation", str(tmp_path / "loso")]) == 1
    assert "expected an evaluation on " in capsys.readouterr().err
    kept.write_text(text.replace('"mdscm"', '"avdal"'))
    assert main(["release", *common, "--out", str(model), "--evaluation", str(tmp_path / "loso")]) == 1
    assert "expected an evaluation with mdscm in every fold, got one without" in capsys.readouterr().err
    kept.write_text(text.replace('"keys": ["', '"keys": ["x'))
    assert main(["release", *common, "--out", str(model), "--evaluation", str(tmp_path / "loso")]) == 1
    assert "got 1 utterances that are not in it with that label (the first is x" in capsys.readouterr().err
    kept.write_text(text)
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", "--dataset", "emodb4", "--data", str(tmp_path / "empty"), "--quiet"]) == 1
    assert "expected EMO-DB recordings" in capsys.readouterr().err
    assert main(["evaluate", *common, "--set", "lr=3"]) == 1
    assert "expected SECTION.KEY=VALUE" in capsys.readouterr().err


def test_a_model_whose_speakers_are_unknown_is_not_known_to_be_independent() -> None:
    def leakage(card: dict[str, Any], *tested: str) -> str:
        return saved_model._leakage({"protocol": card.get("protocol"), "card": card}, "b", set(tested))

    unknown = "NOT known to be speaker-independent: "
    for speakers in ([], [""], ["", "x"]):
        said = leakage({"protocol": {"training_speakers": speakers}}, "", "y")
        assert said == f"{unknown}the model file does not name the speakers on which it was trained"
    assert leakage({}, "y").startswith(unknown)
    known = {"training_speakers": ["x"], "validation_speakers": ["v"]}
    assert leakage({"protocol": known}, "y") == ""
    assert leakage({"protocol": known}, "y", "") == f"{unknown}speakers of b are unknown"
    assert leakage({"protocol": known}, "x", "v") == (
        "NOT speaker-independent: the model was trained on the speakers x; "
        "NOT speaker-independent: the model was picked by its score on the speakers v"
    )
    of_b = {"protocol": known, "data": {"corpus": "B, four classes", "name": "b"}}
    assert leakage(of_b, "x") == "NOT speaker-independent: the model was trained on the speakers x"
    assert leakage({"protocol": known, "data": {"corpus": "a"}}, "x") == (
        "NOT speaker-independent unless these are other people: the model was trained on speakers of these names, of "
        "a: x"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "a=b"], "--map: expected --test-dataset or --model"),
        (["--test-dataset", "b", "--protocol", SPEAKER], "--protocol: expected no --test-dataset"),
        (["--model", "m", "--test-dataset", "b"], "--test-dataset: expected no --model"),
        (["--model", "m", "--protocol", SPEAKER], "--protocol: expected no --model"),
        (["--model", "m", "--allow-leakage"], "--allow-leakage: expected no --model"),
    ],
)
def test_options_that_would_be_ignored(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--dataset", "a", *options])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--threads", "-1"], "--threads: expected a whole number of at least 1, got '-1'"),
        (["evaluate", "--threads", "0"], "--threads: expected a whole number of at least 1, got '0'"),
        (["evaluate", "--seeds", "0,-1"], "--seeds: expected whole numbers of at least 0 separated by commas, got '0"),
        (["train", "--out", "o", "--seed", "-1"], "--seed: expected a whole number of at least 0, got '-1'"),
        (["train", "--out", "o", "--every", "0"], "--every: expected a whole number of at least 1, got '0'"),
        (["reproduce", "--protocols", "random-80-20,leave-one"], "--protocols: expected some of random-80-20, leave-"),
    ],
)
def test_numbers_and_names_that_are_none(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = ["iemocap", "--root", "r", "--out", "o"] if arguments[0] == "reproduce" else ["--dataset", "a"]
    with pytest.raises(SystemExit) as end:
        main([arguments[0], *corpus, *arguments[1:]])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_pipe_that_is_closed_is_no_error() -> None:
    run = CONFIGS.parent / "results" / "protocols"
    command = [sys.executable, "-m", "python_training", "report", *map(str, sorted(run.glob("*.json"))[:1])]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=CONFIGS.parents[1], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""


def test_usage_errors_exit_with_2() -> None:
    done = subprocess.run([sys.executable, "-m", "python_training", "evaluate"], capture_output=True, text=True)
    assert done.returncode == 2 and "--dataset" in done.stderr
