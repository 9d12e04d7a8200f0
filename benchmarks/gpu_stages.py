"""Where the time of a forward on a GPU goes: a row per stage, from the times of the first steps alone.

All stages run in one launch.  What is timed is a launch of steps [0, e) for every e, and a stage's time is the
difference of two such neighbours: it holds the meeting behind the stage, not the launch, unless the device has no
clusters and gives every stage a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LAUNCH, WHOLE = "a launch without stages", "the whole"
#: Ceiling -> what is a share of it, and how it is called.
SHARES = {"bf16_tflops": ("tflops", "of_product"), "copy_gbps": ("gbps", "of_copy")}
NOTE = """\
Every stage's time is that of all stages up to it less that of those before it, the smallest times of graphs that took
turns; ± is by how much these differed between repetitions, and a time within that is noise: it has no rate. FLOPs are
those of the products as they are defined, not all of which are multiplied in bf16; bytes are weights, once, and
activations in and out. What is read again, and what stays in the L2 cache, is the same to this count: a share of a
copy's rate may be above 100 %."""


def row(name: str, us: float, resolution_us: float, flops: int, moved: int) -> dict[str, Any]:
    """``resolution_us``: how far the time may be off; a time that is no longer than that has no rates."""
    seen = us > resolution_us
    return {
        "stage": name,
        "us": us,
        "resolution_us": resolution_us,
        "flops": flops,
        "bytes": moved,
        "tflops": flops / us / 1e6 if seen and flops else None,
        "gbps": moved / us / 1e3 if seen and moved else None,
    }


def rows(stages: Sequence[dict[str, Any]], clips: int, times: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """The launch, every stage, the whole.  stages: as ``GpuModel.stages()`` gives them; times: for e = 0, 1, ... the
    milliseconds of steps [0, e), one of each repetition."""
    if len(times) != len(stages) + 1:
        raise ValueError(f"times: expected {len(stages) + 1}, one more than stages, got {len(times)}")
    smallest = [1e3 * min(own) for own in times]
    spread = [1e3 * (max(own) - min(own)) for own in times]
    flops = [clips * stage["flops"] for stage in stages]
    moved = [stage["weight_bytes"] + clips * (stage["read_bytes"] + stage["write_bytes"]) for stage in stages]
    return [
        row(LAUNCH, smallest[0], spread[0], 0, 0),
        *(
            row(stage["name"], smallest[i + 1] - smallest[i], spread[i] + spread[i + 1], flops[i], moved[i])
            for i, stage in enumerate(stages)
        ),
        row(WHOLE, smallest[-1], spread[-1], sum(flops), sum(moved)),
    ]


def set_shares(found: Sequence[dict[str, Any]], ceilings: dict[str, float] | None) -> None:
    """Beside every rate its share of the ceiling; None where one of the two was not measured."""
    for own in found:
        for ceiling, (rate, share) in SHARES.items():
            most = (ceilings or {}).get(ceiling)
            own[share] = own[rate] / most if own[rate] is not None and most else None


def table(found: Sequence[dict[str, Any]]) -> str:
    def cell(value: float | None, unit: float = 1, digits: int = 3) -> str:
        return "" if value is None else f"{value * unit:.{digits}g}"

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    head = "stage | us | ± | MFLOP | MB | TFLOP/s | of a bf16 product's | GB/s | of a copy's"
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for own in found:
        cells = [own["stage"], f"{own['us']:.2f}", f"{own['resolution_us']:.2f}"]
        cells += [cell(own["flops"], 1e-6), cell(own["bytes"], 1e-6)]
        cells += [cell(own["tflops"]), percent(own["of_product"]), cell(own["gbps"]), percent(own["of_copy"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text(content: dict[str, Any]) -> str:
    """Of ``gpu-engine.json``: a table for every number of clips whose stages were timed; nothing where none were."""
    parts = [part for name, part in content.items() if name.startswith("stages-")]
    if not parts:
        return ""
    lines = [
        "## Where the time goes on a GPU",
        "",
        f"The published network in bf16, {content['device']['gpu']}. {NOTE}",
    ]
    for part in parts:
        lines += ["", f"{part['clips']} clips:", "", table(part["rows"])]
    return "\n".join([*lines, ""])
