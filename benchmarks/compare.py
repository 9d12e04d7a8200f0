"""Interleaved timing: contenders take turns in one process, so that a noisy machine is noisy for all of them."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avser_fast import _engine

#: The name of our row; whatever else a table holds is a peer.
OURS = "avser_fast"
#: Turns of each contender, unless a time budget ends them earlier (never before ``LEAST_ROUNDS``).
ROUNDS = 60
LEAST_ROUNDS = 5
#: In a turn a contender is timed again and again for about this long, and at most ``CALLS`` times.
TURN_MS = 10.0
CALLS = 20
#: A loop on registers tells whether threads have a core each: for how long it runs, and what share of as many times one
#: thread's rate it must reach.
PROBE_S, WHOLE_CORES = 0.002, 0.85
#: A process is idle when so many looks in a row, a millisecond apart, find none of its threads at work.
QUIET_LOOKS = 3


@dataclass
class Contender:
    """``run`` does the work once; ``check`` raises AssertionError when its result is not what the case asks for.

    ``setting`` says how a peer was set up, ``tried`` what each of its settings took (or why it was refused).
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], None]
    versions: str = ""
    setting: str = ""
    tried: dict[str, str] = field(default_factory=dict)


@dataclass
class Row:
    name: str
    versions: str
    median_ms: float
    min_ms: float
    p95_ms: float
    setting: str = ""
    calls: int = 0
    tried: dict[str, str] = field(default_factory=dict)


@dataclass
class Table:
    """Results of one case: a row per contender, ``missing`` says why one was not run.

    ``facts`` is what the case is, as plain data: group, precision, threads, utterances, multiply-adds, ceiling.
    """

    case: str
    rows: list[Row]
    missing: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> Row | None:
        return next((row for row in self.rows if row.name == OURS), None)

    @property
    def peers(self) -> list[Row]:
        return [row for row in self.rows if row.name != OURS]

    def ratio(self, row: Row) -> float | None:
        """How many times as long as ours; None where ours was not run."""
        return None if self.ours is None else row.median_ms / self.ours.median_ms

    def best_ratio(self) -> float | None:
        """How many times as long as ours the fastest peer takes; None where either was not run."""
        return min((r for r in map(self.ratio, self.peers) if r is not None), default=None)

    def share(self) -> float | None:
        """Our multiply-adds per second, of those that the machine can do in this precision."""
        macs, ceiling = self.facts.get("macs"), self.facts.get("ceiling_gmacs")
        if self.ours is None or not macs or not ceiling:
            return None
        return macs / (self.ours.median_ms * 1e-3) / (ceiling * 1e9)

    def text(self) -> str:
        width = max(map(len, [OURS, *(r.name for r in self.rows), *self.missing]))
        lines = [self.case]
        if self.rows:
            lines.append(f"  {'':{width}}   median ms      min      p95   times ours")
        for row in self.rows:
            ratio = self.ratio(row)
            times = f"{ratio:10.2f}" if ratio is not None else f"{'':10}"
            notes = "   ".join(filter(None, (row.setting, row.versions)))
            lines.append(
                f"  {row.name:{width}}  {row.median_ms:10.3f} {row.min_ms:8.3f} {row.p95_ms:8.3f}   {times}   {notes}"
            )
        for name, reason in self.missing.items():
            lines.append(f"  {name:{width}}  missing: {reason}")
        share = self.share()
        if share is not None:
            lines.append(f"  {100 * share:.0f} % of {self.facts['ceiling_gmacs']:.0f} G multiply-adds per second")
        return "\n".join(line.rstrip() for line in lines)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Table:
        """Inverse of ``dataclasses.asdict``; other keys are not looked at."""
        return Table(data["case"], [Row(**row) for row in data["rows"]], data["missing"], data["facts"])


def busy_threads() -> int:
    """Threads of this process, the caller aside, that run or wait for a CPU.

    Their states, not the process's processor time: Linux brings that of threads that run up to date once per tick (4 ms
    where a second has 250), so that a thread may spin through a shorter look unseen.
    """
    count = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            stat = (task / "stat").read_bytes()
        except OSError:  # it has ended
            continue
        running = stat[stat.rindex(b")") + 2 :].startswith(b"R")
        count += running and int(task.name) != threading.get_native_id()
    return count


def settle(limit_s: float = 1.0) -> bool:
    """Wait until no other thread of this process is busy, and say whether that came: pools spin for a while after their
    work, some for tens of milliseconds, and would take the cores from the contender whose turn comes next."""
    end, quiet = time.perf_counter() + limit_s, 0
    while quiet < QUIET_LOOKS and time.perf_counter() < end:
        quiet = 0 if busy_threads() else quiet + 1
        time.sleep(0.001)
    return quiet == QUIET_LOOKS


def await_cores(threads: int, limit_s: float = 1.0) -> bool:
    """Wait until ``threads`` threads have a core each, and say whether they do.

    CPUs of a virtual machine may for a while be hyperthreads of one core, where two threads take as long as one and no
    counter of the system says so.
    """
    end = time.perf_counter() + limit_s
    while threads > 1:
        one, all_ = (_engine.measure_peak("float32", PROBE_S, n) for n in (1, threads))
        if all_ >= WHOLE_CORES * threads * one:
            break
        if time.perf_counter() > end:
            return False
        time.sleep(0.02)
    return True


def checked(case: str, contenders: list[Contender]) -> None:
    """Raise AssertionError naming the contender whose result is wrong."""
    for contender in contenders:
        try:
            contender.check(contender.run())
        except AssertionError as error:
            raise AssertionError(f"{case}: {contender.name}: {error}") from error


def compare(
    case: str,
    contenders: list[Contender],
    missing: dict[str, str],
    facts: dict[str, Any] | None = None,
    budget_s: float = 10.0,
) -> Table:
    """Check every contender's result, then time them in turns.

    A turn: wait until every pool sleeps and the threads of the case (``facts``) have cores, one call that wakes the
    contender's own threads and is not timed, then the timed ones.  The turns in which that did not come are
    ``facts["unsettled_turns"]`` and ``facts["crowded_turns"]``.  Raises AssertionError naming the contender whose
    result is wrong: nothing is timed then.
    """
    checked(case, contenders)
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    facts = {**(facts or {}), "unsettled_turns": 0, "crowded_turns": 0}
    begin = time.perf_counter()
    for turn in range(ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() - begin > budget_s:
            break
        for contender in contenders:
            facts["unsettled_turns"] += not settle()
            facts["crowded_turns"] += not await_cores(facts.get("threads", 1))
            contender.run()
            spent, calls = 0.0, 0
            while calls == 0 or (spent < TURN_MS and calls < CALLS):
                start = time.perf_counter()
                contender.run()
                took = 1e3 * (time.perf_counter() - start)
                times[contender.name].append(took)
                spent, calls = spent + took, calls + 1
    rows = []
    for contender in contenders:
        values = sorted(times[contender.name])
        p95 = values[round(0.95 * (len(values) - 1))]
        rows.append(
            Row(
                contender.name,
                contender.versions,
                statistics.median(values),
                values[0],
                p95,
                contender.setting,
                len(values),
                contender.tried,
            )
        )
    return Table(case, rows, missing, facts)
