"""Line and scatter charts as SVG for a page; colours are classes of its style sheet, so they follow light and dark.

``STYLE`` is that sheet.  Colours are Okabe and Ito's, those that white or black would swallow moved a little; what they
tell apart is also told by dashes, shapes or text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT, TALL = 420, 250, 350
LEFT, RIGHT, TOP, BOTTOM = 55, 20, 30, 40
BINS = 120

#: Colour k of light and of dark pages; more than eight classes begin again.
LIGHT = ("#0072b2", "#d55e00", "#00805c", "#b8568f", "#a87400", "#2a8bc4", "#7a7400", "#5c6670")
DARK = ("#56b4e9", "#f08a3c", "#00c48e", "#df92bb", "#e69f00", "#a5d8f7", "#f0e442", "#a9b4bf")
DASHES = ("", "8 3", "2 3", "9 3 2 3")

STYLE = (
    """
svg.chart{display:block;width:100%;height:auto;font-size:12px}
.chart text{fill:var(--soft);font-variant-numeric:tabular-nums}
.chart .name{fill:var(--ink)}
.chart .halo{fill:var(--ink);font-weight:600;paint-order:stroke;stroke:var(--page);stroke-width:3px;
stroke-opacity:.75;stroke-linejoin:round}
.chart .grid{stroke:var(--line);stroke-width:1;fill:none}
.chart .frame{stroke:var(--soft);stroke-width:1;fill:none}
.chart .reference,.key .reference{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:5 4;fill:none}
.chart .mark,.key .mark{stroke:var(--warn);stroke-width:1.5;stroke-dasharray:1 3;stroke-linecap:round;fill:none}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.band{fill:currentColor;opacity:.18}
.circles{fill:none;stroke:currentColor;stroke-width:6;stroke-linecap:round;opacity:.7}
.triangles,.square{fill:currentColor;opacity:.7}
"""
    + "@media (max-width:40rem){svg.chart{font-size:13px}}\n"
    + "".join(f".c{k}{{color:var(--c{k})}}\n" for k in range(len(LIGHT)))
)


@dataclass(frozen=True)
class Line:
    """A series; ``x`` rises, both arrays are finite.  ``style`` picks colour and dash."""

    label: str
    x: np.ndarray
    y: np.ndarray
    style: int


@dataclass(frozen=True)
class Cloud:
    """The points (n, 2) of one class and domain; ``colour`` is the class, ``triangle`` the domain."""

    points: np.ndarray
    colour: int
    triangle: bool


@dataclass(frozen=True)
class Axis:
    """From values to pixels: ``low`` comes to lie at ``first``, ``high`` at ``last``."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        scale: Callable[[np.ndarray], np.ndarray] = np.log10 if self.log else np.asarray
        low, high = scale(np.array([self.low, self.high], dtype=np.float64))
        return self.first + (scale(np.asarray(values, np.float64)) - low) / (high - low) * (self.last - self.first)

    def ticks(self, count: int) -> list[float]:
        values = log_ticks(self.low, self.high, count) if self.log else []
        return values if len(values) > 1 else ticks(self.low, self.high, count)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round values within [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(f for f, limit in ((1, 1.5), (2, 3.5), (5, 7.5), (10, 10.1)) if rough / power < limit)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Powers of ten within [low, high], 2 and 5 times them too where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / count))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    values = [f * 10.0**k for k in range(first, last + 1) if (k - first) % every == 0 for f in factors]
    return [v for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]


def thin(x: np.ndarray, y: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean x and mean, smallest and largest y of each of ``bins`` stretches of a rising x that hold a value."""
    span = x[-1] - x[0]
    index = np.minimum((x - x[0]) / span * bins, bins - 1).astype(np.int64) if span > 0 else np.zeros(len(x), np.int64)
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    counts = np.diff(starts, append=len(x))
    mean_x, mean_y = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    return mean_x, mean_y, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def number(value: float) -> str:
    """A tick's text."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.10g}".replace("-", "−")
    power = math.floor(math.log10(abs(value)) + 1e-9)
    factor = f"{value / 10.0**power:.3g}".replace("-", "−")
    return _power(power) if factor == "1" else f"{factor}·{_power(power)}"


def _power(power: int) -> str:
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _range(values: np.ndarray, log: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        return (low / 1.3, high * 1.3)
    if low == high:
        pad = abs(low) / 2 or 1.0
        return (low - pad, high + pad)
    pad = 0.04 * (high - low)
    return (low - pad if low < 0 or low - pad > 0 else 0.0, high + pad)


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist()))


