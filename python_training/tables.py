"""What a summary of ``evaluation`` says: tables for a terminal and in Markdown, beside the published figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .data.corpus import LABELS
from .evaluation import MODELS
from .protocols import RANDOM

#: Figures in percent of Wei et al., "Audio-Visual Domain Adaptation Feature Fusion for Speech Emotion Recognition",
#: Interspeech 2022 (abstract): four classes of IEMOCAP.  None: not known.
PUBLISHED: dict[str, dict[str, float] | None] = {"mdscm": None, "avdal": None, "fusion": {"wa": 72.43, "ua": 73.22}}
PUBLISHED_CORPUS = "iemocap"
#: The split of the code that was released with the paper; its training scripts print the best epoch on the test set.
PUBLISHED_PROTOCOL = RANDOM


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
    if summary["notes"]:
        lines += ["", _sentence("; ".join(summary["notes"]))]
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
    lines += summary["notes"]
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


def precision_table(precisions: Mapping[str, Any] | None) -> str:
    """A model's ``precisions`` as a Markdown table with the seeds they hold for, or one sentence when nothing was
    measured.  The UA of float32 is that of the same seeds."""
    measured = {name: entry for name, entry in (precisions or {}).items() if "agreement" in entry}
    if not measured:
        return "bf16 and int8 were not measured under this protocol."
    lines = [
        "| precision | UA % | same decision as float32 % | largest difference of a score |",
        "|---|---|---|---|",
    ]
    first = next(iter(measured.values()))
    lines.append(f"| float32 | {first['float32_ua']:.1f} | 100.0 | 0 |")
    for name, entry in measured.items():
        lines.append(
            f"| {name} | {entry['ua']:.1f} | {100 * entry['agreement']:.1f} | {entry['largest_difference']:.4f} |"
        )
    return "\n".join([*lines, "", f"Seeds: {', '.join(map(str, first['seeds']))}."])


def show(summary: dict[str, Any], title: str, corpus_name: str) -> str:
    """The summary for a terminal, with the table of the ablation."""
    parts = [text_report(summary, title), ablation_table(summary, corpus_name)]
    for model, row in summary["models"].items():
        if row["precisions"]:
            parts.append(f"{MODELS[model]} in each precision:\n\n{precision_table(row['precisions'])}")
    return "\n\n".join(parts)


def compare_table(comparison: Mapping[str, Any]) -> str:
    """``comparison.compare`` as a Markdown table, and under it the protocol of every run and what it says of itself."""
    lines = [
        "| settings | seeds | WA % | UA % | UA of each seed | UA of validation speakers |",
        "|---|---|---|---|---|---|",
    ]
    rows = dict(comparison["runs"])
    if comparison["nested"]:
        rows["*chosen per fold by its validation speaker*"] = comparison["nested"]
    for name, summary in rows.items():
        row = summary["models"][comparison["model"]]
        each = " / ".join(f"{rates['ua']:.1f}" for rates in row["per_seed"].values())
        validation = "" if row["validation_ua"] is None else f"{row['validation_ua']:.1f}"
        lines.append(
            f"| {name} | {len(row['per_seed'])} | {row['wa']['mean']:.1f} | {row['ua']['mean']:.1f} | {each} "
            f"| {validation} |"
        )
    protocols = {name: summary["protocol"] for name, summary in comparison["runs"].items()}
    if len(set(protocols.values())) == 1:
        lines += ["", f"Protocol: {next(iter(protocols.values()))}."]
    else:
        lines += ["", f"Protocols: {'; '.join(f'{name} {protocol}' for name, protocol in protocols.items())}."]
    for name, summary in comparison["runs"].items():
        if summary["leakage"]:
            lines += ["", f"**{name}: {summary['leakage']}.**"]
        if summary["notes"]:
            lines += ["", f"{name}: {'; '.join(summary['notes'])}."]
    return "\n".join(lines)
