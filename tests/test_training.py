"""The trainer: data, seeds, resume, protocol, report, command line."""

from __future__ import annotations

import dataclasses
import json
import math
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
from python_training import crossval, precisions, report
from python_training.__main__ import main
from python_training.data import PreparedCorpus
from python_training.data.augment import Augmentation
from python_training.data.crops import CropSampler, augment
from python_training.data.feature_set import FeatureSet
from python_training.losses import learning_rate
from python_training.metrics import confusion_matrix, unweighted_accuracy, weighted_accuracy
from python_training.settings import CONFIGS, Settings, load_settings
from python_training.train import _loss, halves, train

TINY = {
    "network.stem": (2, 4),
    "network.blocks": (6, 8),
    "network.attention_reduction": 2,
    "network.encoder_layers": 0,
    "network.block_dropout": 0.0,
    "network.statistics": 6,
    "network.statistics_hidden": 8,
    "optimisation.epochs": 3,
    "optimisation.batch_size": 8,
    "optimisation.warmup_epochs": 1,
    "optimisation.refit": False,
}


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings("mdscm-small", TINY)


@pytest.fixture(scope="module")
def corpus(settings: Settings, prepared_emodb: PreparedCorpus) -> FeatureSet:
    return two_per_class(FeatureSet.of(prepared_emodb, settings.front_end.front_end()))


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


def test_global_normalisation_is_measured_on_what_it_is_given(corpus: FeatureSet) -> None:
    part = corpus.subset(lambda u: u.speaker != "03")
    front_end = part.measured_front_end()
    stacked = torch.cat([f for f in part.normalized(front_end)], dim=1)
    assert abs(float(stacked.mean())) < 1e-3 and abs(float(stacked.std()) - 1) < 1e-3
    assert front_end != corpus.measured_front_end()


def test_crops_come_from_the_utterances_and_from_the_seed() -> None:
    features = [[torch.arange(t, dtype=torch.float32).view(1, t, 1) + 1] for t in (5, 8, 12, 30)]
    sampler = CropSampler(features, torch.tensor([0, 1, 2, 3]), 8, 2)
    batches = list(sampler.epoch(torch.Generator().manual_seed(1)))
    again = list(sampler.epoch(torch.Generator().manual_seed(1)))
    other = list(sampler.epoch(torch.Generator().manual_seed(2)))
    assert all(torch.equal(a, b) for x, y in zip(batches, again) for a, b in zip(x, y))
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(batches, other))
    seen = torch.cat([t for _, t in batches]).tolist()
    assert sorted(seen) == [0, 1, 2, 3]
    for crops, targets in batches:
        for crop, target in zip(crops, targets):
            values = crop[0, :, 0]
            inside = values[values > 0]
            assert crop.shape == (1, 8, 1)
            assert (inside.diff() == 1).all() and len(inside) == min(8, features[int(target)][0].shape[1])
    assert CropSampler(features[:3], torch.zeros(3), 8, 2).steps_per_epoch() == 2
    assert CropSampler(features[:1] * 9, torch.zeros(9), 8, 4).steps_per_epoch() == 2


def test_augmentation() -> None:
    crops, targets = torch.rand(16, 1, 50, 20) + 1, torch.arange(16) % 4
    generator = torch.Generator().manual_seed(0)
    same, soft = augment(crops, targets, Augmentation(), 4, generator)
    assert torch.equal(same, crops) and torch.equal(soft.argmax(1), targets) and (soft.sum(1) == 1).all()
    masked, _ = augment(crops, targets, Augmentation(band_mask=6, time_mask=10), 4, generator)
    hidden = masked == 0
    assert torch.equal(masked[~hidden], crops[~hidden]) and 0 < hidden.float().mean() < 0.8
    full = hidden.all(2, keepdim=True) | hidden.all(3, keepdim=True)
    assert torch.equal(hidden, full.expand_as(hidden)), "masks cover whole bands or whole frames"
    assert int(hidden.all(2).sum(2).max()) <= 12 and int(hidden.all(3).sum(2).max()) <= 20
    constant = torch.full((4, 1, 30, 10), 2.5)
    warped, _ = augment(constant, targets[:4], Augmentation(time_warp=0.3, band_warp=0.3), 4, generator)
    assert torch.allclose(warped, constant, atol=1e-5), "a warp moves values, it does not change them"
    mixed, soft = augment(crops, targets, Augmentation(mixup=0.4), 4, generator)
    assert torch.allclose(soft.sum(1), torch.ones(16)) and float(soft.max(1).values.min()) >= 0.6 - 1e-6
    louder, _ = augment(constant, targets[:4], Augmentation(level=0.5), 4, generator)
    assert (louder.flatten(1).std(1) < 1e-5).all() and louder[:, 0, 0, 0].unique().numel() == 4


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


