"""What a run's folder holds beside its folds: settings, logged steps and epochs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from avser_fast.inference.whole_files import write_bytes

from .settings import STAGES

PARTS = (
    "settings.json",
    "environment.json",
    "log.jsonl",
    "epochs.jsonl",
    "embeddings.npz",
    "validation.json",
    "evaluation",
)
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


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, its keys joined by dots."""
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            flat.update(flatten(entry, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = entry
    return flat


def write_json(value: Any, path: Path) -> None:
    """Write ``path`` whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
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
    logged, scored = read_lines(log), read_lines(epochs)
    by_stage: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for which, rows in enumerate((logged, scored)):
        for row in rows:
            by_stage.setdefault(str(row.get("stage") or default), ([], []))[which].append(row)
    known = {name + mark: place for place, name in enumerate(STAGES) for mark in ("", "-refit")}
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
