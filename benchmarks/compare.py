"""Interleaved timing: contenders take turns in one process, so that a noisy machine is noisy for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: Turns of each contender, unless a time budget ends them earlier (never before five).
ROUNDS = 40
BUDGET_S = 10.0


@dataclass
class Contender:
    """``run`` does the work once; ``check`` raises AssertionError when its result is not what the case asks for."""

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], None]
    versions: str = ""


@dataclass
class Row:
    name: str
    versions: str
    median_ms: float
    min_ms: float
    p95_ms: float


@dataclass
class Table:
    """Results of one case; ``ours`` is the first row, ``missing`` maps a peer to the reason why it was not run."""

    case: str
    rows: list[Row]
    missing: dict[str, str] = field(default_factory=dict)

    def ratio(self, row: Row) -> float:
        """How many times as long as ours."""
        return row.median_ms / self.rows[0].median_ms

    def text(self) -> str:
        width = max(len(r.name) for r in self.rows)
        lines = [self.case, f"  {'':{width}}   median ms      min      p95   times ours"]
        for row in self.rows:
            lines.append(
                f"  {row.name:{width}}  {row.median_ms:10.3f} {row.min_ms:8.3f} {row.p95_ms:8.3f}"
                f"   {self.ratio(row):10.2f}" + (f"   {row.versions}" if row.versions else "")
            )
        for name, reason in self.missing.items():
            lines.append(f"  {name:{width}}  missing: {reason}")
        return "\n".join(lines)


def compare(case: str, contenders: list[Contender], missing: dict[str, str]) -> Table:
    """Check every contender's result, then time them in turns; the first one is ours.

    Raises AssertionError naming the contender whose result is wrong: nothing is timed then.
    """
    for contender in contenders:
        try:
            contender.check(contender.run())
        except AssertionError as error:
            raise AssertionError(f"{case}: {contender.name}: {error}") from error
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    begin = time.perf_counter()
    for turn in range(ROUNDS):
        if turn >= 5 and time.perf_counter() - begin > BUDGET_S:
            break
        for contender in contenders:
            start = time.perf_counter()
            contender.run()
            times[contender.name].append(1e3 * (time.perf_counter() - start))
    rows = []
    for contender in contenders:
        values = sorted(times[contender.name])
        p95 = values[min(len(values) - 1, round(0.95 * (len(values) - 1)))]
        rows.append(Row(contender.name, contender.versions, statistics.median(values), values[0], p95))
    return Table(case, rows, missing)