def split(corpus: FeatureSet) -> tuple[FeatureSet, FeatureSet]:
    return corpus.subset(lambda u: u.speaker in ("03", "08")), corpus.subset(lambda u: u.speaker == "10")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_training_ends_with_the_same_numbers(
    settings: Settings, corpus: FeatureSet, tmp_path: Path, stop_after: int
) -> None:
    training, validation = split(corpus)
    whole = train(settings, training, validation, seed=3)
    caller = torch.get_rng_state()

    def interrupt(epoch: int, last: int, record: dict[str, float]) -> None:
        if epoch == stop_after:
            raise Stop

    with pytest.raises(Stop):
        train(settings, training, validation, seed=3, checkpoint=tmp_path / "x.pt", progress=interrupt)
    resumed = train(settings, training, validation, seed=3, checkpoint=tmp_path / "x.pt")
    assert same(resumed.state, whole.state)
    assert resumed.history == whole.history and resumed.epoch == whole.epoch
    assert torch.equal(torch.get_rng_state(), caller), "the caller's random generator is untouched"
    other = train(settings, training, validation, seed=4)
    assert not same(other.state, whole.state), "another seed gives another network"


def test_training_learns(settings: Settings, corpus: FeatureSet) -> None:
    """Without augmentation even a tiny network learns its few utterances."""
    recipe = dataclasses.replace(settings.optimisation, epochs=25, lr=1e-2, label_smoothing=0.0)
    longer = dataclasses.replace(settings, optimisation=recipe, augmentation=Augmentation())
    trained = train(longer, corpus, None, seed=0)
    assert trained.epoch == 25
    assert trained.history[-1]["loss"] < 0.75 * math.log(4), "three quarters of the loss of guessing"


def test_the_two_paths_learn_apart(settings: Settings, corpus: FeatureSet) -> None:
    """What the body is shown changes what the body learns, not what the statistics path learns."""
    torch.manual_seed(0)
    network = dataclasses.replace(settings.network, statistics_dropout=0.0)
    model = nn.MDSCM(network)
    crops, targets = torch.randn(8, 3, network.clip_frames, 40), torch.arange(8) % 4
    gradients = []
    for augmentation in (settings.augmentation, Augmentation()):
        model.zero_grad()
        changed = dataclasses.replace(settings, augmentation=augmentation, network=network)
        _loss(model, crops, targets, torch.Generator().manual_seed(0), changed, torch.ones(4)).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    a, b = gradients
    path = [n for n in a if n.startswith("statistics.")]
    assert len(path) == 4 and all(torch.equal(a[n], b[n]) for n in path)
    assert not torch.equal(a["body.conv_stem.convs.0.weight"], b["body.conv_stem.convs.0.weight"])
    trained, fixed = train(settings, corpus, None, seed=0).state, nn.MDSCM(network).state_dict()
    for name in ("statistics.gate.weight", "statistics.gate.bias", "statistics.bands.weight"):
        assert torch.equal(trained[name], fixed[name]), "map and gate are not trained"


