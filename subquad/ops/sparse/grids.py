"""Rules on grids of one to three axes, tokens in row-major order: Neighborhood (NATTEN) and Circle (CLEAR).

A range of positions is planned by the box of coordinates that encloses it: exact along the axis on which its ends differ,
and whole on the axes behind it. Every function takes integers and tensors alike.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import isqrt, prod
from operator import and_
from typing import Any

Range = tuple[Any, Any]  # first and last coordinate
Box = list[Range]  # one an axis
Coordinates = list[Any]


def least(a: Any, b: Any) -> Any:
    return a - (a - b) * (a > b)


def most(a: Any, b: Any) -> Any:
    return a + (b - a) * (b > a)


def unravel(grid: tuple[int, ...], p: Any) -> list[Any]:
    """The coordinates of position p, one an axis; positions outside of the grid have a first coordinate outside."""
    strides = [prod(grid[axis + 1 :]) for axis in range(len(grid))]
    return [p // s if axis == 0 else p // s % size for axis, (s, size) in enumerate(zip(strides, grid))]


def box(grid: tuple[int, ...], p0: Any, p1: Any) -> Box:
    """The smallest box that surely encloses the positions p0 … p1."""
    first = prod(grid[1:])
    ranges: Box = [(p0 // first, p1 // first)]  # outside of the grid for positions outside of it
    for axis, size in list(enumerate(grid))[1:]:
        inner = prod(grid[axis + 1 :])
        same = p0 // (inner * size) == p1 // (inner * size)
        ranges.append((p0 // inner % size * same, p1 // inner % size * same + (size - 1) * (same == 0)))
    return ranges


def runs(grid: tuple[int, ...], ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A box as runs of positions (start, stop)."""
    if any(a > b for a, b in ranges):
        return []
    axis = len(grid) - 1
    while axis and ranges[axis] == (0, grid[axis] - 1):
        axis -= 1
    inner = prod(grid[axis + 1 :])
    a, b = ranges[axis]
    found = []
    for outer in product(*(range(lo, hi + 1) for lo, hi in ranges[:axis])):
        at = reduce(lambda p, step: p * step[1] + step[0], zip(outer, grid), 0) * grid[axis]
        found.append(((at + a) * inner, (at + b + 1) * inner))
    return found


