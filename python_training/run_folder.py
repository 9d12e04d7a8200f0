"""What a run's folder holds: settings, logged steps and epochs, folds and their figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import confusion_matrix, unweighted_accuracy, weighted_accuracy

PARTS = ("settings.json", "environment.json", "log.jsonl", "epochs.jsonl", "embeddings.npz", "evaluation")
STAGES = ("mdscm", "avdal", "fusion", "joint")
MODELS = {"mdscm": "MDSCM", "avdal": "AVDAL", "fusion": "Fusion"}
LOGGED = (
    "loss", "speech_loss", "face_loss", "domain_loss", "lambda", "lr",
    "speech_accuracy", "face_accuracy", "domain_accuracy", "gradient_ratio",
)  # fmt: skip
#: The gradient ratio may stand in either file: it costs two backward passes, so most runs log it once an epoch.
SCORED = ("validation_wa", "validation_ua", "validation_loss", "probe_accuracy", "gradient_ratio")
ADVERSARIAL = ("lambda", "domain_accuracy", "gradient_ratio")

Series = dict[str, tuple[np.ndarray, np.ndarray, int]]


@dataclass
class Stage:
    """What one stage has logged: per key the steps, the finite values and how many values were not finite."""

    log: Series = field(default_factory=dict)
    epochs: Series = field(default_factory=dict)
    by_step: bool = True
    warnings: list[tuple[int, float, str]] = field(default_factory=list)

    @property
    def is_adversarial(self) -> bool:
        return any(key in self.log for key in ADVERSARIAL) or "probe_accuracy" in self.epochs


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected readable UTF-8, got {error}") from error


def read_object(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line that is still being written is left out."""
    if not path.exists():
        return []
    text = _read_text(path)
    lines = text[: text.rfind("\n") + 1].split("\n")
    last = text[text.rfind("\n") + 1 :]
    try:
        lines.append(json.dumps(json.loads(last)))
    except json.JSONDecodeError:
        pass
    lines = [line for line in lines if line and not line.isspace()]
    try:
        rows = json.loads(f"[{','.join(lines)}]")  # ten times as fast as line by line
    except json.JSONDecodeError:
        rows = [_read_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}: expected a JSON object in every line, got {type(row).__name__}")
    return rows


def _read_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {number}: expected JSON, got {error}") from error


def _floats(path: Path, key: str, values: Sequence[Any]) -> np.ndarray:
    try:
        numbers = np.array(values, dtype=np.float64)
        if numbers.ndim == 1:
            return numbers
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{path}: expected a number or null as {key!r} in every line, got something else")


def _series(path: Path, rows: Sequence[dict[str, Any]], keys: Iterable[str], x_key: str) -> Series:
    """Every key that has values, over ``x_key``; of lines with one x, as a resumed run leaves them, the last."""
    x = _floats(path, x_key, [row.get(x_key) for row in rows])
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: expected a number as {x_key!r} in every line, got none in some")
    _, last = np.unique(x[::-1], return_index=True)
    last = len(x) - 1 - last
    series: Series = {}
    for name in keys:
        column = [row.get(name) for row in rows]
        there = last[[column[i] is not None for i in last.tolist()]]
        if not len(there):
            continue
        values = _floats(path, name, column)[there]
        finite = np.isfinite(values)
        series[name] = (x[there][finite], values[finite], int((~finite).sum()))
    return series


def read_stages(log: Path, epochs: Path, default: str) -> dict[str, Stage]:
    """What both files say, by stage; lines without a stage belong to ``default``."""
    logged, scored = _read_lines(log), _read_lines(epochs)
    by_stage: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for which, rows in enumerate((logged, scored)):
        for row in rows:
            by_stage.setdefault(str(row.get("stage") or default), ([], []))[which].append(row)
    known = {name: place for place, name in enumerate(STAGES)}
    stages = {}
    for name in sorted(by_stage, key=lambda s: (known.get(s, len(STAGES)), s)):
        log_rows, epoch_rows = by_stage[name]
        stage = Stage(by_step=bool(np.isfinite(_floats(epochs, "step", [row.get("step") for row in epoch_rows])).all()))
        if log_rows:
            stage.log = _series(log, log_rows, LOGGED, "step")
        if epoch_rows:
            stage.epochs = _series(epochs, epoch_rows, SCORED, "epoch")
            stage.warnings = _warnings(epochs, epoch_rows)
            if stage.by_step:
                stage.epochs["step"] = _series(epochs, epoch_rows, ["step"], "epoch")["step"]
        stages[name] = stage
    return stages


def _warnings(path: Path, rows: Sequence[dict[str, Any]]) -> list[tuple[int, float, str]]:
    """Epoch, place on the axis of steps and text of every warning."""
    found = {}
    for row in rows:
        warnings = row.get("warnings") or []
        if not isinstance(warnings, list):
            raise ValueError(f"{path}: expected a list as 'warnings', got {type(warnings).__name__}")
        epoch = int(float(row["epoch"]))
        found[epoch] = [(epoch, float(row.get("step") or 0), str(text)) for text in warnings]
    return [warning for epoch in sorted(found) for warning in found[epoch]]


