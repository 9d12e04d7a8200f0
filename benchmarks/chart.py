"""The picture of the tables: milliseconds per call, a panel per precision and thread count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .compare import OURS, Table

GROUP, UTTERANCES = "mdscm-published", 1
PRECISIONS = ("float32", "bf16", "int8")
TITLE = "Published MDSCM, one utterance of 5 clips: median milliseconds per call, shorter is better"
#: Ours stands out, peers recede.
COLOURS = {OURS: "#d1495b"}
PEER, INK, FAINT = "#a9b4c2", "#2b2d42", "#6c757d"


def _panel(axes: Any, table: Table, title: str, widest: float, bars: int) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    axes.set_xlim(0, widest)
    axes.set_ylim(bars - 0.5, -0.5)  # bars of the same height in every panel
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.set_xticks([])
    rows = sorted(table.rows, key=lambda row: row.median_ms)
    names = [row.name for row in rows]
    axes.barh(names, [row.median_ms for row in rows], height=0.66, color=[COLOURS.get(n, PEER) for n in names])
    for place, row in enumerate(rows):
        weight = "bold" if row.name == OURS else "normal"
        label = f"{row.median_ms:.2f}" if row.median_ms < 10 else f"{row.median_ms:.1f}"
        axes.text(row.median_ms + 0.015 * widest, place, label, va="center", fontsize=9, color=INK, fontweight=weight)
    if table.ours is None:
        axes.text(0, len(rows), f"{OURS}: not run", va="center", fontsize=9, color=FAINT)
    for tick in axes.get_yticklabels():
        if tick.get_text() == OURS:
            tick.set_fontweight("bold")
            tick.set_color(COLOURS[OURS])


def draw(tables: list[Table], path: Path) -> None:
    found = {
        (table.facts["precision"], table.facts["threads"]): table
        for table in tables
        if table.facts["group"] == GROUP and table.facts["utterances"] == UTTERANCES and table.rows
    }
    threads = sorted({count for _, count in found})
    if not threads:
        return
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    slowest = max(row.median_ms for table in found.values() for row in table.rows)
    bars = max(len(table.rows) + (table.ours is None) for table in found.values())
    figure = Figure(figsize=(10.5, 0.5 + len(threads) * (0.5 + 0.3 * bars)), dpi=150, facecolor="white")
    panels = figure.subplots(len(threads), len(PRECISIONS), squeeze=False)
    for line, count in zip(panels, threads):
        for axes, precision in zip(line, PRECISIONS):
            title = f"{precision}, {count} thread{'s' if count > 1 else ''}"
            if (precision, count) in found:
                _panel(axes, found[precision, count], title, 1.18 * slowest, bars)
            else:
                axes.set_axis_off()
    figure.suptitle(TITLE, x=0.01, ha="left", fontsize=11, color=INK)
    figure.tight_layout(rect=(0, 0, 1, 1), w_pad=2.0, h_pad=1.2)
    figure.savefig(path)
