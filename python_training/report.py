"""What a cross-validation says: per fold, per seed, pooled, and how much the seed matters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avser_fast.inference.weights import write_bytes

from .metrics import confusion_matrix, unweighted_accuracy, weighted_accuracy
from .precisions import compare_precisions, measured

PROTOCOL = "leave one speaker out; one further speaker of the training folds picks the epoch"


@dataclass(frozen=True)
class Run:
    """A finished (or partly finished) cross-validation: its settings, class names and the results of its folds."""

    name: str
    labels: list[str]
    settings: dict[str, Any]
    folds: list[dict[str, Any]]


def read_run(path: Path) -> Run:
    """A run from its folder, or from the one file that ``collect`` made of it."""
    path = Path(path)
    if path.is_file():
        data = json.loads(path.read_text(encoding="utf-8"))
        return Run(path.stem, data["labels"], data["settings"], data["folds"])
    files = sorted(path.glob("seed*-speaker*.json"))
    if not files:
        raise ValueError(f"{path}: expected finished folds (seed*-speaker*.json), got none")
    folds = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    mark = json.loads((path / "settings.json").read_text(encoding="utf-8"))
    ordered = sorted(folds, key=lambda r: (r["seed"], r["test"]))
    return Run(path.name, mark["labels"], mark["settings"], ordered)


def collect(folder: Path, out: Path) -> None:
    """Write a run as one file: settings and, fold by fold, the probabilities of every utterance."""
    run = read_run(folder)
    folds = [{key: value for key, value in fold.items() if key != "history"} for fold in run.folds]
    head = {"labels": run.labels, "settings": run.settings}
    rows = ",\n  ".join(json.dumps(fold) for fold in folds)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(head)[:-1] + f', "folds": [\n  {rows}\n]}}\n'
    write_bytes(out, text.encode())


def _matrix(results: Sequence[dict[str, Any]], classes: int) -> np.ndarray:
    truth = [t for r in results for t in r["truth"]]
    predicted = [int(np.argmax(p)) for r in results for p in r["probabilities"]]
    return confusion_matrix(truth, predicted, classes)


def _percent(value: float) -> float:
    return round(100.0 * value, 2)


def _rates(results: Sequence[dict[str, Any]], classes: int) -> dict[str, float]:
    matrix = _matrix(results, classes)
    return {"wa": _percent(weighted_accuracy(matrix)), "ua": _percent(unweighted_accuracy(matrix))}


def _of_path(result: dict[str, Any], path: str) -> dict[str, Any]:
    return {**result, "probabilities": result["paths"][path]}


def summarize(results: Sequence[dict[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """Pooled WA and UA in percent: per seed, per test speaker (all seeds pooled), mean and spread over seeds.

    ``spread`` is (smallest, largest) over the seeds, ``std`` the sample standard deviation (None for one seed).
    ``confusion`` sums the seeds; rows are the truth.  ``precisions`` is what the card says of bf16 and int8, None for
    runs that did not measure them.  ``paths`` has the UA per seed of each path of a network answering alone, where the
    network has two.
    """
    classes = len(labels)
    seeds = sorted({r["seed"] for r in results})
    speakers = sorted({r["test"] for r in results})
    missing = [f"seed {s}, speaker {t}" for s in seeds for t in speakers
               if not any(r["seed"] == s and r["test"] == t for r in results)]  # fmt: skip
    per_seed = {str(s): _rates([r for r in results if r["seed"] == s], classes) for s in seeds}
    summary: dict[str, Any] = {
        "protocol": PROTOCOL,
        "labels": list(labels),
        "seeds": seeds,
        "missing": missing,
        "per_seed": per_seed,
        "per_speaker": {t: _rates([r for r in results if r["test"] == t], classes) for t in speakers},
        "validation_ua": _percent(float(np.mean([r["validation_ua"] for r in results]))),
        "epochs": {"picked": [r["epoch"] for r in results], "median": int(np.median([r["epoch"] for r in results]))},
        "confusion": _matrix(results, classes).tolist(),
        "precisions": compare_precisions(results, PROTOCOL),
    }
    scored = measured(results)

    def mean_ua(folds: Sequence[dict[str, Any]]) -> float:
        each = [_rates([r for r in folds if r["seed"] == s], classes)["ua"] for s in sorted({r["seed"] for r in folds})]
        return round(float(np.mean(each)), 2)

    for name, entry in (summary["precisions"] or {}).items():
        entry["ua"] = mean_ua([{**r, "probabilities": r["precisions"][name]} for r in scored])
        entry["float32_ua"] = mean_ua(scored)
    if results and all("paths" in r for r in results):
        summary["paths"] = {
            name: {str(s): _rates([_of_path(r, name) for r in results if r["seed"] == s], classes)["ua"] for s in seeds}
            for name in results[0]["paths"]
        }
    for rate in ("wa", "ua"):
        values = [per_seed[str(s)][rate] for s in seeds]
        summary[rate] = {
            "mean": round(float(np.mean(values)), 2),
            "std": round(float(np.std(values, ddof=1)), 2) if len(values) > 1 else None,
            "spread": [min(values), max(values)],
        }
    return summary


def text_report(summary: dict[str, Any], title: str) -> str:
    """The summary as a page of text for a terminal."""
    labels = summary["labels"]
    lines = [title, summary["protocol"], ""]
    for seed in summary["seeds"]:
        rates = summary["per_seed"][str(seed)]
        lines.append(f"seed {seed:<3}        WA {rates['wa']:5.1f} %   UA {rates['ua']:5.1f} %")
    wa, ua = summary["wa"], summary["ua"]
    if len(summary["seeds"]) > 1:
        lines.append(
            f"mean of seeds   WA {wa['mean']:5.1f} %   UA {ua['mean']:5.1f} %"
            f"   (UA from {ua['spread'][0]:.1f} to {ua['spread'][1]:.1f}, std {ua['std']:.1f})"
        )
    for name, rates in summary.get("paths", {}).items():
        each = " / ".join(f"{value:.1f}" for value in rates.values())
        lines.append(f"{name + ' only':<16}UA {np.mean(list(rates.values())):5.1f} %   ({each})")
    lines += ["", "speaker   WA      UA"]
    for speaker, rates in summary["per_speaker"].items():
        lines.append(f"{speaker:<8} {rates['wa']:5.1f} % {rates['ua']:5.1f} %")
    lines += ["", "rows: truth, columns: answer" + (", all seeds added up" if len(summary["seeds"]) > 1 else "")]
    lines.append(" " * 6 + "".join(f"{label:>6}" for label in labels))
    for label, row in zip(labels, summary["confusion"]):
        lines.append(f"{label:<6}" + "".join(f"{count:>6}" for count in row))
    if summary["missing"]:
        lines += ["", f"not run yet: {'; '.join(summary['missing'])}"]
    return "\n".join(lines)


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """Several runs side by side, and what choosing among them by validation speakers alone would give.

    For each test speaker ``nested`` takes the run whose validation speaker, averaged over the seeds, was recognised
    best, and pools those predictions: the rate of the whole procedure, choice included.  Seeds and speakers that a run
    has not finished are left out of it.
    """
    runs = {run.name: run for run in map(read_run, paths)}
    rows = {name: summarize(run.folds, run.labels) for name, run in runs.items()}
    seeds = set.intersection(*({f["seed"] for f in run.folds} for run in runs.values()))
    speakers = sorted(set.intersection(*({f["test"] for f in run.folds} for run in runs.values())))

    def shared(name: str, speaker: str) -> list[dict[str, Any]]:
        return [f for f in runs[name].folds if f["test"] == speaker and f["seed"] in seeds]

    def validation(name: str, speaker: str) -> float:
        return float(np.mean([f["validation_ua"] for f in shared(name, speaker)] or [0.0]))

    chosen = [f for s in speakers for f in shared(max(runs, key=lambda name: validation(name, s)), s)]
    labels = next(iter(runs.values())).labels
    return {"runs": rows, "nested": summarize(chosen, labels) if len(runs) > 1 and chosen else None}


def compare_table(comparison: dict[str, Any]) -> str:
    """``compare`` as a Markdown table."""
    lines = [
        "| settings | seeds | WA % | UA % | UA of each seed | UA of validation speakers |",
        "|---|---|---|---|---|---|",
    ]
    rows = dict(comparison["runs"])
    if comparison["nested"]:
        rows["*chosen per fold by its validation speaker*"] = comparison["nested"]
    for name, row in rows.items():
        each = " / ".join(f"{row['per_seed'][str(s)]['ua']:.1f}" for s in row["seeds"])
        lines.append(
            f"| {name} | {len(row['seeds'])} | {row['wa']['mean']:.1f} | {row['ua']['mean']:.1f} | {each} "
            f"| {row['validation_ua']:.1f} |"
        )
    return "\n".join(lines)