def test_the_logits_are_the_mean_of_both_paths(settings: Settings, corpus: FeatureSet) -> None:
    plain = dataclasses.replace(settings, augmentation=Augmentation())
    model = nn.MDSCM(settings.network).eval()
    crops = torch.randn(4, 3, settings.network.clip_frames, 40)
    targets, weights = torch.tensor([0, 1, 2, 3]), torch.ones(4)
    loss = _loss(model, crops, targets, torch.Generator(), plain, weights)
    out = model(crops.unsqueeze(1))
    alone = []
    for name, state in halves(model.state_dict(), settings.network).items():
        part = nn.MDSCM(settings.network).eval()
        part.load_state_dict(state)
        alone.append(part(crops.unsqueeze(1)).clip_logits[:, 0])
        missing = "statistics.hidden.weight" if name == "body" else "body.conv_stem.convs.0.weight"
        dict(part.named_parameters())[missing].data.zero_()
        assert torch.equal(part(crops.unsqueeze(1)).clip_logits[:, 0], alone[-1]), f"{name} does not use the other path"
    assert torch.allclose((alone[0] + alone[1]) / 2, out.clip_logits[:, 0], atol=1e-5)
    smoothing = settings.optimisation.label_smoothing
    both = [torch.nn.functional.cross_entropy(h, targets, label_smoothing=smoothing) for h in alone]
    assert torch.allclose(loss, (both[0] + both[1]) / 2, atol=1e-5)


def test_front_end_recipes_reach_the_front_end(settings: Settings) -> None:
    front_end = settings.front_end.front_end()
    assert (front_end.frame_length, front_end.n_fft) == (settings.front_end.frame_length, settings.front_end.n_fft)
    assert front_end.mean == (0.0,) * 3 and front_end.std == (1.0,) * 3
    plain = load_settings("mdscm-published").front_end.front_end()
    assert (plain.frame_length, plain.n_fft, plain.mean) == (400, 512, ())


def test_folds_never_share_a_speaker() -> None:
    ring = [f"{i:02}" for i in range(10)]
    made = crossval.folds(ring, [0, 1])
    assert len(made) == 20 and {f.test for f in made} == set(ring) == {f.validation for f in made}
    assert all(f.test != f.validation for f in made)
    with pytest.raises(ValueError, match="expected at least 3 speakers, got 2"):
        crossval.folds(["a", "b"], [0])


def test_the_test_speaker_cannot_influence_a_fold(settings: Settings, corpus: FeatureSet, tmp_path: Path) -> None:
    """Training data, normalisation and the picked epoch stay the same whatever the test speaker's labels are."""
    swapped = dataclasses.replace(
        corpus,
        utterances=tuple(
            dataclasses.replace(u, label=3 - u.label) if u.speaker == "03" else u for u in corpus.utterances
        ),
    )
    results = []
    for name, data in (("a", corpus), ("b", swapped)):
        (tmp_path / name).mkdir()
        results.append(crossval.run_fold(settings, data, crossval.Fold(0, "03", "08"), tmp_path / name))
    a, b = results
    assert a["probabilities"] == b["probabilities"] and a["epoch"] == b["epoch"] and a["history"] == b["history"]
    assert a["paths"] == b["paths"] and a["paths"].keys() == {"body", "statistics"}
    assert a["truth"] != b["truth"]
    assert a["precisions"] == b["precisions"]


