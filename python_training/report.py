"""What a cross-validation says: per fold, per seed, pooled, and how much the seed matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from .metrics import confusion_matrix, unweighted_accuracy, weighted_accuracy


def read_folds(folder: Path) -> list[dict[str, Any]]:
    """The results of all finished folds in ``folder``, sorted by seed and test speaker."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("seed*-speaker*.json"))]
    if not results:
        raise ValueError(f"{folder}: expected finished folds (seed*-speaker*.json), got none")
    return sorted(results, key=lambda r: (r["seed"], r["test"]))


def _matrix(results: Sequence[dict[str, Any]], classes: int) -> np.ndarray:
    truth = [t for r in results for t in r["truth"]]
    predicted = [int(np.argmax(p)) for r in results for p in r["probabilities"]]
    return confusion_matrix(truth, predicted, classes)


def _percent(value: float) -> float:
    return round(100.0 * value, 2)


def _rates(results: Sequence[dict[str, Any]], classes: int) -> dict[str, float]:
    matrix = _matrix(results, classes)
    return {"wa": _percent(weighted_accuracy(matrix)), "ua": _percent(unweighted_accuracy(matrix))}


def summarize(results: Sequence[dict[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """Pooled WA and UA in percent: per seed, per test speaker (all seeds pooled), mean and spread over seeds.

    ``spread`` is (smallest, largest) over the seeds, ``std`` the sample standard deviation (None for one seed).
    ``confusion`` sums the seeds; rows are the truth.
    """
    classes = len(labels)
    seeds = sorted({r["seed"] for r in results})
    speakers = sorted({r["test"] for r in results})
    missing = [f"seed {s}, speaker {t}" for s in seeds for t in speakers
               if not any(r["seed"] == s and r["test"] == t for r in results)]  # fmt: skip
    per_seed = {str(s): _rates([r for r in results if r["seed"] == s], classes) for s in seeds}
    summary: dict[str, Any] = {
        "protocol": "leave one speaker out; one further speaker of the training folds picks the epoch",
        "labels": list(labels),
        "seeds": seeds,
        "missing": missing,
        "per_seed": per_seed,
        "per_speaker": {t: _rates([r for r in results if r["test"] == t], classes) for t in speakers},
        "validation_ua": _percent(float(np.mean([r["validation_ua"] for r in results]))),
        "epochs": {"picked": [r["epoch"] for r in results], "median": int(np.median([r["epoch"] for r in results]))},
        "confusion": _matrix(results, classes).tolist(),
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


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """Several cross-validations side by side, and what choosing among them by validation speakers alone would give.

    For each fold (seed, test speaker) ``nested`` takes the run whose validation speaker, averaged over the seeds, was
    recognised best, and pools those predictions: the rate of the whole procedure, choice included.
    """
    runs = {Path(folder).name: read_folds(folder) for folder in folders}
    labels = json.loads((Path(folders[0]) / "settings.json").read_text(encoding="utf-8"))["labels"]
    rows = {name: summarize(results, labels) for name, results in runs.items()}
    seeds = sorted(set.intersection(*({r["seed"] for r in results} for results in runs.values())))
    speakers = sorted(set.intersection(*({r["test"] for r in results} for results in runs.values())))
    nested = []
    for test in speakers:
        def validation(name: str, speaker: str = test) -> float:
            return float(np.mean([r["validation_ua"] for r in runs[name] if r["test"] == speaker and r["seed"] in seeds]))

        best = max(runs, key=validation)
        nested += [r for r in runs[best] if r["test"] == test and r["seed"] in seeds]
    return {"runs": rows, "nested": summarize(nested, labels) if nested else None}


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
            f"| {name} | {len(row['seeds'])} | {row['wa']['mean']:.1f} | {row['ua']['mean']:.1f} | {each} | {row['validation_ua']:.1f} |"
        )
    return "\n".join(lines)
