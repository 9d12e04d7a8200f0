"""``python -m benchmarks.render`` writes README.md's tables, ``results/README.md``, training's notes and the chart.

They come from results files: no figure is typed by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from python_training.comparison import Run, against, changes, closest, compare, read_run
from python_training.evaluation import summarize
from python_training.tables import ablation_table, compare_table

from . import gpu_stages
from .compare import OURS, Row, Table
from .goals import START_MB, START_SECONDS, TRAINING_MEMORY, goal
from .harness import plural

ROOT = Path(__file__).resolve().parents[1]
SPEED = ROOT / "benchmarks" / "results"
ACCURACY = ROOT / "python_training" / "results" / "protocols"
NOTES = ROOT / "python_training" / "NOTES.md"
CHART = "speed.png"

#: Group of cases -> how it is called in a table, in the order of the tables.
GROUPS = {
    "mdscm-published": "MDSCM as published",
    "resnet18": "ResNet-18 encoder",
    "whole way": "samples to probabilities",
    "log-mel": "log-mel",
    "mdscm-small": "default model",
    "training-eager": "training step",
    "training-compile": "training step",
}
EAGER = "PyTorch eager"
PRECISIONS = ("float32", "bf16", "int8")
SHORT = {"python_speech_features": "PSF"}


def read(folder: Path) -> tuple[list[Table], dict[str, dict[str, Any]]]:
    """The tables in the order of GROUPS, and every file's content by its name."""
    files = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}
    tables = [Table.from_dict(content) for content in files.values() if "case" in content]

    def place(table: Table) -> tuple[Any, ...]:
        facts = table.facts
        known = [list(GROUPS).index(facts["group"]) if facts["group"] in GROUPS else len(GROUPS)]
        return (*known, PRECISIONS.index(facts["precision"]), facts["utterances"], facts["threads"], table.case)

    return sorted(tables, key=place), files


def short(name: str) -> str:
    for long, brief in SHORT.items():
        name = name.replace(f"{long} +", f"{brief} +")
    return name


def fastest(table: Table) -> Row | None:
    return min(table.peers, key=lambda row: row.median_ms, default=None)