def test_folds_are_scored_in_every_precision(
    settings: Settings, corpus: FeatureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 with ranges of the speakers that trained the network, which the test speaker is not."""
    calibrated_on: list[set[str]] = []
    original = precisions.ranges_of
    monkeypatch.setattr(
        precisions,
        "ranges_of",
        lambda spec, state, training: (
            calibrated_on.append(set(training.speakers)) or original(spec, state, training)  # type: ignore[func-returns-value]
        ),
    )
    for refit, speakers in ((False, {"10", "12"}), (True, {"08", "10", "12"})):
        recipe = dataclasses.replace(settings.optimisation, refit=refit)
        result = crossval.run_fold(
            dataclasses.replace(settings, optimisation=recipe), corpus, crossval.Fold(0, "03", "08"), tmp_path
        )
        assert calibrated_on.pop() == speakers and not calibrated_on
        whole = np.array(result["probabilities"])
        for name in ("bf16", "int8"):
            low = np.array(result["precisions"][name])
            assert low.shape == whole.shape and np.abs(low.sum(1) - 1).max() < 1e-5
            assert 0 < np.abs(low - whole).max() < 0.05


def test_cross_validation_resumes_and_refuses_other_settings(
    settings: Settings, corpus: FeatureSet, tmp_path: Path
) -> None:
    runs = crossval.cross_validate(settings, corpus, [0], tmp_path)
    first, _ = next(runs)
    runs.close()
    finished = tmp_path / f"{first.name}.json"
    stamp = finished.stat().st_mtime_ns
    results = dict(crossval.cross_validate(settings, corpus, [0], tmp_path))
    assert sorted(f.test for f in results) == sorted(SPEAKERS)
    assert finished.stat().st_mtime_ns == stamp, "a finished fold is not run again"
    assert not list(tmp_path.glob("*.pt")), "checkpoints of finished folds are removed"
    other = dataclasses.replace(settings, optimisation=dataclasses.replace(settings.optimisation, lr=1.0))
    with pytest.raises(ValueError, match="expected folds of the settings .* got others"):
        list(crossval.cross_validate(other, corpus, [0], tmp_path))
    summary = report.summarize(report.read_run(tmp_path).folds, corpus.labels)
    assert np.sum(summary["confusion"]) == 32 and summary["missing"] == []


def fold_result(seed: int, test: str, predictions: list[int], validation_ua: float) -> dict[str, Any]:
    return {
        "seed": seed, "test": test, "validation": "v", "epoch": 7, "validation_ua": validation_ua,
        "truth": [0, 0, 1, 1], "probabilities": np.eye(2)[predictions].tolist(),
    }  # fmt: skip


def test_report_pools_and_shows_the_spread() -> None:
    results = [
        fold_result(0, "a", [0, 0, 1, 1], 1.0), fold_result(0, "b", [0, 1, 1, 1], 0.5),
        fold_result(1, "a", [1, 1, 0, 0], 0.5), fold_result(1, "b", [0, 0, 1, 1], 0.5),
    ]  # fmt: skip
    summary = report.summarize(results, ["no", "yes"])
    assert summary["per_seed"]["0"] == {"wa": 87.5, "ua": 87.5} and summary["per_seed"]["1"] == {"wa": 50.0, "ua": 50.0}
    assert summary["ua"] == {"mean": 68.75, "std": 26.52, "spread": [50.0, 87.5]}
    assert summary["per_speaker"]["a"] == {"wa": 50.0, "ua": 50.0}
    assert summary["confusion"] == [[5, 3], [2, 6]]
    text = report.text_report(summary, "title")
    assert "87.5 %" in text and "no" in text and "std 26.5" in text
    assert report.summarize(results[:3], ["no", "yes"])["missing"] == ["seed 1, speaker b"]
    assert "paths" not in summary
    for result in results:
        result["paths"] = {"body": result["probabilities"], "statistics": np.eye(2)[result["truth"]].tolist()}
    summary = report.summarize(results, ["no", "yes"])
    assert summary["paths"] == {"body": {"0": 87.5, "1": 50.0}, "statistics": {"0": 100.0, "1": 100.0}}
    assert "statistics only" in report.text_report(summary, "title")


def test_report_of_precisions() -> None:
    results = [fold_result(0, "a", [0, 0, 1, 1], 1.0), fold_result(1, "a", [0, 0, 1, 0], 1.0)]
    assert report.summarize(results, ["no", "yes"])["precisions"] is None
    assert precisions.precision_table(None) == "bf16 and int8 were not measured under this protocol."
    assert precisions.precision_table({"int8": {"calibration": {}}}).startswith("bf16 and int8 were not measured")
    for result in results:
        result["precisions"] = {"bf16": result["probabilities"], "int8": np.eye(2)[[0, 1, 1, 1]].tolist()}
    summary = report.summarize(results, ["no", "yes"])
    bf16, int8 = summary["precisions"]["bf16"], summary["precisions"]["int8"]
    assert (bf16["agreement"], bf16["utterances"], bf16["largest_difference"]) == (1.0, 8, 0.0)
    assert bf16["ua"] == summary["ua"]["mean"] == 87.5 and int8["ua"] == 75.0
    assert (int8["agreement"], int8["largest_difference"]) == (0.625, 1.0)
    table = precisions.precision_table(summary["precisions"]).splitlines()
    assert table[2:] == [
        "| float32 | 87.5 | 100.0 | 0 |",
        "| bf16 | 87.5 | 100.0 | 0.0000 |",
        "| int8 | 75.0 | 62.5 | 1.0000 |",
        "",
        "Seeds: 0, 1.",
    ]
    del results[1]["precisions"]
    bf16 = report.summarize(results, ["no", "yes"])["precisions"]["bf16"]
    assert (bf16["seeds"], bf16["utterances"], bf16["ua"], bf16["float32_ua"]) == ([0], 4, 100.0, 100.0)
    results[1]["seed"] = 0
    assert report.summarize(results, ["no", "yes"])["precisions"] is None, "a seed that measured some folds only"


def test_nested_choice_uses_validation_speakers_only(tmp_path: Path) -> None:
    for name, validation, answers in (("good", 0.9, [0, 0, 1, 1]), ("bad", 0.4, [1, 1, 0, 0])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(json.dumps({"labels": ["no", "yes"], "settings": {}}))
        for test in ("a", "b"):
            # On speaker b the better network has the worse validation speaker: the choice must follow validation.
            ua = validation if test == "a" else 1 - validation
            (tmp_path / name / f"seed0-speaker{test}.json").write_text(json.dumps(fold_result(0, test, answers, ua)))
    comparison = report.compare([tmp_path / "good", tmp_path / "bad"])
    assert comparison["runs"]["good"]["ua"]["mean"] == 100.0 and comparison["runs"]["bad"]["ua"]["mean"] == 0.0
    assert comparison["nested"]["ua"]["mean"] == 50.0
    assert "| good | 1 | 100.0 | 100.0 |" in report.compare_table(comparison)


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
    assert "leave one speaker out" in printed and "mean of seeds" in printed and "rows: truth" in printed
    assert json.loads((tmp_path / "loso" / "summary.json").read_text())["seeds"] == [0, 1]
    model = tmp_path / "m.safetensors"
    assert main(["release", *common, "--out", str(model), "--evaluation", str(tmp_path / "loso")]) == 0
    card = avser_fast.load(model).info()
    assert card["protocol"]["training_speakers"] == ["03", "08", "10"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    entries = card["card"]["precisions"]
    assert entries["bf16"]["protocol"] == entries["int8"]["protocol"] == report.PROTOCOL
    assert entries["int8"]["calibration"]["utterances"] == len(list(data.iterdir()))
    assert 0 <= entries["int8"]["agreement"] <= 1 and "precisions" not in card["metrics"]
    assert avser_fast.load(model, precision="int8").infer([next(data.iterdir())])[0].backend == "engine/int8"
    capsys.readouterr()
    assert main(["evaluate", *common, "--model", str(model)]) == 0
    assert "NOT speaker-independent" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "loso"), "--collect", str(tmp_path / "kept")]) == 0
    table = capsys.readouterr().out
    assert "| loso | 2 |" in table
    assert main(["report", str(tmp_path / "kept" / "loso.json")]) == 0
    assert capsys.readouterr().out == table, "the collected file says the same as the folder"
    page = (tmp_path / "m.md").read_text()
    assert "| precision | UA % | same decision as float32 % |" in page and "| bf16 | " in page
    assert "CC0-1.0" in page and "mean of seeds" in page and "| loso | 2 |" in page
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", "--dataset", "emodb4", "--data", str(tmp_path / "empty"), "--quiet"]) == 1
    assert "expected EMO-DB recordings" in capsys.readouterr().err
    assert main(["evaluate", *common, "--set", "lr=3"]) == 1
    assert "expected SECTION.KEY=VALUE" in capsys.readouterr().err


def test_usage_errors_exit_with_2() -> None:
    done = subprocess.run([sys.executable, "-m", "python_training", "evaluate"], capture_output=True, text=True)
    assert done.returncode == 2 and "--dataset" in done.stderr
