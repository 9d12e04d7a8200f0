"""Results of evaluation as plain data: one file per fold, their summary, and what it says beside the published figures.

A fold is the test of one split (``protocols.Split``) by the models that were trained for it:
    {"protocol", "seed", "name", "test_of", "validation_of", "shares_speakers",  as in the split
     "leakage":    the sentence of ``leakage_label`` (empty where speakers are not shared),
     "keys", "speakers", "truth":  of each tested utterance,
     "models":     model -> [[probability of each class] of each utterance],
     "validation_ua":  model -> share}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from avser_fast.inference.weights import write_bytes

from .data.corpus import LABELS, Utterance
from .metrics import (
    bootstrap_interval,
    confusion_matrix,
    paired_difference,
    recalls,
    unweighted_accuracy,
    weighted_accuracy,
)
from .protocols import RANDOM, Split, leakage_label

#: Models in the order of tables, and what they are called there.
MODELS = {"mdscm": "MDSCM", "avdal": "AVDAL", "fusion": "fusion"}

#: Figures in percent of Wei et al., "Audio-Visual Domain Adaptation Feature Fusion for Speech Emotion Recognition",
#: Interspeech 2022 (abstract): four classes of IEMOCAP.  None: not known.
PUBLISHED: dict[str, dict[str, float] | None] = {"mdscm": None, "avdal": None, "fusion": {"wa": 72.43, "ua": 73.22}}
PUBLISHED_CORPUS = "iemocap"
#: The split of the code that was released with the paper; its training scripts print the best epoch on the test set.
PUBLISHED_PROTOCOL = RANDOM

#: From this many tested speakers on the bootstrap draws speakers, below it utterances.
MIN_SPEAKERS = 8
LEVEL, SAMPLES = 0.95, 2000

_FIELDS = {
    "protocol": str, "seed": int, "name": str, "test_of": str, "validation_of": str, "shares_speakers": bool,
    "keys": list, "speakers": list, "truth": list, "models": dict, "validation_ua": dict,
}  # fmt: skip

Fold = dict[str, Any]


def fold_result(
    split: Split,
    utterances: Sequence[Utterance],
    models: Mapping[str, Any],
    validation_ua: Mapping[str, float],
    *,
    target: Sequence[Utterance] | None = None,
) -> Fold:
    """A fold out of a split and ``models``: name -> (tested, classes) probabilities in the order of ``split.test``.

    ``utterances`` are those of the split; ``target`` those that are tested, where they are of another corpus.
    """
    tested = [(utterances if target is None else target)[i] for i in split.test]
    fold: Fold = {
        "protocol": split.protocol,
        "seed": split.seed,
        "name": split.name,
        "test_of": split.test_of,
        "validation_of": split.validation_of,
        "shares_speakers": split.shares_speakers,
        "leakage": leakage_label(split, utterances),
        "keys": [u.key for u in tested],
        "speakers": [u.speaker for u in tested],
        "truth": [u.label for u in tested],
        "models": {name: [[round(float(p), 6) for p in row] for row in rows] for name, rows in models.items()},
        "validation_ua": {name: float(value) for name, value in validation_ua.items()},
    }
    _check(fold, f"fold {split.name}, seed {split.seed}")
    return fold


def fold_path(folder: Path, name: str, seed: int) -> Path:
    """File of a fold; characters that a file name may not have are percent-encoded."""
    return Path(folder) / f"{quote(name, safe='')}-seed{seed}.json"


def write_fold(fold: Fold, folder: Path) -> Path:
    """Write a fold to its file in ``folder``, which is made where it is missing; whole or not at all."""
    path = fold_path(folder, fold["name"], fold["seed"])
    _check(fold, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(fold, allow_nan=False) + "\n").encode())
    return path


def read_folds(folder: Path) -> list[Fold]:
    """Every fold of a folder, by seed and name.  ValueError naming a file that is no fold; empty without any."""
    folds = []
    for path in Path(folder).glob("*-seed*.json"):
        if not re.fullmatch(r".+-seed-?\d+\.json", path.name) or path.name.startswith("."):
            continue
        try:
            fold = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected a fold written by evaluation, got no JSON ({error})") from error
        _check(fold, str(path))
        folds.append(fold)
    return sorted(folds, key=lambda fold: (fold["seed"], fold["name"]))


def _check(fold: Any, where: str) -> None:
    """ValueError, naming the fold and what is wrong with it."""
    if not isinstance(fold, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(fold).__name__}")
    for field, kind in _FIELDS.items():
        if not isinstance(fold.get(field), kind):
            raise ValueError(f"{where}: expected {field} to be a {kind.__name__}, got {fold.get(field)!r:.40}")
    size = len(fold["keys"])
    if not size or not fold["models"]:
        raise ValueError(f"{where}: expected tested utterances and models, got {size} and {len(fold['models'])}")
    for field, values in (("speakers", fold["speakers"]), ("truth", fold["truth"]), *fold["models"].items()):
        if len(values) != size:
            raise ValueError(f"{where}: expected {field} of {size} utterances, got {len(values)}")
    classes = set()
    for name, rows in fold["models"].items():
        try:
            table = np.asarray(rows, dtype=np.float64)
        except (TypeError, ValueError):
            table = np.empty(0)
        if table.ndim != 2 or not np.isfinite(table).all():
            raise ValueError(f"{where}: expected {name} to have a row of finite probabilities per utterance")
        classes.add(table.shape[1])
    if len(classes) > 1:
        raise ValueError(f"{where}: expected models with the same number of classes, got {sorted(classes)}")
    wrong = [label for label in fold["truth"] if not isinstance(label, int) or not 0 <= label < min(classes)]
    if wrong:
        raise ValueError(f"{where}: expected truths from 0 to {min(classes) - 1}, got {wrong[0]!r}")


def _percent(value: float) -> float:
    return round(100.0 * value, 2)


def _predicted(folds: Iterable[Fold], model: str) -> list[int]:
    return [int(np.argmax(row)) for fold in folds for row in fold["models"][model]]


def _of(folds: Iterable[Fold], field: str) -> list[Any]:
    return [value for fold in folds for value in fold[field]]


def _matrix(folds: Sequence[Fold], model: str, classes: int) -> np.ndarray:
    return confusion_matrix(_of(folds, "truth"), _predicted(folds, model), classes)


def _rates(matrix: np.ndarray) -> dict[str, Any]:
    return {
        "utterances": int(matrix.sum()),
        "wa": _percent(weighted_accuracy(matrix)),
        "ua": _percent(unweighted_accuracy(matrix)),
    }


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    """Mean over seeds and sample standard deviation, None for one seed."""
    std = round(float(np.std(values, ddof=1)), 2) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), 2), "std": std}


def _drawn_over(folds: Sequence[Fold]) -> str:
    """What the bootstrap draws."""
    speakers = _of(folds, "speakers")
    return "speakers" if all(speakers) and len(set(speakers)) >= MIN_SPEAKERS else "keys"


def _one_evaluation(folds: Sequence[Fold], labels: Sequence[str]) -> None:
    """ValueError where folds do not belong together."""
    if not folds:
        raise ValueError("evaluation: expected at least one fold, got none")
    for fold in folds:
        where = f"fold {fold.get('name')}, seed {fold.get('seed')}"
        _check(fold, where)
        width = len(next(iter(fold["models"].values()))[0])
        if width != len(labels):
            raise ValueError(f"{where}: expected probabilities of {len(labels)} classes, got {width}")
    protocols = sorted({fold["protocol"] for fold in folds})
    if len(protocols) > 1:
        raise ValueError(f"evaluation: expected folds of one protocol, got {', '.join(protocols)}")
    for seed in {fold["seed"] for fold in folds}:
        seen: set[str] = set()
        for key in _of([fold for fold in folds if fold["seed"] == seed], "keys"):
            if key in seen:
                raise ValueError(f"seed {seed}: expected every utterance to be tested once, got {key} twice")
            seen.add(key)


def summarize(folds: Sequence[Fold], labels: Sequence[str], expected: Iterable[Split] = ()) -> dict[str, Any]:
    """What an evaluation says, as plain data; rates in percent, differences in percentage points.

    ``leakage``       the sentence that every output carries, empty where no speaker is shared
    ``missing``       folds of ``expected``, or that another seed has, which are not there; models that a fold lacks
    ``bootstrap``     what it draws (``over``: speakers, from ``MIN_SPEAKERS`` on, or utterances), of how many
    ``models``        per model: ``wa`` and ``ua`` (mean, std over the seeds' pooled rates), ``interval`` of the UA,
                      ``per_seed``, ``per_fold`` (its seeds pooled), ``recall`` per class and ``confusion``, seeds added
                      up, rows the truth; ``validation_ua``, the mean, None where it is not there
    ``differences``   of every two models: UA of ``model`` less that of ``than`` on the folds that both have, and its
                      ``interval``, on the same draws

    An interval adds the seeds up, which is their mean where all seeds test the same utterances; a drawn utterance or
    speaker comes with all its seeds.
    """
    _one_evaluation(folds, labels)
    folds = sorted(folds, key=lambda fold: (fold["seed"], fold["name"]))
    classes = len(labels)
    found = {(fold["seed"], fold["name"]) for fold in folds}
    seeds = sorted({seed for seed, _ in found})
    names = sorted({name for _, name in found})
    wanted = {(s, n) for s in seeds for n in names} | {(split.seed, split.name) for split in expected}
    present = {model for fold in folds for model in fold["models"]}
    models = [m for m in MODELS if m in present] + sorted(present - set(MODELS))
    missing = [f"seed {seed}, {name}" for seed, name in sorted(wanted - found)]
    missing += [f"seed {f['seed']}, {f['name']} ({m})" for f in folds for m in models if m not in f["models"]]
    over = _drawn_over(folds)
    summary: dict[str, Any] = {
        "protocol": folds[0]["protocol"],
        "labels": list(labels),
        "seeds": seeds,
        "folds": names,
        "missing": missing,
        "leakage": _leakage(folds),
        "bootstrap": {
            "over": "speakers" if over == "speakers" else "utterances",
            "count": len(set(_of(folds, over))),
            "level": LEVEL,
            "samples": SAMPLES,
        },
        "models": {m: _model([f for f in folds if m in f["models"]], m, classes, over) for m in models},
        "differences": [],
    }
    for than, model in combinations(models, 2):
        both = [f for f in folds if model in f["models"] and than in f["models"]]
        if both:
            a, b = _predicted(both, model), _predicted(both, than)
            difference, low, high = paired_difference(
                _of(both, "truth"), a, b, classes, _of(both, over), level=LEVEL, samples=SAMPLES
            )
            entry = {"model": model, "than": than, "ua": _percent(difference)}
            summary["differences"].append({**entry, "interval": [_percent(low), _percent(high)]})
    return summary


def _leakage(folds: Sequence[Fold]) -> str:
    """The sentences of the folds that share speakers, each once."""
    sharing = [fold for fold in folds if fold["shares_speakers"]]
    plain = "NOT speaker-independent: test speakers are also in training (protocol {protocol})"
    sentences = dict.fromkeys(fold.get("leakage") or plain.format_map(fold) for fold in sharing)
    return "; ".join(sentences)


def _model(folds: Sequence[Fold], model: str, classes: int, over: str) -> dict[str, Any]:
    seeds = sorted({fold["seed"] for fold in folds})
    per_seed = {str(s): _rates(_matrix([f for f in folds if f["seed"] == s], model, classes)) for s in seeds}
    per_fold = {}
    for name in sorted({fold["name"] for fold in folds}):
        own = [f for f in folds if f["name"] == name]
        per_fold[name] = {"test_of": own[0]["test_of"], "seeds": len(own), **_rates(_matrix(own, model, classes))}
    matrix = _matrix(folds, model, classes)
    truth, predicted = _of(folds, "truth"), _predicted(folds, model)
    low, high = bootstrap_interval(truth, predicted, classes, groups=_of(folds, over), level=LEVEL, samples=SAMPLES)
    validation = [fold["validation_ua"][model] for fold in folds if fold["validation_ua"].get(model) is not None]
    return {
        "wa": _mean([rates["wa"] for rates in per_seed.values()]),
        "ua": _mean([rates["ua"] for rates in per_seed.values()]),
        "interval": [_percent(low), _percent(high)],
        "per_seed": per_seed,
        "per_fold": per_fold,
        "recall": [None if value is None else _percent(value) for value in recalls(matrix)],
        "confusion": matrix.tolist(),
        "validation_ua": _percent(float(np.mean(validation))) if validation else None,
    }


def comparability(summary: dict[str, Any], corpus_name: str) -> str:
    """One sentence on whether the published figures may stand beside these; empty for another corpus than theirs."""
    if corpus_name != PUBLISHED_CORPUS:
        return ""
    if set(summary["labels"]) != set(LABELS):
        return (
            f"not comparable: the published figures are of the classes {', '.join(LABELS)}, these of "
            f"{', '.join(summary['labels'])}"
        )
    if summary["protocol"] != PUBLISHED_PROTOCOL:
        return (
            f"not comparable: the published figures are of {PUBLISHED_PROTOCOL}, which tests speakers that are also in "
            f"training, these of {summary['protocol']}"
        )
    return (
        f"same protocol as the published figures ({PUBLISHED_PROTOCOL}), though the order of the published list, and "
        "so its test utterances, are not known, and the released training scripts print the best epoch on the test set"
    )


def _plus_minus(rate: dict[str, float | None]) -> str:
    return f"{rate['mean']:.2f}" + ("" if rate["std"] is None else f" ± {rate['std']:.2f}")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _drawn(summary: dict[str, Any]) -> str:
    b = summary["bootstrap"]
    return f"{100 * b['level']:.0f} % interval of the UA over {b['count']} {b['over']}"


def _seeds(summary: dict[str, Any]) -> str:
    count = len(summary["seeds"])
    return "1 seed" if count == 1 else f"{count} seeds (± is their standard deviation)"


def ablation_table(summary: dict[str, Any], corpus_name: str) -> str:
    """The models of a summary as Markdown, in percent, with the published figures where the corpus is theirs.

    The sentences around the table name the protocol, shared speakers and missing folds: none is to be left out.
    """
    labels = summary["labels"]
    lines = [f"{corpus_name}, {summary['protocol']}, {_seeds(summary)}; {_drawn(summary)}."]
    if summary["leakage"]:
        lines += ["", f"**{_sentence(summary['leakage'])}**"]
    recall_heads = " | ".join(f"recall {label} %" for label in labels)
    lines += ["", f"| model | WA % | UA % | interval | {recall_heads} |", "|" + "---|" * (4 + len(labels))]
    for model, row in summary["models"].items():
        recall = " | ".join("no utterances" if value is None else f"{value:.1f}" for value in row["recall"])
        low, high = row["interval"]
        lines.append(
            f"| {MODELS.get(model, model)} | {_plus_minus(row['wa'])} | {_plus_minus(row['ua'])} "
            f"| {low:.1f} .. {high:.1f} | {recall} |"
        )
    sentence = comparability(summary, corpus_name)
    if sentence:
        for model, figures in PUBLISHED.items():
            if figures is not None:
                lines.append(
                    f"| {MODELS[model]}, published ({PUBLISHED_PROTOCOL}, shares speakers) | {figures['wa']:.2f} "
                    f"| {figures['ua']:.2f} | |" + " |" * len(labels)
                )
        lines += ["", _sentence(sentence)]
    if summary["missing"]:
        lines += ["", f"Not there yet: {'; '.join(summary['missing'])}."]
    return "\n".join(lines)


def text_report(summary: dict[str, Any], title: str) -> str:
    """The summary as a page of text for a terminal."""
    labels = summary["labels"]
    lines = [title, f"protocol {summary['protocol']}, {_seeds(summary)}; {_drawn(summary)}"]
    if summary["leakage"]:
        lines.append(summary["leakage"])
    for model, row in summary["models"].items():
        low, high = row["interval"]
        lines += ["", MODELS.get(model, model)]
        for seed, rates in row["per_seed"].items():
            lines.append(f"  seed {seed:<10} WA {rates['wa']:6.2f} %   UA {rates['ua']:6.2f} %")
        lines.append(
            f"  {'mean':<15} WA {_plus_minus(row['wa'])} %   UA {_plus_minus(row['ua'])} %   ({low:.1f} .. {high:.1f})"
        )
        width = max(16, *map(len, row["per_fold"]))
        lines.append(f"  {'fold':<{width}} utterances     WA %    UA %")
        for name, rates in row["per_fold"].items():
            lines.append(f"  {name:<{width}} {rates['utterances']:10d} {rates['wa']:8.2f} {rates['ua']:7.2f}")
        cell = max(7, *(len(label) + 2 for label in labels))
        added = ", all seeds added up" if len(summary["seeds"]) > 1 else ""
        lines.append(f"  rows: truth, columns: answer{added}")
        lines.append("  " + " " * cell + "".join(f"{label:>{cell}}" for label in labels) + "   recall")
        for label, counts, recall in zip(labels, row["confusion"], row["recall"]):
            end = "  none" if recall is None else f"{recall:6.1f} %"
            lines.append(f"  {label:<{cell}}" + "".join(f"{count:>{cell}}" for count in counts) + f"  {end}")
    if summary["differences"]:
        lines += ["", "UA against UA on the same draws, in points"]
    for d in summary["differences"]:
        low, high = d["interval"]
        clear = "" if low > 0 or high < 0 else ", which does not tell them apart"
        pair = f"{MODELS.get(d['model'], d['model'])} less {MODELS.get(d['than'], d['than'])}"
        lines.append(f"  {pair:<20} {d['ua']:+.2f} ({low:+.2f} .. {high:+.2f}){clear}")
    if summary["missing"]:
        lines += ["", f"not there yet: {'; '.join(summary['missing'])}"]
    return "\n".join(lines)