def verdict(table: Table) -> str:
    """The goal of a case and whether it was reached."""
    wanted, found = goal(table.facts), table.best_ratio()
    if wanted is None:
        return ""
    if found is None:
        return f"{wanted:g}: not measured"
    return f"{wanted:g}: {'met' if found >= wanted else 'not met'}"


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def speed_table(folder: Path = SPEED) -> str:
    """One row per case: ours, its share of the ceiling, the fastest peer, and the goal."""
    tables, files = read(folder)
    shown = [table for table in tables if table.facts["group"] in GROUPS]
    if not shown:
        return "Not measured yet."
    image = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    lines = [
        f"![Milliseconds per call, avser_fast and its peers]({(image / CHART).as_posix()})",
        "",
        "| | precision | clips | threads | avser_fast, ms | of the ceiling | fastest peer | times as long | goal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for table in shown:
        facts, ours, share, best, ratio = table.facts, table.ours, table.share(), fastest(table), table.best_ratio()
        cells = [
            GROUPS[facts["group"]],
            facts["precision"],
            "" if facts["group"] == "log-mel" else str(5 * facts["utterances"]),
            str(facts["threads"]),
            "not run" if ours is None else milliseconds(ours.median_ms),
            "" if share is None else f"{100 * share:.0f} %",
            "" if best is None else f"{short(best.name)} ({milliseconds(best.median_ms)} ms)",
            "" if ratio is None else f"**{ratio:.2f}**",
            verdict(table),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *remarks(tables, files)]
    return "\n".join(lines)


def remarks(tables: list[Table], files: dict[str, dict[str, Any]]) -> list[str]:
    """Start-up, memory, device and versions as sentences."""
    lines = []
    for table in tables:
        if table.facts["group"] == "start-up" and table.ours is not None:
            seconds, resident = table.ours.median_ms / 1e3, table.facts["resident_mb"][OURS]
            met = "met" if seconds <= START_SECONDS and resident <= START_MB else "not met"
            lines.append(
                f"A fresh process, {table.case}: {seconds:.2f} s, {resident:.0f} MB resident, torch not imported "
                f"(goal {START_SECONDS:g} s, {START_MB:g} MB: {met})."
            )
    if "memory" in files:
        memory = files["memory"]
        series = memory["resident_mb"]
        lines.append(
            f"{memory['calls']:,} calls of mixed lengths: {series[0]:.1f} MB resident after the first twentieth, "
            f"{series[-1]:.1f} MB at the end."
        )
    if "training-memory" in files:
        peak = files["training-memory"]["peak_mb"]
        share = peak[OURS] / peak[EAGER]
        met = "met" if share <= TRAINING_MEMORY else "not met"
        lines.append(
            f"A training step needs {peak[OURS]:.0f} MB beside network, optimizer and batch, {EAGER} needs "
            f"{peak[EAGER]:.0f} MB: {share:.2f} times as much (goal {TRAINING_MEMORY:g}: {met})."
        )
    if "prepare" in files:
        found = files["prepare"]
        for kind, figures in found["kinds"].items():
            shares = ", ".join(f"{100 * share:.0f} % {part}" for part, share in figures["shares"].items())
            lines.append(
                f"Preparing {found['utterances']:,} utterances ({kind}, {figures['hours']:.1f} hours) with "
                f"{plural(found['workers'], 'thread')}: {figures['hours_per_second']:.2f} hours of audio per second, "
                f"{figures['cores_busy']:.2f} cores busy (decoding alone: "
                f"{figures['hours_per_second_decoding_alone']:.2f} hours per second); processor time: {shares}; "
                f"{figures['resident_mb']:.0f} MB resident at most, {figures['resident_mb_of_a_tenth']:.0f} MB "
                f"for a tenth of the corpus; again, all cached: {figures['again']['seconds']:.1f} s; all features by "
                f"memory map: {figures['hit']['seconds']:.1f} s, {figures['hit']['resident_mb']:.0f} MB resident."
            )
    devices = {json.dumps(files[name]["device"]) for name in files if "case" in files[name]}
    for found in sorted(devices):
        device = json.loads(found)
        lines.append(f"{device['cpu']}, {plural(device['cores'], 'core')}, {device['isa']}, {device['compiler']}.")
    versions = sorted({v for table in tables for row in table.peers for v in row.versions.split(" + ") if v})
    lines.append(", ".join(v for v in versions if not v.startswith("avser_fast")) + ".")
    return lines


def goals_table(tables: list[Table]) -> str:
    lines = ["| case | at least | measured | |", "|---|---|---|---|"]
    for table in tables:
        wanted, found = goal(table.facts), table.best_ratio()
        if wanted is None:
            continue
        if found is None:
            measured, met = "", table.missing.get(OURS, "no peer was measured")
        else:
            measured, met = f"{found:.2f}", "met" if found >= wanted else "not met"
        lines.append(f"| {table.case} | {wanted:g} | {measured} | {met} |")
    return "\n".join(lines)


def details(folder: Path = SPEED) -> str:
    """The text of ``results/README.md``: goals, and every contender of every case with its setting."""
    tables, files = read(folder)
    lines = [
        "# Results of the benchmarks",
        "",
        "Rendered from the files beside it by `python -m benchmarks.render`.",
        "",
    ]
    if not tables:
        return "\n".join([*lines, "Not measured yet.", ""])
    lines += ["## Goals: how many times as long as ours the fastest peer takes", "", goals_table(tables), ""]
    if "roofline" in files:
        from .roofline import text

        lines += ["## Limits of the machine", "", "```", text(files["roofline"]), "```", ""]
    if where := gpu_stages.text(files.get("gpu-engine", {})):
        lines += [where]
    for table in tables:
        lines += [f"## {table.case}", ""]
        share = table.share()
        if share is not None:
            lines += [f"{100 * share:.0f} % of {table.facts['ceiling_gmacs']:.0f} G multiply-adds per second.", ""]
        if table.facts.get("unsettled_turns"):
            lines += [f"{table.facts['unsettled_turns']} turns beside threads that others had left spinning.", ""]
        if table.facts.get("crowded_turns"):
            lines += [f"{table.facts['crowded_turns']} turns in which threads had to share a core.", ""]
        if table.rows:
            lines += ["| | median ms | min | p95 | calls | times as long | setting |", "|---|---|---|---|---|---|---|"]
        for row in table.rows:
            ratio = table.ratio(row)
            times = "" if ratio is None else f"{ratio:.2f}"
            lines.append(
                f"| {row.name} | {row.median_ms:.3f} | {row.min_ms:.3f} | {row.p95_ms:.3f} | {row.calls} | {times} "
                f"| {row.setting} |"
            )
        for row in table.rows:
            others = [f"{setting}: {what}" for setting, what in row.tried.items() if setting != row.setting]
            if others:
                lines += ["", f"{row.name}, other settings tried: {'; '.join(others)}."]
        for name, why in table.missing.items():
            lines += ["", f"{name} was not run: {why}."]
        lines.append("")
    return "\n".join(lines)


def _mean_ua(summary: dict[str, Any]) -> float:
    return float(summary["models"]["mdscm"]["ua"]["mean"])


def accuracy_table(folder: Path = ACCURACY) -> str:
    """The evaluations of recipes on the shipped corpus, best first; what changes one of them has another name."""
    files = [folder / f"{run.name}.json" for run in _networks(folder) if run.name == f"emodb4-{run.settings['name']}"]
    if not files:
        return "Not measured yet."
    comparison = compare(files)
    best_first = sorted(comparison["runs"].items(), key=lambda item: -_mean_ua(item[1]))
    comparison["runs"] = {name.removeprefix("emodb4-"): summary for name, summary in best_first}
    return compare_table(comparison)


def default_ua(folder: Path = ACCURACY) -> str:
    """The rate of the default model's recipe and its spread, for a sentence."""
    path = folder / "emodb4-mdscm-small.json"
    if not path.exists():
        return "UA not measured yet"
    summary = compare([path])["runs"][path.stem]
    seeds = [rates["ua"] for rates in summary["models"]["mdscm"]["per_seed"].values()]
    return f"UA {_mean_ua(summary):.1f} % ({plural(len(seeds), 'seed')}, {min(seeds):.1f} to {max(seeds):.1f})"


def choices_table(folder: Path = ACCURACY) -> str:
    """What every change of the default recipe does, best first: rates, and the difference on the same draws from the
    recipe or, where a run has several changes, from that with the most of them."""
    runs = {_choice(run): run for run in _networks(folder)}
    if "mdscm-small" not in runs:
        return "Not measured yet."
    base = runs.pop("mdscm-small")
    others = list(runs.values())
    rows = []
    for run in [base, *others]:
        models = summarize(run.folds)["models"]
        paths = [f"{models[m]['ua']['mean']:.1f}" if m in models else "" for m in ("convolutions", "statistics")]
        each = [rates["ua"] for rates in models["mdscm"]["per_seed"].values()]
        if run is base:
            change, difference = "none: the recipe", ""
        else:
            known = closest(run, base, others)
            changed = {} if run.settings["name"] != base.settings["name"] else changes(run, known)
            change = ", ".join(f"`{key}={json.dumps(value)}`" for key, value in changed.items()) or "another recipe"
            found = against(run, known)
            difference = "{}: {:+.1f} ({:+.1f} .. {:+.1f})".format(_choice(known), found["ua"], *found["interval"])
        mean = models["mdscm"]["ua"]["mean"]
        cells = [_choice(run), change, str(len(each)), f"{mean:.1f} ({min(each):.1f} .. {max(each):.1f})"]
        cells += ["{:.1f} .. {:.1f}".format(*models["mdscm"]["interval"]), *paths, difference]
        rows.append((mean, f"| {' | '.join(cells)} |"))
    head = [
        "| name | change | seeds | UA % (of the seeds) | interval | convolutions alone | statistics alone | against |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(row for _, row in sorted(rows, key=lambda row: -row[0]))])


def stages_table(folder: Path = ACCURACY) -> str:
    """What each stage of a system reaches on the shipped corpus."""
    path = folder / "emodb4-fusion.json"
    return ablation_table(summarize(read_run(path).folds), "emodb") if path.exists() else "Not measured yet."


def _networks(folder: Path) -> list[Run]:
    """The evaluations of an MDSCM alone on the shipped corpus."""
    runs = [read_run(path) for path in sorted(folder.glob("emodb4-*.json"))]
    return [run for run in runs if "fusion" not in run.folds[0]["models"]]


def _choice(run: Run) -> str:
    return run.name.removeprefix("emodb4-")


def rendered(text: str) -> str:
    """README's text with its tables and figures replaced."""
    return _replaced(
        text,
        "README.md",
        {"speed": f"\n{speed_table()}\n", "accuracy": f"\n{accuracy_table()}\n", "ua": default_ua()},
    )


def rendered_notes(text: str) -> str:
    """The text of the notes of training with its tables replaced."""
    return _replaced(text, NOTES.name, {"choices": f"\n{choices_table()}\n", "stages": f"\n{stages_table()}\n"})


def _replaced(text: str, where: str, parts: dict[str, str]) -> str:
    for name, part in parts.items():
        pattern = rf"(<!-- {name} -->).*?(<!-- /{name} -->)"
        if not re.search(pattern, text, flags=re.S):
            raise ValueError(f"{where}: expected the marks <!-- {name} --> and <!-- /{name} -->")
        text = re.sub(pattern, lambda m, p=part: f"{m[1]}{p}{m[2]}", text, flags=re.S)  # type: ignore[misc]
    return text


def main() -> int:
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")
    NOTES.write_text(rendered_notes(NOTES.read_text(encoding="utf-8")), encoding="utf-8")
    SPEED.mkdir(exist_ok=True)
    (SPEED / "README.md").write_text(details(), encoding="utf-8")
    tables, _ = read(SPEED)
    if not tables:
        (SPEED / CHART).unlink(missing_ok=True)
        return 0
    try:
        from .chart import draw
    except ImportError as error:
        print(f"render: expected matplotlib for {CHART}, which was not renewed ({error})")
        return 1
    draw(tables, SPEED / CHART)
    return 0


if __name__ == "__main__":
    sys.exit(main())
