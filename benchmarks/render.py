"""``python -m benchmarks.render`` writes the tables of README.md from results files: no figure is typed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from python_training.report import compare, compare_table

ROOT = Path(__file__).resolve().parents[1]
SPEED = ROOT / "benchmarks" / "results"
ACCURACY = ROOT / "python_training" / "results" / "emodb4"


def speed_table(folder: Path = SPEED) -> str:
    """One row per case: our median and how many times as long each peer takes."""
    tables: list[dict[str, Any]] = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    if not tables:
        return "Not measured yet."
    lines = ["| case | avser_fast, median ms | peers: times as long |", "|---|---|---|"]
    for table in tables:
        ours, *peers = table["rows"]
        cells = [f"{p['name']} {p['median_ms'] / ours['median_ms']:.1f}" for p in peers]
        cells += [f"{name} missing" for name in table["missing"]]
        lines.append(f"| {table['case']} | {ours['median_ms']:.2f} | {', '.join(cells)} |")
    device = tables[0]["device"]
    versions = sorted({row["versions"] for table in tables for row in table["rows"] if row["versions"]})
    lines += ["", f"{device['cpu']}, {device['cores']} cores, {device['isa']}. {', '.join(versions)}."]
    return "\n".join(lines)


def accuracy_table(folder: Path = ACCURACY) -> str:
    """The cross-validations that are kept, best first."""
    files = sorted(folder.glob("*.json"))
    if not files:
        return "Not measured yet."
    comparison = compare(files)
    comparison["runs"] = dict(sorted(comparison["runs"].items(), key=lambda item: -item[1]["ua"]["mean"]))
    return compare_table(comparison)


def rendered(text: str) -> str:
    """README's text with both tables replaced."""
    for name, table in (("speed", speed_table()), ("accuracy", accuracy_table())):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(pattern, text, flags=re.S):
            raise ValueError(f"README.md: expected the marks <!-- {name} --> and <!-- /{name} -->")
        text = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)  # type: ignore[misc]
    return text


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
