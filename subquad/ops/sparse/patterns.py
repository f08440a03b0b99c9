"""Rules of the long-context mechanisms, and what joins rules: Band, Globals, Strided, Power, Joint, Union, Intersection.

The words position and block mean the same throughout: block = position div `block`. See `rules` for what a rule answers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from typing import Any, ClassVar

from subquad.ops.sparse.grids import Box, Coordinates
from subquad.ops.sparse.rules import Rule

POWERS = 31  # positions are below 2^31


@dataclass(frozen=True)
class Band:
    """A query at position q sees the keys q − left … q + right (Longformer's sliding window)."""

    left: int
    right: int

    @property
    def words(self) -> str:
        return f"the {self.left} keys before its own position, its own, and the {self.right} after"

    def allowed(self, q: Any, k: Any) -> Any:
        return (k >= q - self.left) & (k <= q + self.right)

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (k0 <= k1) & (k1 >= q0 - self.left) & (k0 <= q1 + self.right)

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (k0 >= q1 - self.left) & (k1 <= q0 + self.right)

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        return (q0 - self.left, q1 - self.left, q0 + self.right + 1, q1 + self.right + 1)

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        return k0 - q0


@dataclass(frozen=True)
class Globals:
    """The first `count` positions see every key, and every query sees them."""

    count: int

    @property
    def words(self) -> str:
        return f"the {self.count} global keys (and every key, if it is global itself)"

    def allowed(self, q: Any, k: Any) -> Any:
        return (k < self.count) | (q < self.count)

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (k0 <= k1) & ((k0 < self.count) | (q0 < self.count))

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (k1 < self.count) | (q1 < self.count)

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        return (self.count,)

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        return max(self.count - q0, 0), k1 < self.count


@dataclass(frozen=True)
class Strided:
    """A query sees, up to its own position, its own block and the local − 1 before it, and every stride-th block.

    Key block j is one of the latter if (j + offset) mod stride = 0: columns that all queries share (S2-Attention).
    """

    block: int
    local: int
    stride: int
    offset: int = 0

    @property
    def words(self) -> str:
        blocks = f"the last {self.local} blocks of {self.block}"
        return f"{blocks} and every {self.stride}th block (those j with (j + {self.offset}) mod {self.stride} = 0), up to its own position"

    def allowed(self, q: Any, k: Any) -> Any:
        column = (k // self.block + self.offset) % self.stride == 0
        return (k <= q) & ((k // self.block > q // self.block - self.local) | column)

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        a, b = k0 // self.block + self.offset, k1 // self.block + self.offset
        column = b // self.stride > (a - 1) // self.stride
        return (k0 <= q1) & (k0 <= k1) & ((k1 // self.block > q0 // self.block - self.local) | column)

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        a, b = k0 // self.block, k1 // self.block
        column = (a == b) & ((a + self.offset) % self.stride == 0)
        return (k1 <= q0) & ((a > q1 // self.block - self.local) | column | (self.stride == 1))

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        local = [(q // self.block - self.local + 1) * self.block for q in (q0, q1)]
        first = -self.offset % self.stride
        columns = [j * self.block for j in range(first, q1 // self.block + 1, self.stride)] if self.stride > 1 else []
        return (*local, q0 + 1, q1 + 1, *columns, *(c + self.block for c in columns))

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        return k0 - q0, q0 % (self.block * self.stride)


@dataclass(frozen=True)
class Power:
    """A query sees, up to its own position, the blocks at distance 0 … local − 1 or a power of two, and the first `sinks` blocks.

    After d such layers it has reached every block at a distance below 2^d (PowerAttention).
    """

    block: int
    local: int
    sinks: int = 0

    @property
    def words(self) -> str:
        near = f"the last {self.local} blocks of {self.block}, those at a distance of a power of two"
        return near + (f", and the first {self.sinks}" if self.sinks else "") + ", up to its own position"

    def allowed(self, q: Any, k: Any) -> Any:
        away = q // self.block - k // self.block
        near = (away < self.local) | (k < self.sinks * self.block)
        return (k <= q) & (near | ((away > 0) & (away & (away - 1) == 0)))

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        low, high = q0 // self.block - k1 // self.block, q1 // self.block - k0 // self.block
        power = reduce(or_, ((low <= 1 << i) & (high >= 1 << i) for i in range(POWERS)))
        return (k0 <= q1) & (k0 <= k1) & ((low < self.local) | (k0 < self.sinks * self.block) | power)

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        low, high = q0 // self.block - k1 // self.block, q1 // self.block - k0 // self.block
        power = (low == high) & (low > 0) & (low & (low - 1) == 0)
        return (k1 <= q0) & ((high < self.local) | (k1 < self.sinks * self.block) | power)

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        found = {self.sinks * self.block, q0 + 1, q1 + 1, *((q // self.block - self.local + 1) * self.block for q in (q0, q1))}
        for row in range(q0 // self.block, q1 // self.block + 1):
            for i in range(row.bit_length()):
                found |= {(row - (1 << i)) * self.block, (row - (1 << i) + 1) * self.block}
        return tuple(found)

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        return k0 - q0, q0 % self.block, k1 < self.sinks * self.block


@dataclass(frozen=True)
class Listed:
    """Within the blocks of a list, what its bitmaps or its runs of keys name: the rule of layouts that hold either."""

    words = "the keys that its lists name"

    def allowed(self, q: Any, k: Any) -> Any:
        return (q == q) & (k == k)

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (q0 <= q1) & (k0 <= k1)

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (q0 != q0) & (k0 != k0)

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        return ()

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        return None


@dataclass(frozen=True)
class Joint:
    """Tokens of two kinds in one sequence: `size` from position `start` on see each other by the rule `inner`, and all the rest,
    which see all (an image among text: CLEAR). The rule's positions count from `start`.
    """

    inner: Rule
    start: int
    size: int

    @property
    def words(self) -> str:
        inside = f"{self.start} … {self.start + self.size - 1}"
        return f"the keys outside of {inside} (every key, if it is outside itself), and inside {self.inner.words}"

    def allowed(self, q: Any, k: Any) -> Any:
        return self._some(q, q) | self._some(k, k) | self.inner.allowed(q - self.start, k - self.start)

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        inner = self.inner.touches(*(x - self.start for x in (q0, q1, k0, k1)))
        return (q0 <= q1) & (k0 <= k1) & (self._some(q0, q1) | self._some(k0, k1) | inner)

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        inner = self.inner.covers(*(x - self.start for x in (q0, q1, k0, k1)))
        among = (self._some(q0, q1) == 0) & (self._some(k0, k1) == 0) & inner
        return among | self._none(q0, q1) | self._none(k0, k1)

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        first, last = max(q0 - self.start, 0), min(q1 - self.start, self.size - 1)
        inner = self.inner.cuts(first, last) if first <= last else ()
        return (self.start, self.start + self.size, *(self.start + cut for cut in inner))

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        return None

    def _some(self, first: Any, last: Any) -> Any:
        """Whether some position of first … last is outside."""
        return (first < self.start) | (last >= self.start + self.size)

    def _none(self, first: Any, last: Any) -> Any:
        """Whether none of first … last is inside."""
        return (last < self.start) | (first >= self.start + self.size)


@dataclass(frozen=True)
class _Joined:
    rules: tuple[Rule, ...]
    by: ClassVar[Callable[[Any, Any], Any]]  # how two answers join

    def allowed(self, q: Any, k: Any) -> Any:
        return self._of_all("allowed", q, k)

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return self._of_all("touches", q0, q1, k0, k1)

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return self._of_all("covers", q0, q1, k0, k1)

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        return tuple({c for rule in self.rules for c in rule.cuts(q0, q1)})

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        parts = tuple(rule.pattern(q0, k0, k1) for rule in self.rules)
        return None if None in parts else parts

    @property
    def grid(self) -> tuple[int, ...] | None:
        """The grid that all of the rules stand on, if they do."""
        grids = {getattr(rule, "grid", None) for rule in self.rules}
        return grids.pop() if len(grids) == 1 else None

    def seen(self, q: Coordinates, k: Coordinates) -> Any:
        return self._of_all("seen", q, k)

    def touches_box(self, q: Box, k: Box) -> Any:
        return self._of_all("touches_box", q, k)

    def covers_box(self, q: Box, k: Box) -> Any:
        return self._of_all("covers_box", q, k)

    def span(self, axis: int) -> int:
        return max(rule.span(axis) for rule in self.rules)  # type: ignore[attr-defined]

    def _of_all(self, name: str, *ranges: Any) -> Any:
        return reduce(type(self).by, (getattr(rule, name)(*ranges) for rule in self.rules))


@dataclass(frozen=True)
class Union(_Joined):
    """A query sees what it sees by some of the rules."""

    by = or_

    @property
    def words(self) -> str:
        return "; or ".join(rule.words for rule in self.rules)


@dataclass(frozen=True)
class Intersection(_Joined):
    """A query sees what it sees by all of the rules."""

    by = and_

    @property
    def words(self) -> str:
        return "; and of these only ".join(rule.words for rule in self.rules)


def join(kind: type[Union] | type[Intersection], *rules: Rule) -> Rule:
    """One rule out of several: nested ones of the same kind are opened, equal ones kept once."""
    flat: dict[Rule, None] = {}
    for rule in rules:
        flat.update(dict.fromkeys(rule.rules if isinstance(rule, kind) else (rule,)))
    return next(iter(flat)) if len(flat) == 1 else kind(tuple(flat))
