"""Results of evaluation as plain data: one file per fold, and their summary.

A fold is the test of one split (``protocols.Split``) by the models that were trained for it:
    {"protocol", "seed", "name", "test_of", "validation_of", "shares_speakers",  as in the split
     "leakage":    the sentence of ``leakage_label`` (empty where speakers are not shared),
     "labels":     the classes,
     "notes":      sentences about labels that another corpus' labels count as (may be missing),
     "keys", "speakers", "truth":  of each tested utterance,
     "models":     model -> [[probability of each class] of each utterance],
     "validation_ua":  model -> share,
     "epochs":     stage -> the epoch that was kept,
     "precisions": model -> precision -> probabilities as in "models"; the last two where they were kept}
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

from avser_fast.inference.convert import agreement
from avser_fast.inference.whole_files import write_bytes

from .data.corpus import Utterance
from .metrics import (
    bootstrap_interval,
    confusion_matrix,
    paired_difference,
    recalls,
    unweighted_accuracy,
    weighted_accuracy,
)
from .protocols import Split, leakage_label

#: Models in the order of tables, and what they are called there.
MODELS = {
    "mdscm": "MDSCM",
    "convolutions": "MDSCM, its convolutions alone",
    "statistics": "MDSCM, its statistics path alone",
    "avdal": "AVDAL",
    "fusion": "fusion",
}

#: From this many tested speakers on the bootstrap draws speakers, below it utterances.
MIN_SPEAKERS = 8
LEVEL, SAMPLES = 0.95, 2000

_FIELDS = {
    "protocol": str, "seed": int, "name": str, "test_of": str, "validation_of": str, "shares_speakers": bool,
    "labels": list, "keys": list, "speakers": list, "truth": list, "models": dict, "validation_ua": dict,
}  # fmt: skip

Fold = dict[str, Any]


def fold_result(
    split: Split,
    utterances: Sequence[Utterance],
    labels: Sequence[str],
    models: Mapping[str, Any],
    validation_ua: Mapping[str, float],
    *,
    target: Sequence[Utterance] | None = None,
    epochs: Mapping[str, int] | None = None,
    precisions: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> Fold:
    """A fold out of a split and ``models``: name -> (tested, classes) probabilities in the order of ``split.test``.

    ``utterances`` are those of the split; ``target`` those that are tested, where they are of another corpus.
    """

    def rounded(tables: Mapping[str, Any]) -> dict[str, list[list[float]]]:
        return {name: [[round(float(p), 6) for p in row] for row in rows] for name, rows in tables.items()}

    tested = [(utterances if target is None else target)[i] for i in split.test]
    fold: Fold = {
        "protocol": split.protocol,
        "seed": split.seed,
        "name": split.name,
        "test_of": split.test_of,
        "validation_of": split.validation_of,
        "shares_speakers": split.shares_speakers,
        "leakage": leakage_label(split, utterances),
        "labels": list(labels),
        "notes": list(notes),
        "keys": [u.key for u in tested],
        "speakers": [u.speaker for u in tested],
        "truth": [u.label for u in tested],
        "models": rounded(models),
        "validation_ua": {name: float(value) for name, value in validation_ua.items()},
        "epochs": dict(epochs or {}),
        "precisions": {model: rounded(tables) for model, tables in (precisions or {}).items()},
    }
    check_fold(fold, f"fold {split.name}, seed {split.seed}")
    return fold


def fold_path(folder: Path, name: str, seed: int) -> Path:
    """File of a fold; characters that a file name may not have are percent-encoded."""
    return Path(folder) / f"{quote(name, safe='')}-seed{seed}.json"


def write_fold(fold: Fold, folder: Path) -> Path:
    """Write a fold to its file in ``folder``, which is made where it is missing; whole or not at all."""
    path = fold_path(folder, fold["name"], fold["seed"])
    check_fold(fold, str(path))
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
        check_fold(fold, str(path))
        folds.append(fold)
    return sorted(folds, key=lambda fold: (fold["seed"], fold["name"]))


def check_fold(fold: Any, where: str) -> None:
    """ValueError, naming the fold and what is wrong with it."""
    if not isinstance(fold, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(fold).__name__}")
    for field, kind in _FIELDS.items():
        if not isinstance(fold.get(field), kind):
            raise ValueError(f"{where}: expected {field} to be a {kind.__name__}, got {fold.get(field)!r:.40}")
    size, classes = len(fold["keys"]), len(fold["labels"])
    if not size or not fold["models"]:
        raise ValueError(f"{where}: expected tested utterances and models, got {size} and {len(fold['models'])}")
    tables = dict(fold["models"])
    for model, entries in fold.get("precisions", {}).items():
        tables.update({f"{model} in {precision}": rows for precision, rows in entries.items()})
    for field, values in (("speakers", fold["speakers"]), ("truth", fold["truth"]), *tables.items()):
        if len(values) != size:
            raise ValueError(f"{where}: expected {field} of {size} utterances, got {len(values)}")
    for name, rows in tables.items():
        try:
            table = np.asarray(rows, dtype=np.float64)
        except (TypeError, ValueError):
            table = np.empty(0)
        if table.shape != (size, classes) or not np.isfinite(table).all():
            raise ValueError(f"{where}: expected {name} to have {classes} finite probabilities per utterance")
    wrong = [label for label in fold["truth"] if type(label) is not int or not 0 <= label < classes]
    if wrong:
        raise ValueError(f"{where}: expected truths from 0 to {classes - 1}, got {wrong[0]!r}")


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


def _one_evaluation(folds: Sequence[Fold]) -> None:
    """ValueError where folds do not belong together."""
    if not folds:
        raise ValueError("evaluation: expected at least one fold, got none")
    labels = folds[0]["labels"]
    for fold in folds:
        where = f"fold {fold.get('name')}, seed {fold.get('seed')}"
        check_fold(fold, where)
        if fold["labels"] != labels:
            raise ValueError(f"{where}: expected the classes {', '.join(labels)}, got {', '.join(fold['labels'])}")
    protocols = sorted({fold["protocol"] for fold in folds})
    if len(protocols) > 1:
        raise ValueError(f"evaluation: expected folds of one protocol, got {', '.join(protocols)}")
    for seed in {fold["seed"] for fold in folds}:
        seen: set[str] = set()
        for key in _of([fold for fold in folds if fold["seed"] == seed], "keys"):
            if key in seen:
                raise ValueError(f"seed {seed}: expected every utterance to be tested once, got {key} twice")
            seen.add(key)


def summarize(folds: Sequence[Fold], expected: Iterable[Split] = ()) -> dict[str, Any]:
    """What an evaluation says, as plain data; rates in percent, differences in percentage points.

    ``leakage``       the sentence that every output carries, empty where no speaker is shared
    ``notes``         how labels of another corpus were counted
    ``missing``       folds of ``expected``, or that another seed has, which are not there; models that a fold lacks
    ``bootstrap``     what it draws (``over``: speakers, from ``MIN_SPEAKERS`` on, or utterances), of how many
    ``models``        per model: ``wa`` and ``ua`` (mean, std over the seeds' pooled rates), ``interval`` of the UA,
                      ``per_seed``, ``per_fold`` (its seeds pooled), ``recall`` per class and ``confusion``, seeds added
                      up, rows the truth; ``validation_ua``, the mean, None where it is not there; ``precisions``, what
                      each precision makes of it, as a card says it, over the seeds that were measured whole
    ``epochs``        per stage: the epochs that were kept and their ``median``
    ``differences``   of every two models: UA of ``model`` less that of ``than`` on the folds that both have, and its
                      ``interval``, on the same draws

    An interval adds the seeds up, which is their mean where all seeds test the same utterances; a drawn utterance or
    speaker comes with all its seeds.
    """
    _one_evaluation(folds)
    folds = sorted(folds, key=lambda fold: (fold["seed"], fold["name"]))
    labels = folds[0]["labels"]
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
        "labels": labels,
        "seeds": seeds,
        "folds": names,
        "missing": missing,
        "leakage": _leakage(folds),
        "notes": list(dict.fromkeys(note for fold in folds for note in fold.get("notes", []))),
        "bootstrap": {
            "over": "speakers" if over == "speakers" else "utterances",
            "count": len(set(_of(folds, over))),
            "level": LEVEL,
            "samples": SAMPLES,
        },
        "models": {m: _model([f for f in folds if m in f["models"]], m, classes, over) for m in models},
        "differences": [],
        "epochs": _epochs(folds),
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


def _epochs(folds: Sequence[Fold]) -> dict[str, dict[str, Any]]:
    kept: dict[str, list[int]] = {}
    for fold in folds:
        for stage, epoch in fold.get("epochs", {}).items():
            kept.setdefault(stage, []).append(epoch)
    return {stage: {"kept": epochs, "median": int(np.median(epochs))} for stage, epochs in kept.items()}


def fold_rates(fold: Fold, model: str) -> dict[str, Any]:
    """``utterances``, ``wa`` and ``ua`` of one fold."""
    return _rates(_matrix([fold], model, len(fold["labels"])))


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
        "precisions": _precisions(folds, model, classes),
    }


def _precisions(folds: Sequence[Fold], model: str, classes: int) -> dict[str, dict[str, Any]]:
    """Agreement with float32 and UA of each precision, over the seeds of which every fold was scored in it."""
    found = {}
    for name in dict.fromkeys(p for fold in folds for p in fold.get("precisions", {}).get(model, {})):
        lacking = {fold["seed"] for fold in folds if name not in fold.get("precisions", {}).get(model, {})}
        whole = [fold for fold in folds if fold["seed"] not in lacking]
        if not whole:
            continue
        low = [{**fold, "models": {model: fold["precisions"][model][name]}} for fold in whole]
        seeds = sorted({fold["seed"] for fold in whole})

        def ua(some: Sequence[Fold], seeds: Sequence[int] = seeds) -> float | None:
            each = [_rates(_matrix([f for f in some if f["seed"] == s], model, classes))["ua"] for s in seeds]
            return _mean(each)["mean"]

        rows = [np.array([row for fold in some for row in fold["models"][model]]) for some in (whole, low)]
        rates = {"ua": ua(low), "float32_ua": ua(whole)}
        found[name] = {**agreement(*rows), "protocol": folds[0]["protocol"], "seeds": seeds, **rates}
    return found
