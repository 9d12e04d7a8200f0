"""Several evaluations side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avser_fast.inference.whole_files import write_bytes

from .evaluation import Fold, check_fold, read_folds, summarize
from .run_folder import flatten, read_object


@dataclass(frozen=True)
class Run:
    """A finished (or partly finished) evaluation: what was asked for, of what it was made, its folds."""

    name: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    folds: list[Fold]


def read_run(path: Path) -> Run:
    """A run from the folder of ``evaluate``, or from the one file that ``collect`` made of it."""
    path = Path(path)
    if path.is_file():
        data = read_object(path) or {}
        if not isinstance(data.get("folds"), list) or not data["folds"]:
            raise ValueError(f"{path}: expected a file of collected folds, got one without")
        for fold in data["folds"]:
            check_fold(fold, str(path))
        return Run(path.stem, data["settings"], data["environment"], data["folds"])
    folds = read_folds(path / "evaluation")
    if not folds:
        raise ValueError(f"{path}: expected finished folds in evaluation/, got none")
    settings, environment = (read_object(path / f"{name}.json") or {} for name in ("settings", "environment"))
    return Run(path.name, settings, environment, folds)


def collect(folder: Path, out: Path) -> None:
    """Write a run as one file: settings, environment, summary and, a line each, its folds."""
    run = read_run(folder)
    head = {"settings": run.settings, "environment": run.environment, "summary": summarize(run.folds)}
    rows = ",\n  ".join(json.dumps(fold) for fold in run.folds)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, (json.dumps(head)[:-1] + f', "folds": [\n  {rows}\n]}}\n').encode())


def changes(run: Run, base: Run) -> dict[str, Any]:
    """Settings of ``run`` that are not those of ``base``, by dotted name; a manifest names folders and is none."""
    own, known = flatten(run.settings), flatten(base.settings)
    own = {**{n: False for n, value in known.items() if value is True}, **own}  # `config.plain` leaves out what is off
    return {n: value for n, value in own.items() if known.get(n) != value and not n.endswith("manifest_sha256")}


def closest(run: Run, base: Run, others: Sequence[Run]) -> Run:
    """Of ``base`` and those ``others`` that change nothing in it but what ``run`` changes too, the one with the most.

    A run of another recipe (``settings["name"]``) stands beside ``base``.
    """
    made = changes(run, base)
    known = [base, *(r for r in others if r.settings["name"] == base.settings["name"] == run.settings["name"])]
    within = [r for r in known if (own := changes(r, base)).items() <= made.items() and len(own) < len(made)]
    return max(within, key=lambda r: len(changes(r, base)), default=base)


def against(run: Run, base: Run, model: str = "mdscm") -> dict[str, Any]:
    """UA of ``run`` less that of ``base`` on the seeds and folds that both have: an entry of a summary's differences.

    ValueError where they have none in common.
    """
    known = {(f["seed"], f["name"]): f for f in base.folds}
    both = [
        {**f, "models": {"base": known[f["seed"], f["name"]]["models"][model], "run": f["models"][model]}}
        for f in run.folds
        if (f["seed"], f["name"]) in known
    ]
    if not both:
        raise ValueError(f"{run.name}: expected folds that {base.name} has too, got none")
    (difference,) = summarize([{**f, "precisions": {}} for f in both])["differences"]
    return {"seeds": len({f["seed"] for f in both}), "ua": difference["ua"], "interval": difference["interval"]}


def compare(paths: Sequence[Path], model: str = "mdscm") -> dict[str, Any]:
    """Summaries of several runs by name, and what choosing among them by validation speakers alone would give.

    For each fold ``nested`` takes the run whose ``model``, averaged over the seeds, recognised the validation
    utterances best, and pools those predictions: the rate of the whole procedure, choice included.  Seeds and folds
    that some run has not finished are left out of it.
    """
    runs = {run.name: [f for f in run.folds if model in f["models"]] for run in map(read_run, paths)}
    for name, folds in runs.items():
        if not folds:
            raise ValueError(f"{name}: expected folds of the model {model}, got none")
    seeds = set.intersection(*({f["seed"] for f in folds} for folds in runs.values()))
    names = sorted(set.intersection(*({f["name"] for f in folds} for folds in runs.values())))

    def shared(run: str, name: str) -> list[Fold]:
        return [f for f in runs[run] if f["name"] == name and f["seed"] in seeds]

    def validation(run: str, name: str) -> float:
        return float(np.mean([f["validation_ua"].get(model, 0.0) for f in shared(run, name)] or [0.0]))

    chosen = [f for n in names for f in shared(max(runs, key=lambda run: validation(run, n)), n)]
    rows = {name: summarize(folds) for name, folds in runs.items()}
    return {"model": model, "runs": rows, "nested": summarize(chosen) if len(runs) > 1 and chosen else None}
