"""What the benchmarks are to show: how many times as long as ours the fastest peer of the same precision must take.

One place for the numbers: `python -m benchmarks.render` sets them beside what was measured.
"""

from __future__ import annotations

from typing import Any

#: (group, precision, threads, utterances) -> least ratio.  None stands for any value.
GOALS: dict[tuple[str, str | None, int | None, int | None], float] = {
    ("mdscm-published", None, None, None): 1.0,
    ("resnet18", None, None, None): 1.0,
    ("log-mel", None, None, None): 1.0,
    ("whole way", None, None, None): 1.0,
}
#: Of a fresh process: seconds from the import to the first result of a 3 s file, and peak resident memory.
START_SECONDS, START_MB = 0.6, 200.0


def goal(facts: dict[str, Any]) -> float | None:
    """The goal of a case, that of the most specific key; None where there is none."""
    given = tuple(facts.get(name) for name in ("group", "precision", "threads", "utterances"))
    matching = {
        sum(k is not None for k in key): value
        for key, value in GOALS.items()
        if all(k is None or k == g for k, g in zip(key, given))
    }
    return matching[max(matching)] if matching else None