def _open(title: str, height: int) -> str:
    title = html.escape(title)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}"><title>{title}</title>'


def _frame(across: Axis, up: Axis, height: int, x_label: str, y_label: str, whole: bool = False) -> str:
    """Grid, ticks (``whole``: those of x are whole numbers) and the axes' names; that of y stands above its axis."""
    parts = []
    bottom, right = height - BOTTOM, WIDTH - RIGHT
    for value in up.ticks(5):
        y = float(up(np.array(value)))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    choices = [[v for v in across.ticks(k) if not whole or v == round(v)] for k in (6, 5, 4, 3, 2)]
    fitting = [values for values in choices if sum(len(number(v)) + 2 for v in values) < (right - LEFT) / 7.5]
    for value in (fitting or choices[-1:])[0]:
        x = float(across(np.array(value)))
        parts.append(f'<path class="frame" d="M{x:.1f} {bottom}v4"/>')
        x = min(x, WIDTH - 4 * len(number(value)))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<path class="frame" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    parts.append(f'<text class="name" x="4" y="15">{html.escape(y_label)}</text>')
    parts.append(f'<text class="name" x="{right}" y="{height - 6}" text-anchor="end">{html.escape(x_label)}</text>')
    return "".join(parts)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    reference: float | None = None,
    marks: Sequence[float] = (),
) -> str:
    """Series over one x axis, dashed where there are several.

    More than ``BINS`` values are drawn as means of neighbours, with a band from smallest to largest.

    ``reference`` is a level to compare with, ``marks`` places on the x axis.
    """
    drawn = [thin(line.x, line.y) if len(line.x) > BINS else (line.x, line.y, None, None) for line in lines]
    every_x = np.concatenate([line.x for line in lines] + [np.asarray(marks, np.float64)])
    every_y = np.concatenate([line.y for line in lines])
    if reference is not None:
        every_y = np.append(every_y, reference)
    low, high = x_range or (float(every_x.min()), float(every_x.max()))
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    across = Axis(low, high, LEFT, right) if high > low else Axis(low - 1, high + 1, LEFT, right)
    up = Axis(*(y_range or _range(every_y, log)), bottom, TOP, log)
    shown, largest = up, max(abs(up.low), abs(up.high))
    if not (log or 0.01 <= largest < 1e5):  # 3, 4, 5 and "×10⁻⁴" once instead of 0.0003, 0.0004, 0.0005
        power = math.floor(math.log10(largest))
        shown = Axis(up.low / 10.0**power, up.high / 10.0**power, up.first, up.last)
        y_label += f" (×{_power(power)})"
    parts = [_open(title, HEIGHT), _frame(across, shown, HEIGHT, x_label, y_label, whole=True)]
    parts += [f'<path class="mark" d="M{float(across(np.array(m))):.1f} {TOP}V{bottom}"/>' for m in marks]
    if reference is not None:
        parts.append(f'<path class="reference" d="M{LEFT} {float(up(np.array(reference))):.1f}H{right}"/>')
    for line, (x, _, least, most) in zip(lines, drawn):
        if least is not None and most is not None:
            there, back = _points(across(x), up(most)), _points(across(x)[::-1], up(least)[::-1])
            parts.append(f'<path class="band c{line.style}" d="M{there}L{back}Z"/>')
    for line, (x, y, _, _) in zip(lines, drawn):
        dash = f' stroke-dasharray="{DASHES[line.style]}"' if DASHES[line.style] and len(lines) > 1 else ""
        parts.append(f'<path class="line c{line.style}"{dash} d="M{_points(across(x), up(y))}"/>')
        if len(x) <= 40:
            parts.append(_circles(across(x), up(y), line.style))
    return "".join(parts) + "</svg>"


