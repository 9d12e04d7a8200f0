"""What every benchmark does with its contenders, and what is known about the machine they ran on."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import avser_fast
from avser_fast import _engine
from avser_fast.inference.whole_files import write_bytes

from .compare import OURS, Contender, Table, compare
from .ours import ABSENT
from .peers import Check, Peers, reason


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> dict[str, Any]:
    """The machine and the program, as written into every results file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": cores(),
        "isa": _engine.cpu_isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "avser_fast": avser_fast.__version__,
        "compiler": _engine.build_info()["compiler"],
    }


#: The largest seen by this process: a ceiling is what the machine can do undisturbed.
_CEILINGS: dict[tuple[str, int], float] = {}


def ceiling(precision: str, threads: int) -> float | None:
    """G multiply-adds per second of this machine; None where it has no instruction for the precision."""
    found = _engine.measure_peak(precision, 0.2, threads) / 1e9  # type: ignore[arg-type]
    _CEILINGS[precision, threads] = max(found, _CEILINGS.get((precision, threads), 0.0))
    return _CEILINGS[precision, threads] or None


def file_name(case: str) -> str:
    """'MDSCM, 1 thread' -> 'mdscm-1-thread.json'"""
    return "-".join("".join(c if c.isalnum() else " " for c in case.lower()).split()) + ".json"


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


@dataclass
class Bench:
    """The tables of a session, and how much time its cases may take."""

    budget_s: float = 1.5
    peers: str = "default"
    full: bool = False
    tables: list[Table] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # other figures, by the name of their file

    def needs(self, case: str, facts: dict[str, Any]) -> None:
        """End the test where this process cannot run the case as it is meant; the table says so."""
        if facts["threads"] > cores():
            self._not_run(case, f"needs {facts['threads']} cores, this process may use {cores()}", facts)
        if facts.get("utterances", 1) > 1 and not self.full:
            self._not_run(case, "large batches are measured with --full or --results", facts)

    def _not_run(self, case: str, why: str, facts: dict[str, Any]) -> None:
        self.tables.append(Table(case, [], {OURS: why}, facts))
        pytest.skip(f"{case}: {why}")

    def measure(
        self,
        benchmark: Any,
        case: str,
        ours: Callable[[], Callable[[], Any]],
        check: Check,
        peers: Peers,
        facts: dict[str, Any],
    ) -> Table:
        """Compare, keep the table, and skip the rest of the test where ours is absent: the peers are measured all the
        same, and the table says why ours was not run."""
        missing, contenders, run = dict(peers.missing), list(peers.contenders), None
        try:
            run = ours()
        except ABSENT as error:
            missing = {OURS: reason(error), **missing}
        else:
            contenders.insert(0, Contender(OURS, run, check, f"avser_fast {avser_fast.__version__}"))
        if "macs" in facts:
            facts = {**facts, "ceiling_gmacs": ceiling(facts["precision"], facts["threads"])}
        table = compare(case, contenders, missing, facts, self.budget_s)
        self.tables.append(table)
        for other in self.tables:
            key = other.facts["precision"], other.facts["threads"]
            if key in _CEILINGS and "ceiling_gmacs" in other.facts:
                other.facts["ceiling_gmacs"] = _CEILINGS[key] or None
        if run is None:
            pytest.skip(f"{case}: {missing[OURS]}")
        ratios = {row.name: table.ratio(row) for row in table.rows}
        benchmark.extra_info["ratios"] = {name: round(r, 2) for name, r in ratios.items() if r is not None}
        benchmark.pedantic(run, rounds=3, warmup_rounds=1)
        return table

    def write(self, folder: Path) -> None:
        """One file per case, and what else was measured."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            write_result(folder / f"{name}.json", content)
        for table in self.tables:
            write_result(folder / file_name(table.case), dataclasses.asdict(table))


def write_result(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps({"device": device(), **content}, indent=1) + "\n"
    write_bytes(path, text.encode())