def read_folds(folder: Path) -> list[dict[str, Any]]:
    """The folds of an evaluation, each checked: as many probabilities as truths, all finite, classes that exist."""
    folds = []
    for path in sorted(folder.glob("*-seed*.json")) if folder.exists() else []:
        fold = read_object(path) or {}
        needed = ("protocol", "seed", "name", "shares_speakers", "truth", "models", "labels")
        missing = [name for name in needed if name not in fold]
        if missing:
            raise ValueError(f"{path}: expected {', '.join(needed)}, got none of {', '.join(missing)}")
        if not (
            isinstance(fold["models"], dict) and isinstance(fold["truth"], list) and isinstance(fold["labels"], list)
        ):
            raise ValueError(f"{path}: expected an object as models and lists as truth and labels, got others")
        classes, truth = len(fold["labels"]), fold["truth"]
        if any(type(t) is not int or not 0 <= t < classes for t in truth):
            raise ValueError(f"{path}: expected truths from 0 to {classes - 1}, got others")
        fold["models"] = {name: value for name, value in fold["models"].items() if value is not None}
        for name, rows in fold["models"].items():
            try:
                scores = np.array(rows, dtype=np.float64).reshape(-1, classes) if rows else np.zeros((0, classes))
            except (TypeError, ValueError):
                scores = np.full((0, classes), np.nan)
            if len(scores) != len(truth) or len(rows) != len(truth) or not np.isfinite(scores).all():
                raise ValueError(
                    f"{path}: {name}: expected {classes} finite probabilities for each of {len(truth)} utterances, "
                    "got others"
                )
            fold["models"][name] = scores.argmax(1).tolist() if len(scores) else []
        folds.append({**fold, "id": path.stem.rpartition("-seed")[0]})
    for fold in folds:
        first = next(other for other in folds if other["protocol"] == fold["protocol"])
        if fold["labels"] != first["labels"]:
            raise ValueError(f"{folder}: {fold['name']}: expected the labels of {first['name']}, got others")
    return folds


def summarize(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rates in percent of the folds of one protocol, for each model: pooled per seed, their mean and sample deviation.

    ``confusion`` adds the seeds up (rows: truth), ``recall`` is its diagonal by row, None for a class that never
    occurs.  ``missing`` names folds that some seed or model lacks.
    """
    labels, seeds = folds[0]["labels"], sorted({fold["seed"] for fold in folds})
    models = [name for name in MODELS if any(name in fold["models"] for fold in folds)]
    models += sorted({name for fold in folds for name in fold["models"]} - set(models))

    def matrix(name: str, some: Sequence[dict[str, Any]]) -> np.ndarray:
        pairs = [(t, p) for fold in some if name in fold["models"] for t, p in zip(fold["truth"], fold["models"][name])]
        return confusion_matrix([t for t, _ in pairs], [p for _, p in pairs], len(labels))

    def rates(counts: np.ndarray) -> dict[str, float | None]:
        some = counts.sum() > 0
        return {
            "wa": 100 * weighted_accuracy(counts) if some else None,
            "ua": 100 * unweighted_accuracy(counts) if some else None,
            "utterances": int(counts.sum()),
        }

    summary: dict[str, Any] = {
        "protocol": folds[0]["protocol"],
        "labels": labels,
        "seeds": seeds,
        "shared": sum(bool(fold["shares_speakers"]) for fold in folds),
        "models": {},
        "folds": [
            {**fold, "rates": {name: rates(matrix(name, [fold])) for name in models if name in fold["models"]}}
            for fold in sorted(folds, key=lambda fold: (fold["seed"], str(fold["name"])))
        ],
    }
    ids = sorted({fold["id"] for fold in folds})
    there = {(fold["id"], fold["seed"]): fold["models"] for fold in folds}
    summary["missing"] = [
        f"{i}, seed {s}" for i in ids for s in seeds if any(name not in there.get((i, s), {}) for name in models)
    ]
    for name in models:
        counts = matrix(name, folds)
        per_seed = {s: rates(matrix(name, [fold for fold in folds if fold["seed"] == s])) for s in seeds}
        present = counts.sum(1)
        entry: dict[str, Any] = {
            "per_seed": per_seed,
            "confusion": counts.tolist(),
            "recall": [100 * counts[k, k] / present[k] if present[k] else None for k in range(len(labels))],
        }
        for rate in ("wa", "ua"):
            values = [value for r in per_seed.values() if (value := r[rate]) is not None]
            entry[rate] = {
                "mean": float(np.mean(values)) if values else None,
                "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            }
        summary["models"][name] = entry
    return summary