def _circles(x: np.ndarray, y: np.ndarray, colour: int) -> str:
    """Strokes of no length with round ends."""
    dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x.tolist(), y.tolist()))
    return f'<path class="circles c{colour}" d="{dots}"/>'


def _triangles(x: np.ndarray, y: np.ndarray, colour: int) -> str:
    shapes = "".join(f"M{a:.1f} {b - 4:.1f}l3.6 6.4h-7.2z" for a, b in zip(x.tolist(), y.tolist()))
    return f'<path class="triangles c{colour}" d="{shapes}"/>'


def scatter_chart(
    clouds: Sequence[Cloud], names: Sequence[tuple[float, float, str]], *, title: str, x_label: str, y_label: str
) -> str:
    """Clouds of points with the same scale on both axes; ``names`` are texts at places among them."""
    points = np.concatenate([cloud.points for cloud in clouds])
    middle, half = (points.max(0) + points.min(0)) / 2, (points.max(0) - points.min(0)) / 2
    wide, high = (WIDTH - LEFT - RIGHT) / 2, (TALL - TOP - BOTTOM) / 2
    scale = 1.06 * max(half[0] / wide, half[1] / high) or 1.0
    across = Axis(middle[0] - wide * scale, middle[0] + wide * scale, LEFT, WIDTH - RIGHT)
    up = Axis(middle[1] - high * scale, middle[1] + high * scale, TALL - BOTTOM, TOP)
    parts = [_open(title, TALL), _frame(across, up, TALL, x_label, y_label)]
    for cloud in clouds:
        draw = _triangles if cloud.triangle else _circles
        parts.append(draw(across(cloud.points[:, 0]), up(cloud.points[:, 1]), cloud.colour % len(LIGHT)))
    for x, y, name in _apart([(float(across(np.array(a))), float(up(np.array(b))), text) for a, b, text in names]):
        parts.append(f'<text class="halo" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{html.escape(name)}</text>')
    return "".join(parts) + "</svg>"


def _apart(names: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The names, moved down where they would cover one another and sideways where they would leave the frame."""
    placed: list[tuple[float, float, str]] = []
    for x, y, name in sorted(names, key=lambda entry: entry[1]):
        half = 3.7 * len(name)
        x = min(max(x, LEFT + half), WIDTH - RIGHT - half)
        for other_x, other_y, other in placed:
            if abs(x - other_x) < half + 3.7 * len(other) and y - other_y < 13:
                y = other_y + 13
        placed.append((x, min(y, TALL - BOTTOM - 4), name))
    return placed


def key(entries: Sequence[tuple[str, str]]) -> str:
    """A legend below a chart: pairs of a swatch and its text."""
    items = "".join(f"<li>{swatch}{html.escape(text)}</li>" for swatch, text in entries)
    return f'<ul class="key">{items}</ul>'


def _swatch(width: int, inside: str) -> str:
    return f'<svg width="{width}" height="12" viewBox="0 0 {width} 12" aria-hidden="true">{inside}</svg>'


def line_swatch(style: int, dashed: bool) -> str:
    dash = f' stroke-dasharray="{DASHES[style]}"' if DASHES[style] and dashed else ""
    return _swatch(28, f'<path class="line c{style}"{dash} d="M1 6H27"/>')


def class_swatch(kind: str) -> str:
    """The swatch of a ``reference`` or of a ``mark``."""
    return (
        _swatch(28, '<path class="reference" d="M1 6H27"/>')
        if kind == "reference"
        else _swatch(12, '<path class="mark" d="M6 1V11"/>')
    )


def point_swatch(colour: int, triangle: bool) -> str:
    draw = _triangles if triangle else _circles
    return _swatch(12, draw(np.array([6.0]), np.array([6.0]), colour % len(LIGHT)))


def colour_swatch(colour: int) -> str:
    return _swatch(12, f'<rect class="square c{colour % len(LIGHT)}" x="1" y="1" width="10" height="10" rx="2"/>')
