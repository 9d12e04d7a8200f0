"""What a corpus holds and what is wrong with it: as a dictionary for programs, as a table for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from .corpus import FAULTS, Corpus, Fault, Utterance
from .features import SAMPLING_RATE

#: Faults of one kind that the text shows; all of them stand in the JSON.
_SHOWN = 5
_SHOWN_SPEAKERS = 30
#: What a key or a file name may hold and a terminal would obey.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def corpus_report(
    corpus: Corpus,
    utterances: Sequence[Utterance],
    samples: Mapping[str, int],
    rates: Mapping[str, int],
    faces: set[str],
    faults: Sequence[Fault],
) -> dict[str, Any]:
    """Counts, durations and faults of the ``utterances`` that can be used.

    ``samples`` (at 16 kHz) and ``rates`` (hertz of the file) are by key, ``faces`` the keys that have one.
    """
    seconds = np.array([samples[u.key] / SAMPLING_RATE for u in utterances if u.key in samples])
    names = corpus.labels

    def by_class(chosen: Iterable[Utterance]) -> dict[str, int]:
        counted = Counter(u.label for u in chosen)
        return {name: counted[i] for i, name in enumerate(names)}

    def by(group_of: Callable[[Utterance], str]) -> dict[str, dict[str, int]]:
        ordered = sorted(utterances, key=group_of)
        return {name: by_class(group) for name, group in groupby(ordered, key=group_of)}

    duration = (
        {
            "hours": round(float(seconds.sum()) / 3600, 4),
            "mean_s": round(float(seconds.mean()), 3),
            "median_s": round(float(np.median(seconds)), 3),
            "min_s": round(float(seconds.min()), 3),
            "max_s": round(float(seconds.max()), 3),
        }
        if len(seconds)
        else None
    )
    return {
        "corpus": corpus.name,
        "labels": list(names),
        "utterances": len(utterances),
        "by_class": by_class(utterances),
        "by_speaker": by(lambda u: u.speaker),
        "by_session": {name: counts for name, counts in by(lambda u: u.session).items() if name},
        "with_speech": len(samples),
        "with_face": len(faces),
        "faces_by_class": by_class(u for u in utterances if u.key in faces),
        "duration": duration,
        "seconds_by_class": {
            name: round(sum(samples[u.key] for u in utterances if u.label == i and u.key in samples) / SAMPLING_RATE, 2)
            for i, name in enumerate(names)
        },
        "file_rates_hz": {str(r): n for r, n in sorted(Counter(rates.values()).items())},
        "dropped": dict(sorted(corpus.dropped.items())),
        "faults": [{"kind": f.kind, "item": f.item, "message": f.message, "lost": f.lost} for f in faults],
    }


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need be, the first one to the left, figures to the right."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]


def report_text(report: Mapping[str, Any]) -> str:
    """A report for a person: counts by class and speaker, durations, what was left out, faults by kind."""
    labels = report["labels"]
    lines = [
        f"{report['corpus']}: {report['utterances']} utterances, {report['with_speech']} with speech, "
        f"{report['with_face']} with a face",
        "",
    ]
    seconds, faces = report["seconds_by_class"], report["faces_by_class"]
    rows = [["class", "utterances", "minutes", "faces"]]
    rows += [[n, str(report["by_class"][n]), f"{seconds[n] / 60:.1f}", str(faces[n])] for n in labels]
    total = [sum(v.values()) for v in (report["by_class"], faces)]
    rows.append(["all", str(total[0]), f"{sum(seconds.values()) / 60:.1f}", str(total[1])])
    lines += _table(rows)
    for what in ("session", "speaker"):
        groups: Mapping[str, Mapping[str, int]] = report[f"by_{what}"]
        if not groups:
            continue
        shown = list(groups.items())[:_SHOWN_SPEAKERS]
        rows = [[what, *labels, "all"]]
        rows += [[s or "(unknown)", *(str(c[n]) for n in labels), str(sum(c.values()))] for s, c in shown]
        lines += ["", *_table(rows)]
        if len(groups) > len(shown):
            lines.append(f"... and {len(groups) - len(shown)} {what}s more")
    duration = report["duration"]
    if duration is not None:
        lines += [
            "",
            f"duration: {duration['hours']:.2f} hours; an utterance {duration['min_s']:.2f} to "
            f"{duration['max_s']:.2f} s, mean {duration['mean_s']:.2f}, median {duration['median_s']:.2f}",
            "rates of the files: " + ", ".join(f"{r} Hz ({n})" for r, n in report["file_rates_hz"].items()),
        ]
    if report["dropped"]:
        shown_dropped = ", ".join(f"{name} {count}" for name, count in report["dropped"].items())
        lines += ["", f"left out, not among the classes: {shown_dropped}"]
    if report.get("faces_left_out"):
        lines += ["", report["faces_left_out"]]
    unused = report.get("unused")
    if unused and unused["bytes"]:
        done = "removed" if unused["removed"] else "--prune removes it"
        lines += ["", f"stored and not of this corpus: {unused['bytes'] / 1e6:.1f} MB ({done})"]
    faults = report["faults"]
    lines += ["", f"faults: {len(faults) or 'none'}"]
    for kind, (what, lost) in FAULTS.items():
        of_kind = [f for f in faults if f["kind"] == kind]
        if not of_kind:
            continue
        lines.append(f"  {what}: {len(of_kind)}{' (left out)' if lost else ''}")
        lines += [f"    {f['item']}: {f['message']}" for f in of_kind[:_SHOWN]]
        if len(of_kind) > _SHOWN:
            lines.append(f"    ... and {len(of_kind) - _SHOWN} more (report.json has all)")
    return "\n".join(_CONTROL.sub(lambda found: ascii(found[0])[1:-1], line) for line in lines)