def cuts_of(grid: tuple[int, ...], found: list[tuple[int, int]]) -> set[int]:
    """The ends of runs, and of the lines and planes they lie in: a piece between runs then has an exact box, and is left out."""
    units = [prod(grid[axis:]) for axis in range(1, len(grid))]
    lines = {x for a, b in found for unit in units for x in (a // unit * unit, -(-b // unit) * unit)}
    return lines | {x for run in found for x in run}


@dataclass(frozen=True)
class Neighborhood:
    """On every axis a query sees the `window` keys nearest to the leader of its stride group; all axes must agree.

    With dilation d only the keys of its own residue mod d count, on which everything else is defined. Windows slide inwards
    at the borders, so that every query sees the same number of keys; an even window reaches one further to the left. A causal
    axis shows the keys up to the query's own, from the window of the last query of its group on.

    Hassani et al.: Generalized Neighborhood Attention (arXiv 2504.16922); Faster Neighborhood Attention (arXiv 2403.04690).
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @property
    def words(self) -> str:
        shape, sides = (" x ".join(map(str, x)) for x in (self.window, self.grid))
        extra = [f"{name} {' x '.join(map(str, x))}" for name, x in (("stride", self.stride), ("dilation", self.dilation)) if set(x) != {1}]
        extra += ["causal along axis " + ", ".join(str(i) for i, c in enumerate(self.causal) if c)] if any(self.causal) else []
        return ", ".join([f"the {shape} nearest positions on the grid {sides}", *extra])

    def allowed(self, q: Any, k: Any) -> Any:
        return self.seen(unravel(self.grid, q), unravel(self.grid, k))

    def seen(self, q: Coordinates, k: Coordinates) -> Any:
        found = []
        for axis, (i, j) in enumerate(zip(q, k)):
            d = self.dilation[axis]
            first, last = self.along(axis, i // d, (self.grid[axis] - i % d + d - 1) // d)
            seen = (j >= i % d + d * first) & (j <= i % d + d * last)
            found.append(seen if d == 1 else seen & (j % d == i % d))
        return reduce(and_, found)

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return self.touches_box(box(self.grid, q0, q1), box(self.grid, k0, k1)) & (q0 <= q1) & (k0 <= k1)

    def touches_box(self, q: Box, k: Box) -> Any:
        return reduce(and_, ((a <= d) & (b >= c) for (a, b), (c, d) in zip(self._outer(q), k)))

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return self.covers_box(box(self.grid, q0, q1), box(self.grid, k0, k1))

    def covers_box(self, q: Box, k: Box) -> Any:
        return reduce(and_, ((a <= c) & (b >= d) for (a, b), (c, d) in zip(self._inner(q), k)))

    def span(self, axis: int) -> int:
        """Keys from the first to the last that a query sees on an axis."""
        return (self.window[axis] - 1) * self.dilation[axis] + 1

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        q = box(self.grid, q0, q1)
        inner = runs(self.grid, self._inner(q)) if len(self.grid) == 1 else []
        return tuple(cuts_of(self.grid, runs(self.grid, self._outer(q)) + inner))

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        return None

    def along(self, axis: int, j: Any, size: Any) -> Range:
        """First and last key of query j on one axis of `size` positions, all counted within a residue class."""
        window, stride = self.window[axis], self.stride[axis]
        if self.causal[axis]:
            leader = least(j // stride * stride + stride - 1, size - 1)
            return most(leader - window + 1, 0), j
        leader = least(j // stride * stride + stride // 2, size - 1)
        first = least(most(leader - window // 2, 0), size - window)
        return first, first + window - 1

    def _outer(self, q: Box) -> Box:
        """A box that encloses every key that the queries of a box see."""
        ranges: Box = []
        for axis, (x0, x1) in enumerate(q):
            size, d = self.grid[axis], self.dilation[axis]
            # starts and ends never fall with j nor with the length of the class: the least and greatest of both bound all
            first = self.along(axis, x0 // d, size // d)[0]
            last = self.along(axis, x1 // d, -(-size // d))[1]
            ranges.append((d * first, least(d * last + d - 1, size - 1)))
        return ranges

    def _inner(self, q: Box) -> Box:
        """A box of keys that all of the queries of a box see; empty under dilation."""
        ranges: Box = []
        for axis, (x0, x1) in enumerate(q):
            if self.dilation[axis] > 1:
                ranges.append((x0 - x0 + 1, x0 - x0))
                continue
            ranges.append((self.along(axis, x1, self.grid[axis])[0], self.along(axis, x0, self.grid[axis])[1]))
        return ranges


@dataclass(frozen=True)
class Circle:
    """A query sees the keys on its grid whose squared Euclidean distance is at most `limit`; nothing is shifted at borders.

    Liu, Tan, Wang: CLEAR (arXiv 2412.16112), where the distance is below the radius r: limit = ⌈r²⌉ − 1.
    """

    grid: tuple[int, ...]
    limit: int

    @property
    def words(self) -> str:
        return f"the keys at a squared distance of at most {self.limit} on the grid {' x '.join(map(str, self.grid))}"

    def allowed(self, q: Any, k: Any) -> Any:
        return self.seen(unravel(self.grid, q), unravel(self.grid, k))

    def seen(self, q: Coordinates, k: Coordinates) -> Any:
        return sum((i - j) * (i - j) for i, j in zip(q, k)) <= self.limit

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return self.touches_box(box(self.grid, q0, q1), box(self.grid, k0, k1)) & (q0 <= q1) & (k0 <= k1)

    def touches_box(self, q: Box, k: Box) -> Any:
        gaps = [most(most(c - b, a - d), 0) for (a, b), (c, d) in zip(q, k)]
        return sum(gap * gap for gap in gaps) <= self.limit

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return self.covers_box(box(self.grid, q0, q1), box(self.grid, k0, k1))

    def covers_box(self, q: Box, k: Box) -> Any:
        gaps = [most(d - a, b - c) for (a, b), (c, d) in zip(q, k)]
        return sum(gap * gap for gap in gaps) <= self.limit

    def span(self, axis: int) -> int:
        """Keys from the first to the last that a query sees on an axis."""
        return 2 * isqrt(self.limit) + 1

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        reach = isqrt(self.limit)
        near = [(max(a - reach, 0), min(b + reach, size - 1)) for (a, b), size in zip(box(self.grid, q0, q1), self.grid)]
        return tuple(cuts_of(self.grid, runs(self.grid, near)))

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        return None


def grid_of(rule: Any) -> tuple[int, ...] | None:
    """The grid of a rule that answers for coordinates and boxes too (by `seen`, `touches_box`, `covers_box`, `span`); else None."""
    return getattr(rule, "grid", None)


__all__ = ["Box", "Circle", "Coordinates", "Neighborhood", "box", "cuts_of", "grid_of", "least", "most", "runs", "unravel"]
