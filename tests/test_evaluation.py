"""Metrics with intervals, and what an evaluation's folds add up to."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from python_training.data.corpus import LABELS, Utterance
from python_training.evaluation import fold_path, fold_result, read_folds, summarize, write_fold
from python_training.metrics import (
    bootstrap_interval,
    confusion_matrix,
    paired_difference,
    recalls,
    unweighted_accuracy,
    weighted_accuracy,
)
from python_training.protocols import PROTOCOLS, splits
from python_training.tables import ablation_table, precision_table, text_report

RANDOM, SESSION, SPEAKER = PROTOCOLS


def iemocap_like(size: int = 200) -> list[Utterance]:
    utterances = []
    for i in range(size):
        session = f"Ses{i % 5 + 1:02d}"
        speaker = session + "FM"[i // 5 % 2]
        utterances.append(Utterance(f"{speaker}_{i:04d}", Path(f"{i}.wav"), speaker, (i // 3) % 4, session))
    return utterances


UTTERANCES = iemocap_like()


def answers(
    generator: np.random.Generator, truth: list[int], right: float | np.ndarray, classes: int = 4
) -> np.ndarray:
    truth_ = np.asarray(truth)
    wrong = (truth_ + generator.integers(1, classes, len(truth_))) % classes
    return np.where(generator.random(len(truth_)) < right, truth_, wrong)


def one_hot(labels: np.ndarray, classes: int = 4) -> np.ndarray:
    return np.eye(classes)[labels] * 0.7 + 0.3 / classes


def make_folds(protocol: str, seeds: list[int], quality: dict[str, float]) -> list[dict[str, Any]]:
    folds = []
    for split in splits(UTTERANCES, protocol, seeds):
        generator = np.random.default_rng([split.seed, len(folds)])
        truth = [UTTERANCES[i].label for i in split.test]
        models = {model: one_hot(answers(generator, truth, right)) for model, right in quality.items()}
        folds.append(fold_result(split, UTTERANCES, LABELS, models, dict.fromkeys(quality, 0.5)))
    return folds


QUALITY = {"mdscm": 0.6, "avdal": 0.3, "fusion": 0.8}


# Metrics.


def test_recalls_have_no_nan() -> None:
    matrix = confusion_matrix([0, 0, 2, 2], [0, 1, 2, 2], 3)
    assert recalls(matrix) == [0.5, None, 1.0]
    assert unweighted_accuracy(matrix) == 0.75 and weighted_accuracy(matrix) == 0.75


def test_labels_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="truth: expected labels from 0 to 3, got -1"):
        confusion_matrix([0, -1], [0, 0], 4)
    with pytest.raises(ValueError, match="predicted: expected labels from 0 to 3, got 4"):
        bootstrap_interval([0, 1], [4, 0], 4)


def slow_bootstrap(
    truth: list[int], systems: list[list[int]], groups: list[Any], rate: Callable[[np.ndarray], float], samples: int
) -> list[list[float]]:
    """One draw at a time, utterance by utterance."""
    generator = np.random.default_rng(99)
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    names = list(members)
    found = []
    for _ in range(samples):
        drawn = [i for g in generator.integers(0, len(names), len(names)) for i in members[names[g]]]
        row = []
        for predicted in systems:
            matrix = np.zeros((4, 4))
            for i in drawn:
                matrix[truth[i], predicted[i]] += 1
            row.append(rate(matrix))
        found.append(row)
    return found


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("rate", [unweighted_accuracy, weighted_accuracy, lambda m: float(m[0, 0] / m[0].sum())])
def test_bootstrap_is_that_of_a_loop(clustered: bool, rate: Callable[[np.ndarray], float]) -> None:
    generator = np.random.default_rng(3)
    truth = generator.choice(4, 240, p=[0.4, 0.3, 0.2, 0.1]).tolist()
    speakers = (np.arange(240) % 12).tolist()
    a = answers(generator, truth, 0.4 + 0.04 * np.asarray(speakers)).tolist()
    b = answers(generator, truth, 0.6).tolist()
    slow = np.array(slow_bootstrap(truth, [a, b], speakers if clustered else list(range(240)), rate, 3000))
    groups = [f"speaker {s}" for s in speakers] if clustered else None
    # Both sides are random: the standard error of a 2.5 % point of 3000 draws is 0.05 standard deviations.
    low, high = bootstrap_interval(truth, a, 4, groups=groups, rate=rate, samples=20000)
    for ours, percent in ((low, 2.5), (high, 97.5)):
        assert ours == pytest.approx(np.percentile(slow[:, 0], percent), abs=0.2 * slow[:, 0].std())
    difference, low, high = paired_difference(truth, a, b, 4, groups, rate=rate, samples=20000)
    assert difference == rate(confusion_matrix(truth, a, 4)) - rate(confusion_matrix(truth, b, 4))
    between = slow[:, 0] - slow[:, 1]
    for ours, percent in ((low, 2.5), (high, 97.5)):
        assert ours == pytest.approx(np.percentile(between, percent), abs=0.2 * between.std())


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(5)
    right = np.array([0.9, 0.7, 0.5, 0.6])
    inside = 0
    for trial in range(300):
        truth = generator.choice(4, 300, p=[0.4, 0.3, 0.2, 0.1])
        low, high = bootstrap_interval(truth, answers(generator, truth, right[truth]), 4, samples=500, seed=trial)
        inside += low <= right.mean() <= high
    assert 0.90 <= inside / 300 <= 0.985


def test_groups_that_err_together_need_the_bootstrap_of_groups() -> None:
    generator = np.random.default_rng(6)
    inside = {"utterances": 0, "groups": 0}
    for trial in range(200):
        groups = np.repeat(np.arange(30), 40)
        truth = generator.integers(0, 4, len(groups))
        predicted = answers(generator, truth, generator.uniform(0.3, 0.9, 30)[groups])
        for name, by in (("utterances", None), ("groups", groups.tolist())):
            low, high = bootstrap_interval(truth, predicted, 4, groups=by, samples=500, seed=trial)
            inside[name] += low <= 0.6 <= high
    assert inside["groups"] / 200 >= 0.88 and inside["utterances"] / 200 <= 0.75


def test_draws_without_a_class_use_the_others() -> None:
    low, high = bootstrap_interval([0] * 20 + [1], [0] * 20 + [0], 3)
    assert (low, high) == (0.5, 1.0), "the single utterance of class 1 is wrong, and missing from a third of the draws"
    assert bootstrap_interval([0] * 20 + [1], [0] * 20 + [1], 3) == (1.0, 1.0)


def test_one_group_is_always_the_same_draw() -> None:
    assert bootstrap_interval([0, 0, 1], [0, 1, 1], 2, groups=["x", "x", "x"]) == (0.75, 0.75)


def test_bootstrap_of_a_system_against_itself_is_nothing() -> None:
    truth = [u.label for u in UTTERANCES]
    predicted = answers(np.random.default_rng(0), truth, 0.6)
    assert paired_difference(truth, predicted, predicted, 4) == (0.0, 0.0, 0.0)


def test_intervals_repeat_and_are_fast() -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, 5531)
    predicted = answers(generator, truth, 0.7)
    start = time.process_time()
    first = bootstrap_interval(truth, predicted, 4)
    # 0.03 s where nothing else runs; a loop over 2000 draws takes more than 10 s.
    assert time.process_time() - start < 0.5
    assert first == bootstrap_interval(truth, predicted, 4) != bootstrap_interval(truth, predicted, 4, seed=1)
    assert first[0] < unweighted_accuracy(confusion_matrix(truth, predicted, 4)) < first[1]
    assert first[1] - first[0] == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 5531), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (([], [], 4), {}, "bootstrap: expected utterances, got none"),
        (([0, 1], [0], 4), {}, r"bootstrap: expected as many predictions as truths \(2\), got 1"),
        (([0, 1], [0, 1], 4), {"groups": ["x"]}, r"bootstrap: expected as many groups as truths \(2\), got 1"),
        (([0], [0], 4), {"level": 95}, "bootstrap: expected samples >= 1 and 0 < level < 1, got 2000 and 95"),
        (([0], [0], 4), {"samples": 0}, "bootstrap: expected samples >= 1 and 0 < level < 1, got 0 and 0.95"),
    ],
)
def test_bootstrap_errors(arguments: tuple[Any, ...], keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(*arguments, **keywords)


# Folds and files.


def test_folds_come_back_as_they_were_written(tmp_path: Path) -> None:
    folds = make_folds(SESSION, [1, 0], QUALITY)
    for fold in folds:
        write_fold(fold, tmp_path / "new")
    (tmp_path / "new" / "settings.json").write_text("{}")
    assert len(list((tmp_path / "new").iterdir())) == 11
    found = read_folds(tmp_path / "new")
    assert found == sorted(folds, key=lambda f: (f["seed"], f["name"])) and len(found) == 10
    assert (tmp_path / "new" / "session-Ses01-seed0.json").is_file()
    assert read_folds(tmp_path) == []


def test_a_speaker_named_like_a_path_stays_in_the_folder(tmp_path: Path) -> None:
    assert fold_path(tmp_path, "speaker../a b", 3) == tmp_path / "speaker..%2Fa%20b-seed3.json"
    fold = {**make_folds(SPEAKER, [0], QUALITY)[0], "name": "speaker../a b"}
    assert write_fold(fold, tmp_path).parent == tmp_path and read_folds(tmp_path) == [fold]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": [0]}, "expected truth of 20 utterances, got 1"),
        ({"truth": [4] * 20}, "expected truths from 0 to 3, got 4"),
        ({"models": {}}, "expected tested utterances and models, got 20 and 0"),
        ({"models": {"mdscm": [[0.5, 0.5, float("nan"), 0.0]] * 20}}, "expected mdscm to have 4 finite "),
        ({"models": {"mdscm": [["a"]] * 20}}, "expected mdscm to have 4 finite probabilities per utterance"),
        (
            {"models": {"mdscm": [[1.0] * 4] * 20, "fusion": [[1.0] * 3] * 20}},
            "expected fusion to have 4 finite probabilities",
        ),
        ({"seed": None}, "expected seed to be a int, got None"),
    ],
)
def test_what_is_no_fold_is_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_fold({**make_folds(SPEAKER, [0], QUALITY)[0], **change}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "speaker03-seed0.json"
    path.write_text('{"protocol": ')
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected a fold written by evaluation, got no JSON")):
        read_folds(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected a JSON object, got list")):
        read_folds(tmp_path)


# Summary.


@pytest.mark.parametrize("protocol", [SESSION, SPEAKER])
def test_rates_are_those_of_the_pooled_predictions(protocol: str) -> None:
    folds = make_folds(protocol, [0, 1, 2], QUALITY)
    summary = json.loads(json.dumps(summarize(folds), allow_nan=False))
    assert list(summary["models"]) == ["mdscm", "avdal", "fusion"] and summary["seeds"] == [0, 1, 2]
    assert summary["missing"] == [] and summary["leakage"] == ""
    total = np.zeros((4, 4), dtype=int)
    ua, wa = [], []
    for seed in range(3):
        own = [f for f in folds if f["seed"] == seed]
        truth = np.concatenate([f["truth"] for f in own])
        predicted = np.concatenate([np.argmax(f["models"]["fusion"], 1) for f in own])
        assert len(truth) == 200
        wa.append(100 * (truth == predicted).mean())
        ua.append(100 * np.mean([(predicted[truth == c] == c).mean() for c in range(4)]))
        np.add.at(total, (truth, predicted), 1)
    row = summary["models"]["fusion"]
    assert row["wa"]["mean"] == pytest.approx(np.mean(wa), abs=0.01)
    assert row["ua"]["mean"] == pytest.approx(np.mean(ua), abs=0.01)
    assert row["ua"]["std"] == pytest.approx(np.std(ua, ddof=1), abs=0.01)
    assert [row["per_seed"][str(s)]["ua"] for s in range(3)] == pytest.approx(ua, abs=0.006)
    assert row["confusion"] == total.tolist()
    assert row["recall"] == pytest.approx(100 * np.diag(total) / total.sum(1), abs=0.006)
    assert row["interval"][0] < row["ua"]["mean"] < row["interval"][1]
    assert sum(fold["utterances"] for fold in row["per_fold"].values()) == 600
    assert all(fold["seeds"] == 3 for fold in row["per_fold"].values())
    assert row["validation_ua"] == 50.0
    assert summary["bootstrap"] == {"over": "speakers", "count": 10, "level": 0.95, "samples": 2000}


def test_differences_between_models() -> None:
    summary = summarize(make_folds(SPEAKER, [0, 1], QUALITY))
    pairs = {(d["model"], d["than"]): d for d in summary["differences"]}
    assert list(pairs) == [("avdal", "mdscm"), ("fusion", "mdscm"), ("fusion", "avdal")]
    ua = {model: row["ua"]["mean"] for model, row in summary["models"].items()}
    for (model, than), d in pairs.items():
        assert d["ua"] == pytest.approx(ua[model] - ua[than], abs=0.02), "every seed tests the same utterances"
        assert d["interval"][0] < d["ua"] < d["interval"][1]
    assert pairs["fusion", "avdal"]["interval"][0] > 0 > pairs["avdal", "mdscm"]["interval"][1]


def test_few_or_unknown_speakers_leave_the_bootstrap_to_utterances() -> None:
    folds = make_folds(SPEAKER, [0, 1], QUALITY)
    few = [f for f in folds if f["speakers"][0] < "Ses04M"]
    assert summarize(few)["bootstrap"]["over"] == "utterances"
    assert summarize(few)["bootstrap"]["count"] == 140
    folds[0]["speakers"][0] = ""
    assert summarize(folds)["bootstrap"]["over"] == "utterances"


def test_more_seeds_do_not_make_an_interval_narrower() -> None:
    """The same answers three times are no more utterances."""
    folds = [f for f in make_folds(SPEAKER, [0], QUALITY) if f["speakers"][0] < "Ses04M"]
    once = summarize(folds)
    thrice = summarize([{**f, "seed": seed} for f in folds for seed in range(3)])
    for model, row in once["models"].items():
        assert thrice["models"][model]["interval"] == pytest.approx(row["interval"], abs=0.5)
        assert row["interval"][1] - row["interval"][0] > 5
        assert thrice["models"][model]["ua"] == {"mean": row["ua"]["mean"], "std": 0.0}


def test_missing_folds_are_named() -> None:
    folds = make_folds(SESSION, [0, 1], QUALITY)
    wanted = splits(UTTERANCES, SESSION, [0, 1, 2])
    left = [f for f in folds if (f["seed"], f["name"]) != (1, "session-Ses02") and f["name"] != "session-Ses05"]
    del left[0]["models"]["fusion"]
    summary = summarize(left)
    assert summary["missing"] == ["seed 1, session-Ses02", "seed 0, session-Ses01 (fusion)"]
    assert "session-Ses05" not in summary["models"]["mdscm"]["per_fold"]
    assert summarize(left, wanted)["missing"] == [
        "seed 0, session-Ses05",
        "seed 1, session-Ses02",
        "seed 1, session-Ses05",
        *(f"seed 2, session-Ses0{i}" for i in range(1, 6)),
        "seed 0, session-Ses01 (fusion)",
    ]
    for text in (text_report(summary, "title"), ablation_table(summary, "iemocap")):
        assert "seed 1, session-Ses02; seed 0, session-Ses01 (fusion)" in text


def test_a_class_that_is_never_tested() -> None:
    folds = make_folds(SPEAKER, [0], {"mdscm": 0.7})
    for fold in folds:
        fold["truth"] = [2 if label == 3 else label for label in fold["truth"]]
    summary = summarize(folds)
    assert summary["models"]["mdscm"]["recall"][3] is None
    assert "| no utterances |" in ablation_table(summary, "iemocap") and "none" in text_report(summary, "t")


def test_folds_that_do_not_belong_together() -> None:
    folds = make_folds(SPEAKER, [0], QUALITY)
    for wrong, message in (
        ([], "evaluation: expected at least one fold, got none"),
        (
            [*folds, *make_folds(RANDOM, [1], QUALITY)],
            "expected folds of one protocol, got leave-one-speaker-out, random",
        ),
        ([*folds, folds[0]], f"seed 0: expected every utterance to be tested once, got {folds[0]['keys'][0]} twice"),
    ):
        with pytest.raises(ValueError, match=message):
            summarize(wrong)
    folds[1]["labels"] = ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="fold speakerSes01M, seed 0: expected the classes ang, .*, got a, b, c, d"):
        summarize(folds)


def test_precisions_are_compared_where_a_seed_measured_all_of_them() -> None:
    folds = make_folds(SPEAKER, [0, 1], {"mdscm": 0.7})
    assert summarize(folds)["models"]["mdscm"]["precisions"] == {}
    assert precision_table({}) == "bf16 and int8 were not measured under this protocol."
    assert precision_table({"int8": {"calibration": {}}}).startswith("bf16 and int8 were not measured")
    wrong = 0
    for fold in folds:
        whole = np.array(fold["models"]["mdscm"])
        turned = np.roll(whole, 1, axis=1)  # another answer for every utterance of one fold in five
        low = turned if fold["name"] in ("speakerSes01F", "speakerSes03M") else whole
        wrong += len(low) if low is turned else 0
        fold["precisions"] = {"mdscm": {"bf16": whole.tolist(), "int8": low.tolist()}}
    summary = summarize(folds)
    model = summary["models"]["mdscm"]
    bf16, int8 = model["precisions"]["bf16"], model["precisions"]["int8"]
    assert (bf16["agreement"], bf16["utterances"], bf16["largest_difference"]) == (1.0, 400, 0.0)
    assert bf16["ua"] == bf16["float32_ua"] == int8["float32_ua"] == model["ua"]["mean"]
    assert int8["agreement"] == pytest.approx(1 - wrong / 400) and int8["largest_difference"] == pytest.approx(0.7)
    assert int8["ua"] < bf16["ua"] - 5 and (bf16["protocol"], bf16["seeds"]) == (SPEAKER, [0, 1])
    table = precision_table(model["precisions"]).splitlines()
    assert table[2].startswith(f"| float32 | {model['ua']['mean']:.1f} | 100.0 |") and table[-1] == "Seeds: 0, 1."
    assert table[4] == f"| int8 | {int8['ua']:.1f} | {100 - wrong / 4:.1f} | 0.7000 |"
    del folds[-1]["precisions"]
    assert summarize(folds)["models"]["mdscm"]["precisions"]["bf16"]["seeds"] == [0], "seed 1 lacks a fold"
    folds[0]["precisions"]["mdscm"]["int8"][0] = [float("nan")] * 4
    with pytest.raises(ValueError, match="speakerSes01F, seed 0: expected mdscm in int8 to have 4 finite prob"):
        summarize(folds)


def test_kept_epochs_and_their_median() -> None:
    folds = make_folds(SPEAKER, [0], {"mdscm": 0.7})
    for epoch, fold in enumerate(folds, start=21):
        fold["epochs"] = {"mdscm": epoch}
    assert summarize(folds)["epochs"] == {"mdscm": {"kept": list(range(21, 31)), "median": 25}}


# What is shown.

SHARED = "NOT speaker-independent: 10 of 10 test speakers are also in training (protocol random-80-20)"


def test_shared_speakers_are_said_in_every_output() -> None:
    summary = summarize(make_folds(RANDOM, [0], QUALITY))
    assert summary["leakage"] == SHARED
    two = summarize(make_folds(RANDOM, [0, 1], QUALITY))["leakage"]
    assert two == f"{SHARED}; {SHARED.replace('10 of 10', '9 of 9')}", "seed 1 tests nine speakers"
    assert SHARED in text_report(summary, "t")
    assert all(SHARED in ablation_table(summary, name) for name in ("iemocap", "other"))
    folds = make_folds(RANDOM, [0], QUALITY)
    del folds[0]["leakage"]  # a fold that does not say how many
    assert summarize(folds)["leakage"] == (
        "NOT speaker-independent: test speakers are also in training (protocol random-80-20)"
    )


def test_published_figures_stand_only_beside_their_corpus_and_name_their_protocol() -> None:
    independent = summarize(make_folds(SPEAKER, [0, 1], QUALITY))
    table = ablation_table(independent, "iemocap")
    assert "| fusion, published (random-80-20, shares speakers) | 72.43 | 73.22 |" in table
    assert "Not comparable: the published figures are of random-80-20" in table
    assert "72.43" not in ablation_table(independent, "emodb4") and "published" not in text_report(independent, "t")
    same = ablation_table(summarize(make_folds(RANDOM, [0], QUALITY)), "iemocap")
    assert "72.43" in same and "Not comparable" not in same and "Same protocol as the published figures" in same
    renamed = {**summarize(make_folds(RANDOM, [0], QUALITY)), "labels": ["a", "b", "c", "d"]}
    assert "Not comparable: the published figures are of the classes" in ablation_table(renamed, "iemocap")


def test_the_table_is_markdown_with_a_row_per_model() -> None:
    summary = summarize(make_folds(SPEAKER, [0, 1], QUALITY))
    rows = [line for line in ablation_table(summary, "iemocap").splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert [row.split(" |")[0] for row in rows] == [
        "| model", "|---|---|---|---|---|---|---|---|", "| MDSCM", "| AVDAL", "| fusion",
        "| fusion, published (random-80-20, shares speakers)",
    ]  # fmt: skip
    row = summary["models"]["fusion"]
    assert f"| {row['wa']['mean']:.2f} ± {row['wa']['std']:.2f} |" in rows[4]
    assert f"| {row['interval'][0]:.1f} .. {row['interval'][1]:.1f} |" in rows[4]
    assert "±" not in ablation_table(summarize(make_folds(SPEAKER, [0], QUALITY)), "iemocap")


def test_the_page_for_a_terminal() -> None:
    summary = summarize(make_folds(SESSION, [0, 1], QUALITY))
    text = text_report(summary, "IEMOCAP-like")
    assert text.startswith(
        "IEMOCAP-like\nprotocol leave-one-session-out, 2 seeds (± is their standard deviation); "
        "95 % interval of the UA over 10 speakers\n"
    )
    assert text.count("seed 1 ") == 3 and text.count("session-Ses03") == 3
    assert re.search(r"fusion less AVDAL +\+\d", text) and "tell them apart" not in text
    alike = make_folds(SESSION, [0, 1], {"mdscm": 0.6})
    for fold in alike:
        fold["models"]["fusion"] = fold["models"]["mdscm"]
    assert re.search(r"fusion less MDSCM .*, which does not tell them apart", text_report(summarize(alike), "t"))
    assert max(map(len, text.splitlines())) <= 120
