"""What neighbourhood attention can gain on tiles: which key tiles each query tile visits, counted axis by axis.

A kernel works on tiles: boxes of t_q queries against boxes of t_k keys. On one axis, windows begin and end in the order of
their queries, so that the queries i0 … i1 of a tile visit exactly the key tiles a(i0) div t_k … b(i1) div t_k, where a(i) and
b(i) are the first and last key of query i; those inside a(i1) … b(i0) are seen whole, and the others need a mask. On a grid
all three are products over the axes. Under dilation each residue class has tiles of its own.

    ideal      N² / pairs seen                                    what the definition saves
    reachable  N² / (visited tiles · T_q · T_k)                   what is left on tiles, padding at the grid's ends included
    bound      all key tiles / key tiles of the busiest query tile    the figure that the paper gives

Hassani et al.: Generalized Neighborhood Attention (arXiv 2504.16922), their simulator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from math import prod

import numpy as np

from subquad.bench.progress import Advance, bar
from subquad.checks import InputError
from subquad.ops.sparse.grids import Neighborhood

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """What there is to know of one axis: its side, window, stride, dilation, causal flag, tiles, and how key tiles are laid."""

    side: int
    window: int
    stride: int
    dilation: int
    causal: bool
    tile_q: int
    tile_k: int
    dynamic: bool

    def visits(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """For each residue class: of every query tile the first and last key tile it visits, the first and last it sees whole, and
        of every query the number of its keys.

        Dynamic key tiles begin at the first key of each query tile, and are numbered from there.
        """
        rule = Neighborhood((self.side,), (self.window,), (self.stride,), (self.dilation,), (self.causal,))
        for residue in range(self.dilation):
            size = -(-(self.side - residue) // self.dilation)
            j = np.arange(size)
            start, end = (np.broadcast_to(x, j.shape) for x in rule.along(0, j, size))
            i0 = np.arange(0, size, self.tile_q)
            i1 = np.minimum(i0 + self.tile_q, size) - 1
            a, b = start[i0], end[i1]
            origin, border = (a, b) if self.dynamic else (0 * a, 0 * a + size - 1)  # the last tile is cropped at the border
            whole = -(-(start[i1] - origin) // self.tile_k)
            until = np.where(end[i0] == border, (border - origin) // self.tile_k, (end[i0] + 1 - origin) // self.tile_k - 1)
            yield (a - origin) // self.tile_k, (b - origin) // self.tile_k, whole, until, end - start + 1


@dataclass(frozen=True)
class Count:
    """Tiles along one axis, all residue classes together.

    Args:
        all_k: key tiles of the undilated axis, as dense attention has them.
        visited, full: pairs of tiles that are computed, and those in which every real query sees every real key.
        worst: key tiles of the query tile that visits most.
        pairs: pairs of a query and a key that it sees.
    """

    all_k: int
    visited: int
    full: int
    worst: int
    pairs: int


@lru_cache(maxsize=1 << 16)
def count(axis: Axis) -> Count:
    visited = full = worst = pairs = 0
    for first, last, whole, until, keys in axis.visits():
        visited += int((last - first + 1).sum())
        worst = max(worst, int((last - first + 1).max(initial=0)))
        full += int(np.maximum(until - whole + 1, 0).sum())
        pairs += int(keys.sum())
    return Count(-(-axis.side // axis.tile_k), visited, full, worst, pairs)


def axis_of(rule: Neighborhood, i: int, stride: int, tile_q: int, tile_k: int, dynamic: bool) -> Axis:
    return Axis(rule.grid[i], rule.window[i], stride, rule.dilation[i], rule.causal[i], tile_q, tile_k, dynamic)


@dataclass(frozen=True)
class Tiling:
    """Neighbourhood attention on tiles of certain shapes, and what that costs.

    >>> rule = Layout.neighborhood((30, 48, 80), (18, 24, 24), stride=(16, 8, 8)).rule
    >>> Tiling(rule, (4, 8, 8), (2, 8, 8)).bound                                        # 900 key tiles, 81 of them visited
    11.11…

    Args:
        rule: of `Layout.neighborhood`.
        tile_q, tile_k: sides of the query and key tiles, one an axis.
        dynamic: key tiles begin at the first key of each query tile, instead of on a fixed grid.

    Raises:
        InputError: a rule of another kind, or tiles of another number of axes.
    """

    rule: Neighborhood
    tile_q: Shape
    tile_k: Shape
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Neighborhood):
            raise InputError("rule", type(self.rule).__name__, "the rule of Layout.neighborhood")
        for name, tile in (("tile_q", self.tile_q), ("tile_k", self.tile_k)):
            if len(tile) != len(self.rule.grid) or min(tile) < 1:
                raise InputError(name, tile, f"{len(self.rule.grid)} positive integers, as many as the grid has axes")

    @property
    def axes(self) -> list[Axis]:
        return [axis_of(self.rule, i, self.rule.stride[i], q, k, self.dynamic) for i, (q, k) in enumerate(zip(self.tile_q, self.tile_k))]

    @cached_property
    def counts(self) -> list[Count]:
        return [count(axis) for axis in self.axes]

    @property
    def tokens(self) -> int:
        return prod(self.rule.grid)

    @property
    def density(self) -> float:
        """The share of all pairs that is seen."""
        return prod(x.pairs for x in self.counts) / self.tokens**2

    @property
    def ideal(self) -> float:
        return self.tokens**2 / prod(x.pairs for x in self.counts)

    @property
    def visited(self) -> int:
        """Pairs of a query tile and a key tile that are computed."""
        return prod(x.visited for x in self.counts)

    @property
    def worst(self) -> int:
        """Key tiles of the query tile that visits most."""
        return prod(x.worst for x in self.counts)

    @property
    def partial(self) -> float:
        """The share of the visited tiles that need a mask."""
        return 1 - prod(x.full for x in self.counts) / self.visited

    @property
    def reachable(self) -> float:
        return self.tokens**2 / (self.visited * prod(self.tile_q) * prod(self.tile_k))

    @property
    def bound(self) -> float:
        return prod(x.all_k for x in self.counts) / self.worst

    @property
    def shared(self) -> int:
        """Queries that share one window: the product of the strides."""
        return prod(self.rule.stride)

    def end_to_end(self, share: float) -> float:
        """What `bound` makes of a whole model in which attention takes that share of the time (Amdahl)."""
        return 1 / (1 - share + share / self.bound)


def shapes_of(tokens: int, grid: Sequence[int]) -> list[Shape]:
    """All boxes of that many tokens on a grid, without those of which half would still reach over an axis."""
    sides = [[t for t in range(1, min(tokens, 2 * side - 1) + 1) if tokens % t == 0] for side in grid]
    return [shape for shape in product(*sides) if prod(shape) == tokens]


def ranked(
    rule: Neighborhood, tiles_q: Sequence[Shape], tiles_k: Sequence[Shape], *, dynamic: bool = False, progress: bool = False
) -> list[Tiling]:
    """Every pair of tile shapes, the greatest reachable speed-up first, then the fewest partial tiles."""
    found = [Tiling(rule, q, k, dynamic) for q, k in product(tiles_q, tiles_k)]
    with bar("tiles", len(found), show=progress) as advance:
        for one in found:
            _ = one.counts
            advance()
    return sorted(found, key=lambda x: (-x.reachable, x.partial, -x.bound, x.tile_q, x.tile_k))


def frontier(
    rule: Neighborhood, tiles_q: Sequence[Shape], tiles_k: Sequence[Shape], *, dynamic: bool = False, progress: bool = False
) -> list[Tiling]:
    """Over all strides and tiles: those that no stride with as few or fewer queries to a window reaches, few queries first."""
    best: dict[Shape, Tiling] = {}
    with bar("strides", len(tiles_q) * len(tiles_k) * sum(rule.window), show=progress) as advance:
        for q, k in product(tiles_q, tiles_k):
            useful = [_useful(rule, i, q[i], k[i], dynamic, advance) for i in range(len(rule.grid))]
            for stride in product(*useful):
                one = Tiling(replace(rule, stride=stride), q, k, dynamic)
                if stride not in best or _order(one) < _order(best[stride]):
                    best[stride] = one
    kept: list[Tiling] = []
    for one in sorted(best.values(), key=lambda x: (x.shared, *_order(x), x.rule.stride)):
        if not kept or one.reachable > kept[-1].reachable * (1 + 1e-12):
            kept.append(one)
    return kept


def _order(x: Tiling) -> tuple[float, float]:
    return -x.reachable, x.partial


def _useful(rule: Neighborhood, i: int, tile_q: int, tile_k: int, dynamic: bool, advance: Advance) -> list[int]:
    """The strides of an axis that visit fewer tiles than every smaller one: tiles multiply over the axes, so others gain nothing."""
    kept: list[int] = []
    least = None
    for stride in range(1, rule.window[i] + 1):
        visited = count(axis_of(rule, i, stride, tile_q, tile_k, dynamic)).visited
        if least is None or visited < least:
            least = visited
            kept.append(stride)
        advance()
    return kept


__all__ = ["Axis", "Count", "Tiling", "count", "frontier", "ranked", "shapes_of"]
