"""Small plots as SVG text: lines and dots, with colours from CSS variables, so that they follow light and dark pages.

Nothing is drawn by a library and nothing is fetched: a page that holds these needs nothing else. They are laid out
420 units wide, which keeps their text readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

COLORS = 9
STYLE = """
:root { color-scheme: light dark; --ink:#1c2430; --soft:#5b6675; --grid:#dfe4ea; --paper:#ffffff; --panel:#f6f8fa;
  --c0:#30363f; --c1:#0b6bcb; --c2:#c2410c; --c3:#15803d; --c4:#7e22ce; --c5:#b8860b; --c6:#be185d; --c7:#0e7490;
  --c8:#4d7c0f; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6eaf0; --soft:#9aa5b4; --grid:#323a46; --paper:#12161c; --panel:#1a2029;
  --c0:#d5dbe4; --c1:#5aa9f8; --c2:#f59e6c; --c3:#5fd08a; --c4:#c08bf5; --c5:#e3c04d; --c6:#f279ae; --c7:#4cc4dd;
  --c8:#a3d65c; } }
svg.plot { width:100%; height:auto; font:12px system-ui,sans-serif; }
svg.plot text { fill:var(--soft); } svg.plot text.strong { fill:var(--ink); }
svg.plot .grid { stroke:var(--grid); stroke-width:1; } svg.plot .line { fill:none; stroke-width:2; }
svg.plot .unmeasured { stroke-dasharray:2 4; }
"""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 260, 64, 14, 12, 40
_MARKS = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Series:
    """A named line. Points past `measured` (an x) are drawn dotted: they are computed, not measured."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int
    measured: float = math.inf


@dataclass(frozen=True)
class Axis:
    """One axis: its label, whether it is logarithmic (and in which base its ticks stand) or begins at zero, and how a
    value is written."""

    label: str
    log: float | None = None
    zero: bool = False
    text: Callable[[float], str] = lambda value: f"{value:g}"

    def ticks(self, low: float, high: float) -> list[float]:
        """At most six round values that cover low … high."""
        if self.log is not None:
            first, last = math.floor(math.log(low, self.log) + 1e-9), math.ceil(math.log(high, self.log) - 1e-9)
            step = max(1, math.ceil((last - first) / 5))
            return [self.log**power for power in range(first, max(last, first + 1) + step, step)]
        low = min(low, 0.0) if self.zero else low
        width = _round_step((high - low) / 4 or abs(high) / 4 or 1.0)
        first, last = math.floor(low / width + 1e-9), math.ceil(high / width - 1e-9)
        return [index * width for index in range(first, max(last, first + 1) + 1)]

    def place(self, value: float, ticks: Sequence[float]) -> float:
        """0 … 1 between the first and the last tick."""
        low, high, at = ticks[0], ticks[-1], value
        if self.log is not None:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low) if high > low else 0.5


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))


def color(index: int) -> str:
    return f"var(--c{index % COLORS})"


def _mark(kind: int, x: float, y: float, fill: str, title: str) -> str:
    tip = f"<title>{escape(title)}</title>"
    name = _MARKS[kind % len(_MARKS)]
    if name == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}">{tip}</circle>'
    corners = {
        "square": ((-3, -3), (3, -3), (3, 3), (-3, 3)), "diamond": ((0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0)),
        "triangle": ((0, -4), (4, 3), (-4, 3)),
    }[name]  # fmt: skip
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}" fill="{fill}">{tip}</polygon>'


def _open(title: str, height: float) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {height:g}" role="img" xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
    )


def lines(title: str, series: Sequence[Series], x: Axis, y: Axis, *, marks: bool = True) -> str:
    """Lines over common axes, as one `<svg>`; series without points are left out."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs = [p[0] for one in series for p in one.points]
    ys = [p[1] for one in series for p in one.points]
    x_ticks, y_ticks = x.ticks(min(xs), max(xs)), y.ticks(min(ys), max(ys))
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return _LEFT + wide * x.place(point[0], x_ticks), _TOP + high * (1 - y.place(point[1], y_ticks))

    parts = [_open(title, _HEIGHT)]
    for tick in y_ticks:
        row = at((x_ticks[0], tick))[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{row + 4:.1f}" text-anchor="end">{escape(y.text(tick))}</text>')
    for tick in x_ticks:
        column = at((tick, y_ticks[0]))[0]
        parts.append(f'<text x="{column:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(x.text(tick))}</text>')
    parts.append(f'<text x="{_LEFT + wide / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    for number, one in enumerate(series):
        shown = [p for p in one.points if p[0] <= one.measured]
        rest = [*shown[-1:], *(p for p in one.points if p[0] > one.measured)]
        for points, extra in ((shown, ""), (rest, " unmeasured")):
            if len(points) > 1:
                path = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(at, points))
                parts.append(f'<polyline class="line{extra}" stroke="{color(one.color)}" points="{path}"/>')
        if marks or len(one.points) == 1:
            parts += [_mark(number, *at(p), color(one.color), f"{one.name}: {x.text(p[0])}, {y.text(p[1])}") for p in one.points]
    return "".join(parts) + "</svg>"


@dataclass(frozen=True)
class Dot:
    name: str
    value: float
    text: str
    color: int


def dots(title: str, items: Sequence[Dot], axis: Axis) -> str:
    """One row a value, each a dot on a common axis with its name above it: reads on narrow screens."""
    if not items:
        return ""
    ticks = axis.ticks(min(i.value for i in items), max(i.value for i in items))
    height, wide = 44 * len(items) + 42, _WIDTH - 60
    parts = [_open(title, height)]
    for tick in ticks:
        column = 10 + wide * axis.place(tick, ticks)
        parts.append(f'<line class="grid" x1="{column:.1f}" x2="{column:.1f}" y1="4" y2="{height - 36}"/>')
        parts.append(f'<text x="{column:.1f}" y="{height - 22}" text-anchor="middle">{escape(axis.text(tick))}</text>')
    for number, item in enumerate(items):
        row, column = 44 * number + 30, 10 + wide * axis.place(item.value, ticks)
        parts.append(f'<text class="strong" x="10" y="{row - 12}">{escape(item.name)}</text>')
        parts.append(f'<line x1="10" x2="{column:.1f}" y1="{row}" y2="{row}" stroke="{color(item.color)}" stroke-width="2"/>')
        parts.append(_mark(0, column, row, color(item.color), f"{item.name}: {item.text}"))
        parts.append(f'<text class="strong" x="{column + 8:.1f}" y="{row + 4}">{escape(item.text)}</text>')
    parts.append(f'<text x="{10 + wide / 2:.1f}" y="{height - 5}" text-anchor="middle">{escape(axis.label)}</text>')
    return "".join(parts) + "</svg>"


def legend(names: Sequence[tuple[str, int]]) -> str:
    """A row of colour swatches, as HTML."""
    return '<p class="legend">' + "".join(f'<span><i style="background:{color(c)}"></i>{escape(n)}</span>' for n, c in names) + "</p>"
